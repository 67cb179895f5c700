"""What verifiers saw, in a database of their own: uses of versions, answers, ended secrets presented.

SQLite: `usage.db` beside the store, so that no failure and no lock of it can hold up a revoke.
PostgreSQL: tables that the verifiers' role may add to and never delete from, outside the epoch.

A flush is one transaction that carries its process's number: one whose answer was lost is not added a
second time. Instants arrive as time since boot and become the database's time here, so that a verifier
whose clock is off counts at the right hour.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from keyturn.errors import StoreUnavailable
from keyturn.ports import Clock
from keyturn.storage.codec import micros
from keyturn.storage.engine import Database, is_sqlite, open_database
from keyturn.storage.postgresql import Password, no_password
from keyturn.storage.tables import store_now
from keyturn.storage.usage_tables import (
    usage_metadata,
    usage_presented,
    usage_results,
    usage_sources,
    usage_versions,
)

FILE = "usage.db"
BUSY_MS = 500  # whoever holds the file for longer is met again at the next flush
FORGET_SOURCES = timedelta(days=7)
RINGS = {"minute": (60, 1440), "hour": (3600, 24 * 90), "day": (86400, 0)}  # seconds, slots; 0: all
_HOUR = 3_600_000_000
_BATCH = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """How often something was seen, first and last; instants are time since boot."""

    first: timedelta
    last: timedelta
    number: int

    def plus(self, later: Count) -> Count:
        """Return both together."""
        return Count(
            first=min(self.first, later.first),
            last=max(self.last, later.last),
            number=self.number + later.number,
        )


@dataclass(slots=True, kw_only=True)
class Tally:
    """What one process counted and has not stored yet."""

    uses: dict[str, Count] = field(default_factory=dict)  # by version
    results: dict[tuple[int, str], int] = field(default_factory=dict)  # by minute since boot
    presented: dict[tuple[str, str], Count] = field(default_factory=dict)  # by version and state

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.uses or self.results or self.presented)


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """What is known of a version's uses. `last_hour` weighs the hour that ends within it by its share."""

    first_used_at: datetime
    last_used_at: datetime
    uses: int
    last_hour: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Presented:
    """An ended version that was presented in full; `told_at` is when that was last raised."""

    version_id: str
    state: str
    first_at: datetime
    last_at: datetime
    number: int
    told_at: datetime | None
    told_number: int


