"""What answers about this daemon from its first moment on: the listener, and `keyturn health`.

The admin socket comes with the lead; until then a standby says how it is at a socket beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import structlog

from keyturn.config import Settings
from keyturn.daemon.listener import Listener
from keyturn.daemon.metrics import Metrics
from keyturn.daemon.pages import Pages
from keyturn.daemon.peer import Role, Roles
from keyturn.daemon.readiness import Readiness, Reason
from keyturn.daemon.socket import AdminServer, Command
from keyturn.daemon.wire import waiting_path
from keyturn.errors import ConfigError

_log = structlog.get_logger(__name__)


class Front:
    """The two ways to ask a daemon how it is. Raises ConfigError for a listener that cannot be."""

    def __init__(
        self, settings: Settings, socket: Path, roles: Roles, readiness: Readiness, metrics: Metrics
    ) -> None:
        self._readiness = readiness
        self._listener: Listener | None = None
        if settings.listen.address is not None:
            self._listener = Listener(settings.listen, Pages(readiness, metrics))
        health = Command(role=Role.VIEW, function=lambda _args, _peer, _tell: self._health())
        self._waiting: AdminServer | None = AdminServer(
            waiting_path(socket), {"health": health}, roles
        )

    def open(self) -> None:
        """Begin to answer."""
        if self._listener is not None:
            self._listener.start()
        try:
            if self._waiting is not None:
                self._waiting.start()
        except (
            ConfigError
        ) as error:  # another standby has it; the admin socket has checks of its own
            self._waiting = None
            _log.info("daemon.no-waiting-socket", problem=str(error))

    def confirm(self) -> None:
        """Raise ConfigError where somebody else has the address, and it was not who led before us.

        Who stood by goes on: that it rotates matters more, and the address is tried again.
        """
        refused = self._listener.refused if self._listener else None
        if refused is None:
            return
        if Reason.STANDBY not in self._readiness.reasons:
            raise refused
        _log.error("listener.refused", problem=str(refused), hint=refused.hint)

    def lead(self) -> None:
        """Leave the answers about health to the admin socket."""
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None

    def close(self) -> None:
        """Answer no more."""
        self.lead()
        if self._listener is not None:
            self._listener.close()

    def _health(self) -> dict[str, Any]:
        return self._readiness.describe()
