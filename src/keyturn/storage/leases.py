"""The freshness lease of a verifier that remembers, on PostgreSQL (protocol.md, 16 to 19; ADR 27).

A thread polls the primary with one statement, which renews the verifier's row, acknowledges what was
applied before it was sent, and brings the newest epoch with the store's time:

    register        INSERT, committed; only then is anything read
    renew           sent at S: whatever was committed before S is in its answer
    answer          published in memory: from here on every `epoch()` says so, until S + lease
    acknowledge     a new epoch by one more renewal, at once
    close           no answer any more, and only then is the row taken away

So whoever cuts something off waits until each row acknowledges that, or for one lease since its
commit: an answer that counts after that was sent after it.
"""

from __future__ import annotations

import os
import select
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import structlog

from keyturn.core.lease import DRIFT, LONGEST
from keyturn.errors import StoreUnavailable, VerifierStale
from keyturn.storage.codec import instant
from keyturn.storage.engine import code_of
from keyturn.storage.freshness import NO_EPOCH, Epoch
from keyturn.storage.postgresql import Password, asked, no_password, postgresql_arguments, refusal

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

BETWEEN = 0.02  # seconds between acknowledgements where every poll brings a new epoch

_log = structlog.get_logger(__name__)


def boottime() -> float:
    """Return the seconds since boot, suspend included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leasing:
    """How a process registers: its random id, who it is for people, its lease and how often it polls."""

    id: str
    host: str
    release: str
    lease: timedelta = timedelta(seconds=30)
    poll: timedelta = timedelta(milliseconds=250)

    @property
    def patience(self) -> float:
        """Seconds for one answer, far below the lease."""
        return max(self.lease.total_seconds() / 10, 0.3)


class Answer(NamedTuple):
    """What a renewal brings: the store's epoch and its time, as they were after it was sent."""

    epoch: Epoch
    now: datetime


class Link(Protocol):
    """How the store is reached. Everything raises StoreUnavailable, none of it takes long."""

    def register(self) -> None:
        """Make the row; committed when this returns."""

    def renew(self, applied: Epoch) -> Answer | None:
        """Acknowledge and ask; None where there is no such row any more."""

    def deregister(self) -> None:
        """Take the row away."""

    def close(self) -> None:
        """Give the connection back."""


class _Held(NamedTuple):
    """What the newest answer gave. Times are seconds since boot."""

    epoch: Epoch
    sent: float
    until: float
    received: float
    now: datetime


