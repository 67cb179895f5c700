"""An administrator cuts an agent off, in each of the four ways, as a person would do it."""

from __future__ import annotations

import signal
import sqlite3
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from keyturn.cli.client import AdminClient
from support.running import Keyturn, accepts


@pytest.fixture
def keyturn(tmp_path: Path) -> Iterator[Keyturn]:
    """Give a running Keyturn whose agents have their first versions."""
    one = Keyturn(tmp_path)
    one.start()
    one.wait_first()
    yield one
    one.stop()


def test_revoke_on_the_running_daemon_refuses_when_it_returns(keyturn: Keyturn) -> None:
    """`keyturn revoke` returns only when nothing of the agent is accepted any more."""
    held, other = keyturn.held("agent-0"), keyturn.held("agent-1")
    verifier = keyturn.verifier()
    assert accepts(verifier, held) is True

    code, result = keyturn.ask("revoke", "agent-0", "--reason", "INC-1")

    assert (code, result["versions"], result["incomplete"]) == (0, [held["version"]], False)
    assert accepts(verifier, held) is False
    assert accepts(verifier, other) is True
    assert keyturn.ask("status", "agent-0")[1]["state"] == "suspended"
    verifier.close()


def test_revoke_takes_the_secret_out_of_what_the_agent_reads(keyturn: Keyturn) -> None:
    """Within seconds the entry shows no secret; after `resume` it has a new one, by itself."""
    held = keyturn.held("agent-0")
    verifier = keyturn.verifier()

    assert keyturn.ask("revoke", "agent-0")[0] == 0

    keyturn.wait_for(lambda: keyturn.held("agent-0") == {"id": held["id"]}, seconds=5)
    keyturn.wait_for(lambda: shows(keyturn, "agent-0") == (None, None))
    assert keyturn.ask("resume", "agent-0")[0] == 0
    keyturn.wait_for(lambda: "secret" in keyturn.held("agent-0"))
    fresh = keyturn.held("agent-0")
    assert (accepts(verifier, held), accepts(verifier, fresh)) == (False, True)
    entries = keyturn.ask("audit", "agent-0")[1]["entries"]
    assert [e["version"] for e in entries if e["action"] == "entry.withdrawn"] == [held["version"]]
    verifier.close()


def shows(keyturn: Keyturn, agent: str) -> tuple[str | None, str | None]:
    """Return which version the status says is shown, and what it says is wrong there."""
    (place,) = keyturn.ask("status", agent)[1]["destinations"]
    return place["shows_version"], place["error_code"]


def test_revoke_with_reissue_gives_a_successor(keyturn: Keyturn) -> None:
    """`--reissue --wait` cuts first and returns with the version that agents read then."""
    held = keyturn.held("agent-0")
    verifier = keyturn.verifier()

    code, result = keyturn.ask("revoke", "agent-0", "--reissue", "--wait")

    fresh = keyturn.held("agent-0")
    assert (code, fresh["version"]) == (0, result["successor"]["version"])
    assert (accepts(verifier, held), accepts(verifier, fresh)) == (False, True)
    verifier.close()


def test_revoke_with_the_daemon_down_works_on_the_store(keyturn: Keyturn) -> None:
    """Without a daemon the same command refuses at once, and the daemon keeps to it."""
    held = keyturn.held("agent-0")
    keyturn.stop()

    code, result = keyturn.ask("revoke", "agent-0")

    verifier = keyturn.verifier()
    assert (code, result["incomplete"]) == (0, False)
    assert accepts(verifier, held) is False
    keyturn.start()
    assert keyturn.ask("status", "agent-0")[1]["state"] == "suspended"
    assert accepts(verifier, held) is False
    verifier.close()


