"""An HTTP answer whose time counts as a whole, from the request to its last byte.

A socket's timeout counts from one piece of an answer to the next, so a server that drips a byte at a
time keeps a call for ever, and with it a thread and whatever lock it holds.
"""

from __future__ import annotations

import http.client
import io
import time
from typing import Any


class _Pieces(io.RawIOBase):
    """A socket's bytes, as long as there is time."""

    def __init__(self, raw: Any, line: Any, until: float) -> None:
        self._raw, self._line, self._until = raw, line, until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._line.settimeout(left)
        found: int | None = self._raw.readinto(buffer)
        return found

    def close(self) -> None:
        super().close()
        self._raw.close()


class BoundedAnswer(http.client.HTTPResponse):
    """An answer that is read in pieces, each of which gets what is left of the time.

    `until` is an instant of `time.monotonic`.
    """

    def __init__(self, line: Any, *more: Any, until: float, **named: Any) -> None:
        super().__init__(line, *more, **named)
        raw = line.makefile("rb", buffering=0)
        self.fp.close()
        self.fp = io.BufferedReader(_Pieces(raw, line, until))
