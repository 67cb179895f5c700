"""Durations as people write them: `30d`, `48h`, `1h30m`, `250ms`."""

from __future__ import annotations

import re
from datetime import timedelta

FORM = "a duration such as 30d, 48h, 1h30m, 2s or 250ms"

_UNITS = {
    "w": timedelta(weeks=1),
    "d": timedelta(days=1),
    "h": timedelta(hours=1),
    "m": timedelta(minutes=1),
    "s": timedelta(seconds=1),
    "ms": timedelta(milliseconds=1),
}
# Each unit at most once, the largest first: "1m1h" is more often a typing error than a duration.
_DURATION = re.compile("".join(rf"(?:([0-9]{{1,6}}){unit})?" for unit in _UNITS))


def parse_duration(text: str) -> timedelta:
    """Return the duration that a text means. Raises ValueError, which never quotes the text."""
    found = _DURATION.fullmatch(text)
    if found is None or not text:
        raise ValueError(f"expected {FORM}")
    counts = zip(found.groups(), _UNITS.values(), strict=True)
    return sum((unit * int(count) for count, unit in counts if count), timedelta(0))


def format_duration(value: timedelta) -> str:
    """Write a duration so that `parse_duration` reads it again (to the millisecond)."""
    if value < timedelta(0):
        return "-" + format_duration(-value)
    text, rest = "", value
    for unit, size in _UNITS.items():
        if unit == "w" or (unit == "d" and value <= 2 * size):
            continue  # 7d and 48h read better than 1w and 2d, and 24h better than 1d
        count, rest = divmod(rest, size)
        text += f"{count}{unit}" if count else ""
    return text or "0s"
