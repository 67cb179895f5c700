"""A verifier's lease and those who wait for it, with clocks and answers that the test decides."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import sqlalchemy as sa

from keyturn import settling
from keyturn.core.model import AgentState, VersionState
from keyturn.core.secret import Secret, mint
from keyturn.daemon.metrics import Metrics
from keyturn.daemon.registered import count
from keyturn.errors import StoreUnavailable, VerificationFailed
from keyturn.ports import Standing
from keyturn.storage.decisions import Decision
from keyturn.storage.freshness import NO_EPOCH, Epoch
from keyturn.storage.leases import Answer, Leased, Leasing
from keyturn.storage.tables import meta, verifiers
from keyturn.storage.verifiers import registered
from keyturn.testing.fakes import seeded
from keyturn.verifier.authority import BuiltinAuthority
from keyturn.verifier.decision import Verifier
from keyturn.verifier.hashing import CHEAP_FOR_TESTS, Hashing, tag
from keyturn.verifier.registered import Registered
from keyturn.verifier.spool import Spool
from keyturn.wiring import Parts
from support.stores import NOW, Place

LEASE = 30.0
HOUR = 3600.0
FIRST, SECOND = Epoch(1, 1), Epoch(1, 2)


class Ticking:
    """A clock that stands where the test puts it."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


class Wire:
    """A link whose answers the test gives, and which notes what was asked."""

    def __init__(self, clock: Ticking) -> None:
        self._clock = clock
        self.epoch = FIRST
        self.now = NOW
        self.asked: list[object] = []
        self.takes = 0.0  # seconds on the way back
        self.cut = False
        self.gone = False

    def register(self) -> None:
        self.asked.append("register")
        self.gone = False

    def renew(self, applied: Epoch) -> Answer | None:
        if self.cut:
            raise StoreUnavailable("cut off")
        self.asked.append(applied)
        if self.gone:
            return None
        answer = Answer(self.epoch, self.now)
        self._clock.at += self.takes
        return answer

    def deregister(self) -> None:
        self.asked.append("deregister")

    def close(self) -> None:
        pass


class Scene:
    """A leased verifier over rows in memory, polled by hand."""

    def __init__(self, folder: Path) -> None:
        self.clock = Ticking()
        self.wire = Wire(self.clock)
        leasing = Leasing(id="one", host="here", release="1", lease=timedelta(seconds=LEASE))
        self.lease = Leased(leasing, self.wire, clock=self.clock)
        version_id, self.secret = mint(random_bytes=seeded(1))
        hashing = Hashing(cost=CHEAP_FOR_TESTS)
        self.values: dict[str, Any] = {
            "agent_uid": "u", "agent_name": "bot", "login": "bot", "agent_state": AgentState.ENABLED,
            "credential_uid": "c", "version_id": version_id, "state": VersionState.CURRENT,
            "scheme": "argon2id", "digest": hashing.digest(self.secret),
            "tag": tag(version_id, self.secret), "deadline": None, "not_after": None, "now": NOW,
            "epoch": FIRST,
        }  # fmt: skip
        self.verifier = Verifier(
            self, Spool(folder / "revoked.d"), self.lease, freshness=self.lease, hashing=hashing
        )

    def lookup(self, version_id: str, login: str = "") -> Decision | None:
        del login
        row = Decision(**self.values)
        return row if version_id == row.version_id else None

    def imported(self, login: str) -> list[Decision]:
        del login
        return []

    def close(self) -> None:
        pass

    def revoke(self) -> None:
        """Revoke in the store: this process has not heard of it."""
        self.values |= {"state": VersionState.REVOKED, "epoch": SECOND}
        self.wire.epoch = SECOND

    def answer(self) -> bool | None:
        """Return yes, no, or None for a 503."""
        try:
            self.verifier.verify("bot", Secret(self.secret.reveal()))
        except VerificationFailed:
            return False
        except StoreUnavailable:
            return None
        return True


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """Give a verifier that has not polled yet."""
    return Scene(tmp_path)


# --- the lease ------------------------------------------------------------------------------


