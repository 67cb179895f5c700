"""A daemon whose scheduler hangs as long as a file is there: `stuck_daemon CONFIG FILE`.

The product has no switch for this: its own loop is wrapped from outside.
"""

from __future__ import annotations

import sys
import time
from datetime import datetime
from pathlib import Path

from keyturn.daemon import service
from keyturn.daemon.service import Service

HANGS = Path(sys.argv[2])


class StuckService(Service):
    """The daemon, with a tick that can be held."""

    def _hand_out(self, now: datetime) -> None:
        while HANGS.exists():
            time.sleep(0.05)
        super()._hand_out(now)


if __name__ == "__main__":
    service.Service = StuckService  # type: ignore[misc]
    sys.exit(service.run(Path(sys.argv[1])))
