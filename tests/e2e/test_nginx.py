"""Agents come through a real nginx, with the configuration that is shipped."""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from support.gateway import SMUGGLED, Gateway, hears_when_it_retires, nginx
from support.http_verifier import Served, basic, served
from support.over_unix import ask


@pytest.fixture
def behind(tmp_path: Path) -> Iterator[tuple[Gateway, Served]]:
    """Give nginx with a verifier at a Unix socket."""
    path = tmp_path / "v.sock"
    (tmp_path / "state").mkdir(mode=0o700)
    with (
        served(tmp_path / "state", ("a", "b"), path=path) as verifier,
        nginx(tmp_path / "nginx", verifier=path) as gateway,
    ):
        yield gateway, verifier


def test_the_application_learns_who_asks_and_no_secret(behind: tuple[Gateway, Served]) -> None:
    """A good secret gets through, and what arrives is the agent's id without the secret."""
    gateway, verifier = behind
    good = verifier.held[0]
    with closing(gateway.connection()) as connection:
        status, headers, _ = ask(
            connection, "/x?y=1", method="POST", body=b"payload",
            headers={"Authorization": good.basic, "Cookie": "c=1"},
        )  # fmt: skip
    assert (status, "keyturn-deadline" in headers) == (200, False)
    status, _, got = gateway.raw([f"Authorization: {good.basic}", "Cookie: c=1"])
    names = Counter(name.lower() for name, _ in got["headers"])
    assert dict(got["headers"])["Keyturn-Agent"] == "a"
    assert {name for name in names if name.startswith(("keyturn", "auth"))} == {"keyturn-agent"}
    assert names["cookie"] == 1
    assert good.secret.reveal() not in str(got)


def test_a_refusal_reaches_the_agent_with_its_challenge(behind: tuple[Gateway, Served]) -> None:
    """Wrong, none at all, two at once: 401 with WWW-Authenticate, and the application is not asked."""
    gateway, verifier = behind
    good, other = verifier.held
    wrong = [
        [f"Authorization: {basic('a', other.secret.reveal())}"],
        [],
        ["Authorization: Digest x"],
        [f"Authorization: {basic('a', 'x')}", "Keyturn-Agent: a"],
    ]
    for lines in wrong:
        status, headers, got = gateway.raw(lines)
        assert (status, got) == (401, None), lines
        assert headers["www-authenticate"].startswith('Basic realm="keyturn"')
    # Two headers: nginx refuses them itself, or shows the first; never what the second one says.
    for first, second in [(good.basic, basic("b", "x")), (basic("b", "x"), good.basic)]:
        status, _, got = gateway.raw([f"Authorization: {first}", f"Authorization: {second}"])
        if status == 200:
            assert first == good.basic
            assert dict(got["headers"])["Keyturn-Agent"] == "a"
        else:
            assert status in (400, 401)
    assert gateway.raw(["X: 1"])[0] == 401
    for path in ("/_keyturn", "/_keyturn?x", "//_keyturn", "/%5fkeyturn", "/@keyturn_unavailable"):
        with closing(gateway.connection()) as connection:
            assert ask(connection, path)[0] in (401, 404), path


def test_nobody_names_himself(behind: tuple[Gateway, Served]) -> None:
    """What a client says of itself does not arrive: no header, no twin with an underscore, no pair."""
    gateway, verifier = behind
    good = f"Authorization: {verifier.held[0].basic}"
    cases = [[good, line] for line in SMUGGLED]
    cases += [[line, good, line] for line in SMUGGLED]
    cases += [
        [*SMUGGLED[:6], good],
        [good, "Connection: Keyturn-Agent"],
        [good, "Connection: x, y"],
    ]
    cases += [[good, "X: 1", " Keyturn-Agent: mallory"]]  # a folded line
    assert len(cases) > 40
    seen = Counter[int]()
    for lines in cases:
        status, _, got = gateway.raw(lines)
        seen[status] += 1
        assert status in (200, 400), lines
        if got is not None:
            ours = [(n, v) for n, v in got["headers"] if n.lower().startswith("keyturn")]
            assert ours == [("Keyturn-Agent", "a")], lines
            assert "Authorization" not in dict(got["headers"])
    assert seen[200] > 40


def test_who_cannot_tell_is_no_refusal(behind: tuple[Gateway, Served]) -> None:
    """503 stays 503 for the agent, with Retry-After; the application's own 500 stays what it is."""
    gateway, verifier = behind
    lines = [f"Authorization: {verifier.held[0].basic}"]
    gateway.application.status = 500
    status, headers, got = gateway.raw(lines)
    assert (status, "retry-after" in headers, got is None) == (500, False, False)
    gateway.application.status = 200

    store = sqlite3.connect(gateway.folder.parent / "state" / "keyturn.db", isolation_level=None)
    store.execute("BEGIN EXCLUSIVE")
    status, headers, got = gateway.raw([f"Authorization: {verifier.held[1].basic}"])
    store.execute("ROLLBACK")
    store.close()
    assert (status, got) == (503, {"error": "temporarily_unavailable"})
    assert int(headers["retry-after"]) >= 1
    assert headers["cache-control"] == "no-store"
    assert gateway.raw(lines)[0] == 200

    verifier.server.stop()  # and nobody there at all
    until = time.monotonic() + 20
    while gateway.raw(lines)[0] != 503:
        assert time.monotonic() < until
    status, headers, _ = gateway.raw(lines)
    assert (status, headers["retry-after"]) == (503, "1")


def test_a_client_hears_when_its_secret_retires(behind: tuple[Gateway, Served]) -> None:
    """The deadline of a previous version reaches the client, whatever the application says of it."""
    gateway, verifier = behind
    hears_when_it_retires(gateway, verifier, verifier.held[0])


def test_one_connection_to_the_verifier_is_enough(behind: tuple[Gateway, Served]) -> None:
    """Connections are kept: requests one after the other do not each open their own."""
    gateway, verifier = behind
    with closing(gateway.connection()) as connection:
        for _ in range(50):
            assert (
                ask(connection, "/x", headers={"Authorization": verifier.held[0].basic})[0] == 200
            )
    assert len(verifier.server.registry) == 1
