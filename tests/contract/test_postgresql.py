"""What only PostgreSQL can do to a store and to a verifier: cut, hang, and have a time of its own."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from keyturn.core.model import VersionState
from keyturn.core.secret import mint
from keyturn.errors import StorageError, StoreUnavailable, VerificationFailed
from keyturn.storage import decisions
from keyturn.storage.decisions import DecisionReader
from keyturn.storage.engine import PREPARE_AFTER, Database
from keyturn.storage.postgresql import postgresql_arguments
from keyturn.storage.store import Store
from keyturn.testing.certificates import new_authority
from keyturn.testing.fakes import FakeClock, seeded
from keyturn.verifier.decision import Verifier
from keyturn.verifier.hashing import CHEAP_FOR_TESTS, Hashing, tag
from support.postgres import Cluster, postgres  # noqa: F401 - a fixture
from support.stores import Place, add, entry, version

_OTHERS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


@pytest.fixture
def place(postgres: Cluster, tmp_path: Path) -> Iterator[Place]:  # noqa: F811
    """Give an empty database."""
    place = Place(postgres.new_database(), tmp_path)
    yield place
    place.close()


def cut(place: Place) -> None:
    """End every connection to the database, as a restart or a failover does."""
    with psycopg.connect(place.url, autocommit=True) as connection:
        connection.execute(_OTHERS)


def fill_pool(database: Database, number: int) -> None:
    """Leave so many connections idle in the pool."""
    together = threading.Barrier(number)
    with ThreadPoolExecutor(number) as pool:
        waits = [pool.submit(database.read, lambda _: together.wait(10)) for _ in range(number)]
        for one in waits:
            one.result()


@pytest.mark.parametrize(
    "ask",
    [
        lambda store: store.epoch,
        lambda store: store.append_audit(entry("after the cut")),
        lambda store: store.agents(),
    ],
    ids=["read", "write", "list"],
)
def test_a_cut_connection_costs_a_repeat(place: Place, ask: Callable[[Store], Any]) -> None:
    """The server restarted while connections lay idle: the next call works, whichever it gets."""
    store = place.open()
    fill_pool(store.database, 8)
    for _ in range(3):
        cut(place)
        ask(store)


def test_a_server_that_is_away_is_an_error_of_ours(place: Place) -> None:
    """No error of the driver gets out, whatever is asked and whenever the connection is cut."""
    store = place.open()

    def cut_inside(connection: Any) -> None:
        pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
        with psycopg.connect(place.url, autocommit=True) as other:
            other.execute("SELECT pg_terminate_backend(%s)", (pid,))
        connection.exec_driver_sql("SELECT 1")

    for run in (store.database.read, store.database.write):
        with pytest.raises(StoreUnavailable):
            run(cut_inside)
    for name in ("a\0", "\ud800"):
        with pytest.raises(StorageError):
            store.agent(name)
    assert store.agents() == []


def test_the_server_keeps_the_plans_of_a_direct_connection(place: Place) -> None:
    """Without a pooler in between, what is asked again and again is planned once."""
    store = place.open()
    for _ in range(PREPARE_AFTER + 2):
        kept = store.database.read(_plans)
    assert kept > 0


def _plans(connection: Any) -> int:
    found: int = connection.exec_driver_sql(
        "SELECT count(*) FROM pg_prepared_statements"
    ).scalar_one()
    return found


# --- the verifier -------------------------------------------------------------------------


class Scene:
    """A store with one good secret, and a verifier whose own clock a test turns."""

    def __init__(self, place: Place) -> None:
        self.store = place.open()
        self.clock = FakeClock(self.store.now())
        hashing = Hashing(cost=CHEAP_FOR_TESTS)
        self.verifier = Verifier.open(
            place.url, state_dir=place.state_dir, clock=self.clock, hashing=hashing
        )
        self.version_id, self.secret = mint(random_bytes=seeded(7))
        self.uid = add(self.store)
        self.known = version(
            self.uid,
            login="a",
            id=self.version_id,
            state=VersionState.CURRENT,
            digest=hashing.digest(self.secret),
            tag=tag(self.version_id, self.secret),
        )
        self.save(self.known)

    def save(self, *versions: Any) -> None:
        """Store these versions and no others."""
        self.store.amend(self.uid, lambda case: (replace(case, versions=versions), [entry()]))

    def says(self) -> str:
        """Return what the verifier answers."""
        try:
            return str(self.verifier.verify("a", self.secret).state)
        except VerificationFailed:
            return "refused"
        except StoreUnavailable:
            return "unavailable"


@pytest.fixture
def scene(place: Place) -> Iterator[Scene]:
    """Give a scene."""
    one = Scene(place)
    yield one
    one.verifier.close()


@pytest.mark.parametrize("off", [-60, -30, 0, 30, 60])
def test_a_deadline_is_judged_by_the_databases_time(scene: Scene, off: int) -> None:
    """However far this host's clock is off, nobody is refused early and nobody accepted late."""
    scene.clock.jump(timedelta(minutes=off))
    previous = replace(scene.known, state=VersionState.PREVIOUS)
    scene.save(replace(previous, deadline=scene.store.now() + timedelta(minutes=10)))
    assert scene.says() == "previous"
    soon = scene.store.now() + timedelta(milliseconds=300)
    scene.save(replace(previous, deadline=soon))
    assert scene.says() == "previous"
    while scene.store.now() < soon:
        time.sleep(0.02)
    assert scene.says() == "refused"


