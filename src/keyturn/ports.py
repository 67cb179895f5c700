"""What the saga needs from the world, as Protocols with their promises in prose.

Adapters live in `destinations/`, `verifier/` and `storage/`; `keyturn.testing` ships the contract
suite that holds them to these promises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol

from keyturn.core.model import Case, Target, Traits, Version
from keyturn.core.own import Own
from keyturn.core.secret import Secret

# --- destinations -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What Keyturn writes for an agent: id, secret and version in one piece, and whose it is.

    `owner` is the store's id and `fence` the one journalled with the version at accept; both go into
    the owner marker. `minted_at` and `not_after` (an enforced maximum age, else None) are for stores
    that show when a value may be used. The bytes of an entry are a function of these fields alone.
    """

    login: str
    secret: Secret
    version_id: str
    owner: str
    fence: int
    minted_at: datetime
    not_after: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What the ordinary read of a destination gives.

    exists      there is an entry, whatever is in it
    has_value   our secret key is in it
    login, secret, version_id  the three parts as found, None where missing or not text
    other_keys  keys that are not ours are in it
    owner       the store id in the owner marker, None where there is no marker
    staged      version id of what is staged there, None if nothing; "" for somebody else's
    token       what a compare-and-set of the next write is compared with, as opaque text
    locator     name of the shown immutable copy ("" where there are none)
    fresh       the read came from where writes go, so it may let a version go (rule 5)
    """

    exists: bool = False
    has_value: bool = False
    login: str | None = None
    secret: Secret | None = None
    version_id: str | None = None
    other_keys: bool = False
    owner: str | None = None
    staged: str | None = None
    token: str = ""
    locator: str = ""
    fresh: bool = True


class Destination(Protocol):
    """A place where agents read, reached by one connection. Thread-safe.

    Every call answers within the connection's call deadline or raises `DestinationUnavailable` (with
    `late`, the future of the call, where its thread has not returned yet), and raises nothing but
    `DestinationError`s. None retries by itself.
    """

    @property
    def traits(self) -> Traits:
        """What this destination can do. Constant."""

    def identity(self, target: Target) -> str:
        """Return the canonical remote key of an entry, offline: two spellings, one identity.

        Raises ConfigError where the path is not allowed.
        """

    def probe(self) -> str:
        """Log in, touch nothing, and return one line about what was reached."""

    def probe_entry(self, target: Target, *, retire: str) -> Observed | None:
        """Raise what a rotation of this entry would meet, as far as it shows without a write.

        `retire` says what becomes of old copies, as in the policy. Returns what the ordinary read
        gave, for the caller to judge; None where even that would change something. Writes nothing.
        """

    def observe(self, target: Target) -> Observed:
        """Read what agents read. A missing entry is an answer; an unreadable one raises."""

    def stage(self, target: Target, entry: Entry, *, expected: str) -> str:
        """Write without showing it, return its locator. Idempotent by version id.

        Only called where `traits.can_stage`. Raises Conflict where `expected` no longer holds.
        """

    def read(self, target: Target, version_id: str) -> Observed:
        """Read a staged or shown version by its version id; `has_value` False if not there."""

    def activate(self, target: Target, entry: Entry, *, expected: str) -> str:
        """Make this version what agents read, return its locator. Idempotent by version id.

        Where the destination stages, it was staged before. With `has_cas` the write lands only if
        the token of the entry is still `expected`, else Conflict. Raises Rejected where the entry
        belongs to somebody else (create only, unless `merge` or `adopt`).
        """

    def retire(self, target: Target, *, version_id: str, locator: str, how: str) -> None:
        """Disable or destroy one immutable copy, never the one shown. Idempotent.

        `how` is `disable` or `destroy`. Removes our staging label from it as well.
        """

    def withdraw(self, target: Target, *, owner: str, version_id: str, expected: str) -> str:
        """Write the entry without our secret and version keys, return its locator. Idempotent.

        The id key and the keys of others stay; an entry without the two, or none, stays as it is, and
        none is made. Raises Conflict where the entry shows another version than `version_id`, and
        with `has_cas` where its token is no longer `expected`; Rejected where it is not `owner`'s.
        """

    def close(self) -> None:
        """Give back logins and connections."""


# --- authority ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What an authority declares about itself."""

    max_accepted: int = 4
    accepts_chosen_secret: bool = True
    can_read_back: bool = True
    revoke_one: bool = True
    probe: bool = True
    reports_use: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """What the store keeps of an accepted secret."""

    secret: Secret  # the authority's own where it does not accept a chosen one
    scheme: str
    digest: str
    tag: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How far the verifiers are with an epoch; `silent` names those that have not acknowledged it.

    Settled is also what a silent one cannot contradict any more: its lease has run out.
    """

    settled: bool
    acknowledged: int
    live: int
    silent: tuple[str, ...] = ()


class Authority(Protocol):
    """What decides whether a secret is good. Every call is idempotent by version id.

    The built-in one is the verifier store: its effects are the rows that the journal commits, so
    `set_deadline`, `revoke` and `suspend` have nothing left to do there.
    """

    @property
    def abilities(self) -> Abilities:
        """What it can do. Constant."""

    def accept(
        self, *, version_id: str, secret: Secret, credential_uid: str, scheme: str
    ) -> Accepted:
        """Make a new version acceptable, or return what makes it so when it is committed.

        `scheme` is what the policy asks for; only an authority that keeps hashes of ours heeds it.
        Raises KeyMissing where a key for it is not there.
        """

    def matches(self, version: Version, secret: Secret) -> bool:
        """Tell by the full check whether this text is that very version, accepted or not.

        Raises KeyMissing where that cannot be told without a key: it is no "no".
        """

    def resembles(self, version: Version, secret: Secret) -> bool:
        """Tell by a cheap check (the tag) whether this text can be that version."""

    def set_deadline(self, version: Version, deadline: datetime | None) -> None:
        """Let the version end at `deadline`."""

    def revoke(self, version: Version) -> None:
        """Refuse the version from now on."""

    def suspend(self, login: str, *, suspended: bool) -> None:
        """Refuse, or accept again, everything of one login."""

    def settled(self, epoch: int) -> bool:
        """Tell whether every verifier that may answer has applied this epoch."""

    def standing(self, epoch: int) -> Standing:
        """Tell the same with numbers and names. Asked first after the commit that made the epoch."""


# --- the daemon's own logins ---------------------------------------------------------------


NOT_KNOWN = "not known: "


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnLogin:
    """How a connection logs in, and when that ends unless a person does something.

    `note` says why there is no end, or begins with NOT_KNOWN. What renews itself has none.
    """

    method: str
    ends_at: datetime | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnSeen:
    """What an authority says of a credential that it has made; `owner` "" where we have not."""

    accessor: str
    owner: str = ""
    made_at: datetime | None = None
    ends_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnIssued:
    """A credential that an authority has just made."""

    secret: Secret
    accessor: str
    ends_at: datetime | None = None


class OwnAuthority(Protocol):
    """Mints the credential by which one connection logs in, and keeps it where the daemon reads it.

    The counterpart of `Authority` where the authority chooses the secret (`accepts_chosen_secret`
    False): so a version is found again by its id, never made twice. Raises DestinationErrors only.
    """

    @property
    def abilities(self) -> Abilities:
        """What it can do. Constant."""

    def look(self) -> OwnSeen:
        """Say what the file holds, asked of the authority. Raises Denied where it is no good one."""

    def refuse_unwritable(self) -> None:
        """Raise Denied where the file could not be replaced."""

    def issue(self, version_id: str, *, owner: str) -> OwnIssued:
        """Have one made that carries this id and its owner."""

    def find(self, version_ids: Sequence[str]) -> Mapping[str, OwnSeen]:
        """Return those that were made with one of these ids."""

    def prove(self, secret: Secret | None) -> None:
        """Log in with it, or with what the file holds, and give that login back. Raises Denied."""

    def publish(self, secret: Secret, *, expected: str) -> None:
        """Replace what the file holds at one stroke. Raises Conflict where it is not `expected`."""

    def destroy(self, accessor: str) -> None:
        """Have it refused from now on. Idempotent."""


class OwnJournal(Protocol):
    """The durable half of the daemon's own credentials."""

    def own(self, connection: str, host: str) -> Own | None:
        """Return what is known of one, None where nothing is."""

    def save_own(self, after: Own, *, audit: Sequence[AuditEntry]) -> Own:
        """Write it with its audit entries, all or nothing, if its revision still holds.

        Returns it with the new revision. Raises StaleRevision, StoreUnavailable.
        """


