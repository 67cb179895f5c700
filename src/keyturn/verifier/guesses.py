"""How often a secret may be guessed that has no tag: an imported one.

SECURITY: every guess at it costs a hash, so whoever knows a login could keep the one permit for these
busy, and everybody else's imported secret waiting. Each credential has a budget of wrong ones and two
hashes at once; beyond that nobody can tell for a while, which is no refusal. A right one costs nothing,
and one that was right before needs no hash: whoever authenticated here goes on through any guessing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from keyturn.errors import VerifierBusy

BURST = 20  # wrong ones at once
EVERY = 3.0  # seconds for one more: 29,000 a day, where 16 random bytes have 2**128
AT_ONCE = 2


@dataclass(slots=True)
class Guess:
    """One attempt; it was wrong unless somebody says otherwise."""

    right: bool = False


@dataclass(slots=True)
class _Account:
    spent: float = 0.0
    at: float = 0.0
    running: int = 0


class Guesses:
    """The budgets of all credentials that were asked for; there are no more than the store has."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._guard = threading.Lock()

    @contextmanager
    def one(self, credential: str) -> Iterator[Guess]:
        """Make an attempt. Raises VerifierBusy where the budget is spent.

        Whatever ends without an answer, as by a full gate, was none.
        """
        guess, told = Guess(), False
        self._begin(credential)
        try:
            yield guess
            told = True
        finally:
            self._end(credential, free=guess.right or not told)

    def _begin(self, credential: str) -> None:
        now = self._clock()
        with self._guard:
            account = self._accounts.setdefault(credential, _Account(at=now))
            account.spent = max(0.0, account.spent - (now - account.at) / EVERY)
            account.at = now
            if account.spent > BURST - 1:
                missing = account.spent - (BURST - 1)
                raise VerifierBusy(retry_after=timedelta(seconds=missing * EVERY))
            if account.running >= AT_ONCE:
                raise VerifierBusy(retry_after=timedelta(seconds=1))
            account.running += 1
            account.spent += 1

    def _end(self, credential: str, *, free: bool) -> None:
        with self._guard:
            account = self._accounts[credential]
            account.running -= 1
            if free:
                account.spent = max(0.0, account.spent - 1)
