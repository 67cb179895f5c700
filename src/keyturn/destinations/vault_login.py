"""Logins to Vault and OpenBao, and the one place from which requests leave.

Nothing of the surroundings is trusted: no environment, no netrc, no proxy, no redirect (hvac follows
a 307 to another host and sends the token along).
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import hvac
import hvac.adapters
import hvac.exceptions as vendor
import requests
import urllib3

from keyturn.destinations.base import pause
from keyturn.destinations.network import BoundedAdapter
from keyturn.destinations.vault_auth import AppRole, AuthOptions, method_of, text_of
from keyturn.errors import (
    Denied,
    DestinationUnavailable,
    KeyturnError,
    Refused,
    Rejected,
    Throttled,
)

RENEW_AT = 2 / 3  # of the token's life
TRY_AGAIN = 5.0  # seconds, to replace a token that still lives
ANSWER_LIMIT = 1024 * 1024
LONGEST_GOODBYE = 2.0  # seconds that a reload or SIGTERM waits for a token's revocation


def canonical(address: str) -> str:
    """Return the one spelling of an address: lower case, no final dot, the port always there."""
    parts = urlsplit(address.lower())
    port = parts.port or {"https": 443, "http": 80}[parts.scheme]
    return f"{parts.scheme}://{(parts.hostname or '').rstrip('.')}:{port}"


Headers = Mapping[str, str | None]


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
        self._method = method_of(auth, name)
        self._name = name
        session = _Unredirected()
        session.mount("https://", BoundedAdapter())
        session.mount("http://", BoundedAdapter())
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
        self._patience = timeout.total_seconds()
        self._closed = False
        self._renew_at = 0.0
        self._ends_at: float | None = None
        self._ours = False
        self._life = 0.0  # of a token as it was given, in seconds
        self.last: float | None = None  # monotonic: when a token that others made ends for good
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

    def try_secret_id(self, secret_id: str) -> None:
        """Log in with a secret id beside the session, and give that token back. Raises Denied."""
        if not isinstance(self._method, AppRole):
            raise Refused(f"{self._name}: the login is no AppRole")
        try:
            body = self._method.with_secret_id(secret_id)
            found = self.send("post", self._door, body, {"X-Vault-Token": None})
        except (vendor.InvalidRequest, vendor.Forbidden) as error:
            raise self._method.refusal(error, worked=True) from None
        token = (found.get("auth") or {}).get("client_token")
        if not token:
            raise DestinationUnavailable(f"{self._name}: the login's answer makes no sense")
        with contextlib.suppress(vendor.VaultError):  # it runs out by itself
            self.send("post", "/v1/auth/token/revoke-self", None, {"X-Vault-Token": token})

    def look_at_wrapping(self) -> str:
        """Say that a login by a wrapped secret id would be possible, without making it.

        A wrapping token can be used once: whoever only looks must leave it to the daemon.
        """
        if not isinstance(self._method, AppRole):
            raise Refused(f"{self._name}: nothing is wrapped")
        self._method.look_at_wrapping(self.send)
        return (
            "the wrapped secret id is whole and was left for the daemon; so nothing else was seen"
        )

    def close(self) -> None:
        """Revoke the token, if we got it by a login; the server may be away already.

        Neither a login that hangs nor the server's answer is waited for: a reload and SIGTERM come
        through here.
        """
        self._closed = True  # a login that is still under way gives its token back by itself
        if self._ours and self._client.token is not None:
            leaving = threading.Thread(target=self._give_back, name="goodbye", daemon=True)
            leaving.start()
            leaving.join(LONGEST_GOODBYE)
        self._client.adapter.close()  # idle connections; those of calls under way go on

    def _give_back(self) -> None:
        # Where the server is away the token runs out by itself.
        with contextlib.suppress(
            vendor.VaultError, requests.RequestException, urllib3.exceptions.HTTPError, KeyturnError
        ):
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

    @property
    def _door(self) -> str:
        return f"/v1/auth/{self._auth.place}/login"

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one thread log in at a time. Raises DestinationUnavailable where that one takes long."""
        if not self._guard.acquire(timeout=self._patience):
            raise DestinationUnavailable(f"{self._name}: a login is under way", sent=False)
        try:
            yield
        finally:
            self._guard.release()

    def _ready(self) -> str | None:
        with self._alone():
            if self._client.token is None:
                self._log_in()
            elif time.monotonic() >= self._renew_at:
                self._renew()
            return self._client.token  # type: ignore[no-any-return]

    def _again(self, refused: str | None) -> bool:
        """Log in anew unless another thread has; False where that cannot help."""
        with self._alone():
            if self._client.token != refused:
                return True
            if self._method is None:
                fresh = text_of(self._auth.token_file, self._name)
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
        if self._method is None:
            self._client.token = text_of(self._auth.token_file, self._name)
            self._ours = False
            self._read_life()
            return
        body = self._method.credentials(self.send)
        try:
            found = self.send("post", self._door, body, {"X-Vault-Token": None})
        except (vendor.InvalidRequest, vendor.Forbidden) as error:
            raise self._method.refusal(error, worked=self._logins > 0) from None
        answer = found.get("auth") if isinstance(found, dict) else None
        if not isinstance(answer, dict) or not answer.get("client_token"):
            raise DestinationUnavailable(f"{self._name}: the login's answer makes no sense")
        self._client.token = answer["client_token"]
        self._ours = True
        self._began(answer.get("num_uses"))
        self._lives(answer.get("lease_duration"), renewable=bool(answer.get("renewable")))
        self._life = float(answer.get("lease_duration") or 0)
        if self._closed:
            self._give_back()
            raise DestinationUnavailable(f"{self._name}: closed", sent=False)

    def _renew(self) -> None:
        try:
            found = self._client.adapter.post("/v1/auth/token/renew-self", json={})
        except (vendor.Forbidden, vendor.InvalidRequest, vendor.InternalServerError):
            # OpenBao 2.7 answers 500 where the token has just come to its maximum, and 403 where
            # Kubernetes does not confirm the token that the login was made with [measured].
            if self._ours:
                self._replace()
            else:
                self.last = self._ends_at
                self._renew_at = time.monotonic() + 60
            return
        auth = found.get("auth") or {}
        seconds = auth.get("lease_duration")
        if self._ours and self._life and (seconds or 0) < self._life / 2:
            # Its maximum is near: a token that ends inside of a request makes the server answer 500.
            self._replace()
            return
        self._lives(seconds, renewable=bool(auth.get("renewable")))
        if not self._ours and (seconds or 0) < self._life:
            self.last = self._ends_at  # it was given less than the first time: its maximum is near

    def _replace(self) -> None:
        """Log in anew before the token ends; where that is not possible now, it is used on."""
        try:
            self._log_in()
        except DestinationUnavailable:
            left = (self._ends_at or 0.0) - time.monotonic()
            if left <= 0:
                self._client.token = None
                raise
            self._renew_at = time.monotonic() + min(TRY_AGAIN, left)
        except Denied:
            self._client.token = None
            raise

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
        self._life = float(data.get("period") or data.get("creation_ttl") or 0)
        self.last = None if data.get("renewable") else self._ends_at
        if data.get("explicit_max_ttl"):
            since = time.time() - float(data.get("creation_time") or time.time())
            self.last = time.monotonic() + float(data["explicit_max_ttl"]) - since

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
        raise Throttled("the server asks us to slow down", retry_after=pause(retry_after))
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
