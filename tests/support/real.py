"""A real destination in the saga's bench: the process can end before and after each of its effects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from keyturn.core.model import Target
from keyturn.ports import Entry, Observed
from support.bench import Bench


class Real:
    """A real destination as the saga's bench plays it: a point before and after each write."""

    def __init__(self, bench: Bench, destination: Any, place: Any) -> None:
        self._bench, self._destination = bench, destination
        self.traits = destination.traits
        self.faults: list[str] = []
        self.inner = SimpleNamespace(raw_get=place.read, close=destination.close)

    def fall(self) -> None:
        """Nothing of it hangs."""

    def observe(self, target: Target) -> Observed:
        self._bench.point("observe")
        found: Observed = self._destination.observe(target)
        return found

    def read(self, target: Target, version_id: str) -> Observed:
        self._bench.point("read")
        found: Observed = self._destination.read(target, version_id)
        return found

    def stage(self, target: Target, entry: Entry, *, expected: str) -> Any:
        return self._write("stage", target, entry, expected=expected)

    def activate(self, target: Target, entry: Entry, *, expected: str) -> Any:
        return self._write("activate", target, entry, expected=expected)

    def withdraw(self, target: Target, **more: Any) -> Any:
        return self._write("withdraw", target, **more)

    def retire(self, target: Target, **more: Any) -> Any:
        return self._write("retire", target, **more)

    def _write(self, what: str, *arguments: Any, **more: Any) -> Any:
        self._bench.point(f"before {what}")
        done = getattr(self._destination, what)(*arguments, **more)
        self._bench.point(f"after {what}")
        return done
