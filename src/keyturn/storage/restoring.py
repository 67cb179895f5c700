"""A store that may be an older one: noticed, quarantined, merged from the ledger, let go again.

  compare      does the ledger know of commits that this store does not have
  quarantine   a new incarnation, and every verifier answers that nobody can tell
  merge        each agent as the ledger has it; crashing anywhere and again gives the same
  let_go       what is certain; the rest stays for a person
  begin        a ledger for a store that has none

Only a process that leads may quarantine or merge: no writer of an earlier life may be alive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from keyturn.core import merging
from keyturn.core.merging import Known, Moment, Schedule
from keyturn.core.model import (
    ACCEPTED,
    Agent,
    AgentState,
    Case,
    Credential,
    Target,
    Version,
    VersionState,
)
from keyturn.ports import AuditEntry
from keyturn.storage import cases, claims, codec, queries, reading
from keyturn.storage.store import Store
from keyturn.storage.tables import (
    agents,
    credentials,
    daemons,
    identities,
    intents,
    meta,
    quarantine,
    rotations,
    versions,
)

EVERYBODY = ""
AHEAD, MISSING, FOREIGN = "ledger-ahead", "ledger-missing", "ledger-foreign"
RESTORED, HELD, GAP = "restored", "held", "ledger-gap"
Identify = Callable[[Target], str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubt:
    """An agent, or everybody, for which nobody can tell; `detail` is what a person decides by."""

    agent_uid: str
    reason: str
    since: datetime
    detail: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What the merge changed of one agent, or why it could not."""

    agent: str
    what: str  # added | removed | suspended | resumed | accepted | refused | deadline | kept | undecided
    version: str = ""
    before: str = ""
    after: str = ""


# --- is it an older one? ------------------------------------------------------------------


def compare(store: Store) -> str:
    """Return why this store cannot be believed, "" if it can. Raises StoreUnavailable."""
    belongs, ledger_id = store.ledger.belongs(), store.database.read(_kept_ledger)
    if not belongs:
        # On PostgreSQL another host may have led, which has a ledger of its own.
        return MISSING if ledger_id and store.database.is_sqlite else ""
    if belongs["store"] != store.store_id:
        return FOREIGN
    known = reading.read(store.ledger, whole=False)
    moments = store.database.read(_moments)
    life = Moment(incarnation=store.incarnation, revision=0)
    for uid, one in known.items():
        at = moments.get(uid)
        if at is None:
            # An agent that was announced and never added is no sign; one that was, is.
            if any(news.confirmed for news in one.agents):
                return AHEAD
        elif merging.is_ahead(one, replace(life, revision=at)):
            return AHEAD
    return ""


def _kept_ledger(connection: Connection) -> str:
    return connection.execute(sa.select(meta.c.ledger_id)).scalar() or ""


def _moments(connection: Connection) -> dict[str, int]:
    rows = connection.execute(sa.select(credentials.c.uid, credentials.c.revision))
    return {row.uid: row.revision for row in rows}


# --- quarantine ---------------------------------------------------------------------------


def doubts(store: Store) -> list[Doubt]:
    """Return what is in quarantine, everybody first."""
    return store.database.read(doubts_in)


def doubts_in(connection: Connection) -> list[Doubt]:
    """Return what is in quarantine, inside a transaction."""
    query = sa.select(quarantine).order_by(quarantine.c.agent_uid)
    return [
        Doubt(
            agent_uid=row.agent_uid,
            reason=row.reason,
            since=row.since,
            detail=dict(codec.loads(row.detail)),
        )
        for row in connection.execute(query)
    ]


def put_in_quarantine(store: Store, reason: str, *, actor: str) -> None:
    """Begin a new life of the store in which nobody can tell yet; verifiers know when this returns."""
    last = reading.incarnation(reading.read(store.ledger, whole=False).values())

    def body(connection: Connection) -> int:
        now = store.now_in(connection)
        life = begin_life(connection, reason, last=last, now=now)
        entry = AuditEntry(
            action="store.quarantined",
            actor=actor,
            outcome=reason,
            detail=(("incarnation", life),),
        )
        store.record_in(connection, [entry], at=now)
        return life

    store.incarnation = store.database.write(body)


def begin_life(connection: Connection, reason: str, *, last: int, now: datetime) -> int:
    """Give the store an incarnation above all that came before, and quarantine everybody."""
    was: int = connection.execute(sa.select(meta.c.incarnation)).scalar_one()
    life = max(was, last) + 1
    # Of a quarantine that was not over the rows are still of the life before that.
    was = _life_of_rows(connection, default=was)
    connection.execute(sa.update(meta).values(incarnation=life, epoch=meta.c.epoch + 1))
    connection.execute(sa.delete(quarantine))
    connection.execute(
        sa.insert(quarantine).values(
            agent_uid=EVERYBODY, reason=reason, since=now, detail=codec.text({"of": was})
        )
    )
    # Whoever held a claim was of the life before.
    connection.execute(
        sa.update(credentials).values(
            holder=None, holder_writer=None, until=None, wake_requested=None
        )
    )
    return life


