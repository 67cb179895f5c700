"""The moves of a version and of a rotation, as pure functions from a case to a changed case.

`MOVES` is the transition table (printed in the docs, compared by a test); what comes next is
decided in `decision`. Each function below is one event of the protocol and
checks its own precondition: a move that the table does not have is a bug in Keyturn and raises
IllegalTransition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from keyturn.core import repair
from keyturn.core.model import (
    AgentState,
    Case,
    Cause,
    Drift,
    Effect,
    Intent,
    Look,
    Outcome,
    Placement,
    Request,
    Rotation,
    RotationState,
    Version,
    VersionState,
    Waiting,
    WaitReason,
)
from keyturn.errors import IllegalTransition, Refused, RotationInProgress, UnknownVersion

S = VersionState

MOVES: dict[VersionState, frozenset[VersionState]] = {
    S.PENDING: frozenset({S.CURRENT, S.KEPT, S.RETIRED, S.REVOKED}),
    S.CURRENT: frozenset({S.PREVIOUS, S.REVOKED}),
    S.PREVIOUS: frozenset({S.RETIRED, S.REVOKED}),
    S.KEPT: frozenset({S.PREVIOUS, S.RETIRED, S.REVOKED}),
    S.RETIRED: frozenset({S.REVOKED}),
    S.REVOKED: frozenset(),
}


# --- opening and accepting ----------------------------------------------------------------


def open_rotation(case: Case, *, uid: str, cause: Cause, now: datetime) -> Case:
    """Open a rotation with the agent's present list of destinations; a request is used up.

    Destinations that a revoke left out stay out.
    """
    if case.rotation is not None and case.rotation.open:
        raise IllegalTransition("a rotation of this credential is open")
    request = case.credential.request
    rotation = Rotation(
        uid=uid,
        credential_uid=case.credential.uid,
        cause=cause,
        targets=case.next_targets,
        grace=request.grace if request else None,
        opened_at=now,
    )
    return replace(case, rotation=rotation, credential=replace(case.credential, request=None))


def accept(
    case: Case,
    *,
    version_id: str,
    scheme: str,
    digest: str,
    tag: bytes | None,
    fence: int,
    now: datetime,
    lifetime: timedelta | None = None,
) -> Case:
    """Add the pending version of a new attempt; it is accepted as soon as this is committed.

    With a `lifetime` it is refused after that, whatever else happens.
    """
    rotation = _running(case)
    if case.pending is not None or rotation.version_id is not None:
        raise IllegalTransition("the attempt has a version already")
    version = Version(
        id=version_id,
        credential_uid=case.credential.uid,
        seq=case.credential.seq + 1,
        login=case.agent.login,
        state=S.PENDING,
        scheme=scheme,
        digest=digest,
        tag=tag,
        fence=fence,
        minted_at=now,
        not_after=None if lifetime is None else now + lifetime,
    )
    return replace(
        case,
        versions=(*case.versions, version),
        rotation=replace(rotation, version_id=version_id, attempt=rotation.attempt + 1),
        credential=replace(case.credential, seq=version.seq),
    )


# --- intents ------------------------------------------------------------------------------


def intend(case: Case, intent: Intent, *, exposes: bool) -> Case:
    """Journal an intent. One that may show the version to a reader exposes it from here on."""
    changed = replace(case, intents=(*case.intents, intent))
    return _edit(changed, intent.version_id, exposed=True) if exposes else changed


def resolve(
    case: Case, intent_uid: str, outcome: Outcome, *, now: datetime, locator: str = ""
) -> Case:
    """Record how an intent ended; a write of a version that landed leaves a placement behind."""
    intent = next(i for i in case.intents if i.uid == intent_uid)
    ended = replace(intent, outcome=outcome, ended_at=now)
    case = replace(case, intents=tuple(ended if i is intent else i for i in case.intents))
    if outcome is not Outcome.FAILED and intent.effect is Effect.ACTIVATE:
        case = _edit(case, intent.version_id, landed_at=now)
    if outcome is not Outcome.DONE or intent.effect is Effect.WITHDRAW:
        return case
    if intent.effect is Effect.RETIRE:
        return gone(case, intent.version_id, intent.target, locator)
    return place(case, intent.version_id, intent.target, locator)


def place(case: Case, version_id: str, target: str, locator: str) -> Case:
    """Note that a destination holds a copy of a version, under this name.

    A write whose answer was lost and that was repeated may leave two copies: each has its name.
    """
    here = [p for p in case.placements if (p.version_id, p.target) == (version_id, target)]
    known = {p.locator for p in here if not p.gone}
    if locator in known or (known and not locator):
        return case
    placement = Placement(
        version_id=version_id,
        credential_uid=case.credential.uid,
        target=target,
        locator=locator,
    )
    nameless = [p for p in here if p.locator in ("", locator)]
    others = tuple(p for p in case.placements if p not in nameless)
    return replace(case, placements=(*others, placement))


def gone(case: Case, version_id: str, target: str, locator: str) -> Case:
    """Note that a destination holds that copy no more (or that policy leaves it there)."""
    copy = version_id, target, locator
    return replace(
        case,
        placements=tuple(
            replace(p, gone=True) if (p.version_id, p.target, p.locator) == copy else p
            for p in case.placements
        ),
    )


def pinned(case: Case, version_id: str) -> bool:
    """Whether an unresolved write may still make this version visible (rule 2)."""
    return any(
        i.unresolved and i.version_id == version_id and i.effect in (Effect.STAGE, Effect.ACTIVATE)
        for i in case.intents
    )


# --- ends of an attempt -------------------------------------------------------------------


def drop_attempt(case: Case, *, now: datetime) -> Case:
    """Let the attempt's version go: kept if somebody may have read it, else retired."""
    rotation = _running(case)
    version = case.version(rotation.version_id)
    case = replace(case, rotation=replace(rotation, version_id=None))
    if version is None or version.state is not S.PENDING:
        return case
    return _let_go(case, version, now=now)


