"""Nobody holds more than a place for a while: slow, silent, greedy and deaf clients, thousands of them.

The tenth has a tenth of the connections and of the deadlines. CVE-2026-73500 (etcd had no deadline for
handshakes); uvicorn and granian keep silent, half-headed and half-bodied connections for 45 s and more.
"""

from __future__ import annotations

import asyncio
import http.client
import resource
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from keyturn.verifier.http.callers import Callers
from keyturn.verifier.http.connection import (
    AHEAD,
    BODY_LIMIT,
    HEAD_LIMIT,
    HEADERS,
    Connection,
    Registry,
)
from support.http_verifier import Served, served
from support.raw_client import connect, exchange, statuses, wait_until_closed

HEAD = "POST /v1/verify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = f"{HEAD}Content-Length: 100\r\n\r\n"
GOOD_P99, HEALTH = 0.5, 0.1  # seconds
SILENT: dict[str, bytes] = {
    "silent": b"",
    "half a head": b"GET /v1/auth HTTP/1.1\r\nHost: x\r\nX: y",
    "half a body": (BODY + "{").encode(),
    "half a chunk": f"{HEAD}Transfer-Encoding: chunked\r\n\r\n5\r\nab".encode(),
    "half a trailer": f"{HEAD}Transfer-Encoding: chunked\r\n\r\n0\r\nX: y".encode(),
    "half a second request": b"GET /nope HTTP/1.1\r\nHost: x\r\n\r\nGET /nope HTTP/1.1\r\nHo",
    "blank lines": b"\r\n" * 40,
}


# --- how much ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Give one service for the caps."""
    with served(tmp_path_factory.mktemp("caps")) as found:
        yield found


def chunks(number: int, size: int) -> str:
    """Return a body in so many chunks."""
    return f"{size:x}\r\n{'x' * size}\r\n" * number


A = "a:\r\n"
CODED = f"{HEAD}Transfer-Encoding: chunked\r\n"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (f"GET /v1/auth HTTP/1.1\r\nHost: x\r\nX: {'x' * 14_000}\r\n\r\n", 401),
        (f"GET /v1/auth HTTP/1.1\r\nHost: x\r\nX: {'x' * 2 * HEAD_LIMIT}\r\n\r\n", 431),
        (f"GET /v1/auth HTTP/1.1\r\nHost: x\r\nX: {'x' * 2 * HEAD_LIMIT}", 431),
        (f"GET /v1/auth HTTP/1.1\r\nHost: x\r\nAuthorization: {'x' * 300_000}\r\n\r\n", 431),
        (f"GET /{'x' * 2 * HEAD_LIMIT} HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (f"GET / HTTP/1.1\r\nHost: x\r\n{'x' * 2 * HEAD_LIMIT}: x\r\n\r\n", 431),
        (f"GET /v1/auth HTTP/1.1\r\nHost: x\r\n{A * (HEADERS - 2)}\r\n", 401),
        (f"GET /v1/auth HTTP/1.1\r\nHost: x\r\n{A * HEADERS}\r\n", 431),
        (f"GET /v1/auth HTTP/1.1\r\nHost: x\r\n{A * 3000}", 431),
        (f"{HEAD}Content-Length: {BODY_LIMIT}\r\n\r\n{'x' * BODY_LIMIT}", 400),
        (f"{HEAD}Content-Length: {BODY_LIMIT + 1}\r\n\r\n{'x' * (BODY_LIMIT + 1)}", 413),
        (f"{HEAD}Content-Length: 99999999\r\n\r\n{'x' * 100_000}", 413),
        (f"{CODED}\r\n{chunks(16, 1024)}0\r\n\r\n", 400),
        (f"{CODED}\r\n{chunks(17, 1024)}0\r\n\r\n", 413),
        (f"{CODED}\r\n{chunks(9000, 1)}0\r\n\r\n", 431),  # of which most is no body
        (f"{CODED}\r\n1;{'x' * 2 * HEAD_LIMIT}\r\nx\r\n0\r\n\r\n", 431),
        (f"{CODED}\r\n0\r\nX: {'x' * 2 * HEAD_LIMIT}\r\n\r\n", 431),
        (f"{CODED}\r\n0\r\n{A * 30_000}", 431),
    ],
)
@pytest.mark.parametrize("size", [0, 4000])
def test_a_request_has_a_size(service: Served, data: str, expected: int, size: int) -> None:
    """Head, headers, body, chunks and trailers, in one piece or in many: refused, and closed."""
    text = data.replace("\r\nHost", "\r\nConnection: close\r\nHost", 1)
    assert statuses(exchange(service.port, text.encode(), size=size)) == [expected]


# --- how long ---------------------------------------------------------------------------------


