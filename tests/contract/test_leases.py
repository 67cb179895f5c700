"""The lease of a verifier on a real PostgreSQL: what its row says when, and what a bad network does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy.engine import make_url

from keyturn.errors import StoreUnavailable, VerifierStale
from keyturn.storage.decisions import DecisionReader
from keyturn.storage.freshness import Epoch
from keyturn.storage.leases import Leased, Leasing, PostgresLink, boottime
from keyturn.storage.roles import VERIFIER
from keyturn.storage.store import Store
from keyturn.storage.verifiers import RegisteredVerifier, registered
from keyturn.verifier.decision import Verifier
from keyturn.verifier.registered import Registered
from support.leased import Proxy
from support.least_rights import as_role, least_rights
from support.pgbouncer import PgBouncer, pgbouncer  # noqa: F401 - a fixture
from support.postgres import Cluster, Standby, binaries, postgres  # noqa: F401 - a fixture
from support.stores import Place, RealClock, add

LEASE = timedelta(seconds=2)


def leasing(number: int = 1, **more: Any) -> Leasing:
    """Return how a test's verifier registers."""
    values = {"lease": LEASE, "poll": timedelta(milliseconds=50), **more}
    return Leasing(id=f"{number:032x}", host=f"host{number}", release="1", **values)


@pytest.fixture
def place(postgres: Cluster, tmp_path: Path) -> Iterator[Place]:  # noqa: F811
    """Give an empty store on PostgreSQL."""
    found = Place(postgres.new_database(), tmp_path)
    yield found
    found.close()


def rows(store: Store) -> tuple[RegisteredVerifier, ...]:
    """Return the verifiers that are registered."""
    return store.database.read(registered).rows


def bump(url: str) -> None:
    """Move the epoch on, as every cut does."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("UPDATE meta SET epoch = epoch + 1")


def until(condition: Callable[[], object]) -> None:
    """Wait for a condition."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_it_acknowledges_in_a_later_poll_and_at_once(place: Place) -> None:
    """By hand: the row has the epoch of the poll before, never that of the answer on its way."""
    store = place.open()
    lease = Leased(leasing(), PostgresLink(place.url, leasing()))
    assert lease.poll()
    assert lease.epoch() == Epoch(1, 0)
    assert (rows(store)[0].incarnation, rows(store)[0].epoch) == (0, 0)
    bump(place.url)
    assert lease.poll()
    assert (rows(store)[0].incarnation, rows(store)[0].epoch) == (1, 0)
    assert lease.epoch() == Epoch(1, 1)
    assert not lease.poll()
    assert rows(store)[0].acknowledged == Epoch(1, 1)
    lease.close()
    assert rows(store) == ()


def test_an_acknowledgement_does_not_wait_for_the_next_poll(place: Place) -> None:
    """With polls an hour apart, what the first poll brought is acknowledged within the second."""
    store = place.open()
    bump(place.url)
    lease = Leased.open(place.url, leasing(poll=timedelta(hours=1)))
    until(lambda: rows(store) and rows(store)[0].acknowledged == Epoch(1, 1))
    lease.close()


def test_one_that_was_taken_away_comes_back(place: Place) -> None:
    """Whoever thought it dead deletes its row; it registers again and is waited for again."""
    store = place.open()
    lease = Leased.open(place.url, leasing())
    assert lease.wait(20)
    with psycopg.connect(place.url, autocommit=True) as connection:
        connection.execute("DELETE FROM verifiers")
    until(lambda: rows(store))
    bump(place.url)
    waiting = Registered(lambda: store.database)
    until(lambda: waiting.standing(1).acknowledged)
    lease.close()


def test_a_lease_goes_through_a_pooler(place: Place, pgbouncer: PgBouncer) -> None:  # noqa: F811
    """PgBouncer in transaction mode: each request is one message, and nothing lives in a session."""
    store = place.open()
    lease = Leased.open(pgbouncer.url(place.url), leasing())
    assert lease.wait(20)
    bump(place.url)
    until(lambda: lease.epoch() == Epoch(1, 1))
    until(lambda: rows(store)[0].acknowledged == Epoch(1, 1))
    lease.close()
    assert rows(store) == ()


def test_the_stores_time_is_learned(place: Place) -> None:
    """It is a little less than the database's, whatever this host's wall clock says."""
    place.open()
    lease = Leased(leasing(), PostgresLink(place.url, leasing()))
    before = datetime.now(UTC)  # the same host's
    lease.poll()
    found = lease.now()
    assert before - timedelta(seconds=1) < found <= datetime.now(UTC)
    lease.close()


