"""What `decide` chooses, as sentences; each rule of the protocol that lives in it has one."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyturn.core import steps
from keyturn.core.decision import decide
from keyturn.core.model import (
    Agent,
    AgentState,
    Case,
    Cause,
    Credential,
    Drift,
    Effect,
    Placement,
    Policy,
    Repairs,
    Request,
    RotationState,
    Target,
    Traits,
    VersionState,
    WaitReason,
)
from keyturn.core.steps import Action, Plan, Run, Sight, Trouble
from support.stores import NOW, intent, rotation, target, version

UID = "cred"
A, B = target("a"), target("b")
S, R = VersionState, RotationState
SOON, AGO = NOW + timedelta(hours=1), NOW - timedelta(hours=1)
OLD, NEW = version(UID, 1).id, version(UID, 2).id
CAS = Traits(has_cas=True, keeps_versions=True)
STAGING = replace(CAS, can_stage=True)


def case(*states: VersionState, rotating: Any = None, placed: bool = True, **more: Any) -> Case:
    """Return a case: versions numbered from 1, placed everywhere, and a rotation if wanted."""
    versions = tuple(version(UID, seq, state) for seq, state in enumerate(states, 1))
    own = next((v.id for v in versions if v.state is S.PENDING), None)
    values = {"targets": (A, B), "state": R.RUNNING, "version_id": own}
    credential = Credential(uid=UID, agent_uid="x", seq=len(versions), sweep_at=SOON)
    return Case(
        agent=Agent(
            uid="x",
            name="bot",
            login="bot",
            targets=(A, B),
            state=more.pop("agent", AgentState.ENABLED),
            listed=more.pop("listed", True),
        ),
        credential=replace(credential, **more),
        versions=versions,
        rotation=None if rotating is None else rotation(UID, **values | rotating),
        placements=tuple(
            Placement(version_id=v.id, credential_uid=UID, target=t.key, locator=str(v.seq))
            for v in versions
            for t in (A, B)
            if placed
        ),
    )


def having(given_case: Case, seq: int, **values: Any) -> Case:
    """Change a version."""
    versions = (replace(v, **values) if v.seq == seq else v for v in given_case.versions)
    return replace(given_case, versions=tuple(versions))


def naming(given_case: Case, seq: int, **values: Any) -> Case:
    """Add an unresolved intent."""
    found = intent(given_case.versions[seq - 1], at=AGO, **values)
    return replace(given_case, intents=(*given_case.intents, found))


def run(a: Sight | None = None, b: Sight | None = None, **more: Any) -> Run:
    """Return what a run knows of the two destinations."""
    sights = {t.key: sight for t, sight in ((A, a), (B, b)) if sight is not None}
    return Run(writer="w1", sights=sights, **more)


def ready(a: Sight, b: Sight, **more: Any) -> Run:
    """Return a run that holds the plaintext of version 2, with every verifier told."""
    return run(a, b, holding=NEW, settled=True, **more)


def sees(shown: str | None, **more: Any) -> Sight:
    """Return a sight."""
    return Sight(shown=shown, token=more.pop("token", "5"), empty=shown is None, **more)


def plan(traits: Traits = CAS, **more: Any) -> Plan:
    """Return a plan with the same traits everywhere."""
    return Plan(policy=Policy(), traits={A.key: traits, B.key: traits}, **more)


OPEN: dict[str, Any] = {}
GOING = case(S.CURRENT, S.PENDING, rotating=OPEN)
DONE = sees(NEW, verified=True)
WAITING = {"state": R.WAITING}
OVER = having(case(S.PREVIOUS, S.CURRENT), 1, deadline=AGO)
TROUBLE = {B.key: Trouble(code="denied", permanent=True)}
AWAY = {B.key: Trouble(code="x")}
FULL = case(S.PREVIOUS, S.PREVIOUS, S.PREVIOUS, S.CURRENT, rotating=OPEN)
for _days, _version in enumerate(FULL.versions[:3]):
    FULL = having(FULL, _version.seq, deadline=SOON + timedelta(_days))

A_BIT = timedelta(minutes=1)


def opening(kind: str, *targets: Target) -> steps.Open:
    """Return the rotation that mends these."""
    drift = tuple(Drift(target=one.key, kind=kind, since=NOW) for one in targets)
    return steps.Open(cause=Cause.DRIFT, drift=drift)


def copying(to: Target, source: Target, *, kind: str, **more: Any) -> steps.CopyForward:
    """Return the copy of version 2 that mends an entry."""
    return steps.CopyForward(
        target=to,
        source=source,
        version_id=NEW,
        expected="5",
        drift=Drift(target=to.key, kind=kind, since=NOW),
        **{"stages": False, "empty": False, **more},
    )


def mended(where: Target, *minutes: int) -> Repairs:
    """Return an entry that was mended so many minutes ago."""
    return Repairs(target=where.key, at=tuple(NOW - minute * A_BIT for minute in minutes))


Row = tuple[Case, Run, Plan, Action]

SENTENCES: dict[str, Row] = {
    # --- what opens a rotation
    "an agent without a version gets its first at once": (
        case(),
        run(),
        plan(),
        steps.Open(cause=Cause.FIRST),
    ),
    "a rotation that is due is opened": (
        case(S.CURRENT, next_rotation_at=NOW),
        run(),
        plan(),
        steps.Open(cause=Cause.SCHEDULE),
    ),
    "one that is not due is not": (
        case(S.CURRENT, next_rotation_at=SOON),
        run(),
        plan(),
        steps.Rest(until=SOON),
    ),
    "a request is followed": (
        case(S.CURRENT, request=Request()),
        run(),
        plan(),
        steps.Open(cause=Cause.REQUEST),
    ),
    "a successor that is owed comes before everything (rule 14)": (
        case(S.REVOKED, successor_owed=True, request=Request()),
        run(),
        plan(),
        steps.Open(cause=Cause.REISSUE),
    ),
    "nothing is minted for a suspended agent (rule 13)": (
        case(S.REVOKED, agent=AgentState.SUSPENDED, placed=False),
        run(),
        plan(),
        steps.Rest(until=SOON),
    ),
    "after a resume an agent whose versions are refused gets a new one": (
        case(S.REVOKED),
        run(),
        plan(),
        steps.Open(cause=Cause.DRIFT),
    ),
    "a destination that shows a revoked version owes a rotation (rule 14)": (
        case(S.REVOKED, S.CURRENT),
        run(sees(OLD), sees(OLD)),
        plan(),
        opening("revoked", A, B),
    ),
    "but not for a suspended agent (rule 14)": (
        case(S.REVOKED, S.CURRENT, agent=AgentState.SUSPENDED, placed=False),
        run(sees(OLD), sees(NEW)),
        plan(),
        steps.Rest(until=SOON),
    ),
    "nothing opens where every place is left out": (
        case(S.REVOKED, S.CURRENT, withheld=("files",), placed=False),
        run(sees(OLD), sees(OLD)),
        plan(),
        steps.Rest(until=SOON),
    ),
    "an older value is repaired by copying current forward (rule 4)": (
        case(S.PREVIOUS, S.CURRENT),
        run(sees(OLD), sees(NEW)),
        plan(),
        copying(A, B, kind="older"),
    ),
    "a value that is missing is copied too": (
        case(S.PREVIOUS, S.CURRENT),
        run(sees(NEW), sees(None)),
        plan(),
        copying(B, A, kind="missing", empty=True),
    ),
    "and so is one that a person refused (rule 14)": (
        case(S.REVOKED, S.CURRENT),
        run(sees(OLD), sees(NEW)),
        plan(),
        copying(A, B, kind="revoked"),
    ),
    "every place is read before anything is mended": (
        case(S.PREVIOUS, S.CURRENT),
        run(sees(OLD)),
        plan(),
        steps.Observe(target=B),
    ),
    "without a copy elsewhere a rotation mends it": (
        case(S.PREVIOUS, S.CURRENT),
        run(sees(OLD), sees(OLD)),
        plan(),
        opening("older", A, B),
    ),
    "nothing is moved back to current: a rotation moves it on (rule 4)": (
        case(S.CURRENT, S.REVOKED),
        run(sees(NEW), sees(OLD)),
        plan(),
        opening("revoked", A),
    ),
    "what can stage gives its own copy": (
        case(S.PREVIOUS, S.CURRENT),
        run(sees(OLD), sees(OLD)),
        plan(STAGING),
        copying(A, A, kind="older", stages=True),
    ),
    "a copy that proved wrong is none": (
        case(S.PREVIOUS, S.CURRENT),
        run(sees(OLD), sees(NEW), no_copy=frozenset({B.key})),
        plan(),
        opening("older", A),
    ),
    "what refused a repair for good is left to a rotation to tell of": (
        case(S.PREVIOUS, S.CURRENT),
        run(
            sees(OLD),
            sees(NEW),
            written=frozenset({(A.key, Effect.ACTIVATE)}),
            unmended=frozenset({A.key}),
        ),
        plan(),
        opening("older", A),
    ),
    "a repair that was tried in this run waits for the next look": (
        case(S.PREVIOUS, S.CURRENT),
        run(sees(OLD), sees(NEW), written=frozenset({(A.key, Effect.ACTIVATE)})),
        plan(),
        steps.Rest(until=SOON),
    ),
    "three repairs an hour are enough": (
        case(S.PREVIOUS, S.CURRENT, repairs=(mended(A, 59, 40, 1),)),
        run(sees(OLD), sees(NEW)),
        plan(),
        steps.Rest(until=SOON),
    ),
    "two are not": (
        case(S.PREVIOUS, S.CURRENT, repairs=(mended(A, 61, 40, 1),)),
        run(sees(OLD), sees(NEW)),
        plan(),
        copying(A, B, kind="older"),
    ),
    "in a fight one an hour is": (
        case(S.PREVIOUS, S.CURRENT, repairs=(replace(mended(A, 59), fight=AGO),)),
        run(sees(OLD), sees(NEW)),
        plan(),
        steps.Rest(until=SOON),
    ),
    "and then it is tried again": (
        case(S.PREVIOUS, S.CURRENT, repairs=(replace(mended(A, 61), fight=AGO),)),
        run(sees(OLD), sees(NEW)),
        plan(),
        copying(A, B, kind="older"),
    ),
    "three rotations an hour mend an agent, however many entries it has": (
        case(S.PREVIOUS, S.CURRENT, repairs=(Repairs(target="", at=(AGO + A_BIT,) * 3),)),
        run(sees(OLD), sees(OLD)),
        plan(),
        steps.Rest(until=SOON),
    ),
    "a fight keeps no rotation from its time": (
        case(S.PREVIOUS, S.CURRENT, next_rotation_at=NOW, repairs=(mended(A, 3, 2, 1),)),
        run(sees(OLD), sees(NEW)),
        plan(),
        steps.Open(cause=Cause.SCHEDULE),
    ),
    "a stale read repairs nothing (rule 5)": (
        having(case(S.PREVIOUS, S.CURRENT), 1, deadline=SOON),
        run(sees(OLD, fresh=False), sees(NEW)),
        plan(),
        steps.Rest(until=SOON),
    ),
    "a new destination gets its value by a rotation": (
        case(S.CURRENT, placed=False),
        run(sees(OLD), sees(None)),
        plan(),
        steps.Open(cause=Cause.NEW_DESTINATION),
    ),
    # --- before the first side effect
    "every destination is read before anything is minted": (
        case(S.CURRENT, rotating=OPEN),
        run(sees(OLD)),
        plan(),
        steps.Observe(target=B),
    ),
    "one that cannot be read makes it wait, not mint (rule 12)": (
        case(S.CURRENT, rotating=OPEN),
        run(sees(OLD), troubles={B.key: Trouble(code="x", retry_after=timedelta(9))}),
        plan(),
        steps.Wait(
            reason=WaitReason.DESTINATION, where=B.key, code="x", retry_after=timedelta(9)
        ),
    ),
    "one that refuses us stalls it": (
        case(S.CURRENT, rotating=OPEN),
        run(sees(OLD), troubles=TROUBLE),
        plan(),
        steps.Stall(code="denied", where=B.key),
    ),
    "a value that is not ours stalls it": (
        case(S.CURRENT, rotating=OPEN),
        run(sees(OLD), sees(None, blocked="not-ours")),
        plan(),
        steps.Stall(code="not-ours", where=B.key),
    ),
    "what somebody else staged is never stolen": (
        case(S.CURRENT, rotating=OPEN),
        run(sees(OLD), sees(OLD, foreign_staged=True)),
        plan(),
        steps.Wait(reason=WaitReason.FOREIGN_STAGED, where=B.key, code="conflict"),
    ),
    "at the limit it waits for the next deadline (rule 7)": (
        FULL,
        run(sees(None), sees(None)),
        plan(),
        steps.Wait(reason=WaitReason.ACCEPTED_LIMIT, until=SOON),
    ),
    "below the limit it mints": (
        case(S.CURRENT, rotating=OPEN),
        run(sees(OLD), sees(OLD)),
        plan(),
        steps.Mint(),
    ),
    # --- recovery
    "confirmations of another run count nothing (rule 6)": (
        GOING,
        run(),
        plan(),
        steps.Observe(target=A),
    ),
    "the secret is taken from a copy": (GOING, run(sees(OLD), DONE), plan(), steps.Recover(target=B)),
    "a staged copy will do": (
        GOING,
        run(sees(OLD, staged=NEW), sees(OLD)),
        plan(STAGING),
        steps.Recover(target=A),
    ),
    "without a copy the attempt is dropped": (
        GOING,
        run(sees(OLD), sees(OLD)),
        plan(),
        steps.DropAttempt(),
    ),
    "a copy that proved wrong is no copy": (
        GOING,
        run(sees(OLD), DONE, no_copy=frozenset({B.key})),
        plan(),
        steps.DropAttempt(),
    ),
    "an unreadable destination may hold the copy (rule 12)": (
        GOING,
        run(sees(OLD), troubles=AWAY),
        plan(),
        steps.Wait(reason=WaitReason.DESTINATION, where=B.key, code="x"),
    ),
    "a version found revoked is never rolled forward (rule 15)": (
        case(S.CURRENT, S.REVOKED, rotating={"version_id": NEW}),
        run(sees(NEW), sees(OLD)),
        plan(),
        steps.DropAttempt(),
    ),
    # --- publishing
    "nothing is shown before every verifier knows": (
        GOING,
        run(sees(OLD), sees(OLD), holding=NEW),
        plan(),
        steps.AwaitVerifiers(),
    ),
    "what can stage is staged first": (
        GOING,
        ready(sees(OLD), sees(OLD)),
        plan(STAGING),
        steps.Stage(target=A, expected="5", exposes=False),
    ),
    "staging into an empty entry exposes (rule 8)": (
        GOING,
        ready(sees(None), sees(OLD)),
        plan(STAGING),
        steps.Stage(target=A, expected="5", exposes=True),
    ),
    "what was staged is read back": (
        GOING,
        ready(sees(OLD, staged=NEW), sees(OLD)),
        plan(STAGING),
        steps.ReadBack(target=A),
    ),
    "everything is staged before anything is shown": (
        GOING,
        ready(sees(OLD, staged=NEW), sees(OLD), read_back=frozenset({A.key})),
        plan(STAGING),
        steps.Stage(target=B, expected="5", exposes=False),
    ),
    "the number that was read goes with the write (rule 3)": (
        GOING,
        ready(sees(OLD, token="17"), sees(OLD)),
        plan(),
        steps.Activate(target=A, expected="17"),
    ),
    "a later version is never replaced by an earlier one (rule 4)": (
        case(S.PENDING, S.KEPT, rotating=OPEN),
        run(sees(NEW), sees(None), holding=OLD, settled=True),
        plan(),
        steps.Stall(code="later-version", where=A.key),
    ),
    "a value that differs from ours stalls it": (
        GOING,
        ready(sees(NEW), sees(OLD)),
        plan(),
        steps.Stall(code="unknown-value", where=A.key),
    ),
    "a confirmed write that is not shown is not repeated in one run": (
        GOING,
        ready(sees(OLD), sees(OLD), written=frozenset({(A.key, Effect.ACTIVATE)})),
        plan(),
        steps.Wait(reason=WaitReason.DESTINATION, where=A.key, code="not-shown"),
    ),
    "it is promoted when every destination shows it": (GOING, ready(DONE, DONE), plan(), steps.Promote()),
    "a destination outside of the rotation is looked at before promote": (
        case(S.CURRENT, S.PENDING, rotating={"targets": (A,)}),
        Run(writer="w1", sights={A.key: DONE}, holding=NEW, settled=True),
        plan(),
        steps.Observe(target=B),
    ),
    "but hinders nothing where it cannot be read": (
        case(S.CURRENT, S.PENDING, rotating={"targets": (A,)}),
        Run(writer="w1", sights={A.key: DONE}, troubles=TROUBLE, holding=NEW, settled=True),
        plan(),
        steps.Promote(),
    ),
    # --- old versions
    "an intent whose writer may live is not settled (rule 2)": (
        naming(case(S.KEPT, S.CURRENT), 1, writer="other"),
        run(),
        plan(),
        steps.Rest(until=NOW + timedelta(minutes=5)),
    ),
    "an intent settles when its request cannot land any more (rule 2)": (
        naming(case(S.KEPT, S.CURRENT), 1),
        run(),
        plan(),
        steps.Settle(intent=naming(case(S.KEPT, S.CURRENT), 1).intents[0]),
    ),
    "it counts from the writer's death (rule 2)": (
        naming(case(S.KEPT, S.CURRENT), 1, writer="other"),
        run(died={"other": NOW}),
        plan(),
        steps.Rest(until=NOW + timedelta(minutes=5)),
    ),
    "for files the writer's death is enough (rule 2)": (
        naming(case(S.KEPT, S.CURRENT), 1, writer="other"),
        run(died={"other": NOW}),
        plan(Traits(has_cas=True, settles_with_writer=True)),
        steps.Settle(intent=naming(case(S.KEPT, S.CURRENT), 1, writer="other").intents[0]),
    ),
    "a call that has not returned is not settled (rule 2)": (
        naming(case(S.KEPT, S.CURRENT), 1),
        run(in_flight=frozenset({naming(case(S.KEPT), 1).intents[0].uid})),
        plan(),
        steps.Rest(until=NOW + timedelta(minutes=5)),
    ),
    "a later write of ours settles a compare-and-set (rule 2)": (
        naming(case(S.KEPT, S.CURRENT), 1, writer="other", expected="4"),
        run(sees(NEW), sees(NEW)),
        plan(),
        steps.Settle(
            intent=naming(case(S.KEPT, S.CURRENT), 1, writer="other", expected="4").intents[0]
        ),
    ),
    "a kept version that is shown nowhere gets its deadline (rule 7)": (
        case(S.KEPT, S.CURRENT),
        run(sees(NEW), sees(NEW)),
        plan(),
        steps.SetDeadline(version_id=OLD),
    ),
    "also while a rotation is stalled (rule 7)": (
        case(S.KEPT, S.CURRENT, rotating={"state": R.STALLED}),
        run(sees(NEW), sees(NEW)),
        plan(),
        steps.SetDeadline(version_id=OLD),
    ),
    "a version that is over is looked for before it is retired (rule 5)": (
        OVER,
        run(sees(NEW)),
        plan(),
        steps.Observe(target=B),
    ),
    "what is shown nowhere is retired": (OVER, run(sees(NEW), sees(NEW)), plan(), steps.Retire(version_id=OLD)),
    "a read that is not fresh lets nothing go (rule 5)": (
        OVER,
        run(sees(NEW), sees(NEW, fresh=False)),
        plan(),
        steps.Rest(until=SOON),
    ),
    "what cannot be read lets nothing go (rule 5)": (
        OVER,
        run(sees(NEW), troubles=AWAY),
        plan(),
        steps.Rest(until=NOW + timedelta(minutes=15)),
    ),
    "copies of what is over are cleaned (rule 11)": (
        case(S.RETIRED, S.CURRENT),
        run(sees(NEW, locator="2"), sees(NEW, locator="2")),
        plan(),
        steps.Clean(target=A, placement=case(S.RETIRED, S.CURRENT).placements[0]),
    ),
    "never the one that is shown (rule 11)": (
        case(S.RETIRED, S.CURRENT, agent=AgentState.SUSPENDED),
        run(sees(OLD, locator="1"), sees(None, blocked="x", locator="1")),
        plan(),
        steps.Rest(until=SOON),
    ),
    "not under another name either: some know it by its version id (rule 11)": (
        case(S.RETIRED, S.CURRENT, agent=AgentState.SUSPENDED),
        run(sees(OLD, locator="9"), sees(OLD, locator="9")),
        plan(),
        steps.Rest(until=SOON),
    ),
    "nothing is cleaned where no copies are kept": (
        case(S.RETIRED, S.CURRENT),
        run(sees(NEW), sees(NEW)),
        plan(Traits(has_cas=True)),
        steps.Forget(placement=case(S.RETIRED, S.CURRENT).placements[0]),
    ),
    "a revoked value goes out where no rotation replaces it": (
        case(S.REVOKED, agent=AgentState.SUSPENDED),
        run(sees(OLD, token="7", locator="1"), sees(None)),
        plan(),
        steps.Withdraw(target=A, version_id=OLD, expected="7"),
    ),
    "also where somebody added keys of their own": (
        case(S.REVOKED, agent=AgentState.SUSPENDED),
        run(sees(OLD, blocked="other-keys"), sees(None)),
        plan(),
        steps.Withdraw(target=A, version_id=OLD, expected="5"),
    ),
    "not by a read that is not fresh (rule 5)": (
        case(S.REVOKED, agent=AgentState.SUSPENDED),
        run(sees(OLD, fresh=False), sees(OLD, blocked="other-owner")),
        plan(),
        steps.Rest(until=SOON),
    ),
    "not twice in one run": (
        case(S.REVOKED, agent=AgentState.SUSPENDED),
        run(sees(OLD), sees(OLD), written=frozenset((t.key, Effect.WITHDRAW) for t in (A, B))),
        plan(),
        steps.Rest(until=SOON),
    ),
    "not while nobody knows how the last try ended": (
        naming(case(S.REVOKED, agent=AgentState.SUSPENDED), 1, effect=Effect.WITHDRAW, target=A.key, writer="alive"),
        run(sees(OLD, locator="1"), sees(None, locator="1")),
        plan(Traits(keeps_versions=True)),
        steps.Rest(until=NOW + Policy().retry.settle_after),
    ),
    "its intent is settled by any other token": (
        naming(case(S.REVOKED, agent=AgentState.SUSPENDED), 1, effect=Effect.WITHDRAW, target=A.key, writer="alive", expected="4"),
        run(sees(None), sees(None)),
        plan(),
        steps.Settle(intent=naming(case(S.REVOKED), 1, effect=Effect.WITHDRAW, target=A.key, writer="alive", expected="4").intents[0]),
    ),
    "a sweep records what it found": (
        case(S.CURRENT, sweep_at=NOW),
        run(sees(OLD), sees(OLD)),
        plan(),
        steps.RecordSweep(drift=()),
    ),
    "a leaving destination that is empty is left (rule 12)": (
        replace(case(S.CURRENT, sweep_at=NOW, leaving=(B,)), agent=replace(GOING.agent, targets=(A,))),
        run(sees(OLD), sees(None)),
        plan(),
        steps.Leave(target=B.key),
    ),
    "not while a write of ours may still land there": (
        naming(
            replace(case(S.CURRENT, sweep_at=NOW, leaving=(B,)), agent=replace(GOING.agent, targets=(A,))),
            1, target=B.key, effect=Effect.STAGE, writer="alive",
        ),
        run(sees(OLD), sees(None)),
        plan(),
        steps.RecordSweep(drift=()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("sentence", SENTENCES)
def test_decision(sentence: str) -> None:
    """What is decided is what the sentence says."""
    given_case, seen, planned, expected = SENTENCES[sentence]

    assert decide(given_case, seen, planned, NOW) == expected


# --- total --------------------------------------------------------------------------------

MOMENTS = st.sampled_from([None, AGO, NOW, SOON])
IDS = st.sampled_from([None, OLD, NEW, version(UID, 3).id, "stranger"])
SIGHTS = st.none() | st.builds(
    Sight,
    shown=IDS.filter(lambda i: i != "stranger"),
    verified=st.booleans(),
    blocked=st.sampled_from(["", "", "not-ours"]),
    staged=IDS,
    foreign_staged=st.booleans(),
    empty=st.booleans(),
    token=st.sampled_from(["", "5"]),
    locator=st.sampled_from(["", "1", "2"]),
    fresh=st.booleans(),
)
TROUBLES = st.dictionaries(
    st.sampled_from([A.key, B.key]), st.builds(Trouble, code=st.just("x"), permanent=st.booleans())
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a case that the store would take: at most one pending and one current version."""
    states = draw(st.lists(st.sampled_from(S), max_size=6))
    seen: set[VersionState] = set()
    kept = [s for s in states if s not in seen & {S.PENDING, S.CURRENT} and not seen.add(s)]
    rotating = draw(
        st.none()
        | st.fixed_dictionaries(
            {"state": st.sampled_from(R), "targets": st.sampled_from([(A,), (A, B)])}
        )
    )
    found = case(
        *kept,
        rotating=rotating,
        placed=draw(st.booleans()),
        agent=draw(st.sampled_from(AgentState)),
        sweep_at=draw(MOMENTS),
        next_rotation_at=draw(MOMENTS),
        successor_owed=draw(st.booleans()),
        listed=draw(st.booleans()),
        leaving=draw(st.sampled_from([(), (B,)])),
    )
    for v in found.versions:
        if v.state in (S.PREVIOUS, S.KEPT):
            found = having(found, v.seq, deadline=draw(MOMENTS))
        if draw(st.booleans()):
            writer = draw(st.sampled_from(["w1", "dead", "alive"]))
            effect = draw(st.sampled_from(Effect))
            found = naming(found, v.seq, writer=writer, effect=effect, target=B.key)
    return found


