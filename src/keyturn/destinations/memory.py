"""A destination in this process: it stages, compares and keeps versions, or whatever it is told to.

It proves the saga's every path, and is held to the same contract as the real ones. `fault` is called
before and after each effect, outside of the lock, so a test can make it fail, lose an answer (raise
after) or stall (wait on an event).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from keyturn.core.model import Keys, Target, Traits
from keyturn.destinations.base import ConnectionOptions, DestinationBase
from keyturn.destinations.entry import merged, observed, refuse_foreign, without_ours
from keyturn.errors import Conflict, Rejected
from keyturn.ports import Clock, Entry, Observed

_NUMBERS = count()
Fault = Callable[[str, str], None]  # (operation, "before" | "after")
Values = dict[str, Any]
FOREIGN = ""  # what `Observed.staged` says where somebody else has staged


class MemoryOptions(ConnectionOptions):
    """Which kind of store it plays."""

    can_stage: bool = True
    has_cas: bool = True
    keeps_versions: bool = True


@dataclass(slots=True)
class _Shelf:
    """One entry: its copies by number, which one is shown, what is staged, whose it is."""

    copies: dict[int, Values] = field(default_factory=dict)
    last: int = 0
    shown: int = 0
    staged: tuple[str, int] | None = None
    owner: str | None = None
    disabled: set[int] = field(default_factory=set)


class MemoryStore:
    """What several connections to one place share."""

    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.shelves: dict[str, _Shelf] = {}
        self.number = next(_NUMBERS)


class MemoryDestination(DestinationBase):
    """Entries in a dictionary."""

    Options = MemoryOptions

    def __init__(
        self,
        options: Any,
        *,
        name: str,
        store_id: str,
        clock: Clock,
        store: MemoryStore | None = None,
    ) -> None:
        super().__init__(options, name=name, store_id=store_id, clock=clock)
        self.fault: Fault = lambda _operation, _moment: None
        self.store = store or MemoryStore()

    @property
    def traits(self) -> Traits:
        """What its options say."""
        return Traits(
            can_stage=self.options.can_stage,
            has_cas=self.options.has_cas,
            keeps_versions=self.options.keeps_versions,
            call_deadline=self.options.call_deadline,
        )

    # --- what an agent, or somebody else, does ------------------------------------------------

    def raw_get(self, target: Target) -> Values | None:
        """Return what an agent reads, bypassing the port."""
        with self.store.guard:
            shelf = self._shelf(target)
            return dict(shelf.copies[shelf.shown]) if shelf.shown in shelf.copies else None

    def raw_put(self, target: Target, values: Mapping[str, Any]) -> None:
        """Edit from outside."""
        with self.store.guard:
            shelf = self._shelf(target)
            self._show(shelf, self._add(shelf, dict(values)))

    def raw_delete(self, target: Target) -> None:
        """Remove what agents read, from outside; the owner marker stays, as in most stores."""
        with self.store.guard:
            shelf = self._shelf(target)
            shelf.last += 1
            shelf.shown = shelf.last

    def raw_stage(self, target: Target, values: Mapping[str, Any]) -> None:
        """Stage as somebody else who uses the same label."""
        with self.store.guard:
            shelf = self._shelf(target)
            shelf.staged = (FOREIGN, self._add(shelf, dict(values)))

    def disabled(self, target: Target, locator: str) -> bool:
        """Tell whether a copy was retired."""
        with self.store.guard:
            return int(locator) in self._shelf(target).disabled

    # --- the port ---------------------------------------------------------------------------

    def identity(self, target: Target) -> str:
        """Return which memory, and the path in it."""
        return f"memory:{self.store.number}/{self.place(target)}"

    def _probe(self) -> str:
        self.fault("probe", "before")
        return "in memory"

    def _observe(self, target: Target) -> Observed:
        self.fault("observe", "before")
        with self.store.guard:
            shelf = self._shelf(target)
            return self._seen(target.keys, shelf, shelf.shown)

    def _read(self, target: Target, version_id: str) -> Observed:
        self.fault("read", "before")
        with self.store.guard:
            shelf = self._shelf(target)
            number = self._find(shelf, target.keys, version_id)
            return self._seen(target.keys, shelf, number)

    def _stage(self, target: Target, entry: Entry, expected: str) -> str:
        if not self.options.can_stage:
            return super()._stage(target, entry, expected)
        self.fault("stage", "before")
        with self.store.guard:
            shelf = self._shelf(target)
            if shelf.staged and shelf.staged[0] == FOREIGN:
                raise Conflict  # never stolen
            number = self._place(target, shelf, entry, expected)
            shelf.staged = (entry.version_id, number)
            if shelf.shown not in shelf.copies:
                self._show(shelf, number)  # like AWS: a first value is shown at once (rule 8)
        self.fault("stage", "after")
        return self._locator(number)

    def _activate(self, target: Target, entry: Entry, expected: str) -> str:
        self.fault("activate", "before")
        with self.store.guard:
            shelf = self._shelf(target)
            number = self._place(target, shelf, entry, expected)
            if number != shelf.shown:
                self._compare(shelf, expected)
                self._show(shelf, number)
        self.fault("activate", "after")
        return self._locator(number)

    def _withdraw(self, target: Target, owner: str, version_id: str, expected: str) -> str:
        self.fault("withdraw", "before")
        with self.store.guard:
            shelf = self._shelf(target)
            shown = shelf.copies.get(shelf.shown, {})
            left = without_ours(
                target, shown, marked=shelf.owner, owner=owner, version_id=version_id
            )
            if left is not None:
                self._compare(shelf, expected)
                self._show(shelf, self._add(shelf, left))
            locator = self._locator(shelf.shown) if shelf.shown in shelf.copies else ""
        self.fault("withdraw", "after")
        return locator

    def _retire(self, target: Target, version_id: str, locator: str, how: str) -> None:
        if not self.options.keeps_versions:
            return super()._retire(target, version_id, locator, how)
        self.fault("retire", "before")
        with self.store.guard:
            self._put_away(self._shelf(target), target.keys, version_id, int(locator), how)
        self.fault("retire", "after")
        return None

    # --- inside -----------------------------------------------------------------------------

    def _shelf(self, target: Target) -> _Shelf:
        return self.store.shelves.setdefault(self.place(target), _Shelf())

    def _place(self, target: Target, shelf: _Shelf, entry: Entry, expected: str) -> int:
        """Add a copy, unless these very values are there; only what may be replaced is replaced."""
        shown = shelf.copies.get(shelf.shown, {})
        wanted = merged(target, shown, entry)
        number = self._find(shelf, target.keys, entry.version_id)
        if number and shelf.copies[number] == wanted and shelf.owner == entry.owner:
            return number
        self._compare(shelf, expected)
        refuse_foreign(target, shown, owner=shelf.owner, store_id=self.store_id)
        shelf.owner = entry.owner
        return self._add(shelf, wanted)

    def _find(self, shelf: _Shelf, keys: Keys, version_id: str) -> int:
        """Return the newest readable copy that says it is this version; 0 if there is none."""
        found = (
            number
            for number, values in shelf.copies.items()
            if values.get(keys.version) == version_id and number not in shelf.disabled
        )
        return max(found, default=0)

    def _compare(self, shelf: _Shelf, expected: str) -> None:
        if self.options.has_cas and expected != str(shelf.shown):
            raise Conflict

    def _add(self, shelf: _Shelf, values: Values) -> int:
        shelf.last += 1  # a number is never used again, or an old token would come true
        shelf.copies[shelf.last] = values
        return shelf.last

    def _show(self, shelf: _Shelf, number: int) -> None:
        if shelf.staged and shelf.staged[1] == number:
            shelf.staged = None
        if not self.options.keeps_versions:
            shelf.copies.pop(shelf.shown, None)
        shelf.shown = number

    def _put_away(self, shelf: _Shelf, keys: Keys, version_id: str, number: int, how: str) -> None:
        if number == shelf.shown:
            raise Rejected("that copy is the one shown")
        values = shelf.copies.get(number)
        if values is not None and values.get(keys.version) != version_id:
            raise Rejected("that copy is another version")
        if shelf.staged == (version_id, number):
            shelf.staged = None
        shelf.disabled.add(number)
        if how == "destroy":
            shelf.copies.pop(number, None)

    def _locator(self, number: int) -> str:
        return str(number) if self.options.keeps_versions else ""

    def _seen(self, keys: Keys, shelf: _Shelf, number: int) -> Observed:
        values = shelf.copies.get(number)
        locator = self._locator(number) if values is not None else ""
        staged = shelf.staged[0] if shelf.staged else None
        found = observed(keys, values, owner=shelf.owner, token=str(shelf.shown), locator=locator)
        return replace(found, staged=staged)
