"""What the verifier says over HTTP: statuses, headers and bytes, and who hears them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from keyturn.core.model import VersionState
from keyturn.errors import ConfigError, VerifierBusy
from keyturn.verifier.http.callers import Caller, Callers, RelyingParty
from keyturn.verifier.http.routes import unavailable
from support.cutter import administration, cut
from support.http_verifier import Held, Served, served
from support.stores import RealClock

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
TOKEN = {name: name * 16 for name in ("aa", "bb", "cc", "dd")}  # of 32 characters each


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Served]:
    """Give a service with two agents, which anybody may ask."""
    with served(tmp_path, ["a", "b"]) as found:
        yield found


def bearer(held: Held) -> dict[str, str]:
    """Return a header with the secret alone."""
    return {"Authorization": f"Bearer {held.secret.reveal()}"}


# --- statuses ---------------------------------------------------------------------------------


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")


def test_a_gateway_asks_with_any_method_body_suffix_and_query(service: Served) -> None:
    """Nginx auth_request and Envoy ext_authz: 200 without a body or 401, by the header alone."""
    held = service.held[0]
    paths = ("/v1/auth", "/v1/auth/some/path?client_secret=x&a=b", "/v1/auth?x")
    bodies = (None, b"client_id=a&client_secret=b", b"x" * 40_000)
    for number, method in enumerate(METHODS * 3):
        path, body = paths[number % 3], bodies[number // 9]
        good = {**FORM, "Authorization": held.basic}
        status, headers, said = service.ask(path, method=method, headers=good, body=body)
        assert (status, said, headers["content-length"]) == (200, b"", "0")
        assert headers["keyturn-agent"] == "a"
        status, headers, said = service.ask(path, method=method, headers=FORM, body=body)
        assert (status, said) == (401, b"")
        assert headers["www-authenticate"].startswith('Basic realm="keyturn"')


def test_a_body_that_nobody_reads_has_an_end(service: Served) -> None:
    """Up to 1 MiB is read over, as gateways send it; more is refused."""
    good = {"Authorization": service.held[0].basic}
    assert service.ask("/v1/auth", headers=good, body=b"x" * 1_000_000)[0] == 200
    status, _, said = service.ask("/v1/auth", headers=good, body=b"x" * 1_100_000)
    assert (status, b"above 1048576 bytes" in said) == (413, True)


def test_verify_answers_by_status_and_json(service: Served) -> None:
    """200 with everything about the version; 401 with a challenge; 400 for what is no question."""
    held = service.held[0]
    status, said = service.verify(held)
    assert status == 200
    assert said == {
        "accepted": True,
        "agent": "a",
        "login": "a",
        "version": held.version_id,
        "state": "current",
        "deadline": None,
    }
    assert service.verify(held, secret="x" * 30) == (
        401,
        {"accepted": False, "error": "invalid_client"},
    )
    for headers in ({"Authorization": held.basic}, bearer(held)):
        assert service.ask("/v1/verify", headers=headers)[0] == 200
    status, headers, _ = service.ask("/v1/verify", headers={"Authorization": "Basic bm8="})
    assert (status, headers["www-authenticate"].split()[0]) == (401, "Basic")
    assert service.ask("/v1/verify", headers={"Authorization": "Digest x"})[0] == 400
    assert service.ask("/v1/verify")[0] == 401


@pytest.mark.parametrize("path", ["/v1/verify", "/v1/introspect"])
def test_a_question_is_asked_by_post_alone(service: Served, path: str) -> None:
    """405 with Allow for anything else, HEAD and OPTIONS too."""
    for method in ("GET", "HEAD", "PUT", "OPTIONS"):
        status, headers, _ = service.ask(path, method=method)
        assert (status, headers["allow"]) == (405, "POST")


def test_introspection_is_what_rfc_7662_says(service: Served) -> None:
    """Active with sub and client_id; everything else is {"active": false} and nothing more."""
    held = service.held[0]
    body = f"token={held.secret.reveal()}&token_type_hint=access_token"
    status, _, said = service.ask("/v1/introspect", headers=FORM, body=body)
    content = json.loads(said)
    assert (status, content["active"], content["sub"]) == (200, True, "a")
    assert "exp" not in content
    for token in ("nobodys", "", "x" * 300, "kt_" + "0" * 63):
        status, _, said = service.ask("/v1/introspect", headers=FORM, body=f"token={token}")
        assert (status, json.loads(said)) == (200, {"active": False})
    assert service.ask("/v1/introspect", headers=FORM, body="x=y")[0] == 400


def test_grace_is_told_by_a_header_and_only_then(service: Served) -> None:
    """Keyturn-Deadline is there for a retiring secret, in each answer that can carry it."""
    held = service.held[0]
    _, headers, _ = service.ask("/v1/auth", headers={"Authorization": held.basic})
    assert "keyturn-deadline" not in headers
    assert headers["keyturn-state"] == "current"
    until = (RealClock().now() + timedelta(hours=2)).replace(microsecond=0)
    service.amend(held.agent, state=VersionState.PREVIOUS, deadline=until)
    for path in ("/v1/auth", "/v1/verify"):
        _, headers, said = service.ask(path, headers={"Authorization": held.basic})
        assert headers["keyturn-deadline"] == until.isoformat().replace("+00:00", "Z")
        assert headers["keyturn-state"] == "previous"
    assert json.loads(said)["deadline"] == headers["keyturn-deadline"]
    body = f"token={held.secret.reveal()}"
    content = json.loads(service.ask("/v1/introspect", headers=FORM, body=body)[2])
    assert content["exp"] == int(until.timestamp())


def test_nothing_is_ever_stored_by_anybody_in_between(service: Served) -> None:
    """no-store on a yes, a no, a bad request, an unknown path and a refusal of the reader."""
    held = service.held[0]
    for path, headers in [
        ("/v1/verify", {"Authorization": held.basic}),
        ("/v1/verify", {"Authorization": "Basic bm8="}),
        ("/v1/verify", {"Authorization": "Digest x"}),
        ("/v1/verify?x", {}),
        ("/v1/auth", {"Authorization": held.basic}),
        ("/v1/auth", {}),
        ("/v1/introspect", {}),
        ("/nope", {}),
        ("/v1/auth", {f"X-{n}": "x" for n in range(80)}),
        ("/v1/auth", {"X": "x" * 40_000}),
    ]:
        _, found, _ = service.ask(path, headers=headers)
        assert found["cache-control"] == "no-store", path
        assert found["pragma"] == "no-cache"


def test_head_is_answered_by_the_head_alone(service: Served) -> None:
    """The length is that of the page, and no byte of it comes."""
    status, headers, said = service.ask("/nope", method="HEAD")
    assert (status, said) == (404, b"")
    assert int(headers["content-length"]) > 0


@pytest.mark.parametrize(
    ("wait", "expected"),
    [(None, "1"), (0.0, "1"), (0.2, "1"), (1.0, "1"), (1.01, "2"), (33.5, "34")],
)
def test_whoever_cannot_be_told_now_is_told_when(wait: float | None, expected: str) -> None:
    """Retry-After in whole seconds, never too early and never 0."""
    answer = unavailable(None if wait is None else timedelta(seconds=wait))
    assert answer.status == 503
    assert f"Retry-After: {expected}\r\n".encode() in answer.head


def test_a_full_gate_is_503_and_no_refusal(
    service: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VerifierBusy comes as Retry-After on each route."""

    def busy(*_args: Any, **_more: Any) -> None:
        raise VerifierBusy(retry_after=timedelta(seconds=7))

    monkeypatch.setattr(service.verifier, "begin", busy)
    held = service.held[0]
    for path in ("/v1/auth", "/v1/verify"):
        status, headers, _ = service.ask(path, headers={"Authorization": held.basic})
        assert (status, headers["retry-after"]) == (503, "7")
    body = f"token={held.secret.reveal()}"
    assert service.ask("/v1/introspect", headers=FORM, body=body)[0] == 503


