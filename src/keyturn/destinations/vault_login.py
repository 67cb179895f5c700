"""Logins to Vault and OpenBao, and the one place from which requests leave.

Nothing of the surroundings is trusted: no environment, no netrc, no proxy, no redirect (hvac follows
a 307 to another host and sends the token along).
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import hvac
import hvac.adapters
import hvac.exceptions as vendor
import requests
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from keyturn.credential_file import read_credential
from keyturn.destinations.base import Form
from keyturn.errors import (
    ConfigError,
    Denied,
    DestinationUnavailable,
    KeyturnError,
    Rejected,
    Throttled,
)

RENEW_AT = 2 / 3  # of the token's life
ANSWER_LIMIT = 1024 * 1024
LONGEST_RETRY_AFTER = 300
WRAPPED_BY = "secret-id"  # end of the only path that may have made a wrapped secret id
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


def is_safe_address(address: str) -> bool:
    """Whether an address is https, or http on this host; nothing but scheme, host and port."""
    parts = urlsplit(address)
    plain = not (parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc)
    safe = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK)
    return plain and safe and bool(parts.hostname)


def _file(value: object) -> Path:
    if not isinstance(value, str) or not value.startswith("/"):
        raise ValueError
    return Path(value)


Headers = Mapping[str, str | None]
CredentialFile = Annotated[Path | None, BeforeValidator(_file), Form("an absolute path")]


class AuthOptions(BaseModel):
    """How to log in. Secrets are only ever named by file."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, hide_input_in_errors=True, validate_default=False
    )

    method: Annotated[
        Literal["token", "approle"],
        Form("token or approle"),
        Field(description="token: a file with a token; approle: role id and secret id"),
    ]
    token_file: Annotated[CredentialFile, Field(description="file that holds the token")] = None
    role_id: Annotated[str | None, Form("a role id"), Field(description="role id, public")] = None
    role_id_file: Annotated[CredentialFile, Field(description="file that holds the role id")] = None
    secret_id_file: Annotated[
        CredentialFile, Field(description="file that holds the secret id, or a wrapping token")
    ] = None
    wrapped: Annotated[
        bool, Form("true or false"), Field(description="the file holds a wrapping token")
    ] = False
    mount: Annotated[
        str, Form("the mount of the auth method"), Field(description="mount of the method")
    ] = "approle"

    @model_validator(mode="after")
    def _whole(self) -> AuthOptions:
        if self.method == "token":
            good = self.token_file is not None
        else:
            role = (self.role_id is None) != (self.role_id_file is None)
            good = role and self.secret_id_file is not None
        if not good:
            raise ValueError
        return self


