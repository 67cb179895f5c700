"""A revoked value that no rotation will replace is taken out of what agents read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from keyturn.core import lifecycle
from keyturn.core.model import AgentState, Effect, VersionState
from keyturn.errors import Conflict, Denied, DestinationUnavailable
from keyturn.ports import Observed
from support.bench import SETTLE, SHAPES, SWEEP, Bench

PAIRS = [("staging", "azure"), ("vault", "file")]
ALL = [*((shape,) for shape in SHAPES), *PAIRS]
FAULTS = ["before", "after", "unsent", "late"]
DAY = timedelta(days=1)

Make = Callable[..., Bench]


@pytest.fixture
def make() -> Iterator[Make]:
    """Build benches whose first version is everywhere, and give back what they hold."""
    made: list[Bench] = []

    def build(*shapes: str) -> Bench:
        bench = Bench(*shapes)
        made.append(bench)
        bench.go()
        bench.assert_home()
        bench.steps.done.clear()
        return bench

    yield build
    for bench in made:
        bench.close()


def revoke(bench: Bench, *, reissue: bool = False, withhold: tuple[str, ...] = ()) -> str:
    """Revoke everything, as `keyturn revoke bot` does; return what was current."""
    current = bench.case.current
    assert current is not None
    bench.amend(lifecycle.revoke_agent, reissue=reissue, withhold=withhold)
    return current.id


def secrets_at(bench: Bench) -> list[str]:
    """Return where an agent finds a secret."""
    raw = {name: bench.played[name].inner.raw_get(bench.targets[name]) for name in bench.targets}
    return [name for name, values in raw.items() if values and "secret" in values]


def pending(bench: Bench) -> int:
    """Return what the metric of that name says."""
    return bench.store.counts(max_ages={}).cleanup_pending


def withdrawn(bench: Bench) -> bool:
    """Whether a revoke is over: nothing shows a secret, nothing is left to clean or to settle."""
    return not secrets_at(bench) and not bench.case.intents and pending(bench) == 0


def tries(bench: Bench) -> int:
    """Count the steps that withdrew, or tried to."""
    return sum(step.startswith("withdraw") for step in bench.steps.done)


# --- what goes well -----------------------------------------------------------------------


@pytest.mark.parametrize("shapes", ALL, ids="-".join)
def test_a_revoke_takes_the_secret_out_everywhere(make: Make, shapes: tuple[str, ...]) -> None:
    """One run after it no entry shows a secret, each is ours still, and nothing is pending."""
    bench = make(*shapes)
    revoked = revoke(bench)
    bench.run()

    assert withdrawn(bench)
    assert bench.case.credential.drift == ()
    for name, target in bench.targets.items():
        assert bench.played[name].inner.raw_get(target) == {"id": "bot"}
    noted = [recorded.entry for recorded in bench.store.audit_entries(agent="bot")]
    written = [entry for entry in noted if entry.action == "entry.withdrawn"]
    assert {entry.version_id for entry in written} == {revoked}
    assert len(written) == len(shapes)


@pytest.mark.parametrize("shapes", ALL, ids="-".join)
def test_a_resume_publishes_over_it(make: Make, shapes: tuple[str, ...]) -> None:
    """After `resume` every entry has a new version, without `adopt` and without a person."""
    bench = make(*shapes)
    revoked = revoke(bench)
    bench.run()
    for _ in range(3):
        bench.pass_time(SWEEP)
        bench.run()
    assert len(bench.versions()) == 1
    assert tries(bench) == len(shapes)
    bench.amend(lifecycle.resume)
    bench.go()

    bench.assert_home()
    assert bench.version(revoked).state is VersionState.REVOKED
    assert not any("stall" in step for step in bench.steps.done)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_place_of_a_leak_is_emptied_and_the_others_have_the_successor(
    make: Make, shape: str
) -> None:
    """`--except`: no secret there, no rotation for its sake, and a readmission brings the next."""
    bench = make("vault", shape)
    revoke(bench, reissue=True, withhold=("d1",))
    bench.run()

    assert secrets_at(bench) == ["d0"]
    assert bench.shown("d0") == getattr(bench.case.current, "id", "")
    assert pending(bench) == 0
    assert bench.case.credential.drift == ()
    minted = len(bench.versions())
    for _ in range(4):
        bench.pass_time(SWEEP)
        bench.run()
    assert (len(bench.versions()), tries(bench)) == (minted, 1)
    assert bench.case.credential.drift == ()
    bench.amend(lambda case, now: lifecycle.readmit(case, "d1", now=now))
    bench.go()
    bench.assert_home()


def test_a_destination_that_leaves_is_emptied_and_left(make: Make) -> None:
    """What nobody will publish to any more is withdrawn, and then looked at no more."""
    bench = make("vault", "file")
    bench.retarget("d0")
    revoke(bench, reissue=True)
    bench.run()

    assert secrets_at(bench) == ["d0"]
    assert bench.case.credential.leaving == ()
    assert tries(bench) == 1


def test_a_removed_agents_entries_are_emptied(make: Make) -> None:
    """Removing an agent revokes everything of it: its entries show no refused value."""
    bench = make("vault", "file")
    bench.amend(lifecycle.remove)
    bench.run()

    assert withdrawn(bench)


def test_what_a_rotation_replaces_is_not_withdrawn(make: Make) -> None:
    """With a successor owed nobody finds an empty entry: the rotation replaces the value."""
    bench = make("vault", "file")
    revoke(bench, reissue=True)
    bench.go()

    bench.assert_home()
    assert tries(bench) == 0


def test_a_rotation_that_stalls_keeps_what_it_will_replace(make: Make) -> None:
    """A person decides about a stalled rotation; what it shows meanwhile is refused anyhow."""
    bench = make("vault", "file")
    bench.played["d1"].read_faults = [Denied()]
    revoke(bench, reissue=True)
    bench.run()

    assert str(getattr(bench.case.rotation, "state", "")) == "stalled"
    assert tries(bench) == 0
    bench.amend(lifecycle.retry)
    bench.go()
    bench.assert_home()


def test_a_suspension_alone_takes_nothing_out(make: Make) -> None:
    """Suspended is not revoked: the version is accepted again after `resume`, so it stays."""
    bench = make("vault", "file")
    bench.amend(lifecycle.suspend)
    bench.pass_time(2 * SWEEP)
    bench.run()

    assert secrets_at(bench) == ["d0", "d1"]
    bench.amend(lifecycle.resume)
    bench.go()
    bench.assert_home()


def test_a_revoked_version_of_a_suspended_agent_is_no_drift_once_it_is_out(make: Make) -> None:
    """While the agent is suspended an entry without a secret lacks nothing."""
    bench = make("vault", "file")
    bench.played["d1"].faults = ["unsent"] * 9
    bench.ask()
    bench.run()
    old = bench.shown("d1")
    assert old not in (None, bench.shown("d0"))
    bench.amend(lifecycle.suspend)
    bench.played["d1"].faults = []
    bench.amend(lifecycle.revoke_version, old, reissue=False)
    bench.run()

    assert secrets_at(bench) == ["d0"]
    assert bench.case.credential.drift == ()
    bench.amend(lifecycle.resume)
    bench.go()
    bench.assert_home()


# --- a crash at every point, a lost answer --------------------------------------------------


def _story(bench: Bench) -> None:
    """Revoke without a successor, until all is clean; then resume, until all is at home."""
    revoke(bench)
    bench.go(until=lambda: withdrawn(bench))
    bench.amend(lifecycle.resume)
    bench.go()


@pytest.mark.parametrize("shapes", ALL, ids="-".join)
def test_a_crash_at_every_point_converges(make: Make, shapes: tuple[str, ...]) -> None:
    """Whatever a crash leaves, the secret goes out, and later the new one goes in."""
    whole = make(*shapes)
    start = len(whole.points)
    revoke(whole)
    whole.run()
    points = whole.points[start:]
    assert any(point.startswith("after withdraw") for point in points)
    for number, name in enumerate(points):
        bench = make(*shapes)
        end = len(bench.points) + number
        bench.crash_at = lambda at, _name, end=end: at == end
        _story(bench)

        assert bench.crashes == 1, (number, name)
        bench.assert_home()
        assert len(bench.versions()) == 2, (number, name)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_lost_answer_is_asked_for_again(make: Make, shape: str, fault: str) -> None:
    """Without an answer the entry is read again: emptied already, or tried again by the sweep."""
    bench = make(shape)
    bench.played["d0"].faults = [fault]
    revoke(bench)
    bench.run()
    assert tries(bench) == 1
    bench.pass_time(timedelta(seconds=20))
    bench.played["d0"].land()
    bench.go(until=lambda: withdrawn(bench))
    bench.amend(lifecycle.resume)
    bench.go()

    bench.assert_home()
    assert tries(bench) <= 3


@pytest.mark.parametrize("shape", SHAPES)
def test_a_withdrawal_that_lands_late_costs_no_successor(make: Make, shape: str) -> None:
    """It names the version that it takes out: what was published meanwhile stays."""
    bench = make(shape)
    bench.played["d0"].faults = ["late"]
    revoke(bench)
    bench.run()
    bench.amend(lifecycle.resume)
    bench.go(until=bench.at_home)
    bench.played["d0"].land()

    assert bench.at_home()
    bench.go()
    bench.assert_home()


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "file"])
def test_a_withdrawal_that_hangs_is_not_repeated_beside_itself(make: Make, shape: str) -> None:
    """A lane does not fill up: while nobody knows how the call ends there is no second one."""
    bench = make(shape)
    bench.played["d0"].faults = ["late"] * 9
    revoke(bench)
    for _ in range(6):
        bench.run()
        bench.pass_time(SWEEP)

    assert tries(bench) == 1
    assert [(i.effect, i.unresolved) for i in bench.case.intents] == [(Effect.WITHDRAW, True)]
    bench.played["d0"].faults = []
    bench.played["d0"].fall()
    bench.go(until=lambda: withdrawn(bench))


def test_a_dead_writers_withdrawal_settles_by_what_is_read(make: Make) -> None:
    """With compare-and-set another token proves that it cannot land any more: no time is waited."""
    bench = make("vault")
    revoke(bench)
    bench.crash_at = lambda _at, name: name == "after withdraw d0"
    assert bench.crashing_run()
    assert [i.effect for i in bench.case.intents] == [Effect.WITHDRAW]
    before = bench.clock.now()
    bench.run()

    assert withdrawn(bench)
    assert bench.clock.now() - before < SETTLE
    assert tries(bench) == 0  # the crashed step was not told, and there was none after it


# --- destinations that misbehave ------------------------------------------------------------


@pytest.mark.parametrize("error", [Denied, DestinationUnavailable])
def test_a_withdrawal_that_fails_is_tried_with_the_sweeps(
    make: Make, error: type[Exception]
) -> None:
    """Once a sweep, not every few seconds; meanwhile the place is reported as showing it."""
    bench = make("file")

    def fails(*_arguments: object) -> str:
        raise error

    bench.played["d0"].inner._withdraw = fails  # type: ignore[method-assign]
    revoke(bench)
    bench.run()
    assert [d.kind for d in bench.case.credential.drift] == ["revoked"]
    assert pending(bench) == 1
    sweeps = 8
    until = bench.clock.now() + sweeps * SWEEP
    bench.go(until=lambda: bench.clock.now() >= until, runs=99)

    assert 3 <= tries(bench) <= sweeps + 2
    del bench.played["d0"].inner._withdraw  # type: ignore[method-assign]
    bench.go(until=lambda: withdrawn(bench))


def test_a_destination_that_confirms_and_shows_it_still_is_not_written_to_for_ever(
    make: Make,
) -> None:
    """One try a sweep, and the sweep says what is shown."""
    bench = make("azure")
    bench.played["d0"].inner._withdraw = lambda *_a: "9"  # type: ignore[method-assign]
    revoke(bench)
    bench.run()

    assert tries(bench) == 1
    assert [d.kind for d in bench.case.credential.drift] == ["revoked"]
    bench.pass_time(SWEEP)
    bench.run()
    assert tries(bench) == 2


def test_an_entry_that_changes_all_the_time_is_left_for_the_sweep(make: Make) -> None:
    """A conflict means read again, three times in a run and no more."""
    bench = make("vault")

    def meddle(name: str) -> None:
        if name == "before withdraw d0":
            inner, target = bench.played["d0"].inner, bench.targets["d0"]
            inner.raw_put(target, inner.raw_get(target) or {})

    revoke(bench)
    bench.on_point = meddle
    bench.run()
    assert bench.steps.done.count(f"withdraw d0:bot {Conflict.code}") == 4
    bench.on_point = lambda _name: None
    bench.go(until=lambda: withdrawn(bench))


def test_a_read_that_is_not_fresh_takes_nothing_out(make: Make) -> None:
    """A standby may show a version that was replaced long ago (rule 5)."""
    bench = make("vault")
    bench.played["d0"].stale = True
    revoke(bench)
    bench.run()
    assert tries(bench) == 0
    bench.played["d0"].stale = False
    bench.go(until=lambda: withdrawn(bench))


LIES: dict[str, Callable[[Observed], Observed]] = {
    "a secret that is not the version's": lambda o: replace(o, secret=None),
    "a version of nobody": lambda o: replace(o, version_id="stranger"),
    "another login": lambda o: replace(o, login="mallory"),
    "the marker of another store": lambda o: replace(o, owner="somebody else"),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_is_not_surely_ours_is_left_alone(make: Make, lie: str) -> None:
    """Only an unaltered version of ours is taken out, never what merely looks like it."""
    bench = make("vault")
    played = bench.played["d0"]
    honest = played.observe
    played.observe = lambda target: LIES[lie](honest(target))  # type: ignore[method-assign]
    revoke(bench)
    bench.run()
    assert tries(bench) == 0
    played.observe = honest  # type: ignore[method-assign]
    bench.go(until=lambda: withdrawn(bench))


@pytest.mark.parametrize("shape", SHAPES)
def test_an_old_answer_never_costs_a_good_version(make: Make, shape: str) -> None:
    """A read that shows the revoked one while the good one is there ends in a conflict."""
    bench = make(shape)
    played, target = bench.played["d0"], bench.targets["d0"]
    first = played.observe(target)
    bench.amend(lifecycle.revoke_version, first.version_id, reissue=False)
    bench.go()
    good = bench.shown("d0")
    bench.amend(lifecycle.suspend)
    honest = played.observe

    def lying(place: Any) -> Observed:
        return replace(first, token=honest(place).token, fresh=True)

    played.observe = lying  # type: ignore[method-assign]
    bench.pass_time(2 * SWEEP)
    bench.run()

    assert tries(bench) > 0
    assert bench.shown("d0") == good
    assert secrets_at(bench) == ["d0"]


def test_the_keys_of_others_stay(make: Make) -> None:
    """Whoever added keys to our entry without `merge` keeps them, and our secret goes."""
    bench = make("vault")
    inner, target = bench.played["d0"].inner, bench.targets["d0"]
    inner.raw_put(target, {**(inner.raw_get(target) or {}), "port": "5432"})
    revoke(bench)
    bench.run()

    assert inner.raw_get(target) == {"id": "bot", "port": "5432"}


def test_a_revoke_that_comes_while_suspended_waits_for_nobody(make: Make) -> None:
    """A successor that is owed to a suspended agent comes with `resume`; until then it is empty."""
    bench = make("vault", "file")
    bench.amend(lifecycle.suspend)
    revoke(bench, reissue=True)
    bench.run()
    assert bench.case.agent.state is AgentState.SUSPENDED
    assert withdrawn(bench)
    bench.amend(lifecycle.resume)
    bench.go()
    bench.assert_home()