class UsageRecords:
    """The rows. Thread-safe; opened at the first use, and again where the file was replaced.

    Every method may raise StorageError: then nothing was changed, or nobody knows whether it was.
    """

    def __init__(self, source: Callable[[], Database], file: Path | None = None) -> None:
        self._source = source
        self._file = file
        self._guard = threading.Lock()
        self._database: Database | None = None
        self._identity: tuple[int, int] | None = None

    @classmethod
    def open(
        cls, store_url: str, *, state_dir: Path, clock: Clock, password: Password = no_password
    ) -> UsageRecords:
        """Prepare to write and read what belongs to a store; on SQLite the file is made if need be."""
        if not is_sqlite(store_url):
            return cls(
                lambda: open_database(store_url, clock=clock, password=password, create=False)
            )
        path = state_dir / FILE

        def source() -> Database:
            database = open_database(f"sqlite:///{path}", clock=clock)
            event.listen(database.engine, "connect", _be_quick, insert=True)
            try:
                database.write(usage_metadata.create_all)
            except BaseException:
                database.close()
                raise
            return database

        return cls(source, path)

    @classmethod
    def beside(cls, database: Database, *, state_dir: Path, clock: Clock) -> UsageRecords:
        """Return what belongs to an open store; on SQLite there is nothing before a verifier counts."""
        if not database.is_sqlite:
            return cls(lambda: database)
        return cls.open("sqlite:///", state_dir=state_dir, clock=clock)

    @property
    def begun(self) -> bool:
        """Whether there may be anything to read: the file is there, or the store is a server."""
        return self._file is None or os.path.isfile(self._file)  # noqa: PTH113 - it never raises

    def close(self) -> None:
        """Give the connections back."""
        with self._guard:
            if self._database is not None:
                self._database.close()
            self._database = None

    def _open(self) -> Database:
        with self._guard:
            here = _identity(self._file)
            if self._database is not None and here != self._identity:
                self._database.close()
                self._database = None
            if self._database is None:
                self._database = self._source()
                self._identity = _identity(self._file)
            return self._database

    # --- what a verifier writes -------------------------------------------------------------

    def add(self, source: str, number: int, tally: Tally, *, boottime: timedelta) -> None:
        """Add what a process counted; its own `number` says whether that was done before."""

        def body(connection: Connection) -> None:
            now = connection.execute(sa.select(store_now())).scalar_one()
            query = sa.select(usage_sources.c.number).where(usage_sources.c.source == source)
            before = connection.execute(query).scalar()
            if before is not None and before >= number:
                return
            insert = _insert(connection)
            _upsert(connection, insert, _SOURCE, [_source(source, number, now)])
            # In order, so that two processes never wait for each other.
            _upsert(connection, insert, _USES, _uses(tally, now - boottime))
            _upsert(connection, insert, _RESULTS, _results(tally, now - boottime))
            _upsert(connection, insert, _PRESENTED, _presented(tally, now - boottime))

        self._open().write(body)

    # --- what others read -------------------------------------------------------------------

    def flushed_at(self) -> datetime | None:
        """Return when a verifier last wrote down what it counted; None where none ever did."""
        if not self.begun:
            return None
        query = sa.select(sa.func.max(usage_sources.c.flushed_at))
        return self._open().read(lambda connection: connection.execute(query).scalar())

    def uses(self, version_ids: Iterable[str]) -> dict[str, Used]:
        """Return what is known of these versions; those that nobody used are left out."""
        ids = list(dict.fromkeys(version_ids))
        if not self.begun:
            return {}

        def body(connection: Connection) -> dict[str, Used]:
            now = connection.execute(sa.select(store_now())).scalar_one()
            found: dict[str, Used] = {}
            for start in range(0, len(ids), _BATCH):
                some = usage_versions.c.version_id.in_(ids[start : start + _BATCH])
                for row in connection.execute(sa.select(usage_versions).where(some)):
                    found[row.version_id] = _used(row, now)
            return found

        return self._open().read(body)

    def totals(self) -> dict[str, int]:
        """Return how often each answer was ever given."""
        if not self.begun:
            return {}
        days = usage_results.c.span == "day"
        query = sa.select(usage_results.c.result, sa.func.sum(usage_results.c.number)).where(days)
        grouped = query.group_by(usage_results.c.result)
        rows = self._open().read(lambda connection: connection.execute(grouped).all())
        return {result: int(number) for result, number in rows}

    def presented(self, *, untold: bool = False) -> list[Presented]:
        """Return the ended versions that were presented, or only those of which there is news."""
        if not self.begun:
            return []
        query = sa.select(usage_presented).order_by(usage_presented.c.version_id)
        if untold:
            query = query.where(usage_presented.c.number > usage_presented.c.told_number)
        rows = self._open().read(lambda connection: connection.execute(query).all())
        return [Presented(**row._asdict()) for row in rows]

    def told(self, one: Presented, at: datetime) -> None:
        """Note that somebody was told of it."""
        table = usage_presented
        change = (
            sa.update(table)
            .where(table.c.version_id == one.version_id)
            .values(told_at=at, told_number=one.number)
        )
        self._open().write(lambda connection: connection.execute(change))

    def forget(self, now: datetime) -> None:
        """Drop processes that have not written for a week, the newest apart."""
        flushed = usage_sources.c.flushed_at
        newest = sa.select(sa.func.max(flushed)).scalar_subquery()
        old = sa.delete(usage_sources).where(flushed < now - FORGET_SOURCES, flushed < newest)
        if self.begun:
            self._open().write(lambda connection: connection.execute(old))


def _be_quick(connection: Any, _record: object) -> None:
    connection.execute(f"PRAGMA busy_timeout={BUSY_MS}")


def _identity(file: Path | None) -> tuple[int, int] | None:
    if file is None:
        return None
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreUnavailable(f"{file} cannot be looked at (errno {error.errno})") from None
    return found.st_dev, found.st_ino


# --- rows ---------------------------------------------------------------------------------


def _source(source: str, number: int, now: datetime) -> dict[str, Any]:
    return {"source": source, "number": number, "flushed_at": now}


