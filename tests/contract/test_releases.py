"""Two releases on one store: expanded by the next one this one goes on, contracted it says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from keyturn.core.model import VersionState
from keyturn.daemon.keeping import _upgrade
from keyturn.errors import Refused, StorageError, StoreQuarantined, StoreTooNew, StoreTooOld
from keyturn.storage import migrations, restoring
from keyturn.storage.decisions import DecisionReader
from keyturn.storage.engine import open_database
from keyturn.storage.membership import Membership
from keyturn.storage.postgresql import no_password
from keyturn.storage.store import Store
from keyturn.storage.usage_tables import usage_metadata
from support.postgres import Cluster, postgres  # noqa: F401 - a fixture
from support.stores import TTL, Place, RealClock, add, claim_of, version

_HEAD = migrations.HEAD
_EXPANDS = f"""
from alembic import op
revision, down_revision, contracts_to = "9001", "{_HEAD}", None
def upgrade():
    op.execute("ALTER TABLE agents ADD COLUMN colour TEXT DEFAULT 'none' NOT NULL")
    op.execute("CREATE TABLE colours (name TEXT NOT NULL, PRIMARY KEY (name))")
"""
_CONTRACTS = """
from alembic import op
revision, down_revision, contracts_to = "9002", "9001", "9001"
def upgrade():
    op.execute("DROP TABLE colours")
"""


# What came after schema 0001, newest first.
_NEW_TABLES = (
    "verifiers", "own_versions", "own_credentials", "anchored", "hook_cursors", "hooks", "quarantine",
)  # fmt: skip
_NEW_COLUMNS = (
    "versions.landed_at", "credentials.repairs", "agents.file", "daemons.knows",
    "meta.oldest_schema", "meta.ledger_id",
)  # fmt: skip


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Give an empty place for a store on each database."""
    url = f"sqlite:///{tmp_path}/keyturn.db"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").new_database()
    place = Place(url, tmp_path)
    yield place
    place.close()


