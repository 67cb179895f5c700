"""The client of the admin socket, from the standard library alone."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from keyturn.daemon import wire
from keyturn.errors import KeyturnError, NotPermitted

OnProgress = Callable[[dict[str, Any]], None]

DEFAULT_SOCKET = Path("/run/keyturn/admin.sock")
RECEIVED_WITHIN = 5.0  # seconds until the daemon must have said `received`
_ANSWER_LIMIT = 256 * 1024 * 1024


class DaemonDown(KeyturnError):
    """The daemon is not running."""

    code = "daemon-down"
    exit_code = 69
    default_hint = "start it with `keyturn run -c FILE`, or name its socket with --socket"


class AnswerLost(KeyturnError):
    """The daemon ended before it answered: the command may or may not have been done."""

    code = "answer-lost"
    exit_code = 75
    default_hint = "look with `keyturn status`, then repeat the command; repeating does no harm"


class Answered(KeyturnError):
    """The daemon's own error, with its code, hint and exit code."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(str(error.get("message", "error")), hint=str(error.get("hint", "")))
        self.code = str(error.get("code", "error"))
        self.exit_code = int(error.get("exit_code", 1))


class AdminClient:
    """Calls commands of the daemon at `path`, one connection each."""

    def __init__(
        self,
        path: Path = DEFAULT_SOCKET,
        *,
        received_within: float = RECEIVED_WITHIN,
        answered_within: float | None = None,
    ) -> None:
        """Waits for `received`, and after it for each line, in seconds; None waits on."""
        self._path = path
        self._received_within = received_within
        self._answered_within = answered_within

    def call(
        self, command: str, args: dict[str, Any], on_progress: OnProgress | None = None
    ) -> Any:
        """Return the command's result.

        Raises DaemonDown where nobody answers (also a daemon that is stopped: nothing was done
        unless it runs again), AnswerLost where it went away in the middle, NotPermitted where the
        socket may not be opened, and Answered with whatever the daemon says.
        """
        with self._connect() as connection:
            self._send(
                connection, wire.request_line(command, args, os.environ.get("SUDO_USER", ""))
            )
            for answer in self._answers(connection):
                if "ok" not in answer:
                    if on_progress is not None and answer.get("event") != "received":
                        on_progress(answer)
                elif answer["ok"]:
                    return answer.get("result")
                else:
                    raise Answered(answer.get("error", {}))
        raise AnswerLost

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        connection.settimeout(self._received_within)
        try:
            connection.connect(os.fspath(self._path))
        except PermissionError:
            connection.close()
            raise NotPermitted(
                f"you may not open {self._path}",
                hint="try it with sudo, or ask for a group of `admin.groups`, then log in anew",
            ) from None
        except OSError:
            connection.close()
            raise DaemonDown(
                f"the daemon is not running (nobody answers at {self._path})"
            ) from None
        return connection

    @staticmethod
    def _send(connection: socket.socket, line: bytes) -> None:
        try:
            connection.sendall(line)
        except BrokenPipeError:
            pass  # refused before it read: its reason can still be read
        except OSError:
            raise AnswerLost from None

    def _answers(self, connection: socket.socket) -> Iterator[dict[str, Any]]:
        with connection.makefile("rb") as lines:
            heard = False
            while True:
                try:
                    line = lines.readline(_ANSWER_LIMIT)
                except TimeoutError:
                    raise DaemonDown("the daemon does not answer (stopped or overloaded)") from None
                except OSError:
                    raise AnswerLost from None
                if not line.endswith(b"\n"):
                    raise AnswerLost
                if not heard:
                    heard = True
                    # It works on it; how long that takes is its own matter.
                    connection.settimeout(self._answered_within)
                yield wire.parse_answer(line)
