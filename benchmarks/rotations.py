"""Rotations per second against a real OpenBao, beside a peer that does the same by hand.

The peer makes the same requests by bare hvac, one argon2 hash under the same permits and the same
number of durable commits, with nothing in between: what Keyturn costs on top of what must be done.
Both run in turn, in one process, on one server and one disk; ratios are what counts. The goal is a
ratio of 0.8 or more.

    python benchmarks/rotations.py [--agents 96] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import secrets
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import hvac
import psycopg

from keyturn import rotation
from keyturn.core.model import Agent, Case, Credential, Policy, Request, Target
from keyturn.core.secret import mint
from keyturn.core.steps import Plan
from keyturn.destinations.vault import VaultDestination, VaultOptions
from keyturn.destinations.vault_login import AuthOptions
from keyturn.storage.store import Store
from keyturn.testing import openbao
from keyturn.verifier.authority import BuiltinAuthority
from keyturn.verifier.hashing import Hashing
from keyturn.wiring import StoreClock, SystemClock
from keyturn.world import World

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

IN_FLIGHT = 16


@dataclass(slots=True)
class Steps:
    """Counts what a run did."""

    seen: Counter[str] = field(default_factory=Counter)

    def step(self, *, step: str, case: Case, where: str, seconds: float, code: str) -> None:
        del case, where, seconds
        self.seen[step if not code else f"{step}: {code}"] += 1


class Ours:
    """Keyturn's saga, store and destination, as the daemon wires them."""

    def __init__(self, url: str, folder: Path, server: openbao.Server, agents: int) -> None:
        clock = SystemClock()
        self.store = Store.open(
            url, state_dir=folder, clock=clock, random_bytes=secrets.token_bytes, writer="bench"
        )
        options = VaultOptions(
            address=server.address,
            auth=AuthOptions(method="token", token_file=str(server.token_file)),
            prefix=f"ours-{uuid.uuid4().hex[:6]}",
            parallel=IN_FLIGHT,
        )
        self.destination = VaultDestination(
            options, name="bao", store_id=self.store.store_id, clock=clock
        )
        self.steps = Steps()
        self.commits = 0
        policy = Policy(grace=timedelta(seconds=1), consumer_cache=timedelta(0), every=None)
        self.world = World(
            journal=self.store,
            authority=BuiltinAuthority(),
            destinations={"bao": self.destination},
            plan=lambda case: Plan(
                policy=policy, traits={t.key: self.destination.traits for t in case.targets}
            ),
            schedule=lambda _case, _now: None,
            backoff=lambda _plan, _tries: timedelta(seconds=1),
            sweep_every=timedelta(hours=1),
            clock=clock if self.store.database.is_sqlite else StoreClock(self.store, clock),
            random_bytes=secrets.token_bytes,
            new_id=lambda: uuid.uuid4().hex,
            watcher=self.steps,
        )
        self.uids = [self._add(number) for number in range(agents)]

    def _add(self, number: int) -> str:
        agent = Agent(
            uid=uuid.uuid4().hex,
            name=f"agent-{number}",
            login=f"agent-{number}",
            targets=(Target(to="bao", path=f"agent-{number}"),),
        )
        credential = Credential(uid=uuid.uuid4().hex, agent_uid=agent.uid)
        identity = {t.key: self.destination.identity(t) for t in agent.targets}
        self.store.add_agent(agent, credential, identities=identity, audit=[])
        return credential.uid

    def prepare(self) -> None:
        """Ask for a rotation of everybody; not timed."""
        asked = Request()
        for uid in self.uids:
            self.store.amend(
                uid,
                lambda case: (
                    replace(case, credential=replace(case.credential, request=asked)),
                    [],
                ),
            )

    def one(self, number: int) -> None:
        """Rotate one agent."""
        rotation.run(self.world, self.uids[number], holder=f"bench-{threading.get_ident()}")

    def close(self) -> None:
        """Give everything back."""
        self.destination.close()
        self.store.close()


class Peer:
    """The same work by hand: requests, hash and commits, and nothing else."""

    def __init__(
        self,
        server: openbao.Server,
        commit: Callable[[bytes], None],
        *,
        commits: int,
        appends: int,
        folder: Path,
    ) -> None:
        self._clients = threading.local()
        self._server = server
        self._commit = commit
        self._commits, self._appends = commits, appends
        self._hashing = Hashing(gate=threading.BoundedSemaphore(1))
        self._prefix = f"peer-{uuid.uuid4().hex[:6]}"
        self._folder = folder / "peer-ledger"
        self._folder.mkdir()

    def _client(self) -> hvac.Client:
        if not hasattr(self._clients, "client"):
            self._clients.client = hvac.Client(url=self._server.address, token=self._server.token)
        found: hvac.Client = self._clients.client
        return found

    def prepare(self) -> None:
        """Nothing to prepare."""

    def one(self, number: int) -> None:
        """Rotate one agent."""
        client, path = self._client(), f"{self._prefix}/agent-{number}"
        version_id, secret = mint(random_bytes=secrets.token_bytes)
        newest = self._read(client, path)
        digest = self._hashing.digest(secret).encode()
        for _ in range(self._commits - 1):
            self._commit(digest)
        for turn in range(self._appends):
            self._append(number, digest, turn)
        self._read(client, path)
        client.secrets.kv.v2.create_or_update_secret(
            path,
            {"id": "x", "secret": secret.reveal(), "version": version_id},
            cas=newest,
            mount_point="kv",
        )
        self._read(client, path)
        self._commit(digest)

    def _read(self, client: hvac.Client, path: str) -> int:
        try:
            found = client.secrets.kv.v2.read_secret_version(
                path, mount_point="kv", raise_on_deleted_version=True
            )
        except hvac.exceptions.InvalidPath:
            return 0
        return int(found["data"]["metadata"]["version"])

    def _append(self, number: int, line: bytes, turn: int) -> None:
        del turn
        import os

        with (self._folder / f"{number}.jsonl").open("ab") as file:
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())


