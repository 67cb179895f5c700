"""The saga and the copies that it leaves at destinations: staged, lost, found again, doubled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest

from keyturn.core import lifecycle
from keyturn.core.model import RotationState, Target, VersionState
from keyturn.errors import Denied, DestinationUnavailable, Rejected
from keyturn.verifier.authority import BuiltinAuthority
from support.bench import GRACE, SETTLE, SHAPES, SWEEP, Bench, Played


@pytest.fixture
def benches() -> Iterator[list[Bench]]:
    """Give a list whose benches are given back."""
    made: list[Bench] = []
    yield made
    for bench in made:
        bench.close()


def at_home(benches: list[Bench], *shapes: str) -> Bench:
    """Return a bench whose first version is everywhere."""
    bench = Bench(*shapes)
    benches.append(bench)
    bench.go()
    bench.assert_home()
    bench.steps.done.clear()
    return bench


def test_every_activation_asks_the_verifiers_anew(benches: list[Bench]) -> None:
    """A verifier that registered meanwhile is waited for as well (rule 18)."""
    bench = at_home(benches, "vault", "azure", "staging")

    class Asked(BuiltinAuthority):
        """A verifier comes up between the first activation and the second."""

        times = 0

        def settled(self, epoch: int) -> bool:
            del epoch
            Asked.times += 1
            return Asked.times != 2

    bench.world = replace(bench.world, authority=Asked(hashing=bench.hashing))
    bench.ask()
    bench.run()
    waiting = bench.case.rotation

    assert waiting is not None
    assert waiting.waiting is not None
    assert str(waiting.waiting.reason) == "verifiers"
    assert sum(step.startswith("activate") for step in bench.steps.done) == 1
    bench.go()
    bench.assert_home()
    acts = [s.split()[0] for s in bench.steps.done if s.startswith(("await", "activate"))]
    for before, step in pairwise(acts):
        assert step != "activate" or before == "awaitverifiers"


def test_a_staged_copy_that_vanished_is_staged_again(benches: list[Bench]) -> None:
    """The label is there and the value is gone: the same version is staged again, by nobody's hand."""
    bench = at_home(benches, "staging")
    minted = len(bench.versions())
    played, target = bench.played["d0"], bench.targets["d0"]
    bench.ask()
    seen = bench.on_point

    def cut(name: str) -> None:
        seen(name)
        if name == "after stage d0":
            played.read_faults = [DestinationUnavailable("no answer")]

    bench.on_point = cut
    bench.run()
    bench.on_point = seen
    shelf = played.inner._shelf(target)
    assert shelf.staged is not None
    label, number = shelf.staged
    del shelf.copies[number]
    assert played.inner._observe(target).staged == label
    bench.go()

    assert len(bench.versions()) == minted + 1
    assert sum(step.startswith("stage ") for step in bench.steps.done) == 2
    bench.assert_home()


def test_what_is_staged_under_our_id_and_is_not_ours_needs_a_person(benches: list[Bench]) -> None:
    """A staged copy with another secret is never activated, and never waited for silently."""
    bench = at_home(benches, "staging")
    played, target = bench.played["d0"], bench.targets["d0"]
    seen = bench.on_point

    def forge(name: str) -> None:
        seen(name)
        if name == "after stage d0":
            shelf = played.inner._shelf(target)
            assert shelf.staged is not None
            shelf.copies[shelf.staged[1]]["secret"] = "forged"

    bench.ask()
    bench.on_point = forge
    bench.run()
    rotation = bench.case.rotation

    assert rotation is not None
    assert rotation.state is RotationState.STALLED
    assert rotation.error_where == "d0:bot"
    assert not any(step.startswith("activate") for step in bench.steps.done[-4:])


def test_a_copy_that_nobody_lived_to_report_is_put_away_in_its_time(benches: list[Bench]) -> None:
    """A write that landed behind a dead process is found, named, and disabled at retirement."""
    bench = at_home(benches, "vault")
    bench.ask()
    bench.crash_at = lambda _at, name: name == "after activate d0"
    assert bench.crashing_run()
    bench.go(until=bench.at_home)
    bench.go()
    landed = bench.case.current
    assert landed is not None
    bench.ask()
    bench.go()

    assert bench.version(landed.id).state is VersionState.RETIRED
    played, target = bench.played["d0"], bench.targets["d0"]
    copies = played.inner._shelf(target).copies
    (number,) = (n for n, values in copies.items() if values.get("version") == landed.id)
    assert played.inner.disabled(target, str(number))


