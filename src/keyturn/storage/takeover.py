"""Bringing every agent in line with the files: all in one transaction, or nothing.

What is looked up is read once and kept in memory, since thousands of agents come at once and nobody
else can write meanwhile.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from keyturn.core.model import ACCEPTED, Agent, AgentState, Credential
from keyturn.errors import Refused, StaleRevision
from keyturn.ports import AuditEntry
from keyturn.storage import cases, owners, queries
from keyturn.storage.tables import agents, credentials, identities, versions

_NAMED_AT_MOST = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Owned:
    """An entry at a destination, and whose it is."""

    agent_uid: str
    target: str
    identity: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What one agent is to be. A new one comes with its credential."""

    agent: Agent
    claimed: Mapping[str, str]  # identities by the key of the target
    audit: AuditEntry
    credential: Credential | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeOver:
    """A whole change, and what it was computed from.

    `moved` are the entries of `owned` whose connection leads elsewhere now.
    """

    known: Sequence[Agent]
    owned: Sequence[Owned]
    moved: Sequence[Owned] = ()
    wanted: Sequence[Wanted] = ()


def owned(connection: Connection) -> list[Owned]:
    """Return every entry that an agent has or is leaving."""
    query = sa.select(identities.c.agent_uid, identities.c.target, identities.c.identity)
    found = connection.execute(query.order_by(identities.c.identity))
    return [Owned(agent_uid=uid, target=key, identity=entry) for uid, key, entry in found]


def apply(connection: Connection, taken: TakeOver, *, now: datetime) -> None:
    """Write a change. Raises Refused, and StaleRevision where it was computed from older rows."""
    known = queries.agents(connection, removed=False)
    if known != list(taken.known) or owned(connection) != list(taken.owned):
        raise StaleRevision
    before = {agent.uid: agent for agent in known}
    _refuse_moved(connection, taken.moved, before)
    moved = {one.identity for one in taken.moved}
    for identity in moved:
        connection.execute(sa.delete(identities).where(identities.c.identity == identity))
    stays = [one for one in taken.owned if one.identity not in moved]
    register = _Register(connection, known, stays)
    touched = {one.agent_uid for one in taken.moved}
    for wanted in taken.wanted:
        old = before.get(wanted.agent.uid)
        register.check(wanted)
        if old is None and wanted.credential is not None:
            owners.insert(connection, wanted.agent, wanted.credential, wanted.claimed)
        elif old is not None and old.targets == wanted.agent.targets and old.uid not in touched:
            _rewrite(connection, old, wanted.agent, now)
        elif old is not None:
            owners.amend(connection, old.uid, old, wanted.agent, wanted.claimed, now=now)
        register.take(connection, wanted)


def _rewrite(connection: Connection, old: Agent, agent: Agent, now: datetime) -> None:
    """Write what changed where no destination did; a run that goes on loads again."""
    same = agents.c.uid == old.uid, agents.c.state == old.state
    values = cases.changes(old, agent)
    changed = sa.update(agents).where(*same).values(**values)
    if old != agent and connection.execute(changed).rowcount != 1:
        raise StaleRevision
    if values.keys() == {"file"}:
        return  # nothing that a rotation goes by
    mine = sa.update(credentials).where(credentials.c.agent_uid == old.uid)
    connection.execute(mine.values(revision=credentials.c.revision + 1, wake_at=now))


def _refuse_moved(
    connection: Connection, moved: Sequence[Owned], known: Mapping[str, Agent]
) -> None:
    """Refuse that a connection leads elsewhere while something of ours may be where it led.

    Nobody would look there any more: what agents read there would be refused after the grace (I1).
    """
    held: dict[str, set[str]] = defaultdict(set)
    for one in moved:
        if not owners.vacant(connection, one.agent_uid, one.target):
            held[one.target.partition(":")[0]].add(known[one.agent_uid].name)
    if held:
        places = "; ".join(
            f"{name} leads elsewhere now, and {_called(found)} may still read where it led"
            for name, found in sorted(held.items())
        )
        raise Refused(
            f"connection {places}",
            hint="give the moved connection a new name and keep the old one beside it until a"
            " rotation of each agent has left it: `keyturn status AGENT`",
        )


def _called(names: set[str]) -> str:
    shown = sorted(names)[:_NAMED_AT_MOST]
    more = ", …" if len(names) > len(shown) else ""
    return f"{len(names)} agent{'s' if len(names) > 1 else ''} ({', '.join(shown)}{more})"


class _Register:
    """Who has which name, login and entry, while one agent after the other is changed."""

    def __init__(
        self, connection: Connection, known: Sequence[Agent], entries: Sequence[Owned]
    ) -> None:
        self._agents = {agent.uid: agent for agent in known}
        self._names = {agent.name: agent.uid for agent in known}
        self._logins = {agent.login: agent.uid for agent in known}
        self._entries = {one.identity: one for one in entries}
        self._of: dict[str, list[str]] = defaultdict(list)
        for one in entries:
            self._of[one.agent_uid].append(one.identity)
        self._older: dict[str, set[str]] = defaultdict(set)
        for login, uid in connection.execute(_OLDER_LOGINS):
            self._older[login].add(uid)

    def check(self, wanted: Wanted) -> None:
        """Raise Refused, naming the other agent, where a name, login or entry is taken."""
        agent, claimed = wanted.agent, wanted.claimed
        for field, having in (("name", self._names), ("login", self._logins)):
            value = getattr(agent, field)
            if having.get(value, agent.uid) != agent.uid:
                raise owners.is_taken(field, value, self._agents[having[value]].name)
        for uid in self._older[agent.login] - {agent.uid}:
            raise owners.is_still_used(agent.login, self._agents[uid].name)
        for key, identity in claimed.items():
            one = self._entries.get(identity)
            if one is not None and one.agent_uid != agent.uid:
                raise owners.is_owned(key, self._agents[one.agent_uid].name, one.target)
        if len(set(claimed.values())) != len(claimed):
            raise owners.is_twice(agent.name)

    def take(self, connection: Connection, wanted: Wanted) -> None:
        """Note what an agent has now, and no longer."""
        agent = wanted.agent
        if (before := self._agents.get(agent.uid)) is not None:
            self._logins.pop(before.login, None)
        self._agents[agent.uid] = agent
        self._names[agent.name] = self._logins[agent.login] = agent.uid
        for identity in self._of.pop(agent.uid, []):
            self._entries.pop(identity, None)
        mine = sa.select(identities.c.identity, identities.c.target)
        for identity, key in connection.execute(mine.where(identities.c.agent_uid == agent.uid)):
            self._entries[identity] = Owned(agent_uid=agent.uid, target=key, identity=identity)
            self._of[agent.uid].append(identity)


_OLDER_LOGINS = (
    sa.select(versions.c.login, agents.c.uid)
    .join_from(versions, credentials, versions.c.credential_uid == credentials.c.uid)
    .join(agents, credentials.c.agent_uid == agents.c.uid)
    .where(
        versions.c.login != agents.c.login,
        versions.c.state.in_(sorted(ACCEPTED)),
        agents.c.state != AgentState.REMOVED,
    )
)
