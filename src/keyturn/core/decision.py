"""What a rotation does next: `decide(case, run, plan, now) -> Action`, pure and total.

The case is what is durable, the `Run` what this run under this claim has seen with its own eyes.
Nothing seen survives the run: a takeover, a retry or a restart starts with an empty `Run`, and so
every destination is read again before anything is let go (rules 5 and 6).

Order of precedence: the open rotation; else what opens one; and where that has to wait, the
housekeeping of older versions, which goes on meanwhile (rule 7).
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from keyturn.core.lifecycle import pinned
from keyturn.core.model import (
    AgentState,
    Case,
    Cause,
    Drift,
    Effect,
    Intent,
    Placement,
    RotationState,
    Target,
    Traits,
    Version,
    VersionState,
    WaitReason,
)
from keyturn.core.repair import (
    DONE_FOR,
    WHOLE_AGENT,
    drift_kind,
    may_mend,
    owing,
    source_for,
    takes_copy,
)
from keyturn.core.steps import (
    Action,
    Activate,
    AwaitVerifiers,
    Clean,
    CopyForward,
    DropAttempt,
    Forget,
    Leave,
    Mint,
    Observe,
    Open,
    Plan,
    Promote,
    ReadBack,
    RecordSweep,
    Recover,
    Rest,
    Retire,
    Run,
    SetDeadline,
    Settle,
    Stage,
    Stall,
    Trouble,
    Wait,
    Withdraw,
)

ENDING = frozenset({VersionState.PREVIOUS, VersionState.KEPT})
_SHOWING = frozenset({Effect.STAGE, Effect.ACTIVATE})

# --- the decision -------------------------------------------------------------------------


def decide(case: Case, run: Run, plan: Plan, now: datetime) -> Action:
    """Return what this run does next."""
    settle = _settling(case, run, plan, now)
    if settle is not None:
        return settle
    first = _rotation(case, run, plan, now) if _goes_on(case) else _opening(case, run, plan, now)
    if first is not None and not isinstance(first, Wait | Rest):
        return first
    chore = _housekeeping(case, run, plan, now)
    if chore is not None:
        return chore
    if isinstance(first, Wait):
        return first
    return Rest(until=_next_look(case, run, plan, now))


def _goes_on(case: Case) -> bool:
    return case.rotation is not None and case.rotation.open


# --- the open rotation --------------------------------------------------------------------


def _rotation(case: Case, run: Run, plan: Plan, now: datetime) -> Action | None:
    rotation = case.rotation
    if rotation is None or rotation.state is RotationState.STALLED:
        return None
    if not case.agent.rotates:
        return None
    if rotation.waiting is not None and rotation.waiting.next_try_at > now:
        return Rest(until=rotation.waiting.next_try_at)
    own = case.version(rotation.version_id)
    if own is not None and (own.state is not VersionState.PENDING or own.over(now)):
        return DropAttempt()  # revoked or too old meanwhile: never rolled forward (rule 15)
    seen = _observe_all(rotation.targets, run)
    if seen is not None:
        return seen
    hindered = _hindrance(case, run)
    if hindered is not None:
        return hindered
    if own is None:
        return _mint(case, plan, now)
    if run.holding != own.id:
        return _recover(own, rotation.targets, run)
    publish = _stage(own, rotation.targets, run, plan) or _show(case, own, run)
    if isinstance(publish, Stage | Activate) and not run.settled:
        return AwaitVerifiers()  # no destination shows it before every verifier accepts it
    return publish or _observe_others(case, run) or Promote()


def _observe_all(targets: Iterable[Target], run: Run) -> Action | None:
    """Look at each destination once; one that cannot be read makes the rotation wait or stall."""
    for target in targets:
        trouble = run.troubles.get(target.key)
        if trouble is not None:
            return _give_way(target, trouble)
        if target.key not in run.sights:
            return Observe(target=target)
    return None


def _observe_others(case: Case, run: Run) -> Action | None:
    """Look at the destinations outside of the rotation: what they show gets no deadline yet.

    One that cannot be read hinders nothing: it may be leaving because it is gone.
    """
    for target in case.targets:
        if target.key not in run.sights and target.key not in run.troubles:
            return Observe(target=target)
    return None


def _give_way(target: Target, trouble: Trouble) -> Action:
    if trouble.permanent:
        return Stall(code=trouble.code, where=target.key, detail=trouble.detail)
    return Wait(
        reason=WaitReason.DESTINATION,
        where=target.key,
        code=trouble.code,
        detail=trouble.detail,
        retry_after=trouble.retry_after,
    )


def _hindrance(case: Case, run: Run) -> Action | None:
    """Check every precondition before the first side effect."""
    rotation = case.rotation
    for target in rotation.targets if rotation else ():
        sight = run.sights[target.key]
        if sight.blocked:
            return Stall(code=sight.blocked, where=target.key)
        if sight.foreign_staged:
            return Wait(reason=WaitReason.FOREIGN_STAGED, where=target.key, code="conflict")
    return None


def _mint(case: Case, plan: Plan, now: datetime) -> Action:
    alive = [v for v in case.accepted if not v.over(now)]
    if len(alive) < plan.max_accepted:
        return Mint()
    ends = [v.deadline for v in alive if v.deadline is not None]
    return Wait(reason=WaitReason.ACCEPTED_LIMIT, until=min(ends, default=None))


def _recover(own: Version, targets: Iterable[Target], run: Run) -> Action:
    for target in targets:
        sight = run.sights[target.key]
        if own.id in (sight.shown, sight.staged) and target.key not in run.no_copy:
            return Recover(target=target)
    return DropAttempt()


def _stage(own: Version, targets: Iterable[Target], run: Run, plan: Plan) -> Action | None:
    for target in targets:
        sight = run.sights[target.key]
        if not plan.traits[target.key].can_stage or sight.shown == own.id:
            continue
        if sight.staged != own.id:
            if (target.key, Effect.STAGE) in run.written:
                return _unseen(target)
            return Stage(target=target, expected=sight.token, exposes=sight.empty)
        if target.key not in run.read_back:
            return ReadBack(target=target)
    return None


def _show(case: Case, own: Version, run: Run) -> Action | None:
    rotation = case.rotation
    for target in rotation.targets if rotation else ():
        sight = run.sights[target.key]
        if sight.shown == own.id:
            if not sight.verified:
                return Stall(code="unknown-value", where=target.key)
            continue
        shown = case.version(sight.shown)
        if shown is not None and shown.seq > own.seq:  # forward only (rule 4)
            return Stall(code="later-version", where=target.key)
        if (target.key, Effect.ACTIVATE) in run.written:
            return _unseen(target)
        return Activate(target=target, expected=sight.token)
    return None


def _unseen(target: Target) -> Action:
    """A write was confirmed and a read does not show it yet: writing on and on shows nothing more."""
    return Wait(reason=WaitReason.DESTINATION, where=target.key, code="not-shown")


# --- what opens a rotation ----------------------------------------------------------------


def _opening(case: Case, run: Run, plan: Plan, now: datetime) -> Action | None:
    if not case.agent.rotates or not case.next_targets:
        return None
    cause = _cause(case, run)
    due = case.credential.next_rotation_at
    if cause is None and due is not None and due <= now and not plan.paused:
        cause = Cause.SCHEDULE
    return Open(cause=cause) if cause is not None else _mending(case, run, plan, now)


def _cause(case: Case, run: Run) -> Cause | None:
    credential = case.credential
    if credential.successor_owed:
        return Cause.REISSUE
    if credential.request is not None:
        return credential.request.cause
    if case.current is None:
        return Cause.DRIFT if case.versions else Cause.FIRST
    if case.current.login != case.agent.login:
        return Cause.NEW_LOGIN
    return Cause.NEW_DESTINATION if _has_new_destination(case, run) else None


def _mending(case: Case, run: Run, plan: Plan, now: datetime) -> Action | None:
    """Copy current forward, or open a rotation where that mends not everything (rule 4).

    One that was tried in this run waits for the next look; what refused us for good is opened for
    all the same: a rotation that stalls tells a person why.
    """
    drift = [one for one in owing(case, run, now) if _may_mend(case, one.target, run, now)]
    if not drift:
        return None
    seen = _observe_others(case, run)
    if seen is not None:
        return seen
    copies = [_copy(case, one, run, plan, now) for one in drift]
    if all(copies):
        return copies[0]
    return Open(cause=Cause.DRIFT, drift=tuple(drift)) if _may_rotate(case, now) else None


def _may_mend(case: Case, where: str, run: Run, now: datetime) -> bool:
    tried = (where, Effect.ACTIVATE) in run.written and where not in run.unmended
    outdated = case.current is not None and run.sights[where].shown == case.current.id
    return outdated or (not tried and may_mend(case, where, now))


def _may_rotate(case: Case, now: datetime) -> bool:
    outdated = case.current is not None and case.current.over(now)
    return outdated or may_mend(case, WHOLE_AGENT, now)


def _copy(case: Case, drift: Drift, run: Run, plan: Plan, now: datetime) -> CopyForward | None:
    target = next(one for one in case.next_targets if one.key == drift.target)
    if case.current is None or target.key in run.unmended:
        return None
    stages = plan.traits[target.key].can_stage
    source = source_for(case, target, run, stages=stages)
    if source is None or not takes_copy(case, target, run, now):
        return None
    sight = run.sights[target.key]
    return CopyForward(
        target=target,
        source=source,
        version_id=case.current.id,
        expected=sight.token,
        stages=stages,
        empty=sight.empty,
        drift=drift,
    )


def _has_new_destination(case: Case, run: Run) -> bool:
    placed = {placement.target for placement in case.placements}
    return any(
        target.key not in placed and run.sights[target.key].shown is None
        for target in case.next_targets
        if target.key in run.sights and not run.sights[target.key].blocked
    )


# --- housekeeping -------------------------------------------------------------------------


def _settling(case: Case, run: Run, plan: Plan, now: datetime) -> Action | None:
    for intent in case.intents:
        if intent.unresolved:
            ends = _settles_at(intent, run, plan)
            if ends is not None and ends <= now:
                return Settle(intent=intent)
            if _overtaken(case, intent, run, plan):
                return Settle(intent=intent)
    return None


def _settles_at(intent: Intent, run: Run, plan: Plan) -> datetime | None:
    """When the request can no longer land (rule 2); None while that is not known."""
    traits = plan.traits.get(intent.target, Traits())
    if intent.uid in run.in_flight:
        return None
    died = intent.at if intent.writer == run.writer else run.died.get(intent.writer)
    if died is None:
        return None
    if traits.settles_with_writer:
        return died
    return max(intent.at, died) + plan.policy.retry.settle_after


def _overtaken(case: Case, intent: Intent, run: Run, plan: Plan) -> bool:
    """Whether a later write of ours is confirmed where writes are compare-and-set.

    What a withdrawal leaves shows none of ours: there any other token will do.
    """
    sight = run.sights.get(intent.target)
    return (
        sight is not None
        and plan.traits[intent.target].has_cas
        and intent.effect in (Effect.ACTIVATE, Effect.WITHDRAW)
        and sight.fresh
        and (case.version(sight.shown) is not None or intent.effect is Effect.WITHDRAW)
        and sight.token != intent.expected
        and intent.uid not in run.in_flight
    )


def _housekeeping(case: Case, run: Run, plan: Plan, now: datetime) -> Action | None:
    """Deadlines, retirement, clean-up and the sweep: whatever needs a fresh look reads first."""
    if not _needs_look(case, now):
        return None
    return (
        _observe_others(case, run)
        or _deadline(case, run, plan, now)
        or (None if plan.paused else _retirement(case, run, plan, now))
        or _withdrawal(case, run)
        or _cleaning(case, run, plan)
        or _leaving(case, run)
        or _sweep(case, run, now)
    )


def _needs_look(case: Case, now: datetime) -> bool:
    credential = case.credential
    return (
        (credential.sweep_at is not None and credential.sweep_at <= now)
        or any(_wants_deadline(case, version) for version in case.versions)
        or any(_is_over(case, version, now) for version in case.versions)
        or any(_wants_cleaning(case, placement) for placement in case.placements)
    )


def _wants_deadline(case: Case, version: Version) -> bool:
    ending = version.state in ENDING
    return ending and version.deadline is None and not pinned(case, version.id)


def _is_over(case: Case, version: Version, now: datetime) -> bool:
    ending = version.state in ENDING
    passed = version.deadline is not None and version.deadline <= now
    return ending and passed and not pinned(case, version.id)


def _wants_cleaning(case: Case, placement: Placement) -> bool:
    version = case.version(placement.version_id)
    return not placement.gone and version is not None and version.state in DONE_FOR


def nowhere(case: Case, version: Version, run: Run, plan: Plan, now: datetime) -> bool:
    """Whether a fresh read of every destination shows this version nowhere (rule 5)."""
    return all(
        target.key in run.sights
        and run.sights[target.key].fresh
        and run.sights[target.key].shown != version.id
        and (
            _has_moved_on(case, version, target, run) or _is_conclusive(version, target, plan, now)
        )
        for target in case.targets
    )


def _has_moved_on(case: Case, version: Version, target: Target, run: Run) -> bool:
    """Whether a later version is shown there: nothing is ever moved back."""
    shown = case.version(run.sights[target.key].shown)
    return shown is not None and shown.seq > version.seq


def _is_conclusive(version: Version, target: Target, plan: Plan, now: datetime) -> bool:
    """Whether a read that shows something else can no longer be one from before its write.

    An adapter notices answers that are behind its own writes, until it is restarted.
    """
    if plan.traits.get(target.key, Traits()).settles_with_writer:
        return True
    return version.landed_at is None or _conclusive_from(version.landed_at, plan) <= now


def _conclusive_from(landed_at: datetime, plan: Plan) -> datetime:
    return landed_at + plan.policy.retry.settle_after


def _deadline(case: Case, run: Run, plan: Plan, now: datetime) -> Action | None:
    for version in case.versions:
        if _wants_deadline(case, version) and nowhere(case, version, run, plan, now):
            return SetDeadline(version_id=version.id)
    return None


def _retirement(case: Case, run: Run, plan: Plan, now: datetime) -> Action | None:
    for version in case.versions:
        if _is_over(case, version, now) and nowhere(case, version, run, plan, now):
            return Retire(version_id=version.id)
    return None


def _withdrawal(case: Case, run: Run) -> Action | None:
    """Take a revoked value out of where no rotation will replace it; once in a run.

    SECURITY: only a fresh read of an unaltered version of ours that a person refused moves us to it,
    and the write is conditional on it: no old answer and no forged entry costs an agent a good one.
    """
    for target in case.targets:
        sight = run.sights.get(target.key)
        shown = case.version(sight.shown) if sight is not None and sight.fresh else None
        if sight is None or shown is None or shown.state is not VersionState.REVOKED:
            continue
        # Keys that others added hinder a rotation, which would drop them, and not this.
        if _is_served(case, target) or sight.blocked not in ("", "other-keys"):
            continue
        if (target.key, Effect.WITHDRAW) in run.written or _is_withdrawing(case, target):
            continue
        return Withdraw(target=target, version_id=shown.id, expected=sight.token)
    return None


def _is_served(case: Case, target: Target) -> bool:
    """Whether the open rotation or the next one publishes there."""
    of_rotation = case.rotation.targets if case.rotation is not None and _goes_on(case) else ()
    served = {one.key for one in (*of_rotation, *case.next_targets)}
    return case.agent.rotates and target.key in served


def _is_withdrawing(case: Case, target: Target) -> bool:
    """Whether nobody knows yet how the last try ended: a lane must not fill up with them."""
    return any(
        i.unresolved and i.effect is Effect.WITHDRAW and i.target == target.key
        for i in case.intents
    )


def _cleaning(case: Case, run: Run, plan: Plan) -> Action | None:
    targets = {target.key: target for target in case.targets}
    for placement in case.placements:
        if not _wants_cleaning(case, placement):
            continue
        target = targets.get(placement.target)
        if target is None or not _may_clean(target, plan):
            return Forget(placement=placement)
        sight = run.sights.get(target.key)
        if (target.key, Effect.RETIRE) in run.written:
            continue  # it was tried in vain: a clean-up must not keep a rotation from its work
        if sight is not None and sight.fresh and sight.shown != placement.version_id:
            if sight.locator and sight.locator == placement.locator:
                continue  # never the one shown, whatever is in it
            return Clean(target=target, placement=placement)
    return None


def _may_clean(target: Target, plan: Plan) -> bool:
    """Old versions of a merged entry hold other people's keys: those are left alone."""
    keeps = plan.traits[target.key].keeps_versions
    return keeps and plan.policy.retire != "leave" and not target.merge


