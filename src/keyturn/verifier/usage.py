"""What a verifier counts of its own answers: in memory, and every few seconds into a database of its own.

SECURITY: a failed verification is no mutation. It is one number more in memory, whatever was presented
and by whom, and ends as an aggregate; it touches neither the store nor its lock nor the audit, so that
a guesser delays no revoke and fills no disk.

Counting takes no lock where a version is known, and waits for no flush. The instants of a use are those of
the flush that collects it: up to `EVERY` late, never early. What a process has not flushed dies with
it; what it could not flush it keeps for the next time.
"""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Protocol

from keyturn.core.secret import Secret
from keyturn.errors import StorageError
from keyturn.ports import Clock
from keyturn.storage.decisions import Decision
from keyturn.storage.postgresql import Password, no_password
from keyturn.storage.usage import Count, Tally, UsageRecords
from keyturn.verifier.counters import Counters
from keyturn.verifier.keyring import KeyRing
from keyturn.verifier.tombstones import Lookup, Tombstones

EVERY = 10.0  # seconds between two flushes
QUIET = timedelta(minutes=1)  # after which one says that there is nothing
VERSIONS = 200_000  # that are counted one by one between two flushes; others only in sum
MINUTES = 5_000  # of answers by result that are kept apart while nothing can be flushed
FAILURES = ("refused", "limited", "unavailable")
_PREVIOUS = "previous"


class Counted(Protocol):
    """A yes, as far as it is counted; `decision.Verified` is one."""

    @property
    def version_id(self) -> str:
        """The version's public id."""

    @property
    def state(self) -> str:
        """The version's state at the answer."""


class Records(Protocol):
    """Where counts end; `storage.usage.UsageRecords` is the real one."""

    def add(self, source: str, number: int, tally: Tally, *, boottime: timedelta) -> None:
        """Add them, once for each number of a source. Raises StorageError."""

    def close(self) -> None:
        """Give the connections back."""


class Usage:
    """Counts for one process. Thread-safe; nothing that an answer calls waits or raises.

    `counts` says how it goes itself: flushed, not_flushed, unlisted, dropped.
    """

    def __init__(
        self,
        records: Records,
        clock: Clock,
        *,
        source: str,
        tombstones: Tombstones | None = None,
        versions: int = VERSIONS,
    ) -> None:
        self._records = records
        self._clock = clock
        self._source = source
        self._versions = versions
        self._tombstones = tombstones or Tombstones(clock.boottime)
        self._tombstones.found = self._presented
        self._uses = Counters(versions)
        self._late = Counters(versions)
        self._failures = {result: count() for result in FAILURES}
        self._failed = dict.fromkeys(FAILURES, 0)  # of which so many are taken
        self._flushing = threading.Lock()  # of what is taken
        self._kept = Tally()
        self._sent: Tally | None = None
        self._number = 0
        self._flushed: timedelta | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.counts: Counter[str] = Counter()

    @classmethod
    def open(
        cls,
        store_url: str,
        *,
        state_dir: Path,
        clock: Clock,
        password: Password = no_password,
        every: float = EVERY,
    ) -> Usage:
        """Count for a store, in the background; the database is first touched at the first flush."""
        records = UsageRecords.open(store_url, state_dir=state_dir, clock=clock, password=password)
        usage = cls(records, clock, source=uuid.uuid4().hex)
        usage.start(every)
        return usage

    def start(self, every: float = EVERY) -> None:
        """Flush now and then, in a thread of its own."""
        self._thread = threading.Thread(target=self._run, args=(every,), name="usage", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Flush once more, end the threads and give the connections back."""
        self._stop.set()
        self._tombstones.close()
        if self._thread is not None:
            self._thread.join()
        self.flush()
        self._records.close()

    # --- what an answer calls ---------------------------------------------------------------

    def accepted(self, verified: Counted) -> None:
        """Count a yes, also one that was remembered."""
        counters = self._late if verified.state == _PREVIOUS else self._uses
        counters.raised(verified.version_id)

    def failed(self, result: str) -> None:
        """Count another answer, by one of `FAILURES`."""
        next(self._failures[result])

    def presented(self, row: Decision, secret: Secret) -> None:
        """Look later whether this is an ended version's secret; its tag says so already."""
        self._tombstones.presented(row, secret)

    def tombstone(self, version_id: str, secret: Secret) -> Decision | None:
        """Return the row of a version that this host's spool refuses, as far as it is known by now."""
        return self._tombstones.row(version_id, secret)

    def look_up_by(self, lookup: Lookup, ring: Callable[[], KeyRing]) -> None:
        """Take what finds such rows, and the keys to check them with."""
        self._tombstones.lookup, self._tombstones.ring = lookup, ring

    # --- what goes on beside ----------------------------------------------------------------

    def flush(self) -> bool:
        """Write down what was counted so far; False where it has to be kept."""
        with self._flushing:
            self._collect()
            while self._sent is not None or self._kept or self._is_silent():
                if self._sent is None:
                    self._sent, self._kept = self._kept, Tally()
                    self._number += 1
                if not self._send(self._sent):
                    return False
                self._sent = None
            return True

    def _send(self, tally: Tally) -> bool:
        now = self._clock.boottime()
        try:
            self._records.add(self._source, self._number, tally, boottime=now)
        except StorageError:
            self.counts["not_flushed"] += 1
            return False
        self.counts["flushed"] += 1
        self._flushed = now
        return True

    def _is_silent(self) -> bool:
        """Whether it is time to say that nothing was seen: silence is no proof of that."""
        return self._flushed is None or self._clock.boottime() - self._flushed >= QUIET

    def _collect(self) -> None:
        """Take over what answers have counted."""
        # The time comes last: a use is never earlier than it is said to be.
        taken = (("accepted", *self._uses.taken()), ("accepted_previous", *self._late.taken()))
        failed = {result: next(number) for result, number in self._failures.items()}
        now = self._clock.boottime()
        minute = now // timedelta(minutes=1)
        for result, uses, unlisted in taken:
            for version_id, number in uses.items():
                self._keep_use(version_id, Count(first=now, last=now, number=number))
            self.counts["unlisted"] += unlisted
            self._keep_result(minute, result, sum(uses.values()) + unlisted)
        for result, value in failed.items():
            self._keep_result(minute, result, value - self._failed[result])
            self._failed[result] = value + 1
        self.counts["dropped"] = self._tombstones.dropped

    def _keep_use(self, version_id: str, use: Count) -> None:
        kept = self._kept.uses
        if version_id in kept:
            kept[version_id] = kept[version_id].plus(use)
        elif len(kept) < self._versions:
            kept[version_id] = use
        else:
            self.counts["unlisted"] += use.number

    def _keep_result(self, minute: int, result: str, number: int) -> None:
        if not number:
            return
        kept = self._kept.results
        if len(kept) >= MINUTES:  # after hours without a flush the sum is what is left
            minute = max((m for m, known in kept if known == result), default=minute)
        kept[minute, result] = kept.get((minute, result), 0) + number

    def _presented(self, version_id: str, state: str) -> None:
        now = self._clock.boottime()
        one = Count(first=now, last=now, number=1)
        with self._flushing:
            kept = self._kept.presented
            before = kept.get((version_id, state))
            kept[version_id, state] = before.plus(one) if before else one

    def _run(self, every: float) -> None:
        while not self._stop.wait(every):
            # Nothing that can be wrong with one flush may end the next ones: its numbers are kept.
            with suppress(Exception):
                self.flush()