# --- the store ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The single-writer right on one credential, as granted."""

    credential_uid: str
    holder: str
    fence: int
    incarnation: int
    until: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """Who did what. `detail` holds ids, codes and times; never a secret, never a vendor's text."""

    action: str
    actor: str
    agent: str = ""
    version_id: str = ""
    outcome: str = "ok"
    detail: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What a commit returns: the case with its new revisions, and the store's epoch after it."""

    case: Case
    epoch: int


class Journal(Protocol):
    """The durable half of the saga.

    `save` is one transaction: it writes the difference of two cases if the case's revision and the
    claim's fence still hold, appends the audit entries, and bumps the epoch where verifiers must
    know. Versions that become accepted, and promotions, are appended to the ledger *before* the
    commit that allows their effect.
    """

    def claim(
        self, credential_uid: str, *, holder: str, ttl: timedelta
    ) -> tuple[Claim, Saved] | None:
        """Take the claim, with a new fence, if nobody who may be alive has it, and read the case."""

    def renew(self, claim: Claim, *, ttl: timedelta) -> Claim:
        """Prolong a claim. Raises ClaimLost."""

    def release(self, claim: Claim, *, wake_at: datetime | None) -> None:
        """Give the claim back and say when the credential must be looked at again.

        Never moves `wake_at` later than what another writer has asked for since the claim was taken.
        """

    def load(self, claim: Claim) -> Saved:
        """Read the case. Raises ClaimLost."""

    def save(
        self,
        claim: Claim,
        *,
        before: Case,
        after: Case,
        audit: Sequence[AuditEntry],
        release: bool = False,
    ) -> Saved:
        """Write the difference, all or nothing; with `release` the claim is given back with it.

        Raises StaleRevision, ClaimLost, StoreUnavailable.
        """

    def report(self, intent_uid: str, *, landed: bool) -> None:
        """Record a late outcome of one's own intent; needs no claim."""

    def writer_died_at(self, writer: str) -> datetime | None:
        """When the process that wrote an intent is known to have ended; None while it may live."""

    @property
    def store_id(self) -> str:
        """The id that entries carry as their owner."""

    @property
    def writer(self) -> str:
        """The id of this process run, as it stands in intents."""


class Clock(Protocol):
    """Time comes in here and nowhere else."""

    def now(self) -> datetime:
        """The store's time, aware, UTC."""

    def boottime(self) -> timedelta:
        """Time since boot, counting suspend: differences survive jumps of the wall clock."""
