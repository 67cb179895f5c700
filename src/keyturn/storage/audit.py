"""The audit chains: a few per writer, each entry hashed over the one before it in its chain.

One chain for all would make everyone wait for a paused writer. One per writer would put all its
commits in a row, since a chain's head is locked until the commit: that is what makes a chain follow
the order of commits. So a writer has `LANES`, an agent always in the same one; and revocations have
a chain of their own (`<writer>/revoke`), so that they wait for nothing else. Anchors quote the other
chains in one more (`anchors`).
"""

from __future__ import annotations

import hashlib
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Row

from keyturn.ports import AuditEntry
from keyturn.storage import codec
from keyturn.storage.tables import audit, chains

T = TypeVar("T")

START = "0" * 64
LANES = 8
SLICE = 500  # entries in one read: few milliseconds
MOST = 10_000  # entries that can be asked for
ANCHOR = "anchor"  # the chain of a writer that quotes the others
ANCHOR_ACTION = "audit.anchor"

Head = tuple[int, str]  # number and hash of a chain's last entry
Heads = dict[str, Head]


class Read(Protocol):
    """`Database.read`: runs a body in a read transaction of its own."""

    def __call__(self, body: Callable[[Connection], T], /) -> T:
        """Return what the body returns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """An audit entry as it stands in the store."""

    entry: AuditEntry
    chain: str
    seq: int
    at: datetime
    hash: str


def append(
    connection: Connection,
    entries: Iterable[AuditEntry],
    *,
    writer: str,
    at: datetime,
    heads: Heads,
) -> None:
    """Append to this writer's chains, in the caller's transaction.

    `heads` remembers where they ended. It may be wrong, after a rollback say: the chain in the store
    decides, and then it is read.
    """
    by_chain: dict[str, list[AuditEntry]] = defaultdict(list)
    for entry in entries:
        by_chain[_chain(writer, entry)].append(entry)
    for chain, of_chain in sorted(by_chain.items()):
        heads[chain] = _append(connection, chain, of_chain, at, heads.get(chain))


def _chain(writer: str, entry: AuditEntry) -> str:
    if entry.action.startswith("revoke"):
        return f"{writer}/revoke"
    if entry.action == ANCHOR_ACTION:
        return f"{writer}/{ANCHOR}"
    return f"{writer}/{zlib.crc32(entry.agent.encode()) % LANES}"


_HEAD = (
    sa.select(chains.c.seq, chains.c.hash)
    .where(chains.c.chain == sa.bindparam("b_chain"))
    .with_for_update()
)
_MOVE_HEAD = sa.update(chains).where(
    chains.c.chain == sa.bindparam("b_chain"), chains.c.hash == sa.bindparam("b_before")
)
_BEGIN = {
    "sqlite": sqlite.insert(chains).on_conflict_do_nothing(),
    "postgresql": postgresql.insert(chains).on_conflict_do_nothing(),
}
_ENTRY = sa.insert(audit)


def _head(connection: Connection, chain: str) -> Head:
    """Lock a chain's head; two that begin a chain at once both find it."""
    named = {"b_chain": chain}
    head = connection.execute(_HEAD, named).first()
    if head is None:
        begin = _BEGIN[connection.dialect.name]
        connection.execute(begin, {"chain": chain, "seq": 0, "hash": START})
        head = connection.execute(_HEAD, named).one()
    return head.seq, head.hash


def _append(
    connection: Connection,
    chain: str,
    entries: Sequence[AuditEntry],
    at: datetime,
    remembered: Head | None,
) -> Head:
    """Move the head from where it is remembered, which locks it, else from where it is."""
    head = remembered or _head(connection, chain)
    rows, reached = _chained(chain, entries, at, head)
    if not _moved(connection, chain, head, reached):
        head = _head(connection, chain)
        rows, reached = _chained(chain, entries, at, head)
        _moved(connection, chain, head, reached)
    connection.execute(_ENTRY, rows if len(rows) > 1 else rows[0])
    return reached


def _chained(
    chain: str, entries: Sequence[AuditEntry], at: datetime, head: Head
) -> tuple[list[dict[str, object]], Head]:
    """Return the rows that follow a head, and the head after them."""
    seq, last = head
    rows = []
    for entry in entries:
        seq += 1
        last = _hash(last, chain, seq, at, entry)
        rows.append(_row(entry) | {"chain": chain, "seq": seq, "at": at, "hash": last})
    return rows, (seq, last)


def _moved(connection: Connection, chain: str, before: Head, after: Head) -> bool:
    named = {"b_chain": chain, "b_before": before[1], "seq": after[0], "hash": after[1]}
    return connection.execute(_MOVE_HEAD, named).rowcount == 1


def entries(read: Read, *, agent: str | None, limit: int) -> list[Recorded]:
    """Return the newest entries, newest first, `MOST` at most; a slice at a time, as below."""
    found: list[Recorded] = []
    query = sa.select(audit).order_by(audit.c.position.desc())
    if agent is not None:
        query = query.where(audit.c.agent == agent)
    after, left = query, max(0, min(limit, MOST))
    while left:
        size = min(left, SLICE)
        rows = read(_all(after.limit(size)))
        found += [recorded(row) for row in rows]
        if len(rows) < size:
            break
        left -= size
        after = query.where(audit.c.position < rows[-1].position)
    return found


