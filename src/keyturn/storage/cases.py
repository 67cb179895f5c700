"""Reading a whole case and writing the difference of two, inside a caller's transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
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
    meta,
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


# Statements are built once: building and hashing them anew costs more than running them.
_UID: sa.BindParameter[str] = sa.bindparam("b_uid")

_ROOT = (
    sa.select(
        *columns(Credential, credentials),
        credentials.c.holder,
        credentials.c.fence,
        *columns(Agent, agents, "a_"),
        *columns(Rotation, rotations, "r_"),
        sa.select(meta.c.epoch).scalar_subquery().label("epoch"),
    )
    .join_from(credentials, agents, credentials.c.agent_uid == agents.c.uid)
    .outerjoin(
        rotations,
        sa.and_(rotations.c.credential_uid == credentials.c.uid, is_open(rotations.c.state)),
    )
)
BY_UID = _ROOT.where(credentials.c.uid == _UID)
BY_NAME = _ROOT.where(
    agents.c.name == sa.bindparam("b_name"),
    credentials.c.name == sa.bindparam("b_credential"),
    agents.c.state != AgentState.REMOVED,
)

_PLACED = sa.and_(placements.c.credential_uid == _UID, ~placements.c.gone)
_INTENTS = (
    sa.select(*columns(Intent, intents))
    .where(intents.c.credential_uid == _UID, intents.c.outcome.is_(None))
    .order_by(intents.c.at)
)
_PLACEMENTS = (
    sa.select(*columns(Placement, placements)).where(_PLACED).order_by(placements.c.locator)
)


def _versions() -> sa.Select[Any]:
    """Return the query for accepted, placed and the newest other versions, oldest first."""
    mine = versions.c.credential_uid == _UID
    accepted = versions.c.state.in_([sa.literal_column(f"'{s}'") for s in sorted(ACCEPTED)])
    newest = (
        sa.select(versions.c.id)
        .where(mine, ~accepted)
        .order_by(versions.c.seq.desc())
        .limit(OTHER_VERSIONS)
    )
    placed = sa.select(placements.c.version_id).where(_PLACED)
    chosen = sa.or_(accepted, versions.c.id.in_(newest), versions.c.id.in_(placed))
    return sa.select(*columns(Version, versions)).where(mine, chosen).order_by(versions.c.seq)


_VERSIONS = _versions()


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A case, and what stands beside it in its row."""

    case: Case
    holder: str | None
    fence: int
    epoch: int


def load(connection: Connection, query: sa.Select[Any], **values: str) -> Loaded | None:
    """Return the case that `BY_UID` (`b_uid`) or `BY_NAME` (`b_name`, `b_credential`) finds."""
    row = connection.execute(query, values).first()
    if row is None:
        return None
    uid = {"b_uid": row.uid}

    def all_of(kind: type[T], query: sa.Select[Any]) -> tuple[T, ...]:
        return tuple(from_row(kind, found) for found in connection.execute(query, uid))

    case = Case(
        agent=from_row(Agent, row, "a_"),
        credential=from_row(Credential, row),
        versions=all_of(Version, _VERSIONS),
        rotation=from_row(Rotation, row, "r_") if row.r_uid else None,
        intents=all_of(Intent, _INTENTS),
        placements=all_of(Placement, _PLACEMENTS),
    )
    return Loaded(case=case, holder=row.holder, fence=row.fence, epoch=row.epoch)


def load_one(connection: Connection, credential_uid: str, *, also: str = "") -> Case:
    """Return a case by its credential, with the version `also` of it. Raises UnknownAgent."""
    found = load(connection, BY_UID, b_uid=credential_uid)
    if found is None:
        raise UnknownAgent("no credential has this id")
    case = found.case
    if not also or case.version(also) is not None:
        return case
    old = sa.select(*columns(Version, versions)).where(
        versions.c.id == also, versions.c.credential_uid == credential_uid
    )
    more = (from_row(Version, row) for row in connection.execute(old))
    return replace(case, versions=tuple(sorted((*more, *case.versions), key=lambda v: v.seq)))


def with_revision(case: Case, revision: int) -> Case:
    """Return the case as its commit numbers it."""
    return replace(case, credential=replace(case.credential, revision=revision))


