"""The threads that decide what the loop cannot tell at once: few ask the store, as few hash.

Who waits for a hash waits in a queue and not in a thread: a hundred threads that want the interpreter
keep it from each other, and from the loop (a page took 200 ms where it takes 20). All threads are there
before the first answer, so that a limit of tasks shows at the start and not in the middle of a herd.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar

import structlog

from keyturn.errors import KeyturnError, StoreUnavailable
from keyturn.verifier.decision import IMPORTED_QUEUE, Proof, Unproven, Verifier
from keyturn.verifier.http.callers import Caller

READERS = 4  # that ask the store: a look-up may wait for a server, or for a lock
_REFUSERS = 2  # that ask the spool alone
_SPARE = 2  # beside those that hash: one of them has the next secret in its hand
# By which hashes give way to the loop and to look-ups where cores are short: a thread that waits for a
# core while it holds the interpreter keeps all others waiting, and a hash holds it hardly ever.
_NICE = 5
_OTHERS = 4  # every so many pieces one of the others, or a new secret might wait for ever
_BY_STORE, _BY_SPOOL, _BY_HASH, _IMPORTED = range(4)  # in the order in which they hand on
_log = structlog.get_logger(__name__)

T = TypeVar("T")
Outcome = Proof | StoreUnavailable | None
Ways = Iterator[tuple[bytes, bytes]]  # logins and secrets that may have been meant


class Workers:
    """Threads for one desk."""

    def __init__(
        self, verifier: Verifier, *, hashing: int, done: Callable[[bytes, Outcome], None]
    ) -> None:
        """`hashing` at once; `done` is called with a key and its outcome, by any of the threads."""
        self._verifier = verifier
        self._done = done
        self._sizes = (  # in the order of `_BY_STORE` and so on; and how much each gives way
            (READERS, 0),
            (_REFUSERS, 0),
            (hashing + _SPARE, _NICE),
            (IMPORTED_QUEUE + 1 + _SPARE, _NICE),
        )
        self._lanes: list[_Lane] = []

    def start(self) -> None:
        """Start them all. Raises KeyturnError where there may not be so many."""
        for size, nice in self._sizes:
            self._lanes.append(_Lane(size, nice=nice))

    def decide(
        self,
        key: bytes,
        ways: Ways,
        caller: Caller,
        *,
        by_spool: bool,
        first: bool,
        wanted: Callable[[], bool],
    ) -> None:
        """Decide, and call `done`. `by_spool` says that the spool refuses it; `first` goes before others.

        Nothing is looked up that is not `wanted` any more when its turn comes: a store that is too slow
        for all of them would else be asked for those alone who have given up.

        SECURITY: what is revoked here waits in no line for a store that is locked, and who was right
        before in none that strangers make long.
        """
        lane = self._lanes[_BY_SPOOL if by_spool else _BY_STORE]
        lane.put(partial(self._look_up, key, ways, caller, wanted), first=first)

    def close(self) -> None:
        """Wait for what is being decided."""
        for lane in self._lanes:
            lane.close()

    def _look_up(self, key: bytes, ways: Ways, caller: Caller, wanted: Callable[[], bool]) -> None:
        def look_up() -> Proof | Unproven | None:
            if not wanted():
                raise StoreUnavailable("nobody waits any more")
            for login, text in ways:
                found = self._verifier.begin(key, login, text, agents=caller.agents)
                if found is not None:
                    return found
            return None

        found = _outcome(look_up)
        if isinstance(found, Unproven):
            lane = self._lanes[_IMPORTED if found.imported else _BY_HASH]
            lane.put(partial(self._prove, key, found, ways, caller))
        else:
            self._done(key, found)

    def _prove(self, key: bytes, unproven: Unproven, ways: Ways, caller: Caller) -> None:
        def prove() -> Proof | None:
            found = unproven.prove()
            for login, text in () if found else ways:
                found = self._verifier.decide(key, login, text, agents=caller.agents)
                if found is not None:
                    break
            return found

        self._done(key, _outcome(prove))


class _Lane:
    """Threads that take work in its order. Who is at work takes the next by itself.

    To wake a thread for each piece costs ten times a look-up's share of the interpreter.
    """

    def __init__(self, size: int, *, nice: int = 0) -> None:
        """Raises KeyturnError where there may not be so many."""
        self._size = size
        self._pool = ThreadPoolExecutor(size, "verifier", partial(_give_way, nice))
        self._first: deque[Callable[[], None]] = deque()
        self._work: deque[Callable[[], None]] = deque()
        self._taken = 0
        self._guard = threading.Lock()
        self._busy = 0
        self._fill()

    def _fill(self) -> None:
        """Start each thread now: a pool starts one where none is free."""
        ready = threading.Barrier(self._size + 1)
        try:
            for _ in range(self._size):
                self._pool.submit(ready.wait)
        except RuntimeError:
            ready.abort()
            self._pool.shutdown()
            raise KeyturnError(
                "not all threads of the verifier can be had",
                hint="raise TasksMax= of its unit, or `ulimit -u`",
            ) from None
        ready.wait()

    def put(self, work: Callable[[], None], *, first: bool = False) -> None:
        """Do it soon, and before most of what is not to be done first. It may not raise."""
        with self._guard:
            (self._first if first else self._work).append(work)
            if self._busy == self._size:
                return
            self._busy += 1
        self._pool.submit(self._go_on)

    def close(self) -> None:
        """Wait for what is being done, and do no more."""
        with self._guard:
            self._first.clear()
            self._work.clear()
        self._pool.shutdown(wait=True)

    def _go_on(self) -> None:
        while True:
            with self._guard:
                work = self._next()
                if work is None:
                    self._busy -= 1
                    return
            work()

    def _next(self) -> Callable[[], None] | None:
        self._taken += 1
        if self._work and self._taken % _OTHERS == 0:
            return self._work.popleft()
        waiting = self._first or self._work
        return waiting.popleft() if waiting else None


def _give_way(nice: int) -> None:
    """Let this thread give way to others by so much (setpriority(2): on Linux it is its own)."""
    with suppress(OSError):  # a service's filter may forbid it
        mine = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, mine, os.getpriority(os.PRIO_PROCESS, mine) + nice)


def _outcome(call: Callable[[], T]) -> T | StoreUnavailable:
    try:
        return call()
    except StoreUnavailable as error:
        return error
    except KeyturnError as error:
        _log.error("verifier.failed", problem=str(error), hint=error.hint)
    except BaseException:  # noqa: BLE001  # whatever it was: nobody can tell, and that is no refusal
        _log.error("verifier.failed", exc_info=True)
    return StoreUnavailable("the decision failed")
