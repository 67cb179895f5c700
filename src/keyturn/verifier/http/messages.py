"""What goes over the wire: a request as it was read, an answer as it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

JSON = b"application/json"
_NO_STORE = b"Cache-Control: no-store\r\nPragma: no-cache\r\n"  # Pragma: RFC 6749, 5.1


class Request:
    """One request, whole. Header names are in lower case."""

    __slots__ = ("authorization", "body", "headers", "keep_alive", "method", "path", "query")

    def __init__(self) -> None:
        self.method = b""
        self.path = b""
        self.query = False
        self.authorization: list[bytes] = []  # apart: it is wanted each time
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.keep_alive = True

    def header(self, name: bytes) -> list[bytes]:
        """Return every value of a header."""
        return [value for found, value in self.headers if found == name]


class Answer:
    """An answer in two halves, with room for the date and for how the connection goes on."""

    __slots__ = ("_date", "_kept", "body", "head", "status")

    def __init__(
        self,
        status: int,
        body: bytes = b"",
        *,
        kind: bytes = JSON,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status = status
        self.body = body
        lines = [f"{name}: {value}\r\n" for name, value in (headers or {}).items()]
        if body:
            lines.append(f"Content-Type: {kind.decode()}\r\n")
        lines.append(f"Content-Length: {len(body)}\r\n")
        text = "".join(lines).encode("ascii")
        phrase = HTTPStatus(status).phrase.encode()
        self.head = b"HTTP/1.1 %d %b\r\n%b%b" % (status, phrase, _NO_STORE, text)
        self._date = self._kept = b""

    def kept_alive(self, date: bytes) -> bytes:
        """Return it as it is sent on a connection that goes on; `date` is a whole line."""
        if date is not self._date:
            self._kept = self.head + date + b"\r\n" + self.body
            self._date = date
        return self._kept

    def last(self, date: bytes) -> bytes:
        """Return it as the last one of a connection."""
        return self.head + date + b"Connection: close\r\n\r\n" + self.body

    def without_body(self) -> Answer:
        """Return it as HEAD is answered."""
        found = Answer(self.status)
        found.head = self.head
        return found


def json_answer(
    status: int, content: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> Answer:
    """Return an answer for machines."""
    body = json.dumps(content, separators=(",", ":")).encode() + b"\n"
    return Answer(status, body, headers=headers)


def date_line(now: float) -> bytes:
    """Return the header Date (RFC 9110, 6.6.1); `now` in seconds since 1970."""
    return f"Date: {formatdate(now, usegmt=True)}\r\n".encode()
