"""Logins at Azure, and the only way in which a request leaves for it.

Each method is one named class of azure-identity, with every parameter given: no chain of guesses, no
cache on disk, nothing of the environment. Requests go to the hosts that the connection names, or to
none (`Session`), whatever a discovery document, a challenge or a link says.
Sources: Microsoft's pages on the client credentials flow and on managed identities for VMs (IMDS).
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import requests
import urllib3
from azure.core.credentials import AccessToken, AccessTokenInfo, TokenRequestOptions
from azure.core.pipeline.transport import RequestsTransport
from azure.identity import (
    CertificateCredential,
    ClientSecretCredential,
    ManagedIdentityCredential,
    WorkloadIdentityCredential,
)
from cryptography import x509
from pydantic import BaseModel, ConfigDict, Field, model_validator

from keyturn.credential_file import read_credential
from keyturn.destinations.base import (
    CredentialFile,
    Form,
    pause,
)
from keyturn.destinations.network import BoundedAdapter, trouble
from keyturn.errors import (
    ConfigError,
    Denied,
    DestinationError,
    DestinationUnavailable,
    KeyturnError,
    Rejected,
    Throttled,
)

# SECURITY: it logs a refused login as a warning, with whatever text the other side has sent.
logging.getLogger("azure.identity").setLevel(logging.CRITICAL)

ANSWER_LIMIT = 1024 * 1024
PUBLIC_CLOUD = "https://login.microsoftonline.com"
IMDS = "http://169.254.169.254"  # link-local: it never leaves the machine
# The retry policies of azure-core and of azure-identity; ours is the saga.
NO_RETRIES = {"retry_total": 0, "retry_connect": 0, "retry_read": 0, "retry_status": 0}
_NEEDS = {
    "managed-identity": (),
    "workload-identity": ("tenant_id", "client_id", "token_file"),
    "client-secret": ("tenant_id", "client_id", "secret_file"),
    "client-certificate": ("tenant_id", "client_id", "certificate_file"),
}
# Numbers of Entra's errors (AADSTS…) that say what to do; they quote nothing.
_CODES = {
    7000222: "the client secret has run out: make a new one",
    7000215: "the client secret is wrong: the file must hold its value, not its id",
    700016: "the tenant has no application of this client_id",
    90002: "there is no such tenant",
    900023: "there is no such tenant",
    700027: "the certificate is not registered with the application, or has run out",
    70021: "no federated credential of the application matches issuer and subject of the token",
    700213: "no federated credential of the application matches the subject of the token",
    700024: "the assertion is outside of its time: check the clock",
}

Credential = (
    ManagedIdentityCredential
    | WorkloadIdentityCredential
    | ClientSecretCredential
    | CertificateCredential
)


def https_origin(value: object) -> str:
    """Return https://host[:port], in lower case and without the default port. Raises ValueError."""
    if not isinstance(value, str) or "\\" in value:
        raise ValueError
    parts = urlsplit(value)
    rest = parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc
    if parts.scheme != "https" or not parts.hostname or rest:
        raise ValueError
    port = "" if parts.port in (None, 443) else f":{parts.port}"
    return f"https://{parts.hostname}{port}"


