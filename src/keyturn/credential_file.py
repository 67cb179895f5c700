"""Reads files that decide about secrets: those that hold our own credentials, and who can change one."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from keyturn.errors import ConfigError

LONGEST = 64 * 1024
# What systemd hands over by LoadCredential=, and where it does that for our unit (systemd.exec(5)).
HANDED_OVER = "credential:"
CREDENTIALS = "/run/credentials/keyturn.service"
CREDENTIAL_FORM = "an absolute path, or credential:NAME for what systemd hands over"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}", re.ASCII)
Mark = tuple[int, int, int]  # inode, size, instant of the last change

OPEN_TO_OTHERS = 0o037  # a group may read: that is how systemd and Kubernetes hand credentials over
READ_BY_OTHERS = 0o004
MOST_LINKS = 40  # as many as the kernel follows


def credential_path(value: object) -> Path:
    """Read how a file names a credential: an absolute path, or `credential:NAME`.

    The second is a file in the folder that systemd hands over; without `$CREDENTIALS_DIRECTORY`
    that of our unit, so that `check --probe` by root finds it. Raises ValueError.
    """
    text = value if isinstance(value, str) else ""
    if text.startswith("/"):
        return Path(text)
    name = text.removeprefix(HANDED_OVER)
    if name == text or not _NAME.fullmatch(name):
        raise ValueError
    folder = os.environ.get("CREDENTIALS_DIRECTORY", "")
    return Path(folder if folder.startswith("/") else CREDENTIALS, name)


def read_credential(path: Path, *, anybody_may_read: bool = False) -> str:
    """Return the text of a credential file, read anew: it may have been replaced.

    `anybody_may_read` is for the one file that its maker leaves open (see `vault_auth.Kubernetes`);
    nobody else may ever write one.

    Raises ConfigError where it cannot be read, or where others can: what has been readable for
    anybody on this host has to count as known, and whoever can replace it chooses where we log in.
    """
    try:
        with plain_file(path) as (file, found):
            text = file.read(LONGEST).decode()
            changeable = next(changeable_by_others(path, found), None)
    except (OSError, UnicodeDecodeError) as error:
        number = getattr(error, "errno", None)
        raise ConfigError(
            f"{path} cannot be read" + (f" (errno {number})" if number else ""),
            hint="it must be text in a plain file, readable by the daemon's user",
        ) from None
    mode = stat.S_IMODE(found.st_mode)
    if mode & OPEN_TO_OTHERS & ~(READ_BY_OTHERS if anybody_may_read else 0):
        raise ConfigError(
            f"{path} is open to other users (mode {mode:04o})",
            hint=f"chmod 600 {path} (Kubernetes: defaultMode: 0400), and replace what is in it",
        )
    if changeable is not None:
        raise ConfigError(
            f"{path} could be replaced by others, through {changeable}",
            hint="file and folders must belong to root or the daemon's user, writable by nobody else",
        )
    if not text.strip():
        raise ConfigError(f"{path} is empty", hint="put the credential into it")
    return text


def mark(path: Path) -> Mark | None:
    """Return what changes when a file is replaced or written to; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def plain_file(path: Path) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """Open a plain file to read it, with what it is. Raises OSError for everything else.

    Never blocks: somebody may have put a pipe there.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(number)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "no plain file")
        with open(number, "rb", closefd=False) as file:
            yield file, found
    finally:
        os.close(number)


def changeable_by_others(path: Path, found: os.stat_result) -> Iterator[str]:
    """Name what somebody else can write: the file, or a folder or link on the way to it.

    Raises OSError where the way is gone meanwhile.
    """
    ours = {0, os.geteuid()}
    if found.st_uid not in ours or found.st_mode & 0o022:
        yield str(path)
    shared = False  # whether the folder lets others put things beside what is ours
    for one, status in way_to(path):
        if stat.S_ISDIR(status.st_mode):
            open_to_others = bool(status.st_mode & 0o022) and not _is_read_only(one)
            # A sticky folder (/tmp) lets nobody replace what belongs to another.
            shared = open_to_others and bool(status.st_mode & stat.S_ISVTX)
            if status.st_uid not in ours or (open_to_others and not shared):
                yield str(one)
        elif stat.S_ISLNK(status.st_mode) and shared and status.st_uid not in ours:
            yield str(one)


def way_to(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield each name that is looked up on the way to a file, links as links, the file last.

    Raises OSError where it leads nowhere.
    """
    at, links = Path("/"), 0
    yield at, at.lstat()
    ahead = list(reversed(path.absolute().parts[1:]))
    while ahead:
        name = ahead.pop()
        if name == "..":
            at = at.parent
            continue
        one = at / name
        found = one.lstat()
        yield one, found
        if not stat.S_ISLNK(found.st_mode):
            at = one
            continue
        if (links := links + 1) > MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        target = one.readlink()
        at = Path("/") if target.is_absolute() else at
        ahead += reversed([part for part in target.parts if part != "/"])


def _is_read_only(folder: Path) -> bool:
    """Whether nobody can write there: Kubernetes makes the folder of a ConfigMap 0777, and mounts it so.

    Only root of this host, whom we trust, can have another way to the same folder.
    """
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


# --- replacing one that is ours -------------------------------------------------------------------

_GIVEN = ("/run/credentials/", "/run/secrets/", "/var/run/secrets/")  # systemd, Docker, Kubernetes


def platform_given(path: Path) -> bool:
    """Whether systemd, Docker or Kubernetes puts the file there anew at each start, as its path tells."""
    return any(str(one).startswith(_GIVEN) for one in (path, path.parent.resolve() / path.name))


def refuse_given(path: Path) -> None:
    """Raise ConfigError where others put the file there anew at each start."""
    if platform_given(path):
        raise ConfigError(
            f"{path} is handed over anew at each start and cannot be replaced",
            hint="copy it once into a folder of the daemon's own, 0700 (systemd: StateDirectory=),"
            " and name that file; LoadCredential= and mounted secrets are read-only",
        )


def refuse_unwritable(path: Path) -> None:
    """Raise ConfigError, with what to do, where we could not replace a credential file."""
    refuse_given(path)
    if path.is_symlink():
        raise ConfigError(f"{path} is a link", hint="name the file itself: a link is not replaced")
    folder = path.parent
    if not os.access(folder, os.W_OK | os.X_OK) or os.statvfs(folder).f_flag & os.ST_RDONLY:
        raise ConfigError(
            f"{folder} is read-only for the daemon, so {path.name} in it cannot be replaced",
            hint="give the file a folder that belongs to the daemon's user, 0700"
            " (systemd: StateDirectory=, or ReadWritePaths=)",
        )


def replace_credential(path: Path, text: str) -> None:
    """Put another text there at one stroke and durably, open to nobody who could not read it before.

    Raises ConfigError, and OSError where the disk does not take it; then the file is as it was.
    """
    refuse_unwritable(path)
    before, new = path.stat(), path.with_name(f".{path.name}.keyturn-new")
    new.unlink(missing_ok=True)  # what a crash has left
    number = os.open(
        new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
    )
    try:
        with os.fdopen(number, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fchmod(number, _mode_for(number, before))
            os.fsync(number)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _mode_for(number: int, before: os.stat_result) -> int:
    """Return the mode as it was; its group reads on only where the new file is that group's too."""
    mode = stat.S_IMODE(before.st_mode) & 0o640 | 0o400
    if mode & 0o040 and os.fstat(number).st_gid != before.st_gid:
        try:
            os.fchown(number, -1, before.st_gid)
        except PermissionError:
            mode &= ~0o040
    return mode