@contextmanager
def next_release(folder: Path) -> Iterator[None]:
    """Know one expansion and one contraction more."""
    more = folder / "versions"
    more.mkdir(exist_ok=True)
    (more / "r9001.py").write_text(_EXPANDS)
    (more / "r9002.py").write_text(_CONTRACTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(migrations, "FOLDERS", [*migrations.FOLDERS, more])
        patch.setattr(migrations, "HEAD", "9001")
        yield


def upgraded(place: Place, **more: Any) -> dict[str, Any]:
    """Do `keyturn store upgrade`."""
    database = open_database(place.url, clock=RealClock(), create=False)
    try:
        options = {"contract": False, "dry_run": False, **more}
        return database.write(lambda connection: _upgrade(connection, **options))
    finally:
        database.close()


def works(store: Store, uid: str) -> None:
    """Claim, save and release, as a rotation does."""
    claim = claim_of(store, uid, holder="h", ttl=TTL)
    assert claim is not None
    saved = store.load(claim)
    number = saved.case.credential.seq + 1
    fresh = version(uid, number, VersionState.KEPT)
    after = replace(
        saved.case,
        versions=(*saved.case.versions, fresh),
        credential=replace(saved.case.credential, seq=number),
    )
    store.save(claim, before=saved.case, after=after, audit=[], release=True)


def test_a_release_goes_on_while_the_next_one_expands(place: Place) -> None:
    """Both work on one store, in turn and at once, and the older one may even start anew."""
    old = place.open("n")
    uid = add(old)
    with next_release(place.state_dir):
        assert [one["schema"] for one in upgraded(place, dry_run=True)["steps"]] == ["9001"]
        assert [one["schema"] for one in upgraded(place)["steps"]] == ["9001"]
        new = place.open("n+1", create=False)
    for store in (old, new, place.open("n again", create=False), new):
        works(store, uid)
    assert new.case(uid).credential.seq == 4
    assert Membership(old).try_lead(ttl=TTL)


def test_nothing_is_taken_from_a_release_that_runs(place: Place) -> None:
    """A contraction is refused while a daemon needs what it takes away, and leaves that one out after."""
    old = place.open("n")
    add(old)
    member, standby = Membership(old), Membership(place.open("standby"))
    assert member.try_lead(ttl=TTL)
    with next_release(place.state_dir):
        with pytest.raises(Refused, match="older release works on this store: n "):
            upgraded(place, contract=True)
        assert upgraded(place)["left"] == [{"schema": "9002", "kind": "contract"}]
        member.leave()
        done = upgraded(place, contract=True)
        assert (done["after"], done["left"]) == ("9002", [])
        place.open("n+1", create=False)
    with pytest.raises(StoreTooNew, match=f"from schema 9001 on; this one knows {_HEAD}") as caught:
        place.open("n again", create=False)
    assert caught.value.exit_code == 78
    assert "install" in caught.value.hint
    with pytest.raises(StoreTooNew):
        standby.try_lead(ttl=TTL)


def test_a_file_is_expanded_by_itself_and_never_contracted(tmp_path: Path) -> None:
    """`keyturn run` of the next release adds what it needs, and takes nothing."""
    place = Place(f"sqlite:///{tmp_path}/keyturn.db", tmp_path)
    old = place.open("n")
    uid = add(old)
    with next_release(tmp_path):
        new = place.open("n+1")
    with new.engine.connect() as connection:
        assert migrations.revision(connection) == "9001"
    works(old, uid)
    place.close()


def test_a_database_login_needs_no_right_to_change_tables(
    postgres: Cluster,  # noqa: F811 - the fixture
    tmp_path: Path,
) -> None:
    """It opens what is current, or newer and good for it; an older one it asks to be upgraded."""
    place = Place(postgres.new_database(), tmp_path)
    uid = add(place.open("owner"))
    with psycopg.connect(place.url, autocommit=True) as connection:
        connection.execute("DROP ROLE IF EXISTS plain")
        connection.execute("CREATE ROLE plain LOGIN")
        connection.execute(
            "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO plain"
        )
        connection.execute("GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO plain")
    plain = Place(place.url.replace("keyturn@", "plain@"), tmp_path)
    works(plain.open("daemon"), uid)
    with next_release(tmp_path):
        with pytest.raises(StoreTooOld, match="needs 9001") as caught:
            plain.open("n+1")
        with pytest.raises(StoreTooOld, match="may not change tables"):
            upgraded(plain)
        upgraded(place)
        works(plain.open("n+1"), uid)
    assert "keyturn store upgrade" in caught.value.hint
    works(plain.open("daemon again"), uid)
    empty = postgres.new_database().replace("keyturn@", "plain@")
    with pytest.raises(StorageError, match="may not change tables"):
        Place(empty, tmp_path).open("first")
    plain.close()
    place.close()


def test_a_verifier_reads_the_store_of_the_release_before(place: Place) -> None:
    """Without the table of quarantine it answers; as soon as there is one it heeds that."""
    store = place.open()
    uid = add(store)
    works(store, uid)
    found = store.case(uid).versions[0]
    with store.engine.connect() as connection, connection.begin():
        for table in [*_NEW_TABLES, *usage_metadata.tables]:  # those of usage on a server only
            connection.execute(sa.text(f"DROP TABLE IF EXISTS {table}"))
        for column in _NEW_COLUMNS:
            connection.execute(sa.text("ALTER TABLE {} DROP COLUMN {}".format(*column.split("."))))
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '0001'"))
    reader = DecisionReader.open(place.url, password=no_password)
    assert reader.lookup(found.id) is not None
    assert reader.lookup("unknown0000000") is None
    upgraded(place)
    assert reader.lookup(found.id) is not None
    store = place.open("again")
    restoring.put_in_quarantine(store, restoring.RESTORED, actor="test")
    for version_id in (found.id, "unknown0000000"):
        with pytest.raises(StoreQuarantined):
            reader.lookup(version_id)
    with pytest.raises(StoreQuarantined):
        reader.imported("nobody")
    assert store.due(now=store.now(), limit=5) == []
    restoring.let_go(store, [], actor="test")
    assert reader.lookup(found.id) is not None
    assert reader.lookup("unknown0000000") is None
    assert store.due(now=store.now(), limit=5) != []
    reader.close()


def test_one_agent_in_quarantine_keeps_no_other_from_its_answers(place: Place) -> None:
    """What is undecided of one is unavailable; the others are accepted, refused and rotated."""
    store = place.open()
    for name in ("a", "b"):
        works(store, add(store, name))
    ids = {name: store.case_of(name).versions[0].id for name in ("a", "b")}
    undecided = restoring.Difference(agent="a", what="undecided", before=restoring.GAP)
    restoring.put_in_quarantine(store, restoring.RESTORED, actor="test")
    assert restoring.let_go(store, [undecided], actor="test") == ["a"]
    reader = DecisionReader.open(place.url, password=no_password)
    with pytest.raises(StoreQuarantined):
        reader.lookup(ids["a"])
    assert reader.lookup(ids["b"]) is not None
    assert reader.lookup("unknown0000000") is None
    assert [due.agent_name for due in store.due(now=store.now(), limit=5)] == ["b"]
    assert restoring.release(store, "a", actor="test")
    assert not restoring.release(store, "a", actor="test")
    assert reader.lookup(ids["a"]) is not None
    reader.close()


def test_each_host_that_leads_has_a_ledger_of_its_own(
    postgres: Cluster,  # noqa: F811 - the fixture
    tmp_path: Path,
) -> None:
    """A second host begins one with all that is accepted, and so does the first when it leads again."""
    url = postgres.new_database()
    hosts = [Place(url, tmp_path / name) for name in ("first", "second")]
    one, two = (host.open(host.state_dir.name) for host in hosts)
    uid = add(one)
    restoring.keep_ledger(one)
    works(one, uid)
    assert restoring.compare(two) == ""
    restoring.keep_ledger(two)
    works(two, uid)
    assert len(two.ledger.accepted("a")) == 2
    assert restoring.compare(one) == ""
    restoring.keep_ledger(one)
    assert len(one.ledger.accepted("a")) == 2
    for host in hosts:
        host.close()
