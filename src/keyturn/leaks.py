"""What is asked for when something leaks: by whom, as a note in the spool, and what it does to a case.

A note is read back by whatever daemon applies a tombstone to the store, perhaps after a restore: it
must never do more than the person meant, nor less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from keyturn.core import lifecycle
from keyturn.core.model import AgentState, Case, Version, VersionState
from keyturn.core.secret import mask
from keyturn.ports import AuditEntry
from keyturn.storage.requests import Once

STORE_AWAY = (
    "the store could not be written: every verifier of this host refuses already, the daemon writes"
    " the rest as soon as it can"
)

NO_TOMBSTONE = (
    "the store has it, but no tombstone could be made: after a restore of the store revoke it again"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks, and how it reached us: `socket`, `command`, `signal`, `file` or `reload`."""

    name: str
    trigger: str = "command"

    def __post_init__(self) -> None:
        """Replace what is no text: the name goes into the audit."""
        object.__setattr__(self, "name", text_of(self.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """What is to be revoked: an agent or one version, everything minted up to `at`."""

    agent: str | None = None
    version: str | None = None
    reissue: bool = False
    reason: str = ""
    at: datetime | None = None
    withhold: tuple[str, ...] = ()  # connections where the successor is not published

    def __post_init__(self) -> None:
        """Mask a secret that was pasted into the reason, and what is no text: no cause to refuse."""
        object.__setattr__(self, "reason", mask(text_of(self.reason)))
        object.__setattr__(self, "withhold", tuple(text_of(name) for name in self.withhold))

    @property
    def target(self) -> str:
        """The typed target, as the revocations file writes it."""
        return f"agent:{self.agent}" if self.agent else f"version:{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One leak to be acted on for a caller."""

    leak: Leak
    caller: Caller
    once: Once | None = None


def _state(case: Case, version: Version) -> VersionState | None:
    known = case.version(version.id)
    return known.state if known else None


def is_cut(before: Case, version: Version) -> bool:
    """Whether a change revoked a version of the case."""
    revoked = VersionState.REVOKED
    return version.state is revoked and _state(before, version) is not revoked


def older(case: Case, leak: Leak) -> list[Version]:
    """Return what is accepted and was minted up to the leak's time."""
    return [v for v in case.accepted if leak.at is None or v.minted_at <= leak.at]


def revoked(case: Case, leak: Leak, now: datetime) -> Case:
    """Return the case after a leak was acted on."""
    if leak.version is not None:
        return lifecycle.revoke_version(case, leak.version, reissue=leak.reissue, now=now)
    leaked = older(case, leak)
    if leak.at is None or (leaked and len(leaked) == len(case.accepted)):
        return lifecycle.revoke_agent(case, reissue=leak.reissue, now=now, withhold=leak.withhold)
    for version in leaked:  # a list that stays in place never kills a successor
        case = lifecycle.revoke_version(case, version.id, reissue=leak.reissue, now=now)
    if leaked and leak.withhold:
        withheld = tuple(sorted({*case.credential.withheld, *leak.withhold}))
        case = replace(case, credential=replace(case.credential, withheld=withheld))
    return case


def revoke_entry(case: Case, order: Order, cut: Sequence[str]) -> AuditEntry:
    """Return what the audit says of it; `cut` are the versions that it refused."""
    leak = order.leak
    return AuditEntry(
        action="revoke",
        actor=order.caller.name,
        agent=case.agent.name,
        version_id=leak.version or "",
        detail=(
            ("reason", leak.reason),
            ("reissue", leak.reissue),
            ("revoked", tuple(cut)),
            ("trigger", order.caller.trigger),
            ("withheld", leak.withhold),
        ),
    )


def warnings_of(leak: Leak, case: Case, *, cancelled: bool) -> list[str]:
    """Say what a person would not expect of a revoke that was done.

    `cancelled`: it took a successor that was owed.
    """
    name, found = case.agent.name, []
    if cancelled:
        found.append(
            f"an earlier revoke of {name} owed it a successor: it gets none now, unless you"
            f" `keyturn resume {name}`"
        )
    if leak.reissue and case.agent.state is AgentState.SUSPENDED:
        found.append(f"{name} is suspended: it gets its successor after `keyturn resume {name}`")
    if leak.reissue and not case.next_targets and case.agent.targets:
        found.append(
            f"every destination of {name} is left out: a successor is published nowhere before"
            f" `keyturn resume {name} --destination CONNECTION`"
        )
    return found


def note_of(leak: Leak, caller: Caller, once: Once | None) -> dict[str, Any]:
    """Write down for the spool what is asked for. Only a line has a time, and that is a person's."""
    return {
        "scope": "version" if leak.version else "agent",
        "agent": leak.agent or "",
        "actor": caller.name,
        "reason": leak.reason,
        "reissue": leak.reissue,
        "at": leak.at.isoformat() if leak.at else None,
        "withhold": list(leak.withhold),
        "request": [once.id, once.digest] if once else None,
    }


def orders_of(
    version: Version, notes: Sequence[dict[str, Any]], agent: str, caller: Caller
) -> list[Order]:
    """Read the notes of a tombstone back; one that was made by hand means that version.

    Nothing where it is over with already. What notes before the last `done` one asked for was done:
    if that is to do again the store was restored, and what was minted since then is not meant.
    """
    if version.state is VersionState.REVOKED:
        return []
    for number, note in enumerate(notes):
        if note.get("done"):
            notes = notes[number:]
            break
    leaks = [(_leak_of(version.id, note, agent=agent), _once_of(note)) for note in notes]
    orders = [
        Order(leak=leak, caller=caller, once=once)
        for leak, once in leaks or [(Leak(version=version.id), None)]
    ]
    # SECURITY: an agent's note on what was replaced since must not replay onto its successor.
    return orders if version.accepted else [order for order in orders if order.leak.version]


def _leak_of(version_id: str, note: dict[str, Any], *, agent: str) -> Leak:
    reissue, reason = bool(note.get("reissue")), str(note.get("reason", ""))
    if note.get("scope") != "agent":
        return Leak(version=version_id, reissue=reissue, reason=reason)
    at = datetime.fromisoformat(str(note["at"])) if note.get("at") else None
    withhold = tuple(str(name) for name in note.get("withhold") or ())
    return Leak(agent=agent, reissue=reissue, reason=reason, at=at, withhold=withhold)


def _once_of(note: dict[str, Any]) -> Once | None:
    """Read the request of a note back: a repeat must find that the daemon completed it."""
    request = note.get("request")
    return Once(id=str(request[0]), digest=str(request[1])) if request else None


def text_of(text: str) -> str:
    """Return a text that can be stored: an argument may hold bytes that are none."""
    return text.encode(errors="replace").decode()
