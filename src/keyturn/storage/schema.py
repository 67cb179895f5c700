"""Whether the tables are still those that this release's migrations made.

Somebody who drops a trigger or an index in a night of trouble has a store that works, and no longer
refuses an illegal state. Only what this release knows is looked for: a newer one may have added to it,
and may have changed what stands inside a constraint.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Dialect

from keyturn.errors import StorageError
from keyturn.storage.tables import metadata
from keyturn.storage.usage_tables import usage_metadata

Part = tuple[str, str, str]  # table, name, what it is
_TRIGGERS = (("versions", "versions_tombstones"),)

_ON_SQLITE = (
    'SELECT m.tbl_name, m.type, m.name, m.sql, p.name, p.type, p."notnull" OR p.pk'
    " FROM sqlite_master m LEFT JOIN pragma_table_info(m.name) p ON m.type = 'table'"
)
# NOT VALID, switched off and half-built ones do not count.
_ON_POSTGRESQL = """
WITH t AS (SELECT oid, relname FROM pg_class
  WHERE relkind = 'r' AND relnamespace = to_regnamespace(current_schema()))
SELECT t.relname, a.attname, format_type(a.atttypid, a.atttypmod)
    || CASE WHEN a.attnotnull THEN ' not null' ELSE '' END
  FROM t JOIN pg_attribute a ON a.attrelid = t.oid WHERE a.attnum > 0 AND NOT a.attisdropped
UNION ALL SELECT t.relname, c.conname, 'constraint'
  FROM t JOIN pg_constraint c ON c.conrelid = t.oid WHERE c.convalidated
UNION ALL SELECT t.relname, i.relname, CASE WHEN x.indisunique THEN 'unique index' ELSE 'index' END
  FROM t JOIN pg_index x ON x.indrelid = t.oid JOIN pg_class i ON i.oid = x.indexrelid WHERE x.indisvalid
UNION ALL SELECT t.relname, g.tgname, 'trigger'
  FROM t JOIN pg_trigger g ON g.tgrelid = t.oid WHERE g.tgenabled IN ('O', 'A') AND NOT g.tgisinternal
"""


def check(connection: Connection) -> None:
    """Raise StorageError, naming the first difference, where a part is missing or another one."""
    wanted = _wanted(connection.dialect.name)
    if (missing := wanted - _found(connection)) == set():
        return
    table, name, what = min(missing)
    raise StorageError(
        f"the store's tables were changed: {table} has no {name} ({what})",
        hint="undo what was done to them by hand, or restore a backup",
    )


def _found(connection: Connection) -> frozenset[Part]:
    if connection.dialect.name == "sqlite":
        return frozenset(_on_sqlite(connection))
    rows = connection.exec_driver_sql(_ON_POSTGRESQL)
    return frozenset((table, name, what) for table, name, what in rows)


def _on_sqlite(connection: Connection) -> Iterator[Part]:
    for table, kind, name, text, column, of, filled in connection.exec_driver_sql(_ON_SQLITE):
        if kind == "table":
            yield table, column, f"{of.lower()}{' not null' if filled else ''}"
            for constraint in _constraints().get(table, ()):
                if f"CONSTRAINT {constraint} " in text:
                    yield table, constraint, "constraint"
        elif text is not None:  # what a primary key makes has no text
            yield table, name, f"unique {kind}" if text.startswith("CREATE UNIQUE") else kind


@functools.cache
def _wanted(dialect_name: str) -> frozenset[Part]:
    dialect = sa.make_url(f"{dialect_name}://").get_dialect()()
    return frozenset(_parts(dialect))


def _parts(dialect: Dialect) -> Iterator[Part]:
    for table in _tables(dialect.name):
        for column in table.columns:
            filled = " not null" if not column.nullable else ""
            yield table.name, column.name, column.type.compile(dialect).lower() + filled
        for index in table.indexes:
            kind = "unique index" if index.unique else "index"
            yield table.name, str(index.name), kind
        for constraint in _constraints()[table.name]:
            yield table.name, constraint, "constraint"
    for trigger in _TRIGGERS:
        yield (*trigger, "trigger")


def _tables(dialect_name: str) -> list[sa.Table]:
    """Return what a store consists of: on SQLite what verifiers saw is in another file."""
    found = list(metadata.tables.values())
    return found if dialect_name == "sqlite" else [*found, *usage_metadata.tables.values()]


@functools.cache
def _constraints() -> dict[str, list[str]]:
    return {
        table.name: [str(one.name) for one in table.constraints if one.name is not None]
        for table in _tables("postgresql")
    }
