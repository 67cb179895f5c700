"""The admin socket: a Unix stream socket, a thread per connection, roles by the peer's groups."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from keyturn.daemon import wire
from keyturn.daemon.door import Door
from keyturn.daemon.peer import Peer, Role, Roles, peer_of
from keyturn.errors import KeyturnError, NotPermitted

Progress = Callable[[dict[str, Any]], None]
Handler = Callable[[dict[str, Any], Peer, Progress], Any]

READ_DEADLINE = 10.0  # seconds for one whole line, however it drips
SEND_DEADLINE = 10.0
MOST_CONNECTIONS = 64
MOST_OF_ONE_UID = 16
# How many of them are kept for higher roles, so that no crowd of viewers keeps anybody from revoking.
# Root and the daemon's own uid have the last ones for themselves.
_KEPT_FOR_HIGHER = {Role.VIEW: 32, Role.RESPOND: 16, Role.ADMIN: 8}
_ROLE_HINT = (
    "ask an administrator for one of the unix groups under `admin.groups`, then log in anew"
)
_CHUNK = 16 * 1024
_OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What the socket can be asked: the least role, and the function that answers.

    The function gets the request's args, the peer and a progress callback, and returns what JSON can
    carry. Its KeyturnErrors reach the caller; anything else is an internal error and is logged.
    """

    role: Role
    function: Handler


class Busy(KeyturnError):
    """Too many connections are open."""

    code = "busy"
    retryable = True
    exit_code = 75
    default_hint = (
        "try again in a moment; root and the daemon's own uid have connections of their own"
    )


class UnknownCommand(KeyturnError):
    """The daemon does not know this command."""

    code = "unknown-command"
    exit_code = 2
    default_hint = "command line and daemon may be of different releases: restart the daemon"


