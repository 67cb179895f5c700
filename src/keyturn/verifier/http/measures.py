"""How long answers take, counted in plain lists: an instrument's lock would cost as much as an answer."""

from __future__ import annotations

from bisect import bisect_left

BOUNDS = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
)


class Measures:
    """A histogram in seconds, written on the loop alone; readers may be a moment behind."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total = 0.0

    def turn(self, number: int, seconds: float) -> None:
        """Count all that were answered together by the one that waited longest."""
        self.counts[bisect_left(BOUNDS, seconds)] += number
        self.total += seconds * number

    def one(self, seconds: float) -> None:
        """Count one answer."""
        self.turn(1, seconds)

    def buckets(self) -> list[tuple[str, float]]:
        """Return the running sums, as Prometheus wants them."""
        found, running = [], 0
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), self.counts, strict=True):
            running += count
            found.append((bound, float(running)))
        return found
