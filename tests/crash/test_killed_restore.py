"""A restore that is killed anywhere is finished by the next one, or by the daemon's start."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from keyturn.storage import copying
from support.drill import Drill, add, revoke, rotate, suspend

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "every",
    [9, pytest.param(1, marks=[pytest.mark.full, pytest.mark.timeout(1800)])],
    ids=["some", "whole"],
)
def test_a_restore_that_was_killed_converges(tmp_path: Path, every: int) -> None:
    """Before and after every copy, commit and line of the ledger: 0 secrets answered otherwise."""
    drill = Drill(tmp_path, 7)
    drill.happen(3)
    copying.snapshot(tmp_path / "state" / "keyturn.db", tmp_path / "backup.db")
    for verb, name in ((rotate, "one"), (add, ""), (revoke, "two"), (rotate, "one")):
        verb(drill, name)
    suspend(drill, "one")
    verdicts = drill.verdicts()
    drill.close()
    (tmp_path / "expected.json").write_text(json.dumps({"held": drill.held, "verdicts": verdicts}))
    (tmp_path / "state").rename(tmp_path / "lost")
    (tmp_path / "state").mkdir(mode=0o700)

    done = subprocess.run(
        [sys.executable, "-m", "support.killed_restore", str(tmp_path), str(every)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
    )

    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] > 1
    assert found["failed"] == 0, done.stderr[-3000:]
    print(f"\n{found['kills']} kills at {found['points']} points: {found['failed']} failed")
    shutil.rmtree(tmp_path / "lost")
    (tmp_path / "expected.json").unlink()
