"""What a command tells of what became of it: deadlines, successors, what stalled, what was refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from support.running import Keyturn, accepts


@pytest.fixture
def keyturn(tmp_path: Path) -> Iterator[Keyturn]:
    """Give a running Keyturn with one agent."""
    with Keyturn(tmp_path, agents=1) as one:
        one.wait_first()
        yield one


def alter(keyturn: Keyturn) -> Path:
    """Put something of somebody else's where the agent reads."""
    path = keyturn.folder / "agents" / "agent-0.json"
    path.write_text('{"id": "x", "secret": "y", "version": "z"}')
    return path


def test_rotate_tells_how_long_the_replaced_version_lives(keyturn: Keyturn) -> None:
    """Not the latest deadline of all, and the audit has the grace that was asked for."""
    keyturn.ask("rotate", "agent-0", "--grace", "1h", "--wait")
    before = keyturn.held("agent-0")["version"]
    result = keyturn.ask("rotate", "agent-0", "--grace", "20s", "--wait")[1]["results"][0]

    status = keyturn.ask("status", "agent-0")[1]
    ends = {v["version"]: v["deadline"] for v in status["previous"]}
    assert len(ends) == 2
    assert result["deadline"] == ends[before] != max(ends.values())
    distance = datetime.fromisoformat(result["deadline"]) - datetime.fromisoformat(
        status["current"]["promoted_at"]
    )
    assert distance == timedelta(seconds=20)
    entries = keyturn.ask("audit", "agent-0")[1]["entries"]
    asked = [e["detail"]["grace"] for e in entries if e["action"] == "rotate"]
    assert sorted(asked) == ["1h", "20s"]


def test_revoke_tells_what_was_cut_and_that_there_is_no_successor(keyturn: Keyturn) -> None:
    """The cut is told first; that the successor stalled ends with 3 and the command to type."""
    held = keyturn.held("agent-0")
    verifier = keyturn.verifier()
    ours = alter(keyturn).read_text()

    done = keyturn.run("revoke", "agent-0", "--reissue", "--wait")

    text = done.stdout
    assert done.returncode == 3, done.stderr
    assert accepts(verifier, held) is False
    assert -1 < text.find("refused everywhere") < text.find("NO SUCCESSOR")
    assert "next: keyturn rotation retry agent-0" in text
    assert text.count("refused everywhere") == 1
    place = keyturn.ask("status", "agent-0")[1]["destinations"][0]
    assert (place["in_sync"], place["shows_version"]) == (False, None)

    (keyturn.folder / "agents" / "agent-0.json").unlink()
    code, answer = keyturn.ask("rotation", "retry", "agent-0", "--wait")
    (result,) = answer["results"]
    assert (code, result["outcome"]) == (0, "promoted")
    assert keyturn.held("agent-0")["version"] == result["version"]
    assert ours not in json.dumps(keyturn.held("agent-0"))
    verifier.close()


def test_revoke_while_the_daemon_is_down_promises_no_successor_now(keyturn: Keyturn) -> None:
    """The successor comes when the daemon runs again, and the command says so."""
    keyturn.stop()
    done = keyturn.run("revoke", "agent-0", "--reissue", "--wait")
    assert done.returncode == 0, done.stderr
    assert "a successor follows once the daemon runs" in done.stdout


def test_what_the_files_own_is_not_removed_by_command(keyturn: Keyturn) -> None:
    """The next reload would bring it back; nothing is cut before that is said."""
    held = keyturn.held("agent-0")
    verifier = keyturn.verifier()

    done = keyturn.run("agents", "remove", "agent-0", "--yes")

    assert done.returncode == 4
    assert "NOTHING WAS CUT" in done.stderr
    assert accepts(verifier, held) is True
    definition: dict[str, Any] = keyturn.content["agents"].pop("agent-0")
    keyturn.write()
    keyturn.ask("reload", "--allow-mass-change")
    assert keyturn.ask("agents", "remove", "agent-0", "--yes")[0] == 0
    assert accepts(verifier, held) is False
    assert definition
    verifier.close()
