"""A real nginx with the shipped configuration, and an application behind it that tells what it got."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any

from support.over_unix import UnixConnection

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "deploy" / "nginx" / "keyturn.conf"
NGINX = "/usr/sbin/nginx"

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


class Application:
    """Answers 200 with the header lines that it got, in order; `status` is another answer."""

    def __init__(self, path: Path) -> None:
        self.status = 200
        self.headers: dict[str, str] = {}
        self.asked = 0
        application = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                application.asked += 1
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length).decode()
                got = {"headers": self.headers.items(), "path": self.path, "body": body}
                text = json.dumps(got).encode()
                self.send_response(application.status)
                for name, value in application.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_POST = do_GET  # noqa: N815

            def address_string(self) -> str:
                return "nginx"

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
    """Where nginx listens, and who is behind it."""

    path: Path
    application: Application
    folder: Path
    process: subprocess.Popen[bytes] = field(repr=False)

    def connection(self) -> UnixConnection:
        """Open a connection to nginx."""
        return UnixConnection(self.path)

    def raw(self, lines: Sequence[str]) -> tuple[int, dict[str, str], Any]:
        """Send header lines as they are; returns status, headers in lower case, and what the application got."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
            one.settimeout(20)
            one.connect(str(self.path))
            head = ["GET /x HTTP/1.1", "Host: app", *lines, "Connection: close", "", ""]
            one.sendall("\r\n".join(head).encode("latin-1"))
            got = b"".join(iter(lambda: one.recv(65536), b""))
        first, _, body = got.partition(b"\r\n\r\n")
        status, *rest = first.decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in rest)
        }
        try:
            content = json.loads(body)
        except ValueError:
            content = None
        return int(status.split()[1]), headers, content


def _serves(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        return one.connect_ex(str(path)) == 0


@contextlib.contextmanager
def nginx(folder: Path, *, verifier: Path) -> Iterator[Gateway]:
    """Run nginx with the shipped configuration in front of an application, until the block ends."""
    folder.mkdir(exist_ok=True)
    text = SHIPPED.read_text()
    places = {
        "unix:/run/keyturn-verifier/verify.sock": f"unix:{verifier}",
        "127.0.0.1:8080": f"unix:{folder}/app.sock",
        "listen 127.0.0.1:8000": f"listen unix:{folder}/nginx.sock",
    }
    for shipped, here in places.items():
        assert text.count(shipped) == 1, shipped
        text = text.replace(shipped, here)
    (folder / "keyturn.conf").write_text(text)
    (folder / "nginx.conf").write_text(_MAIN.format(folder=folder))
    application = Application(folder / "app.sock")
    command = [NGINX, "-p", str(folder), "-e", str(folder / "error.log")]
    process = subprocess.Popen(
        [*command, "-c", str(folder / "nginx.conf")], env={"PATH": os.defpath}
    )
    try:
        until = time.monotonic() + 30
        while not _serves(folder / "nginx.sock"):
            assert process.poll() is None, (folder / "error.log").read_text()
            assert time.monotonic() < until
            time.sleep(0.02)
        yield Gateway(
            path=folder / "nginx.sock", application=application, folder=folder, process=process
        )
    finally:
        process.terminate()
        process.wait()
        application.close()
