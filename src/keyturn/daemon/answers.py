"""What commands answer, as plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from keyturn import advice, status
from keyturn.core.model import Case, Rotation, Version
from keyturn.core.walltime import rfc3339
from keyturn.daemon.socket import Progress
from keyturn.errors import KeyturnError
from keyturn.storage.audit import ANCHOR_ACTION, Recorded
from keyturn.storage.usage import Used


def recorded(one: Recorded) -> dict[str, Any]:
    """Return an audit entry."""
    entry = one.entry
    if entry.action == ANCHOR_ACTION:  # what it quotes is for `--verify`, not for people
        heads = dict(entry.detail).get("heads", ())
        entry = replace(entry, detail=(("heads", len(heads)),))
    return {
        "at": rfc3339(one.at),
        "actor": entry.actor,
        "action": entry.action,
        "agent": entry.agent,
        "version": entry.version_id,
        "outcome": entry.outcome,
        "detail": {key: value for key, value in entry.detail if value not in ("", (), [], False)},
        "chain": one.chain,
        "seq": one.seq,
        "hash": one.hash,
    }


def error_of(error: KeyturnError) -> dict[str, Any]:
    """Return an error."""
    return {
        "code": error.code,
        "message": str(error),
        "hint": error.hint,
        "exit_code": error.exit_code,
    }


def definition(case: Case) -> dict[str, Any]:
    """Return what an agent is."""
    agent = case.agent
    return {
        **status.definition(agent),
        "targets": [
            {"to": t.to, "path": t.path, "merge": t.merge, "adopt": t.adopt} for t in agent.targets
        ],
    }


def promoted(case: Case, current: Version) -> dict[str, Any]:
    """Say which version agents read now, and how long the one before it is accepted."""
    before = [v for v in case.accepted if v.promoted_at is not None and v.seq < current.seq]
    replaced = max(before, key=lambda v: v.seq, default=None)
    ends = replaced.deadline if replaced else None
    return {
        "agent": case.agent.name,
        "outcome": "promoted",
        "version": current.id,
        "deadline": rfc3339(ends) if ends else None,
    }


def stalled(name: str, rotation: Rotation) -> dict[str, Any]:
    """Say why a rotation stands still."""
    code = rotation.error_code
    message = f"{code} at {rotation.error_where}"
    message += f": {rotation.error_detail}" if rotation.error_detail else ""
    error = {"code": code, "message": message, "hint": advice.hint(code, name), "exit_code": 4}
    return {"agent": name, "outcome": "stalled", "error": error}


def tell(name: str, case: Case, shown: str, progress: Progress, parked: str) -> str:
    """Send an event where the rotation's state has changed since `shown`; return the new one.

    `parked` is the code of the store's that broke the last run off: nothing goes on until it is well.
    """
    rotation = case.rotation if case.rotation is not None and case.rotation.open else None
    if rotation is None and not parked:
        return shown
    waiting = rotation.waiting if rotation else None
    why = parked or (str(waiting.reason) if waiting else "")
    name_of_state = str(rotation.state) if rotation and not parked else "waiting"
    state = f"{name_of_state}/{rotation.version_id if rotation else ''}/{why}"
    if state != shown:
        progress(
            {
                "event": "rotation",
                "agent": name,
                "state": name_of_state,
                "why": why,
                "target": waiting.where if waiting else "",
            }
        )
    return state


def with_uses(
    rows: list[dict[str, Any]], uses: Mapping[str, Used | None] | None
) -> list[dict[str, Any]]:
    """Add to identified versions how often each was used within an hour; null where nothing counts."""
    for row in rows:
        used = uses.get(row["version"]) if uses is not None else None
        row["last_used_at"] = rfc3339(used.last_used_at) if used else None
        row["uses_last_hour"] = None if uses is None else used.last_hour if used else 0
    return rows