class Leased:
    """The epoch of a store on another host, good for one lease. Thread-safe.

    Implements `freshness.Freshness`, and `ports.Clock` with the store's time.
    """

    def __init__(
        self, leasing: Leasing, link: Link, *, clock: Callable[[], float] = boottime
    ) -> None:
        self._lease = min(leasing.lease, LONGEST).total_seconds()
        self._poll = leasing.poll.total_seconds()
        self._link = link
        self._clock = clock
        self._held: _Held | None = None
        self._applied = NO_EPOCH
        self._source = 0
        self._registered = False
        self._ending = threading.Event()
        self._answered = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self.trouble = ""  # why the last poll failed
        _living.add(self)

    @classmethod
    def open(cls, url: str, leasing: Leasing, *, password: Password = no_password) -> Leased:
        """Start to poll a store on PostgreSQL."""
        found = cls(leasing, PostgresLink(url, leasing, password))
        found.start()
        return found

    def start(self) -> None:
        """Start the thread that polls."""
        self._thread.start()

    def wait(self, patience: float) -> bool:
        """Wait for the first answer; False where none came."""
        return self._answered.wait(patience)

    # --- what verifications ask -------------------------------------------------------------

    def epoch(self) -> Epoch:
        """Return the newest epoch that was applied. Raises VerifierStale where the lease is over."""
        held = self._held
        if held is None or self._clock() >= held.until:
            raise VerifierStale
        return held.epoch

    def learn(self) -> Epoch:
        """Return the same: nothing but a poll can tell."""
        return self.epoch()

    def now(self) -> datetime:
        """Return what the store's time is at least. Raises VerifierStale before the first answer."""
        held = self._held
        if held is None:
            raise VerifierStale
        # SECURITY: from the receiving of the answer on, and less than this clock says: a deadline
        # refuses a good agent only when it has passed for sure.
        return held.now + timedelta(seconds=(self._clock() - held.received) * (1 - DRIFT))

    def boottime(self) -> timedelta:
        """Return the time since boot, suspend included."""
        return timedelta(seconds=self._clock())

    def staleness(self) -> float:
        """Return the seconds since the newest answered poll was sent; infinite before the first."""
        held = self._held
        return float("inf") if held is None else self._clock() - held.sent

    # --- polling ----------------------------------------------------------------------------

    def poll(self) -> bool:
        """Ask once. True where one more must be sent at once. Raises StoreUnavailable."""
        if not self._registered:
            self._link.register()
            self._registered = True
        sent = self._clock()
        answer = self._link.renew(self._applied)
        if answer is None:
            self._registered = False  # somebody thought that we are gone
            return True
        received = self._clock()
        if answer.epoch[:2] < self._applied[:2]:
            self._source += 1  # a store that went back: what is remembered of its numbers is void
        epoch = answer.epoch._replace(source=self._source)
        # Published before it can be acknowledged, which the next renewal does (rule 17).
        self._held = _Held(epoch, sent, sent + self._lease, received, answer.now)
        news, self._applied = epoch != self._applied, epoch
        self._answered.set()
        return news

    def _run(self) -> None:
        at_once = False
        while not self._ending.is_set():
            began, before = time.monotonic(), at_once
            at_once = self._attempt()
            pause = (BETWEEN if before else 0.0) if at_once else self._poll
            self._ending.wait(max(0.0, pause - (time.monotonic() - began)))

    def _attempt(self) -> bool:
        try:
            again = self.poll()
        except StoreUnavailable as error:
            self._failed(str(error), error.code)
        except Exception as error:  # noqa: BLE001  # or the thread ends and this process is stale for good
            self._failed(type(error).__name__, type(error).__name__)
        else:
            if self.trouble:
                _log.info("lease.renewed")
            self.trouble = ""
            return again
        return False

    def _failed(self, problem: str, code: str) -> None:
        if not self.trouble:
            _log.warning("lease.not-renewed", code=code, problem=problem)
        self.trouble = problem

    def close(self) -> None:
        """Answer nothing any more, then deregister."""
        self._ending.set()
        if self._thread.ident is not None:
            self._thread.join(self._lease)
        self._held = None
        if self._registered and not self._thread.is_alive():
            try:
                self._link.deregister()
            except StoreUnavailable as error:
                _log.warning("lease.not-deregistered", code=error.code)
        self._link.close()

    def _forget(self) -> None:
        """In the child of a fork: its parent acknowledges for itself alone."""
        self._held = None
        self._ending.set()


_living: weakref.WeakSet[Leased] = weakref.WeakSet()


def _forked() -> None:
    for one in list(_living):
        one._forget()  # noqa: SLF001 - of this module


os.register_at_fork(after_in_child=_forked)


# --- the database ---------------------------------------------------------------------------

_NOW = "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT)"
_REGISTER = (
    "INSERT INTO verifiers (id, login, host, release, started_at, lease, incarnation, epoch, renewals,"
    " renewed_at) VALUES (%s, current_user, %s, %s, {now}, %s, 0, 0, 0, {now})"
    " ON CONFLICT (id) DO NOTHING"  # the answer of a first try may be lost
).replace("{now}", _NOW)
_RENEW = (
    "UPDATE verifiers v SET incarnation = %s, epoch = %s, renewals = v.renewals + 1,"
    " renewed_at = {now} FROM meta m WHERE v.id = %s AND NOT pg_is_in_recovery()"
    " RETURNING m.incarnation, m.epoch, {now}"
).replace("{now}", _NOW)
_DEREGISTER = "DELETE FROM verifiers WHERE id = %s"
# Nobody's default shall make a snapshot older than its statement.
_MESSAGE = (
    "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; SET LOCAL statement_timeout = {0};"
    " SET LOCAL lock_timeout = {0}; {1}; COMMIT"
)