def promote(
    case: Case,
    *,
    grace: timedelta,
    next_rotation_at: datetime | None,
    now: datetime,
    held: frozenset[str] = frozenset(),
) -> Case:
    """Make pending current; what was current or kept becomes previous, with a deadline.

    A version that an unresolved intent names gets its deadline later, when that is settled; so does
    one of `held`: some destination outside of this rotation may show it still (rules 5 and 12).
    """
    rotation = _running(case)
    own = case.version(rotation.version_id)
    if own is None:
        raise IllegalTransition("there is nothing to promote")
    for version in case.versions:
        if version.state in (S.CURRENT, S.KEPT):
            later = version.id in held or pinned(case, version.id)
            ends = None if later else now + grace
            # A kept version may have its deadline already: it never moves earlier or later.
            case = _move(case, version.id, S.PREVIOUS, deadline=version.deadline or ends)
    case = _move(case, own.id, S.CURRENT, promoted_at=now)
    credential = replace(
        case.credential, successor_owed=False, next_rotation_at=next_rotation_at, drift=()
    )
    return _close(replace(case, credential=credential), RotationState.DONE, now=now)


def wait(case: Case, waiting: Waiting) -> Case:
    """Park the rotation until `next_try_at`; the same reason keeps its `since` and counts tries."""
    rotation = _running(case)
    was = rotation.waiting
    number = tries(case, waiting.reason, waiting.where)
    if was is not None and number > 1:
        waiting = replace(waiting, since=was.since, tries=number)
    return replace(case, rotation=replace(rotation, state=RotationState.WAITING, waiting=waiting))


def tries(case: Case, reason: WaitReason, where: str) -> int:
    """Count how often the rotation would have waited for the same reason at the same place."""
    was = case.rotation.waiting if case.rotation else None
    same = was is not None and (was.reason, was.where) == (reason, where)
    return was.tries + 1 if was is not None and same else 1


def go_on(case: Case) -> Case:
    """Return the case with its rotation running: it got past what it waited for."""
    rotation = case.rotation
    if rotation is None or rotation.state is not RotationState.WAITING:
        return case
    running = replace(rotation, state=RotationState.RUNNING, waiting=None)
    return replace(case, rotation=running)


def stall(case: Case, *, code: str, where: str, detail: str = "") -> Case:
    """Stop until a person retries or abandons; current stays current."""
    rotation = replace(
        _running(case),
        state=RotationState.STALLED,
        waiting=None,
        error_code=code,
        error_where=where,
        error_detail=detail,
    )
    return replace(case, rotation=rotation)


# --- old versions -------------------------------------------------------------------------


def settle(case: Case, intent_uid: str, *, now: datetime) -> Case:
    """Note that an unreported intent can no longer land."""
    return resolve(case, intent_uid, Outcome.SETTLED, now=now)


def set_deadline(case: Case, version_id: str, *, deadline: datetime) -> Case:
    """Give a previous or kept version its end; it is unpinned and was just seen nowhere."""
    version = _known(case, version_id)
    if version.state not in (S.PREVIOUS, S.KEPT) or version.deadline or pinned(case, version_id):
        raise IllegalTransition("this version gets no deadline now")
    return _edit(case, version_id, deadline=deadline)


def retire(case: Case, version_id: str, *, now: datetime) -> Case:
    """End a version whose deadline has passed and that no destination shows."""
    version = _known(case, version_id)
    if version.deadline is None or version.deadline > now or pinned(case, version_id):
        raise IllegalTransition("its grace has not passed")
    return _move(case, version_id, S.RETIRED, ended_at=now)


