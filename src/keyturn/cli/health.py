"""`keyturn health`: what container health checks and load balancers' scripts ask."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from keyturn.cli import options, output, render
from keyturn.cli.client import AdminClient, DaemonDown
from keyturn.cli.reach import socket_of
from keyturn.daemon.wire import waiting_path

PATIENCE = 5.0  # seconds; what is asked is answered from memory
UNAVAILABLE = 69


def health(
    ready: Annotated[
        bool,
        typer.Option("--ready", help="Whether it leads and works, not only whether it lives."),
    ] = False,
    json: options.Json = False,
    config: options.ConfigOfDaemon = options.CONFIG,
    socket: options.Socket = options.SOCKET,
) -> None:
    """Tell whether the daemon lives.

    Exit 0 with `live`, or 69 with the reason in a word. A standby lives and is not ready. With
    --ready it says `ready` only if this daemon leads, its store answers and nothing holds it back.
    """
    found = _ask(socket or socket_of(config))
    output.show(found, as_json=json, people=render_ready if ready else render_live)
    output.end_with(0 if found["ready" if ready else "live"] else UNAVAILABLE)


def _ask(path: Path) -> dict[str, Any]:
    """Ask at the admin socket, and beside it, where a daemon that does not lead yet answers."""
    down: DaemonDown | None = None
    for place in (path, waiting_path(path), path):  # it may take the lead in between
        client = AdminClient(place, received_within=PATIENCE, answered_within=PATIENCE)
        try:
            found: dict[str, Any] = client.call("health", {})
        except DaemonDown as error:
            down = down or error
        else:
            return found
    raise down or DaemonDown("the daemon is not running")


def render_live(found: dict[str, Any]) -> str:
    """Return `live`, or that it is stuck."""
    return "live" if found["live"] else _reasons(found)


def render_ready(found: dict[str, Any]) -> str:
    """Return `ready`, or why not, a line each."""
    return "ready" if found["ready"] else _reasons(found)


def _reasons(found: dict[str, Any]) -> str:
    return "\n".join(
        f"{render.safe(one['reason'])}: {render.safe(one['text'])}" for one in found["reasons"]
    )
