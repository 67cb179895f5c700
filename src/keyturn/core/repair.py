"""What is wrong with what destinations show, and how far it is mended (rules 4, 10, 11 and 14).

A sweep that finds an entry without our value, or with an older, retired or revoked version, mends it:
current is copied forward from a verified copy elsewhere, and where there is none, or where the entry
shows something minted later, a rotation publishes a new version. What is not ours is never touched.

Whoever writes an old value back whenever we mend it would make us write for ever. So each entry is
mended at most `MOST` times within `WINDOW`, and each agent rotated as often for that sake; then it is
a fight: told, left alone, and tried once in a `WINDOW` until it held for one or a person intervenes.
The count is durable, in one transaction with the intent: no restart begins anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime, timedelta

from keyturn.core.model import (
    AgentState,
    Case,
    Cause,
    Drift,
    Repairs,
    RotationState,
    Target,
    Version,
    VersionState,
    WaitReason,
)
from keyturn.core.steps import Run

MOST = 3
WINDOW = timedelta(hours=1)
WHOLE_AGENT = ""  # stands for the rotations of an agent, where the others name a destination
MENDED = frozenset({"missing", "older", "revoked"})
DONE_FOR = frozenset({VersionState.RETIRED, VersionState.REVOKED})

# --- what is wrong ------------------------------------------------------------------------


def refused(version: Version, now: datetime) -> bool:
    """Whether the verifier refuses a version, whatever may come."""
    return version.state in DONE_FOR or version.over(now)


def drift_kind(case: Case, target: Target, run: Run, now: datetime) -> str:
    """Name what is wrong with what a destination shows; "" if nothing is."""
    sight = run.sights.get(target.key)
    if sight is None:
        return "unreadable"
    shown, current = case.version(sight.shown), case.current
    if shown is not None and refused(shown, now):
        return "revoked"
    if sight.blocked:
        return "unknown"
    runs = case.rotation is not None and case.rotation.state is RotationState.RUNNING
    if runs or current is None:
        return ""  # what is shown changes right now; one that waits may wait for hours
    if shown is None:
        return "" if _is_withheld(case, target) else "missing"
    return "older" if shown.seq < current.seq else ""


def _is_withheld(case: Case, target: Target) -> bool:
    """Whether a person keeps our values from there for now: then none is missed."""
    suspended = case.agent.state is AgentState.SUSPENDED
    return suspended or target.to in case.credential.withheld


def owes(case: Case, target: Target, run: Run, now: datetime) -> bool:
    """Whether a destination shows a version that is refused or will be, or no version (rule 14).

    A version with a deadline was seen nowhere: shown again, it came from outside.
    """
    sight = run.sights.get(target.key)
    shown = case.version(sight.shown) if sight is not None else None
    if sight is None or (shown is not None and refused(shown, now)):
        return sight is not None
    ending = shown is not None and shown.deadline is not None
    return sight.fresh and (ending or drift_kind(case, target, run, now) in MENDED)


def owing(case: Case, run: Run, now: datetime) -> tuple[Drift, ...]:
    """Return what is to be mended, of the places that a rotation would publish to."""
    return tuple(
        Drift(target=target.key, kind=drift_kind(case, target, run, now) or "older", since=now)
        for target in case.next_targets
        if owes(case, target, run, now)
    )


# --- where a copy of current is -----------------------------------------------------------


def takes_copy(case: Case, target: Target, run: Run, now: datetime) -> bool:
    """Whether current may be copied there: it is good, and later than what is shown (rule 4)."""
    current, sight = case.current, run.sights.get(target.key)
    if current is None or sight is None or refused(current, now) or not sight.fresh:
        return False
    shown = case.version(sight.shown)
    forward = shown is None or shown.seq < current.seq
    return forward and not sight.blocked and not sight.foreign_staged


def source_for(case: Case, target: Target, run: Run, *, stages: bool) -> Target | None:
    """Return where current can be copied from: a place that shows it, else the entry's own copies.

    Only what can stage finds a copy by its version id once it is not shown there any more.
    """
    current = case.current
    for one in case.targets:
        sight = run.sights.get(one.key)
        if current is not None and sight is not None and one.key not in run.no_copy:
            if one.key == target.key:
                continue
            if sight.shown == current.id and not sight.blocked:
                return one
    return target if stages and target.key not in run.no_copy else None


# --- how often ----------------------------------------------------------------------------


def record_of(case: Case, target: str) -> Repairs:
    """Return what is remembered of the repairs of one entry."""
    known = (one for one in case.credential.repairs if one.target == target)
    return next(known, Repairs(target=target))


def may_mend(case: Case, target: str, now: datetime) -> bool:
    """Whether another repair there is within what is allowed."""
    record = record_of(case, target)
    recent = len(_recent(record, now))
    return recent == 0 if record.fight is not None else recent < MOST


def next_try_at(record: Repairs) -> datetime | None:
    """Return when a fight is taken up once more; None where there is none."""
    return max(record.at) + WINDOW if record.fight is not None and record.at else None


def charged(case: Case, targets: Iterable[str], now: datetime) -> Case:
    """Count a repair of each of these, before its effect."""
    for target in targets:
        record = record_of(case, target)
        case = _with(case, replace(record, at=(*_recent(record, now), now)))
    return case


def rotated(case: Case, now: datetime) -> Case:
    """Let what a rotation mends count from its end: it may have waited for hours."""
    for record in case.credential.repairs:
        if record.at:
            case = _with(case, replace(record, at=(*record.at[:-1], now)))
    return case


def given_back(case: Case, target: str) -> Case:
    """Count the newest repair no more: it is known that nothing was written."""
    record = record_of(case, target)
    return _with(case, replace(record, at=record.at[:-1]))


def found(case: Case, drift: Iterable[Drift]) -> Case:
    """Store what is about to be mended: a repair that breaks off leaves it told."""
    news = {one.target: one for one in drift}
    others = tuple(one for one in case.credential.drift if one.target not in news)
    known = {(one.target, one.kind): one for one in case.credential.drift}
    stored = tuple(known.get((one.target, one.kind), one) for one in news.values())
    return replace(case, credential=replace(case.credential, drift=(*others, *stored)))


def swept(case: Case, drift: Iterable[Drift], now: datetime) -> Case:
    """Begin a fight where an entry is wrong and may be mended no more; end one that was given up.

    While a rotation is open nothing is judged, except that one which mends may itself be kept waiting
    by the versions that the fight has used up.
    """
    stuck = _is_stuck(case)
    if case.rotation is not None and not stuck:
        return case
    wrong = {one.target for one in drift if one.kind in MENDED}
    for target in wrong & {target.key for target in case.next_targets}:
        record = record_of(case, target)
        spent = not may_mend(case, WHOLE_AGENT, now) or not may_mend(case, target, now)
        if spent or (stuck and len(_recent(record, now)) > 1):
            case = _with(case, replace(record, fight=record.fight or now))
    looked_at = {WHOLE_AGENT, *(target.key for target in case.targets)}
    for record in case.credential.repairs:
        quiet = record.target not in wrong and not _recent(record, now)
        if quiet or record.target not in looked_at:
            case = _with(case, replace(record, at=(), fight=None))
    return case


def _is_stuck(case: Case) -> bool:
    rotation = case.rotation
    waiting = rotation.waiting if rotation is not None else None
    mends = rotation is not None and rotation.cause is Cause.DRIFT
    return mends and waiting is not None and waiting.reason is WaitReason.ACCEPTED_LIMIT


def fights(case: Case) -> tuple[Repairs, ...]:
    """Return the entries that others keep from being mended."""
    return tuple(one for one in case.credential.repairs if one.fight is not None)


def peace(case: Case, now: datetime) -> Case:
    """Forget what was counted, and look at once: a person says that it is over."""
    credential = replace(case.credential, repairs=(), sweep_at=now, wake_at=now)
    return replace(case, credential=credential)


def _recent(record: Repairs, now: datetime) -> tuple[datetime, ...]:
    return tuple(at for at in record.at if now - at < WINDOW)


def _with(case: Case, record: Repairs) -> Case:
    others = [one for one in case.credential.repairs if one.target != record.target]
    kept = [record] if record.at or record.fight is not None else []
    repairs = tuple(sorted((*others, *kept), key=lambda one: one.target))
    return replace(case, credential=replace(case.credential, repairs=repairs))
