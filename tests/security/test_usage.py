"""Counting costs no answer, no revoke and no disk, whoever floods, locks, fills or kills."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from keyturn.core.model import VersionState
from keyturn.core.secret import Secret, mint
from keyturn.errors import VerificationFailed
from keyturn.storage.store import Store
from keyturn.storage.usage import FILE, UsageRecords
from keyturn.testing.fakes import FakeClock, seeded
from keyturn.verifier.decision import Verifier
from keyturn.verifier.hashing import CHEAP_FOR_TESTS, Hashing, tag
from keyturn.verifier.usage import Usage
from security.test_full_disk import fill, small_disk
from support.counting import ONE
from support.cutter import administration, cut, open_store
from support.stores import RealClock, add, entry, version

TESTS = Path(__file__).parents[1]
MIB = 1 << 20


class Bench:
    """A store with one agent, and a verifier that counts; flushed by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store: Store = open_store(folder, writer="w")
        (folder / "revoked.d").mkdir(mode=0o700)
        hashing = Hashing(cost=CHEAP_FOR_TESTS)
        self.version_id, self.secret = mint(random_bytes=seeded(1))
        known = version(
            add(self.store, "a"),
            login="a",
            id=self.version_id,
            state=VersionState.CURRENT,
            digest=hashing.digest(self.secret),
            tag=tag(self.version_id, self.secret),
        )
        self.store.amend("cred-a", lambda case: (replace(case, versions=(known,)), [entry()]))
        self.clock = FakeClock(RealClock().now())
        self.records = UsageRecords.open("sqlite:///", state_dir=folder, clock=self.clock)
        self.usage = Usage(self.records, self.clock, source="s")
        self.verifier = Verifier.open(
            f"sqlite:///{folder}/keyturn.db",
            state_dir=folder,
            clock=RealClock(),
            hashing=hashing,
            usage=self.usage,
        )

    def ask(self, number: int, *, junk: Secret | str = "x" * 40) -> None:
        """Present the good secret and junk in turn; each must get its answer."""
        for _ in range(number):
            assert self.verifier.verify("a", self.secret).version_id == self.version_id
            with pytest.raises(VerificationFailed):
                self.verifier.verify("a", junk)

    def counted(self) -> tuple[int, int]:
        """Return uses and refusals as they are stored."""
        uses = self.records.uses([self.version_id])
        return uses[self.version_id].uses, self.records.totals().get("refused", 0)

    def close(self) -> None:
        """End it."""
        self.usage.close()
        self.verifier.close()
        self.store.close()


@contextmanager
def bench_in(folder: Path) -> Iterator[Bench]:
    """Give a bench in a folder."""
    bench = Bench(folder)
    try:
        yield bench
    finally:
        bench.close()


def test_a_locked_file_delays_nothing_and_loses_nothing(tmp_path: Path) -> None:
    """While somebody holds the file exclusively: every answer comes, a revoke is done, all is counted."""
    with bench_in(tmp_path) as bench:
        bench.ask(3)
        assert bench.usage.flush()
        with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as holder:
            holder.execute("BEGIN EXCLUSIVE")
            bench.ask(20)
            assert not bench.usage.flush()
            bench.ask(20)
            done = cut(administration(tmp_path, bench.store), "revoke", bench.version_id)
            assert done["incomplete"] is False
            with pytest.raises(VerificationFailed):
                bench.verifier.verify("a", bench.secret)
            holder.execute("ROLLBACK")
        assert bench.usage.flush()
        assert bench.counted() == (43, 44)
        assert bench.usage.counts["not_flushed"] == 1


def test_a_full_disk_delays_nothing_and_loses_nothing(tmp_path: Path) -> None:
    """The same where no flush finds room, from the first one on; they do as soon as there is some."""
    place = tmp_path / "disk"
    with small_disk(place), bench_in(place) as bench:
        fill(place)
        bench.ask(20)
        assert not bench.usage.flush()
        bench.ask(20)
        assert not bench.usage.flush()
        (place / "neighbour").unlink()
        assert bench.usage.flush()
        assert bench.counted() == (40, 40)


