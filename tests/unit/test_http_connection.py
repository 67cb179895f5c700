"""What a connection holds, and for how long."""

from __future__ import annotations

import asyncio
from typing import cast

from keyturn.verifier.http.callers import Callers
from keyturn.verifier.http.connection import Connection, Registry
from keyturn.verifier.http.desk import Desk


def test_who_hangs_up_at_the_end_of_a_handshake_takes_no_place() -> None:
    """The loop tells of the end first then, and nobody else would be let go for a place that is held."""
    registry = Registry(most=4)

    async def hang_up() -> None:
        one = Connection(cast("Desk", None), registry, Callers([]))
        one.connection_lost(None)
        one.connection_made(asyncio.Transport())

    asyncio.run(hang_up())
    assert len(registry) == 0