def test_it_registers_first_and_answers_only_after_the_first_poll(scene: Scene) -> None:
    """Before an answer it says 503, and what it asks first is to be registered."""
    assert scene.answer() is None
    assert scene.lease.staleness() == float("inf")
    scene.lease.poll()
    assert scene.wire.asked == ["register", NO_EPOCH]
    assert scene.answer() is True


def test_the_lease_counts_from_the_sending(scene: Scene) -> None:
    """An answer that was long on its way is good for what is left of the lease, or for nothing."""
    scene.wire.takes = LEASE - 1
    scene.lease.poll()
    assert scene.answer() is True
    scene.clock.at += 1
    assert scene.answer() is None
    scene.wire.takes = LEASE
    scene.lease.poll()
    assert scene.answer() is None
    assert scene.lease.staleness() == LEASE


def test_what_was_applied_is_acknowledged_by_a_later_poll(scene: Scene) -> None:
    """The poll that brings an epoch does not acknowledge it; the next one does, and is sent at once."""
    assert scene.lease.poll()
    assert not scene.lease.poll()
    assert scene.answer() is True
    scene.revoke()
    assert scene.answer() is True  # nobody has told it, and nobody was told that it knows
    assert scene.lease.poll()
    assert scene.wire.asked[1:] == [NO_EPOCH, FIRST, FIRST]
    assert scene.answer() is False
    assert not scene.lease.poll()
    assert scene.wire.asked[-1] == SECOND


def test_one_whose_row_is_gone_registers_again(scene: Scene) -> None:
    """An update that hits no row brings no lease; the row is made anew before anything is read."""
    scene.lease.poll()
    scene.wire.gone = True
    sent = scene.clock.at
    scene.clock.at += 1
    assert scene.lease.poll()
    assert scene.lease.staleness() == scene.clock.at - sent
    scene.lease.poll()
    assert scene.wire.asked[-2:] == ["register", FIRST]
    assert scene.lease.staleness() == 0


def test_it_answers_nothing_after_it_was_closed(scene: Scene) -> None:
    """The row goes when no answer can come any more."""
    scene.lease.poll()
    scene.lease.close()
    assert scene.answer() is None
    assert scene.wire.asked[-1] == "deregister"