def test_two_copies_of_one_version_are_both_put_away(benches: list[Bench]) -> None:
    """Without compare-and-set a repeated write may land twice: retirement finds both names."""
    bench = at_home(benches, "azure")
    played, target = bench.played["d0"], bench.targets["d0"]
    bench.ask()
    bench.run()
    doubled = bench.case.current
    assert doubled is not None
    values = played.inner.raw_get(target)
    assert values is not None
    played.inner.raw_put(target, values)  # the same entry again, under its second name
    bench.clock.advance(timedelta(hours=2))
    bench.go()
    assert len({p.locator for p in bench.case.placements if p.version_id == doubled.id}) == 2
    bench.ask()
    bench.go()

    shelf = played.inner._shelf(target)
    numbers = [n for n, kept in shelf.copies.items() if kept.get("version") == doubled.id]
    assert len(numbers) == 2
    assert all(played.inner.disabled(target, str(number)) for number in numbers)


def test_an_enforced_maximum_age_refuses_and_rotates(benches: list[Bench]) -> None:
    """Too old is refused by the verifier at that instant, and replaced at once, schedule or not."""
    days = timedelta(days=1)
    bench = Bench("vault", max_age=5 * days, enforce_max_age=True)
    benches.append(bench)
    bench.go()
    first = bench.case.current
    assert first is not None
    values = bench.played["d0"].inner.raw_get(bench.targets["d0"])
    assert values is not None
    assert first.not_after == first.minted_at + 5 * days
    bench.watched = False  # I1 excepts it: the policy says refuse
    bench.clock.advance(first.not_after - bench.clock.now() - timedelta(seconds=1))
    assert bench.accepts(values["id"], values["secret"])
    wake = bench.store.next_wake()
    assert wake is not None
    assert wake <= first.not_after
    bench.clock.advance(timedelta(seconds=1))
    assert not bench.accepts(values["id"], values["secret"])
    bench.go(until=lambda: bench.at_home() and bench.shown("d0") != first.id)
    now = bench.played["d0"].inner.raw_get(bench.targets["d0"])
    assert now is not None
    assert bench.accepts(now["id"], now["secret"])


def test_a_pending_version_that_got_too_old_is_not_rolled_forward(benches: list[Bench]) -> None:
    """A rotation that waited longer than a version may live mints another one."""
    days = timedelta(days=1)
    bench = Bench("vault", "file", max_age=5 * days, enforce_max_age=True)
    benches.append(bench)
    bench.go()
    bench.watched = False
    bench.played["d1"].read_faults = [DestinationUnavailable("no answer")] * 3
    bench.ask()
    bench.played["d1"].faults = ["unsent"]
    bench.played["d1"].read_faults = []
    bench.run()
    waiting = bench.case.pending
    assert waiting is not None
    bench.clock.advance(6 * days)
    bench.go(until=bench.at_home)
    current = bench.case.current
    assert current is not None
    assert current.id != waiting.id
    assert bench.version(waiting.id).state in (VersionState.KEPT, VersionState.PREVIOUS)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "file"])
def test_a_late_end_that_says_nothing_was_sent_is_an_outcome(
    benches: list[Bench], shape: str
) -> None:
    """A call that ends late and was never sent need not be settled by time."""
    bench = at_home(benches, shape)
    bench.played["d0"].faults = ["late"]
    bench.ask()
    bench.run()
    (open_intent,) = bench.case.intents
    for call, _, _ in bench.played["d0"]._taken():
        call.set_exception(DestinationUnavailable("never sent", sent=False))

    assert open_intent.outcome is None
    assert bench.case.intents == ()
    before = bench.clock.now()
    bench.go(until=bench.at_home)
    assert bench.clock.now() - before < SETTLE


def test_a_clean_up_that_is_refused_keeps_no_agent_waiting(benches: list[Bench]) -> None:
    """An old copy cannot be put away, again and again: what agents read is still mended."""
    bench = at_home(benches, "vault")
    played = bench.played["d0"]
    refused = []

    def retire(target: Target, **_options: Any) -> None:
        refused.append(target)
        raise Rejected("no")

    played.retire = retire  # type: ignore[method-assign]
    bench.ask()
    bench.go()
    bench.pass_time(2 * GRACE)
    bench.run()
    assert refused
    before = len(refused)
    played.inner.raw_delete(bench.targets["d0"])
    bench.pass_time(SWEEP)
    bench.go()

    bench.assert_home()
    assert len(refused) > before
    assert bench.case.credential.drift == ()