def test_a_spool_that_is_gone_is_503_for_who_is_remembered_too(
    service: Served, tmp_path: Path
) -> None:
    """Without its tombstones nobody can tell: neither yes, nor no, nor 500."""
    held = service.held[0]
    for _ in range(2):
        assert service.ask("/v1/auth", headers={"Authorization": held.basic})[0] == 200
    (tmp_path / "revoked.d").rename(tmp_path / "elsewhere")
    for headers in ({"Authorization": held.basic}, bearer(held)):
        assert service.ask("/v1/auth", headers=headers)[0] == 503
    (tmp_path / "elsewhere").rename(tmp_path / "revoked.d")
    assert service.ask("/v1/auth", headers={"Authorization": held.basic})[0] == 200


# --- relying parties --------------------------------------------------------------------------


def party(name: str, folder: Path, token: str, *agents: str, certificate: str = "") -> RelyingParty:
    """Return a relying party that shows a token from a file."""
    path = folder / f"{name}.token"
    path.write_text(token + "\n")
    path.chmod(0o600)
    caller = Caller(name=name, agents=frozenset(agents) if agents else None)
    return RelyingParty(caller=caller, token_file=path, certificate=certificate)


def caller_token(token: str) -> dict[str, str]:
    """Return the header by which a relying party shows itself."""
    return {"Keyturn-Caller-Token": token}


