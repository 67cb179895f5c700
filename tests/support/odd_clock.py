"""A daemon, or a command, on a host whose wall clock is off: `odd_clock FILE ARGUMENT…`.

FILE holds by how many seconds, and may be changed at any time. The product has no switch for this.
"""

from __future__ import annotations

import sys
from datetime import datetime, timedelta
from pathlib import Path

from keyturn import wiring
from keyturn.cli.main import main


class OddClock(wiring.SystemClock):
    """The host's clocks, the wall clock turned by hand."""

    file: Path

    def now(self) -> datetime:
        """Wall time with its error."""
        return super().now() + timedelta(seconds=float(self.file.read_text() or 0))


if __name__ == "__main__":
    OddClock.file = Path(sys.argv[1])
    wiring.SystemClock = OddClock  # type: ignore[misc]
    sys.exit(main(sys.argv[2:]))
