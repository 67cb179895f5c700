"""A credential's own row: who has the claim, its revision, and when it must be looked at again.

Every rotation runs these statements several times, so they are built once: SQLAlchemy then finds
the compiled text by the statement, instead of building and hashing it anew.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.sql.elements import ColumnElement

from keyturn.core.model import Credential
from keyturn.errors import ClaimLost, StaleRevision
from keyturn.ports import Claim
from keyturn.storage import cases, queries
from keyturn.storage.codec import MICROSECOND
from keyturn.storage.tables import Instant, credentials, meta, now_micros, store_now

_UID = credentials.c.uid == sa.bindparam("b_uid")
_REVISION = credentials.c.revision == sa.bindparam("b_revision")
_HELD = (
    _UID,
    credentials.c.holder == sa.bindparam("b_holder"),
    credentials.c.fence == sa.bindparam("b_fence"),
)
_FREE = {"holder": None, "holder_writer": None, "until": None, "wake_requested": None}


def _earlier(column: sa.Column[Any]) -> ColumnElement[Any]:
    """Return the earlier of a column and the parameter `b_at`, where NULL means never."""
    at = sa.bindparam("b_at", type_=Instant)
    return sa.case((at.is_(None), column), (column < at, column), else_=at)


_until = now_micros() + sa.bindparam("b_ttl", type_=sa.BigInteger)
_bumped = credentials.c.revision + 1
_epoch = sa.select(meta.c.epoch).scalar_subquery()

_TAKE = (
    sa.update(credentials)
    .where(_UID, queries.claim_free(now_micros()))
    .values(until=_until, fence=credentials.c.fence + 1, wake_requested=None)
    .returning(credentials.c.fence, credentials.c.until)
)
_PROLONG = sa.update(credentials).where(*_HELD).values(until=_until).returning(credentials.c.until)
_IS_HELD = sa.select(credentials.c.uid).where(*_HELD)
_LOCK = sa.select(credentials.c.uid).where(_UID).with_for_update()
_GIVE_BACK = (
    sa.update(credentials)
    .where(*_HELD)
    .values(wake_at=_earlier(credentials.c.wake_requested), **_FREE)
)
# With the claim: what another writer has asked for since it was taken is never overwritten.
_SAVE = (
    sa.update(credentials)
    .where(*_HELD, _REVISION)
    .values(revision=_bumped, wake_at=_earlier(credentials.c.wake_requested))
    .returning(store_now().label("now"), _epoch.label("epoch"))
)
_SAVE_AND_GIVE_BACK = _SAVE.values(**_FREE)
# Without: a run that goes on now must not sleep through this when it gives its claim back.
_AMEND = (
    sa.update(credentials)
    .where(_UID, _REVISION)
    .values(revision=_bumped, wake_requested=_earlier(credentials.c.wake_requested))
    .returning(store_now().label("now"), _epoch.label("epoch"))
)
_wake = sa.update(credentials).values(
    wake_at=_earlier(credentials.c.wake_at), wake_requested=_earlier(credentials.c.wake_requested)
)
_WAKE = _wake.where(_UID)
_WAKE_ANEW = _wake.where(_UID).values(revision=_bumped)


def take(
    connection: Connection, uid: str, *, holder: str, writer: str, ttl: timedelta, incarnation: int
) -> Claim | None:
    """Take the claim, with a new fence, if nobody who may be alive has it."""
    values = {"b_uid": uid, "b_ttl": ttl // MICROSECOND, "holder": holder, "holder_writer": writer}
    row = connection.execute(_TAKE, values).first()
    if row is None:
        return None
    return Claim(
        credential_uid=uid,
        holder=holder,
        fence=row.fence,
        incarnation=incarnation,
        until=row.until,
    )


def prolong(connection: Connection, claim: Claim, *, ttl: timedelta) -> Claim:
    """Prolong a claim. Raises ClaimLost."""
    row = connection.execute(_PROLONG, {**_held(claim), "b_ttl": ttl // MICROSECOND}).first()
    if row is None:
        raise ClaimLost
    return replace(claim, until=row.until)


def give_back(connection: Connection, claim: Claim, *, wake_at: datetime | None) -> None:
    """Give the claim back; one that is lost already is no error: its taker decides."""
    connection.execute(_GIVE_BACK, {**_held(claim), "b_at": wake_at})


def lock(connection: Connection, uid: str) -> None:
    """Let nobody else change a credential until the transaction ends."""
    connection.execute(_LOCK, {"b_uid": uid})


def save(
    connection: Connection,
    old: Credential,
    new: Credential,
    *,
    claim: Claim | None,
    give_back: bool = False,
) -> tuple[datetime, int]:
    """Bump the revision, if it is still that of `old`, and write what changed.

    Returns the store's time and epoch. Raises StaleRevision, ClaimLost.
    """
    values: dict[str, Any] = cases.changes(old, new)
    values |= {"b_uid": old.uid, "b_revision": old.revision, "b_at": new.wake_at}
    statement = _AMEND
    if claim is not None:
        values.pop("wake_at", None)
        values |= _held(claim)
        statement = _SAVE_AND_GIVE_BACK if give_back else _SAVE
    row = connection.execute(statement, values).first()
    if row is None:
        raise _lost(connection, claim)
    return row.now, row.epoch


def wake(connection: Connection, uid: str, at: datetime, *, anew: bool = False) -> None:
    """Look at a credential at `at` or earlier; with `anew` a run that goes on loads it again."""
    connection.execute(_WAKE_ANEW if anew else _WAKE, {"b_uid": uid, "b_at": at})


def _held(claim: Claim) -> dict[str, Any]:
    return {"b_uid": claim.credential_uid, "b_holder": claim.holder, "b_fence": claim.fence}


def _lost(connection: Connection, claim: Claim | None) -> ClaimLost | StaleRevision:
    """Return why a conditional update met no row."""
    if claim is None or connection.execute(_IS_HELD, _held(claim)).first():
        return StaleRevision()
    return ClaimLost()
