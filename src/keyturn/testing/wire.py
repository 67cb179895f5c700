"""Requests and answers as values, and a server on loopback that can misbehave: for stand-ins, proxies.

What becomes of a call is one function, the rule: it is given the call and a way to have it answered,
and returns what is sent. `HangUp` is no answer at all.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

LONGEST_BODY = 4 * 1024 * 1024


class HangUp(Exception):
    """Reset the connection instead of an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a client has sent. Names of headers are in lower case; `target` is path and query."""

    method: str
    target: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = field(default=b"", repr=False)

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> Mapping[str, str]:
        """The parameters of the target."""
        return dict(parse_qsl(self.target.partition("?")[2], keep_blank_values=True))

    @property
    def host(self) -> str:
        """The name that was asked for, in lower case, with its port if one was given."""
        return self.headers.get("host", "").lower()

    @property
    def operation(self) -> str:
        """What services whose calls all look alike name in a header or the body (AWS); else ""."""
        target = self.headers.get("x-amz-target", "")
        if "." in target:
            return target.rpartition(".")[2]
        named = (pair[7:] for pair in self.body[:4096].split(b"&") if pair.startswith(b"Action="))
        return next(named, b"").decode("ascii", "replace")

    def json(self) -> Any:
        """Return the body's JSON; None where it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    def with_header(self, name: str, value: str) -> Call:
        """Return the same call with one more header."""
        return replace(self, headers={**self.headers, name.lower(): value})


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a client gets; `missing` bytes of the body are promised and never sent."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = field(default=b"", repr=False)
    missing: int = 0


Forward = Callable[[Call], Answer]
Rule = Callable[[Call, Forward], Answer]


def straight(call: Call, forward: Forward) -> Answer:
    """Change nothing."""
    return forward(call)


def as_json(status: int, body: Any, **headers: str) -> Answer:
    """Return an answer in JSON; `_` in names of headers stands for `-`."""
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    kind = {"Content-Type": "application/json; charset=utf-8", "Cache-Control": "no-cache"}
    return Answer(status=status, body=json.dumps(body).encode(), headers={**kind, **named})


class Server:
    """Listens on loopback, with TLS where it has a certificate, and gives every call to `rule`.

    `seen` is every call with the status of its answer, 0 where there was none. Thread-safe.
    """

    def __init__(
        self, serve: Forward, *, port: int = 0, certificate: tuple[Path, Path] | None = None
    ) -> None:
        self.rule: Rule = straight
        self.seen: list[tuple[Call, int]] = []
        self._serve = serve
        self._http = _Listener(("127.0.0.1", port), _handler(self))
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            # Handshakes are made by the threads: a client that stalls stops no other.
            self._http.socket = context.wrap_socket(
                self._http.socket, server_side=True, do_handshake_on_connect=False
            )
        self.place = ("127.0.0.1", int(self._http.server_port))
        self.address = f"{'https' if certificate else 'http'}://127.0.0.1:{self.place[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop listening, and end every connection that is open."""
        self._http.shutdown()
        self._http.server_close()
        self._http.hang_up()

    def answer(self, call: Call) -> Answer | None:
        """Answer by the rule; None where the connection is to be reset."""
        try:
            answer = self.rule(call, self._serve)
        except (HangUp, OSError):  # OSError: what is behind it is away
            self.seen.append((call, 0))
            return None
        self.seen.append((call, answer.status))
        return answer


@contextlib.contextmanager
def served(serve: Forward, **more: Any) -> Iterator[Server]:
    """Run a server until the block ends."""
    one = Server(serve, **more)
    try:
        yield one
    finally:
        one.close()


def _handler(server: Server) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        timeout = 60

        def serve(self) -> None:
            size = min(int(self.headers.get("Content-Length") or 0), LONGEST_BODY)
            call = Call(
                method=self.command,
                target=self.path,
                headers={name.lower(): text for name, text in self.headers.items()},
                body=self.rfile.read(size),
            )
            answer = server.answer(call)
            with contextlib.suppress(OSError):
                self.reset() if answer is None else self.give(answer)

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

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_LIST = serve  # noqa: N815

        def log_message(self, *_args: Any) -> None:
            """Say nothing: a path or a header may be what somebody looks for in vain."""

    return Handler


class _Listener(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """End what clients keep open for their next call."""
        for one in tuple(self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up, or does not trust the certificate, is no news."""
