"""HashiCorp Vault and OpenBao, KV version 2, through hvac.

What is compared is the number of the newest version of an entry, deleted ones included (the `cas`
option of KV v2). An entry's owner marker stands in its custom metadata and is written before its
first value. Reads come from the node that writes go to (`vault_reads`), or say that they do not.
Sources: the KV v2 API pages of both projects.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Annotated, Any

import hvac.exceptions as vendor
import requests
import urllib3
from pydantic import BeforeValidator, Field

from keyturn.core.duration import FORM
from keyturn.core.model import Target, Traits
from keyturn.destinations.base import (
    ConnectionOptions,
    DestinationBase,
    Form,
    duration,
    safe_address,
)
from keyturn.destinations.entry import merged, observed, refuse_foreign, without_ours
from keyturn.destinations.network import trouble
from keyturn.destinations.vault_auth import AUTH_FORM, AuthOptions, plain_place
from keyturn.destinations.vault_login import Login, canonical
from keyturn.destinations.vault_reads import Reads
from keyturn.destinations.vault_secret_id import SecretIds, own_login
from keyturn.destinations.vault_secret_id import rights as own_rights
from keyturn.errors import (
    Conflict,
    Denied,
    DestinationError,
    DestinationUnavailable,
    NotFound,
    Rejected,
    Throttled,
)
from keyturn.ports import Clock, Entry, Observed, OwnAuthority, OwnLogin

OWNER, FENCE = "keyturn-owner", "keyturn-fence"
STALE_READS = 5  # how often a read that is older than our own last write is made
STALE_PAUSE = 0.05
_OWN_TOKEN = ("auth/token/renew-self", "auth/token/revoke-self")


def _namespace(value: object) -> str | None:
    if value is None:
        return None
    place = plain_place(value)
    if "root" in place.split("/"):  # no namespace can have it: `root` means that there is none
        raise ValueError
    return place


class VaultOptions(ConnectionOptions):
    """How to reach a Vault or OpenBao, and which of its mounts to write in."""

    address: Annotated[
        str,
        BeforeValidator(safe_address),
        Form("https://host[:port] (http on loopback only)"),
        Field(description="address of the server"),
    ]
    auth: Annotated[AuthOptions, Form(AUTH_FORM), Field(description="login")]
    namespace: Annotated[
        str | None,
        BeforeValidator(_namespace),
        Form("a namespace such as platform or platform/team, never root"),
        Field(description="namespace of login and mount, where there are any"),
    ] = None
    ca_file: Annotated[
        str | None,
        Form("an absolute path"),
        Field(description="certificates of the authority that signed the server's"),
    ] = None
    mount: Annotated[
        str,
        BeforeValidator(plain_place),
        Form("the name of a KV v2 mount such as kv or team/kv"),
        Field(description="KV v2 mount"),
    ] = "kv"
    staleness: Annotated[
        timedelta,
        BeforeValidator(duration),
        Form(FORM),
        Field(description="how far standbys that agents read from may be behind"),
    ] = timedelta(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """The newest version of an entry: `values` None where there are none, `number` 0 where never."""

    number: int
    values: Any
    owner: str | None
    fresh: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What the last read has shown, without its values."""

    number: int
    ours: bool
    version_id: str | None


