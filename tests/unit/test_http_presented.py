"""How a secret is shown over HTTP: exactly as the RFCs say it, once, and nothing in between."""

from __future__ import annotations

import base64
import json

import pytest

from keyturn.verifier.http.messages import Request
from keyturn.verifier.http.presented import NOBODYS, Malformed, Presented
from keyturn.verifier.http.routes import AUTH, INTROSPECT, VERIFY, route_of

FORM, JSON = "application/x-www-form-urlencoded", "application/json"
S = "s" * 20


def request(
    *authorization: bytes | str, body: bytes | str = b"", kind: str = "", query: bool = False
) -> Request:
    """Return a request as a connection hands it over."""
    one = Request()
    one.method, one.path, one.query = b"POST", b"/v1/verify", query
    one.authorization = [a.encode() if isinstance(a, str) else a for a in authorization]
    one.headers = [(b"content-type", kind.encode())] if kind else []
    one.body = body.encode() if isinstance(body, str) else body
    return one


def b64(text: bytes | str) -> str:
    """Return a header Basic of these bytes."""
    raw = text.encode() if isinstance(text, str) else text
    return "Basic " + base64.b64encode(raw).decode()


def ways(one: Request) -> list[tuple[bytes, bytes]]:
    """Return what may have been meant."""
    found = VERIFY.read(one)
    assert isinstance(found, Presented), found
    return [] if found is NOBODYS else found.ways()


def status(one: Request) -> int:
    """Return the status of what cannot be answered."""
    found = VERIFY.read(one)
    assert not isinstance(found, Presented), found
    return found.status


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (f"a:{S}", [("a", S)]),
        ("a:b:c", [("a", "b:c")]),  # at the first colon (RFC 7617, 2)
        ("a%3Ab:c", [("a:b", "c"), ("a%3Ab", "c")]),  # both halves are decoded (RFC 6749, app. B)
        ("a+b:c+d", [("a b", "c d"), ("a+b", "c+d")]),  # or neither of them was encoded
        ("a:p%2Bw", [("a", "p+w"), ("a", "p%2Bw")]),
        ("a:100%", [("a", "100%")]),  # half an escape is none
        ("50%:c", [("50%", "c")]),
        ("a%ffb:c", [("a%ffb", "c")]),  # decoded it is no login; as it stands it is one
        ("a:c%ff", [("a", "c%ff")]),  # decoded it is no text
        ("a:c%00", [("a", "c\0"), ("a", "c%00")]),
        ("a:" + "%41" * 100, [("a", "A" * 100)]),  # as it stands it is too long
        ("a:é", [("a", "é")]),
        ("a" * 128 + ":c", [("a" * 128, "c")]),
        ("a:" + "s" * 256, [("a", "s" * 256)]),
    ],
)
def test_basic_is_read_as_clients_write_it(raw: str, expected: list[tuple[str, str]]) -> None:
    """Encoded or as it is: whatever can have been meant is tried, the standard's way first."""
    assert ways(request(b64(raw))) == [(a.encode(), b.encode()) for a, b in expected]


@pytest.mark.parametrize(
    "header",
    [
        "Basic",
        "Basic ",
        "Basic !!!!",
        "Basic YTp",
        "Basic YTpi\nYTpi",
        "Basic YTpi YTpi",
        "Basic YTpiY",
        b64("nocolon"),
        b64(":secret"),  # an empty login is nobody's, and asks for nobody
        b64("%:"),
        b64("a:"),
        b64("a:" + "s" * 257),
        b64("a" * 129 + ":c"),
        b64(b"\xff:c"),
        b64(b"a:\xff\xfe"),
        b64(b"a\0:c"),
        b64(b"a\n:c"),
        b64(b"a%00:\xff"),
        b64(b"a:\xed\xa0\x80"),  # a lone surrogate
        "Bearer ",
        "Bearer " + "s" * 257,
        b"Bearer \xff",
        b"Bearer \xed\xa0\x80",
    ],
)
def test_what_can_be_nobodys_is_answered_like_a_wrong_secret(header: str | bytes) -> None:
    """It costs no look-up, no hash and no 400: a client cannot tell it from a wrong secret."""
    assert ways(request(header)) == []
    assert AUTH.read(request(header)) is NOBODYS


def test_the_scheme_has_any_case() -> None:
    """RFC 9110, 11.1."""
    for scheme in ("basic", "BASIC", "bAsIc"):
        assert ways(request(scheme + b64("a:b")[5:])) == [(b"a", b"b")]
    assert ways(request("bearer   kt  ")) == [(b"", b"kt")]


