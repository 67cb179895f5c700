"""Logins to AWS: exactly the one that a connection names, never what lies around.

Credentials come from the instance (IMDSv2 only), the container's agent, a profile or keys in a named
file, or a web identity's token; a role can be assumed on top. Programs (`credential_process`) and
browser sign-ins of a profile are refused. They are renewed at two thirds of their life.
Sources: the EC2, ECS, EKS and STS pages of AWS.
"""

from __future__ import annotations

import configparser
import http.client
import json
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from keyturn import ambient
from keyturn.credential_file import read_credential
from keyturn.destinations.aws_door import ANSWER_LIMIT, Keys
from keyturn.destinations.aws_errors import understand
from keyturn.destinations.base import (
    CredentialFile,
    Form,
    is_safe_address,
)
from keyturn.errors import ConfigError, Denied, DestinationUnavailable, KeyturnError

RENEW_AT = 2 / 3  # of what is left of their life
RETRY_AFTER = 30.0  # seconds, where credentials that are still good could not be renewed
SHORTEST_LIFE = 60.0  # where our clock says that they are over already
LONGEST_CHAIN = 5  # of profiles that name each other
INSTANCE = "http://169.254.169.254"
_CONTAINER_HOST = "http://169.254.170.2"
# The SDKs' own rule: the agents of ECS and EKS, and this host.
_PLAIN_HOSTS = {"localhost", "127.0.0.1", "::1", "169.254.170.2", "169.254.170.23", "fd00:ec2::23"}
_TOKEN_LIFE = "300"  # noqa: S105 - seconds, of a token for the metadata service
_FORBIDDEN = ("credential_process", "sso_session", "sso_start_url", "credential_source",
              "web_identity_token_file", "login_session")  # fmt: skip


def _agent(value: object) -> object:
    if not isinstance(value, str) or not is_agent_address(value):
        raise ValueError
    return value


def is_agent_address(address: str) -> bool:
    """Whether an address may be asked for a container's role: https, or an agent's own over http."""
    return is_safe_address(address, plain_hosts=_PLAIN_HOSTS, bare=False)


class AuthOptions(BaseModel):
    """How to log in. Secrets are only ever named by file."""

    rule: ClassVar[str] = (
        "the keys of its method only: none for instance, address (and token_file) for container,"
        " profile and file, file for keys, role_arn and token_file for web-identity"
    )

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, hide_input_in_errors=True, validate_default=False
    )

    method: Annotated[
        Literal["instance", "container", "profile", "keys", "web-identity"],
        Form("instance, container, profile, keys or web-identity"),
        Field(
            description="instance: the role of the EC2 instance, by IMDSv2; container: that of the task"
        ),
    ] = "instance"
    profile: Annotated[str | None, Form("the name of a profile"), Field(description="profile")] = (
        None
    )
    file: Annotated[
        CredentialFile, Field(description="file that holds the profile, or the keys")
    ] = None
    role_arn: Annotated[
        str | None, Form("the ARN of a role"), Field(description="role of the web identity")
    ] = None
    token_file: Annotated[
        CredentialFile,
        Field(description="file that holds the web identity's token, or the container agent's"),
    ] = None
    address: Annotated[
        str | None,
        BeforeValidator(_agent),
        Form("https://host/path (http for the agents of ECS and EKS only)"),
        Field(description="where a container asks for its role; by default what the platform says"),
    ] = None

    @model_validator(mode="after")
    def _whole(self) -> AuthOptions:
        needed: dict[str, tuple[str, ...]] = {
            "instance": (),
            "container": (),
            "profile": ("profile", "file"),
            "keys": ("file",),
            "web-identity": ("role_arn", "token_file"),
        }
        allowed = {*needed[self.method], "method"}
        if self.method == "container":
            allowed |= {"address"} | ({"token_file"} if self.address else set())
        if any(getattr(self, name) is None for name in needed[self.method]):
            raise ValueError
        if {name for name in self.model_fields_set if getattr(self, name) is not None} - allowed:
            raise ValueError
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """A role to take on, by credentials that we have."""

    arn: str
    session_name: str
    external_id: str | None = None


_TAKING = {
    "assume_role": "AssumeRole",
    "assume_role_with_web_identity": "AssumeRoleWithWebIdentity",
}
Sts = Callable[[Callable[[], Keys] | None], Any]  # a client for STS that signs so


