"""Four verifiers on PostgreSQL that remember: no yes to a verification that starts after a cut returned.

Each has a state folder of its own, as on another host: it learns of a revoke from its polls alone.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from keyturn.core.secret import mint
from keyturn.storage.store import Store
from keyturn.verifier.authority import BuiltinAuthority
from keyturn.verifier.hashing import CHEAP_FOR_TESTS, Hashing, tag
from keyturn.verifier.registered import Registered
from support.cutter import administration, cut
from support.leased import Process, Proxy
from support.postgres import Cluster, postgres  # noqa: F401 - a fixture
from support.stores import Place, add

SEED = int(os.environ.get("KEYTURN_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)
LEASE, POLL = 1.0, 0.25
LONGEST = LEASE * 1.2  # what a cut waits for one that does not answer, and not longer
LONG = 20.0  # a lease that nobody waits for
SLACK = 1.0  # for a busy machine
AGENT = "a"
_INSERT = (
    "INSERT INTO versions (id, login, credential_uid, seq, state, scheme, digest, tag, origin, exposed,"
    " fence, minted_at) VALUES (%s, 'a', 'cred-a', %s, 'kept', 'argon2id', %s, %s, 'minted', TRUE, 1, %s)"
)


class Fleet:
    """A store, whoever cuts, and verifiers in processes of their own."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.random = random.Random(SEED)
        self.hashing = Hashing(cost=CHEAP_FOR_TESTS)
        self.place = Place(url, folder)
        self.store: Store = self.place.open()
        add(self.store, AGENT)
        registered = Registered(lambda: self.store.database)
        self.verbs = administration(
            folder, self.store, authority=BuiltinAuthority(registered=registered)
        )
        self.raw = psycopg.connect(url, autocommit=True)
        self.processes: list[Process] = []
        self.seq = 0

    def start(self, count: int, url: str = "", *, lease: float = LEASE) -> list[Process]:
        """Start verifiers."""
        found = []
        for _ in range(count):
            state = self.folder / f"host{len(self.processes)}"
            state.mkdir()
            one = Process(url or self.url, state, lease=lease, poll=POLL)
            self.processes.append(one)
            found.append(one)
        for one in found:
            one.ready()
        return found

    def close(self) -> None:
        """End everything."""
        for one in self.processes:
            one.end()
        self.raw.close()
        self.place.close()

    def fresh(self) -> tuple[str, str]:
        """Add one more accepted version; return its id and its secret."""
        self.seq += 1
        version_id, secret = mint(random_bytes=self.random.randbytes)
        values = (
            version_id, self.seq, self.hashing.digest(secret), tag(version_id, secret),
            time.time_ns() // 1000,
        )  # fmt: skip
        self.raw.execute(_INSERT, values)
        return version_id, secret.reveal()

    def remembered(self, secret: str) -> None:
        """Have every verifier remember a yes."""
        for one in self.processes:
            said(one, secret, "yes")

    def revoke(self, version_id: str) -> tuple[float, dict[str, Any]]:
        """Revoke; return how long the call took and what it says."""
        began = time.monotonic()
        result = cut(self.verbs, "revoke", version_id)
        return time.monotonic() - began, result["verifiers"]

    def answers(self, secret: str) -> list[str]:
        """Ask every verifier, after the cut has returned."""
        for one in self.processes:
            one.tell(AGENT, secret)
        return [one.said() for one in self.processes]


def said(process: Process, secret: str, expected: str) -> None:
    """Ask until this verifier can tell, and hold it to that."""
    until = time.monotonic() + 20
    while (answer := process.ask(AGENT, secret)) == "unavailable":
        assert time.monotonic() < until
        time.sleep(0.05)
    assert answer == expected


@pytest.fixture
def fleet(postgres: Cluster, tmp_path: Path) -> Iterator[Fleet]:  # noqa: F811
    """Give an empty one."""
    with _fleet(postgres, tmp_path) as one:
        yield one


@contextmanager
def _fleet(cluster: Cluster, folder: Path) -> Iterator[Fleet]:
    one = Fleet(cluster.new_database(), folder)
    yield one
    one.close()


