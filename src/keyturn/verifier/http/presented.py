"""How a secret is shown to us: as OAuth clients and HTTP clients do it, and nothing in between.

    Basic    RFC 7617; both halves form-encoded (RFC 6749, 2.3.1 and appendix B), or as they are
    Bearer   RFC 6750, 2.1: the secret alone, whoever has it
    form     client_id and client_secret (RFC 6749, 2.3.1)
    JSON     {"login": …, "secret": …}, the login may be left out

One way in one request, no parameter twice, none in the address. Whatever is not exactly that is
`Malformed`; what can be no login or no secret of ours is `NOBODYS`, and answered like a wrong one.
"""

from __future__ import annotations

import binascii
import json
import re
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from keyturn.core.secret import MAX_SECRET_BYTES
from keyturn.verifier.http.messages import Request

MAX_LOGIN = 128
_ENCODED = re.compile(rb"(?:[^%]|%[0-9A-Fa-f]{2})*")
_FORM, _JSON = b"application/x-www-form-urlencoded", b"application/json"
_MAX_FIELDS = 32


class Presented(NamedTuple):
    """A login and a secret; `login` b"" asks who has the secret.

    `plain` are both as they stand, where that may have been meant: clients forget to encode them.
    """

    login: bytes
    text: bytes
    plain: tuple[bytes, bytes] | None = None

    def ways(self) -> list[tuple[bytes, bytes]]:
        """Return every pair that may have been meant, the likeliest first."""
        return [self[:2], *([self.plain] if self.plain else [])]


NOBODYS = Presented(b"", b"")


class Malformed(Exception):
    """The request is none that could be answered; `args` say why, and quote nothing."""


def from_header(request: Request) -> Presented | None:
    """Read the header Authorization, None without one. Raises Malformed."""
    values = request.authorization
    if not values:
        return None
    if len(values) > 1:
        raise Malformed("more than one Authorization header")
    scheme, _, rest = values[0].partition(b" ")
    scheme, rest = scheme.lower(), rest.strip(b" ")
    if scheme == b"basic":
        return _basic(rest)
    if scheme == b"bearer":
        return possible(Presented(b"", rest))
    raise Malformed("an Authorization header of another kind than Basic or Bearer")


def from_body(request: Request) -> Presented | None:
    """Read a form or JSON, None without a body. Raises Malformed."""
    if not request.body:
        return None
    kind = _kind(request)
    if kind == _FORM:
        fields = form(request.body)
        if not fields.keys() & {"client_id", "client_secret"}:
            return None
        if not fields.keys() >= {"client_id", "client_secret"}:
            raise Malformed("client_id and client_secret go together")
        return _named(Presented(fields["client_id"], fields["client_secret"]))
    if kind == _JSON:
        return _from_json(request.body)
    raise Malformed("a body that is neither application/json nor a form")


def form(body: bytes) -> dict[str, bytes]:
    """Return the fields of a form, decoded. Raises Malformed for one that comes twice."""
    fields: dict[str, bytes] = {}
    parts = body.split(b"&", _MAX_FIELDS)
    if len(parts) > _MAX_FIELDS:
        raise Malformed("too many parameters")
    for part in parts:
        name, _, value = part.partition(b"=")
        key = _decoded(name).decode("ascii", "replace")
        if key in fields:
            raise Malformed("a parameter that is repeated")
        fields[key] = _decoded(value)
    return fields


def only_one(*ways: Presented | None) -> Presented | None:
    """Return the one that there is. Raises Malformed where there are more (RFC 6749, 2.3)."""
    found = [one for one in ways if one is not None]
    if len(found) > 1:
        raise Malformed("more than one way of showing a secret")
    return found[0] if found else None


def is_form(request: Request) -> bool:
    """Tell whether the body says that it is a form."""
    return _kind(request) == _FORM


def _kind(request: Request) -> bytes:
    kinds = request.header(b"content-type")
    if len(kinds) > 1:
        raise Malformed("more than one Content-Type")
    return kinds[0].partition(b";")[0].strip().lower() if kinds else b""


def _basic(text: bytes) -> Presented:
    try:
        raw = binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error:
        return NOBODYS
    login, colon, secret = raw.partition(b":")
    if not colon:
        return NOBODYS
    if b"%" not in raw and b"+" not in raw:
        return _named(Presented(login, secret))
    plain = _named(Presented(login, secret))
    try:
        decoded = _named(Presented(_decoded(login), _decoded(secret)))
    except Malformed:
        return plain
    if NOBODYS in (plain, decoded) or plain == decoded:
        return plain if decoded is NOBODYS else decoded
    return decoded._replace(plain=(login, secret))


def _named(shown: Presented) -> Presented:
    """Return it as `possible` does; SECURITY: an empty login is nobody's, and does not ask whose."""
    return possible(shown) if shown.login else NOBODYS


def possible(shown: Presented) -> Presented:
    """Return it, or `NOBODYS` where no login or secret can look like that."""
    login, text = shown[:2]
    if not 0 < len(text) <= MAX_SECRET_BYTES or len(login) > MAX_LOGIN:
        return NOBODYS
    if not login.isascii() or not login.decode().isprintable():
        return NOBODYS  # a database may choke on such a character, and that is no answer
    try:
        text.decode()
    except UnicodeDecodeError:
        return NOBODYS
    return shown


def _from_json(body: bytes) -> Presented:
    try:
        # As text: of bytes it would guess the encoding, and there is only one (RFC 8259, 8.1).
        found = json.loads(body.decode(), object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise Malformed("no JSON object, or a key that is repeated") from None
    if not isinstance(found, dict) or not {"secret"} <= found.keys() <= {"login", "secret"}:
        raise Malformed('expected {"login": …, "secret": …}')
    login, secret = found.get("login"), found["secret"]
    if not isinstance(secret, str) or not isinstance(login, str | None):
        raise Malformed("login and secret are texts")
    if login == "":
        return NOBODYS
    try:
        return possible(Presented((login or "").encode(), secret.encode()))
    except UnicodeEncodeError:  # a lone surrogate
        return NOBODYS


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


def _no_number(_text: str) -> None:
    raise ValueError


def _decoded(text: bytes) -> bytes:
    """Decode application/x-www-form-urlencoded; half an escape is none."""
    if _ENCODED.fullmatch(text) is None:
        raise Malformed("a broken percent escape")
    return unquote_to_bytes(text.replace(b"+", b" "))