class Login:
    """A session with a token that is renewed at two thirds of its life. Thread-safe."""

    def __init__(
        self,
        *,
        address: str,
        auth: AuthOptions,
        namespace: str | None,
        ca_file: str | None,
        timeout: timedelta,
        name: str,
    ) -> None:
        self._auth = auth
        self._name = name
        session = _Unredirected()
        session.trust_env = False  # SECURITY: no proxy, netrc or CA bundle of the surroundings
        session.verify = ca_file or True  # hvac takes this from the session, not from its argument
        self._client = hvac.Client(
            url=address,
            token="",
            namespace=namespace,
            timeout=timeout.total_seconds(),
            session=session,
            allow_redirects=False,
            adapter=_Careful,
        )
        self._client.token = None
        self._guard = threading.Lock()
        self._renew_at = 0.0
        self._ends_at: float | None = None
        self._ours = False
        self._life = 0.0  # of a token as it was given, in seconds
        self._logins = 0
        self.limited = False  # whether the token has a limited number of uses

    def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        *,
        headers: Headers | None = None,
    ) -> Any:
        """Make one request. Where the token was refused: log in anew and make it once more."""
        token = self._ready()
        try:
            return self.send(method, path, body, headers)
        except vendor.Forbidden:
            if not self._again(token):
                raise
        return self.send(method, path, body, headers)

    def session(self) -> int:
        """Log in if need be, and return the number of the login: another one, another session."""
        self._ready()
        return self._logins

    @property
    def ends_in(self) -> timedelta | None:
        """How long the token lives unless it is renewed; None if for ever, or before a login."""
        ends_at = self._ends_at
        return None if ends_at is None else timedelta(seconds=ends_at - time.monotonic())

    def check(self) -> str:
        """Log in and say how long the token lives."""
        self._ready()
        found = self.send("get", "/v1/auth/token/lookup-self", None)
        ttl = (found.get("data") or {}).get("ttl")
        life = f"lives {ttl} s" if ttl else "does not end"  # a root token has none
        return f"logged in by {self._auth.method}, token {life}"

    def close(self) -> None:
        """Revoke the token, if we got it by a login; the server may be away already."""
        with self._guard:
            if not self._ours or self._client.token is None:
                return
            # Where the server is away the token runs out by itself.
            with contextlib.suppress(vendor.VaultError, requests.RequestException, KeyturnError):
                self.send("post", "/v1/auth/token/revoke-self", None)
            self._client.token = None

    def send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        headers: Headers | None = None,
    ) -> Any:
        """Make one request with what there is. `headers` win over ours; None takes one away."""
        call = getattr(self._client.adapter, method)
        more = {} if body is None else {"json": dict(body)}
        return call(path, headers=headers, **more)

    # --- the token --------------------------------------------------------------------------

    def _ready(self) -> str | None:
        with self._guard:
            if self._client.token is None:
                self._log_in()
            elif time.monotonic() >= self._renew_at:
                self._renew()
            return self._client.token  # type: ignore[no-any-return]

    def _again(self, refused: str | None) -> bool:
        """Log in anew unless another thread has; False where that cannot help."""
        with self._guard:
            if self._client.token != refused:
                return True
            if self._auth.method == "token":
                fresh = _text_of(self._auth.token_file, self._name)
                if fresh == refused:
                    return False
            elif self._still_good():
                return False  # a good token without the right: a login would not help
            self._client.token = None
            self._log_in()
            return True

    def _still_good(self) -> bool:
        try:
            self.send("get", "/v1/auth/token/lookup-self", None)
        except vendor.Forbidden:
            return False
        return True

    def _log_in(self) -> None:
        if self._auth.method == "token":
            self._client.token = _text_of(self._auth.token_file, self._name)
            self._ours = False
            self._read_life()
            return
        role = self._auth.role_id or _text_of(self._auth.role_id_file, self._name)
        secret_id = _text_of(self._auth.secret_id_file, self._name)
        if self._auth.wrapped:
            secret_id = self._unwrapped(secret_id)
        answer = self._login_call(role, secret_id)
        self._client.token = answer["client_token"]
        self._ours = True
        self._began(answer.get("num_uses"))
        self._lives(answer.get("lease_duration"), renewable=bool(answer.get("renewable")))
        self._life = float(answer.get("lease_duration") or 0)

    def _login_call(self, role: str, secret_id: str) -> dict[str, Any]:
        body = {"role_id": role, "secret_id": secret_id}
        try:
            found = self._client.adapter.post(f"/v1/auth/{self._auth.mount}/login", json=body)
        except (vendor.InvalidRequest, vendor.Forbidden):
            raise Denied(
                f"{self._name}: the AppRole login is refused",
                hint="check role id and secret id, and whether the secret id has run out",
            ) from None
        auth = found.get("auth") if isinstance(found, dict) else None
        if not isinstance(auth, dict) or not auth.get("client_token"):
            raise DestinationUnavailable(f"{self._name}: the login's answer makes no sense")
        return auth

    def _unwrapped(self, wrapping: str) -> str:
        """Unwrap a secret id once, if its creation path is that of a secret id.

        SECURITY: whoever can put a token into the file could otherwise hand us one that they made.
        """
        if self._secret_id is not None and self._wrapping == wrapping:
            return self._secret_id
        try:
            found = self._client.adapter.post("/v1/sys/wrapping/lookup", json={"token": wrapping})
            made_by = str((found.get("data") or {}).get("creation_path", ""))
            expected = f"auth/{self._auth.mount}/role/"
            if not (made_by.startswith(expected) and made_by.endswith(f"/{WRAPPED_BY}")):
                raise Denied(f"{self._name}: the wrapping token was not made for a secret id")
            # No login yet: the wrapping token itself is what lets it be unwrapped.
            found = self._client.adapter.post(
                "/v1/sys/wrapping/unwrap", json={}, headers={"X-Vault-Token": wrapping}
            )
        except (vendor.InvalidRequest, vendor.Forbidden):
            raise Denied(
                f"{self._name}: the wrapping token is used up or has run out",
                hint="if nobody of yours used it, somebody else did: revoke the secret id",
            ) from None
        self._wrapping, self._secret_id = wrapping, str(found["data"]["secret_id"])
        return self._secret_id

    _wrapping: str | None = None
    _secret_id: str | None = None

    def _renew(self) -> None:
        try:
            found = self._client.adapter.post("/v1/auth/token/renew-self", json={})
        except (vendor.Forbidden, vendor.InvalidRequest, vendor.InternalServerError):
            # OpenBao 2.7 answers 500 where the token has just come to its maximum [measured].
            if self._ours:
                self._client.token = None
                self._log_in()
            else:
                self._renew_at = time.monotonic() + 60
            return
        auth = found.get("auth") or {}
        seconds = auth.get("lease_duration")
        if self._ours and self._life and (seconds or 0) < self._life / 2:
            # Its maximum is near: a token that ends inside of a request makes the server answer 500.
            self._log_in()
            return
        self._lives(seconds, renewable=bool(auth.get("renewable")))

    def _read_life(self) -> None:
        try:
            found = self.send("get", "/v1/auth/token/lookup-self", None)
        except vendor.Forbidden:
            self._client.token = None
            raise Denied(
                f"{self._name}: the token is refused", hint="put a valid one into token_file"
            ) from None
        data = found.get("data") or {}
        self._began(data.get("num_uses"))
        self._lives(data.get("ttl"), renewable=bool(data.get("renewable")))

    def _began(self, uses: object) -> None:
        self._logins += 1
        self.limited = isinstance(uses, int) and uses > 0

    def _lives(self, seconds: object, *, renewable: bool) -> None:
        life = float(seconds) if isinstance(seconds, int | float) and seconds else 0.0
        self._ends_at = time.monotonic() + life if life else None
        forever = not life or (not renewable and not self._ours)
        self._renew_at = float("inf") if forever else time.monotonic() + life * RENEW_AT


