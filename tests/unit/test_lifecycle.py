"""Every event of a case, and every move that the table does not have."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from keyturn.core import lifecycle
from keyturn.core.model import (
    Agent,
    AgentState,
    Case,
    Cause,
    Credential,
    Drift,
    Effect,
    Look,
    Outcome,
    Request,
    RotationState,
    Version,
    VersionState,
    WaitReason,
)
from keyturn.errors import IllegalTransition, Refused, RotationInProgress, UnknownVersion
from support.stores import NOW, intent, rotation, target, version

UID = "cred"
GRACE = timedelta(hours=48)
LATER = NOW + timedelta(days=9)
S = VersionState
R = RotationState


def of(*states: VersionState, open_as: RotationState | None = None, **more: Any) -> Case:
    """Return a case with one version per state, numbered from 1, and a rotation for the pending."""
    versions = tuple(version(UID, seq, state, **more) for seq, state in enumerate(states, 1))
    own = next((v.id for v in versions if v.state is S.PENDING), None)
    opened = rotation(UID, state=open_as, version_id=own, targets=(target(),)) if open_as else None
    return Case(
        agent=Agent(uid="a", name="bot", login="bot", targets=(target(),)),
        credential=Credential(uid=UID, agent_uid="a", seq=len(versions)),
        versions=versions,
        rotation=opened,
    )


def states(case: Case) -> list[VersionState]:
    """Return the states of a case's versions, oldest first."""
    return [v.state for v in case.versions]


def exposed(case: Case, seq: int) -> Case:
    """Mark a version as exposed."""
    return changed(case, seq, exposed=True)


def changed(case: Case, seq: int, **values: Any) -> Case:
    """Change a version."""
    return replace(
        case, versions=tuple(replace(v, **values) if v.seq == seq else v for v in case.versions)
    )


def naming(case: Case, seq: int, **values: Any) -> Case:
    """Add an unresolved intent that names a version."""
    return replace(case, intents=(*case.intents, intent(case.versions[seq - 1], seq, **values)))


def owed(case: Case) -> Case:
    """Owe a successor."""
    return replace(case, credential=replace(case.credential, successor_owed=True))


def agent_is(case: Case, state: AgentState) -> Case:
    """Put the agent in a state."""
    return replace(case, agent=replace(case.agent, state=state))


def accept(case: Case) -> Case:
    """Accept a version."""
    return lifecycle.accept(
        case, version_id="new", scheme="s", digest="d", tag=None, fence=7, now=NOW
    )


def promote(case: Case, **more: Any) -> Case:
    """Promote."""
    return lifecycle.promote(case, grace=GRACE, next_rotation_at=LATER, now=NOW, **more)


def opened(case: Case) -> Case:
    """Open a rotation."""
    return lifecycle.open_rotation(case, uid="r", cause=Cause.SCHEDULE, now=NOW)


# --- the table ----------------------------------------------------------------------------


def test_the_printed_table_is_the_one_in_force() -> None:
    """The table of moves in the documentation is `lifecycle.MOVES`."""
    page = Path(__file__).parents[2] / "docs/reference/states.md"
    printed = page.read_text().split("## What they mean")[0]
    rows = re.findall(r"^\| (\w+) \| ([\w, ]*)\|$", printed, re.MULTILINE)
    table = {
        S(start): frozenset(S(word) for word in ends.replace(",", " ").split())
        for start, ends in rows
        if start != "from"
    }

    assert table == lifecycle.MOVES


@pytest.mark.parametrize("start", S)
@pytest.mark.parametrize("end", S)
def test_every_other_move_is_illegal(start: VersionState, end: VersionState) -> None:
    """A move is made if the table has it, and is a bug of ours otherwise."""
    case = of(start)
    if end in lifecycle.MOVES[start]:
        assert states(lifecycle._move(case, case.versions[0].id, end)) == [end]
    else:
        with pytest.raises(IllegalTransition):
            lifecycle._move(case, case.versions[0].id, end)


# --- events -------------------------------------------------------------------------------

Event = tuple[Case, Callable[[Case], Case], list[VersionState]]

