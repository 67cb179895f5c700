"""Whether a store says what it said a moment ago, told in microseconds: for verifiers that remember.

An answer may be remembered for as long as the store's epoch stands. On the host of an SQLite file
that is asked anew before each yes (rule 18: such a verifier has no lease and is not waited for):
SQLite counts the commits of a file in its header (Database File Format, 1.3.7) and writes the count
before a commit returns. One `stat` for a file that was replaced and one `pread` cost 2 µs where
`PRAGMA data_version`, which takes and gives back a lock, costs 11 (ADR 26).
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple, Protocol

from keyturn.errors import StoreUnavailable
from keyturn.storage.engine import code_of

BUSY_MS = 50  # for a writer's commit
_COUNT = slice(24, 28)  # where the header has the count of commits
_WRITE_VERSION = 18  # and how commits are written: 1 is a rollback journal
_ROLLBACK = 1
_KEPT = 64  # files whose descriptor a process keeps; it has one store, tests have many

_Identity = tuple[int, int]  # device, inode
_Mark = tuple[int, int, bytes]  # and the count


class Epoch(NamedTuple):
    """Number of the newest change that verifiers must know, within one life of the store.

    `source` counts what it was read from: a file that is put in the place of another is another one.
    """

    incarnation: int
    number: int
    source: int = 0

    def same_store(self, other: Epoch) -> bool:
        """Whether both stand for the same state, whatever they were read from."""
        return self[:2] == other[:2]


NO_EPOCH = Epoch(0, 0)  # before every life of a store


class Freshness(Protocol):
    """How a verifier that remembers knows how fresh it is. Thread-safe."""

    def epoch(self) -> Epoch | None:
        """Return what the store's epoch is at least, None where `learn` must tell; never waits.

        Every commit that returned before this call is in it, or is waited for by whoever made it
        (rule 18). Raises StoreUnavailable where this process may not answer (rule 16).
        """

    def learn(self) -> Epoch:
        """Ask the store. Raises StoreUnavailable."""

    def staleness(self) -> float:
        """Return how many seconds old what it goes by is; infinite where it knows nothing yet."""

    def close(self) -> None:
        """Give back what it holds."""


class SharedFile:
    """The epoch of an SQLite store on this host."""

    def __init__(self, path: Path) -> None:
        self._path = os.fspath(path)
        self._uri = f"{path.absolute().as_uri()}?mode=rw"  # not ro: see `storage.decisions`
        self._file = -1
        self._of: _Identity | None = None
        self._source = 0
        self._connection: sqlite3.Connection | None = None
        self._known: tuple[_Mark, Epoch] | None = None
        self._guard = threading.Lock()

    def epoch(self) -> Epoch | None:
        """Return it as it was learned, if no commit came since."""
        known = self._known
        return known[1] if known is not None and self._mark() == known[0] else None

    def learn(self) -> Epoch:
        """Read it, with the count of commits that it belongs to."""
        with self._guard:
            try:
                return self._learn()
            except (OSError, sqlite3.Error) as error:
                self._known = None
                self._drop()
                what = (
                    code_of(error) if isinstance(error, sqlite3.Error) else f"errno {error.errno}"
                )
                raise StoreUnavailable(f"the store cannot be read ({what})") from None

    def staleness(self) -> float:
        """Return none: the file is looked at before each yes."""
        return 0.0

    def close(self) -> None:
        """Close the connection."""
        with self._guard:
            self._known = None
            self._drop()

    def _mark(self) -> _Mark | None:
        try:
            found = os.stat(self._path)  # noqa: PTH116 - hot path
            header = os.pread(self._file, _COUNT.stop, 0)
        except OSError:
            return None
        return found.st_dev, found.st_ino, header[_COUNT]

    def _learn(self) -> Epoch:
        found = os.stat(self._path)  # noqa: PTH116 - hot path
        here: _Identity = found.st_dev, found.st_ino
        connection = self._connection
        if connection is None or here != self._of:
            connection = self._open(here)
        # SECURITY: the count is read while this transaction keeps every writer out of the file. Read
        # beside it, it may be that of a commit that was rolled back, and come again with another one.
        connection.execute("BEGIN")
        try:
            row = connection.execute("SELECT incarnation, epoch FROM meta").fetchone()
            header = os.pread(self._file, _COUNT.stop, 0)
        finally:
            connection.execute("ROLLBACK")
        if row is None or len(header) < _COUNT.stop:
            raise StoreUnavailable("the store is empty")
        epoch = Epoch(row[0], row[1], self._source)
        # Under a write-ahead log the count stands elsewhere: then every answer is learned anew.
        counted = header[_WRITE_VERSION] == _ROLLBACK
        self._known = ((*here, header[_COUNT]), epoch) if counted else None
        return epoch

    def _open(self, here: _Identity) -> sqlite3.Connection:
        self._known = None
        self._drop()
        self._file = _descriptor(self._path, here)
        self._connection = connection = sqlite3.connect(
            self._uri,
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=BUSY_MS / 1000,
        )
        connection.execute("PRAGMA query_only=ON")
        connection.execute("PRAGMA trusted_schema=OFF")
        connection.execute("PRAGMA mmap_size=0")
        # SECURITY: the descriptor keeps the inode's number taken, so nothing else passes for it.
        again = os.stat(self._path)  # noqa: PTH116 - as above
        if here != (again.st_dev, again.st_ino):
            self._drop()
            raise _replaced()
        if here != self._of:
            self._of, self._source = here, self._source + 1
        return connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


_held: OrderedDict[_Identity, int] = OrderedDict()
_holding = threading.Lock()


def _descriptor(path: str, wanted: _Identity) -> int:
    """Return this process's one descriptor of a file. Raises StoreUnavailable if it was replaced.

    It stays open: closing any descriptor of a file drops all locks of the process on it (fcntl(2)),
    also those of an SQLite connection in the middle of a write.
    """
    with _holding:
        if wanted not in _held:
            number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            found = os.fstat(number)
            here = found.st_dev, found.st_ino
            if here in _held:
                raise _replaced()  # and one descriptor too many, once
            _held[here] = number
            for other in [one for one in _held if one != here and _is_gone(_held[one])]:
                os.close(_held.pop(other))
            while len(_held) > _KEPT:
                os.close(_held.popitem(last=False)[1])
            if here != wanted:
                raise _replaced()
        return _held[wanted]


def _is_gone(number: int) -> bool:
    return os.fstat(number).st_nlink == 0


def _replaced() -> StoreUnavailable:
    return StoreUnavailable("the store's file was replaced just now")
