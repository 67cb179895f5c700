"""Due times, grace, back-off and the checks of a policy."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyturn.core import policy as rules
from keyturn.core.duration import format_duration, parse_duration
from keyturn.core.model import Policy, Retry, Traits
from keyturn.core.walltime import instant_of, parse_window, wall_of

NOW = datetime(2026, 3, 2, 12, tzinfo=UTC)  # a Monday
H = timedelta(hours=1)
D = timedelta(days=1)


class Slots:
    """A calculator with a slot at every full multiple of a step after an epoch."""

    def __init__(self, step: timedelta, end: datetime | None = None) -> None:
        self.step, self.end = step, end

    def next(self, expression: str, *, zone: str, after: datetime) -> datetime | None:
        """Return the next multiple."""
        epoch = datetime(2026, 1, 1, tzinfo=UTC)
        slot = epoch + ((after - epoch) // self.step + 1) * self.step
        return None if self.end and slot > self.end else slot


def due(
    policy: Policy, *, last: datetime = NOW, now: datetime | None = None, key: str = "k"
) -> datetime | None:
    """Ask for the next rotation, by default at the moment of the last one."""
    return rules.next_rotation(policy, last=last, now=now or last, key=key, cron=Slots(6 * H))


def test_manual_only_is_never_due() -> None:
    """A policy without interval and cron leaves rotations to people."""
    assert due(Policy(every=None)) is None


def test_interval_without_jitter_is_exact() -> None:
    """Without jitter the next rotation is one interval after the last."""
    assert due(Policy(every=30 * D, jitter=0)) == NOW + 30 * D


@given(key=st.text(max_size=40), jitter=st.floats(0, 0.9))
def test_jitter_is_early_only_and_constant(key: str, jitter: float) -> None:
    """Jitter never makes a rotation late, never exceeds its share, and is the same every time."""
    policy = Policy(every=30 * D, jitter=jitter)
    found = due(policy, key=key)
    assert found is not None
    assert NOW + 30 * D * (1 - jitter) <= found <= NOW + 30 * D
    assert found == due(policy, key=key)


def test_jitter_spreads_credentials() -> None:
    """A thousand credentials do not become due together."""
    policy = Policy(every=30 * D, jitter=0.1)
    hours = [(due(policy, key=f"agent-{n}") - NOW) // (7.2 * H) for n in range(1000)]  # type: ignore[operator]
    assert set(hours) == set(range(90, 100))
    assert max(hours.count(hour) for hour in set(hours)) < 160


def test_cron_ignores_jitter_and_counts_from_the_last() -> None:
    """With cron the due time is the slot itself, also one that is long past."""
    policy = Policy(every=None, cron="x", jitter=0.9)
    assert due(policy) == datetime(2026, 3, 2, 18, tzinfo=UTC)
    assert due(policy, now=NOW + 9 * D) == datetime(2026, 3, 2, 18, tzinfo=UTC)


def test_cron_without_a_slot_is_never_due() -> None:
    """A crontab line that never comes round gives no due time."""
    never = Slots(H, end=NOW - D)
    policy = Policy(every=None, cron="x")
    assert rules.next_rotation(policy, last=NOW, now=NOW, key="k", cron=never) is None


WINDOWS = [
    "Mon-Fri 02:00-05:00",
    "02:00-02:30",
    "Sat,Sun 22:00-04:00",
    "Fri-Mon 23:30-00:10",
    "Sun 02:10-02:50",
]
ZONES = ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "UTC"]


def inside(window: str, zone: str, at: datetime) -> bool:
    """Oracle: read the wall clock, allow for the day before where a window runs over midnight."""
    names, _, clock = window.rpartition(" ")
    wall = wall_of(at, ZoneInfo(zone))
    start, end = (tuple(map(int, part.split(":"))) for part in clock.split("-"))
    allowed = {
        "Mon-Fri": {0, 1, 2, 3, 4},
        "": set(range(7)),
        "Sat,Sun": {5, 6},
        "Fri-Mon": {4, 5, 6, 0},
        "Sun": {6},
    }
    today, moment = wall.weekday(), (wall.hour, wall.minute)
    if start < end:
        return today in allowed[names] and start <= moment < end
    late = today in allowed[names] and moment >= start
    return late or ((today - 1) % 7 in allowed[names] and moment < end)


@given(
    window=st.sampled_from(WINDOWS),
    zone=st.sampled_from(ZONES),
    every=st.integers(60, 60 * 24 * 40).map(lambda n: timedelta(minutes=n)),
    jitter=st.sampled_from([0.0, 0.1, 0.5]),
    start=st.datetimes(datetime.fromisoformat("2025-01-01"), datetime.fromisoformat("2027-12-01")),
    late=st.integers(0, 60 * 24 * 20).map(lambda n: timedelta(minutes=n)),
    key=st.text(max_size=5),
)
def test_due_times_stay_inside_the_window(
    window: str,
    zone: str,
    every: timedelta,
    jitter: float,
    start: datetime,
    late: timedelta,
    key: str,
) -> None:
    """Whatever the interval, jitter, zone and delay: due inside a window that has not closed."""
    policy = Policy(every=every, jitter=jitter, window=window, zone=zone)
    last = start.replace(tzinfo=UTC)
    now = last + late
    found = due(policy, last=last, now=now, key=key)
    assert found is not None
    assert inside(window, zone, found)
    assert found >= last + every * (1 - jitter)
    _, end = parse_window(window).at_or_after(max(found, now), ZoneInfo(zone))
    assert parse_window(window).at_or_after(found, ZoneInfo(zone))[1] == end
    assert due(policy, last=last, now=now, key=key) == found


def test_a_shut_window_does_not_make_a_herd() -> None:
    """Credentials that become due while the window is shut spread over it when it opens."""
    policy = Policy(every=7 * D, jitter=0.1, window="Mon 02:00-05:00")
    last = datetime(2026, 3, 4, 12, tzinfo=UTC)
    found = {due(policy, last=last, key=str(n)) for n in range(100)}
    assert len(found) == 100


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Mon",
        "2-3",
        "Mon-Fri 02:00",
        "02:00-02:00",
        "25:00-26:00",
        "Foo 02:00-03:00",
        "24:00-01:00",
        "Mon-Tue-Wed 01:00-02:00",
        "Mon 01:60-02:00",
    ],
)
def test_a_wrong_window_is_refused_without_quoting(text: str) -> None:
    """A window that cannot be read names the form and nothing else."""
    with pytest.raises(ValueError, match=r'^expected a window such as "Mon-Fri 02:00-05:00"$'):
        parse_window(text)


def test_longest_closed_time_of_a_window() -> None:
    """The longest wait for a window that opens on weekdays is the weekend."""
    assert parse_window("Mon-Fri 02:00-05:00").longest_closed() == 3 * D - 3 * H
    assert parse_window("Sun 22:00-04:00").longest_closed() == 7 * D - 6 * H


def test_a_missing_wall_time_means_the_change() -> None:
    """02:30 on the spring night is the moment at which the clock jumps."""
    berlin = ZoneInfo("Europe/Berlin")
    assert instant_of(datetime.fromisoformat("2026-03-29T02:30"), berlin) == datetime(
        2026, 3, 29, 1, tzinfo=UTC
    )


def test_a_doubled_wall_time_means_its_first_instant() -> None:
    """02:30 on the autumn night is the one in summer time."""
    berlin = ZoneInfo("Europe/Berlin")
    assert instant_of(datetime.fromisoformat("2026-10-25T02:30"), berlin) == datetime(
        2026, 10, 25, 0, 30, tzinfo=UTC
    )


@given(tries=st.integers(1, 10_000), unit=st.floats(0, 1), after=st.none() | st.timedeltas())
def test_backoff_is_bounded(tries: int, unit: float, after: timedelta | None) -> None:
    """However often and whatever the destination asks for, the wait is between half of first and max."""
    retry = Retry()
    assert retry.first / 2 <= rules.backoff(retry, tries, unit=unit, retry_after=after) <= retry.max


def test_backoff_doubles_and_honours_retry_after() -> None:
    """It doubles from `first`; a longer Retry-After wins."""
    retry = Retry(first=timedelta(seconds=2), max=timedelta(minutes=15))
    waits = [rules.backoff(retry, tries, unit=1).total_seconds() for tries in range(1, 11)]
    assert waits == [2, 4, 8, 16, 32, 64, 128, 256, 512, 900]
    assert rules.backoff(retry, 1, unit=0) == timedelta(seconds=1)
    assert rules.backoff(retry, 1, unit=0, retry_after=timedelta(seconds=40)) == timedelta(
        seconds=40
    )


FAST = Policy(
    every=timedelta(seconds=3),
    grace=timedelta(seconds=6),
    consumer_cache=timedelta(seconds=2),
    jitter=0,
)


def test_the_demo_policy_and_the_defaults_pass() -> None:
    """Every 3 s with grace 6 s and cache 2 s is sound, and so are the defaults."""
    assert rules.check(FAST, {"f:x": Traits()}, timedelta(0)) == []
    assert rules.check(Policy(), {"f:x": Traits()}, timedelta(seconds=30)) == []


@pytest.mark.parametrize(
    ("every", "grace", "good"),
    [
        (24 * H, 48 * H, True),
        (24 * H - timedelta(seconds=1), 48 * H, False),
        (H, 2 * H, True),
        (H, 2 * H + timedelta(seconds=1), False),
    ],
)
def test_at_most_four_accepted_versions(every: timedelta, grace: timedelta, good: bool) -> None:
    """ceil(grace / every) + 2 may be four and not five: 48 h fits no interval under 24 h."""
    policy = Policy(every=every, grace=grace, consumer_cache=timedelta(0))
    problems = rules.check(policy, {"f:x": Traits()}, timedelta(0))
    assert (problems == []) is good
    assert good or "needs 5 accepted versions" in problems[0]


def test_enforced_max_age_must_hold_interval_and_grace() -> None:
    """Interval + grace over max_age is refused under enforce only, and a window adds its longest wait."""
    policy = Policy(every=30 * D, grace=2 * D, max_age=31 * D, enforce_max_age=True)
    assert "is enforced" in rules.check(policy, {}, timedelta(0))[0]
    assert rules.check(Policy(every=30 * D, grace=2 * D, max_age=31 * D), {}, timedelta(0)) == []
    windowed = Policy(
        every=30 * D, grace=2 * D, max_age=33 * D, enforce_max_age=True, window="Mon 02:00-05:00"
    )
    assert "until the window opens" in rules.check(windowed, {}, timedelta(0))[0]


def test_quota_of_a_destination() -> None:
    """An interval, jitter counted, below what the destination carries is refused with its name."""
    traits = {"aws:x": Traits(minimum_interval=H)}
    tight = Policy(every=H, grace=2 * H, consumer_cache=H, jitter=0)
    assert rules.check(tight, traits, timedelta(0)) == []
    early = Policy(every=H, grace=2 * H, consumer_cache=H, jitter=0.1)
    assert rules.check(early, traits, timedelta(0)) == [
        "aws:x carries one rotation every 1h (its quota), and this policy can rotate every 54m (jitter counted)"
    ]


def test_floor_names_the_short_part() -> None:
    """A grace below rule 19 says by how much and shows every part of the floor."""
    policy = Policy(every=7 * D, grace=24 * H, consumer_cache=24 * H)
    lease, traits = timedelta(seconds=30), {"v:x": Traits(staleness=timedelta(seconds=5))}
    assert rules.grace_floor(
        policy, staleness=timedelta(seconds=5), lease=lease
    ) == 24 * H + timedelta(seconds=35)
    assert rules.check(policy, traits, lease) == [
        "grace 24h is 35s short of its floor 24h35s: consumer_cache 24h + staleness of v:x 5s + lease 30s"
    ]


def test_shortest_interval_of_each_schedule() -> None:
    """The shortest interval counts jitter, or looks at the slots of the crontab line."""
    slots = Slots(6 * H)
    assert rules.shortest_interval(Policy(every=10 * D), now=NOW, cron=slots) == 9 * D
    assert rules.shortest_interval(Policy(every=None, cron="x"), now=NOW, cron=slots) == 6 * H
    assert rules.shortest_interval(Policy(every=None), now=NOW, cron=slots) is None
    assert (
        rules.shortest_interval(Policy(every=None, cron="x"), now=NOW, cron=Slots(H, end=NOW))
        is None
    )


def test_cron_policies_are_checked_by_their_shortest_interval() -> None:
    """A cron that comes round every hour does not fit a grace of 48 h."""
    problems = rules.check(Policy(every=None, cron="x"), {}, timedelta(0), interval=H)
    assert "needs 50 accepted versions" in problems[0]


def test_default_grace_is_the_longer_one() -> None:
    """48 h, or twice the cache where that is longer."""
    assert rules.default_grace(8 * D) == 16 * D
    assert rules.default_grace(H) == 48 * H


@given(st.integers(0, 10**9).map(lambda n: timedelta(milliseconds=n)))
def test_durations_round_trip(value: timedelta) -> None:
    """What we print is what we read."""
    assert parse_duration(format_duration(value)) == value


@pytest.mark.parametrize(
    "text", ["", "1", "h", "1.5h", "1m1h", "-1h", "1 h", "1h ", "１h", "1H", "99999999d"]
)
def test_wrong_durations_are_refused_without_quoting(text: str) -> None:
    """A text that is no duration names the form and nothing else."""
    with pytest.raises(
        ValueError, match=r"^expected a duration such as 30d, 48h, 1h30m, 2s or 250ms$"
    ):
        parse_duration(text)


@pytest.mark.parametrize(
    ("deadline", "settle", "good"), [(10, 300, True), (10, 10, False), (10, 5, False)]
)
def test_a_call_on_its_way_never_counts_as_settled(deadline: int, settle: int, good: bool) -> None:
    """`settle_after` must be longer than the deadline of a call (rule 2)."""
    policy = Policy(retry=Retry(settle_after=timedelta(seconds=settle)))
    slow = {"vault": Traits(call_deadline=timedelta(seconds=deadline))}
    assert (rules.check(policy, slow, timedelta(0)) == []) is good


def test_a_window_does_not_make_a_rotation_later_than_needed() -> None:
    """Where the interval ends inside a window the spread ends there too; else it is the jitter's span."""
    policy = Policy(every=7 * D, jitter=0.1, window="Mon 02:00-23:00")
    last = datetime(2026, 3, 2, 3, tzinfo=UTC)
    assert all(due(policy, last=last, key=str(n)) <= last + 7 * D for n in range(100))  # type: ignore[operator]
    short = Policy(every=7 * D, jitter=0.001, window="Mon 02:00-23:00")
    opening = datetime(2026, 3, 16, 2, tzinfo=UTC)
    found = [due(short, last=last + 1 * D, key=str(n)) for n in range(100)]
    assert all(opening <= at < opening + 7 * D * 0.001 for at in found if at)


def test_a_window_over_midnight_holds_the_next_morning() -> None:
    """At 03:00 on Sunday the window that opened on Saturday at 22:00 is still the one."""
    sunday = datetime(2026, 3, 8, 3, tzinfo=UTC)
    start, end = parse_window("Sat 22:00-04:00").at_or_after(sunday, ZoneInfo("UTC"))
    assert (start, end) == (sunday - 5 * H, sunday + H)


def test_a_window_that_the_change_of_the_clock_swallows_is_skipped() -> None:
    """02:10 to 02:50 does not exist on the spring night: the next one is a week later."""
    night = datetime(2026, 3, 28, 12, tzinfo=UTC)
    start, _ = parse_window("Sun 02:10-02:50").at_or_after(night, ZoneInfo("Europe/Berlin"))
    assert start == datetime(2026, 4, 5, 0, 10, tzinfo=UTC)