EVENTS: dict[str, Event] = {
    "accept adds a pending version": (
        of(S.CURRENT, open_as=R.RUNNING),
        accept,
        [S.CURRENT, S.PENDING],
    ),
    "an attempt that nobody saw is retired": (
        of(S.CURRENT, S.PENDING, open_as=R.RUNNING),
        lambda c: lifecycle.drop_attempt(c, now=NOW),
        [S.CURRENT, S.RETIRED],
    ),
    "an attempt that somebody may have read is kept (rule 1)": (
        exposed(of(S.CURRENT, S.PENDING, open_as=R.RUNNING), 2),
        lambda c: lifecycle.drop_attempt(c, now=NOW),
        [S.CURRENT, S.KEPT],
    ),
    "promote makes pending current and current previous": (
        of(S.CURRENT, S.PENDING, open_as=R.RUNNING),
        promote,
        [S.PREVIOUS, S.CURRENT],
    ),
    "the first promote has nothing to replace": (
        of(S.PENDING, open_as=R.RUNNING),
        promote,
        [S.CURRENT],
    ),
    "promote makes kept previous, never retired (rule 7)": (
        of(S.CURRENT, S.KEPT, S.PENDING, open_as=R.WAITING),
        promote,
        [S.PREVIOUS, S.PREVIOUS, S.CURRENT],
    ),
    "promote leaves what is over alone": (
        of(S.RETIRED, S.REVOKED, S.PENDING, open_as=R.RUNNING),
        promote,
        [S.RETIRED, S.REVOKED, S.CURRENT],
    ),
    "abandon retires what was never exposed": (
        of(S.CURRENT, S.PENDING, open_as=R.STALLED),
        lambda c: lifecycle.abandon(c, now=NOW),
        [S.CURRENT, S.RETIRED],
    ),
    "abandon keeps what was exposed": (
        exposed(of(S.CURRENT, S.PENDING, open_as=R.STALLED), 2),
        lambda c: lifecycle.abandon(c, now=NOW),
        [S.CURRENT, S.KEPT],
    ),
    "revoking an agent takes pending and kept too (rule 13)": (
        of(S.RETIRED, S.PREVIOUS, S.KEPT, S.CURRENT, S.PENDING, open_as=R.RUNNING),
        lambda c: lifecycle.revoke_agent(c, reissue=False, now=NOW),
        [S.RETIRED, S.REVOKED, S.REVOKED, S.REVOKED, S.REVOKED],
    ),
    "revoking one version leaves the others (rule 13)": (
        of(S.CURRENT, S.PENDING, open_as=R.RUNNING),
        lambda c: lifecycle.revoke_version(c, c.versions[0].id, reissue=False, now=NOW),
        [S.REVOKED, S.PENDING],
    ),
    "revoking a retired version makes it a tombstone": (
        of(S.RETIRED, S.CURRENT),
        lambda c: lifecycle.revoke_version(c, c.versions[0].id, reissue=False, now=NOW),
        [S.REVOKED, S.CURRENT],
    ),
    "revoking twice changes nothing": (
        of(S.REVOKED, S.CURRENT),
        lambda c: lifecycle.revoke_version(c, c.versions[0].id, reissue=False, now=NOW),
        [S.REVOKED, S.CURRENT],
    ),
    "removing an agent revokes everything": (
        of(S.PREVIOUS, S.CURRENT),
        lambda c: lifecycle.remove(c, now=NOW),
        [S.REVOKED, S.REVOKED],
    ),
    "a previous version whose deadline passed is retired": (
        changed(of(S.PREVIOUS, S.CURRENT), 1, deadline=NOW),
        lambda c: lifecycle.retire(c, c.versions[0].id, now=NOW),
        [S.RETIRED, S.CURRENT],
    ),
    "a kept version whose deadline passed is retired": (
        changed(of(S.KEPT, S.CURRENT), 1, deadline=NOW),
        lambda c: lifecycle.retire(c, c.versions[0].id, now=NOW),
        [S.RETIRED, S.CURRENT],
    ),
    "resume brings nothing back that was revoked": (
        agent_is(of(S.REVOKED), AgentState.SUSPENDED),
        lambda c: lifecycle.resume(c, now=NOW),
        [S.REVOKED],
    ),
}


