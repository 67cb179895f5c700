"""Logins of the stand-in: the token endpoint of Microsoft Entra ID, and a machine's IMDS.

Client credentials by secret, by an assertion that a registered certificate has signed, and by a
federated token; managed identities as a virtual machine gets them. As strict as Microsoft's pages
on these flows say: audience, issuer, subject and time of each assertion (msal sends one again).
"""

from __future__ import annotations

import base64
import secrets
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa

from keyturn.testing.wire import Answer, Call, as_json

ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
EXCHANGE = "api://AzureADTokenExchange"
LIFE = 3599
IMDS_VERSION = "2018-02-01"


@dataclass(slots=True, kw_only=True)
class Identity:
    """An application or a managed identity, and what it logs in with."""

    client_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    object_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    secret: str | None = field(default=None, repr=False)
    secret_over: bool = False  # the secret has run out
    certificate: x509.Certificate | None = None
    federated: tuple[str, str] | None = None  # issuer and subject of its federated credential
    managed: bool = False  # of the machine; the first one is system-assigned


class _Refused(Exception):
    """A login that is refused: number of the error, and its OAuth code."""

    def __init__(self, number: int, code: str = "invalid_client") -> None:
        super().__init__(number)
        self.number, self.code = number, code


class Entra:
    """One tenant: its identities, and the tokens that it has given. Thread-safe."""

    def __init__(self, *, authority: str, resource: str) -> None:
        self.tenant = str(uuid.uuid4())
        self.authority, self.resource = authority, resource
        self.identities: list[Identity] = []
        self.life = LIFE
        self.issuers: dict[str, rsa.RSAPublicKey] = {}  # of federated tokens, by issuer
        self._key = secrets.token_bytes(32)
        self._void_before = 0.0

    def add(self, identity: Identity) -> Identity:
        """Register an identity."""
        self.identities.append(identity)
        return identity

    def void(self) -> None:
        """Refuse every token that was given until now, as after a revocation."""
        self._void_before = time.time()

    def caller(self, token: str, *, audience: str) -> Identity | None:
        """Return whose token this is, if it is good for this audience now."""
        try:
            claims = jwt.decode(
                token, self._key, algorithms=["HS256"], audience=audience,
                options={"require": ["exp", "aud", "oid", "tid"]},
            )  # fmt: skip
        except jwt.InvalidTokenError:
            return None
        if claims["tid"] != self.tenant or claims["at"] < self._void_before:
            return None
        return next((one for one in self.identities if one.object_id == claims["oid"]), None)

    # --- the authority ----------------------------------------------------------------------

    def answer(self, call: Call) -> Answer:
        """Answer at the authority's address."""
        if call.path == "/common/discovery/instance":
            return self._instances()
        tenant, _, rest = call.path.lstrip("/").partition("/")
        if rest not in ("v2.0/.well-known/openid-configuration", "oauth2/v2.0/token"):
            return as_json(404, {"error": "not_found"})
        try:
            if tenant != self.tenant:
                raise _Refused(90002, "invalid_request")  # noqa: TRY301 - one way out for refusals
            if rest.endswith("configuration"):
                return self._configuration()
            return self._token(call)
        except _Refused as refused:
            return self._refusal(refused)

    def _instances(self) -> Answer:
        host = self.authority.partition("://")[2]
        names = {"preferred_network": host, "preferred_cache": host, "aliases": [host]}
        discovery = f"{self.authority}/{self.tenant}/v2.0/.well-known/openid-configuration"
        return as_json(200, {"tenant_discovery_endpoint": discovery, "metadata": [names]})

    def _configuration(self) -> Answer:
        base = f"{self.authority}/{self.tenant}"
        return as_json(
            200,
            {
                "issuer": f"{base}/v2.0",
                "token_endpoint": f"{base}/oauth2/v2.0/token",
                "authorization_endpoint": f"{base}/oauth2/v2.0/authorize",
                "device_authorization_endpoint": f"{base}/oauth2/v2.0/devicecode",
                "jwks_uri": f"{base}/discovery/v2.0/keys",
            },
        )

    def _token(self, call: Call) -> Answer:
        if call.method != "POST":
            raise _Refused(900561, "invalid_request")
        form = dict(parse_qsl(call.body.decode("utf-8", "replace")))
        if form.get("grant_type") != "client_credentials":
            raise _Refused(70003, "unsupported_grant_type")
        resource, slash, default = form.get("scope", "").partition("/.default")
        if not slash or default or not resource:
            raise _Refused(70011, "invalid_scope")
        if resource != self.resource:
            raise _Refused(500011, "invalid_resource")
        identity = self._authenticated(form)
        given = self._given(identity, resource)
        kept = ("token_type", "expires_in", "ext_expires_in", "access_token")
        return as_json(200, {name: given[name] for name in kept})

    def _authenticated(self, form: Mapping[str, str]) -> Identity:
        found = [
            one
            for one in self.identities
            if one.client_id == form.get("client_id") and not one.managed
        ]
        if not found:
            raise _Refused(700016, "unauthorized_client")
        identity = found[0]
        if "client_secret" in form:
            if identity.secret is None or not secrets.compare_digest(
                form["client_secret"], identity.secret
            ):
                raise _Refused(7000215)
            if identity.secret_over:
                raise _Refused(7000222)
        elif form.get("client_assertion_type") == ASSERTION:
            self._check_assertion(identity, form.get("client_assertion", ""))
        else:
            raise _Refused(7000218)
        return identity

    def _check_assertion(self, identity: Identity, text: str) -> None:
        try:
            header = jwt.get_unverified_header(text)
            issuer = str(jwt.decode(text, options={"verify_signature": False}).get("iss"))
        except jwt.InvalidTokenError:
            raise _Refused(50027) from None
        if issuer in self.issuers and identity.federated is not None:
            return self._check_federated(identity, text, issuer)
        return self._check_signed(identity, text, header)

    def _check_federated(self, identity: Identity, text: str, issuer: str) -> None:
        try:
            claims = jwt.decode(
                text, self.issuers[issuer], algorithms=["RS256"], audience=EXCHANGE,
                options={"require": ["exp", "iss", "sub", "aud"]},
            )  # fmt: skip
        except jwt.ExpiredSignatureError:
            raise _Refused(700024) from None
        except jwt.InvalidTokenError:
            raise _Refused(700212) from None
        if (claims["iss"], claims["sub"]) != identity.federated:
            raise _Refused(700213)

    def _check_signed(self, identity: Identity, text: str, header: Mapping[str, Any]) -> None:
        certificate = identity.certificate
        if certificate is None or not _names(header, certificate):
            raise _Refused(700027)
        try:
            claims = jwt.decode(
                text, certificate.public_key(), algorithms=["RS256", "PS256"],  # type: ignore[arg-type]
                audience=f"{self.authority}/{self.tenant}/oauth2/v2.0/token",
                options={"require": ["exp", "iss", "sub", "aud", "jti"]},
            )  # fmt: skip
        except jwt.ExpiredSignatureError:
            raise _Refused(700024) from None
        except jwt.InvalidTokenError:
            raise _Refused(700027) from None
        if not claims["iss"] == claims["sub"] == identity.client_id:
            raise _Refused(700021)

    def _given(self, identity: Identity, resource: str) -> dict[str, Any]:
        now = time.time()
        claims = {
            "aud": resource, "iss": f"https://sts.windows.net/{self.tenant}/", "tid": self.tenant,
            "oid": identity.object_id, "appid": identity.client_id, "at": now,
            "nbf": int(now), "iat": int(now), "exp": now + self.life, "jti": str(uuid.uuid4()),
        }  # fmt: skip
        return {
            "token_type": "Bearer", "expires_in": self.life, "ext_expires_in": self.life,
            "access_token": jwt.encode(claims, self._key, algorithm="HS256"),
            "expires_on": str(int(now) + self.life), "not_before": str(int(now)),
        }  # fmt: skip

    def _refusal(self, refused: _Refused) -> Answer:
        text = f"AADSTS{refused.number}: refused. Trace ID: {uuid.uuid4()}"
        body = {
            "error": refused.code, "error_description": text, "error_codes": [refused.number],
            "timestamp": time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime()),
            "trace_id": str(uuid.uuid4()), "correlation_id": str(uuid.uuid4()),
        }  # fmt: skip
        return as_json(401 if refused.code == "invalid_client" else 400, body)

    # --- the machine --------------------------------------------------------------------------

    def imds(self, call: Call) -> Answer:
        """Answer at the machine's metadata address, for its managed identities."""
        if call.headers.get("metadata") != "true" or "x-forwarded-for" in call.headers:
            return _bad("Required metadata header not specified")
        if call.method != "GET" or call.path != "/metadata/identity/oauth2/token":
            return as_json(404, {"error": "not_found"})
        if call.query.get("api-version") != IMDS_VERSION:
            return _bad("The api-version is not supported")
        if call.query.get("resource") != self.resource:
            return _bad(f"AADSTS500011: The resource principal named {call.query} was not found")
        ours = [one for one in self.identities if one.managed]
        wanted = call.query.get("client_id")
        found = [one for one in ours if wanted in (None, one.client_id)]
        if not found:
            return _bad("Identity not found")
        given = self._given(found[0], self.resource)
        for name in ("expires_in", "ext_expires_in"):
            given[name] = str(given[name])
        return as_json(200, {**given, "client_id": found[0].client_id, "resource": self.resource})


def _bad(text: str) -> Answer:
    return as_json(400, {"error": "invalid_request", "error_description": text})


def _names(header: Mapping[str, Any], certificate: x509.Certificate) -> bool:
    """Whether the header of an assertion names this certificate by one of its thumbprints."""
    kinds: tuple[tuple[str, hashes.HashAlgorithm], ...] = (
        ("x5t", hashes.SHA1()),
        ("x5t#S256", hashes.SHA256()),
    )
    return any(
        header.get(name) == base64.urlsafe_b64encode(certificate.fingerprint(kind)).decode().rstrip("=")
        or header.get(name) == base64.urlsafe_b64encode(certificate.fingerprint(kind)).decode()
        for name, kind in kinds
    )  # fmt: skip
