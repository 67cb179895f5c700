"""`keyturn report`: what auditors ask for, as a table, JSON or CSV."""

from __future__ import annotations

import csv as csv_
import io
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from keyturn.cli import options, output, render
from keyturn.cli.reach import ask

_COLUMNS = (
    "agent", "owner", "policy", "managed_by", "file", "state", "version", "minted_at", "age_days",
    "over_max_age", "rotations", "revoked", "refusals",
)  # fmt: skip
_SHOWN = ("agent", "owner", "state", "rotations", "revoked", "age_days", "over_max_age", "file")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def report(
    since: Annotated[str, typer.Option(help="How far back, such as 90d.")] = "90d",
    csv: Annotated[bool, typer.Option("--csv", help="As CSV, with every column.")] = False,
    json: options.Json = False,
    config: options.ConfigOfDaemon = options.CONFIG,
    socket: options.Socket = options.SOCKET,
) -> None:
    """Tell how often each agent's secret changed.

    `keyturn report --since 90d --csv > rotations.csv`
    """
    if csv and json:
        raise typer.BadParameter("--csv or --json, not both")
    seconds = options.duration(since).total_seconds()
    rows = ask("report", {"since_seconds": seconds}, socket=socket, config=config)
    output.show(rows, as_json=json, people=as_csv if csv else as_table)


def as_table(rows: Sequence[render.Row]) -> str:
    """Return what a person looks for."""
    headings = [name.replace("_", " ").upper() for name in _SHOWN]
    return render.table(headings, ([render.safe(row[name]) for name in _SHOWN] for row in rows))


def as_csv(rows: Sequence[render.Row]) -> str:
    """Return every column (RFC 4180, with the line ends of this system)."""
    out = io.StringIO()
    writer = csv_.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows([_cell(row[name]) for name in _COLUMNS] for row in rows)
    return out.getvalue().rstrip("\n")


def _cell(value: Any) -> Any:
    """Return what a spreadsheet shows as it is: an owner's text must not become a formula (CWE-1236)."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, str):
        return value
    text = render.safe(value)
    return f"'{text}" if text.startswith(_FORMULA) else text
