"""Whether an ended version's secret was presented in full, found beside the answers.

SECURITY: version ids are public, so a known old id is no event: only a text whose tag and hash both
match is one. The answer compares one tag as it always does; whatever comes after is done here, by one
thread with a hash permit of its own that works a tenth of its time, at most once a minute for each
version. What does not fit into its short queue is dropped and counted: no stranger makes it grow.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import NamedTuple

from keyturn.core.model import VersionState
from keyturn.core.secret import Secret
from keyturn.storage.decisions import Decision
from keyturn.verifier.gate import Gate
from keyturn.verifier.hashing import Hashing, same_tag
from keyturn.verifier.keyring import KeyRing
from keyturn.verifier.recent import keep
from keyturn.verifier.schemes import Schemes, Stored

QUEUE = 32
KEPT = 4096  # versions of which row and minute are kept
SHARE = 0.1  # of a core, at most
ENDED = frozenset({VersionState.RETIRED, VersionState.REVOKED})

Lookup = Callable[[str], Decision | None]


class _Shown(NamedTuple):
    version_id: str
    row: Decision | None
    secret: Secret


class Tombstones:
    """Looks at presented secrets of ended versions. Thread-safe; nothing an answer calls waits.

    `found` is told of each that was proven: version and state.
    """

    def __init__(
        self,
        boottime: Callable[[], timedelta],
        *,
        hashing: Hashing | None = None,
        room: int = QUEUE,
        share: float = SHARE,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._boottime = boottime
        self.ring: Callable[[], KeyRing] = KeyRing
        hashing = hashing or Hashing(gate=Gate(1, queue=None))
        self._schemes = Schemes(hashing=hashing, ring=self._keys)
        self._share = share
        self._timer = timer
        self._queue: queue.Queue[_Shown] = queue.Queue(room)
        self._rows: OrderedDict[str, Decision] = OrderedDict()
        self._minutes: OrderedDict[str, int] = OrderedDict()
        self._starting = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.dropped = 0
        self.lookup: Lookup = lambda _version_id: None
        self.found: Callable[[str, str], None] = lambda _version_id, _state: None

    def _keys(self) -> KeyRing:
        return self.ring()

    def presented(self, row: Decision, secret: Secret) -> None:
        """Look later at a text whose tag is that of an ended version."""
        self._put(_Shown(row.version_id, row, secret))

    def row(self, version_id: str, secret: Secret) -> Decision | None:
        """Return the row of a version that the spool refuses; the first one who asks makes it known.

        SECURITY: an answer must not ask the store for it, which somebody may have locked.
        """
        known = self._rows.get(version_id)
        if known is None:
            self._put(_Shown(version_id, None, secret))
        return known

    def is_idle(self) -> bool:
        """Whether everything that was handed over has been looked at."""
        return not self._queue.unfinished_tasks

    def close(self) -> None:
        """End the thread; what it has not looked at is dropped."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _put(self, shown: _Shown) -> None:
        try:
            self._queue.put_nowait(shown)
        except queue.Full:
            self.dropped += 1
            return
        if self._thread is None:
            with self._starting:
                if self._thread is None and not self._stop.is_set():
                    self._thread = threading.Thread(
                        target=self._run, name="tombstones", daemon=True
                    )
                    self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                shown = self._queue.get(timeout=0.5)
            except queue.Empty:
                continue
            began = self._timer()
            try:
                self._look(shown)
            except Exception:  # noqa: BLE001  # loop top: the next one is looked at all the same
                self.dropped += 1
            self._queue.task_done()
            self._stop.wait((self._timer() - began) * (1 / self._share - 1))

    def _look(self, shown: _Shown) -> None:
        row = shown.row or self._learn(shown.version_id)
        if row is None or not row.tag or row.state not in ENDED:
            return
        minute = self._boottime() // timedelta(minutes=1)
        if self._minutes.get(row.version_id) == minute:
            return
        if not same_tag(row.tag, row.version_id, shown.secret):
            return
        keep(self._minutes, row.version_id, minute, most=KEPT)
        if self._schemes.matches(Stored.of(row), shown.secret):
            self.found(row.version_id, str(row.state))

    def _learn(self, version_id: str) -> Decision | None:
        known = self._rows.get(version_id)
        if known is None and (known := self.lookup(version_id)) is not None:
            known = replace(known, state=VersionState.REVOKED)  # whatever the store knows yet
            keep(self._rows, version_id, known, most=KEPT)
        return known
