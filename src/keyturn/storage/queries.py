"""Plain reads for commands, scheduler and metrics."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.sql.elements import ColumnElement

from keyturn.core.model import (
    UNMANAGED,
    Agent,
    AgentState,
    Case,
    Credential,
    Drift,
    Repairs,
    Rotation,
    RotationState,
    Version,
    VersionState,
)
from keyturn.errors import UnknownAgent
from keyturn.storage.cases import BY_NAME, columns, from_row, is_open, load
from keyturn.storage.codec import leads_to, micros
from keyturn.storage.results import Counts, Due, History
from keyturn.storage.tables import agents as agents_table
from keyturn.storage.tables import (
    audit,
    credentials,
    daemons,
    placements,
    quarantine,
    rotations,
    versions,
)

_LIVES = agents_table.c.state != AgentState.REMOVED


def claim_free(now: ColumnElement[Any]) -> ColumnElement[bool]:
    """Return the condition that nobody who may be alive holds the claim."""
    dead = sa.select(daemons.c.writer).where(daemons.c.died_at.is_not(None))
    return sa.or_(
        credentials.c.holder.is_(None),
        sa.type_coerce(credentials.c.until, sa.BigInteger) <= now,
        credentials.c.holder_writer.in_(dead),
    )


def in_quarantine() -> ColumnElement[bool]:
    """Return the condition that nobody can tell about an agent, or about any."""
    mine = quarantine.c.agent_uid.in_(("", agents_table.c.uid))
    return sa.exists().where(mine).correlate(agents_table)


def agents(connection: Connection, *, removed: bool) -> list[Agent]:
    """Return the agents that live, or the removed ones."""
    wanted = ~_LIVES if removed else _LIVES
    query = sa.select(*columns(Agent, agents_table)).where(wanted).order_by(agents_table.c.name)
    return [from_row(Agent, row) for row in connection.execute(query)]


def with_credentials(
    connection: Connection, uids: Sequence[str] | None = None
) -> list[tuple[Agent, Credential]]:
    """Return agents, removed ones too, with each of their credentials; without `uids` all."""
    query = (
        sa.select(*columns(Agent, agents_table, "a_"), *columns(Credential, credentials))
        .join_from(credentials, agents_table, credentials.c.agent_uid == agents_table.c.uid)
        .order_by(agents_table.c.name, credentials.c.name)
    )
    wanted = None if uids is None else set(uids)
    return [
        (from_row(Agent, row, "a_"), from_row(Credential, row))
        for row in connection.execute(query)
        if wanted is None or row.a_uid in wanted
    ]


def agent(connection: Connection, name: str) -> Agent:
    """Return a living agent by name."""
    query = sa.select(*columns(Agent, agents_table)).where(agents_table.c.name == name, _LIVES)
    row = connection.execute(query).first()
    if row is None:
        raise UnknownAgent(f"no agent is called {name!r}")
    return from_row(Agent, row)


def case_of(connection: Connection, agent_name: str, credential: str) -> Case:
    """Return the case of a living agent's credential."""
    if found := load(connection, BY_NAME, b_name=agent_name, b_credential=credential):
        return found.case
    raise UnknownAgent(f"no agent is called {agent_name!r}")


def history(connection: Connection, uid: str, limit: int) -> History:
    """Return versions and rotations of a credential."""
    of_versions = sa.select(*columns(Version, versions)).where(versions.c.credential_uid == uid)
    of_rotations = sa.select(*columns(Rotation, rotations)).where(rotations.c.credential_uid == uid)
    newest = of_versions.order_by(versions.c.seq.desc()).limit(limit)
    last = of_rotations.order_by(rotations.c.opened_at.desc()).limit(limit)
    return History(
        versions=tuple(from_row(Version, row) for row in connection.execute(newest)),
        rotations=tuple(from_row(Rotation, row) for row in connection.execute(last)),
    )


def find_version(connection: Connection, version_id: str) -> tuple[Agent, Version] | None:
    """Return a version and its agent, removed or not."""
    return find_versions(connection, [version_id]).get(version_id)


