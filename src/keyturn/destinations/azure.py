"""Azure Key Vault secrets, through azure-keyvault-secrets and azure-identity.

Each write adds a version, which agents read at once; none can be made conditional. What stands in for
that: whose a version is and which of ours stands in its tags, so that a repeated write finds the one
whose answer was lost; a surplus one is disabled; only older versions are ever disabled, by their id
(rules 9 to 11 of the protocol). Names know letters, digits and `-` only, in either case.
Sources: see `azure_calls` and `azure_login`.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field

from keyturn.core.duration import FORM
from keyturn.core.model import Target, Traits
from keyturn.destinations.azure_calls import (
    LIST,
    READ,
    RECOVER,
    RIGHTS,
    UPDATE,
    WRITE,
    Calls,
    Copy,
    Deleted,
)
from keyturn.destinations.azure_login import PUBLIC_CLOUD, AuthOptions, Login, https_origin
from keyturn.destinations.base import (
    ConnectionOptions,
    DestinationBase,
    Form,
    checked_tags,
    duration,
    rate,
)
from keyturn.destinations.entry import merged, observed, parsed, refuse_foreign, without_ours
from keyturn.errors import (
    ConfigError,
    Conflict,
    Denied,
    DestinationError,
    DestinationUnavailable,
    Rejected,
)
from keyturn.ports import NOT_KNOWN, Clock, Entry, Observed, OwnLogin

OWNER, VERSION, FENCE = "keyturn-owner", "keyturn-version", "keyturn-fence"
LONGEST_NAME = 127
MOST_TAGS = 15 - 3
STALE_READS = 5  # how often a read that is older than our own last write is made
STALE_PAUSE = 0.05
STALE_LIMIT = 60.0  # seconds after which an older answer is believed: somebody put a backup back
RECOVERY_PAUSE = 0.5
PROBED = "keyturn-probe"
_ACTIONS = (READ, LIST, WRITE, UPDATE, RECOVER)


def _tags(value: object) -> object:
    return checked_tags(value, most=MOST_TAGS, name_is_good=lambda name: 0 < len(name) <= 256)


class AzureOptions(ConnectionOptions):
    """How to reach a Key Vault."""

    vault: Annotated[
        str,
        BeforeValidator(https_origin),
        Form("https://NAME.vault.azure.net, or https://host[:port]"),
        Field(description="address of the vault"),
    ]
    auth: Annotated[AuthOptions, Form("a mapping with a method"), Field(description="login")] = (
        AuthOptions()
    )
    authority: Annotated[
        str,
        BeforeValidator(https_origin),
        Form("https://host[:port]"),
        Field(description="where logins other than managed-identity go: sovereign clouds"),
    ] = PUBLIC_CLOUD
    ca_file: Annotated[
        str | None,
        Form("an absolute path"),
        Field(description="certificates of the authority that signed the servers'"),
    ] = None
    tags: Annotated[
        Mapping[str, str],
        BeforeValidator(_tags),
        Form("a mapping of at most 12 tags, none of them keyturn-…"),
        Field(description="more tags for each version"),
    ] = {}
    write_limit: Annotated[
        float | None,
        BeforeValidator(rate),
        Form("a number of writes a second such as 20/s"),
        Field(description="most writes a second; a vault takes 30"),
    ] = 20.0
    staleness: Annotated[
        timedelta,
        BeforeValidator(duration),
        Form(FORM),
        Field(description="how far what agents read may be behind"),
    ] = timedelta(0)
    expires_after: Annotated[
        timedelta | None,
        BeforeValidator(duration),
        Form(FORM),
        Field(description="expiry shown on a version, from when it was minted"),
    ] = None
    not_before: Annotated[
        bool,
        Form("true or false"),
        Field(description="show on a version that it is not to be used before it was minted"),
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """Our own last write to a secret, and when it was by this process's own clock."""

    copy: Copy
    at: float