class VaultDestination(DestinationBase):
    """One mount of one server."""

    Options = VaultOptions
    TRAITS = Traits(has_cas=True, keeps_versions=True)

    def __init__(self, options: Any, *, name: str, store_id: str, clock: Clock) -> None:
        super().__init__(options, name=name, store_id=store_id, clock=clock)
        self._login = Login(
            address=options.address,
            auth=options.auth,
            namespace=options.namespace,
            ca_file=options.ca_file,
            timeout=options.call_deadline,
            name=name,
        )
        self._reads = Reads(self._login, name)
        self._secret_ids = SecretIds(options.auth, self._login, name, self._call)
        self._written: dict[str, int] = {}
        self._known: dict[str, _Known] = {}
        self._guard = threading.Lock()

    @property
    def traits(self) -> Traits:
        """What this destination can do."""
        return replace(super().traits, staleness=self.options.staleness)

    def identity(self, target: Target) -> str:
        """Return the address by which the server knows the entry, whatever names what part of it.

        SECURITY: a namespace may stand in the header or begin the path, so `namespace: a` with the
        mount `kv` and the mount `a/kv` are one place [measured]. What requests are made of is
        compared, because by nothing else does the server tell entries apart.
        """
        space, mount = self.options.namespace, self.options.mount
        parts = [*([space] if space else []), mount, "data", self.place(target)]
        return f"vault:{canonical(self.options.address)}/{'/'.join(parts)}"

    @property
    def login_ends_in(self) -> timedelta | None:
        """How long our token lives unless it is renewed."""
        return self._login.ends_in

    def own_login(self) -> OwnLogin:
        """Say when a person has to give us another token or secret id."""
        return self._call(lambda: own_login(self.options.auth, self._login, self._secret_ids))

    @property
    def own_authority(self) -> OwnAuthority | None:
        """AppRole, where it is to replace our secret id."""
        return self._secret_ids if self.options.auth.rotate is not None else None

    def close(self) -> None:
        """Give the token back, where we got one by a login."""
        self._login.close()
        super().close()

    @classmethod
    def least_policy(cls, options: Any, entries: Sequence[tuple[Target, str]]) -> str:
        """Return a policy in HCL; its paths are relative to the namespace that it is written in."""
        rights: dict[str, tuple[str, ...]] = {}
        for path, retire in sorted((_placed(options, target), how) for target, how in entries):
            rights |= _rights(options, path, retire)
        rights |= dict.fromkeys(_OWN_TOKEN, ("update",))
        rights["auth/token/lookup-self"] = ("read",)
        rights |= own_rights(options.auth)
        rules = [_rule(path, needed) for path, needed in rights.items()]
        return "\n".join([*_where(options), *rules])

    def _probe(self) -> str:
        if self.options.auth.wrapped:
            return f"{self.options.address}: {self._login.look_at_wrapping()}"
        life = self._login.check()
        self._check_mount()
        if own_rights(self.options.auth):
            self._refuse_lacking(own_rights(self.options.auth))
        space = f", namespace {self.options.namespace}" if self.options.namespace else ""
        server = f"{self.options.address}{space}, mount {self.options.mount}"
        return f"{server}: {life}; reads reach the leader {self._reads.way()}"

    def _check_mount(self) -> None:
        """Ask what is mounted, as the servers' own command lines do before each `kv` command."""
        mount, space = self.options.mount, self.options.namespace
        where = f"-namespace={space} " if space else ""
        try:
            found = self._login.request("get", f"/v1/sys/internal/ui/mounts/{mount}", None)
        except vendor.Forbidden:
            raise Denied(
                f"{self.name}: there is no mount {mount}, or the login has no right in it",
                hint="compare its policy with `keyturn policy vault`; a mount is made by"
                f" `vault secrets enable {where}-path={mount} -version=2 kv`",
            ) from None
        data = found.get("data") or {}
        if data.get("type") != "kv" or (data.get("options") or {}).get("version") != "2":
            raise Rejected(
                f"{self.name}: the mount {mount} is no KV store of version 2",
                hint=f"`vault kv enable-versioning {where}{mount}`, or name another mount",
            )

    def _probe_entry(self, target: Target, retire: str) -> Observed | None:
        """Read it, and compare the login's rights with those of the printed policy."""
        if self.options.auth.wrapped:
            return None  # a login would use the wrapping token up
        rights = _rights(self.options, self.place(target), retire)
        self._refuse_lacking(rights)
        return self._observe(target)

    def _refuse_lacking(self, rights: Mapping[str, Sequence[str]]) -> None:
        """Raise Denied for a right that the printed policy has and our login has not."""
        with contextlib.suppress(vendor.Forbidden):  # where a login may not even ask for its rights
            body = {"paths": list(rights)}
            answer = self._login.request("post", "/v1/sys/capabilities-self", body)
            granted = answer.get("data") or {}
            for path, needed in rights.items():
                lacks = [one for one in needed if one not in (granted.get(path) or ())]
                if lacks and "root" not in (granted.get(path) or ()):
                    raise self._lacking(", ".join(lacks), path)

    # --- reading ----------------------------------------------------------------------------

    def _observe(self, target: Target) -> Observed:
        path = self.place(target)
        for attempt in range(STALE_READS):
            shown = self._shown(path)
            if shown.number >= self._mark(path):
                return self._understood(path, target, shown)
            time.sleep(STALE_PAUSE * 2**attempt)  # a standby that is behind our own last write
        if not shown.fresh:
            raise DestinationUnavailable(f"{self.name}: only stale answers for the entry")
        # The leader says so: somebody removed the entry with its history, and it began anew.
        with self._guard:
            self._written.pop(path, None)
        return self._understood(path, target, shown)

    def _understood(self, path: str, target: Target, shown: _Shown) -> Observed:
        token = str(shown.number)
        if shown.values is not None and not isinstance(shown.values, dict):
            return Observed(
                exists=True, other_keys=True, owner=shown.owner, token=token, fresh=shown.fresh
            )
        found = observed(
            target.keys,
            shown.values,
            owner=shown.owner,
            token=token,
            locator=token if shown.values is not None else "",
            fresh=shown.fresh,
        )
        with self._guard:
            self._known[path] = _Known(
                number=shown.number,
                ours=shown.owner == self.store_id and not found.other_keys,
                version_id=found.version_id,
            )
        return found

    def _shown(self, path: str) -> _Shown:
        """Read the newest version. A deleted one is a 404 that carries its metadata."""
        answer, fresh = self._get(path)
        data = answer.get("data") or {}
        metadata = data.get("metadata") or {}
        number, values = metadata.get("version") or 0, data.get("data")
        owner = (metadata.get("custom_metadata") or {}).get(OWNER)
        if values is None and owner is None:
            owner = self._owner(path)  # marks can stand there before a value, and after one
        return _Shown(number=number, values=values, owner=owner, fresh=fresh)

    def _get(self, path: str) -> tuple[dict[str, Any], bool]:
        full = self._full(f"data/{path}")
        try:
            answer, fresh = self._reads.get(full)
        except vendor.InvalidPath as error:
            if error.errors:  # an entry that is missing says nothing; a mount or a namespace does
                raise self._absent() from None
            found, fresh = _body(error), self._reads.way().fresh
            return (found if _is_entry(found) else {}), fresh
        except vendor.VaultError as error:
            raise self._refusal("get", full, error) from None
        if not _is_entry(answer):  # taken for an empty entry it would let a version go
            raise DestinationUnavailable(f"{self.name}: the answer to a read makes no sense")
        return answer, fresh

    def _owner(self, path: str) -> str | None:
        owner = self._marks(path).get(OWNER)
        return owner if isinstance(owner, str) else None

    def _marks(self, path: str) -> dict[str, Any]:
        """Return an entry's custom metadata: ours and what others keep there."""
        answer = self._request("get", f"metadata/{path}", absent=True)
        data = {"custom_metadata": None} if answer is None else _dict(answer).get("data")
        if not isinstance(data, dict) or "custom_metadata" not in data:
            raise DestinationUnavailable(f"{self.name}: the answer to a read makes no sense")
        return _dict(data["custom_metadata"])

    def _mark(self, path: str) -> int:
        with self._guard:
            return self._written.get(path, 0)

    # --- writing ----------------------------------------------------------------------------

    def _activate(self, target: Target, entry: Entry, expected: str) -> str:
        path = self.place(target)
        if self._can_replace_unread(path, target, entry, expected):
            try:
                return self._put(path, merged(target, {}, entry), expected)
            except Conflict:
                pass  # perhaps by this very version, from a call whose answer was lost
        shown = self._shown(path)
        if shown.values is not None and not isinstance(shown.values, dict):
            raise Rejected(f"{self.name}: the entry is no JSON object")
        wanted = merged(target, shown.values or {}, entry)
        if shown.values == wanted and shown.owner == entry.owner:
            return str(shown.number)  # the same version again
        if str(shown.number) != expected:
            raise Conflict
        refuse_foreign(target, shown.values or {}, owner=shown.owner, store_id=self.store_id)
        if shown.owner != entry.owner:
            # The request replaces all of them, and a PATCH needs a right that we do not ask for.
            marks = {**self._marks(path), OWNER: entry.owner, FENCE: str(entry.fence)}
            self._request("post", f"metadata/{path}", {"custom_metadata": marks})
        return self._put(path, wanted, expected)

    def _can_replace_unread(self, path: str, target: Target, entry: Entry, expected: str) -> bool:
        """Whether what the last read showed at this very number is ours alone.

        The compare-and-set holds for that number, so a second read would say nothing new. A merge
        needs the values of others, and a first write their absence: those read again.
        """
        known = self._known.get(path)
        return (
            known is not None
            and not target.merge
            and known.ours
            and entry.owner == self.store_id
            and str(known.number) == expected
            and known.version_id != entry.version_id
        )

    def _withdraw(self, target: Target, owner: str, version_id: str, expected: str) -> str:
        """Write a new version without our keys: the old ones are cleaned like any copy."""
        path = self.place(target)
        shown = self._shown(path)
        values = shown.values if isinstance(shown.values, dict) else {}
        left = without_ours(target, values, marked=shown.owner, owner=owner, version_id=version_id)
        if left is None:
            return "" if shown.values is None else str(shown.number)
        if str(shown.number) != expected:
            raise Conflict
        return self._put(path, left, expected)

    def _put(self, path: str, wanted: Mapping[str, Any], expected: str) -> str:
        body = {"options": {"cas": int(expected)}, "data": wanted}
        answer = self._request("post", f"data/{path}", body)
        written = int((answer.get("data") or {}).get("version") or 0)
        if written != int(expected) + 1:
            raise DestinationUnavailable(f"{self.name}: the answer to a write makes no sense")
        with self._guard:
            self._written[path] = max(self._written.get(path, 0), written)
            self._known.pop(path, None)
        return str(written)

    def _retire(self, target: Target, version_id: str, locator: str, how: str) -> None:
        """Soft-delete or destroy exactly one number, and never the newest."""
        path, number = self.place(target), int(locator)
        shown = self._shown(path)
        if not shown.fresh:
            raise DestinationUnavailable(
                f"{self.name}: no fresh read before a retirement", sent=False
            )
        if not self._is_copy(path, target, version_id, number, shown):
            return
        if number == shown.number:
            raise Rejected(f"{self.name}: that copy is the one shown")
        verb = "destroy" if how == "destroy" else "delete"
        self._request("post", f"{verb}/{path}", {"versions": [number]})

    def _is_copy(
        self, path: str, target: Target, version_id: str, number: int, shown: _Shown
    ) -> bool:
        """Whether that number still holds this version, or held it until it was deleted.

        SECURITY: where somebody removed the entry with its history, numbers begin anew, and what
        has this one now may be good.
        """
        if number > shown.number:
            return False
        values = shown.values
        if number < shown.number:
            answer, _ = self._get(f"{path}?version={number}")
            values = (answer.get("data") or {}).get("data")
        if not isinstance(values, dict):
            return shown.owner == self.store_id
        return values.get(target.keys.version) == version_id

    # --- requests ---------------------------------------------------------------------------

    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, absent: bool = False
    ) -> Any:
        """Ask once; log in again and repeat where the token has run out, which did nothing."""
        full = self._full(path)
        try:
            return self._login.request(method, full, body)
        except vendor.InvalidPath:
            if absent:
                return None
            raise self._absent() from None
        except vendor.VaultError as error:
            raise self._refusal(method, full, error) from None

    def _refusal(self, method: str, full: str, error: vendor.VaultError) -> DestinationError:
        if isinstance(error, vendor.Forbidden):
            return self._lacking({"get": "read", "post": "create, update"}[method], full[4:])
        if isinstance(error, vendor.InvalidRequest):
            if _is_mismatch(error):
                return Conflict()
            return Rejected(f"{self.name}: the request was refused (400)")
        return self._translate(error)

    def _absent(self) -> NotFound:
        space = f" in the namespace {self.options.namespace}" if self.options.namespace else ""
        return NotFound(
            f"{self.name}: no KV v2 mount {self.options.mount}{space}",
            hint="check the connection's address, namespace and mount",
        )

    def _lacking(self, need: str, path: str) -> Denied:
        return Denied(
            f"{self.name}: the login lacks {need} on {path}",
            hint="compare its policy with `keyturn policy vault`",
        )

    def _full(self, path: str) -> str:
        return f"/v1/{self.options.mount}/{path}"

    def _translate(self, error: Exception) -> DestinationError:
        if type(error) is OSError and self._lacks_ca():
            return DestinationUnavailable(
                f"{self.name}: ca_file {self.options.ca_file} is not there or cannot be read",
                hint="put the authority's certificates there, readable by the daemon's user",
                sent=False,
            )
        return translate(f"{self.name}: {self.options.address}", error)

    def _lacks_ca(self) -> bool:
        path = self.options.ca_file
        return path is not None and not os.access(path, os.R_OK)


