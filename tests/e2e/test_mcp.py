"""The example MCP server, with the SDK's own client and server, in front of a real verifier."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from keyturn.core.model import VersionState
from keyturn.verifier.http.callers import Caller, RelyingParty
from support.http_verifier import Served, served

EXAMPLE = Path(__file__).parents[2] / "deploy" / "mcp" / "server.py"
TOKEN = "t" * 40


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@dataclass(kw_only=True)
class Running:
    """The MCP server, and the verifier that it asks."""

    address: str
    verifier: Served

    def whoami(self, secret: str) -> str:
        """Call the tool as an agent does; raises whatever the SDK's client raises."""

        async def call() -> str:
            headers = {"Authorization": f"Bearer {secret}"}
            async with (
                httpx2.AsyncClient(headers=headers, timeout=20) as http,
                Client(streamable_http_client(f"{self.address}/mcp", http_client=http)) as client,
            ):
                found = await client.call_tool("whoami", {})
                return str(found.content[0].text)  # type: ignore[union-attr]

        return asyncio.run(call())

    def status(self, secret: str) -> tuple[int, httpx2.Headers]:
        """Return what a request with this secret is answered."""
        content = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
        headers = {
            "Authorization": f"Bearer {secret}",
            "Accept": "application/json, text/event-stream",
        }
        found = httpx2.post(f"{self.address}/mcp", json=content, headers=headers, timeout=20)
        return found.status_code, found.headers


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    """Give the example, known to its verifier by a token, and allowed to hear of `a` alone."""
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(TOKEN)
    (tmp_path / "state").mkdir(mode=0o700)
    caller = Caller(name="mcp", agents=frozenset({"a"}))
    parties = [RelyingParty(caller=caller, token_file=token)]
    with served(tmp_path / "state", ("a", "b"), parties=parties) as verifier:
        port = free_port()
        environ = {
            **os.environ, "KEYTURN_VERIFIER": f"http://127.0.0.1:{verifier.port}",
            "KEYTURN_TOKEN_FILE": str(token), "PORT": str(port),
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-I", str(EXAMPLE)], env=environ, stdout=subprocess.DEVNULL
        )
        until = time.monotonic() + 60
        with socket.socket() as one:
            while one.connect_ex(("127.0.0.1", port)):
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.05)
        yield Running(address=f"http://127.0.0.1:{port}", verifier=verifier)
        process.terminate()
        process.wait()


def state(verifier: Served, name: str, to: VersionState, deadline: datetime | None = None) -> None:
    """Put an agent's version into another state."""
    ended = datetime.now(UTC) if to is VersionState.REVOKED else None
    verifier.amend(name, state=to, deadline=deadline, ended_at=ended)


def test_a_good_a_retiring_and_a_revoked_secret(running: Running) -> None:
    """The tool hears the agent's id, until the moment of the revoke; what nobody can tell is no 401."""
    good, other = (one.secret.reveal() for one in running.verifier.held)
    assert running.whoami(good) == "a"
    state(running.verifier, "a", VersionState.PREVIOUS, datetime.now(UTC) + timedelta(hours=1))
    assert running.whoami(good) == "a"

    assert running.status(other)[0] == 401  # another agent's: not for this server
    assert running.status(good[:-1])[0] == 401
    assert running.status("x")[0] == 401
    state(running.verifier, "a", VersionState.REVOKED)
    assert running.status(good)[0] == 401
    with pytest.raises(Exception):  # noqa: B017  # the SDK raises groups of its own
        running.whoami(good)

    running.verifier.server.stop()
    until = time.monotonic() + 20
    while running.status(good)[0] != 503:
        assert time.monotonic() < until
    assert running.status(good)[1]["retry-after"] == "1"
