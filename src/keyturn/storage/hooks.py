"""How far each webhook has told what the audit holds.

Nothing is queued: an event is an audit entry beyond a hook's cursors. So what was committed with its
entry is told, whoever is killed in between, and no rotation writes a row for it. The cursors stand
one on each chain, since a chain has no gaps and the order of the commits; the table's own numbers
have neither on PostgreSQL.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from keyturn.storage import audit, codec
from keyturn.storage.audit import Recorded
from keyturn.storage.engine import Database
from keyturn.storage.tables import audit as entries
from keyturn.storage.tables import chains, hook_cursors, hooks

Cursors = dict[str, int]  # by chain, the number of the last entry that is over with
SLICE = 200  # entries of one chain in one read: few milliseconds
CHAINS = 32  # chains in one read


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What the store keeps of one hook.

    `summaries` are what is to be told in sum only, the oldest first; `number` counts them all.
    """

    cursors: Cursors
    gone_at: datetime | None
    summaries: tuple[dict[str, Any], ...]
    number: int


class HookRecords:
    """The rows of all hooks. Thread-safe; every method may raise StoreUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def begin(self, name: str, receiver: str) -> Told:
        """Return what is kept of a hook. A new one tells what happens from now on.

        `receiver` is a digest of where it leads: one that leads elsewhere is not gone any more.
        """

        def body(connection: Connection) -> Told:
            row = connection.execute(sa.select(hooks).where(hooks.c.name == name)).first()
            if row is None:
                values = {"receiver": receiver, "summaries": "[]", "number": 0}
                connection.execute(sa.insert(hooks).values(name=name, **values))
                columns = [hook_cursors.c.hook, hook_cursors.c.chain, hook_cursors.c.seq]
                heads = sa.select(sa.literal(name), chains.c.chain, chains.c.seq)
                connection.execute(sa.insert(hook_cursors).from_select(columns, heads))
            elif row.receiver != receiver:
                moved = sa.update(hooks).where(hooks.c.name == name)
                connection.execute(moved.values(receiver=receiver, gone_at=None))
            return _told(connection, name)

        return self._database.write(body)

    def find(self, name: str) -> Told | None:
        """Return what is kept of a hook, None where it never began."""

        def body(connection: Connection) -> Told | None:
            known = connection.execute(sa.select(hooks.c.name).where(hooks.c.name == name)).first()
            return _told(connection, name) if known else None

        return self._database.read(body)

    def names(self) -> list[str]:
        """Return every hook that has rows."""
        query = sa.select(hooks.c.name)
        return self._database.read(lambda connection: list(connection.scalars(query)))

    def keep(
        self,
        name: str,
        cursors: Mapping[str, int],
        *,
        summaries: Sequence[Mapping[str, Any]],
        number: int,
        gone_at: datetime | None,
    ) -> None:
        """Write down how far a hook is; `cursors` are those that have moved."""
        place = (hook_cursors.c.hook == name, hook_cursors.c.chain == sa.bindparam("b_chain"))
        move = sa.update(hook_cursors).where(*place).values(seq=sa.bindparam("b_seq"))

        def body(connection: Connection) -> None:
            kept = sa.update(hooks).where(hooks.c.name == name)
            values = {"summaries": codec.text(list(summaries)), "number": number}
            if connection.execute(kept.values(gone_at=gone_at, **values)).rowcount == 0:
                return  # it was taken out of the configuration meanwhile
            for chain, seq in cursors.items():
                if connection.execute(move, {"b_chain": chain, "b_seq": seq}).rowcount == 0:
                    row = {"hook": name, "chain": chain, "seq": seq}
                    connection.execute(sa.insert(hook_cursors), row)

        self._database.write(body)

    def forget(self, name: str) -> None:
        """Forget a hook that the configuration names no more."""

        def body(connection: Connection) -> None:
            connection.execute(sa.delete(hook_cursors).where(hook_cursors.c.hook == name))
            connection.execute(sa.delete(hooks).where(hooks.c.name == name))

        self._database.write(body)

    def after(self, seen: Mapping[str, int]) -> list[Recorded]:
        """Return entries that follow these cursors, in the order of their commits as far as it is known.

        Not all of them where there are many: ask again until there is none.
        """
        return self._database.read(_following(seen))


def _told(connection: Connection, name: str) -> Told:
    row = connection.execute(sa.select(hooks).where(hooks.c.name == name)).one()
    cursors = sa.select(hook_cursors.c.chain, hook_cursors.c.seq).where(hook_cursors.c.hook == name)
    return Told(
        cursors={one.chain: one.seq for one in connection.execute(cursors)},
        gone_at=row.gone_at,
        summaries=tuple(json.loads(row.summaries)),
        number=row.number,
    )


def _following(seen: Mapping[str, int]) -> Callable[[Connection], list[Recorded]]:
    def body(connection: Connection) -> list[Recorded]:
        heads = connection.execute(sa.select(chains.c.chain, chains.c.seq)).all()
        behind = [head.chain for head in heads if head.seq > seen.get(head.chain, 0)]
        found: list[Any] = []
        up_to: int | None = None
        for chain in behind[:CHAINS]:
            rows = connection.execute(
                sa.select(entries)
                .where(entries.c.chain == chain, entries.c.seq > seen.get(chain, 0))
                .order_by(entries.c.seq)
                .limit(SLICE)
            ).all()
            if len(rows) == SLICE:  # what comes later elsewhere waits for the rest of this one
                last = rows[-1].position
                up_to = last if up_to is None else min(up_to, last)
            found += rows
        found.sort(key=lambda row: row.position)
        return [audit.recorded(row) for row in found if up_to is None or row.position <= up_to]

    return body
