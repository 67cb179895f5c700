"""`revoked.d/`: one file per revoked version, looked at before every yes.

A revoke comes here first. Any reader of an SQLite file, or a daemon stopped inside a write, can lock
commits out, and so could veto a revocation; nobody can keep a file from being created. A person can
`touch` one by hand. The files are tombstones: they survive a restore of the store.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from keyturn.core.secret import is_version_id
from keyturn.errors import StoreFull, StoreUnavailable, UnknownVersion
from keyturn.storage.ballast import is_full

NOTE_LIMIT = 1024 * 1024  # more than any reason that a command can bring, escaped


class Spool:
    """A folder of tombstones. Every method is safe in any process that may write there.

    `make_room` gives up some of the ballast where the disk is full, and tells whether it did.
    """

    def __init__(self, folder: Path, *, make_room: Callable[[], bool] = lambda: False) -> None:
        self._folder = folder
        self._make_room = make_room
        self._path = os.fspath(folder)

    def revoke(self, version_id: str, note: Mapping[str, Any]) -> None:
        """Refuse a version from now on; durable when this returns. Idempotent.

        `note` says who and why, for the store's audit; it holds no secret. The first note stays.
        Raises UnknownVersion for a text that is no version id, StoreUnavailable where the file
        cannot be made.
        """
        if not is_version_id(version_id):
            raise UnknownVersion("that is no version id")
        body = json.dumps(dict(note), sort_keys=True).encode()
        while (error := self._attempt(version_id, body)) is not None:
            full = is_full(error)
            if full and self._make_room():
                continue
            if full and self.holds(version_id):
                return  # a tombstone that lost its note refuses all the same
            raise (StoreFull if full else StoreUnavailable)(
                f"no tombstone could be made in {self._folder} (errno {error.errno})",
                hint="look at disk space and rights; the version is NOT refused yet",
            ) from error

    def holds(self, version_id: str) -> bool:
        """Tell whether a version is revoked here: one stat, a few microseconds.

        Raises StoreUnavailable where the folder cannot be looked at: never a yes by mistake.
        """
        try:
            os.stat(f"{self._path}/{version_id}", follow_symlinks=False)  # noqa: PTH116 - hot path
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StoreUnavailable(f"the spool cannot be read (errno {error.errno})") from error
        return True

    def pending(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield every tombstone with its note; one made by hand has an empty note."""
        try:
            names = sorted(entry.name for entry in self._folder.iterdir())
        except FileNotFoundError:
            return
        for name in names:
            if is_version_id(name):
                yield name, self._note(name)

    def _attempt(self, version_id: str, note: bytes) -> OSError | None:
        try:
            self._create(version_id, note)
        except OSError as error:
            return error
        return None

    def _create(self, version_id: str, note: bytes) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _opened(os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as folder:
            try:
                number = self._open(folder, version_id)
                if number is not None:
                    with _opened(number):
                        _write(number, note)
            finally:
                os.fsync(folder)  # also where somebody else made it, and did not get this far

    def _open(self, folder: int, version_id: str) -> int | None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            return os.open(version_id, flags, 0o600, dir_fd=folder)
        except OSError:
            if self.holds(version_id):
                return None  # made by hand as another user, or no file at all: it refuses
            raise

    def _note(self, version_id: str) -> dict[str, Any]:
        try:
            with (self._folder / version_id).open("rb") as file:
                found = json.loads(file.read(NOTE_LIMIT) or b"{}")
        except (OSError, ValueError):
            return {}  # a crash may have cut the note off: the file itself is what counts
        return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def _opened(number: int) -> Iterator[int]:
    try:
        yield number
    finally:
        os.close(number)


def _write(number: int, note: bytes) -> None:
    """Write the note of a tombstone that has none yet."""
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # never waits: a lock must not veto a revoke, and its holder writes a note as well
    if os.fstat(number).st_size:
        return
    try:
        written = os.write(number, note)
        os.fsync(number)
    except OSError:
        os.ftruncate(number, 0)  # or half a note would stay for ever
        raise
    if written != len(note):
        os.ftruncate(number, 0)
        raise OSError(errno.ENOSPC, "the note was cut off")
