"""A daemon that stops itself inside one kind of transaction: `stopped_daemon CONFIG KIND MOMENT`.

KIND is what the transaction does. MOMENT is `begin` (the lock is taken), `commit` (everything is written,
nothing committed) or `committing` (inside COMMIT, which waits for a reader: new readers are locked out
too). It stops once the file `armed` lies beside the configuration.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Connection

from keyturn.core.model import Case
from keyturn.daemon import service
from keyturn.daemon.service import Service

KINDS = ("claim", "accept", "intent", "promote", "release", "amend", "audit")
MOMENTS = ("begin", "commit", "committing")
_CALLS = {"claim": "claim", "release": "release", "amend": "amend", "append_audit": "audit"}


def kinds_of_save(before: Case, after: Case, *, release: bool) -> set[str]:
    """Tell what a saga's save does."""
    known = {version.id for version in before.versions}
    open_before = {intent.uid for intent in before.intents}
    shown = [case.current.id if case.current else "" for case in (before, after)]
    found = {
        "accept": any(version.id not in known for version in after.versions),
        "intent": any(intent.uid not in open_before for intent in after.intents),
        "promote": shown[0] != shown[1],
        "release": release,
    }
    return {kind for kind, does in found.items() if does}


class Trap:
    """Knows what each transaction does and stops the process in the middle of one, once."""

    def __init__(self, config: Path, kind: str, moment: str) -> None:
        self._armed = config.with_name("armed")
        self._kind = kind
        self._moment = moment
        self._doing = threading.local()

    def around(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Remember what a thread does as long as it does it."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._doing.kinds = {kind} if kind else self._of_save(**kwargs)
            try:
                return call(*args, **kwargs)
            finally:
                self._doing.kinds = set()

        return watched

    @staticmethod
    def _of_save(before: Case, after: Case, *, release: bool = False, **_more: Any) -> set[str]:
        return kinds_of_save(before, after, release=release)

    def inside(self, write: Callable[..., Any], store: Path) -> Callable[..., Any]:
        """Stop inside the transaction; another thread may be the one that carries it out."""

        def watched(body: Callable[[Connection], Any]) -> Any:
            ours = self._kind in getattr(self._doing, "kinds", set())

            def stopping(connection: Connection) -> Any:
                self._perhaps_stop(store, "begin", ours=ours)
                result = body(connection)
                self._perhaps_stop(store, "commit", ours=ours)
                return result

            return write(stopping)

        return watched

    def _perhaps_stop(self, store: Path, moment: str, *, ours: bool) -> None:
        wanted = "begin" if self._moment == "begin" else "commit"
        if ours and moment == wanted and self._armed.exists():
            self._armed.unlink()
            if self._moment == "committing":
                stop_soon(store)
            else:
                os.kill(os.getpid(), signal.SIGSTOP)


def stop_soon(store: Path) -> None:
    """Keep a read open, so that the COMMIT waits, and stop the process while it does."""
    reader = sqlite3.connect(store, isolation_level=None, check_same_thread=False)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM versions").fetchone()

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGSTOP)
        reader.close()

    threading.Timer(0.1, stop).start()


class StoppedService(Service):
    """The daemon, with a trap around its transactions."""

    trap: Trap

    def _connect(self) -> None:
        super()._connect()
        store = self.parts.store
        if "save" in vars(store):  # a reload comes here again
            return
        store.save = self.trap.around("", store.save)  # type: ignore[method-assign]
        for name, kind in _CALLS.items():
            setattr(store, name, self.trap.around(kind, getattr(store, name)))
        path = Path(str(store.engine.url.database))
        store.database.write = self.trap.inside(  # type: ignore[method-assign]
            store.database.write, path
        )


if __name__ == "__main__":
    StoppedService.trap = Trap(Path(sys.argv[1]), *sys.argv[2:4])
    service.Service = StoppedService  # type: ignore[misc]
    sys.exit(service.run(Path(sys.argv[1])))
