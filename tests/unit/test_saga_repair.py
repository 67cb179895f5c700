"""What a sweep finds is mended: forward only, from a proven copy, and never in a fight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta

import pytest

from keyturn.core import lifecycle
from keyturn.core.model import Cause, Effect, RotationState, VersionState
from keyturn.core.repair import MOST
from keyturn.errors import Denied, DestinationUnavailable, Rejected
from keyturn.ports import Observed
from support.bench import SETTLE, SHAPES, Bench

SWEEP = timedelta(minutes=5)
HOUR = timedelta(hours=1)
PAIRS = [("staging", "azure"), ("vault", "file"), ("file", "vault"), ("azure", "staging")]
Make = Callable[..., Bench]


@pytest.fixture
def make() -> Iterator[Make]:
    """Build benches whose second version is everywhere and whose first is still accepted."""
    made: list[Bench] = []

    def build(*shapes: str) -> Bench:
        bench = Bench(*shapes)
        made.append(bench)
        bench.go()
        bench.first = bench.played["d0"].inner.raw_get(bench.targets["d0"])  # type: ignore[attr-defined]
        bench.ask()
        bench.run()
        assert bench.at_home()
        bench.steps.done.clear()
        bench.points.clear()
        bench.world = replace(bench.world, sweep_every=SWEEP)
        bench.amend(lambda case, now: replace(case, credential=_sweeping(case, now)))
        return bench

    yield build
    for bench in made:
        bench.close()


def _sweeping(case, now):  # type: ignore[no-untyped-def]
    return replace(case.credential, sweep_at=now + SWEEP, wake_at=now)


# --- what somebody does to an entry -------------------------------------------------------


def older(bench: Bench, name: str = "d0") -> None:
    """Write the first version back, which is accepted still."""
    bench.edit(name, **bench.first)  # type: ignore[attr-defined]


def revoked(bench: Bench, name: str = "d0") -> None:
    """Write the first version back, after a person refused it."""
    first = bench.version(bench.first["version"])  # type: ignore[attr-defined]
    if first.state is not VersionState.REVOKED:
        bench.amend(lifecycle.revoke_version, first.id, reissue=False)
    older(bench, name)


def missing(bench: Bench, name: str = "d0") -> None:
    """Delete the entry."""
    bench.played[name].inner.raw_delete(bench.targets[name])


DRIFTS = {"older": older, "revoked": revoked, "missing": missing}


def sweep(bench: Bench) -> None:
    """Let the next sweep come."""
    bench.world = replace(bench.world, sweep_every=SWEEP)
    bench.pass_time(SWEEP)
    bench.run()


def count(bench: Bench, step: str) -> int:
    """Count the steps of one kind."""
    return sum(one.split()[0] == step for one in bench.steps.done)


def writes(bench: Bench, name: str = "d0") -> int:
    """Count what was written there."""
    return sum(
        point in (f"before activate {name}", f"before stage {name}") for point in bench.points
    )


def told(bench: Bench, action: str) -> list[str]:
    """Return the outcomes of one kind of audit entry, oldest first."""
    noted = [one.entry for one in bench.store.audit_entries(agent="bot", limit=500)]
    return [one.outcome for one in sorted(noted, key=str) if one.action == action]


# --- what is mended, and how --------------------------------------------------------------


@pytest.mark.parametrize("kind", DRIFTS)
@pytest.mark.parametrize("shapes", PAIRS, ids="-".join)
def test_current_is_copied_forward(make: Make, shapes: tuple[str, str], kind: str) -> None:
    """Whatever the two places can do, one sweep later the entry shows current, and none is minted."""
    bench = make(*shapes)
    current, minted = bench.case.current, len(bench.versions())
    DRIFTS[kind](bench)
    sweep(bench)

    assert bench.at_home()
    assert current is not None
    assert bench.case.current is not None
    assert bench.case.current.id == current.id
    assert len(bench.versions()) == minted
    assert (count(bench, "copyforward"), count(bench, "open")) == (1, 0)
    assert told(bench, "drift.found") == [kind]
    assert told(bench, "entry.repaired") == [kind]
    assert bench.case.credential.drift == ()
    assert not any(intent.unresolved for intent in bench.case.intents)
    bench.go()
    bench.assert_home()


@pytest.mark.parametrize("kind", DRIFTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_copy_a_rotation_mends_it(make: Make, shape: str, kind: str) -> None:
    """The only place lost it: a new version, except where the place finds its own old copies."""
    bench = make(shape)
    minted = len(bench.versions())
    DRIFTS[kind](bench)
    sweep(bench)

    assert bench.at_home()
    assert len(bench.versions()) == minted + (shape != "staging")
    assert told(bench, "drift.found") == [kind]
    bench.go()
    bench.assert_home()


@pytest.mark.parametrize("lie", ["secret", "login", "owner", "version"])
def test_what_is_merely_found_is_never_published(make: Make, lie: str) -> None:
    """A copy that does not prove to be current, by hash, login, marker and id, mends nothing."""
    bench = make("vault", "file")
    current = bench.case.current
    source, honest = bench.played["d1"], bench.played["d1"].read

    def lying(target, version_id):  # type: ignore[no-untyped-def]
        found: Observed = honest(target, version_id)
        first = bench.first  # type: ignore[attr-defined]
        return {
            "secret": lambda: replace(found, secret=None),
            "login": lambda: replace(found, login="mallory"),
            "owner": lambda: replace(found, owner="another store"),
            "version": lambda: replace(found, version_id=first["version"]),
        }[lie]()

    source.read = lying  # type: ignore[method-assign]
    missing(bench)
    sweep(bench)

    assert bench.at_home()
    assert bench.case.current != current  # by a rotation
    assert told(bench, "entry.repaired") == []


def test_a_tag_alone_is_no_proof(make: Make) -> None:
    """A copy is checked by the whole hash: what only resembles current is not published."""
    bench = make("vault", "file")
    seen = []

    class Strict(type(bench.authority)):  # type: ignore[misc]
        def matches(self, version, secret):  # type: ignore[no-untyped-def]
            seen.append(version.id)
            return False

    bench.world = replace(bench.world, authority=Strict(hashing=bench.hashing))
    current = bench.case.current
    missing(bench)
    sweep(bench)

    assert current is not None
    assert seen == [current.id]
    assert told(bench, "entry.repaired") == []
    assert count(bench, "open") == 1


def test_a_suspended_agent_is_left_alone(make: Make) -> None:
    """Nothing is published for an agent that a person stopped."""
    bench = make("vault", "file")
    bench.amend(lifecycle.suspend)
    older(bench)
    sweep(bench)

    assert writes(bench) == 0


def test_what_is_not_ours_is_left_alone_and_told(make: Make) -> None:
    """An unknown value is never overwritten by a sweep, however good the other copy is."""
    bench = make("vault", "file")
    bench.edit("d0", id="bot", secret="hand-made", version="x")
    for _ in range(4):
        sweep(bench)

    assert writes(bench) == 0
    assert [one.kind for one in bench.case.credential.drift] == ["unknown"]
    assert told(bench, "drift.found") == ["unknown"]


def test_another_keyturns_entry_is_left_alone(make: Make) -> None:
    """Two Keyturns on one entry: the marker of the other one is no drift that we mend."""
    bench = make("vault", "file")
    inner, target = bench.played["d0"].inner, bench.targets["d0"]
    older(bench)
    inner.store.shelves[inner.place(target)].owner = "another store"
    for _ in range(4):
        sweep(bench)

    assert writes(bench) == 0


def test_a_stale_answer_is_not_mended(make: Make) -> None:
    """An old answer of a standby moves nothing."""
    bench = make("vault", "file")
    older(bench)
    bench.played["d0"].stale = True
    sweep(bench)

    assert writes(bench) == 0


# --- what fails ---------------------------------------------------------------------------


def _crashes_everywhere(make: Make, shapes: tuple[str, str], kind: str, step: int = 1) -> None:
    number = 0
    while True:
        bench = make(*shapes)
        minted = len(bench.versions())
        DRIFTS[kind](bench)
        bench.crash_at = lambda at, _name, number=number: at == number
        bench.pass_time(SWEEP)
        crashed = bench.crashing_run()
        bench.go(until=lambda bench=bench: bench.at_home() and bench.case.rotation is None)
        bench.go()
        bench.assert_home()

        assert len(bench.versions()) == minted, (number, bench.points[number])
        assert writes(bench) <= 2 * (1 + (shapes[0] == "staging")), number
        if not crashed:
            return
        number += step


def test_a_crash_in_a_repair_converges(make: Make) -> None:
    """After a crash a new process mends it, without minting, and counts every try."""
    _crashes_everywhere(make, ("vault", "file"), "older", step=2)


@pytest.mark.full
@pytest.mark.parametrize("kind", DRIFTS)
@pytest.mark.parametrize(
    "shapes", [("staging", "azure"), ("vault", "file"), ("file", "staging")], ids="-".join
)
def test_a_crash_at_every_point_of_a_repair_converges(
    make: Make, shapes: tuple[str, str], kind: str
) -> None:
    """The same at every point, for every kind of drift and destination."""
    _crashes_everywhere(make, shapes, kind)


@pytest.mark.parametrize("fault", ["before", "after", "unsent", "late"])
@pytest.mark.parametrize("shape", ["file", "azure"])
def test_a_lost_answer_is_looked_at_again(make: Make, shape: str, fault: str) -> None:
    """A write without an answer stays an intent until it is settled, and the sweep mends the rest."""
    bench = make(shape, "vault")
    minted = len(bench.versions())
    older(bench)
    bench.played["d0"].faults = [fault]
    sweep(bench)
    bench.pass_time(SETTLE / 2)
    bench.played["d0"].land()
    bench.go(until=bench.at_home)
    bench.go()
    bench.assert_home()

    assert len(bench.versions()) == minted


@pytest.mark.parametrize("error", [Denied(), Rejected()])
def test_a_place_that_refuses_for_good_tells_by_a_rotation(make: Make, error: Exception) -> None:
    """A missing right is not tried for ever: a stalled rotation says what is missing where."""
    bench = make("vault", "file")

    def refuses(*_arguments: object) -> str:
        raise error

    bench.played["d0"].inner._activate = refuses  # type: ignore[method-assign]
    missing(bench)
    sweep(bench)

    rotation = bench.case.rotation
    assert rotation is not None
    assert (rotation.state, rotation.cause) == (RotationState.STALLED, Cause.DRIFT)
    assert rotation.error_code == getattr(error, "code", "")
    assert rotation.error_where == "d0:bot"
    assert told(bench, "repair.fight") == []
    del bench.played["d0"].inner._activate  # type: ignore[method-assign]
    bench.amend(lifecycle.retry)
    bench.go()
    bench.assert_home()


def test_what_was_surely_not_written_is_not_counted(make: Make) -> None:
    """A place that is away for an hour is no fight: it is mended when it is back."""
    bench = make("vault", "file")
    missing(bench)
    bench.played["d0"].faults = ["unsent"] * 12
    for _ in range(12):
        sweep(bench)
    assert told(bench, "repair.fight") == []
    sweep(bench)

    assert bench.at_home()


def test_an_entry_that_changes_all_the_time_makes_few_writes(make: Make) -> None:
    """A conflict means read again, three times in a run and no more; the entry is told of."""
    bench = make("vault", "file")

    def meddle(name: str) -> None:
        if name == "before activate d0":
            older(bench)

    older(bench)
    bench.on_point = meddle
    sweep(bench)

    assert count(bench, "copyforward") == 4
    assert [one.kind for one in bench.case.credential.drift] == ["older"]
    bench.on_point = lambda _name: None
    bench.go()
    bench.assert_home()


# --- no fights ----------------------------------------------------------------------------


def _undone_for_hours(make: Make, shapes: tuple[str, ...], kind: str, hours: int) -> None:
    bench = make(*shapes)
    start = bench.clock.now()
    repairs: list[int] = []
    for _ in range(hours * 12):
        DRIFTS[kind](bench)
        before = count(bench, "copyforward") + count(bench, "open")
        bench.restart()  # what was counted survives each of them
        sweep(bench)
        made = count(bench, "copyforward") + count(bench, "open") - before
        repairs += [(bench.clock.now() - start) // HOUR] * made
        for played in bench.played.values():
            played.land()

    assert repairs.count(0) == MOST
    # A rotation waits for the limit of accepted versions, and only when it has ended is it a fight.
    assert all(repairs.count(hour) <= MOST for hour in range(5)), repairs
    assert len(repairs) <= 2 * MOST + 1, repairs
    assert told(bench, "repair.fight")[:1] == ["left"]
    assert [where for _, where in [(n, r.target) for n, r in bench.store.fights()]] == ["d0:bot"]


@pytest.mark.parametrize("shapes", [("vault", "file"), ("azure",)], ids="-".join)
def test_whoever_undoes_a_repair_makes_few_writes(make: Make, shapes: tuple[str, ...]) -> None:
    """Three repairs an hour, then one an hour; told once, in status, audit and metric."""
    _undone_for_hours(make, shapes, "older", hours=2)


@pytest.mark.full
@pytest.mark.parametrize("kind", DRIFTS)
@pytest.mark.parametrize(
    "shapes", [("vault", "file"), ("file",), ("azure",), ("staging",)], ids="-".join
)
def test_whoever_undoes_a_repair_for_hours_makes_few_writes(
    make: Make, shapes: tuple[str, ...], kind: str
) -> None:
    """The same for every kind of drift and destination, and longer."""
    _undone_for_hours(make, shapes, kind, hours=4)


def test_a_person_takes_the_repair_up_again(make: Make) -> None:
    """`keyturn rotation retry` forgets the fight, and the entry is mended at once."""
    bench = make("vault", "file")
    for _ in range(MOST + 1):
        older(bench)
        sweep(bench)
    assert bench.store.fights()
    before = writes(bench)
    bench.amend(lifecycle.retry)
    bench.run()

    assert bench.at_home()
    assert writes(bench) == before + 1
    assert bench.store.fights() == []


def test_a_fight_that_was_given_up_is_over(make: Make) -> None:
    """Whoever wrote there stops: the next try holds, and an hour later nothing is told any more."""
    bench = make("vault", "file")
    for _ in range(MOST + 1):
        older(bench)
        sweep(bench)
    for _ in range(12):
        sweep(bench)
    assert bench.at_home()
    for _ in range(13):
        sweep(bench)

    assert bench.store.fights() == []
    assert told(bench, "repair.over") == ["ok"]
    bench.go()
    bench.assert_home()


def test_a_fight_at_one_place_leaves_the_others_mended(make: Make) -> None:
    """The count is of an entry: another one is copied to all the same."""
    bench = make("vault", "file", "azure")
    for _ in range(MOST + 1):
        older(bench)
        sweep(bench)
    older(bench)
    missing(bench, "d1")
    before = writes(bench)
    sweep(bench)

    assert bench.shown("d1") == bench.shown("d2")
    assert writes(bench) == before


def test_repairs_are_intents_of_current(make: Make) -> None:
    """Each copy is journalled before it is made, with the token that was read."""
    bench = make("vault", "file")
    journalled = []

    def note(name: str) -> None:
        if name == "before activate d0":
            journalled.extend(one for one in bench.case.intents if one.unresolved)

    older(bench)
    bench.on_point = note
    token = bench.played["d0"].inner._observe(bench.targets["d0"]).token
    sweep(bench)
    current = bench.case.current

    assert current is not None
    assert [(i.version_id, i.effect, i.expected) for i in journalled] == [
        (current.id, Effect.ACTIVATE, token)
    ]


def test_a_revoke_stops_a_repair(make: Make) -> None:
    """Current is revoked between the look and the write: it is not published any more (rule 15)."""
    bench = make("vault", "file")
    refused = bench.case.current
    assert refused is not None

    def cut(name: str) -> None:
        if name == "read d1":
            bench.on_point = lambda _name: None
            bench.amend(lifecycle.revoke_version, refused.id, reissue=False)

    missing(bench)
    bench.on_point = cut
    sweep(bench)

    assert bench.at_home()
    assert bench.case.current is not None
    assert bench.case.current.id != refused.id
    assert told(bench, "entry.repaired") == []


def test_a_read_fault_of_the_source_is_no_fault_of_the_entry(make: Make) -> None:
    """A copy that cannot be read just now leaves it to a rotation, which waits for nothing."""
    bench = make("vault", "file")
    honest = bench.played["d1"].read

    def away(*_arguments: object) -> Observed:
        raise DestinationUnavailable

    bench.played["d1"].read = away  # type: ignore[method-assign]
    missing(bench)
    sweep(bench)
    bench.played["d1"].read = honest  # type: ignore[method-assign]

    assert bench.at_home()
