"""The daemon as an operator meets it: reload, standby, stop, agents by command, outside edits."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.running import Keyturn, accepts


@pytest.fixture
def keyturn(tmp_path: Path) -> Iterator[Keyturn]:
    """Give a running Keyturn whose agents have their first versions."""
    one = Keyturn(tmp_path)
    one.start()
    one.wait_first()
    yield one
    one.stop()


def test_rotate_with_wait_publishes_a_new_version(keyturn: Keyturn) -> None:
    """`rotate --wait` ends when agents read the new version; the old one lives through its grace."""
    old = keyturn.held("agent-0")
    verifier = keyturn.verifier()

    code, result = keyturn.ask("rotate", "agent-0", "--wait")

    new = keyturn.held("agent-0")
    assert (code, result["results"][0]["outcome"]) == (0, "promoted")
    assert new["version"] == result["results"][0]["version"] != old["version"]
    assert (accepts(verifier, old), accepts(verifier, new)) == (True, True)
    verifier.close()


def test_a_grace_below_the_floor_wants_force(keyturn: Keyturn) -> None:
    """A grace that cuts agents off is refused, and done with `--force`."""
    old = keyturn.held("agent-0")
    verifier = keyturn.verifier()

    refused = keyturn.run("rotate", "agent-0", "--grace", "1s")
    forced = keyturn.run("rotate", "agent-0", "--grace", "1s", "--force", "--wait")

    assert (refused.returncode, forced.returncode) == (4, 0)
    assert "--force" in refused.stdout + refused.stderr
    forever = keyturn.run("rotate", "agent-0", "--grace", "100000d")
    assert forever.returncode == 4
    assert "longer than" in forever.stdout + forever.stderr
    keyturn.wait_for(lambda: accepts(verifier, old) is False, seconds=5)
    verifier.close()


def test_agents_come_and_go_by_command(keyturn: Keyturn) -> None:
    """An agent that is added gets its first secret at once; one that is removed is refused."""
    code, result = keyturn.ask("agents", "add", "hello", "--to", "files:team/hello", "--wait")
    held = json.loads((keyturn.folder / "agents" / "team" / "hello.json").read_text())
    verifier = keyturn.verifier()

    assert (code, result["outcome"], held["id"]) == (0, "promoted", "hello")
    assert accepts(verifier, held) is True
    assert keyturn.ask("agents", "remove", "hello", "--yes")[0] == 0
    assert accepts(verifier, held) is False
    assert keyturn.ask("status", "hello")[0] != 0
    verifier.close()


@pytest.mark.parametrize(
    "place", ["files:agent-0", "files:agent-0.json", "files:../agents/agent-0", "nowhere:x"]
)
def test_a_second_owner_of_an_entry_is_refused(keyturn: Keyturn, place: str) -> None:
    """No spelling lets a second agent write where another one reads."""
    held = keyturn.held("agent-0")

    done = keyturn.run("agents", "add", "thief", "--to", place)

    assert done.returncode not in (0, 1)
    assert keyturn.held("agent-0") == held


def test_a_reload_takes_over_and_a_wrong_one_changes_nothing(keyturn: Keyturn) -> None:
    """A good file is taken over; a wrong one is named by file, line and key, and the old one stays."""
    keyturn.content["agents"]["agent-2"] = {"destinations": [{"to": "files", "path": "agent-2"}]}
    keyturn.write()
    assert keyturn.ask("reload")[0] == 0
    keyturn.wait_for((keyturn.folder / "agents" / "agent-2.json").exists)
    keyturn.content["policies"]["default"]["every"] = "canary-value"
    keyturn.write()

    wrong = keyturn.run("reload")

    assert wrong.returncode == 78
    assert f"{keyturn.config}:" in wrong.stderr
    assert "every" in wrong.stderr
    assert "canary-value" not in wrong.stderr + keyturn.log.read_text()
    assert keyturn.ask("rotate", "agent-2", "--wait")[0] == 0


def test_an_agent_that_leaves_the_files_stays_accepted(keyturn: Keyturn) -> None:
    """A line that disappears revokes nobody: the agent is unmanaged until a person decides."""
    held = keyturn.held("agent-1")
    verifier = keyturn.verifier()
    del keyturn.content["agents"]["agent-1"]
    keyturn.write()
    keyturn.signal(signal.SIGHUP)

    keyturn.wait_for(lambda: keyturn.ask("status", "agent-1")[1]["state"] == "unmanaged")
    assert accepts(verifier, held) is True
    verifier.close()


def test_a_second_daemon_stands_by_and_takes_over(keyturn: Keyturn) -> None:
    """A standby waits, and leads as soon as the first daemon is dead."""
    log = (keyturn.folder / "second.log").open("wb")
    socket = keyturn.folder / "run" / "second.sock"
    second = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "keyturn",
            "run",
            "-c",
            str(keyturn.config),
            "--socket",
            str(socket),
        ],
        stdout=log,
        stderr=log,
    )
    try:
        time.sleep(2)
        assert not socket.exists()
        assert keyturn.process is not None
        keyturn.process.kill()
        keyturn.process.wait()
        keyturn.wait_for(socket.exists, seconds=15)
        done = keyturn.run("rotate", "agent-0", "--wait", "--socket", str(socket))
        assert done.returncode == 0, done.stderr
    finally:
        second.terminate()
        second.wait(35)
        log.close()


def test_without_standby_a_second_daemon_ends_at_once(keyturn: Keyturn) -> None:
    """`--no-standby` says that another daemon has the store."""
    done = keyturn.run("run", "-c", str(keyturn.config), "--no-standby")

    assert done.returncode == 69


def test_sigterm_ends_within_its_time_and_loses_nothing(keyturn: Keyturn) -> None:
    """The daemon ends with 0, and the next one goes on where it was."""
    began = time.monotonic()
    assert keyturn.stop() == 0
    assert time.monotonic() - began < 30
    verifier = keyturn.verifier()
    assert accepts(verifier, keyturn.held("agent-0")) is True
    keyturn.start()
    assert keyturn.ask("rotate", "agent-0", "--wait")[0] == 0
    verifier.close()


def test_an_outside_edit_stalls_a_rotation_and_is_not_overwritten(keyturn: Keyturn) -> None:
    """Somebody's edit stops the rotation with a reason and a hint; retry goes on when it is mended."""
    path = keyturn.folder / "agents" / "agent-0.json"
    ours = path.read_text()
    path.write_text(json.dumps({"id": "agent-0", "secret": "theirs", "version": "x"}))

    code, result = keyturn.ask("rotate", "agent-0", "--wait")

    status = keyturn.ask("status", "agent-0")[1]
    assert (code, result["results"][0]["outcome"]) == (4, "stalled")
    assert (status["rotation"]["state"], status["rotation"]["error_code"]) == (
        "stalled",
        "unknown-value",
    )
    assert "retry" in status["hint"]
    assert "theirs" in path.read_text()
    path.write_text(ours)
    assert keyturn.ask("rotation", "retry", "agent-0")[0] == 0
    keyturn.wait_for(lambda: keyturn.held("agent-0")["version"] not in ours)


