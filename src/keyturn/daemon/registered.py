"""Which verifiers remember answers, and how far each of them is: a command, and a count for metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from keyturn.core.walltime import rfc3339
from keyturn.daemon.metrics import Metrics
from keyturn.daemon.peer import Peer, Role
from keyturn.daemon.socket import Command, Progress
from keyturn.errors import StorageError
from keyturn.storage.verifiers import RegisteredVerifier, Registrations, registered
from keyturn.wiring import Parts


class VerifierCommands:
    """What the admin socket can be asked about verifiers."""

    def __init__(self, parts: Callable[[], Parts]) -> None:
        self._parts = parts

    def table(self) -> Mapping[str, Command]:
        """Return every command with the least role that it needs."""
        return {"verifiers": Command(role=Role.VIEW, function=self.verifiers)}

    def verifiers(self, args: dict[str, Any], peer: Peer, progress: Progress) -> Any:
        """List the verifiers that are registered."""
        del args, peer, progress
        database = self._parts().store.database
        found = database.read(registered)
        return {
            "leased": not database.is_sqlite,  # on SQLite each looks at the file before each yes
            "epoch": found.epoch.number,
            "verifiers": [_shown(row, found) for row in found.rows],
        }


def count(parts: Parts, metrics: Metrics) -> None:
    """Count them for the metrics, and take away those that are gone. Nothing on SQLite."""
    waiting = parts.authority.registered
    if waiting is None:
        return
    try:
        metrics.verifiers_live.set(waiting.keep())
    except StorageError:
        return  # the tick says so


def _shown(row: RegisteredVerifier, all_of_them: Registrations) -> dict[str, Any]:
    return {
        "id": row.id,
        "host": row.host,
        "login": row.login,
        "release": row.release,
        "since": rfc3339(row.started_at),
        "lease_seconds": row.lease.total_seconds(),
        "epoch": row.epoch,
        "behind": row.acknowledged < all_of_them.epoch,
        "renewed_at": rfc3339(row.renewed_at),
        "stale": all_of_them.now - row.renewed_at >= row.lease,
    }