@pytest.mark.parametrize("sentence", EVENTS)
def test_event(sentence: str) -> None:
    """Each event moves the versions as its sentence says."""
    case, event, expected = EVENTS[sentence]

    assert states(event(case)) == expected


ILLEGAL: dict[str, tuple[Case, Callable[[Case], Case], type[Exception]]] = {
    "a second rotation is never opened": (
        of(S.CURRENT, open_as=R.WAITING),
        opened,
        IllegalTransition,
    ),
    "nothing is accepted without a rotation (rule 12)": (of(S.CURRENT), accept, IllegalTransition),
    "nothing is accepted after its rotation was closed": (
        of(S.CURRENT, open_as=R.CLOSED),
        accept,
        IllegalTransition,
    ),
    "an attempt has one version": (of(S.PENDING, open_as=R.RUNNING), accept, IllegalTransition),
    "nothing is promoted without a version": (
        of(S.CURRENT, open_as=R.RUNNING),
        promote,
        IllegalTransition,
    ),
    "nothing is promoted without a rotation": (of(S.PENDING), promote, IllegalTransition),
    "a revoked version is never promoted (rule 15)": (
        lifecycle._edit(
            of(S.CURRENT, S.PENDING, open_as=R.RUNNING), version(UID, 2).id, state=S.REVOKED
        ),
        promote,
        IllegalTransition,
    ),
    "current gets no deadline": (
        of(S.CURRENT),
        lambda c: lifecycle.set_deadline(c, c.versions[0].id, deadline=LATER),
        IllegalTransition,
    ),
    "a deadline is never moved": (
        changed(of(S.PREVIOUS), 1, deadline=NOW),
        lambda c: lifecycle.set_deadline(c, c.versions[0].id, deadline=LATER),
        IllegalTransition,
    ),
    "a version that an unresolved intent names gets no deadline (rule 2)": (
        naming(of(S.KEPT), 1),
        lambda c: lifecycle.set_deadline(c, c.versions[0].id, deadline=LATER),
        IllegalTransition,
    ),
    "nothing is retired before its deadline": (
        changed(of(S.PREVIOUS), 1, deadline=LATER),
        lambda c: lifecycle.retire(c, c.versions[0].id, now=NOW),
        IllegalTransition,
    ),
    "nothing is retired without a deadline": (
        of(S.PREVIOUS),
        lambda c: lifecycle.retire(c, c.versions[0].id, now=NOW),
        IllegalTransition,
    ),
    "nothing is retired while an unresolved intent names it": (
        naming(changed(of(S.PREVIOUS), 1, deadline=NOW), 1),
        lambda c: lifecycle.retire(c, c.versions[0].id, now=NOW),
        IllegalTransition,
    ),
    "an unknown version gets no deadline": (
        of(S.CURRENT),
        lambda c: lifecycle.set_deadline(c, "x", deadline=LATER),
        IllegalTransition,
    ),
    "an unknown version is not revoked": (
        of(S.CURRENT),
        lambda c: lifecycle.revoke_version(c, "x", reissue=False, now=NOW),
        UnknownVersion,
    ),
    "no second rotation is asked for": (
        of(S.CURRENT, open_as=R.STALLED),
        lambda c: lifecycle.request(c, Request(), now=NOW),
        RotationInProgress,
    ),
    "a suspended agent is not rotated": (
        agent_is(of(S.CURRENT), AgentState.SUSPENDED),
        lambda c: lifecycle.request(c, Request(), now=NOW),
        Refused,
    ),
    "there is nothing to retry": (of(S.CURRENT), lambda c: lifecycle.retry(c, now=NOW), Refused),
    "there is nothing to abandon": (
        of(S.CURRENT),
        lambda c: lifecycle.abandon(c, now=NOW),
        Refused,
    ),
    "what owes a successor is not abandoned (rule 14)": (
        owed(of(S.CURRENT, open_as=R.STALLED)),
        lambda c: lifecycle.abandon(c, now=NOW),
        Refused,
    ),
    "a removed agent is not resumed": (
        agent_is(of(S.REVOKED), AgentState.REMOVED),
        lambda c: lifecycle.resume(c, now=NOW),
        Refused,
    ),
    "a removed agent is not suspended": (
        agent_is(of(S.REVOKED), AgentState.REMOVED),
        lambda c: lifecycle.suspend(c, now=NOW),
        Refused,
    ),
}


