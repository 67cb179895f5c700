"""A recording proxy: stands between an adapter and a real server, and can lie, stall and hang up.

What it does with a call is one function, the rule: it is given the call and a way to forward it, and
returns what is answered. `HangUp` is no answer at all.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_OWN_HEADERS = {"host", "connection", "content-length", "transfer-encoding", "accept-encoding"}


class HangUp(Exception):
    """Close the connection without an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a client has sent."""

    method: str
    path: str
    headers: Mapping[str, str]  # names in lower case
    body: bytes = b""

    def with_header(self, name: str, value: str) -> Call:
        """Return the same call with one more header."""
        return replace(self, headers={**self.headers, name.lower(): value})


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
    """Forward and change nothing."""
    return forward(call)


class StandbyBehind:
    """Plays a read-enabled standby that is behind: reads get the answer that was true at `freeze`.

    As at a real one of OpenBao, a read that asks for wrapping is forwarded to the leader, and so is
    every call of a token with a limited number of uses (`limited`); writes are forwarded anyway.
    """

    def __init__(self, *, limited: bool = False) -> None:
        self.limited = limited
        self.frozen = False
        self.replayed = 0
        self._known: dict[str, Answer] = {}

    def __call__(self, call: Call, forward: Forward) -> Answer:
        local = call.method == "GET" and "/data/" in call.path and not self.limited
        if not local or "x-vault-wrap-ttl" in call.headers:
            return forward(call)
        if self.frozen and call.path in self._known:
            self.replayed += 1
            return self._known[call.path]
        return forward(call)

    def freeze(self, path: str, answer: Answer) -> None:
        """From now on reads of this path get this answer."""
        self._known[path] = answer
        self.frozen = True


class Proxy:
    """A server on loopback in front of `upstream`. Thread-safe; `seen` is every call and its status."""

    def __init__(
        self,
        upstream: str,
        *,
        ca_file: Path | None = None,
        certificate: tuple[Path, Path] | None = None,
    ) -> None:
        self.upstream, self.rule = upstream, straight
        self.seen: list[tuple[Call, int]] = []
        self._trusted = ssl.create_default_context(cafile=str(ca_file)) if ca_file else None
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.http.daemon_threads = True
        scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self.http.socket = context.wrap_socket(
                self.http.socket, server_side=True, do_handshake_on_connect=False
            )
            scheme = "https"
        self.address = f"{scheme}://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    rule: Rule

    def calls(self) -> list[str]:
        """Return what was asked, in order, as `METHOD path`."""
        return [f"{call.method} {call.path.removeprefix('/v1/')}" for call, _ in self.seen]

    def forward(self, call: Call) -> Answer:
        """Make the call at the real server."""
        to = urlsplit(self.upstream)
        if self._trusted is not None:
            line: http.client.HTTPConnection = http.client.HTTPSConnection(
                to.netloc, timeout=30, context=self._trusted
            )
        else:
            line = http.client.HTTPConnection(to.netloc, timeout=30)
        with contextlib.closing(line):
            headers = {k: v for k, v in call.headers.items() if k not in _OWN_HEADERS}
            line.request(call.method, call.path, body=call.body or None, headers=headers)
            found = line.getresponse()
            kept = {k: v for k, v in found.getheaders() if k.lower() not in _OWN_HEADERS}
            return Answer(status=found.status, headers=kept, body=found.read())

    def close(self) -> None:
        """Stop listening."""
        self.http.shutdown()
        self.http.server_close()

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def serve(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                call = Call(
                    method=self.command,
                    path=self.path,
                    headers={name.lower(): value for name, value in self.headers.items()},
                    body=self.rfile.read(size),
                )
                try:
                    answer = proxy.rule(call, proxy.forward)
                except (HangUp, OSError):  # OSError: the real server is away
                    proxy.seen.append((call, 0))
                    self.close_connection = True
                    return
                proxy.seen.append((call, answer.status))
                with contextlib.suppress(OSError):
                    self.give(answer)

            def give(self, answer: Answer) -> None:
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body) + answer.missing))
                self.end_headers()
                self.wfile.write(answer.body)
                self.close_connection = self.close_connection or answer.missing > 0

            do_GET = do_POST = do_PUT = do_DELETE = do_LIST = serve  # noqa: N815 - the library's

            def log_message(self, *_args: Any) -> None:
                pass

        return Handler


@contextlib.contextmanager
def recording_proxy(upstream: str, **more: Any) -> Iterator[Proxy]:
    """Give a proxy until the block ends."""
    one = Proxy(upstream, **more)
    try:
        yield one
    finally:
        one.close()
