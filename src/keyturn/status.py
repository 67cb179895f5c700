"""What one sees: the state of an agent as `keyturn status` and its `--json` show it.

The shape is the one of `docs/reference/commands.md`; times are RFC 3339 in UTC, usage is null where
nothing counts it yet.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from keyturn import advice, laggards
from keyturn.core import repair
from keyturn.core.decision import ENDING
from keyturn.core.lifecycle import pinned
from keyturn.core.model import (
    Agent,
    AgentState,
    Case,
    Drift,
    Policy,
    Rotation,
    RotationState,
    Target,
    Version,
    VersionState,
    WaitReason,
)
from keyturn.core.walltime import rfc3339
from keyturn.laggards import Seen
from keyturn.world import Parked

OVERDUE_AFTER = timedelta(minutes=5)


def describe(
    case: Case,
    *,
    policy: Policy,
    now: datetime,
    parked: Parked | None = None,
    suspension: dict[str, Any] | None = None,
    seen: Seen | None = None,
) -> dict[str, Any]:
    """Return everything about one agent as plain JSON values.

    `parked` is what the daemon knows of a run that the store broke off, `suspension` who stopped the
    agent, when and why, `seen` what verifiers counted.
    """
    agent, credential = case.agent, case.credential
    current, pending = case.current, case.pending

    def shown(version: Version | None) -> dict[str, Any] | None:
        if version is None:
            return None
        return _version(version) | laggards.of_version(version, case, policy, seen)

    return {
        **definition(agent),
        "suspension": suspension,
        # Of the others it is the time to go on from, and nothing rotates then.
        "next_rotation_at": _at(credential.next_rotation_at) if agent.rotates else None,
        "overdue": is_overdue(case, now),
        "max_age_at": _at(_max_age_at(current, policy)),
        "current": shown(current),
        "pending": shown(pending),
        "kept": [shown(v) for v in case.accepted if v.state is VersionState.KEPT],
        "previous": [shown(v) for v in case.accepted if v.state is VersionState.PREVIOUS],
        "presented": laggards.presented_rows(case, seen),
        "successor_owed": credential.successor_owed,
        "rotation": _rotation(case, parked),
        "destinations": [_destination(case, target) for target in case.targets],
        "safe_to_retire": _safe_to_retire(case, now, _lagging(case, policy, seen)),
        "hint": advice.hint(parked.code, agent.name) if parked else _hint(case, now),
    }


def definition(agent: Agent) -> dict[str, Any]:
    """Return what an agent was declared as, without its destinations."""
    return {
        "agent": agent.name,
        "login": agent.login,
        "owner": agent.owner,
        "policy": agent.policy,
        "managed_by": str(agent.managed_by),
        "file": agent.file,
        "state": agent.shown_state,
    }


def is_overdue(case: Case, now: datetime) -> bool:
    """Whether a due rotation has not even begun, or is still not done, five minutes later."""
    due = case.credential.next_rotation_at
    return case.agent.rotates and due is not None and due + OVERDUE_AFTER < now


def _at(moment: datetime | None) -> str | None:
    return rfc3339(moment) if moment else None


def _max_age_at(current: Version | None, policy: Policy) -> datetime | None:
    if current is None or policy.max_age is None:
        return None
    return current.minted_at + policy.max_age


def _version(version: Version) -> dict[str, Any]:
    return {
        "version": version.id,
        "minted_at": _at(version.minted_at),
        "promoted_at": _at(version.promoted_at),
        "deadline": _at(version.deadline),
        "exposed": version.exposed,
    }


def _rotation(case: Case, parked: Parked | None) -> dict[str, Any] | None:
    """Describe the open rotation, or one that begins now: its row comes with its first effect."""
    rotation = case.rotation
    if rotation is None or not rotation.open:
        request = case.credential.request
        if request is None and not (parked and case.agent.rotates):
            return None
        cause = request.cause if request is not None else None
        found = dict.fromkeys(_ROTATION) | {
            "state": "asked",
            "cause": str(cause) if cause else None,
        }
        return found | {"attempt": 0, "tries": 0} | _broken_off(parked)
    return _open(case, rotation) | _broken_off(parked)


_ROTATION = (
    "id", "state", "cause", "step", "why", "where", "attempt", "version", "opened_at",
    "waiting_since", "next_try_at", "tries", "error_code", "error_detail",
)  # fmt: skip


def _broken_off(parked: Parked | None) -> dict[str, Any]:
    """Say that the store stands in the way, whatever the rotation was at."""
    if parked is None:
        return {}
    said = advice.TABLE.get(parked.code)
    return {
        "state": "waiting",
        "why": parked.code,
        "where": "store",
        "waiting_since": _at(parked.since),
        "error_code": parked.code,
        "error_detail": said.meaning if said else None,
    }


def _open(case: Case, rotation: Rotation) -> dict[str, Any]:
    waiting = rotation.waiting
    return {
        "id": rotation.uid,
        "state": str(rotation.state),
        "cause": str(rotation.cause),
        "step": _step(case, rotation),
        "why": str(waiting.reason) if waiting else rotation.error_code or None,
        "where": (waiting.where if waiting else rotation.error_where) or None,
        "attempt": rotation.attempt,
        "version": rotation.version_id,
        "opened_at": _at(rotation.opened_at),
        "waiting_since": _at(waiting.since) if waiting else None,
        "next_try_at": _at(waiting.next_try_at) if waiting else None,
        "tries": waiting.tries if waiting else 0,
        "error_code": (waiting.code if waiting else rotation.error_code) or None,
        "error_detail": (waiting.detail if waiting else rotation.error_detail) or None,
    }


def _step(case: Case, rotation: Rotation) -> str:
    """Name the step that an open rotation is at, as far as the store knows it."""
    own = case.version(rotation.version_id)
    if own is None:
        return "mint"
    if rotation.waiting is not None and rotation.waiting.reason is WaitReason.VERIFIERS:
        return "accept"
    placed = {p.target for p in case.placements if p.version_id == own.id}
    everywhere = own.exposed and all(target.key in placed for target in rotation.targets)
    return "confirm" if everywhere else "publish"


def _destination(case: Case, target: Target) -> dict[str, Any]:
    drift, code = _drift(case, target), _error_code(case, target)
    record = repair.record_of(case, target.key)
    # What is there now is none of ours: what we read before says nothing any more.
    shown, read_at = _shown(case, target) if code not in advice.ALTERED else (None, None)
    withheld = target.to in case.credential.withheld
    return {
        "name": target.to,
        "path": target.path,
        "shows_version": shown,
        "read_back_at": _at(read_at),
        "in_sync": drift is None and case.current is not None and shown == case.current.id,
        "leaving": target.key in {t.key for t in case.credential.leaving},
        "withheld": withheld,
        "error_code": code or ("withheld" if withheld else None),
        "since": _at(drift.since) if drift else None,
        "repairs": {"last_hour": len(record.at), "next_try_at": _at(repair.next_try_at(record))},
    }


def _drift(case: Case, target: Target) -> Drift | None:
    return next((d for d in case.credential.drift if d.target == target.key), None)


def _error_code(case: Case, target: Target) -> str | None:
    """Say what is wrong there: what the open rotation met, else what the last sweep found."""
    rotation, drift = case.rotation, _drift(case, target)
    if rotation is not None and rotation.waiting and rotation.waiting.where == target.key:
        return rotation.waiting.code or str(rotation.waiting.reason)
    if rotation is not None and rotation.error_code and rotation.error_where == target.key:
        return rotation.error_code
    if drift is not None and repair.record_of(case, target.key).fight is not None:
        return "repair-fight"
    return drift.kind if drift else None


def _shown(case: Case, target: Target) -> tuple[str | None, datetime | None]:
    """Return which version of ours is there, by our last read, and when that was.

    A promotion has read everything back; after it the sweeps do.
    """
    look = next((one for one in case.credential.looks if one.target == target.key), None)
    placed = {p.version_id for p in case.placements if p.target == target.key}
    # Whatever its state: a revoked one stays there until it is withdrawn, and a sweep tells of that.
    latest = max((v for v in case.versions if v.id in placed), key=lambda v: v.seq, default=None)
    if latest is not None:
        since = latest.promoted_at or latest.ended_at
        if look is None or since is None or look.at < since:
            return latest.id, latest.promoted_at or (look.at if look else None)
    return (look.shown or None, look.at) if look else (None, None)


def _lagging(case: Case, policy: Policy, seen: Seen | None) -> frozenset[str]:
    return frozenset(v.id for v in case.accepted if laggards.lags(v, case, policy, seen))


def _safe_to_retire(
    case: Case, now: datetime, lagging: frozenset[str] = frozenset()
) -> dict[str, Any]:
    for version in case.accepted:
        reason = _keeps(case, version, now) if version.state in ENDING else ""
        if reason:
            used = ", and it is still used" if version.id in lagging else ""
            return {"ok": False, "reason": reason + used}
    return {"ok": True, "reason": ""}


def _keeps(case: Case, version: Version, now: datetime) -> str:
    """Say why an old version is accepted still; "" where nothing holds it."""
    if pinned(case, version.id):
        return f"a write of {version.id} is not settled yet"
    if version.deadline is not None and version.deadline > now:
        return f"the grace of {version.id} has not passed"
    for target in case.targets:
        if _unread(case, target):
            return f"{target.key} cannot be read and may show {version.id}"
        if _shown(case, target)[0] == version.id:
            return f"{target.key} shows {version.id} still"
    return "" if version.deadline else f"the grace of {version.id} has not begun"


def _hint(case: Case, now: datetime) -> str:
    """Return the next command to type, "" where there is nothing to do."""
    name, rotation = case.agent.name, case.rotation
    if not case.agent.listed:
        return f"keyturn agents remove {name}   # or put it back into the files"
    if case.agent.state is AgentState.SUSPENDED:
        return f"keyturn audit {name}   # suspended: see who did it and why; then keyturn resume {name}"
    if rotation is not None and rotation.state is RotationState.STALLED:
        return advice.hint(rotation.error_code, name)
    if rotation is not None and rotation.waiting is not None:
        code = rotation.waiting.code or str(rotation.waiting.reason)
        return advice.hint(code, name, oldest=_oldest(case))
    if _safe_to_retire(case, now)["ok"] is False and (held := _leaving_that_holds(case)):
        return f"keyturn destinations forget {name} {held}   # if nobody reads there any more"
    fought = {one.target for one in repair.fights(case)}
    for drift in case.credential.drift:
        if drift.target in fought:
            return advice.hint("repair-fight", name)
        if drift.kind == "unreadable":
            return f"keyturn check --probe   # {drift.target} cannot be read"
        if drift.kind == "unknown":
            return f"keyturn rotation retry {name}   # after mending {drift.target}: not ours"
    if case.credential.withheld:
        where = case.credential.withheld[0]
        return f"keyturn resume {name} --destination {where}   # when it leaks no more"
    return f"keyturn rotate {name}" if is_overdue(case, now) else ""


def _oldest(case: Case) -> str:
    """Return the version that can be given up first: accepted, and neither current nor pending."""
    ending = [v for v in case.accepted if v.state in ENDING]
    return min(ending, key=lambda v: v.seq).id if ending else ""


def _leaving_that_holds(case: Case) -> str:
    """Return a leaving destination that shows something of ours or cannot be read."""
    for target in case.credential.leaving:
        if _unread(case, target) or _shown(case, target)[0] is not None:
            return target.key
    return ""


def _unread(case: Case, target: Target) -> bool:
    """Whether the last sweep could not read it: then it saw others later than this one."""
    seen = {look.target: look.at for look in case.credential.looks}
    newest = max(seen.values(), default=None)
    return newest is not None and seen.get(target.key) != newest
