"""Serves a store over HTTP in a process of its own: `python -m support.http_process FOLDER`.

Prints its port, and ends with its input; then it says as JSON what it counted, and how many hashes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from keyturn.verifier.decision import Verifier
from support.http_verifier import Counted, serve
from support.stores import RealClock


def main() -> None:
    """Serve until the input ends."""
    folder = Path(sys.argv[1])
    hashing = Counted()
    verifier = Verifier.open(
        f"sqlite:///{folder}/keyturn.db", state_dir=folder, clock=RealClock(), hashing=hashing
    )
    with serve(verifier) as (port, _desk, _server):
        print(port, flush=True)
        sys.stdin.read()
    verifier.close()
    print(json.dumps({**verifier.counts, "hashes": len(hashing.checked)}), flush=True)


if __name__ == "__main__":
    main()
