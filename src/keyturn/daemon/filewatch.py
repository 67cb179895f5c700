"""Notices that the configuration's files changed, and has them read again.

A change counts once two looks in a row have seen the same: whoever writes a file in several pieces,
or several files one after the other, is given the time between two looks. What was refused is not
tried again until the files change once more.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from keyturn.config import Settings
from keyturn.config.generation import Generation
from keyturn.errors import KeyturnError

POLL = 2.0  # seconds between two looks

_log = structlog.get_logger(__name__)


class FileWatch:
    """Looks at the files of the settings in force. One thread at a time."""

    def __init__(self, settings: Callable[[], Settings], reload: Callable[[], object]) -> None:
        self._settings = settings
        self._reload = reload
        self._last: Generation | None = None
        self._refused: Generation | None = None

    def look(self) -> None:
        """Reload where the files changed and are still; errors go to the log."""
        settings = self._settings()
        if not settings.reload.on_change:
            return
        now = settings.generation.again()
        is_still, self._last = now == self._last, now
        if now in (settings.generation, self._refused) or not is_still:
            return
        _log.info("config.changed", files=len(now.files))
        try:
            self._reload()
        except KeyturnError as error:
            if not error.retryable:  # the store will be back; a wrong line stays wrong
                self._refused = now
            for line in str(error).splitlines():
                _log.error("config.rejected", problem=line, hint=error.hint)
