"""What verifiers remember is bound to the epoch: so no change that they would judge by leaves it alone."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from keyturn.storage.engine import Database
from support.drill import Drill

_JUDGED = (
    "SELECT v.id, v.login, v.state, v.scheme, v.digest, v.tag, v.deadline, v.not_after, a.name, a.state"
    " FROM versions v JOIN credentials c ON c.uid = v.credential_uid JOIN agents a ON a.uid = c.agent_uid"
    " WHERE v.state IN ('pending', 'current', 'previous', 'kept') ORDER BY v.id"
)
_EPOCH = "SELECT incarnation, epoch FROM meta"


def _seen(path: Path) -> tuple[Any, Any]:
    """Return what a verifier could say yes to, and the epoch."""
    with closing(sqlite3.connect(path)) as store:
        return store.execute(_JUDGED).fetchall(), store.execute(_EPOCH).fetchone()


@pytest.mark.parametrize("seed", [1, 2])
def test_no_commit_changes_a_decision_and_leaves_the_epoch(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through random histories, commit by commit; what was not accepted before could not be remembered."""
    drill = Drill(tmp_path, seed)
    path = tmp_path / "state" / "keyturn.db"
    write, commits, moved = Database.write, [], []

    def watched(self: Database, body: Callable[[Connection], Any]) -> Any:
        rows, epoch = _seen(path)
        try:
            return write(self, body)
        finally:
            after, later = _seen(path)
            commits.append(1)
            lost = [row for row in rows if row not in after]
            if lost:
                moved.append(1)
                assert later > epoch, lost

    monkeypatch.setattr(Database, "write", watched)
    drill.happen(25)
    drill.close()
    assert len(commits) > 20
    assert len(moved) > 3
