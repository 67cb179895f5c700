"""The nouns of a rotation, as frozen values. No clock, no randomness, no I/O.

A `Case` is everything durable about one credential: the saga loads it, `lifecycle` decides on it
and returns a changed one, the journal saves the difference. `Credential.revision` counts the
changes of the whole case; every save is conditional on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum


class VersionState(StrEnum):
    """States of a version; the moves between them are in `lifecycle.MOVES`."""

    PENDING = "pending"
    CURRENT = "current"
    PREVIOUS = "previous"
    KEPT = "kept"
    RETIRED = "retired"
    REVOKED = "revoked"


ACCEPTED = frozenset(
    {VersionState.PENDING, VersionState.CURRENT, VersionState.PREVIOUS, VersionState.KEPT}
)


class AgentState(StrEnum):
    """What people decided about an agent; a file decides none of it. `removed` is for ever."""

    ENABLED = "enabled"
    SUSPENDED = "suspended"
    REMOVED = "removed"


UNMANAGED = "unmanaged"  # what is shown of an enabled agent that disappeared from the files


class ManagedBy(StrEnum):
    """Who owns the definition of an agent: a file or the command line, never both."""

    FILE = "file"
    COMMAND = "command"


class RotationState(StrEnum):
    """Open: running, waiting (goes on by itself), stalled (a person decides). The rest are ends."""

    RUNNING = "running"
    WAITING = "waiting"
    STALLED = "stalled"
    DONE = "done"
    ABANDONED = "abandoned"
    CLOSED = "closed"  # its agent or its version was revoked


OPEN = frozenset({RotationState.RUNNING, RotationState.WAITING, RotationState.STALLED})


class Cause(StrEnum):
    """Why a rotation was opened."""

    FIRST = "first"
    SCHEDULE = "schedule"
    REQUEST = "request"
    REISSUE = "reissue"
    DRIFT = "drift"  # a destination shows what it should not, and no copy of current is elsewhere
    NEW_DESTINATION = "new-destination"
    NEW_LOGIN = "new-login"


class WaitReason(StrEnum):
    """Why a rotation waits."""

    DESTINATION = "destination"
    VERIFIERS = "verifiers"
    ACCEPTED_LIMIT = "accepted-limit"
    FOREIGN_STAGED = "foreign-staged"


class Effect(StrEnum):
    """What an intent is about to do at a destination."""

    STAGE = "stage"
    ACTIVATE = "activate"
    RETIRE = "retire"
    WITHDRAW = "withdraw"


class Outcome(StrEnum):
    """How an intent ended. One without an outcome is unresolved.

    SETTLED: never reported, but it can no longer land.
    """

    DONE = "done"
    FAILED = "failed"
    SETTLED = "settled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """The names under which an entry holds the three parts."""

    id: str = "id"
    secret: str = "secret"  # noqa: S105 - a key name
    version: str = "version"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One destination of one agent: a connection and a place under its prefix."""

    to: str
    path: str
    keys: Keys = Keys()
    merge: bool = False
    adopt: bool = False

    @property
    def key(self) -> str:
        """Its name in intents, placements and messages."""
        return f"{self.to}:{self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """A workload that holds a credential. `uid` is the surrogate key, `name` what people type.

    `listed` is False for one that disappeared from the files: accepted still, rotated no more. It is
    a mark beside the state, so that no reload can lift a suspension (I3). `file` is the one that it
    belongs to, or belonged to last.
    """

    uid: str
    name: str
    login: str
    owner: str | None = None
    policy: str = "default"
    managed_by: ManagedBy = ManagedBy.FILE
    state: AgentState = AgentState.ENABLED
    targets: tuple[Target, ...] = ()
    listed: bool = True
    file: str | None = None

    @property
    def rotates(self) -> bool:
        """Whether anything new is published for it."""
        return self.state is AgentState.ENABLED and self.listed

    @property
    def shown_state(self) -> str:
        """The word for its state: an enabled agent that no file names is `unmanaged`."""
        left = self.state is AgentState.ENABLED and not self.listed
        return UNMANAGED if left else str(self.state)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A rotation that a person asked for; it waits here until the saga opens it."""

    cause: Cause = Cause.REQUEST
    grace: timedelta | None = None
    by: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """What the last sweep found at one destination that is not as it should be."""

    target: str
    kind: str  # missing | older | revoked | unknown | unreadable
    since: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the last sweep that could read a destination saw there; `shown` is "" for none of ours."""

    target: str
    at: datetime
    shown: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repairs:
    """When one entry was mended lately, and since when somebody undoes that; see `core.repair`."""

    target: str
    at: tuple[datetime, ...] = ()
    fight: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """A named thing that an agent holds, of one kind. Versions belong to it.

    `seq` is the last sequence number given to a version: "later" and "older" mean this number.
    `wake_at` is when the saga must look again; the due-queue is an index over it. `withheld` names
    the connections where a secret leaked: they get nothing until a person names them again.
    """

    uid: str
    agent_uid: str
    name: str = "default"
    kind: str = "secret"
    seq: int = 0
    next_rotation_at: datetime | None = None
    sweep_at: datetime | None = None
    wake_at: datetime | None = None
    request: Request | None = None
    successor_owed: bool = False
    leaving: tuple[Target, ...] = ()
    withheld: tuple[str, ...] = ()
    drift: tuple[Drift, ...] = ()
    looks: tuple[Look, ...] = ()
    repairs: tuple[Repairs, ...] = ()
    revision: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One immutable value of a credential. Only its hash is here.

    `exposed` is set in the transaction that journals its first activation intent. `fence` is the
    fence that was journalled at accept: entry bytes are a function of the secret and of fields
    like this one, so that a re-write after a takeover has the same bytes. So is `login`, what the
    agent presents beside it: one that still reads the old entry goes on with its old login.
    `deadline` ends a grace; `not_after` is the maximum age of a policy that enforces it. `landed_at` is
    when its last activation had surely landed or could land no more: a read soon after may be behind.
    """

    id: str
    credential_uid: str
    seq: int
    login: str
    state: VersionState
    scheme: str
    digest: str
    tag: bytes | None = None
    origin: str = "generated"
    exposed: bool = False
    fence: int = 0
    minted_at: datetime
    landed_at: datetime | None = None
    promoted_at: datetime | None = None
    deadline: datetime | None = None
    not_after: datetime | None = None
    ended_at: datetime | None = None

    def over(self, now: datetime) -> bool:
        """Whether it is refused whatever its state: its grace or its maximum age has passed."""
        return any(end is not None and end <= now for end in (self.deadline, self.not_after))

    @property
    def accepted(self) -> bool:
        """Whether its state is one that the verifier accepts (its deadline apart)."""
        return self.state in ACCEPTED


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Why a rotation waits, where, since when, and when it tries again.

    `detail` is what a destination's error of ours says, the missing permission for one.
    """

    reason: WaitReason
    where: str = ""
    code: str = ""
    detail: str = ""
    since: datetime
    next_try_at: datetime
    tries: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """One saga. Its list of destinations is fixed when it opens."""

    uid: str
    credential_uid: str
    cause: Cause
    state: RotationState = RotationState.RUNNING
    version_id: str | None = None
    attempt: int = 0
    targets: tuple[Target, ...] = ()
    grace: timedelta | None = None
    opened_at: datetime
    waiting: Waiting | None = None
    error_code: str = ""
    error_where: str = ""
    error_detail: str = ""
    closed_at: datetime | None = None

    @property
    def open(self) -> bool:
        """Whether it still has something to do."""
        return self.state in OPEN


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """What is journalled before an effect. `expected` is the compare-and-set token, as text."""

    uid: str
    credential_uid: str
    version_id: str
    target: str
    effect: Effect
    expected: str = ""
    writer: str
    fence: int
    incarnation: int
    at: datetime
    outcome: Outcome | None = None
    ended_at: datetime | None = None

    @property
    def unresolved(self) -> bool:
        """Whether nobody knows yet if it landed."""
        return self.outcome is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """An immutable copy of a version at a destination that keeps copies.

    `locator` names it there (a Vault version number, an Azure version id); "" where there is none.
    """

    version_id: str
    credential_uid: str
    target: str
    locator: str = ""
    gone: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Everything durable about one credential.

    `rotation` is the open one, or None. `intents` are the unresolved ones, `versions` those that are
    accepted, those that some placement still holds, and the newest of the others (so that a
    destination that shows an old one is recognised).
    """

    agent: Agent
    credential: Credential
    versions: tuple[Version, ...] = ()
    rotation: Rotation | None = None
    intents: tuple[Intent, ...] = ()
    placements: tuple[Placement, ...] = ()

    def version(self, version_id: str | None) -> Version | None:
        """Return the version with this id, if the case has it."""
        return next((v for v in self.versions if v.id == version_id), None)

    @property
    def current(self) -> Version | None:
        """The version that agents should hold."""
        return next((v for v in self.versions if v.state is VersionState.CURRENT), None)

    @property
    def pending(self) -> Version | None:
        """The version of the open attempt."""
        return next((v for v in self.versions if v.state is VersionState.PENDING), None)

    @property
    def accepted(self) -> tuple[Version, ...]:
        """Every version in an accepted state, oldest first."""
        return tuple(sorted((v for v in self.versions if v.accepted), key=lambda v: v.seq))

    @property
    def next_targets(self) -> tuple[Target, ...]:
        """Every destination that the next rotation publishes to."""
        withheld = self.credential.withheld
        return tuple(target for target in self.agent.targets if target.to not in withheld)

    @property
    def targets(self) -> tuple[Target, ...]:
        """Every destination that must be looked at: of the rotation, of the agent, leaving."""
        of_rotation = self.rotation.targets if self.rotation else ()
        every = (*of_rotation, *self.agent.targets, *self.credential.leaving)
        return tuple({target.key: target for target in reversed(every)}.values())[::-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Back-off of retryable errors, and when an intent without an answer is settled."""

    first: timedelta = timedelta(seconds=2)
    max: timedelta = timedelta(minutes=15)
    settle_after: timedelta = timedelta(minutes=5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What an adapter declares about its destination; nothing is ever sniffed.

    can_stage           a version can be written without becoming what agents read
    has_cas             a write can be made conditional on what was read
    keeps_versions      older values stay readable as immutable copies
    settles_with_writer a dead writer's request cannot land any more (files)
    staleness           how long an ordinary read may lag behind a write
    minimum_interval    shortest interval of rotations that its quotas carry
    call_deadline       time for the whole answer of one call; belongs to the connection, not to a
                        policy, since agents of several policies share its lanes
    """

    can_stage: bool = False
    has_cas: bool = False
    keeps_versions: bool = False
    settles_with_writer: bool = False
    staleness: timedelta = timedelta(0)
    minimum_interval: timedelta = timedelta(0)
    call_deadline: timedelta = timedelta(seconds=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """When a credential rotates and how long its old versions live. See `policy` for the rules."""

    name: str = "default"
    every: timedelta | None = timedelta(days=30)  # None with `cron`, or for manual only
    cron: str | None = None
    zone: str = "UTC"
    window: str | None = None
    jitter: float = 0.1  # share of `every`, early only
    grace: timedelta = timedelta(hours=48)
    consumer_cache: timedelta = timedelta(hours=24)
    max_age: timedelta | None = timedelta(days=90)
    enforce_max_age: bool = False
    first_rotation: str = "after-first-use"  # next-slot | now
    retry: Retry = field(default_factory=Retry)
    retire: str = "disable"  # leave | disable | destroy
    scheme: str = "argon2id"  # or hmac-sha256: how the store keeps what is minted from now on

    @property
    def lifetime(self) -> timedelta | None:
        """After which a version is refused; None where age alone refuses nothing."""
        return self.max_age if self.enforce_max_age else None
