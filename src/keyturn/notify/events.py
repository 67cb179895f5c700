"""Which audit entries are told to whom, and in which words.

SECURITY: a body holds ids, names, codes and times. Never a secret, never what a vendor or a person
wrote: reasons and error texts stay in the audit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from keyturn import advice, incidents
from keyturn.core.model import Agent
from keyturn.core.walltime import rfc3339
from keyturn.storage.audit import Recorded

_KINDS = {"version.promoted": "promoted", "rotation.stalled": "stalled"}
_REVOKES = frozenset({"revoke", "revoke.removed"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What is sent: its type, its id (the same for each try and each hook) and its bytes."""

    kind: str
    id: str
    body: bytes


def kind_of(found: Recorded) -> str | None:
    """Return the type of event that an audit entry is; None for what is not told."""
    entry = found.entry
    if entry.action in _REVOKES:
        return "revoked"
    if entry.action in _KINDS:
        return _KINDS[entry.action]
    return "incident" if incidents.code_of(entry) else None


def message_of(found: Recorded, *, store_id: str, agent: Agent | None) -> Message:
    """Build the message of an entry; `agent` is who it is about, as the store has it now."""
    entry, kind = found.entry, kind_of(found) or ""
    detail = dict(entry.detail)
    data: dict[str, Any] = {
        "agent": entry.agent or None,
        "owner": agent.owner if agent else None,
        "version": entry.version_id or None,
        "destinations": sorted({target.to for target in agent.targets}) if agent else [],
        "actor": entry.actor,
        "code": None,
        "meaning": None,
        "hint": f"keyturn status {entry.agent}" if entry.agent else None,
    }
    if kind == "stalled":
        data |= _stalled(entry.outcome, entry.agent, str(detail.get("target", "")))
    elif kind == "revoked":
        revoked = [str(one) for one in detail.get("revoked", ())]
        data |= {"versions": revoked, "reissue": bool(detail.get("reissue"))}
    elif kind == "incident":
        data |= _incident(incidents.code_of(entry) or "", entry.agent, detail)
    return _message(kind, id_of(store_id, found.chain, found.seq), found.at, store_id, data)


def _stalled(code: str, agent: str, where: str) -> dict[str, Any]:
    known = advice.TABLE.get(code)
    return {
        "code": code,
        "meaning": known.meaning if known else None,
        "destination": where.partition(":")[0] or None,
        "hint": (known.command if known else "keyturn status AGENT").replace("AGENT", agent),
    }


def _incident(code: str, agent: str, detail: Mapping[str, Any]) -> dict[str, Any]:
    known = incidents.TABLE.get(code)
    where = str(detail.get("target", "")).partition(":")[0]
    return {
        "code": code,
        "meaning": known.meaning if known else None,
        "destination": where or None,
        "hint": (known.command if known else "keyturn audit AGENT").replace("AGENT", agent).strip(),
    }


def summary(told: Mapping[str, Any], *, hook: str, store_id: str, at: datetime) -> Message:
    """Build the message that stands for events that were not told one by one."""
    data = {key: told[key] for key in ("counts", "from", "to", "why")}
    data["hint"] = "keyturn audit --limit 1000"
    return _message(
        "summary", id_of(store_id, f"summary/{hook}", told["number"]), at, store_id, data
    )


def ping(*, store_id: str, at: datetime, nonce: str) -> Message:
    """Build the message that only tells that the way is open."""
    return _message("ping", f"msg_{nonce}", at, store_id, {"hint": None})


def id_of(store_id: str, chain: str, seq: int) -> str:
    """Return the id of an event: the same after every crash, since it follows from the entry's place."""
    place = json.dumps([store_id, chain, seq]).encode()
    return f"msg_{hashlib.sha256(place).hexdigest()[:32]}"


def counted(events: Sequence[Recorded]) -> dict[str, int]:
    """Count events by their type."""
    found: dict[str, int] = {}
    for one in events:
        kind = kind_of(one) or "other"
        found[kind] = found.get(kind, 0) + 1
    return found


def _message(kind: str, id: str, at: datetime, store_id: str, data: dict[str, Any]) -> Message:
    body = {
        "type": kind,
        "id": id,
        "timestamp": rfc3339(at),
        "data": {"store": store_id, **data},
    }
    text = json.dumps(body, ensure_ascii=True, separators=(",", ":"))
    return Message(kind=kind, id=id, body=text.encode())
