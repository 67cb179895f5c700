"""AppRole as the authority of our own secret id: it makes, knows and destroys them by accessor.

Each that we have made carries its version and our store in its metadata, so one whose answer was
lost is found again; tokens that came of it carry them too, in the server's audit. Tokens outlive
the secret id that they were got with [measured at OpenBao 2.7]. Sources: the AppRole API pages of
both projects, `path_role.go` of their AppRole method.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import hvac.exceptions as vendor

from keyturn.core.secret import Secret
from keyturn.credential_file import refuse_unwritable, replace_credential
from keyturn.destinations.vault_auth import AuthOptions, text_of
from keyturn.destinations.vault_login import Login
from keyturn.errors import (
    ConfigError,
    Conflict,
    Denied,
    DestinationUnavailable,
    NotFound,
    Rejected,
)
from keyturn.ports import NOT_KNOWN, Abilities, OwnIssued, OwnLogin, OwnSeen

VERSION, OWNER = "keyturn-version", "keyturn-owner"
NO_END = "it does not end"
NEVER = ("", "0001-01-01T00:00:00Z")
T = TypeVar("T")


def rights(auth: AuthOptions) -> dict[str, tuple[str, ...]]:
    """Return the capabilities that looking after our own secret id needs, by API path."""
    if auth.method != "approle" or auth.role is None:
        return {}
    role = _place(auth)
    found: dict[str, tuple[str, ...]] = {f"{role}/secret-id/lookup": ("update",)}
    if auth.rotate is not None:
        found[f"{role}/secret-id"] = ("list", "update")
        found[f"{role}/secret-id-accessor/lookup"] = ("update",)
        found[f"{role}/secret-id-accessor/destroy"] = ("update",)
    return found


class SecretIds:
    """Implements `ports.OwnAuthority` for one connection. Thread-safe."""

    abilities = Abilities(
        max_accepted=1000, accepts_chosen_secret=False, can_read_back=False, reports_use=False
    )

    def __init__(
        self, auth: AuthOptions, login: Login, name: str, call: Callable[[Callable[[], Any]], Any]
    ) -> None:
        self._auth, self._login, self._name, self._call = auth, login, name, call
        self._file = auth.secret_id_file or Path()

    def look(self) -> OwnSeen:
        """Ask the server about what the file holds."""
        found: OwnSeen = self._call(lambda: self._look(self._text()))
        return found

    def seen(self) -> OwnSeen:
        """The same as `look`, from inside of a call."""
        return self._look(self._text())

    def refuse_unwritable(self) -> None:
        """Raise Denied where the file could not be replaced."""
        self._filed(lambda: refuse_unwritable(self._file))

    def issue(self, version_id: str, *, owner: str) -> OwnIssued:
        """Have the server make a secret id that carries this id."""
        found: OwnIssued = self._call(lambda: self._issue(version_id, owner))
        return found

    def find(self, version_ids: Sequence[str]) -> Mapping[str, OwnSeen]:
        """Look through the role's accessors for these ids."""
        found: Mapping[str, OwnSeen] = self._call(lambda: self._find(frozenset(version_ids)))
        return found

    def prove(self, secret: Secret | None) -> None:
        """Log in with it, beside the session, and give that token back."""
        self._call(lambda: self._login.try_secret_id(secret.reveal() if secret else self._text()))

    def publish(self, secret: Secret, *, expected: str) -> None:
        """Replace the file."""
        self._call(lambda: self._publish(secret, expected))

    def destroy(self, accessor: str) -> None:
        """Destroy the secret id of this accessor."""
        self._call(lambda: self._destroy(accessor))

    # --- requests ---------------------------------------------------------------------------

    def _look(self, text: str) -> OwnSeen:
        found = self._ask("post", "secret-id/lookup", {"secret_id": text})
        data = found.get("data") if isinstance(found, dict) else None
        if not data:  # 204: the role has none of this text
            raise Denied(
                f"{self._name}: the role {self._auth.role} does not know the secret id in"
                f" {self._file}",
                hint="it was destroyed or has run out, or auth.role names another role: put a new"
                f" one there, `vault write -f -field=secret_id {_place(self._auth)}/secret-id`",
            )
        return _seen(data)

    def _issue(self, version_id: str, owner: str) -> OwnIssued:
        marks = json.dumps({VERSION: version_id, OWNER: owner})
        data = self._ask("post", "secret-id", {"metadata": marks}).get("data") or {}
        text, accessor = data.get("secret_id"), data.get("secret_id_accessor")
        if not text or not accessor:
            raise DestinationUnavailable(
                f"{self._name}: the answer to a new secret id makes no sense"
            )
        life = data.get("secret_id_ttl") or 0
        ends_at = datetime.now(UTC) + timedelta(seconds=life) if life else None
        if data.get("secret_id_num_uses"):
            self._destroy(accessor)
            raise Rejected(
                f"{self._name}: secret ids of the role {self._auth.role} have a limited number of"
                " uses, and each login takes one",
                hint=f"vault write {_place(self._auth)} secret_id_num_uses=0",
            )
        return OwnIssued(secret=Secret(str(text)), accessor=str(accessor), ends_at=ends_at)

    def _find(self, version_ids: frozenset[str]) -> Mapping[str, OwnSeen]:
        try:
            listed = self._ask("list", "secret-id", None)
        except NotFound:
            return {}  # the role has none
        found = {}
        for accessor in (listed.get("data") or {}).get("keys") or ():
            data = self._known(str(accessor))
            version_id = (data.get("metadata") or {}).get(VERSION)
            if version_id in version_ids:
                found[version_id] = _seen({**data, "secret_id_accessor": accessor})
        return found

    def _known(self, accessor: str) -> dict[str, Any]:
        try:
            found = self._ask("post", "secret-id-accessor/lookup", {"secret_id_accessor": accessor})
        except NotFound:
            return {}
        data = found.get("data") if isinstance(found, dict) else None
        return data if isinstance(data, dict) else {}

    def _destroy(self, accessor: str) -> None:
        """Look first: for one that is gone the server answers 500, as it does where it fails."""
        if self._known(accessor):
            path = "secret-id-accessor/destroy"
            self._ask("post", path, {"secret_id_accessor": accessor})

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        full = f"/v1/{_place(self._auth)}/{path}"
        try:
            return self._login.request(method, full, body)
        except vendor.InvalidPath:
            raise NotFound(f"{self._name}: there is no {full[4:]}") from None
        except vendor.Forbidden:
            raise Denied(
                f"{self._name}: the login lacks {'list' if method == 'list' else 'update'}"
                f" on {full[4:]}",
                hint="compare its policy with `keyturn policy vault`",
            ) from None
        except vendor.InvalidRequest:
            raise Rejected(
                f"{self._name}: the server refuses {full[4:]} (400)",
                hint=f"check that auth.role names the role of this login: {self._auth.role}",
            ) from None

    # --- the file ---------------------------------------------------------------------------

    def _text(self) -> str:
        return text_of(self._file, self._name)

    def _publish(self, secret: Secret, expected: str) -> None:
        if self._look(self._text()).accessor != expected:
            raise Conflict
        self._filed(lambda: replace_credential(self._file, secret.reveal()))

    def _filed(self, body: Callable[[], T]) -> T:
        try:
            return body()
        except ConfigError as error:
            raise Denied(f"{self._name}: {error}", hint=error.hint) from None
        except OSError as error:
            raise DestinationUnavailable(
                f"{self._name}: {self._file} cannot be written (errno {error.errno})",
                hint="see the disk's space; the secret id before it is in force",
                sent=False,
            ) from None


