"""One rotation over several unlike destinations: together or not at all, and none harms another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest

from keyturn.core import lifecycle
from keyturn.core.model import RotationState, VersionState
from keyturn.errors import Denied, DestinationError, DestinationUnavailable
from support.bench import Bench

STORES = ("staging", "vault", "azure", "file")
DAY = timedelta(days=1)


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Give an agent with four unlike destinations that has its first version everywhere."""
    one = Bench(*STORES)
    one.go()
    one.steps.done.clear()
    one.points.clear()
    yield one
    one.close()


def failing(name: str, error: Callable[[], DestinationError]) -> Callable[[str], None]:
    """Let every call whose point begins or ends so fail."""

    def at(point: str) -> None:
        if point in (f"observe {name}", f"read {name}", f"before {name}") or (
            point.startswith("before ") and point.endswith(f" {name}")
        ):
            raise error()

    return at


def at_write(name: str, error: Callable[[], DestinationError]) -> Callable[[str], None]:
    """Let every activation there fail, while it can be read."""

    def at(point: str) -> None:
        if point == f"before activate {name}":
            raise error()

    return at


def down() -> DestinationError:
    """The connection is refused."""
    return DestinationUnavailable("d2: ConnectionError", sent=False)


def denies() -> DestinationError:
    """A permission is missing."""
    return Denied("d2: the login lacks secrets/set on bot", hint="grant it")


def activations(bench: Bench) -> list[str]:
    """Return where something was shown, in order."""
    return [step.split()[1] for step in bench.steps.done if step.startswith("activate")]


def test_all_is_staged_and_read_back_before_any_of_it_is_shown() -> None:
    """Every place that can stage holds a copy that was compared before the first one shows it."""
    bench = Bench("vault", "staging", "file", "staging")
    bench.go()
    bench.steps.done.clear()
    bench.ask()
    bench.run()
    done = [step.split()[0] for step in bench.steps.done]
    first = done.index("activate")

    assert [done[:first].count(step) for step in ("observe", "stage", "readback")] == [4, 2, 2]
    assert done.count("activate") == 4
    assert "stage" not in done[first:]
    assert done.index("promote") > max(at for at, step in enumerate(done) if step == "activate")
    bench.close()


def test_one_that_is_down_from_the_start_lets_nothing_begin(bench: Bench) -> None:
    """A day later nothing was minted, everything is as it was, and then it goes on by itself."""
    before = bench.case.current
    bench.on_point = failing("d2", down)
    bench.ask()
    until = bench.clock.now() + DAY
    bench.go(runs=2000, until=lambda: bench.clock.now() >= until)
    rotation = bench.case.rotation

    assert rotation is not None
    assert rotation.state is RotationState.WAITING
    assert rotation.waiting is not None
    assert (rotation.waiting.where, rotation.waiting.detail) == (
        "d2:bot",
        "d2: ConnectionError",
    )
    assert bench.case.current == before
    assert len(bench.versions()) == 1
    assert activations(bench) == []
    bench.on_point = lambda _name: None
    bench.go()
    bench.assert_home()


def test_one_that_goes_down_half_way_holds_both_versions_accepted(bench: Bench) -> None:
    """For a day the others show the new one, it the old one; both are accepted, one was minted.

    It can be read and not written: the pauses grow all the same, and the wait is one and the same.
    """
    old = bench.case.current
    assert old is not None
    bench.on_point = at_write("d2", down)
    bench.ask()
    began = bench.clock.now()
    until = began + DAY
    bench.go(runs=2000, until=lambda: bench.clock.now() >= until)
    case = bench.case

    assert case.rotation is not None
    assert case.rotation.waiting is not None
    assert case.rotation.waiting.since == began
    assert case.pending is not None
    assert [v.id for v in case.accepted] == [old.id, case.pending.id]
    assert [bench.shown(name) for name in ("d0", "d1")] == [case.pending.id] * 2
    assert bench.shown("d2") == old.id
    for text in bench.texts.values():
        assert bench.accepts(*text)
    assert len(bench.versions()) == 2
    bench.on_point = lambda _name: None
    bench.go()
    bench.assert_home()
    assert bench.case.current is not None
    assert bench.case.current.id == case.pending.id


@pytest.mark.parametrize("where", [failing, at_write])
def test_one_that_denies_stalls_and_names_the_permission(
    bench: Bench, where: Callable[..., Callable[[str], None]]
) -> None:
    """Nothing is cut, the words of the destination are kept, and a retry takes it up again."""
    bench.on_point = where("d2", denies)
    bench.ask()
    bench.run()
    rotation = bench.case.rotation

    assert rotation is not None
    assert rotation.state is RotationState.STALLED
    assert (rotation.error_code, rotation.error_where) == ("denied", "d2:bot")
    assert rotation.error_detail == "d2: the login lacks secrets/set on bot"
    assert {v.state for v in bench.case.accepted} <= {VersionState.CURRENT, VersionState.PENDING}
    bench.pass_time(DAY)
    bench.on_point = lambda _name: None
    bench.amend(lifecycle.retry)
    bench.go()
    bench.assert_home()
    assert bench.case.rotation is None
