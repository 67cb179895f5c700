"""A store is copied, lost, put back and merged, with the commands that an operator types."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keyturn.cli.client import AdminClient
from support.running import Keyturn, accepts


def tell(keyturn: Keyturn, command: str, **args: Any) -> Any:
    """Ask the daemon without starting a process for it."""
    return AdminClient(keyturn.folder / "run" / "admin.sock").call(command, args)


def rotate(keyturn: Keyturn, *agents: str) -> None:
    """Rotate, and wait for that."""
    done = tell(keyturn, "rotate", agents=agents, wait=True)["results"]
    assert {one["outcome"] for one in done} == {"promoted"}


@pytest.fixture
def keyturn(tmp_path: Path) -> Iterator[Keyturn]:
    """Give a running installation with two agents."""
    with Keyturn(tmp_path, policy={"grace": "30m"}) as one:
        one.wait_first()
        yield one


def test_what_is_copied_and_restored_forgets_nothing(keyturn: Keyturn) -> None:
    """A backup is whole and 0600 while the daemon runs; what was cut off or rotated since stays so."""
    place = keyturn.folder / "backup.db"
    old = os.umask(0)
    code, made = keyturn.ask("store", "backup", str(place))
    os.umask(old)

    assert (code, made["agents"], made["file"]) == (0, 2, str(place))
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    with sqlite3.connect(place) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    copy.close()
    assert keyturn.ask("store", "backup", str(place))[0] == 4
    found = tell(keyturn, "store.status")
    assert found["last_backup"]["file"] == str(place)
    assert (found["schema"], found["quarantine"]) == (found["this_release"], [])
    assert found["ledger"]["state"] == "complete"
    assert [one.name for one in keyturn.folder.iterdir() if "backup" in one.name] == ["backup.db"]

    old, cut = keyturn.held("agent-0"), keyturn.held("agent-1")
    rotate(keyturn, "agent-0")
    target = {"to": "files", "path": "new", "merge": False, "adopt": False}
    tell(keyturn, "agents.add", name="new", policy="default", targets=[target], wait=True)
    tell(keyturn, "revoke", agent="agent-1")
    assert keyturn.ask("store", "restore", str(place), "--yes")[0] == 4  # the daemon runs
    keyturn.stop()

    code, rehearsed = keyturn.ask("store", "restore", str(place), "--dry-run")
    assert (code, rehearsed["dry_run"]) == (0, True)
    code, report = keyturn.ask("store", "restore", str(place), "--yes")

    assert code == 0, report
    assert report["undecided"] == []
    told = {(one["agent"], one["what"]) for one in report["merged"]}
    assert {("new", "added"), ("agent-0", "accepted"), ("agent-1", "suspended")} <= told
    assert rehearsed["merged"] == report["merged"]
    verifier = keyturn.verifier()
    assert accepts(verifier, keyturn.held("agent-0")) is True
    assert accepts(verifier, keyturn.held("new")) is True
    assert accepts(verifier, old) is True  # its grace goes on
    assert accepts(verifier, cut) is False
    verifier.close()
    keyturn.start()
    rotate(keyturn, "agent-0", "new")
    assert tell(keyturn, "status", agent="agent-1")[0]["state"] == "suspended"
