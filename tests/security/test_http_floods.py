"""Floods, crowds and cuts over HTTP: a good agent is answered, and no cut is missed by any process."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from keyturn.core.secret import mint
from keyturn.storage.store import Store
from keyturn.verifier.gate import Gate
from keyturn.verifier.hashing import CHEAP_FOR_TESTS, Cost, Hashing
from support.cutter import administration, cut, open_store
from support.http_verifier import Counted, Held, basic, fill, served

SEED = int(os.environ.get("KEYTURN_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)
TESTS = Path(__file__).parents[1]
RATE, CONNECTIONS = 5000, 100


@contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run a module of support until its input ends."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    command = [sys.executable, "-m", *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
    ) as one:
        yield one


@contextmanager
def flooded(port: int, headers: Sequence[str], seen: Counter[str]) -> Iterator[None]:
    """Flood a service while the block runs."""
    with process("support.flooder", str(port), str(RATE), str(CONNECTIONS)) as one:
        assert one.stdin is not None
        assert one.stdout is not None
        one.stdin.write("\n".join([*headers, "", ""]))
        one.stdin.flush()
        assert one.stdout.readline() == "flooding\n"
        try:
            yield
        finally:
            one.stdin.close()
            seen.update(json.loads(one.stdout.readline()))


def junk(held: Held, revoked: Held) -> list[str]:
    """Return well-formed junk: unknown ids, a known id, and a revoked one that is right."""
    draw = random.Random(SEED).randbytes
    unknown = [basic("a0", mint(random_bytes=draw)[1].reveal()) for _ in range(300)]
    wrong = basic(held.login, revoked.secret.reveal())
    return [header for one in unknown for header in (one, wrong, revoked.basic)]


def p99(took: Sequence[float]) -> float:
    """Return the time that one of a hundred exceeds."""
    return sorted(took)[int(len(took) * 0.99)]


def filled(folder: Path, names: Sequence[str]) -> tuple[Store, list[Held]]:
    """Make a store with these agents."""
    store = open_store(folder, writer="w")
    (folder / "revoked.d").mkdir(mode=0o700)
    return store, fill(store, names, hashing=Hashing(cost=CHEAP_FOR_TESTS))


@pytest.mark.parametrize(
    "seconds", [3, pytest.param(60, marks=[pytest.mark.full, pytest.mark.timeout(600)])]
)
def test_a_flood_of_junk_costs_no_good_agent_its_answer(tmp_path: Path, seconds: int) -> None:
    """security.md, test 1: cold checks are all answered, no 503, no hash for junk."""
    names = [f"a{n}" for n in range(20 * seconds)]
    seen, took, bad = Counter[str](), [], []
    store, held = filled(tmp_path, names)
    cut(administration(tmp_path, store), "revoke", held[-1].version_id)
    good = held[:-1]
    with process("support.http_process", str(tmp_path)) as service:
        assert service.stdin is not None
        assert service.stdout is not None
        port = int(service.stdout.readline())
        kept = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        with flooded(port, junk(good[0], held[-1]), seen):
            began_all, asked = time.monotonic(), iter(good)
            while (one := next(asked, None)) is not None:
                if time.monotonic() - began_all > seconds:
                    break
                began = time.perf_counter()
                kept.request("GET", "/v1/auth", headers={"Authorization": one.basic})
                found = kept.getresponse()
                found.read()
                took.append(time.perf_counter() - began)
                if found.status != 200:
                    bad.append(found.status)
                time.sleep(0.03)
            lasted = time.monotonic() - began_all
        kept.close()
        service.stdin.close()
        counts = json.loads(service.stdout.readline())
    store.close()
    rate = sum(seen.values()) / lasted
    print(
        f"{rate:.0f} junk a second; {len(took)} cold checks,"
        f" median {statistics.median(took) * 1000:.1f} ms, p99 {p99(took) * 1000:.0f} ms"
    )
    assert bad == []
    assert set(seen) == {"401"}
    assert rate > (100 if seconds < 60 else 0.9 * RATE)
    assert counts["hashes"] == len(took)
    assert "unavailable" not in counts
    assert "limited" not in counts


@pytest.mark.parametrize(
    "number", [30, pytest.param(1000, marks=[pytest.mark.full, pytest.mark.timeout(900)])]
)
def test_a_flood_of_junk_delays_no_revoke(tmp_path: Path, number: int) -> None:
    """security.md, test 2: none refused, each seen at once, and the store does not grow."""
    names, seen, took = [f"a{n}" for n in range(number + 2)], Counter[str](), []
    with served(tmp_path, names) as service:
        verbs = administration(tmp_path, service.store)
        cut(verbs, "revoke", service.held[-1].version_id)
        for one in service.held[:-1]:
            assert service.ask("/v1/auth", headers={"Authorization": one.basic})[0] == 200
        before = (tmp_path / "keyturn.db").stat().st_size
        with (
            flooded(service.port, junk(service.held[0], service.held[-1]), seen),
            process("support.cutter", str(tmp_path)) as cutter,
        ):
            assert cutter.stdin is not None
            assert cutter.stdout is not None
            print("revoke", service.held[-1].version_id, file=cutter.stdin, flush=True)
            assert float(cutter.stdout.readline())  # it has started
            for one in service.held[1:-1]:
                began = time.monotonic()
                print("revoke", one.version_id, file=cutter.stdin, flush=True)
                took.append(float(cutter.stdout.readline()) - began)
                assert service.ask("/v1/auth", headers={"Authorization": one.basic})[0] == 401
        grown = (tmp_path / "keyturn.db").stat().st_size - before
        print(
            f"{number} revokes by a process of their own under {sum(seen.values())} junk, of which"
            f" {seen['503']} met a commit: median"
            f" {statistics.median(took) * 1000:.1f} ms, p99 {p99(took) * 1000:.0f} ms;"
            f" the store grew by {grown / 1024:.0f} KiB, by the revokes"
        )
        assert set(seen) <= {"401", "503"}  # a commit may lock a look-up out: nobody can tell
        if number >= 1000:
            assert p99(took) <= 0.1


# --- freshness --------------------------------------------------------------------------------


@contextmanager
def services(folder: Path, number: int) -> Iterator[list[int]]:
    """Serve one store by so many processes; gives their ports."""
    with ExitStack() as stack:
        running = [
            stack.enter_context(process("support.http_process", str(folder))) for _ in range(number)
        ]
        ports = []
        for one in running:
            assert one.stdout is not None
            ports.append(int(one.stdout.readline()))
        yield ports
        for one in running:
            assert one.stdin is not None
            assert one.stdout is not None
            one.stdin.close()
            one.stdout.read()


class Asking:
    """A thread that asks one service about one secret, over and over."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)

    def accepted(self, held: Held) -> bool:
        """Ask once; nothing but yes and no is an answer here."""
        self.connection.request("GET", "/v1/auth", headers={"Authorization": held.basic})
        found = self.connection.getresponse()
        found.read()
        assert found.status in (200, 401, 503)
        return found.status == 200

    def run(self, held: Held, over: threading.Event, begun: threading.Barrier) -> list[float]:
        """Return when each question began that was answered by yes."""
        yes, last = [], False
        begun.wait(20)
        while not last:
            last = over.is_set()
            began = time.monotonic()
            if self.accepted(held):
                yes.append(began)
        return yes