class PostgresLink:
    """A verifier's row on PostgreSQL, each request one message: so a pooler may stand between.

    Whatever goes wrong or takes too long ends the connection: what was sent may still land, and says
    nothing that is not true.
    """

    def __init__(self, url: str, leasing: Leasing, password: Password = no_password) -> None:
        self._url = url
        self._of = leasing
        self._password = password
        self._connection: Any = None

    def register(self) -> None:
        """Insert the row."""
        one, lease = self._of, min(self._of.lease, LONGEST)
        values = (one.id, one.host[:200], one.release, lease // timedelta(microseconds=1))
        self._ask(_REGISTER, values)

    def renew(self, applied: Epoch) -> Answer | None:
        """Update it, and read the newest epoch in the same statement."""
        row = self._ask(_RENEW, (applied.incarnation, applied.number, self._of.id))
        return None if row is None else Answer(Epoch(row[0], row[1]), instant(row[2]))

    def deregister(self) -> None:
        """Delete it."""
        self._ask(_DEREGISTER, (self._of.id,))

    def close(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _ask(self, query: str, values: tuple[object, ...]) -> tuple[int, ...] | None:
        import psycopg

        try:
            if self._connection is None:
                self._connection = self._open()
            cursor = self._connection.cursor()
            limit = int(self._of.patience * 1000)
            text: str = _MESSAGE.format(limit, cursor.mogrify(query, values))
            return _row(_exchange(self._connection.pgconn, text.encode(), self._of.patience))
        except TimeoutError:
            self.close()
            raise StoreUnavailable("the store did not answer in time") from None
        except (psycopg.Error, OSError) as error:
            self.close()
            known = refusal(error)
            if known is None:
                raise StoreUnavailable(f"the store cannot be asked ({code_of(error)})") from None
            raise StoreUnavailable(str(known), hint=known.hint) from None

    def _open(self) -> Any:
        import psycopg

        arguments = postgresql_arguments(self._url, asked(self._password))
        arguments["connect_timeout"] = 2  # seconds; it takes no less
        arguments["tcp_user_timeout"] = int(self._of.patience * 2000)
        arguments["application_name"] = "keyturn lease"
        connection = psycopg.connect(self._url, autocommit=True, **arguments)
        connection.cursor_factory = psycopg.ClientCursor
        return connection


def _exchange(pgconn: Any, message: bytes, patience: float) -> list[PGresult]:
    """Send one message and return its results; never longer than `patience` seconds.

    psycopg's own waiting has no end, and a server that was stopped keeps its connections alive.
    """
    until = time.monotonic() + patience
    pgconn.send_query(message)
    results: list[PGresult] = []
    while True:
        while (sending := pgconn.flush()) or pgconn.is_busy():
            _ready(pgconn.socket, until, writing=bool(sending))
            pgconn.consume_input()
        if (result := pgconn.get_result()) is None:
            return results
        results.append(result)


def _ready(socket: int, until: float, *, writing: bool) -> None:
    waiting = select.poll()  # `select` ends at a thousand descriptors
    waiting.register(socket, select.POLLIN | (select.POLLOUT if writing else 0))
    left = until - time.monotonic()
    if left <= 0 or not waiting.poll(left * 1000):
        raise TimeoutError("no answer in time")


def _row(results: list[PGresult]) -> tuple[int, ...] | None:
    """Return the one row that is in the results, if there is one. Raises what the server refused."""
    import psycopg
    from psycopg.pq import ExecStatus

    found = None
    for result in results:
        if result.status == ExecStatus.TUPLES_OK and result.ntuples:
            found = tuple(int(result.get_value(0, n) or 0) for n in range(result.nfields))
        elif result.status not in (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK):
            raise psycopg.errors.error_from_result(result)
    return found
