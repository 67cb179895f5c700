"""The ways to log in to Vault and OpenBao: what each is given, reads and sends, and what a no means.

A token from a file is no login; every other method is one class here, and `vault_login` keeps the
token that it brings. Sources: the AppRole and Kubernetes auth pages of both projects, and
`path_login.go` of their Kubernetes method.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import hvac.exceptions as vendor
from pydantic import BaseModel, BeforeValidator, Field, model_validator

from keyturn.core.duration import FORM
from keyturn.credential_file import CREDENTIAL_FORM, credential_path, read_credential
from keyturn.destinations.base import (
    ConnectionOptions,
    CredentialFile,
    Form,
    duration,
    is_plain,
)
from keyturn.errors import ConfigError, Denied, DestinationError, DestinationUnavailable

WRAPPED_BY = "secret-id"  # end of the only path that may have made a wrapped secret id
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
AUTH_FORM = (
    "a method with its own keys alone: token with token_file, approle with secret_id_file and one of"
    " role_id and role_id_file (with rotate also role, and without wrapped), or kubernetes with role"
)
ROTATE_FORM = "a mapping with every and grace, such as {every: 7d, grace: 1d}, grace not the longer"
_PROJECTED = f"{CREDENTIAL_FORM} (kubernetes: {SERVICE_ACCOUNT} by default)"


def plain_place(value: object) -> str:
    """Return the one spelling of a mount or a namespace. Raises ValueError for an odd one.

    SECURITY: servers take `/a/`, `a//b`, `./a` and `a%2Fb` as well, and two spellings of one place
    would be two owners of its entries.
    """
    bare = value.removeprefix("/").removesuffix("/") if isinstance(value, str) else ""
    if not is_plain(bare):
        raise ValueError
    return bare


def _role(value: object) -> object:
    """SECURITY: it becomes part of a path, and `x/../y` is another role."""
    if value is not None and not (isinstance(value, str) and is_plain(value) and "/" not in value):
        raise ValueError
    return value


# What may stand beside `method`, by method.
_BELONGS = {
    "token": {"token_file"},
    "approle": {"role", "role_id", "role_id_file", "secret_id_file", "wrapped", "mount", "rotate"},
    "kubernetes": {"role", "token_file", "mount"},
}


class RotateOptions(BaseModel):
    """How the secret id is replaced by Keyturn itself."""

    model_config = ConnectionOptions.model_config

    every: Annotated[
        timedelta,
        BeforeValidator(duration),
        Form(FORM),
        Field(description="oldest that a secret id gets; earlier where the role ends it earlier"),
    ]
    grace: Annotated[
        timedelta,
        BeforeValidator(duration),
        Form(FORM),
        Field(description="time until the one before is destroyed"),
    ] = timedelta(days=1)

    @model_validator(mode="after")
    def _in_turn(self) -> RotateOptions:
        if self.grace > self.every:
            raise ValueError
        return self


class AuthOptions(BaseModel):
    """How to log in. Secrets are only ever named by file."""

    model_config = ConnectionOptions.model_config

    method: Annotated[
        Literal["token", "approle", "kubernetes"],
        Form("token, approle or kubernetes"),
        Field(
            description="token: a file with a token; approle: role id and secret id;"
            " kubernetes: the pod's service account"
        ),
    ]
    token_file: Annotated[
        Path | None,
        BeforeValidator(credential_path),
        Form(_PROJECTED),
        Field(description="file that holds the token; kubernetes: of the service account"),
    ] = None
    role: Annotated[
        str | None,
        BeforeValidator(_role),
        Form("a role's name"),
        Field(
            description="kubernetes: role to log in by; approle: name of the role of role_id, so"
            " that the end of the secret id can be asked for"
        ),
    ] = None
    role_id: Annotated[str | None, Form("a role id"), Field(description="role id, public")] = None
    role_id_file: Annotated[CredentialFile, Field(description="file that holds the role id")] = None
    secret_id_file: Annotated[
        CredentialFile, Field(description="file that holds the secret id, or a wrapping token")
    ] = None
    wrapped: Annotated[
        bool, Form("true or false"), Field(description="the file holds a wrapping token")
    ] = False
    mount: Annotated[
        str | None,
        BeforeValidator(plain_place),
        Form("the mount of the auth method such as kubernetes or k8s/eu"),
        Field(description="mount of the method, by default its name"),
    ] = None
    rotate: Annotated[
        RotateOptions | None,
        Form(ROTATE_FORM),
        Field(description="replace the secret id by ourselves (docs/howto/own-logins.md)"),
    ] = None

    @model_validator(mode="after")
    def _whole(self) -> AuthOptions:
        if self.method == "token":
            good = self.token_file is not None
        elif self.method == "kubernetes":
            good = bool(self.role)
        else:
            role = (self.role_id is None) != (self.role_id_file is None)
            good = role and self.secret_id_file is not None
            good = good and (self.rotate is None or (self.role is not None and not self.wrapped))
        if not good or self.model_fields_set - _BELONGS[self.method] - {"method"}:
            raise ValueError
        return self

    @property
    def place(self) -> str:
        """Where the method is mounted."""
        return self.mount or self.method


class Send(Protocol):
    """Makes one request; raises what hvac raises."""

    def __call__(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        headers: Mapping[str, str | None] | None = None,
    ) -> Any:
        """Make it."""
        ...


class Method(Protocol):
    """A way to log in at `auth/MOUNT/login`."""

    def credentials(self, send: Send) -> Mapping[str, str]:
        """Read what the login sends, anew: files are replaced. Raises Denied."""
        ...

    def refusal(self, error: vendor.VaultError, *, worked: bool) -> DestinationError:
        """Say what a 400 or 403 means; `worked` if this way has brought a token before."""
        ...


def method_of(auth: AuthOptions, name: str) -> Method | None:
    """Return the way to log in, or None for a token that somebody else has made."""
    if auth.method == "token":
        return None
    return Kubernetes(auth, name) if auth.method == "kubernetes" else AppRole(auth, name)


class AppRole:
    """A role id and a secret id, which may come wrapped."""

    def __init__(self, auth: AuthOptions, name: str) -> None:
        self._auth, self._name = auth, name
        self._unwrapped: tuple[str, str] | None = None  # wrapping token, secret id

    def credentials(self, send: Send) -> Mapping[str, str]:
        """Read role id and secret id."""
        secret_id = text_of(self._auth.secret_id_file, self._name)
        if self._auth.wrapped:
            secret_id = self._unwrap(secret_id, send)
        return self.with_secret_id(secret_id)

    def with_secret_id(self, secret_id: str) -> Mapping[str, str]:
        """Return what a login with this secret id sends."""
        role = self._auth.role_id or text_of(self._auth.role_id_file, self._name)
        return {"role_id": role, "secret_id": secret_id}

    def refusal(self, error: vendor.VaultError, *, worked: bool) -> DestinationError:
        """Both servers say no more than no."""
        del error, worked
        return Denied(
            f"{self._name}: the AppRole login is refused",
            hint="check role id and secret id, and whether the secret id has run out",
        )

    def _unwrap(self, wrapping: str, send: Send) -> str:
        """Unwrap a secret id once, if its creation path is that of a secret id.

        SECURITY: whoever can put a token into the file could otherwise hand us one that they made.
        """
        if self._unwrapped is not None and self._unwrapped[0] == wrapping:
            return self._unwrapped[1]
        self._look(wrapping, send)
        try:
            # No login yet: the wrapping token itself is what lets it be unwrapped.
            own = {"X-Vault-Token": wrapping}
            found = send("post", "/v1/sys/wrapping/unwrap", {}, own)
        except (vendor.InvalidRequest, vendor.Forbidden):
            raise self._used_up() from None
        secret_id = str(found["data"]["secret_id"])
        self._unwrapped = wrapping, secret_id
        return secret_id

    def look_at_wrapping(self, send: Send) -> None:
        """Raise Denied where the wrapping token in the file is of no use; it is not used up."""
        self._look(text_of(self._auth.secret_id_file, self._name), send)

    def _look(self, wrapping: str, send: Send) -> None:
        try:
            found = send("post", "/v1/sys/wrapping/lookup", {"token": wrapping})
        except (vendor.InvalidRequest, vendor.Forbidden):
            raise self._used_up() from None
        made_by = str((found.get("data") or {}).get("creation_path", ""))
        expected = f"auth/{self._auth.place}/role/"
        if not (made_by.startswith(expected) and made_by.endswith(f"/{WRAPPED_BY}")):
            raise Denied(f"{self._name}: the wrapping token was not made for a secret id")

    def _used_up(self) -> Denied:
        return Denied(
            f"{self._name}: the wrapping token is used up or has run out",
            hint="if nobody of yours used it, somebody else did: revoke the secret id",
        )


class Kubernetes:
    """The service account of our pod: kubelet replaces its token long before it ends."""

    def __init__(self, auth: AuthOptions, name: str) -> None:
        self._auth, self._name = auth, name
        self._file = auth.token_file or SERVICE_ACCOUNT
        self._ends_at: float | None = None  # of the token that was sent last, by its own claims

    def credentials(self, send: Send) -> Mapping[str, str]:
        """Read the token that is projected now.

        SECURITY: anybody may be able to read it, for this file alone. Kubelet projects it 0644
        unless the pod has an fsGroup (0640) or one user for all of its containers (0600); it lies in
        memory, in the pod's own volume below a folder of root's, and ends with the pod (ADR 14).
        """
        del send
        token = text_of(self._file, self._name, anybody_may_read=True)
        self._ends_at = _end_of(token)
        return {"role": str(self._auth.role), "jwt": token}

    def refusal(self, error: vendor.VaultError, *, worked: bool) -> DestinationError:
        """Tell what is wrong from a review that could not be made, as far as the server does.

        They name what is wrong with the token or the role, and say "permission denied" alone where
        Kubernetes did not confirm the token: also where it cannot be asked [measured at OpenBao 2.7].
        Where this very login has worked before, and the token has not ended, that is waited out.
        """
        lives = self._ends_at is not None and self._ends_at > time.time()
        if _is_bare(error) and worked and lives:
            return DestinationUnavailable(
                f"{self._name}: Kubernetes does not confirm our service account any more",
                hint="check that the server reaches the cluster's API and may review tokens"
                f" (auth/{self._auth.place}/config), and that the service account still exists",
                sent=False,
            )
        return Denied(
            f"{self._name}: the Kubernetes login is refused"
            + ("" if lives else ", and the service account token has run out or is none"),
            hint=f"check that auth/{self._auth.place}/role/{self._auth.role} exists and binds this"
            f" service account, its namespace and the audience of {self._file}, that the file is"
            f" replaced in time, and that the server may review tokens (auth/{self._auth.place}/config)",
        )


def _is_bare(error: vendor.VaultError) -> bool:
    """Tell a no without a reason from one that names what is wrong; only its words differ."""
    texts = error.errors if isinstance(error.errors, list) else []
    bare = all("permission denied" in str(text) for text in texts)
    return isinstance(error, vendor.Forbidden) and bare


def _end_of(token: str) -> float | None:
    """Return when a JWT says that it ends, unverified: it only tells how a refusal is to be read."""
    try:
        part = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
        return float(claims["exp"])
    except (ValueError, LookupError, TypeError):
        return None


def text_of(path: Path | None, name: str, *, anybody_may_read: bool = False) -> str:
    """Return what a credential file holds. Raises Denied."""
    try:
        found = read_credential(path, anybody_may_read=anybody_may_read) if path else ""
    except ConfigError as error:
        raise Denied(f"{name}: {error}", hint=error.hint) from None
    return found.strip()
