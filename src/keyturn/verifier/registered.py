"""Where the verifiers that remember are with an epoch, and which of them are gone (rule 18, ADR 27).

Nothing here goes by a time that a row tells. A verifier is waited for until it has acknowledged, or
until its lease has run out by this process's own clock, counted from the later of two moments after
which it cannot have got an answer without the epoch:

    asked     the first question about this epoch, which came after its commit
    still     its row was seen as it is now, and has not been renewed since: whatever it may answer by
              was sent before that. A row that stands still for a whole lease is taken away.

The earlier of the two ends counts. Both are this process's own: a restart waits again from the start.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import structlog

from keyturn.core.lease import allowance
from keyturn.errors import StorageError
from keyturn.ports import Standing
from keyturn.storage.engine import Database
from keyturn.storage.freshness import Epoch
from keyturn.storage.leases import boottime
from keyturn.storage.verifiers import (
    RegisteredVerifier,
    Registrations,
    deregister,
    registered,
)

POLL = 0.05  # seconds
REMEMBERED = 10_000  # questions; one that is forgotten is waited for anew

_log = structlog.get_logger(__name__)


class Registered:
    """The registered verifiers of a store, as one waiting process sees them. Thread-safe.

    `patience` is how many seconds `settled` waits by itself: about as long as a poll takes to come.
    """

    def __init__(
        self,
        database: Callable[[], Database],
        *,
        clock: Callable[[], float] = boottime,
        patience: float = 0.0,
    ) -> None:
        self._patience = patience
        self._database = database
        self._clock = clock
        self._asked: OrderedDict[Epoch, float] = OrderedDict()
        self._still: dict[str, tuple[int, float]] = {}  # renewals, and since when
        self._guard = threading.Lock()

    def settled(self, epoch: int) -> bool:
        """Tell whether none is behind any more, at once or in a moment. Raises StoreUnavailable."""
        until = time.monotonic() + self._patience
        while not (found := self.standing(epoch).settled) and time.monotonic() < until:
            time.sleep(POLL)
        return found

    def standing(self, epoch: int) -> Standing:
        """Tell how far they are with an epoch that is committed. Raises StoreUnavailable."""
        began, found = self._look()
        wanted = Epoch(found.epoch.incarnation, epoch)  # in another life it is another one
        asked = self._first_asked(wanted, began)
        behind = [row for row in found.rows if not _knows(row, wanted)]
        waiting = [row for row in behind if began - asked <= allowance(row.lease)]
        waiting = [row for row in waiting if not self._is_over(row, began)]
        self._take_away(found.rows, began)
        return Standing(
            settled=not waiting,
            acknowledged=len(found.rows) - len(behind),
            live=len(found.rows),
            silent=tuple(row.name for row in behind),
        )

    def keep(self) -> int:
        """Take away those that are gone; count the others. Raises StoreUnavailable."""
        began, found = self._look()
        return len(found.rows) - self._take_away(found.rows, began)

    def _first_asked(self, epoch: Epoch, now: float) -> float:
        with self._guard:
            asked = self._asked.setdefault(epoch, now)
            while len(self._asked) > REMEMBERED:
                self._asked.popitem(last=False)
            return asked

    def _look(self) -> tuple[float, Registrations]:
        """Read the rows. The time is from before; what is noted of them is from after."""
        began = self._clock()
        found = self._database().read(registered)
        seen = self._clock()
        with self._guard:
            before = self._still
            self._still = {
                row.id: before[row.id]
                if row.id in before and before[row.id][0] == row.renewals
                else (row.renewals, seen)
                for row in found.rows
            }
        return began, found

    def _is_over(self, row: RegisteredVerifier, now: float) -> bool:
        with self._guard:
            renewals, since = self._still.get(row.id, (-1, now))
        return renewals == row.renewals and now - since > allowance(row.lease)

    def _take_away(self, rows: tuple[RegisteredVerifier, ...], now: float) -> int:
        over = [row for row in rows if self._is_over(row, now)]
        for row in over:
            with suppress(StorageError):  # whoever looks next tries again
                if self._database().write(partial(deregister, gone=row)):
                    _log.warning("verifier.gone", host=row.host, verifier=row.id[:8])
        return len(over)


def _knows(row: RegisteredVerifier, wanted: Epoch) -> bool:
    known = row.acknowledged
    return known.incarnation == wanted.incarnation and known.number >= wanted.number
