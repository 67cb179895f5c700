"""Which process leads on a store, and which earlier ones are known to have ended.

SQLite: the lead is an flock beside the file. The kernel drops it when its process ends, however it
ends, so whoever holds it knows that every other writer is dead. PostgreSQL: a row with a lease by
the database's clock; a writer whose lease ran out is taken for dead, and the fence of its claims
guards against one that was only paused.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from keyturn.core.timekeeping import Anchor
from keyturn.errors import ClaimLost, IllegalTransition, StoreUnavailable
from keyturn.storage import cases, migrations
from keyturn.storage.engine import sqlite_path
from keyturn.storage.store import Store
from keyturn.storage.tables import credentials, daemons


class Membership:
    """This process's place on a store: it leads or stands by."""

    def __init__(self, store: Store, *, lock: FileLock | None = None) -> None:
        self._store = store
        self._database = store.database
        self._lock = lock
        if lock is None and self._database.is_sqlite:
            self._lock = lock_of(sqlite_path(str(store.engine.url)))

    def try_lead(self, *, ttl: timedelta) -> bool:
        """Take the lead if no living process has it; record who died before.

        The claims of dead writers are free at once, and what they held is due.
        """
        if self._lock and not self._lock.take():
            return False
        try:
            return self._database.write(lambda connection: self._take(connection, ttl))
        except IllegalTransition:
            return False  # another standby took the row in the same moment

    def anchor(self, boot_id: str) -> Anchor | None:
        """Return when a daemon's clock was last believed: on this boot if there was one, else ever."""
        query = (
            sa.select(daemons.c.boot_id, daemons.c.boottime, daemons.c.wall)
            .where(daemons.c.wall.is_not(None))
            .order_by((daemons.c.boot_id == boot_id).desc(), daemons.c.wall.desc())
            .limit(1)
        )
        row = self._database.read(lambda connection: connection.execute(query).first())
        if row is None:
            return None
        return Anchor(boot_id=row.boot_id, boottime=row.boottime, wall=row.wall)

    def renew(self, *, ttl: timedelta, anchor: Anchor | None = None) -> None:
        """Prolong the lead, and note when the clock was believed.

        Raises ClaimLost where another process has the lead now.
        """
        if self._lock and not self._lock.held():
            raise ClaimLost("another process leads on this store")

        def body(connection: Connection) -> int:
            now = self._store.now_in(connection)
            mine = sa.update(daemons).where(daemons.c.writer == self._store.writer, daemons.c.leads)
            believed = cases.to_row(anchor) if anchor else {}
            return connection.execute(mine.values(until=now + ttl, **believed)).rowcount

        if self._database.write(body) != 1:
            raise ClaimLost("another process leads on this store")

    def leave(self) -> None:
        """Give up the lead as the last thing of a run: no call of it may still be on its way."""

        def body(connection: Connection) -> None:
            now = self._store.now_in(connection)
            mine = daemons.c.writer == self._store.writer, daemons.c.leads
            if connection.execute(sa.select(daemons.c.writer).where(*mine)).first():
                _bury(connection, [self._store.writer], now)

        try:
            self._database.write(body)
        finally:
            if self._lock:
                self._lock.drop()

    def _take(self, connection: Connection, ttl: timedelta) -> bool:
        migrations.check_oldest(connection)  # a standby may have waited through a contraction
        now, me = self._store.now_in(connection), self._store.writer
        others = connection.execute(
            sa.select(daemons)
            .where(daemons.c.died_at.is_(None), daemons.c.writer != me)
            .with_for_update()
        ).all()
        # With the file's lock in hand nobody else can be alive, whatever a row says.
        dead = [row.writer for row in others if self._lock or row.until <= now]
        if any(row.leads and row.writer not in dead for row in others):
            return False
        _bury(connection, dead, now)
        mine = sa.update(daemons).where(daemons.c.writer == me)
        values = {"leads": True, "until": now + ttl, "died_at": None, "knows": migrations.HEAD}
        if connection.execute(mine.values(**values)).rowcount == 0:
            connection.execute(sa.insert(daemons).values(writer=me, started_at=now, **values))
        return True


def _bury(connection: Connection, writers: list[str], now: datetime) -> None:
    """Record deaths and free the claims that the dead held."""
    if not writers:
        return
    dead = sa.update(daemons).where(daemons.c.writer.in_(writers), daemons.c.died_at.is_(None))
    connection.execute(dead.values(leads=False, died_at=now))
    held = sa.update(credentials).where(credentials.c.holder_writer.in_(writers))
    connection.execute(
        held.values(holder=None, holder_writer=None, until=None, wake_at=now, wake_requested=None)
    )


def lock_of(path: Path) -> FileLock:
    """Return the lock that stands for the lead on an SQLite file; the file itself may be gone."""
    return FileLock(path.with_name(path.name + ".lead"))


class FileLock:
    """An exclusive flock on a file of its own, never inherited by a child that we start."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None

    def take(self) -> bool:
        """Take the lock unless another process has it."""
        if self.held():
            return True
        self.drop()
        try:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreUnavailable(f"the lock file is unusable ({error.errno})") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            return False
        self._handle = handle
        # Somebody may have removed the file between open and lock: then this lock excludes nobody.
        return self.held() or self.take()

    def held(self) -> bool:
        """Tell whether we hold the lock of the file that is there now."""
        if self._handle is None:
            return False
        with suppress(OSError):
            mine, there = os.fstat(self._handle), self._path.stat()
            return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
        return False

    def drop(self) -> None:
        """Give the lock back."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