def test_a_locked_table_is_no_answer_for_a_moment_only(scene: Scene, place: Place) -> None:
    """Under a lock nobody can tell, and says so long before a lease ends; then all is well again."""
    assert scene.says() == "current"
    with psycopg.connect(place.url) as lock:
        lock.execute("LOCK TABLE versions IN ACCESS EXCLUSIVE MODE")
        began = time.monotonic()
        with ThreadPoolExecutor(20) as pool:
            answers = set(pool.map(lambda _: scene.says(), range(20)))
        took = time.monotonic() - began
        lock.rollback()
    assert answers == {"unavailable"}
    assert took < 2 * decisions.STATEMENT_MS / 1000
    assert scene.says() == "current"


def test_one_look_up_that_hangs_holds_up_no_other(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look-up has a connection of its own: one that waits leaves the others to the rest."""
    inside, go = threading.Event(), threading.Event()
    monkeypatch.setattr(decisions._PostgresSource, "_run", _held_up(inside, go))
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(scene.verifier._reader.lookup, "slow")
        inside.wait(10)
        assert [scene.says() for _ in range(20)] == ["current"] * 20
        go.set()
        assert hanging.result() is None


def _held_up(inside: threading.Event, go: threading.Event) -> Callable[..., Any]:
    run = decisions._PostgresSource._run

    def held_up(self: Any, query: str, value: str, login: str) -> Any:
        if value == "slow":
            inside.set()
            go.wait(10)
        return run(self, query, value, login)

    return held_up


def test_a_reader_survives_a_restart_and_keeps_nothing_in_the_session(place: Place) -> None:
    """A cut costs a verifier nothing; its timeouts are gone with its transaction (poolers)."""
    place.open()
    reader = DecisionReader.open(place.url)
    assert reader.lookup("x") is None
    cut(place)
    assert reader.lookup("x") is None
    assert reader.imported("o'neill\\") == []
    (source,) = reader._idle
    connection = source._connection  # type: ignore[attr-defined]
    assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    assert connection.execute("SHOW statement_timeout").fetchone() == ("0",)
    reader.close()


# --- what libpq would find by itself --------------------------------------------------------


def test_nothing_is_taken_from_anybodys_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whom to trust is what the URL names or the system does, whatever lies in the home."""
    authority = new_authority(tmp_path / "ca")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".postgresql").mkdir()
    (tmp_path / ".postgresql" / "root.crt").write_bytes(authority.ca_file.read_bytes())
    (tmp_path / ".postgresql" / "postgresql.crt").write_text("no certificate at all")
    with tls_front(*authority.issue("db")) as port:
        for more, expected in (
            ("", "certificate verify failed"),
            ("&sslrootcert=/nowhere/ca.pem", 'root certificate file "/nowhere/ca.pem"'),
            (f"&sslrootcert={authority.ca_file}", "unexpected eof"),
        ):
            url = f"postgresql://k@localhost:{port}/k?sslmode=verify-full{more}"
            with pytest.raises(psycopg.OperationalError, match=expected):
                psycopg.connect(url, **postgresql_arguments(url, None))


@contextmanager
def tls_front(certificate: Path, key: Path) -> Iterator[int]:
    """Give a port that begins TLS as PostgreSQL does, and then says no more."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection = server.accept()[0]
                connection.recv(8)
                connection.sendall(b"S")
                with suppress(OSError), context.wrap_socket(connection, server_side=True) as inside:
                    inside.recv(4096)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
