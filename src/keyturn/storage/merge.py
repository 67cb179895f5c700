"""A quarantined store is brought up to what its ledger knows: the effects of `core.merging`.

Agents in one transaction, since names and logins may have gone from one to another; then one transaction
a credential. Killed anywhere and repeated it comes to the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from keyturn.core import merging
from keyturn.core.merging import Known, Moment, Schedule
from keyturn.core.model import Agent, AgentState, Case, Credential, Target, Version, VersionState
from keyturn.ports import AuditEntry
from keyturn.storage import cases, claims, queries, reading
from keyturn.storage.restoring import GAP, MISSING, Difference, life_of_rows
from keyturn.storage.store import Store
from keyturn.storage.tables import (
    agents,
    credentials,
    daemons,
    identities,
    intents,
    rotations,
    versions,
)

Identify = Callable[[Target], str | None]


def merge(store: Store, *, schedule: Schedule, identify: Identify, actor: str) -> list[Difference]:
    """Bring a quarantined store up to what the ledger knows; a repeat finds nothing more to do.

    Raises StoreUnavailable.
    """
    usable = store.ledger.belongs().get("store") == store.store_id
    known = reading.read(store.ledger) if usable else {}
    life = store.database.read(lambda c: life_of_rows(c, default=store.incarnation))
    _bury_writers(store, known.values())
    found = _Merge(store=store, known=known, life=life, schedule=schedule, actor=actor)
    return [*found.agents(identify), *found.cases()]


def _bury_writers(store: Store, known: Iterable[Known]) -> None:
    """Note the end of every process of a life that is lost: its writes settle from now on."""
    lost = {writer for writer, _ in reading.writers(known)} - {store.writer}

    def body(connection: Connection) -> None:
        now = store.now_in(connection)
        there = set(connection.execute(sa.select(daemons.c.writer)).scalars())
        for writer in sorted(lost - there):
            dead = {"writer": writer, "leads": False, "died_at": now}
            connection.execute(sa.insert(daemons).values(**dead, started_at=now, until=now))
        mine = daemons.c.writer != store.writer
        alive = sa.update(daemons).where(mine, daemons.c.died_at.is_(None))
        connection.execute(alive.values(leads=False, died_at=now))

    store.database.write(body)


@dataclass(slots=True, kw_only=True)
class _Merge:
    store: Store
    known: Mapping[str, Known]
    life: int
    schedule: Schedule
    actor: str
    moments: dict[str, Moment | None] = field(default_factory=dict)  # of each row as it was found

    # --- agents: all in one transaction, since names and logins go from one to another ------

    def agents(self, identify: Identify) -> list[Difference]:
        """Bring every agent's own row in line."""

        def body(connection: Connection) -> list[Difference]:
            rows = queries.with_credentials(connection)
            self.moments = dict.fromkeys(self.known)
            for _, one in rows:
                self.moments[one.uid] = Moment(incarnation=self.life, revision=one.revision)
            before = {agent.uid: agent for agent, _ in rows}
            after: dict[str, tuple[Agent, Credential]] = {}
            for agent, credential in rows:
                known = self.known.get(credential.uid, Known())
                merged = merging.merged_agent(agent, known, self.moments[credential.uid])
                if merged is not None and merged != agent:
                    after[agent.uid] = merged, credential
            for uid, known in self.known.items():
                if self.moments[uid] is None and known.agents:
                    merged = merging.merged_agent(None, known, None)
                    if merged is not None and merged.uid not in before:
                        after[merged.uid] = merged, known.agents[-1].credential
            return self._write_agents(connection, before, after, identify)

        return self.store.database.write(body)

    def _write_agents(
        self,
        connection: Connection,
        before: Mapping[str, Agent],
        after: Mapping[str, tuple[Agent, Credential]],
        identify: Identify,
    ) -> list[Difference]:
        now, found = self.store.now_in(connection), list[Difference]()
        for uid in after.keys() & before.keys():
            # Out of the way first: two agents may have changed places.
            aside = {"name": f"~{uid}", "login": f"~{uid}"}
            connection.execute(sa.update(agents).where(agents.c.uid == uid).values(**aside))
        # Those that are removed give their names up.
        ordered = sorted(after.values(), key=lambda pair: pair[0].state is not AgentState.REMOVED)
        for agent, credential in ordered:
            old = before.get(agent.uid)
            if old is None:
                connection.execute(sa.insert(agents).values(**cases.to_row(agent)))
                fresh = replace(credential, wake_at=now, sweep_at=now, revision=0)
                connection.execute(sa.insert(credentials).values(**cases.to_row(fresh)))
            else:
                place = sa.update(agents).where(agents.c.uid == agent.uid)
                connection.execute(place.values(**cases.to_row(agent)))
            found.append(_agent_difference(old, agent))
            _own_entries(connection, agent, identify)
        entries = [self._entry(one) for one in found]
        self.store.record_in(connection, entries, at=now)
        return found

    # --- versions: one transaction a credential ----------------------------------------------

    def cases(self) -> list[Difference]:
        """Bring every credential in line."""
        every = self.store.database.read(queries.with_credentials)
        return [one for agent, credential in every for one in self._case(agent, credential.uid)]

    def _case(self, agent: Agent, uid: str) -> list[Difference]:
        known = self.known.get(uid, Known())

        def body(connection: Connection) -> tuple[Case, Case, list[Difference]]:
            claims.lock(connection, uid)
            before = _whole_case(connection, uid)
            at = self.moments.get(uid) or Moment(incarnation=0, revision=0)
            now = self.store.now_in(connection)
            living = agent.state is not AgentState.REMOVED
            doubt = living and merging.in_doubt(before, known, at)
            after = merging.merged(before, known, at, now=now, schedule=self.schedule)
            found = _version_differences(before, after)
            if doubt:
                reason = GAP if self.known else MISSING
                found.append(Difference(agent=agent.name, what="undecided", before=reason))
            # Above all that was ever announced: or the next start would take it for an older one.
            last = max(before.credential.revision, known.announced.revision)
            _write_case(connection, before, after, last + 1, known.fence + 1)
            moved = after, cases.with_revision(after, last + 1)
            if not doubt:
                # SECURITY: else a merge after a crash would find there what this one has guessed.
                self.store.ledger.announce(
                    before, moved[1], incarnation=self.store.incarnation, at=now, revision=last + 1
                )
            self.store.record_in(connection, [self._entry(one) for one in found], at=now)
            return before, moved[1], found

        _, after, found = self.store.database.write(body)
        if found:
            self.store.ledger.confirm(after)
        return found

    def _entry(self, one: Difference) -> AuditEntry:
        return AuditEntry(
            action="store.merged",
            actor=self.actor,
            agent=one.agent,
            version_id=one.version,
            outcome=one.what,
            detail=(("before", one.before), ("after", one.after)),
        )


