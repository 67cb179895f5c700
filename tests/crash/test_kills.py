"""The daemon is killed before and after its effects, and at random, while agents go on working."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from keyturn.cli.client import AdminClient
from keyturn.core.secret import Secret
from keyturn.errors import KeyturnError, StoreUnavailable, VerificationFailed
from keyturn.testing.places import KINDS, Place, Read, daemon, place
from keyturn.verifier.decision import Verifier
from keyturn.wiring import SystemClock
from support.recording_proxy import recording_proxy
from support.weather import Weather
from support.workloads import Workload

AGENTS = 20
CACHE = 2.0
DEADLINE = 2.0
SEED = int(os.environ.get("KEYTURN_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)
TESTS = Path(__file__).parents[1]
# Where agent n reads, by turns: most in one place, some in all of them.
LAYOUTS = {
    "file and vault": [("file",), ("vault",), ("file",), ("file", "vault")],
    "everywhere": [("aws",), ("azure",), ("file", "vault"), ("aws", "azure"), KINDS],
}


def write_config(
    folder: Path, places: Mapping[str, Place], layout: Sequence[tuple[str, ...]]
) -> Path:
    """Give each agent its places."""
    content = {
        "version": 1,
        "store": {"url": f"sqlite:///{folder / 'state' / 'keyturn.db'}"},
        "admin": {"socket": str(folder / "run" / "admin.sock")},
        "connections": {
            kind: {**one.connection, "call_deadline": f"{DEADLINE:.0f}s"}
            for kind, one in places.items()
        },
        "policies": {
            "default": {
                "every": "3s",
                "grace": "6s",
                "consumer_cache": f"{CACHE:.0f}s",
                "jitter": "30%",
                "retry": {"first": "100ms", "max": "1s", "settle_after": "3s"},
            }
        },
        "agents": {
            f"agent-{n}": {
                "destinations": [{"to": to, "path": f"agent-{n}"} for to in layout[n % len(layout)]]
            }
            for n in range(AGENTS)
        },
    }
    path = folder / "keyturn.yaml"
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(content))
    return path


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
    """Destinations, agents at work, and kills."""

    def __init__(
        self, folder: Path, places: Mapping[str, Place], layout: Sequence[tuple[str, ...]]
    ) -> None:
        self.folder, self.places = folder, places
        self.config = write_config(folder, places, layout)
        self.store = folder / "state" / "keyturn.db"
        self.log = folder / "daemon.log"
        self.random = random.Random(SEED)
        self.kills = 0
        # One that reads in several places reads a different one than its neighbour does.
        self.readers: list[tuple[str, Read]] = []
        for n in range(AGENTS):
            kinds = layout[n % len(layout)]
            self.readers.append((f"agent-{n}", places[kinds[n // len(layout) % len(kinds)]].read))
        self.workloads: list[Workload] = []

    @contextmanager
    def daemon(self, *, trap: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
        """Run a daemon until the block ends; with `trap` it kills itself at that boundary."""
        names = {name: to for one in self.places.values() for name, to in one.names.items()}
        command = daemon("run", "-c", str(self.config), places=names)
        if trap is not None:
            command = daemon(
                str(self.config), str(trap), places=names, module="support.killed_daemon"
            )
        with self.log.open("ab") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=out, env={**os.environ, "PYTHONPATH": str(TESTS)}
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def settle_in(self) -> None:
        """Run until everybody has a first version."""
        with self.daemon():
            until = time.monotonic() + 90
            while any(read(agent) is None for agent, read in self.readers):
                assert time.monotonic() < until, self.log.read_text()[-2000:]
                time.sleep(0.1)

    def start(self) -> Verifier:
        """Let every agent begin to work."""
        verifier = Verifier.open(
            f"sqlite:///{self.store}", state_dir=self.store.parent, clock=SystemClock()
        )
        for agent, read in self.readers:
            one = Workload(
                agent, read, verifier, cache=CACHE, pause=0.05, seed=self.random.randrange(1 << 30)
            )
            one.start()
            self.workloads.append(one)
        return verifier

    def let_people_retry(self) -> None:
        """Do what a person does for what has stalled: nothing here needs to be mended first."""
        socket = self.folder / "run" / "admin.sock"
        with contextlib.suppress(KeyturnError):
            client = AdminClient(socket)
            for row in client.call("status", {}):
                if (row["rotation"] or {}).get("state") == "stalled":
                    client.call("rotation.retry", {"agents": [row["agent"]]})

    def kill_at_boundary(self) -> None:
        """Let a daemon run into a trap at one of the next effects."""
        trap = self.random.randrange(1, 80)
        with self.daemon(trap=trap) as process:
            self._until_dead(process)
            assert process.returncode == -signal.SIGKILL, self.log.read_text()[-3000:]
        self._after_kill()

    def kill_at_random(self) -> None:
        """Kill a daemon some time after its start."""
        with self.daemon() as process:
            time.sleep(self.random.uniform(1.2, 4.0))
            process.kill()
            process.wait()
        self._after_kill()

    def live_on(self, *, seconds: float) -> None:
        """Let a daemon live for a while."""
        with self.daemon():
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                self.let_people_retry()
                time.sleep(1)

    def _until_dead(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the trap; where weather has stalled everybody, a person lets them go on."""
        for _ in range(60):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
                return
            self.let_people_retry()

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
    for agent, read in scene.readers:
        held = read(agent)
        assert held is not None
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


