"""The daemon's own credentials: what one is, its moves, and what comes next. Pure.

A small sibling of `lifecycle` and `decision` for a credential that an authority mints and the daemon
itself reads from a file (ADR 22). One keeps its rules: an intent before each effect, nothing is cut
before what replaces it was proven and is what the file shows, and a crash leaves at most one extra.

    minting → pending → current → previous → retired
    minting | pending → surplus → retired              made, and never what the file showed
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

SURPLUS_LIMIT = 3  # made, of no use, and not destroyed: no more of them then
RENEW_AT = 2 / 3  # of what the authority lets one live
_FIRST_PAUSE, _LONGEST_PAUSE = timedelta(seconds=5), timedelta(minutes=15)


class OwnState(StrEnum):
    """Where a version of an own credential is in its life."""

    MINTING = "minting"  # asked for: whether it was made is not known
    PENDING = "pending"
    CURRENT = "current"
    PREVIOUS = "previous"
    SURPLUS = "surplus"
    RETIRED = "retired"


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnVersion:
    """One value; `accessor` is the authority's public name of it, "" until that is known."""

    id: str
    state: OwnState
    at: datetime  # asked for; made, where somebody else did that
    accessor: str = ""
    ends_at: datetime | None = None  # by the authority
    deadline: datetime | None = None  # of a previous one


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnProblem:
    """Why the last run ended early."""

    code: str
    detail: str
    since: datetime
    tries: int
    until: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """Everything durable about the credential of one connection on one host."""

    connection: str
    host: str
    revision: int = 0
    rotated_at: datetime | None = None
    versions: tuple[OwnVersion, ...] = ()
    problem: OwnProblem | None = None

    def only(self, *states: OwnState) -> Iterator[OwnVersion]:
        """Yield the versions in these states, oldest first."""
        return (one for one in self.versions if one.state in states)

    @property
    def current(self) -> OwnVersion | None:
        """What the daemon logs in with."""
        return next(self.only(OwnState.CURRENT), None)

    def version(self, version_id: str) -> OwnVersion:
        """Return one of them. Raises LookupError."""
        return next(one for one in self.versions if one.id == version_id)

    def by_accessor(self, accessor: str) -> OwnVersion | None:
        """Return the version that the authority calls so; retired ones are not kept."""
        return next((one for one in self.versions if one.accessor == accessor), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnPlan:
    """How often it is replaced, and how long the one before stays good."""

    every: timedelta
    grace: timedelta
    settle_after: timedelta = timedelta(minutes=5)  # a request that got no answer may land so late


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnRun:
    """What one run has seen with its own eyes; it dies with the run."""

    shown: str | None = None  # accessor of what the file holds
    holding: str | None = None  # id of the version whose plaintext is in memory
    proven: str | None = None
    searched: bool = False
    barred: bool = False  # nothing could be destroyed: that must not keep a new one from being made


class OwnStep(StrEnum):
    """What comes next."""

    LOOK = "look"
    ADOPT = "adopt"
    SEARCH = "search"
    MINT = "mint"
    PROVE = "prove"
    PUBLISH = "publish"
    PROMOTE = "promote"
    DISCARD = "discard"
    DESTROY = "destroy"
    REST = "rest"


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnAction:
    """A step, the version that it is about, and for a rest until when."""

    step: OwnStep
    version_id: str = ""
    until: datetime | None = None


def decide(own: Own, run: OwnRun, plan: OwnPlan, now: datetime) -> OwnAction:
    """Say what comes next. Total; what is over goes first, or each crash would leave one more."""
    if run.shown is None:
        return OwnAction(step=OwnStep.LOOK)
    shown = own.by_accessor(run.shown)
    if shown is None or shown.state not in (OwnState.CURRENT, OwnState.PENDING):
        return OwnAction(step=OwnStep.ADOPT)
    if not run.searched and any(own.only(OwnState.MINTING)):
        return OwnAction(step=OwnStep.SEARCH)
    for one in own.only(OwnState.PENDING):
        return OwnAction(step=_of_pending(one, run), version_id=one.id)
    over = list(_over(own, now))
    if over and not run.barred:
        return OwnAction(step=OwnStep.DESTROY, version_id=over[0].id)
    due, surplus = due_at(own, plan), sum(1 for _ in own.only(OwnState.SURPLUS))
    if due is not None and due <= now and surplus < SURPLUS_LIMIT:
        return OwnAction(step=OwnStep.MINT)
    return OwnAction(step=OwnStep.REST, until=_next_look(own, plan, due))


def _over(own: Own, now: datetime) -> Iterator[OwnVersion]:
    yield from own.only(OwnState.SURPLUS)
    for one in own.only(OwnState.PREVIOUS):
        if one.deadline is not None and one.deadline <= now:
            yield one


def _of_pending(one: OwnVersion, run: OwnRun) -> OwnStep:
    if one.accessor == run.shown:
        return OwnStep.PROMOTE if run.proven == one.id else OwnStep.PROVE
    if run.holding != one.id:
        return OwnStep.DISCARD  # nobody knows its text any more
    return OwnStep.PUBLISH if run.proven == one.id else OwnStep.PROVE


def due_at(own: Own, plan: OwnPlan) -> datetime | None:
    """Say when the current one is to be replaced; earlier where the authority ends it soon."""
    current = own.current
    if current is None:
        return None
    due = current.at + plan.every
    if current.ends_at is not None:
        due = min(due, current.at + (current.ends_at - current.at) * RENEW_AT)
    return due


def _next_look(own: Own, plan: OwnPlan, due: datetime | None) -> datetime | None:
    instants = [one.deadline for one in own.only(OwnState.PREVIOUS)]
    instants += [one.at + plan.settle_after for one in own.only(OwnState.MINTING)]
    return min((one for one in (due, *instants) if one is not None), default=None)


# --- moves ------------------------------------------------------------------------------------


def minting(own: Own, version_id: str, *, now: datetime) -> Own:
    """The intent to have one made."""
    made = OwnVersion(id=version_id, state=OwnState.MINTING, at=now)
    return replace(own, versions=(*own.versions, made))


def made(own: Own, version_id: str, *, accessor: str, ends_at: datetime | None) -> Own:
    """The authority has made it."""
    return _changed(own, version_id, state=OwnState.PENDING, accessor=accessor, ends_at=ends_at)


def discarded(own: Own, version_id: str) -> Own:
    """It was made, and nobody can use it any more: it is to be destroyed."""
    return _changed(own, version_id, state=OwnState.SURPLUS)


def retired(own: Own, version_id: str) -> Own:
    """It is gone, or was never made."""
    return _changed(own, version_id, state=OwnState.RETIRED, deadline=None)


def not_found(own: Own, found: Iterable[str], plan: OwnPlan, *, now: datetime) -> Own:
    """Let those go that were asked for, are not there, and cannot come any more."""
    for one in own.only(OwnState.MINTING):
        if one.id not in set(found) and one.at + plan.settle_after <= now:
            own = retired(own, one.id)
    return own


def shows(own: Own, version: OwnVersion, *, grace: timedelta, now: datetime) -> Own:
    """What the file shows is current; the one before it gets a deadline."""
    if own.current is not None and own.current.id != version.id:
        own = _changed(own, own.current.id, state=OwnState.PREVIOUS, deadline=now + grace)
    others = tuple(one for one in own.versions if one.id != version.id)
    current = replace(version, state=OwnState.CURRENT, deadline=None)
    return replace(own, versions=(*others, current))


def failed(own: Own, code: str, detail: str, *, now: datetime) -> Own:
    """Remember why a run ended early, and try again later and later."""
    before = own.problem
    tries = before.tries + 1 if before else 1
    pause = min(_FIRST_PAUSE * 2 ** min(tries - 1, 16), _LONGEST_PAUSE)
    since = before.since if before else now
    problem = OwnProblem(code=code, detail=detail, since=since, tries=tries, until=now + pause)
    return replace(own, problem=problem)


def _changed(own: Own, version_id: str, **changes: object) -> Own:
    versions = tuple(
        replace(one, **changes) if one.id == version_id else one  # type: ignore[arg-type]
        for one in own.versions
    )
    return replace(own, versions=versions)
