"""How a command gets done: by the daemon, or straight on the store where the daemon is down."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from keyturn.cli.client import DEFAULT_SOCKET, AdminClient, AnswerLost, DaemonDown, OnProgress
from keyturn.core.secret import Secret
from keyturn.errors import ConfigError

DEFAULT_CONFIG = Path("/etc/keyturn/keyturn.yaml")

# Commands that have an answer without the daemon; the rest need something that only it does.
WITHOUT_DAEMON = frozenset(
    {"status", "status.own", "revoke", "suspend", "resume", "audit", "audit.quoted", "verifiers"}
)


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
    socket: Path | None,
    config: Path,
    on_progress: OnProgress | None = None,
) -> Any:
    """Return the command's result, from the daemon if it runs.

    `config` names the daemon's socket, and the store for the commands that can do without the
    daemon; `socket` goes before what stands there. Raises KeyturnError.
    """
    try:
        return _by_daemon(AdminClient(socket or socket_of(config)), command, args, on_progress)
    except KeyboardInterrupt:
        if args.get("wait"):
            print("note: only the waiting ends here; the daemon goes on", file=sys.stderr)  # noqa: T201
        raise
    except DaemonDown:
        if command not in WITHOUT_DAEMON:
            raise
        # A daemon that is gone, or stopped in the middle, must not keep a revoke from working.
        print("note: the daemon does not answer; working on the store directly", file=sys.stderr)  # noqa: T201
    return _on_the_store(command, args, config, on_progress)


def _by_daemon(
    client: AdminClient, command: str, args: dict[str, Any], on_progress: OnProgress | None
) -> Any:
    """Call once, and once more where the answer was lost and a repeat does nothing twice."""
    try:
        return client.call(command, args, on_progress)
    except AnswerLost:
        if not args.get("request_id"):
            raise
    print("note: the connection broke; asking again", file=sys.stderr)  # noqa: T201
    try:
        return client.call(command, args, on_progress)
    except DaemonDown:
        if command in WITHOUT_DAEMON:
            raise
        raise AnswerLost from None


def socket_of(config: Path, *, quiet: bool = False) -> Path:
    """Return `admin.socket` of a configuration, the default where the file names none.

    A file that cannot be read, or is broken, is no reason to give up: the daemon may run well with
    what it read before, and a revoke must reach it.
    """
    try:
        text = config.read_text(errors="replace")
    except OSError as error:
        if config != DEFAULT_CONFIG and not quiet:
            reason = os.strerror(error.errno or 0)
            print(f"note: {config}: {reason}; trying {DEFAULT_SOCKET}", file=sys.stderr)  # noqa: T201
        return DEFAULT_SOCKET
    named = _named_socket(text)
    return Path(named) if named.startswith("/") else DEFAULT_SOCKET


def _named_socket(text: str) -> str:
    import yaml

    try:
        found = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - both safe
        return str(found["admin"]["socket"])
    except yaml.YAMLError:
        line = _SOCKET_LINE.search(text)  # no other section has a key of this name
        return line[1] if line else ""
    except (KeyError, TypeError, ValueError):
        return ""


_SOCKET_LINE = re.compile(r"""\bsocket["']?\s*:\s*["']?(/[^\s"',}]+)""")


def _on_the_store(
    command: str, args: dict[str, Any], config: Path, on_progress: OnProgress | None
) -> Any:
    # Asked before the store is opened: that drops root, and the audit wants who it was.
    peer = late("keyturn.daemon.peer", "local_peer")(os.environ.get("SUDO_USER", ""))
    try:
        with store(config) as offline:
            function = offline.commands()[command]
            return function(args, peer, on_progress or (lambda _event: None))
    except ConfigError as error:
        if command != "revoke":
            raise
        # Raised before anything is done: nobody may take silence for a cut.
        raise ConfigError(f"NOTHING WAS CUT: {error}", hint=_BY_HAND) from None


_BY_HAND = (
    "name the store: `KEYTURN_STORE__URL=sqlite:////PATH/keyturn.db keyturn revoke …`; or by hand, as"
    " the daemon's user: `touch STATE/revoked.d/VERSION`, STATE being the folder of the database"
    " (`keyturn identify < SECRET` says which VERSION)"
)