def own_login(auth: AuthOptions, login: Login, secret_ids: SecretIds) -> OwnLogin:
    """Say when this login ends unless a person does something. May log in; raises DestinationErrors."""
    if auth.method == "kubernetes":
        return OwnLogin(method="kubernetes", note="kubelet replaces the service account's token")
    if auth.method == "token":
        login.session()
        if login.last is None:
            note = (
                "it is renewed; its maximum shows when it comes near" if login.ends_in else NO_END
            )
            return OwnLogin(method="token", note=note)
        left = timedelta(seconds=login.last - time.monotonic())
        return OwnLogin(method="token", ends_at=datetime.now(UTC) + left)
    if auth.wrapped:
        return OwnLogin(method="approle", note=f"{NOT_KNOWN}it was unwrapped in memory")
    if auth.role is None:
        return OwnLogin(method="approle", note=f"{NOT_KNOWN}name the role under auth.role")
    ends_at = secret_ids.seen().ends_at
    return OwnLogin(method="approle", ends_at=ends_at, note="" if ends_at else NO_END)


def _place(auth: AuthOptions) -> str:
    return f"auth/{auth.place}/role/{auth.role}"


def _seen(data: Mapping[str, Any]) -> OwnSeen:
    marks = data.get("metadata") or {}
    return OwnSeen(
        accessor=str(data.get("secret_id_accessor", "")),
        owner=str(marks.get(OWNER, "")),
        made_at=_instant(data.get("creation_time")),
        ends_at=_instant(data.get("expiration_time")),
    )


def _instant(text: object) -> datetime | None:
    """Read a time as Go writes it, with up to nine digits of a second; the first year means never."""
    if not isinstance(text, str) or text in NEVER:
        return None
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except ValueError:
        return None
