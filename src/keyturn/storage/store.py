"""The store: the saga's journal, and everything commands and metrics ask of it.

Every change is one transaction that bumps the credential's revision, so two writers never both
succeed. The claim's fence is checked where the save lands, not where the claim was taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.sql.elements import ColumnElement

from keyturn.core.model import Agent, Case, Credential, Drift, Outcome, Version
from keyturn.core.secret import Secret
from keyturn.errors import ClaimLost, StaleRevision, UnknownAgent
from keyturn.ports import AuditEntry, Claim, Clock, Saved
from keyturn.storage import audit, cases, owners, queries
from keyturn.storage.codec import micros
from keyturn.storage.engine import Database, open_database
from keyturn.storage.ledger import Ledger
from keyturn.storage.migrations import migrate
from keyturn.storage.results import Counts, Due, History
from keyturn.storage.tables import Instant, credentials, daemons, intents, meta

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
        password: Secret | None = None,
        create: bool = True,
    ) -> Store:
        """Open a store, make it or bring its schema up to date.

        Raises ConfigError for a URL that is none, StorageError for a store of a newer release, one
        that other users may reach, or none at all where `create` is False.
        """
        database = open_database(url, password=password, create=create)
        store_id = random_bytes(16).hex()

        def prepare(connection: Connection) -> Any:
            migrate(connection, create=create)
            row = connection.execute(sa.select(meta)).first()
            if row is None:
                values = {"id": 1, "store_id": store_id, "incarnation": 1, "epoch": 0}
                connection.execute(sa.insert(meta).values(**values, created_at=clock.now()))
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

    def claim(self, credential_uid: str, *, holder: str, ttl: timedelta) -> Claim | None:
        """Take the claim, with a new fence, if nobody who may be alive has it."""
        now = self._now_sql()
        query = (
            sa.update(credentials)
            .where(credentials.c.uid == credential_uid, queries.claim_free(now))
            .values(
                holder=holder,
                holder_writer=self._writer,
                until=now + sa.literal(micros_of(ttl), sa.BigInteger),
                fence=credentials.c.fence + 1,
                wake_requested=None,
            )
            .returning(credentials.c.fence, credentials.c.until)
        )
        row = self.database.write(lambda connection: connection.execute(query).first())
        if row is None:
            return None
        return Claim(
            credential_uid=credential_uid,
            holder=holder,
            fence=row.fence,
            incarnation=self.incarnation,
            until=row.until,
        )

    def renew(self, claim: Claim, *, ttl: timedelta) -> Claim:
        """Prolong a claim. Raises ClaimLost."""
        until = self._now_sql() + sa.literal(micros_of(ttl), sa.BigInteger)
        query = (
            sa.update(credentials)
            .where(*_held(claim))
            .values(until=until)
            .returning(credentials.c.until)
        )
        row = self.database.write(lambda connection: connection.execute(query).first())
        if row is None:
            raise ClaimLost
        return Claim(
            credential_uid=claim.credential_uid,
            holder=claim.holder,
            fence=claim.fence,
            incarnation=claim.incarnation,
            until=row.until,
        )

    def release(self, claim: Claim, *, wake_at: datetime | None) -> None:
        """Give the claim back and say when the credential must be looked at again.

        Never moves `wake_at` later than what another writer has asked for since the claim was
        taken. A claim that is lost already is no error: its taker decides.
        """
        query = (
            sa.update(credentials)
            .where(*_held(claim))
            .values(
                holder=None,
                holder_writer=None,
                until=None,
                wake_at=_earlier(credentials.c.wake_requested, wake_at),
                wake_requested=None,
            )
        )
        self.database.write(lambda connection: connection.execute(query))

    def load(self, claim: Claim) -> Saved:
        """Read the case. Raises ClaimLost."""

        def body(connection: Connection) -> Saved:
            found = cases.load(connection, credentials.c.uid == claim.credential_uid)
            if found is None or found[1:] != (claim.holder, claim.fence):
                raise ClaimLost
            return Saved(case=found[0], epoch=_epoch(connection))

        return self.database.read(body)

    def save(
        self, claim: Claim, *, before: Case, after: Case, audit: Sequence[AuditEntry]
    ) -> Saved:
        """Write the difference, all or nothing.

        Raises StaleRevision, ClaimLost, StoreUnavailable.
        """

        def body(connection: Connection) -> tuple[Saved, bool]:
            return self._write(connection, before, after, audit, claim=claim)

        return self._confirmed(*self.database.write(body))

    def amend(self, credential_uid: str, change: Change) -> Saved:
        """Load, apply a pure change and save it in one transaction; needs no claim.

        A running saga meets StaleRevision and loads again. `change` may be called more than once;
        what it raises goes through and nothing is changed. Raises UnknownAgent.
        """

        def body(connection: Connection) -> tuple[Saved, bool]:
            lock = sa.select(credentials.c.uid).where(credentials.c.uid == credential_uid)
            connection.execute(lock.with_for_update())
            found = cases.load(connection, credentials.c.uid == credential_uid)
            if found is None:
                raise UnknownAgent("no credential has this id")
            after, entries = change(found[0])
            return self._write(connection, found[0], after, entries)

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
                self._wake(connection, credentials.c.uid == uid, now, bump=1)

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
            self._record(connection, audit)
            return case

        return self.database.write(body)

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
            found = owners.locked(connection, agent_uid)
            if before is not None and found[0].agent != before:
                raise StaleRevision
            owners.check(connection, agent, identities)
            changed = [owners.changed(connection, case, agent, wake_at=now) for case in found]
            for old, new in zip(found, changed, strict=True):
                self._update_credential(connection, old, new, claim=None)
            cases.write_agent(connection, found[0].agent, agent)
            owners.keep_identities(connection, agent, changed, identities)
            self._record(connection, audit)
            if cases.epoch_moves(found[0], changed[0]):
                _bump_epoch(connection)
            return [cases.load_one(connection, case.credential.uid) for case in changed]

        return self.database.write(body)

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

    # --- due work -------------------------------------------------------------------------

    def due(self, *, now: datetime, limit: int) -> list[Due]:
        """Return what must be looked at by `now` and is not claimed, oldest first."""
        return self.database.read(lambda connection: queries.due(connection, now, limit))

    def next_wake(self) -> datetime | None:
        """When `due` has something next; for a claimed credential not before its claim ends."""
        return self.database.read(queries.next_wake)

    def wake(self, credential_uid: str, *, at: datetime) -> None:
        """Look at a credential at `at` or earlier, also if a run that goes on now says later."""
        where = credentials.c.uid == credential_uid
        self.database.write(lambda connection: self._wake(connection, where, at))

    def counts(self) -> Counts:
        """Return the numbers for status and metrics."""
        return self.database.read(
            lambda connection: queries.counts(connection, self.now_in(connection))
        )

    def drifts(self) -> list[tuple[str, Drift]]:
        """Return what the last sweeps found, with the agent's name."""
        return self.database.read(queries.drifts)

    # --- audit ----------------------------------------------------------------------------

    def audit_entries(self, *, agent: str | None = None, limit: int = 100) -> list[audit.Recorded]:
        """Return the newest audit entries, newest first."""
        return self.database.read(
            lambda connection: audit.entries(connection, agent=agent, limit=limit)
        )

    def verify_audit(self) -> list[str]:
        """Return what is wrong with the audit chains; nothing means that they are whole."""
        return self.database.read(audit.problems)

    def append_audit(self, entry: AuditEntry) -> None:
        """Record something that changed no row: a reload, a refused command."""
        self.database.write(lambda connection: self._record(connection, [entry]))

    # --- inside a transaction -------------------------------------------------------------

    def _write(
        self,
        connection: Connection,
        before: Case,
        after: Case,
        entries: Sequence[AuditEntry],
        claim: Claim | None = None,
    ) -> tuple[Saved, bool]:
        revision = self._update_credential(connection, before, after, claim=claim)
        case = cases.write(connection, before, after)
        # Under the credential's row lock, so a ledger has the order of the commits; before the
        # locks that everybody shares, so nobody waits for this disk.
        now = self.now_in(connection)
        unsure = self.ledger.announce(before, after, incarnation=self.incarnation, at=now)
        self._record(connection, entries, at=now)
        moves = cases.epoch_moves(before, after)
        epoch = _bump_epoch(connection) if moves else _epoch(connection)
        return Saved(case=cases.with_revision(case, revision), epoch=epoch), unsure

    def _update_credential(
        self, connection: Connection, before: Case, after: Case, *, claim: Claim | None
    ) -> int:
        """Bump the revision, if it is still that of `before`, and write what changed."""
        old, new = before.credential, after.credential
        values: dict[str, Any] = cases.changes(old, new)
        values["revision"] = old.revision + 1
        if claim is None:
            # A run that goes on now must not sleep through this when it releases its claim.
            values["wake_requested"] = _earlier(credentials.c.wake_requested, new.wake_at)
        elif "wake_at" in values:
            values["wake_at"] = _earlier(credentials.c.wake_requested, new.wake_at)
        where = [credentials.c.uid == old.uid, credentials.c.revision == old.revision]
        place = sa.update(credentials).where(*where, *(_held(claim) if claim else ()))
        if connection.execute(place.values(**values)).rowcount != 1:
            raise _lost(connection, claim)
        return old.revision + 1

    def _record(
        self,
        connection: Connection,
        entries: Sequence[AuditEntry],
        *,
        at: datetime | None = None,
    ) -> None:
        if entries:
            at = at or self.now_in(connection)
            audit.append(connection, entries, writer=self._writer, at=at)

    def _wake(
        self, connection: Connection, where: ColumnElement[bool], at: datetime, *, bump: int = 0
    ) -> None:
        place = sa.update(credentials).where(where)
        connection.execute(
            place.values(
                wake_at=_earlier(credentials.c.wake_at, at),
                wake_requested=_earlier(credentials.c.wake_requested, at),
                revision=credentials.c.revision + bump,
            )
        )

    def _confirmed(self, saved: Saved, unsure: bool) -> Saved:
        if unsure:
            self.ledger.confirm(saved.case)
        return saved

    def now_in(self, connection: Connection) -> datetime:
        """Return the store's time inside a transaction."""
        if self.database.is_sqlite:
            return self._clock.now()
        found: datetime = connection.execute(
            sa.select(sa.type_coerce(self._now_sql(), Instant))
        ).scalar_one()
        return found

    def _now_sql(self) -> ColumnElement[Any]:
        if self.database.is_sqlite:
            return sa.literal(micros(self._clock.now()), sa.BigInteger)
        seconds = sa.extract("epoch", sa.func.clock_timestamp())
        return sa.cast(seconds * 1_000_000, sa.BigInteger)