@pytest.mark.parametrize(
    "rounds", [30, pytest.param(10_000, marks=[pytest.mark.full, pytest.mark.timeout(3600)])]
)
def test_no_process_says_yes_after_a_cut_has_returned(rounds: int) -> None:
    """security.md, test 4, over HTTP: three processes on one file, suspended and resumed in races."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
    store, held = filled(folder, [f"a{n}" for n in range(rounds // 2 + 1)])
    verbs, draw, stale = administration(folder, store), random.Random(SEED), 0
    try:
        with services(folder, 3) as ports, ThreadPoolExecutor(3) as pool:
            asking = [Asking(port) for port in ports]
            for number in range(rounds):
                one = held[0] if number % 2 else held[1 + number // 2]
                for each in asking:
                    assert each.accepted(one)  # and remembered
                over, begun = threading.Event(), threading.Barrier(4)
                running = [pool.submit(each.run, one, over, begun) for each in asking]
                begun.wait(20)
                time.sleep(draw.random() * 0.004)
                try:
                    if number % 2:
                        cut(verbs, "suspend", one.agent)
                    else:
                        cut(verbs, "revoke", one.version_id)
                    returned = time.monotonic()
                finally:
                    over.set()
                stale += sum(at > returned for each in running for at in each.result())
                if number % 2:
                    cut(verbs, "resume", one.agent)
            for each in asking:
                each.connection.close()
    finally:
        store.close()
        shutil.rmtree(folder)
    print(f"seed {SEED}: {stale} of {rounds} races stale")
    assert stale == 0, f"seed {SEED}"


# --- a crowd ----------------------------------------------------------------------------------


def patient(port: int, held: Held, start: threading.Barrier) -> tuple[float, int]:
    """Ask until answered, as told by Retry-After; return how long that took, and how often."""
    start.wait(60)
    began, tries = time.monotonic(), 0
    while True:
        tries += 1
        one = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        one.request("GET", "/v1/auth", headers={"Authorization": held.basic})
        found = one.getresponse()
        found.read()
        one.close()
        if found.status == 200:
            return time.monotonic() - began, tries
        assert found.status == 503
        time.sleep(int(found.headers["Retry-After"]))


@pytest.mark.parametrize(
    ("number", "queue", "slack"),
    [
        pytest.param(24, 8, 6.0, id="tenth"),
        pytest.param(1000, 64, 5.0, id="whole", marks=[pytest.mark.full, pytest.mark.timeout(900)]),
    ],
)
def test_a_cold_crowd_that_comes_back_when_told_is_all_answered(
    tmp_path: Path, number: int, queue: int, slack: float
) -> None:
    """Real argon2id: nobody is refused, all are in within 1.2 times the hashing, pages go on."""
    cost, permits = Cost(), 2
    gate = Gate(permits, memory_kib=permits * cost.memory_kib, queue=queue)
    hashing = Counted(cost, gate)
    names = [f"a{n}" for n in range(number)]
    with served(tmp_path, names, hashing=hashing) as service:
        over, pages = threading.Event(), []

        def probe() -> None:
            while not over.wait(0.05):
                began = time.perf_counter()
                assert service.ask("/nope")[0] == 404
                pages.append(time.perf_counter() - began)

        start = threading.Barrier(number)
        with ThreadPoolExecutor(number + 1) as pool:
            probing = pool.submit(probe)
            crowd = [pool.submit(patient, service.port, one, start) for one in service.held]
            results = [one.result() for one in crowd]
            over.set()
            probing.result()
        last, tries = max(took for took, _ in results), sum(tries for _, tries in results)
        ideal = number * gate._each / permits
        print(
            f"{number} cold agents: last after {last:.1f} s, {last / ideal:.2f} times the hashing"
            f" of {ideal:.1f} s; {tries} requests; probe p99 {p99(pages) * 1000:.0f} ms"
        )
        assert len(service.hashes) >= number
        assert last <= 1.2 * ideal + slack
        assert gate._used == gate.waiting == 0
        if number >= 1000:
            assert p99(pages) <= 0.1
