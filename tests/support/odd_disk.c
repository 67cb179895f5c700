/* A disk that misbehaves, for one folder of one process: preloaded, it stands between libc and kernel.

   ODD_STATE    the folder
   ODD_CONTROL  a file that holds a word, read anew at each call: "eio", "erofs" and "enospc" fail
                what writes, "slow" lets each sync take five seconds; anything else: a good disk
   ODD_SHADOW   a copy of the folder that holds only what was synced: content by the sync of the file,
                names by the sync of their folder. Power is cut by killing and going on with it. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* The path below ODD_STATE, or NULL for a descriptor of something else. */
static const char *inside(int fd, char *buffer) {
    const char *state = getenv("ODD_STATE");
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, buffer, PATH_MAX - 1);
    if (state == NULL || length < 0) return NULL;
    buffer[length] = 0;
    size_t prefix = strlen(state);
    if (strncmp(buffer, state, prefix) || (buffer[prefix] && buffer[prefix] != '/')) return NULL;
    return buffer + prefix;
}

static int told(const char *word) {
    const char *path = getenv("ODD_CONTROL");
    char text[16] = "";
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return 0;
    ssize_t length = read(fd, text, sizeof text - 1);
    close(fd);
    return length > 0 && !strncmp(text, word, strlen(word));
}

static int fails(int fd) {
    char path[PATH_MAX];
    int kept = errno;
    if (inside(fd, path) == NULL) { errno = kept; return 0; }
    int found = told("eio") ? EIO : told("erofs") ? EROFS : told("enospc") ? ENOSPC : 0;
    errno = found ? found : kept;
    return found;
}

/* Replaces `to` in one instant, so that a kill in between leaves the old content. */
static void copy(const char *from, const char *to) {
    char draft[2 * PATH_MAX], block[65536];
    snprintf(draft, sizeof draft, "%s.%d.draft", to, getpid());
    int in = open(from, O_RDONLY | O_CLOEXEC);
    int out = open(draft, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    ssize_t length;
    while (in >= 0 && (length = read(in, block, sizeof block)) > 0)
        if (REAL(write)(out, block, length) < 0) break;
    if (in >= 0) close(in);
    close(out);
    rename(draft, to);
}

static void waiting(char *to, ino_t number) {
    snprintf(to, PATH_MAX, "%s.waiting/%lu", getenv("ODD_SHADOW"), (unsigned long)number);
}

static void synced_file(const char *path, const char *below, ino_t number) {
    char to[PATH_MAX], aside[PATH_MAX];
    snprintf(to, sizeof to, "%s%s", getenv("ODD_SHADOW"), below);
    waiting(aside, number);
    copy(path, access(to, F_OK) ? aside : to);
}

static void synced_folder(const char *path, const char *below) {
    char to[PATH_MAX], from[2 * PATH_MAX], name[2 * PATH_MAX], aside[PATH_MAX];
    struct dirent *entry;
    struct stat found;
    snprintf(to, sizeof to, "%s%s", getenv("ODD_SHADOW"), below);
    mkdir(to, 0700);
    DIR *folder = opendir(path);
    while (folder && (entry = readdir(folder))) {
        if (entry->d_name[0] == '.' && (!entry->d_name[1] || entry->d_name[1] == '.')) continue;
        snprintf(name, sizeof name, "%s/%s", to, entry->d_name);
        snprintf(from, sizeof from, "%s/%s", path, entry->d_name);
        if (lstat(from, &found) || !access(name, F_OK)) continue;
        if (S_ISDIR(found.st_mode)) { mkdir(name, 0700); continue; }
        waiting(aside, found.st_ino);
        if (rename(aside, name)) close(open(name, O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
    }
    if (folder) closedir(folder);
    folder = opendir(to);
    while (folder && (entry = readdir(folder))) {
        if (strstr(entry->d_name, ".draft")) continue;
        snprintf(from, sizeof from, "%s/%s", path, entry->d_name);
        snprintf(name, sizeof name, "%s/%s", to, entry->d_name);
        if (access(from, F_OK)) unlink(name);
    }
    if (folder) closedir(folder);
}

static void synced(int fd) {
    char path[PATH_MAX], lock[PATH_MAX];
    const char *below = inside(fd, path), *shadow = getenv("ODD_SHADOW");
    struct stat found;
    if (below == NULL || shadow == NULL || fstat(fd, &found)) return;
    snprintf(lock, sizeof lock, "%s.lock", shadow);
    int guard = open(lock, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    flock(guard, LOCK_EX);
    if (S_ISDIR(found.st_mode)) synced_folder(path, below);
    else synced_file(path, below, found.st_ino);
    close(guard);
}

static int sync_with(int fd, int (*real)(int)) {
    char path[PATH_MAX];
    if (fails(fd)) return -1;
    if (inside(fd, path) && told("slow")) sleep(5);
    int done = real(fd), kept = errno;
    if (!done) synced(fd);
    errno = kept;
    return done;
}

int fsync(int fd) { return sync_with(fd, REAL(fsync)); }
int fdatasync(int fd) { return sync_with(fd, REAL(fdatasync)); }
int ftruncate(int fd, off_t n) { return fails(fd) ? -1 : REAL(ftruncate)(fd, n); }
int ftruncate64(int fd, off64_t n) { return fails(fd) ? -1 : REAL(ftruncate64)(fd, n); }
ssize_t write(int fd, const void *b, size_t n) { return fails(fd) ? -1 : REAL(write)(fd, b, n); }
ssize_t pwrite(int fd, const void *b, size_t n, off_t at) {
    return fails(fd) ? -1 : REAL(pwrite)(fd, b, n, at);
}
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t at) {
    return fails(fd) ? -1 : REAL(pwrite64)(fd, b, n, at);
}
