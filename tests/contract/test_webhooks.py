"""Deliveries to real receivers, over HTTP and HTTPS, that behave badly."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook

from keyturn.errors import ConfigError
from keyturn.notify import events, in_words, signing
from keyturn.notify.events import Message
from keyturn.notify.hook import Spec, send
from keyturn.notify.sending import Answer, deliver
from keyturn.testing.certificates import new_authority
from support.receiver import KEY, OTHER_KEY, Receiver, key_file, receiving

SOON = 0.5  # seconds: the deadline of a delivery in these tests
HOWTO = Path(__file__).parents[2] / "docs" / "howto" / "webhooks.md"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A receiver over plain HTTP on loopback."""
    with receiving() as found:
        yield found


def ping() -> Message:
    """Return a message."""
    return events.ping(store_id="s1", at=datetime.now(UTC), nonce="0" * 32)


def sent(receiver: Receiver, folder: Path, *keys: str, **more: object) -> Answer:
    """Send one message there, signed with these keys."""
    spec = Spec(name="x", url=receiver.url, key_file=key_file(folder, *keys), on=frozenset())

    def by(url: str, body: bytes, headers: dict[str, str], *, ca_file: Path | None) -> Answer:
        return deliver(url, body, headers, ca_file=ca_file, deadline=SOON)

    return send(spec, ping(), by=by)


# --- signatures ---------------------------------------------------------------------------


def test_the_ready_library_verifies_what_is_sent(receiver: Receiver, tmp_path: Path) -> None:
    """A receiver needs nothing but `standardwebhooks`; path and query arrive as configured."""
    answer = sent(receiver, tmp_path)

    assert (answer.delivered, answer.status, answer.words) == (True, 204, "HTTP 204")
    assert receiver.got[0]["type"] == "ping"
    assert receiver.paths == ["/hook?from=keyturn"]
    assert receiver.headers["content-type"] == "application/json"


def test_two_keys_give_two_signatures(receiver: Receiver, tmp_path: Path) -> None:
    """While a key changes, receivers with the old and with the new one both say yes."""
    for receiver.key in (KEY, OTHER_KEY):
        assert sent(receiver, tmp_path, OTHER_KEY, KEY).delivered
    assert receiver.headers["webhook-signature"].count("v1,") == 2
    receiver.key = "whsec_" + "A" * 40
    assert not sent(receiver, tmp_path, OTHER_KEY, KEY).delivered


def test_a_new_key_counts_from_the_next_delivery(receiver: Receiver, tmp_path: Path) -> None:
    """The file is read for each delivery: nobody restarts anything to change a key."""
    assert sent(receiver, tmp_path, KEY).delivered
    receiver.key = OTHER_KEY
    assert sent(receiver, tmp_path, OTHER_KEY).delivered


@pytest.mark.parametrize(
    "content",
    ["", "hunter2hunter2hunter2hunter2", "whsec_", "whsec_c2hvcnQ=", "whsec_!!!!", f"{KEY}\n" * 3],
)
def test_what_is_no_key_is_refused_without_showing_it(content: str, tmp_path: Path) -> None:
    """Nothing is sent, and the error says what is expected and quotes nothing."""
    with pytest.raises(ConfigError) as caught:
        signing.read_keys(key_file(tmp_path, content))
    assert "hunter2" not in f"{caught.value} {caught.value.hint}"
    assert str(tmp_path) in str(caught.value)


def test_a_key_that_others_can_read_is_refused(receiver: Receiver, tmp_path: Path) -> None:
    """Whoever has the key can write events: then nothing is sent at all."""
    path = key_file(tmp_path)
    path.chmod(0o644)
    spec = Spec(name="x", url=receiver.url, key_file=path, on=frozenset())
    assert "open to other users" in send(spec, ping()).trouble
    assert receiver.seen.total() == 0


# --- answers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("broken", "HTTP 500"),
        ("redirect", "redirect, not followed"),
        ("gone", "HTTP 410"),
        ("picky", "HTTP 400"),
        ("hang", "no whole answer in time"),
        ("drip", "no whole answer in time"),
        ("garbage", "an answer that is no HTTP"),
        ("lost", "the connection was cut"),
    ],
)
def test_what_is_no_yes_is_no_delivery(
    receiver: Receiver, tmp_path: Path, mode: str, words: str
) -> None:
    """Each ends within the deadline, in our words, after one request to the one address."""
    receiver.mode = mode
    began = time.monotonic()
    answer = sent(receiver, tmp_path)

    assert not answer.delivered
    assert answer.words == words
    assert time.monotonic() - began < SOON + 1.5
    assert receiver.paths == ["/hook?from=keyturn"]


def test_a_huge_answer_is_read_to_its_limit_only(receiver: Receiver, tmp_path: Path) -> None:
    """A yes with a terabyte behind it is a yes."""
    receiver.mode = "huge"
    assert sent(receiver, tmp_path).delivered