def test_a_connection_that_hangs_holds_the_thread_for_a_moment_only(
    place: Place, tmp_path: Path
) -> None:
    """Nothing comes back and nothing is closed: the poll gives up, and a new connection mends it."""
    place.open()
    folder = tmp_path / "proxy"
    folder.mkdir()
    proxy = Proxy(folder, place.url)
    lease = Leased(leasing(), PostgresLink(proxy.url, leasing()))
    lease.poll()
    proxy.cut()
    began = boottime()
    with pytest.raises(StoreUnavailable, match="did not answer in time"):
        lease.poll()
    assert boottime() - began < LEASE.total_seconds() / 2
    proxy.mend()
    lease.poll()
    assert lease.staleness() < LEASE.total_seconds()
    lease.close()
    proxy.close()


def test_a_row_that_somebody_locks_makes_it_stale_and_not_stuck(place: Place) -> None:
    """A lock on its row is waited for less than a lease; then it says 503 until the lock is gone."""
    place.open()
    lease = Leased.open(place.url, leasing(lease=timedelta(seconds=1)))
    assert lease.wait(20)

    def stale() -> bool:
        try:
            lease.epoch()
        except VerifierStale:
            return True
        return False

    with psycopg.connect(place.url) as locking:
        locking.execute("SELECT * FROM verifiers FOR UPDATE")
        until(stale)
        until(lambda: lease.trouble)
    until(lambda: not stale())
    lease.close()


@pytest.mark.full
def test_a_standby_gives_no_lease_and_no_answer(
    postgres: Cluster,  # noqa: F811
    place: Place,
    tmp_path: Path,
) -> None:
    """A hot standby may lack what was committed: stale, and 503 to each look-up, until it is promoted."""
    store = place.open()
    add(store)
    folder = binaries()
    assert folder is not None
    standby = Standby(folder, postgres)
    try:
        url = standby.url(str(make_url(place.url).database))
        lease = Leased(leasing(), PostgresLink(url, leasing()))
        reader = DecisionReader.open(url)
        with pytest.raises(StoreUnavailable):
            lease.poll()
        with pytest.raises(StoreUnavailable, match="no primary"):
            reader.lookup("unknown0000000")
        with pytest.raises(VerifierStale):
            lease.epoch()
        standby.promote()
        lease.poll()
        assert lease.epoch() == Epoch(1, 0)
        assert reader.lookup("unknown0000000") is None
        reader.close()
        lease.close()
    finally:
        standby.remove()


def test_without_a_lease_nothing_is_registered(place: Place, tmp_path: Path) -> None:
    """A command that verifies once leaves no row, reads the store each time and remembers nothing."""
    store = place.open()
    add(store)
    verifier = Verifier.open(place.url, state_dir=tmp_path, clock=RealClock())
    assert verifier.look().epoch is None
    assert rows(store) == ()
    verifier.close()


def test_a_verifier_changes_its_own_rows_only(postgres: Cluster, tmp_path: Path) -> None:  # noqa: F811
    """Two logins: neither acknowledges for the other nor ends it, and neither prolongs its own lease."""
    with least_rights(postgres, tmp_path) as rights:
        with rights.connect() as admin:
            admin.execute("DROP ROLE IF EXISTS verifier_a")
            admin.execute(f"CREATE ROLE verifier_a LOGIN IN ROLE {VERIFIER}".encode())
        store = rights.open()
        mine = Leased(leasing(1), PostgresLink(as_role(rights.place.url, "verifier_a"), leasing(1)))
        other = Leased(leasing(2), PostgresLink(rights.url(VERIFIER), leasing(2)))
        mine.poll()
        other.poll()
        assert [row.login for row in rows(store)] == ["verifier_a", VERIFIER]
        with rights.connect(VERIFIER) as attacker:
            for statement in (
                "UPDATE verifiers SET epoch = 99 WHERE id LIKE '%1'",
                "DELETE FROM verifiers WHERE id LIKE '%1'",
            ):
                assert attacker.execute(statement.encode()).rowcount == 0
            assert attacker.execute("UPDATE verifiers SET epoch = 0").rowcount == 1
        waiting = Registered(lambda: store.database)
        assert waiting.keep() == 2
        mine.close()
        other.close()
        assert rows(store) == ()
        with rights.connect() as admin:
            admin.execute("DROP ROLE verifier_a")


def test_the_daemon_takes_a_dead_row_away_with_its_own_rights(
    postgres: Cluster,  # noqa: F811
    tmp_path: Path,
) -> None:
    """It may read and delete, and it does once the row stood still for a lease and a fifth."""
    at = [1000.0]
    with least_rights(postgres, tmp_path) as rights:
        store = rights.open()
        lease = Leased(leasing(), PostgresLink(rights.url(VERIFIER), leasing()))
        lease.poll()
        waiting = Registered(lambda: store.database, clock=lambda: at[0])
        assert not waiting.standing(1).settled
        at[0] += 2.5
        assert waiting.standing(1).settled
        assert rows(store) == ()
        lease.close()
