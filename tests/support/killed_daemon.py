"""A daemon that is killed by SIGKILL before or after its n-th effect: `killed_daemon CONFIG N [own]`.

With `own` only what it does about its own logins counts.

The product has no switch for this: the daemon's own parts are wrapped from outside.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keyturn.daemon import service
from keyturn.daemon.service import Service

JOURNAL_EFFECTS = ("save", "claim", "release")
DESTINATION_EFFECTS = ("stage", "activate", "retire", "withdraw")
OWN_EFFECTS = ("issue", "publish", "destroy")


class Trap:
    """Counts boundaries of effects and ends the process at the n-th."""

    def __init__(self, number: int) -> None:
        self._left = number
        self._guard = threading.Lock()

    def pass_by(self) -> None:
        with self._guard:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def trapped(*args: Any, **kwargs: Any) -> Any:
            self.pass_by()
            result = call(*args, **kwargs)
            self.pass_by()
            return result

        return trapped


class KilledService(Service):
    """The daemon, with a trap around everything that leaves a trace."""

    trap: Trap
    own = False

    def _connect(self) -> None:
        super()._connect()
        if self.own:
            self._trap_own_logins()
            return
        for destination in self.parts.destinations.values():
            for name in DESTINATION_EFFECTS:
                setattr(destination, name, self.trap.around(getattr(destination, name)))
        store = self.parts.store
        for name in JOURNAL_EFFECTS:
            setattr(store, name, self.trap.around(getattr(store, name)))

    def _trap_own_logins(self) -> None:
        for destination in self.parts.destinations.values():
            for name in OWN_EFFECTS if destination.own_authority is not None else ():
                authority = destination.own_authority
                setattr(authority, name, self.trap.around(getattr(authority, name)))
        store = self.parts.store
        store.save_own = self.trap.around(store.save_own)  # type: ignore[method-assign]


if __name__ == "__main__":
    KilledService.trap = Trap(int(sys.argv[2]))
    KilledService.own = sys.argv[3:] == ["own"]
    service.Service = KilledService  # type: ignore[misc]
    sys.exit(service.run(Path(sys.argv[1])))
