"""How often each agent's secret was changed in a span of time, and how old it is, for auditors."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from keyturn.core.model import Case, VersionState
from keyturn.core.walltime import rfc3339
from keyturn.storage.tables import versions
from keyturn.wiring import Parts

Counts = dict[str, int]
LONGEST = timedelta(days=36500)


def report(parts: Parts, *, since: timedelta) -> list[dict[str, Any]]:
    """Return one row per agent, by name.

    `rotations` counts the versions that became current in that time, the first one included;
    `revoked` those that were refused by a person. What was refused to callers nothing counts yet:
    `refusals` is null.
    """
    store, now = parts.store, parts.store.now()
    begin = now - since

    def body(connection: Connection) -> tuple[Counts, Counts]:
        promoted = _counted(connection, versions.c.promoted_at >= begin)
        revoked = versions.c.state == VersionState.REVOKED
        return promoted, _counted(connection, sa.and_(revoked, versions.c.ended_at >= begin))

    promoted, revoked = store.database.read(body)
    rows = []
    for agent in sorted(store.agents(), key=lambda one: one.name):
        case = store.case_of(agent.name)
        uid = case.credential.uid
        counts = {"rotations": promoted.get(uid, 0), "revoked": revoked.get(uid, 0)}
        rows.append(_row(parts, case, now) | counts | {"refusals": None})
    return rows


def _counted(connection: Connection, which: sa.ColumnElement[bool]) -> Counts:
    query = sa.select(versions.c.credential_uid, sa.func.count()).where(which)
    found = connection.execute(query.group_by(versions.c.credential_uid))
    return {str(uid): int(number) for uid, number in found}


def _row(parts: Parts, case: Case, now: datetime) -> dict[str, Any]:
    agent, current = case.agent, case.current
    age = now - current.minted_at if current is not None else None
    most = parts.policy_of(case).max_age
    return {
        "agent": agent.name,
        "owner": agent.owner,
        "policy": agent.policy,
        "managed_by": str(agent.managed_by),
        "file": agent.file,
        "state": agent.shown_state,
        "version": current.id if current is not None else None,
        "minted_at": rfc3339(current.minted_at) if current else None,
        "age_days": round(age / timedelta(days=1), 2) if age is not None else None,
        "over_max_age": bool(age and most and age > most),
    }
