"""The options and arguments that several commands share, and how their texts are read."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from keyturn.cli import complete
from keyturn.cli.reach import DEFAULT_CONFIG
from keyturn.core.duration import parse_duration

Socket = Annotated[
    Path | None,
    typer.Option(
        "--socket", envvar="KEYTURN_SOCKET", help="Instead of `admin.socket` of the file."
    ),
]
Config = Annotated[
    Path,
    typer.Option("-c", "--config", envvar="KEYTURN_CONFIG", help="The configuration file."),
]
ConfigOfDaemon = Annotated[
    Path,
    typer.Option(
        "-c",
        "--config",
        envvar="KEYTURN_CONFIG",
        help="Names the daemon's socket, and the store if the daemon is down.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the data as JSON, for machines.")]
Wait = Annotated[
    bool,
    typer.Option("--wait", help="Wait until it is done, at most an hour, and show the progress."),
]
AgentName = Annotated[
    str,
    typer.Argument(metavar="AGENT", help="The agent's id.", autocompletion=complete.agents),
]
Reason = Annotated[str, typer.Option("--reason", help="Why; goes into the audit.")]
RequestId = Annotated[
    str,
    typer.Option(
        metavar="ID", help="Repeated within a day with the same one, it is not done twice."
    ),
]

SOCKET = None
CONFIG = DEFAULT_CONFIG


def duration(text: str) -> timedelta:
    """Read `15m`, `48h`, `1h30m`. Raises a usage error."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def target(text: str, *, merge: bool, adopt: bool) -> dict[str, Any]:
    """Read `CONNECTION:PATH`. Raises a usage error."""
    to, colon, path = text.partition(":")
    if not (to and colon and path):
        raise typer.BadParameter("expected CONNECTION:PATH, such as vault-eu:hello")
    return {"to": to, "path": path, "merge": merge, "adopt": adopt}
