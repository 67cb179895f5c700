"""Rotations per second at OpenBao, AWS and Azure, each beside a peer that does the same by hand.

OpenBao is a real one; the clouds are stand-ins, in processes of their own. A peer makes the same
requests by the vendor's bare client, one argon2 hash under the same permits and the same number of
durable commits, in the order in which one rotation of ours was seen to make them, with nothing in
between: what Keyturn costs on top of what must be done.
REQUESTS and WRITES are those of a rotation that comes alone, with putting its old version away.
Both run in turn, in one process, on one server and one disk; ratios are what counts. The goal is a
ratio of 0.8 or more.

    python benchmarks/rotations.py [--dest vault|aws|azure|all] [--agents 96] [--rounds 5]
                                   [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

from keyturn import rotation
from keyturn.core.model import Agent, Case, Credential, Policy, Request, Target
from keyturn.core.steps import Plan
from keyturn.storage.store import Store
from keyturn.verifier.authority import BuiltinAuthority
from keyturn.wiring import StoreClock, SystemClock
from keyturn.world import World
from peers import IN_FLIGHT, Commit, Peer, postgres_commit, sqlite_commit
from sites import SITES, Site

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

PAUSE = 1.2  # s between rounds: the grace of the last one, so that each puts an old version away
TITLES = ("DESTINATION", "STORE", "ROTATIONS/s", "PEER/s", "RATIO", "REQUESTS", "WRITES")
FORM = "{:<13}{:<12}{:>11}{:>9}{:>7}{:>10}{:>8}"


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

    def __init__(self, url: str, folder: Path, site: Site, agents: int) -> None:
        clock = SystemClock()
        self.store = Store.open(
            url, state_dir=folder, clock=clock, random_bytes=secrets.token_bytes, writer="bench"
        )
        self.destination = site.kind(
            site.options.model_copy(update={"prefix": f"ours-{uuid.uuid4().hex[:6]}"}),
            name="there",
            store_id=self.store.store_id,
            clock=clock,
        )
        self.steps = Steps()
        policy = Policy(grace=timedelta(seconds=1), consumer_cache=timedelta(0), every=None)
        self.world = World(
            journal=self.store,
            authority=BuiltinAuthority(),
            destinations={"there": self.destination},
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
            targets=(Target(to="there", path=f"agent-{number}"),),
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


# --- measuring ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rate:
    """What a round came to; the process's own time for one rotation, in ms, depends on less."""

    per_second: float
    cpu: float


def rate(subject: Ours | Peer, agents: int) -> Rate:
    """Rotate everybody once, sixteen in flight."""
    subject.prepare()
    began, worked = time.perf_counter(), time.process_time()
    _each(subject.one, agents)
    ended, done = time.perf_counter(), time.process_time()
    return Rate(agents / (ended - began), 1000 * (done - worked) / agents)


def _each(what: Callable[[int], None], agents: int) -> None:
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        list(pool.map(what, range(agents)))


def script_of(ours: Ours, site: Site) -> list[str]:
    """Return what one rotation of many does, by looking: requests, hash, commits and appends.

    Of a steady state: the version before the last one is put away, too.
    """
    script: list[str] = []

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            script.append(name)
            return call(*args, **kwargs)

        return wrapper

    def announce(before: Case, after: Case, **kwargs: Any) -> Any:
        if any(version not in before.versions for version in after.versions):
            script.append("append")
        return ledger_announce(before, after, **kwargs)

    ledger_announce, database = ours.store.ledger.announce, ours.store.database
    with ExitStack() as stack:
        for where, name, instead in (
            (database, "write", noted("commit", database.write)),
            (ours.store.ledger, "announce", announce),
            (BuiltinAuthority, "accept", noted("hash", BuiltinAuthority.accept)),
        ):
            stack.enter_context(mock.patch.object(where, name, instead))
        stack.enter_context(site.watch(script))
        ours.one(0)
    return script


def requests_of(ours: Ours, site: Site) -> list[str]:
    """Return the requests of a rotation that comes alone, until its old version is put away.

    One that comes right after another puts that one's away, and may find less to do.
    """
    seen: list[str] = []
    ours.prepare()
    with site.watch(seen):
        ours.one(0)
        time.sleep(PAUSE)
        ours.one(0)
    return seen