def test_the_child_of_a_fork_is_stale(scene: Scene) -> None:
    """Its parent acknowledges for itself: what the child remembers, nobody waits for."""
    scene.lease.poll()
    child = os.fork()
    if child == 0:
        os._exit(0 if scene.answer() is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert scene.answer() is True


# --- clocks (security.md, test 14) ----------------------------------------------------------


@pytest.mark.parametrize("gap", [LEASE, 8 * HOUR], ids=["a lease", "eight hours"])
def test_after_a_gap_nothing_is_accepted_before_a_fresh_poll(scene: Scene, gap: float) -> None:
    """Suspended, stopped or cut off for the length of its lease: 503 to all, good and revoked alike."""
    scene.lease.poll()
    assert scene.answer() is True
    scene.revoke()
    scene.clock.at += gap
    scene.wire.cut = True
    assert [scene.answer() for _ in range(1000)] == [None] * 1000
    with pytest.raises(StoreUnavailable):
        scene.lease.poll()
    assert scene.answer() is None
    scene.wire.cut = False
    scene.lease.poll()
    assert scene.answer() is False


def test_a_lease_that_ends_during_a_decision_is_no_yes(scene: Scene) -> None:
    """It is compared before the decision and after it."""
    scene.lease.poll()

    def slow(version_id: str, login: str = "") -> Decision | None:
        scene.clock.at += LEASE
        return Scene.lookup(scene, version_id, login)

    scene.lookup = slow  # type: ignore[method-assign]
    assert scene.answer() is None


@pytest.mark.parametrize("skew", [-HOUR, 0.0, HOUR, 100_000 * HOUR])
def test_deadlines_go_by_the_stores_time_alone(scene: Scene, skew: float) -> None:
    """An hour or a decade off: the deadline is the store's, and so is the time; its clock may stand still."""
    there = NOW + timedelta(seconds=skew)
    deadline = there + timedelta(seconds=10)
    scene.wire.now = there
    scene.values |= {"deadline": deadline, "state": VersionState.PREVIOUS, "now": there}
    scene.lease.poll()
    assert scene.answer() is True
    scene.clock.at += 9
    assert scene.answer() is True
    scene.clock.at += 4  # 13 s by a clock that may be too fast by a fifth
    scene.values["now"] = there + timedelta(seconds=13)
    assert scene.answer() is False


def test_a_deadline_refuses_only_when_it_has_surely_passed(scene: Scene) -> None:
    """The way back of the answer is not counted, and this clock may be the faster one."""
    scene.wire.takes = 5.0
    scene.lease.poll()
    assert scene.lease.now() == NOW
    scene.clock.at += 10
    assert timedelta(seconds=7.9) < scene.lease.now() - NOW < timedelta(seconds=8.1)


def test_what_is_remembered_of_a_store_that_went_back_is_void(scene: Scene) -> None:
    """Epochs that come again, after a failover that lost some, stand for something else."""
    scene.values["epoch"] = scene.wire.epoch = SECOND
    scene.lease.poll()
    assert scene.answer() is True
    scene.wire.epoch = FIRST
    scene.lease.poll()
    scene.wire.epoch = SECOND
    scene.lease.poll()
    scene.values["state"] = VersionState.REVOKED
    assert scene.answer() is False


def test_an_answer_of_a_server_that_is_behind_is_none(scene: Scene) -> None:
    """A row from before the epoch that was acknowledged comes from another server: 503, no yes."""
    scene.wire.epoch = SECOND
    scene.lease.poll()
    assert scene.answer() is None
    scene.values["epoch"] = SECOND
    assert scene.answer() is True


# --- who waits ------------------------------------------------------------------------------


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[Waiting]:
    """Give a store with the row of one verifier that knows epoch 5."""
    place = Place(f"sqlite:///{tmp_path}/keyturn.db", tmp_path)
    yield Waiting(place)
    place.close()


class Waiting:
    """A waiter over a real table, whose clock the test moves."""

    def __init__(self, place: Place) -> None:
        self.database = place.open().database
        self.clock = Ticking()
        self.waiter = Registered(lambda: self.database, clock=self.clock)
        row = {
            "id": "first", "login": "v", "host": "there", "release": "1", "started_at": NOW,
            "lease": timedelta(seconds=LEASE), "incarnation": 1, "epoch": 5, "renewals": 3,
            "renewed_at": NOW,
        }  # fmt: skip
        self.row = row
        self.database.write(lambda c: c.execute(sa.insert(verifiers).values(**row)))

    def renew(self, **more: Any) -> None:
        """Have the verifier renew its row."""
        values = {"renewals": verifiers.c.renewals + 1, **more}
        self.database.write(lambda c: c.execute(sa.update(verifiers).values(**values)))

    def restore(self) -> None:
        """Give the store another life."""
        self.database.write(lambda c: c.execute(sa.update(meta).values(incarnation=2)))

    @property
    def rows(self) -> int:
        """How many are registered."""
        return len(self.database.read(registered).rows)


def test_whoever_has_acknowledged_is_not_waited_for(waiting: Waiting) -> None:
    """An epoch up to the acknowledged one is settled at once, a later one is not."""
    assert waiting.waiter.standing(5).settled
    found = waiting.waiter.standing(6)
    assert (found.settled, found.acknowledged, found.live) == (False, 0, 1)
    assert found.silent == ("there/first",)
    waiting.renew(epoch=6)
    assert waiting.waiter.standing(6).settled


def test_what_was_acknowledged_in_a_former_life_does_not_count(waiting: Waiting) -> None:
    """After a restore epochs begin anew, and so does the waiting for each of them."""
    waiting.renew(incarnation=0)
    assert not waiting.waiter.standing(5).settled
    waiting.clock.at += LEASE * 1.3
    waiting.renew()
    assert waiting.waiter.standing(5).settled
    waiting.restore()
    assert not waiting.waiter.standing(5).settled


@pytest.mark.parametrize("renewed_at", [NOW - timedelta(days=1), NOW + timedelta(days=1)])
def test_the_waiters_own_clock_counts_and_no_rows_time(
    waiting: Waiting, renewed_at: datetime
) -> None:
    """One lease and a fifth since the first question, whatever the row says of its renewal."""
    waiting.renew(renewed_at=renewed_at)
    assert not waiting.waiter.standing(6).settled
    waiting.clock.at += LEASE * 1.2 - 0.1
    waiting.renew()
    assert not waiting.waiter.standing(6).settled
    assert not waiting.waiter.standing(7).settled  # a later epoch: counted from now
    waiting.clock.at += 0.2
    waiting.renew()
    found = waiting.waiter.standing(6)
    assert (found.settled, found.acknowledged, found.silent) == (True, 0, ("there/first",))
    assert not waiting.waiter.standing(7).settled
    assert waiting.rows == 1  # it is alive, it only cannot hear


def test_the_lease_that_counts_is_that_of_the_row(waiting: Waiting) -> None:
    """A verifier that was configured with a longer lease is waited for that long."""
    waiting.renew(lease=timedelta(seconds=60))
    waiting.waiter.standing(6)
    waiting.clock.at += 71
    waiting.renew()
    assert not waiting.waiter.standing(6).settled
    waiting.clock.at += 2
    assert waiting.waiter.standing(6).settled


def test_a_lease_beyond_the_longest_cannot_be_registered(waiting: Waiting) -> None:
    """Nobody can make a revoke wait for a day."""
    with pytest.raises(Exception, match="illegal state"):
        waiting.renew(lease=timedelta(minutes=6))


def test_one_that_stands_still_is_waited_for_once_only(waiting: Waiting) -> None:
    """Seen unchanged for a lease it can answer nothing: its row goes, for whatever epoch."""
    assert waiting.waiter.keep() == 1
    waiting.clock.at += LEASE * 1.2 - 0.1
    assert waiting.waiter.keep() == 1
    waiting.clock.at += 0.2
    assert waiting.waiter.standing(7).settled
    assert waiting.rows == 0


def test_a_store_that_goes_away_meanwhile_is_asked_again(waiting: Waiting) -> None:
    """The cut is committed: the call neither fails nor returns before it is known who knows."""
    away = iter([True, True, False, False])

    class Flaky(BuiltinAuthority):
        """An authority whose store comes and goes."""

        def standing(self, epoch: int) -> Standing:
            if next(away, False):
                raise StoreUnavailable
            waiting.renew(epoch=epoch)
            return super().standing(epoch)

    found = settling.wait(Flaky(registered=waiting.waiter), 9)
    assert settling.numbers(found) == {"acknowledged": 1, "live": 1, "silent": []}


def test_they_are_counted_for_the_metrics(waiting: Waiting) -> None:
    """What a revoke would wait for; on SQLite, where it waits for none, there is no sample."""
    for registered_ones, expected in ((waiting.waiter, ["1.0"]), (None, [])):
        metrics = Metrics()
        parts = SimpleNamespace(authority=BuiltinAuthority(registered=registered_ones))
        count(cast("Parts", parts), metrics)
        assert (
            re.findall(r"^keyturn_verifiers_live (.+)$", metrics.text(), re.MULTILINE) == expected
        )


def test_a_rotation_waits_a_moment_by_itself(waiting: Waiting) -> None:
    """About as long as the next poll takes: it need not be put off for that."""
    patient = Registered(lambda: waiting.database, clock=waiting.clock, patience=20.0)
    late = threading.Timer(0.1, lambda: waiting.renew(epoch=6))
    late.start()
    assert patient.settled(6)
    late.join()
    assert not waiting.waiter.settled(7)


def test_one_that_was_renewed_in_the_same_moment_stays(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken away only as it was seen: a verifier that comes back is not cut off."""
    waiting.waiter.keep()
    waiting.clock.at += LEASE * 1.3
    before = waiting.database.read(registered)
    waiting.renew()
    monkeypatch.setattr(waiting.database, "read", lambda _body: before)
    waiting.waiter.keep()
    monkeypatch.undo()
    assert waiting.rows == 1
