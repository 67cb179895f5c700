"""Clocks and randomness that a test decides about."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

START = datetime(2026, 3, 1, 12, tzinfo=UTC)


class FakeClock:
    """A clock that stands until it is told to go on."""

    def __init__(self, now: datetime = START) -> None:
        self._now = now
        self._boottime = timedelta(hours=1)

    def now(self) -> datetime:
        """The time that was set."""
        return self._now

    def boottime(self) -> timedelta:
        """Time since boot: goes on with `advance` only."""
        return self._boottime

    def advance(self, by: timedelta) -> None:
        """Let time pass."""
        self._now += by
        self._boottime += by

    def jump(self, by: timedelta) -> None:
        """Set the wall clock, as an administrator or a time server would."""
        self._now += by


def seeded(seed: int) -> Callable[[int], bytes]:
    """Return a source of bytes that gives the same ones for the same seed."""
    return random.Random(seed).randbytes
