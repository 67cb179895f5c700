"""The first hour of an operator, as the page prints it: nothing in it is only prose."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.page import play

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(400)
def test_the_first_hour_goes_as_it_is_printed(tmp_path: Path) -> None:
    """Install, configure, rotate, revoke, back up, restore, upgrade, uninstall: as typed, in order."""
    tmp_path.chmod(0o755)
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "KEYTURN_SOURCE": str(ROOT),
        "PIP_CACHE_DIR": os.environ.get("PIP_CACHE_DIR", str(Path.home() / ".cache" / "pip")),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }

    outputs = play(
        (ROOT / "docs" / "tutorial" / "first-hour.md").read_text(),
        folder=tmp_path,
        environ=environ,
        limit=380,
    )

    assert len(outputs) > 8
    assert not (tmp_path / "first-hour").exists()
