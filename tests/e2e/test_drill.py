"""A hundredth of the drill: `make drill` has the whole one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "revocation.py"


def test_no_way_of_revoking_accepts_anything_after_it_returned(tmp_path: Path) -> None:
    """Each way refuses, in another process, at the latest when its call returns; under load."""
    out = tmp_path / "drill.json"
    words = ["--revokes", "10", "--agents", "4", "--victims", "5", "--json", out]
    done = subprocess.run(
        [sys.executable, BENCHMARK, *words], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["ways"]
    assert [row["revokes"] for row in rows] == [10, 10, 10, 10, 1]
    assert [row["accepts_after_return"] for row in rows] == [0] * 5
