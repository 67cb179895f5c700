"""What the network can do to Vault: answers that drip, TLS that breaks, servers that are not there."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from keyturn.core.model import Target
from keyturn.destinations.vault import VaultDestination, VaultOptions
from keyturn.destinations.vault_auth import AuthOptions
from keyturn.errors import DestinationUnavailable
from keyturn.testing.certificates import new_authority
from keyturn.testing.contract import STORE_ID
from keyturn.testing.fakes import FakeClock
from support.raw_server import BEGINNINGS, dripping, listening

PLACE = Target(to="v", path="a")
MISSING = b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}"


def connection(folder: Path, address: str, **options: Any) -> VaultDestination:
    """Make a connection with a token of no meaning."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text("x")
    auth = AuthOptions(method="token", token_file=str(token))
    read = VaultOptions(auth=auth, **{"address": address, "call_deadline": "1s", **options})
    return VaultDestination(read, name="bao", store_id=STORE_ID, clock=FakeClock())


@pytest.mark.parametrize("begin", BEGINNINGS.values(), ids=BEGINNINGS)
def test_an_answer_that_drips_frees_its_thread(tmp_path: Path, begin: bytes) -> None:
    """A byte now and then keeps no connection: once the server is well, calls are answered again."""
    drips = threading.Event()
    drips.set()
    with listening(dripping(drips, begin, MISSING)) as port:
        destination = connection(tmp_path, f"http://127.0.0.1:{port}", parallel=2)
        for _ in range(3):
            with pytest.raises(DestinationUnavailable):
                destination.observe(PLACE)
        time.sleep(2.5)
        drips.clear()
        with pytest.raises(Exception, match="nothing is mounted|no KV v2|token") as caught:
            destination.probe()
        assert "busy" not in str(caught.value)
        destination.close()


def test_closing_waits_for_no_login(tmp_path: Path) -> None:
    """A reload and SIGTERM go on while a login gets no answer."""
    well = threading.Event()

    def observe() -> None:
        with contextlib.suppress(DestinationUnavailable):
            destination.observe(PLACE)

    with listening(lambda _line: well.wait(10) and None) as port:
        destination = connection(tmp_path, f"http://127.0.0.1:{port}", call_deadline="20s")
        asking = threading.Thread(target=observe, daemon=True)
        asking.start()
        time.sleep(0.3)
        began = time.monotonic()
        destination.close()
        assert time.monotonic() - began < 3
        well.set()
        asking.join(5)


def raised(destination: VaultDestination) -> DestinationUnavailable:
    """Return what a call ends in."""
    with pytest.raises(DestinationUnavailable) as caught:
        destination.observe(PLACE)
    destination.close()
    return caught.value


def test_only_a_handshake_that_failed_has_sent_nothing(tmp_path: Path) -> None:
    """TLS that breaks after the request was read may have done what was asked."""
    ca = new_authority(tmp_path / "ca")
    certificate, key = ca.issue("localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    done: list[bytes] = []

    def breaks(line: socket.socket) -> None:
        secure = context.wrap_socket(line, server_side=True)
        done.append(secure.recv(65536))
        number = secure.detach()
        os.write(number, bytes([0x17, 3, 3, 0, 32]) + b"x" * 32)
        time.sleep(0.3)
        os.close(number)

    with listening(breaks) as port:
        address = f"https://localhost:{port}"
        after = raised(connection(tmp_path, address, ca_file=str(ca.ca_file)))
        assert done
        assert after.sent is True
    with listening(lambda line: line.sendall(b"this is not TLS at all\r\n")) as port:
        before = raised(connection(tmp_path, f"https://localhost:{port}"))
        assert before.sent is False
        assert "handshake" in str(before)


def test_what_is_wrong_is_said_in_our_own_words(tmp_path: Path) -> None:
    """Address and kind: a closed port, an unknown name, a strange certificate, a file not there."""
    ca, other = new_authority(tmp_path / "ca"), new_authority(tmp_path / "other")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*ca.issue("localhost"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"http://127.0.0.1:{server.getsockname()[1]}"
    unknown = "https://no-such-host.invalid:8200"

    def greets(line: socket.socket) -> None:
        context.wrap_socket(line, server_side=True).close()

    with listening(greets) as port:
        secure = f"https://localhost:{port}"
        missing = str(tmp_path / "nothing.pem")
        found = {
            "refused": raised(connection(tmp_path, closed)),
            "name is unknown": raised(connection(tmp_path, unknown)),
            "not trusted": raised(connection(tmp_path, secure, ca_file=str(other.ca_file))),
            f"ca_file {missing} is not there": raised(
                connection(tmp_path, secure, ca_file=missing)
            ),
        }
    for words, error in found.items():
        assert words in str(error)
        assert error.sent is False
        assert error.hint
    assert closed in str(found["refused"])
    assert unknown in str(found["name is unknown"])
