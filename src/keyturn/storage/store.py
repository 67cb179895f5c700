"""The store: the saga's journal, and everything commands and metrics ask of it.

Every change is one transaction that bumps the credential's revision, so two writers never both
succeed. The claim's fence is checked where the save lands, not where the claim was taken.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from keyturn.core.model import (
    Agent,
    AgentState,
    Case,
    Credential,
    Drift,
    Outcome,
    Repairs,
    Version,
)
from keyturn.core.own import Own
from keyturn.errors import ClaimLost
from keyturn.ports import AuditEntry, Claim, Clock, Saved
from keyturn.storage import (
    anchors,
    audit,
    cases,
    claims,
    own,
    owners,
    queries,
    requests,
    schema,
    takeover,
)
from keyturn.storage.engine import Database, open_database
from keyturn.storage.ledger import Ledger
from keyturn.storage.migrations import migrate, oldest_at_head
from keyturn.storage.postgresql import Password, no_password
from keyturn.storage.requests import Once
from keyturn.storage.results import Counts, Due, History
from keyturn.storage.tables import daemons, intents, meta, store_now
from keyturn.storage.takeover import Owned, TakeOver

Change = Callable[[Case], tuple[Case, Sequence[AuditEntry]]]


class Store:
    """A store on SQLite or PostgreSQL. Thread-safe; implements `ports.Journal`.

    Every method may raise StoreUnavailable (nothing was changed); nothing else of a database ever
    gets out.
    """

    def __init__(
        self, database: Database, *, ledger: Ledger, clock: Clock, writer: str, identity: Any
    ) -> None:
        self.database = database
        self.engine = database.engine
        self.ledger = ledger
        self._clock = clock
        self._writer = writer
        self._heads: audit.Heads = {}
        self._verifying = threading.Lock()
        self._store_id: str = identity.store_id
        self.incarnation: int = identity.incarnation

    @classmethod
    def open(
        cls,
        url: str,
        *,
        state_dir: Path,
        clock: Clock,
        random_bytes: Callable[[int], bytes],
        writer: str,
        password: Password = no_password,
        create: bool = True,
    ) -> Store:
        """Open a store, make it or bring its schema up to date.

        Raises ConfigError for a URL that is none, StorageError for a store of a newer release, one
        that other users may reach, one whose tables were changed, or none at all where `create` is
        False.
        """
        database = open_database(url, clock=clock, password=password, create=create)
        store_id = random_bytes(16).hex()

        def prepare(connection: Connection) -> Any:
            migrate(connection, create=create)
            schema.check(connection)
            row = connection.execute(sa.select(meta)).first()
            if row is None:
                values = {"id": 1, "store_id": store_id, "incarnation": 1, "epoch": 0}
                values["oldest_schema"] = oldest_at_head()
                first = _FIRST[connection.dialect.name]
                connection.execute(first, {**values, "created_at": clock.now()})
                row = connection.execute(sa.select(meta)).one()
            return row

        try:
            identity = database.write(prepare)
            ledger = Ledger(state_dir / "ledger")
        except BaseException:
            database.close()
            raise
        return cls(database, ledger=ledger, clock=clock, writer=writer, identity=identity)

    def close(self) -> None:
        """Give back every connection."""
        self.database.close()

    @property
    def store_id(self) -> str:
        """The id that entries carry as their owner."""
        return self._store_id

    @property
    def writer(self) -> str:
        """The id of this process run, as it stands in intents and names its audit chain."""
        return self._writer

    @property
    def epoch(self) -> int:
        """The number of the newest change that verifiers must know."""
        return self.database.read(_epoch)

    def now(self) -> datetime:
        """The store's time: the database's clock on PostgreSQL, the given one on SQLite."""
        if self.database.is_sqlite:
            return self._clock.now()
        return self.database.read(self.now_in)

    # --- the journal ----------------------------------------------------------------------

    def claim(
        self, credential_uid: str, *, holder: str, ttl: timedelta
    ) -> tuple[Claim, Saved] | None:
        """Take the claim, with a new fence, if nobody who may be alive has it, and read the case."""

        def body(connection: Connection) -> tuple[Claim, Saved] | None:
            claim = claims.take(
                connection,
                credential_uid,
                holder=holder,
                writer=self._writer,
                ttl=ttl,
                incarnation=self.incarnation,
            )
            return None if claim is None else (claim, self._load(connection, claim))

        return self.database.write(body)

    def renew(self, claim: Claim, *, ttl: timedelta) -> Claim:
        """Prolong a claim. Raises ClaimLost."""
        return self.database.write(lambda connection: claims.prolong(connection, claim, ttl=ttl))

    def release(self, claim: Claim, *, wake_at: datetime | None) -> None:
        """Give the claim back and say when the credential must be looked at again.

        Never moves `wake_at` later than what another writer has asked for since the claim was
        taken. A claim that is lost already is no error: its taker decides.
        """
        self.database.write(lambda connection: claims.give_back(connection, claim, wake_at=wake_at))

    def load(self, claim: Claim) -> Saved:
        """Read the case. Raises ClaimLost."""
        return self.database.read(lambda connection: self._load(connection, claim))

    @staticmethod
    def _load(connection: Connection, claim: Claim) -> Saved:
        found = cases.load(connection, cases.BY_UID, b_uid=claim.credential_uid)
        if found is None or (found.holder, found.fence) != (claim.holder, claim.fence):
            raise ClaimLost
        return Saved(case=found.case, epoch=found.epoch)

    def save(
        self,
        claim: Claim,
        *,
        before: Case,
        after: Case,
        audit: Sequence[AuditEntry],
        release: bool = False,
    ) -> Saved:
        """Write the difference, all or nothing; with `release` the claim is given back with it.

        Raises StaleRevision, ClaimLost, StoreUnavailable.
        """

        def body(connection: Connection) -> tuple[Saved, bool]:
            return self._write(connection, before, after, audit, claim=claim, release=release)

        return self._confirmed(*self.database.write(body))

    def amend(
        self, credential_uid: str, change: Change, *, once: Once | None = None, also: str = ""
    ) -> Saved:
        """Load, apply a pure change and save it in one transaction; needs no claim.

        `also` names a version that the case shall have, however long ago it was refused.

        A running saga meets StaleRevision and loads again. `change` may be called more than once;
        what it raises goes through and nothing is changed. With `once` a change that was made
        already is not made again: `once` then holds what it did. Raises UnknownAgent.
        """

        def body(connection: Connection) -> tuple[Saved, bool]:
            claims.lock(connection, credential_uid)
            before = cases.load_one(connection, credential_uid, also=also)
            if once is not None and once.repeats(connection, credential_uid):
                return Saved(case=before, epoch=_epoch(connection)), False
            after, entries = change(before)
            if after.agent.state is AgentState.REMOVED:
                after = owners.without_untouched(connection, after)
            if once is not None:
                once.keep(connection, credential_uid, at=self.now_in(connection))
            return self._write(connection, before, after, entries)

        return self._confirmed(*self.database.write(body))

    def report(self, intent_uid: str, *, landed: bool) -> None:
        """Record a late outcome of one's own intent, and wake its credential; needs no claim."""
        outcome = Outcome.DONE if landed else Outcome.FAILED

        def body(connection: Connection) -> None:
            now = self.now_in(connection)
            ended = (
                sa.update(intents)
                .where(
                    intents.c.uid == intent_uid,
                    intents.c.writer == self._writer,
                    intents.c.outcome.is_(None),
                )
                .values(outcome=outcome, ended_at=now)
                .returning(intents.c.credential_uid)
            )
            if (uid := connection.execute(ended).scalar()) is not None:
                claims.wake(connection, uid, now, anew=True)

        self.database.write(body)

    def writer_died_at(self, writer: str) -> datetime | None:
        """When the process that wrote an intent is known to have ended; None while it may live."""
        query = sa.select(daemons.c.died_at).where(daemons.c.writer == writer)
        return self.database.read(lambda connection: connection.execute(query).scalar())

    # --- agents ---------------------------------------------------------------------------

    def add_agent(
        self,
        agent: Agent,
        credential: Credential,
        *,
        identities: Mapping[str, str],
        audit: Sequence[AuditEntry],
    ) -> Case:
        """Add an agent with its credential. `identities` maps each target's key to its identity.

        Raises Refused, naming the other agent, where name, login or an entry is taken.
        """

        def body(connection: Connection) -> Case:
            owners.add(connection, agent, credential, identities)
            case = Case(agent=agent, credential=credential)
            self._announce_agents(connection, [(agent, credential)])
            self.record_in(connection, audit)
            return case

        added = self.database.write(body)
        self.ledger.confirm_agents([agent])
        return added

    def amend_agent(
        self,
        agent_uid: str,
        agent: Agent,
        *,
        identities: Mapping[str, str],
        audit: Sequence[AuditEntry],
        before: Agent | None = None,
    ) -> list[Case]:
        """Change an agent's definition or state and wake its credentials.

        A dropped target is `leaving` until nothing of ours is there. With `before`, raises
        StaleRevision where the row is no longer that: a reload never undoes a suspension. Raises
        UnknownAgent, Refused.
        """

        def body(connection: Connection) -> list[Case]:
            now = self.now_in(connection)
            owners.check(connection, agent, identities)
            found, changed = owners.amend(connection, agent_uid, before, agent, identities, now=now)
            pairs = [(one.agent, one.credential) for one in changed]
            self._announce_agents(connection, pairs, bump=1)
            self.record_in(connection, audit)
            if cases.epoch_moves(found[0], changed[0]):
                _bump_epoch(connection)
            return [cases.load_one(connection, case.credential.uid) for case in changed]

        amended = self.database.write(body)
        self.ledger.confirm_agents([agent])
        return amended

    def take_over(self, taken: TakeOver) -> None:
        """Bring every agent in line with the files, all or nothing.

        Raises StaleRevision where it was computed from rows that changed meanwhile, Refused.
        """

        def body(connection: Connection) -> None:
            now = self.now_in(connection)
            takeover.apply(connection, taken, now=now)
            uids = [wanted.agent.uid for wanted in taken.wanted]
            self._announce_agents(connection, queries.with_credentials(connection, uids))
            self.record_in(connection, [wanted.audit for wanted in taken.wanted], at=now)

        self.database.write(body)
        self.ledger.confirm_agents(wanted.agent for wanted in taken.wanted)

    def owned(self) -> list[Owned]:
        """Return every entry that an agent has or is leaving."""
        return self.database.read(takeover.owned)

    def agents(self, *, removed: bool = False) -> list[Agent]:
        """Return every agent by name; removed ones only with `removed`, and then they alone."""
        return self.database.read(lambda connection: queries.agents(connection, removed=removed))

    def agent(self, name: str) -> Agent:
        """Return the agent of this name. Raises UnknownAgent; removed ones are unknown."""
        return self.database.read(lambda connection: queries.agent(connection, name))

    def case_of(self, agent_name: str, credential: str = "default") -> Case:
        """Return the case of an agent's credential. Raises UnknownAgent."""
        return self.database.read(
            lambda connection: queries.case_of(connection, agent_name, credential)
        )

    def case(self, credential_uid: str) -> Case:
        """Return a case. Raises UnknownAgent."""
        return self.database.read(lambda connection: cases.load_one(connection, credential_uid))

    def history(self, credential_uid: str, *, limit: int = 50) -> History:
        """Return all versions and rotations of a credential, newest first, up to `limit` each."""
        return self.database.read(
            lambda connection: queries.history(connection, credential_uid, limit)
        )

    def find_version(self, version_id: str) -> tuple[Agent, Version] | None:
        """Return the version of this id and whose it is."""
        return self.database.read(lambda connection: queries.find_version(connection, version_id))

    def find_versions(self, version_ids: Sequence[str]) -> dict[str, tuple[Agent, Version]]:
        """Return the versions of some hundred ids and whose they are; unknown ids are left out."""
        return self.database.read(lambda connection: queries.find_versions(connection, version_ids))

    # --- due work -------------------------------------------------------------------------

    def due(
        self,
        *,
        now: datetime,
        limit: int,
        full: Collection[str] = frozenset(),
        after: Due | None = None,
    ) -> list[Due]:
        """Return what must be looked at by `now` and is not claimed, oldest first.

        Whatever touches a connection that is `full` is left out, as is what comes before `after`.
        """
        return self.database.read(
            lambda connection: queries.due(connection, now, limit, full, after)
        )

    def next_wake(self) -> datetime | None:
        """When `due` has something next; for a claimed credential not before its claim ends."""
        return self.database.read(queries.next_wake)

    def wake(self, credential_uid: str, *, at: datetime) -> None:
        """Look at a credential at `at` or earlier, also if a run that goes on now says later."""
        self.database.write(lambda connection: claims.wake(connection, credential_uid, at))

    def counts(
        self,
        *,
        max_ages: Mapping[str, timedelta] | None = None,
        late_by: timedelta = timedelta(0),
    ) -> Counts:
        """Return the numbers for metrics; `max_ages` is the maximum age by policy.

        Overdue is what has been due for longer than `late_by`.
        """
        ages = max_ages or {}
        return self.database.read(
            lambda connection: queries.counts(connection, self.now_in(connection), ages, late_by)
        )

    def drifts(self) -> list[tuple[str, Drift]]:
        """Return what the last sweeps found, with the agent's name."""
        return self.database.read(queries.drifts)

    def fights(self) -> list[tuple[str, Repairs]]:
        """Return the entries that others keep from being mended, with the agent's name."""
        return self.database.read(queries.fights)

    def stopped(self) -> list[tuple[str, str]]:
        """Return the agents whose rotation waits or is stalled, and at which target."""
        return self.database.read(queries.stopped)

    def forget_requests(self, *, before: datetime) -> None:
        """Forget which commands were done before an instant."""
        self.database.write(lambda connection: requests.clean(connection, before=before))

    # --- the daemon's own logins ----------------------------------------------------------

    def own(self, connection: str, host: str) -> Own | None:
        """Return what is known of an own credential, None where nothing is."""
        return self.database.read(lambda reading: own.load(reading, connection, host))

    def owns(self) -> list[Own]:
        """Return the own credentials of every connection and host."""
        return self.database.read(own.load_all)

    def save_own(self, after: Own, *, audit: Sequence[AuditEntry]) -> Own:
        """Write an own credential with its audit entries. Raises StaleRevision."""

        def body(connection: Connection) -> Own:
            saved = own.save(connection, after)
            self.record_in(connection, audit)
            return saved

        return self.database.write(body)

    # --- audit ----------------------------------------------------------------------------

    def audit_entries(self, *, agent: str | None = None, limit: int = 100) -> list[audit.Recorded]:
        """Return the newest audit entries, newest first; never more than `audit.MOST`."""
        return audit.entries(self.database.read, agent=agent, limit=limit)

    def revocations_of_others(self, *, after: int, upto: int) -> list[str]:
        """Return what triggered the revocations between two audit positions that others wrote."""
        found = self.database.read(
            lambda connection: audit.revocations(
                connection, after=after, upto=upto, but=self._writer
            )
        )
        return [str(dict(detail).get("trigger", "")) for detail in found]

    def verify_audit(self) -> list[str]:
        """Return what is wrong with the audit chains; nothing means that they are whole.

        Many short reads, one walk at a time: it keeps neither commits nor verifiers waiting.
        """
        with self._verifying:
            return anchors.problems(self.database.read)

    def anchor_audit(self, *, why: str) -> audit.Heads:
        """Quote the audit's heads in the audit, and return them all as they are then."""
        self.database.write(
            lambda connection: anchors.append(
                connection, writer=self._writer, at=self.now_in(connection), why=why
            )
        )
        return audit.ends(self.database.read)

    def append_audit(self, entry: AuditEntry) -> None:
        """Record something that changed no row: a reload, a refused command."""
        self.database.write(lambda connection: self.record_in(connection, [entry]))

    # --- inside a transaction -------------------------------------------------------------

    def _write(
        self,
        connection: Connection,
        before: Case,
        after: Case,
        entries: Sequence[AuditEntry],
        claim: Claim | None = None,
        *,
        release: bool = False,
    ) -> tuple[Saved, bool]:
        now, epoch = claims.save(
            connection, before.credential, after.credential, claim=claim, give_back=release
        )
        case = cases.write(connection, before, after)
        # Under the credential's row lock, so a ledger has the order of the commits; before the
        # locks that everybody shares, so nobody waits for this disk.
        revision = before.credential.revision + 1
        unsure = self.ledger.announce(
            before, after, incarnation=self.incarnation, at=now, revision=revision
        )
        self.record_in(connection, entries, at=now)
        if cases.epoch_moves(before, after):
            epoch = _bump_epoch(connection)
        return Saved(case=cases.with_revision(case, revision), epoch=epoch), unsure

    def _announce_agents(
        self, connection: Connection, pairs: Sequence[tuple[Agent, Credential]], bump: int = 0
    ) -> None:
        if pairs:
            now = self.now_in(connection)
            self.ledger.announce_agents(pairs, incarnation=self.incarnation, at=now, bump=bump)

    def record_in(
        self,
        connection: Connection,
        entries: Sequence[AuditEntry],
        *,
        at: datetime | None = None,
    ) -> None:
        """Append audit entries to whatever else a transaction does."""
        if entries:
            at = at or self.now_in(connection)
            audit.append(connection, entries, writer=self._writer, at=at, heads=self._heads)

    def _confirmed(self, saved: Saved, unsure: bool) -> Saved:
        if unsure:
            self.ledger.confirm(saved.case)
        return saved

    def now_in(self, connection: Connection) -> datetime:
        """Return the store's time inside a transaction."""
        if self.database.is_sqlite:
            return self._clock.now()
        found: datetime = connection.execute(_NOW).scalar_one()
        return found


_FIRST = {  # two that open a new store at once both find the row of one
    "sqlite": sqlite.insert(meta).on_conflict_do_nothing(),
    "postgresql": postgresql.insert(meta).on_conflict_do_nothing(),
}
_NOW = sa.select(store_now())
_EPOCH = sa.select(meta.c.epoch)
_BUMP_EPOCH = sa.update(meta).values(epoch=meta.c.epoch + 1).returning(meta.c.epoch)


def _epoch(connection: Connection) -> int:
    found: int = connection.execute(_EPOCH).scalar_one()
    return found


def _bump_epoch(connection: Connection) -> int:
    """Bump last, since everybody waits for this row: so epochs have the order of the commits."""
    bumped: int = connection.execute(_BUMP_EPOCH).scalar_one()
    return bumped
