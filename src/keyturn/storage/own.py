"""Rows of the daemon's own credentials: one with its versions, written if its revision still holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from keyturn.core.own import Own, OwnProblem, OwnState, OwnVersion
from keyturn.errors import StaleRevision
from keyturn.storage.tables import own_credentials, own_versions

_VERSION = ("id", "state", "at", "accessor", "ends_at", "deadline")


def load(connection: Connection, name: str, host: str) -> Own | None:
    """Return the own credential of a connection on a host."""
    mine = (own_credentials.c.connection == name, own_credentials.c.host == host)
    row = connection.execute(sa.select(own_credentials).where(*mine)).first()
    return None if row is None else _own(connection, row)


def load_all(connection: Connection) -> list[Own]:
    """Return those of every connection and host."""
    order = (own_credentials.c.connection, own_credentials.c.host)
    rows = connection.execute(sa.select(own_credentials).order_by(*order)).all()
    return [_own(connection, row) for row in rows]


def save(connection: Connection, after: Own) -> Own:
    """Write one, and return it without what is over. Raises StaleRevision where it has changed."""
    living = tuple(one for one in after.versions if one.state is not OwnState.RETIRED)
    saved = replace(after, revision=after.revision + 1, versions=living)
    if after.revision:
        table, key = own_credentials, _key(after)
        held = (table.c.connection == key["connection"], table.c.host == key["host"])
        same = sa.update(table).where(*held, table.c.revision == after.revision)
        if connection.execute(same.values(**_columns(saved))).rowcount != 1:
            raise StaleRevision
    elif load(connection, after.connection, after.host) is not None:
        raise StaleRevision
    else:
        connection.execute(sa.insert(own_credentials).values(**_key(saved), **_columns(saved)))
    known = {one.id: one for one in _versions(connection, after)}
    # The current one last: the database holds that there is one, after each statement.
    for seq, one in sorted(enumerate(after.versions), key=_current_last):
        values = {"seq": seq, **{name: getattr(one, name) for name in _VERSION}}
        if one.id not in known:
            connection.execute(sa.insert(own_versions).values(**_key(after), **values))
        else:
            here = own_versions.c.id == one.id
            connection.execute(sa.update(own_versions).where(here).values(**values))
    return saved


def _current_last(numbered: tuple[int, OwnVersion]) -> tuple[bool, int]:
    return numbered[1].state is OwnState.CURRENT, numbered[0]


def _key(own: Own) -> dict[str, str]:
    return {"connection": own.connection, "host": own.host}


def _columns(own: Own) -> dict[str, Any]:
    problem = own.problem
    return {
        "revision": own.revision,
        "rotated_at": own.rotated_at,
        "problem_code": problem.code if problem else None,
        "problem_detail": problem.detail if problem else None,
        "problem_since": problem.since if problem else None,
        "problem_tries": problem.tries if problem else None,
        "problem_until": problem.until if problem else None,
    }


def _own(connection: Connection, row: Any) -> Own:
    problem = None
    if row.problem_code is not None:
        problem = OwnProblem(
            code=row.problem_code,
            detail=row.problem_detail,
            since=row.problem_since,
            tries=row.problem_tries,
            until=row.problem_until,
        )
    bare = Own(
        connection=row.connection,
        host=row.host,
        revision=row.revision,
        rotated_at=row.rotated_at,
        problem=problem,
    )
    return replace(bare, versions=tuple(_versions(connection, bare)))


def _versions(connection: Connection, own: Own) -> list[OwnVersion]:
    table = own_versions
    mine = (table.c.connection == own.connection, table.c.host == own.host)
    living = table.c.state != OwnState.RETIRED
    rows = connection.execute(sa.select(table).where(*mine, living).order_by(table.c.seq)).all()
    return [OwnVersion(**{name: getattr(row, name) for name in _VERSION}) for row in rows]
