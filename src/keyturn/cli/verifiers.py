"""`keyturn verifiers`: who answers by what it remembers, and how far behind it is."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from keyturn.cli import options, output, render
from keyturn.cli.reach import ask

_NONE = {
    True: "no verifier is registered",
    False: "none is registered: on SQLite each verifier looks at the store itself before each yes",
}


def verifiers(
    json: options.Json = False,
    config: options.ConfigOfDaemon = options.CONFIG,
    socket: options.Socket = options.SOCKET,
) -> None:
    """Show the verifiers that remember answers, on PostgreSQL.

    A revoke waits until each of them has acknowledged it, or its lease has run out. One that is
    `stale` answers 503 to everything until it can ask the store again. Works on the store directly
    where the daemon is down.
    """
    found = ask("verifiers", {}, socket=socket, config=config)
    output.show(found, as_json=json, people=table)


def table(found: dict[str, Any]) -> str:
    """Return a line for each."""
    rows = found["verifiers"]
    if not rows:
        return _NONE[bool(found["leased"])]
    now = datetime.now(UTC)
    return render.table(
        ("VERIFIER", "HOST", "RELEASE", "SINCE", "EPOCH", "STATE", "RENEWED"),
        (
            (
                one["id"][:8],
                one["host"],
                one["release"],
                render.when(one["since"], now),
                one["epoch"],
                "stale" if one["stale"] else "behind" if one["behind"] else "fresh",
                render.when(one["renewed_at"], now),
            )
            for one in rows
        ),
    )
