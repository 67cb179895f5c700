"""Reading a whole case and writing the difference of two, inside a caller's transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.sql.elements import ColumnElement

from keyturn.core.model import (
    ACCEPTED,
    OPEN,
    Agent,
    AgentState,
    Case,
    Credential,
    Intent,
    Placement,
    Rotation,
    Version,
    VersionState,
)
from keyturn.errors import IllegalTransition, StaleRevision, UnknownAgent
from keyturn.storage.tables import (
    agents,
    credentials,
    identities,
    intents,
    placements,
    rotations,
    versions,
)

T = TypeVar("T")
OTHER_VERSIONS = 20  # newest refused ones in a case: a destination that shows one is recognised
_UNIQUE_STATES = frozenset({VersionState.PENDING, VersionState.CURRENT})


def columns(kind: type[Any], table: sa.Table, prefix: str = "") -> list[ColumnElement[Any]]:
    """Return the columns that hold the fields of a model class."""
    return [table.c[field.name].label(prefix + field.name) for field in fields(kind)]


def from_row(kind: Callable[..., T], row: Any, prefix: str = "") -> T:
    """Return a model value from a row that was selected with `columns`."""
    mapping: Any = row._mapping  # noqa: SLF001 - its documented name
    model: Any = kind
    return kind(**{f.name: mapping[prefix + f.name] for f in fields(model)})


def to_row(value: Any) -> dict[str, Any]:
    """Return the columns of a model value."""
    return {field.name: getattr(value, field.name) for field in fields(value)}


def changes(before: Any, after: Any) -> dict[str, Any]:
    """Return the columns that differ between two values of one class."""
    old = to_row(before)
    return {name: value for name, value in to_row(after).items() if value != old[name]}


def is_open(column: ColumnElement[Any]) -> ColumnElement[bool]:
    """Return the condition of an open rotation, spelled so that the partial index serves it."""
    return column.in_([sa.literal_column(f"'{state}'") for state in sorted(OPEN)])


_ROOT = sa.select(
    *columns(Credential, credentials),
    credentials.c.holder,
    credentials.c.fence,
    *columns(Agent, agents, "a_"),
).join_from(credentials, agents, credentials.c.agent_uid == agents.c.uid)


def load(connection: Connection, where: ColumnElement[bool]) -> tuple[Case, str | None, int] | None:
    """Return the case that `where` finds, with holder and fence of its claim; None if none."""
    row = connection.execute(_ROOT.where(where)).first()
    if row is None:
        return None
    case = Case(
        agent=from_row(Agent, row, "a_"),
        credential=from_row(Credential, row),
        versions=_versions(connection, row.uid),
        rotation=_rotation(connection, row.uid),
        intents=_all(connection, Intent, intents, row.uid, intents.c.outcome.is_(None)),
        placements=_all(connection, Placement, placements, row.uid, ~placements.c.gone),
    )
    return case, row.holder, row.fence


def load_one(connection: Connection, credential_uid: str) -> Case:
    """Return a case by its credential. Raises UnknownAgent."""
    if found := load(connection, credentials.c.uid == credential_uid):
        return found[0]
    raise UnknownAgent("no credential has this id")


def with_revision(case: Case, revision: int) -> Case:
    """Return the case as its commit numbers it."""
    return replace(case, credential=replace(case.credential, revision=revision))


def _versions(connection: Connection, uid: str) -> tuple[Version, ...]:
    """Return accepted, placed and the newest other versions, oldest first."""
    mine = versions.c.credential_uid == uid
    refused = versions.c.state.not_in(sorted(ACCEPTED))
    newest = (
        sa.select(versions.c.id)
        .where(mine, refused)
        .order_by(versions.c.seq.desc())
        .limit(OTHER_VERSIONS)
    )
    placed = sa.select(placements.c.version_id).where(
        placements.c.credential_uid == uid, ~placements.c.gone
    )
    chosen = sa.or_(~refused, versions.c.id.in_(newest), versions.c.id.in_(placed))
    query = sa.select(*columns(Version, versions)).where(mine, chosen).order_by(versions.c.seq)
    return tuple(from_row(Version, row) for row in connection.execute(query))


def _rotation(connection: Connection, uid: str) -> Rotation | None:
    query = sa.select(*columns(Rotation, rotations)).where(
        rotations.c.credential_uid == uid, is_open(rotations.c.state)
    )
    row = connection.execute(query).first()
    return from_row(Rotation, row) if row else None


def _all(
    connection: Connection, kind: type[T], table: sa.Table, uid: str, where: ColumnElement[bool]
) -> tuple[T, ...]:
    query = sa.select(*columns(kind, table)).where(table.c.credential_uid == uid, where)
    order = table.c.at if table is intents else table.c.locator
    return tuple(from_row(kind, row) for row in connection.execute(query.order_by(order)))


# --- writing ------------------------------------------------------------------------------


def epoch_moves(before: Case | None, after: Case) -> bool:
    """Tell whether verifiers must know: acceptance, a deadline, or the agent's state or login."""
    known = {v.id: (v.accepted, v.deadline) for v in before.versions} if before else {}
    if any(known.get(v.id, (False, None)) != (v.accepted, v.deadline) for v in after.versions):
        return True
    if before is None:
        return False
    old, new = before.agent, after.agent
    return (old.state, old.login) != (new.state, new.login)