class Measured:
    """What good agents and a probe see meanwhile, on connections of their own."""

    def __init__(self, service: Served) -> None:
        self.service, self.over = service, threading.Event()
        self.took: dict[str, list[float]] = {"/v1/auth": [], "/nope": []}
        self.bad: list[object] = []

    def run(self, path: str) -> None:
        """Ask until it is over, each time as a new client and as one that stays."""
        headers = {"Authorization": self.service.held[0].basic}
        wanted = 200 if path == "/v1/auth" else 404
        kept = http.client.HTTPConnection("127.0.0.1", self.service.port, timeout=20)
        while not self.over.wait(0.02):
            fresh = http.client.HTTPConnection("127.0.0.1", self.service.port, timeout=20)
            for one in (kept, fresh):
                began = time.perf_counter()
                try:
                    one.request("GET", path, headers=headers)
                    found = one.getresponse()
                    found.read()
                    status: object = found.status
                except OSError as error:
                    status = error
                self.took[path].append(time.perf_counter() - began)
                if status != wanted:
                    self.bad.append(status)
            fresh.close()
        kept.close()

    def p99(self, path: str) -> float:
        """Return the time that one of a hundred exceeds."""
        return statistics.quantiles(self.took[path], n=100)[98]


@contextmanager
def measured(service: Served) -> Iterator[Measured]:
    """Measure while the block runs."""
    one = Measured(service)
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(one.run, path) for path in one.took]
        try:
            yield one
        finally:
            one.over.set()
        for each in running:
            each.result()


def descriptors() -> int:
    """Count what this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def many_files(number: int) -> None:
    """Let this process hold both ends of so many connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(number, hard), hard))


AMOUNTS = pytest.mark.parametrize(
    ("number", "deadline", "within"),
    [
        pytest.param(200, 0.5, 6.0, id="tenth"),
        pytest.param(
            2000, 10.0, 15.0, id="whole", marks=[pytest.mark.full, pytest.mark.timeout(600)]
        ),
    ],
)


@AMOUNTS
def test_slow_and_silent_connections_end_and_cost_nobody_anything(
    tmp_path: Path, number: int, deadline: float, within: float
) -> None:
    """Rows 5 and 6: so many of each kind; all closed in time, good agents and the probe unhindered."""
    registry = Registry(most=8 * number, deadline=deadline, idle=60)
    many_files(20 * number)
    whole = deadline > 1
    parts = [[kind] for kind in SILENT] if whole else [list(SILENT)]
    with served(tmp_path, registry=registry) as service, ExitStack() as stack:
        before = descriptors()
        for kinds in parts:
            with measured(service) as good:
                held = []
                for kind in kinds * number:
                    held.append(stack.enter_context(connect(service.port)))
                    held[-1].sendall(SILENT[kind])
                closed = wait_until_closed(held, within=within)
            assert max(closed) <= within, kinds
            assert good.bad == [], kinds
            assert descriptors() <= before + len(held) + 50
            for one in held:
                one.close()
            print(
                f"{', '.join(kinds)}: {len(held)} closed within {max(closed):.1f} s;"
                f" good agents p99 {good.p99('/v1/auth') * 1000:.0f} ms,"
                f" probe p99 {good.p99('/nope') * 1000:.0f} ms"
            )
            if whole:
                assert good.p99("/v1/auth") <= GOOD_P99
                assert good.p99("/nope") <= HEALTH
        wait_for(lambda: len(registry) == 0)


def wait_for(true: Callable[[], bool]) -> None:
    """Wait for a condition."""
    until = time.monotonic() + 20
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_dribble_does_not_move_its_end(tmp_path: Path) -> None:
    """A byte now and then, in head, body or trailer: the deadline is that of the whole request."""
    registry = Registry(most=100, deadline=0.5, idle=60)
    with served(tmp_path, registry=registry) as service, ExitStack() as stack:
        held = []
        for data in list(SILENT.values())[1:]:
            one = stack.enter_context(connect(service.port))
            one.sendall(data)
            held.append(one)
        over = threading.Event()

        def dribble() -> None:
            while not over.wait(0.05):
                for one in held:
                    with suppress(OSError):
                        one.send(b"\r\n" if one is held[-1] else b"a")

        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(dribble)
            closed = wait_until_closed(held, within=10)
            over.set()
            running.result()
        assert max(closed) < 10


def test_who_rests_from_the_first_moment_on_ends_as_well(tmp_path: Path) -> None:
    """An idle connection has its time, whenever it was opened."""
    registry = Registry(most=100, deadline=20, idle=0.1)
    with served(tmp_path, registry=registry) as service, connect(service.port) as one:
        one.sendall(b"GET /nope HTTP/1.1\r\nHost: x\r\n\r\n")
        assert max(wait_until_closed([one], within=10)) < 10


def test_a_store_that_hangs_keeps_no_deadline_from_being_kept(tmp_path: Path) -> None:
    """Deadlines are swept by nobody who asks the store."""
    go_on = threading.Event()
    registry = Registry(most=100, deadline=0.1, idle=0.1)
    try:
        with served(tmp_path, registry=registry, refresh=lambda: go_on.wait(20)) as service:
            for _ in range(2):
                with connect(service.port) as one:
                    assert max(wait_until_closed([one], within=10)) < 10
            go_on.set()
    finally:
        go_on.set()


def all_answered(here: Any, number: int) -> bool:
    """Whether so many requests were read from a connection, and none of them waits."""
    return here._complete == number and not here._busy and not here._queue


