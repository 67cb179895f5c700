"""What people see of webhooks."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from keyturn.cli.render import Row, safe, table, when


def status(rows: Sequence[Row], now: datetime | None = None) -> str:
    """Return a table of the receivers, with what is wrong below it."""
    if not rows:
        return "no webhooks: `notify:` in the configuration names none"
    now = now or datetime.now(UTC)
    headings = ("WEBHOOK", "TELLS", "STATE", "WAITING", "OLDEST", "IN SUM", "LAST")
    cells = [
        (
            row["name"],
            " ".join(row["on"]),
            row["state"],
            row["waiting"],
            when(row["oldest_at"], now),
            row["in_sum"],
            row["last"],
        )
        for row in rows
    ]
    problems = [safe(row["problem"]) for row in rows if row["problem"]]
    return "\n".join([table(headings, cells), *problems])


def tests(found: Row) -> str:
    """Return one line per receiver that was pinged, and what it said."""
    lines = []
    for one in found["results"]:
        mark = "ok  " if one["ok"] else "FAIL"
        lines.append(f"{mark} {safe(one['name'])}: {safe(one['answer'])} in {one['seconds']} s")
        if one["text"]:
            lines.append(f"     it said: {safe(one['text'])}")
    return "\n".join(lines)
