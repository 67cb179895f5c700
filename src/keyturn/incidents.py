"""What counts as an incident, by one word each: something that nobody asked for and somebody must see.

Some are audited under an action of their own; `code_of` knows them. Whatever else finds one appends
`entry(code)`. docs/reference/incidents.md shows the same table; a test compares.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from keyturn.ports import AuditEntry

ACTION = "incident"


class Incident(NamedTuple):
    """One row of the table; `command` holds the agent's name as `AGENT`."""

    meaning: str
    command: str


TABLE = {
    "clock-jumped": Incident(
        "the wall clock jumped by more than five minutes; due work waits", "keyturn clock"
    ),
    "drift-revoked": Incident(
        "a destination shows a revoked or retired version", "keyturn status AGENT"
    ),
    "drift-older": Incident(
        "a destination shows an older version than the current one", "keyturn status AGENT"
    ),
    "drift-unknown": Incident(
        "somebody wrote a value of their own into an entry of ours", "keyturn status AGENT"
    ),
    "mass-change": Incident(
        "the files would drop more than a tenth of the agents; nothing was changed",
        "keyturn reload --allow-mass-change",
    ),
    "ballast-used": Incident(
        "the store's disk is full, and a revoke took what was kept for it", "keyturn metrics"
    ),
    "quarantined": Incident("the store was restored and is not believed yet", "keyturn status"),
    "audit-broken": Incident(
        "the audit is not what it was: entries were changed, cut or put back",
        "keyturn audit --verify",
    ),
    "revoked-presented": Incident(
        "somebody presented a revoked secret, all of it", "keyturn status AGENT"
    ),
    "retired-presented": Incident(
        "somebody presented a retired secret, all of it, and was refused", "keyturn status AGENT"
    ),
    "webhook-gone": Incident(
        "a receiver of webhooks answered that it is gone for ever; nothing is sent to it any more",
        "keyturn notify status",
    ),
}

_DRIFTS = frozenset({"revoked", "older", "unknown"})


def entry(code: str, *, actor: str, agent: str = "", **detail: Any) -> AuditEntry:
    """Return the audit entry of an incident that has no action of its own."""
    return AuditEntry(
        action=ACTION,
        actor=actor,
        agent=agent,
        outcome=code,
        detail=tuple(sorted(detail.items())),
    )


def code_of(found: AuditEntry) -> str | None:
    """Return which incident an audit entry tells of, None for every other entry."""
    if found.action == ACTION:
        return found.outcome
    if found.action == "clock.jumped":
        return "clock-jumped"
    if found.action == "drift.found" and found.outcome in _DRIFTS:
        return f"drift-{found.outcome}"
    if found.action == "config.reload" and found.outcome == "mass-change":
        return found.outcome
    return None
