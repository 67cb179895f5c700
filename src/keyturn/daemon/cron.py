"""The slots of a crontab line, by APScheduler's calendar and our own rules for odd nights.

APScheduler 3 counts weekdays from Monday, joins day and weekday by "and", fires twice in a doubled
hour and can name wall times that do not exist. So it is only asked on a calendar without changes
of the clock (UTC as if it were the wall), and `core.walltime` turns each wall time into its one
instant. The meaning of a line is that of crontab(5).
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from functools import lru_cache

from apscheduler.triggers.cron import CronTrigger

from keyturn.core.walltime import DAYS, instant_of, wall_of, zone_of

CRON_FORM = 'five fields of a crontab such as "0 3 * * tue" (minute hour day month weekday)'

_SUNDAY_FIRST = (DAYS[6], *DAYS[:6])
_PART = re.compile(r"(\*|[0-7]|[a-z]{3})(?:-([0-7]|[a-z]{3}))?(?:/([1-9][0-9]?))?")
# Names only where crontab has them: APScheduler knows more ("last", "2nd mon").
_FIELDS = [re.compile(form) for form in (*3 * [r"[0-9*,/-]{1,200}"], *2 * [r"[0-9a-z*,/-]{1,200}"])]
# A line that never matches (30 February) must not be searched for up to the year 9999.
_HORIZON = datetime(2200, 1, 1, tzinfo=UTC)
_TICK = timedelta(microseconds=1)


class Crontab:
    """The calculator that core gets passed in (`keyturn.core.policy.CronCalculator`)."""

    def next(self, expression: str, *, zone: str, after: datetime) -> datetime | None:
        """Return the first slot later than `after`, in UTC; None where there is none.

        Raises ValueError, whose text never quotes the expression.
        """
        place, triggers = zone_of(zone), _triggers(expression)
        wall = wall_of(after, place)
        while True:
            found = [
                trigger.get_next_fire_time(None, wall.replace(tzinfo=UTC) + _TICK)
                for trigger in triggers
            ]
            slots = [slot for slot in found if slot is not None]
            if not slots:
                return None
            wall = min(slots).replace(tzinfo=None)
            slot = instant_of(wall, place)
            if slot > after:  # else `after` is in the second run of a doubled hour: go on
                return slot


@lru_cache(maxsize=1024)
def _triggers(expression: str) -> tuple[CronTrigger, ...]:
    """Return one trigger, or two where day and weekday are both given (crontab: either will do)."""
    fields = expression.lower().split()
    if len(fields) != 5 or not all(map(re.Pattern.fullmatch, _FIELDS, fields)):
        raise ValueError(f"expected {CRON_FORM}")
    minute, hour, day, month, weekday = fields
    either = not day.startswith("*") and not weekday.startswith("*")
    choices = [(day, "*"), ("*", weekday)] if either else [(day, weekday)]
    try:
        return tuple(
            CronTrigger(
                minute=minute,
                hour=hour,
                day=chosen_day,
                month=month,
                day_of_week=_weekday_names(chosen_weekday),
                end_date=_HORIZON,
                timezone=UTC,
            )
            for chosen_day, chosen_weekday in choices
        )
    except ValueError:
        raise ValueError(f"expected {CRON_FORM}") from None


def _weekday_names(field: str) -> str:
    """Translate a weekday field to a list of names: a number means another day to APScheduler."""
    chosen: set[int] = set()
    for part in field.split(","):
        found = _PART.fullmatch(part)
        if found is None:
            raise ValueError(f"expected {CRON_FORM}")
        first, last, step = found.groups()
        if first == "*":
            if last:
                raise ValueError(f"expected {CRON_FORM}")
            chosen.update(range(0, 7, int(step or 1)))
            continue
        start = _weekday_number(first)
        end = _weekday_number(last) if last else (start if step is None else 6)
        if end < start:  # fri-mon goes over the end of the week
            end += 7
        chosen.update(range(start, end + 1, int(step or 1)))
    return ",".join(_SUNDAY_FIRST[day] for day in sorted({day % 7 for day in chosen}))


def _weekday_number(name: str) -> int:
    if name.isdigit():
        return int(name)
    return _SUNDAY_FIRST.index(name)
