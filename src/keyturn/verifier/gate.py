"""A gate for work that costs memory and cores: few at once, few that wait, and a time for the rest.

SECURITY: a permit belongs to the thread that works, never to a request: a client that hangs up cannot
leave more hashes running than there are permits. Whoever finds the queue full is told when to come
back, and nobody else is told the same moment: so a crowd that honours it comes back in a line.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from keyturn.errors import VerifierBusy

QUEUE = 64
_FIRST_GUESS = 0.03  # seconds; argon2id at the OWASP minimum on one core
_WEIGHT = 0.1  # of the newest duration in the mean


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
        self._turn = threading.Condition()
        self._running = 0
        self._used = 0
        self._mean = _FIRST_GUESS
        self._next = 0.0  # when the next one that is turned away may come back
        self.waiting = 0

    @contextmanager
    def passing(self, memory_kib: int = 0) -> Iterator[None]:
        """Hold a permit for work of this size.

        Raises VerifierBusy, with the time to come back, where too many wait.
        """
        with self._turn:
            if self._queue is not None and self.waiting >= self._queue:
                raise VerifierBusy(retry_after=self._place())
            self.waiting += 1
            try:
                self._turn.wait_for(lambda: self._has_room(memory_kib))
            finally:
                self.waiting -= 1
            self._running += 1
            self._used += memory_kib
        began = self._clock()
        try:
            yield
        finally:
            with self._turn:
                self._running -= 1
                self._used -= memory_kib
                self._mean += _WEIGHT * (self._clock() - began - self._mean)
                self._turn.notify_all()

    def _has_room(self, memory_kib: int) -> bool:
        if self._running >= self._permits:
            return False
        # Whatever asks for more than all of it goes alone.
        return not self._running or self._budget is None or self._used + memory_kib <= self._budget

    def _place(self) -> timedelta:
        """Give the next place in the line of those who come back later."""
        now, each = self._clock(), self._mean / self._permits
        self._next = max(self._next, now + self.waiting * each) + each
        return timedelta(seconds=self._next - now)
