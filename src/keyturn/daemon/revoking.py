"""Revocations that nobody typed: the spool, the revocations file, the `revocations:` of the main file.

Each line refuses on this host before the store is asked, so that no lock keeps one from working.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

import structlog

from keyturn.config.file import read_trusted
from keyturn.core.revocations import RevocationEntry, parse_revocations
from keyturn.daemon.metrics import Metrics
from keyturn.errors import ConfigError, KeyturnError, StoreUnavailable
from keyturn.leaks import Caller, Leak
from keyturn.wiring import Parts

POLL = 2.0  # seconds
PATIENCE = 10.0  # seconds for lines whose rows the store does not take

_log = structlog.get_logger(__name__)


class Revoking:
    """Applies each line once. Thread-safe."""

    def __init__(self, parts: Parts, metrics: Metrics, kick: Callable[[], None]) -> None:
        self._parts, self._metrics, self._kick = parts, metrics, kick
        self._busy = threading.Lock()
        self._applied: set[RevocationEntry] = set()
        self._counted: set[RevocationEntry] = set()
        self._problems: tuple[tuple[str, str], ...] = ()

    def apply(self) -> None:
        """Apply the spool and the revocations file (SIGUSR1, and polled)."""
        entries = self.read_file()
        self._refuse_first(entries, trigger="file")
        if not self._busy.acquire(blocking=False):
            return  # it refuses already, and whoever waits for the store now writes the rest
        try:
            # Each for itself: a lock that keeps the one from the store must not veto the other.
            steps: tuple[Callable[[], None], ...] = (
                lambda: self.apply_entries(entries, trigger="file"),
                self.apply_inline,
                self._apply_spool,
            )
            for apply in steps:
                try:
                    apply()
                except StoreUnavailable as error:
                    _log.error("revocations.incomplete", code=error.code)
        finally:
            self._busy.release()

    def _apply_spool(self) -> None:
        self._parts.administration.apply_spool(Caller(name="daemon", trigger="spool"))

    def apply_spool_alone(self) -> None:
        """Apply the spool before there is a poll: no tombstone keeps a daemon from its start."""
        try:
            self._apply_spool()
        except KeyturnError as error:
            _log.error("revocations.incomplete", code=error.code)

    def poll(self) -> None:
        """Apply all of it, whatever happens."""
        try:
            self.apply()
        except Exception:  # noqa: BLE001  # loop top: a broken file must not end the polling
            _log.error("revocations.failed", exc_info=True)

    def read_file(self) -> tuple[RevocationEntry, ...]:
        """Return the lines of the file that can be applied, and say once what is wrong with others."""
        path = self._parts.settings.revocations_file
        if path is None:
            return ()
        entries: tuple[RevocationEntry, ...] = ()
        try:
            entries, found = parse_revocations(read_trusted(path), now=self._parts.clock.now())
            problems = tuple((f"{one.line}: {one.text}", "") for one in found)
        except FileNotFoundError:
            problems = ()
        except OSError as error:
            problems = ((f"cannot be read (errno {error.errno}): no line is applied", ""),)
        except ConfigError as error:
            problems = ((str(error), error.hint),)
        self._metrics.revocations_file_problems.set(len(problems))
        if problems != self._problems:
            self._problems = problems
            for text, hint in problems:
                _log.error("revocations.problem", path=str(path), problem=text, hint=hint)
        return entries

    def apply_inline(self) -> None:
        """Apply what the settings hold."""
        self.apply_entries(self._parts.settings.revocations, trigger="reload")

    def _new(self, entries: Iterable[RevocationEntry]) -> list[RevocationEntry]:
        return [entry for entry in entries if entry not in self._applied]

    def _refuse_first(self, entries: Iterable[RevocationEntry], *, trigger: str) -> None:
        """Refuse here what the lines name; a lock on the store makes none wait for another."""
        caller = Caller(name=trigger, trigger=trigger)
        leaks = [(_leak(entry), caller) for entry in self._new(entries)]
        self._parts.administration.refuse_first(leaks)

    def apply_entries(self, entries: Iterable[RevocationEntry], *, trigger: str) -> None:
        """Apply lines, each one once. Raises StoreUnavailable where it did not take all of them."""
        self._refuse_first(entries, trigger=trigger)
        began, trouble = time.monotonic(), None
        for entry in self._new(entries):
            try:
                if self._apply_entry(entry, trigger):
                    self._applied.add(entry)
                    continue
            except StoreUnavailable as error:
                trouble = error
            if time.monotonic() - began > PATIENCE:
                break  # the store takes none of them now: they are tried again by the next poll
        if trouble is not None:
            raise trouble

    def _apply_entry(self, entry: RevocationEntry, trigger: str) -> bool:
        """Apply one line; True where it needs no second look."""
        leak = _leak(entry)
        try:
            result = self._parts.administration.revoke(leak, Caller(name=trigger, trigger=trigger))
        except StoreUnavailable:
            raise
        except KeyturnError as error:
            _log.error("revocations.no-match", target=leak.target, code=error.code)
            return True
        if result["versions"]:
            if entry not in self._counted:
                self._counted.add(entry)
                self._parts.note_revocation(result, trigger=trigger)
        else:
            _log.info("revocations.nothing-left", target=leak.target)
        self._kick()
        return not result["incomplete"]


def _leak(entry: RevocationEntry) -> Leak:
    return Leak(
        agent=entry.agent,
        version=entry.version_id,
        reissue=entry.reissue,
        reason=entry.reason,
        at=entry.at,
    )
