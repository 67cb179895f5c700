"""The daemon with least rights, through a real PgBouncer in transaction mode, in bad weather."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from keyturn.storage.roles import DAEMON, VERIFIER
from keyturn.verifier.decision import Verifier
from keyturn.wiring import SystemClock
from support.least_rights import LeastRights, as_role, least_rights
from support.pgbouncer import PgBouncer
from support.postgres import Cluster, postgres  # noqa: F401 - a fixture
from support.running import Keyturn, accepts

READERS = {"web": ["agent-0", "agent-1"]}
# A server that asks for a repeat of every tenth transaction, at its commit.
_WEATHER = """
CREATE SEQUENCE asked_to_repeat;
CREATE FUNCTION weather() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN
  IF random() < 0.1 THEN
    PERFORM nextval('public.asked_to_repeat');
    RAISE EXCEPTION 'weather' USING ERRCODE = 'serialization_failure';
  END IF;
  RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER weather AFTER INSERT OR UPDATE ON credentials
  DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION weather();
"""


class Pooled:
    """A daemon behind a pooler, and what others see of the same store."""

    def __init__(
        self, cluster: Cluster, pooler: PgBouncer, rights: LeastRights, folder: Path
    ) -> None:
        self.cluster, self.pooler, self.rights = cluster, pooler, rights
        self.keyturn = Keyturn(folder, agents=3)
        self.keyturn.content["store"] = {
            "url": self.url(DAEMON),
            "state_dir": str(folder / "state"),
            "readers": {name: {"agents": agents} for name, agents in READERS.items()},
        }
        self.keyturn.write()

    def url(self, role: str) -> str:
        """Return the URL of a role through the pooler."""
        return self.pooler.url(as_role(self.rights.place.url, role))

    def verifier(self) -> Verifier:
        """Open a verifier with the rights of one."""
        folder = self.keyturn.folder / "state"
        return Verifier.open(self.url(VERIFIER), state_dir=folder, clock=SystemClock())

    def ask(self, query: str) -> Any:
        """Ask the database as its administrator."""
        with self.rights.connect() as connection:
            return connection.execute(query.encode()).fetchall()


@pytest.fixture
def pooled(postgres: Cluster, tmp_path: Path) -> Iterator[Pooled]:  # noqa: F811
    """Give a daemon that is not started yet."""
    pooler = PgBouncer(postgres, users=("keyturn", DAEMON, VERIFIER))
    try:
        with least_rights(postgres, tmp_path / "migrator", READERS) as rights:
            one = Pooled(postgres, pooler, rights, tmp_path)
            yield one
            one.keyturn.stop()
    finally:
        pooler.remove()


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.full)])
def test_sagas_run_whole_while_every_tenth_commit_must_be_repeated(
    pooled: Pooled, rounds: int
) -> None:
    """No rotation is lost or done twice, the audit is whole, and the agents' secrets are accepted."""
    with pooled.rights.connect() as admin:
        admin.execute(_WEATHER)
    keyturn, agents = pooled.keyturn, ["agent-0", "agent-1", "agent-2"]
    keyturn.start()
    keyturn.wait_first()
    verifier = pooled.verifier()
    for _ in range(rounds):
        code, said = keyturn.ask("rotate", *agents, "--wait")
        assert code == 0, said
        assert all(accepts(verifier, keyturn.held(agent)) for agent in agents)
    verifier.close()
    (repeated,) = pooled.ask(
        "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM asked_to_repeat"
    )
    promoted = "SELECT agent, count(*) FROM audit WHERE action = 'version.promoted' GROUP BY agent"
    minted = "SELECT login, count(*), max(seq) FROM versions GROUP BY login"
    assert {count for _, count in pooled.ask(promoted)} == {rounds + 1}
    assert {(count, seq) for _, count, seq in pooled.ask(minted)} == {(rounds + 1, rounds + 1)}
    code, said = keyturn.ask("audit", "--verify")
    assert code == 0, said
    print(f"{repeated[0]} transactions repeated over {3 * (rounds + 1)} rotations")


@pytest.mark.full
def test_pooler_and_server_may_restart_under_a_daemon(pooled: Pooled) -> None:
    """Nobody is refused meanwhile, a revoke holds on this host at once, and all goes on by itself."""
    keyturn, pooler, cluster = pooled.keyturn, pooled.pooler, pooled.cluster
    keyturn.start()
    keyturn.wait_first()
    assert keyturn.process is not None
    pid = keyturn.process.pid
    verifier = pooled.verifier()
    restarts: list[tuple[str, Callable[[], None], Callable[[], None]]] = [
        ("agent-0", pooler.stop, pooler.start),
        ("agent-1", lambda: cluster.stop(signal.SIGQUIT), cluster.start),
    ]
    for agent, end, begin in restarts:
        held, other = keyturn.held(agent), keyturn.held("agent-2")
        assert accepts(verifier, held)
        end()
        assert accepts(verifier, other) is None
        code, _ = keyturn.ask("revoke", agent)
        assert code == 75
        assert accepts(verifier, held) is False  # by the spool, which needs no store
        begin()
        keyturn.wait_for(lambda held=other: accepts(verifier, held) is True)  # type: ignore[misc]
        query = f"SELECT count(*) FROM versions WHERE login = '{agent}' AND state <> 'revoked'"
        keyturn.wait_for(lambda query=query: pooled.ask(query) == [(0,)])  # type: ignore[misc]
        code, said = keyturn.ask("rotate", "agent-2", "--wait")
        assert code == 0, said
    assert accepts(verifier, keyturn.held("agent-2"))
    assert keyturn.process.pid == pid
    assert keyturn.process.poll() is None
    verifier.close()
    with psycopg.connect(pooled.rights.url("keyturn_reader_web")) as reader:
        seen = reader.execute("SELECT agent FROM web").fetchall()
        assert seen == []  # both are revoked
