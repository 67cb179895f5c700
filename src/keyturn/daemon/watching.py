"""What the running daemon sees of itself, as metrics and log lines: steps, ends, and the store."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

import structlog

from keyturn import advice, incidents
from keyturn.core import repair
from keyturn.core.model import Case, Drift, VersionState
from keyturn.daemon.metrics import (
    AGENT_STATES,
    DRIFT_KINDS,
    OPEN_STATES,
    OUTCOMES,
    REPAIRS,
    TRIGGERS,
    VERSION_STATES,
    Metrics,
)
from keyturn.daemon.readiness import Readiness
from keyturn.daemon.registered import count as count_verifiers
from keyturn.errors import StorageError, StoreUnavailable
from keyturn.ports import AuditEntry
from keyturn.status import OVERDUE_AFTER
from keyturn.storage.migrations import HEAD
from keyturn.wiring import Parts

_CALLS = frozenset(
    {"observe", "recover", "stage", "readback", "activate", "clean", "withdraw", "copyforward"}
)
_LOUD = frozenset({"open", "promote", "retire", "withdraw", "stall", "wait", "dropattempt"})
_log = structlog.get_logger(__name__)


class Watching:
    """Implements `world.Watcher`. Thread-safe; nothing here raises."""

    def __init__(self, metrics: Metrics, parts: Parts, readiness: Readiness | None = None) -> None:
        self.metrics = metrics
        self._readiness = readiness or Readiness()
        self._named: frozenset[str] = frozenset()
        self._counted_to: int | None = None
        self._parts = parts
        self._drifts: set[tuple[str, Drift]] = set()
        self._fights: set[tuple[str, str]] = set()
        self._ballast = 0
        self._jumped = False
        self._incidents: set[str] = set()  # found, and not in the audit yet
        metrics.store_schema_version.set(int(HEAD))
        for outcome in OUTCOMES:  # an alert on a rate needs the zero before the first one
            metrics.rotations.labels(outcome)
        for trigger in TRIGGERS:
            metrics.revocations.labels(trigger)
        for outcome in REPAIRS:
            metrics.repairs.labels(outcome)

    # --- as it happens ----------------------------------------------------------------------

    def step(
        self, *, step: str, case: Case, where: str, seconds: float, code: str, detail: str
    ) -> None:
        """Watch a saga's steps: logs and metrics."""
        name = where.partition(":")[0]
        self.metrics.step_duration.labels(step, name).observe(seconds)
        if step in _CALLS:
            self._call(name, step, code)
        outcome = "" if code else _outcome(step, case)
        if outcome:
            self.rotation_ended(outcome)
        mends = step == "copyforward" or (step == "open" and bool(detail))
        if mends:
            done = "copied" if step == "copyforward" else "rotated"
            self.metrics.repairs.labels("failed" if code else done).inc()
        # A stall needs a person, whatever it stalled at; what waits goes on by itself.
        level = (
            "error" if step == "stall" else "warning" if code or mends or step == "wait"
            else "info" if step in _LOUD else "debug"
        )  # fmt: skip
        getattr(_log, level)(
            f"rotation.{step}",
            agent=case.agent.name,
            where=where or None,
            code=code or (detail.partition(":")[0] if step in ("stall", "wait") else "") or None,
            detail=detail or None,
        )

    def rotation_ended(self, outcome: str) -> None:
        """Count the end of a rotation or of an attempt."""
        self.metrics.rotations.labels(outcome).inc()

    def revocation(self, result: Mapping[str, Any], trigger: str) -> None:
        """Count a revocation and log it."""
        self.metrics.revocations.labels(trigger).inc()
        self.metrics.revocation_duration.observe(result["delay_seconds"])
        _log.warning(
            "revoked",
            target=result["target"],
            versions=len(result["versions"]),
            trigger=trigger,
            incomplete=result["incomplete"],
            seconds=result["delay_seconds"],
        )
        self._unpark()  # the ballast has made room, perhaps enough for the successor

    def _call(self, name: str, step: str, code: str) -> None:
        self.metrics.destination_requests.labels(step, code or "ok").inc()
        answered = code not in ("destination-unavailable", "throttled")
        self.metrics.destination_up.labels(name).set(1 if answered else 0)
        if not code:
            self.metrics.destination_last_success.labels(name).set(time.time())

    def looked(self, now: datetime) -> None:
        """Note that the due-queue was looked at."""
        self.metrics.last_tick.set(now.timestamp())
        self.metrics.store_up.set(1)
        self._readiness.looked(store_answers=True)

    def store_away(self, error: StoreUnavailable) -> None:
        """Note that the store kept somebody from looking at the due-queue."""
        self.metrics.store_up.set(0)
        self._readiness.looked(store_answers=False)
        _log.warning("store.unavailable", code=error.code)

    def clock(self, jump: timedelta) -> None:
        """Say once when the wall clock jumps, and once when it is believed again."""
        self.metrics.clock_jump.set(jump.total_seconds())
        if bool(jump) == self._jumped:
            return
        self._jumped = bool(jump)
        if jump:
            hint = (
                "`keyturn clock` shows it; due rotations and retirements wait until it is settled"
            )
            _log.error("clock.jumped", seconds=jump.total_seconds(), hint=hint)
        else:
            _log.warning("clock.believed")
        action = "clock.jumped" if jump else "clock.believed"
        detail = (("seconds", round(jump.total_seconds())),)
        try:
            self._parts.store.append_audit(
                AuditEntry(action=action, actor="daemon:clock", detail=detail)
            )
        except StoreUnavailable:
            self._jumped = not jump  # said again at the next look

    # --- now and then -----------------------------------------------------------------------

    def measure(self) -> None:
        """Count for the metrics, and say what the sweeps found that is new."""
        self._keep_ballast()
        self._tell_incidents()
        self._unpark()
        self._forget_dropped()
        self.metrics.audit_queue_length.set(self._parts.administration.queued())
        count_verifiers(self._parts, self.metrics)
        try:
            self._count()
        except StoreUnavailable:
            return  # the tick says so

    def _unpark(self) -> None:
        """Let credentials go on whose last run the store broke off."""
        with suppress(StorageError):
            self._parts.carried.give_back(self._parts.store, self._parts.store.now())

    def _count(self) -> None:
        store, metrics = self._parts.store, self.metrics
        policies = self._parts.settings.policies.values()
        counts = store.counts(
            max_ages={p.name: p.max_age for p in policies if p.max_age}, late_by=OVERDUE_AFTER
        )
        metrics.set_states(metrics.agents, counts.agents, AGENT_STATES)
        metrics.set_states(metrics.versions, counts.versions, VERSION_STATES)
        metrics.set_states(metrics.rotations_open, counts.rotations, OPEN_STATES)
        metrics.agents_overdue.set(counts.overdue)
        metrics.longest_overdue.set(counts.longest_overdue.total_seconds())
        metrics.agents_over_max_age.set(counts.over_max_age)
        metrics.revocation_cleanup_pending.set(counts.cleanup_pending)
        metrics.audit_head_sequence.set(counts.audit_head)
        self._count_others(counts.audit_head)
        found = set(store.drifts())
        kinds = Counter(drift.kind for _, drift in found)
        metrics.set_states(metrics.destination_drift, kinds, DRIFT_KINDS)
        for agent, drift in found - self._drifts:
            _log.warning("drift.found", agent=agent, where=drift.target, kind=drift.kind)
        self._drifts = found
        self._count_fights()

    def _count_fights(self) -> None:
        """Tell of each fight once: it is a person's now."""
        found = {(agent, one.target): one for agent, one in self._parts.store.fights()}
        self.metrics.repair_fights.set(len(found))
        for agent, where in found.keys() - self._fights:
            self.metrics.repairs.labels("left").inc()
            fight, again = found[agent, where].fight, repair.next_try_at(found[agent, where])
            _log.error(
                "repair.fight",
                agent=agent,
                where=where,
                since=str(fight),
                next_try_at=str(again),
                hint=advice.hint("repair-fight", agent),
            )
        for agent, where in self._fights - found.keys():
            _log.info("repair.over", agent=agent, where=where)
        self._fights = set(found)

    def _count_others(self, head: int) -> None:
        """Count the revocations of other processes: commands on the bare store, other hosts."""
        before, self._counted_to = self._counted_to, head
        if before is None or before >= head:
            return  # what was before this daemon is not of this count
        for trigger in self._parts.store.revocations_of_others(after=before, upto=head):
            if trigger in TRIGGERS:  # written by another process: no label of its making
                self.metrics.revocations.labels(trigger).inc()

    def _forget_dropped(self) -> None:
        named = frozenset(self._parts.destinations)
        for gone in self._named - named:
            self.metrics.forget(gone)
        self._named = named

    def _keep_ballast(self) -> None:
        """Take the room back that a revoke needed on a full disk, as soon as there is some."""
        kept, before = self._parts.ballast.keep(), self._ballast
        self.metrics.store_ballast.set(kept)
        if kept < before:
            _log.error("ballast.used", left=kept, hint="the store's disk is full: free some space")
            self.incident("ballast-used")
        elif kept > before:
            _log.info("ballast.kept", size=kept)
        self._ballast = kept

    def incident(self, code: str) -> None:
        """Put an incident into the audit, now or as soon as the store takes it."""
        self._incidents.add(code)

    def _tell_incidents(self) -> None:
        for code in sorted(self._incidents):
            with suppress(StorageError):
                self._parts.store.append_audit(incidents.entry(code, actor="daemon:watch"))
                self._incidents.discard(code)


def _outcome(step: str, case: Case) -> str:
    """Name what a step ends: a rotation, or an attempt whose version is kept or retired."""
    if step == "promote":
        return "promoted"
    if step == "stall":
        return "stalled"
    own = case.version(case.rotation.version_id) if case.rotation else None
    if step != "dropattempt" or own is None or own.state is not VersionState.PENDING:
        return ""
    return "kept" if own.exposed else "retired"