def revocations(
    connection: Connection, *, after: int, upto: int, but: str
) -> list[tuple[tuple[str, Any], ...]]:
    """Return the details of the revocations between two positions that others than `but` wrote."""
    query = (
        sa.select(audit.c.detail)
        .where(
            audit.c.position > after,
            audit.c.position <= upto,
            audit.c.action == "revoke",
            ~audit.c.chain.startswith(f"{but}/", autoescape=True),
        )
        .order_by(audit.c.position)
    )
    return list(connection.execute(query).scalars())


def problems(read: Read) -> list[str]:
    """Return what is wrong with the chains: edited, swapped, missing or cut entries.

    A slice at a time, each a read of its own: on SQLite no commit can end while somebody reads, and
    while it waits no verifier can read either. Where a chain ends is compared with its head as the
    same read saw it. So what is appended meanwhile is judged while its chain is not walked to the
    end, and left for the next time afterwards, as are chains that begin in front of the walk.
    """
    found: list[str] = []
    ends: Heads = {}
    going_on: str | None = None  # the chain in which the last slice ended
    while True:
        ends = {} if going_on is None else {going_on: ends[going_on]}
        rows, heads = read(_slice(going_on, ends))
        for row in rows:
            seq, before = ends.get(row.chain, (0, START))
            if row.seq != seq + 1:
                found.append(f"{row.chain}: entries {seq + 1} to {row.seq - 1} are missing")
            elif row.hash != _hash(before, row.chain, row.seq, row.at, recorded(row).entry):
                found.append(f"{row.chain}: entry {row.seq} was changed")
            ends[row.chain] = (row.seq, row.hash)
        going_on = rows[-1].chain if len(rows) == SLICE else None
        found += [
            f"{chain}: ends at entry {ends.get(chain, (0,))[0]}, not at {heads.get(chain, (0,))[0]}"
            for chain in heads | ends
            if chain != going_on and heads.get(chain, (0, START)) != ends.get(chain, (0, START))
        ]
        if going_on is None:
            return found


def follow(read: Read, chain: str, verified: Head) -> tuple[Head, str]:
    """Go one slice on along a chain from an entry that is known to be good.

    Returns the last good entry, and what is wrong behind it ("" where nothing is).
    """
    query = sa.select(audit).where(audit.c.chain == chain, audit.c.seq > verified[0])
    query = query.order_by(audit.c.seq).limit(SLICE)
    end = sa.select(chains).where(chains.c.chain == chain)

    def body(connection: Connection) -> tuple[Sequence[Row[Any]], Head]:
        head = connection.execute(end).first()
        return connection.execute(query).all(), (head.seq, head.hash) if head else (0, START)

    rows, head = read(body)
    for row in rows:
        seq, before = verified
        if row.seq != seq + 1:
            return verified, f"{chain}: entries {seq + 1} to {row.seq - 1} are missing"
        if row.hash != _hash(before, chain, row.seq, row.at, recorded(row).entry):
            return verified, f"{chain}: entry {row.seq} was changed"
        verified = (row.seq, row.hash)
    if len(rows) < SLICE and verified != head:
        return verified, f"{chain}: ends at entry {verified[0]}, not at {head[0]}"
    return verified, ""


def ends(read: Read) -> Heads:
    """Return the head of every chain."""
    rows = read(_all(sa.select(chains)))
    return {row.chain: (row.seq, row.hash) for row in rows}


def _all(query: sa.Select[Any]) -> Callable[[Connection], Sequence[Row[Any]]]:
    return lambda connection: connection.execute(query).all()


def _slice(
    chain: str | None, ends: Heads
) -> Callable[[Connection], tuple[Sequence[Row[Any]], Heads]]:
    """Return what reads the entries that follow, and the heads of the chains that they belong to."""
    query = sa.select(audit).order_by(audit.c.chain, audit.c.seq).limit(SLICE)
    heads = sa.select(chains)
    if chain is not None:
        after = sa.tuple_(sa.literal(chain), sa.literal(ends[chain][0]))
        query = query.where(sa.tuple_(audit.c.chain, audit.c.seq) > after)
        heads = heads.where(chains.c.chain >= chain)

    def body(connection: Connection) -> tuple[Sequence[Row[Any]], Heads]:
        rows = connection.execute(query).all()
        up_to = heads.where(chains.c.chain <= rows[-1].chain) if len(rows) == SLICE else heads
        return rows, {row.chain: (row.seq, row.hash) for row in connection.execute(up_to)}

    return body


def _row(entry: AuditEntry) -> dict[str, object]:
    return {
        "action": entry.action,
        "actor": entry.actor,
        "agent": entry.agent,
        "version_id": entry.version_id,
        "outcome": entry.outcome,
        "detail": entry.detail,
    }


def recorded(row: Row[Any]) -> Recorded:
    """Return a row of the table as an entry."""
    entry = AuditEntry(
        action=row.action,
        actor=row.actor,
        agent=row.agent,
        version_id=row.version_id,
        outcome=row.outcome,
        detail=row.detail,
    )
    return Recorded(entry=entry, chain=row.chain, seq=row.seq, at=row.at, hash=row.hash)


def _hash(before: str, chain: str, seq: int, at: datetime, entry: AuditEntry) -> str:
    fields = _row(entry) | {"detail": codec.detail_text(entry.detail)}
    body = codec.text([before, chain, seq, codec.micros(at), fields])
    return hashlib.sha256(body.encode()).hexdigest()
