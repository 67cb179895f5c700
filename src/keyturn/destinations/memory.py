"""A destination in this process: it stages, compares and keeps versions, or whatever it is told to.

It proves the saga's every path, and is held to the same contract as the real ones. `fault` is called
before and after each effect, so a test can make it fail, lose an answer or stall.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from keyturn.core.model import Keys, Target, Traits
from keyturn.destinations.base import ConnectionOptions, DestinationBase
from keyturn.destinations.entry import merged, observed, refuse_foreign
from keyturn.errors import Conflict, Rejected
from keyturn.ports import Clock, Entry, Observed

Fault = Callable[[str, str], None]
Values = dict[str, str]


class MemoryOptions(ConnectionOptions):
    """Which kind of store it plays."""

    can_stage: bool = True
    has_cas: bool = True
    keeps_versions: bool = True


@dataclass(slots=True)
class _Shelf:
    """One entry: its copies by number, which one is shown, what is staged, whose it is."""

    copies: dict[int, Values] = field(default_factory=dict)
    shown: int = 0
    staged: tuple[str, int] | None = None
    owner: str | None = None
    disabled: set[int] = field(default_factory=set)


class MemoryDestination(DestinationBase):
    """Entries in a dictionary."""

    Options = MemoryOptions

    def __init__(self, options: Any, *, name: str, store_id: str, clock: Clock) -> None:
        super().__init__(options, name=name, store_id=store_id, clock=clock)
        self.fault: Fault = lambda _operation, _moment: None
        self._shelves: dict[str, _Shelf] = {}
        self._guard = threading.Lock()

    @property
    def traits(self) -> Traits:
        """What its options say."""
        return Traits(
            can_stage=self.options.can_stage,
            has_cas=self.options.has_cas,
            keeps_versions=self.options.keeps_versions,
        )

    # --- what an agent, or somebody else, does ------------------------------------------------

    def raw_get(self, target: Target) -> Values | None:
        """Return what an agent reads, bypassing the port."""
        with self._guard:
            shelf = self._shelf(target)
            return dict(shelf.copies[shelf.shown]) if shelf.shown else None

    def raw_put(self, target: Target, values: Mapping[str, str]) -> None:
        """Edit from outside."""
        with self._guard:
            shelf = self._shelf(target)
            self._show(shelf, self._add(shelf, dict(values)))

    def disabled(self, target: Target, locator: str) -> bool:
        """Tell whether a copy was retired."""
        with self._guard:
            return int(locator) in self._shelf(target).disabled

    # --- the port ---------------------------------------------------------------------------

    def _probe(self) -> str:
        self.fault("probe", "before")
        return "in memory"

    def _observe(self, target: Target) -> Observed:
        self.fault("observe", "before")
        with self._guard:
            shelf = self._shelf(target)
            return _observed(target.keys, shelf, shelf.shown)

    def _read(self, target: Target, version_id: str) -> Observed:
        self.fault("read", "before")
        with self._guard:
            shelf = self._shelf(target)
            for number, values in shelf.copies.items():
                if values.get(target.keys.version) == version_id and number not in shelf.disabled:
                    return _observed(target.keys, shelf, number)
            return Observed(exists=bool(shelf.shown), token=str(shelf.shown))

    def _stage(self, target: Target, entry: Entry, expected: str) -> str:
        if not self.options.can_stage:
            return super()._stage(target, entry, expected)
        self.fault("stage", "before")
        with self._guard:
            shelf = self._shelf(target)
            number = self._place(target, shelf, entry, expected)
            shelf.staged = (entry.version_id, number)
            if not shelf.shown:
                self._show(shelf, number)  # like AWS: a first value is shown at once (rule 8)
        self.fault("stage", "after")
        return str(number)

    def _activate(self, target: Target, entry: Entry, expected: str) -> str:
        self.fault("activate", "before")
        with self._guard:
            shelf = self._shelf(target)
            shown = shelf.copies.get(shelf.shown, {})
            if shown.get(target.keys.version) == entry.version_id:
                number = shelf.shown
            elif shelf.staged and shelf.staged[0] == entry.version_id:
                self._compare(shelf, expected)
                number = shelf.staged[1]
            else:
                number = self._place(target, shelf, entry, expected)
            self._show(shelf, number)
        self.fault("activate", "after")
        return str(number)

    def _retire(self, target: Target, version_id: str, locator: str, how: str) -> None:
        if not self.options.keeps_versions:
            return super()._retire(target, version_id, locator, how)
        self.fault("retire", "before")
        with self._guard:
            shelf = self._shelf(target)
            if int(locator) == shelf.shown:
                raise Rejected("that copy is the one shown")
            shelf.disabled.add(int(locator))
            if how == "destroy":
                shelf.copies.pop(int(locator), None)
        self.fault("retire", "after")
        return None

    # --- inside -----------------------------------------------------------------------------

    def _shelf(self, target: Target) -> _Shelf:
        return self._shelves.setdefault(self.place(target), _Shelf())

    def _place(self, target: Target, shelf: _Shelf, entry: Entry, expected: str) -> int:
        """Add a copy, unless this version has one; only what may be replaced is replaced."""
        for number, values in shelf.copies.items():
            if values.get(target.keys.version) == entry.version_id:
                return number
        self._compare(shelf, expected)
        shown = shelf.copies.get(shelf.shown, {})
        refuse_foreign(target, shown, owner=shelf.owner, store_id=self.store_id)
        shelf.owner = entry.owner
        return self._add(shelf, merged(target, shown, entry))

    def _compare(self, shelf: _Shelf, expected: str) -> None:
        if self.options.has_cas and expected != str(shelf.shown):
            raise Conflict

    def _add(self, shelf: _Shelf, values: Values) -> int:
        number = max(shelf.copies, default=0) + 1
        shelf.copies[number] = values
        return number

    def _show(self, shelf: _Shelf, number: int) -> None:
        if shelf.staged and shelf.staged[1] == number:
            shelf.staged = None
        shelf.shown = number


def _observed(keys: Keys, shelf: _Shelf, number: int) -> Observed:
    values = shelf.copies.get(number, {})
    staged = shelf.staged[0] if shelf.staged else None
    locator = str(number) if number else ""
    found = observed(
        keys, values if number else None, owner=shelf.owner, token=str(shelf.shown), locator=locator
    )
    return replace(found, staged=staged)
