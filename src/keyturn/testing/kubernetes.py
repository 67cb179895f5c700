"""A stand-in for a Kubernetes API server: it projects service account tokens and reviews them.

Over TLS, and as strict as the real one: the reviewer's own token is checked (401, 403), then the
signature, expiry, audiences and account of the token under review; a token that is not good is no
error but a TokenReview without `authenticated`. Sources: the TokenReview v1 page of the Kubernetes
API; bound service account tokens (KEP 1205).
"""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from keyturn.testing.certificates import new_authority
from keyturn.testing.wire import Answer, Call, Server, as_json

ISSUER = "https://kubernetes.default.svc.cluster.local"  # also the API server's own audience
PATH = "/apis/authentication.k8s.io/v1/tokenreviews"
HOUR = timedelta(hours=1)
_HALF = 32  # of a signature by P-256
_ECDSA = ec.ECDSA(hashes.SHA256())


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A service account; made anew under its name it has another uid."""

    namespace: str
    name: str
    uid: str

    @property
    def username(self) -> str:
        """What the API server calls it."""
        return f"system:serviceaccount:{self.namespace}:{self.name}"


class ApiServer:
    """One cluster. `reviewer` is the token that reviews are asked for with."""

    def __init__(self, folder: Path) -> None:
        authority = new_authority(folder, name="kubernetes")
        self.ca_file = authority.ca_file
        self.reviews: list[Mapping[str, Any]] = []  # what was asked and answered, in order
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._accounts: dict[str, Account] = {}
        self._certificate = authority.issue("kube-apiserver")
        self._server = self._listen(0)
        self.address = self._server.address
        self._reviewer = self.account("vault", "token-reviewer")
        self.reviewer = self.token(self._reviewer)

    # --- accounts and their tokens ------------------------------------------------------------

    def account(self, namespace: str, name: str) -> Account:
        """Make a service account, in the place of an older one of that name."""
        made = Account(namespace=namespace, name=name, uid=str(uuid.uuid4()))
        self._accounts[made.username] = made
        return made

    def delete(self, account: Account) -> None:
        """Remove a service account: its tokens are worth nothing from now on."""
        self._accounts.pop(account.username, None)

    def token(
        self, account: Account, *, audiences: Sequence[str] = (ISSUER,), life: timedelta = HOUR
    ) -> str:
        """Return a bound token as kubelet projects it; a negative life makes one that has ended."""
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "sub": account.username,
            "aud": list(audiences),
            "iat": now,
            "nbf": now + min(0, int(life.total_seconds())),
            "exp": now + int(life.total_seconds()),
            "jti": secrets.token_hex(8),
            "kubernetes.io": {
                "namespace": account.namespace,
                "serviceaccount": {"name": account.name, "uid": account.uid},
            },
        }
        text = f"{_encoded({'alg': 'ES256', 'typ': 'JWT'})}.{_encoded(claims)}"
        r, s = decode_dss_signature(self._key.sign(text.encode(), _ECDSA))
        return f"{text}.{_base64(r.to_bytes(_HALF, 'big') + s.to_bytes(_HALF, 'big'))}"

    def review(self, token: str, audiences: Sequence[str] = ()) -> dict[str, Any]:
        """Return the status of a TokenReview."""
        wanted = list(audiences) or [ISSUER]
        claims = self._claims(token)
        if claims is None or claims["exp"] <= time.time():
            return {"user": {}, "error": "[invalid bearer token, token is not valid or expired]"}
        shared = [one for one in claims["aud"] if one in wanted]
        account = self._accounts.get(claims["sub"])
        if not shared or account is None:
            return {"user": {}, "error": "[invalid bearer token, audiences or account]"}
        if claims["kubernetes.io"]["serviceaccount"]["uid"] != account.uid:
            return {"user": {}, "error": "[invalid bearer token, account was made anew]"}
        groups = ["system:serviceaccounts", f"system:serviceaccounts:{account.namespace}"]
        user = {"username": account.username, "uid": account.uid, "groups": groups}
        return {"authenticated": True, "user": user, "audiences": shared}

    def _claims(self, token: str) -> Any:
        """Return the claims of a token that this cluster has signed, else None."""
        try:
            text, _, signature = token.rpartition(".")
            raw = _decoded(signature)
            pair = int.from_bytes(raw[:_HALF], "big"), int.from_bytes(raw[_HALF:], "big")
            self._key.public_key().verify(encode_dss_signature(*pair), text.encode(), _ECDSA)
            return json.loads(_decoded(text.partition(".")[2]))
        except (InvalidSignature, ValueError):
            return None

    # --- the server -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Let nobody listen at its address, until the block ends."""
        port = self._server.place[1]
        self.close()
        try:
            yield
        finally:
            self._server = self._listen(port)

    def close(self) -> None:
        """Stop listening."""
        self._server.close()

    def answer(self, call: Call) -> Answer:
        """Answer one TokenReview by whoever holds the bearer token of the call."""
        if (call.method, call.path) != ("POST", PATH):
            return _status(404, "NotFound")
        caller = self.review(call.headers.get("authorization", "").removeprefix("Bearer "))
        if not caller.get("authenticated"):
            return _status(401, "Unauthorized")
        if caller["user"]["username"] != self._reviewer.username:
            return _status(403, "Forbidden")
        spec = (call.json() or {}).get("spec") or {}
        found = self.review(str(spec.get("token", "")), spec.get("audiences") or ())
        self.reviews.append({**spec, **found})
        kind = {"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1"}
        return as_json(201, {**kind, "metadata": {}, "spec": spec, "status": found})

    def _listen(self, port: int) -> Server:
        return Server(self.answer, port=port, certificate=self._certificate)


@contextlib.contextmanager
def api_server(folder: Path) -> Iterator[ApiServer]:
    """Give a cluster until the block ends."""
    one = ApiServer(folder)
    try:
        yield one
    finally:
        one.close()


def _status(code: int, reason: str) -> Answer:
    kind = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return as_json(code, {**kind, "reason": reason, "code": code})


def _encoded(values: Mapping[str, Any]) -> str:
    return _base64(json.dumps(values).encode())


def _base64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