@pytest.mark.parametrize(
    "rounds",
    [8, pytest.param(1000, marks=[pytest.mark.full, pytest.mark.timeout(3600)])],
    ids=["some", "whole"],
)
def test_four_verifiers_know_of_a_cut_when_it_returns(fleet: Fleet, rounds: int) -> None:
    """Revocations and suspensions in turn; 4/4 have acknowledged, and none of them says yes after that."""
    fleet.start(4, lease=LONG)
    took, stale = [], 0
    for number in range(rounds):
        version_id, secret = fleet.fresh()
        fleet.remembered(secret)
        if number % 4 == 3:
            began = time.monotonic()
            verifiers = cut(fleet.verbs, "suspend", AGENT)["verifiers"]
            took.append(time.monotonic() - began)
            stale += fleet.answers(secret).count("yes")
            cut(fleet.verbs, "resume", AGENT)
            fleet.remembered(secret)
        else:
            seconds, verifiers = fleet.revoke(version_id)
            took.append(seconds)
            stale += fleet.answers(secret).count("yes")
        assert (verifiers["acknowledged"], verifiers["live"]) == (4, 4), verifiers
    took.sort()
    p50, p99 = took[len(took) // 2], took[int(len(took) * 0.99)]
    print(
        f"\n{rounds} cuts, 4 verifiers polling every {POLL * 1000:.0f} ms: {stale} stale accepts;"
        f" the call took {p50 * 1000:.0f} ms (p50), {p99 * 1000:.0f} ms (p99), {took[-1] * 1000:.0f} ms (max)"
    )
    assert stale == 0, f"seed {SEED}"
    assert took[-1] < LONG  # none was waited for by its lease


def test_one_that_is_stopped_is_waited_for_a_lease_and_says_nothing_after_it(fleet: Fleet) -> None:
    """SIGSTOP, revoke, SIGCONT with the question already there: a 503 or a no, and 3/4 are told."""
    first, *_ = fleet.start(4)
    version_id, secret = fleet.fresh()
    fleet.remembered(secret)
    first.stop()
    first.tell(AGENT, secret)
    seconds, verifiers = fleet.revoke(version_id)
    assert seconds < LONGEST + SLACK
    assert verifiers["acknowledged"] == 3
    assert verifiers["silent"][0].startswith("tests/")
    first.go_on()
    assert first.said() in ("unavailable", "no")
    assert fleet.answers(secret).count("yes") == 0
    # Its row was taken away; it comes back by itself, and is waited for again.
    _, other = fleet.fresh()
    said(first, other, "yes")
    known = fleet.raw.execute("SELECT count(*) FROM verifiers").fetchone()
    assert known == (4,)


def test_one_that_is_cut_off_is_waited_for_a_lease_and_says_503(
    fleet: Fleet, tmp_path: Path
) -> None:
    """Its connections stay open and carry nothing: stale by its own clock before the cut returns."""
    folder = tmp_path / "proxy"
    folder.mkdir()
    proxy = Proxy(folder, fleet.url)
    (alone,) = fleet.start(1, proxy.url)
    fleet.start(1)
    version_id, secret = fleet.fresh()
    fleet.remembered(secret)
    proxy.cut()
    seconds, verifiers = fleet.revoke(version_id)
    assert LEASE / 2 < seconds < LONGEST + SLACK
    assert (verifiers["acknowledged"], verifiers["live"]) == (1, 2)
    assert alone.ask(AGENT, secret) == "unavailable"
    proxy.mend()
    said(alone, secret, "no")
    proxy.close()


@pytest.mark.full  # the unit tests say the same of the row
def test_one_that_crashed_delays_one_revoke_only(fleet: Fleet) -> None:
    """Killed without a word its row stands still: it is waited for once, then it is gone."""
    first, *_ = fleet.start(2)
    version_id, secret = fleet.fresh()
    fleet.remembered(secret)
    fleet.processes.remove(first)
    first.kill()
    seconds, verifiers = fleet.revoke(version_id)
    assert seconds < LONGEST + SLACK
    assert (verifiers["acknowledged"], verifiers["live"]) == (1, 2)
    again, _ = fleet.fresh()
    seconds, verifiers = fleet.revoke(again)
    assert (verifiers["acknowledged"], verifiers["live"]) == (1, 1)