@pytest.mark.parametrize("sentence", ILLEGAL)
def test_illegal(sentence: str) -> None:
    """What must never happen raises: a bug of ours, or a refusal to a person."""
    case, event, error = ILLEGAL[sentence]

    with pytest.raises(error):
        event(case)


# --- what else an event changes -------------------------------------------------------------


def deadlines(case: Case) -> list[object]:
    """Return the deadlines, oldest version first."""
    return [v.deadline for v in case.versions]


def test_promote_gives_the_grace_to_what_nothing_shows() -> None:
    """The grace starts at promote, except where a write or a destination may show the version."""
    case = of(S.CURRENT, S.KEPT, S.PENDING, open_as=R.RUNNING)
    ids = [v.id for v in case.versions]

    assert deadlines(promote(case)) == [NOW + GRACE, NOW + GRACE, None]
    assert deadlines(promote(naming(case, 1))) == [None, NOW + GRACE, None]
    assert deadlines(promote(case, held=frozenset(ids[:1]))) == [None, NOW + GRACE, None]
    assert deadlines(promote(changed(case, 2, deadline=NOW))) == [NOW + GRACE, NOW, None]


def test_promote_clears_what_was_owed() -> None:
    """Only promote clears the successor that is owed, and it plans the next rotation (rule 14)."""
    after = promote(owed(of(S.PENDING, open_as=R.RUNNING)))

    assert not after.credential.successor_owed
    assert after.credential.next_rotation_at == LATER
    assert after.rotation is not None
    assert after.rotation.state is R.DONE


@pytest.mark.parametrize("effect", [Effect.RETIRE, Effect.WITHDRAW])
def test_what_takes_away_pins_nothing(effect: Effect) -> None:
    """An unresolved clean-up or withdrawal cannot make a version visible."""
    case = naming(of(S.PREVIOUS), 1, effect=effect)

    assert not lifecycle.pinned(case, case.versions[0].id)


def test_a_withdrawal_that_landed_leaves_no_placement() -> None:
    """What it wrote holds no version: there is nothing to clean there later."""
    case = naming(of(S.REVOKED), 1, effect=Effect.WITHDRAW)
    after = lifecycle.resolve(case, case.intents[0].uid, Outcome.DONE, now=NOW, locator="3")

    assert after.placements == ()


@pytest.mark.parametrize("outcome", Outcome)
def test_only_a_write_that_landed_leaves_a_placement(outcome: Outcome) -> None:
    """A copy is noted where a write is known to have landed."""
    case = naming(of(S.PENDING, open_as=R.RUNNING), 1)
    after = lifecycle.resolve(case, case.intents[0].uid, outcome, now=NOW, locator="3")

    assert [p.locator for p in after.placements] == (["3"] if outcome is Outcome.DONE else [])
    assert not lifecycle.pinned(after, case.versions[0].id)


def test_revoking_an_agent_suspends_unless_it_is_owed_a_successor() -> None:
    """Without reissue nothing is minted until a person resumes the agent (rule 13)."""
    case = of(S.CURRENT, S.PENDING, open_as=R.WAITING)
    without = lifecycle.revoke_agent(case, reissue=False, now=NOW)
    reissued = lifecycle.revoke_agent(case, reissue=True, now=NOW)

    assert (without.agent.state, without.credential.successor_owed) == (AgentState.SUSPENDED, False)
    assert (reissued.agent.state, reissued.credential.successor_owed) == (AgentState.ENABLED, True)
    for after in (without, reissued):
        assert after.rotation is not None
        assert after.rotation.state is R.CLOSED
        assert after.credential.wake_at == NOW


def test_revoking_the_rotations_own_version_closes_it() -> None:
    """A rotation ends with its version; one whose version survives goes on at once."""
    case = of(S.CURRENT, S.PENDING, open_as=R.WAITING)
    own = lifecycle.revoke_version(case, case.versions[1].id, reissue=True, now=NOW)
    other = lifecycle.revoke_version(case, case.versions[0].id, reissue=True, now=NOW)

    assert own.rotation is not None
    assert other.rotation is not None
    assert own.rotation.state is R.CLOSED
    assert other.rotation.state is R.RUNNING
    assert own.credential.successor_owed
    assert other.credential.successor_owed


