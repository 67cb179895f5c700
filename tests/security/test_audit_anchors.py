"""Whoever can write the store cannot change what an anchor has named without being found out."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from keyturn.anchor_file import NO_ANCHOR, AnchorFile, Anchors, AnchorsUnusable, read_anchors
from keyturn.daemon.anchoring import Anchoring
from keyturn.daemon.metrics import Metrics
from keyturn.storage import anchors
from keyturn.storage.store import Store
from support.forger import KINDS, Forger
from support.running import Keyturn
from support.stores import Place, entry

TESTS = Path(__file__).parents[1]


@dataclass
class History:
    """A store with several writers, its file of anchors, and older copies of the store."""

    folder: Path
    draw: random.Random
    older: list[Path] = field(default_factory=list)
    stores: list[Store] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.folder / "state").mkdir(mode=0o700, parents=True)
        self.path = self.folder / "state" / "k.db"
        self.file = self.folder / "anchors"
        self.place = Place(url=f"sqlite:///{self.path}", state_dir=self.path.parent)
        self.files: dict[str, AnchorFile] = {}

    def writer(self, name: str) -> Store:
        """Return the store as this writer has it open."""
        for store in self.stores:
            if store.writer == name:
                return store
        self.stores.append(self.place.open(name))
        return self.stores[-1]

    def work(self, store: Store, number: int) -> None:
        """Commit some entries of several agents in one transaction."""
        actions = ("rotation.opened", "version.promoted", "revoke", "suspend")
        made = [
            entry(
                self.draw.choice(actions),
                agent=f"agent-{self.draw.randrange(5)}",
                version_id=f"v{self.draw.randrange(10**6)}",
                detail=(("n", self.draw.randrange(10**6)),),
            )
            for _ in range(number)
        ]
        store.database.write(lambda connection: store.record_in(connection, made))

    def anchor(self, store: Store) -> None:
        """Anchor as a daemon does."""
        heads = store.anchor_audit(why="hourly")
        file = self.files.setdefault(store.writer, AnchorFile(self.file))
        file.append(
            heads, store_id=store.store_id, writer=store.writer, why="hourly", at=datetime.now(UTC)
        )

    def keep_copy(self) -> None:
        """Keep the store as it is now."""
        self.older.append(self.folder / f"older-{len(self.older)}.db")
        shutil.copy(self.path, self.older[-1])

    def close(self) -> None:
        """Close every store."""
        self.place.close()


def found(path: Path, kept: Anchors) -> list[str]:
    """Return what `audit --verify --anchor` finds wrong."""
    place = Place(url=f"sqlite:///{path}", state_dir=path.parent)
    try:
        store = place.open("auditor")
        wrong = store.verify_audit() + anchors.unmet(store.database.read, kept.quotes)
        return kept.problems + wrong + ["another store"] * bool(kept.stores - {store.store_id})
    finally:
        place.close()


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    """A history of three writers and eight anchors, with entries behind the last one."""
    made = History(tmp_path / "h", random.Random(15))
    for number in range(8):
        store = made.writer(f"w{number % 3}")
        made.work(store, made.draw.randrange(8, 30))
        made.keep_copy()
        made.work(made.writer(f"w{(number + 1) % 3}"), 5)
        made.anchor(store)
    made.work(made.writer("w1"), 9)
    yield made
    made.close()


def manipulate(history: History, folder: Path, number: int) -> tuple[Counter[str], list[str]]:
    """Do that many manipulations; return how many of each kind, and those that were not found."""
    kept = read_anchors(history.file)
    newest: dict[str, int] = {}
    for quote in kept.quotes:
        newest[quote.chain] = max(newest.get(quote.chain, 0), quote.seq)
    done, missed = Counter[str](), []
    (folder / "forged").mkdir(mode=0o700)
    forged = folder / "forged" / "k.db"
    for seed in range(number):
        kind = KINDS[seed % len(KINDS)]
        shutil.copy(history.path, forged)
        forged.chmod(0o600)
        forger = Forger(forged, random.Random(seed), newest)
        forger.act(kind, history.older)
        forged.chmod(0o600)
        done[kind] += 1
        if not found(forged, kept):
            missed.append(f"{seed}: {kind}, skill {forger.skill}")
    return done, missed


def test_a_manipulated_audit_is_found(history: History, tmp_path: Path) -> None:
    """Cut, rewritten, swapped, dropped, put back, with all hashes made anew: 50 of 50 are found."""
    assert found(history.path, read_anchors(history.file)) == []
    done, missed = manipulate(history, tmp_path, 50)
    assert missed == []
    assert done.total() == 50


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_five_hundred_manipulations_are_found(history: History, tmp_path: Path) -> None:
    """The long version of the above (security.md, test 15)."""
    done, missed = manipulate(history, tmp_path, 500)
    print(
        f"audit: {done.total() - len(missed)} of {done.total()} manipulations found, {dict(done)}"
    )
    assert missed == []


# --- honest histories ---------------------------------------------------------------------


def live(history: History) -> list[Path]:
    """Go through one honest history; return every file of anchors that somebody may hold."""
    draw, held = history.draw, []
    for step in range(draw.randrange(8, 16)):
        store = history.writer(f"w{draw.randrange(4)}")
        match draw.randrange(8):
            case 0 | 1 | 2:
                history.work(store, draw.randrange(1, 12))
            case 3 | 4:
                history.anchor(store)
            case 5:  # killed between the audit and the file
                store.anchor_audit(why="hourly")
            case 6 if history.file.exists():
                if draw.random() < 0.5:  # killed while it wrote its line
                    with history.file.open("ab") as file:
                        file.write(b'{"at":"2026-01-01T00:00:00Z","heads":{"w1/2":[4,"ab')
                else:
                    held.append(history.folder / f"rotated-{step}")
                    history.file.rename(held[-1])
            case _ if history.file.exists():
                held.append(history.folder / f"copy-{step}")
                content = history.file.read_bytes()
                held[-1].write_bytes(content[: len(content) - draw.randrange(3)])
            case _:
                pass
    history.work(history.writer("w0"), 3)
    history.anchor(history.writer("w0"))
    return [*held, history.file]


def alarms(folder: Path, number: int) -> tuple[int, list[str]]:
    """Return how many files were compared, and every problem that was told."""
    compared, told = 0, []
    for seed in range(number):
        history = History(folder / f"h{seed}", random.Random(seed))
        try:
            for file in live(history):
                kept = read_anchors(file)
                if kept.problems == [NO_ANCHOR]:
                    continue  # a copy of a line that was torn
                compared += 1
                told += [f"{seed} {file.name}: {one}" for one in found(history.path, kept)]
        finally:
            history.close()
    return compared, told


def test_an_honest_history_raises_no_alarm(tmp_path: Path) -> None:
    """Several writers, crashes, torn lines, rotated and copied files: nothing is told."""
    compared, told = alarms(tmp_path, 8)
    assert told == []
    assert compared >= 8


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_a_hundred_honest_histories_raise_no_alarm(tmp_path: Path) -> None:
    """The long version of the above."""
    compared, told = alarms(tmp_path, 100)
    print(f"audit: 100 honest histories, {compared} files of anchors, {len(told)} false alarms")
    assert told == []


_ANCHORING = """
import sys
from pathlib import Path
from security.test_audit_anchors import History
import random
history = History.__new__(History)
history.folder, history.draw, history.older, history.stores = Path(sys.argv[1]), random.Random(), [], []
history.path = history.folder / "state" / "k.db"
history.file = history.folder / "anchors"
from support.stores import Place
history.place = Place(url=f"sqlite:///{history.path}", state_dir=history.path.parent)
history.files = {}
store = history.writer(sys.argv[2])
print("ready", flush=True)
while True:
    history.work(store, 2)
    history.anchor(store)
