"""The restore drill: whatever happened after a backup, a restore neither revives nor forgets anything.

Random histories: agents are added, rotated, cut off, suspended and removed, and the process dies in the
middle of it; then the store is put back to an earlier time in one of several ways. What every secret
that was ever held is answered with must be the same as before.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from keyturn.daemon import keeping, logs
from keyturn.storage import copying
from support.drill import Drill
from support.postgres import Cluster, binaries, postgres  # noqa: F401 - a fixture

SEED = int(os.environ.get("KEYTURN_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)


def histories(few: int, many: int) -> pytest.MarkDecorator:
    """Return how many histories are drilled."""
    whole = pytest.param(many, marks=[pytest.mark.full, pytest.mark.timeout(1800)])
    return pytest.mark.parametrize("count", [few, whole], ids=["some", "whole"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give a folder in memory where there is such a place."""
    monkeypatch.setattr(logs, "configure", lambda **_more: None)
    memory = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else tmp_path))
    yield place
    shutil.rmtree(place)


def compared(drill: Drill, before: dict[str, bool | None]) -> Counter[str]:
    """Count what is answered otherwise than before the loss."""
    found = Counter({"revived": 0, "forgotten": 0, "unavailable": 0})
    for version, verdict in drill.verdicts().items():
        if verdict is not before[version]:
            what = {True: "revived", False: "forgotten", None: "unavailable"}[verdict]
            found[what] += 1
    return found


def lose_spool(drill: Drill) -> None:
    """Lose the tombstones in some histories: the ledger alone must do."""
    if drill.random.random() < 0.3:
        for one in (drill.folder / "state" / "revoked.d").iterdir():
            one.unlink()
        drill.said.append("the spool is lost")


def check(drill: Drill, before: dict[str, bool | None], how: str) -> int:
    """Fail where anything is answered otherwise, or does not go on; returns the secrets asked about."""
    found, story = compared(drill, before), "\n".join(drill.said)
    assert not found.total(), f"seed {drill.seed}, {how}: {dict(found)}\n{story}"
    drill.parts = drill.open()
    found = compared(drill, before)
    assert not found.total(), f"seed {drill.seed}, {how}, started: {dict(found)}\n{story}"
    wrong = drill.quiet()
    assert not wrong, f"seed {drill.seed}, {how}: {wrong}\n{story}"
    drill.close()
    return len(before)


@histories(10, 100)
def test_a_restore_of_a_file_neither_revives_nor_forgets(folder: Path, count: int) -> None:
    """By `store restore`, by a copy put back by hand, and by one that replaced the file."""
    asked = 0
    for number in range(count):
        place = folder / str(number)
        place.mkdir(mode=0o700)
        drill = Drill(place, SEED + number)
        live, copy = place / "state" / "keyturn.db", place / "backup.db"
        drill.happen(drill.random.randrange(2, 10))
        copying.snapshot(live, copy)
        drill.happen(drill.random.randrange(1, 12))
        before = drill.verdicts()
        drill.random.choice([drill.close, drill.kill])()
        lose_spool(drill)
        how = drill.random.choice(["restore", "restore", "adopt", "by hand", "replaced"])
        if how == "restore":
            keeping.restore(drill.config, copy, dry_run=False, ask=lambda _report: True)
        elif how == "replaced":
            copy.replace(live)
        else:
            shutil.copyfile(copy, live)
        if how == "adopt":
            keeping.restore(drill.config, None, dry_run=False, ask=lambda _report: True)
        elif how != "restore":
            drill.parts = drill.open()
            drill.close()
        asked += check(drill, before, how)
        shutil.rmtree(place)
    print(f"\n{count} histories, {asked} secrets: 0 revived, 0 forgotten (seed {SEED})")


@histories(1, 100)
def test_a_restore_by_pg_restore_neither_revives_nor_forgets(
    folder: Path,
    postgres: Cluster,  # noqa: F811 - the fixture
    count: int,
) -> None:
    """A dump by pg_dump goes into a new database, and is adopted there."""
    tools, asked = binaries(), 0
    assert tools is not None
    for number in range(count):
        place = folder / str(number)
        place.mkdir(mode=0o700)
        drill = Drill(place, SEED + number, url=postgres.new_database())
        dump = place / "dump"
        drill.happen(drill.random.randrange(2, 10))
        connection = ["-h", str(postgres.folder), "-U", "keyturn"]
        name = drill.url.partition("@/")[2].partition("?")[0]
        subprocess.run(
            [str(tools / "pg_dump"), *connection, "-Fc", "-f", str(dump), name], check=True
        )
        drill.happen(drill.random.randrange(1, 12))
        before = drill.verdicts()
        drill.close()
        lose_spool(drill)
        drill.url = postgres.new_database()
        name = drill.url.partition("@/")[2].partition("?")[0]
        subprocess.run([str(tools / "pg_restore"), *connection, "-d", name, str(dump)], check=True)
        drill.write()
        how = drill.random.choice(["adopt", "failover"])
        if how == "adopt":
            keeping.restore(drill.config, None, dry_run=False, ask=lambda _report: True)
        else:
            drill.parts = drill.open()
            drill.close()
        asked += check(drill, before, how)
        shutil.rmtree(place)
    print(f"\n{count} histories, {asked} secrets: 0 revived, 0 forgotten (seed {SEED})")
