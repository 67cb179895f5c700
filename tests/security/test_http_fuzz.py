"""Whatever bytes come, nothing breaks: no 500, no error in the log, and the next good agent is answered."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import random
import re
import string
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httptools
import pytest
from structlog.testing import capture_logs

from keyturn.core.secret import Secret, mint
from keyturn.errors import StoreUnavailable
from keyturn.verifier.hashing import CHEAP_FOR_TESTS, Hashing
from support.http_verifier import Served, served
from support.raw_client import connect, statuses

SEED = int(os.environ.get("KEYTURN_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)
INPUTS = pytest.mark.parametrize(
    "inputs",
    [
        pytest.param(1000, id="some"),
        pytest.param(100_000, id="whole", marks=[pytest.mark.full, pytest.mark.timeout(3600)]),
    ],
)
Make = Callable[[random.Random, Served], bytes]


@pytest.fixture
def service(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Served]:
    """Give a service that has logged no error at the end."""
    with capture_logs() as logged, served(tmp_path) as found:
        yield found
        assert found.verify(found.held[0])[0] == 200
    assert [one for one in logged if one["log_level"] in ("error", "critical")] == []
    assert [one for one in caplog.records if one.levelno >= logging.ERROR] == []


def text(draw: random.Random, most: int = 60) -> bytes:
    """Return a text of odd pieces."""
    pieces = [
        lambda: draw.randbytes(draw.randrange(8)),
        lambda: draw.choice(
            [b"%", b"%zz", b"%00", b"%ff", b"+", b":", b"\0", b"\xed\xa0\x80", b"=", b"&"]
        ),
        lambda: "".join(draw.choices(string.printable, k=draw.randrange(12))).encode(),
        lambda: draw.choice(["é", "\u200b", "𝐝", "\ufeff", "ß"]).encode(),
        lambda: mint(random_bytes=draw.randbytes)[1].reveal().encode(),
        lambda: draw.choice([b"a", b"s", b" "]) * draw.choice([1, 127, 128, 129, 255, 256, 257]),
    ]
    return b"".join(draw.choice(pieces)() for _ in range(draw.randrange(6)))[: most * 20]


def one_line(data: bytes) -> bytes:
    """Return what can stand in a header."""
    return re.sub(rb"[\r\n\0]", b"", data)


def basic_header(draw: random.Random, service: Served) -> bytes:
    """Return a request with an odd header Authorization."""
    raw = text(draw)
    held = service.held[0]
    if draw.random() < 0.3:
        good = bytearray(f"{held.login}:{held.secret.reveal()}".encode())
        good[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        raw = bytes(good)
    value = base64.b64encode(raw)
    if draw.random() < 0.2:
        value = value[: draw.randrange(len(value) + 1)] + one_line(text(draw))
    scheme = draw.choice([b"Basic ", b"basic  ", b"Bearer ", b"Basic", b"", b"Basic\t", b"Digest "])
    lines = (
        b"Authorization: " + scheme + (one_line(raw) if scheme == b"Bearer " else value) + b"\r\n"
    )
    if draw.random() < 0.05:
        lines *= 2
    path = draw.choice([b"/v1/auth", b"/v1/verify", b"/v1/auth/x?y", b"/v1/verify?x"])
    return b"POST " + path + b" HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n"


def value_of(draw: random.Random, depth: int = 0) -> object:
    """Return an odd value for JSON."""
    kind = draw.randrange(9 if depth < 4 else 6)
    if kind == 0:
        return draw.choice([None, True, 0, -1, 1e308, float("nan"), 10**400])
    if kind < 6:
        return text(draw).decode("utf-8", "surrogateescape")
    if kind == 6:
        return [value_of(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {draw.choice(["secret", "login", "x"]): value_of(draw, depth + 1) for _ in range(3)}


def body(draw: random.Random, service: Served) -> bytes:
    """Return a request with an odd body."""
    held = service.held[0]
    content = json.dumps({"login": held.login, "secret": held.secret.reveal()}).encode()
    match draw.randrange(5):
        case 0:
            content = json.dumps(
                {
                    "secret": value_of(draw),
                    **({"login": value_of(draw)} if draw.random() < 0.7 else {}),
                }
            ).encode()
        case 1:
            at = draw.randrange(len(content))
            content = content[:at] + text(draw) + content[at + draw.randrange(5) :]
        case 2:
            content = b"&".join(
                draw.choice([b"client_id", b"client_secret", b"token", text(draw)])
                + b"="
                + text(draw)
                for _ in range(draw.randrange(5))
            )
        case 3:
            content = draw.choice([b"[", b'{"a":', b'{"secret":{', b"\xff\xfe"]) * draw.randrange(
                3000
            )
        case _:
            content = draw.randbytes(draw.randrange(300))
    kind = draw.choice(
        [b"application/json", b"application/x-www-form-urlencoded", b"", one_line(text(draw))]
    )
    path = draw.choice([b"/v1/verify", b"/v1/introspect", b"/v1/auth"])
    head = b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Type: " + kind
    if draw.random() < 0.3:
        pieces, chunked = content, b""
        while pieces:
            size = draw.randrange(1, len(pieces) + 1)
            chunked += b"%x\r\n%b\r\n" % (size, pieces[:size])
            pieces = pieces[size:]
        return head + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked + b"0\r\n\r\n"
    return head + b"\r\nContent-Length: %d\r\n\r\n" % len(content) + content


def stream(draw: random.Random, service: Served) -> bytes:
    """Return requests that were cut, doubled and changed in places."""
    data = bytearray(
        b"".join(
            draw.choice([basic_header, body])(draw, service) for _ in range(draw.randrange(1, 4))
        )
    )
    for _ in range(draw.randrange(8)):
        at = draw.randrange(len(data))
        match draw.randrange(5):
            case 0:
                data[at] = draw.randrange(256)
            case 1:
                del data[at : at + draw.randrange(1, 9)]
            case 2:
                data[at:at] = draw.choice(
                    [
                        b"\r\n",
                        b"\n",
                        b"\0",
                        b" ",
                        b"Transfer-Encoding: chunked\r\n",
                        b"Upgrade: h2c\r\n",
                    ]
                )
            case 3:
                data[at:at] = data[at : at + 50]
            case _:
                data[at:at] = draw.choice(
                    [b"Content-Length: 5\r\n", b"Expect: 100-continue\r\n", b"HTTP/2.0"]
                )
        if not data:
            return b"\r\n"
    return bytes(data)


def send(service: Served, data: bytes, draw: random.Random) -> list[int]:
    """Send a stream in one piece or two, and return the statuses of what came back."""
    with connect(service.port) as one:
        found = bytearray()
        try:
            cut = draw.randrange(len(data) + 1)
            for piece in (data[:cut], data[cut:]):
                one.sendall(piece)
            one.shutdown(1)
            while piece := one.recv(65536):
                found += piece
        except OSError:
            pass
        return statuses(bytes(found))


def run(service: Served, inputs: int, make: Make, allowed: set[int]) -> None:
    """Send so many inputs from a few threads."""

    def some(seed: int) -> set[int]:
        draw, seen = random.Random(seed), set()
        for _ in range(inputs // 4):
            data = make(draw, service)
            answered = send(service, data, draw)
            assert set(answered) <= allowed, (SEED, data, answered)
            seen |= set(answered)
        return seen

    with ThreadPoolExecutor(4) as pool:
        seen = set.union(*pool.map(some, [SEED + n for n in range(4)]))
    print(f"seed {SEED}: {inputs} inputs, answers {sorted(seen)}")
    assert 401 in seen


@INPUTS
@pytest.mark.parametrize(
    ("make", "allowed"),
    [
        (basic_header, {200, 400, 401, 431}),
        (body, {200, 400, 401, 413, 431}),
        (stream, {100, 200, 400, 401, 404, 405, 413, 431}),
    ],
    ids=["header", "body", "stream"],
)
def test_no_bytes_break_the_service(
    service: Served, inputs: int, make: Make, allowed: set[int]
) -> None:
    """Header, body, whole streams: each answer is one of the document, and nothing is logged."""
    run(service, inputs, make, allowed)


@INPUTS
def test_no_stored_hash_breaks_a_check(inputs: int) -> None:
    """A damaged or hostile row is a no, or nobody can tell: never another error, never a big hash."""
    draw = random.Random(SEED)
    hashing, secret = Hashing(cost=CHEAP_FOR_TESTS), Secret("s" * 20)
    good = hashing.digest(secret)
    numbers = [
        "0",
        "1",
        "-1",
        "00",
        "8",
        "131072",
        "131073",
        "99999999999",
        "4294967296",
        "x",
        "",
        "1e3",
    ]
    pieces = [
        "$argon2id",
        "$argon2i",
        "$argon2d",
        "$v=19",
        "$v=16",
        "$",
        "=",
        ",",
        "\0",
        "é",
        "$m=8,t=1,p=1",
    ]
    for _ in range(inputs):
        text_of = list(good)
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(text_of) + 1)
            match draw.randrange(4):
                case 0:
                    text_of[at : at + 1] = draw.choice(string.printable)
                case 1:
                    text_of[at : at + draw.randrange(1, 30)] = []
                case 2:
                    text_of[at:at] = draw.choice(pieces)
                case _:
                    text_of = list(
                        re.sub(r"(?<=[mtp]=)\d+", lambda _m: draw.choice(numbers), "".join(text_of))
                    )
        with contextlib.suppress(StoreUnavailable):
            hashing.matches("".join(text_of), secret)


def test_the_parser_is_the_strict_one() -> None:
    """The version of llhttp that these rules were tried with, or a newer one."""
    assert tuple(map(int, httptools.__version__.split(".")[:2])) >= (0, 6)
