"""How long a verifier may answer by what it heard last, and how long others wait for it (ADR 27)."""

from __future__ import annotations

from datetime import timedelta

SHORTEST, LONGEST = timedelta(seconds=1), timedelta(minutes=5)  # the table has this limit as well
OFTENEST = timedelta(milliseconds=20)  # polls
# By how much two clocks may differ: chrony slews each by up to 8.3 % (chrony.conf, maxslewrate).
DRIFT = 0.2


def allowance(lease: timedelta) -> float:
    """Return the seconds after which a lease has run out for sure, whosever clock it is counted by."""
    return lease.total_seconds() * (1 + DRIFT)
