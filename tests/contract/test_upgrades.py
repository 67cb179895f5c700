"""A store of the first schema, brought up to this release's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.engine import Engine

from keyturn.storage import migrations
from keyturn.storage.migrations import versions
from support.postgres import postgres  # noqa: F401 - a fixture
from support.stores import Place, declared, either_place  # noqa: F401 - a fixture

# An agent as the first release left it: what is accepted was shown to readers, what is pending not yet.
_ROWS = """
INSERT INTO agents VALUES ('u', 'bot', 'bot', NULL, 'default', 'file', 'enabled', '[]', TRUE);
INSERT INTO credentials (uid, agent_uid, name, kind, seq, successor_owed, leaving, withheld, drift,
    looks, revision) VALUES ('c', 'u', 'default', 'basic', 3, FALSE, '[]', '[]', '{}', '{}', 1);
INSERT INTO versions (id, credential_uid, seq, login, state, scheme, digest, origin, exposed, fence,
    minted_at, ended_at) VALUES
    ('v1', 'c', 1, 'bot', 'revoked', 's', 'd', 'generated', TRUE, 1, 1, 9),
    ('v2', 'c', 2, 'bot', 'current', 's', 'd', 'generated', TRUE, 1, 2, NULL),
    ('v3', 'c', 3, 'bot', 'pending', 's', 'd', 'generated', FALSE, 1, 3, NULL);
INSERT INTO intents (uid, credential_uid, version_id, target, effect, expected, writer, fence,
    incarnation, at, outcome, ended_at) VALUES
    ('i1', 'c', 'v1', 't', 'activate', '', 'w', 1, 1, 4, 'done', 5),
    ('i2', 'c', 'v2', 't', 'activate', '', 'w', 1, 1, 6, 'done', 7),
    ('i3', 'c', 'v2', 'x', 'activate', '', 'w', 1, 1, 6, 'settled', 8),
    ('i4', 'c', 'v2', 'y', 'activate', '', 'w', 1, 1, 6, 'failed', 9),
    ('i5', 'c', 'v3', 't', 'stage', '', 'w', 1, 1, 6, 'done', 9)
"""


@pytest.fixture
def engine(place: Place) -> Iterator[Engine]:
    """Give an empty store on each database."""
    engine = sa.create_engine(place.url)
    yield engine
    engine.dispose()


def test_a_store_of_the_first_schema_becomes_one_of_this_release(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tables are those of a new store, its rows are kept, and what had landed is known."""
    with engine.begin() as connection:
        with monkeypatch.context() as first:
            first.setattr(migrations, "HEAD", "0001")
            migrations.upgrade(connection)
        for statement in _ROWS.split(";"):
            connection.exec_driver_sql(statement)
    with engine.begin() as connection:
        done = migrations.upgrade(connection)
        assert [step.revision for step in done][-1] == migrations.HEAD
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, declared(engine)) == []
        landed = connection.exec_driver_sql("SELECT id, landed_at FROM versions ORDER BY id")
        assert [tuple(row) for row in landed] == [("v1", None), ("v2", 8), ("v3", None)]


def test_every_change_says_whether_it_contracts() -> None:
    """One chain, numbered without a gap, and each after the first declares `contracts_to`."""
    assert [step.revision for step in migrations.steps()] == [
        f"{n:04}" for n in range(1, int(migrations.HEAD) + 1)
    ]
    texts = sorted(Path(versions.__path__[0]).glob("r*.py"))
    assert len(texts) == int(migrations.HEAD)
    assert [one.name for one in texts[1:] if "\ncontracts_to = " not in one.read_text()] == []
