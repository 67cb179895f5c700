"""The audit chain: one per writer, each entry hashed over the one before it.

One chain for all would make everyone wait for a paused writer; revocations have a chain of their
own (`<writer>/revoke`), so that they wait for nobody. The head's row lock makes the chain follow
the order of commits.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from keyturn.ports import AuditEntry
from keyturn.storage import codec
from keyturn.storage.tables import audit, chains

START = "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """An audit entry as it stands in the store."""

    entry: AuditEntry
    chain: str
    seq: int
    at: datetime
    hash: str


def append(
    connection: Connection, entries: Iterable[AuditEntry], *, writer: str, at: datetime
) -> None:
    """Append to this writer's chains, in the caller's transaction."""
    by_chain: dict[str, list[AuditEntry]] = defaultdict(list)
    for entry in entries:
        revoking = entry.action.startswith("revoke")
        by_chain[f"{writer}/revoke" if revoking else writer].append(entry)
    for chain, of_chain in sorted(by_chain.items()):
        _append(connection, chain, of_chain, at)


def _append(
    connection: Connection, chain: str, entries: Sequence[AuditEntry], at: datetime
) -> None:
    head = connection.execute(
        sa.select(chains.c.seq, chains.c.hash).where(chains.c.chain == chain).with_for_update()
    ).first()
    seq, last = (head.seq, head.hash) if head else (0, START)
    rows = []
    for entry in entries:
        seq += 1
        last = _hash(last, chain, seq, at, entry)
        rows.append(_row(entry) | {"chain": chain, "seq": seq, "at": at, "hash": last})
    connection.execute(sa.insert(audit), rows)
    if head:
        place = sa.update(chains).where(chains.c.chain == chain)
        connection.execute(place.values(seq=seq, hash=last))
    else:
        connection.execute(sa.insert(chains).values(chain=chain, seq=seq, hash=last))


def entries(connection: Connection, *, agent: str | None, limit: int) -> list[Recorded]:
    """Return the newest entries, newest first."""
    query = sa.select(audit).order_by(audit.c.position.desc()).limit(limit)
    if agent is not None:
        query = query.where(audit.c.agent == agent)
    return [_recorded(row) for row in connection.execute(query)]


def problems(connection: Connection) -> list[str]:
    """Return what is wrong with the chains: edited, swapped, missing or cut entries."""
    heads = {row.chain: (row.seq, row.hash) for row in connection.execute(sa.select(chains))}
    found, last = [], dict.fromkeys(heads, (0, START))
    query = sa.select(audit).order_by(audit.c.chain, audit.c.seq)
    for row in connection.execution_options(yield_per=1000).execute(query):
        seq, before = last.get(row.chain, (0, START))
        if row.seq != seq + 1:
            found.append(f"{row.chain}: entries {seq + 1} to {row.seq - 1} are missing")
        elif row.hash != _hash(before, row.chain, row.seq, row.at, _recorded(row).entry):
            found.append(f"{row.chain}: entry {row.seq} was changed")
        last[row.chain] = (row.seq, row.hash)
    found += [
        f"{chain}: ends at entry {reached[0]}, not at {heads.get(chain, (0,))[0]}"
        for chain, reached in last.items()
        if heads.get(chain) != reached
    ]
    return found


def _row(entry: AuditEntry) -> dict[str, object]:
    return {
        "action": entry.action,
        "actor": entry.actor,
        "agent": entry.agent,
        "version_id": entry.version_id,
        "outcome": entry.outcome,
        "detail": entry.detail,
    }


def _recorded(row: Row[tuple[object, ...]]) -> Recorded:
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
