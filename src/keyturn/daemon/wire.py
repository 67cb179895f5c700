"""The lines of the admin socket: one JSON object per line, of one exact form.

    request    {"command": "rotate", "args": {…}, "claimed_by": "alice"}
    answers    {"event": "…", …}                                          none or more
               {"ok": true, "result": …}                                  or
               {"ok": false, "error": {"code", "message", "hint", "exit_code"}}

The first event is always `received`. No HTTP: nothing that a browser or a proxy can be made to send
is a request, because anything but such a line ends the connection.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keyturn.errors import KeyturnError

LINE_LIMIT = 64 * 1024  # bytes of a request, its newline included
CLAIM_LIMIT = 64
_KEYS = frozenset({"command", "args", "claimed_by"})


def waiting_path(admin: Path) -> Path:
    """Return the socket of a daemon that does not lead: it knows `health` and nothing else."""
    return admin.with_suffix(".wait")  # no longer than its neighbour: a socket's path has a limit


class NotARequest(ValueError):
    """The line is nothing that a client of ours sends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A parsed request line. `args` is unchecked; `claimed_by` is an unproven name."""

    command: str
    args: dict[str, Any]
    claimed_by: str


def parse_request(line: bytes) -> Request:
    """Read one line. Raises NotARequest for anything that has not exactly the form."""
    try:
        found = json.loads(
            line.decode("utf-8"), object_pairs_hook=_without_doubles, parse_constant=_no_constant
        )
    except (ValueError, RecursionError):  # RecursionError: 60 KiB of "["
        raise NotARequest from None
    if not isinstance(found, dict) or not found.keys() <= _KEYS:
        raise NotARequest
    command, args = found.get("command"), found.get("args")
    claimed_by = found.get("claimed_by", "")
    if not (isinstance(command, str) and isinstance(args, dict) and isinstance(claimed_by, str)):
        raise NotARequest
    if len(claimed_by) > CLAIM_LIMIT or not (claimed_by.isprintable() and command.isprintable()):
        raise NotARequest
    return Request(command=command, args=_text_of(args), claimed_by=claimed_by)


def _text_of(args: dict[str, Any]) -> dict[str, Any]:
    """Replace lone surrogates, which JSON can spell and no file, row or hash can hold."""
    try:
        text = json.dumps(args, ensure_ascii=False)
    except RecursionError:
        raise NotARequest from None
    try:
        text = json.dumps(args, ensure_ascii=False)
    except RecursionError:
        raise NotARequest from None
    found: dict[str, Any] = json.loads(text.encode(errors="replace"))
    return found


def request_line(command: str, args: dict[str, Any], claimed_by: str = "") -> bytes:
    """Build a request."""
    return _line({"command": command, "args": args, "claimed_by": claimed_by[:CLAIM_LIMIT]})


def parse_answer(line: bytes) -> dict[str, Any]:
    """Read a line of the daemon's."""
    found = json.loads(line)
    return found if isinstance(found, dict) else {}


def event_line(event: dict[str, Any]) -> bytes:
    """Build a progress line. `event` has the key `event`."""
    return _line(event)


def result_line(result: Any) -> bytes:
    """Build the final line of a command that succeeded."""
    return _line({"ok": True, "result": result})


def error_line(error: KeyturnError) -> bytes:
    """Build the final line of a command that failed on purpose."""
    return _failure(error.code, str(error), error.hint, error.exit_code)


def internal_error_line() -> bytes:
    """Build the final line after a bug of ours: no details, they are in the log."""
    return _failure("internal", "internal error", "see the daemon's log", 1)


def _failure(code: str, message: str, hint: str, exit_code: int) -> bytes:
    error = {"code": code, "message": message, "hint": hint, "exit_code": exit_code}
    return _line({"ok": False, "error": error})


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # two readers could disagree about which one counts
        raise NotARequest
    return found


def _no_constant(_name: str) -> None:
    raise NotARequest
