"""What a verifier reads: one version's row, fresh at every look-up, by connections that never write.

SQLite: autocommit, so that every look-up sees every commit and no read transaction is left behind;
the path's device and inode are compared each time, because a file that was replaced would otherwise
be read for ever. A connection may roll back a crashed writer's journal, nothing else.
PostgreSQL: a transaction of its own in one message, with its timeouts local to it (a pooler gives the
next one another session), and the database's time with the row.

There are several connections, each with all of these checks, because a stranger's junk must not keep
a good agent waiting for its turn (I7).
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from keyturn.core.model import AgentState, VersionState
from keyturn.core.timekeeping import Anchor
from keyturn.errors import StoreQuarantined, StoreUnavailable
from keyturn.storage.codec import instant
from keyturn.storage.engine import code_of, is_sqlite, sqlite_path
from keyturn.storage.freshness import NO_EPOCH, Epoch
from keyturn.storage.hashes import SELECT as _IN_USE
from keyturn.storage.hashes import InUse, of_rows
from keyturn.storage.postgresql import (
    Password,
    asked,
    no_password,
    postgresql_arguments,
    refusal,
)

WAIT = 0.03  # seconds for a connection where all are in use
BUSY_MS = 50  # for a writer's commit; both together stay below 100 ms
ON_SQLITE = 16  # connections at most; they are opened as they are needed
ON_POSTGRESQL = 6  # they cost the server a process each
# Far below any lease: whoever cannot tell says so, and the others find a connection.
LOCK_MS = 500
STATEMENT_MS = 1500

# From the one row of `meta`, so that what is not known comes with whether that counts: in one
# statement, since a store may be restored, or let go again, between any two.
_SELECT = (
    "SELECT a.uid, a.name, v.login, a.state, v.credential_uid, v.id, v.state, v.scheme, v.digest,"
    " v.tag, v.deadline, v.not_after, {now}, m.incarnation, m.epoch, {doubt}"
    " FROM meta m LEFT JOIN versions v ON {which}"
    " LEFT JOIN credentials c ON c.uid = v.credential_uid LEFT JOIN agents a ON a.uid = c.agent_uid"
)
_BY_ID = _SELECT.replace("{which}", "v.id = {value}")
_IMPORTED = _SELECT.replace("{which}", "v.login = {value} AND v.origin = 'imported'") + (
    " ORDER BY v.seq DESC"
)
# A version that was accepted in a life that is lost is known by nobody: its login tells whose it is.
# Each part goes by an index: whoever asks waits for this one.
_DOUBT = (
    "COALESCE((SELECT q.reason FROM quarantine q WHERE q.agent_uid = ''),"
    " (SELECT q.reason FROM quarantine q WHERE q.agent_uid = a.uid),"
    " CASE WHEN v.id IS NULL THEN (SELECT q.reason FROM agents o JOIN quarantine q"
    " ON q.agent_uid = o.uid WHERE o.login = {login} AND o.state <> 'removed' LIMIT 1) END)"
)

_ANCHOR = (
    "SELECT boot_id, boottime, wall FROM daemons WHERE wall IS NOT NULL"
    " ORDER BY CASE WHEN boot_id = {value} THEN 0 ELSE 1 END, wall DESC LIMIT 1"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Everything about one version that a verifier judges; it does not judge itself."""

    agent_uid: str
    agent_name: str
    login: str
    agent_state: AgentState
    credential_uid: str
    version_id: str
    state: VersionState
    scheme: str
    digest: str
    tag: bytes | None
    deadline: datetime | None
    not_after: datetime | None
    now: datetime | None = None  # the store's time at the look-up, where it is not this host's
    epoch: Epoch = NO_EPOCH  # of the look-up: what is read here holds until it moves