def record_sweep(
    case: Case, drift: Iterable[Drift], *, sweep_at: datetime | None, looks: Iterable[Look] = ()
) -> Case:
    """Store what a sweep found; the same finding keeps its `since`, an unread place its last look."""
    known = {(d.target, d.kind): d for d in case.credential.drift}
    found = tuple(known.get((d.target, d.kind), d) for d in drift)
    last = {look.target: look for look in (*case.credential.looks, *looks)}
    kept = tuple(last[target.key] for target in case.targets if target.key in last)
    return replace(
        case, credential=replace(case.credential, drift=found, sweep_at=sweep_at, looks=kept)
    )


def left(case: Case, target: str) -> Case:
    """Forget a leaving destination that shows nothing of ours any more."""
    leaving = tuple(t for t in case.credential.leaving if t.key != target)
    return replace(case, credential=replace(case.credential, leaving=leaving))


# --- what people do -----------------------------------------------------------------------


def request(case: Case, asked: Request, *, now: datetime) -> Case:
    """Ask for a rotation. Refused while one is open, and for an agent that does not rotate."""
    if case.rotation is not None and case.rotation.open:
        raise RotationInProgress(
            f"a rotation of {case.agent.name} is {case.rotation.state} already",
            hint=f"see `keyturn status {case.agent.name}`",
        )
    if not case.agent.rotates:
        back = f"`keyturn resume {case.agent.name}` first"
        raise Refused(
            f"{case.agent.name} is {case.agent.shown_state} and is not rotated",
            hint=back if case.agent.listed else "put it back into the files and reload first",
        )
    return _wake(replace(case, credential=replace(case.credential, request=asked)), now)


def retry(case: Case, *, now: datetime) -> Case:
    """Let a waiting or stalled rotation go on at once; its read-backs count no more.

    Where none is open it takes up the repairs again that were left to a person.
    """
    idle = case.rotation is None or not case.rotation.open
    if idle and case.agent.rotates and repair.fights(case):
        return repair.peace(case, now)
    rotation = _asked_for(case)
    again = replace(
        rotation,
        state=RotationState.RUNNING,
        waiting=None,
        error_code="",
        error_where="",
        error_detail="",
    )
    return _wake(replace(case, rotation=again), now)


def abandon(case: Case, *, now: datetime) -> Case:
    """End a rotation by hand: an exposed version is kept, one that nobody saw is retired."""
    rotation = _asked_for(case)
    if case.credential.successor_owed:
        raise Refused(
            f"{case.agent.name} was revoked and is owed a successor: this rotation can be retried,"
            " not abandoned",
            hint=f"`keyturn rotation retry {case.agent.name}`, or suspend the agent",
        )
    version = case.version(rotation.version_id)
    if version is not None and version.state is S.PENDING:
        case = _let_go(case, version, now=now)
    return _wake(_close(case, RotationState.ABANDONED, now=now), now)


def suspend(case: Case, *, now: datetime) -> Case:
    """Refuse everything of this agent until it is resumed."""
    _not_removed(case)
    return _wake(_with_state(case, AgentState.SUSPENDED), now)


def resume(case: Case, *, now: datetime) -> Case:
    """Accept again what is still accepted; nothing that was revoked comes back."""
    _not_removed(case)
    return _wake(_with_state(case, AgentState.ENABLED), now)


def forget(case: Case, target: str, *, now: datetime) -> Case:
    """Look no more at a leaving destination, whatever it shows: a person answers for that."""
    leaving = [t.key for t in case.credential.leaving]
    if target not in leaving:
        mine = target in {t.key for t in case.agent.targets}
        hint = "take it out of the agent's destinations first" if mine else ""
        raise Refused(
            f"{case.agent.name} is not leaving {target}",
            hint=hint or f"leaving are: {', '.join(leaving) or 'none'}",
        )
    return _wake(left(case, target), now)


def readmit(case: Case, connection: str, *, now: datetime) -> Case:
    """Publish again at a connection that a revoke left out; what it shows owes a rotation at once."""
    credential = case.credential
    if connection not in credential.withheld:
        out = ", ".join(credential.withheld)
        raise Refused(
            f"nothing is withheld from {connection}",
            hint=f"left out are: {out}" if out else f"`keyturn status {case.agent.name}`",
        )
    withheld = tuple(name for name in credential.withheld if name != connection)
    return _wake(
        replace(case, credential=replace(credential, withheld=withheld, sweep_at=now)), now
    )


