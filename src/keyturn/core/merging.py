"""What becomes of a restored store: rows as the backup has them, and what the ledger says since then.

Pure, like all of the core. The ledger decides who is accepted; a destination decides nothing, it is
only read. Three rules make that safe:

  news      a line counts only if its incarnation and revision are later than the row's: what is older
            is in the row already, and an announcement whose commit never came was overtaken by others
  refusals  what either side has revoked stays revoked
  doubt     an accepted version that never was, by the ledger, what its row says shows that the ledger
            has a gap or ends too early: then nobody can tell, and the agent is left to a person
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from keyturn.core.model import (
    Agent,
    AgentState,
    Case,
    Credential,
    Intent,
    Rotation,
    RotationState,
    Version,
    VersionState,
)

S = VersionState
Schedule = Callable[[Case, datetime], datetime | None]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Moment:
    """Where in the life of a credential something happened: lives first, then changes."""

    incarnation: int
    revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """One line of the ledger about a credential: a version as it became, an intent, or what is owed."""

    moment: Moment
    at: datetime
    version: Version | None = None
    intent: Intent | None = None
    owed: bool | None = None
    withheld: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentNews:
    """One line of the ledger about an agent. `accepted` are all its versions where the line is a start.

    `confirmed` tells that the line's commit is known to have returned.
    """

    moment: Moment
    at: datetime
    agent: Agent
    credential: Credential
    accepted: tuple[str, ...] | None = None
    confirmed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """Everything that the ledger has about one credential, oldest first."""

    lines: tuple[News, ...] = ()
    agents: tuple[AgentNews, ...] = ()
    confirmed: Moment = Moment(incarnation=0, revision=0)

    @property
    def announced(self) -> Moment:
        """The latest moment that any line names."""
        moments = [one.moment for one in self.lines] + [one.moment for one in self.agents]
        return max(moments, default=Moment(incarnation=0, revision=0))

    @property
    def versions(self) -> frozenset[str]:
        """Every version that it names."""
        return frozenset(one.version.id for one in self.lines if one.version is not None)

    @property
    def fence(self) -> int:
        """The highest fence that it names."""
        named = [one.version.fence for one in self.lines if one.version is not None]
        named += [one.intent.fence for one in self.lines if one.intent is not None]
        return max(named, default=0)


def is_ahead(known: Known, now: Moment) -> bool:
    """Whether a store must have been replaced by an older one: the ledger knows of later commits.

    A line stands before its commit, so one announcement may be ahead of a store whose process died in
    between; what was confirmed, or what a second announcement built upon, was there.
    """
    if known.confirmed > now:
        return True
    last = known.announced
    if last.incarnation != now.incarnation:
        return last.incarnation > now.incarnation
    return last.revision > now.revision + 1


def in_doubt(case: Case, known: Known, at: Moment) -> bool:
    """Whether the ledger has a gap for this credential, so that only a person can decide."""
    if not known.agents:
        return True
    if any(one.accepted is not None and one.moment > at for one in known.agents):
        return False  # it was begun later, with all that was accepted then
    last = known.agents[-1]
    if last.confirmed and last.moment <= at and last.agent.state is not case.agent.state:
        return True
    lines = [(one.version, one.moment) for one in known.lines if one.version is not None]
    told = {_claims(version) for version, _ in lines}
    before = {version.id: version.state for version, moment in lines if moment <= at}
    return any(_claims(v) not in told or before.get(v.id) is S.RETIRED for v in case.accepted)


def _claims(version: Version) -> tuple[object, ...]:
    """Return what decides whether a secret is accepted, and which one.

    SECURITY: the hash too. Who can write a backup must not choose what an accepted id stands for.
    """
    secret = version.login, version.scheme, version.digest, version.tag, version.not_after
    return version.id, version.state, version.deadline, *secret


def merged_agent(row: Agent | None, known: Known, at: Moment | None) -> Agent | None:
    """Return what an agent is after the lines that are news to its row; None for neither.

    An announcement that was not confirmed counts where it refuses.
    """
    found = row
    for one in known.agents:
        if at is not None and one.moment <= at and row is not None:
            continue
        refuses = one.agent.state is not AgentState.ENABLED
        if one.confirmed or refuses or found is None or found.state is one.agent.state:
            found = one.agent
    return found


def merged(case: Case, known: Known, at: Moment, *, now: datetime, schedule: Schedule) -> Case:
    """Return a case with everything that the ledger knows to have happened since its row's moment.

    The open rotation is closed, what was pending is kept, and every unreported write since the backup
    is unresolved: nothing gets a deadline before it is settled and seen nowhere.
    """
    news = [one for one in known.lines if one.moment > at]
    starts = [one for one in known.agents if one.accepted is not None and one.moment > at]
    versions = {version.id: version for version in case.versions}
    intents = {intent.uid: intent for intent in case.intents}
    owed = case.credential.successor_owed
    events: list[News | AgentNews] = [*news, *starts]
    for one in sorted(events, key=lambda event: event.moment):
        if isinstance(one, AgentNews):
            _drop_unlisted(versions, one.accepted or (), one.at)
            continue
        if one.version is not None:
            _take(versions, one.version, one.at)
        if one.intent is not None and one.intent.version_id in versions:
            intents.setdefault(one.intent.uid, one.intent)
            exposed = replace(versions[one.intent.version_id], exposed=True)
            versions[one.intent.version_id] = exposed
        owed = owed if one.owed is None else one.owed
    _refuse_revoked(versions, known)
    kept = _one_current([_kept(version) for version in versions.values()])
    changed = replace(
        case,
        versions=tuple(sorted(kept, key=lambda v: v.seq)),
        intents=tuple(intents.values()),
        rotation=_closed(case, now),
    )
    withheld = {name for one in news for name in one.withheld}
    credential = _credential(case, changed, owed=owed, now=now, schedule=schedule)
    later = [one.credential for one in known.agents if one.moment > at]
    return replace(
        changed,
        credential=replace(
            credential,
            # Where a secret leaked nothing is published before a person says so again.
            withheld=tuple(sorted({*credential.withheld, *withheld})),
            leaving=later[-1].leaving if later else credential.leaving,
        ),
    )


def _take(versions: dict[str, Version], told: Version, at: datetime) -> None:
    """Put a version as a line has it beside or over what is known of it."""
    before = versions.get(told.id)
    if before is not None and before.state is S.REVOKED:
        return
    if before is not None and before.state is S.RETIRED and told.accepted:
        return
    promoted = before.promoted_at if before else None
    if told.state is S.CURRENT and promoted is None:
        promoted = at
    taken = replace(
        told,
        exposed=before.exposed if before else False,
        promoted_at=promoted,
        ended_at=None if told.accepted else (before and before.ended_at) or at,
    )
    if before is None:
        taken = replace(taken, seq=_free_seq(versions, taken))
    versions[told.id] = replace(taken, seq=before.seq) if before else taken


def _refuse_revoked(versions: dict[str, Version], known: Known) -> None:
    """Revoke what any line has revoked, older than the row or not: a refusal is no old news."""
    for one in known.lines:
        told = one.version
        before = versions.get(told.id) if told is not None else None
        if told is not None and before is not None and told.state is S.REVOKED:
            ended = before.ended_at or one.at
            versions[told.id] = replace(before, state=S.REVOKED, ended_at=ended)


def _free_seq(versions: dict[str, Version], told: Version) -> int:
    """Give way where a number is taken: the pending one of both was announced and never committed."""
    other = next((v for v in versions.values() if v.seq == told.seq), None)
    if other is None:
        return told.seq
    if other.state is S.PENDING and not other.exposed:
        del versions[other.id]
        return told.seq
    return max(v.seq for v in versions.values()) + 1


def _drop_unlisted(versions: dict[str, Version], listed: Sequence[str], at: datetime) -> None:
    """Retire what was not accepted any more when a ledger was begun: nothing tells when it ended."""
    for version in [v for v in versions.values() if v.accepted and v.id not in listed]:
        versions[version.id] = replace(version, state=S.RETIRED, ended_at=at)


def _kept(version: Version) -> Version:
    if version.state is not S.PENDING:
        return version
    return replace(version, state=S.KEPT, exposed=True)


def _one_current(versions: Sequence[Version]) -> Iterable[Version]:
    """Keep the newest current one only: of an announcement that was never committed."""
    newest = max((v.seq for v in versions if v.state is S.CURRENT), default=0)
    return [
        replace(v, state=S.PREVIOUS) if v.state is S.CURRENT and v.seq < newest else v
        for v in versions
    ]


def _closed(case: Case, now: datetime) -> Rotation | None:
    rotation = case.rotation
    if rotation is None or not rotation.open:
        return rotation
    return replace(
        rotation, state=RotationState.ABANDONED, waiting=None, version_id=None, closed_at=now
    )


def _credential(
    before: Case, after: Case, *, owed: bool, now: datetime, schedule: Schedule
) -> Credential:
    was, current = before.current, after.current
    due = before.credential.next_rotation_at
    if current is not None and (was is None or was.id != current.id):
        due = schedule(after, current.promoted_at or now)
    return replace(
        before.credential,
        seq=max([before.credential.seq, *(v.seq for v in after.versions)]),
        next_rotation_at=due,
        successor_owed=owed,
        request=None,
        drift=(),
        sweep_at=now,
        wake_at=now,
    )
