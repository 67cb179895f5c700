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
from keyturn.errors import Refused, StaleRevision, UnknownAgent
from keyturn.storage import cases, claims
from keyturn.storage.tables import agents, credentials, identities, intents, placements, versions


def add(
    connection: Connection,
    agent: Agent,
    credential: Credential,
    claimed: Mapping[str, str],
) -> None:
    """Insert an agent, its credential and its entries. Raises Refused."""
    check(connection, agent, claimed)
    insert(connection, agent, credential, claimed)


def insert(
    connection: Connection,
    agent: Agent,
    credential: Credential,
    claimed: Mapping[str, str],
) -> None:
    """Insert what was checked."""
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
            raise is_taken(field, value, other)
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
        raise is_still_used(agent.login, other)
    owned = (
        sa.select(identities.c.identity, agents.c.name, identities.c.target)
        .join_from(identities, agents, identities.c.agent_uid == agents.c.uid)
        .where(identities.c.identity.in_(list(claimed.values())), agents.c.uid != agent.uid)
    )
    for row in connection.execute(owned):
        mine = next(key for key, identity in claimed.items() if identity == row.identity)
        raise is_owned(mine, row.name, row.target)
    if len(set(claimed.values())) != len(claimed):
        raise is_twice(agent.name)


def is_taken(field: str, value: str, other: str) -> Refused:
    """Return the error of a name or login that another agent has."""
    return Refused(
        f"the {field} {value!r} is taken by agent {other!r}", hint=f"choose another {field}"
    )


def is_still_used(login: str, other: str) -> Refused:
    """Return the error of a login that another agent had."""
    return Refused(
        f"the login {login!r} is still used by older versions of agent {other!r}",
        hint="wait until their grace is over, or choose another login",
    )


def is_owned(mine: str, other: str, as_target: str) -> Refused:
    """Return the error of an entry that another agent has or is leaving."""
    return Refused(
        f"the entry {mine} belongs to agent {other!r} (as {as_target})",
        hint="give each agent an entry of its own",
    )


def is_twice(name: str) -> Refused:
    """Return the error of an agent that writes one entry under two names."""
    return Refused(
        f"agent {name!r} names one entry twice", hint="leave one of its destinations out"
    )


def amend(
    connection: Connection,
    agent_uid: str,
    before: Agent | None,
    agent: Agent,
    claimed: Mapping[str, str],
    *,
    now: datetime,
) -> tuple[list[Case], list[Case]]:
    """Change a definition that was checked; returns the agent's cases as they were and as they are.

    Raises StaleRevision where the row is no longer `before`, Refused, UnknownAgent.
    """
    found = locked(connection, agent_uid)
    if before is not None and found[0].agent != before:
        raise StaleRevision
    after = [changed(connection, case, agent, claimed, wake_at=now) for case in found]
    for old, new in zip(found, after, strict=True):
        claims.save(connection, old.credential, new.credential, claim=None)
    cases.write_agent(connection, found[0].agent, agent)
    keep_identities(connection, agent, after, claimed)
    return found, after


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


def changed(
    connection: Connection,
    case: Case,
    agent: Agent,
    claimed: Mapping[str, str],
    *,
    wake_at: datetime,
) -> Case:
    """Return a case with its agent's new definition; a dropped target may be leaving.

    One whose entry the agent still has, under the name of another connection, is not left. Raises
    Refused where an entry's keys get other names.
    """
    kept = {target.key for target in agent.targets}
    known = {t.key: t for t in (*case.credential.leaving, *case.agent.targets)}
    uid, entries = case.credential.uid, _entries(connection, agent)
    _refuse_renamed_keys(connection, case, agent, claimed, entries)
    leaving = tuple(
        target
        for key, target in known.items()
        if key not in kept
        and entries.get(key) not in set(claimed.values())
        and (target in case.credential.leaving or not _empty(connection, uid, target))
    )
    credential = replace(case.credential, leaving=leaving, wake_at=wake_at)
    return replace(case, agent=agent, credential=credential)


def _refuse_renamed_keys(
    connection: Connection,
    case: Case,
    agent: Agent,
    claimed: Mapping[str, str],
    entries: Mapping[str, str],
) -> None:
    """Refuse other key names in an entry of ours: nothing would ever touch the old ones again.

    Who reads them would be refused after the grace, and no sweep would see it.
    """
    new = {claimed.get(target.key, target.key): target for target in agent.targets}
    for old in (*case.credential.leaving, *case.agent.targets):
        named = new.get(entries.get(old.key, old.key))
        if named is None or named.keys == old.keys:
            continue
        if not _untouched(connection, case.credential.uid, old):
            raise Refused(
                f"agent {agent.name!r}: the keys of {named.key} get other names, and what agents read"
                " under the old ones would be refused after the grace",
                hint=f"take it out and reload; when nobody reads it any more, `keyturn destinations"
                f" forget {agent.name} {old.key}`, and name it anew",
            )


def without_untouched(connection: Connection, case: Case) -> Case:
    """Return the case of a removed agent with those places only where something of it may be.

    Nobody can mend the rights to a place for an agent that is not there: it would be asked for ever.
    """
    uid = case.credential.uid

    def touched(targets: Iterable[Target]) -> tuple[Target, ...]:
        return tuple(t for t in targets if not _untouched(connection, uid, t))

    return replace(
        case,
        agent=replace(case.agent, targets=touched(case.agent.targets)),
        credential=replace(case.credential, leaving=touched(case.credential.leaving)),
    )


def vacant(connection: Connection, agent_uid: str, target: str) -> bool:
    """Tell whether surely nothing of ours ever was where an agent's target leads."""
    mine = sa.select(credentials.c.uid).where(credentials.c.agent_uid == agent_uid)
    to, _, path = target.partition(":")
    uids = connection.execute(mine).scalars().all()
    return all(_untouched(connection, uid, Target(to=to, path=path)) for uid in uids)


def _entries(connection: Connection, agent: Agent) -> dict[str, str]:
    """Return the identities of an agent's entries by the key of the target."""
    mine = identities.c.agent_uid == agent.uid
    found = connection.execute(sa.select(identities.c.target, identities.c.identity).where(mine))
    return {row.target: row.identity for row in found}


def _empty(connection: Connection, uid: str, target: Target) -> bool:
    """Tell whether surely nothing of ours is at a destination.

    Where no copies are recorded, anything that was ever written there counts, and always what may yet
    land or may have landed: an intent that was settled was never reported.
    """
    here = placements.c.credential_uid == uid, placements.c.target == target.key
    copies = connection.execute(sa.select(placements.c.gone).where(*here)).scalars().all()
    outcomes = _outcomes(connection, uid, target)
    if outcomes & {None, Outcome.SETTLED} or not all(copies):
        return False
    return bool(copies) or outcomes <= {Outcome.FAILED}


def _untouched(connection: Connection, uid: str, target: Target) -> bool:
    """Tell whether nothing of ours can ever have been at a destination.

    Copies say less: one that is left there by policy counts as gone, and may be shown still.
    """
    return _outcomes(connection, uid, target) <= {Outcome.FAILED}


def _outcomes(connection: Connection, uid: str, target: Target) -> set[Outcome | None]:
    """Return how the writes to a destination ended; None for one that nobody knows yet."""
    written = sa.select(intents.c.outcome).where(
        intents.c.credential_uid == uid,
        intents.c.target == target.key,
        intents.c.effect != Effect.RETIRE,
    )
    return set(connection.execute(written).scalars())


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