class AzureDestination(DestinationBase):
    """One vault."""

    Options = AzureOptions
    TRAITS = Traits(keeps_versions=True)

    def __init__(self, options: Any, *, name: str, store_id: str, clock: Clock) -> None:
        super().__init__(options, name=name, store_id=store_id, clock=clock)
        self._login = Login(
            auth=options.auth,
            vault=options.vault,
            authority=options.authority,
            ca_file=options.ca_file,
            timeout=options.call_deadline,
            name=name,
        )
        self._calls = Calls(
            vault=options.vault,
            login=self._login,
            ca_file=options.ca_file,
            timeout=options.call_deadline,
            name=name,
        )
        self._written: dict[str, _Written] = {}
        self._guard = threading.Lock()

    @property
    def traits(self) -> Traits:
        """What this destination can do."""
        return replace(super().traits, staleness=self.options.staleness)

    def identity(self, target: Target) -> str:
        """Return vault and secret, in lower case: the service tells no cases apart."""
        host = self.options.vault.partition("://")[2]
        return f"azure:{host}/{self.place(target)}".lower()

    def place(self, target: Target) -> str:
        """Return the name of a secret: `/`, `.` and `_` become `-`. Raises ConfigError."""
        return _name(super().place(target))

    @property
    def login_ends_in(self) -> timedelta | None:
        """How long the certificate of our login is good, where it is one."""
        return self._login.ends_in

    def own_login(self) -> OwnLogin:
        """Say when the certificate of our login ends; of a client secret nobody tells us."""
        method, left = self.options.auth.method, self._login.ends_in
        if left is not None:
            return OwnLogin(method=method, ends_at=datetime.now(UTC) + left)
        renewed = method in ("managed-identity", "workload-identity")
        note = "the platform renews it" if renewed else f"{NOT_KNOWN}the first login shows it"
        if method == "client-secret":
            note = f"{NOT_KNOWN}Azure tells only people (App registrations, Certificates & secrets)"
        return OwnLogin(method=method, note=note)

    def close(self) -> None:
        """Close what is open."""
        super().close()
        self._calls.close()
        self._login.close()

    @classmethod
    def least_policy(cls, options: Any, entries: Sequence[tuple[Target, str]]) -> str:
        """Return a custom role, and the scopes to assign it at: one secret each. JSON."""
        group = "/subscriptions/SUBSCRIPTION/resourceGroups/GROUP"
        vault = (urlsplit(options.vault).hostname or "").partition(".")[0]
        names = sorted({_placed(options, target).lower() for target, _ in entries})
        role = {
            "Name": f"Keyturn {vault}",
            "Description": "Rotates the secrets of agents, without deleting any",
            "IsCustom": True,
            "Actions": [],
            "NotActions": [],
            "DataActions": [RIGHTS + action for action in _ACTIONS],
            "NotDataActions": [],
            "AssignableScopes": [group],
        }
        base = f"{group}/providers/Microsoft.KeyVault/vaults/{vault}/secrets"
        found = {"role": role, "scopes": [f"{base}/{name}" for name in names]}
        return json.dumps(found, indent=2)

    def _probe(self) -> str:
        """Log in, and ask for a secret that nobody has: a right to it is not needed for an answer."""
        try:
            self._calls.get(PROBED)
        except Denied as error:
            if READ not in str(error):
                raise
        return f"{self.options.vault}: logged in by {self.options.auth.method}"

    def _probe_entry(self, target: Target, retire: str) -> Observed:
        """Try the rights that show without a write; the right to write shows with one only."""
        name = self.place(target)
        found = self._observe(target)
        self._calls.versions(name)
        self._calls.may_update(name)
        return found

    # --- reading ----------------------------------------------------------------------------

    def _observe(self, target: Target) -> Observed:
        name = self.place(target)
        latest = self._latest(name)
        if latest is None:
            return Observed()
        owner = self._owner(name, latest)
        values = _values(latest)
        if values is None:
            # Disabled, or no entry: what others may hold in it is not ours to replace.
            foreign = latest.enabled or not self._wrote(latest)
            return Observed(
                exists=True, other_keys=foreign, owner=owner, token=latest.version,
                locator="" if latest.enabled else latest.version,
            )  # fmt: skip
        return observed(
            target.keys, values, owner=owner, token=latest.version, locator=latest.version
        )

    def _latest(self, name: str) -> Copy | None:
        """Read the latest version; one that is older than our own last write is read again."""
        for attempt in range(STALE_READS):
            found = self._calls.get(name)
            if found is not None and not found.version:
                disabled = [copy for copy in self._calls.versions(name) if not copy.enabled]
                # Times have seconds only: of two in one second it is the one that is not ours.
                found = max(
                    disabled, key=lambda c: (c.created, not self._wrote(c), c.version), default=None
                )
                if found is None:
                    raise self._incomplete()
            if not self._is_behind(name, found):
                return found
            time.sleep(STALE_PAUSE * 2**attempt)
        if found is not None:
            raise DestinationUnavailable(
                f"{self.name}: only stale answers for the secret", sent=False
            )
        with self._guard:
            self._written.pop(name.lower(), None)  # somebody has deleted it
        return None

    def _is_behind(self, name: str, found: Copy | None) -> bool:
        with self._guard:
            ours = self._written.get(name.lower())
        if ours is None or time.monotonic() - ours.at > STALE_LIMIT:
            return False
        if found is None:
            return True
        return found.version != ours.copy.version and found.created < ours.copy.created

    def _owner(self, name: str, latest: Copy) -> str | None:
        """Return whose the secret is. A version that somebody else added has no mark of its own.

        Then the newest marked one tells; of two of the same second it is another store's.
        """
        if OWNER in latest.tags:
            return latest.tags[OWNER]
        marked = [copy for copy in self._calls.versions(name) if OWNER in copy.tags]
        newest = max((copy.created for copy in marked), default=None)
        owners = {copy.tags[OWNER] for copy in marked if copy.created == newest}
        return max(owners - {self.store_id} or owners, default=None)

    def _looked_through(self, name: str) -> tuple[list[Copy], Copy | None]:
        """List the versions, and then read the latest one. In this order, and no other.

        What was listed before, and is not the latest now, never will be it again: it can be disabled.
        The other way round the newest of the list may be what agents read by then [measured].
        """
        copies = self._calls.versions(name)
        return copies, self._latest(name)

    def _incomplete(self) -> DestinationUnavailable:
        return DestinationUnavailable(f"{self.name}: the list of versions has a gap", sent=False)

    def _wrote(self, copy: Copy) -> bool:
        return copy.tags.get(OWNER) == self.store_id

    # --- writing ----------------------------------------------------------------------------

    def _activate(self, target: Target, entry: Entry, expected: str) -> str:
        name = self.place(target)
        copies, latest = self._looked_through(name)
        shown = self._replaceable(target, latest)
        wanted = merged(target, shown, entry)
        if latest is not None and _is_same(latest, shown, wanted, entry):
            self._disable(name, self._surplus(copies, latest, entry.version_id))
            return latest.version
        owner = self._owner(name, latest) if latest is not None else None
        refuse_foreign(target, shown, owner=owner, store_id=self.store_id)
        written = self._put(target, name, wanted, entry)
        self._disable(name, self._surplus(copies, written, entry.version_id))
        return written.version

    def _replaceable(self, target: Target, latest: Copy | None) -> Mapping[str, Any]:
        """Return the values that a write would replace. Raises Rejected where nobody knows them."""
        if latest is None:
            return {}
        values = _values(latest)
        if values is not None:
            return values
        if latest.enabled:
            raise Rejected(f"{self.name}: the entry is no JSON object")
        if target.merge or not self._wrote(latest):
            raise Rejected(
                f"{self.name}: the latest version is disabled, what it holds cannot be read",
                hint="enable it, or purge the secret",
            )
        return {}

    def _surplus(self, copies: Sequence[Copy], shown: Copy, version_id: str) -> list[Copy]:
        """Return what a lost answer has left: copies of ours beside the one of their version to keep.

        Kept is what is shown, and of an older version the newest: a request whose answer was lost
        can have landed later than its repetition.
        """
        found: list[Copy] = []
        kept = {version_id: shown.version}
        for copy in sorted(_older(copies, shown), key=_age, reverse=True):
            of = copy.tags.get(VERSION)
            if of is None or not copy.enabled or not self._wrote(copy):
                continue
            if kept.setdefault(of, copy.version) != copy.version:
                found.append(copy)
        return found

    def _disable(self, name: str, copies: Sequence[Copy]) -> None:
        for copy in copies:
            self._calls.disable(name, copy.version)

    def _put(self, target: Target, name: str, wanted: Mapping[str, Any], entry: Entry) -> Copy:
        tags = {OWNER: entry.owner, VERSION: entry.version_id, FENCE: str(entry.fence)}
        after = self.options.expires_after
        try:
            written = self._calls.put(
                name,
                _text(wanted),
                tags={**self.options.tags, **tags},
                not_before=entry.minted_at if self.options.not_before else None,
                expires_on=entry.not_after if after is None else entry.minted_at + after,
            )
        except Deleted:
            self._bring_back(target, name)
            raise Conflict from None
        self._remember(name, written)
        return written

    def _remember(self, name: str, written: Copy) -> None:
        with self._guard:
            self._written[name.lower()] = _Written(
                copy=replace(written, value=None), at=time.monotonic()
            )

    def _bring_back(self, target: Target, name: str) -> None:
        """Recover a deleted secret and wait until it is there: a name cannot be used otherwise.

        Its last version is shown again until ours replaces it.
        """
        marks = self._calls.deleted(name)
        if marks is not None and not (
            target.adopt or target.merge or marks.get(OWNER) == self.store_id
        ):
            raise Rejected(
                f"{self.name}: a deleted secret has that name, and is not ours",
                hint="purge it, or recover it and set adopt: true",
            )
        self._calls.recover(name)
        until = time.monotonic() + self.options.call_deadline.total_seconds() / 2
        while self._calls.get(name) is None:
            if time.monotonic() > until:
                raise DestinationUnavailable(
                    f"{self.name}: the deleted secret is being recovered", sent=False
                )
            time.sleep(RECOVERY_PAUSE)

    def _withdraw(self, target: Target, owner: str, version_id: str, expected: str) -> str:
        """Add a version without our keys: the old ones are cleaned like any copy."""
        name = self.place(target)
        latest = self._latest(name)
        if latest is None:
            return ""
        values = _values(latest) or {}
        marked = self._owner(name, latest)
        left = without_ours(target, values, marked=marked, owner=owner, version_id=version_id)
        if left is None:
            return latest.version
        kept = {tag: latest.tags[tag] for tag in (FENCE,) if tag in latest.tags}
        tags = {**self.options.tags, OWNER: owner, **kept}
        written = self._calls.put(name, _text(left), tags=tags, not_before=None, expires_on=None)
        self._remember(name, written)
        return written.version

    def _retire(self, target: Target, version_id: str, locator: str, how: str) -> None:
        """Disable a version and its twins, never the latest. One alone cannot be destroyed here."""
        name = self.place(target)
        copies, latest = self._looked_through(name)
        if latest is None:
            return
        if locator == latest.version:
            raise Rejected(f"{self.name}: that copy is the one shown")
        if all(copy.version != latest.version for copy in copies):
            raise self._incomplete()  # broken, too old, or somebody has just written
        for copy in _older(copies, latest):
            if copy.enabled and self._is_copy(name, target, copy, version_id, locator):
                self._calls.disable(name, copy.version)

    def _is_copy(
        self, name: str, target: Target, copy: Copy, version_id: str, locator: str
    ) -> bool:
        """Whether a version is this one of ours. SECURITY: tags can be changed, values cannot."""
        if copy.tags.get(VERSION) == version_id:
            return True
        if copy.version != locator:
            return False
        found = self._calls.get(name, copy.version)
        values = _values(found) if found is not None else None
        return values is not None and values.get(target.keys.version) == version_id

    def _translate(self, error: Exception) -> DestinationError:
        """Name what got past `azure_calls`: a broken answer, since faults of ours are told apart."""
        if isinstance(error, DestinationError):
            return error
        return DestinationUnavailable(f"{self.name}: {type(error).__name__}")


