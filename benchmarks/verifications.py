"""Warm checks per second over HTTP, beside what else answers "is this secret good?".

All on one machine in one run, in turn, each with one connection crowd from wrk and one process:

    keyturn, 1 agent         GET /v1/auth, Basic, the same agent each time
    keyturn, N agents        the same, another agent each time
    bare                     the same HTTP server, and a constant answer in the place of a decision
    OpenBao AppRole          POST auth/approle/login for a batch token, in-memory dev server
    argon2 per request       the same HTTP server, argon2-cffi in a thread for each request
    nginx return 200         the limit

Goals: 6 times the logins of OpenBao, a fifth of its p99, 60 % of the bare server; a warm check in the
process itself in 10 µs. `make` needs wrk and nginx (Debian packages of these names).

    python benchmarks/verifications.py [--agents 10000] [--rounds 3] [--seconds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argon2 import PasswordHasher

from keyturn.testing import openbao
from keyturn.verifier.http.callers import Callers
from keyturn.verifier.http.messages import Answer
from keyturn.verifier.http.server import Place, Server, listen_tcp

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

CONNECTIONS = 32
FORM = "{:<24}{:>11}{:>11}{:>11}"
GOALS = {"logins": 6.0, "p99": 0.2, "bare": 0.6, "in_process_us": 10.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A server that is asked, and how."""

    name: str
    url: str
    script: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What wrk saw in one round; times in milliseconds."""

    rate: float
    p50: float
    p99: float


# --- the servers, each in a process of its own ------------------------------------------------


def serve(kind: str, folder: Path, agents: int) -> None:
    """Serve until standard input ends; prints the port, and writes what agents present."""
    from support.http_verifier import served

    if kind == "keyturn":
        with served(folder, [f"agent-{n}" for n in range(agents)]) as found:
            for one in found.held:
                found.verifier.verify(one.login, one.secret)
            (folder / "headers").write_text("".join(f"{one.basic}\n" for one in found.held))
            time.sleep(2.5)  # the spool has just been made
            if agents == 1:
                (folder / "in_process").write_text(str(in_process(found)))
            _until_told(found.port)
        return
    desk: Any = Constant() if kind == "bare" else Naive()
    place = Place(socket=listen_tcp("127.0.0.1", 0))
    server = Server(desk, Callers([]), [place])
    thread = threading.Thread(target=server.run)
    thread.start()
    (folder / "headers").write_text("Basic YTpi\n")
    _until_told(place.socket.getsockname()[1])
    server.stop()
    thread.join()


def _until_told(port: int) -> None:
    print(port, flush=True)
    sys.stdin.read()


def in_process(found: Any, rounds: int = 20_000) -> float:
    """Return the microseconds of one warm check as a library; the best of five."""
    one = found.held[0]
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(rounds):
            found.verifier.verify(one.login, one.secret)
        best = min(best, time.perf_counter() - began)
    return best / rounds * 1e6


class Constant:
    """A desk without a decision."""

    answer = Answer(200, headers={"Keyturn-Agent": "agent-0", "Keyturn-State": "current"})

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin."""

    def take(self, asker: Any, request: Any) -> None:
        """Answer."""
        asker.reply(request, self.answer)