class AuthOptions(BaseModel):
    """How to log in. Secrets are only ever named by file."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, hide_input_in_errors=True, validate_default=False
    )

    method: Annotated[
        Literal["managed-identity", "workload-identity", "client-secret", "client-certificate"],
        Form("managed-identity, workload-identity, client-secret or client-certificate"),
        Field(description="which class of azure-identity"),
    ] = "managed-identity"
    tenant_id: Annotated[
        str | None, Form("a tenant id"), Field(description="tenant, not for managed-identity")
    ] = None
    client_id: Annotated[
        str | None,
        Form("a client id"),
        Field(description="application; for managed-identity: of a user-assigned one"),
    ] = None
    secret_file: Annotated[CredentialFile, Field(description="file with the client secret")] = None
    certificate_file: Annotated[
        CredentialFile, Field(description="PEM file with the certificate and its RSA key")
    ] = None
    token_file: Annotated[
        CredentialFile, Field(description="file with the federated token, as Kubernetes puts it")
    ] = None

    @model_validator(mode="after")
    def _whole(self) -> AuthOptions:
        given = {name for name, value in self if value is not None} - {"method"}
        needs = set(_NEEDS[self.method])
        more = {"client_id"} if self.method == "managed-identity" else set()
        if not needs <= given or given - needs - more:
            raise ValueError
        return self

    @property
    def file(self) -> Path | None:
        """The file that holds what proves who we are."""
        return self.secret_file or self.certificate_file or self.token_file


class Login:
    """A credential as azure-core wants it: gives tokens, and our errors where there are none.

    Thread-safe: one login at a time, the others then find its token. What failed is not remembered,
    since msal would go on answering a refusal or an outage from its memory.
    """

    def __init__(
        self,
        *,
        auth: AuthOptions,
        vault: str,
        authority: str,
        ca_file: str | None,
        timeout: timedelta,
        name: str,
    ) -> None:
        self._auth = auth
        self._vault = urlsplit(vault).hostname or ""
        self._authority = authority
        self._name = name
        host = IMDS if auth.method == "managed-identity" else authority
        self._session = Session({host: host})
        self._transport = transport(self._session, ca_file=ca_file, timeout=timeout)
        self._credential: Credential | None = None
        self._proof: str | None = None
        self._ends_at: datetime | None = None
        self._guard = threading.Lock()

    def get_token_info(
        self, *scopes: str, options: TokenRequestOptions | None = None
    ) -> AccessTokenInfo:
        """Return a token, by a new login where the last one ran out. Raises a DestinationError.

        SECURITY: the tenant is the one of the configuration, whatever a challenge names. The SDK
        keeps challenges for the whole process, so one would outlive a vault's move to another.
        """
        wanted: TokenRequestOptions = {**(options or {})}
        wanted.pop("tenant_id", None)
        self._check(scopes)
        with self._guard:
            try:
                credential = self._ready()
                self._session.last = None
                return credential.get_token_info(*scopes, options=wanted)
            except KeyturnError:
                raise
            except Exception as error:  # noqa: BLE001 - azure-identity wraps whatever it meets
                problem = self._problem(error)
            self._forget()
        # Outside of the handler, or the vendor's error would hang on ours as its context.
        raise problem

    def get_token(
        self,
        *scopes: str,
        claims: str | None = None,
        tenant_id: str | None = None,
        enable_cae: bool = False,
        **_more: Any,
    ) -> AccessToken:
        """Return a token as older versions of azure-core ask for it."""
        options: TokenRequestOptions = {"enable_cae": enable_cae}
        if claims:
            options["claims"] = claims
        found = self.get_token_info(*scopes, options=options)
        return AccessToken(found.token, found.expires_on)

    def forget(self) -> None:
        """Log in anew at the next request: the vault has refused the token."""
        with self._guard:
            self._forget()

    @property
    def ends_in(self) -> timedelta | None:
        """How long the certificate is good; of the other methods nobody tells us."""
        ends_at = self._ends_at
        return None if ends_at is None else ends_at - datetime.now(UTC)

    def close(self) -> None:
        """Close what is open. Tokens cannot be given back: they run out."""
        with self._guard:
            self._forget()
            self._session.close()

    # --- inside -----------------------------------------------------------------------------

    def _check(self, scopes: Sequence[str]) -> None:
        """Refuse a token for anything but the vault's own domain.

        SECURITY: the SDK checks challenges as well, before 4.11.2 only when one first comes: it was
        kept, and followed afterwards [measured].
        """
        for scope in scopes:
            domain = urlsplit(scope).hostname or ""
            if not domain or not self._vault.endswith(f".{domain}"):
                raise foreign(self._name)

    def _ready(self) -> Credential:
        proof = self._read_proof()
        if self._credential is None or proof != self._proof:
            self._forget()
            self._credential, self._proof = self._made(proof), proof
        return self._credential

    def _read_proof(self) -> str:
        """Read the credential file anew: it may have been replaced."""
        if self._auth.file is None:
            return ""
        try:
            return read_credential(self._auth.file).strip()
        except ConfigError as error:
            raise Denied(f"{self._name}: {error}", hint=error.hint) from None

    def _made(self, proof: str) -> Credential:
        auth = self._auth
        common: dict[str, Any] = {"transport": self._transport, **NO_RETRIES}
        if auth.method == "managed-identity":
            # SECURITY: or variables of a pod would make a workload identity of it.
            common["_exclude_workload_identity_credential"] = True
            return ManagedIdentityCredential(client_id=auth.client_id, **common)
        tenant, client = auth.tenant_id or "", auth.client_id or ""
        common["authority"] = self._authority
        if auth.method == "workload-identity":
            path = str(auth.token_file)
            return WorkloadIdentityCredential(
                tenant_id=tenant, client_id=client, token_file_path=path, **common
            )
        # The authority is the one that the file names: nobody else is asked whether it is known.
        common["disable_instance_discovery"] = True
        if auth.method == "client-secret":
            return ClientSecretCredential(tenant, client, proof, **common)
        try:
            self._ends_at = x509.load_pem_x509_certificate(proof.encode()).not_valid_after_utc
            return CertificateCredential(tenant, client, certificate_data=proof.encode(), **common)
        except ValueError:
            pass
        raise Denied(
            f"{self._name}: certificate_file holds no certificate with its RSA key",
            hint="put both into one PEM file, the key without a password",
        )

    def _forget(self) -> None:
        if self._credential is not None:
            with contextlib.suppress(Exception):  # it only closes sockets
                self._credential.close()
        self._credential = self._proof = None

    def _problem(self, error: Exception) -> DestinationError:
        """Tell a refusal from an outage by what was on the wire; the wrapper's text says neither."""
        last = self._session.last
        if isinstance(last, DestinationError):
            return last
        if isinstance(last, Exception):
            return unreachable(f"{self._name}: the login", last, harmless=True)
        if last is None:
            return Denied(
                f"{self._name}: the login was not tried ({type(error).__name__})",
                hint="check tenant_id, client_id and authority",
            )
        return self._judged(last.status_code, last.content, last.headers.get("Retry-After"))

    def _judged(self, status: int, body: bytes, retry_after: str | None) -> DestinationError:
        found = parsed(body)
        if status == 429:
            return Throttled(
                f"{self._name}: the login asks us to slow down", retry_after=pause(retry_after)
            )
        # IMDS says 404 or 410 while it is being updated (Microsoft's page on its errors).
        away = status in (404, 410) if self._auth.method == "managed-identity" else False
        if away or not 400 <= status < 500 or found.get("error") == "temporarily_unavailable":
            return DestinationUnavailable(
                f"{self._name}: the login's answer makes no sense (status {status})", sent=False
            )
        return Denied(f"{self._name}: the login is refused ({status})", hint=self._hint(found))

    def _hint(self, found: Mapping[str, Any]) -> str:
        if self._auth.method == "managed-identity":
            return "give this machine the identity of client_id, or name one that it has"
        codes = found.get("error_codes")
        numbers = [n for n in codes if isinstance(n, int)] if isinstance(codes, list) else []
        known = [_CODES[number] for number in numbers if number in _CODES]
        said = f"AADSTS{numbers[0]}: " if numbers else ""
        return said + (known or ["check tenant_id, client_id and the credential file"])[0]


