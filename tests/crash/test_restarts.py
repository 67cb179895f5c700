"""The daemon is killed by SIGKILL again and again under a supervisor, while agents go on working."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support.running import Keyturn, accepts
from support.supervised import Supervised
from support.workloads import Workload

AGENTS = 10
READY_WITHIN = 2.0  # seconds from a start to READY, on a processor of its own
SEED = int(os.environ.get("KEYTURN_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)
POLICY = {"every": "3s", "grace": "6s", "consumer_cache": "2s", "jitter": "30%"}


def compiled(keyturn: Keyturn) -> dict[str, str]:
    """Return the environment with a place for compiled modules, which an installation always has."""
    environ = {**keyturn.environ, "PYTHONPYCACHEPREFIX": str(keyturn.folder / "compiled")}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    return environ


def promoted(store: Path) -> int:
    """Return how many rotations have promoted a version."""
    with sqlite3.connect(store, timeout=10) as connection:
        query = "SELECT count(*) FROM rotations WHERE state='done'"
        found: int = connection.execute(query).fetchone()[0]
    connection.close()
    return found


def kill_and_look(folder: Path, *, kills: int) -> None:
    """Kill so often; each time it is ready again in time, and in the end nothing is lost."""
    folder.chmod(0o700)
    keyturn, chance = Keyturn(folder, agents=AGENTS, policy=POLICY), random.Random(SEED)
    keyturn.environ = compiled(keyturn)

    def read(agent: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((folder / "agents" / f"{agent}.json").read_text())
        except FileNotFoundError:
            return None
        return found

    with Supervised(
        [sys.executable, "-m", "keyturn", "run", "-c", str(keyturn.config)],
        environ=keyturn.environ,
        log=keyturn.log,
        address=f"@keyturn-kills-{os.getpid()}",
    ) as one:
        one.wait_ready()
        keyturn.wait_first()
        verifier = keyturn.verifier()
        names = list(keyturn.content["agents"])
        workers = [
            Workload(name, read, verifier, cache=2, pause=0.2, seed=chance.randrange(1 << 30))
            for name in names
        ]
        for worker in workers:
            worker.start()
        for number in range(kills):
            time.sleep(chance.uniform(0, 0.5))
            one.process.kill()
            one.wait_ready(number + 2)
        before = promoted(keyturn.store)
        keyturn.wait_for(lambda: promoted(keyturn.store) >= before + AGENTS, seconds=60)
        for worker in workers:
            worker.end()
        for worker in workers:
            worker.join(10)
        assert keyturn.ask("audit", "--verify")[1]["chain"]["ok"] is True
        assert [accepts(verifier, keyturn.held(name)) for name in names] == [True] * AGENTS
        verifier.close()
        assert one.stop() == 0
    with sqlite3.connect(keyturn.store) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    connection.close()
    restarts = one.took[1:]
    own, wall = [took.own for took in restarts], [took.wall for took in restarts]
    print(
        f"seed {SEED}: {kills} kills; ready again after"
        f" {statistics.median(own):.2f} s (worst {max(own):.2f}) on a processor of its own,"
        f" by the wall {statistics.median(wall):.2f} s (worst {max(wall):.2f});"
        f" {sum(worker.counts['accepted'] for worker in workers)} authentications"
    )
    assert [worker.refusals for worker in workers if worker.refusals] == []
    assert sum(worker.counts["accepted"] for worker in workers) > AGENTS * kills
    assert one.starts == kills + 1
    assert max(own) <= READY_WITHIN


def test_ten_kills_and_it_is_back_each_time(tmp_path: Path) -> None:
    """Killed ten times, it is ready within two seconds each time, and nothing is lost."""
    kill_and_look(tmp_path, kills=10)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_hundred_kills_and_it_is_back_each_time(tmp_path: Path) -> None:
    """The same a hundred times."""
    kill_and_look(tmp_path, kills=100)
