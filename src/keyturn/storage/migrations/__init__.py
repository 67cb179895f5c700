"""The schema and its changes: which a store has, which this release knows, and what may go on with it.

A change either expands (adds; the release before goes on) or contracts (takes away what that one
needed: its module says the oldest schema that goes on after it, as `contracts_to`). Two releases work
on one store while a new one is rolled out: expand, replace every process, contract.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.engine import Connection

from keyturn.errors import StorageError, StoreTooNew, StoreTooOld

HEAD = "0009"  # what this release needs: its last expansion
FOLDERS = [Path(__file__).parent / "versions"]
_LOCK = 0x6B65797475726E  # "keyturn"; held to the end of the transaction, so poolers do not matter
_NO_RIGHT = "42501"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One change of the schema; `contracts_to` is None for one that only expands."""

    revision: str
    contracts_to: str | None


def migrate(connection: Connection, *, create: bool) -> None:
    """See that this release can work on a store; make an empty one, and expand an SQLite file.

    A store that is current, or newer and still good for this release, needs no right to change tables.

    Raises StoreTooNew, StoreTooOld, and StorageError for an empty store where `create` is False.
    """
    found = revision(connection)
    if found == HEAD:
        return
    if found is None:
        if not create:
            raise StorageError(
                "the store is empty", hint="check store.url; `keyturn run` creates it"
            )
        upgrade(connection)
        return
    if _may_stay(connection, found):
        return
    if connection.dialect.name != "sqlite":
        raise StoreTooOld(f"the store has schema {found}, and this release needs {HEAD}")
    upgrade(connection)


def check_oldest(connection: Connection) -> None:
    """Raise StoreTooNew where the store was contracted beyond this release meanwhile."""
    found = revision(connection)
    if found not in (HEAD, None):
        _may_stay(connection, str(found))


def _may_stay(connection: Connection, found: str) -> bool:
    """Whether a store is newer than HEAD and still good for this release. Raises StoreTooNew."""
    known = [step.revision for step in steps()]
    if found in known:
        return known.index(found) > known.index(HEAD)
    oldest = oldest_schema(connection)
    if oldest in known:
        return True
    raise StoreTooNew(
        f"the store has schema {found} and works with releases from schema {oldest or found} on;"
        f" this one knows {HEAD}"
    )


def upgrade(connection: Connection, *, contract: bool = False) -> list[Step]:
    """Expand as far as this release knows, and with `contract` contract as well; what was done.

    In the caller's transaction. Raises StoreTooOld where an expansion stands behind a contraction.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
    found = revision(connection)
    left = pending(found)
    # A new store has nobody who would miss anything.
    wanted = left if contract or found is None else _up_to_contraction(left)
    if not contract:
        wanted = wanted[: _needed(wanted)]
    if not contract and HEAD in [step.revision for step in left[len(wanted) :]]:
        raise StoreTooOld(
            f"the store has schema {found}, and {HEAD} comes after a contraction",
            hint="end every daemon of an older release, then `keyturn store upgrade --contract`",
        )
    if wanted:
        _apply(connection, wanted[-1].revision)
    contracted = [step.contracts_to for step in wanted if step.contracts_to]
    if contracted:
        newest = sa.text("UPDATE meta SET oldest_schema = :oldest")
        connection.execute(newest, {"oldest": contracted[-1]})
    return wanted


def _up_to_contraction(left: list[Step]) -> list[Step]:
    first = next((n for n, step in enumerate(left) if step.contracts_to), len(left))
    return left[:first]


def _needed(wanted: list[Step]) -> int:
    """Count the steps up to HEAD."""
    names = [step.revision for step in wanted]
    return names.index(HEAD) + 1 if HEAD in names else len(names)


def pending(found: str | None) -> list[Step]:
    """Return the steps of this release that a store has not made; none for a newer one."""
    every = steps()
    names = [step.revision for step in every]
    if found is None:
        return every
    return every[names.index(found) + 1 :] if found in names else []


def oldest_at_head() -> str:
    """Return the oldest schema whose release works on a store that was made by this one."""
    every = steps()
    made = every[: [step.revision for step in every].index(HEAD) + 1]
    return next((step.contracts_to for step in reversed(made) if step.contracts_to), "0001")


def revision(connection: Connection) -> str | None:
    """Return the schema's revision, None for an empty store."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def oldest_schema(connection: Connection) -> str | None:
    """Return the oldest schema whose release may work here; None where the store does not say."""
    columns = sa.inspect(connection).get_columns("meta")
    if "oldest_schema" not in {column["name"] for column in columns}:
        return None
    return connection.execute(sa.text("SELECT oldest_schema FROM meta")).scalar()


def steps() -> list[Step]:
    """Return every change that this release knows, oldest first."""
    scripts = _scripts()[1].walk_revisions()
    found = [
        Step(revision=one.revision, contracts_to=getattr(one.module, "contracts_to", None))
        for one in scripts
    ]
    return found[::-1]


def _scripts() -> tuple[Any, Any]:
    # Loaded only when there is something to do: it takes longer than opening the store.
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    folders = ":".join(str(folder) for folder in FOLDERS)
    config.set_main_option("version_locations", folders.replace("%", "%%"))
    return config, ScriptDirectory.from_config(config)


def _apply(connection: Connection, to: str) -> None:
    from alembic import command

    config = _scripts()[0]
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, to)
    except exc.ProgrammingError as error:
        if getattr(error.orig, "sqlstate", None) != _NO_RIGHT:
            raise
        raise StoreTooOld(
            f"the store needs schema {to}, and this login may not change tables",
            hint="run `keyturn store upgrade` with the login that owns the tables"
            " (KEYTURN_STORE__URL, KEYTURN_STORE__PASSWORD_FILE)",
        ) from None