def write(connection: Connection, before: Case, after: Case) -> Case:
    """Write what differs below the credential's own row, and return the case as it now loads.

    The caller has locked and bumped the credential's row. Raises StaleRevision where a version is
    no longer in the state that `before` shows.
    """
    _refuse_losses(before, after)
    if before.agent != after.agent:
        _bump_others(connection, after)
        write_agent(connection, before.agent, after.agent)
    _write_versions(connection, before, after)
    _write_rotation(connection, before.rotation, after.rotation)
    _write_intents(connection, before.intents, after.intents)
    _write_placements(connection, before.placements, after.placements)
    if before.credential.leaving != after.credential.leaving:
        _free_identities(connection, after)
    return _as_loaded(after)


def _bump_others(connection: Connection, case: Case) -> None:
    """Let runs of the agent's other credentials load again."""
    others = sa.update(credentials).where(
        credentials.c.agent_uid == case.agent.uid, credentials.c.uid != case.credential.uid
    )
    connection.execute(others.values(revision=credentials.c.revision + 1))


def write_agent(connection: Connection, before: Agent, after: Agent) -> None:
    """Write what changed in an agent's row; a removed one owns no entries."""
    if before.uid != after.uid:
        raise IllegalTransition("a case cannot change its agent")
    if before == after:
        return
    place = sa.update(agents).where(agents.c.uid == after.uid)
    connection.execute(place.values(**changes(before, after)))
    if after.state is AgentState.REMOVED:
        connection.execute(sa.delete(identities).where(identities.c.agent_uid == after.uid))


def _refuse_losses(before: Case, after: Case) -> None:
    """Refuse a change that forgets something open: dropping it from the tuple is not an end."""
    ids = {v.id for v in after.versions}
    uids = {i.uid for i in after.intents}
    rotation = after.rotation.uid if after.rotation else None
    if (
        any(v.accepted and v.id not in ids for v in before.versions)
        or any(i.unresolved and i.uid not in uids for i in before.intents)
        or (before.rotation and before.rotation.open and before.rotation.uid != rotation)
    ):
        raise IllegalTransition("a change forgets an accepted version, an intent or a rotation")


def _write_versions(connection: Connection, before: Case, after: Case) -> None:
    known = {v.id: v for v in before.versions}
    changed = [(known[v.id], v) for v in after.versions if v.id in known and known[v.id] != v]
    # The states that only one version may have are given up before they are taken.
    for old, new in sorted(changed, key=lambda pair: pair[1].state in _UNIQUE_STATES):
        place = sa.update(versions).where(versions.c.id == new.id, versions.c.state == old.state)
        if connection.execute(place.values(**changes(old, new))).rowcount != 1:
            raise StaleRevision
    _insert(connection, versions, (v for v in after.versions if v.id not in known))


def _write_rotation(connection: Connection, old: Rotation | None, new: Rotation | None) -> None:
    if new is None or new == old:
        return
    if old is None or old.uid != new.uid:
        _insert(connection, rotations, [new])
        return
    place = sa.update(rotations).where(rotations.c.uid == new.uid, is_open(rotations.c.state))
    if connection.execute(place.values(**changes(old, new))).rowcount != 1:
        raise StaleRevision


def _write_intents(
    connection: Connection, before: Iterable[Intent], after: Iterable[Intent]
) -> None:
    known = {i.uid: i for i in before}
    after = tuple(after)
    for new in (i for i in after if i.uid in known and known[i.uid] != i):
        place = sa.update(intents).where(intents.c.uid == new.uid, intents.c.outcome.is_(None))
        if connection.execute(place.values(**changes(known[new.uid], new))).rowcount != 1:
            raise StaleRevision
    _insert(connection, intents, (i for i in after if i.uid not in known))


def _write_placements(
    connection: Connection, before: Iterable[Placement], after: Iterable[Placement]
) -> None:
    known = {(p.version_id, p.target, p.locator): p for p in before}
    now = {(p.version_id, p.target, p.locator): p for p in after}
    for key, old in known.items():
        if now.get(key) != old:
            place = sa.and_(
                placements.c.version_id == old.version_id,
                placements.c.target == old.target,
                placements.c.locator == old.locator,
            )
            if key in now:
                gone = now[key].gone
                connection.execute(sa.update(placements).where(place).values(gone=gone))
            else:
                connection.execute(sa.delete(placements).where(place))
    _insert(connection, placements, (p for key, p in now.items() if key not in known))


def _free_identities(connection: Connection, case: Case) -> None:
    """Give up entries that the agent neither has nor is leaving."""
    kept = [t.key for t in (*case.agent.targets, *case.credential.leaving)]
    connection.execute(
        sa.delete(identities).where(
            identities.c.agent_uid == case.agent.uid, identities.c.target.not_in(kept)
        )
    )


def _insert(connection: Connection, table: sa.Table, values: Iterable[Any]) -> None:
    if rows := [to_row(value) for value in values]:
        connection.execute(sa.insert(table), rows)


def _as_loaded(case: Case) -> Case:
    """Return the case as a load would give it, without one."""
    placed = {p.version_id for p in case.placements if not p.gone}
    others = sorted((v for v in case.versions if not v.accepted), key=lambda v: -v.seq)
    newest = {v.id for v in others[:OTHER_VERSIONS]}
    seen = (v for v in case.versions if v.accepted or v.id in placed or v.id in newest)
    return replace(
        case,
        versions=tuple(sorted(seen, key=lambda v: v.seq)),
        rotation=case.rotation if case.rotation and case.rotation.open else None,
        intents=tuple(i for i in case.intents if i.unresolved),
        placements=tuple(p for p in case.placements if not p.gone),
    )
