"""A restore without a ledger, or with one that is not whole: nobody is let in before a person decides."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from keyturn import wiring
from keyturn.cli import render_store
from keyturn.daemon import keeping, logs
from keyturn.daemon.cron import Crontab
from keyturn.daemon.recovery import in_doubt
from keyturn.daemon.service import load
from keyturn.errors import ClaimLost, Refused, StorageError
from keyturn.leaks import Leak
from keyturn.storage import copying, restoring
from keyturn.storage.membership import lock_of
from support.drill import CALLER, Drill, Killed, revoke, rotate, suspend


@pytest.fixture
def drill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Drill]:
    """Give an installation whose two agents have rotated, been copied, and rotated once more."""
    monkeypatch.setattr(logs, "configure", lambda **_more: None)
    one = Drill(tmp_path, 1)
    for name in ("one", "two"):
        rotate(one, name)
    copying.snapshot(tmp_path / "state" / "keyturn.db", tmp_path / "backup.db")
    for name in ("one", "two"):
        rotate(one, name)
    yield one
    one.parts.close()


def shown(drill: Drill, name: str) -> str:
    """Return the version that an agent reads."""
    found = drill.parts.destinations["files"].observe(
        drill.parts.store.case_of(name).agent.targets[0]
    )
    return found.version_id or ""


def restore(drill: Drill) -> dict[str, object]:
    """Restore as the command does, and start again."""
    file = drill.folder / "backup.db"
    found = keeping.restore(drill.config, file, dry_run=False, ask=lambda _report: True)
    (drill.folder / "state" / "revoked.d").mkdir(mode=0o700, exist_ok=True)
    drill.parts = drill.open()
    return found


def test_without_a_ledger_a_person_decides_for_each_agent(drill: Drill) -> None:
    """Verifiers answer 503; one agent gets a new secret, the other one is as the backup had it."""
    lost = {name: shown(drill, name) for name in ("one", "two")}
    drill.close()
    shutil.rmtree(drill.folder / "state")
    report = restore(drill)

    assert report["undecided"] == ["one", "two"]
    assert {row["what"] for row in report["destinations"]} == {"unknown"}  # type: ignore[attr-defined]
    assert set(drill.verdicts().values()) == {None}
    for _ in range(2):  # no start decides it either
        drill.close()
        drill.parts = drill.open()
        assert set(drill.verdicts().values()) == {None}
    assert drill.parts.store.due(now=drill.parts.store.now(), limit=9) == []

    done = drill.recovery.release(["two"], CALLER, reissue=True)
    assert (done["released"], done["undecided"]) == (["two"], ["one"])
    drill.run("two")
    verdicts = drill.verdicts()
    assert verdicts[shown(drill, "two")] is True
    assert (verdicts[lost["two"]], verdicts[lost["one"]]) == (False, None)

    drill.recovery.release([], CALLER, reissue=False)
    verdicts = drill.verdicts()
    assert verdicts[lost["one"]] is False  # that is what was decided
    current = drill.parts.store.case_of("one").current
    assert current is not None
    assert verdicts[current.id] is True
    assert restoring.doubts(drill.parts.store) == []
    actions = [one.entry.action for one in drill.parts.store.audit_entries(agent="one")]
    assert "store.released" in actions


def test_a_ledger_that_ends_before_the_backup_decides_nothing(drill: Drill) -> None:
    """A copy of the ledger that is older than the backup is no second place."""
    drill.close()
    older = drill.folder / "state" / "ledger" / "one.jsonl"
    lines = older.read_bytes().split(b"\n")
    older.write_bytes(b"\n".join(lines[: len(lines) // 4]))
    (drill.folder / "state" / "keyturn.db").unlink()
    assert restore(drill)["undecided"] == ["one"]


def test_a_restore_can_be_looked_at_and_held(drill: Drill) -> None:
    """A rehearsal changes nothing; an answer of no leaves everybody at 503, whatever starts."""
    before, file = drill.verdicts(), drill.folder / "backup.db"
    drill.close()
    state = drill.folder / "state"
    content = {one: one.read_bytes() for one in state.rglob("*.jsonl")}
    rehearsed = keeping.restore(drill.config, file, dry_run=True, ask=lambda _report: True)
    assert rehearsed["merged"]
    assert {one: one.read_bytes() for one in state.rglob("*.jsonl")} == content
    assert drill.verdicts() == before

    held = keeping.restore(drill.config, file, dry_run=False, ask=lambda _report: False)
    assert held["released"] is False
    drill.parts = drill.open()
    assert set(drill.verdicts().values()) == {None}
    with pytest.raises(Refused, match="the whole store"):  # a no to all is no yes by one name
        drill.recovery.release(["one"], CALLER, reissue=False)
    assert set(drill.verdicts().values()) == {None}
    recovery, agent = drill.recovery, drill.parts.store.agents()[0]
    assert recovery.let_go_later() is False  # so the daemon is not ready, and its alert fires
    assert in_doubt(drill.parts.store, agent)["hint"].startswith("keyturn store release --all")
    assert "`keyturn store release --all`" in render_store.status(keeping.status(drill.config))
    recovery.release([], CALLER, reissue=False)
    assert recovery.let_go_later() is True
    assert drill.verdicts() == before
    assert not list(state.glob(".restore*"))


def test_what_is_no_backup_is_refused(drill: Drill) -> None:
    """A daemon that runs, a damaged file and that of another store change nothing."""
    before, file = drill.verdicts(), drill.folder / "backup.db"
    with pytest.raises(Refused, match="the daemon runs"):
        keeping.restore(drill.config, file, dry_run=False, ask=lambda _report: True)
    drill.close()
    content = bytearray(file.read_bytes())
    content[5000:9000] = bytes(4000)
    file.write_bytes(content)
    with pytest.raises(Refused, match="no copy of a store"):
        keeping.restore(drill.config, file, dry_run=False, ask=lambda _report: True)
    other = Drill(drill.folder / "other", 2)
    file.unlink()
    copying.snapshot(drill.folder / "other" / "state" / "keyturn.db", file)
    other.close()
    with pytest.raises(Refused, match="another store"):
        keeping.restore(drill.config, file, dry_run=False, ask=lambda _report: True)
    assert drill.verdicts() == before


def test_a_new_store_beside_an_old_ledger_does_not_start(drill: Drill) -> None:
    """Every agent would be refused: it says to restore a backup, or to begin anew."""
    drill.close()
    live, ledger = drill.folder / "state" / "keyturn.db", drill.folder / "state" / "ledger"
    live.unlink()
    with pytest.raises(StorageError, match="the ledger in .* is that of one that was") as caught:
        drill.open()
    assert "keyturn store restore" in caught.value.hint
    assert not live.exists()  # by an empty one verifiers would say no instead of "cannot tell"

    ledger.rename(drill.folder / "ledger")
    parts = wiring.build(load(drill.config), cron=Crontab(), create=True)
    assert parts.store.agents() == []
    parts.close()
    shutil.rmtree(ledger)
    (drill.folder / "ledger").rename(ledger)
    with pytest.raises(StorageError, match="the ledger in .* is that of another one"):
        drill.open()


def test_a_damaged_store_is_replaced(drill: Drill) -> None:
    """What is no database any more gives way to the backup, and open verifiers see that."""
    suspend(drill, "one")
    revoke(drill, "two")
    before = drill.verdicts()
    drill.close()
    live = drill.folder / "state" / "keyturn.db"
    live.write_bytes(b"not a database at all" * 1000)
    assert restore(drill)["undecided"] == []
    assert drill.verdicts() == before


def test_a_store_that_goes_back_under_a_running_daemon_is_merged(drill: Drill) -> None:
    """As after a failover that lost the last commits: what was accepted and cut off stays so."""
    suspend(drill, "one")
    revoke(drill, "two")
    before = drill.verdicts()
    copying.put_into(drill.folder / "backup.db", drill.folder / "state" / "keyturn.db")
    assert drill.verdicts() != before
    assert drill.recovery.at_start()
    assert set(drill.verdicts().values()) <= {None, False}  # of tombstones it can tell
    assert drill.recovery.let_go_later()
    assert drill.verdicts() == before
    assert drill.parts.store.incarnation == 2
    assert drill.parts.store.verify_audit() == []
    assert not drill.recovery.at_start()


def test_a_resume_that_never_came_does_not_come_by_a_restore(drill: Drill) -> None:
    """It was announced, its commit failed, and something else of the agent was committed later."""
    suspend(drill, "one")
    state = drill.folder / "state"
    (drill.folder / "backup.db").unlink()
    copying.snapshot(state / "keyturn.db", drill.folder / "backup.db")
    with closing(sqlite3.connect(state / "keyturn.db")) as other:
        other.execute("ALTER TABLE audit RENAME TO elsewhere")
        with pytest.raises(StorageError):
            drill.parts.administration.resume("one", CALLER)
        other.execute("ALTER TABLE elsewhere RENAME TO audit")
    old = next(v for v in drill.parts.store.case_of("one").accepted if v.state == "previous")
    drill.parts.administration.revoke(Leak(version=old.id), CALLER)
    before = drill.verdicts()
    assert before[shown(drill, "one")] is False
    drill.close()
    assert restore(drill)["undecided"] == []
    assert drill.verdicts() == before


@pytest.mark.parametrize(
    "planted",
    [
        "CREATE TRIGGER planted AFTER UPDATE ON versions BEGIN SELECT 1; END",
        "DROP TRIGGER versions_tombstones;"
        " CREATE TRIGGER versions_tombstones BEFORE UPDATE ON versions BEGIN SELECT 1; END",
        "CREATE VIEW planted AS SELECT 1",
    ],
    ids=["a trigger", "another one under our name", "a view"],
)
def test_a_backup_brings_no_program_with_it(drill: Drill, planted: str) -> None:
    """A trigger would change rows after the merge had found them to be what the ledger says."""
    drill.close()
    file = drill.folder / "backup.db"
    with closing(sqlite3.connect(file)) as copy:
        copy.executescript(planted)
    with pytest.raises(Refused, match="no copy of a store"):
        keeping.restore(drill.config, file, dry_run=False, ask=lambda _report: True)


def test_a_doubt_outlives_a_restore_that_was_killed(drill: Drill) -> None:
    """What the first merge has made of a version that the ledger lacks is no news to the second one."""
    for steps in range(1, 12):
        drill.parts.administration.rotate("one", CALLER)
        with suppress(Killed):
            drill.run("one", steps=steps)
        pending = [v for v in drill.parts.store.case_of("one").accepted if v.state == "pending"]
        if pending:
            break
        drill.kill()
        drill.parts = drill.open()
    (drill.folder / "backup.db").unlink()
    copying.snapshot(drill.folder / "state" / "keyturn.db", drill.folder / "backup.db")
    drill.kill()
    ledger = drill.folder / "state" / "ledger" / "one.jsonl"
    lines = ledger.read_bytes().split(b"\n")
    ledger.write_bytes(b"\n".join(one for one in lines if pending[0].id.encode() not in one))

    def dies(report: dict[str, Any]) -> bool:
        assert report["undecided"] == ["one"]
        raise Killed

    with pytest.raises(Killed):
        keeping.restore(drill.config, drill.folder / "backup.db", dry_run=False, ask=dies)
    drill.parts = drill.open()
    held = {one.agent_uid for one in restoring.doubts(drill.parts.store)}
    assert held == {drill.parts.store.case_of("one").agent.uid}


@pytest.mark.parametrize("answer", [True, False])
def test_an_answer_that_comes_too_late_is_none(drill: Drill, answer: bool) -> None:
    """Another process leads by then: it is not told that all is held, or let go, as it was shown."""
    drill.close()
    lock = lock_of(drill.folder / "state" / "keyturn.db")

    def slow(_report: dict[str, Any]) -> bool:
        (drill.folder / "state" / "keyturn.db.lead").unlink()  # as a lease of PostgreSQL runs out
        assert lock.take()
        return answer

    with pytest.raises(ClaimLost):
        keeping.restore(drill.config, drill.folder / "backup.db", dry_run=False, ask=slow)
    lock.drop()
    drill.parts = drill.open()
