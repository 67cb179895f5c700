"""A cold herd: every agent asks at once after a restart, each with a secret that was not seen before.

Agents do as HTTP says: whoever is told 503 comes back after Retry-After, on the same connection. Goals:
argon2id: everybody is answered within 1.2 times what the hashes take on their permits, no answer is a
refusal, memory within the gate's budget, /healthz within 100 ms throughout. With --scheme hmac-sha256
all within 10 s.

    python benchmarks/herd.py [--agents 10000] [--scheme argon2id|hmac-sha256] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

AT_ONCE = 256  # connections; a herd behind a gateway comes through few of them
BUDGET_MIB = 256
SLACK_MIB = 64
PERMITS = 2
KEYED_WITHIN = 10.0  # seconds


def serve(folder: Path, agents: int, scheme: str) -> None:
    """Serve until standard input ends, with hashes at their default cost."""
    from keyturn.verifier.gate import Gate
    from keyturn.verifier.hashing import Cost, Hashing, share_memory
    from keyturn.verifier.http.server import settle
    from keyturn.verifier.keyed import Key
    from keyturn.verifier.keyring import KeyRing
    from support.http_verifier import served

    share_memory()
    hashing = Hashing(cost=Cost(), gate=Gate(PERMITS, memory_kib=BUDGET_MIB * 1024))
    keyed = scheme != "argon2id"
    ring = KeyRing(keys={"k1": Key(secrets.token_bytes(32))}, current="k1") if keyed else None
    names = [f"agent-{n}" for n in range(agents)]
    with served(folder, names, hashing=hashing, ring=ring, pages=health) as found:
        (folder / "headers").write_text("".join(f"{one.basic}\n" for one in found.held))
        each = 0.0 if keyed else _time_of_a_hash(hashing, found.held[0].secret)
        settle()
        print(json.dumps({"port": found.port, "hash_s": each}), flush=True)
        sys.stdin.read()


def health(path: bytes) -> Any:
    """Answer /healthz as the service does: from memory."""
    from keyturn.verifier.http.messages import json_answer

    return json_answer(200, {"live": True}) if path == b"/healthz" else None


def _time_of_a_hash(hashing: Any, secret: Any) -> float:
    """Return the seconds of one hash while both permits are in use, as in the herd."""
    digest = hashing.digest(secret)
    rounds = 20

    def some() -> None:
        for _ in range(rounds):
            hashing.matches(digest, secret)

    threads = [threading.Thread(target=some) for _ in range(PERMITS)]
    began = time.perf_counter()
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    return (time.perf_counter() - began) / rounds


@dataclass(slots=True)
class Herd:
    """What the agents saw."""

    answers: Counter[int] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)
    done: int = 0


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, float]:
    """Read one answer: its status, and when to come back."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = retry = 0
    for line in head.split("\r\n"):
        name, _, value = line.partition(":")
        if name.lower() == "content-length":
            length = int(value)
        elif name.lower() == "retry-after":
            retry = int(value)
    await reader.readexactly(length)
    return int(head.split()[1]), float(retry)


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def agent(header: str, herd: Herd, idle: asyncio.Queue[Connection]) -> None:
    """Authenticate once, however often it is told to come back."""
    request = f"GET /v1/auth HTTP/1.1\r\nHost: x\r\nAuthorization: {header}\r\n\r\n".encode()
    began = time.monotonic()
    while True:
        reader, writer = await idle.get()
        writer.write(request)
        status, retry = await answer_of(reader)
        idle.put_nowait((reader, writer))
        herd.answers[status] += 1
        if status != 503:
            break
        await asyncio.sleep(retry)
    herd.done += status == 200
    herd.waits.append(time.monotonic() - began)


def watch(port: int, pid: int) -> None:
    """Ask for /healthz ten times a second and look at the memory, until standard input ends.

    In a process of its own: ten thousand agents in one keep each other waiting, and would keep this.
    """
    over, probes, peak = threading.Event(), list[float](), 0.0
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    while not over.wait(0.1):
        began = time.monotonic()
        connection.request("GET", "/healthz")
        connection.getresponse().read()
        probes.append(time.monotonic() - began)
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                peak = max(peak, int(line.split()[1]) / 1024)
        if len(probes) == 5:
            print(json.dumps({"before_mib": peak}), flush=True)
    print(json.dumps({"probes": probes, "peak_mib": peak}), flush=True)


async def stampede(port: int, headers: list[str]) -> tuple[Herd, float]:
    """Let them all go; returns what they saw, and the seconds."""
    herd = Herd()
    idle: asyncio.Queue[Connection] = asyncio.Queue()
    for _ in range(min(AT_ONCE, len(headers))):
        idle.put_nowait(await asyncio.open_connection("127.0.0.1", port))
    began = time.monotonic()
    await asyncio.gather(*(agent(one, herd, idle) for one in headers))
    seconds = time.monotonic() - began
    while not idle.empty():
        idle.get_nowait()[1].close()
    return herd, seconds


@contextmanager
def beside(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run another part of this file in a process of its own, until it is told to end."""
    command = [sys.executable, __file__, *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            if process.stdin is not None and not process.stdin.closed:
                process.stdin.close()


def line_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Read the next line that it says."""
    assert process.stdout is not None
    found: dict[str, Any] = json.loads(process.stdout.readline())
    return found


def main() -> None:
    """Run one herd, and say whether the goals were reached."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--agents", type=int, default=10_000)
    parser.add_argument("--scheme", choices=["argon2id", "hmac-sha256"], default="argon2id")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--watch", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(Path(options.serve[0]), int(options.serve[1]), options.serve[2])
    if options.watch:
        return watch(*options.watch)
    with tempfile.TemporaryDirectory(prefix="herd-") as name:
        folder = Path(name)
        with beside("--serve", name, str(options.agents), options.scheme) as server:
            told = line_of(server)
            headers = (folder / "headers").read_text().splitlines()
            with beside("--watch", str(told["port"]), str(server.pid)) as watcher:
                before = line_of(watcher)["before_mib"]
                herd, seconds = asyncio.run(stampede(told["port"], headers))
                assert watcher.stdin is not None
                watcher.stdin.close()
                seen = line_of(watcher)
    found = judged(options, herd, seconds, told["hash_s"], seen | {"before_mib": before})
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(0 if all(found["reached"].values()) else 1)


def judged(
    options: argparse.Namespace, herd: Herd, seconds: float, each: float, seen: dict[str, Any]
) -> dict[str, Any]:
    """Return the figures, and which goals were reached."""
    least = options.agents * each / PERMITS
    healthz, grew = max(seen["probes"]) * 1000, seen["peak_mib"] - seen["before_mib"]
    return {
        "agents": options.agents,
        "scheme": options.scheme,
        "answers": dict(herd.answers),
        "hash_ms": round(each * 1000, 1),
        "hashes_alone_s": round(least, 1),
        "all_answered_s": round(seconds, 1),
        "median_wait_s": round(statistics.median(herd.waits), 1),
        "healthz_p99_ms": round(sorted(seen["probes"])[len(seen["probes"]) * 99 // 100] * 1000, 1),
        "healthz_worst_ms": round(healthz, 1),
        "memory_grew_mib": round(grew, 1),
        "reached": {
            "everybody": herd.done == options.agents,
            "in time": seconds <= (1.2 * least + 1 if each else KEYED_WITHIN),
            "memory": grew <= BUDGET_MIB + SLACK_MIB,
            "healthz": healthz <= 100,
        },
    }


if __name__ == "__main__":
    main()
