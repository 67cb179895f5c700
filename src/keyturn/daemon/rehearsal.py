"""What a reload would do, against the running store, without doing it."""

from __future__ import annotations

from typing import Any

from keyturn import wiring
from keyturn.config import Settings
from keyturn.daemon import answers
from keyturn.errors import KeyturnError
from keyturn.reconcile import Change
from keyturn.wiring import Parts


def rehearse(
    parts: Parts, settings: Settings, *, allow_mass_change: bool, take_over: frozenset[str]
) -> dict[str, Any]:
    """Return what would become of each agent, and why it would be refused, if it would.

    Everything that a reload checks is checked, by the same code, in a transaction that is undone.
    """
    changes: list[Change] = []
    counts: dict[str, int] = {}
    refused: KeyturnError | None = None
    fresh = wiring.connect(
        settings,
        store_id=parts.store.store_id,
        clock=parts.clock,
        before=parts.settings,
        kept=parts.destinations,
    )
    try:
        with parts.defining:
            counts = parts.reconcile(
                actor="rehearsal",
                allow_mass_change=allow_mass_change,
                settings=settings,
                destinations=fresh,
                take_over=take_over,
                rehearse=changes.extend,
            )
    except KeyturnError as error:
        refused = error
    finally:
        kept = parts.destinations.values()
        for destination in fresh.values():
            if all(destination is not one for one in kept):
                destination.close()
    return {
        **counts,
        "changes": [_row(one) for one in sorted(changes, key=lambda one: (one.kind, one.agent))],
        "refused": None if refused is None else answers.error_of(refused),
    }


def _row(change: Change) -> dict[str, Any]:
    return {
        "agent": change.agent,
        "change": change.kind,
        "what": list(change.what),
        "file": change.file,
        "line": change.line,
        "was_in": change.was_in,
    }
