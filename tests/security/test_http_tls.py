"""TLS at the verifier: renewed under open connections, nothing old, and nobody with a strange CA."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import pytest

from keyturn.config.listening import TlsSection
from keyturn.daemon.certificates import Certificates
from keyturn.testing.certificates import CertificateAuthority, new_authority
from keyturn.verifier.decision import Verifier
from keyturn.verifier.hashing import CHEAP_FOR_TESTS, Hashing
from keyturn.verifier.http.callers import Caller, Callers, RelyingParty
from keyturn.verifier.http.connection import Registry
from keyturn.verifier.http.desk import Desk
from keyturn.verifier.http.server import Place, Server, listen_tcp
from support.cutter import open_store
from support.http_verifier import Held, fill
from support.raw_client import wait_until_closed
from support.stores import RealClock

NEXT = b"GET /v1/auth HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    """Give an authority of our own."""
    return new_authority(tmp_path / "ca")


@contextmanager
def serving(
    folder: Path,
    tls: TlsSection,
    parties: list[RelyingParty],
    registry: Registry | None = None,
    clients: ssl.VerifyMode = ssl.CERT_REQUIRED,
) -> Iterator[tuple[int, Held]]:
    """Serve over TLS; gives the port and what one agent holds."""
    store = open_store(folder, writer="w")
    (folder / "revoked.d").mkdir(mode=0o700)
    hashing = Hashing(cost=CHEAP_FOR_TESTS)
    held = fill(store, ["a"], hashing=hashing)[0]
    verifier = Verifier.open(
        f"sqlite:///{folder}/keyturn.db", state_dir=folder, clock=RealClock(), hashing=hashing
    )
    callers, ready = Callers(parties), threading.Event()
    place = Place(
        socket=listen_tcp("127.0.0.1", 0), context=Certificates(tls, clients=clients).context
    )
    desk = Desk(verifier, callers, threads=2, pages=lambda _path: None)
    server = Server(desk, callers, [place], registry=registry, serving=ready.set)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(20)
        yield place.socket.getsockname()[1], held
    finally:
        server.stop()
        thread.join(20)
        desk.close()
        verifier.close()
        store.close()


def section(certificate: Path, key: Path, client_ca: Path | None = None) -> TlsSection:
    """Return the section of the configuration."""
    return TlsSection.model_construct(certificate=certificate, key=key, client_ca=client_ca)


class Kept(http.client.HTTPSConnection):
    """A connection that closes itself at the end of a block."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def over_tls(port: int, authority: CertificateAuthority, *client: Path) -> Kept:
    """Connect, with a certificate of a client where one is given."""
    context = ssl.create_default_context(cafile=str(authority.ca_file))
    if client:
        context.load_cert_chain(*client)
    one = Kept("localhost", port, timeout=20, context=context)
    try:
        one.connect()
    except OSError:
        one.close()
        raise
    return one


def ask_once(port: int, held: Held, authority: CertificateAuthority, *client: Path) -> int:
    """Ask on a connection of its own."""
    with over_tls(port, authority, *client) as one:
        return ask(one, held)


def ask(one: http.client.HTTPSConnection, held: Held) -> int:
    """Ask about a good secret."""
    one.request("GET", "/v1/auth", headers={"Authorization": held.basic})
    found = one.getresponse()
    found.read()
    return found.status


def name_of(one: http.client.HTTPSConnection) -> str:
    """Return the name in the server's certificate."""
    found: Any = one.sock.getpeercert()
    return str(dict(pair[0] for pair in found["subject"])["commonName"])


def test_a_renewed_certificate_is_shown_and_no_connection_is_dropped(
    tmp_path: Path, authority: CertificateAuthority
) -> None:
    """Thirty open connections go on; the next handshake shows the new one."""
    certificate, key = authority.issue("one")
    new_certificate, new_key = authority.issue("two")
    with serving(tmp_path, section(certificate, key), []) as (port, held):
        kept = [over_tls(port, authority) for _ in range(30)]
        assert {ask(one, held) for one in kept} == {200}
        new_certificate.replace(certificate)
        between = over_tls(port, authority)
        assert name_of(between) == "one"  # its key is not there yet
        new_key.replace(key)
        fresh = over_tls(port, authority)
        assert name_of(fresh) == "two"
        assert {ask(one, held) for one in [*kept, between, fresh]} == {200}
        for one in [*kept, between, fresh]:
            one.close()


def test_tls_below_1_2_and_no_tls_at_all_are_refused(
    tmp_path: Path, authority: CertificateAuthority
) -> None:
    """TLS 1.1 fails in its handshake; plain HTTP at the port is answered by nothing of ours."""
    certificate, key = authority.issue("one")
    with serving(tmp_path, section(certificate, key), []) as (port, held):
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        began = time.monotonic()
        plain = socket.create_connection(("127.0.0.1", port), timeout=20)
        with plain, pytest.raises(OSError):
            old.wrap_socket(plain)
        with socket.create_connection(("127.0.0.1", port), timeout=20) as plain:
            plain.sendall(NEXT + f"Authorization: {held.basic}\r\n\r\n".encode())
            said = b""
            try:
                while piece := plain.recv(4096):
                    said += piece
            except OSError:
                pass
            assert b"HTTP" not in said
        assert time.monotonic() - began < 5  # at once, not at the deadline
        assert ask_once(port, held, authority) == 200


def test_a_relying_party_is_known_by_its_certificate(
    tmp_path: Path, authority: CertificateAuthority
) -> None:
    """With the right CA and name it may ask; with another CA there is not even a connection."""
    certificate, key = authority.issue("one")
    stranger = new_authority(tmp_path / "other")
    party = RelyingParty(caller=Caller(name="p"), certificate="DNS:localhost")
    elsewhere = RelyingParty(caller=Caller(name="q"), certificate="DNS:elsewhere.example")
    tls = section(certificate, key, authority.ca_file)
    with serving(tmp_path, tls, [party]) as (port, held):
        assert ask_once(port, held, authority, *authority.issue("client")) == 200
        for client in ((), stranger.issue("client")):
            with pytest.raises(OSError):
                ask_once(port, held, authority, *client)
    (tmp_path / "again").mkdir(mode=0o700)
    with serving(tmp_path / "again", tls, [elsewhere]) as (port, held):
        assert ask_once(port, held, authority, *authority.issue("client2")) == 503


@pytest.mark.parametrize(
    ("number", "deadline", "within"),
    [
        pytest.param(60, 0.5, 6.0, id="tenth"),
        pytest.param(2000, 10.0, 15.0, id="whole", marks=[pytest.mark.full]),
    ],
)
def test_half_a_handshake_has_its_time(
    tmp_path: Path, authority: CertificateAuthority, number: int, deadline: float, within: float
) -> None:
    """CVE-2026-73500: nothing, half a hello, and a handshake without a request are all closed."""
    certificate, key = authority.issue("one")
    registry = Registry(most=8 * number, deadline=deadline, idle=60)
    with (
        serving(tmp_path, section(certificate, key), [], registry) as (port, held),
        ExitStack() as stack,
    ):
        good = over_tls(port, authority)
        half: list[socket.socket] = []
        for place in range(number):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            one.sendall(b"" if place % 2 else b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
            half.append(one)
        assert ask(good, held) == 200
        closed = wait_until_closed(half, within=within)
        print(f"{number} half handshakes closed within {max(closed):.1f} s")
        assert max(closed) <= within
        assert ask(good, held) == 200
        good.close()
        silent = over_tls(port, authority)
        silent.sock.settimeout(within)
        assert silent.sock.recv(1) == b""
        silent.close()
