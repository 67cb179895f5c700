"""A store whose tables were changed by hand is not opened, and the error names what is missing."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from keyturn.errors import StorageError
from support.postgres import postgres  # noqa: F401 - a fixture
from support.stores import Place, either_place  # noqa: F401 - a fixture


@pytest.fixture(autouse=True)
def made(place: Place) -> None:
    """Have a store there, made and closed."""
    place.open().close()


def change(place: Place, *statements: str) -> None:
    """Do something by hand, with what is at hand."""
    engine = sa.create_engine(place.url)
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    engine.dispose()


@pytest.mark.parametrize(
    ("sqlite", "postgresql", "names"),
    [
        ("DROP TRIGGER versions_tombstones", "DROP TRIGGER versions_tombstones ON versions", "versions has no versions_tombstones"),
        (None, "ALTER TABLE versions DISABLE TRIGGER versions_tombstones", "versions has no versions_tombstones"),
        ("DROP INDEX versions_one_current", "DROP INDEX versions_one_current", "versions has no versions_one_current"),
        (None, "ALTER TABLE versions DROP CONSTRAINT versions_state", "versions has no versions_state"),
        (None, "ALTER TABLE versions ALTER deadline TYPE text USING NULL", "versions has no deadline"),
        (None, "ALTER TABLE audit ALTER actor DROP NOT NULL", "audit has no actor"),
        ("DROP TABLE daemons", "DROP TABLE daemons", "daemons has no"),
        ("ALTER TABLE credentials DROP COLUMN wake_requested", "ALTER TABLE credentials DROP COLUMN wake_requested", "credentials has no wake_requested"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(
    place: Place, sqlite: str | None, postgresql: str, names: str
) -> None:
    """Whatever somebody took away, the store is not opened, and the first difference is said."""
    statement = sqlite if place.url.startswith("sqlite") else postgresql
    if statement is None:
        return  # SQLite has no such statement
    change(place, statement)
    with pytest.raises(StorageError, match=names):
        place.open()


def test_what_was_added_is_nobodys_business(place: Place) -> None:
    """A newer release may have added columns, tables and indexes, and made a constraint wider."""
    change(
        place,
        "CREATE TABLE later (id INTEGER)",
        "ALTER TABLE versions ADD COLUMN later TEXT",
        "CREATE INDEX later_too ON audit (actor)",
    )
    if place.url.startswith("postgresql"):
        change(
            place,
            "ALTER TABLE agents DROP CONSTRAINT agents_state",
            "ALTER TABLE agents ADD CONSTRAINT agents_state CHECK (state <> 'nonsense')",
        )
    place.open()
