"""The saga over real parts: what it does when destinations, people and the process misbehave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta

import pytest

from keyturn.core import lifecycle
from keyturn.core.model import AgentState, Cause, RotationState, VersionState, WaitReason
from keyturn.errors import Denied, DestinationUnavailable, Rejected, StoreFull, Throttled
from support.bench import GRACE, NOW, SETTLE, SHAPES, SWEEP, Bench, Crash, Endless

PAIRS = [("staging", "azure"), ("vault", "file"), ("azure", "file"), ("staging", "vault")]
ALL = [*((shape,) for shape in SHAPES), *PAIRS]

Make = Callable[..., Bench]


@pytest.fixture
def make() -> Iterator[Make]:
    """Build benches, and give back what they hold."""
    made: list[Bench] = []

    def build(*shapes: str, home: bool = True) -> Bench:
        bench = Bench(*shapes)
        made.append(bench)
        if home:
            bench.go()
            bench.assert_home()
        return bench

    yield build
    for bench in made:
        bench.close()


# --- what goes well -----------------------------------------------------------------------


@pytest.mark.parametrize("shapes", ALL, ids="-".join)
def test_a_rotation_replaces_the_version_and_retires_the_old_one(
    make: Make, shapes: tuple[str, ...]
) -> None:
    """Whatever the destinations can do, the new version is shown and the old one ends in time."""
    bench = make(*shapes)
    first = bench.case.current
    bench.ask()
    bench.run()
    case = bench.case

    assert first is not None
    assert bench.at_home()
    assert case.current != first
    assert bench.version(first.id).state is VersionState.PREVIOUS
    assert bench.version(first.id).deadline == bench.clock.now() + GRACE
    bench.go()
    bench.assert_home()
    assert bench.version(first.id).state is VersionState.RETIRED
    assert bench.clock.now() >= NOW + GRACE


# --- a crash at every point ---------------------------------------------------------------


def _story(bench: Bench) -> None:
    """Mint the first version, rotate once, retire the old one: every step of the protocol."""
    while True:
        bench.crashing_run()
        if bench.case.rotation is None and bench.at_home():
            break
        bench.pass_time(timedelta(seconds=30))
    bench.ask()
    bench.go()


@pytest.mark.parametrize("shapes", ALL, ids="-".join)
def test_a_crash_at_every_point_converges(make: Make, shapes: tuple[str, ...]) -> None:
    """After a crash before or after any effect a new process ends where it must (I1, I4, I5)."""
    whole = make(*shapes, home=False)
    _story(whole)
    for number, name in enumerate(whole.points):
        bench = Bench(*shapes)
        bench.crash_at = lambda at, _name, number=number: at == number
        try:
            _story(bench)
            bench.assert_home()
            minted = len(bench.versions())
        finally:
            bench.close()

        assert bench.crashes == 1, (number, name)
        assert minted <= 3, (number, name, bench.steps.done)  # the two of the story and one more


@pytest.mark.full
@pytest.mark.parametrize("fault", ["before", "after", "late", "unsent"])
@pytest.mark.parametrize("shapes", ALL, ids="-".join)
def test_a_crash_beside_a_lost_answer_converges(
    make: Make, shapes: tuple[str, ...], fault: str
) -> None:
    """A crash at any point of a rotation whose second write had no answer converges as well."""
    number = 0
    while True:
        bench = make(*shapes)
        start = len(bench.points)
        bench.ask()
        bench.played["d0"].faults = ["", fault]
        bench.crash_at = lambda at, _name, end=start + number: at == end
        crashed = bench.crashing_run()
        bench.pass_time(timedelta(seconds=20))
        bench.played["d0"].land()
        bench.go()
        bench.assert_home()
        if not crashed:
            return
        number += 1


CRASHES: dict[str, tuple[str, int, VersionState | None, bool]] = {
    # sentence: (the point, which one of that name, what becomes of the version, minted again)
    "opened and minted, before accept: nothing is used up": (
        "before save rotation.opened+version.accepted",
        1,
        None,
        True,
    ),
    "accepted and nowhere: the version is retired and minted again": (
        "after save rotation.opened+version.accepted",
        1,
        VersionState.RETIRED,
        True,
    ),
    "activation intended, no copy anywhere: kept, minted again": (
        "before activate d0",
        1,
        VersionState.PREVIOUS,
        True,
    ),
    "written and not reported: found where it is shown, and carried on": (
        "after activate d0",
        1,
        VersionState.CURRENT,
        False,
    ),
    "shown at one of two: the secret is taken from the copy": (
        "before activate d1",
        1,
        VersionState.CURRENT,
        False,
    ),
    "everything confirmed: read again, promoted": (
        "before save version.promoted",
        1,
        VersionState.CURRENT,
        False,
    ),
    "promoted: nothing is left to do": (
        "after save version.promoted",
        1,
        VersionState.CURRENT,
        False,
    ),
}


@pytest.mark.parametrize("sentence", CRASHES)
def test_the_crash_table(make: Make, sentence: str) -> None:
    """Each row of the protocol's crash table ends as the row says."""
    point, nth, ends, again = CRASHES[sentence]
    bench = make("vault", "file")
    start, minted = len(bench.points), len(bench.versions())
    bench.ask()
    bench.crash_at = lambda at, name: name == point and bench.points[start:].count(name) == nth

    assert bench.crashing_run()
    own = bench.case.pending or bench.case.current
    bench.go(until=lambda: bench.case.rotation is None and bench.at_home())
    accepted_before_crash = ends is not None
    assert len(bench.versions()) == minted + 1 + int(again and accepted_before_crash)
    if ends is not None:
        assert own is not None
        assert bench.version(own.id).state is ends
    bench.go()
    bench.assert_home()


