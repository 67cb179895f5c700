"""The rows of verifiers that remember, for whoever waits for them or shows them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from keyturn.storage.cases import columns, from_row
from keyturn.storage.freshness import Epoch
from keyturn.storage.tables import meta, store_now, verifiers


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredVerifier:
    """One process that remembers. `renewed_at` is for people: nothing is decided by it."""

    id: str
    login: str
    host: str
    release: str
    started_at: datetime
    lease: timedelta
    incarnation: int
    epoch: int
    renewals: int
    renewed_at: datetime

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{self.host}/{self.id[:8]}"

    @property
    def acknowledged(self) -> Epoch:
        """What it has applied."""
        return Epoch(self.incarnation, self.epoch)


class Registrations(NamedTuple):
    """All of them at one moment, with the store's epoch and time then."""

    epoch: Epoch
    now: datetime
    rows: tuple[RegisteredVerifier, ...]


_STORE = sa.select(meta.c.incarnation, meta.c.epoch, store_now())
_ALL = sa.select(*columns(RegisteredVerifier, verifiers)).order_by(
    verifiers.c.host, verifiers.c.started_at, verifiers.c.id
)


def registered(connection: Connection) -> Registrations:
    """Return every verifier that is registered."""
    incarnation, number, now = connection.execute(_STORE).one()
    rows = tuple(from_row(RegisteredVerifier, row) for row in connection.execute(_ALL))
    return Registrations(Epoch(incarnation, number), now, rows)


def deregister(connection: Connection, gone: RegisteredVerifier) -> bool:
    """Take away the row of one that has run out, if it did not move meanwhile."""
    ended = sa.delete(verifiers).where(
        verifiers.c.id == gone.id, verifiers.c.renewals == gone.renewals
    )
    return bool(connection.execute(ended).rowcount)
