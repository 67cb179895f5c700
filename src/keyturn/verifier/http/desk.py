"""Gives the answers: all that one turn of the loop has read by one look, the rest by threads.

What is remembered is answered on the loop, in microseconds; a batch of requests shares one look at
epoch and spool, taken after the last of them was read: so each look is younger than what it answers.
Whatever has to ask the store goes to a thread, and on to another one where only a hash can tell; one
flight for all who present the same. Who joins a flight on its way is not answered by it but by a look
after it, or by the next one: a yes may have been revoked, and a no accepted, since it began (I3, I1).

SECURITY: to find nothing takes the store less time than to find a wrong secret, and a tombstone takes
none of its time. So a no of a look-up leaves at a beat, of all at once, that no look-up has a part in:
it goes on from when they were asked for, whenever they are found.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable
from hashlib import blake2b
from typing import NamedTuple, Protocol

import structlog

from keyturn.errors import StoreUnavailable, VerifierBusy
from keyturn.verifier.decision import REMEMBERED, Look, Proof, Verifier
from keyturn.verifier.http.callers import ANYBODY, Caller, Callers
from keyturn.verifier.http.measures import Measures
from keyturn.verifier.http.messages import Answer, Request
from keyturn.verifier.http.presented import NOBODYS, Presented
from keyturn.verifier.http.routes import NOWHERE, Route, problem, route_of, unavailable
from keyturn.verifier.http.workers import Outcome, Workers

BEAT = 0.005  # seconds; far more than a look-up takes
PATIENCE = 5.0  # seconds; a server that was stopped answers no look-up, and refuses none
_GLANCES = 0.25  # seconds between two looks at who waits too long
MOST_FLIGHTS = 2048  # texts that are decided at once; beyond it nobody can tell
_log = structlog.get_logger(__name__)

Page = Callable[[bytes], Answer | None]  # other pages, by path
_Schedule = Callable[[Callable[[], None]], object]
_Later = Callable[[float, Callable[[], None]], object]


class Asker(Protocol):
    """Whoever sent a request; a connection."""

    certified: Caller | None

    def reply(self, request: Request, answer: Answer) -> None:
        """Send the answer to the request that was handed over last."""


class _Waiting(NamedTuple):
    asker: Asker
    request: Request
    route: Route
    caller: Caller
    began: float  # by time.perf_counter


class _Flight:
    __slots__ = ("aboard", "began", "late", "shown")

    def __init__(self, shown: Presented, first: _Waiting) -> None:
        self.shown = shown
        self.began = time.perf_counter()
        self.aboard = [first]
        self.late: list[_Waiting] = []

    def wanted(self) -> bool:
        """Whether anybody waits for it; for other threads too, as nobody is lost by either answer."""
        return bool(self.aboard or self.late)


class Desk:
    """Answers requests on one event loop, which alone calls it."""

    def __init__(self, verifier: Verifier, callers: Callers, *, threads: int, pages: Page) -> None:
        """`threads` that may hash at once; there are others for what does not hash."""
        self._verifier = verifier
        self._callers = callers
        self._pages = pages
        self._soon: _Schedule = _not_open
        self._wake: _Schedule = _not_open
        self._later: _Later = lambda _delay, call: _not_open(call)
        self._refused: list[_Waiting] = []
        self._whoever = ANYBODY if callers.open else None
        self._salt = os.urandom(32)
        self._keys: dict[bytes, bytes] = {}  # of headers that came before, by their digest
        self._batch: list[tuple[Asker, Request]] = []
        self._began = 0.0
        self._boarded = 0  # in this turn: counted when they are answered
        self._flights: dict[bytes, _Flight] = {}
        self._workers = Workers(verifier, hashing=threads, done=self._land_soon)
        self._landed: deque[tuple[bytes, Outcome]] = deque()
        self._woken = False
        self._beating = False
        self._glance = 0.0
        self.measures = Measures()

    @property
    def busy(self) -> int:
        """How many texts are being decided."""
        return len(self._flights)

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to answer on this loop. Raises KeyturnError where its threads cannot be had."""
        self._workers.start()
        self._soon, self._wake = loop.call_soon, loop.call_soon_threadsafe
        self._later = loop.call_later

    def close(self) -> None:
        """Wait for what is being decided."""
        self._workers.close()

    def take(self, asker: Asker, request: Request) -> None:
        """Answer this request soon, together with what is read until then."""
        if not self._batch:
            self._began = time.perf_counter()
            self._soon(self._serve)
        self._batch.append((asker, request))

    # --- on the loop ------------------------------------------------------------------------

    def _serve(self) -> None:
        batch, self._batch, began = self._batch, [], self._began
        look = self._look()
        self._boarded = 0
        for asker, request in batch:
            try:
                self._one(asker, request, look, began)
            except Exception:  # noqa: BLE001  # loop top: the others of the batch are answered
                _failed(asker, request)
        self.measures.turn(len(batch) - self._boarded, time.perf_counter() - began)

    def _look(self) -> Look | StoreUnavailable:
        try:
            return self._verifier.look()
        except StoreUnavailable as error:
            return error

    def _one(
        self, asker: Asker, request: Request, look: Look | StoreUnavailable, began: float
    ) -> None:
        route = route_of(request.path)
        if route is None:
            asker.reply(request, self._page(request))
        elif route.methods is not None and request.method not in route.methods:
            allow = b", ".join(sorted(route.methods)).decode()
            asker.reply(request, problem(405, "invalid_request", f"only {allow}", Allow=allow))
        else:
            caller = asker.certified or self._whoever or route.caller(request, self._callers)
            if caller is None:
                asker.reply(request, route.stranger)
                self._verifier.counts["stranger"] += 1
            else:
                self._read(_Waiting(asker, request, route, caller, began), look)

    def _read(self, who: _Waiting, look: Look | StoreUnavailable) -> None:
        request, route = who.request, who.route
        mark = b""
        if not request.body and len(request.authorization) == 1 and not route.introspects:
            # The same header as before: what it shows is known without reading it again.
            mark = blake2b(request.authorization[0], key=self._salt, digest_size=32).digest()
            if who.caller.agents is not None:
                mark += who.caller.name.encode()
            key = self._keys.get(mark)
            usual = route.header_only or not request.query
            if key is not None and isinstance(look, Look) and usual:
                found = self._recall(key, look)
                if found is not None:
                    return self._tell(who, found)
        shown = route.read(request)
        if isinstance(shown, Answer):
            self._verifier.counts["malformed"] += 1
            return who.asker.reply(request, shown)
        return self._ask(who, shown, look, mark)

    def _page(self, request: Request) -> Answer:
        found = self._pages(request.path)
        if found is None:
            return NOWHERE
        if request.method not in (b"GET", b"HEAD"):
            return problem(405, "invalid_request", "only GET, HEAD", Allow="GET, HEAD")
        return found

    def _ask(
        self, who: _Waiting, shown: Presented, look: Look | StoreUnavailable, mark: bytes = b""
    ) -> None:
        if isinstance(look, StoreUnavailable):
            return self._tell(who, look)
        if shown is NOBODYS:
            return self._tell(who, None)
        parts = [part for way in shown.ways() for part in way]
        key = self._verifier.key(*parts, *who.caller.scope)
        found = self._recall(key, look)
        if found is None:
            return self._board(key, shown, who, look)
        if mark and isinstance(found, Proof):
            if len(self._keys) >= REMEMBERED:
                self._keys.clear()
            self._keys[mark] = key
        return self._tell(who, found)

    def _recall(self, key: bytes, look: Look) -> Outcome:
        try:
            return self._verifier.recall(key, look)
        except StoreUnavailable as error:
            return error

    def _tell(self, who: _Waiting, found: Outcome) -> None:
        if isinstance(found, Proof):
            if who.caller.may_hear_of(found.verified.agent):
                self._verifier.count(found)
                return who.asker.reply(who.request, who.route.accepted(found))
            found = None
        self._verifier.count(found)
        no = who.route.no if found is None else unavailable(found.retry_after)
        return who.asker.reply(who.request, no)

    # --- by threads -------------------------------------------------------------------------

    def _board(self, key: bytes, shown: Presented, who: _Waiting, look: Look) -> None:
        flight = self._flights.get(key)
        if flight is not None:
            self._boarded += 1
            flight.late.append(who)
            return None
        ways, known = shown.ways(), self._verifier.was_right(key)
        refused = all(self._verifier.is_tombstoned(text, look) for _, text in ways)
        # SECURITY: a crowd of strangers before a store that is slow, or locked, must turn neither the
        # spool's no nor an agent that was right here before into "cannot tell".
        if len(self._flights) >= MOST_FLIGHTS and not (refused or known):
            return self._tell(who, VerifierBusy())
        self._boarded += 1
        flight = self._flights[key] = _Flight(shown, who)
        self._keep_beat()
        self._workers.decide(
            key,
            iter(ways),
            who.caller,
            by_spool=refused,
            first=known,
            wanted=flight.wanted,
        )
        return None

    def _land_soon(self, key: bytes, outcome: Outcome) -> None:
        """Take what a thread has found."""
        self._landed.append((key, outcome))
        # SECURITY: a no waits for the beat without a word: the loop, once woken, counts its
        # milliseconds from then on, and the beat would come by as much later.
        if outcome is not None and not self._woken:
            self._woken = True
            self._wake(self._collect)

    def _collect(self) -> None:
        self._woken = False  # before the first look: what lands from here on wakes us again
        while self._landed:
            key, outcome = self._landed.popleft()
            flight = self._flights.pop(key)
            if outcome is None:
                self._refused += flight.aboard
            else:
                self._land(flight.aboard, outcome)
            if flight.late:
                self._again(key, flight)

    def _land(self, waiting: list[_Waiting], outcome: Outcome) -> None:
        for who in waiting:
            try:
                self._tell(who, outcome)
            except Exception:  # noqa: BLE001  # as in `_serve`: the others are answered
                _failed(who.asker, who.request)
            self.measures.one(time.perf_counter() - who.began)

    def _keep_beat(self) -> None:
        # SECURITY: from the asking on, not from the finding: a loop counts in whole milliseconds, and
        # an alarm set when a look-up ends would tell by them when it ended.
        if not self._beating:
            self._beating = True
            self._later(BEAT - time.monotonic() % BEAT, self._beat)

    def _beat(self) -> None:
        self._collect()
        due = time.perf_counter() - BEAT
        waiting = self._refused
        self._refused = [who for who in waiting if who.began > due]
        self._land([who for who in waiting if who.began <= due], None)
        self._beating = False
        if self._refused or self._flights:
            self._keep_beat()
        self._give_up()

    def _give_up(self) -> None:
        """Tell who waits too long that nobody can tell; what is found later is remembered."""
        now = time.perf_counter()
        if now < self._glance:
            return
        self._glance = now + _GLANCES
        for flight in list(self._flights.values()):  # the oldest first
            if flight.began > now - PATIENCE:
                break
            waiting = flight.aboard + flight.late
            flight.aboard, flight.late = [], []
            self._land(waiting, StoreUnavailable("no answer in time"))

    def _again(self, key: bytes, flight: _Flight) -> None:
        """Answer those who came while it flew, as if they came now."""
        look = self._look()
        for who in flight.late:
            ahead = self._flights.get(key)
            if ahead is not None:
                ahead.aboard.append(who)  # it began just now, for all of them
                continue
            self._boarded = 0
            try:
                self._ask(who, flight.shown, look)
            except Exception:  # noqa: BLE001  # as in `_serve`: the others are answered
                _failed(who.asker, who.request)
            if not self._boarded:
                self.measures.one(time.perf_counter() - who.began)


def _failed(asker: Asker, request: Request) -> None:
    """Answer all the same, from within the handler of what went wrong."""
    _log.error("verifier.failed", exc_info=True)
    asker.reply(request, problem(500, "server_error"))


def _not_open(_call: Callable[[], None]) -> None:
    raise RuntimeError("no loop yet")
