"""Whether this daemon lives, and whether it is ready: what HTTP, `keyturn health` and systemd say.

live    the due-queue is looked at, or it has not begun yet (a standby, a long start)
ready   it leads, and nothing of `Reason` holds it back

Whatever keeps a daemon from its work calls `hold(Reason.…)` and, when that is over, `release`. All
that shows it (the pages, the command, `keyturn_not_ready`) follows by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from typing import Any

STUCK_AFTER = 120.0  # seconds without a look at the due-queue; a restart is better then


class Reason(StrEnum):
    """Why a daemon is not ready. The values are labels of a metric: words of ours, few of them."""

    STARTING = "starting"
    STANDBY = "standby"
    STOPPING = "stopping"
    STUCK = "stuck"
    STORE_DOWN = "store-down"
    QUARANTINED = "quarantined"
    KEY_MISSING = "key-missing"
    VERIFIER_DOWN = "verifier-down"


TEXTS = {
    Reason.STARTING: "it has not finished its start",
    Reason.STANDBY: "another daemon leads; this one takes over when that one ends",
    Reason.STOPPING: "it was told to stop",
    Reason.STUCK: "the due-queue was not looked at for two minutes: see its log, then restart it",
    Reason.STORE_DOWN: "the store does not answer; it goes on by itself when it does",
    Reason.QUARANTINED: "the store was restored and waits for a person",
    Reason.KEY_MISSING: "accepted versions need a key that is not there",
    Reason.VERIFIER_DOWN: "the verifier beside it does not answer; it is started again: see the log",
}


class Readiness:
    """What keeps this daemon from its work. Thread-safe; nothing here waits or asks anybody."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds that only go on; it may stop while the machine sleeps."""
        self._clock = clock
        self._held = frozenset({Reason.STARTING})
        self._details: dict[Reason, str] = {}
        self._looked_at: float | None = None

    def hold(self, reason: Reason, detail: str = "") -> None:
        """Be not ready for this reason, until it is released; `detail` is put behind its text."""
        self._details[reason] = detail
        self._held |= {reason}

    def release(self, reason: Reason) -> None:
        """Take a reason back; one that was not held is no error."""
        self._held -= {reason}

    def stand_by(self) -> None:
        """Wait for the lead: that is no start, it can take years."""
        self._held = self._held - {Reason.STARTING} | {Reason.STANDBY}

    def take_lead(self) -> None:
        """Begin the start that follows the lead."""
        self._held = self._held - {Reason.STANDBY} | {Reason.STARTING}

    def looked(self, *, store_answers: bool) -> None:
        """Note that the due-queue was just looked at, or would have been if the store answered."""
        self._looked_at = self._clock()
        (self.release if store_answers else self.hold)(Reason.STORE_DOWN)

    @property
    def live(self) -> bool:
        """Whether the daemon does its rounds, or has not begun them."""
        looked_at = self._looked_at
        return looked_at is None or self._clock() - looked_at < STUCK_AFTER

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """Why it is not ready; nothing means that it is."""
        held = self._held if self.live else self._held | {Reason.STUCK}
        return tuple(reason for reason in Reason if reason in held)

    @property
    def ready(self) -> bool:
        """Whether it leads and nothing holds it back."""
        return not self.reasons

    @property
    def leads(self) -> bool:
        """Whether rotations and revocations are this daemon's, as far as it knows."""
        return not self._held & {Reason.STARTING, Reason.STANDBY}

    def describe(self) -> dict[str, Any]:
        """Return all of it as plain JSON values."""
        reasons = self.reasons
        return {
            "live": self.live,
            "ready": not reasons,
            "leads": self.leads,
            "reasons": [{"reason": str(one), "text": self._text(one)} for one in reasons],
        }

    def _text(self, reason: Reason) -> str:
        detail = self._details.get(reason)
        return f"{TEXTS[reason]}: {detail}" if detail else TEXTS[reason]
