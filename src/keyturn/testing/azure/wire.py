"""The wire of the stand-in: requests and answers as values, and a server that can misbehave."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

LONGEST_BODY = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a client has sent. Names of headers are in lower case, `host` has its port if given."""

    method: str
    host: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = field(default=b"", repr=False)

    def json(self) -> Any:
        """Return the body's JSON; None where it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a client gets; `missing` bytes of the body are promised and never sent."""

    status: int
    body: bytes = field(default=b"", repr=False)
    headers: Mapping[str, str] = field(default_factory=dict)
    missing: int = 0


class HangUp(Exception):
    """Reset the connection instead of an answer."""


App = Callable[[Call], Answer]
Rule = Callable[[Call, App], Answer]  # given a call and the way to have it answered


def straight(call: Call, app: App) -> Answer:
    """Answer as the service does."""
    return app(call)


def as_json(status: int, body: Any, **headers: str) -> Answer:
    """Return an answer in JSON; `_` in names of headers stands for `-`."""
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    kind = {"Content-Type": "application/json; charset=utf-8", "Cache-Control": "no-cache"}
    return Answer(status=status, body=json.dumps(body).encode(), headers={**kind, **named})


class Server:
    """A server on loopback, with TLS where it has a certificate. `rule` can put itself between."""

    def __init__(self, app: App, *, certificate: tuple[Path, Path] | None = None) -> None:
        self.app = app
        self.rule: Rule = straight
        self.seen: list[tuple[Call, int]] = []  # every call and the status of its answer, 0: none
        self.http = _Listener(("127.0.0.1", 0), self._handler())
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self.http.socket = context.wrap_socket(
                self.http.socket, server_side=True, do_handshake_on_connect=False
            )
        self.place = ("127.0.0.1", int(self.http.server_port))
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self.http.shutdown()
        self.http.server_close()

    def answer(self, call: Call) -> Answer | None:
        """Answer by the rule; None where the connection is to be reset."""
        try:
            answer = self.rule(call, self.app)
        except HangUp:
            self.seen.append((call, 0))
            return None
        self.seen.append((call, answer.status))
        return answer

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            timeout = 60

            def serve(self) -> None:
                answer = server.answer(self.call())
                with contextlib.suppress(OSError):
                    self.reset() if answer is None else self.give(answer)

            def call(self) -> Call:
                parts = urlsplit(self.path)
                size = min(int(self.headers.get("Content-Length") or 0), LONGEST_BODY)
                return Call(
                    method=self.command,
                    host=(self.headers.get("Host") or "").lower(),
                    path=parts.path,
                    query=dict(parse_qsl(parts.query, keep_blank_values=True)),
                    headers={name.lower(): text for name, text in self.headers.items()},
                    body=self.rfile.read(size),
                )

            def give(self, answer: Answer) -> None:
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body) + answer.missing))
                self.end_headers()
                self.wfile.write(answer.body)
                self.close_connection = self.close_connection or answer.missing > 0

            def reset(self) -> None:
                """Close so that the other side is told of a reset, not of an end."""
                self.close_connection = True
                now = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
                self.connection.close()

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = serve  # noqa: N815 - the library's

            def log_message(self, *_args: Any) -> None:
                """Say nothing: a path or a header may be what somebody looks for in vain."""

        return Handler


class _Listener(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up, or does not trust the certificate, is no news."""
