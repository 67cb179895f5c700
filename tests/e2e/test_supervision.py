"""The real daemon under a supervisor: ready only when it is, reloads, and a watchdog that bites."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from support.running import Keyturn
from support.supervised import Supervised

WATCHDOG = 6.0


def supervised(keyturn: Keyturn, *module: str, name: str = "notify", **more: Any) -> Supervised:
    """Start a daemon of an installation under a supervisor."""
    command = [sys.executable, "-m", *(module or ("keyturn", "run", "-c", str(keyturn.config)))]
    return Supervised(
        command,
        environ=keyturn.environ,
        log=keyturn.log,
        address=more.pop("address", str(keyturn.folder / name)),
        **more,
    )


@pytest.fixture
def keyturn(tmp_path: Path) -> Keyturn:
    """Give an installation that is not started."""
    tmp_path.chmod(0o700)
    return Keyturn(tmp_path)


def test_ready_means_that_it_answers_and_every_state_is_said(keyturn: Keyturn) -> None:
    """READY comes when commands work, RELOADING ends in READY, STOPPING comes before the end."""
    with supervised(keyturn, address=f"@keyturn-{keyturn.folder.name}-{id(keyturn)}") as one:
        one.wait_ready()
        code, found = keyturn.ask("health", "--ready")
        assert (code, found["ready"], found["reasons"]) == (0, True, [])
        one.process.send_signal(signal.SIGHUP)
        one.wait(lambda: any("RELOADING" in said for said in one.said))
        one.wait(lambda: "READY" in one.said[-1])
        keyturn.config.write_text("version: 99\n")
        one.process.send_signal(signal.SIGHUP)
        one.wait(lambda: "refused" in one.said[-1].get("STATUS", ""))
        assert one.said[-1]["READY"] == "1"
        keyturn.write()
        assert one.stop() == 0
    assert "STOPPING" in one.said[-1]
    first = next(number for number, said in enumerate(one.said) if "READY" in said)
    assert all("EXTEND_TIMEOUT_USEC" in said for said in one.said[:first])
    assert int(one.values("MONOTONIC_USEC")[0]) > 0


def test_a_standby_is_live_and_not_ready(keyturn: Keyturn, tmp_path: Path) -> None:
    """It says what it waits for and asks for more time; READY comes when it takes over."""
    other = Keyturn(tmp_path)
    other.content["admin"]["socket"] = str(tmp_path / "standby" / "admin.sock")
    other.config, other.log = tmp_path / "second.yaml", tmp_path / "second.log"
    other.write()
    with supervised(keyturn) as first:
        first.wait_ready()
        with supervised(other, name="second") as second:
            second.wait(lambda: any("standby" in text for text in second.values("STATUS")))
            assert second.readies == 0
            waiting = len(second.values("EXTEND_TIMEOUT_USEC"))
            second.wait(lambda: len(second.values("EXTEND_TIMEOUT_USEC")) > waiting)
            code, found = other.ask("health", "--ready")
            assert (code, found["reasons"][0]["reason"]) == (69, "standby")
            assert other.ask("health")[0] == 0
            first.stop()
            second.wait_ready()
            assert other.ask("health", "--ready")[0] == 0
        assert other.ask("health")[0] == 69


def test_a_stuck_scheduler_is_killed_and_started_again(keyturn: Keyturn) -> None:
    """The socket answers all the while: only the beat knows, and the supervisor acts on it."""
    hangs = keyturn.folder / "hangs"
    module = ("support.stuck_daemon", str(keyturn.config), str(hangs))
    with supervised(keyturn, *module, watchdog=WATCHDOG) as one:
        one.wait_ready()
        one.wait(lambda: "1" in one.values("WATCHDOG"))
        assert one.watchdog_kills == 0
        pid = one.process.pid
        hangs.touch()
        one.wait(lambda: one.watchdog_kills == 1)
        hangs.unlink()
        one.wait_ready(2)
        assert one.process.pid != pid
        one.wait(lambda: one.said[-1].get("WATCHDOG") == "1")
        assert one.watchdog_kills == 1
