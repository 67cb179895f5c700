"""What the shell offers after TAB: agents, connections, policies …, from the daemon, or nothing.

Quiet and quick whatever happens: no text of ours may get into the line that somebody types.
"""

from __future__ import annotations

from pathlib import Path

import typer

from keyturn.cli.client import AdminClient
from keyturn.cli.reach import DEFAULT_CONFIG, socket_of
from keyturn.errors import KeyturnError

PATIENCE = 0.1  # seconds for each of two waits: connecting and asking


def agents(context: typer.Context, incomplete: str) -> list[str]:
    """Offer the ids of agents that were not typed yet."""
    typed = context.params.get("agents") or ()
    return [name for name in _names(context, "agents", incomplete) if name not in typed]


def connections(context: typer.Context, incomplete: str) -> list[str]:
    """Offer the names of connections."""
    return _names(context, "connections", incomplete)


def places(context: typer.Context, incomplete: str) -> list[str]:
    """Offer `CONNECTION:`, the beginning of a place."""
    return [f"{name}:" for name in _names(context, "connections", incomplete)]


def policies(context: typer.Context, incomplete: str) -> list[str]:
    """Offer the names of policies."""
    return _names(context, "policies", incomplete)


def owners(context: typer.Context, incomplete: str) -> list[str]:
    """Offer who owns agents already."""
    return _names(context, "owners", incomplete)


def logins(context: typer.Context, incomplete: str) -> list[str]:
    """Offer what agents present."""
    return _names(context, "logins", incomplete)


def versions(context: typer.Context, incomplete: str) -> list[str]:
    """Offer the versions that are accepted."""
    return _names(context, "versions", incomplete)


def destinations(context: typer.Context, incomplete: str) -> list[str]:
    """Offer `CONNECTION:PATH` of every agent, or of the one that was typed."""
    agent = context.params.get("agent")
    found = _names(context, "destinations", f"{agent}=" if agent else "")
    offered = {one.partition("=")[2] for one in found}
    return sorted(one for one in offered if one.startswith(incomplete))


def types(incomplete: str) -> list[str]:
    """Offer the types of destinations that have policies of their own."""
    return [one for one in ("aws", "azure", "vault") if one.startswith(incomplete)]


def demos(incomplete: str) -> list[str]:
    """Offer what the demo can show."""
    offered = ("all", "aws", "azure", "file", "vault")
    return [one for one in offered if one.startswith(incomplete)]


def _names(context: typer.Context, kind: str, incomplete: str) -> list[str]:
    try:
        socket = context.params.get("socket")
        config = Path(context.params.get("config") or DEFAULT_CONFIG)
        path = Path(socket) if socket else socket_of(config, quiet=True)
        client = AdminClient(path, received_within=PATIENCE, answered_within=PATIENCE)
        found = client.call("names", {})
        return [name for name in found[kind] if name.startswith(incomplete)]
    except (KeyturnError, OSError, ValueError, KeyError, TypeError):
        return []
