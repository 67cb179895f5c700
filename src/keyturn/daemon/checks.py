"""What `keyturn check` looks at: the files, offline; with `--probe` the destinations as well."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from keyturn import wiring
from keyturn.config import Settings
from keyturn.core.model import Target
from keyturn.daemon.service import load
from keyturn.destinations import registry
from keyturn.destinations.base import DestinationBase
from keyturn.errors import KeyturnError, Refused
from keyturn.storage.engine import refuse_open

Check = dict[str, Any]


def check(path: Path, *, probe: bool = False) -> dict[str, Any]:
    """Return one row per check. Raises ConfigError where the files cannot be used at all."""
    settings = load(path)
    rows = [_good("configuration", _summary(settings)), _tried("store", lambda: _store(settings))]
    rows += [_good("note", note) for note in settings.notes]
    if probe:
        destinations = wiring.connect(settings, store_id="", clock=wiring.SystemClock())
        for name, destination in destinations.items():
            rows += _probed(name, destination, _entries(settings, name))
            destination.close()
    return {"ok": all(row["ok"] for row in rows), "checks": rows}


def least_policy(path: Path, kind: str, connection: str = "") -> dict[str, Any]:
    """Return the least rights that a configuration needs at one connection of a type, and notes.

    Raises ConfigError, and Refused where it is not clear which connection is meant.
    """
    adapter = registry.load(kind)
    settings = load(path)
    names = [name for name, one in settings.connections.items() if one.type == kind]
    wanted = [name for name in names if connection in ("", name)]
    if len(wanted) != 1:
        listed = ", ".join(names) or "none"
        problem = f"there is no connection {connection}" if connection and names else ""
        raise Refused(
            problem or f"there are {len(names)} connections of type {kind}",
            hint=f"name one with --connection: {listed}" if names else "add one to the file",
        )
    options, entries = settings.connections[wanted[0]].options, _entries(settings, wanted[0])
    note = f"connection {wanted[0]}, {len(entries)} entries of the agents in these files; what was"
    note += " added by a command needs its own rules beside them"
    return {"text": adapter.least_policy(options, entries), "notes": [note]}


def _entries(settings: Settings, connection: str) -> list[tuple[Target, str]]:
    """Return what the files' agents read at a connection, each with how old copies are retired."""
    return [
        (target, settings.policies[agent.policy].retire)
        for agent in settings.agents.values()
        for target in agent.targets
        if target.to == connection
    ]


def _summary(settings: Settings) -> str:
    return (
        f"{len(settings.agents)} agents, {len(settings.connections)} connections,"
        f" {len(settings.policies)} policies"
    )


def _store(settings: Settings) -> str:
    """Describe the store; a folder that is not there yet is made by `keyturn run`."""
    with suppress(FileNotFoundError, PermissionError):  # not ours to look at: a pull request's host
        refuse_open(settings.store.folder, 0o700)
    if not settings.store.url.startswith("sqlite:"):
        return "PostgreSQL"
    return f"SQLite {sqlite3.sqlite_version}, journal mode PERSIST, synchronous FULL"


def _probed(
    name: str, destination: DestinationBase, entries: list[tuple[Target, str]]
) -> list[Check]:
    """Look at a connection and then, where it can be reached, at each entry; one row per problem."""
    rows = [_tried(f"connection {name}", destination.probe)]
    if not entries or not rows[0]["ok"]:
        return rows

    def look(entry: tuple[Target, str]) -> Check:
        target, retire = entry

        def attempt() -> str:
            destination.probe_entry(target, retire=retire)
            return ""

        return _tried(f"entry {target.key}", attempt)

    with ThreadPoolExecutor(destination.parallel) as pool:
        bad = [row for row in pool.map(look, entries) if not row["ok"]]
    good = len(entries) - len(bad)
    rows.append(_good(f"entries {name}", f"{good} of {len(entries)} can be rotated"))
    return rows + bad


def _tried(name: str, attempt: Callable[[], str]) -> Check:
    try:
        return _good(name, attempt())
    except KeyturnError as error:
        return {"name": name, "ok": False, "detail": str(error), "hint": error.hint}


def _good(name: str, detail: str) -> Check:
    return {"name": name, "ok": True, "detail": detail, "hint": ""}