def test_a_staged_copy_gives_the_secret_back(make: Make) -> None:
    """A crash after staging loses nothing: the copy is read by version id and rolled forward."""
    bench = make("staging")
    bench.ask()
    bench.crash_at = lambda _at, name: name == "after stage d0"

    assert bench.crashing_run()
    pending = bench.case.pending
    bench.run()
    assert pending is not None
    assert bench.case.current is not None
    assert bench.case.current.id == pending.id
    assert "recover d0:bot" in bench.steps.done


def test_a_crash_during_retirement_repeats_it(make: Make) -> None:
    """Retirement at a destination is repeated until it is done, and never hits the one shown."""
    bench = make("vault")
    bench.ask()
    bench.crash_at = lambda _at, name: name == "before retire d0"
    bench.go()

    assert bench.crashes == 1
    assert bench.steps.done.count("clean d0:bot") >= 1
    bench.assert_home()


# --- destinations that misbehave ----------------------------------------------------------


@pytest.mark.parametrize("fault", ["before", "unsent", "after"])
@pytest.mark.parametrize("shape", SHAPES)
def test_lost_answers_never_use_up_versions(make: Make, shape: str, fault: str) -> None:
    """However often a write has no answer, a process that lives keeps its one version."""
    bench = make(shape)
    minted = len(bench.versions())
    bench.played["d0"].faults = [fault] * 6
    bench.ask()
    bench.go()

    assert len(bench.versions()) == minted + 1
    bench.assert_home()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_call_that_has_not_returned_is_never_settled(make: Make, shape: str) -> None:
    """An intent stays unresolved, run after run, until its thread has returned (rule 2)."""
    bench = make(shape)
    old = bench.case.current
    bench.played["d0"].faults = ["late"]
    bench.ask()
    bench.go(until=lambda: bench.clock.now() > NOW + GRACE + timedelta(hours=1))

    assert old is not None
    assert [i.unresolved for i in bench.case.intents] == [True]
    bench.played["d0"].fall()
    bench.go()
    bench.assert_home()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_late_answer_is_reported_without_a_claim(make: Make, shape: str) -> None:
    """A writer reports its own intent whenever the call returns, and the rotation goes on."""
    bench = make(shape)
    bench.played["d0"].faults = ["late"]
    bench.ask()
    bench.run()

    assert bench.case.rotation is not None
    assert bench.case.rotation.state is RotationState.WAITING
    bench.played["d0"].land()
    assert bench.case.intents == ()
    bench.go()
    bench.assert_home()


def test_a_write_that_no_read_shows_waits(make: Make) -> None:
    """A destination that confirms and never shows makes the rotation wait, not write for ever."""
    bench = make("azure")
    bench.played["d0"].inner._activate = lambda _t, _e, _x: "9"  # type: ignore[method-assign]
    bench.ask()
    bench.run()
    rotation = bench.case.rotation

    assert rotation is not None
    assert rotation.waiting is not None
    assert rotation.waiting.code == "not-shown"
    assert bench.steps.done.count("activate d0:bot") == 2


