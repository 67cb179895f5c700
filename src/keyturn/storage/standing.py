"""What a store is, said without opening it for work: its schema may be too old or too new for that."""

from __future__ import annotations

import json
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, make_url

from keyturn.core.model import AgentState
from keyturn.core.walltime import rfc3339
from keyturn.errors import StorageError
from keyturn.storage import codec, migrations
from keyturn.storage.engine import Database, sqlite_path
from keyturn.storage.ledger import Ledger
from keyturn.storage.tables import agents, daemons, meta, now_micros, quarantine

NOTE = "last-backup.json"  # beside the store, not in it: a restored one would say what is not so


def standing(database: Database, url: str, folder: Path) -> dict[str, Any]:
    """Return it as plain JSON values. Raises StoreUnavailable, StorageError."""
    found = database.read(_rows)
    found |= _kind(database, url)
    found["ledger"] = _ledger(folder, str(found["store"] or ""))
    found["last_backup"] = last_backup(folder)
    return found


def note_backup(folder: Path, note: dict[str, Any]) -> None:
    """Remember what the last backup was. Losing it is harmless."""
    draft = folder / f".{NOTE}"
    with suppress(OSError):
        draft.touch(mode=0o600)
        draft.write_text(json.dumps(note))
        draft.replace(folder / NOTE)


def last_backup(folder: Path) -> dict[str, Any] | None:
    """Return what `store backup` made last, where that is known."""
    with suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads((folder / NOTE).read_text())
        return found
    return None


def live_daemons(connection: Connection) -> list[dict[str, Any]]:
    """Return the daemons whose lease runs, and which schema their release knows."""
    query = sa.select(daemons.c.writer, daemons.c.leads, *_knows(connection)).where(
        daemons.c.died_at.is_(None), sa.type_coerce(daemons.c.until, sa.BigInteger) > now_micros()
    )
    return [
        {"writer": row.writer, "leads": bool(row.leads), "schema": row.knows or "0001"}
        for row in connection.execute(query)
    ]


def _knows(connection: Connection) -> list[Any]:
    there = {one["name"] for one in sa.inspect(connection).get_columns("daemons")}
    return [daemons.c.knows if "knows" in there else sa.null().label("knows")]


def _rows(connection: Connection) -> dict[str, Any]:
    schema = migrations.revision(connection)
    if schema is None:
        raise StorageError("the store is empty", hint="check store.url; `keyturn run` creates it")
    row = connection.execute(
        sa.select(meta.c.store_id, meta.c.incarnation, meta.c.epoch, meta.c.created_at)
    ).first()
    oldest = migrations.oldest_schema(connection)
    return {
        "store": row.store_id if row else None,
        "incarnation": row.incarnation if row else None,
        "epoch": row.epoch if row else None,
        "created_at": rfc3339(row.created_at) if row else None,
        "schema": schema,
        "oldest_schema": oldest or schema,
        "this_release": migrations.HEAD,
        "pending": [
            {"schema": step.revision, "kind": "contract" if step.contracts_to else "expand"}
            for step in migrations.pending(schema)
        ],
        "daemons": live_daemons(connection),
        "agents": connection.execute(
            sa.select(sa.func.count()).where(agents.c.state != AgentState.REMOVED)
        ).scalar_one(),
        "quarantine": _quarantine(connection),
    }


def _quarantine(connection: Connection) -> list[dict[str, Any]]:
    if not sa.inspect(connection).has_table("quarantine"):
        return []
    query = (
        sa.select(quarantine.c.agent_uid, quarantine.c.reason, quarantine.c.since, agents.c.name)
        .outerjoin(agents, agents.c.uid == quarantine.c.agent_uid)
        .order_by(agents.c.name)
    )
    return [
        {
            "agent": row.name if row.agent_uid else None,
            "reason": row.reason,
            "since": rfc3339(row.since),
        }
        for row in connection.execute(query)
    ]


def _kind(database: Database, url: str) -> dict[str, Any]:
    if database.is_sqlite:
        path = sqlite_path(url)
        with database.engine.connect() as connection:
            mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
        return {
            "kind": "SQLite",
            "version": sqlite3.sqlite_version,
            "place": str(path),
            "size": path.stat().st_size,
            "journal_mode": mode,
        }
    parsed = make_url(url)
    with database.engine.connect() as connection:
        version = connection.exec_driver_sql("SHOW server_version").scalar()
        size = connection.exec_driver_sql("SELECT pg_database_size(current_database())").scalar()
    host = parsed.host or str(parsed.query.get("host", ""))
    return {
        "kind": "PostgreSQL",
        "version": version,
        "place": f"{host}/{parsed.database}",
        "size": size,
        "journal_mode": None,
    }


def _ledger(folder: Path, store_id: str) -> dict[str, Any]:
    """Say where the ledger is, and whether a restore could be merged from it."""
    ledger = Ledger(folder / "ledger")
    belongs = ledger.belongs()
    state = (
        "missing"
        if not belongs
        else "complete"
        if belongs["store"] == store_id
        else "of another store"
    )
    begun = belongs.get("at")
    return {
        "folder": str(ledger.folder),
        "state": state,
        "since": rfc3339(codec.instant(begun)) if begun else None,
        "agents": len(ledger.names()),
    }
