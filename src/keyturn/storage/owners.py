"""Who owns what: names, logins and entries at destinations, each one agent's only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from keyturn.core.model import (
    ACCEPTED,
    Agent,
    AgentState,
    Case,
    Credential,
    Effect,
    Outcome,
    Target,
)
from keyturn.errors import Refused, UnknownAgent
from keyturn.storage import cases
from keyturn.storage.tables import agents, credentials, identities, intents, placements, versions


def add(
    connection: Connection,
    agent: Agent,
    credential: Credential,
    claimed: Mapping[str, str],
) -> None:
    """Insert an agent, its credential and its entries. Raises Refused."""
    check(connection, agent, claimed)
    connection.execute(sa.insert(agents).values(**cases.to_row(agent)))
    connection.execute(sa.insert(credentials).values(**cases.to_row(credential)))
    _claim(connection, agent, claimed)


def check(connection: Connection, agent: Agent, claimed: Mapping[str, str]) -> None:
    """Raise Refused, naming the other agent, where a name, login or entry is taken."""
    if agent.state is AgentState.REMOVED:
        return
    for field in ("name", "login"):
        value = getattr(agent, field)
        taken = sa.select(agents.c.name).where(
            agents.c[field] == value,
            agents.c.state != AgentState.REMOVED,
            agents.c.uid != agent.uid,
        )
        if other := connection.execute(taken).scalar():
            raise Refused(
                f"the {field} {value!r} is taken by agent {other!r}",
                hint=f"choose another {field}",
            )
    # An agent that has a new login is still known by the old one, until its old versions are over.
    still = (
        sa.select(agents.c.name)
        .join_from(versions, credentials, versions.c.credential_uid == credentials.c.uid)
        .join(agents, credentials.c.agent_uid == agents.c.uid)
        .where(
            versions.c.login == agent.login,
            versions.c.state.in_(sorted(ACCEPTED)),
            agents.c.uid != agent.uid,
            agents.c.state != AgentState.REMOVED,
        )
    )
    if other := connection.execute(still.limit(1)).scalar():
        raise Refused(
            f"the login {agent.login!r} is still used by older versions of agent {other!r}",
            hint="wait until their grace is over, or choose another login",
        )
    owned = (
        sa.select(identities.c.identity, agents.c.name, identities.c.target)
        .join_from(identities, agents, identities.c.agent_uid == agents.c.uid)
        .where(identities.c.identity.in_(list(claimed.values())), agents.c.uid != agent.uid)
    )
    for row in connection.execute(owned):
        mine = next(key for key, identity in claimed.items() if identity == row.identity)
        raise Refused(
            f"the entry {mine} belongs to agent {row.name!r} (as {row.target})",
            hint="give each agent an entry of its own",
        )
    if len(set(claimed.values())) != len(claimed):
        raise Refused(
            f"agent {agent.name!r} names one entry twice", hint="leave one of its destinations out"
        )


def locked(connection: Connection, agent_uid: str) -> list[Case]:
    """Lock an agent's credentials and return their cases. Raises UnknownAgent."""
    query = (
        sa.select(credentials.c.uid)
        .where(credentials.c.agent_uid == agent_uid)
        .order_by(credentials.c.uid)
        .with_for_update()
    )
    uids = connection.execute(query).scalars().all()
    if not uids:
        raise UnknownAgent("no agent has this id")
    return [cases.load_one(connection, uid) for uid in uids]


def changed(connection: Connection, case: Case, agent: Agent, *, wake_at: datetime) -> Case:
    """Return a case with its agent's new definition; a dropped target may be leaving."""
    kept = {target.key for target in agent.targets}
    known = {t.key: t for t in (*case.credential.leaving, *case.agent.targets)}
    uid = case.credential.uid
    leaving = tuple(
        target
        for key, target in known.items()
        if key not in kept
        and (target in case.credential.leaving or not _empty(connection, uid, target))
    )
    credential = replace(case.credential, leaving=leaving, wake_at=wake_at)
    return replace(case, agent=agent, credential=credential)


def _empty(connection: Connection, uid: str, target: Target) -> bool:
    """Tell whether surely nothing of ours is at a destination.

    Where no copies are recorded, anything that was ever written there counts, and always what may yet
    land or may have landed: an intent that was settled was never reported.
    """
    here = placements.c.credential_uid == uid, placements.c.target == target.key
    copies = connection.execute(sa.select(placements.c.gone).where(*here)).scalars().all()
    written = sa.select(intents.c.outcome).where(
        intents.c.credential_uid == uid,
        intents.c.target == target.key,
        intents.c.effect != Effect.RETIRE,
    )
    outcomes = set(connection.execute(written).scalars())
    if outcomes & {None, Outcome.SETTLED} or not all(copies):
        return False
    return bool(copies) or outcomes <= {Outcome.FAILED}


def keep_identities(
    connection: Connection,
    agent: Agent,
    changed_cases: Sequence[Case],
    claimed: Mapping[str, str],
) -> None:
    """Let an agent own its entries and those that it is leaving, and no others."""
    leaving = {t.key for case in changed_cases for t in case.credential.leaving}
    mine = identities.c.agent_uid == agent.uid
    connection.execute(
        sa.delete(identities).where(mine, identities.c.target.not_in(sorted(leaving)))
    )
    if agent.state is AgentState.REMOVED:
        connection.execute(sa.delete(identities).where(mine))
    else:
        _claim(connection, agent, claimed)


def _claim(connection: Connection, agent: Agent, claimed: Mapping[str, str]) -> None:
    owned = _owned(connection, agent)
    rows: Iterable[tuple[str, str]] = claimed.items()
    values = [
        {"identity": identity, "agent_uid": agent.uid, "target": key}
        for key, identity in rows
        if identity not in owned
    ]
    if values:
        connection.execute(sa.insert(identities), values)


def _owned(connection: Connection, agent: Agent) -> set[str]:
    query = sa.select(identities.c.identity).where(identities.c.agent_uid == agent.uid)
    return set(connection.execute(query).scalars())
