"""The HTTP side of the AWS stand-in: one rule decides what becomes of a call, so it can fail as one likes."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BODY_LIMIT = 1024 * 1024


class HangUp(Exception):
    """Close the connection without an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a client has sent; `operation` is the name of the API's operation, where it is one."""

    method: str
    path: str
    headers: Mapping[str, str]  # names in lower case
    body: bytes = b""
    operation: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a client gets; `missing` bytes of the body are promised and never sent."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    missing: int = 0


Forward = Callable[[Call], Answer]
Rule = Callable[[Call, Forward], Answer]


def straight(call: Call, forward: Forward) -> Answer:
    """Change nothing."""
    return forward(call)


def refusal(code: str, text: str, *, status: int = 400, **headers: str) -> Answer:
    """Return what a JSON service of AWS answers to what it refuses."""
    body = json.dumps({"__type": code, "message": text}).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(
        status=status, headers={"Content-Type": "application/x-amz-json-1.1", **named}, body=body
    )


def operation_of(headers: Mapping[str, str], body: bytes) -> str:
    """Return the operation that a request names: by header in JSON services, in the body of others."""
    target = headers.get("x-amz-target", "")
    if "." in target:
        return target.rpartition(".")[2]
    for pair in body[:4096].split(b"&"):
        if pair.startswith(b"Action="):
            return pair[7:].decode("ascii", "replace")
    return ""


class Front:
    """Listens on loopback and gives every call to `rule`. `seen` is each call and its status."""

    def __init__(
        self, serve: Forward, *, port: int = 0, certificate: tuple[Path, Path] | None = None
    ) -> None:
        self.rule: Rule = straight
        self.seen: list[tuple[Call, int]] = []
        self._serve = serve
        self._http = _Server(("127.0.0.1", port), self._handler(), certificate)
        scheme = "http" if certificate is None else "https"
        self.port = int(self._http.server_port)
        self.address = f"{scheme}://127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._http.shutdown()
        self._http.server_close()

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        front = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            timeout = 60

            def serve(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                headers = {name.lower(): value for name, value in self.headers.items()}
                body = self.rfile.read(min(size, BODY_LIMIT))
                call = Call(
                    method=self.command,
                    path=self.path,
                    headers=headers,
                    body=body,
                    operation=operation_of(headers, body),
                )
                try:
                    answer = front.rule(call, front._serve)
                except HangUp:
                    front.seen.append((call, 0))
                    self.close_connection = True
                    return
                front.seen.append((call, answer.status))
                with contextlib.suppress(OSError):
                    self._give(answer)

            def _give(self, answer: Answer) -> None:
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body) + answer.missing))
                self.end_headers()
                self.wfile.write(answer.body)
                self.close_connection = self.close_connection or answer.missing > 0

            do_GET = do_POST = do_PUT = do_DELETE = serve  # noqa: N815 - the library's names

            def log_message(self, *_args: Any) -> None:
                """Say nothing: what was asked stands in `seen`."""

        return Handler


class _Server(http.server.ThreadingHTTPServer):
    """A server whose TLS handshakes are made by the threads: a client that stalls stops no other."""

    daemon_threads = True

    def __init__(
        self,
        place: tuple[str, int],
        handler: type[http.server.BaseHTTPRequestHandler],
        certificate: tuple[Path, Path] | None,
    ) -> None:
        super().__init__(place, handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self.socket: socket.socket = context.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that hang up or do not trust us."""