"""


def kill_anchoring(folder: Path, kills: int) -> Anchors:
    """Kill a process that anchors all the time, again and again."""
    history = History(folder, random.Random(1))
    history.close()
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    draw = random.Random(7)
    for number in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", _ANCHORING, str(folder), f"w{number}"],
            stdout=subprocess.PIPE,
            env=environ,
        )
        assert process.stdout is not None
        process.stdout.readline()
        size, until = _size(history.file), time.monotonic() + 20
        while _size(history.file) == size and time.monotonic() < until:
            time.sleep(draw.random() / 200)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    kept = read_anchors(history.file)
    assert found(history.path, kept) == []
    return kept


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_killed_while_anchoring(tmp_path: Path) -> None:
    """SIGKILL at any moment leaves a file that the audit agrees with."""
    assert kill_anchoring(tmp_path / "h", 2).lines >= 2


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_killed_forty_times_while_anchoring(tmp_path: Path) -> None:
    """The long version of the above."""
    print(
        f"audit: 40 kills while anchoring, {kill_anchoring(tmp_path / 'h', 40).lines} lines, whole"
    )


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_a_hundred_thousand_entries_are_verified_quickly(tmp_path: Path) -> None:
    """Verification with anchors stays a matter of seconds, and one look of the daemon of moments."""
    history = History(tmp_path / "h", random.Random(1))
    for number in range(200):
        store = history.writer(f"w{number % 4}")
        history.work(store, 500)
        history.anchor(store)
    kept, began = read_anchors(history.file), time.monotonic()
    assert found(history.path, kept) == []
    whole = time.monotonic() - began
    history.close()
    print(f"audit: 100,000 entries, {len(kept.quotes)} quotes, verified in {whole:.1f} s")
    assert whole < 60


# --- the file itself ----------------------------------------------------------------------


def test_a_changed_file_of_anchors_is_told(history: History, tmp_path: Path) -> None:
    """A line that was altered, or taken out of the middle, is named; a torn end is none."""
    lines = history.file.read_bytes().splitlines(keepends=True)
    other = tmp_path / "other"
    other.write_bytes(
        b"".join([*lines[:2], lines[2].replace(b'"hourly"', b'"whenever"'), *lines[3:]])
    )
    assert any("line 3 was changed" in one for one in read_anchors(other).problems)
    other.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    assert read_anchors(other).problems == ["lines are missing before line 3"]
    other.write_bytes(b"".join(lines)[:-9])
    assert read_anchors(other).problems == []
    other.write_bytes(b"nothing")
    assert read_anchors(other).problems == [NO_ANCHOR]
    with pytest.raises(AnchorsUnusable):
        read_anchors(tmp_path / "none")


def test_a_line_is_short(history: History) -> None:
    """It quotes what has moved since the line before, whoever appended that."""
    store = history.writer("w2")
    history.anchor(store)
    before = len(history.file.read_bytes())
    history.anchor(store)
    added = history.file.read_bytes()[before:]
    assert added.count(b"/") == 1, added  # its own chain of anchors


def test_a_file_that_others_can_write_is_not_used(history: History) -> None:
    """It would prove nothing."""
    history.file.chmod(0o666)
    with pytest.raises(AnchorsUnusable, match="can be written by others"):
        history.anchor(history.writer("w1"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_somebody_else_is_not_used(history: History) -> None:
    """Its owner writes it, whatever its mode says."""
    history.anchor(history.writer("w1"))
    os.chown(history.file, 12345, -1)
    with pytest.raises(AnchorsUnusable, match="can be written by others"):
        history.anchor(history.writer("w1"))


def test_a_pipe_in_the_place_of_the_file_stops_no_start(
    history: History, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever waits for its other end would wait for ever."""
    pipe = history.folder / "pipe"
    os.mkfifo(pipe, 0o600)
    settings = SimpleNamespace(anchor_file=pipe)
    parts: Any = SimpleNamespace(settings=settings, store=history.writer("w1"))
    starts = threading.Thread(
        target=Anchoring(parts, Metrics(), lambda _code: None).start, daemon=True
    )
    starts.start()
    starts.join(10.0)
    assert not starts.is_alive()
    assert "no plain file" in capsys.readouterr().out