def test_retry_after_is_honoured_within_bounds(receiver: Receiver, tmp_path: Path) -> None:
    """Seconds and dates are read; what asks for more than an hour gets an hour."""
    receiver.mode = "busy"
    assert sent(receiver, tmp_path).retry_after == timedelta(seconds=7)

    from keyturn.notify.sending import _retry_after

    assert _retry_after("999999999999") == timedelta(hours=1)
    assert _retry_after("Wed, 21 Oct 2099 07:28:00 GMT") == timedelta(hours=1)
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == timedelta(0)
    for nonsense in (None, "", "soon", "-5", "1" * 100, "²"):
        assert _retry_after(nonsense) is None


def test_nothing_listens_or_nobody_knows_the_name(tmp_path: Path) -> None:
    """Both are said in words that tell where to look."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert deliver(f"http://127.0.0.1:{port}/", b"", {}).words == "refused: nothing listens there"
    assert deliver("https://no-such-host.invalid/", b"", {}).words == "its name is unknown"


def test_a_server_that_never_accepts_ends_in_time() -> None:
    """The deadline counts from the connection on, also for a handshake that never comes."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}/"
        began = time.monotonic()
        assert deliver(url, b"", {}, deadline=SOON).words == "no whole answer in time"
        assert time.monotonic() - began < SOON + 1.5


# --- trust --------------------------------------------------------------------------------


def test_https_by_the_authority_that_is_named(tmp_path: Path) -> None:
    """With its ca_file a receiver is trusted; without, or with another, nothing is sent."""
    mine, other = new_authority(tmp_path / "a"), new_authority(tmp_path / "b", name="other")
    body, headers = (
        ping().body,
        signing.headers(
            signing.read_keys(key_file(tmp_path)), id="0" * 5, seconds=int(time.time()), body=b"{}"
        ),
    )
    with receiving(tls=mine.issue("hook")) as receiver:
        trusted = sent_by_tls(receiver, tmp_path, mine.ca_file)
        assert trusted.delivered, trusted
        for ca_file in (None, other.ca_file):
            answer = deliver(receiver.url, body, headers, ca_file=ca_file)
            assert answer.words == "its certificate is not trusted"
        wrong = deliver(receiver.url, body, headers, ca_file=tmp_path / "none.pem")
        assert wrong.words == "its ca_file cannot be read"
    assert receiver.seen.total() == 1


def sent_by_tls(receiver: Receiver, folder: Path, ca_file: Path) -> Answer:
    """Send one message over TLS."""
    spec = Spec(
        name="x", url=receiver.url, key_file=key_file(folder), on=frozenset(), ca_file=ca_file
    )
    return send(spec, ping())


def test_no_proxy_of_the_environment_is_used(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the environment names is not asked: the message goes to the receiver itself."""
    with receiving() as proxy:
        for name in ("http_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        assert sent(receiver, tmp_path).delivered
        assert proxy.seen.total() == 0


def test_a_redirect_reaches_no_stranger(tmp_path: Path) -> None:
    """Twelve kinds of redirect, none followed: 0 requests at the place that they name (E5)."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        stranger.setblocking(False)
        place = f"http://127.0.0.1:{stranger.getsockname()[1]}/take"
        for status in (301, 302, 303, 307, 308, 300):
            for header in ("Location", "Refresh"):
                value = place if header == "Location" else f"0; url={place}"
                answer = f"HTTP/1.1 {status} Go\r\n{header}: {value}\r\nContent-Length: 0\r\n\r\n"
                assert answered_raw(answer.encode()).words == "redirect, not followed"
        with pytest.raises(BlockingIOError):
            stranger.accept()


def answered_raw(answer: bytes) -> Answer:
    """Deliver to a server that answers with these bytes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            line, _ = server.accept()
            with line:
                line.recv(65536)
                line.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        found = deliver(f"http://127.0.0.1:{server.getsockname()[1]}/x", b"{}", {})
        thread.join()
        return found


def test_an_answer_shows_no_address(receiver: Receiver, tmp_path: Path) -> None:
    """Where a webhook leads can be a secret of its own: a receiver's text is shown without it."""
    spec = Spec(
        name="x", url="https://hooks.example/T1/B2/token", key_file=tmp_path, on=frozenset()
    )
    answer = Answer(
        status=404, text="no hook at https://hooks.example/T1/B2/token, nor T1/B2/token"
    )
    shown = in_words(spec, "msg_1", answer)
    assert shown["text"] == "no hook at …, nor …"


# --- receivers ----------------------------------------------------------------------------


def test_the_receiver_of_the_howto_works(tmp_path: Path) -> None:
    """The lines that the page shows verify, and refuse a replay, an old message and another body."""
    code = re.search(r"```python\n(.*?)```", HOWTO.read_text(), re.DOTALL)
    assert code is not None
    found: dict[str, Any] = {}
    exec(code[1], found)
    keys = signing.read_keys(key_file(tmp_path))
    body, webhook, seen = ping().body, Webhook(KEY), set[str]()

    def take(id: str, *, age: int = 0, changed: bytes = b"") -> object:
        headers = signing.headers(keys, id=id, seconds=int(time.time()) - age, body=body)
        return found["take"](webhook, seen, body + changed, headers)

    assert take("msg_1") is True
    assert take("msg_1") is False
    with pytest.raises(Exception, match="too old"):
        take("msg_1", age=3600)
    with pytest.raises(Exception, match="signature"):
        take("msg_2", changed=b" ")
