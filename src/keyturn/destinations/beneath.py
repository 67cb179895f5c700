"""Folders and files that nobody can swap under us: no links, no writable folders, whole writes.

A path is walked from `/`, one component at a time, each opened relative to the folder before it and
never through a link (`openat(2)` with O_NOFOLLOW). So an agent that can create names somewhere
cannot lead a read or a write of ours to another place, not even between two steps of ours.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from keyturn.errors import DestinationUnavailable, Rejected

LIMIT = 1024 * 1024  # bytes of a file
FOLDER_MODE = 0o2750
NOTHING = "-"  # identity of a file that is not there
TEMPORARY = ".keyturn-new-"
_UNFINISHED = 0o1700  # a folder that we made and did not finish; nobody sets this by hand
_LOCK_POLL = 0.005
_WALK = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC  # needs no right to list
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class Making:
    """What folders that are missing are made with. `gid` -1 leaves the group as it comes."""

    mode: int = FOLDER_MODE
    gid: int = -1


@contextlib.contextmanager
def folder(root: Path, parts: tuple[str, ...] = (), *, make: Making | None) -> Iterator[int]:
    """Give a descriptor of a folder beneath a root.

    Raises FileNotFoundError where it is missing and nothing is to be made, Rejected where a component
    is a link or could be swapped by others.
    """
    ancestors = root.parts[1:]
    number = os.open("/", _WALK)
    try:
        for depth, part in enumerate((*ancestors, *parts), start=1):
            inner = _step(number, part, make=make)
            os.close(number)
            number = inner
            refuse_swappable(number, part, shared=depth < len(ancestors))
        yield number
    finally:
        os.close(number)


def _step(outer: int, part: str, *, make: Making | None) -> int:
    number = _open_folder(outer, part)
    if number is None and make is not None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(part, _UNFINISHED, dir_fd=outer)
        number = _open_folder(outer, part)
    if number is None:
        raise FileNotFoundError(errno.ENOENT, "no such folder")
    if make is not None and stat.S_IMODE(os.fstat(number).st_mode) & 0o1777 == _UNFINISHED:
        _finish(outer, part, make)
    return number


def _open_folder(outer: int, part: str) -> int | None:
    try:
        return os.open(part, _WALK, dir_fd=outer)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise Rejected(
            f"{part} is a link or no folder", hint="write the real path, without links"
        ) from None


def _finish(outer: int, part: str, make: Making) -> None:
    """Let agents in. A crash before this leaves a mode by which the next run knows to do it."""
    number = os.open(part, _FOLDER, dir_fd=outer)
    try:
        if make.gid != -1:
            os.fchown(number, -1, make.gid)
        os.fchmod(number, make.mode)
        os.fsync(number)
    finally:
        os.close(number)
    sync(outer)


def refuse_swappable(number: int, name: str, *, shared: bool = False) -> None:
    """Refuse a folder in which others could swap what we write or read.

    A mask of an access control list shows as the rights of the group. `shared`: above the root a
    sticky folder such as /tmp will do, since there nobody can rename what is not theirs.
    """
    found = os.fstat(number)
    writable = bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
    if shared and found.st_mode & stat.S_ISVTX:
        writable = False
    if found.st_uid not in (0, os.geteuid()) or writable:
        raise Rejected(
            f"the folder {name} can be changed by others",
            hint="it must belong to the daemon's user or root, not writable for group or others",
        )


def sync(number: int) -> None:
    """Make the names in a folder durable."""
    inner = os.open(".", _FOLDER, dir_fd=number)
    try:
        os.fsync(inner)
    finally:
        os.close(inner)


def read(outer: int, name: str) -> tuple[bytes | None, str]:
    """Read a plain file: its bytes, None if it is too large, and the identity of that very file.

    Both come from one descriptor: a file that was swapped between reading and looking at it would
    else give its token to the other one's content. Raises FileNotFoundError.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe would block us
    try:
        number = os.open(name, flags, dir_fd=outer)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise Rejected(f"{name} is a link or no plain file") from None
        raise
    try:
        found = os.fstat(number)
        if not stat.S_ISREG(found.st_mode):
            raise Rejected(f"{name} is no plain file")
        with open(number, "rb", closefd=False) as file:
            data = file.read(LIMIT + 1)
    finally:
        os.close(number)
    # ctime, because mtime can be set back by whoever may write the file.
    identity = f"{found.st_ino}:{found.st_ctime_ns}:{found.st_size}"
    return (data if len(data) <= LIMIT else None), identity


def replace(outer: int, name: str, data: bytes, *, mode: int, gid: int) -> None:
    """Replace a file in one instant: owner and mode are right before it can be seen.

    Raises DestinationUnavailable (sent) where the disk did not confirm the rename; with any other
    error the old file stands. The caller holds the lock.
    """
    temporary = f"{TEMPORARY}{name}"
    remove_stale(outer, name)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    number = os.open(temporary, flags, 0o600, dir_fd=outer)
    try:
        _fill(number, data, mode=mode, gid=gid)
    except BaseException:
        remove_stale(outer, name)
        raise
    try:
        os.rename(temporary, name, src_dir_fd=outer, dst_dir_fd=outer)
        sync(outer)
    except OSError as error:
        remove_stale(outer, name)
        raise DestinationUnavailable(
            f"{name} was written, but not confirmed by the disk (errno {error.errno})"
        ) from None


def _fill(number: int, data: bytes, *, mode: int, gid: int) -> None:
    with open(number, "wb") as file:
        file.write(data)
        file.flush()
        if gid != -1:
            os.fchown(number, -1, gid)
        os.fchmod(number, mode)
        os.fsync(number)


def remove_stale(outer: int, name: str) -> None:
    """Remove what a writer that died has left: it can hold a secret. The caller holds the lock."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{TEMPORARY}{name}", dir_fd=outer)


@contextlib.contextmanager
def locked(outer: int, name: str, *, patience: float) -> Iterator[None]:
    """Hold a lock file, waiting for it so many seconds; a dead holder's lock is free.

    Raises DestinationUnavailable: whoever was stopped inside makes others wait, not overwrite.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    number = os.open(name, flags, 0o600, dir_fd=outer)
    try:
        until = time.monotonic() + patience
        while not _try_lock(number):
            if time.monotonic() > until:
                raise DestinationUnavailable("the entry is locked by another writer", sent=False)
            time.sleep(_LOCK_POLL)
        yield
    finally:
        os.close(number)


def _try_lock(number: int) -> bool:
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