def measure(
    site: Site, store: str, url: str, folder: Path, commit: Commit, *, agents: int, rounds: int
) -> dict[str, Any]:
    """Run both in turn on one store and compare pair by pair."""
    ours = Ours(url, folder, site, agents)
    rate(ours, agents)  # first versions, connections, caches
    alone = requests_of(ours, site)
    if ours.steps.seen["clean"] != 1:
        raise SystemExit(f"the old version was not put away: {dict(ours.steps.seen)}")
    rate(ours, agents)  # the second: from now on each has an old one to put away
    time.sleep(PAUSE)
    ours.prepare()
    script = script_of(ours, site)
    peer = site.peer(commit, script=script, folder=folder)
    _each(peer.begin, agents)
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
        "destination": site.name,
        "store": store,
        "rotation": script,
        "alone": alone,
        "requests": len(alone),
        "writes": sum(what in site.writes for what in alone),
        "rotations_per_second": [round(mine.per_second, 1) for mine, _ in pairs],
        "peer_per_second": [round(theirs.per_second, 1) for _, theirs in pairs],
        "ratio_median": round(_median(m.per_second / t.per_second for m, t in pairs), 3),
        "ratios": [round(mine.per_second / theirs.per_second, 3) for mine, theirs in pairs],
        "cpu_ms": round(_median(mine.cpu for mine, _ in pairs), 2),
        "peer_cpu_ms": round(_median(theirs.cpu for _, theirs in pairs), 2),
    }


def _median(numbers: Iterable[float]) -> float:
    return statistics.median(list(numbers))


@contextmanager
def stores(folder: Path, wanted: Sequence[str]) -> Iterator[list[tuple[str, str, Commit]]]:
    """Give the stores of these names with the peer's way to commit on each."""
    folder.mkdir(mode=0o700)
    found: list[tuple[str, str, Commit]] = []
    with ExitStack() as stack:
        if "SQLite" in wanted:
            commit = sqlite_commit(folder / "peer.db")
            found.append(("SQLite", f"sqlite:///{folder / 'k.db'}", commit))
        if "PostgreSQL" in wanted:
            from support.postgres import Cluster, binaries

            where = binaries()
            if where is None:
                print("PostgreSQL is not installed: not measured", file=sys.stderr)
            else:
                cluster = Cluster(where)
                stack.callback(cluster.remove)
                url = cluster.new_database()
                found.append(("PostgreSQL", url, postgres_commit(url)))
        yield found


def shown(results: Sequence[dict[str, Any]]) -> str:
    """Return the table for people."""
    lines = [FORM.format(*TITLES) + "   (medians, goal 0.8)"]
    for one in results:
        rates = (one["rotations_per_second"], one["peer_per_second"])
        mine, theirs = (f"{statistics.median(found):.1f}" for found in rates)
        ratio = f"{one['ratio_median']:.2f}"
        counts = one["requests"], one["writes"]
        lines.append(FORM.format(one["destination"], one["store"], mine, theirs, ratio, *counts))
    return "\n".join(lines)


def main() -> None:
    """Measure at every destination and print table and JSON; fail where too much is written."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--dest", choices=[*SITES, "all"], default="all")
    arguments.add_argument("--agents", type=int, default=96)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--json", type=Path)
    asked = arguments.parse_args()
    results, too_many = [], []
    size = {"agents": asked.agents, "rounds": asked.rounds}
    for kind in SITES if asked.dest == "all" else [asked.dest]:
        with (
            tempfile.TemporaryDirectory() as name,
            SITES[kind](Path(name) / kind) as site,
            stores(Path(name) / "stores", site.stores) as found,
        ):
            for store, url, commit in found:
                state = Path(name) / f"state-{store}"
                state.mkdir(mode=0o700)
                one = measure(site, store, url, state, commit, **size)
                results.append(one)
                if site.most_writes is not None and one["writes"] > site.most_writes:
                    too_many.append(f"a rotation at {site.name} makes {one['writes']} writes")
    print(shown(results))
    print(json.dumps(results, indent=2))
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=2))
    if too_many:
        raise SystemExit("; ".join(too_many))


if __name__ == "__main__":
    main()