# --- the wire -----------------------------------------------------------------------------


class Session(requests.Session):
    """Requests to named hosts alone, without redirects, proxies or anything of the surroundings.

    `origins` maps what the SDK asks for to where it goes. `last` is what the last request came to.
    """

    def __init__(self, origins: Mapping[str, str]) -> None:
        super().__init__()
        self.trust_env = False  # SECURITY: no proxy, netrc or CA bundle of the surroundings
        self.last: requests.Response | Exception | None = None
        self._origins = dict(origins)
        for scheme in ("https://", "http://"):
            self.mount(scheme, _Bounded())

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Say that this answer leads nowhere else."""
        return None

    def request(  # type: ignore[override]
        self, method: str, url: str, *more: Any, **named: Any
    ) -> requests.Response:
        """Make one request, and remember what it came to."""
        try:
            self.last = super().request(method, self._placed(url), *more, **named)
        except Exception as error:
            self.last = error
            raise
        return self.last

    def _placed(self, url: str) -> str:
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc}".lower()
        for known in (origin, origin.removesuffix(":443")):
            if known in self._origins:
                to = urlsplit(self._origins[known])
                return parts._replace(scheme=to.scheme, netloc=to.netloc).geturl()
        # SECURITY: a token endpoint or a link to a next page may name any host.
        raise DestinationUnavailable(
            "a request to a host that the connection does not name was refused",
            hint="check vault and authority; what answers there leads somewhere else",
            sent=False,
        )


class _Bounded(BoundedAdapter):
    """Reads the whole answer in time, at most so much of it, whatever the SDK does with it later."""

    def send(self, request: requests.PreparedRequest, *more: Any, **named: Any) -> Any:
        answer = super().send(request, *more, **{**named, "stream": True})
        with answer:
            body = answer.raw.read(ANSWER_LIMIT + 1, decode_content=True)
        if len(body) > ANSWER_LIMIT:
            raise Rejected("the answer is larger than 1 MiB")
        answer.headers.pop("Content-Encoding", None)
        answer.raw = urllib3.HTTPResponse(
            io.BytesIO(body), status=answer.status_code, preload_content=False
        )
        return answer


def transport(session: Session, *, ca_file: str | None, timeout: timedelta) -> RequestsTransport:
    """Return what the SDK sends by."""
    seconds = timeout.total_seconds()
    return RequestsTransport(
        session=session,
        session_owner=False,
        use_env_settings=False,
        connection_timeout=seconds,
        read_timeout=seconds,
        connection_verify=ca_file or True,
    )


def foreign(name: str) -> Denied:
    """Say that a vault asks for a token of somebody else."""
    return Denied(
        f"{name}: the vault names a resource that is not its own, no token was sent",
        hint="check `vault`: something else answers there, or it asks for another domain",
    )


def unreachable(what: str, error: Exception, *, harmless: bool = False) -> DestinationUnavailable:
    """Name a failure below HTTP, by what the network did. `harmless`: a read."""
    found = trouble(error)
    if found is not None:
        sent = found.sent and not harmless
        return DestinationUnavailable(f"{what}: {found.what}", hint=found.hint, sent=sent)
    return DestinationUnavailable(f"{what}: {type(error).__name__}", sent=not harmless)


def parsed(body: bytes) -> dict[str, Any]:
    """Return a JSON object, an empty one where it is something else."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
