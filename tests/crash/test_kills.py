"""The daemon is killed before and after its effects, and at random, while agents go on working."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from keyturn.core.secret import Secret
from keyturn.errors import StoreUnavailable, VerificationFailed
from keyturn.testing import openbao
from keyturn.verifier.decision import Verifier
from keyturn.wiring import SystemClock
from support.workloads import Workload, file_reader, vault_reader

AGENTS = 20
CACHE = 2.0
SEED = int(os.environ.get("KEYTURN_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)
TESTS = Path(__file__).parents[1]


def write_config(folder: Path, server: openbao.Server) -> Path:
    """Half of the agents read files, a quarter OpenBao, a quarter both."""
    places = [["files"], ["bao"], ["files"], ["files", "bao"]]
    content = {
        "version": 1,
        "store": {"url": f"sqlite:///{folder / 'state' / 'keyturn.db'}"},
        "admin": {"socket": str(folder / "run" / "admin.sock")},
        "connections": {
            "files": {"type": "file", "root": str(folder / "agents"), "call_deadline": "2s"},
            "bao": {
                "type": "vault",
                "address": server.address,
                "auth": {"method": "token", "token_file": str(server.token_file)},
                "prefix": "agents",
                "call_deadline": "2s",
            },
        },
        "policies": {
            "default": {
                "every": "3s",
                "grace": "6s",
                "consumer_cache": "2s",
                "jitter": "30%",
                "retry": {"first": "100ms", "max": "1s", "settle_after": "3s"},
            }
        },
        "agents": {
            f"agent-{n}": {
                "destinations": [{"to": to, "path": f"agent-{n}"} for to in places[n % 4]]
            }
            for n in range(AGENTS)
        },
    }
    path = folder / "keyturn.yaml"
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(content))
    return path


@contextmanager
def daemon(
    config: Path, log: Path, *, trap: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a daemon until the block ends; with `trap` it kills itself at that boundary."""
    command = [sys.executable, "-m", "keyturn", "run", "-c", str(config)]
    if trap is not None:
        command = [sys.executable, "-m", "support.killed_daemon", str(config), str(trap)]
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, "PYTHONPATH": str(TESTS)}
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def integrity(store: Path) -> str:
    """Ask SQLite whether the file is whole; also rolls back what a killed writer left."""
    with sqlite3.connect(store, timeout=10) as connection:
        found = connection.execute("PRAGMA integrity_check").fetchone()[0]
    connection.close()
    return str(found)


def numbers(store: Path) -> tuple[int, int]:
    """Return how many versions were minted and how many rotations promoted one."""
    with sqlite3.connect(store, timeout=10) as connection:
        minted = connection.execute("SELECT count(*) FROM versions").fetchone()[0]
        done = connection.execute("SELECT count(*) FROM rotations WHERE state='done'").fetchone()[0]
    connection.close()
    return minted, done


class Scene:
    """OpenBao, a folder, agents at work, and kills."""

    def __init__(self, folder: Path, server: openbao.Server) -> None:
        self.folder = folder
        self.config = write_config(folder, server)
        self.store = folder / "state" / "keyturn.db"
        self.log = folder / "daemon.log"
        self.random = random.Random(SEED)
        self.kills = 0
        readers = {
            "files": file_reader(folder / "agents"),
            "bao": vault_reader(server.address, server.token),
        }
        self.places = [
            (f"agent-{n}", readers["bao" if n % 4 == 1 or (n % 8 == 3) else "files"])
            for n in range(AGENTS)
        ]
        self.workloads: list[Workload] = []

    def settle_in(self) -> None:
        """Run until everybody has a first version."""
        with daemon(self.config, self.log):
            until = time.monotonic() + 60
            while any(read(agent) is None for agent, read in self.places):
                assert time.monotonic() < until, self.log.read_text()[-2000:]
                time.sleep(0.1)

    def start(self) -> Verifier:
        """Let every agent begin to work."""
        verifier = Verifier.open(
            f"sqlite:///{self.store}", state_dir=self.store.parent, clock=SystemClock()
        )
        for agent, read in self.places:
            one = Workload(
                agent, read, verifier, cache=CACHE, pause=0.05, seed=self.random.randrange(1 << 30)
            )
            one.start()
            self.workloads.append(one)
        return verifier

    def kill_at_boundary(self) -> None:
        """Let a daemon run into a trap at one of the next effects."""
        trap = self.random.randrange(1, 80)
        with daemon(self.config, self.log, trap=trap) as process:
            process.wait(60)
            assert process.returncode == -signal.SIGKILL, self.log.read_text()[-3000:]
        self._after_kill()

    def kill_at_random(self) -> None:
        """Kill a daemon some time after its start."""
        with daemon(self.config, self.log) as process:
            time.sleep(self.random.uniform(1.2, 4.0))
            process.kill()
            process.wait()
        self._after_kill()

    def _after_kill(self) -> None:
        self.kills += 1
        assert integrity(self.store) == "ok"

    def end(self) -> Counter[str]:
        """Let every agent end, and add up what they saw."""
        for one in self.workloads:
            one.end()
        for one in self.workloads:
            one.join(10)
        return sum((one.counts for one in self.workloads), Counter())


def accepted_everywhere(scene: Scene, verifier: Verifier) -> list[str]:
    """Return the agents whose destination shows something that is refused."""
    wrong = []
    for agent, read in scene.places:
        held = read(agent)
        for _ in range(20):
            try:
                verifier.verify(held["id"], Secret(held["secret"]))
            except StoreUnavailable:
                time.sleep(0.05)
                continue
            except VerificationFailed:
                wrong.append(agent)
            break
    return wrong


def run_scene(folder: Path, *, kills: int, rotations: int) -> None:
    """Kill so often, rotate so often, and look at what everybody saw."""
    with openbao.dev_server(folder / "openbao") as server:
        scene = Scene(folder, server)
        scene.settle_in()
        verifier = scene.start()
        for number in range(kills):
            scene.kill_at_random() if number % 3 == 2 else scene.kill_at_boundary()
        with daemon(scene.config, scene.log):
            until = time.monotonic() + 120
            while numbers(scene.store)[1] < rotations + AGENTS and time.monotonic() < until:
                time.sleep(0.2)
            time.sleep(4)
        totals = scene.end()
        wrong = accepted_everywhere(scene, verifier)
        verifier.close()
    minted, done = numbers(scene.store)
    print(f"seed {SEED}: {scene.kills} kills, {done} promoted, {minted} minted, {dict(totals)}")

    assert totals["refused"] == 0, [one.refusals for one in scene.workloads if one.refusals]
    assert wrong == []
    assert done >= rotations + AGENTS
    # At most one for each rotation that a crash interrupted: a few are under way at a time.
    assert minted - done <= 2 * (scene.kills + 1)
    assert totals["accepted"] > 100


def test_kills_and_rotations_refuse_nobody(tmp_path: Path) -> None:
    """Ten kills at effects and at random refuse no agent and leave the store whole."""
    run_scene(tmp_path, kills=10, rotations=20)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_hundred_kills_refuse_nobody(tmp_path: Path) -> None:
    """A hundred kills over two hundred rotations refuse no agent and leave the store whole."""
    run_scene(tmp_path, kills=100, rotations=200)
