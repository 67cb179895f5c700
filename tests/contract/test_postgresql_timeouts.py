"""Somebody is stuck inside PostgreSQL: everybody else gives up in time, and says that nobody can tell."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from keyturn.config.verifying import VerifierSection
from keyturn.errors import StoreUnavailable, VerificationFailed
from keyturn.storage import decisions, engine, postgresql, roles
from keyturn.storage.roles import DAEMON, VERIFIER
from keyturn.testing.fakes import FakeClock
from keyturn.verifier.decision import Verifier
from keyturn.verifier.hashing import CHEAP_FOR_TESTS, Hashing
from keyturn.verifier.spool import Spool
from support.least_rights import LeastRights, least_rights, put
from support.postgres import Cluster, postgres  # noqa: F401 - a fixture
from support.stores import NOW, entry

LEASE = VerifierSection().lease.total_seconds()


@pytest.fixture
def rights(postgres: Cluster, tmp_path: Path) -> Iterator[LeastRights]:  # noqa: F811
    """Give a store with its roles."""
    with least_rights(postgres, tmp_path) as made:
        yield made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the store's own limits be a twentieth, so that a test need not wait for them."""
    limits = (
        "SET LOCAL statement_timeout = 500; SET LOCAL lock_timeout = 250;"
        " SET LOCAL idle_in_transaction_session_timeout = 500"
    )
    monkeypatch.setattr(engine, "BEGIN_WRITE", f"BEGIN; {limits}")


def test_every_limit_is_below_the_lease() -> None:
    """Whoever is stuck gives up before a verifier's lease ends: the migrator alone may take longer."""
    assert postgresql.STATEMENT_MS / 1000 < LEASE
    assert postgresql.LOCK_MS < postgresql.STATEMENT_MS
    assert postgresql.IDLE_MS / 1000 < LEASE
    assert decisions.LOCK_MS < decisions.STATEMENT_MS < LEASE * 1000
    for number in (postgresql.STATEMENT_MS, postgresql.LOCK_MS, postgresql.IDLE_MS):
        assert f"= {number}" in engine.BEGIN_WRITE
    for role, (statement, lock, idle, _) in roles._LIMITS.items():
        if role != roles.MIGRATOR:
            assert max(statement, lock, idle) < LEASE * 1000


def _locked(connection: psycopg.Connection[Any]) -> None:
    connection.execute("LOCK TABLE versions, audit IN ACCESS EXCLUSIVE MODE")


def _slow_trigger(connection: psycopg.Connection[Any]) -> None:
    connection.execute(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_sleep(30); RETURN NEW; END $$"
    )
    connection.execute(
        "CREATE TRIGGER slow BEFORE INSERT ON audit FOR EACH ROW EXECUTE FUNCTION slow()"
    )
    connection.commit()


def _row_held(connection: psycopg.Connection[Any]) -> None:
    connection.execute("SELECT * FROM versions, credentials, chains FOR UPDATE")


@pytest.mark.parametrize(
    ("stuck", "verified"),
    [(_locked, "unavailable"), (_slow_trigger, "current"), (_row_held, "current")],
)
@pytest.mark.usefixtures("impatient")
def test_a_stuck_server_delays_nobody_for_long(
    rights: LeastRights,
    tmp_path: Path,
    stuck: Callable[[psycopg.Connection[Any]], None],
    verified: str,
) -> None:
    """A write gives up and changed nothing; a check is answered or cannot tell; a revoke holds at once."""
    store = rights.open(DAEMON)
    version_id, secret = put(store, "web-bot", seed=1)
    clock, hashing = FakeClock(NOW), Hashing(cost=CHEAP_FOR_TESTS)
    verifier = Verifier.open(rights.url(VERIFIER), state_dir=tmp_path, clock=clock, hashing=hashing)

    def says() -> str:
        try:
            return str(verifier.verify("web-bot", secret).state)
        except VerificationFailed:
            return "refused"
        except StoreUnavailable:
            return "unavailable"

    assert says() == "current"
    before = len(store.audit_entries())
    with psycopg.connect(rights.url("keyturn")) as other:
        stuck(other)
        began = time.monotonic()
        assert says() == verified
        with pytest.raises(StoreUnavailable):
            store.amend("cred-web-bot", lambda case: (case, [entry("meanwhile")]))
        assert time.monotonic() - began < LEASE / 2
        (tmp_path / "revoked.d").mkdir()
        Spool(tmp_path / "revoked.d").revoke(version_id, {})
        assert says() == "refused"
        other.rollback()
        other.execute("DROP TRIGGER IF EXISTS slow ON audit")
        other.commit()
    assert len(store.audit_entries()) == before
    store.append_audit(entry("afterwards"))
    verifier.close()


@pytest.mark.usefixtures("impatient")
def test_a_transaction_of_ours_that_is_stuck_is_ended_by_the_server(rights: LeastRights) -> None:
    """A daemon that was stopped in the middle keeps its locks for as long as the limit, no longer."""
    store = rights.open(DAEMON)
    put(store, "web-bot", seed=1)

    def paused(connection: Any) -> None:
        connection.exec_driver_sql("SELECT uid FROM credentials FOR UPDATE").all()
        with psycopg.connect(rights.url("keyturn"), autocommit=True) as other:
            other.execute(
                "UPDATE credentials SET wake_at = 1"
            )  # waits until the server has ended it
        connection.exec_driver_sql("SELECT 1")

    with pytest.raises(StoreUnavailable):
        store.database.write(paused)
    store.append_audit(entry("afterwards"))
