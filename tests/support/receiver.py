"""A receiver of webhooks that behaves as it is told to, and keeps what it was sent."""

from __future__ import annotations

import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from standardwebhooks import Webhook

KEY = "whsec_" + "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVoxMjM0NTY="
OTHER_KEY = "whsec_" + "MTIzNDU2Nzg5MGFiY2RlZmdoaWprbG1ub3BxcnN0dXY="


@dataclass
class Receiver:
    """What came, in its order; `mode` says how the next requests are answered."""

    key: str = KEY
    mode: str = "ok"
    url: str = ""
    got: list[dict[str, Any]] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    paths: list[str] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)
    released: threading.Event = field(default_factory=threading.Event)

    def take(self, path: str, headers: dict[str, str], body: bytes) -> None:
        """Verify a request as the ready library does, and keep it."""
        message = Webhook(self.key).verify(body, headers)
        with self.changed:
            self.paths.append(path)
            self.headers = headers
            self.seen[message["id"]] += 1
            assert message["id"] == headers["webhook-id"]
            if self.mode in ("ok", "lost"):
                self.got.append(message)
            self.changed.notify_all()

    def wait_for(self, number: int, *, seconds: float = 20) -> list[dict[str, Any]]:
        """Wait until so many were taken."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.got) >= number, seconds), self.got
            return list(self.got)

    def wait_tried(self, number: int, *, seconds: float = 20) -> None:
        """Wait until so many requests came, whatever became of them."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.seen.total() >= number, seconds), self.seen


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    receiver: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.close_connection = True
        self.receiver.take(self.path, headers, body)
        with suppress(OSError):
            getattr(self, "_" + self.receiver.mode)()

    def _answer(self, status: int, text: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _ok(self) -> None:
        self._answer(204)

    def _lost(self) -> None:
        """Take it, and end without an answer."""

    def _broken(self) -> None:
        self._answer(500, b"out of order")

    def _redirect(self) -> None:
        self._answer(307, Location=self.receiver.url.replace("/hook", "/elsewhere"))

    def _gone(self) -> None:
        self._answer(410)

    def _picky(self) -> None:
        self._answer(400, b"what is this?")

    def _busy(self) -> None:
        self._answer(503, Retry_After="7")

    def _hang(self) -> None:
        self.receiver.released.wait(20)

    def _drip(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        while not self.receiver.released.wait(0.05):
            self.wfile.write(b"x")

    def _garbage(self) -> None:
        self.wfile.write(b"\x00\xff this is no HTTP\r\n" * 50)

    def _huge(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(1 << 40))
        self.end_headers()
        while not self.receiver.released.is_set():
            self.wfile.write(b"x" * 65536)

    def log_message(self, *_args: object) -> None:
        """Say nothing."""


@contextmanager
def receiving(
    receiver: Receiver | None = None, *, tls: tuple[Path, Path] | None = None, port: int = 0
) -> Iterator[Receiver]:
    """Run a receiver on loopback; with a certificate and its key over TLS."""
    found = receiver or Receiver()
    handler = type("Handler", (_Handler,), {"receiver": found})
    server = _Server(("127.0.0.1", port), handler)
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    scheme = "https" if tls else "http"
    found.url = f"{scheme}://127.0.0.1:{server.server_port}/hook?from=keyturn"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield found
    finally:
        found.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_args: object) -> None:
        """A client that hangs up, or wants no TLS, is no news."""


def key_file(folder: Path, *keys: str) -> Path:
    """Write a signing key as an operator does."""
    path = folder / "hook.key"
    path.touch(mode=0o600)
    path.write_text("\n".join(keys or (KEY,)) + "\n")
    return path