class AdminServer:
    """Answers commands at `path` from `start` to `close`.

    Raises ConfigError from `start` where another daemon is alive at this path, or where the folder
    lets others put a socket of their own there.
    """

    def __init__(self, path: Path, handlers: Mapping[str, Command], roles: Roles) -> None:
        self._door = Door(path, roles.view)
        self._handlers = dict(handlers)
        self._roles = roles
        self._open: Counter[int] = Counter()
        self._threads: set[threading.Thread] = set()
        self._guard = threading.Lock()
        self._closing = False
        self._accepting: threading.Thread | None = None
        self._listener: socket.socket | None = None

    def start(self) -> None:
        """Take the path and begin to accept."""
        self._listener = self._door.open()
        self._accepting = threading.Thread(target=self._accept, name="admin-socket", daemon=True)
        self._accepting.start()

    def regroup(self, roles: Roles) -> list[str]:
        """Go by other groups from the next connection on; returns what a person has to do for it."""
        self._roles = roles
        return self._door.regroup(roles.view)

    def close(self, wait_seconds: float = 5.0) -> None:
        """Stop accepting, give running commands `wait_seconds` to answer, remove the socket."""
        if self._listener is None or self._accepting is None:
            return
        self._closing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._accepting.join()
        deadline = time.monotonic() + wait_seconds
        with self._guard:
            running = list(self._threads)
        for thread in running:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._door.close(self._listener)
        self._listener = None

    def _accept(self) -> None:
        listener = self._listener
        while listener is not None and not self._closing:
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if error.errno in _OUT_OF_DESCRIPTORS:
                    time.sleep(0.1)  # accept() would return at once again and again
                elif self._closing or error.errno in (errno.EINVAL, errno.EBADF):
                    return
                continue
            connection.settimeout(SEND_DEADLINE)
            try:
                self._admit(connection)
            except Exception:  # noqa: BLE001  # loop top: one caller must not close the socket for all
                _log.error("admin.admit", exc_info=True)
                connection.close()

    def _admit(self, connection: socket.socket) -> None:
        peer = peer_of(connection)
        role = self._roles.of(peer)
        if role is Role.NONE:
            _log.warning("admin.refused", uid=peer.uid, pid=peer.pid)
            return _refuse(
                connection, NotPermitted(f"{peer.user} has no role at this socket", hint=_ROLE_HINT)
            )
        if not self._count(peer, role):
            return _refuse(connection, Busy())
        thread = threading.Thread(
            target=self._serve, args=(connection, peer, role), name="admin-call", daemon=True
        )
        with self._guard:
            self._threads.add(thread)
        thread.start()
        return None

    def _count(self, peer: Peer, role: Role) -> bool:
        """Take a connection for this peer, or say that there is none left."""
        first_class = peer.uid in (0, self._roles.own_uid)
        with self._guard:
            total = self._open.total()
            limit = MOST_CONNECTIONS - (0 if first_class else _KEPT_FOR_HIGHER[role])
            if total >= limit or (not first_class and self._open[peer.uid] >= MOST_OF_ONE_UID):
                return False
            self._open[peer.uid] += 1
            return True

    def _serve(self, connection: socket.socket, peer: Peer, role: Role) -> None:
        try:
            with connection:
                for line in _lines(connection):
                    connection.settimeout(SEND_DEADLINE)
                    self._answer(connection, line, peer, role)
        except wire.NotARequest:
            _log.warning("admin.not-a-request", uid=peer.uid, pid=peer.pid)
        except OSError:
            pass  # the caller went away
        except Exception:  # noqa: BLE001  # loop top: logged here or nowhere
            _log.error("admin.connection", exc_info=True)
        finally:
            with self._guard:
                self._open[peer.uid] -= 1
                self._threads.discard(threading.current_thread())

    def _answer(self, connection: socket.socket, line: bytes, peer: Peer, role: Role) -> None:
        request = wire.parse_request(line)
        known_as = replace(peer, claimed_by=request.claimed_by)
        caller = Caller(connection)
        caller({"event": "received"})
        try:
            command = self._permitted(request.command, role)
            answer = wire.result_line(command.function(request.args, known_as, caller))
        except KeyturnError as error:
            answer = wire.error_line(error)
        except Exception:  # noqa: BLE001  # a bug of ours: logged here, no details to the caller
            _log.error("admin.internal", command=request.command, exc_info=True)
            answer = wire.internal_error_line()
        if not caller.broken:  # half an event may be on its way: nothing can follow it
            connection.sendall(answer)

    def _permitted(self, name: str, role: Role) -> Command:
        command = self._handlers.get(name)
        if command is None:
            raise UnknownCommand
        if role < command.role:
            needed = command.role.name.lower()
            raise NotPermitted(
                f"this needs the role {needed}, you have {role.name.lower()}", hint=_ROLE_HINT
            )
        return command


class Caller:
    """The progress callback of one call. It never raises: a caller who left stops no command.

    Handlers that only wait may look at `gone` and give up; those that change something go on.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.broken = False

    def __call__(self, event: dict[str, Any]) -> None:
        """Send one event, `{"event": name, …}`, if there is still somebody."""
        if self.broken:
            return
        try:
            self._connection.sendall(wire.event_line(event))
        except OSError:
            self.broken = True

    @property
    def gone(self) -> bool:
        """Whether the caller has hung up."""
        if not self.broken:
            readable, _, _ = select.select([self._connection], [], [], 0)
            try:
                self.broken = bool(readable) and not self._connection.recv(1, socket.MSG_PEEK)
            except OSError:
                self.broken = True
        return self.broken


def _lines(connection: socket.socket) -> Iterator[bytes]:
    """Yield whole lines until the caller hangs up.

    Raises NotARequest for a line that is too long and TimeoutError for one that takes too long: the
    deadline is that of the line, so a byte every nine seconds wins nothing.
    """
    held = bytearray()
    while True:
        deadline = time.monotonic() + READ_DEADLINE
        while (end := held.find(b"\n")) < 0:
            if len(held) >= wire.LINE_LIMIT:
                raise wire.NotARequest
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            chunk = connection.recv(min(_CHUNK, wire.LINE_LIMIT - len(held)))
            if not chunk:
                return
            held += chunk
        line = bytes(held[:end])
        del held[: end + 1]
        yield line


def _refuse(connection: socket.socket, error: KeyturnError) -> None:
    with connection, contextlib.suppress(OSError):
        connection.sendall(wire.error_line(error))
