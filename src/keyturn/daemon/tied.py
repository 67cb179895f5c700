"""A process that ends with the one that started it, however that one ends."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import MutableMapping

PARENT = "KEYTURN_PARENT"  # the pid of the daemon, for a verifier that it starts
_PR_SET_PDEATHSIG = 1  # prctl(2)


def tie(environ: MutableMapping[str, str]) -> bool:
    """Have the kernel end us with the daemon that started us; tells whether one did.

    KILL and not TERM: who takes over from a killed daemon must find the addresses free. A verifier
    holds nothing that would have to be put in order, and a cut answer is no refusal.
    """
    parent = environ.pop(PARENT, "")
    if not parent.isdecimal():
        return False
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "this process cannot be tied to the daemon")
    if os.getppid() != int(parent):  # it ended before we had asked
        os._exit(0)
    return True