def _leaving(case: Case, run: Run) -> Action | None:
    """Leave a dropped destination that shows nothing of ours, once no write of ours can land there."""
    mine = {target.key for target in case.agent.targets}
    coming = {i.target for i in case.intents if i.unresolved and i.effect in _SHOWING}
    for target in case.credential.leaving:
        sight = run.sights.get(target.key)
        empty = sight is not None and sight.fresh and sight.shown is None
        if target.key in mine or (empty and target.key not in coming):
            return Leave(target=target.key)
    return None


def _sweep(case: Case, run: Run, now: datetime) -> Action | None:
    if case.credential.sweep_at is None or case.credential.sweep_at > now:
        return None
    found = (_drift(case, target, run, now) for target in case.agent.targets)
    drift = tuple(drift for drift in found if drift is not None)
    return RecordSweep(drift=drift, last=_is_cleared(case, run))


def _is_cleared(case: Case, run: Run) -> bool:
    """Whether a removed agent has nothing left anywhere, nor anything on its way there."""
    sights = [run.sights.get(target.key) for target in case.targets]
    return (
        case.agent.state is AgentState.REMOVED
        and all(s is not None and s.fresh and s.shown is None for s in sights)
        and not any(intent.unresolved for intent in case.intents)
        and not any(_wants_cleaning(case, placement) for placement in case.placements)
    )