def test_a_stranger_learns_nothing(tmp_path: Path) -> None:
    """A good secret and a bad one are the same to it, and its answer is no refusal of the agent."""
    with served(tmp_path, parties=[party("p", tmp_path, TOKEN["aa"])]) as service:
        good = {"Authorization": service.held[0].basic}
        for more in ({}, caller_token(TOKEN["bb"]), caller_token("")):
            assert service.ask("/v1/verify", headers=good | more)[0] == 403
            assert service.ask("/v1/auth", headers=good | more)[0] == 503
            bad = {"Authorization": "Basic YTpi"} | more
            assert service.ask("/v1/verify", headers=bad)[0] == 403
            assert service.ask("/v1/introspect", headers=FORM | more, body="token=x")[0] == 401
        for path in ("/v1/auth", "/v1/verify"):
            assert service.ask(path, headers=good | caller_token(TOKEN["aa"]))[0] == 200
        as_bearer = FORM | {"Authorization": f"bearer {TOKEN['aa']}"}
        assert service.ask("/v1/introspect", headers=as_bearer, body="token=x")[0] == 200


def test_two_tokens_count_for_as_long_as_both_stand_in_the_file(tmp_path: Path) -> None:
    """A change of the token needs no moment in which neither is known."""
    one = party("p", tmp_path, f"{TOKEN['aa']}\n{TOKEN['bb']}")
    callers = Callers([one])
    assert one.token_file is not None
    known = [callers.by_token(TOKEN[name].encode()) for name in ("aa", "bb", "cc")]
    assert known == [one.caller, one.caller, None]
    one.token_file.write_text(f"{TOKEN['bb']}\n{TOKEN['cc']}\n")
    callers.refresh()
    known = [callers.by_token(TOKEN[name].encode()) for name in ("aa", "bb", "cc")]
    assert known == [None, one.caller, one.caller]


@pytest.mark.parametrize("broken", [b"short\n", b"", b"\xff" * 40, None])
def test_a_broken_token_file_leaves_the_last_good_tokens(
    tmp_path: Path, broken: bytes | None
) -> None:
    """At start it is an error that says what to type; later it is logged, and nobody is cut off."""
    one = party("p", tmp_path, TOKEN["aa"])
    callers = Callers([one])
    assert one.token_file is not None
    if broken is None:
        one.token_file.unlink()
    else:
        one.token_file.write_bytes(broken)
    callers.refresh()
    assert callers.by_token(TOKEN["aa"].encode()) == one.caller
    with pytest.raises(ConfigError):
        Callers([one])