def under_weather(places: Mapping[str, Place], stack: contextlib.ExitStack) -> dict[str, Place]:
    """Put bad weather between the daemon and each server; agents read past it."""
    made = dict(places)
    for kind, one in places.items():
        if kind == "file":
            continue
        door = one.door
        if door is None:
            door = stack.enter_context(recording_proxy(one.connection["address"]))
            made[kind] = replace(
                one, door=door, connection={**one.connection, "address": door.address}
            )
        door.rule = Weather(kind, seed=SEED, share=0.2, stall=DEADLINE + 0.4)
    return made


def weathers(places: Mapping[str, Place]) -> dict[str, Weather]:
    """Return the weather at each place that has one."""
    rules = {kind: one.door.rule for kind, one in places.items() if one.door is not None}
    return {kind: rule for kind, rule in rules.items() if isinstance(rule, Weather)}


def run_scene(
    folder: Path, *, kills: int, rotations: int, layout: str, weather: bool = False
) -> None:
    """Kill so often, rotate so often, and look at what everybody saw."""
    kinds = dict.fromkeys(kind for one in LAYOUTS[layout] for kind in one)
    with contextlib.ExitStack() as stack:
        places = {kind: stack.enter_context(place(kind, folder / kind)) for kind in kinds}
        if weather:
            places = under_weather(places, stack)
        scene = Scene(folder, places, LAYOUTS[layout])
        scene.settle_in()
        verifier = scene.start()
        storms = weathers(places)
        for one in storms.values():
            one.calm = False
        for number in range(kills):
            scene.kill_at_random() if number % 3 == 2 else scene.kill_at_boundary()
        if storms:
            scene.live_on(seconds=kills)
        for one in storms.values():
            one.calm = True
        with scene.daemon():
            until = time.monotonic() + 120
            while numbers(scene.store)[1] < rotations + AGENTS and time.monotonic() < until:
                scene.let_people_retry()
                time.sleep(0.2)
            time.sleep(4)
        totals = scene.end()
        wrong = accepted_everywhere(scene, verifier)
        verifier.close()
    minted, done = numbers(scene.store)
    print(f"seed {SEED}: {scene.kills} kills, {done} promoted, {minted} minted, {dict(totals)}")
    for kind, one in storms.items():
        print(f"  weather at {kind}: {dict(one.seen)}")

    assert totals["refused"] == 0, [one.refusals for one in scene.workloads if one.refusals]
    assert wrong == []
    assert done >= rotations + AGENTS
    # At most one for each rotation that a crash interrupted: a few are under way at a time.
    assert minted - done <= 2 * (scene.kills + 1)
    assert totals["accepted"] > 100
    for one in storms.values():
        assert one.seen.total() > one.seen["calm"] > 0


def test_kills_and_rotations_refuse_nobody(tmp_path: Path) -> None:
    """Ten kills at effects and at random refuse no agent and leave the store whole."""
    run_scene(tmp_path, kills=10, rotations=20, layout="file and vault")


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_hundred_kills_refuse_nobody(tmp_path: Path) -> None:
    """A hundred kills over two hundred rotations refuse no agent and leave the store whole."""
    run_scene(tmp_path, kills=100, rotations=200, layout="file and vault")


def test_kills_in_bad_weather_refuse_nobody(tmp_path: Path) -> None:
    """Files, OpenBao, AWS and Azure together, killed and in every fault: nobody is refused."""
    run_scene(tmp_path, kills=15, rotations=20, layout="everywhere", weather=True)


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_many_kills_in_bad_weather_refuse_nobody(tmp_path: Path) -> None:
    """The same with a hundred and fifty kills over two hundred rotations."""
    run_scene(tmp_path, kills=150, rotations=200, layout="everywhere", weather=True)
