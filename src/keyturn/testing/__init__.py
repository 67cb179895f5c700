"""Shipped for authors of adapters: the contract suite and the fakes that pass it.

    from keyturn.testing.contract import DestinationContract   # needs pytest
    from keyturn.testing import FakeClock, Scanner, canary, leaks

The fake of a destination is `keyturn.destinations.memory`.
"""

from keyturn.testing.canary import Scanner, canary, leaks
from keyturn.testing.fakes import FakeClock, seeded

__all__ = ["FakeClock", "Scanner", "canary", "leaks", "seeded"]
