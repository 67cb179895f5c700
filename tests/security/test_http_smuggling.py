"""Two servers never understand one stream in two ways: what is not clear is refused, and is the last.

Behind each of these requests comes another one. Where the first was refused nothing more is answered
on that connection: whatever a proxy took for a body is no request of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.http_verifier import Served, served
from support.raw_client import exchange, statuses

HOST = "Host: x\r\n"
NEXT = b"GET /next HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Give one service for all of them."""
    folder: Path = tmp_path_factory.mktemp("smuggling")
    with served(folder) as found:
        yield found


def post(headers: str, body: str = "", *, version: str = "1.1") -> bytes:
    """Return a request as it goes over the wire."""
    return f"POST /v1/auth HTTP/{version}\r\n{HOST}{headers}\r\n{body}".encode("latin-1")


CHUNKED = "Transfer-Encoding: chunked\r\n"
REFUSED = {
    "length and coding": post(f"Content-Length: 4\r\n{CHUNKED}", "0\r\n\r\n"),
    "coding and length": post(f"{CHUNKED}Content-Length: 4\r\n", "0\r\n\r\n"),
    "two lengths": post("Content-Length: 0\r\nContent-Length: 4\r\n"),
    "one length twice": post("Content-Length: 0\r\nContent-Length: 0\r\n"),
    "a list of lengths": post("Content-Length: 0, 0\r\n"),
    "a signed length": post("Content-Length: +0\r\n"),
    "a negative length": post("Content-Length: -1\r\n"),
    "a hexadecimal length": post("Content-Length: 0x0\r\n"),
    "a length without end": post(f"Content-Length: {'9' * 30}\r\n"),
    "an empty length": post("Content-Length:\r\n"),
    "a length folded": post("Content-Length:\r\n 0\r\n"),
    "coding twice": post(f"{CHUNKED}{CHUNKED}", "0\r\n\r\n"),
    "another coding": post("Transfer-Encoding: identity\r\n"),
    "chunked not last": post("Transfer-Encoding: chunked, identity\r\n", "0\r\n\r\n"),
    "chunked not alone": post("Transfer-Encoding: gzip, chunked\r\n", "0\r\n\r\n"),
    "two codings": post(f"{CHUNKED}Transfer-Encoding: identity\r\n", "0\r\n\r\n"),
    "nearly chunked": post("Transfer-Encoding: xchunked\r\n", "0\r\n\r\n"),
    "a blank before chunked": post("Transfer-Encoding: \x0bchunked\r\n", "0\r\n\r\n"),
    "a blank before the colon": post("Transfer-Encoding : chunked\r\n", "0\r\n\r\n"),
    "chunked in 1.0": post(f"Connection: keep-alive\r\n{CHUNKED}", "0\r\n\r\n", version="1.0"),
    "a folded header": post("X: a\r\n b\r\n"),
    "a folded first header": b"GET /v1/auth HTTP/1.1\r\n Host: x\r\n\r\n",
    "bare LF": b"GET /v1/auth HTTP/1.1\nHost: x\n\n",
    "LF after a header": b"GET /v1/auth HTTP/1.1\r\nHost: x\nX: y\r\n\r\n",
    "LF at the end": b"GET /v1/auth HTTP/1.1\r\nHost: x\r\n\n",
    "bare CR": b"GET /v1/auth HTTP/1.1\r\nHost: x\rX: y\r\n\r\n",
    "NUL": b"GET /v1/auth HTTP/1.1\r\nHost: x\0\r\n\r\n",
    "a header without a name": post(": y\r\n"),
    "a header without a colon": post("X\r\n"),
    "LF in chunks": post(CHUNKED, "1\nx\n0\n\n"),
    "LF in a chunk's extension": post(CHUNKED, "1;a\nb\r\nx\r\n0\r\n\r\n"),
    "a chunk of 0x1": post(CHUNKED, "0x1\r\nx\r\n0\r\n\r\n"),
    "a chunk without end": post(CHUNKED, f"{'f' * 17}1\r\nx\r\n0\r\n\r\n"),
    "a blank after the size": post(CHUNKED, "1 \r\nx\r\n0\r\n\r\n"),
    "more than its size": post(CHUNKED, "1\r\nxy\r\n0\r\n\r\n"),
    "a length in the trailer": post(CHUNKED, "0\r\nContent-Length: 10\r\n\r\n"),
    "no host": b"GET /v1/auth HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /v1/auth HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "HTTP/0.9": b"GET /v1/auth\r\n\r\n",
    "HTTP/1.2": b"GET /v1/auth HTTP/1.2\r\nHost: x\r\n\r\n",
    "HTTP/2.0": b"GET /v1/auth HTTP/2.0\r\nHost: x\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "CONNECT": b"CONNECT x:443 HTTP/1.1\r\nHost: x:443\r\n\r\n",
    "CONNECT to a path": b"CONNECT /v1/auth HTTP/1.1\r\nHost: x\r\n\r\n",
    "a blank in the target": b"GET /v1/auth x HTTP/1.1\r\nHost: x\r\n\r\n",
    "a tab": b"GET\t/v1/auth HTTP/1.1\r\nHost: x\r\n\r\n",
    "no such method": b"FOO /v1/auth HTTP/1.1\r\nHost: x\r\n\r\n",
    "a method in lower case": b"get /v1/auth HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_clear_is_refused_and_is_the_last(service: Served, name: str) -> None:
    """One 400, the connection ends, and what came behind it is not answered."""
    found = exchange(service.port, REFUSED[name] + NEXT)
    assert statuses(found) == [400]
    assert b"Connection: close\r\n" in found


@pytest.mark.parametrize("name", list(REFUSED)[::5])
def test_it_is_refused_however_it_is_cut(service: Served, name: str) -> None:
    """Byte by byte it is the same request."""
    assert statuses(exchange(service.port, REFUSED[name] + NEXT, size=1))[:1] == [400]


def test_what_was_asked_before_is_answered_and_nothing_after(service: Served) -> None:
    """An answer that is owed goes out; the broken request behind it ends the connection."""
    good = b"GET /v1/auth HTTP/1.1\r\nHost: x\r\n\r\n"
    for name in ("length and coding", "bare LF", "no such method"):
        found = statuses(exchange(service.port, good + REFUSED[name] + NEXT))
        assert found in ([401], [401, 400]), name


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"GET http://other/v1/auth HTTP/1.1\r\nHost: x\r\n\r\n", [401, 404]),
        (b"GET http://other/v1/nope HTTP/1.1\r\nHost: x\r\n\r\n", [404, 404]),
        (b"GET ftp://other/v1/auth HTTP/1.1\r\nHost: x\r\n\r\n", [404, 404]),
        (b"GET http://x?a=/v1/auth HTTP/1.1\r\nHost: x\r\n\r\n", [404, 404]),
        (b"GET /v1/auth#x HTTP/1.1\r\nHost: x\r\n\r\n", [404, 404]),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", [404, 404]),
        (post(CHUNKED, "1;a=b\r\nx\r\n0\r\n\r\n"), [401, 404]),
        (post("Content-Length: 2\r\n", "ab"), [401, 404]),
        (post("Content-Length: 4\r\nExpect: 100-continue\r\n", "abcd"), [100, 401, 404]),
        (post("Content-Length: 4\r\nExpect: else\r\n", "abcd"), [401, 404]),
        (post("Content-Length: 9999999\r\nExpect: 100-continue\r\n"), [413]),
        (post("Content-Length: 9999999999\r\nExpect: 100-continue\r\n"), [413]),
        (b"GET /v1/auth HTTP/1.0\r\n\r\n", [401]),
        (b"\r\nGET /v1/auth HTTP/1.1\r\nHost: x\r\n\r\n", [401, 404]),
    ],
)
def test_what_is_clear_is_answered_in_order(
    service: Served, data: bytes, expected: list[int]
) -> None:
    """Absolute targets, chunks, bodies that were announced, and the requests behind them."""
    assert statuses(exchange(service.port, data + NEXT)) == expected


