"""The seven requests to a Key Vault that we make, through azure-keyvault-secrets, once each.

What comes back is one of our values or one of our errors: by status and error code, never by text.
Sources: Microsoft's reference of the Key Vault REST API 7.4 and its pages on error codes, throttling
and authentication; the inner codes of 403 and 409 as the service sends them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

import urllib3
from azure.core.exceptions import (
    AzureError,
    HttpResponseError,
    ResourceNotFoundError,
    ServiceRequestError,
    ServiceResponseError,
)
from azure.keyvault.secrets import KeyVaultSecret, SecretClient, SecretProperties

from keyturn.destinations.azure_login import (
    NO_RETRIES,
    Login,
    Session,
    foreign,
    parsed,
    transport,
    unreachable,
)
from keyturn.destinations.base import pause
from keyturn.errors import (
    Conflict,
    Denied,
    DestinationError,
    DestinationUnavailable,
    NotFound,
    Rejected,
    Throttled,
)

T = TypeVar("T")

API_VERSION = "7.4"  # sovereign clouds and emulators have it, and it has all that we use
RIGHTS = "Microsoft.KeyVault/vaults/secrets/"
READ, LIST, WRITE = "getSecret/action", "readMetadata/action", "setSecret/action"
UPDATE, RECOVER = "update/action", "recover/action"
MOST_PAGES = 400  # of 25 versions: who has more than 10,000 has to start a new name
NOWHERE = "0" * 32  # a version that no secret has
JSON = "application/json"
_NETWORK = ("ForbiddenByFirewall", "ForbiddenByConnection")
_BUSY = ("ObjectIsBeingDeleted", "ObjectIsBeingRecovered", "ObjectIsBeingCreated")


class Deleted(Conflict):
    """The name belongs to a soft-deleted secret."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """One version of a secret. `value` None where it was not asked for, or is disabled."""

    version: str
    enabled: bool
    created: datetime
    tags: Mapping[str, str]
    value: str | None = field(default=None, repr=False)


class Calls:
    """Requests to one vault. Thread-safe: each thread has a client of its own, all have one login.

    A client of the SDK holds the token of its last challenge without a lock.
    """

    def __init__(
        self, *, vault: str, login: Login, ca_file: str | None, timeout: timedelta, name: str
    ) -> None:
        host = urlsplit(vault).hostname or ""
        # The SDK compares the host of a request with the resource of the challenge, and counts a
        # port as a part of both. The check of the host stands; the port is put back where it sends.
        self._url = f"https://[{host}]" if ":" in host else f"https://{host}"
        self._vault, self._login, self._name = vault, login, name
        self._ca_file, self._timeout = ca_file, timeout
        self._local = threading.local()
        self._sessions: list[Session] = []

    def get(self, secret: str, version: str = "") -> Copy | None:
        """Return a version, the latest by default; None where there is none.

        Of a disabled one the service says neither its version nor its tags: `version` "" then.
        """
        try:
            found = self._ask(READ, secret, lambda c: c.get_secret(secret, version or None))
        except _Disabled:
            return Copy(
                version="", enabled=False, created=datetime.min.replace(tzinfo=UTC), tags={}
            )
        except _Absent:
            return None
        return self._bundle(found, secret)

    def versions(self, secret: str) -> list[Copy]:
        """Return every version without its value, in no order."""
        found: list[Copy] = []
        token: str | None = None
        for _ in range(MOST_PAGES):
            page, token = self._ask(LIST, secret, lambda c, t=token: self._page(c, secret, t))  # type: ignore[misc]
            found += page
            if token is None:
                return found
        raise Rejected(f"{self._name}: the secret has too many versions to look through")

    def put(
        self,
        secret: str,
        value: str,
        *,
        tags: Mapping[str, str],
        not_before: datetime | None,
        expires_on: datetime | None,
    ) -> Copy:
        """Add a version, which is the latest at once. Raises Deleted."""
        found = self._ask(
            WRITE,
            secret,
            lambda client: client.set_secret(
                secret,
                value,
                content_type=JSON,
                enabled=True,
                tags=dict(tags),
                not_before=not_before,
                expires_on=expires_on,
            ),
            harmless=False,
        )
        written = self._bundle(found, secret, sent=True)
        if dict(written.tags) != dict(tags):
            raise self._nonsense("to a write", sent=True)
        return written

    def disable(self, secret: str, version: str) -> None:
        """Disable one version. Its value and its tags stay."""
        found = self._ask(
            UPDATE,
            secret,
            lambda client: client.update_secret_properties(secret, version, enabled=False),
            harmless=False,
        )
        done = self._copy(found, secret, None, sent=True)
        if done.version != version or done.enabled:
            raise self._nonsense("to a change", sent=True)

    def may_update(self, secret: str) -> None:
        """Raise Denied where versions cannot be disabled; asks for one that is not there."""
        with contextlib.suppress(_Absent, Deleted):
            self._ask(UPDATE, secret, lambda c: c.update_secret_properties(secret, NOWHERE))

    def deleted(self, secret: str) -> Mapping[str, str] | None:
        """Return the tags of a soft-deleted secret; None where there is none of that name."""
        try:
            found = self._ask(READ, secret, lambda client: client.get_deleted_secret(secret))
        except _Absent:
            return None
        return self._copy(found.properties, secret, None, deleted=True).tags

    def recover(self, secret: str) -> None:
        """Begin to bring a soft-deleted secret back; it takes a moment until it is there."""
        with contextlib.suppress(_Absent):  # somebody was faster
            self._ask(RECOVER, secret, lambda client: client.begin_recover_deleted_secret(secret))

    def close(self) -> None:
        """Close what is open."""
        for session in self._sessions:
            session.close()

    # --- asking -----------------------------------------------------------------------------

    def _client(self) -> SecretClient:
        client: SecretClient | None = getattr(self._local, "client", None)
        if client is None:
            session = Session({self._url: self._vault})
            self._sessions.append(session)
            client = self._local.client = SecretClient(
                self._url,
                self._login,
                api_version=API_VERSION,
                transport=transport(session, ca_file=self._ca_file, timeout=self._timeout),
                permit_redirects=False,
                **NO_RETRIES,
            )
        return client

    def _ask(
        self,
        right: str,
        secret: str,
        call: Callable[[SecretClient], T],
        *,
        harmless: bool = True,
    ) -> T:
        """Ask once. Where the token is refused, which did nothing: log in anew and ask once more."""
        for again in (True, False):
            try:
                return call(self._client())
            except HttpResponseError as error:
                problem = self._judged(error, right, secret, harmless=harmless)
                refused = error.status_code == 401
            except (AzureError, ValueError, urllib3.exceptions.HTTPError) as error:
                problem = self._broken(error, harmless=harmless)
                refused = False
            if not (refused and again):
                break
            self._login.forget()
        # Outside of the handlers, or the vendor's error would hang on ours as its context.
        raise problem

    def _judged(
        self, error: HttpResponseError, right: str, secret: str, *, harmless: bool
    ) -> DestinationError:
        answer: Any = error.response
        status = error.status_code or 0
        body = parsed(answer.body()) if answer is not None else {}
        inner = _inner_code(body)
        if isinstance(error, ResourceNotFoundError) or status == 404:
            return self._not_found(body)
        if status == 403:
            return self._forbidden(inner, right, secret)
        if status == 409:
            return self._taken(inner)
        if status == 401:
            return Denied(
                f"{self._name}: the vault refuses the token of our login",
                hint="the login must be of the vault's tenant; compare the clocks",
            )
        if status == 429:
            after = answer.headers.get("Retry-After") if answer is not None else None
            return Throttled(f"{self._name}: too many requests", retry_after=pause(after))
        if status in (400, 413):
            return Rejected(
                f"{self._name}: the request was refused ({status})",
                hint="a value is at most 25 kB, with the keys of others in it; tags at most 15",
            )
        if 300 <= status < 400:
            return DestinationUnavailable(
                f"{self._name}: the server sent a redirect, and redirects are refused",
                hint="set `vault` to the address that answers itself",
                sent=not harmless,
            )
        return DestinationUnavailable(
            f"{self._name}: status {status}"
            if status >= 400
            else f"{self._name}: no answer in JSON",
            sent=not harmless,
        )

    def _not_found(self, body: Mapping[str, Any]) -> DestinationError:
        error = body.get("error")
        if isinstance(error, dict) and error.get("code") == "SecretNotFound":
            return _Absent()
        return NotFound(f"{self._name}: what answers there is no vault of that name")

    def _forbidden(self, inner: str, right: str, secret: str) -> DestinationError:
        if inner == "SecretDisabled" and right == READ:
            return _Disabled()
        if inner in _NETWORK:
            return Denied(
                f"{self._name}: the vault's firewall does not let this host in",
                hint="add this host's network to the vault's networking rules",
            )
        return Denied(
            f"{self._name}: the login lacks {RIGHTS}{right} on {secret}",
            hint="compare its roles with `keyturn policy azure`",
        )

    def _taken(self, inner: str) -> DestinationError:
        if inner == "ObjectIsDeletedButRecoverable":
            return Deleted()
        if inner in _BUSY:
            return DestinationUnavailable(
                f"{self._name}: the secret is being deleted or recovered", sent=False
            )
        return Conflict()

    def _broken(self, error: Exception, *, harmless: bool) -> DestinationError:
        if isinstance(error, ServiceRequestError | ServiceResponseError):
            return unreachable(self._name, error, harmless=harmless)
        if type(error) is ValueError and "challenge" in str(error):
            # SECURITY: the SDK's own check, before any token is asked for. Only its text tells.
            return foreign(self._name)
        return DestinationUnavailable(f"{self._name}: {type(error).__name__}", sent=not harmless)

    # --- answers ----------------------------------------------------------------------------

    def _page(
        self, client: SecretClient, secret: str, token: str | None
    ) -> tuple[list[Copy], str | None]:
        pages = client.list_properties_of_secret_versions(secret).by_page(token)
        found = [self._copy(one, secret, None) for one in next(pages)]
        link = getattr(pages, "continuation_token", None)
        return found, self._own_link(link) if link else None

    def _own_link(self, link: str) -> str:
        """Return a link to a next page as the SDK may follow it: at this vault only."""
        parts, to = urlsplit(link), urlsplit(self._vault)
        if parts.scheme != "https" or parts.hostname != to.hostname:
            raise self._nonsense("to a list")
        return parts._replace(netloc=urlsplit(self._url).netloc).geturl()

    def _bundle(self, found: KeyVaultSecret, secret: str, *, sent: bool = False) -> Copy:
        if not isinstance(found.value, str):
            raise self._nonsense("about a secret", sent=sent)
        return self._copy(found.properties, secret, found.value, sent=sent)

    def _copy(
        self,
        found: SecretProperties,
        secret: str,
        value: str | None,
        *,
        deleted: bool = False,
        sent: bool = False,
    ) -> Copy:
        """Take an answer in, if it is about this secret of this vault.

        A deleted one is named in the past tense or the present: only its name is looked at.
        """
        version, created = found.version, found.created_on
        right = (
            urlsplit(found.id or "").hostname == urlsplit(self._vault).hostname
            and (found.name or "").lower() == secret.lower()
            and (bool(version) or deleted)
        )
        if not right or not isinstance(created, datetime):
            raise self._nonsense("about a secret", sent=sent)
        return Copy(
            version=version or "",
            enabled=found.enabled is not False,
            created=created,
            tags=dict(found.tags or {}),
            value=value,
        )

    def _nonsense(self, what: str, *, sent: bool = False) -> DestinationUnavailable:
        return DestinationUnavailable(f"{self._name}: the answer {what} makes no sense", sent=sent)


class _Absent(DestinationError):
    """No such secret, or version."""


class _Disabled(DestinationError):
    """The version is there, and disabled."""


def _inner_code(body: Mapping[str, Any]) -> str:
    error = body.get("error")
    inner = error.get("innererror") or error.get("innerError") if isinstance(error, dict) else None
    code = inner.get("code") if isinstance(inner, dict) else None
    return code if isinstance(code, str) else ""
