"""A daemon that stops itself inside one kind of transaction: `stopped_daemon CONFIG KIND MOMENT`.

KIND is what the transaction is for: `claim`, `release`, `append_audit`, `amend`, or a step of the saga
(`mint` is the accept, `activate` the intent, `promote`). MOMENT is `begin` (the lock is taken), `commit`
(everything is written, nothing committed) or `committing` (inside COMMIT, which waits for a reader: new
readers are locked out too). It does so once the file `armed` lies beside the configuration.
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

from sqlalchemy import event
from sqlalchemy.engine import Connection

from keyturn import rotation
from keyturn.daemon import service
from keyturn.daemon.service import Service

CALLS = ("claim", "release", "append_audit", "amend")
KINDS = (*CALLS, "mint", "activate", "promote")
MOMENTS = ("begin", "commit", "committing")


class Trap:
    """Knows what each thread is doing and stops the process in the middle of it, once."""

    def __init__(self, config: Path, kind: str, moment: str) -> None:
        self._armed = config.with_name("armed")
        self._kind = kind
        self._moment = moment
        self._doing = threading.local()

    def around(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Remember what a thread does as long as it does it."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            before = getattr(self._doing, "kind", "")
            self._doing.kind = kind
            try:
                return call(*args, **kwargs)
            finally:
                self._doing.kind = before

        return watched

    def perform(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Watch the steps of the saga under their own names."""

        def watched(saga: Any, action: Any) -> Any:
            return self.around(type(action).__name__.lower(), call)(saga, action)

        return watched

    def at(self, moment: str) -> Callable[[Connection], None]:
        """Return a listener for the begin or the commit of a transaction."""

        def listen(connection: Connection) -> None:
            wanted = "begin" if self._moment == "begin" else "commit"
            if moment == wanted and self._due(connection):
                self._armed.unlink()
                self._stop(str(connection.engine.url.database))

        return listen

    def _due(self, connection: Connection) -> bool:
        reading = connection.get_execution_options().get("keyturn_read")
        kind = getattr(self._doing, "kind", "")
        return not reading and kind == self._kind and self._armed.exists()

    def _stop(self, store: str) -> None:
        if self._moment != "committing":
            os.kill(os.getpid(), signal.SIGSTOP)
            return
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
        for name in CALLS:
            setattr(store, name, self.trap.around(name, getattr(store, name)))
        for moment in ("begin", "commit"):
            event.listen(store.engine, moment, self.trap.at(moment))


if __name__ == "__main__":
    StoppedService.trap = trap = Trap(Path(sys.argv[1]), *sys.argv[2:4])
    rotation._Saga._perform = trap.perform(rotation._Saga._perform)  # type: ignore[method-assign]
    service.Service = StoppedService  # type: ignore[misc]
    sys.exit(service.run(Path(sys.argv[1])))
