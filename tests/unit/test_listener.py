"""The HTTP listener: what it answers, and that nobody who is slow, silent or broken is in the way."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from keyturn.config.listening import ListenSettings, TlsSection
from keyturn.daemon.listener import HEAD_LIMIT, Answer, Listener
from keyturn.daemon.metrics import Metrics
from keyturn.daemon.pages import Pages
from keyturn.daemon.readiness import Readiness, Reason
from keyturn.errors import ConfigError
from keyturn.testing.certificates import CertificateAuthority, new_authority

BIG = b"x" * 8_000_000


def settings(port: int = 0, **tls: Path) -> ListenSettings:
    """Return settings for loopback; port 0 is any free one, which no file can say."""
    section = TlsSection.model_construct(**{"client_ca": None, **tls}) if tls else None
    return ListenSettings.model_construct(address=f"127.0.0.1:{port}", tls=section)


def echo(method: str, target: str, accept: str) -> Answer:
    """Answer what was asked; `/big` is more than a socket takes at once."""
    body = BIG if target == "/big" else f"{method} {target} {accept}".encode()
    return Answer(status=200, kind="text/plain", body=body)


@contextmanager
def listening(
    handler: Callable[[str, str, str], Answer] = echo, at: ListenSettings | None = None, **more: Any
) -> Iterator[Listener]:
    """Run a listener."""
    listener = Listener(at or settings(), handler, **more)
    listener.start()
    try:
        yield listener
    finally:
        listener.close()


def ask(
    listener: Listener, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Send one request as any client does."""
    client = http.client.HTTPConnection("127.0.0.1", listener.port, timeout=10)
    try:
        client.request(method, path, body=body, headers=headers)
        answer = client.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        client.close()


def connect(listener: Listener, first: bytes = b"") -> socket.socket:
    """Open a bare connection and send this."""
    made = socket.create_connection(("127.0.0.1", listener.port), timeout=10)
    made.sendall(first)
    return made


def rest(connection: socket.socket) -> bytes:
    """Read until the other side ends it; fails where it never does."""
    found = bytearray()
    with connection:
        while True:
            try:
                chunk = connection.recv(65536)
            except ConnectionResetError:
                return bytes(found)
            if not chunk:
                return bytes(found)
            found += chunk


def test_a_request_is_answered_and_the_connection_ends() -> None:
    """One request a connection; the answer says so and has no body for HEAD."""
    with listening() as listener:
        status, headers, body = ask(listener, "/a?b", Accept="text/x")
        assert (status, body) == (200, b"GET /a?b text/x")
        assert headers["Connection"] == "close"
        assert headers["Cache-Control"] == "no-store"
        status, headers, body = ask(listener, "/a", "HEAD")
        assert (status, headers["Content-Length"], body) == (200, "8", b"")
        assert ask(listener, "/big")[2] == BIG


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),  # no Host
        (b"GET /\r\nHTTP/1.1 Host: a\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * HEAD_LIMIT * 2, b"431"),
    ],
)
def test_what_is_no_request_is_refused(sent: bytes, status: bytes) -> None:
    """A broken or endless head gets its status and the connection ends."""
    with listening() as listener:
        assert rest(connect(listener, sent)).startswith(b"HTTP/1.1 " + status)