def let_go(store: Store, differences: Iterable[Difference], *, actor: str) -> list[str]:
    """Lift the quarantine from everybody but those that are undecided; returns their names."""
    undecided = {one.agent: one.before for one in differences if one.what == "undecided"}

    def body(connection: Connection) -> None:
        now = store.now_in(connection)
        connection.execute(sa.delete(quarantine).where(quarantine.c.agent_uid == EVERYBODY))
        for agent in queries.agents(connection, removed=False):
            if agent.name in undecided:
                connection.execute(sa.delete(quarantine).where(quarantine.c.agent_uid == agent.uid))
                connection.execute(
                    sa.insert(quarantine).values(
                        agent_uid=agent.uid, reason=undecided[agent.name], since=now
                    )
                )
        connection.execute(sa.update(meta).values(epoch=meta.c.epoch + 1))
        connection.execute(sa.update(credentials).values(wake_at=now, sweep_at=now))
        entry = AuditEntry(
            action="store.released",
            actor=actor,
            detail=(("undecided", len(undecided)),),
        )
        store.record_in(connection, [entry], at=now)

    keep_ledger(store, without=undecided)
    store.database.write(body)
    return sorted(undecided)


def release(store: Store, agent: str, *, actor: str) -> bool:
    """Let one agent go as the store has it: a person decided. Tells whether it was in quarantine."""

    def body(connection: Connection) -> bool:
        found = queries.agent(connection, agent)
        here = sa.delete(quarantine).where(quarantine.c.agent_uid == found.uid)
        if connection.execute(here).rowcount == 0:
            return False
        now = store.now_in(connection)
        mine = sa.update(credentials).where(credentials.c.agent_uid == found.uid)
        connection.execute(mine.values(wake_at=now, sweep_at=now))
        connection.execute(sa.update(meta).values(epoch=meta.c.epoch + 1))
        entry = AuditEntry(action="store.released", actor=actor, agent=agent)
        store.record_in(connection, [entry], at=now)
        return True

    _start_ledger(store, [agent])
    return store.database.write(body)


def hold(store: Store) -> None:
    """Leave everybody in quarantine until a person lets go: no daemon does that by itself."""
    everybody = quarantine.c.agent_uid == EVERYBODY
    store.database.write(
        lambda c: c.execute(sa.update(quarantine).where(everybody).values(reason=HELD))
    )


def bury(store: Store, case: Case, *, version_id: str, tag: bytes) -> None:
    """Note a version that was accepted in the life that is lost, as refused for ever."""

    def change(found: Case) -> tuple[Case, Sequence[AuditEntry]]:
        now, seq = store.now(), found.credential.seq + 1
        version = Version(
            id=version_id,
            credential_uid=found.credential.uid,
            seq=seq,
            login=found.agent.login,
            state=VersionState.REVOKED,
            scheme="lost",
            digest="",
            tag=tag,
            origin="found",
            exposed=True,
            minted_at=now,
            ended_at=now,
        )
        entry = AuditEntry(
            action="version.found",
            actor="restore",
            agent=found.agent.name,
            version_id=version_id,
            outcome="revoked",
        )
        return replace(
            found,
            versions=(*found.versions, version),
            credential=replace(found.credential, seq=seq),
        ), [entry]

    store.amend(case.credential.uid, change)


# --- a ledger -----------------------------------------------------------------------------


def keep_ledger(store: Store, *, without: Iterable[str] = ()) -> None:
    """Begin the ledger of a store that has none, with all that is accepted now."""
    belongs = store.ledger.belongs()
    known = store.database.read(_kept_ledger)
    here = belongs.get("store") == store.store_id
    if here and known in ("", belongs["ledger"]):
        _note_ledger(store, belongs["ledger"])
        return
    # There is none yet, or another host has led meanwhile, and this one lacks what happened there.
    left_out = set(without)
    _start_ledger(store, [one.name for one in store.agents() if one.name not in left_out])
    ledger_id = f"{store.writer}-{codec.micros(store.now())}"
    store.ledger.begin(store=store.store_id, ledger=ledger_id, at=store.now())
    _note_ledger(store, ledger_id)


def _note_ledger(store: Store, ledger_id: str) -> None:
    if store.database.read(_kept_ledger) != ledger_id:
        store.database.write(lambda c: c.execute(sa.update(meta).values(ledger_id=ledger_id)))


def _start_ledger(store: Store, names: Sequence[str]) -> None:
    wanted = set(names)

    def body(connection: Connection) -> list[tuple[Agent, Credential, list[Version]]]:
        pairs = [
            pair for pair in queries.with_credentials(connection)
            if pair[0].name in wanted and pair[0].state is not AgentState.REMOVED
        ]  # fmt: skip
        query = sa.select(*cases.columns(Version, versions)).where(
            versions.c.state.in_(sorted(ACCEPTED))
        )
        accepted: dict[str, list[Version]] = {}
        for row in connection.execute(query):
            accepted.setdefault(row.credential_uid, []).append(cases.from_row(Version, row))
        return [(agent, one, accepted.get(one.uid, [])) for agent, one in pairs]

    found = store.database.read(body)
    store.ledger.start(found, incarnation=store.incarnation, at=store.now())


# --- merging ------------------------------------------------------------------------------


def merge(store: Store, *, schedule: Schedule, identify: Identify, actor: str) -> list[Difference]:
    """Bring a quarantined store up to what the ledger knows; a repeat finds nothing more to do.

    Raises StoreUnavailable.
    """
    usable = store.ledger.belongs().get("store") == store.store_id
    known = reading.read(store.ledger) if usable else {}
    life = store.database.read(lambda c: _life_of_rows(c, default=store.incarnation))
    _bury_writers(store, known.values())
    found = _Merge(store=store, known=known, life=life, schedule=schedule, actor=actor)
    return [*found.agents(identify), *found.cases()]


def _life_of_rows(connection: Connection, *, default: int) -> int:
    """Return the incarnation that wrote the rows which are not merged yet."""
    query = sa.select(quarantine.c.detail).where(quarantine.c.agent_uid == EVERYBODY)
    row = connection.execute(query).first()
    return default if row is None else int(codec.loads(row.detail).get("of", default))


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