def test_all_that_stopped_at_a_place_go_on_with_one_command(tmp_path: Path) -> None:
    """Once it is mended nobody types three hundred names; what stopped elsewhere is left alone."""
    with Keyturn(tmp_path, agents=3) as one:
        one.wait_first()
        paths = [one.folder / "agents" / f"agent-{n}.json" for n in range(2)]
        ours = [path.read_text() for path in paths]
        for number, path in enumerate(paths):
            path.write_text('{"secret": "theirs"}')
            one.ask("rotate", f"agent-{number}", "--wait")
        for path, text in zip(paths, ours, strict=True):
            path.write_text(text)

        none = one.ask("rotation", "retry", "--all", "--destination", "elsewhere")
        code, result = one.ask("rotation", "retry", "--all", "--destination", "files", "--wait")

        assert none == (0, {"results": []})
        assert code == 0
        found = [(row["agent"], row["outcome"]) for row in result["results"]]
        assert found == [("agent-0", "promoted"), ("agent-1", "promoted")]


def test_an_abandoned_rotation_comes_at_its_next_slot(tmp_path: Path) -> None:
    """A scheduled rotation that a person gave up does not open again at once."""
    one = Keyturn(tmp_path, agents=1, policy={"every": "8s", "grace": "6s"})
    one.start()
    one.wait_first()
    path = tmp_path / "agents" / "agent-0.json"
    ours = path.read_text()
    path.write_text(json.dumps({"id": "agent-0", "secret": "theirs", "version": "x"}))
    one.wait_for(
        lambda: (one.ask("status", "agent-0")[1]["rotation"] or {}).get("state") == "stalled"
    )
    path.write_text(ours)

    assert one.ask("rotation", "abandon", "agent-0")[0] == 0

    time.sleep(1)
    assert one.ask("status", "agent-0")[1]["rotation"] is None
    assert path.read_text() == ours
    one.stop()


def test_a_wrong_configuration_does_not_start(tmp_path: Path) -> None:
    """Exit 78, with file, line and key."""
    one = Keyturn(tmp_path)
    one.content["policies"]["default"]["grace"] = "1s"
    one.write()

    done = one.run("run", "-c", str(one.config))

    assert done.returncode == 78
    assert "grace" in done.stderr
    assert "keyturn.yaml:" in done.stderr


def test_an_entry_that_was_edited_is_reported_by_the_sweep(tmp_path: Path) -> None:
    """Status, metric, log and audit name what a sweep finds; the agent itself is not touched."""
    one = Keyturn(tmp_path, agents=1)
    one.start()
    one.wait_first()
    path = tmp_path / "agents" / "agent-0.json"
    path.write_text(json.dumps({"id": "agent-0", "secret": "theirs", "version": "x"}))
    one.stop()
    with sqlite3.connect(one.store) as store:  # the next sweep is due now
        store.execute("UPDATE credentials SET sweep_at = 1, wake_at = 1")
    store.close()
    one.start()

    def drifted() -> bool:
        status = one.ask("status", "agent-0")[1]
        return [d["error_code"] for d in status["destinations"]] == ["unknown"]

    one.wait_for(drifted)
    one.wait_for(lambda: 'drift{kind="unknown"} 1.0' in one.run("metrics").stdout)
    one.wait_for(lambda: "drift.found" in one.log.read_text())
    actions = [entry["action"] for entry in one.ask("audit", "agent-0")[1]["entries"]]
    assert "drift.found" in actions
    one.stop()
