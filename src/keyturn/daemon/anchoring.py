"""The daemon's side of the audit's anchors: hourly, at the start and at the end; and a slow verification.

All of it runs beside the work: in jobs of the scheduler, in slices of a few milliseconds.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import structlog

from keyturn.anchor_file import NO_ANCHOR, AnchorFile, Quote, read_anchors
from keyturn.daemon.metrics import Metrics
from keyturn.daemon.peer import Peer, Role
from keyturn.daemon.socket import Command, Progress
from keyturn.errors import Refused, StorageError
from keyturn.storage import anchors, audit
from keyturn.wiring import Parts

EVERY = 3600.0  # seconds between two anchors
LOOK = 30.0  # seconds between two looks of the verification
SLICES = 10  # of `audit.SLICE` entries in one look: 10,000 entries a minute
LOGGED = 50  # heads in a line of the log; all of them are in the file
PATIENCE = 3.0  # seconds that SIGTERM waits for the last anchor: its disk may be another host's

_log = structlog.get_logger(__name__)


class Anchoring:
    """Anchors and verifies. Nothing here raises."""

    def __init__(self, parts: Parts, metrics: Metrics, incident: Callable[[str], None]) -> None:
        self._parts = parts
        self._metrics = metrics
        self._incident = incident
        self._guard = threading.Lock()
        self._file: AnchorFile | None = None
        self._verified: audit.Heads = {}
        self._broken = False
        metrics.audit_verified.set(1)

    # --- anchors ----------------------------------------------------------------------------

    def start(self) -> None:
        """Compare the audit with the file, which may know more than a store that was put back."""
        path = self._parts.settings.anchor_file
        # A pipe would keep us from our start for ever; the append says that it is no plain file.
        if path is not None and os.path.isfile(path):  # noqa: PTH113 - it never raises
            try:
                found = read_anchors(path)
                wrong = anchors.unmet(self._parts.store.database.read, found.quotes)
                if strangers := found.stores - {self._parts.store.store_id, "None"}:
                    wrong.append(f"{path} has anchors of another store ({min(strangers)})")
            except StorageError as error:
                _log.error("audit.not-compared", code=error.code, problem=str(error))
            else:
                # An empty one was made for us, with the attributes that it shall have.
                self._break(wrong + [one for one in found.problems if one != NO_ANCHOR])
        self.anchor("start")

    def hourly(self) -> None:
        """Write the anchor of this hour."""
        self.anchor("hourly")

    def stop(self) -> None:
        """Write the last anchor, if that does not take long."""
        last = threading.Thread(target=self.anchor, args=["stop"], name="anchor", daemon=True)
        last.start()
        last.join(PATIENCE)

    def anchor(self, why: str) -> None:
        """Quote the heads in the audit, in the log and in the operator's file."""
        with self._guard:
            try:
                heads = self._parts.store.anchor_audit(why=why)
                at = self._parts.store.now()
            except StorageError as error:
                _log.error("audit.not-anchored", code=error.code, hint=error.hint)
                return
            self._say(heads, why)
            path = self._parts.settings.anchor_file
            if path is not None:
                try:
                    self._file_at(path).append(
                        heads,
                        store_id=self._parts.store.store_id,
                        writer=self._parts.store.writer,
                        why=why,
                        at=at,
                    )
                except StorageError as error:
                    _log.error("audit.not-anchored", problem=str(error), hint=error.hint)
                    return
            self._metrics.audit_anchor.set(at.timestamp())

    def _say(self, heads: audit.Heads, why: str) -> None:
        """Log the heads of this process, which have moved; a log elsewhere is an anchor too."""
        mine = {c: list(h) for c, h in heads.items() if c.startswith(self._parts.store.writer)}
        shown = dict(sorted(mine.items())[:LOGGED])
        _log.info(
            "audit.anchor",
            why=why,
            store=self._parts.store.store_id,
            chains=len(heads),
            heads=json.dumps(shown),
        )

    def _file_at(self, path: Path) -> AnchorFile:
        if self._file is None or self._file.path != path:
            self._file = AnchorFile(path)
        return self._file

    # --- verification -----------------------------------------------------------------------

    def look(self) -> None:
        """Go on verifying: what is new first, then what is older than this process."""
        try:
            self._look()
        except StorageError as error:
            _log.warning("store.unavailable", code=error.code)

    def _look(self) -> None:
        read, left = self._parts.store.database.read, SLICES
        heads = audit.ends(read)
        gone = [
            f"{chain}: the whole chain is gone" for chain in self._verified.keys() - heads.keys()
        ]
        self._break(gone)
        mine = self._parts.store.writer
        for chain in sorted(heads, key=lambda chain: not chain.startswith(mine)):
            while left and not self._broken and heads[chain] != self._at(chain):
                left -= 1
                before = self._at(chain)
                self._verified[chain], wrong = audit.follow(read, chain, before)
                self._break([wrong] if wrong else [])
                if self._verified[chain][0] >= heads[chain][0]:
                    break

    def _at(self, chain: str) -> audit.Head:
        return self._verified.get(chain, (0, audit.START))

    def _break(self, wrong: list[str]) -> None:
        """Say once that the audit is broken; it stays so until a person has looked."""
        if not wrong or self._broken:
            return
        self._broken = True
        self._metrics.audit_verified.set(0)
        hint = "`keyturn audit --verify --anchor FILE` shows what is wrong; keep the store as it is"
        _log.error("audit.broken", problem=wrong[0], problems=len(wrong), hint=hint)
        self._incident("audit-broken")


class AnchorCommands:
    """What the admin socket can be asked about anchors."""

    def __init__(self, parts: Callable[[], Parts]) -> None:
        self._parts = parts

    def table(self) -> Mapping[str, Command]:
        """Return every command with the least role that it needs."""
        return {"audit.quoted": Command(role=Role.VIEW, function=self.quoted)}

    def quoted(self, args: dict[str, Any], peer: Peer, progress: Progress) -> Any:
        """Compare heads that somebody kept with the audit."""
        del peer, progress
        store = self._parts().store
        try:
            quotes = {Quote(str(c), int(n), str(h), str(at)) for c, n, h, at in args["heads"]}
        except (KeyError, TypeError, ValueError):
            raise Refused("the command needs heads") from None
        return {"store": store.store_id, "problems": anchors.unmet(store.database.read, quotes)}