def revoke_agent(case: Case, *, reissue: bool, now: datetime, withhold: Iterable[str] = ()) -> Case:
    """Refuse every accepted version for ever, pending and kept ones too (rules 13 and 14).

    The successor is not published at the connections of `withhold`, nor is any later version, until
    `readmit`.
    """
    for version in case.accepted:
        case = _move(case, version.id, S.REVOKED, ended_at=now)
    if case.rotation is not None and case.rotation.open:
        case = _close(case, RotationState.CLOSED, now=now)
    credential = replace(
        case.credential,
        successor_owed=reissue,
        request=None,
        sweep_at=now,
        withheld=tuple(sorted({*case.credential.withheld, *withhold})),
    )
    case = replace(case, credential=credential)
    if not reissue and case.agent.state is not AgentState.REMOVED:
        case = _with_state(case, AgentState.SUSPENDED)
    return _wake(case, now)


def revoke_version(case: Case, version_id: str, *, reissue: bool, now: datetime) -> Case:
    """Refuse one version for ever; a rotation whose own version survives goes on."""
    version = case.version(version_id)
    if version is None:
        raise UnknownVersion(f"{case.agent.name} has no version {version_id}")
    if version.state is not S.REVOKED:
        case = _move(case, version_id, S.REVOKED, ended_at=version.ended_at or now)
    rotation = case.rotation
    if rotation is not None and rotation.open and rotation.version_id == version_id:
        case = _close(case, RotationState.CLOSED, now=now)
    elif rotation is not None and rotation.state is RotationState.WAITING:
        # It may have waited for the limit, and it may be the successor now: nothing to wait for.
        running = replace(rotation, state=RotationState.RUNNING, waiting=None)
        case = replace(case, rotation=running)
    lives = case.agent.state is not AgentState.REMOVED
    owed = (reissue and lives) or case.credential.successor_owed
    # A destination that shows it owes a rotation at once (rule 14), so look at once.
    credential = replace(case.credential, successor_owed=owed, sweep_at=now)
    return _wake(replace(case, credential=credential), now)


def remove(case: Case, *, now: datetime) -> Case:
    """End an agent: everything is revoked and its name is free again."""
    case = _with_state(case, AgentState.REMOVED)
    return revoke_agent(case, reissue=False, now=now)


# --- shared -------------------------------------------------------------------------------


def _running(case: Case) -> Rotation:
    if case.rotation is None or not case.rotation.open:
        raise IllegalTransition("no rotation is open")
    return case.rotation


def _asked_for(case: Case) -> Rotation:
    if case.rotation is None or not case.rotation.open:
        raise Refused(
            f"no rotation of {case.agent.name} is open", hint=f"`keyturn rotate {case.agent.name}`"
        )
    return case.rotation


def _not_removed(case: Case) -> None:
    if case.agent.state is AgentState.REMOVED:
        raise Refused(f"{case.agent.name} was removed", hint="add it again under the same id")


def _known(case: Case, version_id: str) -> Version:
    version = case.version(version_id)
    if version is None:
        raise IllegalTransition("the case has no such version")
    return version


def _edit(case: Case, version_id: str, **changes: Any) -> Case:
    return _replace_version(case, version_id, lambda version: replace(version, **changes))


def _move(case: Case, version_id: str, to: VersionState, **changes: Any) -> Case:
    def moved(version: Version) -> Version:
        if to not in MOVES[version.state]:
            raise IllegalTransition(f"{version.state} -> {to}")
        return replace(version, state=to, **changes)

    return _replace_version(case, version_id, moved)


def _replace_version(case: Case, version_id: str, change: Callable[[Version], Version]) -> Case:
    _known(case, version_id)
    versions = tuple(change(v) if v.id == version_id else v for v in case.versions)
    return replace(case, versions=versions)


def _let_go(case: Case, version: Version, *, now: datetime) -> Case:
    if version.exposed:
        return _move(case, version.id, S.KEPT)
    return _move(case, version.id, S.RETIRED, ended_at=now)


def _close(case: Case, state: RotationState, *, now: datetime) -> Case:
    rotation = replace(_running(case), state=state, waiting=None, closed_at=now)
    return replace(case, rotation=rotation)


def _with_state(case: Case, state: AgentState) -> Case:
    return replace(case, agent=replace(case.agent, state=state))


def _wake(case: Case, now: datetime) -> Case:
    return replace(case, credential=replace(case.credential, wake_at=now))


def waiting(
    reason: WaitReason,
    *,
    now: datetime,
    until: datetime,
    where: str = "",
    code: str = "",
    detail: str = "",
) -> Waiting:
    """Build the reason why a rotation waits from `now` and when it tries again."""
    return Waiting(
        reason=reason, where=where, code=code, detail=detail, since=now, next_try_at=until
    )
