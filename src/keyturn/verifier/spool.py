"""`revoked.d/`: one file per revoked version, looked at before every yes.

A revoke comes here first. Any reader of an SQLite file, or a daemon stopped inside a write, can lock
commits out, and so could veto a revocation; nobody can keep a file from being created. A person can
`touch` one by hand. The files are tombstones: they survive a restore of the store.

A file holds the notes of every revoke that named its version, a line each: while the store is locked a
second one may ask for more than the first did.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import time
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from keyturn.core.secret import is_version_id
from keyturn.errors import StoreFull, StoreUnavailable, UnknownVersion
from keyturn.storage.ballast import is_full

NOTES_LIMIT = 4 * 1024 * 1024  # of one tombstone; a note is far below 1 MiB, whatever its reason
_ENOUGH = NOTES_LIMIT // 2  # from here on no note is added: thousands are there
_SETTLED_NS = 2_000_000_000
_COARSE = 5  # CLOCK_REALTIME_COARSE, by which the kernel stamps files (clock_gettime(2))
_WHO_AND_WHY = frozenset({"actor", "reason"})  # notes that differ in nothing else are one


class _Asked:
    """A spool that looks for each version by itself."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool

    def __contains__(self, version_id: object) -> bool:
        return self._spool.holds(str(version_id))


