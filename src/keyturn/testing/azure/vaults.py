"""A Key Vault of the stand-in: secrets with versions, roles, soft delete, pages and limits.

From Microsoft's reference of the Key Vault REST API (secrets) and its pages on authentication, soft
delete, service limits and throttling; error codes as the service sends them. Where these leave a
choice, it takes the one that is harder for a client: versions come in no order and on small pages,
some of them empty, and times have seconds only.
"""

from __future__ import annotations

import random
import re
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from keyturn.testing.azure.entra import Entra, Identity
from keyturn.testing.wire import Answer, Call, as_json

API_VERSIONS = frozenset(
    {"7.0", "7.1", "7.2", "7.3", "7.4", "7.5", "7.6", "2025-07-01", "2026-04-01"}
)
LARGEST_VALUE = 25 * 1024
MOST_TAGS, LONGEST_TAG, LONGEST_TEXT = 15, 512, 256
LARGEST_PAGE = 25
WINDOW = 10.0  # seconds that the limits count
DAYS = 90
RIGHTS = "Microsoft.KeyVault/vaults/secrets/"
ALL = frozenset(
    {"getSecret/action", "readMetadata/action", "setSecret/action", "update/action", "delete",
     "recover/action", "purge/action"}
)  # fmt: skip
_NAME = re.compile(r"[0-9a-zA-Z-]{1,127}", re.ASCII)


@dataclass(slots=True, kw_only=True)
class Version:
    """One version of a secret."""

    id: str
    value: str = field(repr=False)
    created: int
    content_type: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    enabled: bool = True
    nbf: int | None = None
    exp: int | None = None
    updated: int = 0


@dataclass(slots=True, kw_only=True)
class Secret:
    """All versions of a name, the latest last. `moving` until when it is being deleted or recovered."""

    name: str
    versions: list[Version] = field(default_factory=list)
    deleted: bool = False
    moving: float = 0.0

    @property
    def is_moving(self) -> bool:
        """Whether a deletion or a recovery is still under way."""
        return time.monotonic() < self.moving


class _Error(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str, text: str, inner: str = "", **headers: str) -> None:
        super().__init__(code)
        body: dict[str, Any] = {"code": code, "message": text}
        if inner:
            body["innererror"] = {"code": inner}
        self.answer = as_json(status, {"error": body}, **headers)


