"""What can be asked over HTTP, and in which words it is answered.

| route               | shown by                | yes        | no                | cannot tell |
|---------------------|-------------------------|------------|-------------------|-------------|
| POST /v1/verify     | Basic, Bearer, form, JSON | 200 + JSON | 401 invalid_client | 503         |
| any /v1/auth[/…]    | Basic, Bearer           | 200, empty | 401, empty        | 503         |
| POST /v1/introspect | token=                  | 200 active | 200 not active    | 503         |

SECURITY: unknown, wrong, expired, revoked and suspended are one answer, byte for byte. An answer that
is no yes never has status 200 where callers look at nothing else (nginx, Envoy, careless clients).
nginx makes 500 of all but 2xx, 401 and 403, and a refusal is what an agent sees as 401 or 403: so
whatever is no refusal stays away from these two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from keyturn.verifier.decision import Proof, Verified
from keyturn.verifier.http.callers import Caller, Callers
from keyturn.verifier.http.messages import Answer, Request, json_answer
from keyturn.verifier.http.presented import (
    NOBODYS,
    Malformed,
    Presented,
    form,
    from_body,
    from_header,
    is_form,
    only_one,
    possible,
)

CALLER_TOKEN = b"keyturn-caller-token"
_CHALLENGE = {"WWW-Authenticate": 'Basic realm="keyturn", charset="UTF-8"'}
_BEARER = {"WWW-Authenticate": 'Bearer realm="keyturn"'}


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One way to ask. `read` returns what was shown, or an answer at once."""

    name: str
    methods: frozenset[bytes] | None
    read: Callable[[Request], Presented | Answer]
    yes: Callable[[Verified], Answer]
    no: Answer
    stranger: Answer  # to whoever is no relying party
    introspects: bool = False
    header_only: bool = False  # body and parameters are the agent's, meant for the application

    def accepted(self, proof: Proof) -> Answer:
        """Return the yes, made once for each proof."""
        found = proof.said.get(self.name)
        if found is None:
            found = proof.said[self.name] = self.yes(proof.verified)
        return found

    def caller(self, request: Request, callers: Callers) -> Caller | None:
        """Return whose token this is, None for a stranger."""
        values = request.header(CALLER_TOKEN)
        if not values and self.introspects:  # RFC 7662, 2.1
            found = request.authorization
            scheme, _, token = found[0].partition(b" ") if len(found) == 1 else (b"", b"", b"")
            values = [token.strip()] if scheme.lower() == b"bearer" else []
        return callers.by_token(values[0]) if len(values) == 1 else None


def route_of(path: bytes) -> Route | None:
    """Find a route by the path as it came over the wire, decoded and mended by nobody."""
    found = _ROUTES.get(path)
    if found is None and path.startswith(b"/v1/auth/"):
        return AUTH  # Envoy's `path_prefix` puts the path of the original request behind ours
    return found


def unavailable(retry_after: timedelta | None) -> Answer:
    """Return that nobody can tell now: no refusal."""
    seconds = 1 if retry_after is None else max(1, -(-retry_after // timedelta(seconds=1)))
    return json_answer(503, {"error": "temporarily_unavailable"}, {"Retry-After": str(seconds)})


def problem(status: int, error: str, text: str = "", **headers: str) -> Answer:
    """Return an error in the form of RFC 6749, 5.2."""
    content = {"error": error} | ({"error_description": text} if text else {})
    return json_answer(status, content, headers)


def _invalid(text: str) -> Answer:
    return problem(400, "invalid_request", text)


# --- verify -----------------------------------------------------------------------------------


def _read_verify(request: Request) -> Presented | Answer:
    if request.query:
        return _invalid("parameters in the address")
    try:
        shown = only_one(from_header(request), from_body(request))
    except Malformed as found:
        return _invalid(str(found))
    return NOBODYS if shown is None else shown


def _facts(found: Verified) -> dict[str, str | None]:
    deadline = found.deadline.isoformat().replace("+00:00", "Z") if found.deadline else None
    return {
        "agent": found.agent,
        "login": found.login,
        "version": found.version_id,
        "state": found.state,
        "deadline": deadline,
    }


def _headers(found: Verified) -> dict[str, str]:
    """Give what a gateway hands on: `Keyturn-Deadline` tells a client that its secret retires."""
    return {f"Keyturn-{key.title()}": value for key, value in _facts(found).items() if value}


def _verified(found: Verified) -> Answer:
    return json_answer(200, {"accepted": True, **_facts(found)}, _headers(found))


# --- auth -------------------------------------------------------------------------------------


def _read_auth(request: Request) -> Presented | Answer:
    try:
        return from_header(request) or NOBODYS
    except Malformed:
        return NOBODYS


# --- introspect -------------------------------------------------------------------------------


def _read_introspect(request: Request) -> Presented | Answer:
    if request.query:
        return _invalid("parameters in the address")
    try:
        fields = form(request.body) if is_form(request) else {}
    except Malformed as found:
        return _invalid(str(found))
    if "token" not in fields:
        return _invalid("expected a form with token=")
    return possible(Presented(b"", fields["token"]))


def _active(found: Verified) -> Answer:
    """Return RFC 7662, 2.2; members of ours have a prefix."""
    content: dict[str, object] = {
        "active": True,
        "client_id": found.login,
        "sub": found.agent,
        "token_type": "Bearer",
        "keyturn_version": found.version_id,
        "keyturn_state": found.state,
    }
    if found.deadline is not None:
        content["exp"] = int(found.deadline.timestamp())
    return json_answer(200, content)


VERIFY = Route(
    name="verify",
    methods=frozenset({b"POST"}),
    read=_read_verify,
    yes=_verified,
    no=json_answer(401, {"accepted": False, "error": "invalid_client"}, _CHALLENGE),
    stranger=problem(403, "unauthorized_client", "no relying party of this verifier"),
)
AUTH = Route(
    name="auth",
    methods=None,
    header_only=True,
    read=_read_auth,
    yes=lambda found: Answer(200, headers=_headers(found)),
    no=Answer(401, headers=_CHALLENGE),
    stranger=Answer(503, headers={"Keyturn-Error": "unknown-caller"}),
)
INTROSPECT = Route(
    name="introspect",
    methods=frozenset({b"POST"}),
    read=_read_introspect,
    yes=_active,
    no=json_answer(200, {"active": False}),
    stranger=json_answer(401, {"error": "invalid_client"}, _BEARER),
    introspects=True,
)
_ROUTES = {b"/v1/verify": VERIFY, b"/v1/auth": AUTH, b"/v1/introspect": INTROSPECT}
NOWHERE = problem(404, "not_found", f"there are {', '.join(map(bytes.decode, _ROUTES))}")