class Login:
    """The credentials of one connection. Thread-safe."""

    def __init__(
        self, auth: AuthOptions, *, role: Role | None, sts: Sts, timeout: timedelta, name: str
    ) -> None:
        self._auth, self._role, self._sts, self._name = auth, role, sts, name
        self._timeout = timeout.total_seconds()
        self._guard = threading.Lock()
        self._keys: Keys | None = None
        self._renew_at = 0.0

    def ready(self) -> Keys:
        """Return credentials that are good now. Raises DestinationError where there are none."""
        with self._guard:
            now = time.monotonic()
            if self._keys is None or now >= self._renew_at:
                self._renew(now)
            assert self._keys is not None  # noqa: S101 - `_renew` raises else
            return self._keys

    def keys(self) -> Keys:
        """Return what signs: `ready` has been called in this call."""
        return self._keys or self.ready()

    def again(self, refused: Keys) -> bool:
        """Get others than the refused ones; False where there are none."""
        with self._guard:
            if self._keys is refused:
                self._keys = None
                self._renew(time.monotonic())
            return self._keys is not None and self._keys.access != refused.access

    @property
    def ends_in(self) -> timedelta | None:
        """How long they live unless they are renewed; None if for ever, or before a login."""
        keys = self._keys
        if keys is None or keys.ends_at is None:
            return None
        return timedelta(seconds=keys.ends_at - time.monotonic())

    def _renew(self, now: float) -> None:
        try:
            found = self._fetched()
        except KeyturnError:
            old = self._keys
            if old is None or old.ends_at is None or old.ends_at <= now:
                raise
            self._renew_at = now + RETRY_AFTER  # what we have is good for a while yet
            return
        self._keys = found
        life = None if found.ends_at is None else max(found.ends_at - now, SHORTEST_LIFE)
        # Keys in a file can be replaced at any time: it is read anew every minute.
        self._renew_at = now + (SHORTEST_LIFE if life is None else life * RENEW_AT)

    def _fetched(self) -> Keys:
        found = self._base()
        if self._role is not None:
            found = self._assumed(found, self._role)
        return found

    # --- where they come from ---------------------------------------------------------------

    def _base(self) -> Keys:
        auth = self._auth
        if auth.method == "instance":
            return self._of_instance()
        if auth.method == "container":
            return self._of_container()
        if auth.method == "web-identity":
            return self._of_web_identity()
        text = self._text_of(auth.file)
        if auth.method == "keys":
            return _keys_in(text) or self._unusable("holds no keys")
        return self._of_profile(text, auth.profile or "")

    def _of_instance(self) -> Keys:
        """Ask the metadata service, in two steps (IMDSv2): whoever can be made to GET gets nothing."""
        life = {"X-aws-ec2-metadata-token-ttl-seconds": _TOKEN_LIFE}
        token = self._ask("PUT", f"{INSTANCE}/latest/api/token", life).decode("ascii", "replace")
        headers = {"X-aws-ec2-metadata-token": token.strip()}
        path = "/latest/meta-data/iam/security-credentials/"
        role = self._ask("GET", INSTANCE + path, headers).decode("ascii", "replace")
        role = role.split("\n", 1)[0].strip()
        if not role or "/" in role:
            self._unusable("the instance has no role")
        return self._given(self._ask("GET", INSTANCE + path + role, headers))

    def _of_container(self) -> Keys:
        address, headers = self._auth.address, {}
        token_file = self._auth.token_file
        if address is None:
            relative = ambient.kept.get(ambient.CONTAINER[0])
            full = ambient.kept.get(ambient.CONTAINER[1])
            address = f"{_CONTAINER_HOST}{relative}" if relative else full
            named = ambient.kept.get(ambient.CONTAINER[2])
            token_file = Path(named) if named else None
        if address is None or not is_agent_address(address):
            self._unusable("the platform names no address for the container's role")
        if token_file is not None:
            headers["Authorization"] = self._text_of(token_file).strip()
        return self._given(self._ask("GET", address, headers))

    def _of_web_identity(self) -> Keys:
        token, role = self._text_of(self._auth.token_file).strip(), self._auth.role_arn
        session = self._role.session_name if self._role else "keyturn"
        return self._taken(
            None, "assume_role_with_web_identity",
            RoleArn=role, RoleSessionName=session, WebIdentityToken=token,
        )  # fmt: skip

    def _of_profile(self, text: str, name: str) -> Keys:
        """Read a profile, and those that it names as its source. SECURITY: it can name no program."""
        profiles, roles = _parsed(text), []
        for _ in range(LONGEST_CHAIN):
            found = profiles.get(name)
            if found is None:
                self._unusable(f"has no profile {name}")
            for key in _FORBIDDEN:
                if key in found:
                    self._unusable(f"profile {name}: {key} is refused")
            keys = _keys_from(found)
            if "role_arn" not in found:
                break
            session = found.get("role_session_name", "keyturn")
            arn, outside = found["role_arn"], found.get("external_id")
            roles.append(Role(arn=arn, session_name=session, external_id=outside))
            if keys is not None or "source_profile" not in found:
                break
            name = found["source_profile"]
        else:
            self._unusable(f"more than {LONGEST_CHAIN} profiles name each other")
        keys = keys or self._unusable(f"profile {name} holds no keys")
        for role in reversed(roles):
            keys = self._assumed(keys, role)
        return keys

    def _assumed(self, keys: Keys, role: Role) -> Keys:
        more = {} if role.external_id is None else {"ExternalId": role.external_id}
        return self._taken(
            keys, "assume_role", RoleArn=role.arn, RoleSessionName=role.session_name, **more
        )

    def _taken(self, keys: Keys | None, operation: str, **parameters: Any) -> Keys:
        client = self._sts(None if keys is None else lambda: keys)
        try:
            answer = getattr(client, operation)(**parameters)
        except Exception as error:  # noqa: BLE001 - whatever the SDK raises; none of its text goes on
            refusal = understand(
                error, name=self._name, operation=_TAKING[operation],
                what=str(parameters["RoleArn"]), write=False,
            )  # fmt: skip
            raise refusal from None
        found = answer.get("Credentials") if isinstance(answer, dict) else None
        made = _keys_of(found) if isinstance(found, dict) else None
        return made or self._senseless()

    # --- small things -----------------------------------------------------------------------

    def _ask(self, method: str, address: str, headers: Mapping[str, str]) -> bytes:
        """Ask this very host once: no proxy, no redirect, nothing of the environment."""
        parts = urlsplit(address)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            with closing(_line(parts, self._timeout)) as line:
                line.request(method, path, headers=dict(headers))
                answer = line.getresponse()
                body = answer.read(ANSWER_LIMIT)
        except (OSError, http.client.HTTPException) as error:
            raise DestinationUnavailable(
                f"{self._name}: no credentials by {self._auth.method}: {type(error).__name__}",
                hint="check that this host or container has a role, and that its hop limit is enough",
                sent=False,
            ) from None
        if answer.status in (401, 403, 404):
            self._unusable(f"they are refused ({answer.status}): is there a role?")
        if answer.status != 200:
            raise DestinationUnavailable(
                f"{self._name}: no credentials by {self._auth.method} ({answer.status})", sent=False
            )
        return body

    def _given(self, body: bytes) -> Keys:
        """Read what a metadata service gives."""
        try:
            found = json.loads(body)
        except ValueError:
            found = None
        keys = _keys_of(found) if isinstance(found, dict) else None
        return keys or self._senseless()

    def _senseless(self) -> NoReturn:
        raise DestinationUnavailable(f"{self._name}: the login's answer makes no sense", sent=False)

    def _unusable(self, what: str) -> NoReturn:
        place = f"{self._auth.file} " if self._auth.file and " " in what else ""
        raise Denied(
            f"{self._name}: no login by {self._auth.method}: {place}{what}",
            hint="see `auth` of the connection in docs/howto/aws.md",
        )

    def _text_of(self, path: Path | None) -> str:
        try:
            return read_credential(path) if path is not None else ""
        except ConfigError as error:
            raise Denied(f"{self._name}: {error}", hint=error.hint) from None