def test_waiting_counts_tries_and_keeps_its_since() -> None:
    """The same reason keeps its beginning; another one starts anew."""
    case = of(S.PENDING, open_as=R.RUNNING)
    for reason, at in [("destination", 0), ("destination", 5), ("verifiers", 9)]:
        now = NOW + timedelta(seconds=at)
        parked = lifecycle.waiting(WaitReason(reason), now=now, until=now)
        case = lifecycle.wait(case, parked)
        assert case.rotation is not None
        assert case.rotation.waiting is not None
        found = case.rotation.waiting
        expected = {0: (NOW, 1), 5: (NOW, 2), 9: (now, 1)}[at]
        assert (found.since, found.tries) == expected


def test_opening_uses_up_the_request() -> None:
    """A request's grace goes with the rotation that it opens."""
    case = lifecycle.request(of(S.CURRENT), Request(grace=GRACE), now=NOW)
    after = opened(case)

    assert after.credential.request is None
    assert after.rotation is not None
    assert after.rotation.grace == GRACE
    assert after.rotation.targets == case.agent.targets


def test_a_sweep_keeps_since_when() -> None:
    """The same finding keeps its beginning; what is gone is forgotten."""
    first = Drift(target="a", kind="missing", since=NOW)
    case = lifecycle.record_sweep(of(S.CURRENT), [first], sweep_at=LATER)
    again = lifecycle.record_sweep(case, [replace(first, since=LATER)], sweep_at=LATER)

    assert again.credential.drift == (first,)
    assert lifecycle.record_sweep(again, [], sweep_at=LATER).credential.drift == ()


def test_a_version_is_known_by_its_sequence() -> None:
    """Later and older mean the credential's own numbers; ids are random."""
    new: Version = accept(of(S.CURRENT, open_as=R.RUNNING)).versions[-1]

    assert (new.seq, new.fence, new.exposed, new.deadline) == (2, 7, False, None)


def test_what_a_revoke_left_out_stays_out_until_it_is_named() -> None:
    """The successor and every later rotation go past the place where it leaked; one word ends that."""
    case = of(S.CURRENT)
    agent = replace(case.agent, targets=(target("a"), replace(target("b"), to="leaky")))
    cut = lifecycle.revoke_agent(
        replace(case, agent=agent), reissue=True, now=NOW, withhold=["leaky"]
    )
    again = lifecycle.revoke_agent(cut, reissue=True, now=NOW)

    for one in (cut, again):
        after = opened(one)
        assert after.rotation is not None
        assert [t.key for t in after.rotation.targets] == [target("a").key]
        assert [t.to for t in after.targets] == [target("a").to, "leaky"]
    back = lifecycle.readmit(cut, "leaky", now=LATER)
    assert (back.next_targets, back.credential.sweep_at) == (agent.targets, LATER)
    with pytest.raises(Refused, match="nothing is withheld"):
        lifecycle.readmit(cut, "files", now=NOW)


def test_a_sweep_remembers_the_last_look_at_what_it_could_not_read() -> None:
    """A place that cannot be read keeps its last look; one that the agent does not have loses it."""
    keys = [target().key, "other:x"]
    case = of(S.CURRENT)
    seen = lifecycle.record_sweep(
        case, [], sweep_at=LATER, looks=[Look(target=key, at=NOW) for key in keys]
    )

    assert seen.credential.looks == (Look(target=keys[0], at=NOW),)
    assert lifecycle.record_sweep(seen, [], sweep_at=LATER).credential.looks[0].at == NOW


def test_only_what_is_being_left_can_be_forgotten() -> None:
    """A person ends the look at a dropped destination; one that the agent has must go first."""
    gone = target("old")
    case = of(S.CURRENT)
    case = replace(case, credential=replace(case.credential, leaving=(gone,)))

    after = lifecycle.forget(case, gone.key, now=NOW)

    assert (after.credential.leaving, after.credential.wake_at) == ((), NOW)
    for key in (target().key, "files:nowhere"):
        with pytest.raises(Refused, match="is not leaving"):
            lifecycle.forget(case, key, now=NOW)
