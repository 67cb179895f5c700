"""How a command gets done: by the daemon, or straight on the store where the daemon is down."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from keyturn.cli.client import AdminClient, DaemonDown, OnProgress
from keyturn.core.secret import Secret

# Commands that have an answer without the daemon; the rest need something that only it does.
WITHOUT_DAEMON = frozenset({"status", "revoke", "suspend", "resume", "audit"})


class Offline(Protocol):
    """What `keyturn.daemon.offline` gives: the daemon's command functions on the bare store."""

    def commands(self) -> Mapping[str, Callable[[dict[str, Any], Any, OnProgress], Any]]:
        """Return the same functions under the same names as at the socket."""

    def verify(self, login: str, secret: Secret) -> bool:
        """Tell whether the store accepts this pair now."""


def late(module: str, name: str) -> Any:
    """Import when it is used: `--help` must not pay for SQLAlchemy, pydantic and the SDKs."""
    return getattr(import_module(module), name)


@contextmanager
def store(config: Path) -> Iterator[Offline]:
    """Open the store that the configuration names, as a library."""
    opened = cast(
        "AbstractContextManager[Offline]", late("keyturn.daemon.offline", "offline")(config)
    )
    with opened as offline:
        yield offline


def ask(
    command: str,
    args: dict[str, Any],
    *,
    socket: Path,
    config: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Any:
    """Return the command's result, from the daemon if it runs.

    `config` names the store for the commands that can do without the daemon. Raises KeyturnError.
    """
    try:
        return AdminClient(socket).call(command, args, on_progress)
    except DaemonDown:
        if config is None or command not in WITHOUT_DAEMON:
            raise
        # A daemon that is gone, or stopped in the middle, must not keep a revoke from working.
        print("note: the daemon does not answer; working on the store directly", file=sys.stderr)  # noqa: T201
    return _on_the_store(command, args, config, on_progress)


def _on_the_store(
    command: str, args: dict[str, Any], config: Path, on_progress: OnProgress | None
) -> Any:
    # Asked before the store is opened: that drops root, and the audit wants who it was.
    peer = late("keyturn.daemon.peer", "local_peer")(os.environ.get("SUDO_USER", ""))
    with store(config) as offline:
        function = offline.commands()[command]
        return function(args, peer, on_progress or (lambda _event: None))
