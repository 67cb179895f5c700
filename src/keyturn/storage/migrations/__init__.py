"""The schema and its changes, applied in one transaction when the store is opened."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from keyturn.errors import StorageError

HEAD = "0001"
_LOCK = 0x6B65797475726E  # "keyturn"; held to the end of the transaction, so poolers do not matter


def migrate(connection: Connection, *, create: bool) -> None:
    """Bring the schema to this release's, in the caller's transaction.

    Raises StorageError where the store was written by a newer release, or is empty and `create`
    is False.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
    found = revision(connection)
    if found == HEAD:
        return
    if found is None and not create:
        raise StorageError("the store is empty", hint="check store.url; `keyturn run` creates it")
    _upgrade(connection, found)


def revision(connection: Connection) -> str | None:
    """Return the schema's revision, None for an empty store."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def _upgrade(connection: Connection, found: str | None) -> None:
    # Loaded only when there is something to do: it takes longer than opening the store.
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise StorageError(
            f"the store was written by a newer release (schema {found}, this one knows {HEAD})",
            hint="install that release or a newer one, or restore a backup of this one",
        )
    command.upgrade(config, HEAD)
