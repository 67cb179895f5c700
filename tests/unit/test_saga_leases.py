"""A rotation and the verifiers that remember: none is shown a version that it does not accept yet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from keyturn.core.model import RotationState
from keyturn.storage.tables import meta, verifiers
from keyturn.verifier.authority import BuiltinAuthority
from keyturn.verifier.registered import Registered
from support.bench import Bench
from support.stores import NOW

LEASE = timedelta(seconds=30)


class Seconds:
    """The waiter's clock."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        return self.at


class Watched:
    """A bench at home, with one registered verifier that acknowledges when the test says so."""

    def __init__(self) -> None:
        self.bench = Bench("vault", "azure")
        self.bench.go()
        self.bench.assert_home()
        self.bench.steps.done.clear()
        self.clock = Seconds()
        waiting = Registered(lambda: self.bench.database, clock=self.clock)
        authority = BuiltinAuthority(hashing=self.bench.hashing, registered=waiting)
        self.bench.world = replace(self.bench.world, authority=authority)
        row = {
            "id": "first", "login": "v", "host": "there", "release": "1", "started_at": NOW,
            "lease": LEASE, "incarnation": 1, "epoch": 0, "renewals": 1, "renewed_at": NOW,
        }  # fmt: skip
        self._do(sa.insert(verifiers).values(**row))

    def _do(self, statement: Any) -> None:
        self.bench.database.write(lambda connection: connection.execute(statement))

    def renew(self, *, hears: bool) -> None:
        """Have the verifier renew its row; only one that hears what comes back knows the epoch."""
        epoch = sa.select(meta.c.epoch).scalar_subquery() if hears else verifiers.c.epoch
        self._do(sa.update(verifiers).values(renewals=verifiers.c.renewals + 1, epoch=epoch))

    def others_move_the_epoch(self) -> None:
        """Somebody else's version changes."""
        self._do(sa.update(meta).values(epoch=meta.c.epoch + 1))

    @property
    def activated(self) -> int:
        """How often an entry was written."""
        return sum(step.startswith("activate") for step in self.bench.steps.done)

    def try_again(self) -> str:
        """Run once more, a second later; return what the rotation waits for, or that it is done."""
        self.bench.clock.advance(timedelta(seconds=2))
        self.bench.run()
        rotation = self.bench.case.rotation
        if rotation is None or rotation.state is RotationState.DONE:
            return "done"
        return str(rotation.waiting.reason) if rotation.waiting else str(rotation.state)


@pytest.fixture
def watched() -> Iterator[Watched]:
    """Give one whose rotation is due."""
    one = Watched()
    one.bench.ask()
    yield one
    one.bench.close()


def test_nothing_is_published_before_the_verifier_has_acknowledged(watched: Watched) -> None:
    """It waits, however often it looks; the acknowledgement lets it go on with the same version."""
    for _ in range(3):
        assert watched.try_again() == "verifiers"
        watched.renew(hears=False)
    assert watched.activated == 0
    minted = len(watched.bench.versions())
    watched.renew(hears=True)
    assert watched.try_again() == "done"
    assert len(watched.bench.versions()) == minted
    assert watched.activated == 2


def test_one_that_renews_and_never_hears_is_waited_for_one_lease(watched: Watched) -> None:
    """Others move the epoch on all the time: that is no reason to begin to wait anew."""
    assert watched.try_again() == "verifiers"
    for _ in range(6):
        watched.clock.at += LEASE.total_seconds() * 0.19
        watched.renew(hears=False)
        watched.others_move_the_epoch()
        assert watched.try_again() == "verifiers"
    watched.clock.at += LEASE.total_seconds() * 0.1
    watched.renew(hears=False)
    assert watched.try_again() == "done"