@pytest.mark.parametrize(
    "one",
    [
        request(b64("a:b"), b64("a:b")),
        request(b64("a:b"), "Bearer b"),
        request("Digest username=a"),
        request(""),
        request(b64("a:b"), body="client_id=a&client_secret=b", kind=FORM),
        request(b64("a:b"), body='{"secret":"b"}', kind=JSON),
        request("Bearer b", body='{"secret":"b"}', kind=JSON),
        request(b64("a:b"), query=True),
        request(body="client_id=a&client_secret=b", kind=FORM, query=True),
        request(body='{"secret":"b"}', kind=JSON, query=True),
        request(body="client_id=a&client_id=a&client_secret=b", kind=FORM),
        request(body="client_id=a&client%5Fid=a&client_secret=b", kind=FORM),
        request(body="client_id=a&client_secret=b&x=1&x=2", kind=FORM),
        request(body="client_id=a", kind=FORM),
        request(body="client_secret=b", kind=FORM),
        request(body="client_id=a&client_secret=%zz", kind=FORM),
        request(body="&".join(f"f{n}=1" for n in range(40)), kind=FORM),
        request(body="client_id=a&client_secret=b", kind=JSON),
        request(body='{"secret":"b"}', kind=FORM.replace("form", "from")),
        request(body='{"secret":"b"}'),
        request(body="{}", kind=JSON),
        request(body='{"secret":null}', kind=JSON),
        request(body='{"secret":["b"]}', kind=JSON),
        request(body='{"secret":1}', kind=JSON),
        request(body='{"secret":"b","login":1}', kind=JSON),
        request(body='{"secret":"b","login":["a"]}', kind=JSON),
        request(body='{"secret":"b","secret":"b"}', kind=JSON),
        request(body='{"secret":"b","s\\u0065cret":"c"}', kind=JSON),
        request(body='{"secret":"b","x":{"y":1,"y":2}}', kind=JSON),
        request(body='{"secret":"b","agent":"a"}', kind=JSON),
        request(body='{"secret":NaN}', kind=JSON),
        request(body='{"secret":' + "9" * 9000 + "}", kind=JSON),
        request(body="[" * 16000, kind=JSON),
        request(body='{"secret":' * 1600, kind=JSON),
        request(body='["secret"]', kind=JSON),
        request(body='"secret"', kind=JSON),
        request(body='{"secret":"b"}x', kind=JSON),
        request(body='\ufeff{"secret":"b"}', kind=JSON),
        request(body='{"secret":"b"}'.encode("utf-16"), kind=JSON),
        request(body='{"secret":"b"}'.encode("utf-32-le"), kind=JSON),
        request(body=b'{"secret":"\xff"}', kind=JSON),
        request(body=b'{"secret":"\xed\xa0\x80"}', kind=JSON),
        request(body=b"\x1f\x8b\x08\x00", kind=JSON),
    ],
)
def test_anything_but_one_clear_way_is_a_bad_request(one: Request) -> None:
    """Two ways at once, a parameter twice or in the address, or no JSON of this shape."""
    assert status(one) == 400


def test_two_content_types_are_a_bad_request() -> None:
    """Whoever is in between may have read the body by the other one."""
    one = request(body='{"secret":"b"}', kind=JSON)
    one.headers.append((b"content-type", FORM.encode()))
    assert status(one) == 400


def test_a_body_shows_a_secret_as_well() -> None:
    """Form and JSON, with any parameters of the media type."""
    form = "grant_type=client_credentials&client_id=a+b&client_secret=c%2Bd&"
    assert ways(request(body=form, kind=FORM + "; charset=utf-8")) == [(b"a b", b"c+d")]
    assert ways(request(body='{"secret":"b"}', kind="Application/JSON;x=y")) == [(b"", b"b")]
    both = json.dumps({"login": "a", "secret": "é\0"})
    assert ways(request(body=both, kind=JSON)) == [(b"a", "é\0".encode())]
    assert ways(request(body='{"login":null,"secret":"b"}', kind=JSON)) == [(b"", b"b")]