def socket_of(here: Any) -> Any:
    """Return the socket of a connection, which does not grow its buffer for this test."""
    return here._transport.get_extra_info("socket")


def test_who_never_reads_its_answers_ends(tmp_path: Path) -> None:
    """It asks and asks and reads nothing: no more is read from it, and its time comes."""
    registry = Registry(most=100, deadline=0.5, idle=60)
    with served(tmp_path, registry=registry) as service, socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect(("127.0.0.1", service.port))
        one.settimeout(20)
        wait_for(lambda: len(registry) == 1)
        here: Any = next(iter(registry._all))
        socket_of(here).setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        ask = b"GET /nope HTTP/1.1\r\nHost: x\r\n\r\n" * 60
        for number in range(1, 3000):
            one.sendall(ask)
            wait_for(lambda: here._stuck or all_answered(here, 60 * number))  # noqa: B023
            if here._stuck:
                break
        assert here._stuck
        wait_for(lambda: len(registry) == 0)


def test_a_greedy_pipeline_that_is_not_read_ends(tmp_path: Path) -> None:
    """It sends all that it can at once, and reads nothing of what comes."""
    registry = Registry(most=100, deadline=0.5, idle=60)
    with served(tmp_path, registry=registry) as service, ExitStack() as stack:
        ask = b"GET /nope HTTP/1.1\r\nHost: x\r\n\r\n" * 2000
        for _ in range(20):
            one = stack.enter_context(connect(service.port))
            one.setblocking(False)
            one.send(ask)
        wait_for(lambda: len(registry) == 0)


class Deaf:
    """A transport that takes everything, and a desk that answers nothing."""

    def __init__(self) -> None:
        self.paused = 0

    def get_extra_info(self, _name: str) -> None:
        return None

    def pause_reading(self) -> None:
        self.paused += 1

    def take(self, _asker: object, _request: object) -> None:
        pass


def test_a_pipeline_waits_no_deeper_than_it_may() -> None:
    """However many requests come in one read, so many are kept, and the last of them ends it."""

    async def read() -> None:
        deaf: Any = Deaf()
        here = Connection(deaf, Registry(most=9), Callers([]))
        here.connection_made(deaf)
        here.data_received(b"GET /nope HTTP/1.1\r\nHost: x\r\n\r\n" * 5000)
        assert len(here._queue) == AHEAD + 1
        assert [one.keep_alive for one in here._queue] == [True] * AHEAD + [False]
        assert deaf.paused == 1

    asyncio.run(read())


def test_more_connections_than_places_take_them_from_who_asks_nothing(tmp_path: Path) -> None:
    """A crowd of silent ones fills all places over and over: who works goes on."""
    registry = Registry(most=50)
    with served(tmp_path, registry=registry) as service, ExitStack() as stack:
        with measured(service) as good:
            wait_for(lambda: len(good.took["/v1/auth"]) > 4)
            for _ in range(300):
                stack.enter_context(connect(service.port))
            wait_for(lambda: len(registry) <= 50)
        assert good.bad == []


# --- memory -----------------------------------------------------------------------------------


def resident() -> int:
    """Return the memory that this process has, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


GREEDY: dict[str, bytes] = {
    "slow bodies": (
        f"{HEAD}Content-Length: {BODY_LIMIT}\r\n\r\n" + "x" * (BODY_LIMIT - 1)
    ).encode(),
    "small chunks": (f"{CODED}\r\n" + chunks(2600, 2)).encode(),
    "many headers": ("GET / HTTP/1.1\r\nHost: x\r\n" + "a:\r\n" * 3900).encode(),
    "long trailers": (f"{CODED}\r\n0\r\nX: " + "x" * 15_000).encode(),
    "pipelines": b"GET /v1/auth HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer x\r\n\r\n" * 200,
}


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(100, id="tenth"),
        pytest.param(1000, id="whole", marks=[pytest.mark.full, pytest.mark.timeout(600)]),
    ],
)
def test_what_they_all_hold_is_bounded(tmp_path: Path, number: int) -> None:
    """CVE-2025-6203, CVE-2025-59043, CVE-2024-8185: 1,000 of each kind cost at most 64 MiB more."""
    registry = Registry(most=8 * number, deadline=30, idle=30)
    many_files(4 * number + 200)
    with served(tmp_path, registry=registry) as service:
        for kind, data in GREEDY.items():
            with ExitStack() as stack:
                before = resident()
                held = [stack.enter_context(connect(service.port)) for _ in range(number)]
                for one in held:
                    one.setblocking(False)
                    one.send(data)
                wait_for(lambda: all(quiet(one) for one in list(registry._all)))
                assert service.ask("/nope")[0] == 404
                grown = (resident() - before) / 2**20
            print(f"{number} with {kind}: {grown:+.1f} MiB")
            assert grown <= 64, kind
            wait_for(lambda: len(registry) == 0)


def quiet(one: object) -> bool:
    """Whether a connection has read something and is asked for nothing."""
    return bool(getattr(one, "_begun", False) or getattr(one, "_ending", False)) or (
        not getattr(one, "_busy", False) and not getattr(one, "_queue", True)
    )
