"""What an operator meets around the verbs: where a secret leaked, repeated commands, what one sees."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.running import Keyturn, accepts, file_at


@pytest.fixture
def keyturn(tmp_path: Path) -> Iterator[Keyturn]:
    """Give a running Keyturn whose only agent reads at two connections."""
    one = Keyturn(tmp_path, agents=1)
    one.content["connections"]["leaky"] = file_at(tmp_path / "leaky")
    one.content["agents"]["agent-0"]["destinations"].append({"to": "leaky", "path": "agent-0"})
    one.write()
    one.start()
    one.wait_first()
    yield one
    one.stop()


def leaked(keyturn: Keyturn) -> dict[str, Any]:
    """Read what is at the place of the leak."""
    found: dict[str, Any] = json.loads((keyturn.folder / "leaky" / "agent-0.json").read_text())
    return found


def wait_withdrawn(keyturn: Keyturn, held: dict[str, Any]) -> None:
    """Wait until the place of the leak shows no secret any more, and nothing in its place."""
    keyturn.wait_for(lambda: leaked(keyturn) == {"id": held["id"]})


def revocations(keyturn: Keyturn) -> int:
    """Count how often the agent was revoked."""
    entries = keyturn.ask("audit", "agent-0", "--limit", "1000")[1]["entries"]
    return [entry["action"] for entry in entries].count("revoke")


# --- the place of a leak ----------------------------------------------------------------------


def test_the_successor_is_not_published_where_it_leaked(keyturn: Keyturn) -> None:
    """`--except` leaves a place out, of later rotations too, until a person names it again."""
    held = keyturn.held("agent-0")
    verifier = keyturn.verifier()

    code, result = keyturn.ask("revoke", "agent-0", "--reissue", "--except", "leaky", "--wait")
    assert (code, result["withheld"]) == (0, ["leaky"])
    assert keyturn.ask("rotate", "agent-0", "--wait")[0] == 0

    fresh = keyturn.held("agent-0")
    wait_withdrawn(keyturn, held)
    assert fresh["version"] != result["successor"]["version"]
    assert (accepts(verifier, held), accepts(verifier, fresh)) == (False, True)
    assert keyturn.ask("resume", "agent-0", "--destination", "leaky")[0] == 0
    keyturn.wait_for(lambda: leaked(keyturn) == keyturn.held("agent-0"))
    assert accepts(verifier, leaked(keyturn)) is True
    assert keyturn.ask("resume", "agent-0", "--destination", "leaky")[0] == 4
    verifier.close()


def test_a_restart_keeps_it_out(keyturn: Keyturn) -> None:
    """Neither a new daemon nor its first look at everything publishes there."""
    held = keyturn.held("agent-0")
    keyturn.stop()
    assert keyturn.ask("revoke", "agent-0", "--reissue", "--except", "leaky")[0] == 0

    keyturn.start()

    keyturn.wait_for(lambda: keyturn.held("agent-0") != held)
    keyturn.wait_for(lambda: keyturn.ask("status", "agent-0")[1]["rotation"] is None)
    wait_withdrawn(keyturn, held)


@pytest.mark.parametrize("names", [["typo"], ["files", "leaky"]])
def test_a_name_that_cannot_be_meant_changes_nothing(keyturn: Keyturn, names: list[str]) -> None:
    """A typo would publish the successor where it leaked: refused before anything is cut."""
    held = keyturn.held("agent-0")
    verifier = keyturn.verifier()

    given = [word for name in names for word in ("--except", name)]
    assert keyturn.ask("revoke", "agent-0", "--reissue", *given)[0] == 4

    assert accepts(verifier, held) is True
    verifier.close()


def test_what_was_left_out_survives_a_locked_store(keyturn: Keyturn) -> None:
    """A revoke that only reached the spool is completed as it was meant."""
    held = keyturn.held("agent-0")
    keyturn.stop()
    with locked(keyturn):
        assert keyturn.ask("revoke", "agent-0", "--reissue", "--except", "leaky")[0] == 75
    keyturn.start()

    keyturn.wait_for(lambda: keyturn.held("agent-0") != held)
    keyturn.wait_for(lambda: keyturn.ask("status", "agent-0")[1]["rotation"] is None)
    wait_withdrawn(keyturn, held)


class locked:  # noqa: N801 - reads like a function
    """Lock the store against everybody."""

    def __init__(self, keyturn: Keyturn) -> None:
        self._lock = sqlite3.connect(keyturn.store, isolation_level=None)

    def __enter__(self) -> None:
        self._lock.execute("BEGIN EXCLUSIVE")

    def __exit__(self, *_exc: object) -> None:
        self._lock.execute("ROLLBACK")
        self._lock.close()


# --- commands that are repeated ---------------------------------------------------------------


def test_a_repeated_revoke_spares_the_successor(keyturn: Keyturn) -> None:
    """The same request id twice: one revocation, one answer, and the new secret stays good."""
    args = ("revoke", "agent-0", "--reissue", "--wait", "--request-id", "INC-1")
    verifier = keyturn.verifier()
    first = keyturn.ask(*args)[1]
    fresh = keyturn.held("agent-0")

    code, again = keyturn.ask(*args)

    assert (code, again["versions"]) == (0, first["versions"])
    assert again["successor"]["version"] == fresh["version"]
    assert accepts(verifier, fresh) is True
    assert (keyturn.held("agent-0"), revocations(keyturn)) == (fresh, 1)
    assert keyturn.ask("revoke", "agent-0", "--request-id", "INC-1")[0] == 4
    assert accepts(verifier, fresh) is True
    verifier.close()


def test_a_repeated_rotate_rotates_once(keyturn: Keyturn) -> None:
    """The second asks for nothing and returns what the first one brought."""
    args = ("rotate", "agent-0", "--wait", "--request-id", "monday")
    first = keyturn.ask(*args)[1]["results"]
    fresh = keyturn.held("agent-0")

    code, again = keyturn.ask(*args)

    assert (code, again["results"]) == (0, first)
    assert keyturn.held("agent-0") == fresh


def test_a_hanging_daemon_does_not_repeat_what_was_done_without_it(keyturn: Keyturn) -> None:
    """It finds the request in its socket when it goes on; by then it was done on the store."""
    verifier = keyturn.verifier()
    keyturn.signal(signal.SIGSTOP)
    assert keyturn.ask("revoke", "agent-0", "--reissue")[0] == 0
    keyturn.signal(signal.SIGCONT)

    keyturn.wait_for(lambda: accepts(verifier, keyturn.held("agent-0")) is True)

    fresh = keyturn.held("agent-0")
    assert keyturn.ask("rotate", "agent-0", "--wait")[0] == 0  # whatever was queued is done by now
    assert (accepts(verifier, fresh), revocations(keyturn)) == (True, 1)
    verifier.close()


def test_a_repeat_after_the_daemon_completed_it_spares_the_successor(keyturn: Keyturn) -> None:
    """First the store was locked, then the daemon did the rest: the repeat finds it done."""
    args = ("revoke", "agent-0", "--reissue", "--request-id", "INC-2")
    held = keyturn.held("agent-0")
    verifier = keyturn.verifier()
    keyturn.stop()
    with locked(keyturn):
        assert keyturn.ask(*args)[0] == 75
    keyturn.start()
    keyturn.wait_for(lambda: keyturn.held("agent-0") != held)

    code, again = keyturn.ask(*args)

    assert (code, again["versions"], again["incomplete"]) == (0, [held["version"]], False)
    assert accepts(verifier, keyturn.held("agent-0")) is True
    assert revocations(keyturn) == 1
    verifier.close()


# --- a destination that was dropped -----------------------------------------------------------


def test_a_person_forgets_a_destination_that_blocks_retirement(keyturn: Keyturn) -> None:
    """A dropped place that still shows a version keeps it; `destinations forget` lets it go."""
    old = keyturn.held("agent-0")["version"]
    place = "leaky:agent-0"
    assert keyturn.ask("destinations", "forget", "agent-0", place, "--yes")[0] == 4
    del keyturn.content["agents"]["agent-0"]["destinations"][1]
    keyturn.write()
    assert keyturn.ask("reload")[0] == 0
    assert keyturn.ask("rotate", "agent-0", "--wait")[0] == 0
    one = keyturn.ask("status", "agent-0")[1]
    assert [(v["version"], v["deadline"]) for v in one["previous"]] == [(old, None)]
    assert [d["leaving"] for d in one["destinations"]] == [False, True]
    assert one["safe_to_retire"]["ok"] is False

    assert keyturn.run("destinations", "forget", "agent-0", place).returncode == 2
    assert keyturn.ask("destinations", "forget", "agent-0", place, "--yes")[0] == 0

    keyturn.wait_for(lambda: keyturn.ask("status", "agent-0")[1]["previous"][0]["deadline"])
    assert len(keyturn.ask("status", "agent-0")[1]["destinations"]) == 1
    audit = keyturn.ask("audit", "agent-0")[1]["entries"]
    forgotten = next(entry for entry in audit if entry["action"] == "destination.forgotten")
    assert forgotten["detail"]["target"] == place


# --- what the shell offers --------------------------------------------------------------------


def offered(keyturn: Keyturn, line: str, **environ: str) -> tuple[list[str], str, float]:
    """Press TAB after a line, as the script of `--show-completion` does it for bash."""
    words = line.split(" ")
    values = {
        **os.environ,
        "KEYTURN_CONFIG": str(keyturn.config),
        "_KEYTURN_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "keyturn"],
        capture_output=True,
        text=True,
        env=values | environ,
        timeout=30,
        check=False,
    )
    return done.stdout.split(), done.stderr, time.monotonic() - began


LINES = [
    ("keyturn rotate ", ["agent-0"]),
    ("keyturn rotate agent-0 ", []),
    ("keyturn status a", ["agent-0"]),
    ("keyturn status b", []),
    ("keyturn revoke agent-0 --reissue --except l", ["leaky"]),
    ("keyturn resume agent-0 --destination ", ["files", "leaky"]),
    ("keyturn agents add x --to f", ["files:"]),
    ("keyturn agents remove ", ["agent-0"]),
    ("keyturn agents add x --to files:x --policy d", ["default"]),
    ("keyturn destinations forget agent-0 l", ["leaky:agent-0"]),
    ("keyturn verify ", ["agent-0"]),
    ("keyturn reload --take-over a", ["agent-0"]),
    ("keyturn policy a", ["aws", "azure"]),
]


def test_the_shell_completes_agents_and_connections(keyturn: Keyturn) -> None:
    """TAB gives what the daemon knows; without one, or with one that hangs, quickly nothing."""
    for line, names in LINES:
        assert offered(keyturn, line)[:2] == (names, ""), line
    done = keyturn.run("--show-completion")
    script = done.stdout + done.stderr  # where no shell called it, it says so
    assert "_KEYTURN_COMPLETE" in script or "shell" in script.lower()

    keyturn.signal(signal.SIGSTOP)
    hanging = offered(keyturn, "keyturn rotate ")
    keyturn.signal(signal.SIGCONT)
    keyturn.stop()
    down = offered(keyturn, "keyturn rotate ")

    assert (hanging[:2], down[:2]) == (([], ""), ([], ""))
    # The time to start Python is the machine's; what waiting adds is ours.
    assert hanging[2] - down[2] < 1.0
    assert offered(keyturn, "keyturn rotate ", KEYTURN_CONFIG="/none.yaml")[:2] == ([], "")


# --- what one sees ----------------------------------------------------------------------------


def test_status_says_what_operators_are_promised(keyturn: Keyturn) -> None:
    """Every field of the documents is there, and tells what is so."""
    one = keyturn.ask("status", "agent-0")[1]
    held = keyturn.held("agent-0")["version"]

    promised = {
        "agent", "login", "owner", "policy", "managed_by", "state", "next_rotation_at", "overdue",
        "max_age_at", "current", "pending", "kept", "previous", "rotation", "destinations",
        "safe_to_retire", "hint",
    }  # fmt: skip
    assert promised <= one.keys()
    assert one["current"]["version"] == held
    usage = {"first_used_at", "last_used_at", "uses"}
    assert {one["current"][name] for name in usage} == {None}
    for place in one["destinations"]:
        assert (place["shows_version"], place["in_sync"], place["error_code"]) == (held, True, None)
        assert place["read_back_at"] == one["current"]["promoted_at"]
    assert (one["safe_to_retire"], one["hint"]) == ({"ok": True, "reason": ""}, "")


def test_status_shows_what_was_left_out_and_what_hinders(keyturn: Keyturn) -> None:
    """A place left out is empty and not in sync, and the next command to type stands below."""
    held = keyturn.held("agent-0")
    keyturn.ask("revoke", "agent-0", "--reissue", "--except", "leaky", "--wait")

    def seen() -> dict[str, Any]:
        found: dict[str, Any] = keyturn.ask("status", "agent-0")[1]
        return found

    wait_withdrawn(keyturn, held)
    keyturn.wait_for(lambda: seen()["destinations"][1]["read_back_at"] is not None)
    good, bad = seen()["destinations"]
    assert (good["in_sync"], good["error_code"]) == (True, None)
    assert (bad["in_sync"], bad["withheld"], bad["shows_version"]) == (False, True, None)
    assert bad["error_code"] == "withheld"
    assert seen()["hint"].startswith("keyturn resume agent-0 --destination leaky")
    assert "left" in keyturn.run("status", "agent-0").stdout

    stranger = keyturn.folder / "agents" / "agent-0.json"
    stranger.chmod(0o644)
    stranger.write_text('{"id": "x", "secret": "y", "version": "z"}')
    assert keyturn.ask("rotate", "agent-0", "--wait")[0] == 4
    one = seen()
    assert (one["rotation"]["state"], one["rotation"]["step"]) == ("stalled", "mint")
    assert one["destinations"][0]["error_code"] == one["rotation"]["error_code"]
    assert one["hint"].startswith("keyturn rotation retry agent-0")
