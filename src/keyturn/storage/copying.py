"""Copies of an SQLite store: made by the backup API, private from the first byte, looked at before use.

The live file is never replaced where it is one: a restore is a transaction on it, so that whoever has
it open sees the change, and a crash in the middle leaves what was there.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from keyturn.errors import Refused, StorageError, StoreFull, StoreUnavailable
from keyturn.storage import codec
from keyturn.storage.ballast import is_full
from keyturn.storage.engine import code_of
from keyturn.storage.migrations.versions.r0001_first import TOMBSTONES

PATIENCE = 10.0  # seconds for a writer to end


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a file says about itself."""

    store_id: str
    schema: str
    incarnation: int
    epoch: int
    created_at: datetime
    agents: int
    size: int


def snapshot(source: Path, target: Path) -> None:
    """Copy a live store into a new private file, synced, all of one moment.

    Writes wait while it copies. Raises StorageError, StoreUnavailable; then there is no file.
    """
    with _new_file(target), _errors():
        with (
            closing(sqlite3.connect(f"file:{source}?mode=rw", uri=True, timeout=PATIENCE)) as live,
            closing(sqlite3.connect(target)) as copy,
        ):
            copy.execute("PRAGMA synchronous=OFF")  # synced once, below
            live.backup(copy, progress=_patience(), sleep=0.01)
            # A copy in one file: it carries no journal from place to place.
            copy.execute("PRAGMA journal_mode=DELETE")
        _sync(target)


def facts(path: Path, *, thorough: bool = True) -> Facts:
    """Read and check a copy. Raises Refused where it is none, or damaged."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as copy:
            if thorough:
                found = copy.execute("PRAGMA integrity_check(1)").fetchone()[0]
                if found != "ok":
                    raise _no_copy(path, "it is damaged")
                if programs := _programs(copy) - _OURS:
                    raise _no_copy(path, f"it brings programs with it: {min(programs)[0]!r}")
            row = copy.execute(
                "SELECT store_id, incarnation, epoch, created_at, version_num"
                " FROM meta, alembic_version"
            ).fetchone()
            (agents,) = copy.execute(
                "SELECT count(*) FROM agents WHERE state <> 'removed'"
            ).fetchone()
    except sqlite3.Error as error:
        raise _no_copy(path, code_of(error)) from None
    if row is None:
        raise _no_copy(path, "it is empty")
    store_id, incarnation, epoch, created_at, schema = row
    return Facts(
        store_id=store_id,
        schema=schema,
        incarnation=incarnation,
        epoch=epoch,
        created_at=codec.instant(created_at),
        agents=agents,
        size=path.stat().st_size,
    )


def _programs(copy: sqlite3.Connection) -> set[tuple[str, str]]:
    """Return name and text of what would run by itself.

    SECURITY: a trigger could change a hash after the merge has found it to be the ledger's, and a
    view could stand where a table was.
    """
    query = "SELECT name, sql FROM sqlite_master WHERE type IN ('trigger', 'view')"
    return {(name, " ".join(text.split())) for name, text in copy.execute(query)}


_OURS = {("versions_tombstones", " ".join(text.split())) for text in TOMBSTONES["sqlite"]}


def put_into(copy: Path, live: Path) -> None:
    """Make a live store what a copy is: in one transaction, seen by whoever has it open.

    A live file that is gone, or no database any more, is replaced instead; what reads it compares the
    file's identity each time. Raises StoreUnavailable where somebody keeps it locked.
    """
    if not _is_database(live):
        with suppress(FileNotFoundError):
            live.with_name(live.name + "-journal").unlink()
        os.replace(copy, live)  # noqa: PTH105 - one rename
        _sync_folder(live.parent)
        return
    with _errors():
        source = sqlite3.connect(f"file:{copy}?mode=ro", uri=True)
        target = sqlite3.connect(live, timeout=PATIENCE, isolation_level=None)
        with closing(source), closing(target):
            target.execute("PRAGMA journal_mode=PERSIST")
            target.execute("PRAGMA synchronous=FULL")
            source.backup(target, progress=_patience(), sleep=0.01)


def _patience() -> Callable[[int, int, int], None]:
    """Return what ends a copy that finds the store locked for too long; SQLite would wait for ever."""
    until = time.monotonic() + PATIENCE

    def look(_status: int, left: int, _total: int) -> None:
        if left and time.monotonic() > until:
            raise StoreUnavailable("somebody keeps the store locked", hint="see who holds it")

    return look


def publish(made: Path, place: Path) -> None:
    """Give a finished copy its name in another folder, never half-written there.

    Raises Refused where that name is taken, StorageError.
    """
    draft = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        with _new_file(draft), made.open("rb") as source, draft.open("r+b") as target:
            while block := source.read(1 << 20):
                target.write(block)
            target.flush()
            os.fsync(target.fileno())
        try:
            os.link(draft, place)  # fails where the name is taken, unlike a rename
        finally:
            draft.unlink()
        _sync_folder(place.parent)
    except FileExistsError:
        raise Refused(f"{place} is there already", hint="name another file") from None
    except OSError as error:
        if is_full(error):
            raise StoreFull(
                f"there is no room for {place}", hint="name a file on a disk with room"
            ) from None
        raise StorageError(
            f"{place} cannot be written (errno {error.errno})", hint="name a file in another folder"
        ) from None


def _is_database(path: Path) -> bool:
    """Whether a file is an SQLite database whose pages can be written over."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=rw", uri=True)) as found:
            found.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        return code_of(error) not in {"SQLITE_NOTADB", "SQLITE_CORRUPT", "SQLITE_CANTOPEN"}
    return path.stat().st_size > 0


def _no_copy(path: Path, why: str) -> Refused:
    return Refused(
        f"{path} is no copy of a store that can be used ({why})",
        hint="name a file that `keyturn store backup` has made",
    )


@contextmanager
def _new_file(path: Path) -> Iterator[None]:
    """Make a file of 0600 before anybody writes to it; gone again where that fails."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        if code_of(error) == "SQLITE_FULL":
            raise StoreFull from None
        if code_of(error) in {"SQLITE_CORRUPT", "SQLITE_NOTADB"}:
            raise StorageError(
                "the store is damaged", hint="`keyturn store restore FILE` from an earlier backup"
            ) from None
        raise StoreUnavailable(
            f"the store cannot be copied now ({code_of(error)})",
            hint="see who holds it, and repeat this",
        ) from None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
