"""Serves a store over HTTP in a process of its own: `python -m support.http_process FOLDER`.

Prints its port, and ends with its input.
"""

from __future__ import annotations

import sys
from pathlib import Path

from keyturn.verifier.decision import Verifier
from keyturn.verifier.hashing import CHEAP_FOR_TESTS, Hashing
from support.http_verifier import serve
from support.stores import RealClock


def main() -> None:
    """Serve until the input ends."""
    folder = Path(sys.argv[1])
    hashing = Hashing(cost=CHEAP_FOR_TESTS)
    verifier = Verifier.open(
        f"sqlite:///{folder}/keyturn.db", state_dir=folder, clock=RealClock(), hashing=hashing
    )
    with serve(verifier) as (port, _desk, _server):
        print(port, flush=True)
        sys.stdin.read()
    verifier.close()


if __name__ == "__main__":
    main()