# --- what a dropped destination may still show ------------------------------------------------


def test_a_write_that_still_hangs_keeps_a_dropped_destination(benches: list[Bench]) -> None:
    """It is looked at until the write has landed, and what it then shows stays accepted (I1)."""
    bench = Bench("vault", "vault")
    benches.append(bench)
    bench.played["d1"].faults = ["late"]
    bench.run()
    bench.amend(lifecycle.abandon)
    bench.retarget("d0")
    for _ in range(4):
        bench.pass_time(timedelta(minutes=20))
        bench.run()
    assert [target.key for target in bench.case.credential.leaving] == ["d1:bot"]

    bench.played["d1"].land()
    for _ in range(8):
        bench.run()
        bench.pass_time(SWEEP)

    landed = bench.shown("d1")
    assert landed is not None
    assert bench.version(landed).accepted


def test_a_write_that_was_settled_keeps_a_dropped_destination(benches: list[Bench]) -> None:
    """It may have landed, whatever became of the copies that were there before it (I1)."""
    bench = at_home(benches, "vault", "vault")
    bench.amend(lifecycle.revoke_agent, reissue=False)
    for _ in range(6):
        bench.run()
        bench.pass_time(timedelta(minutes=10))
    bench.amend(lifecycle.resume)
    played = bench.played["d1"]
    played.faults = ["after"]
    seen = bench.on_point

    def cut(name: str) -> None:
        seen(name)
        if name == "after activate d1":
            played.read_faults = [DestinationUnavailable("away")] * 30

    bench.on_point = cut
    for _ in range(8):
        bench.run()
        bench.pass_time(timedelta(minutes=2))
    own = bench.case.rotation.version_id if bench.case.rotation else None
    assert (own, bench.case.intents) == (bench.shown("d1"), ())  # settled, and nobody could read it

    bench.retarget("d0")
    bench.amend(lifecycle.abandon)
    assert [target.key for target in bench.case.credential.leaving] == ["d1:bot"]
    bench.ask()
    for _ in range(8):
        bench.run()
        bench.pass_time(timedelta(minutes=31))
    assert own is not None
    assert bench.version(own).accepted


# --- a removed agent --------------------------------------------------------------------------


def test_a_removed_agent_that_never_got_an_entry_is_asked_for_no_more(
    benches: list[Bench],
) -> None:
    """Nobody can mend its rights any more, so nobody may be alarmed about them for ever."""
    bench = Bench("vault", "file")
    benches.append(bench)
    bench.played["d0"].read_faults = [Denied() for _ in range(9)]
    bench.run()
    bench.amend(lifecycle.remove)
    bench.steps.done.clear()

    bench.run()

    assert not any(step.startswith("observe") for step in bench.steps.done)
    assert bench.store.next_wake() is None


def test_a_removed_agent_is_looked_at_until_its_places_are_clean(benches: list[Bench]) -> None:
    """What it got is withdrawn, a new place that it never got is not asked for; then it is over."""
    bench = at_home(benches, "vault", "file")
    bench.played["d2"] = Played(bench, "d2", "vault")
    bench.targets["d2"] = Target(to="d2", path="bot")
    bench.played["d2"].read_faults = [Denied() for _ in range(99)]
    bench.retarget("d0", "d1", "d2")
    bench.run()
    bench.played["d1"].read_faults = [DestinationUnavailable("away")]
    bench.amend(lifecycle.remove)
    bench.steps.done.clear()

    bench.run()
    assert bench.store.next_wake() is not None
    bench.pass_time(SWEEP)
    bench.run()

    assert not any("d2" in step for step in bench.steps.done)
    assert bench.store.next_wake() is None
    for name in ("d0", "d1"):
        values = bench.played[name].inner.raw_get(bench.targets[name])
        assert values is not None
        assert "secret" not in values


def test_a_removed_agent_keeps_the_places_of_what_was_revoked_before(benches: list[Bench]) -> None:
    """A copy that policy leaves alone counts as gone, and is shown until it is withdrawn."""
    bench = at_home(benches, "file")
    bench.played["d0"].read_faults = [DestinationUnavailable("away")] * 3
    bench.amend(lifecycle.revoke_agent, reissue=False)
    bench.run()
    assert bench.case.placements == ()
    bench.amend(lifecycle.remove)
    bench.played["d0"].read_faults.clear()

    bench.run()

    values = bench.played["d0"].inner.raw_get(bench.targets["d0"])
    assert values is not None
    assert "secret" not in values
    assert bench.store.next_wake() is None