READS: dict[str, tuple[Exception, RotationState]] = {
    "no answer makes it wait": (DestinationUnavailable(), RotationState.WAITING),
    "slow down makes it wait": (Throttled(), RotationState.WAITING),
    "a permission that is missing stalls it": (Denied(), RotationState.STALLED),
    "a request that will never be taken stalls it": (Rejected(), RotationState.STALLED),
}


@pytest.mark.parametrize("sentence", READS)
def test_a_read_that_fails(make: Make, sentence: str) -> None:
    """Retryable errors never end a rotation, permanent ones stall it; current stays current."""
    error, state = READS[sentence]
    bench = make("vault", "file")
    current = bench.case.current
    bench.played["d1"].read_faults = [error]
    bench.ask()
    bench.run()

    assert bench.case.rotation is not None
    assert bench.case.rotation.state is state
    assert bench.case.current == current
    bench.amend(lifecycle.retry)
    bench.go()
    bench.assert_home()


def test_three_conflicts_in_a_row_wait(make: Make) -> None:
    """A conflict means read again; an entry that changes all the time makes the rotation wait."""
    bench = make("vault")

    def meddle(name: str) -> None:
        if name == "before activate d0":
            inner, target = bench.played["d0"].inner, bench.targets["d0"]
            inner.raw_put(target, inner.raw_get(target) or {})

    bench.on_point = meddle
    bench.ask()
    bench.run()

    assert bench.case.rotation is not None
    assert bench.case.rotation.waiting is not None
    assert bench.case.rotation.waiting.code == "conflict"
    bench.on_point = lambda _name: None
    bench.go()
    bench.assert_home()


def test_a_stale_read_lets_nothing_go(make: Make) -> None:
    """A read that is not fresh gives no deadline and retires nothing (rule 5)."""
    bench = make("vault", "file")
    bench.played["d1"].stale = True
    bench.ask()
    bench.go(until=lambda: bench.clock.now() > NOW + 3 * GRACE)

    assert [v.deadline for v in bench.case.accepted] == [None, None]
    bench.played["d1"].stale = False
    bench.go()
    bench.assert_home()


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("shape", ["azure", "vault"])
def test_an_answer_from_before_a_write_lets_nothing_go(make: Make, shape: str, known: bool) -> None:
    """After a restart nobody knows the writes before it: a read that is behind is not believed yet.

    Whether the outcome of the write was stored or not.
    """
    bench = make(shape)
    played = bench.played["d0"]
    before = played.inner._observe(bench.targets["d0"])

    def after_write(point: str) -> None:
        if point == "after activate d0" and known:
            played.read_faults = [DestinationUnavailable("no answer", sent=False)]

    bench.on_point = after_write
    bench.crash_at = lambda _at, name: name == "after activate d0" and not known
    bench.ask()
    if not bench.crashing_run():
        bench.restart()
    bench.on_point = lambda _name: None
    written = str(bench.shown("d0"))
    assert written != before.version_id
    played.behind = before
    bench.go(until=lambda: bench.version(written).state is VersionState.KEPT)
    bench.pass_time(timedelta(0) if known else SETTLE)
    bench.run()
    assert written not in {intent.version_id for intent in bench.case.intents}
    assert bench.version(written).deadline is None
    played.behind = None
    bench.pass_time(SETTLE)
    bench.go()
    bench.assert_home()


# --- edits from outside -------------------------------------------------------------------


def test_an_entry_that_was_deleted_is_repaired(make: Make) -> None:
    """A destination that lost the value gets it again within one sweep, by a copy."""
    bench = make("vault", "file")
    bench.played["d1"].inner.raw_delete(bench.targets["d1"])
    bench.pass_time(SWEEP)
    bench.run()

    assert bench.at_home()
    assert len(bench.versions()) == 1


def test_an_older_value_is_repaired_forward(make: Make) -> None:
    """A destination that shows an older version gets a newer one, never the older one back."""
    bench = make("azure")
    inner, target = bench.played["d0"].inner, bench.targets["d0"]
    old = inner.raw_get(target)
    bench.ask()
    bench.run()
    assert old is not None
    bench.edit("d0", **old)
    bench.pass_time(SWEEP)
    bench.run()

    assert bench.at_home()
    assert len(bench.versions()) == 3