# --- durable commits by hand --------------------------------------------------------------


def sqlite_commit(path: Path) -> Callable[[bytes], None]:
    """Return a commit on SQLite with the pragmas of the store, one writer at a time."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode=PERSIST")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, v BLOB)")
    guard = threading.Lock()

    def commit(value: bytes) -> None:
        with guard:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT INTO t (v) VALUES (?)", (value,))
            connection.execute("COMMIT")

    return commit


def postgres_commit(url: str) -> Callable[[bytes], None]:
    """Return a commit on PostgreSQL, a connection per thread."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE peer (n BIGSERIAL PRIMARY KEY, v BYTEA)")
    local = threading.local()

    def commit(value: bytes) -> None:
        if not hasattr(local, "connection"):
            local.connection = psycopg.connect(url, autocommit=True)
        local.connection.execute("INSERT INTO peer (v) VALUES (%s)", (value,))

    return commit


# --- measuring ----------------------------------------------------------------------------


def rate(subject: Ours | Peer, agents: int) -> float:
    """Return rotations per second with sixteen in flight."""
    subject.prepare()
    began = time.perf_counter()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        list(pool.map(subject.one, range(agents)))
    return agents / (time.perf_counter() - began)


def count_writes(ours: Ours) -> tuple[int, int]:
    """Return durable commits and ledger appends of one rotation, by looking."""
    seen: Counter[str] = Counter()
    write, announce = ours.store.database.write, ours.store.ledger.announce

    def counted_write(body: Any) -> Any:
        seen["commits"] += 1
        return write(body)

    def counted_announce(before: Case, after: Case, **kwargs: Any) -> Any:
        seen["appends"] += any(v not in before.versions for v in after.versions)
        return announce(before, after, **kwargs)

    ours.prepare()
    ours.store.database.write = counted_write  # type: ignore[method-assign]
    ours.store.ledger.announce = counted_announce  # type: ignore[method-assign]
    ours.one(0)
    ours.store.database.write = write  # type: ignore[method-assign]
    ours.store.ledger.announce = announce  # type: ignore[method-assign]
    return seen["commits"], seen["appends"]


def measure(
    name: str,
    url: str,
    folder: Path,
    server: openbao.Server,
    commit: Callable[[bytes], None],
    *,
    agents: int,
    rounds: int,
) -> dict[str, Any]:
    """Run both in turn on one store and compare pair by pair."""
    ours = Ours(url, folder, server, agents)
    rate(ours, agents)  # first versions, connections, caches
    commits, appends = count_writes(ours)
    peer = Peer(server, commit, commits=commits, appends=appends, folder=folder)
    rate(peer, agents)
    pairs = []
    for _ in range(rounds):
        time.sleep(1.2)  # the grace of the last round: nobody waits for the limit of four
        ours.steps.seen.clear()
        mine = rate(ours, agents)
        if ours.steps.seen["promote"] != agents:
            raise SystemExit(f"not every rotation was promoted: {dict(ours.steps.seen)}")
        pairs.append((mine, rate(peer, agents)))
    ours.close()
    return {
        "store": name,
        "commits": commits,
        "ledger_appends": appends,
        "rotations_per_second": [round(mine, 1) for mine, _ in pairs],
        "peer_per_second": [round(theirs, 1) for _, theirs in pairs],
        "ratio_median": round(statistics.median(mine / theirs for mine, theirs in pairs), 3),
        "ratios": [round(mine / theirs, 3) for mine, theirs in pairs],
    }


@contextmanager
def stores(folder: Path) -> Iterator[list[tuple[str, str, Callable[[bytes], None]]]]:
    """Give both stores with the peer's way to commit on each."""
    from support.postgres import Cluster, binaries

    sqlite = folder / "sqlite"
    sqlite.mkdir(mode=0o700)
    found: list[tuple[str, str, Callable[[bytes], None]]] = [
        ("SQLite", f"sqlite:///{sqlite / 'k.db'}", sqlite_commit(sqlite / "peer.db"))
    ]
    with ExitStack() as stack:
        where = binaries()
        if where is None:
            print("PostgreSQL is not installed: not measured", file=sys.stderr)
        else:
            cluster = Cluster(where)
            stack.callback(cluster.remove)
            url = cluster.new_database()
            found.append(("PostgreSQL", url, postgres_commit(url)))
        yield found


def main() -> None:
    """Measure on every store and print table and JSON."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--agents", type=int, default=96)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--json", type=Path)
    asked = arguments.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with openbao.dev_server(folder / "bao") as server, stores(folder) as found:
            for number, (store, url, commit) in enumerate(found):
                state = folder / f"state-{number}"
                state.mkdir(mode=0o700)
                results.append(
                    measure(
                        store, url, state, server, commit, agents=asked.agents, rounds=asked.rounds
                    )
                )
    print(f"{'STORE':<12}{'ROTATIONS/s':>12}{'PEER/s':>10}{'RATIO':>8}   (medians, goal 0.8)")
    for one in results:
        mine = statistics.median(one["rotations_per_second"])
        theirs = statistics.median(one["peer_per_second"])
        print(f"{one['store']:<12}{mine:>12.1f}{theirs:>10.1f}{one['ratio_median']:>8.2f}")
    print(json.dumps(results, indent=2))
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
