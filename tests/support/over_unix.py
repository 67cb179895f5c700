"""HTTP over a Unix socket, with the standard library alone."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Mapping
from pathlib import Path


class UnixConnection(http.client.HTTPConnection):
    """A connection to whoever serves a path."""

    def __init__(self, path: Path, *, timeout: float = 20) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def ask(
    connection: http.client.HTTPConnection,
    path: str = "/v1/auth",
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """Send one request; headers come back in lower case. The connection stays open."""
    connection.request(method, path, body=body, headers=dict(headers or {}))
    found = connection.getresponse()
    return found.status, {k.lower(): v for k, v in found.getheaders()}, found.read()