def test_a_strangers_value_stalls(make: Make) -> None:
    """A value that is not ours is never overwritten: the rotation stalls and says where."""
    bench = make("vault")
    bench.edit("d0", id="bot", secret="hand-made", version="x")
    bench.ask()
    bench.run()

    assert bench.case.rotation is not None
    assert bench.case.rotation.error_code == "unknown-value"
    assert bench.case.rotation.error_where == "d0:bot"
    assert bench.case.credential.drift == ()
    bench.pass_time(SWEEP)
    bench.run()
    assert [d.kind for d in bench.case.credential.drift] == ["unknown"]


# --- destinations that come and go --------------------------------------------------------


def test_a_leaving_destination_keeps_what_it_shows_accepted(make: Make) -> None:
    """A dropped destination blocks retirement of what it shows until it is empty (rule 12)."""
    bench = make("vault", "vault")
    old = bench.case.current
    bench.retarget("d0")
    del_target = bench.targets.pop("d1")
    bench.ask()
    bench.go(until=lambda: bench.clock.now() > NOW + 3 * GRACE)

    assert old is not None
    assert bench.version(old.id).state is VersionState.PREVIOUS
    assert bench.version(old.id).deadline is None
    bench.played["d1"].inner.raw_delete(del_target)
    bench.go()
    bench.assert_home()
    assert bench.case.credential.leaving == ()


def test_a_leaving_destination_that_is_dead_hinders_no_rotation(make: Make) -> None:
    """What is dropped because it is gone for ever makes no rotation wait."""
    bench = make("vault", "vault")
    bench.retarget("d0")
    bench.played["d1"].read_faults = [Denied()]
    bench.ask()
    bench.run()

    assert bench.case.rotation is None
    assert bench.shown("d0") == bench.case.current.id  # type: ignore[union-attr]


def test_a_destination_that_comes_back_during_a_rotation_cuts_nobody_off(make: Make) -> None:
    """What a destination outside of the open rotation shows stays accepted (I1)."""
    bench = make("vault", "vault")
    bench.retarget("d0")
    bench.played["d0"].read_faults = [DestinationUnavailable()]
    bench.ask()
    bench.run()
    bench.retarget("d0", "d1")
    bench.go()

    bench.assert_home()


def test_a_new_destination_opens_a_rotation(make: Make) -> None:
    """A destination that is added gets its first value by a rotation of the whole agent."""
    bench = make("vault", "file")
    bench.retarget("d0")
    bench.played["d1"].inner.raw_delete(bench.targets["d1"])
    bench.pass_time(SWEEP)
    bench.run()
    bench.retarget("d0", "d1")
    bench.pass_time(SWEEP)
    bench.run()

    assert bench.at_home()


@pytest.mark.parametrize("moment", [None, "after activate d0", "after save rotation.opened"])
def test_a_new_login_is_rolled_out_like_a_new_secret(make: Make, moment: str | None) -> None:
    """Entries keep the login that they were written with, and both are good until the grace ends."""
    bench = make("vault", "file")
    agent, old = bench.case.agent, bench.case.current
    assert old is not None

    def rename() -> None:
        changed = replace(agent, login="bot@new")
        identities = bench.identities(agent.targets)
        bench.store.amend_agent(agent.uid, changed, identities=identities, audit=[])

    if moment is None:
        rename()
    else:
        bench.ask()
        seen, done = bench.on_point, []

        def at(name: str) -> None:
            seen(name)
            if name.startswith(moment) and not done:
                done.append(name)
                rename()

        bench.on_point = at
    bench.go()

    bench.assert_home()
    case = bench.case
    assert case.current is not None
    assert case.current.login == "bot@new"
    assert bench.version(old.id).login == "bot"
    values = bench.played["d0"].inner.raw_get(bench.targets["d0"])
    assert values is not None
    assert values["id"] == "bot@new"
    assert not any("unknown-value" in step for step in bench.steps.done)


# --- people, while it runs ----------------------------------------------------------------

