"""The writes of one account and region: connections that share a quota share one line of turns."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from keyturn.destinations.base import Timeline
from keyturn.ports import Clock


class Line(Timeline):
    """The writes of one region. Times of another clock cannot be compared with these."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock  # kept, or its id could be another's


_lines: weakref.WeakValueDictionary[tuple[Any, ...], Line] = weakref.WeakValueDictionary()
_guard = threading.Lock()


def line_of(clock: Clock, *key: Any) -> Line:
    """Return the line of a quota, the same one for as long as a connection has it."""
    with _guard:
        return _lines.setdefault((id(clock), *key), Line(clock))
