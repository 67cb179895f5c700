"""Waiting for the verifiers after a change that they must know: revoke, suspend and the other verbs."""

from __future__ import annotations

import time
from typing import Any

from keyturn.core.lease import LONGEST, allowance
from keyturn.errors import StoreUnavailable
from keyturn.ports import Authority, Standing

POLL = 0.02  # seconds


def wait(authority: Authority, epoch: int) -> Standing:
    """Return once no verifier that may answer is behind this epoch, which was just committed (I3).

    A store that goes away now is asked again until the longest lease has run out: the change is made.
    """
    began = time.clock_gettime(time.CLOCK_BOOTTIME)
    seen = Standing(settled=False, acknowledged=0, live=0)
    while True:
        over = time.clock_gettime(time.CLOCK_BOOTTIME) - began > allowance(LONGEST)
        try:
            seen = authority.standing(epoch)
        except StoreUnavailable:
            if over:
                return seen
        if seen.settled:
            return seen
        time.sleep(POLL)


def numbers(standing: Standing) -> dict[str, Any]:
    """Return a standing as plain JSON values."""
    return {
        "acknowledged": standing.acknowledged,
        "live": standing.live,
        "silent": list(standing.silent),
    }
