"""Wall-clock time in a zone: which instant a wall time means, and maintenance windows.

Two nights a year are odd. A wall time that occurs twice means its first instant; one that does
not occur means the instant of the change, as cron(8) has it ("run immediately after the time
change"). So a wall time always means exactly one instant, and later ones never mean earlier
instants. Zone rules are the IANA data that `zoneinfo` holds in memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY = timedelta(days=1)
WINDOW_FORM = 'a window such as "Mon-Fri 02:00-05:00"'
ZONE_FORM = "a time zone of the IANA list such as UTC or Europe/Berlin"

_NAMES = "|".join(DAYS)
_WINDOW = re.compile(
    rf"(?:((?:{_NAMES})(?:[,-](?:{_NAMES}))*) +)?"
    r"([0-2]?[0-9]):([0-5][0-9]) ?- ?([0-2]?[0-9]):([0-5][0-9])",
    re.ASCII | re.IGNORECASE,
)


def zone_of(name: str) -> ZoneInfo:
    """Return the zone with this name. Raises ValueError, which never quotes the name."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # OSError: the name of a folder of the data
        raise ValueError(f"expected {ZONE_FORM}") from None


def rfc3339(at: datetime) -> str:
    """Write an instant (in UTC) as everything has it that we print, send or log."""
    return at.isoformat().replace("+00:00", "Z")


def instant_of(wall: datetime, zone: ZoneInfo) -> datetime:
    """Return the one instant (UTC) that a naive wall time means in a zone."""
    first = wall.replace(tzinfo=zone, fold=0).astimezone(UTC)
    if wall_of(first, zone) == wall:
        return first
    before = wall.replace(tzinfo=zone, fold=1).astimezone(UTC)
    after = first
    while after - before > timedelta(seconds=1):  # find the change: zones change on whole seconds
        middle = before + timedelta(seconds=(after - before) // timedelta(seconds=2))
        before, after = (before, middle) if wall_of(middle, zone) > wall else (middle, after)
    return after


def wall_of(instant: datetime, zone: ZoneInfo) -> datetime:
    """Return what a clock on the wall shows, naive."""
    return instant.astimezone(zone).replace(tzinfo=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A maintenance window: on these days (Monday is 0) from `opens` to `closes` after midnight.

    `closes` is past 24 hours where the window runs over midnight; the days are those it opens on.
    """

    days: frozenset[int]
    opens: timedelta
    closes: timedelta

    def at_or_after(self, instant: datetime, zone: ZoneInfo) -> tuple[datetime, datetime]:
        """Return opening and end (not inside) of the window that holds an instant, or the next."""
        midnight = datetime.combine(wall_of(instant, zone).date(), time())
        # From two days back (a window over midnight) to three weeks on: one change of the clock can
        # swallow a short weekly window.
        for day in (midnight + DAY * offset for offset in range(-2, 22)):
            if day.weekday() not in self.days:
                continue
            start, end = instant_of(day + self.opens, zone), instant_of(day + self.closes, zone)
            if start < end and end > instant:
                return start, end
        raise ValueError("the window never opens in this zone")

    def longest_closed(self) -> timedelta:
        """Return the longest time between an end and the next opening (changes of clock apart)."""
        days = sorted(self.days)
        starts = [DAY * day for day in (*days, days[0] + 7)]
        length = self.closes - self.opens
        return max(later - earlier - length for earlier, later in pairwise(starts))


def parse_window(text: str) -> Window:
    """Return the window that a text means. Raises ValueError, which never quotes the text."""
    found = _WINDOW.fullmatch(text)
    if found is None:
        raise ValueError(f"expected {WINDOW_FORM}")
    opens, closes = _clock(found[2], found[3]), _clock(found[4], found[5])
    if opens in (closes, DAY) or max(opens, closes) > DAY:
        raise ValueError(f"expected {WINDOW_FORM}")
    if closes < opens:
        closes += DAY
    return Window(days=_days(found[1] or "mon-sun"), opens=opens, closes=closes)


def _clock(hours: str, minutes: str) -> timedelta:
    return timedelta(hours=int(hours), minutes=int(minutes))


def _days(text: str) -> frozenset[int]:
    chosen: set[int] = set()
    for part in text.lower().split(","):
        first, *rest = (DAYS.index(name) for name in part.split("-"))
        if len(rest) > 1:
            raise ValueError(f"expected {WINDOW_FORM}")
        last = rest[0] if rest else first
        chosen.update((first + step) % 7 for step in range((last - first) % 7 + 1))
    return frozenset(chosen)