class DecisionReader:
    """Look-ups in a store for verifiers. Thread-safe.

    Both look-ups see every commit that returned before they were called, and raise
    StoreUnavailable within 100 ms where the store is locked (SQLite), StoreQuarantined where it was
    restored and nobody can tell yet.
    """

    def __init__(self, source: Callable[[], _Source], most: int) -> None:
        self._source = source
        self._most = most
        self._free = threading.Semaphore(most)
        self._idle: deque[_Source] = deque()  # the one used last is taken first: it is the warm one

    @classmethod
    def open(cls, url: str, *, password: Password = no_password) -> DecisionReader:
        """Prepare to read a store; it is first touched at the first look-up."""
        if is_sqlite(url):
            path = sqlite_path(url)
            return cls(lambda: _SqliteSource(path), ON_SQLITE)
        return cls(lambda: _PostgresSource(url, password), ON_POSTGRESQL)

    def lookup(self, version_id: str, login: str = "") -> Decision | None:
        """Return what is known of a version id, whatever its state; `login` presents it."""
        rows = _certain(self._rows(_BY_ID, version_id, login))
        return _decision(rows[0]) if rows else None

    def imported(self, login: str) -> list[Decision]:
        """Return the imported versions of a login, newest first, refused ones too."""
        found = [_decision(row) for row in _certain(self._rows(_IMPORTED, login, login))]
        return [one for one in found if one.agent_state is not AgentState.REMOVED]

    def anchor(self, boot_id: str) -> Anchor | None:
        """Return when a daemon's clock was last believed, on this boot if there was one."""
        rows = self._rows(_ANCHOR, boot_id)
        if not rows:
            return None
        found, boottime, wall = rows[0]
        return Anchor(boot_id=found, boottime=timedelta(microseconds=boottime), wall=instant(wall))

    def in_use(self) -> list[InUse]:
        """Return which schemes and keys accepted versions have. Raises StoreUnavailable."""
        return of_rows(self._rows(_IN_USE, ""))

    def close(self) -> None:
        """Give back the connections, those in use as soon as their look-ups are done."""
        for _ in range(self._most):
            self._free.acquire()
        for source in self._idle:
            source.close()
        self._idle.clear()
        self._free.release(self._most)

    def _rows(self, query: str, value: str, login: str = "") -> Sequence[Sequence[Any]]:
        if not self._free.acquire(timeout=WAIT):
            raise StoreUnavailable("the store is busy")
        try:
            try:
                source = self._idle.pop()
            except IndexError:
                source = self._source()
            try:
                return source.rows(query, value, login)
            finally:
                self._idle.append(source)
        finally:
            self._free.release()


class _Source(Protocol):
    """One connection that opens itself when needed."""

    def rows(self, query: str, value: str, login: str) -> Sequence[Sequence[Any]]:
        """Run one query outside any transaction. Raises StoreUnavailable."""

    def close(self) -> None:
        """Close the connection."""


class _SqliteSource:
    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None

    def rows(self, query: str, value: str, login: str) -> Sequence[Sequence[Any]]:
        try:
            return self._run(query, value, login)
        except sqlite3.Error as error:
            self.close()
            raise StoreUnavailable(f"the store cannot be read ({code_of(error)})") from None
        except OSError as error:
            self.close()
            raise StoreUnavailable(f"the store's file is not there ({error.errno})") from None

    def _run(self, query: str, value: str, login: str) -> Sequence[Sequence[Any]]:
        connection = self._connected()
        try:
            return connection.execute(_ON_SQLITE[query], _values(query, value, login)).fetchall()
        except sqlite3.OperationalError as error:
            if query == _ANCHOR or "no such table: quarantine" not in str(error):
                raise
        # The daemon of the release before is still at work: asked anew each time, so that the first
        # quarantine of the next one is seen.
        return connection.execute(_BEFORE_SQLITE[query], (value,)).fetchall()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = self._file = None

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None or self._identity() != self._file:
            self.close()
            self._connection, self._file = self._opened()
        return self._connection

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._path)  # noqa: PTH116 - a Path would cost as much as the query
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def _opened(self) -> tuple[sqlite3.Connection, tuple[int, int]]:
        """Open the file that is there now, and return its identity."""
        # SECURITY: a file that is replaced while it is opened frees its inode number for the next
        # one, which would then pass for the file that was opened; this descriptor keeps the number
        # taken. O_PATH, because closing any other descriptor drops SQLite's locks in this process.
        held = os.open(self._path, os.O_PATH | os.O_CLOEXEC)
        try:
            found = os.fstat(held)
            connection, here = self._open(), (found.st_dev, found.st_ino)
            if self._identity() == here:
                return connection, here
        finally:
            os.close(held)
        connection.close()
        raise StoreUnavailable("the store's file was replaced just now")

    def _open(self) -> sqlite3.Connection:
        # Not mode=ro: after a crash inside a commit that could not roll back the journal, and
        # every check would fail until the daemon is back.
        uri = f"{Path(self._path).absolute().as_uri()}?mode=rw"
        connection = sqlite3.connect(
            uri, uri=True, isolation_level=None, check_same_thread=False, timeout=BUSY_MS / 1000
        )
        connection.execute("PRAGMA query_only=ON")
        connection.execute("PRAGMA trusted_schema=OFF")
        connection.execute("PRAGMA mmap_size=0")
        return connection