@pytest.mark.parametrize(
    "body",
    [
        '{"secret":"\\ud800"}',
        '{"secret":"b","login":"\\udfff"}',
        '{"secret":""}',
        '{"login":"","secret":"b"}',
        '{"login":"a\\u0000","secret":"b"}',
        '{"login":"é","secret":"b"}',
        json.dumps({"secret": "s" * 257}),
        json.dumps({"secret": "é" * 129}),
        json.dumps({"login": "a" * 129, "secret": "b"}),
    ],
)
def test_a_body_can_show_what_is_nobodys(body: str) -> None:
    """A lone surrogate, a length that none has, a login that none has: no, not 400 and not 500."""
    assert ways(request(body=body, kind=JSON)) == []


@pytest.mark.parametrize("size", [256, 257])
def test_a_secret_ends_at_256_bytes(size: int) -> None:
    """In each way of showing it."""
    text, expected = "s" * size, size == 256
    form = f"client_id=a&client_secret={text}"
    for one in (
        request(b64(f"a:{text}")),
        request(f"Bearer {text}"),
        request(body=form, kind=FORM),
        request(body=json.dumps({"login": "a", "secret": text}), kind=JSON),
    ):
        assert bool(ways(one)) is expected
    shown = INTROSPECT.read(request(body=f"token={text}", kind=FORM))
    assert (shown is not NOBODYS) is expected


def test_a_form_without_a_client_shows_nothing() -> None:
    """Other parameters beside Basic are the caller's own."""
    one = request(b64("a:b"), body="grant_type=client_credentials", kind=FORM)
    assert ways(one) == [(b"a", b"b")]
    assert ways(request(body="grant_type=client_credentials", kind=FORM)) == []


def test_a_gateway_is_never_told_that_its_client_was_wrong() -> None:
    """What /v1/auth cannot read is a no: nginx makes 500 of a 400."""
    for one in (request("Digest x"), request(b64("a:b"), b64("a:b")), request()):
        assert AUTH.read(one) is NOBODYS
    assert AUTH.read(request(b64("a:b"), query=True)) == Presented(b"a", b"b")


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (request(body="token=kt&token_type_hint=access_token", kind=FORM), b"kt"),
        (request(body="token=k%2Bt", kind=FORM), b"k+t"),
        (request(body="token=", kind=FORM), b""),
        (request(body="token=kt&token=kt", kind=FORM), None),
        (request(body="token=kt", kind=JSON), None),
        (request(body="token=kt"), None),
        (request(body="", kind=FORM), None),
        (request(body="x=y", kind=FORM), None),
        (request(body="token=kt", kind=FORM, query=True), None),
        (request(body='{"token":"kt"}', kind=JSON), None),
    ],
)
def test_introspection_takes_one_token_of_a_form(one: Request, expected: bytes | None) -> None:
    """RFC 7662, 2.1."""
    found = INTROSPECT.read(one)
    if expected is None:
        assert not isinstance(found, Presented)
        assert found.status == 400
    else:
        assert found == (Presented(b"", expected) if expected else NOBODYS)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (b"/v1/verify", VERIFY),
        (b"/v1/auth", AUTH),
        (b"/v1/auth/", AUTH),
        (b"/v1/auth/../verify", AUTH),
        (b"/v1/auth/%2e%2e/v1/introspect", AUTH),
        (b"/v1/introspect", INTROSPECT),
        (b"/v1/authx", None),
        (b"/v1/verify/", None),
        (b"//v1/verify", None),
        (b"/v1//verify", None),
        (b"/v1/./verify", None),
        (b"/V1/verify", None),
        (b"/v1/verif%79", None),
        (b"/v1/verify;x", None),
        (b"/v1/verify#x", None),
        (b"/v1\\verify", None),
        (b"", None),
        (b"*", None),
    ],
)
def test_a_path_has_one_spelling(path: bytes, expected: object) -> None:
    """CVE-2026-48710, CVE-2025-54576, CVE-2026-3605: as it came, decoded and mended by nobody."""
    assert route_of(path) is expected


def test_malformed_quotes_nothing() -> None:
    """CVE-2025-4166: what is wrong with a request never repeats what was in it."""
    canary = "kt_canary"
    for one in (
        request(f"Digest {canary}"),
        request(body=f"{canary}={canary}&{canary}=1", kind=FORM),
        request(body=f'{{"secret":"{canary}","{canary}":1}}', kind=JSON),
        request(body=f'{{"secret":"{canary}"', kind=JSON),
    ):
        found = VERIFY.read(one)
        assert not isinstance(found, Presented)
        assert canary.encode() not in found.body + found.head
    assert issubclass(Malformed, Exception)
