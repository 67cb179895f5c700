"""How long a revoke takes until an agent is refused, by each of the four ways, under load.

The delay counts from the operator's act to the first refusal that a verifier in another process gives;
both read one monotonic clock. An accept that began after a call had returned is an error: I3. The acts
are those of the command without the start of its interpreter: the call on the admin socket, the
function on the bare store, a line in the revocations file and SIGUSR1, a line in the main file and
SIGHUP. Meanwhile `--agents` others authenticate all the time and rotate every few seconds.

    python benchmarks/revocation.py [--revokes 1000] [--agents 20] [--json FILE]

Goal: refused before the call returns, p99 at most 100 ms. A way by signal returns nothing: there the
delay is all.
"""

from __future__ import annotations

import argparse
import json
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from keyturn.cli.client import AdminClient
from keyturn.core.secret import Secret
from keyturn.daemon.offline import offline
from keyturn.daemon.peer import local_peer
from keyturn.errors import StoreUnavailable, VerificationFailed
from keyturn.verifier.decision import Verifier
from keyturn.wiring import SystemClock
from support.running import Keyturn, accepts

WAYS = ("command", "down", "locked", "file", "main file")
VICTIMS = 50
LOCKED = 10  # one revoke in so many: on a locked store each call waits for its patience
GOAL = 0.1
SIGNALS = ("file", "main file")
FORM = "{:<24}{:>8}{:>12}{:>10}{:>10}{:>12}{:>10}"
TITLES = ("WAY", "REVOKES", "MEDIAN ms", "p99 ms", "WORST ms", "RETURNS ms", "LATE YES")
NAMES = {
    "command": "command, daemon up",
    "down": "command, daemon down",
    "locked": "command, store locked",
    "file": "revocations file + USR1",
    "main file": "main file + HUP",
}