class Vault:
    """One vault. Thread-safe. `base` is its address as it stands in the ids of secrets."""

    def __init__(self, *, base: str, entra: Entra) -> None:
        self.base, self.entra = base, entra
        self.secrets: dict[str, Secret] = {}
        self.grants: list[tuple[str, frozenset[str], str]] = []  # object id, actions, secret or ""
        self.recovery = 0.0  # seconds that deleting and recovering take
        self.most_writes, self.most_others = 300, 4000  # each ten seconds
        self.short_pages = 0.2  # how many pages hold fewer versions than were asked for
        self.firewall = False
        self._done: dict[bool, deque[float]] = {True: deque(), False: deque()}
        self._draw = random.Random(base)
        self._guard = threading.RLock()

    # --- roles, and what is done past the wire ------------------------------------------------

    def grant(
        self, identity: Identity, actions: frozenset[str] | set[str] = ALL, *, secret: str = ""
    ) -> None:
        """Assign a role: at the vault, or at the scope of one secret."""
        full = frozenset(action.removeprefix(RIGHTS) for action in actions)
        self.grants.append((identity.object_id, full, secret.lower()))

    def revoke(self, identity: Identity) -> None:
        """Take every role of an identity away."""
        self.grants = [one for one in self.grants if one[0] != identity.object_id]

    def latest(self, name: str) -> Version | None:
        """Return what agents read, disabled or not; None where there is nothing, or it is deleted."""
        with self._guard:
            found = self.secrets.get(name.lower())
            return found.versions[-1] if found and not found.deleted and found.versions else None

    def add(self, name: str, value: str, tags: Mapping[str, str] | None = None) -> Version:
        """Add a version as somebody with every right; a deleted secret of that name is purged."""
        with self._guard:
            found = self.secrets.get(name.lower())
            if found is None or found.deleted:
                found = self.secrets[name.lower()] = Secret(name=name)
            now = int(time.time())
            made = Version(
                id=uuid.uuid4().hex, value=value, created=now, updated=now, tags=dict(tags or {})
            )
            found.versions.append(made)
            return made

    def delete(self, name: str) -> None:
        """Delete a secret softly, at once."""
        with self._guard:
            if name.lower() in self.secrets:
                self.secrets[name.lower()].deleted = True

    def purge(self, name: str) -> None:
        """Remove a secret with everything."""
        with self._guard:
            self.secrets.pop(name.lower(), None)

    # --- the wire -----------------------------------------------------------------------------

    def answer(self, call: Call) -> Answer:
        """Answer one request."""
        try:
            caller = self._caller(call)
            with self._guard:
                self._count(is_write=call.method == "PUT")
                if call.query.get("api-version") not in API_VERSIONS:
                    raise _Error(400, "BadParameter", "api-version must be specified, and be known")  # noqa: TRY301
                return self._routed(call, caller)
        except _Error as error:
            return error.answer

    def _caller(self, call: Call) -> Identity:
        scheme, _, token = call.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and token:
            found = self.entra.caller(token, audience=self.entra.resource)
            if found is not None:
                return found
            text, more = (
                "AKV10022: Invalid audience, or the token has run out.",
                ', error="invalid_token"',
            )
        else:
            text, more = "AKV10000: Request is missing a Bearer or PoP token.", ""
        place = f"{self.entra.authority}/{self.entra.tenant}"
        challenge = f'Bearer authorization="{place}", resource="{self.entra.resource}"{more}'
        raise _Error(401, "Unauthorized", text, WWW_Authenticate=challenge)

    def _count(self, *, is_write: bool) -> None:
        done, now = self._done[is_write], time.monotonic()
        while done and done[0] < now - WINDOW:
            done.popleft()
        if len(done) >= (self.most_writes if is_write else self.most_others):
            after = str(max(1, round(WINDOW - (now - done[0]))))
            raise _Error(429, "Throttled", "Request was not processed", Retry_After=after)
        done.append(now)

    def _routed(self, call: Call, caller: Identity) -> Answer:
        parts = call.path.strip("/").split("/")
        table: dict[tuple[str, str, int], tuple[str, Callable[..., Answer]]] = {
            ("PUT", "secrets", 2): ("setSecret/action", self._set),
            ("GET", "secrets", 2): ("getSecret/action", self._get),
            ("GET", "secrets", 3): ("getSecret/action", self._get),
            ("PATCH", "secrets", 2): ("update/action", self._update),
            ("PATCH", "secrets", 3): ("update/action", self._update),
            ("DELETE", "secrets", 2): ("delete", self._delete),
            ("GET", "deletedsecrets", 2): ("getSecret/action", self._get_deleted),
            ("DELETE", "deletedsecrets", 2): ("purge/action", self._purge),
        }
        act: Callable[..., Answer]
        if parts[2:] == ["versions"] and parts[0] == "secrets" and call.method == "GET":
            right, act = "readMetadata/action", self._list
        elif parts[2:] == ["recover"] and parts[0] == "deletedsecrets" and call.method == "POST":
            right, act = "recover/action", self._recover
        elif (call.method, parts[0], len(parts)) in table:
            right, act = table[call.method, parts[0], len(parts)]
        else:
            raise _Error(404, "NotFound", "There is nothing at this path")
        if not _NAME.fullmatch(parts[1]):
            raise _Error(400, "BadParameter", "The request URI contains an invalid name")
        self._check(caller, right, parts[1])
        return act(call, *parts[1:])

    def _check(self, caller: Identity, action: str, secret: str) -> None:
        if self.firewall:
            raise _Error(
                403, "Forbidden", "Client address is not authorized.", "ForbiddenByFirewall"
            )
        for object_id, actions, scope in self.grants:
            good = object_id == caller.object_id and scope in ("", secret.lower())
            if good and action in actions:
                return
        text = (
            "Caller is not authorized to perform action on resource.\r\nIf role assignments, deny"
            " assignments or role definitions were changed recently, please observe propagation"
            f" time.\r\nCaller: appid={caller.client_id};oid={caller.object_id}\r\n"
            f"Action: '{RIGHTS}{action}'\r\nAssignment: (not found)\r\n"
        )
        raise _Error(403, "Forbidden", text, "ForbiddenByRbac")

    # --- operations ---------------------------------------------------------------------------

    def _set(self, call: Call, name: str) -> Answer:
        body = call.json()
        if not isinstance(body, dict) or not isinstance(body.get("value"), str):
            raise _Error(400, "BadParameter", "Property value is required")
        if len(body["value"].encode()) > LARGEST_VALUE:
            raise _Error(400, "BadParameter", f"Secret value exceeds {LARGEST_VALUE} bytes")
        made = Version(id=uuid.uuid4().hex, value=body["value"], created=int(time.time()))
        self._apply(made, body)
        found = self.secrets.get(name.lower())
        if found is not None:
            self._refuse_gone(found)
        else:
            found = self.secrets[name.lower()] = Secret(name=name)
        found.versions.append(made)
        return as_json(200, self._bundle(found, made, with_value=True))

    def _refuse_gone(self, found: Secret) -> None:
        """Refuse a write where the name is deleted, or on its way there or back."""
        text = f"Secret {found.name} is currently "
        if found.is_moving:
            inner = "ObjectIsBeingDeleted" if found.deleted else "ObjectIsBeingRecovered"
            raise _Error(409, "Conflict", text + "being changed; retry later.", inner)
        if found.deleted:
            text += "in a deleted but recoverable state, and its name cannot be reused"
            raise _Error(409, "Conflict", text, "ObjectIsDeletedButRecoverable")

    def _get(self, call: Call, name: str, version: str = "") -> Answer:
        found, made = self._found(name, version)
        if not made.enabled:
            raise _Error(
                403,
                "Forbidden",
                "Operation get is not allowed on a disabled secret.",
                "SecretDisabled",
            )
        return as_json(200, self._bundle(found, made, with_value=True))

    def _update(self, call: Call, name: str, version: str = "") -> Answer:
        found, made = self._found(name, version)
        body = call.json()
        if not isinstance(body, dict):
            raise _Error(400, "BadParameter", "The request has no body")
        self._apply(made, body)
        return as_json(200, self._bundle(found, made, with_value=False))

    def _list(self, call: Call, name: str, _versions: str) -> Answer:
        size = call.query.get("maxresults", str(LARGEST_PAGE))
        if not size.isdecimal() or not 1 <= int(size) <= LARGEST_PAGE:
            raise _Error(400, "BadParameter", f"maxresults must be from 1 to {LARGEST_PAGE}")
        start = call.query.get("$skiptoken", "0")
        if not start.isdecimal():
            raise _Error(400, "BadParameter", "The skip token is not valid")
        found = self.secrets.get(name.lower())
        gone = found is None or found.deleted or found.is_moving
        # No order, but the same one on each page: by id.
        listed = [] if gone or found is None else sorted(found.versions, key=lambda one: one.id)
        # A page may hold fewer than asked for, none as well, though more follow.
        short = self._draw.random() < self.short_pages
        given = self._draw.randrange(int(size)) if short else int(size)
        page, end = listed[int(start) : int(start) + given], int(start) + given
        link = None
        if end < len(listed):
            version = call.query["api-version"]
            link = f"{self._with_port()}/secrets/{name}/versions?api-version={version}&$skiptoken={end}&maxresults={size}"
        items = [self._bundle(found, one, with_value=False) for one in page if found is not None]
        return as_json(200, {"value": items, "nextLink": link})

    def _with_port(self) -> str:
        """The service writes the port into its links even where it is the usual one."""
        return self.base if self.base.count(":") > 1 else f"{self.base}:443"

    def _delete(self, call: Call, name: str) -> Answer:
        found, made = self._found(name, "")
        found.deleted, found.moving = True, time.monotonic() + self.recovery
        return as_json(200, self._deleted_bundle(found, made))

    def _get_deleted(self, call: Call, name: str) -> Answer:
        found = self.secrets.get(name.lower())
        if found is None or not found.deleted or found.is_moving:
            raise self._absent(name)
        return as_json(200, self._deleted_bundle(found, found.versions[-1]))

    def _recover(self, call: Call, name: str, _recover: str) -> Answer:
        found = self.secrets.get(name.lower())
        if found is None or not found.deleted:
            raise self._absent(name)
        if found.is_moving:
            raise _Error(409, "Conflict", "It is being deleted.", "ObjectIsBeingDeleted")
        found.deleted, found.moving = False, time.monotonic() + self.recovery
        return as_json(200, self._bundle(found, found.versions[-1], with_value=False))

    def _purge(self, call: Call, name: str) -> Answer:
        found = self.secrets.get(name.lower())
        if found is None or not found.deleted:
            raise self._absent(name)
        del self.secrets[name.lower()]
        return Answer(status=204)

    # --- inside -------------------------------------------------------------------------------

    def _found(self, name: str, version: str) -> tuple[Secret, Version]:
        found = self.secrets.get(name.lower())
        if found is None or found.deleted or found.is_moving:
            raise self._absent(name)
        if not version:
            return found, found.versions[-1]
        for made in found.versions:
            if made.id == version:
                return found, made
        raise self._absent(f"{name}/{version}")

    def _absent(self, name: str) -> _Error:
        return _Error(
            404,
            "SecretNotFound",
            f"A secret with (name/id) {name} was not found in this key vault.",
        )

    def _apply(self, made: Version, body: Mapping[str, Any]) -> None:
        """Take content type, tags and attributes in, or nothing of them."""
        kind, tags, more = body.get("contentType"), body.get("tags"), body.get("attributes") or {}
        if kind is not None and not (isinstance(kind, str) and len(kind) <= 255):
            raise _Error(400, "BadParameter", "contentType is not valid")
        if tags is not None and not _good_tags(tags):
            raise _Error(400, "BadParameter", "The tags are not valid")
        times = {name: more.get(name, getattr(made, name)) for name in ("nbf", "exp")}
        if not all(one is None or isinstance(one, int) for one in times.values()):
            raise _Error(400, "BadParameter", "nbf and exp must be numbers")
        if None not in times.values() and times["exp"] <= times["nbf"]:
            raise _Error(400, "BadParameter", "exp must be after nbf")
        if not isinstance(more.get("enabled", True), bool):
            raise _Error(400, "BadParameter", "enabled must be true or false")
        made.content_type = made.content_type if kind is None else kind
        made.tags = made.tags if tags is None else dict(tags)
        made.enabled = more.get("enabled", made.enabled)
        made.nbf, made.exp = times["nbf"], times["exp"]
        made.updated = int(time.time())

    def _bundle(self, found: Secret, made: Version, *, with_value: bool) -> dict[str, Any]:
        attributes: dict[str, Any] = {
            "enabled": made.enabled, "created": made.created, "updated": made.updated,
            "recoveryLevel": "Recoverable+Purgeable", "recoverableDays": DAYS,
        }  # fmt: skip
        attributes |= {
            name: getattr(made, name) for name in ("nbf", "exp") if getattr(made, name) is not None
        }
        body: dict[str, Any] = {
            "id": f"{self.base}/secrets/{found.name}/{made.id}", "attributes": attributes,
            "tags": dict(made.tags),
        }  # fmt: skip
        if made.content_type is not None:
            body["contentType"] = made.content_type
        return {"value": made.value, **body} if with_value else body

    def _deleted_bundle(self, found: Secret, made: Version) -> dict[str, Any]:
        now = int(time.time())
        return {
            **self._bundle(found, made, with_value=False),
            "recoveryId": f"{self.base}/deletedsecrets/{found.name}",
            "deletedDate": now, "scheduledPurgeDate": now + DAYS * 86400,
        }  # fmt: skip


def _good_tags(tags: object) -> bool:
    return (
        isinstance(tags, dict)
        and len(tags) <= MOST_TAGS
        and all(isinstance(text, str) for text in tags.values())
        and all(len(name) <= LONGEST_TAG for name in tags)
        and all(len(text) <= LONGEST_TEXT for text in tags.values())
    )