def micros_of(span: timedelta) -> int:
    """Return whole microseconds of a span."""
    return span // timedelta(microseconds=1)


def _held(claim: Claim) -> tuple[ColumnElement[bool], ...]:
    return (
        credentials.c.uid == claim.credential_uid,
        credentials.c.holder == claim.holder,
        credentials.c.fence == claim.fence,
    )


def _earlier(column: sa.Column[Any], at: datetime | None) -> ColumnElement[Any]:
    """Return the earlier of a column and an instant, where None means never."""
    bound = sa.literal(at, Instant)
    if at is None:
        return column
    return sa.case((column < bound, column), else_=bound)


def _lost(connection: Connection, claim: Claim | None) -> ClaimLost | StaleRevision:
    """Return why a conditional update met no row."""
    if claim is None:
        return StaleRevision()
    held = sa.select(credentials.c.uid).where(*_held(claim))
    return StaleRevision() if connection.execute(held).first() else ClaimLost()


def _epoch(connection: Connection) -> int:
    found: int = connection.execute(sa.select(meta.c.epoch)).scalar_one()
    return found


def _bump_epoch(connection: Connection) -> int:
    """Bump last, since everybody waits for this row: so epochs have the order of the commits."""
    bump = sa.update(meta).values(epoch=meta.c.epoch + 1).returning(meta.c.epoch)
    bumped: int = connection.execute(bump).scalar_one()
    return bumped
