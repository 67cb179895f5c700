"""What a verifier counts of its own answers: in memory, and every few seconds into a database of its own.

SECURITY: a failed verification is no mutation. It is one number more in memory, whatever was presented
and by whom, and ends as an aggregate; it touches neither the store nor its lock nor the audit, so that
a guesser delays no revoke and fills no disk.

Counting waits for nothing but a lock that is held for nanoseconds. The instants of a use are those of
the flush that collects it: up to `EVERY` late, never early. What a process has not flushed dies with
it; what it could not flush it keeps for the next time.
"""

from __future__ import annotations

import threading
import uuid
from collections import Counter, defaultdict
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from keyturn.core.secret import Secret
from keyturn.errors import StorageError
from keyturn.ports import Clock
from keyturn.storage.decisions import Decision
from keyturn.storage.postgresql import Password, no_password
from keyturn.storage.usage import Count, Tally, UsageRecords
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
        self._guard = threading.Lock()  # of what answers touch
        self._uses: defaultdict[str, int] = defaultdict(int)
        self._late: defaultdict[str, int] = defaultdict(int)
        self._failed = dict.fromkeys(FAILURES, 0)
        self._unlisted = {"accepted": 0, "accepted_previous": 0}
        self._flushing = threading.Lock()  # of what follows
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
        version_id = verified.version_id
        late = verified.state == _PREVIOUS
        with self._guard:
            counts = self._late if late else self._uses
            if version_id in counts or len(counts) < self._versions:
                counts[version_id] += 1
            else:
                self._unlisted["accepted_previous" if late else "accepted"] += 1

    def failed(self, result: str) -> None:
        """Count another answer, by one of `FAILURES`."""
        with self._guard:
            self._failed[result] += 1

    def presented(self, row: Decision, secret: Secret) -> None:
        """Look later whether this is an ended version's secret; its tag says so already."""
        self._tombstones.presented(row, secret)

    def tombstone(self, version_id: str, secret: Secret) -> Decision | None:
        """Return the row of a version that this host's spool refuses, as far as it is known by now."""
        return self._tombstones.row(version_id, secret)

    def look_up_by(self, lookup: Lookup) -> None:
        """Take what finds such rows."""
        self._tombstones.lookup = lookup

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
        """Take over what answers have counted. The next one finds empty dictionaries."""
        with self._guard:
            uses, self._uses = self._uses, defaultdict(int)
            late, self._late = self._late, defaultdict(int)
            failed, self._failed = self._failed, dict.fromkeys(FAILURES, 0)
            unlisted, self._unlisted = self._unlisted, dict.fromkeys(self._unlisted, 0)
        now = self._clock.boottime()
        for counts, result in ((uses, "accepted"), (late, "accepted_previous")):
            for version_id, number in counts.items():
                self._keep_use(version_id, Count(first=now, last=now, number=number))
            failed[result] = sum(counts.values()) + unlisted[result]
        self.counts["unlisted"] += sum(unlisted.values())
        self.counts["dropped"] = self._tombstones.dropped
        minute = now // timedelta(minutes=1)
        for result, number in failed.items():
            if number:
                self._keep_result(minute, result, number)

    def _keep_use(self, version_id: str, count: Count) -> None:
        kept = self._kept.uses
        if version_id in kept:
            kept[version_id] = kept[version_id].plus(count)
        elif len(kept) < self._versions:
            kept[version_id] = count
        else:
            self.counts["unlisted"] += count.number

    def _keep_result(self, minute: int, result: str, number: int) -> None:
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