@settings(max_examples=600, deadline=None, derandomize=True)
@given(
    given_case=cases(),
    a=SIGHTS,
    b=SIGHTS,
    troubles=TROUBLES,
    holding=IDS,
    settled=st.booleans(),
    traits=st.sampled_from([CAS, STAGING, Traits(), Traits(settles_with_writer=True)]),
)
def test_decide_is_total(
    given_case: Case,
    a: Sight | None,
    b: Sight | None,
    troubles: dict[str, Trouble],
    holding: str | None,
    settled: bool,
    traits: Traits,
) -> None:
    """Whatever a store can hold and a run can see, there is an answer, and the same one each time."""
    seen = run(a, b, troubles=troubles, holding=holding, settled=settled, died={"dead": AGO})
    found = decide(given_case, seen, plan(traits), NOW)

    assert isinstance(found, Action)
    assert found == decide(given_case, seen, plan(traits), NOW)
    if isinstance(found, steps.Rest):
        assert found.until is None or found.until > NOW


@pytest.mark.parametrize("shown", [OLD, None])
def test_a_place_where_it_leaked_owes_nothing(shown: str | None) -> None:
    """Neither a revoked value nor none is mended there, unless a person names the place."""
    leaky = target("b", to="leaky")
    of = case(S.REVOKED, S.CURRENT, placed=False, withheld=("leaky",))
    of = replace(of, agent=replace(of.agent, targets=(A, leaky)))
    seen = Run(writer="w1", sights={A.key: sees(NEW), leaky.key: sees(shown)})
    traits = Plan(policy=Policy(), traits={A.key: CAS, leaky.key: CAS})

    assert decide(of, seen, traits, NOW) == steps.Rest(until=SOON)
    named = replace(of, credential=replace(of.credential, withheld=()))
    mends = steps.Open if shown is None else steps.CopyForward
    assert isinstance(decide(named, seen, traits, NOW), mends)