@dataclass(slots=True)
class Way:
    """What was measured of one way; times in seconds."""

    name: str
    delays: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    late_yes: int = 0  # accepted although the call had returned

    def row(self) -> dict[str, Any]:
        """Return it as plain values; milliseconds."""
        ordered = sorted(self.delays)
        return {
            "way": self.name,
            "revokes": len(ordered),
            "median_ms": round(statistics.median(ordered) * 1000, 2),
            "p99_ms": round(ordered[max(0, -(-len(ordered) * 99 // 100) - 1)] * 1000, 2),
            "worst_ms": round(ordered[-1] * 1000, 2),
            "returns_median_ms": round(statistics.median(self.returns) * 1000, 2)
            if self.returns
            else None,
            "accepts_after_return": self.late_yes,
        }


# --- who is refused ------------------------------------------------------------------------


def watch(url: str, state: Path) -> None:
    """Say when each secret that comes in is refused first, and when the last yes began."""
    verifier = Verifier.open(url, state_dir=state, clock=SystemClock())
    for line in sys.stdin:
        login, text = json.loads(line)
        secret, last = Secret(text), 0.0
        began = time.monotonic()
        while (refused := _refused_at(verifier, login, secret)) is None:
            if not last:
                print("accepted", flush=True)
            last = began
            time.sleep(0.0005)  # or it would take the processor from those that it watches
            began = time.monotonic()
        print(json.dumps([refused, last]), flush=True)


def _refused_at(verifier: Verifier, login: str, secret: Secret) -> float | None:
    try:
        verifier.verify(login, secret)
    except VerificationFailed:
        return time.monotonic()
    except StoreUnavailable:
        return None  # a 503 is neither a yes nor a no
    return None


class Watcher:
    """The verifier in a process of its own."""

    def __init__(self, keyturn: Keyturn) -> None:
        words = [__file__, "--watch", f"sqlite:///{keyturn.store}", str(keyturn.store.parent)]
        self.process = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(keyturn.environ),
        )

    def begin(self, held: Mapping[str, str]) -> None:
        """Show it a secret; returns when that is accepted."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([held["id"], held["secret"]]) + "\n")
        self.process.stdin.flush()
        said = self.process.stdout.readline().strip()
        assert said == "accepted", said

    def end(self) -> tuple[float, float]:
        """Return when it was refused first, and when the last check that was accepted began."""
        assert self.process.stdout is not None
        refused, last = json.loads(self.process.stdout.readline())
        return refused, last

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


# --- the operator --------------------------------------------------------------------------


def at() -> str:
    """Return the present moment as an entry of the revocations wants it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def settings(folder: Path, agents: int, victims: int) -> Keyturn:
    """Return an installation whose first agents rotate all the time and whose others are revoked."""
    one = Keyturn(folder, agents=agents + victims, policy={"every": "1h"})
    busy = deepcopy(one.content["policies"]["default"])  # YAML would write an alias
    busy |= {"every": "12s", "jitter": "30%"}
    one.content["policies"]["busy"] = busy
    for number in range(agents):
        one.content["agents"][f"agent-{number}"]["policy"] = "busy"
    one.write()
    return one


@contextmanager
def load(keyturn: Keyturn, agents: int) -> Iterator[Callable[[], int]]:
    """Let the first agents authenticate one after the other, without a pause; gives the checks."""
    stop, count = threading.Event(), [0]
    verifier = keyturn.verifier()

    def work() -> None:
        number = 0
        while agents and not stop.wait(0.002):
            with suppress(OSError, ValueError):
                held = keyturn.held(f"agent-{number % agents}")
                if accepts(verifier, held) is True:
                    count[0] += 1
            number += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield lambda: count[0]
    finally:
        stop.set()
        thread.join()
        verifier.close()


class Drill:
    """One installation and what is done to it."""

    def __init__(self, keyturn: Keyturn, victims: Sequence[str]) -> None:
        self.keyturn, self.victims = keyturn, victims
        self.client = AdminClient(keyturn.folder / "run" / "admin.sock")
        self.watcher = Watcher(keyturn)
        self.lines: list[str] = []
        self._revoked: dict[str, str] = {}

    def close(self) -> None:
        """End the verifier."""
        self.watcher.close()

    def held(self, victim: str) -> dict[str, Any]:
        """Wait for a version that was not revoked yet, and return it."""
        found = self.await_fresh(victim)
        self._revoked[victim] = found["version"]
        return found

    def await_fresh(self, victim: str) -> dict[str, Any]:
        """Wait until an agent reads a version that was not revoked yet."""
        found: dict[str, Any] = {}

        def fresh() -> bool:
            found.clear()
            found.update(self.keyturn.held(victim))
            return "secret" in found and found["version"] != self._revoked.get(victim)

        self.keyturn.wait_for(fresh, seconds=120)
        return found

    def one(self, way: Way, victim: str, act: Callable[[str], None]) -> None:
        """Revoke one agent and measure."""
        self.watcher.begin(self.held(victim))
        began = time.monotonic()
        act(victim)
        returned = time.monotonic()
        refused, last = self.watcher.end()
        way.delays.append(refused - began)
        if way.name not in (NAMES[one] for one in SIGNALS):
            way.returns.append(returned - began)
            way.late_yes += last > returned

    # --- the ways -----------------------------------------------------------------------------

    def by_command(self, victim: str) -> None:
        """Ask the daemon."""
        self.client.call("revoke", {"agent": victim, "reissue": True, "reason": "drill"})

    def by_file(self, victim: str) -> None:
        """Add a line and signal."""
        with self.keyturn.revocations.open("a") as file:
            file.write(f"agent:{victim} at={at()} reissue drill\n")
        self.keyturn.signal(signal.SIGUSR1)

    def by_main_file(self, victim: str) -> None:
        """Put an entry in the main file and signal."""
        self.lines = [*self.lines[-20:], f"agent:{victim} at={at()} reissue drill"]
        self.keyturn.content["revocations"] = self.lines
        self.keyturn.write()
        self.keyturn.signal(signal.SIGHUP)


def while_up(drill: Drill, name: str, act: Callable[[str], None], revokes: int) -> Way:
    """Revoke one agent after the other on the running daemon."""
    way = Way(NAMES[name])
    for number in range(revokes):
        drill.one(way, drill.victims[number % len(drill.victims)], act)
    return way


def while_down(drill: Drill, name: str, revokes: int) -> Way:
    """Revoke on the bare store, a batch for each start of the daemon that brings the successors."""
    way, keyturn = Way(NAMES[name]), drill.keyturn
    while len(way.delays) < revokes:
        batch = list(drill.victims[: revokes - len(way.delays)])
        for victim in batch:  # each has its successor
            drill.await_fresh(victim)
        keyturn.stop()
        with offline(keyturn.config) as store, locked(keyturn, on=name == "locked"):
            function, peer = store.commands()["revoke"], local_peer("")

            def act(victim: str) -> None:
                args = {"agent": victim, "reissue": True, "reason": "drill"}
                function(args, peer, lambda _event: None)  # noqa: B023 - called in this round

            for victim in batch:
                drill.one(way, victim, act)
        keyturn.start()
    return way


@contextmanager
def locked(keyturn: Keyturn, *, on: bool) -> Iterator[None]:
    """Hold the store as a reader does that keeps every commit out."""
    if not on:
        yield
        return
    holder = sqlite3.connect(keyturn.store, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        holder.execute("ROLLBACK")
        holder.close()


def drill(folder: Path, *, revokes: int, agents: int, victims: int = VICTIMS) -> list[Way]:
    """Run every way; returns what was measured."""
    keyturn = settings(folder, agents, victims)
    names = [f"agent-{agents + number}" for number in range(victims)]
    found = []
    with keyturn:
        keyturn.wait_for(lambda: _all_there(keyturn, agents + victims), seconds=600)
        one = Drill(keyturn, names)
        try:
            with load(keyturn, agents):
                found.append(while_up(one, "command", one.by_command, revokes))
                found.append(while_up(one, "file", one.by_file, revokes))
                found.append(while_up(one, "main file", one.by_main_file, revokes))
                found.append(while_down(one, "down", revokes))
                found.append(while_down(one, "locked", -(-revokes // LOCKED)))
        finally:
            one.close()
    return found


def _all_there(keyturn: Keyturn, count: int) -> bool:
    with suppress(OSError, ValueError):
        return all("secret" in keyturn.held(f"agent-{n}") for n in range(count))
    return False


def main() -> int:
    """Print the table; exit 1 where an accept came after a return."""
    if sys.argv[1:2] == ["--watch"]:
        watch(sys.argv[2], Path(sys.argv[3]))
        return 0
    parser = argparse.ArgumentParser(description="how long a revoke takes, by each way")
    parser.add_argument("--revokes", type=int, default=1000)
    parser.add_argument("--agents", type=int, default=20)
    parser.add_argument("--victims", type=int, default=VICTIMS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="keyturn-drill-") as folder:
        ways = drill(
            Path(folder), revokes=given.revokes, agents=given.agents, victims=given.victims
        )
    rows = [way.row() for way in ways]
    print(FORM.format(*TITLES))
    for row in rows:
        print(FORM.format(*("-" if value is None else str(value) for value in row.values())))
    good = all(row["p99_ms"] <= GOAL * 1000 for row in rows)
    print(f"goal p99 ≤ {GOAL * 1000:.0f} ms: {'reached' if good else 'MISSED'}")
    if given.json:
        given.json.write_text(json.dumps({"ways": rows, "raw": [asdict(w) for w in ways]}))
    return int(any(way.late_yes for way in ways))


if __name__ == "__main__":
    sys.exit(main())
