"""What an operator meets around the verbs: where a secret leaked, repeated commands, what one sees."""

from __future__ import annotations

import json
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.running import Keyturn, accepts


@pytest.fixture
def keyturn(tmp_path: Path) -> Iterator[Keyturn]:
    """Give a running Keyturn whose only agent reads at two connections."""
    one = Keyturn(tmp_path, agents=1)
    one.content["connections"]["leaky"] = {"type": "file", "root": str(tmp_path / "leaky")}
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
    assert (leaked(keyturn), fresh["version"] == result["successor"]) == (held, False)
    assert (accepts(verifier, held), accepts(verifier, fresh)) == (False, True)
    assert keyturn.ask("resume", "agent-0", "--destination", "leaky")[0] == 0
    keyturn.wait_for(lambda: leaked(keyturn) != held)
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
    assert leaked(keyturn) == held


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
    assert leaked(keyturn) == held


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

    assert (code, again["versions"], again["successor"]) == (0, first["versions"], fresh["version"])
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
