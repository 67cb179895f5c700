"""What the daemon makes of what verifiers saw: metrics, and an incident where an ended secret is shown.

SECURITY: a verifier may be in the wrong hands, and these rows are its word. It can raise an alarm about
a version that has ended, once an hour for each, and name no other; what the state is says the store.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta

import structlog

from keyturn import incidents, laggards
from keyturn.core.model import Agent, Version, VersionState
from keyturn.daemon.metrics import ENDED_STATES, VERIFICATIONS, Metrics
from keyturn.errors import StorageError
from keyturn.storage.previous import previous
from keyturn.storage.usage import Presented
from keyturn.wiring import Parts

EVERY = 5.0  # seconds between two looks
AGAIN = timedelta(hours=1)  # until the same version is told of again
AT_ONCE = 100  # events in one look
FORGET = timedelta(hours=1)
_log = structlog.get_logger(__name__)


class UsageWatch:
    """Looks every few seconds; nothing here raises."""

    def __init__(self, parts: Parts, metrics: Metrics) -> None:
        self._parts = parts
        self._metrics = metrics
        self._totals: dict[str, int] | None = None
        self._counted: dict[str, int] = {}
        self._forgot: datetime | None = None
        self._looking = threading.Lock()
        for state in ENDED_STATES:  # an alert on a rate needs the zero before the first one
            metrics.retired_presented.labels(state)

    def look(self) -> None:
        """Read what is new, and say it, unless another thread is at it."""
        if self._looking.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._looking.release()

    def _look(self) -> None:
        with suppress(StorageError):  # the tick says that the store is away
            records, now = self._parts.usage, self._parts.store.now()
            flushed = records.flushed_at()
            if flushed is None:
                return
            self._metrics.usage_flushed.set(flushed.timestamp())
            self._count_answers(records.totals())
            self._count_laggards(now, counts=now - flushed <= laggards.LATELY)
            for one in records.presented(untold=True)[:AT_ONCE]:
                self._raise(one, now)
            if self._forgot is None or now - self._forgot >= FORGET:
                records.forget(now)
                self._forgot = now

    def _count_answers(self, totals: dict[str, int]) -> None:
        before, self._totals = self._totals, totals
        for result in VERIFICATIONS:
            counter = self._metrics.verifications.labels(result)
            if before is not None:  # what was before this daemon is not of this count
                counter.inc(max(0, totals.get(result, 0) - before.get(result, 0)))

    def _count_laggards(self, now: datetime, *, counts: bool) -> None:
        gauges = self._metrics.laggards, self._metrics.grace_ending_in_use
        if not counts:
            for gauge in gauges:
                gauge.unset()
            return
        found = self._parts.store.database.read(previous)
        uses = self._parts.usage.uses(one.version_id for one in found)
        policies = self._parts.settings.policies
        lagging = ending = 0
        for one in found:
            used = uses.get(one.version_id)
            policy = policies.get(one.policy) or policies.get("default")
            lagging += policy is not None and laggards.is_laggard(one.replaced_at, policy, used)
            ending += laggards.ends_in_use(one, used, now)
        for gauge, number in zip(gauges, (lagging, ending), strict=True):
            gauge.set(number)

    def _raise(self, one: Presented, now: datetime) -> None:
        known = self._parts.store.find_version(one.version_id)
        state = None if known is None else self._state(known[1])
        if known is None or state is None:
            self._parts.usage.told(one, now)
            return
        before = self._counted.get(one.version_id, one.told_number)
        self._metrics.retired_presented.labels(state).inc(max(0, one.number - before))
        self._counted[one.version_id] = one.number
        if one.told_at is None or now - one.told_at >= AGAIN:
            self._tell(one, known[0], state)
            self._parts.usage.told(one, now)
            del self._counted[one.version_id]

    def _state(self, version: Version) -> str | None:
        """Return how a version has ended, None for one that has not."""
        if version.state is VersionState.REVOKED or self._parts.spool.holds(version.id):
            return str(VersionState.REVOKED)
        return str(version.state) if version.state is VersionState.RETIRED else None

    def _tell(self, one: Presented, agent: Agent, state: str) -> None:
        """Put it into the audit first: webhooks read that, and it is there if this ends here."""
        entry = incidents.entry(
            f"{state}-presented",
            actor="daemon:usage",
            agent=agent.name,
            first_at=one.first_at.isoformat(),
            last_at=one.last_at.isoformat(),
            times=one.number - one.told_number,
        )
        self._parts.store.append_audit(replace(entry, version_id=one.version_id))
        level = _log.error if state == VersionState.REVOKED else _log.warning
        level(
            f"{state}.presented",
            agent=agent.name,
            version=one.version_id,
            last_at=str(one.last_at),
            times=one.number - one.told_number,
        )
