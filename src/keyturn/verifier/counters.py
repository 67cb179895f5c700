"""Numbers by name that many threads raise and one thread takes, without a lock where they are raised.

A number is an `itertools.count`: `next` raises it in one step that no other thread can come into, where
`numbers[name] += 1` would read and write in two, and taking a lock costs more than everything else. It
only ever grows; whoever takes remembers what was there the last time, so nothing is lost in between.
"""

from __future__ import annotations

import threading
from itertools import count


class Counters:
    """Counts by name, of which there are `most` at a time; what is beyond is one number.

    `raised` is for any thread, `taken` for one at a time.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._numbers: dict[str, count[int]] = {}
        self._before: dict[str, int] = {}
        self._leaving: list[tuple[str, count[int], int]] = []
        self._others = count()
        self._others_before = 0
        self._guard = threading.Lock()

    def raised(self, name: str) -> None:
        """Count one."""
        number = self._numbers.get(name)
        next(number if number is not None else self._begin(name))

    def taken(self) -> tuple[dict[str, int], int]:
        """Return what was counted since the last time, and how much of it under no name."""
        found = {name: new for name, number, before in self._leaving
                 if (new := next(number) - before)}  # fmt: skip
        self._leaving = []
        with self._guard:
            numbers = list(self._numbers.items())
        crowded = len(numbers) > self._most // 2
        for name, number in numbers:
            before, value = self._before.get(name, 0), next(number)
            self._before[name] = value + 1  # this `next` was a step as well
            if value != before:
                found[name] = found.get(name, 0) + value - before
            elif crowded:
                self._end(name, number)
        value = next(self._others)
        others, self._others_before = value - self._others_before, value + 1
        return found, others

    def _begin(self, name: str) -> count[int]:
        with self._guard:
            if name not in self._numbers and len(self._numbers) >= self._most:
                return self._others
            return self._numbers.setdefault(name, count())

    def _end(self, name: str, number: count[int]) -> None:
        """Make room where nobody raised it; a thread that has just found it is heard the next time."""
        with self._guard:
            del self._numbers[name]
        self._leaving.append((name, number, self._before.pop(name)))