class Naive(Constant):
    """argon2 for each request, as argon2-cffi's documentation shows it, on threads."""

    def __init__(self) -> None:
        self._hasher = PasswordHasher(time_cost=2, memory_cost=19456, parallelism=1)
        self._digest = self._hasher.hash("secret")
        self._pool = ThreadPoolExecutor(2)

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin."""
        self._loop = loop

    def take(self, asker: Any, request: Any) -> None:
        """Hash, then answer."""
        done = self._pool.submit(self._hasher.verify, self._digest, "secret")
        done.add_done_callback(
            lambda _done: self._loop.call_soon_threadsafe(asker.reply, request, self.answer)
        )


@contextmanager
def ours(kind: str, folder: Path, agents: int) -> Iterator[str]:
    """Run one of our servers; gives its address."""
    folder.mkdir(mode=0o700)
    command = [sys.executable, __file__, "--serve", kind, str(folder), str(agents)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1/auth"
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


@contextmanager
def approle(folder: Path) -> Iterator[tuple[str, str]]:
    """Run a real OpenBao with a role for batch tokens; gives address and body of a login."""
    folder.mkdir(mode=0o700)
    with openbao.dev_server(folder) as server:

        def call(method: str, path: str, content: dict[str, Any] | None = None) -> Any:
            body = json.dumps(content or {}).encode() if method == "POST" else None
            found = openbao.call(server, method, path, body)
            return json.loads(found) if found else None

        call("POST", "sys/auth/approle", {"type": "approle"})
        role = "auth/approle/role/bench"
        call("POST", role, {"token_type": "batch", "token_ttl": "1h"})
        role_id = call("GET", f"{role}/role-id")["data"]["role_id"]
        secret_id = call("POST", f"{role}/secret-id")["data"]["secret_id"]
        body = json.dumps({"role_id": role_id, "secret_id": secret_id})
        yield f"{server.address}/v1/auth/approle/login", body


@contextmanager
def nginx(folder: Path) -> Iterator[str]:
    """Run nginx with one worker that says 200."""
    folder.mkdir(mode=0o700)
    port = openbao.free_port()
    config = folder / "nginx.conf"
    config.write_text(
        f"worker_processes 1; pid {folder}/pid; error_log {folder}/error; daemon off;\n"
        "events { worker_connections 1024; }\n"
        "http { access_log off; keepalive_requests 100000000; server {\n"
        f"listen 127.0.0.1:{port}; location / {{ return 200; }} }} }}\n"
    )
    process = subprocess.Popen([_tool("nginx"), "-c", str(config), "-p", str(folder)])
    try:
        time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1/auth"
    finally:
        process.terminate()
        process.wait(20)


# --- the load ---------------------------------------------------------------------------------

_HEADERS = """
local r = {}
local i = 0
init = function(args)
  for line in io.lines("%s") do
    r[#r + 1] = wrk.format("GET", nil, {["Authorization"] = line})
  end
end
request = function()
  i = i %% #r + 1
  return r[i]
end
"""
_BODY = """
wrk.method = "POST"
wrk.body = '%s'
wrk.headers["Content-Type"] = "application/json"
"""
_UNITS = {"us": 0.001, "ms": 1.0, "s": 1000.0}


def measure(peer: Peer, seconds: int, connections: int = CONNECTIONS) -> Measured:
    """Load a peer with wrk. Raises RuntimeError where one answer was no 200."""
    command = [
        _tool("wrk"),
        "-t1",
        f"-c{connections}",
        f"-d{seconds}s",
        "--latency",
        "--timeout",
        "30s",
    ]
    done = subprocess.run(
        [*command, "-s", str(peer.script), peer.url], capture_output=True, text=True, check=True
    )
    if "Non-2xx" in done.stdout or "Socket errors" in done.stdout:
        raise RuntimeError(f"{peer.name}: {done.stdout}")
    rate = re.search(r"Requests/sec:\s+([0-9.]+)", done.stdout)
    tails = dict(re.findall(r"(50|99)%\s+([0-9.]+[a-z]+)", done.stdout))
    assert rate is not None
    return Measured(rate=float(rate[1]), p50=_ms(tails["50"]), p99=_ms(tails["99"]))


def _ms(text: str) -> float:
    found = re.fullmatch(r"([0-9.]+)([a-z]+)", text)
    assert found is not None
    return float(found[1]) * _UNITS[found[2]]


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        sys.exit(f"{name} is missing: apt-get install {name}")
    return found


# --- the run ----------------------------------------------------------------------------------


def main() -> None:
    """Measure all peers in turn, and say whether the goals were reached."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--agents", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        kind, folder, agents = options.serve
        serve(kind, Path(folder), int(agents))
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="verifications-")))
        found = run(stack, folder, options)
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(0 if all(found["reached"].values()) else 1)


