"""Anchors inside the audit: each quotes the heads of all other chains that have moved.

So a chain cannot be taken away whole: another one names it. An anchor stands in a chain of its own,
`<writer>/anchor`, and makes nobody wait. Against whoever writes all chains anew only a copy elsewhere
helps: `keyturn.anchor_file`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from keyturn.anchor_file import Quote, batches
from keyturn.core.walltime import rfc3339
from keyturn.ports import AuditEntry
from keyturn.storage import audit
from keyturn.storage.audit import ANCHOR, Head, Read
from keyturn.storage.tables import anchored, chains
from keyturn.storage.tables import audit as entries

MOST = 500  # heads in one entry, and look-ups in one read


def append(connection: Connection, *, writer: str, at: datetime, why: str) -> None:
    """Append an anchor to the audit, in the caller's transaction."""
    moved = _moved(connection)
    parts = [moved[start : start + MOST] for start in range(0, len(moved), MOST)] or [[]]
    made = [_entry(part, why) for part in parts]
    audit.append(connection, made, writer=writer, at=at, heads={})
    _note(connection, moved)


def _moved(connection: Connection) -> list[Row[Any]]:
    query = (
        sa.select(chains, anchored.c.seq.label("quoted"))
        .join(anchored, anchored.c.chain == chains.c.chain, isouter=True)
        .where(
            sa.or_(anchored.c.seq.is_(None), anchored.c.seq != chains.c.seq),
            chains.c.chain.not_like(f"%/{ANCHOR}"),
        )
        .order_by(chains.c.chain)
    )
    return list(connection.execute(query))


def _entry(heads: Sequence[Row[Any]], why: str) -> AuditEntry:
    quoted = tuple((row.chain, row.seq, row.hash) for row in heads)
    detail = (("heads", quoted), ("why", why))
    return AuditEntry(action=audit.ANCHOR_ACTION, actor="daemon:anchor", detail=detail)


def _note(connection: Connection, moved: Sequence[Row[Any]]) -> None:
    for row in moved:
        if row.quoted is None:
            connection.execute(sa.insert(anchored), {"chain": row.chain, "seq": row.seq})
        else:
            place = sa.update(anchored).where(anchored.c.chain == row.chain)
            connection.execute(place.values(seq=row.seq))


# --- verifying ----------------------------------------------------------------------------


def problems(read: Read) -> list[str]:
    """Return what is wrong with the chains by themselves, and by the anchors among them."""
    return audit.problems(read) + unmet(read, quoted(read))


def quoted(read: Read) -> set[Quote]:
    """Return every head that an anchor in the audit names."""
    names = sa.select(chains.c.chain).where(chains.c.chain.like(f"%/{ANCHOR}"))
    found: set[Quote] = set()
    for chain in read(lambda connection: list(connection.scalars(names))):
        seq = 0
        while rows := read(_slice(chain, seq)):
            seq = rows[-1].seq
            for row in rows:
                at = rfc3339(row.at)
                heads = dict(row.detail).get("heads", ())
                found |= {Quote(str(c), int(n), str(h), at) for c, n, h in heads}
    return found


def _slice(chain: str, seq: int) -> Any:
    query = (
        sa.select(entries.c.seq, entries.c.at, entries.c.detail)
        .where(entries.c.chain == chain, entries.c.seq > seq)
        .order_by(entries.c.seq)
        .limit(audit.SLICE)
    )
    return lambda connection: connection.execute(query).all()


def unmet(read: Read, quotes: Iterable[Quote]) -> list[str]:
    """Return what is not as these quotes have it, a line for each chain."""
    wrong: dict[str, Quote] = {}
    there: dict[str, Head] = {}
    for batch in batches(quotes, MOST):
        hashes = read(_hashes({(quote.chain, quote.seq) for quote in batch}))
        for quote in batch:
            known = hashes.get((quote.chain, quote.seq))
            if known == quote.hash:
                there[quote.chain] = (quote.seq, quote.at)
            elif quote.chain not in wrong:
                wrong[quote.chain] = quote
    return [_words(quote, there.get(chain)) for chain, quote in sorted(wrong.items())]


def _words(quote: Quote, good: Head | None) -> str:
    since = f"whole up to entry {good[0]} of {good[1]}" if good else "nothing of it can be believed"
    return (
        f"{quote.chain}: entry {quote.seq} is not what the anchor of {quote.at} names: it was written"
        f" anew, cut, or an older store was put back ({since})"
    )


def _hashes(places: set[tuple[str, int]]) -> Any:
    columns = sa.tuple_(entries.c.chain, entries.c.seq)
    query = sa.select(entries.c.chain, entries.c.seq, entries.c.hash).where(
        columns.in_(sorted(places))
    )

    def body(connection: Connection) -> dict[tuple[str, int], str]:
        return {(row.chain, row.seq): row.hash for row in connection.execute(query)}

    return body