class Spool:
    """A folder of tombstones. Every method is safe in any process that may write there.

    `make_room` gives up some of the ballast where the disk is full, and tells whether it did. With
    `required` a folder that is missing is one whose tombstones are lost: then nobody can tell.
    """

    def __init__(
        self,
        folder: Path,
        *,
        make_room: Callable[[], bool] = lambda: False,
        required: bool = False,
    ) -> None:
        self._folder = folder
        self._required = required
        self._make_room = make_room
        self._path = os.fspath(folder)
        self._listed: tuple[tuple[int, int], frozenset[str]] | None = None

    def revoke(self, version_id: str, note: Mapping[str, Any]) -> bool:
        """Refuse a version from now on; durable when this returns. Tells whether that is new.

        `note` says who, why and how much, for the store; it holds no secret. Of notes that ask for the
        same the first one stays. Raises UnknownVersion for a text that is no version id,
        StoreUnavailable where the file cannot be made.
        """
        if not is_version_id(version_id):
            raise UnknownVersion("that is no version id")
        new = not self._is_there(version_id)
        while (error := self._attempt(version_id, note)) is not None:
            full = is_full(error)
            if full and self._make_room():
                continue
            if full and self.holds(version_id):
                return new  # a tombstone that lost its note refuses all the same
            raise (StoreFull if full else StoreUnavailable)(
                f"no tombstone could be made in {self._folder} (errno {error.errno})",
                hint="look at disk space and rights; the version is NOT refused yet",
            ) from error
        return new

    def withdraw(self, version_id: str, note: Mapping[str, Any]) -> None:
        """Take back a tombstone that `revoke` has just made with this note, of a version of nobody.

        One that says anything else stays: somebody meant it.
        """
        if self.notes(version_id) == [json.loads(_line(note))]:
            with contextlib.suppress(OSError):
                (self._folder / version_id).unlink()

    def holds(self, version_id: str) -> bool:
        """Tell whether a version is revoked here: one stat, a few microseconds.

        Raises StoreUnavailable where the folder cannot be looked at: never a yes by mistake.
        """
        try:
            os.stat(f"{self._path}/{version_id}", follow_symlinks=False)  # noqa: PTH116 - hot path
        except FileNotFoundError:
            if self._required and not os.path.isdir(self._path):  # noqa: PTH112 - hot path
                raise StoreUnavailable(
                    f"the spool {self._path} is missing",
                    hint="restore it, or make it again (mkdir -m 700) where no tombstone is lost",
                ) from None
            return False
        except OSError as error:
            raise StoreUnavailable(f"the spool cannot be read (errno {error.errno})") from error
        return True

    def glance(self) -> Container[str]:
        """Return what holds the versions that are revoked here, good for this instant: one stat.

        Raises StoreUnavailable as `holds` does, then or when it is asked.
        """
        try:
            found = os.stat(self._path)  # noqa: PTH116 - hot path
        except OSError:
            return _Asked(self)
        seen = found.st_ino, found.st_ctime_ns
        kept = self._listed
        if kept is not None and kept[0] == seen:
            return kept[1]
        # SECURITY: the folder's time is a coarse clock's, on some file systems in whole seconds: a
        # tombstone that comes within one tick of it does not move it. An old one does not stand still.
        age = time.clock_gettime_ns(_COARSE) - found.st_ctime_ns
        if not age > _SETTLED_NS:
            return _Asked(self)
        listed = frozenset(self._names())  # whoever answers waits: neither sorted nor looked at
        self._listed = seen, listed
        return listed

    def ids(self) -> list[str]:
        """Return the version of every tombstone, in order. Raises StoreUnavailable."""
        return sorted(name for name in self._names() if is_version_id(name))

    def _names(self) -> list[str]:
        try:
            return os.listdir(self._path)  # noqa: PTH208 - thousands, every two seconds
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreUnavailable(f"the spool cannot be read (errno {error.errno})") from error

    def notes(self, version_id: str) -> list[dict[str, Any]]:
        """Return the notes of a tombstone, oldest first; one that was made by hand has none.

        What a crash has torn is left out: the file itself is what counts.
        """
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            number = os.open(f"{self._path}/{version_id}", flags)
            with open(number, "rb") as file:  # noqa: PTH123 - a descriptor
                return list(_notes(file.read(NOTES_LIMIT) or b""))
        except OSError:
            return []

    def _is_there(self, version_id: str) -> bool:
        try:
            return self.holds(version_id)
        except StoreUnavailable:
            return False  # the attempt says what is wrong

    def _attempt(self, version_id: str, note: Mapping[str, Any]) -> OSError | None:
        try:
            self._create(version_id, note)
        except OSError as error:
            return error
        return None

    def _create(self, version_id: str, note: Mapping[str, Any]) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _opened(os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as folder:
            try:
                number = self._open(folder, version_id)
                if number is not None:
                    with _opened(number):
                        self._add(version_id, number, note)
            finally:
                os.fsync(folder)  # also where somebody else made it, and did not get this far

    def _open(self, folder: int, version_id: str) -> int | None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            return os.open(version_id, flags | os.O_CREAT, 0o600, dir_fd=folder)
        except PermissionError:
            self._take_over(folder, version_id)
            return os.open(version_id, flags, dir_fd=folder) if self._is_ours(version_id) else None
        except OSError:
            if self.holds(version_id):
                return None  # no file at all: it refuses
            raise

    def _take_over(self, folder: int, version_id: str) -> None:
        """Put a file of ours in the place of one that another user made by hand: it takes notes."""
        if not self.holds(version_id):
            raise PermissionError(errno.EACCES, "nothing can be made there")
        draft = f".{version_id}.{os.getpid()}"
        with contextlib.suppress(OSError):  # it refuses as it is
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with _opened(os.open(draft, flags, 0o600, dir_fd=folder)) as number:
                for note in self.notes(version_id):
                    os.write(number, b"\n" + _line(note))
                os.fsync(number)
            os.replace(draft, version_id, src_dir_fd=folder, dst_dir_fd=folder)

    def _is_ours(self, version_id: str) -> bool:
        return (self._folder / version_id).lstat().st_uid == os.geteuid()

    def _add(self, version_id: str, number: int, note: Mapping[str, Any]) -> None:
        """Append a note, unless one that asks for the same is there."""
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _ENOUGH:
            return
        line = _line(note)
        if _asked(json.loads(line)) in [_asked(one) for one in self.notes(version_id)]:
            return
        # The leading newline ends a line that a crash or a full disk tore: no lock is needed, and
        # none could be waited for.
        data = b"\n" + line
        written = os.write(number, data)
        os.fsync(number)
        if written != len(data):
            raise OSError(errno.ENOSPC, "the note was cut off")


@contextlib.contextmanager
def _opened(number: int) -> Iterator[int]:
    try:
        yield number
    finally:
        os.close(number)


def _line(note: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(note), sort_keys=True).encode()


def _notes(data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.split(b"\n"):
        try:
            found = json.loads(line) if line else None
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def _asked(note: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in note.items() if key not in _WHO_AND_WHY}