def _drift(case: Case, target: Target, run: Run, now: datetime) -> Drift | None:
    kind = drift_kind(case, target, run, now)
    return Drift(target=target.key, kind=kind, since=now) if kind else None


# --- when to look again -------------------------------------------------------------------


def _next_look(case: Case, run: Run, plan: Plan, now: datetime) -> datetime | None:
    # Whoever ends such a call wakes the credential; this is only for a writer that died meanwhile.
    soon = now + plan.policy.retry.settle_after
    moments = [case.credential.sweep_at]
    if case.agent.rotates:
        moments.append(_rotation_moment(case))
    if run.troubles and _needs_look(case, now):
        moments.append(now + plan.policy.retry.max)
    moments.extend(v.deadline for v in case.versions if v.state in ENDING)
    waiting = (v.landed_at for v in case.versions if _wants_deadline(case, v))
    moments.extend(_conclusive_from(landed_at, plan) for landed_at in waiting if landed_at)
    moments.append(case.current.not_after if case.current else None)
    moments.extend(_settles_at(i, run, plan) or soon for i in case.intents if i.unresolved)
    later = [moment for moment in moments if moment is not None and moment > now]
    # What is due already could not be done in this run: look again by the sweep at the latest.
    return min(later, default=None)


def _rotation_moment(case: Case) -> datetime | None:
    rotation = case.rotation
    if rotation is None or not rotation.open:
        return case.credential.next_rotation_at
    return rotation.waiting.next_try_at if rotation.waiting else None
