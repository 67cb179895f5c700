"""By which schemes and keys the hashes of accepted versions were made: what a key ring must still have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from keyturn.storage.engine import Database

_MAC = 43  # a keyed text ends with its MAC; what stands before it names the key
# Whatever may still be accepted, deadlines apart: one that has passed says nothing of copies.
SELECT = (
    "SELECT v.scheme, CASE WHEN v.scheme = 'hmac-sha256' THEN"  # noqa: S608  # constants
    f" CASE WHEN length(v.digest) > {_MAC} THEN substr(v.digest, 1, length(v.digest) - {_MAC})"
    " ELSE 'broken' END ELSE '' END, COUNT(*)"
    " FROM versions v JOIN credentials c ON c.uid = v.credential_uid"
    " JOIN agents a ON a.uid = c.agent_uid"
    " WHERE v.state IN ('pending', 'current', 'previous', 'kept') AND a.state <> 'removed'"
    " GROUP BY 1, 2"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class InUse:
    """How many accepted versions have one scheme and key; `head` is their digest without the MAC."""

    scheme: str
    head: str
    versions: int


def in_use(database: Database) -> list[InUse]:
    """Return what is in use. Raises StoreUnavailable."""
    return of_rows(database.read(lambda connection: connection.execute(sa.text(SELECT)).all()))


def of_rows(rows: Iterable[Sequence[Any]]) -> list[InUse]:
    """Return rows of `SELECT` as values."""
    return [InUse(scheme=scheme, head=head, versions=number) for scheme, head, number in rows]