# --- the daemon ---------------------------------------------------------------------------


def test_the_daemon_anchors_and_finds_a_store_that_was_put_back(tmp_path: Path) -> None:
    """At start and end; an older store is an incident at the next start, and `--anchor` names it."""
    kt = Keyturn(tmp_path, agents=1)
    file = tmp_path / "anchors"
    file.touch(mode=0o600)
    kt.content["audit"] = {"anchor_file": str(file)}
    kt.write()
    with kt:
        kt.wait_for(lambda: file.stat().st_size > 0)
    assert "audit.broken" not in kt.log.read_text()
    older = tmp_path / "older.db"
    shutil.copy(kt.store, older)
    with kt:
        kt.run("suspend", "agent-0")
    assert len(file.read_bytes().splitlines()) == 4
    done = kt.run("audit", "--anchor", str(file))  # the daemon is down: straight on the store
    assert (done.returncode, "chain: whole" in done.stdout) == (0, True), done.stderr

    logged = read_anchors(kt.log)
    assert (logged.lines, found(kt.store, logged)) == (4, [])
    shutil.copy(older, kt.store)
    with kt:
        kt.wait_for(lambda: "audit.broken" in kt.log.read_text())
        code, said = kt.ask("audit", "--anchor", str(file), "--limit", "20")
        assert code == 1
        assert "an older store was put back" in said["chain"]["problem"]
        assert "keyturn_audit_verified 0.0" in kt.run("metrics").stdout