def translate(name: str, error: Exception) -> DestinationError:
    """Map what hvac and requests raise; a test holds this against hvac's own list."""
    if isinstance(error, DestinationError):
        return error
    if isinstance(error, vendor.Forbidden | vendor.Unauthorized):
        return Denied(f"{name}: the login is refused")
    if isinstance(error, vendor.RateLimitExceeded):
        return Throttled(f"{name}: too many requests")
    if isinstance(error, vendor.InvalidPath):
        return NotFound(
            f"{name}: nothing is mounted there",
            hint="check the connection's address, namespace and mount",
        )
    if isinstance(
        error, vendor.InvalidRequest | vendor.UnsupportedOperation | vendor.ParamValidationError
    ):
        return Rejected(f"{name}: the request was refused")
    if isinstance(error, requests.RequestException | urllib3.exceptions.HTTPError):
        found = trouble(error)
        if found is not None:
            return DestinationUnavailable(f"{name}: {found.what}", hint=found.hint, sent=found.sent)
    if isinstance(error, vendor.VaultDown):
        return DestinationUnavailable(f"{name}: sealed, or without a leader (503)")
    # A standby without a leader, 5xx, broken answers, cut connections: perhaps it landed.
    return DestinationUnavailable(f"{name}: {type(error).__name__}")