def _line(parts: Any, timeout: float) -> http.client.HTTPConnection:
    if parts.scheme == "https":
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(
            parts.hostname, parts.port, timeout=timeout, context=context
        )
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)


def _keys_of(found: Mapping[str, Any]) -> Keys | None:
    """Read credentials as STS and the metadata services write them."""
    access, secret = found.get("AccessKeyId"), found.get("SecretAccessKey")
    token = found.get("SessionToken", found.get("Token"))
    if not (isinstance(access, str) and access and isinstance(secret, str) and secret):
        return None
    ends = found.get("Expiration")
    keys = Keys(access=access, secret=secret, token=token if isinstance(token, str) else None)
    if ends is None:
        return keys
    try:
        at = ends if isinstance(ends, datetime) else datetime.fromisoformat(str(ends))
        left = (at - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return None
    return replace(keys, ends_at=time.monotonic() + max(left, SHORTEST_LIFE))


def _keys_from(found: Mapping[str, str]) -> Keys | None:
    """Read keys as profiles write them."""
    access, secret = found.get("aws_access_key_id"), found.get("aws_secret_access_key")
    if not access or not secret:
        return None
    return Keys(access=access, secret=secret, token=found.get("aws_session_token") or None)


def _keys_in(text: str) -> Keys | None:
    """Read a file that holds one pair of keys: JSON, or the only section of an INI file."""
    try:
        found = json.loads(text)
    except ValueError:
        profiles = _parsed(text)
        return _keys_from(next(iter(profiles.values()))) if len(profiles) == 1 else None
    return (_keys_of(found) or _keys_from(found)) if isinstance(found, dict) else None


def _parsed(text: str) -> dict[str, dict[str, str]]:
    """Read an INI file as the SDKs do: `[name]` or `[profile name]`. Nothing where it is none."""
    parser = configparser.RawConfigParser(default_section="")
    try:
        parser.read_string(text)
    except (configparser.Error, ValueError):
        return {}  # its error would quote a line of the file
    return {
        section.removeprefix("profile ").strip(): dict(parser.items(section))
        for section in parser.sections()
    }
