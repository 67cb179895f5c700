"""What `keyturn check` looks at: the files, offline; with `--probe` the destinations as well."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keyturn import wiring
from keyturn.config import Settings
from keyturn.daemon.service import load
from keyturn.destinations.base import DestinationBase
from keyturn.errors import KeyturnError

Check = dict[str, Any]


def check(path: Path, *, probe: bool = False) -> dict[str, Any]:
    """Return one row per check. Raises ConfigError where the files cannot be used at all."""
    settings = load(path)
    rows = [_good("configuration", _summary(settings)), _store(settings)]
    rows += [_good("note", note) for note in settings.notes]
    if probe:
        destinations = wiring.connect(settings, store_id="", clock=wiring.SystemClock())
        rows += [_probe(name, destination) for name, destination in destinations.items()]
    return {"ok": all(row["ok"] for row in rows), "checks": rows}


def vault_policy(path: Path) -> str:
    """Return the least policy that a configuration needs at Vault or OpenBao."""
    from keyturn.destinations.vault import VaultOptions, policy_text

    settings = load(path)
    parts = []
    for name, connection in settings.connections.items():
        if isinstance(connection.options, VaultOptions):
            texts = [
                policy_text(
                    connection.options,
                    [target for target in agent.targets if target.to == name],
                    retire=settings.policies[agent.policy].retire,
                )
                for agent in settings.agents.values()
            ]
            lines = dict.fromkeys("\n".join(texts).splitlines())
            parts.append(f"# connection {name}\n" + "\n".join(lines))
    return "\n".join(parts)


def _summary(settings: Settings) -> str:
    return (
        f"{len(settings.agents)} agents, {len(settings.connections)} connections,"
        f" {len(settings.policies)} policies"
    )


def _store(settings: Settings) -> Check:
    if not settings.store.url.startswith("sqlite:"):
        return _good("store", "PostgreSQL")
    detail = f"SQLite {sqlite3.sqlite_version}, journal mode PERSIST, synchronous FULL"
    return _good("store", detail)


def _probe(name: str, destination: DestinationBase) -> Check:
    return _tried(f"connection {name}", destination.probe, destination.close)


def _tried(name: str, attempt: Callable[[], str], end: Callable[[], None]) -> Check:
    try:
        return _good(name, attempt())
    except KeyturnError as error:
        return {"name": name, "ok": False, "detail": str(error), "hint": error.hint}
    finally:
        end()


def _good(name: str, detail: str) -> Check:
    return {"name": name, "ok": True, "detail": detail, "hint": ""}
