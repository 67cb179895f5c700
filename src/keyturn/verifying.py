"""How a verifier is put together: the one place that knows its parts, for services and commands.

No destination is opened here, and no login to one is read.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress

from keyturn import __version__
from keyturn.config import Settings
from keyturn.core.timekeeping import Anchor
from keyturn.errors import StoreUnavailable
from keyturn.storage.decisions import DecisionReader
from keyturn.storage.engine import is_sqlite, sqlite_path
from keyturn.storage.freshness import SharedFile
from keyturn.storage.leases import Leased, Leasing
from keyturn.verifier.decision import Verifier
from keyturn.verifier.gate import Gate
from keyturn.verifier.hashing import Hashing
from keyturn.verifier.spool import Spool
from keyturn.verifier.usage import Usage
from keyturn.wiring import GuardedClock, SystemClock, boot_id, password_of, ring_of


def leasing_of(settings: Settings) -> Leasing:
    """Return how this process registers as a verifier that remembers, on PostgreSQL."""
    return Leasing(
        id=secrets.token_hex(16),
        host=os.uname().nodename,
        release=__version__,
        lease=settings.verifier.lease,
        poll=settings.verifier.poll,
    )


def open_usage(settings: Settings) -> Usage:
    """Begin to count what a verifier of these settings answers; to be closed before that."""
    folder, password = settings.store.folder, password_of(settings)
    return Usage.open(settings.store.url, state_dir=folder, clock=SystemClock(), password=password)


def open_verifier(
    settings: Settings, *, serving: bool = False, usage: Usage | None = None
) -> Verifier:
    """Open the verifier of these settings; one that is `serving` remembers what it has proven.

    It starts from the time that the daemon goes by: a clock that jumped refuses nobody early.
    """
    this_boot, password = boot_id(), password_of(settings)
    reader = DecisionReader.open(settings.store.url, password=password)

    def learn() -> Anchor | None:
        with suppress(StoreUnavailable):
            return reader.anchor(this_boot)
        return None

    here = is_sqlite(settings.store.url)
    spool = Spool(settings.store.folder / "revoked.d", required=here)
    gate = Gate(os.cpu_count() or 1, memory_kib=settings.verifier.hash_memory_kib)
    hashing, ring = Hashing(gate=gate), ring_of(settings)
    if serving and not here:
        leased = Leased.open(settings.store.url, leasing_of(settings), password=password)
        return Verifier(
            reader, spool, leased, freshness=leased, hashing=hashing, ring=ring, usage=usage
        )
    clock = GuardedClock(SystemClock(), boot_id=this_boot, learn=learn)
    clock.anchor = learn()
    freshness = SharedFile(sqlite_path(settings.store.url)) if serving else None
    return Verifier(
        reader, spool, clock, freshness=freshness, hashing=hashing, ring=ring, usage=usage
    )
