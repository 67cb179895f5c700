"""Agents come through a real Envoy, with the configuration that is shipped."""

from __future__ import annotations

import json
import re
import socket
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from keyturn.verifier.http.callers import Caller, RelyingParty
from support.cutter import administration, cut
from support.gateway import (
    ENVOY,
    ENVOY_SHIPPED,
    SMUGGLED,
    Application,
    Gateway,
    envoy,
    hears_when_it_retires,
)
from support.http_verifier import Served, basic, serve, served
from support.over_h2 import ask_h2
from support.over_unix import ask
from support.raw_client import statuses


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, Served]]:
    """Give Envoy with a verifier at a Unix socket, which go on until the last test."""
    folder = tmp_path_factory.mktemp("e")
    (folder / "state").mkdir(mode=0o700)
    names = ("a", "b", "leaked", "old")
    with (
        served(folder / "state", names, path=folder / "v.sock") as verifier,
        envoy(folder / "envoy", verifier=folder / "v.sock") as gateway,
    ):
        yield gateway, verifier


@pytest.fixture
def behind(both: tuple[Gateway, Served]) -> tuple[Gateway, Served]:
    """Give Envoy and its verifier, with an application that nobody has asked yet."""
    application = both[0].application
    application.status, application.headers, application.asked = 200, {}, 0
    return both


