"""What one sees: the state of an agent as `keyturn status` and its `--json` show it.

The shape is the one of `docs/reference/commands.md`; times are RFC 3339 in UTC, usage is null where
nothing counts it yet.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from keyturn.core.decision import ENDING
from keyturn.core.lifecycle import pinned
from keyturn.core.model import (
    AgentState,
    Case,
    Policy,
    Rotation,
    RotationState,
    Target,
    Version,
    VersionState,
)

OVERDUE_AFTER = timedelta(minutes=5)


def describe(case: Case, *, policy: Policy, now: datetime) -> dict[str, Any]:
    """Return everything about one agent as plain JSON values."""
    agent, credential = case.agent, case.credential
    current, pending = case.current, case.pending
    return {
        "agent": agent.name,
        "login": agent.login,
        "owner": agent.owner,
        "policy": agent.policy,
        "managed_by": str(agent.managed_by),
        "state": str(agent.state),
        "next_rotation_at": _at(credential.next_rotation_at),
        "overdue": is_overdue(case, now),
        "max_age_at": _at(_max_age_at(current, policy)),
        "current": _version(current),
        "pending": _version(pending),
        "kept": [_version(v) for v in case.accepted if v.state is VersionState.KEPT],
        "previous": [_version(v) for v in case.accepted if v.state is VersionState.PREVIOUS],
        "successor_owed": credential.successor_owed,
        "rotation": _rotation(case.rotation),
        "destinations": [_destination(case, target) for target in case.targets],
        "safe_to_retire": _safe_to_retire(case, now),
        "hint": _hint(case, now),
    }


def is_overdue(case: Case, now: datetime) -> bool:
    """Whether a due rotation has not even begun, or is still not done, five minutes later."""
    due = case.credential.next_rotation_at
    return case.agent.state is AgentState.ENABLED and due is not None and due + OVERDUE_AFTER < now


def _at(moment: datetime | None) -> str | None:
    return moment.isoformat().replace("+00:00", "Z") if moment else None


def _max_age_at(current: Version | None, policy: Policy) -> datetime | None:
    if current is None or policy.max_age is None:
        return None
    return current.minted_at + policy.max_age


def _version(version: Version | None) -> dict[str, Any] | None:
    if version is None:
        return None
    return {
        "version": version.id,
        "minted_at": _at(version.minted_at),
        "promoted_at": _at(version.promoted_at),
        "deadline": _at(version.deadline),
        "exposed": version.exposed,
        "first_used_at": None,
        "last_used_at": None,
        "uses": None,
        "laggards": None,
    }


def _rotation(rotation: Rotation | None) -> dict[str, Any] | None:
    if rotation is None or not rotation.open:
        return None
    waiting = rotation.waiting
    return {
        "id": rotation.uid,
        "state": str(rotation.state),
        "cause": str(rotation.cause),
        "why": str(waiting.reason) if waiting else rotation.error_code or None,
        "where": (waiting.where if waiting else rotation.error_where) or None,
        "attempt": rotation.attempt,
        "version": rotation.version_id,
        "opened_at": _at(rotation.opened_at),
        "waiting_since": _at(waiting.since) if waiting else None,
        "next_try_at": _at(waiting.next_try_at) if waiting else None,
        "tries": waiting.tries if waiting else 0,
        "error_code": (waiting.code if waiting else rotation.error_code) or None,
    }


def _destination(case: Case, target: Target) -> dict[str, Any]:
    drift = next((d for d in case.credential.drift if d.target == target.key), None)
    placed = [p for p in case.placements if p.target == target.key]
    seqs = {v.id: v.seq for v in case.versions}
    newest = max(placed, key=lambda p: seqs.get(p.version_id, 0), default=None)
    leaving = target.key in {t.key for t in case.credential.leaving}
    return {
        "name": target.to,
        "path": target.path,
        "shows_version": newest.version_id if newest and drift is None else None,
        "in_sync": drift is None and newest is not None,
        "leaving": leaving,
        "error_code": drift.kind if drift else None,
        "since": _at(drift.since) if drift else None,
    }


def _safe_to_retire(case: Case, now: datetime) -> dict[str, Any]:
    for version in case.accepted:
        if version.state in ENDING:
            if pinned(case, version.id):
                return {"ok": False, "reason": f"a write of {version.id} is not settled yet"}
            if version.deadline is None or version.deadline > now:
                return {"ok": False, "reason": f"the grace of {version.id} has not passed"}
    return {"ok": True, "reason": ""}


def _hint(case: Case, now: datetime) -> str:
    """Return the next command to type, "" where there is nothing to do."""
    name, rotation = case.agent.name, case.rotation
    if case.agent.state is AgentState.SUSPENDED:
        return f"keyturn resume {name}"
    if rotation is not None and rotation.state is RotationState.STALLED:
        return f"keyturn rotation retry {name}   # after mending: {rotation.error_code}"
    if case.credential.drift:
        return f"keyturn rotate {name}   # publishes a new version everywhere"
    return f"keyturn rotate {name}" if is_overdue(case, now) else ""