def _agent_difference(old: Agent | None, new: Agent) -> Difference:
    if new.state is AgentState.REMOVED:
        what = "removed"
    elif old is None:
        what = "added"
    elif old.state is not new.state:
        what = "suspended" if new.state is AgentState.SUSPENDED else "resumed"
    else:
        what = "changed"
    return Difference(
        agent=new.name, what=what, before=str(old.state) if old else "", after=str(new.state)
    )


def _version_differences(before: Case, after: Case) -> list[Difference]:
    found = []
    for version in after.versions:
        old = before.version(version.id)
        was, now = (str(old.state) if old else ""), str(version.state)
        if was == now and old is not None and old.deadline == version.deadline:
            continue
        still = "deadline" if was == now else "accepted"
        difference = Difference(
            agent=after.agent.name,
            what=still if version.accepted else "refused",
            version=version.id,
        )
        found.append(replace(difference, before=was, after=now))
    return found


def _own_entries(connection: Connection, agent: Agent, identify: Identify) -> None:
    """Let an agent own the entries that it reads, as far as the settings still name them."""
    connection.execute(sa.delete(identities).where(identities.c.agent_uid == agent.uid))
    if agent.state is AgentState.REMOVED:
        return
    taken = set(connection.execute(sa.select(identities.c.identity)).scalars())
    for target in agent.targets:
        identity = identify(target)
        if identity is not None and identity not in taken:
            taken.add(identity)
            row = {"identity": identity, "agent_uid": agent.uid, "target": target.key}
            connection.execute(sa.insert(identities).values(**row))


def _whole_case(connection: Connection, uid: str) -> Case:
    """Return a case with every version that it ever had."""
    case = cases.load_one(connection, uid)
    query = sa.select(*cases.columns(Version, versions)).where(versions.c.credential_uid == uid)
    rows = connection.execute(query.order_by(versions.c.seq))
    return replace(case, versions=tuple(cases.from_row(Version, row) for row in rows))


def _write_case(
    connection: Connection, before: Case, after: Case, revision: int, fence: int
) -> None:
    known = {version.id: version for version in before.versions}
    gone = known.keys() - {version.id for version in after.versions}
    for version_id in gone:
        # Its number is another one's: it was announced here, and committed nowhere.
        connection.execute(sa.delete(intents).where(intents.c.version_id == version_id))
        connection.execute(sa.delete(versions).where(versions.c.id == version_id))
    unique = (VersionState.PENDING, VersionState.CURRENT)
    for version in sorted(after.versions, key=lambda v: v.state in unique):
        old = known.get(version.id)
        if old is None:
            connection.execute(sa.insert(versions).values(**cases.to_row(version)))
        elif old != version:
            place = sa.update(versions).where(versions.c.id == version.id)
            connection.execute(place.values(**cases.changes(old, version)))
    open_before = {intent.uid for intent in before.intents}
    for intent in after.intents:
        there = sa.select(intents.c.uid).where(intents.c.uid == intent.uid)
        if intent.uid not in open_before and connection.execute(there).first() is None:
            connection.execute(sa.insert(intents).values(**cases.to_row(intent)))
    if after.rotation is not None and after.rotation != before.rotation:
        one = sa.update(rotations).where(rotations.c.uid == after.rotation.uid)
        connection.execute(one.values(**cases.to_row(after.rotation)))
    mine = sa.update(credentials).where(credentials.c.uid == after.credential.uid)
    row = cases.to_row(after.credential) | {"revision": revision}
    highest = sa.case((credentials.c.fence > fence, credentials.c.fence), else_=fence)
    connection.execute(mine.values(**row, fence=highest + 1))
