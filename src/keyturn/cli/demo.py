"""`keyturn demo`: the main job, live, on this machine, in less than a minute.

A real daemon runs beside agents that authenticate all the time with nothing but plain reads of their
destination, while their secrets rotate every few seconds. At the end one agent is revoked. Exit 1 if
one authentication was refused that should not have been.
"""

from __future__ import annotations

import contextlib
import random
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

from keyturn import verifying
from keyturn.cli.client import AdminClient
from keyturn.cli.render import table
from keyturn.core.secret import Secret
from keyturn.daemon.service import load
from keyturn.errors import KeyturnError, Refused, StoreUnavailable, VerificationFailed
from keyturn.testing.places import KINDS, Place, Read, daemon, place
from keyturn.verifier.decision import Verifier

AGENTS = ("billing-bot", "support-bot", "search-bot", "mail-bot", "report-bot", "build-bot")
SECONDS = 24.0
CACHE = 2.0  # seconds that an agent keeps what it read
PAUSE = 0.02  # seconds between two authentications of one agent
START_LIMIT = 30.0


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


class _Agent(threading.Thread):
    """A workload: reads its destination, keeps what it read for a while, authenticates."""

    def __init__(self, name: str, read: Read, verifier: Verifier, seed: int) -> None:
        super().__init__(name=name, daemon=True)
        self.counts: Counter[str] = Counter()
        self.versions: list[str] = []
        self.revoked = threading.Event()
        self._read, self._verifier = read, verifier
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
        try:
            self._verifier.verify(held["id"], Secret(held["secret"]))
        except VerificationFailed:
            self.counts["refused as it should be" if revoked else "REFUSED"] += 1
        except StoreUnavailable:
            self.counts["unavailable"] += 1
        else:
            self.counts["accepted after revoke" if revoked else "accepted"] += 1


# --- the show -----------------------------------------------------------------------------


def _show(config: Path, places: Sequence[Place], seconds: float) -> int:
    settings = load(config)
    client = AdminClient(settings.admin.socket)
    _await_first_versions(client)
    verifier = verifying.open_verifier(settings)
    agents = [
        _Agent(name, places[seed % len(places)].read, verifier, seed)
        for seed, name in enumerate(AGENTS)
    ]
    for agent in agents:
        agent.start()
    try:
        _say(
            f"{len(agents)} agents read their secrets from {', '.join(one.kind for one in places)};"
            " each rotates every 3 s\n"
        )
        _watch(agents, client, seconds)
        before = agents[0].counts["REFUSED"]
        revoked, delay = _revoke(agents[0], client)
        time.sleep(1.0)
    finally:
        for agent in agents:
            agent.end()
        for agent in agents:
            agent.join(5)
        verifier.close()
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
        if rows and all(row["current"] for row in rows):
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
