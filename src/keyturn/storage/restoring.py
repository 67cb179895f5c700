"""A store that may be an older one: noticed, quarantined, merged from the ledger, let go again.

  compare      does the ledger know of commits that this store does not have
  quarantine   a new incarnation, and every verifier answers that nobody can tell
  merge        each agent as the ledger has it (`merge.py`)
  let_go       what is certain; the rest stays for a person
  begin        a ledger for a store that has none

Only a process that leads may quarantine or merge: no writer of an earlier life may be alive.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from keyturn.core import merging
from keyturn.core.merging import Moment
from keyturn.core.model import (
    ACCEPTED,
    Agent,
    AgentState,
    Case,
    Credential,
    Version,
    VersionState,
)
from keyturn.errors import StoreUnavailable
from keyturn.ports import AuditEntry
from keyturn.storage import cases, codec, queries, reading
from keyturn.storage.engine import is_sqlite, sqlite_path
from keyturn.storage.ledger import Ledger
from keyturn.storage.store import Store
from keyturn.storage.tables import (
    credentials,
    meta,
    quarantine,
    versions,
)

EVERYBODY = ""
AHEAD, MISSING, FOREIGN = "ledger-ahead", "ledger-missing", "ledger-foreign"
RESTORED, HELD, GAP = "restored", "held", "ledger-gap"


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


def refuse_lost(url: str, ledger: Ledger) -> None:
    """Refuse to make a store where one was lost: by an empty one verifiers would refuse everybody.

    Raises StoreUnavailable: a revoke is on this host all the same, and written by a later start.
    """
    if is_sqlite(url) and not sqlite_path(url).exists() and ledger.belongs():
        raise StoreUnavailable(
            f"there is no store at {sqlite_path(url)}, and the ledger in {ledger.folder} is that of"
            " one that was there",
            hint="restore a backup: `keyturn store restore FILE`; or, to begin anew, move the"
            " ledger and revoked.d away",
        )


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
    was = life_of_rows(connection, default=was)
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


def life_of_rows(connection: Connection, *, default: int) -> int:
    """Return the incarnation that wrote the rows which are not merged yet."""
    query = sa.select(quarantine.c.detail).where(quarantine.c.agent_uid == EVERYBODY)
    row = connection.execute(query).first()
    return default if row is None else int(codec.loads(row.detail).get("of", default))