MOMENTS = [
    "before save rotation.opened+version.accepted",
    "after save rotation.opened+version.accepted",
    "before save intent",
    "before activate d0",
    "after activate d0",
    "before activate d1",
    "after activate d1",
    "before save version.promoted",
    "after save version.promoted",
    "before release",
]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("reissue", [True, False])
@pytest.mark.parametrize("scope", ["agent", "current", "pending"])
def test_a_revoke_in_the_middle_of_a_run(
    make: Make, moment: str, reissue: bool, scope: str
) -> None:
    """Whenever a revoke comes, what it named is refused for ever and nothing else is lost."""
    bench = make("vault", "file")
    named: list[str] = []

    def revoke(name: str) -> None:
        case = bench.case
        own = {"agent": case.current, "current": case.current, "pending": case.pending}[scope]
        if name != moment or named or own is None:
            return
        named.extend([v.id for v in case.accepted] if scope == "agent" else [own.id])
        if scope == "agent":
            bench.amend(lifecycle.revoke_agent, reissue=reissue)
        else:
            bench.amend(lifecycle.revoke_version, own.id, reissue=reissue)

    bench.on_point = revoke
    bench.ask()
    bench.run()
    bench.on_point = lambda _name: None
    if scope == "agent" and not reissue:
        if named:
            assert bench.case.agent.state is AgentState.SUSPENDED
            count = len(bench.versions())
            bench.pass_time(SWEEP)
            bench.run()
            assert len(bench.versions()) == count
        bench.amend(lifecycle.resume)
    bench.go()

    bench.assert_home()
    assert all(bench.version(i).state is VersionState.REVOKED for i in named)
    assert not bench.case.credential.successor_owed


def test_a_revoked_version_that_is_shown_is_replaced_at_once(make: Make) -> None:
    """A destination that shows what was just revoked is not left to the next sweep (rule 14)."""
    bench = make("vault")
    bench.played["d0"].faults = ["after"]
    bench.ask()
    bench.run()
    pending = bench.case.pending
    assert pending is not None
    assert bench.shown("d0") == pending.id
    bench.amend(lifecycle.revoke_version, pending.id, reissue=False)
    bench.run()

    assert bench.at_home()
    assert bench.shown("d0") != pending.id


def test_a_clean_up_that_is_denied_is_not_tried_all_the_time(make: Make) -> None:
    """A copy that cannot be retired is tried again with the sweeps, not every few seconds."""
    bench = make("vault")
    bench.ask()
    bench.run()

    def denied(*_arguments: object) -> None:
        raise Denied

    bench.played["d0"].inner._retire = denied  # type: ignore[method-assign]
    bench.go(until=lambda: bench.clock.now() > NOW + GRACE + timedelta(hours=1), runs=99)

    longest = bench.policy.retry.max
    assert 1 <= bench.steps.done.count("clean d0:bot denied") <= timedelta(hours=1) / longest + 5


def test_a_change_of_the_case_voids_what_was_confirmed(make: Make) -> None:
    """A run that meets a change reads everything again before it promotes (rule 6)."""
    bench = make("vault", "file")
    inner, target = bench.played["d0"].inner, bench.targets["d0"]
    old = inner.raw_get(target)

    def meddle(name: str) -> None:
        if name == "before activate d1":
            bench.on_point = lambda _name: None
            inner.raw_put(target, old or {})
            bench.amend(lifecycle.suspend)
            bench.amend(lifecycle.resume)

    bench.on_point = meddle
    bench.ask()
    bench.run()

    assert bench.case.rotation is None
    assert bench.at_home()


def test_a_reissue_does_not_wait_for_the_limit(make: Make) -> None:
    """A rotation that waited for deadlines goes on at once when a revoke makes room (rule 14)."""
    bench = make("vault")
    bench.max_accepted = 2
    bench.ask()
    bench.run()
    bench.ask()
    bench.run()
    case = bench.case
    assert case.rotation is not None
    assert case.rotation.waiting is not None
    assert case.rotation.waiting.reason is WaitReason.ACCEPTED_LIMIT
    assert case.current is not None
    bench.amend(lifecycle.revoke_version, case.current.id, reissue=True)
    bench.run()

    assert bench.at_home()
    assert not bench.case.credential.successor_owed


def test_the_limit_of_accepted_versions_is_waited_for(make: Make) -> None:
    """At the limit the rotation waits for a deadline and goes on by itself (rule 7)."""
    bench = make("vault")
    for _ in range(4):
        bench.ask()
        bench.run()

    assert len(bench.case.accepted) == 4
    bench.go()
    bench.assert_home()
    assert len(bench.versions()) == 5