def find_versions(
    connection: Connection, version_ids: Sequence[str]
) -> dict[str, tuple[Agent, Version]]:
    """Return versions with their agents, removed or not."""
    query = (
        sa.select(*columns(Version, versions), *columns(Agent, agents_table, "a_"))
        .join_from(versions, credentials, versions.c.credential_uid == credentials.c.uid)
        .join(agents_table, credentials.c.agent_uid == agents_table.c.uid)
        .where(versions.c.id.in_(version_ids))
    )
    rows = connection.execute(query)
    return {row.id: (from_row(Agent, row, "a_"), from_row(Version, row)) for row in rows}


def due(
    connection: Connection, now: datetime, limit: int, full: Collection[str], after: Due | None
) -> list[Due]:
    """Return unclaimed credentials whose time has come and that touch no full connection."""
    open_one = sa.and_(rotations.c.credential_uid == credentials.c.uid, is_open(rotations.c.state))
    bound = sa.literal(now, credentials.c.wake_at.type)
    query = (
        sa.select(
            credentials.c.uid,
            credentials.c.wake_at,
            agents_table.c.name,
            agents_table.c.targets,
            credentials.c.leaving,
            rotations.c.targets.label("open_targets"),
        )
        .join_from(credentials, agents_table, credentials.c.agent_uid == agents_table.c.uid)
        .outerjoin(rotations, open_one)
        .where(credentials.c.wake_at <= bound, claim_free(sa.literal(micros(now), sa.BigInteger)))
        .where(~in_quarantine())
        .order_by(credentials.c.wake_at, credentials.c.uid)
        .limit(limit)
    )
    for column in (agents_table.c.targets, credentials.c.leaving, rotations.c.targets):
        # In the query: whoever reads all the rows of a hanging destination to pass them over is as
        # slow as there are many.
        text = sa.func.coalesce(sa.type_coerce(column, sa.Text), "")
        query = query.where(*(~text.contains(leads_to(to), autoescape=True) for to in full))
    if after is not None:
        place = sa.tuple_(credentials.c.wake_at, credentials.c.uid)
        query = query.where(
            place
            > sa.tuple_(sa.literal(after.wake_at, bound.type), sa.literal(after.credential_uid))
        )
    return [_due(row) for row in connection.execute(query)]


def _due(row: Any) -> Due:
    targets = (*row.targets, *row.leaving, *(row.open_targets or ()))
    return Due(
        credential_uid=row.uid,
        agent_name=row.name,
        wake_at=row.wake_at,
        connections=tuple(sorted({target.to for target in targets})),
    )


def next_wake(connection: Connection) -> datetime | None:
    """Return the earliest moment at which something is due."""
    later = credentials.c.until > credentials.c.wake_at
    at = sa.case((later, credentials.c.until), else_=credentials.c.wake_at)
    query = sa.select(sa.type_coerce(sa.func.min(at), credentials.c.wake_at.type))
    return connection.execute(query.where(credentials.c.wake_at.is_not(None))).scalar()


def counts(
    connection: Connection,
    now: datetime,
    max_ages: Mapping[str, timedelta],
    late_by: timedelta = timedelta(0),
) -> Counts:
    """Return the numbers by state; `max_ages` is the maximum age by policy.

    Overdue is what has been due for longer than `late_by`.
    """
    due = credentials.c.next_rotation_at
    overdue = connection.execute(
        sa.select(sa.func.count(), sa.func.min(due))
        .select_from(credentials)
        .join(agents_table, credentials.c.agent_uid == agents_table.c.uid)
        .where(
            due < sa.literal(now - late_by, due.type),
            agents_table.c.state == AgentState.ENABLED,
            agents_table.c.listed,
        )
    ).one()
    return Counts(
        agents=_agents(connection),
        versions=_by_state(connection, versions),
        rotations=_by_state(connection, rotations, is_open(rotations.c.state)),
        overdue=overdue[0],
        longest_overdue=now - overdue[1] if overdue[1] else timedelta(0),
        over_max_age=_over_max_age(connection, now, max_ages),
        cleanup_pending=_cleanup_pending(connection),
        audit_head=connection.execute(sa.select(sa.func.max(audit.c.position))).scalar() or 0,
    )