def run(stack: ExitStack, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Start every peer, and load one after the other, round by round."""
    peers: list[Peer] = []

    def add(name: str, url: str, script: str) -> None:
        path = folder / f"{len(peers)}.lua"
        path.write_text(script)
        peers.append(Peer(name=name, url=url, script=path))

    many = f"keyturn, {options.agents} agents"
    kinds: list[tuple[str, str, int]] = [
        ("keyturn, 1 agent", "keyturn", 1),
        (many, "keyturn", options.agents),
        ("bare", "bare", 1),
        ("argon2 per request", "naive", 1),
    ]
    for number, (name, kind, agents) in enumerate(kinds):
        place = folder / str(number)
        url = stack.enter_context(ours(kind, place, agents))
        add(name, url, _HEADERS % (place / "headers"))
    url, body = stack.enter_context(approle(folder / "bao"))
    add("OpenBao AppRole", url, _BODY % body)
    add("nginx return 200", stack.enter_context(nginx(folder / "nginx")), "")

    rounds: dict[str, list[Measured]] = {peer.name: [] for peer in peers}
    for peer in peers:
        measure(peer, 1)
    for _ in range(options.rounds):
        for peer in peers:
            rounds[peer.name].append(measure(peer, options.seconds))
    in_process_us = float((folder / "0" / "in_process").read_text())
    return judged(rounds, in_process_us, ["keyturn, 1 agent", many])


def judged(
    rounds: dict[str, list[Measured]], in_process_us: float, names: list[str]
) -> dict[str, Any]:
    """Return medians, ratios and which goals were reached."""

    def median(name: str, of: Callable[[Measured], float]) -> float:
        return statistics.median(of(one) for one in rounds[name])

    rows = [
        {
            "name": name,
            "per_second": round(median(name, lambda one: one.rate)),
            "p50_ms": round(median(name, lambda one: one.p50), 3),
            "p99_ms": round(median(name, lambda one: one.p99), 3),
        }
        for name in rounds
    ]

    def ratio(name: str, other: str, of: Callable[[Measured], float]) -> float:
        """Compare within each round: a noisy minute is the same for both."""
        pairs = zip(rounds[name], rounds[other], strict=True)
        return round(statistics.median(of(one) / of(two) for one, two in pairs), 3)

    worst = {
        "logins": min(ratio(n, "OpenBao AppRole", lambda one: one.rate) for n in names),
        "p99": max(ratio(n, "OpenBao AppRole", lambda one: one.p99) for n in names),
        "bare": min(ratio(n, "bare", lambda one: one.rate) for n in names),
        "in_process_us": round(in_process_us, 2),
    }
    reached = {
        "logins": worst["logins"] >= GOALS["logins"],
        "p99": worst["p99"] <= GOALS["p99"],
        "bare": worst["bare"] >= GOALS["bare"],
        "in_process_us": worst["in_process_us"] <= GOALS["in_process_us"],
    }
    return {"rows": rows, "worst": worst, "goals": GOALS, "reached": reached}


def table(found: dict[str, Any]) -> str:
    """Return it for people."""
    lines = [FORM.format("", "PER SECOND", "P50 MS", "P99 MS")]
    lines += [
        FORM.format(row["name"], row["per_second"], row["p50_ms"], row["p99_ms"])
        for row in found["rows"]
    ]
    worst, reached = found["worst"], found["reached"]
    texts = {
        "logins": f"{worst['logins']} times the logins of OpenBao (goal 6)",
        "p99": f"{worst['p99']} of its p99 (goal 0.2)",
        "bare": f"{worst['bare']} of the bare server (goal 0.6)",
        "in_process_us": f"{worst['in_process_us']} µs for a warm check in the process (goal 10)",
    }
    lines += ["", "the worse of both keyturn rows:"]
    lines += [f"  {texts[key]}: {'reached' if reached[key] else 'MISSED'}" for key in texts]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