def test_failures_never_touch_the_store(tmp_path: Path) -> None:
    """After junk of every kind, flushed, the store's file is the same to the byte and to the second."""
    with bench_in(tmp_path) as bench:
        path = tmp_path / "keyturn.db"
        bench.ask(1)
        with closing(sqlite3.connect(path)) as reader:
            [before] = reader.execute("PRAGMA data_version").fetchone()
            found, content = path.stat(), path.read_bytes()
            draw = random.Random(3).randbytes
            for _ in range(30):
                bench.ask(1, junk=mint(random_bytes=draw)[1])
            assert bench.usage.flush()
            assert reader.execute("PRAGMA data_version").fetchone() == (before,)
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == (found.st_mtime_ns, found.st_ino)
        assert path.read_bytes() == content
        assert not list(tmp_path.glob("keyturn.db-wal"))
        assert bench.counted()[1] == 31


@pytest.mark.parametrize(
    "number",
    [100_000, pytest.param(1_000_000, marks=[pytest.mark.full, pytest.mark.timeout(1800)])],
)
def test_a_million_failures_cost_less_than_a_mebibyte(tmp_path: Path, number: int) -> None:
    """At 5,000 a second, flushed every ten of them: what is on the disk grows by a share of that.

    As many at one a second, over days, stay below it as well.
    """
    with bench_in(tmp_path) as bench:
        bench.ask(1)
        assert bench.usage.flush()
        before = size_of(tmp_path)
        spared = 1 if number == 10**6 else 10  # answers that only the long version gives
        for done in range(1, number + 1):
            if done % spared:
                bench.usage.failed("refused")
            else:
                with suppress(VerificationFailed):
                    bench.verifier.verify("b" if done % 100 == 0 else None, "x" * 40)
            if done % 50_000 == 0:
                bench.clock.advance(timedelta(seconds=10))
                assert bench.usage.flush()
        grown = size_of(tmp_path) - before
        print(f"{number} failures at 5,000/s: {grown} bytes ({grown * 10**6 // number} a million)")
        assert grown <= MIB * number // 10**6
        assert bench.counted()[1] == number + 1

        minutes = number // 60
        for _ in range(minutes // 500):
            for _ in range(500):
                bench.usage._keep_result(
                    bench.clock.boottime() // timedelta(minutes=1), "refused", 60
                )
                bench.clock.advance(timedelta(minutes=1))
            assert bench.usage.flush()
        grown = size_of(tmp_path) - before
        print(f"{number} failures at 1/s: {grown} bytes ({grown * 10**6 // number} a million)")
        assert grown <= MIB * number // 10**6


def size_of(folder: Path) -> int:
    """Return the bytes of what verifiers have written there, journal included."""
    return sum(path.stat().st_size for path in folder.glob(f"{FILE}*"))


# --- processes ------------------------------------------------------------------------------


def counting(folder: Path, source: str, number: int, *how: str) -> subprocess.Popen[str]:
    """Start a process that counts."""
    return subprocess.Popen(
        [sys.executable, "-m", "support.counting", str(folder), source, str(number), *how],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
    )


def test_processes_add_up_and_a_killed_one_loses_its_last_interval(tmp_path: Path) -> None:
    """Three at once: two end as they should, one is killed after a flush and loses what came later."""
    (tmp_path / "state").mkdir(mode=0o700)
    folder = tmp_path / "state"
    killed = counting(folder, "killed", 1_000, "hold")
    others = [counting(folder, name, 700) for name in ("one", "two")]
    assert killed.stdout is not None
    assert [killed.stdout.readline().strip() for _ in range(2)] == ["flushed", "more"]
    killed.kill()
    killed.communicate()
    assert [(one.communicate()[0].strip(), one.returncode) for one in others] == [
        ("flushed", 0)
    ] * 2
    records = UsageRecords.open("sqlite:///", state_dir=folder, clock=RealClock())
    assert records.uses([ONE])[ONE].uses == 2_400
    assert records.totals() == {"accepted": 2_400, "refused": 2_400}
    records.close()