def _over_max_age(connection: Connection, now: datetime, max_ages: Mapping[str, timedelta]) -> int:
    minted = versions.c.minted_at
    old = [
        sa.and_(agents_table.c.policy == name, minted < sa.literal(now - age, minted.type))
        for name, age in max_ages.items()
    ]
    query = (
        sa.select(sa.func.count())
        .select_from(versions)
        .join(credentials, versions.c.credential_uid == credentials.c.uid)
        .join(agents_table, credentials.c.agent_uid == agents_table.c.uid)
        .where(versions.c.state == VersionState.CURRENT, _LIVES, sa.or_(sa.false(), *old))
    )
    found: int = connection.execute(query).scalar_one()
    return found


def _cleanup_pending(connection: Connection) -> int:
    """Count destinations with a copy of a revoked version, or that showed one to the last sweep."""
    copies = (
        sa.select(placements.c.credential_uid, placements.c.target)
        .join_from(placements, versions, placements.c.version_id == versions.c.id)
        .where(~placements.c.gone, versions.c.state == VersionState.REVOKED)
    )
    drifting = credentials.c.drift != sa.literal((), credentials.c.drift.type)
    shown = sa.select(credentials.c.uid, credentials.c.drift).where(drifting)
    found = {(row.credential_uid, row.target) for row in connection.execute(copies)}
    for row in connection.execute(shown):
        found |= {(row.uid, drift.target) for drift in row.drift if drift.kind == "revoked"}
    return len(found)


def drifts(connection: Connection) -> list[tuple[str, Drift]]:
    """Return what the last sweeps found, with the agent's name, of agents that are not removed."""
    query = (
        sa.select(agents_table.c.name, credentials.c.drift)
        .join_from(credentials, agents_table, credentials.c.agent_uid == agents_table.c.uid)
        .where(
            credentials.c.drift != sa.literal((), credentials.c.drift.type),
            agents_table.c.state != AgentState.REMOVED,
        )
    )
    return [(row.name, drift) for row in connection.execute(query) for drift in row.drift]


def fights(connection: Connection) -> list[tuple[str, Repairs]]:
    """Return the entries that others keep from being mended, with the agent's name."""
    query = (
        sa.select(agents_table.c.name, credentials.c.repairs)
        .join_from(credentials, agents_table, credentials.c.agent_uid == agents_table.c.uid)
        .where(credentials.c.repairs != sa.literal((), credentials.c.repairs.type), _LIVES)
    )
    rows = connection.execute(query)
    return [(row.name, one) for row in rows for one in row.repairs if one.fight is not None]


def stopped(connection: Connection) -> list[tuple[str, str]]:
    """Return the agents whose rotation waits or is stalled, and at which target; "" for none."""
    query = (
        sa.select(agents_table.c.name, rotations.c.waiting, rotations.c.error_where)
        .join_from(rotations, credentials, rotations.c.credential_uid == credentials.c.uid)
        .join(agents_table, credentials.c.agent_uid == agents_table.c.uid)
        .where(rotations.c.state.in_((RotationState.WAITING, RotationState.STALLED)), _LIVES)
        .order_by(agents_table.c.name)
    )
    return [
        (row.name, row.waiting.where if row.waiting else row.error_where)
        for row in connection.execute(query)
    ]


def _agents(connection: Connection) -> dict[str, int]:
    """Count agents by the word that is shown of their state."""
    left = sa.and_(agents_table.c.state == AgentState.ENABLED, ~agents_table.c.listed)
    found = _by_state(connection, agents_table)
    counted = sa.select(sa.func.count()).select_from(agents_table).where(left)
    if number := connection.execute(counted).scalar_one():
        found = {**found, "enabled": found["enabled"] - number, UNMANAGED: number}
    return found


def _by_state(
    connection: Connection, table: sa.Table, where: ColumnElement[bool] | None = None
) -> dict[str, int]:
    query = sa.select(table.c.state, sa.func.count()).group_by(table.c.state)
    rows = connection.execute(query if where is None else query.where(where))
    return {str(state): number for state, number in rows}
