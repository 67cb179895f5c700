"""A gate for work that costs memory and cores: few at once, few that wait, and a time for the rest.

SECURITY: a permit belongs to the thread that works, never to a request: a client that hangs up cannot
leave more hashes running than there are permits. Whoever finds the queue full is told when to come
back, and nobody else is told the same moment: so a crowd that honours it comes back in a line. Each has
one place in it, however often they ask: the line would grow by everybody who does not honour it, and
whoever does would wait for minutes before a gate that is idle.

Permits go round in the order of arrival, each to one thread that is woken for it: were all woken, they
would take the interpreter from each other as often as there are of them.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from keyturn.errors import VerifierBusy
from keyturn.verifier.recent import keep

QUEUE = 64
_FIRST_GUESS = 0.03  # seconds; argon2id at the OWASP minimum on one core
# The line of those who come back is laid out by what a hash takes at best, and tighter than that: who
# comes too early costs a thousandth of a hash, a permit that waits for somebody costs all of it. A mean
# would be that of the first moment, when a whole crowd takes the cores: 10,000 came in in 1.7 times
# what their hashes took.
_FORGET = 1.02  # by so much each further one may be slower
_DISTANCE = 0.75
_PLACES = 100_000  # in that line that are remembered


class Ticket:
    """A place in a gate's queue, until there is a permit for it or it is given back."""

    __slots__ = ("_gate", "turn", "waits")

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self.waits = True
        self.turn = threading.Lock()  # opened by whoever gives it its permit
        self.turn.acquire()

    def give_back(self) -> None:
        """Leave the queue, unless the permit has come."""
        self._gate.let_go(self)


class Gate:
    """Lets threads through, one a core and within a budget of memory, while few wait. Thread-safe."""

    def __init__(
        self,
        permits: int,
        *,
        memory_kib: int | None = None,
        queue: int | None = QUEUE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`memory_kib` is the budget; `queue` None lets everybody wait, for callers that are few."""
        self._permits = permits
        self._budget = memory_kib
        self._queue = queue
        self._clock = clock
        self._guard = threading.Lock()
        self._line: deque[tuple[int, Ticket]] = deque()  # who waits by now, and for how much
        self._running = 0
        self._used = 0
        self._each = _FIRST_GUESS
        self._next = 0.0  # when the next one that is turned away may come back
        self._places: OrderedDict[str, float] = OrderedDict()  # when each of them may
        self.waiting = 0

    def queue_up(self, who: str = "") -> Ticket:
        """Take a place in the queue; `who` is turned away until one moment, "" is anybody.

        Raises VerifierBusy, with the time to come back, if it is full.
        """
        with self._guard:
            if self._queue is not None and self.waiting >= self._queue:
                raise VerifierBusy(retry_after=self._come_back(who))
            self.waiting += 1
            return Ticket(self)

    def let_go(self, ticket: Ticket) -> None:
        """Take a place back, unless it was used."""
        with self._guard:
            self._no_longer_waits(ticket)

    @contextmanager
    def passing(
        self, memory_kib: int = 0, ticket: Ticket | None = None, *, who: str = ""
    ) -> Iterator[None]:
        """Hold a permit for work of this size; `ticket` is one that was taken before.

        Raises VerifierBusy as `queue_up` does.
        """
        self._wait(memory_kib, ticket or self.queue_up(who))
        began = self._clock()
        try:
            yield
        finally:
            with self._guard:
                self._each = min(self._clock() - began, self._each * _FORGET)
                self._release(memory_kib)

    def _wait(self, memory_kib: int, ticket: Ticket) -> None:
        mine = (memory_kib, ticket)
        with self._guard:
            self._line.append(mine)
            self._admit()
        try:
            ticket.turn.acquire()
        except BaseException:  # such as a KeyboardInterrupt
            with self._guard:
                if mine in self._line:
                    self._line.remove(mine)
                    self._no_longer_waits(ticket)
                else:
                    self._release(memory_kib)
            raise

    def _release(self, memory_kib: int) -> None:
        self._running -= 1
        self._used -= memory_kib
        self._admit()

    def _admit(self) -> None:
        while self._line and self._has_room(self._line[0][0]):
            memory_kib, ticket = self._line.popleft()
            self._no_longer_waits(ticket)
            self._running += 1
            self._used += memory_kib
            ticket.turn.release()

    def _no_longer_waits(self, ticket: Ticket) -> None:
        self.waiting -= ticket.waits
        ticket.waits = False

    def _has_room(self, memory_kib: int) -> bool:
        if self._running >= self._permits:
            return False
        # Whatever asks for more than all of it goes alone.
        return not self._running or self._budget is None or self._used + memory_kib <= self._budget

    def _come_back(self, who: str) -> timedelta:
        """Give the next place in the line of those who come back later, or the one that they have."""
        now, each = self._clock(), self._each / self._permits
        place = self._places.get(who, now)
        if place <= now:
            place = self._next = max(self._next, now + self.waiting * each) + each * _DISTANCE
            if who:
                keep(self._places, who, place, most=_PLACES)
        return timedelta(seconds=place - now)