def test_a_body_is_thrown_away_and_does_not_take_the_answer_along() -> None:
    """Whoever sends more than was asked for still reads the answer."""
    with listening() as listener:
        head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 50000\r\n\r\n"
        with connect(listener, head) as client:
            while client.recv(4096):  # the answer comes first, and ends
                pass
            for _ in range(5):
                client.sendall(b"x" * 10_000)  # a closed connection would refuse the second one
        head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n"
        assert rest(connect(listener, head + b"x" * 60_000)).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET / HT", b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n"],
    ids=["silent", "half", "unread"],
)
def test_whoever_is_slow_is_ended(sent: bytes) -> None:
    """Silent, half a head, or an answer that is not read: all of it has one deadline."""
    with listening(deadline=0.2) as listener:
        connection = connect(listener, sent)
        wait_for(lambda: bool(listener._open))
        wait_for(lambda: not listener._open)
        assert len(rest(connection)) < len(BIG)  # nothing was read before it was ended


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is so; it takes milliseconds where all is well."""
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError


def test_a_crowd_of_silent_clients_keeps_nobody_out() -> None:
    """Where all places are taken the oldest one goes; who asks is answered."""
    with ExitStack() as stack:
        listener = stack.enter_context(listening(most=8))
        crowd = [stack.enter_context(connect(listener, b"GET /")) for _ in range(100)]
        for _ in range(3):
            assert ask(listener, "/")[0] == 200
        assert len(listener._open) <= 8
        assert rest(crowd[0]) == b""


def test_a_handler_that_fails_ends_its_connection_alone() -> None:
    """A bug in a page is logged and costs one answer."""

    def fails(method: str, target: str, accept: str) -> Answer:
        if target == "/bug":
            raise RuntimeError
        return echo(method, target, accept)

    with listening(fails) as listener:
        assert rest(connect(listener, b"GET /bug HTTP/1.1\r\nHost: a\r\n\r\n")) == b""
        assert ask(listener, "/")[0] == 200


def test_a_taken_port_is_said_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the address and the command that shows who has it; later it is free."""
    monkeypatch.setattr("keyturn.daemon.listener.BIND_AGAIN", 0.02)
    with listening() as first:
        second = Listener(settings(first.port), echo)
        second.start()
        assert second.refused is not None
        assert str(first.port) in str(second.refused)
        assert "ss -ltnp" in second.refused.hint
    try:
        wait_for(lambda: second.refused is None)
        assert ask(second, "/")[0] == 200
    finally:
        second.close()


def test_an_address_of_another_host_is_refused() -> None:
    """What can never work ends the start with an error."""
    wrong = ListenSettings.model_construct(address="192.0.2.1:9464", tls=None)
    with pytest.raises(ConfigError, match=r"cannot listen at 192\.0\.2\.1:9464"):
        Listener(wrong, echo).start()


# --- TLS ------------------------------------------------------------------------------------


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    """Give an authority."""
    return new_authority(tmp_path)