def _name(path: str) -> str:
    name = re.sub(r"[/._]", "-", path)
    if len(name) > LONGEST_NAME:
        raise ConfigError(
            f"expected a path of at most {LONGEST_NAME} characters, the prefix included",
            hint="the names of secrets are no longer in a Key Vault",
        )
    return name


def _placed(options: AzureOptions, target: Target) -> str:
    return _name(f"{options.prefix}/{target.path}" if options.prefix else target.path)


def _older(copies: Sequence[Copy], shown: Copy) -> list[Copy]:
    """Return what was written before the one that is shown, by its time as well.

    SECURITY: a read that is behind would show an older one, and the real one would be disabled.
    """
    return [c for c in copies if c.version != shown.version and c.created <= shown.created]


def _age(copy: Copy) -> tuple[datetime, str]:
    return copy.created, copy.version


def _values(copy: Copy) -> Mapping[str, Any] | None:
    """Return what an entry holds; None where it is disabled or no JSON object."""
    return None if copy.value is None else parsed(copy.value)


def _text(values: Mapping[str, Any]) -> str:
    """Write values, in ASCII: somebody's half of a surrogate pair cannot be sent otherwise."""
    return json.dumps(values)


def _is_same(latest: Copy, shown: Mapping[str, Any], wanted: object, entry: Entry) -> bool:
    return (
        latest.tags.get(VERSION) == entry.version_id
        and latest.tags.get(OWNER) == entry.owner
        and shown == wanted
    )
