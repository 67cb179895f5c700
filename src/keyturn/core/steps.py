"""What a run knows, and the steps that `decision` chooses between: frozen values, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from keyturn.core.model import (
    Cause,
    Drift,
    Effect,
    Intent,
    Placement,
    Policy,
    Target,
    Traits,
    WaitReason,
)

ACCEPTED_LIMIT = 4


# --- what a run knows ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What the ordinary read of one destination gave in this run.

    shown     the version of ours that agents read there, recognised by its tag; else None
    verified  what is shown equals, byte for byte, the plaintext that this run holds
    blocked   a code where a write of ours would hit what is not ours to replace; else ""
    staged    the version of ours that is staged there; `foreign_staged` where it is somebody else's
    empty     there is no value at all, so that even staging shows it (rule 8)
    """

    shown: str | None = None
    verified: bool = False
    blocked: str = ""
    staged: str | None = None
    foreign_staged: bool = False
    empty: bool = False
    token: str = ""
    locator: str = ""
    fresh: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """A destination that failed in this run. Permanent ones need a person; `detail` says it in words."""

    code: str
    detail: str = ""
    permanent: bool = False
    retry_after: timedelta | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one run under one claim knows by itself. Lost with it, on purpose."""

    writer: str
    sights: Mapping[str, Sight] = field(default_factory=dict)
    troubles: Mapping[str, Trouble] = field(default_factory=dict)
    read_back: frozenset[str] = frozenset()  # targets whose staged copy was verified
    no_copy: frozenset[str] = frozenset()  # targets that were searched for a copy in vain
    # Where which write of it was confirmed; what takes away also where it was tried in vain.
    written: frozenset[tuple[str, Effect]] = frozenset()
    unmended: frozenset[str] = frozenset()  # that refused a repair for good
    holding: str | None = None  # the version whose plaintext is in memory
    settled: bool = False  # every verifier has applied the epoch of the accept
    in_flight: frozenset[str] = frozenset()  # intents whose call has not returned
    died: Mapping[str, datetime] = field(default_factory=dict)  # writers known to be dead

    def saw(self, where: str, sight: Sight) -> Run:
        """A destination was read."""
        return replace(self, sights={**self.sights, where: sight})

    def unsaw(self, where: str) -> Run:
        """What was seen there counts no more: it must be read again."""
        return replace(self, sights={k: sight for k, sight in self.sights.items() if k != where})

    def met(self, where: str, trouble: Trouble) -> Run:
        """A destination failed; nothing seen there counts."""
        return replace(self.unsaw(where), troubles={**self.troubles, where: trouble})

    def wrote(self, where: str, effect: Effect) -> Run:
        """A write was confirmed."""
        return replace(self, written=self.written | {(where, effect)})

    def searched(self, where: str, *, found: bool = False) -> Run:
        """A copy was looked for there, in vain unless `found`."""
        return replace(self, no_copy=self.no_copy - {where} if found else self.no_copy | {where})

    def gave_up(self, where: str) -> Run:
        """A repair was refused for good."""
        return replace(self, unmended=self.unmended | {where})

    def wiped(self) -> Run:
        """The attempt's plaintext is gone, and with it what was known of its version."""
        return Run(
            writer=self.writer,
            sights=self.sights,
            troubles=self.troubles,
            in_flight=self.in_flight,
            died=self.died,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What does not change during a run: the policy and what each destination declares."""

    policy: Policy
    traits: Mapping[str, Traits]  # by target key
    max_accepted: int = ACCEPTED_LIMIT
    paused: bool = (
        False  # the clock jumped: no due work, no retirement, until it is back or trusted
    )


# --- what can come next -------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One of the steps below. `target` is where, `version_id` which, `intent` about what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Open(Action):
    """Open a rotation; `drift` is what it mends."""

    cause: Cause
    drift: tuple[Drift, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Observe(Action):
    """Read what agents read there."""

    target: Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Mint(Action):
    """Mint a version and have the authority accept it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recover(Action):
    """Take the pending plaintext from the copy that a destination holds, if it proves right."""

    target: Target


@dataclass(frozen=True, slots=True, kw_only=True)
class DropAttempt(Action):
    """No copy is left anywhere: keep or retire the attempt's version and mint again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AwaitVerifiers(Action):
    """Ask whether every verifier knows the pending version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage(Action):
    """Write the version without showing it; `exposes` where that shows it all the same."""

    target: Target
    expected: str
    exposes: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadBack(Action):
    """Read the staged copy by its version id and compare it."""

    target: Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Activate(Action):
    """Make the version what agents read."""

    target: Target
    expected: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Promote(Action):
    """Every destination was read back: make it current."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle(Action):
    """The intent can no longer land."""

    intent: Intent


@dataclass(frozen=True, slots=True, kw_only=True)
class SetDeadline(Action):
    """The version is shown nowhere and nothing can show it: its grace begins."""

    version_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Retire(Action):
    """Its grace has passed and no destination shows it."""

    version_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Clean(Action):
    """Disable or destroy the copy of a version that is over."""

    target: Target
    placement: Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Forget(Action):
    """There is nothing to clean for this placement."""

    placement: Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdraw(Action):
    """Take a revoked version out of what agents read: no rotation will replace it there."""

    target: Target
    version_id: str
    expected: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyForward(Action):
    """Write current where it is missing or an older one is shown, with the secret of a copy."""

    target: Target
    source: Target
    version_id: str
    expected: str
    stages: bool
    empty: bool
    drift: Drift


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave(Action):
    """A dropped destination shows nothing of ours any more."""

    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordSweep(Action):
    """Every destination was looked at: store what is not as it should be.

    `last` where nothing of a removed agent is left anywhere: it is looked at no more.
    """

    drift: tuple[Drift, ...]
    last: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait(Action):
    """The rotation cannot go on now; `until` None means by back-off."""

    reason: WaitReason
    where: str = ""
    code: str = ""
    detail: str = ""
    until: datetime | None = None
    retry_after: timedelta | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall(Action):
    """The rotation needs a person."""

    code: str
    where: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest(Action):
    """Nothing to do before `until` (None: until something changes)."""

    until: datetime | None