# --- writing ------------------------------------------------------------------------------

_VERSION = sa.update(versions).where(
    versions.c.id == sa.bindparam("b_id"), versions.c.state == sa.bindparam("b_state")
)
_OPEN_ROTATION = sa.update(rotations).where(rotations.c.uid == _UID, is_open(rotations.c.state))
_OPEN_INTENT = sa.update(intents).where(intents.c.uid == _UID, intents.c.outcome.is_(None))
_THIS_PLACEMENT = sa.and_(
    placements.c.version_id == sa.bindparam("b_id"),
    placements.c.target == sa.bindparam("b_target"),
    placements.c.locator == sa.bindparam("b_locator"),
)
_PLACEMENT = sa.update(placements).where(_THIS_PLACEMENT)
_NO_PLACEMENT = sa.delete(placements).where(_THIS_PLACEMENT)
# A copy that was given up may turn up again: its row is still there, and was not loaded.
_AGAIN: dict[str, Any] = {
    "index_elements": [placements.c.version_id, placements.c.target, placements.c.locator],
    "set_": {"gone": False},
}
_NEW_PLACEMENT: dict[str, sa.Insert] = {
    "sqlite": sqlite.insert(placements).on_conflict_do_update(**_AGAIN),
    "postgresql": postgresql.insert(placements).on_conflict_do_update(**_AGAIN),
}
_INSERT = {table: sa.insert(table) for table in (versions, rotations, intents)}


def epoch_moves(before: Case | None, after: Case) -> bool:
    """Tell whether verifiers must know: a version's state, deadline or login, or the agent's state."""
    known = {v.id: _judged(v) for v in before.versions} if before else {}
    if any(known.get(v.id) != _judged(v) for v in after.versions):
        return True
    return before is not None and before.agent.state is not after.agent.state


def _judged(version: Version) -> tuple[object, ...]:
    return version.state, version.deadline, version.not_after, version.login


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
        where = {"b_id": new.id, "b_state": old.state}
        if connection.execute(_VERSION, changes(old, new) | where).rowcount != 1:
            raise StaleRevision
    _insert(connection, versions, (v for v in after.versions if v.id not in known))


def _write_rotation(connection: Connection, old: Rotation | None, new: Rotation | None) -> None:
    if new is None or new == old:
        return
    if old is None or old.uid != new.uid:
        _insert(connection, rotations, [new])
        return
    if connection.execute(_OPEN_ROTATION, changes(old, new) | {"b_uid": new.uid}).rowcount != 1:
        raise StaleRevision


def _write_intents(
    connection: Connection, before: Iterable[Intent], after: Iterable[Intent]
) -> None:
    known = {i.uid: i for i in before}
    after = tuple(after)
    for new in (i for i in after if i.uid in known and known[i.uid] != i):
        values = changes(known[new.uid], new) | {"b_uid": new.uid}
        if connection.execute(_OPEN_INTENT, values).rowcount != 1:
            raise StaleRevision
    _insert(connection, intents, (i for i in after if i.uid not in known))


def _write_placements(
    connection: Connection, before: Iterable[Placement], after: Iterable[Placement]
) -> None:
    known = {(p.version_id, p.target, p.locator): p for p in before}
    now = {(p.version_id, p.target, p.locator): p for p in after}
    for key, old in known.items():
        if now.get(key) != old:
            where = {"b_id": old.version_id, "b_target": old.target, "b_locator": old.locator}
            if key in now:
                connection.execute(_PLACEMENT, {"gone": now[key].gone, **where})
            else:
                connection.execute(_NO_PLACEMENT, where)
    for new in (p for key, p in now.items() if key not in known):
        connection.execute(_NEW_PLACEMENT[connection.dialect.name], to_row(new))


def _free_identities(connection: Connection, case: Case) -> None:
    """Give up entries that the agent neither has nor is leaving."""
    kept = [t.key for t in (*case.agent.targets, *case.credential.leaving)]
    connection.execute(
        sa.delete(identities).where(
            identities.c.agent_uid == case.agent.uid, identities.c.target.not_in(kept)
        )
    )


def _insert(connection: Connection, table: sa.Table, values: Iterable[Any]) -> None:
    for value in values:
        connection.execute(_INSERT[table], to_row(value))


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