def over_tls(listener: Listener, authority: CertificateAuthority, *client: Path) -> str:
    """Ask over TLS; returns the name in the server's certificate."""
    context = ssl.create_default_context(cafile=str(authority.ca_file))
    if client:
        context.load_cert_chain(*client)
    with (
        socket.create_connection(("127.0.0.1", listener.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        secure.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert secure.recv(12) == b"HTTP/1.1 200"
        found: Any = secure.getpeercert()
        while secure.recv(65536):
            pass
        return str(found["subject"][0][0][1])


def test_a_renewed_certificate_is_taken_over(authority: CertificateAuthority) -> None:
    """The next connection sees it; half a renewal changes nothing."""
    certificate, key = authority.issue("one")
    new_certificate, new_key = authority.issue("two")
    with listening(at=settings(certificate=certificate, key=key)) as listener:
        assert over_tls(listener, authority) == "one"
        new_certificate.replace(certificate)
        assert over_tls(listener, authority) == "one"  # its key is not there yet
        new_key.replace(key)
        assert over_tls(listener, authority) == "two"


def test_without_tls_nothing_is_said_at_a_tls_port(authority: CertificateAuthority) -> None:
    """A plain request gets no page, and a client that only connects is ended."""
    certificate, key = authority.issue("one")
    with listening(at=settings(certificate=certificate, key=key), deadline=0.5) as listener:
        assert b"HTTP/1.1 200" not in rest(connect(listener, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"))
        assert rest(connect(listener)) == b""
        assert over_tls(listener, authority) == "one"


def test_only_clients_of_the_authority_are_answered(authority: CertificateAuthority) -> None:
    """With `client_ca` a stranger is turned away in the handshake."""
    certificate, key = authority.issue("one")
    mine = authority.issue("client")
    at = settings(certificate=certificate, key=key, client_ca=authority.ca_file)
    with listening(at=at) as listener:
        assert over_tls(listener, authority, *mine) == "one"
        with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):
            over_tls(listener, authority)


def test_a_key_that_others_can_read_is_refused(authority: CertificateAuthority) -> None:
    """It counts as known; the error says what to type."""
    certificate, key = authority.issue("one")
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="open to other users"):
        Listener(settings(certificate=certificate, key=key), echo)
    key.chmod(0o600)
    other = authority.issue("two")[1]
    with pytest.raises(ConfigError, match=r"cannot be used together \(KEY_VALUES_MISMATCH\)"):
        Listener(settings(certificate=certificate, key=other), echo)


# --- the pages ------------------------------------------------------------------------------


def test_the_pages_say_what_the_daemon_is() -> None:
    """Health, readiness with its reasons, metrics in both formats, and nothing else."""
    readiness, metrics = Readiness(), Metrics()
    pages = Pages(readiness, metrics)

    assert pages("GET", "/healthz", "").status == 200
    assert pages("GET", "/readyz", "").status == 503
    assert b'"reason": "starting"' in pages("GET", "/readyz?verbose", "").body
    readiness.release(Reason.STARTING)
    assert pages("HEAD", "/readyz", "").status == 200

    plain = pages("GET", "/metrics", "*/*")
    assert plain.kind.startswith("text/plain; version=0.0.4")
    assert b"keyturn_build_info" in plain.body
    opened = pages("GET", "/metrics", "application/openmetrics-text;version=1.0.0")
    assert opened.kind.startswith("application/openmetrics-text")
    assert opened.body.endswith(b"# EOF\n")

    assert pages("GET", "/", "").status == pages("GET", "/metrics/", "").status == 404
    refused = pages("DELETE", "/metrics", "")
    assert (refused.status, refused.allow) == (405, "GET, HEAD")


def test_a_stuck_daemon_is_to_be_restarted() -> None:
    """Health says 503 only where a restart helps, and readiness says why."""
    seconds = [0.0]
    readiness = Readiness(lambda: seconds[0])
    readiness.release(Reason.STARTING)
    pages = Pages(readiness, Metrics())
    readiness.looked(store_answers=False)
    assert pages("GET", "/healthz", "").status == 200
    seconds[0] += 121
    assert pages("GET", "/healthz", "") == Answer(
        status=503, kind="application/json", body=b'{"live": false}\n'
    )
    assert b'"reason": "stuck"' in pages("GET", "/readyz", "").body


def test_many_scrapes_are_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crowd of scrapers costs two renderings a second, whatever each of them says it accepts."""
    metrics = Metrics()
    pages, rendered = Pages(Readiness(), metrics, clock=lambda: 1.0), []
    page = metrics.page
    monkeypatch.setattr(metrics, "page", lambda accept: rendered.append(accept) or page(accept))  # type: ignore[func-returns-value]
    for number in range(100):
        for kind in ("text/plain", "application/openmetrics-text", f"text/{number}"):
            pages("GET", "/metrics", f"{kind}; version=1.{number}.0")
    assert len(rendered) == 2
    assert len(pages._rendered) == 2


@pytest.mark.parametrize("version", ["none", "1.0.0\xff", "1..0", "9" * 5000])
def test_whatever_is_accepted_there_is_a_page(version: str) -> None:
    """A version that is none costs neither the answer nor a traceback in the log."""
    pages = Pages(Readiness(), Metrics())
    for kind in ("text/plain", "application/openmetrics-text"):
        found = pages("GET", "/metrics", f"{kind}; version={version}")
        assert found.status == 200
        assert version not in found.kind
