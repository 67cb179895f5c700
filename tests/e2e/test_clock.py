"""A host whose wall clock jumps while Keyturn runs, or while it is down."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.running import Keyturn

HOUR = 3600


class Host:
    """A Keyturn on a host whose clock a test turns; commands and verifiers run on it too."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "offset"
        self.turn(0)
        self.keyturn = Keyturn(folder, agents=1)
        policy = self.keyturn.content["policies"]["default"]
        policy |= {"every": "6h", "grace": "1h", "jitter": "0%"}
        self.keyturn.write()

    def turn(self, seconds: float) -> None:
        """Put the wall clock off by so much."""
        self.file.write_text(str(seconds))

    def start(self) -> None:
        """Start the daemon here."""
        keyturn = self.keyturn
        keyturn.start("support.odd_clock", str(self.file), "run", "-c", str(keyturn.config))

    def kill(self) -> None:
        """End it without a word."""
        assert self.keyturn.process is not None
        self.keyturn.signal(signal.SIGKILL)
        self.keyturn.process.wait()

    def accepts(self, held: dict[str, Any]) -> bool:
        """Ask `keyturn verify` on this host."""
        words = [str(self.file), "verify", held["id"], "-c", str(self.keyturn.config)]
        done = subprocess.run(
            [sys.executable, "-m", "support.odd_clock", *words],
            input=held["secret"],
            text=True,
            capture_output=True,
            env=dict(self.keyturn.environ),
            timeout=60,
            check=False,
        )
        assert done.returncode in (0, 4), done.stderr
        return done.returncode == 0

    def agent(self) -> dict[str, Any]:
        """Return the agent's status."""
        found: dict[str, Any] = self.keyturn.ask("status", "agent-0")[1]
        return found


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """Give a host whose agent has a current version and a previous one in its grace."""
    one = Host(tmp_path)
    one.start()
    one.keyturn.wait_first()
    assert one.keyturn.run("rotate", "agent-0", "--wait").returncode == 0
    yield one
    one.turn(0)
    one.keyturn.stop()


@pytest.mark.parametrize("jump", [24 * HOUR, -24 * HOUR])
@pytest.mark.parametrize("down", [False, True], ids=["running", "down"])
def test_a_jump_cuts_nobody_off_and_rotates_nobody(host: Host, jump: int, down: bool) -> None:
    """Until a person has looked nothing is due, nothing is let go, and the previous one is good."""
    keyturn = host.keyturn
    assert keyturn.ask("clock")[0] == 0
    before = host.agent()
    held = keyturn.held("agent-0")
    keyturn.wait_for(lambda: believed(keyturn))
    if down:
        host.kill()
    host.turn(jump)
    if down:
        host.start()
    keyturn.wait_for(lambda: keyturn.ask("clock")[0] == 75)
    found = keyturn.ask("clock")[1]

    assert abs(found["jump_seconds"] - jump) < 60
    assert "clock.jumped" in keyturn.log.read_text()
    assert host.accepts(held)
    now = host.agent()
    assert now["current"]["version"] == before["current"]["version"]
    assert [v["version"] for v in now["previous"]] == [v["version"] for v in before["previous"]]
    assert keyturn.run("rotate", "agent-0", "--wait").returncode == 0  # people may still rotate
    assert host.accepts(keyturn.held("agent-0"))
    assert host.accepts(held)  # the one that was current is in its grace now


def test_a_person_says_that_the_clock_is_right(host: Host) -> None:
    """Then what it says has passed counts: the old version ends and the next rotation is due."""
    keyturn, before = host.keyturn, host.agent()
    host.turn(24 * HOUR)
    keyturn.wait_for(lambda: keyturn.ask("clock")[0] == 75)
    code, found = keyturn.ask("clock", "--trust")

    assert (code, found["ok"]) == (0, True)
    keyturn.wait_for(lambda: host.agent()["current"]["version"] != before["current"]["version"])
    actions = [e["action"] for e in keyturn.ask("audit", "--limit", "200")[1]["entries"]]
    assert {"clock.jumped", "clock.trusted", "clock.believed"} <= set(actions)
    assert keyturn.ask("clock")[0] == 0


def test_a_clock_that_comes_back_is_believed_again(host: Host) -> None:
    """Setting it right is all that is needed."""
    keyturn = host.keyturn
    host.turn(-2 * HOUR)
    keyturn.wait_for(lambda: keyturn.ask("clock")[0] == 75)
    shown = keyturn.run("clock").stdout
    assert "jumped by -7200 s" in shown
    assert "--trust" in shown
    host.turn(0)
    keyturn.wait_for(lambda: keyturn.ask("clock")[0] == 0)


def believed(keyturn: Keyturn) -> bool:
    """Tell whether the daemon has written down when its clock was right."""
    with sqlite3.connect(f"file:{keyturn.store}?mode=ro", uri=True) as connection:
        found = connection.execute("SELECT 1 FROM daemons WHERE wall IS NOT NULL").fetchone()
    connection.close()
    return found is not None
