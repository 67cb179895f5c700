"""Counts in a process of its own: `python -m support.counting STATE_FOLDER SOURCE NUMBER [hold]`.

It counts NUMBER uses and as many refusals, writes them down, and says `flushed`. With `hold` it counts
half as many again, says `more`, and waits to be killed; else it ends as a verifier does.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from keyturn.storage.usage import UsageRecords
from keyturn.verifier.decision import Verified
from keyturn.verifier.usage import Usage
from support.stores import RealClock

ONE = "A" * 14
YES = Verified(agent="a", login="a", version_id=ONE, state="current", deadline=None)


def count(usage: Usage, number: int) -> None:
    """Count as many of both."""
    for _ in range(number):
        usage.accepted(YES)
        usage.failed("refused")


def main() -> None:
    """Do what the arguments say."""
    folder, source, number, *how = sys.argv[1:]
    records = UsageRecords.open("sqlite:///", state_dir=Path(folder), clock=RealClock())
    usage = Usage(records, RealClock(), source=source)
    usage.start()
    count(usage, int(number))
    while not usage.flush():
        pass
    print("flushed", flush=True)
    if how:
        count(usage, int(number) // 2)
        print("more", flush=True)
        time.sleep(600)
    usage.close()


if __name__ == "__main__":
    main()
