"""What `keyturn status --json` says of a case: steps, what a destination shows, and what to type."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from keyturn import advice
from keyturn.core.model import (
    Agent,
    AgentState,
    Case,
    Credential,
    Drift,
    Look,
    Placement,
    Policy,
    Repairs,
    Request,
    RotationState,
    Waiting,
    WaitReason,
)
from keyturn.core.model import VersionState as S
from keyturn.errors import DestinationError, KeyMissing, StoreFull, StoreUnavailable
from keyturn.status import describe
from keyturn.world import Parked
from support.stores import NOW, intent, rotation, target, version

UID = "cred"
A, B = target("a"), target("b", to="leaky")
AGO, SOON = NOW - timedelta(hours=1), NOW + timedelta(hours=1)


def case(*states: S, **more: Any) -> Case:
    """Return a case with one version per state, all of them placed at A, the current at B too."""
    versions = tuple(
        version(UID, seq, state, promoted_at=AGO if state is S.CURRENT else None)
        for seq, state in enumerate(states, 1)
    )
    agent = Agent(
        uid="x",
        name="bot",
        login="bot",
        targets=(A, B),
        state=more.pop("agent", AgentState.ENABLED),
    )
    rotating = more.pop("rotating", None)
    intents = more.pop("intents", ())
    pending = next((v.id for v in versions if v.state is S.PENDING), None)
    return Case(
        agent=agent,
        credential=replace(Credential(uid=UID, agent_uid="x", seq=len(versions)), **more),
        versions=versions,
        rotation=rotation(UID, targets=(A, B), version_id=pending, **rotating)
        if rotating is not None
        else None,
        intents=tuple(intents),
        placements=tuple(
            Placement(version_id=v.id, credential_uid=UID, target=t.key)
            for v in versions
            for t in (A, B)
            if v.state is not S.PENDING and (t is A or v.state is S.CURRENT)
        ),
    )


def seen(of: Case) -> dict[str, Any]:
    """Return what `status --json` says."""
    return describe(of, policy=Policy(), now=NOW)


OLD, NEW = version(UID, 1).id, version(UID, 2).id
WAITS = Waiting(reason=WaitReason.VERIFIERS, since=AGO, next_try_at=SOON)
UNREAD = Waiting(
    reason=WaitReason.DESTINATION, where=B.key, code="denied", since=AGO, next_try_at=SOON
)
GOING = case(S.CURRENT, S.PENDING, rotating={})
EXPOSED = replace(GOING, versions=(GOING.versions[0], replace(GOING.versions[1], exposed=True)))
THERE = tuple(Placement(version_id=NEW, credential_uid=UID, target=t.key) for t in (A, B))

STEPS = {
    "nothing is minted": (case(S.CURRENT, rotating={}), "mint"),
    "verifiers are waited for": (
        case(S.CURRENT, S.PENDING, rotating={"state": RotationState.WAITING, "waiting": WAITS}),
        "accept",
    ),
    "one destination has it": (
        replace(EXPOSED, placements=(*EXPOSED.placements, THERE[0])),
        "publish",
    ),
    "it is staged everywhere": (replace(GOING, placements=THERE), "publish"),
    "every destination has it": (replace(EXPOSED, placements=THERE), "confirm"),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_step_follows_from_what_is_durable(name: str) -> None:
    """Each moment of a rotation has the name that the documents give to its step."""
    of, step = STEPS[name]
    assert seen(of)["rotation"]["step"] == step


PLACES: dict[str, tuple[Case, tuple[Any, ...]]] = {
    "a promotion has read it back": (case(S.REVOKED, S.CURRENT), (NEW, AGO, True, None)),
    "a later sweep saw it": (
        case(S.REVOKED, S.CURRENT, looks=(Look(target=B.key, at=NOW, shown=NEW),)),
        (NEW, NOW, True, None),
    ),
    "a later sweep saw nothing of ours": (
        case(
            S.REVOKED,
            S.CURRENT,
            looks=(Look(target=B.key, at=NOW),),
            drift=(Drift(target=B.key, kind="missing", since=NOW),),
        ),
        (None, NOW, False, "missing"),
    ),
    "a look from before the promotion counts no more": (
        case(S.REVOKED, S.CURRENT, looks=(Look(target=B.key, at=AGO - timedelta(1), shown=OLD),)),
        (NEW, AGO, True, None),
    ),
    "a refused value is not in sync": (
        case(S.REVOKED, looks=(Look(target=B.key, at=NOW, shown=OLD),), withheld=("leaky",)),
        (OLD, NOW, False, "withheld"),
    ),
    "a rotation waits there": (
        case(S.CURRENT, rotating={"state": RotationState.WAITING, "waiting": UNREAD}),
        (OLD, AGO, True, "denied"),
    ),
    "a rotation stalled there": (
        case(
            S.CURRENT,
            rotating={
                "state": RotationState.STALLED,
                "error_code": "not-ours",
                "error_where": B.key,
            },
        ),
        (None, None, False, "not-ours"),
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_destination_shows_what_was_read_last(name: str) -> None:
    """Version, time, sync and code are those of the newest read, whoever made it."""
    of, (shown, at, in_sync, code) = PLACES[name]
    found = seen(of)["destinations"][1]
    when = at.isoformat().replace("+00:00", "Z") if at else None
    assert (found["shows_version"], found["read_back_at"]) == (shown, when)
    assert (found["in_sync"], found["error_code"]) == (in_sync, code)


def ending(**more: Any) -> Case:
    """Return a case whose previous version has something to wait for."""
    deadline = more.pop("deadline", None)
    of = case(S.PREVIOUS, S.CURRENT, **more)
    return replace(of, versions=(replace(of.versions[0], deadline=deadline), of.versions[1]))


PREVIOUS = version(UID, 1, S.PREVIOUS)
GONE = target("old", to="gone")
BOTH = (Look(target=A.key, at=NOW, shown=NEW), Look(target=B.key, at=NOW, shown=NEW))
HELD: dict[str, tuple[Case, str]] = {
    "nothing is old": (case(S.CURRENT), ""),
    "a write is not settled": (ending(intents=[intent(PREVIOUS)]), "not settled"),
    "grace": (ending(deadline=SOON), "has not passed"),
    "shown": (
        ending(looks=(BOTH[0], Look(target=B.key, at=NOW, shown=OLD))),
        "leaky:b shows",
    ),
    "unread": (ending(looks=(*BOTH,), leaving=(GONE,)), "gone:old cannot be read"),
    "not begun": (ending(looks=BOTH), "has not begun"),
    "over": (ending(looks=BOTH, deadline=AGO), ""),
}


@pytest.mark.parametrize("name", HELD)
def test_what_keeps_an_old_version_is_told(name: str) -> None:
    """`safe_to_retire` names the one thing that holds an old version."""
    of, reason = HELD[name]
    found = seen(of)["safe_to_retire"]
    assert found["ok"] is (reason == "")
    assert reason in found["reason"]


def waits(reason: WaitReason, code: str = "") -> dict[str, Any]:
    """Return what a rotation is made of that waits at A."""
    waiting = Waiting(reason=reason, where=A.key, code=code, since=AGO, next_try_at=SOON)
    return {"state": RotationState.WAITING, "waiting": waiting}


def unlisted(of: Case) -> Case:
    """Return the case of an agent that disappeared from the files."""
    return replace(of, agent=replace(of.agent, listed=False))


HINTS: dict[str, tuple[Case, str]] = {
    "all is well": (case(S.CURRENT, looks=BOTH), ""),
    "suspended": (case(S.CURRENT, agent=AgentState.SUSPENDED), "keyturn audit bot"),
    "unmanaged": (unlisted(case(S.CURRENT)), "keyturn agents remove bot"),
    "unmanaged and suspended": (
        unlisted(case(S.CURRENT, agent=AgentState.SUSPENDED)),
        "keyturn agents remove bot",
    ),
    "stalled": (
        case(S.CURRENT, rotating={"state": RotationState.STALLED, "error_code": "denied"}),
        "keyturn check --probe",
    ),
    "a destination is away": (
        case(S.CURRENT, rotating=waits(WaitReason.DESTINATION, "destination-unavailable")),
        "keyturn check --probe",
    ),
    "too many are accepted": (
        case(S.PREVIOUS, S.CURRENT, rotating=waits(WaitReason.ACCEPTED_LIMIT)),
        f"keyturn revoke --version {OLD}",
    ),
    "leaving": (
        ending(looks=BOTH, leaving=(GONE,)),
        "keyturn destinations forget bot gone:old",
    ),
    "unreadable": (
        case(S.CURRENT, drift=(Drift(target=A.key, kind="unreadable", since=AGO),)),
        "keyturn check --probe",
    ),
    "withheld": (case(S.CURRENT, withheld=("leaky",)), "keyturn resume bot --destination leaky"),
    "overdue": (case(S.CURRENT, next_rotation_at=AGO), "keyturn rotate bot"),
}


@pytest.mark.parametrize("name", HINTS)
def test_the_hint_is_the_next_command(name: str) -> None:
    """Whatever is wrong, the command that mends it can be copied."""
    of, hint = HINTS[name]
    assert seen(of)["hint"].partition("   #")[0] == hint


def test_every_code_has_its_advice() -> None:
    """Whatever stops a rotation, status says what it means and what to type."""
    errors = {one.code for one in DestinationError.__subclasses__()}
    found = errors | {str(one) for one in WaitReason} | advice.ALTERED | {"not-shown"}
    # These two never come without a code of their own.
    found -= {str(WaitReason.DESTINATION), str(WaitReason.FOREIGN_STAGED)}
    found |= {StoreFull.code, StoreUnavailable.code, KeyMissing.code, "repair-fight"}
    assert found == set(advice.TABLE)


def test_a_fight_is_told_with_its_next_try_and_its_command() -> None:
    """The code, when it is tried again, whom to look for, and the command that takes it up again."""
    fight = Repairs(target=A.key, at=(AGO, NOW), fight=NOW)
    drift = (Drift(target=A.key, kind="older", since=AGO),)
    row = seen(case(S.PREVIOUS, S.CURRENT, drift=drift, repairs=(fight,)))
    place = row["destinations"][0]

    assert (place["error_code"], place["in_sync"]) == ("repair-fight", False)
    assert place["repairs"]["last_hour"] == 2
    assert place["repairs"]["next_try_at"] == (NOW + timedelta(hours=1)).isoformat()[:19] + "Z"
    assert row["hint"].startswith("keyturn rotation retry bot   # repair-fight: others undo")


def test_after_a_revoke_the_latest_version_is_what_is_shown() -> None:
    """An older look says nothing of the version that was placed after it, whatever became of that."""
    revoked = replace(version(UID, 2, S.REVOKED), promoted_at=AGO, ended_at=NOW)
    of = case(S.RETIRED, S.REVOKED, looks=(Look(target=A.key, at=AGO - timedelta(1), shown=OLD),))
    of = replace(of, versions=(of.versions[0], revoked))
    assert seen(of)["destinations"][0]["shows_version"] == NEW

    later = NOW + timedelta(seconds=1)
    swept = replace(of.credential, looks=(Look(target=A.key, at=later),))
    assert seen(replace(of, credential=swept))["destinations"][0]["shows_version"] is None


def test_what_does_not_rotate_has_no_next_rotation() -> None:
    """A suspended agent and one that left the files have a plan, but nothing comes of it."""
    planned = case(S.CURRENT, next_rotation_at=SOON)
    suspended = case(S.CURRENT, next_rotation_at=SOON, agent=AgentState.SUSPENDED)
    assert seen(planned)["next_rotation_at"] is not None
    assert seen(suspended)["next_rotation_at"] is None
    assert seen(unlisted(planned))["next_rotation_at"] is None


PARKED = Parked(code="store-full", since=AGO)


@pytest.mark.parametrize("of", [case(S.CURRENT), case(S.CURRENT, rotating={})])
def test_a_store_that_is_full_stands_in_the_way(of: Case) -> None:
    """Whether its row could be written or not, the rotation waits for the store, and status says so."""
    found = describe(of, policy=Policy(), now=NOW, parked=PARKED)
    rotating = found["rotation"]
    assert (rotating["state"], rotating["why"], rotating["where"]) == (
        "waiting",
        "store-full",
        "store",
    )
    assert "free some space" in found["hint"]


def test_a_rotation_that_was_asked_for_is_seen_before_its_row() -> None:
    """A destination that hangs at the first read leaves nothing in the store yet."""
    found = seen(case(S.CURRENT, request=Request()))["rotation"]
    assert found["state"] == "asked"
    assert set(found) == set(seen(case(S.CURRENT, rotating={}))["rotation"])