def test_an_upgrade_is_not_for_us(service: Served) -> None:
    """A request that offers h2c or websocket is answered as HTTP/1.1, and is the last one."""
    for what in ("h2c", "websocket", "HTTP/2.0", "TLS/1.0"):
        data = f"GET /v1/auth HTTP/1.1\r\n{HOST}Connection: Upgrade\r\nUpgrade: {what}\r\n\r\n"
        assert statuses(exchange(service.port, data.encode() + NEXT)) == [401]


def test_a_body_is_let_come_only_when_no_other_answer_is_owed(service: Served) -> None:
    """100 Continue in front of an answer to somebody else would be taken for a part of it."""
    first = b"GET /v1/auth HTTP/1.1\r\nHost: x\r\n\r\n"
    second = post("Content-Length: 4\r\nExpect: 100-continue\r\n", "abcd")
    assert statuses(exchange(service.port, first + second + NEXT)) == [401, 401, 404]


def test_a_trailer_is_no_header(service: Served) -> None:
    """RFC 9110, 6.5.1: credentials behind a body are not what the proxy in front has seen."""
    held = service.held[0]
    for path, content in (("/v1/auth", ""), ("/v1/verify", "Content-Type: application/json\r\n")):
        head = f"POST {path} HTTP/1.1\r\n{HOST}{content}Connection: close\r\n{CHUNKED}\r\n"
        body = f"0\r\nAuthorization: {held.basic}\r\nHost: y\r\nX: y\r\n\r\n"
        assert statuses(exchange(service.port, (head + body).encode())) == [401]


def test_pipelined_requests_are_answered_in_their_order(service: Served) -> None:
    """Cold and warm, with bodies and without: the answers stand as the questions did."""
    held, wrong = service.held[0].basic, "Basic bm8="
    kinds = [(held, 200), (wrong, 401), (held, 200), ("Digest x", 401)]
    asked = [kinds[n % 4] for n in range(40)]
    data = b"".join(
        f"POST /v1/auth HTTP/1.1\r\n{HOST}Authorization: {one}\r\nContent-Length: 1\r\n\r\nx".encode()
        for one, _ in asked
    )
    found = statuses(exchange(service.port, data + NEXT))
    assert found == [status for _, status in asked] + [404]


def test_a_pipeline_has_an_end(service: Served) -> None:
    """So many that come at once are cut; each that was answered was answered in order."""
    one = f"GET /v1/auth HTTP/1.1\r\n{HOST}Authorization: Bearer {'x' * 40}\r\n\r\n".encode()
    found = statuses(exchange(service.port, one * 2000 + NEXT))
    assert set(found) == {401}
    assert 64 <= len(found) < 2000
