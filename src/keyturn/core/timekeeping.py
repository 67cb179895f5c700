"""Whether a wall clock can be believed: it is compared with the time since boot.

Deadlines and due times are instants of the wall clock, which people, NTP and broken hardware move.
CLOCK_BOOTTIME only ever goes on. A pair of both that was once believed is an anchor; a wall clock
that is more than `JUMP` away from where the anchor says it must be has jumped. Then time goes on by
the anchor: nobody is refused early, nothing is let go, until a person says which of the two is right.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

JUMP = timedelta(minutes=5)
NONE = timedelta(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """A moment when the wall clock was believed: on which boot, how long after it, what it said."""

    boot_id: str
    boottime: timedelta
    wall: datetime


def judge(anchor: Anchor | None, seen: Anchor) -> tuple[Anchor, timedelta]:
    """Return the moment to go by, and by how much the wall clock has jumped (zero: believe it).

    After a reboot, or on another host, only a clock that is behind can be told from one that was
    off for long.
    """
    if anchor is None:
        return seen, NONE
    same_boot = anchor.boot_id == seen.boot_id
    expected = anchor.wall + (seen.boottime - anchor.boottime if same_boot else NONE)
    off = seen.wall - expected
    if abs(off) <= JUMP or (off > NONE and not same_boot):
        return seen, NONE
    return replace(seen, wall=expected), off