def _body(error: vendor.VaultError) -> dict[str, Any]:
    """Return the JSON of a 404: for a deleted version it carries the metadata."""
    found = error.json
    if isinstance(found, dict) and isinstance(found.get("data"), dict):
        return found
    return {}


def _is_entry(answer: object) -> bool:
    """Whether an answer has what every version of an entry has, a deleted one as well."""
    metadata = _dict(_dict(_dict(answer).get("data")).get("metadata"))
    number = metadata.get("version")
    return isinstance(number, int) and number > 0


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_mismatch(error: vendor.VaultError) -> bool:
    """Tell a failed compare-and-set from other refusals by the words of both projects."""
    texts = error.errors if isinstance(error.errors, list) else []
    return any("check-and-set parameter did not match" in str(text) for text in texts)


def _placed(options: VaultOptions, target: Target) -> str:
    return f"{options.prefix}/{target.path}" if options.prefix else target.path


def _rights(options: VaultOptions, path: str, retire: str) -> dict[str, tuple[str, ...]]:
    """Return the capabilities that rotations of one entry need, by API path."""
    mount = options.mount
    rights: dict[str, tuple[str, ...]] = {
        f"{mount}/data/{path}": ("create", "read", "update"),
        f"{mount}/metadata/{path}": ("create", "read", "update"),
    }
    if retire != "leave":
        verb = "destroy" if retire == "destroy" else "delete"
        rights[f"{mount}/{verb}/{path}"] = ("create", "update")
    return rights


def _where(options: VaultOptions) -> list[str]:
    """Say, as a comment of the policy, where it must be written."""
    space = options.namespace
    return [f"# to be written in the namespace {space}: -namespace={space}"] if space else []


def _rule(path: str, capabilities: Sequence[str]) -> str:
    listed = ", ".join(f'"{capability}"' for capability in capabilities)
    return f'path "{path}" {{ capabilities = [{listed}] }}'