def _uses(tally: Tally, boot: datetime) -> list[dict[str, Any]]:
    return [
        {
            "version_id": version_id,
            "first_used_at": boot + count.first,
            "last_used_at": boot + count.last,
            "uses": count.number,
            "hour": micros(boot + count.last) // _HOUR,
            "hour_uses": count.number,
            "hour_before": 0,
        }
        for version_id, count in sorted(tally.uses.items())
    ]


def _results(tally: Tally, boot: datetime) -> list[dict[str, Any]]:
    found: dict[tuple[str, str, int, int], int] = {}
    for (minute, result), number in tally.results.items():
        seconds = micros(boot + timedelta(minutes=minute)) // 1_000_000
        for span, (length, slots) in RINGS.items():
            at = seconds // length
            key = span, result, at % slots if slots else at, at
            found[key] = found.get(key, 0) + number
    names = ("span", "result", "slot", "at")
    return [dict(zip(names, key, strict=True)) | {"number": found[key]} for key in sorted(found)]


def _presented(tally: Tally, boot: datetime) -> list[dict[str, Any]]:
    return [
        {
            "version_id": version_id,
            "state": state,
            "first_at": boot + count.first,
            "last_at": boot + count.last,
            "number": count.number,
        }
        for (version_id, state), count in sorted(tally.presented.items())
    ]


def _used(row: Any, now: datetime) -> Used:
    hour, into = divmod(micros(now), _HOUR)
    left = 1 - into / _HOUR  # of the hour before, what lies within sixty minutes
    this, before = {
        0: (row.hour_uses, row.hour_before),
        1: (0, row.hour_uses),
    }.get(hour - row.hour, (row.hour_uses if row.hour > hour else 0, 0))
    return Used(
        first_used_at=row.first_used_at,
        last_used_at=row.last_used_at,
        uses=row.uses,
        last_hour=this + round(before * left),
    )


# --- statements ---------------------------------------------------------------------------

Insert = Callable[..., Any]
Sets = Callable[[Any, Any], Mapping[str, Any]]


def _insert(connection: Connection) -> Insert:
    return postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert


def _upsert(
    connection: Connection,
    insert: Insert,
    how: tuple[sa.Table, Sets],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    if not rows:
        return
    table, sets = how
    statement = insert(table)
    statement = statement.on_conflict_do_update(
        index_elements=list(table.primary_key.columns),
        set_=sets(table.c, statement.excluded),
    )
    connection.execute(statement, list(rows))


def _least(one: Any, other: Any) -> Any:
    return sa.case((one < other, one), else_=other)


def _most(one: Any, other: Any) -> Any:
    return sa.case((one > other, one), else_=other)


def _set_uses(old: Any, new: Any) -> Mapping[str, Any]:
    return {
        "first_used_at": _least(new.first_used_at, old.first_used_at),
        "last_used_at": _most(new.last_used_at, old.last_used_at),
        "uses": old.uses + new.uses,
        "hour": _most(new.hour, old.hour),
        "hour_uses": sa.case(
            (new.hour == old.hour, old.hour_uses + new.hour_uses),
            (new.hour > old.hour, new.hour_uses),
            else_=old.hour_uses,
        ),
        "hour_before": sa.case(
            (new.hour == old.hour + 1, old.hour_uses),
            (new.hour > old.hour, 0),
            (new.hour == old.hour - 1, old.hour_before + new.hour_uses),
            else_=old.hour_before,
        ),
    }


def _set_results(old: Any, new: Any) -> Mapping[str, Any]:
    number = sa.case(
        (new.at == old.at, old.number + new.number),
        (new.at > old.at, new.number),
        else_=old.number,  # of a round of the ring that is over
    )
    return {"at": _most(new.at, old.at), "number": number}


def _set_presented(old: Any, new: Any) -> Mapping[str, Any]:
    return {
        "state": sa.case((old.state == "revoked", old.state), else_=new.state),
        "last_at": _most(new.last_at, old.last_at),
        "number": old.number + new.number,
    }


_SOURCE: tuple[sa.Table, Sets] = (
    usage_sources,
    lambda _old, new: {"number": new.number, "flushed_at": new.flushed_at},
)
_USES: tuple[sa.Table, Sets] = (usage_versions, _set_uses)
_RESULTS: tuple[sa.Table, Sets] = (usage_results, _set_results)
_PRESENTED: tuple[sa.Table, Sets] = (usage_presented, _set_presented)
