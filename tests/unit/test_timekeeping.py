"""A wall clock is believed as long as it agrees with the time since boot."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from keyturn.core.timekeeping import JUMP, Anchor, judge
from keyturn.wiring import GuardedClock

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
H, M, S = timedelta(hours=1), timedelta(minutes=1), timedelta(seconds=1)


def at(boot: str, boottime: timedelta, wall: datetime) -> Anchor:
    """Return a pair of clocks."""
    return Anchor(boot_id=boot, boottime=boottime, wall=wall)


BELIEVED = at("b", 10 * H, NOON)
CASES: dict[str, tuple[Anchor, timedelta, datetime]] = {
    "both went on alike": (at("b", 11 * H, NOON + H), 0 * S, NOON + H),
    "a correction is followed": (at("b", 11 * H, NOON + H + JUMP), 0 * S, NOON + H + JUMP),
    "forward": (at("b", 11 * H, NOON + 3 * H), 2 * H, NOON + H),
    "back": (at("b", 11 * H, NOON - 2 * H), -3 * H, NOON + H),
    "off for a month": (at("c", 1 * M, NOON + 720 * H), 0 * S, NOON + 720 * H),
    "back after a reboot": (at("c", 1 * M, NOON - 9 * H), -9 * H, NOON),
    "another host that is up for longer": (at("c", 900 * H, NOON + S), 0 * S, NOON + S),
}


@pytest.mark.parametrize("sentence", CASES)
def test_which_clock_is_believed(sentence: str) -> None:
    """More than five minutes off in either direction is a jump; then time goes on by the boot's."""
    seen, jump, now = CASES[sentence]
    moment, off = judge(BELIEVED, seen)
    assert (moment.wall, off) == (now, jump)
    assert (moment.boot_id, moment.boottime) == (seen.boot_id, seen.boottime)


class Host:
    """A host whose wall clock somebody turns."""

    def __init__(self) -> None:
        self.up, self.offset = 5 * H, 0 * S

    def now(self) -> datetime:
        """The wall clock."""
        return NOON + self.up + self.offset

    def boottime(self) -> timedelta:
        """The time since boot."""
        return self.up


def test_time_never_stands_still_nor_jumps_with_the_wall_clock() -> None:
    """While the clock is wrong time goes on; back at its place it is believed again."""
    host = Host()
    clock = GuardedClock(host, boot_id="b")
    assert clock.now() == host.now()
    host.offset = 24 * H
    host.up += H
    assert clock.look() == (NOON + 6 * H, 24 * H)
    host.up += H
    assert clock.look() == (NOON + 7 * H, 24 * H)
    host.offset = 2 * M
    assert clock.look() == (host.now(), 0 * S)


def test_small_steps_are_followed_for_as_long_as_they_last() -> None:
    """A clock that is slewed by hours in small steps is right."""
    host = Host()
    clock = GuardedClock(host, boot_id="b")
    for _ in range(100):
        host.offset += 4 * M
        host.up += M
        assert clock.now() == host.now()


def test_a_person_decides_which_is_right() -> None:
    """Trust takes the wall clock as it is, and says by how much it had jumped."""
    host = Host()
    clock = GuardedClock(host, boot_id="b")
    clock.now()
    host.offset = -3 * H
    assert clock.trust() == -3 * H
    assert clock.look() == (host.now(), 0 * S)
    assert clock.trust() == 0 * S


def test_a_reboot_into_the_past_goes_on_from_what_was_known() -> None:
    """A dead battery does not bring back yesterday: time starts where it was last believed."""
    host = Host()
    clock = GuardedClock(host, boot_id="new")
    clock.anchor = at("old", 400 * H, NOON + 50 * H)
    assert clock.now() == NOON + 50 * H
    host.up += H
    assert clock.now() == NOON + 51 * H


def test_who_only_reads_hears_of_trust() -> None:
    """A verifier of another process goes back to the wall clock once the daemon did."""
    host = Host()
    told: list[Anchor] = []
    clock = GuardedClock(host, boot_id="b", learn=lambda: told[-1] if told else None)
    clock.now()
    host.offset = 24 * H
    assert clock.look()[1] == 24 * H
    told.append(at("b", host.up, host.now()))
    host.up += S
    assert clock.look()[1] == 24 * H  # asked a moment ago
    host.up += 5 * S
    assert clock.look() == (host.now(), 0 * S)
