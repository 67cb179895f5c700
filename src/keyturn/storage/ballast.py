"""The ballast: one mebibyte that nothing but a revoke may use, for the day the disk is full.

It is kept as sixteen files: a disk runs out of file entries as well as of blocks, and what one
revoke does not need is left for the next.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

PIECES = 16
PIECE = 64 * 1024  # bytes
SPARE = 4 * PIECES * PIECE  # free bytes from which on it is made: it must not fill the disk itself
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def is_full(error: OSError) -> bool:
    """Tell whether a write failed because the disk, or what we may have of it, is used up."""
    return error.errno in _FULL


class Ballast:
    """A folder of files to throw away. Every method is safe in any process that may write there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self) -> int:
        """Make what is missing of it where the disk has room to spare; return the bytes kept.

        Never raises: a store without its ballast is better than none.
        """
        with contextlib.suppress(OSError):
            self._folder.mkdir(mode=0o700, exist_ok=True)
            missing = [path for path in self._pieces() if not _whole(path)]
            if missing and self._spare():
                for path in missing:
                    _make(path)
        return sum(PIECE for path in self._pieces() if _whole(path))

    def release(self) -> bool:
        """Give one piece back to the disk; False where there is none left."""
        for path in reversed(self._pieces()):
            try:
                path.unlink()
                self._sync()  # a journalling file system reuses no block before this
            except FileNotFoundError:
                continue
            except OSError:
                return False
            return True
        return False

    def _pieces(self) -> list[Path]:
        return [self._folder / f"{number:02}" for number in range(PIECES)]

    def _spare(self) -> bool:
        disk = os.statvfs(self._folder)
        entries = disk.f_files == 0 or disk.f_favail >= 4 * PIECES  # some have no fixed number
        return entries and disk.f_bavail * disk.f_frsize >= SPARE

    def _sync(self) -> None:
        handle = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _whole(path: Path) -> bool:
    try:
        return path.stat().st_size == PIECE
    except FileNotFoundError:
        return False


def _make(path: Path) -> None:
    """Write one piece. Raises OSError, and then there is none."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    number = os.open(path, flags, 0o600)
    try:
        # Random, or a file system that compresses would hold back nothing.
        os.write(number, os.urandom(PIECE))
        os.fsync(number)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(number)
