"""`keyturn demo`: the main job, live, on this machine, in less than a minute.

A real daemon and its verifier run beside agents that authenticate over HTTP all the time, with nothing
but plain reads of their destination, while their secrets rotate every few seconds. At the end one agent
is revoked. Exit 1 if one authentication was refused that should not have been.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from keyturn.cli.client import AdminClient
from keyturn.cli.render import table
from keyturn.daemon.service import load
from keyturn.errors import KeyturnError, Refused
from keyturn.testing.places import KINDS, Place, Read, daemon, place

AGENTS = ("billing-bot", "support-bot", "search-bot", "mail-bot", "report-bot", "build-bot")
SECONDS = 24.0
CACHE = 2.0  # seconds that an agent keeps what it read
PAUSE = 0.02  # seconds between two authentications of one agent
START_LIMIT = 30.0
PATIENCE = 5.0  # seconds that an agent waits for an answer


def demo(destination: str = "file", *, seconds: float = SECONDS) -> int:
    """Show it. Returns 0 where nothing was refused that should not have been."""
    with tempfile.TemporaryDirectory(prefix="keyturn-demo-") as name:
        folder = Path(name)
        with _places(_kinds(destination), folder) as places:
            config = _write_config(folder, places)
            with _daemon(config, folder, places):
                return _show(config, places, seconds)


# --- the setting --------------------------------------------------------------------------


@contextlib.contextmanager
def _places(kinds: Sequence[str], folder: Path) -> Iterator[list[Place]]:
    """Give where the agents read, one after the other."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(place(kind, folder / kind)) for kind in kinds]


def _kinds(destination: str) -> Sequence[str]:
    if destination == "all":
        return KINDS
    if destination in KINDS:
        return (destination,)
    raise Refused(
        f"there is no demo for {destination}", hint=f"--dest is {', '.join(KINDS)} or all"
    )


def _write_config(folder: Path, places: Sequence[Place]) -> Path:
    retry = {"first": "200ms", "settle_after": "3s"}
    content = {
        "version": 1,
        "store": {"url": f"sqlite:///{folder / 'state' / 'keyturn.db'}"},
        "admin": {"socket": str(folder / "run" / "admin.sock")},
        "verifier": {"listen": {"socket": str(_asked_at(folder))}},
        "connections": {one.kind: {**one.connection, "call_deadline": "2s"} for one in places},
        "policies": {
            "default": {
                "every": "3s",
                "grace": "6s",
                "consumer_cache": f"{CACHE:.0f}s",
                "jitter": "10%",
                "retry": retry,
            }
        },
        "agents": {
            agent: {"destinations": [{"to": one.kind, "path": agent} for one in places]}
            for agent in AGENTS
        },
    }
    path = folder / "keyturn.yaml"
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(content))
    return path


def _asked_at(folder: Path) -> Path:
    return folder / "run" / "verify.sock"