def test_an_abandoned_version_that_was_shown_is_kept(make: Make) -> None:
    """Abandon keeps what somebody may have read until no destination shows it."""
    bench = make("vault", "file")
    bench.played["d1"].faults = ["before"]
    bench.ask()
    bench.run()
    pending = bench.case.pending
    bench.amend(lifecycle.abandon)
    bench.run()

    assert pending is not None
    assert bench.version(pending.id).state is VersionState.KEPT
    bench.ask()
    bench.go()
    bench.assert_home()
    assert bench.version(pending.id).state is VersionState.RETIRED


def test_suspended_agents_are_not_rotated(make: Make) -> None:
    """A suspension stops an open rotation where it is; resume lets it go on with its version."""
    bench = make("vault")
    bench.played["d0"].faults = ["before"]
    bench.ask()
    bench.run()
    pending = bench.case.pending
    bench.amend(lifecycle.suspend)
    bench.pass_time(SWEEP)
    bench.run()

    assert pending is not None
    assert bench.case.pending is not None
    assert bench.case.pending.id == pending.id
    bench.amend(lifecycle.resume)
    bench.run()
    assert bench.case.current is not None
    assert bench.case.current.id == pending.id


# --- claims -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_a_loser_of_the_claim_reports_and_leaves(make: Make, shape: str) -> None:
    """Whoever lost the claim writes nothing more, but says how its own write ended (rule 2)."""
    bench = make(shape)

    def take(name: str) -> None:
        if name == "after activate d0":
            bench.on_point = lambda _name: None
            bench.clock.advance(timedelta(minutes=2))
            assert bench.store.claim(bench.uid, holder="taker", ttl=timedelta(seconds=1))

    bench.on_point = take
    bench.ask()

    assert bench.run() is None
    assert bench.case.intents == ()
    assert bench.case.rotation is not None
    bench.go()
    bench.assert_home()


def test_a_claim_that_somebody_has_is_left_alone(make: Make) -> None:
    """A run that gets no claim does nothing at all."""
    bench = make("vault")
    assert bench.store.claim(bench.uid, holder="other", ttl=timedelta(minutes=1))
    done = list(bench.steps.done)

    assert bench.run() is None
    assert bench.steps.done == done


def test_a_long_run_renews_its_claim(make: Make) -> None:
    """A slow destination does not cost the claim: it is renewed before it runs out."""
    bench = make("vault", "file")

    def drag(name: str) -> None:
        if name.startswith(("observe", "before activate")):
            bench.clock.advance(timedelta(seconds=25))

    bench.on_point = drag
    bench.ask()
    bench.run()

    assert bench.case.rotation is None
    assert bench.at_home()


def test_stopping_leaves_at_the_next_step(make: Make) -> None:
    """A stop ends the run between two steps; what was done is saved and the rest is due at once."""
    bench = make("vault", "file")
    bench.ask()
    stops = iter([False] * 5 + [True] * 9)
    bench.world = replace(bench.world, stopping=lambda: next(stops))

    assert bench.run() == bench.clock.now()
    assert bench.case.rotation is not None
    assert bench.case.rotation.cause is Cause.REQUEST


def test_the_bench_sees_endless_runs_and_crashes(make: Make) -> None:
    """The harness itself can fail: a run without end and a crash both come out."""
    bench = make("azure")
    bench.crash_at = lambda _at, name: name == "after claim"
    with pytest.raises(Crash):
        bench.run()
    bench.restart()
    bench.steps.in_run = 10_000
    with pytest.raises(Endless):
        bench.steps.step(step="x", case=bench.case, where="", seconds=0, code="", detail="")


def test_a_run_that_the_store_breaks_off_is_remembered_and_gives_its_claim_back(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status can tell why nothing goes on, and with room again nobody waits for a claim to run out."""
    bench = make("vault")
    bench.ask()

    def full(*_more: object, **_named: object) -> None:
        raise StoreFull

    with monkeypatch.context() as patch:
        patch.setattr(type(bench.store), "save", full)
        with pytest.raises(StoreFull):
            bench.run()
    carried = bench.world.carried
    parked = carried.parked(bench.uid)
    assert parked is not None
    assert parked.code == "store-full"
    assert bench.store.claim(bench.uid, holder="other", ttl=timedelta(seconds=1)) is None

    carried.give_back(bench.store, bench.clock.now())
    bench.run()

    assert bench.at_home()
    assert carried.parked(bench.uid) is None
