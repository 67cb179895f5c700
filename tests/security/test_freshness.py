"""No verification that starts after a cut has returned says yes, however it meets the store.

Each race has two threads that verify a secret over and over, with everything remembered that can be
remembered, while it is cut off. Half of the cuts are revocations, which the spool and the store
both know; the other half are suspensions, which only the store knows.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from keyturn.core.secret import mint
from keyturn.storage import copying, engine
from keyturn.verifier.decision import Verifier
from keyturn.verifier.hashing import CHEAP_FOR_TESTS, Hashing, tag
from support.cutter import administration, cut, open_store
from support.running import accepts
from support.stores import RealClock, add

SEED = int(os.environ.get("KEYTURN_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)
TESTS = Path(__file__).parents[1]
AGENT = "a"

rounds = pytest.mark.parametrize(
    "rounds",
    [1000, pytest.param(10_000, marks=[pytest.mark.full, pytest.mark.timeout(1800)])],
    ids=["tenth", "whole"],
)

_INSERT = (
    "INSERT INTO versions (id, login, credential_uid, seq, state, scheme, digest, tag, origin, exposed,"
    " fence, minted_at) VALUES (?, 'a', 'cred-a', ?, 'kept', 'argon2id', ?, ?, 'minted', 1, 1, ?)"
)


@dataclass
class Shown:
    """A secret that is good, and its version."""

    id: str
    secret: str
    version: str

    def __getitem__(self, key: str) -> str:
        return str(getattr(self, key))


class Scene:
    """A store with one agent on a disk that syncs for nothing, a verifier, and threads that ask."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.random = random.Random(SEED)
        self.store = open_store(folder, writer="races")
        (folder / "revoked.d").mkdir(mode=0o700, exist_ok=True)
        add(self.store, AGENT)
        self.verbs = administration(folder, self.store)
        self.hashing = Hashing(cost=CHEAP_FOR_TESTS)
        self.verifier = Verifier.open(
            f"sqlite:///{self.path}", state_dir=folder, clock=RealClock(), hashing=self.hashing
        )
        self.pool = ThreadPoolExecutor(2)
        self.raw = sqlite3.connect(self.path, isolation_level=None, timeout=5)
        self.seq = 0

    @property
    def path(self) -> Path:
        """The SQLite file."""
        return self.folder / "keyturn.db"

    def close(self) -> None:
        """End everything."""
        self.pool.shutdown()
        self.raw.close()
        self.verifier.close()
        self.store.close()

    def fresh(self) -> Shown:
        """Add one more accepted version, and have the verifier remember it."""
        self.seq += 1
        version_id, secret = mint(random_bytes=self.random.randbytes)
        digest, its_tag = self.hashing.digest(secret), tag(version_id, secret)
        self.raw.execute(_INSERT, (version_id, self.seq, digest, its_tag, time.time_ns() // 1000))
        shown = Shown(id=AGENT, secret=secret.reveal(), version=version_id)
        assert settled(self.verifier, shown) is True
        return shown

    def race(self, shown: Shown, end: Callable[[], float]) -> int:
        """Cut a secret off by `end`, which says when that had returned; count late yeses."""
        over, begun = threading.Event(), threading.Barrier(3)

        def ask() -> list[float]:
            yes, last = [], False
            begun.wait(10)
            while not last:
                last = over.is_set()
                started = time.monotonic()
                if accepts(self.verifier, shown):
                    yes.append(started)
            return yes

        asking = [self.pool.submit(ask) for _ in range(2)]
        begun.wait(10)
        time.sleep(self.random.random() * 0.001)
        try:
            returned = end()
            mine = [time.monotonic()] if accepts(self.verifier, shown) else []
        finally:
            over.set()
        return sum(at > returned for one in asking for at in one.result()) + len(mine)


def settled(verifier: Verifier, shown: Shown) -> bool | None:
    """Ask until the verifier can tell."""
    until = time.monotonic() + 10
    while (answer := accepts(verifier, shown)) is None:
        assert time.monotonic() < until
    return answer


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """Give a scene in memory where there is such a place: the races are with locks, not disks."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else tmp_path
    folder = Path(tempfile.mkdtemp(dir=place))
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0002)  # more interleavings, and no 5 ms for each of them
    one = Scene(folder)
    yield one
    one.close()
    sys.setswitchinterval(before)
    shutil.rmtree(folder)


def run_races(scene: Scene, rounds: int, cut_by: Callable[[str, str], float]) -> None:
    """Race so often, revocations and suspensions in turn."""
    stale, shown = 0, scene.fresh()
    for number in range(rounds):
        if number % 2:
            stale += scene.race(shown, lambda: cut_by("suspend", AGENT))
            cut_by("resume", AGENT)
            assert settled(scene.verifier, shown) is True
        else:
            revoked = scene.fresh()
            stale += scene.race(revoked, lambda: cut_by("revoke", revoked.version))  # noqa: B023
    assert stale == 0, f"seed {SEED}: {stale} of {rounds}"


@rounds
def test_a_cut_in_the_same_process_is_seen_at_once(scene: Scene, rounds: int) -> None:
    """Threads of one process, one of which cuts: no later verification says yes."""

    def cut_here(command: str, name: str) -> float:
        result = cut(scene.verbs, command, name)
        assert not result.get("incomplete")
        return time.monotonic()

    run_races(scene, rounds, cut_here)


@rounds
def test_a_cut_by_another_process_is_seen_at_once(scene: Scene, rounds: int) -> None:
    """A process of its own cuts: no later verification of ours says yes."""
    with another_process(scene.folder) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def cut_there(command: str, name: str) -> float:
            print(command, name, file=process.stdin, flush=True)
            return float(process.stdout.readline())

        run_races(scene, rounds, cut_there)


@contextmanager
def another_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that cuts what it is told to."""
    with subprocess.Popen(
        [sys.executable, "-m", "support.cutter", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
    ) as process:
        yield process


@rounds
def test_a_revoke_during_open_reads_is_seen_at_once(
    scene: Scene, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody keeps a read open, so that nothing can be committed: the refusal needs no commit."""
    monkeypatch.setattr(engine, "BUSY", 0.0)
    impatient = open_store(scene.folder, writer="impatient")
    verbs = administration(scene.folder, impatient, patience=0.0)
    incomplete = stale = 0

    def revoke(shown: Shown) -> float:
        nonlocal incomplete
        incomplete += cut(verbs, "revoke", shown.version)["incomplete"]
        return time.monotonic()

    reader = sqlite3.connect(scene.path, isolation_level=None)
    for _ in range(rounds):
        shown = scene.fresh()
        with open_read(reader):
            stale += scene.race(shown, lambda: revoke(shown))  # noqa: B023
        scene.raw.execute("UPDATE versions SET state = 'revoked', ended_at = 1")
    reader.close()
    impatient.close()
    assert stale == 0, f"seed {SEED}: {stale} of {rounds}"
    assert incomplete == rounds  # every one of them met the lock


@contextmanager
def open_read(connection: sqlite3.Connection) -> Iterator[None]:
    """Hold a read of the store open, as a forgotten cursor does."""
    connection.execute("BEGIN")
    connection.execute("SELECT count(*) FROM versions").fetchone()
    yield
    connection.execute("ROLLBACK")


@rounds
def test_a_replaced_file_is_read_at_once(scene: Scene, rounds: int) -> None:
    """A newer copy takes the file's place: the next verification reads that one, spool or not."""
    shown = scene.fresh()
    scene.raw.execute("PRAGMA journal_mode=DELETE")
    good = scene.path.read_bytes()
    scene.raw.execute("UPDATE versions SET state = 'revoked', ended_at = 1")
    revoked = scene.path.read_bytes()

    def replace_by(content: bytes) -> float:
        copy = scene.folder / "copy.db"
        copy.write_bytes(content)
        copy.replace(scene.path)
        return time.monotonic()

    stale = 0
    for _ in range(rounds):
        replace_by(good)
        assert settled(scene.verifier, shown) is True
        stale += scene.race(shown, lambda: replace_by(revoked))
    assert stale == 0, f"seed {SEED}: {stale} of {rounds}"


@pytest.mark.parametrize(
    "rounds",
    [100, pytest.param(10_000, marks=[pytest.mark.full, pytest.mark.timeout(3600)])],
    ids=["some", "whole"],
)
def test_a_restored_store_is_read_at_once(scene: Scene, rounds: int) -> None:
    """A backup takes the place of the rows, in quarantine: no verification after that says yes."""
    shown = scene.fresh()
    good, restored = scene.folder / "good.copy", scene.folder / "restored.copy"
    copying.snapshot(scene.path, good)
    copying.snapshot(scene.path, restored)
    with sqlite3.connect(restored) as copy:
        copy.execute("INSERT INTO quarantine VALUES ('', 'restored', 1, '{}')")
        copy.execute("UPDATE meta SET incarnation = incarnation + 1")
    copy.close()

    def restore() -> float:
        copying.put_into(restored, scene.path)
        return time.monotonic()

    stale = 0
    for _ in range(rounds):
        copying.put_into(good, scene.path)
        assert settled(scene.verifier, shown) is True
        stale += scene.race(shown, restore)
        assert accepts(scene.verifier, shown) is None
    assert stale == 0, f"seed {SEED}: {stale} of {rounds}"


def test_a_freed_inode_number_never_passes_for_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaced while it is opened, and again by a file that got the freed number: it is noticed."""
    scene = Scene(tmp_path)  # in memory no number comes back
    shown = scene.fresh()
    scene.raw.execute("PRAGMA journal_mode=DELETE")
    good = scene.path.read_bytes()
    scene.raw.execute("UPDATE versions SET state = 'revoked', ended_at = 1")
    revoked = scene.path.read_bytes()
    connect = sqlite3.connect

    def replace_by(content: bytes) -> None:
        copy = scene.folder / "copy.db"
        copy.write_bytes(content)
        copy.replace(scene.path)

    def connect_late(*args: Any, **more: Any) -> Any:
        held = os.open(scene.path, os.O_PATH)
        replace_by(good)
        os.close(held)
        return connect(*args, **more)

    for _ in range(20):
        replace_by(revoked)
        with monkeypatch.context() as patch:
            patch.setattr(sqlite3, "connect", connect_late)
            accepts(scene.verifier, shown)
        replace_by(revoked)
        assert accepts(scene.verifier, shown) is False
    scene.close()
