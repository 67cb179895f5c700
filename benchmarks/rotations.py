"""Rotations per second against a real OpenBao, beside a peer that does the same by hand.

The peer makes the same requests by bare hvac, one argon2 hash under the same permits and the same
number of durable commits, in the order in which one rotation of ours was seen to make them, with
nothing in between: what Keyturn costs on top of what must be done.
Both run in turn, in one process, on one server and one disk; ratios are what counts. The goal is a
ratio of 0.8 or more.

    python benchmarks/rotations.py [--agents 96] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import hvac
import psycopg
import requests

from keyturn import rotation
from keyturn.core.model import Agent, Case, Credential, Policy, Request, Target
from keyturn.core.secret import mint
from keyturn.core.steps import Plan
from keyturn.destinations.vault import VaultDestination, VaultOptions
from keyturn.destinations.vault_auth import AuthOptions
from keyturn.storage.store import Store
from keyturn.testing import openbao
from keyturn.verifier.authority import BuiltinAuthority
from keyturn.verifier.hashing import Hashing
from keyturn.wiring import StoreClock, SystemClock
from keyturn.world import World

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

IN_FLIGHT = 16
PAUSE = 1.2  # s between rounds: the grace of the last one, so that each puts an old version away


@dataclass(slots=True)
class Steps:
    """Counts what a run did."""

    seen: Counter[str] = field(default_factory=Counter)

    def step(
        self, *, step: str, case: Case, where: str, seconds: float, code: str, detail: str
    ) -> None:
        del case, where, seconds, detail
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
    """The same work by hand, in the same order: requests, hash and commits, and nothing else."""

    def __init__(
        self,
        server: openbao.Server,
        commit: Callable[[bytes], None],
        *,
        script: Sequence[str],
        folder: Path,
    ) -> None:
        self._clients = threading.local()
        self._server = server
        self._commit = commit
        self._script = script
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
        kv, path = self._client().secrets.kv.v2, f"{self._prefix}/agent-{number}"
        version_id, secret = mint(random_bytes=secrets.token_bytes)
        newest, digest = 0, b""
        for what in self._script:
            if what == "read":
                newest = self._read(path)
            elif what == "read old":
                self._read(path, version=newest - 1)
            elif what == "hash":
                digest = self._hashing.digest(secret).encode()
            elif what == "commit":
                self._commit(digest)
            elif what == "append":
                self._append(number, digest)
            elif what == "write":
                values = {"id": "x", "secret": secret.reveal(), "version": version_id}
                kv.create_or_update_secret(path, values, cas=newest, mount_point="kv")
            elif what == "delete" and newest > 1:  # the first round, untimed, has no old one
                kv.delete_secret_versions(path, [newest - 1], mount_point="kv")

    def _read(self, path: str, version: int | None = None) -> int:
        try:
            found = self._client().secrets.kv.v2.read_secret_version(
                path, version=version, mount_point="kv", raise_on_deleted_version=True
            )
        except hvac.exceptions.InvalidPath:
            return 0
        return int(found["data"]["metadata"]["version"])

    def _append(self, number: int, line: bytes) -> None:
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


_REQUESTS = [
    ("get", re.compile(r"/v1/kv/data/[^?]+"), "read"),
    ("get", re.compile(r"/v1/kv/data/[^?]+\?version=[0-9]+"), "read old"),
    ("post", re.compile(r"/v1/kv/data/[^?]+"), "write"),
    ("post", re.compile(r"/v1/kv/delete/[^?]+"), "delete"),
]


def script_of(ours: Ours) -> list[str]:
    """Return what one rotation of many does, by looking: requests, hash, commits and appends.

    Of a steady state: the version before the last one is put away, too.
    """
    script: list[str] = []

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            script.append(name)
            return call(*args, **kwargs)

        return wrapper

    def request(session: Any, method: str, url: str, **kwargs: Any) -> Any:
        path = url.partition("//")[2].partition("/")[2]
        kinds = [k for verb, form, k in _REQUESTS if verb == method and form.fullmatch("/" + path)]
        if len(kinds) != 1:
            raise SystemExit(f"a request that the peer cannot make: {method} {path}")
        script.extend(kinds)
        return send(session, method, url, **kwargs)

    def announce(before: Case, after: Case, **kwargs: Any) -> Any:
        if any(version not in before.versions for version in after.versions):
            script.append("append")
        return ledger_announce(before, after, **kwargs)

    send, ledger_announce = requests.Session.request, ours.store.ledger.announce
    database = ours.store.database
    with ExitStack() as stack:
        for where, name, instead in (
            (database, "write", noted("commit", database.write)),
            (ours.store.ledger, "announce", announce),
            (BuiltinAuthority, "accept", noted("hash", BuiltinAuthority.accept)),
            (requests.Session, "request", request),
        ):
            stack.enter_context(mock.patch.object(where, name, instead))
        ours.one(0)
    return script


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
    rate(ours, agents)  # the second: from now on each has an old one to put away
    time.sleep(PAUSE)
    ours.prepare()
    script = script_of(ours)
    peer = Peer(server, commit, script=script, folder=folder)
    rate(peer, agents)
    pairs = []
    for _ in range(rounds):
        time.sleep(PAUSE)
        ours.steps.seen.clear()
        mine = rate(ours, agents)
        if (done := ours.steps.seen)["promote"] != agents or done["clean"] != agents:
            raise SystemExit(f"not every rotation did all of it: {dict(done)}")
        pairs.append((mine, rate(peer, agents)))
    ours.close()
    return {
        "store": name,
        "rotation": script,
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