class _Unredirected(requests.Session):
    """A session for which there are no redirects: requests would read all of their bodies first."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Say that this answer leads nowhere else."""
        return None


class _Careful(hvac.adapters.JSONAdapter):  # type: ignore[misc]
    """hvac's adapter without redirects, with a bound on what an answer may weigh."""

    def request(
        self,
        method: str,
        url: str,
        headers: Any = None,
        raise_exception: bool = True,
        **kwargs: Any,
    ) -> Any:
        del raise_exception
        address = self.urljoin(self.base_uri, url)
        ours = {
            "X-Vault-Request": "true",
            "X-Vault-Token": self.token or None,
            "X-Vault-Namespace": self.namespace or None,
        }
        sent = {k: v for k, v in {**ours, **(headers or {})}.items() if v is not None}
        kwargs = {**self._kwargs, **kwargs, "allow_redirects": False, "stream": True}
        with self.session.request(method, address, headers=sent, **kwargs) as answer:
            body = answer.raw.read(ANSWER_LIMIT + 1, decode_content=True)
            return _judged(answer.status_code, body, answer.headers.get("Retry-After"))


def _judged(status: int, body: bytes, retry_after: str | None) -> Any:
    if len(body) > ANSWER_LIMIT:
        raise Rejected("the answer is larger than 1 MiB")
    if 300 <= status < 400:
        # Retryable: a standby redirects as well when a call that it forwarded broke, so it may have
        # landed; the next try finds a leader, or says the same until a person changes the address.
        raise DestinationUnavailable(
            "the server sent a redirect, and redirects are refused",
            hint="set the connection's address to the node or load balancer that answers itself",
        )
    if status == 429:
        raise Throttled("the server asks us to slow down", retry_after=_pause(retry_after))
    try:
        found = json.loads(body) if body else {}
    except ValueError:
        if status < 400:
            raise DestinationUnavailable("the answer is no JSON") from None
        found = {}
    if status < 400:
        return found
    errors = found.get("errors") if isinstance(found, dict) else None
    raise vendor.VaultError.from_status(
        status, "refused", errors=errors or [], method="", url="", text="", json=found
    )


def _pause(retry_after: str | None) -> timedelta:
    """Read a Retry-After of seconds (RFC 9110, 10.2.3), bounded: a server must not park us."""
    seconds = int(retry_after) if retry_after and retry_after.isdecimal() else 1
    return timedelta(seconds=min(max(seconds, 1), LONGEST_RETRY_AFTER))


def _text_of(path: Path | None, name: str) -> str:
    try:
        return read_credential(path).strip() if path is not None else ""
    except ConfigError as error:
        raise Denied(f"{name}: {error}", hint=error.hint) from None