@contextlib.contextmanager
def _daemon(config: Path, folder: Path, places: Sequence[Place]) -> Iterator[None]:
    """Run the daemon as its own process, as an operator would."""
    names = {name: to for one in places for name, to in one.names.items()}
    command = daemon("run", "-c", str(config), places=names)
    with (folder / "daemon.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(35)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# --- the agents ---------------------------------------------------------------------------


class _Service(http.client.HTTPConnection):
    """The verifier at its Unix socket, as any service with an HTTP client asks it."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self._path = path

    def connect(self) -> None:
        """Come by the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(str(self._path))

    def status_of(self, login: str, secret: str) -> int:
        """Return 200 for yes, 401 for no, anything else where it cannot tell; 0: no answer."""
        shown = base64.b64encode(f"{login}:{secret}".encode()).decode()
        try:
            self.request("GET", "/v1/auth", headers={"Authorization": f"Basic {shown}"})
            with self.getresponse() as answer:
                answer.read()
                return answer.status
        except (OSError, http.client.HTTPException):
            self.close()  # the next request opens another one
            return 0


class _Agent(threading.Thread):
    """A workload: reads its destination, keeps what it read for a while, authenticates."""

    def __init__(self, name: str, read: Read, service: _Service, seed: int) -> None:
        super().__init__(name=name, daemon=True)
        self.counts: Counter[str] = Counter()
        self.versions: list[str] = []
        self.revoked = threading.Event()
        self._read, self._service = read, service
        self._random = random.Random(seed)  # noqa: S311 - when to read, not what
        self._ended = threading.Event()

    def run(self) -> None:
        """Authenticate until told to end."""
        held, until = self._read(self.name) or {}, 0.0
        while not self._ended.wait(PAUSE):
            if time.monotonic() >= until:
                held = self._fresh(held)
                until = time.monotonic() + self._random.uniform(0, CACHE)
            self._authenticate(held)
        self._service.close()

    def end(self) -> None:
        """Stop."""
        self._ended.set()

    def _fresh(self, held: dict[str, Any]) -> dict[str, Any]:
        found = self._read(self.name)
        if not found or "secret" not in found:
            return held  # revoked, and taken out: what it holds is refused, as it should be
        if not self.versions or self.versions[-1] != found["version"]:
            self.versions.append(found["version"])
        return found

    def _authenticate(self, held: dict[str, Any]) -> None:
        revoked = self.revoked.is_set()
        status = self._service.status_of(held["id"], held["secret"])
        if status == http.HTTPStatus.UNAUTHORIZED:
            self.counts["refused as it should be" if revoked else "REFUSED"] += 1
        elif status != http.HTTPStatus.OK:
            self.counts["unavailable"] += 1
        else:
            self.counts["accepted after revoke" if revoked else "accepted"] += 1


# --- the show -----------------------------------------------------------------------------


def _show(config: Path, places: Sequence[Place], seconds: float) -> int:
    settings = load(config)
    client = AdminClient(settings.admin.socket)
    _await_first_versions(client)
    agents = [
        _Agent(name, places[seed % len(places)].read, _Service(_asked_at(config.parent)), seed)
        for seed, name in enumerate(AGENTS)
    ]
    for agent in agents:
        agent.start()
    try:
        _say(
            f"{len(agents)} agents read their secrets from {', '.join(one.kind for one in places)};"
            " show them to the verifier over HTTP, and each rotates every 3 s\n"
        )
        _watch(agents, client, seconds)
        before = agents[0].counts["REFUSED"]
        revoked, delay = _revoke(agents[0], client)
        time.sleep(1.0)
    finally:
        for agent in agents:
            agent.end()
        for agent in agents:
            agent.join(2 * PATIENCE)
    # Between the start and the return of the revoke its agent may be refused: that is no fault.
    early = agents[0].counts["REFUSED"] - before
    return _sum_up(agents, revoked, delay, early=early)


def _await_first_versions(client: AdminClient) -> None:
    until = time.monotonic() + START_LIMIT
    while True:
        try:
            rows = client.call("status", {})
        except KeyturnError:
            rows = []
        if rows and all(row["current"] for row in rows) and client.call("health", {})["ready"]:
            return
        if time.monotonic() > until:
            raise Refused("the daemon did not get ready", hint="run `keyturn check -c FILE`")
        time.sleep(0.1)


def _watch(agents: list[_Agent], client: AdminClient, seconds: float) -> None:
    live = sys.stdout.isatty()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(1.0 if live else 4.0)
        rows = {row["agent"]: row for row in client.call("status", {})}
        text = table(
            ("AGENT", "CURRENT", "PREVIOUS", "ROTATIONS", "AUTHENTICATIONS", "REFUSED"),
            [_row(agent, rows[agent.name]) for agent in agents],
        )
        _say(("\x1b[H\x1b[2J" if live else "") + text + "\n")


def _row(agent: _Agent, status: dict[str, Any]) -> tuple[str, ...]:
    current = status["current"]["version"] if status["current"] else ""
    previous = " ".join(version["version"] for version in status["previous"])
    rotations = max(len(agent.versions) - 1, 0)
    return (
        agent.name,
        current,
        previous,
        str(rotations),
        str(agent.counts["accepted"]),
        str(agent.counts["REFUSED"]),
    )


def _revoke(agent: _Agent, client: AdminClient) -> tuple[dict[str, Any], float]:
    """Revoke one agent while it works; from the call's return on nothing of it is accepted."""
    _say(f"keyturn revoke {agent.name} --reason demo")
    began = time.monotonic()
    result: dict[str, Any] = client.call("revoke", {"agent": agent.name, "reason": "demo"})
    agent.revoked.set()
    return result, time.monotonic() - began


def _sum_up(agents: list[_Agent], revoked: dict[str, Any], delay: float, *, early: int) -> int:
    totals: Counter[str] = sum((agent.counts for agent in agents), Counter())
    wrongly = totals["REFUSED"] - early
    rotations = sum(max(len(agent.versions) - 1, 0) for agent in agents)
    _say(f"revoked {len(revoked['versions'])} versions; the call took {delay * 1000:.1f} ms")
    _say(
        f"authentications {totals['accepted']} · rotations {rotations} ·"
        f" refused {wrongly} · unavailable {totals['unavailable']} ·"
        f" after the revoke: {totals['refused as it should be']} refused,"
        f" {totals['accepted after revoke']} accepted"
    )
    if totals["unavailable"]:
        _say("unavailable: asked again, because the store did not answer in time; not a refusal")
    good = not wrongly and not totals["accepted after revoke"] and rotations > 0
    good = good and totals["refused as it should be"] > 0
    _say("OK: no agent was refused" if good else "FAILED")
    return 0 if good else 1


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