def test_one_token_is_one_relying_partys(tmp_path: Path) -> None:
    """Else the one that is limited would pass for the other, or the other way round."""
    parties = [party("p", tmp_path, TOKEN["aa"]), party("q", tmp_path, TOKEN["aa"], "a")]
    with pytest.raises(ConfigError, match="another relying party"):
        Callers(parties)


def test_a_certificate_is_known_by_its_subject_alternative_names() -> None:
    """DNS and URI names as they stand; the subject, an address or half a name count for nothing."""
    one = RelyingParty(caller=Caller(name="p"), certificate="DNS:api.example")
    callers = Callers([one])
    for names, expected in [
        ((("DNS", "api.example"),), one.caller),
        ((("DNS", "other"), ("DNS", "api.example")), one.caller),
        ((("URI", "api.example"),), None),
        ((("DNS", "*.example"),), None),
        ((("DNS", "API.example"),), None),
        ((), None),
    ]:
        assert callers.by_certificate({"subjectAltName": names}) == expected
    assert callers.by_certificate({"subject": ((("commonName", "api.example"),),)}) is None
    assert callers.by_certificate({}) is None
    assert callers.by_certificate(None) is None


def test_a_limited_party_hears_the_very_bytes_of_unknown(tmp_path: Path) -> None:
    """About another agent, by each route and also when that one is remembered."""
    parties = [
        party("all", tmp_path, TOKEN["aa"]),
        party("limited", tmp_path, TOKEN["bb"], "b"),
    ]
    with served(tmp_path, ["a", "b"], parties=parties) as service:
        other, mine = service.held
        service.hashes.clear()

        def raw(secret: str, path: str, token: str) -> tuple[int, dict[str, str], bytes]:
            headers = caller_token(token) | (
                {} if "intro" in path else {"Authorization": f"Bearer {secret}"}
            )
            body = f"token={secret}" if "intro" in path else None
            status, found, said = service.ask(
                path, headers=headers | (FORM if body else {}), body=body
            )
            found.pop("date")
            return status, found, said

        for path in ("/v1/auth", "/v1/verify", "/v1/introspect"):
            unknown = raw("nobodys" * 4, path, TOKEN["bb"])
            before = len(service.hashes)
            assert raw(other.secret.reveal(), path, TOKEN["bb"]) == unknown
            assert len(service.hashes) == before  # nor does the time of a hash tell it
            assert raw(other.secret.reveal(), path, TOKEN["aa"]) != unknown
            assert raw(other.secret.reveal(), path, TOKEN["bb"]) == unknown
            assert raw(mine.secret.reveal(), path, TOKEN["bb"]) != unknown


# --- every no is one no -----------------------------------------------------------------------


def test_each_no_has_the_same_bytes(service: Served, tmp_path: Path) -> None:
    """Unknown, wrong, expired, revoked, suspended, somebody else's: one answer, header by header."""
    a, b = service.held
    verbs = administration(tmp_path, service.store)
    seen: list[tuple[int, dict[str, str], bytes]] = []

    def note(headers: dict[str, str]) -> None:
        for path in ("/v1/auth", "/v1/verify"):
            status, found, said = service.ask(path, headers=headers)
            del found["date"]
            seen.append((status, found, said))

    cut(verbs, "suspend", "a")
    note({"Authorization": a.basic})
    cut(verbs, "resume", "a")
    note({"Authorization": replace(a, login="b").basic})
    note({"Authorization": replace(a, login="nobody").basic})
    note({"Authorization": "Bearer " + "x" * 40})
    note({"Authorization": "Basic bm8="})
    note({"Authorization": f"Bearer {a.secret.reveal()[:-1]}x"})
    service.amend(b.agent, state=VersionState.PREVIOUS, deadline=RealClock().now() - timedelta(1))
    note({"Authorization": b.basic})
    cut(verbs, "revoke", a.version_id)
    note({"Authorization": a.basic})
    assert len({json.dumps([one[0], one[1], one[2].decode()]) for one in seen}) == 2
    assert {one[0] for one in seen} == {401}
