"""Slots of crontab lines against a brute-force walk over every minute in UTC."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import product
from zoneinfo import ZoneInfo

import pytest

from keyturn.daemon.cron import Crontab

ZONES = ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "UTC"]
NAMES = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"]
MINUTE = timedelta(minutes=1)
# 2026: both changes of each zone lie in these stretches.
SPRING = (datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 4, 12, tzinfo=UTC))
AUTUMN = (datetime(2026, 9, 27, tzinfo=UTC), datetime(2026, 11, 8, tzinfo=UTC))


def numbers(field: str, low: int, high: int) -> set[int]:
    """Oracle: a crontab field of numbers, as crontab(5) has it."""
    chosen: set[int] = set()
    for part in field.split(","):
        span, _, step = part.partition("/")
        first, _, last = span.partition("-")
        start, end = (low, high) if span == "*" else (int(first), int(last or first))
        chosen.update(range(start, end + 1, int(step or 1)))
    return chosen


def matcher(expression: str) -> Callable[[datetime], bool]:
    """Oracle: a predicate on wall times, made once for the hot loop below."""
    minute, hour, day, month, weekday = expression.split()
    minutes, hours = numbers(minute, 0, 59), numbers(hour, 0, 23)
    days, months = numbers(day, 1, 31), numbers(month, 1, 12)
    weekdays = {number % 7 for number in numbers(weekday, 0, 7)}
    either = not day.startswith("*") and not weekday.startswith("*")

    def matches(wall: datetime) -> bool:
        if wall.minute not in minutes or wall.hour not in hours or wall.month not in months:
            return False
        by_day, by_weekday = wall.day in days, wall.isoweekday() % 7 in weekdays
        return (by_day or by_weekday) if either else (by_day and by_weekday)

    return matches


def oracle(expression: str, zone: str, start: datetime, end: datetime) -> list[datetime]:
    """Walk every minute: a wall minute counts once, and skipped ones count at the jump."""
    matches, place = matcher(expression), ZoneInfo(zone)
    slots: list[datetime] = []
    newest = start.astimezone(place).replace(tzinfo=None) - MINUTE
    at = start
    while at < end:
        wall = at.astimezone(place).replace(tzinfo=None)
        hit = False
        while newest < wall:
            newest += MINUTE
            hit = hit or matches(newest)
        if hit:
            slots.append(at)
        at += MINUTE
    return slots


def walk(expression: str, zone: str, start: datetime, end: datetime) -> list[datetime]:
    """All slots of the calculator in [start, end)."""
    slots: list[datetime] = []
    after = start - timedelta(microseconds=1)
    while (slot := Crontab().next(expression, zone=zone, after=after)) is not None and slot < end:
        slots.append(slot)
        after = slot
    return slots


LINES = [
    "30 2 * * *", "0 3 * * 2", "*/20 * * * *", "15 1-3 * * *", "0 2 1,15 * 0", "5 2 */2 * *",
    "0 0 * * 5-7", "45 1,2 * 3,4,10,11 *", "10 2 * * */3", "0 12 31 * *",
]  # fmt: skip


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("line", LINES)
def test_slots_agree_with_a_walk_over_every_minute(line: str, zone: str) -> None:
    """Over both changes of the clock each wall minute fires once and none is lost."""
    for start, end in (SPRING, AUTUMN):
        assert walk(line, zone, start, end) == oracle(line, zone, start, end)


@pytest.mark.parametrize(("number", "zone"), list(product(range(8), ZONES)))
def test_weekday_numbers_follow_crontab_in_both_forms(number: int, zone: str) -> None:
    """0 and 7 are Sunday, 1 to 6 Monday to Saturday, and each name says the same as its number."""
    start, end = SPRING
    by_number = walk(f"30 2 * * {number}", zone, start, end)
    assert by_number == walk(f"30 2 * * {NAMES[number % 7]}", zone, start, end)
    assert by_number == walk(f"30 2 * * {NAMES[number % 7].upper()}", zone, start, end)
    assert by_number == oracle(f"30 2 * * {number}", zone, start, end)
    assert len(by_number) == 6


@pytest.mark.parametrize(
    ("field", "same"),
    [
        ("mon-fri", "1-5"),
        ("sun-tue", "0-2"),
        ("fri-mon", "0,1,5,6"),
        ("5-7", "0,5,6"),
        ("fri-sun", "0,5,6"),
        ("1-5/2", "1,3,5"),
        ("*/2", "0,2,4,6"),
        ("sat,1", "1,6"),
    ],
)
def test_weekday_ranges_and_lists(field: str, same: str) -> None:
    """Ranges, lists and steps of names and numbers mean the days that a person reads."""
    start, end = AUTUMN
    assert walk(f"0 4 * * {field}", "UTC", start, end) == oracle(
        f"0 4 * * {same}", "UTC", start, end
    )


def test_an_instant_inside_the_second_run_of_a_doubled_hour() -> None:
    """Asked in the second 02:15, the slot of 02:30 has been and is not given again."""
    second = datetime(2026, 10, 25, 1, 15, tzinfo=UTC)
    assert Crontab().next("30 2 * * *", zone="Europe/Berlin", after=second) == datetime(
        2026, 10, 26, 1, 30, tzinfo=UTC
    )


@pytest.mark.parametrize("line", ["0 0 30 2 *", "0 0 31 4,6 *"])
def test_a_line_that_never_comes_round_has_no_slot(line: str) -> None:
    """30 February is answered with nothing, and soon."""
    assert Crontab().next(line, zone="UTC", after=SPRING[0]) is None


def test_a_leap_day_is_found() -> None:
    """29 February is years away and is still found."""
    found = Crontab().next("0 0 29 2 *", zone="UTC", after=SPRING[0])
    assert found == datetime(2028, 2, 29, tzinfo=UTC)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "* * * *",
        "* * * * * *",
        "61 * * * *",
        "0 24 * * *",
        "0 0 0 * *",
        "0 0 * 13 *",
        "0 0 * * 8",
        "0 0 * * xyz",
        "0 0 last * *",
        "0 0 * * mon#2",
        "x x x x x",
        "0 0 * * *-3",
    ],
)
def test_wrong_lines_name_the_form_and_quote_nothing(line: str) -> None:
    """What crontab does not know is refused with the expected form alone."""
    with pytest.raises(
        ValueError, match=r'^expected five fields of a crontab such as "0 3 \* \* tue"'
    ):
        Crontab().next(line, zone="UTC", after=SPRING[0])


@pytest.mark.parametrize("zone", ["", "Nowhere/Town", "../etc/passwd", "Europe", "/etc/localtime"])
def test_wrong_zones_name_the_form_and_quote_nothing(zone: str) -> None:
    """A zone that does not exist is refused with the expected form alone."""
    with pytest.raises(
        ValueError, match=r"^expected a time zone of the IANA list such as UTC or Europe/Berlin$"
    ):
        Crontab().next("0 0 * * *", zone=zone, after=SPRING[0])
