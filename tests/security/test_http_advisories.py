"""What broke elsewhere, tried over HTTP: what is remembered, what was revoked, and answers that are two."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from keyturn.core.model import VersionState
from keyturn.core.secret import mint
from keyturn.errors import StoreUnavailable
from keyturn.storage.store import Store
from keyturn.verifier.http.routes import route_of
from support.cutter import administration, cut
from support.http_verifier import Served, basic, served
from support.raw_client import exchange, statuses
from support.stores import RealClock, entry

FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Served]:
    """Give a service with two agents."""
    with served(tmp_path, ["a", "b"]) as found:
        yield found


def auth(service: Served, login: str, secret: str, path: str = "/v1/auth") -> int:
    """Ask, and return the status."""
    return service.ask(path, headers={"Authorization": basic(login, secret)})[0]


def amend(service: Served, name: str, **changes: Any) -> None:
    """Change the version of an agent in the store."""

    def change(case: Any) -> Any:
        return replace(case, versions=(replace(case.versions[0], **changes),)), [entry()]

    service.store.amend(f"cred-{name}", change)


def test_cve_2021_32701_what_is_remembered_covers_every_input(service: Served) -> None:
    """Oathkeeper's cache left the scope out: here login, secret, way and route all count."""
    a, b = (one.secret.reveal() for one in service.held)
    for _ in range(3):
        for path in ("/v1/auth", "/v1/verify", "/v1/auth/x?y=z"):
            query_is_no_question = path == "/v1/verify"
            assert auth(service, "a", a, path) == 200
            assert auth(service, "b", b, path) == 200
            for login, secret in (("b", a), ("a", b), ("", a), ("A", a), ("a ", a), ("a", a + " ")):
                assert auth(service, login, secret, path) == 401
            assert auth(service, "a", a, "/v1/verify?x") == 400 or not query_is_no_question
        # Login and secret never run into each other.
        for cut_at in range(1, len(a), 9):
            assert auth(service, "a" + a[:cut_at], a[cut_at:]) == 401


def test_cve_2026_46554_nothing_remembered_outlives_a_cut(service: Served, tmp_path: Path) -> None:
    """NocoDB's token was valid for days, CVE-2026-3583 likewise: suspend, resume, retire, revoke."""
    verbs = administration(tmp_path, service.store)
    held = service.held[0]
    shown = held.login, held.secret.reveal()
    body = f"token={held.secret.reveal()}"
    for _ in range(6):
        assert auth(service, *shown) == 200
        cut(verbs, "suspend", "a")
        assert auth(service, *shown) == 401
        said = json.loads(service.ask("/v1/introspect", headers=FORM, body=body)[2])
        assert said == {"active": False}
        cut(verbs, "resume", "a")
    assert auth(service, *shown) == 200
    cut(verbs, "revoke", held.version_id)
    for path in ("/v1/auth", "/v1/verify", "/v1/auth/x"):
        assert auth(service, *shown, path) == 401
    cut(verbs, "resume", "a")
    assert auth(service, *shown) == 401  # resume revives nothing


@pytest.mark.parametrize(
    ("deadline", "expected"),
    [
        (timedelta(0), 401),
        (timedelta(microseconds=-1), 401),
        (timedelta(days=-40_000 // 10), 401),
        (timedelta(hours=1), 200),
        (timedelta(days=100_000), 200),
        (None, 200),
    ],
)
def test_cve_2021_32923_no_deadline_becomes_for_ever(
    service: Served, deadline: timedelta | None, expected: int
) -> None:
    """CVE-2020-25816: zero and below are over, and a remembered yes ends when its deadline comes."""
    held = service.held[0]
    assert auth(service, "a", held.secret.reveal()) == 200
    ends = None if deadline is None else RealClock().now() + deadline
    amend(service, "a", state=VersionState.PREVIOUS, deadline=ends)
    for _ in range(2):
        assert auth(service, "a", held.secret.reveal()) == expected


def test_cve_2020_25816_a_yes_that_is_remembered_ends_by_itself(service: Served) -> None:
    """Nobody writes anything at the deadline: the next question is a no all the same."""
    held = service.held[0]
    amend(
        service,
        "a",
        state=VersionState.PREVIOUS,
        deadline=RealClock().now() + timedelta(seconds=1.5),
    )
    seen = []
    until = datetime.now(UTC) + timedelta(seconds=20)
    while not seen or seen[-1] == 200:
        seen.append(auth(service, "a", held.secret.reveal()))
        assert datetime.now(UTC) < until
    assert seen[-1] == 401
    assert set(seen[:-1]) <= {200}


def test_cve_2020_15223_a_revoke_that_met_errors_is_no_quiet_success(
    service: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CVE-2026-39946, CVE-2022-41316: it says that it is incomplete, and refuses at once."""
    verbs = administration(tmp_path, service.store, patience=0.0)
    held = service.held[0]
    assert auth(service, "a", held.secret.reveal()) == 200

    def locked(*_args: Any, **_more: Any) -> Any:
        raise StoreUnavailable("locked")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "amend", locked)
        patch.setattr(Store, "load", locked, raising=False)
        try:
            result = cut(verbs, "revoke", held.version_id)
        except StoreUnavailable:
            result = {"incomplete": True}
    if result.get("incomplete"):
        assert (tmp_path / "revoked.d" / held.version_id).exists()
    assert auth(service, "a", held.secret.reveal()) == 401


def test_cve_2026_48710_no_host_or_target_is_another_route(service: Served) -> None:
    """CVE-2025-54576, CVE-2026-3605: 10,000 odd targets reach one of three routes, or none."""
    draw = random.Random(1)
    pieces = [
        "/",
        "//",
        "..",
        ".",
        "%2e",
        "%2f",
        ";",
        "?",
        "#",
        "v1",
        "verify",
        "auth",
        "x",
        "\\",
        "@",
        ":",
    ]
    for _ in range(10_000):
        target = "".join(draw.choices(pieces, k=draw.randrange(1, 9))).encode()
        found = route_of(target)
        assert (found is None) == (
            target not in (b"/v1/verify", b"/v1/auth", b"/v1/introspect")
            and not target.startswith(b"/v1/auth/")
        )
    for host in ("x/v1/auth?", "x@y", "/v1/auth", "x#", "\u00e9", "127.0.0.1:1/v1/auth"):
        data = f"GET /v1/nope HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
        assert set(statuses(exchange(service.port, data))) <= {404, 400}


def test_cve_2026_46405_an_answer_is_never_yes_and_no(service: Served) -> None:
    """Status, body and headers say the same, for good secrets, bad ones and broken requests."""
    draw = random.Random(2)
    held = service.held[0]
    for number in range(200):
        secret = (
            held.secret.reveal()
            if number % 3 == 0
            else mint(random_bytes=draw.randbytes)[1].reveal()
        )
        text = secret[: draw.choice([len(secret), 20])] + draw.choice(["", "", " "])
        status, headers, body = service.ask(
            "/v1/verify",
            headers={"Content-Type": "application/json"},
            body=json.dumps({"secret": text}),
        )
        said = json.loads(body)
        good = text == held.secret.reveal()
        assert (status == 200) is good
        assert said.get("accepted", False) is good
        assert ("error" in said) is not good
        assert ("keyturn-agent" in headers) is good
        assert ("www-authenticate" in headers) is (status == 401)
