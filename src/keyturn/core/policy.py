"""When a credential rotates, how long its old versions live, and whether that can work.

    due time   `every` after the last promote, earlier by the credential's own jitter, or the next
               slot of `cron`; never outside the maintenance window; with neither, by hand only
    grace      consumer_cache + staleness of the slowest destination + lease, at least (rule 19)
    accepted   ceil(grace / every) + 2 versions at the same time, at most four

Pure: the last promote, the present and the random number come in as arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from hashlib import sha256
from itertools import pairwise
from typing import Protocol

from keyturn.core.duration import format_duration as text
from keyturn.core.model import Policy, Retry, Traits
from keyturn.core.walltime import parse_window, zone_of

ACCEPTED_LIMIT = 4
DEFAULT_GRACE = timedelta(hours=48)
NOTHING = timedelta(0)
_SLOTS = 64  # enough to meet the shortest distance of a crontab line that people write


class CronCalculator(Protocol):
    """Knows the slots of a crontab line."""

    def next(self, expression: str, *, zone: str, after: datetime) -> datetime | None:
        """Return the first slot later than `after`, in UTC; None where there is none.

        A slot in a doubled hour occurs once, one in a missing hour is not lost. Raises ValueError,
        whose text names the expected form and never quotes the expression.
        """


def next_rotation(
    policy: Policy, *, last: datetime, now: datetime, key: str, cron: CronCalculator
) -> datetime | None:
    """Return when the next rotation is due, perhaps in the past; None where only people start it.

    `last` is the promote of the current version, `key` whatever names the credential for good: the
    same key always gets the same jitter. Inside a window the answer may lie before `now`, but never
    in a window that has closed: a slot that was missed waits for the next opening.
    """
    if policy.cron is not None:
        latest = cron.next(policy.cron, zone=policy.zone, after=last)
        span = NOTHING
    elif policy.every is not None:
        latest, span = last + policy.every, policy.every * policy.jitter
    else:
        return None
    if latest is None:
        return None
    share = _share(key)
    due = latest - span * share
    if policy.window is None:
        return due
    start, end = parse_window(policy.window).at_or_after(max(due, now), zone_of(policy.zone))
    if start <= due:
        return due
    # Many become due while the window is shut: without a spread all would run at its opening.
    last_moment = latest if start <= latest < end else start + span
    return start + (min(end, last_moment) - start) * share


def shortest_interval(policy: Policy, *, now: datetime, cron: CronCalculator) -> timedelta | None:
    """Return the shortest time between two rotations by schedule; None where there is no schedule.

    For `cron` it looks at the next 64 slots.
    """
    if policy.cron is None:
        return None if policy.every is None else policy.every * (1 - policy.jitter)
    slots = [now]
    while len(slots) <= _SLOTS:
        slot = cron.next(policy.cron, zone=policy.zone, after=slots[-1])
        if slot is None:
            break
        slots.append(slot)
    return min((later - earlier for earlier, later in pairwise(slots[1:])), default=None)


def backoff(
    retry: Retry, tries: int, *, unit: float, retry_after: timedelta | None = None
) -> timedelta:
    """Return how long to wait after the given number of tries (1 and up).

    It doubles from `first` to `max`; `unit` (0 to 1, random) chooses between a half and the whole,
    so that many do not come back together. A longer `retry_after` of the destination is honoured,
    but nothing waits longer than `max`: a hostile answer must not park a rotation.
    """
    ceiling = min(retry.max, retry.first * 2 ** min(max(tries, 1) - 1, 40 if retry.first else 0))
    wait = ceiling * (0.5 + unit / 2)
    return max(wait, min(retry_after or NOTHING, retry.max))


def default_grace(consumer_cache: timedelta) -> timedelta:
    """Return the grace where the policy gives none: the longer of 48 h and twice the cache."""
    return max(DEFAULT_GRACE, 2 * consumer_cache)


def grace_floor(policy: Policy, *, staleness: timedelta, lease: timedelta) -> timedelta:
    """Return the least grace (rule 19), whoever sets it.

    Longest consumer cache + the destination's staleness + the verifiers' lease, which is zero where
    no leased verifier is registered.
    """
    return policy.consumer_cache + staleness + lease


def check(
    policy: Policy,
    traits: Mapping[str, Traits],
    lease: timedelta,
    *,
    interval: timedelta | None = None,
) -> list[str]:
    """Return what cannot work about a policy at these destinations, a sentence each.

    `traits` is by the name of the destination. `interval` is the answer of `shortest_interval`,
    needed where the policy has `cron`.
    """
    if policy.cron is None:
        interval = policy.every
    shortest = None if interval is None else interval * (1 - _jitter(policy))
    return [
        *_check_accepted(policy, interval),
        *_check_age(policy, interval),
        *_check_retry(policy.retry),
        *(
            problem
            for name, ability in sorted(traits.items())
            for problem in _check_destination(policy, name, ability, lease, shortest)
        ),
        *([] if traits else _check_floor(policy, None, NOTHING, lease)),
    ]


def _check_accepted(policy: Policy, interval: timedelta | None) -> list[str]:
    if interval is None:
        return []
    versions = -(-policy.grace // interval) + 2 if interval > NOTHING else ACCEPTED_LIMIT + 1
    if versions <= ACCEPTED_LIMIT:
        return []
    least = policy.grace / (ACCEPTED_LIMIT - 2)
    return [
        (
            f"a grace of {text(policy.grace)} at this interval needs {versions} accepted versions, and "
            f"the limit is {ACCEPTED_LIMIT}: rotate no more often than every {text(least)}, or "
            f"shorten the grace to {text((ACCEPTED_LIMIT - 2) * interval)}"
        )
    ]


def _check_age(policy: Policy, interval: timedelta | None) -> list[str]:
    if interval is None or policy.max_age is None or not policy.enforce_max_age:
        return []
    shut = parse_window(policy.window).longest_closed() if policy.window else NOTHING
    needed = interval + shut + policy.grace
    if needed <= policy.max_age:
        return []
    waiting = f" + at most {text(shut)} until the window opens" if shut else ""
    return [
        (
            f"max_age {text(policy.max_age)} is enforced, but a version lives {text(needed)}: interval "
            f"{text(interval)}{waiting} + grace {text(policy.grace)}"
        )
    ]


def _check_retry(retry: Retry) -> list[str]:
    return [] if retry.first <= retry.max else ["retry: expected `first` up to `max`"]


def _check_destination(
    policy: Policy, name: str, traits: Traits, lease: timedelta, shortest: timedelta | None
) -> list[str]:
    problems = _check_floor(policy, name, traits.staleness, lease)
    settle_after, longest = policy.retry.settle_after, traits.call_deadline + traits.staleness
    if settle_after <= longest:  # a call on its way is not settled, a read behind proves nothing
        lag = f" + staleness {text(traits.staleness)}" if traits.staleness else ""
        problems.append(
            f"retry: settle_after {text(settle_after)} is not longer than the call_deadline of {name}"
            f" {text(traits.call_deadline)}{lag}"
        )
    if shortest is not None and shortest < traits.minimum_interval:
        problems.append(
            f"{name} carries one rotation every {text(traits.minimum_interval)} (its quota), and this "
            f"policy can rotate every {text(shortest)} (jitter counted)"
        )
    return problems


def _check_floor(
    policy: Policy, name: str | None, staleness: timedelta, lease: timedelta
) -> list[str]:
    floor = grace_floor(policy, staleness=staleness, lease=lease)
    if policy.grace >= floor:
        return []
    where = f" + staleness of {name} {text(staleness)}" if name else ""
    return [
        (
            f"grace {text(policy.grace)} is {text(floor - policy.grace)} short of its floor "
            f"{text(floor)}: consumer_cache {text(policy.consumer_cache)}{where} + lease {text(lease)}"
        )
    ]


def _jitter(policy: Policy) -> float:
    return 0.0 if policy.cron is not None else policy.jitter


def _share(key: str) -> float:
    """Return a number from 0 to just under 1 that belongs to this key for ever."""
    return int.from_bytes(sha256(b"keyturn-jitter-v1" + key.encode()).digest()[:6]) / 2**48