def validated(file: Path) -> subprocess.CompletedProcess[str]:
    """Let Envoy read a configuration without running it."""
    command = [ENVOY, "--mode", "validate", "-l", "critical", "-c", str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_envoy_knows_every_key(tmp_path: Path) -> None:
    """The file as it is shipped passes `--mode validate`, and a slip of the pen would not."""
    assert validated(ENVOY_SHIPPED).returncode == 0
    slip = tmp_path / "slip.yaml"
    slip.write_text(ENVOY_SHIPPED.read_text().replace("failure_mode_allow:", "failure_mode_alow:"))
    found = validated(slip)
    assert (found.returncode, "failure_mode_alow" in found.stderr) == (1, True)


def test_the_application_learns_who_asks_and_no_secret(behind: tuple[Gateway, Served]) -> None:
    """A good secret gets through, whole requests too, and what arrives is the agent's id without it."""
    gateway, verifier = behind
    good = verifier.held[0]
    body = b"payload" * 100_000  # more than Envoy holds back while it asks
    for scheme in (good.basic, f"Bearer {good.secret.reveal()}"):
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            with closing(gateway.connection()) as connection:
                status, headers, content = ask(
                    connection, "/x?y=1", method=method, body=None if method == "GET" else body,
                    headers={"Authorization": scheme, "Cookie": "c=1"},
                )  # fmt: skip
            assert (status, "keyturn-deadline" in headers) == (200, False)
            got = json.loads(content)
            assert (got["path"], got["body"]) == (
                "/x?y=1",
                "" if method == "GET" else body.decode(),
            )
            names = Counter(name.lower() for name, _ in got["headers"])
            assert dict(got["headers"])["keyturn-agent"] == "a"
            ours = {name for name in names if name.startswith(("keyturn", "auth"))}
            assert ours == {"keyturn-agent"}
            assert names["cookie"] == 1
            assert good.secret.reveal() not in content.decode()
            # Or else Envoy ends every answer after 15 s, a stream as well.
            assert "x-envoy-expected-rq-timeout-ms" not in names


def test_a_refusal_reaches_the_agent_with_its_challenge(behind: tuple[Gateway, Served]) -> None:
    """Wrong, none at all, two at once: 401 with WWW-Authenticate, and the application is not asked."""
    gateway, verifier = behind
    good, other = verifier.held[:2]
    for lines in (
        [f"Authorization: {basic('a', other.secret.reveal())}"],
        [],
        ["Authorization: Digest x"],
        [f"Authorization: {basic('a', 'x')}", "Keyturn-Agent: a"],
        [f"Authorization: {good.basic}", f"Authorization: {basic('b', 'x')}"],
        [f"Authorization: {basic('b', 'x')}", f"Authorization: {good.basic}"],
        [f"Authorization: {good.basic}", f"Authorization: {good.basic}"],
        [f"Authorization: {good.basic}", "Connection: Authorization"],
        [f"Proxy-Authorization: {good.basic}"],
        ["Content-Length: 7", "Expect: 100-continue"],
    ):
        status, headers, got = gateway.raw(lines)
        assert (status, got, headers["cache-control"]) == (401, None, "no-store"), lines
        assert headers["www-authenticate"].startswith('Basic realm="keyturn"')
        theirs = {"cache-control", "www-authenticate", "content-length"}  # and what Envoy says
        assert set(headers) - {"date", "server", "connection"} == theirs
    with closing(gateway.connection()) as connection:
        connection.putrequest("POST", "/x")
        connection.putheader("Content-Length", "1000000")
        connection.endheaders()
        answer = connection.getresponse()  # before a byte of the body
        assert (answer.status, answer.headers["WWW-Authenticate"][:5]) == (401, "Basic")
    assert gateway.application.asked == 0


def test_a_connection_proves_nothing(behind: tuple[Gateway, Served]) -> None:
    """Each request on a connection is asked about, whoever the one before it was."""
    gateway, verifier = behind
    with closing(gateway.connection()) as connection:
        for _ in range(25):
            good = {"Authorization": verifier.held[0].basic}
            assert ask(connection, "/x", headers=good)[0] == 200
            assert ask(connection, "/x", method="POST", body=b"x")[0] == 401
    assert gateway.application.asked == 25


def test_nobody_names_himself(behind: tuple[Gateway, Served]) -> None:
    """What a client says of itself does not arrive: no header, no twin with another sign, no pair."""
    gateway, verifier = behind
    good = f"Authorization: {verifier.held[0].basic}"
    cases = [[good, line] for line in SMUGGLED]
    cases += [[line, good, line] for line in SMUGGLED]
    cases += [
        [
            *(line for line in SMUGGLED if ":" in line and "_" not in line and " :" not in line),
            good,
        ],
        [good, "Connection: Keyturn-Agent"],
        [good, "Connection: x, y"],
        *(
            [good, f"X: 1{sign}Keyturn-Agent: mallory"]
            for sign in ("\r", "\n", "\r\n ", "\0", "\x85")
        ),
    ]
    assert len(cases) > 40
    seen = Counter[int]()
    for lines in cases:
        status, _, got = gateway.raw(lines)
        seen[status] += 1
        underscore = any("_" in line.partition(":")[0] for line in lines)
        assert status in ((400,) if underscore else (200, 400)), lines
        if got is not None:
            ours = [(n, v) for n, v in got["headers"] if n.lower().startswith("keyturn")]
            assert ours == [("keyturn-agent", "a")], lines
            assert "authorization" not in dict(got["headers"])
    assert seen[200] > 40
    assert seen[400] > 20


ODD = [
    *(
        f"GET {path} HTTP/1.1\r\nHost: app\r\n@"
        for path in (
            "/../x", "/public/../x", "/%2e%2e/x", "/a/..;/x", "/x//y", "/x\\y", "/a%2fb", "/a%2F..%2fx", "/%5c",
            "/%00", "/x#y", "*", "x", "http://other/x", "http://a:b@app/x", "/v1/verify", "/healthz",
            "/\xff", "/" + "x" * 50_000, "/x?" + "y" * 50_000,
        )
    ),
    *(
        f"{method} /x HTTP/1.1\r\nHost: app\r\n@"
        for method in ("HEAD", "TRACE", "PROPFIND", "BREW", "get", "")
    ),
    "GET /x HTTP/1.0\r\nHost: app\r\n@",
    "GET /x HTTP/1.1\r\n@",
    "GET /x HTTP/1.1\r\nHost: app\r\nHost: other\r\n@",
    'GET /x HTTP/1.1\r\nHost: a b/"\r\n@',
    "CONNECT app:80 HTTP/1.1\r\nHost: app:80\r\n@",
    "GET /x HTTP/1.1\r\nHost: app\r\nConnection: upgrade\r\nUpgrade: websocket\r\n@",
    "GET /x HTTP/1.1\r\nHost: app\r\nConnection: upgrade, http2-settings\r\nUpgrade: h2c\r\n"
    "HTTP2-Settings: AAMAAABkAAQAAP__\r\n@",
    "GET /x HTTP/1.1\r\nHost: app\r\nX-Envoy-Original-Path: /healthz\r\nX-Envoy-Internal: true\r\n@",
    "POST /x HTTP/1.1\r\nHost: app\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n@",
    "POST /x HTTP/1.1\r\nHost: app\r\nTransfer-Encoding: xchunked\r\n@",
    "POST /x HTTP/1.1\r\nHost: app\r\nContent-Length: 0\r\nContent-Length: 34\r\n@",
    "POST /x HTTP/1.1\r\nHost: app\r\nTransfer-Encoding: chunked\r\n@0\r\n@",
]  # fmt: skip
# The last request on its connection: an answer to it, or an error before it, closes.
HIDDEN = "GET /hidden HTTP/1.1\r\nHost: app\r\nConnection: close\r\n\r\n"
_CLOSES = re.compile(rb"\r\nconnection: close(?=\r\n)(?s:.*?)\r\n\r\n")


def answers(gateway: Gateway, data: str) -> list[int]:
    """Send bytes that end with HIDDEN, and return the statuses of all answers."""
    got = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        one.settimeout(20)
        one.connect(str(gateway.path))
        one.sendall(data.encode("latin-1"))
        while not _CLOSES.search(got) and (piece := one.recv(65536)):
            got += piece
    return statuses(got)


def test_no_odd_request_gets_through_unasked(behind: tuple[Gateway, Served]) -> None:
    """Paths, methods, lengths and upgrades that parts read differently: nothing arrives without a secret."""
    gateway, _ = behind
    seen = Counter[int]()
    for request in ODD:
        found = answers(gateway, request.replace("@", "\r\n") + HIDDEN)
        assert gateway.application.asked == 0, (request, found)
        assert found, request
        assert min(found) >= 400, (request, found)
        seen.update(found)
    assert seen[400] > 10
    assert seen[401] > 20


def test_a_good_secret_covers_its_own_request_alone(behind: tuple[Gateway, Served]) -> None:
    """A request behind one with a good secret is asked about by itself, however the first one ends."""
    gateway, verifier = behind
    good = f"Authorization: {verifier.held[0].basic}\r\n\r\n"
    paths = set()
    for request in ODD:
        gateway.application.asked, gateway.application.got = 0, {}
        found = answers(gateway, request.replace("@", good, 1).replace("@", "\r\n") + HIDDEN)
        assert gateway.application.asked <= 1, (request, found)
        paths.add(gateway.application.got.get("path", "")[:12])
    assert "/hidden" not in paths
    assert {"/x", "/x/y", "/v1/verify"} <= paths  # what is sound arrives, mended
    assert not any(
        "%2" in path or "//" in path or "\\" in path or ".." in path.split("/") for path in paths
    )


def h2_fields(
    *more: tuple[str, str], method: str = "GET", path: str = "/x"
) -> list[tuple[str, str]]:
    """Return the fields of a request."""
    pseudo = [(":method", method), (":path", path), (":scheme", "http"), (":authority", "app")]
    return [*pseudo, *more]


def test_http_2_is_asked_about_as_well(behind: tuple[Gateway, Served]) -> None:
    """Envoy speaks HTTP/2 where a client begins with it: the same answers, and nothing arrives unasked."""
    gateway, verifier = behind
    good, said = ("authorization", verifier.held[0].basic), ("keyturn-agent", "mallory")
    for fields in (
        h2_fields(),
        h2_fields(("authorization", basic("a", "x")), said),
        h2_fields(good, good),
        h2_fields(good, ("authorization", basic("b", "x"))),
        h2_fields(("cookie", good[1])),
        h2_fields(path="/../x"),
    ):
        status, headers, _ = ask_h2(gateway.path, fields)
        assert (status, headers["cache-control"]) == (401, "no-store"), fields
        assert headers["www-authenticate"].startswith('Basic realm="keyturn"')
    assert ask_h2(gateway.path, h2_fields(), body=b"x", trailers=[good])[0] == 401
    broken = (
        h2_fields(path="x"),
        h2_fields(path="/a%2fb"),
        h2_fields(path=""),
        h2_fields(method="CONNECT"),
        h2_fields((":protocol", "websocket"), method="CONNECT"),
        h2_fields(("Authorization", good[1])),
        h2_fields(("x", "1\r\nauthorization: x")),
        h2_fields(("content-length", "1"), ("content-length", "2")),
        h2_fields(("transfer-encoding", "chunked")),
        [*h2_fields(), (":path", "/y")],
    )
    with ThreadPoolExecutor(len(broken)) as pool:  # Envoy takes a second to hang up
        found = list(pool.map(lambda fields: ask_h2(gateway.path, fields)[0], broken))
    assert all(status == 0 or status >= 400 for status in found), found
    assert gateway.application.asked == 0

    for more in (
        [said],
        [("keyturn-login", "x"), said, said],
        [("keyturn.agent", "mallory"), ("keyturn~agent", "mallory")],
        [("te", "trailers")],
    ):
        fields = h2_fields(*more, good, method="POST", path="/x?y")
        status, _, content = ask_h2(gateway.path, [*fields, ("content-length", "2")], body=b"ab")
        got = json.loads(content)
        assert (status, got["path"], got["body"]) == (200, "/x?y", "ab")
        ours = [one for one in got["headers"] if one[0].startswith(("keyturn", "auth"))]
        assert ours == [["keyturn-agent", "a"]], more
        status, _, content = ask_h2(gateway.path, fields, body=b"ab", trailers=[said])
        assert (status, b"mallory" in content) == (200, False), content
    gateway.application.asked = 0
    twin = ("keyturn_agent", "mallory")
    assert ask_h2(gateway.path, h2_fields(good, twin))[0] == 0
    assert gateway.application.asked == 0


def test_a_revoke_counts_with_the_next_request(behind: tuple[Gateway, Served]) -> None:
    """Once `revoke` has returned that secret is refused, on a connection that is open as well."""
    gateway, verifier = behind
    _, _, leaked, _ = verifier.held
    verbs = administration(gateway.folder.parent / "state", verifier.store)
    headers = {"Authorization": leaked.basic}
    with closing(gateway.connection()) as connection:
        for _ in range(10):
            assert ask(connection, "/x", headers=headers)[0] == 200
        cut(verbs, "revoke", leaked.version_id)
        for _ in range(10):
            assert ask(connection, "/x", headers=headers)[0] == 401
    assert gateway.application.asked == 10
    assert gateway.raw([f"Authorization: {verifier.held[0].basic}"])[0] == 200


def test_a_client_hears_when_its_secret_retires(behind: tuple[Gateway, Served]) -> None:
    """The deadline of a previous version reaches the client, whatever the application says of it."""
    gateway, verifier = behind
    got = hears_when_it_retires(gateway, verifier, verifier.held[3])
    assert "keyturn-deadline" not in dict(got["headers"])


UNAVAILABLE = (503, {"error": "temporarily_unavailable"}, "1", "no-store")


def told(gateway: Gateway, authorization: str) -> tuple[object, ...]:
    """Return what an agent hears where nobody can tell."""
    status, headers, got = gateway.raw([f"Authorization: {authorization}"])
    return status, got, headers.get("retry-after"), headers.get("cache-control")


def test_who_cannot_tell_is_no_refusal(tmp_path: Path) -> None:
    """503 with Retry-After while the verifier cannot tell or is down, and nobody gets through; then it goes on."""
    place, state = tmp_path / "v.sock", tmp_path / "state"
    state.mkdir(mode=0o700)
    with (
        served(state, ("a", "b"), path=place) as verifier,
        envoy(tmp_path / "envoy", verifier=place) as gateway,
    ):
        good, other = (one.basic for one in verifier.held)
        for status in (500, 503):  # the application's own stays what it is
            gateway.application.status = status
            found, headers, got = gateway.raw([f"Authorization: {good}"])
            assert (found, "retry-after" in headers, got is None) == (status, False, False)
        gateway.application.status = 200

        store = sqlite3.connect(state / "keyturn.db", isolation_level=None)
        store.execute("BEGIN EXCLUSIVE")
        assert told(gateway, other) == UNAVAILABLE
        store.execute("ROLLBACK")
        store.close()
        assert told(gateway, other)[0] == 200

        verifier.server.stop()  # and nobody there at all
        until = time.monotonic() + 20
        while told(gateway, good)[0] != 503:
            assert time.monotonic() < until
        asked = gateway.application.asked
        for shown in (good, other, basic("a", "x"), "x"):
            assert told(gateway, shown) == UNAVAILABLE
        assert gateway.raw([])[0] == 503
        assert gateway.application.asked == asked

        with serve(verifier.verifier, path=place):
            assert told(gateway, good)[0] == 200
            assert told(gateway, basic("a", "x"))[0] == 401


def test_what_the_verifier_is_sent_and_what_counts_as_a_yes(tmp_path: Path) -> None:
    """One header goes there, no path, cookie or body; nobody gets through by any answer but 200."""
    place = tmp_path / "v.sock"
    verifier = Application(place)
    verifier.headers = {"Keyturn-Agent": "a", "Keyturn-Login": "l", "Keyturn-State": "current"}
    try:
        with envoy(tmp_path / "envoy", verifier=place) as gateway:
            with closing(gateway.connection()) as connection:
                status, _, _ = ask(
                    connection, "/x?client_secret=1", method="POST", body=b"payload",
                    headers={
                        "Authorization": "Bearer x", "Cookie": "c=1", "Keyturn-Caller-Token": "t" * 40,
                        "Content-Type": "text/plain", "X-Forwarded-For": "192.0.2.1",
                    },
                )  # fmt: skip
            assert (status, verifier.asked, gateway.application.asked) == (200, 1, 1)
            assert (verifier.got["path"], verifier.got["body"]) == ("/v1/auth", "")
            sent = {name.lower(): value for name, value in verifier.got["headers"]}
            assert sent.pop("authorization") == "Bearer x"
            theirs = {
                "host",
                "content-length",
                "x-envoy-expected-rq-timeout-ms",
                "x-envoy-internal",
            }
            assert set(sent) <= theirs, sent
            for verifier.status in (201, 302, 400, 403, 404, 429, 500, 503):
                status, headers, _ = gateway.raw(["Authorization: Bearer x"])
                assert status == (503 if verifier.status >= 500 else verifier.status)
                assert not any(name.startswith("keyturn") for name in headers)
            assert (verifier.asked, gateway.application.asked) == (9, 1)
    finally:
        verifier.close()


def test_envoy_shows_the_callers_token_and_no_client_does(tmp_path: Path) -> None:
    """With relying parties the lines that are commented out make Envoy one; without them all hear 503."""
    place, token = tmp_path / "v.sock", "t" * 40
    (tmp_path / "token").write_text(token)
    (tmp_path / "token").chmod(0o600)
    (tmp_path / "state").mkdir(mode=0o700)
    party = RelyingParty(caller=Caller(name="envoy"), token_file=tmp_path / "token")
    named = {
        "#authorization_request:": "authorization_request:",
        "#  headers_to_add:": "  headers_to_add:",
        'value: "…"': f'value: "{token}"',
    }
    with served(tmp_path / "state", ("a",), path=place, parties=[party]) as verifier:
        good = f"Authorization: {verifier.held[0].basic}"
        for folder, more, expected in (("e", None, [503, 503]), ("f", named, [200, 401])):
            with envoy(tmp_path / folder, verifier=place, more=more) as gateway:
                shown = [[good, f"Keyturn-Caller-Token: {token}"], ["Keyturn-Caller-Token: x"]]
                assert [gateway.raw(lines)[0] for lines in shown] == expected


def test_a_verifier_that_never_answers_lets_nobody_through(tmp_path: Path) -> None:
    """A hung verifier is one that cannot tell, once the time of the file is over."""
    place = tmp_path / "v.sock"
    shorter = {"cluster: keyturn_verifier, timeout: 5s": "cluster: keyturn_verifier, timeout: 0.2s"}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as hung:
        hung.bind(str(place))
        hung.listen(8)
        with envoy(tmp_path / "envoy", verifier=place, more=shorter) as gateway:
            assert told(gateway, "Bearer x") == UNAVAILABLE
            assert gateway.application.asked == 0