def test_revoke_works_while_the_store_is_locked(keyturn: Keyturn) -> None:
    """A lock on the store can delay the store's row, never the refusal; the daemon completes it."""
    held = keyturn.held("agent-0")
    keyturn.stop()
    verifier = keyturn.verifier()
    lock = sqlite3.connect(keyturn.store, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")

    code, result = keyturn.ask("revoke", "agent-0", "--reason", "locked")

    assert (code, result["incomplete"]) == (75, True)
    assert accepts(verifier, held) in (False, None)
    lock.execute("ROLLBACK")
    lock.close()
    assert accepts(verifier, held) is False
    keyturn.start()
    keyturn.wait_for(lambda: keyturn.ask("status", "agent-0")[1]["state"] == "suspended")
    verifier.close()


def test_a_store_that_others_may_read_makes_a_revoke_incomplete(keyturn: Keyturn) -> None:
    """Copied back with a wrong mode: what was cut is cut, and 75 says that the rest comes later."""
    held = keyturn.held("agent-0")
    keyturn.stop()
    keyturn.store.chmod(0o644)

    code, result = keyturn.ask("revoke", "agent-0")

    verifier = keyturn.verifier()
    assert (code, result["incomplete"]) == (75, True)
    assert accepts(verifier, held) is False
    keyturn.store.chmod(0o600)
    assert accepts(verifier, held) is False
    verifier.close()


def test_without_its_spool_a_verifier_cannot_tell(keyturn: Keyturn) -> None:
    """The folder went missing, and perhaps a tombstone with it: 503 until a person looks."""
    verifier = keyturn.verifier()
    spool = keyturn.store.parent / "revoked.d"
    spool.rmdir()

    assert accepts(verifier, keyturn.held("agent-0")) is None
    spool.mkdir(mode=0o700)
    assert accepts(verifier, keyturn.held("agent-0")) is True
    verifier.close()


def test_a_broken_configuration_does_not_stand_in_the_way(keyturn: Keyturn) -> None:
    """With the daemon down and a wrong line in the file a revoke still works."""
    held = keyturn.held("agent-0")
    keyturn.stop()
    keyturn.content["policies"]["default"]["every"] = "sometimes"
    keyturn.write()

    assert keyturn.ask("revoke", "agent-0")[0] == 0

    verifier = keyturn.verifier()
    assert accepts(verifier, held) is False
    verifier.close()


def test_the_revocations_file_with_a_signal_refuses(keyturn: Keyturn) -> None:
    """A line in the file and SIGUSR1 refuse within a moment; the line never kills the successor."""
    held = keyturn.held("agent-0")
    verifier = keyturn.verifier()
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    keyturn.revocations.write_text(f"agent:agent-0 at={now} reissue INC-2\n")
    began = time.monotonic()
    keyturn.signal(signal.SIGUSR1)

    keyturn.wait_for(lambda: accepts(verifier, held) is False)

    assert time.monotonic() - began < 2.0
    keyturn.wait_for(lambda: keyturn.held("agent-0")["version"] != held["version"])
    keyturn.signal(signal.SIGUSR1)
    time.sleep(0.5)
    fresh = keyturn.held("agent-0")
    assert accepts(verifier, fresh) is True
    keyturn.stop()
    keyturn.start()
    assert accepts(verifier, keyturn.held("agent-0")) is True
    verifier.close()


def test_a_line_that_stays_gives_one_successor(keyturn: Keyturn) -> None:
    """However often the daemon starts, a line is applied once: nobody is cut or rotated again."""
    held = keyturn.held("agent-1")
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    keyturn.revocations.write_text(f"version:{held['version']} at={now} reissue\n")
    keyturn.signal(signal.SIGUSR1)
    keyturn.wait_for(lambda: keyturn.held("agent-1")["version"] != held["version"])
    fresh = keyturn.held("agent-1")
    for _ in range(2):
        keyturn.stop()
        keyturn.start()
        time.sleep(1)

    assert keyturn.held("agent-1") == fresh
    entries = keyturn.ask("audit", "agent-1")[1]["entries"]
    assert [entry["action"] for entry in entries].count("revoke") == 1


def test_the_revocations_file_is_polled(keyturn: Keyturn) -> None:
    """Without any signal the file is looked at every two seconds."""
    held = keyturn.held("agent-1")
    verifier = keyturn.verifier()
    keyturn.revocations.write_text(
        f"version:{held['version']} at={datetime.now(UTC).isoformat().replace('+00:00', 'Z')}\n"
    )

    keyturn.wait_for(lambda: accepts(verifier, held) is False, seconds=6)
    verifier.close()


def test_sighup_with_entries_in_the_main_file_refuses(keyturn: Keyturn) -> None:
    """The same lines under `revocations:` work by SIGHUP."""
    held = keyturn.held("agent-0")
    verifier = keyturn.verifier()
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    keyturn.content["revocations"] = [f"agent:agent-0 at={now}"]
    keyturn.write()
    keyturn.signal(signal.SIGHUP)

    keyturn.wait_for(lambda: accepts(verifier, held) is False)
    verifier.close()


def test_a_stopped_daemon_cannot_keep_a_revoke_from_working(keyturn: Keyturn) -> None:
    """A daemon that hangs is passed by: the command goes straight to spool and store."""
    held = keyturn.held("agent-0")
    verifier = keyturn.verifier()
    keyturn.signal(signal.SIGSTOP)

    code, _result = keyturn.ask("revoke", "agent-0")

    keyturn.signal(signal.SIGCONT)
    assert code in (0, 75)
    assert accepts(verifier, held) is False
    verifier.close()


def test_a_touched_tombstone_refuses(keyturn: Keyturn) -> None:
    """A person with nothing but a shell revokes by touching a file, and the store follows."""
    held = keyturn.held("agent-0")
    verifier = keyturn.verifier()
    spool = keyturn.store.parent / "revoked.d"
    spool.mkdir(mode=0o700, exist_ok=True)

    (spool / held["version"]).touch()

    assert accepts(verifier, held) is False
    keyturn.wait_for(lambda: keyturn.held("agent-0")["version"] != held["version"])
    verifier.close()


def test_a_file_that_others_can_write_is_refused_aloud(keyturn: Keyturn) -> None:
    """No stranger's line is applied, and nobody is left to think that his own was."""
    held = keyturn.held("agent-1")
    verifier = keyturn.verifier()
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    keyturn.revocations.touch()
    keyturn.revocations.chmod(0o666)
    keyturn.revocations.write_text(f"version:{held['version']} at={now} reissue\n")
    keyturn.signal(signal.SIGUSR1)

    keyturn.wait_for(lambda: "writable by others" in keyturn.log.read_text())
    assert accepts(verifier, held) is True
    assert "revocations_file_problems 1.0" in keyturn.run("metrics").stdout
    code, report = keyturn.ask("check")
    assert code != 0
    assert "chmod go-w" in str([one for one in report["checks"] if not one["ok"]])

    keyturn.revocations.chmod(0o600)
    keyturn.wait_for(lambda: accepts(verifier, held) is False)
    assert keyturn.ask("check")[0] == 0
    verifier.close()


def test_a_reason_that_is_no_utf8_works(keyturn: Keyturn) -> None:
    """By the socket and on the bare store; the daemon starts again after it."""
    verifier = keyturn.verifier()
    reason = b"f\xfcr INC-1".decode(errors="surrogateescape")
    for name in ("agent-0", "agent-1"):
        held = keyturn.held(name)
        assert keyturn.ask("revoke", name, "--reason", reason)[0] == 0
        assert accepts(verifier, held) is False
        keyturn.stop()
    keyturn.start()
    assert keyturn.ask("audit", "--verify")[0] == 0
    verifier.close()


def test_waiting_tells_which_destination_still_holds_it(keyturn: Keyturn) -> None:
    """The cut stands, but what agents read could not be cleaned up: a line for each place, exit 3."""
    folder = keyturn.folder / "agents"
    folder.rename(away := keyturn.folder / "away")
    folder.write_text("no folder")

    done = keyturn.run("revoke", "agent-0", "--wait")

    assert done.returncode == 3, done.stdout + done.stderr
    assert "NOT CLEANED UP: files:agent-0 cannot be read" in done.stdout
    assert "suspended until: keyturn resume agent-0" in done.stdout
    folder.unlink()
    away.rename(folder)
    done = keyturn.run("revoke", "agent-0", "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "revoked already: agent-0" in done.stdout
    assert "no destination shows what was revoked" in done.stdout


def test_a_second_revoke_says_that_it_takes_the_successor(keyturn: Keyturn) -> None:
    """`revoke AGENT` after `--reissue` suspends, and cancels what was owed: it says both."""
    keyturn.stop()
    assert keyturn.ask("revoke", "agent-0", "--reissue")[0] == 0

    done = keyturn.run("revoke", "agent-0")

    assert "owed it a successor" in done.stdout
    assert "suspended until: keyturn resume agent-0" in done.stdout


def test_one_version_of_an_enabled_agent_is_replaced_at_once(keyturn: Keyturn) -> None:
    """A destination that shows a revoked version owes a rotation: the help says so."""
    held = keyturn.held("agent-0")

    done = keyturn.run("revoke", "--version", held["version"], "--wait")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "suspended" not in done.stdout
    assert keyturn.held("agent-0")["version"] != held["version"]
    again = keyturn.run("revoke", "--version", held["version"])
    assert "revoked already" in again.stdout
    assert "agent stays enabled" in " ".join(keyturn.run("revoke", "--help").stdout.split())


def test_status_without_the_daemon_believes_a_touched_tombstone(keyturn: Keyturn) -> None:
    """With nothing but a shell, one sees what one has done."""
    held = keyturn.held("agent-0")
    keyturn.stop()
    (keyturn.store.parent / "revoked.d" / held["version"]).touch()

    assert keyturn.ask("status", "agent-0")[1]["current"] is None
    assert keyturn.ask("status", "agent-1")[1]["current"] is not None


@pytest.mark.parametrize("how", ["broken", "missing"])
def test_without_a_configuration_the_store_is_found_or_nothing_is_promised(
    keyturn: Keyturn, how: str
) -> None:
    """What stands in a broken file or in the environment is enough; else it says what to type."""
    held, other = keyturn.held("agent-0"), keyturn.held("agent-1")
    verifier = keyturn.verifier()
    keyturn.stop()
    environ = keyturn.environ
    if how == "broken":
        keyturn.config.write_text(keyturn.config.read_text() + "\n  }: [broken\n")
        assert keyturn.ask("revoke", "agent-0")[0] == 0
        keyturn.config.write_text("}: [broken\n# url: sqlite:////nowhere/keyturn.db\n")
    else:
        keyturn.config.unlink()
        keyturn.environ = {**environ, "KEYTURN_STORE__URL": f"sqlite:///{keyturn.store}"}
        assert keyturn.ask("revoke", "agent-0")[0] == 0
    assert accepts(verifier, held) is False

    keyturn.environ = {**environ, "KEYTURN_STORE__URL": "sqlite:////nowhere/keyturn.db"}
    done = keyturn.run("revoke", "agent-1")
    assert done.returncode == 78
    assert "NOTHING WAS CUT" in done.stderr
    assert "touch STATE/revoked.d/VERSION" in done.stderr
    assert accepts(verifier, other) is True
    keyturn.write()  # it says where secrets may be
    verifier.close()


def test_suspend_and_resume(keyturn: Keyturn) -> None:
    """A suspended agent is refused at once and accepted again after resume."""
    held = keyturn.held("agent-0")
    verifier = keyturn.verifier()

    assert keyturn.ask("suspend", "agent-0", "--reason", "holiday")[0] == 0
    assert accepts(verifier, held) is False
    assert keyturn.ask("resume", "agent-0")[0] == 0
    assert accepts(verifier, held) is True
    verifier.close()


def test_verify_and_identify_read_standard_input(keyturn: Keyturn) -> None:
    """`verify` answers by exit code; `identify` names the agent; neither prints the secret."""
    held = keyturn.held("agent-0")

    good = keyturn.run("verify", "agent-0", stdin=held["secret"] + "\n")
    bad = keyturn.run("verify", "agent-1", stdin=held["secret"])
    found = keyturn.run("identify", stdin=f"curl -u x:{held['secret']} https://x")

    assert (good.returncode, bad.returncode, found.returncode) == (0, 4, 0)
    assert "agent-0" in found.stdout
    for done in (good, bad, found):
        assert held["secret"] not in done.stdout + done.stderr


def test_everything_is_in_the_audit(keyturn: Keyturn) -> None:
    """Who revoked whom and why stands in a chain that is whole, and no secret with it."""
    held = keyturn.held("agent-0")
    # Not as an argument: those are searched for secrets when the suite ends.
    client = AdminClient(keyturn.folder / "run" / "admin.sock")
    answer = client.call("revoke", {"agent": "agent-0", "reason": f"leaked {held['secret']}"})
    assert not answer["incomplete"], keyturn.log.read_text()[-3000:]

    code, result = keyturn.ask("audit", "agent-0", "--verify", "--limit", "50")

    revoked = [entry for entry in result["entries"] if entry["action"] == "revoke"]
    assert (code, result["chain"]["ok"], len(revoked)) == (0, True, 1)
    assert held["secret"] not in str(result)
    assert held["secret"].encode() not in keyturn.store.read_bytes()