class _PostgresSource:
    def __init__(self, url: str, password: Password) -> None:
        self._url = url
        self._password = password
        self._connection: Any = None

    def rows(self, query: str, value: str, login: str) -> Sequence[Sequence[Any]]:
        import psycopg

        kept = self._connection is not None
        try:
            return self._run(query, value, login)
        except psycopg.Error as error:
            self.close()
            died = isinstance(error, psycopg.OperationalError) and error.sqlstate not in _TOO_LONG
            if not (kept and died):
                raise _unreadable(error) from None
        # A connection that was kept may have died since the last look-up: once more with a new one.
        try:
            return self._run(query, value, login)
        except psycopg.Error as error:
            self.close()
            raise _unreadable(error) from None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _run(self, query: str, value: str, login: str) -> Sequence[Sequence[Any]]:
        if self._connection is None:
            self._connection = self._open()
        # One message for the four statements: psycopg puts the value in, quoted by libpq.
        import psycopg

        try:
            cursor = self._connection.execute(_ON_POSTGRESQL[query], _values(query, value, login))
        except psycopg.errors.UndefinedTable:
            if query == _ANCHOR:
                raise
            self._connection.rollback()  # as on SQLite: a store of the release before
            cursor = self._connection.execute(_BEFORE_POSTGRESQL[query], (value,))
        while cursor.description is None:
            cursor.nextset()
        rows: Sequence[Sequence[Any]] = cursor.fetchall()
        return rows

    def _open(self) -> Any:
        import psycopg

        arguments = postgresql_arguments(self._url, asked(self._password))
        arguments["tcp_user_timeout"] = 5000
        connection = psycopg.connect(self._url, autocommit=True, **arguments)
        connection.cursor_factory = psycopg.ClientCursor
        return connection


def _unreadable(error: object) -> StoreUnavailable:
    """Whatever it is, nobody can tell now: a verifier has no other answer."""
    known = refusal(error)
    if known is None:
        return StoreUnavailable(f"the store cannot be read ({code_of(error)})")
    return StoreUnavailable(str(known), hint=known.hint)


_QUERIES = (_BY_ID, _IMPORTED, _ANCHOR, _IN_USE)
_TOO_LONG = frozenset(
    {"55P03", "57014"}
)  # a lock, a statement: a new connection would wait as long


def _values(query: str, value: str, login: str) -> tuple[str, ...]:
    """Return the parameters in the order in which a query has them."""
    if query == _IN_USE:
        return ()
    return (value,) if query == _ANCHOR else (login, value)


def _on_sqlite(query: str, doubt: str) -> str:
    return query.format(now="NULL", value="?", doubt=doubt.format(login="?"))


def _on_postgresql(query: str, doubt: str) -> str:
    now = "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT)"
    return (
        f"BEGIN READ ONLY; SET LOCAL statement_timeout = {STATEMENT_MS};"
        f" SET LOCAL lock_timeout = {LOCK_MS};"
        f" {query.format(now=now, value='%s', doubt=_on_primary(doubt.format(login='%s')))}; COMMIT"
    )


def _on_primary(doubt: str) -> str:
    """A standby may lack what was committed before (rule 16)."""
    return f"CASE WHEN pg_is_in_recovery() THEN '{_STANDBY}' ELSE {doubt} END"


_STANDBY = "standby"
_ON_SQLITE = {query: _on_sqlite(query, _DOUBT) for query in _QUERIES}
_ON_POSTGRESQL = {query: _on_postgresql(query, _DOUBT) for query in _QUERIES}
_BEFORE_SQLITE = {query: _on_sqlite(query, "NULL") for query in _QUERIES}
_BEFORE_POSTGRESQL = {query: _on_postgresql(query, "NULL") for query in _QUERIES}


def _certain(rows: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """Return the rows of versions. Raises StoreQuarantined where one may be wrong, or one missing."""
    for *_, doubt in rows:
        if doubt == _STANDBY:
            raise StoreUnavailable("this is no primary", hint="let store.url name the primary")
        if doubt is not None:
            raise StoreQuarantined
    return [row[:-1] for row in rows if row[0] is not None]


def _decision(row: Sequence[Any]) -> Decision:
    uid, name, login, agent_state, credential, version, state, scheme, digest, tag, *rest = row
    *times, life, epoch = rest
    deadline, not_after, now = (None if time is None else instant(time) for time in times)
    return Decision(
        agent_uid=uid,
        agent_name=name,
        login=login,
        agent_state=AgentState(agent_state),
        credential_uid=credential,
        version_id=version,
        state=VersionState(state),
        scheme=scheme,
        digest=digest,
        tag=tag,
        deadline=deadline,
        not_after=not_after,
        now=now,
        epoch=Epoch(life, epoch),
    )
