"""A clock that a test moves."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

START = datetime(2026, 3, 1, 12, tzinfo=UTC)


class FakeClock:
    """Both clocks of `ports.Clock`; they stand still until somebody moves them. Thread-safe."""

    def __init__(self, now: datetime = START, boottime: timedelta = timedelta(hours=1)) -> None:
        self._now = now
        self._boottime = boottime
        self._guard = threading.Lock()

    def now(self) -> datetime:
        """Return the wall time, aware, UTC."""
        with self._guard:
            return self._now

    def boottime(self) -> timedelta:
        """Return the time since boot."""
        with self._guard:
            return self._boottime

    def advance(self, by: timedelta) -> None:
        """Let time pass on both clocks. Raises ValueError for a step back: use `jump`."""
        if by < timedelta(0):
            raise ValueError("time does not run back")
        with self._guard:
            self._now += by
            self._boottime += by

    def jump(self, by: timedelta) -> None:
        """Move the wall clock alone, as a person or a bad time server does."""
        with self._guard:
            self._now += by
