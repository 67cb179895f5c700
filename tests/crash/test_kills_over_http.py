"""Daemon and verifier are killed while agents authenticate through nginx and HTTP.

The verifier is a unit of its own, which answers while the daemon is dead, or the daemon's child, which
dies with it.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Self

import pytest
import yaml

from crash.test_kills import AGENTS, CACHE, SEED, Scene, accepted_everywhere, numbers
from crash.test_kills import LAYOUTS as BOTH
from keyturn.testing.places import daemon, place
from keyturn.verifier.decision import Verifier
from keyturn.wiring import SystemClock
from support.asking import Asking
from support.gateway import Gateway, nginx

LAYOUTS = {**BOTH, "files": [("file",)]}


def listen(scene: Scene, socket: Path, *, embedded: bool) -> None:
    """Say in the configuration of a scene where the verifier listens, and whose it is."""
    content = yaml.safe_load(scene.config.read_text())
    content["verifier"] = {"embedded": embedded, "listen": {"socket": str(socket)}}
    scene.config.write_text(yaml.safe_dump(content))


class Unit(threading.Thread):
    """`keyturn verifier`, started again whenever it ends, until the block ends; `kill` it."""

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self._command = daemon("verifier", "-c", str(scene.config), places={})
        self._log, self._ended = scene.folder / "verifier.log", threading.Event()
        self._begin()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._ended.set()
        self.kill()
        self.join()

    def run(self) -> None:
        while True:
            self._process.wait()
            if self._ended.is_set():
                return
            self._begin()

    def kill(self) -> None:
        """End it as a crash does."""
        self._process.kill()

    def _begin(self) -> None:
        with self._log.open("ab") as out:
            self._process = subprocess.Popen(self._command, stdout=out, stderr=out)


def start(scene: Scene, gateway: Gateway) -> None:
    """Let every agent begin to work, through nginx, once somebody answers there."""
    until = time.monotonic() + 60
    while gateway.raw([])[0] != 401:
        assert time.monotonic() < until
        time.sleep(0.1)
    for agent, read in scene.readers:
        seed = scene.random.randrange(1 << 30)
        one = Asking(agent, read, gateway.connection, cache=CACHE, pause=0.05, seed=seed)
        one.start()
        scene.workloads.append(one)


def run_scene(
    folder: Path, *, kills: int, rotations: int, layout: str, embedded: bool
) -> Counter[str]:
    """Kill so often, rotate so often, and look at what everybody was told."""
    (folder / "run").mkdir(mode=0o750)
    socket = folder / "run" / "verify.sock"
    kinds = dict.fromkeys(kind for one in LAYOUTS[layout] for kind in one)
    with contextlib.ExitStack() as stack:
        places = {kind: stack.enter_context(place(kind, folder / kind)) for kind in kinds}
        scene = Scene(folder, places, LAYOUTS[layout])
        listen(scene, socket, embedded=embedded)
        scene.settle_in()
        unit = None if embedded else stack.enter_context(Unit(scene))
        gateway = stack.enter_context(nginx(folder / "nginx", verifier=socket))
        with contextlib.nullcontext() if unit else scene.daemon():
            start(scene, gateway)
        for number in range(kills):
            scene.kill_at_boundary() if number % 2 else scene.kill_at_random()
            if unit is not None and number % 5 == 0:
                unit.kill()
        with scene.daemon():
            until = time.monotonic() + 120
            while numbers(scene.store)[1] < rotations + AGENTS and time.monotonic() < until:
                scene.let_people_retry()
                time.sleep(0.2)
            time.sleep(2)
        totals = scene.end()
        verifier = Verifier.open(
            f"sqlite:///{scene.store}", state_dir=scene.store.parent, clock=SystemClock()
        )
        wrong = accepted_everywhere(scene, verifier)
        verifier.close()
    minted, done = numbers(scene.store)
    print(f"seed {SEED}: {scene.kills} kills, {done} promoted, {minted} minted, {dict(totals)}")
    assert totals["refused"] == 0, [one.refusals for one in scene.workloads if one.refusals]
    assert wrong == []
    assert done >= rotations + AGENTS
    assert totals["accepted"] > 100
    # Nothing but yes and "cannot tell": no 500, no 502, no 504 of nginx's own reaches an agent.
    assert totals.keys() <= {"accepted", "refused", "503", "cut off"}
    return totals


def test_kills_refuse_nobody_who_comes_by_nginx(tmp_path: Path) -> None:
    """A kill of the daemon and one of the verifier: agents hear yes or 503, never no."""
    run_scene(tmp_path, kills=1, rotations=4, layout="files", embedded=False)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("embedded", [False, True], ids=["unit", "child"])
def test_a_hundred_kills_refuse_nobody_who_comes_by_nginx(
    tmp_path: Path, *, embedded: bool
) -> None:
    """A hundred kills over two hundred rotations: nobody hears no."""
    layout = "file and vault"
    totals = run_scene(tmp_path, kills=100, rotations=200, layout=layout, embedded=embedded)
    assert totals["503"] > 0
