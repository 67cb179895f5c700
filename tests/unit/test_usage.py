"""A verifier counts its own answers: in memory, bounded, each once, and nobody waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from keyturn.core import secret as form
from keyturn.core.model import AgentState, VersionState
from keyturn.core.secret import Secret, mint
from keyturn.errors import StoreFull, StoreUnavailable, VerificationFailed
from keyturn.storage.decisions import Decision
from keyturn.storage.usage import Tally
from keyturn.testing.fakes import FakeClock, seeded
from keyturn.verifier import usage as counting
from keyturn.verifier.decision import Verified, Verifier
from keyturn.verifier.gate import Ticket
from keyturn.verifier.hashing import CHEAP_FOR_TESTS, Hashing, tag
from keyturn.verifier.schemes import Schemes
from keyturn.verifier.spool import Spool
from keyturn.verifier.tombstones import Tombstones
from keyturn.verifier.usage import Usage

EVERY = timedelta(seconds=counting.EVERY)


class Kept:
    """Records in memory, as idempotent as the real ones; `broken` is raised, before or after it counts."""

    def __init__(self) -> None:
        self.uses: dict[str, int] = {}
        self.results: dict[str, int] = {}
        self.presented: dict[tuple[str, str], int] = {}
        self.number = 0
        self.broken: Exception | None = None
        self.breaks_after = False
        self.added: list[Tally] = []

    def add(self, source: str, number: int, tally: Tally, *, boottime: timedelta) -> None:
        del source, boottime
        if self.broken is not None and not self.breaks_after:
            raise self.broken
        if number > self.number:
            self.number = number
            self.added.append(tally)
            for version, count in tally.uses.items():
                self.uses[version] = self.uses.get(version, 0) + count.number
            for (_, result), count in tally.results.items():
                self.results[result] = self.results.get(result, 0) + count
            for shown, one in tally.presented.items():
                self.presented[shown] = self.presented.get(shown, 0) + one.number
        if self.broken is not None:
            raise self.broken

    def close(self) -> None:
        pass


def verified(version: str = "v", state: str = "current") -> Verified:
    """Return a yes."""
    return Verified(agent="a", login="a", version_id=version, state=state, deadline=None)


class Bench:
    """Usage over records in memory."""

    def __init__(self, **more: Any) -> None:
        self.kept, self.clock = Kept(), FakeClock()
        self.usage = Usage(self.kept, self.clock, source="s", **more)


def test_answers_are_counted_by_version_and_by_result() -> None:
    """Yeses by version, those in a grace apart by result, and everything else by result alone."""
    bench = Bench()
    for _ in range(3):
        bench.usage.accepted(verified())
    bench.usage.accepted(verified("old", "previous"))
    for result in ("refused", "refused", "limited", "unavailable"):
        bench.usage.failed(result)
    assert bench.usage.flush()
    assert bench.kept.uses == {"v": 3, "old": 1}
    assert bench.kept.results == {
        "accepted": 3, "accepted_previous": 1, "refused": 2, "limited": 1, "unavailable": 1,
    }  # fmt: skip


def test_threads_lose_no_count() -> None:
    """Eight threads count while another one flushes all the time: every single one arrives."""
    bench = Bench()
    over = threading.Event()

    def flush() -> None:
        while not over.is_set():
            bench.usage.flush()

    def count() -> None:
        for _ in range(5_000):
            bench.usage.accepted(verified())
            bench.usage.failed("refused")

    flusher = threading.Thread(target=flush)
    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in (flusher, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    flusher.join()
    bench.usage.flush()
    assert bench.kept.uses == {"v": 40_000}
    assert bench.kept.results == {"accepted": 40_000, "refused": 40_000}


def test_versions_that_rest_make_room_for_others() -> None:
    """Once the table is half full, who was not used goes; what comes back later is counted on."""
    bench = Bench(versions=10)
    for turn in range(6):
        for number in range(4 * turn, 4 * turn + 4):
            bench.usage.accepted(verified(f"v{number}"))
        bench.usage.accepted(verified("always"))
        bench.usage.flush()
    bench.usage.accepted(verified("v0"))
    bench.usage.flush()
    assert bench.kept.uses == {"always": 6, "v0": 2} | {f"v{n}": 1 for n in range(1, 24)}
    assert bench.usage.counts["unlisted"] == 0
    assert len(bench.usage._uses._numbers) <= 10


@pytest.mark.parametrize("error", [StoreUnavailable("locked"), StoreFull()])
@pytest.mark.parametrize("after", [False, True])
def test_a_flush_that_failed_is_made_good_and_nothing_counts_twice(
    error: Exception, after: bool
) -> None:
    """Whether it failed before or after it had landed: once it works every number is there, once."""
    bench = Bench()
    bench.kept.broken, bench.kept.breaks_after = error, after
    for _ in range(4):
        bench.usage.accepted(verified())
        bench.usage.failed("refused")
        bench.clock.advance(EVERY)
        assert not bench.usage.flush()
    bench.kept.broken = None
    assert bench.usage.flush()
    assert bench.kept.uses == {"v": 4}
    assert bench.kept.results == {"accepted": 4, "refused": 4}
    assert bench.usage.counts["not_flushed"] == 4
    assert {found.uses["v"].number for found in bench.kept.added} == {1, 3}


def test_first_and_last_use_are_those_of_their_flushes() -> None:
    """An instant is up to one interval late, and never early."""
    bench = Bench()
    bench.kept.broken = StoreUnavailable()
    bench.usage.flush()
    for _ in range(2):
        bench.usage.accepted(verified())
        bench.clock.advance(EVERY)
        bench.usage.flush()
    bench.kept.broken = None
    bench.usage.flush()
    found = bench.kept.added[-1].uses["v"]
    assert found.last - found.first == EVERY
    assert found.last == bench.clock.boottime()


def test_memory_is_bounded_whatever_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions beyond the bound count in sum only; minutes that cannot be flushed become one."""
    monkeypatch.setattr(counting, "MINUTES", 100)
    bench = Bench(versions=100)
    bench.kept.broken = StoreUnavailable()
    for number in range(1_000):
        bench.usage.accepted(verified(f"v{number}"))
        bench.usage.failed("refused")
    bench.usage.flush()
    for _ in range(2 * counting.MINUTES):
        bench.usage.failed("refused")
        bench.clock.advance(timedelta(minutes=1))
        bench.usage.flush()
    assert len(bench.usage._kept.results) <= counting.MINUTES
    bench.kept.broken = None
    bench.usage.flush()
    assert len(bench.kept.uses) == 100
    assert bench.kept.results == {"accepted": 1_000, "refused": 1_000 + 2 * counting.MINUTES}
    assert bench.usage.counts["unlisted"] == 900


def test_silence_is_said_once_a_minute() -> None:
    """Where nothing happened a flush says so now and then: no news is no proof that nobody came."""
    bench = Bench()
    for _ in range(13):
        bench.usage.flush()
        bench.clock.advance(EVERY)
    assert bench.kept.number == 3


def test_a_result_that_there_is_not_is_a_bug() -> None:
    """What is counted are words of ours, never a text that somebody sent."""
    with pytest.raises(KeyError):
        Bench().usage.failed("kt_whatever")


def test_it_flushes_by_itself_and_at_the_end() -> None:
    """A thread of its own does it, also after a flush that ended in the worst way."""
    bench = Bench()
    bench.kept.broken = RuntimeError("a bug")
    bench.usage.accepted(verified())
    bench.usage.start(every=0.005)
    wait(lambda: bench.usage._sent is not None)
    bench.kept.broken = None
    wait(lambda: bench.kept.uses == {"v": 1})
    bench.usage.accepted(verified())
    bench.usage.close()
    assert bench.kept.uses == {"v": 2}


# --- ended versions -------------------------------------------------------------------------


class Rows:
    """A reader over a dictionary; `broken` stands for a store that somebody has locked."""

    def __init__(self) -> None:
        self.rows: dict[str, Decision] = {}
        self.broken = False
        self.asked = 0

    def lookup(self, version_id: str, login: str = "") -> Decision | None:
        self.asked += 1
        if self.broken:
            raise StoreUnavailable
        return self.rows.get(version_id)

    def imported(self, login: str) -> list[Decision]:
        return []

    def close(self) -> None:
        pass


class Counted(Hashing):
    """Hashing that counts its checks."""

    def __init__(self) -> None:
        super().__init__(cost=CHEAP_FOR_TESTS)
        object.__setattr__(self, "checks", [])

    def matches(self, digest: str, secret: Secret, ticket: Ticket | None = None) -> bool:
        self.checks.append(digest)  # type: ignore[attr-defined]
        return super().matches(digest, secret, ticket)


class Desk(Bench):
    """A verifier that counts, and versions in any state."""

    def __init__(self, folder: Path) -> None:
        self.hashing, self.rows = Counted(), Rows()
        clock = FakeClock()
        self.tombstones = Tombstones(clock.boottime, hashing=self.hashing, share=1.0)
        super().__init__(tombstones=self.tombstones)
        self.clock = clock
        self.usage._clock = clock
        self.spool = Spool(folder / "revoked.d")
        self.verifier = Verifier(
            self.rows, self.spool, clock, hashing=Hashing(cost=CHEAP_FOR_TESTS), usage=self.usage
        )

    def add(self, seed: int, state: VersionState) -> tuple[str, Secret]:
        """Add a version and return its id and secret."""
        version_id, secret = mint(random_bytes=seeded(seed))
        self.rows.rows[version_id] = Decision(
            not_after=None,
            agent_uid="a",
            agent_name="a",
            login="a",
            agent_state=AgentState.ENABLED,
            credential_uid="c",
            version_id=version_id,
            state=state,
            scheme="argon2id",
            digest=self.hashing.digest(secret),
            tag=tag(version_id, secret),
            deadline=None,
        )
        return version_id, secret

    def refuses(self, secret: Secret, login: str = "a") -> None:
        """Present it; it must be refused."""
        with pytest.raises(VerificationFailed):
            self.verifier.verify(login, secret)

    def seen(self) -> dict[tuple[str, str], int]:
        """Return what was proven once the queue is empty."""
        wait(self.tombstones.is_idle)
        self.usage.flush()
        return self.kept.presented


@pytest.fixture
def desk(tmp_path: Path) -> Any:
    """Give a desk, and end its threads."""
    made = Desk(tmp_path)
    yield made
    made.usage.close()


def wait(condition: Callable[[], bool]) -> None:
    """Wait until it holds."""
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


def forged(secret: Secret, seed: int = 99) -> Secret:
    """Return a well-formed secret with the same public id and another random part."""
    other = mint(random_bytes=seeded(seed))[1].reveal()
    prefix, version_id, _ = secret.reveal().split("_")
    body = f"{prefix}_{version_id}_{other.split('_')[2][: form.RANDOM_LENGTH]}"
    return Secret(body + form._checksum(body.encode()))


@pytest.mark.parametrize("state", [VersionState.RETIRED, VersionState.REVOKED])
def test_an_ended_secret_in_full_is_an_event(desk: Desk, state: VersionState) -> None:
    """Whoever presents it, under whichever login: it is refused as ever, and it is known."""
    version_id, secret = desk.add(1, state)
    desk.refuses(secret)
    assert desk.seen() == {(version_id, str(state)): 1}
    desk.clock.advance(timedelta(minutes=1))
    desk.refuses(secret, login="somebody-else")
    assert desk.seen() == {(version_id, str(state)): 2}


@pytest.mark.parametrize("state", list(VersionState))
def test_a_known_id_alone_is_none(desk: Desk, state: VersionState) -> None:
    """Ids are public: the right one with a wrong secret trips nothing, and reaches no hash."""
    _, secret = desk.add(1, state)
    for seed in range(50, 60):
        desk.refuses(forged(secret, seed))
    assert desk.tombstones._thread is None  # nothing was handed over
    assert desk.seen() == {}


def test_junk_that_makes_a_tombstone_known_reaches_no_hash(desk: Desk) -> None:
    """The first one who presents a version that only the spool refuses may be a guesser."""
    version_id, secret = desk.add(1, VersionState.CURRENT)
    desk.spool.revoke(version_id, {})
    desk.refuses(forged(secret))
    assert desk.seen() == {}
    assert desk.hashing.checks == []  # type: ignore[attr-defined]
    desk.refuses(secret)
    assert desk.seen() == {(version_id, "revoked"): 1}


def test_what_is_accepted_is_none_either(desk: Desk) -> None:
    """A good secret is a use and no event."""
    version_id, secret = desk.add(1, VersionState.CURRENT)
    assert desk.verifier.verify("a", secret).version_id == version_id
    assert desk.seen() == {}
    assert desk.kept.uses == {version_id: 1}


def test_once_a_minute_is_enough(desk: Desk) -> None:
    """A fleet that goes on with a revoked secret costs one hash a minute, however often it tries."""
    version_id, secret = desk.add(1, VersionState.REVOKED)
    for _ in range(200):
        desk.refuses(secret)
        wait(desk.tombstones.is_idle)
    assert desk.seen() == {(version_id, "revoked"): 1}
    assert len(desk.hashing.checks) == 1  # type: ignore[attr-defined]


def test_a_version_that_only_the_spool_refuses_is_one_as_well(desk: Desk) -> None:
    """The answer does not ask the store for it; its row becomes known beside it, and stays so."""
    version_id, secret = desk.add(1, VersionState.CURRENT)
    desk.spool.revoke(version_id, {})
    asked = desk.rows.asked
    desk.refuses(secret)
    assert desk.seen() == {(version_id, "revoked"): 1}
    desk.clock.advance(timedelta(minutes=1))
    desk.refuses(forged(secret))
    desk.refuses(secret)
    assert desk.seen() == {(version_id, "revoked"): 2}
    assert desk.rows.asked == asked + 1


def test_a_locked_store_changes_no_answer(desk: Desk) -> None:
    """While nobody can read the row a revoked secret is refused as before, and its event is lost."""
    version_id, secret = desk.add(1, VersionState.CURRENT)
    desk.spool.revoke(version_id, {})
    desk.rows.broken = True
    desk.refuses(secret)
    assert desk.seen() == {}
    assert desk.tombstones.dropped == 1


def test_the_queue_is_short_and_what_it_drops_is_counted(tmp_path: Path) -> None:
    """However many come while one is looked at, no more than its room wait, and no answer does."""
    entered, let_go = threading.Event(), threading.Event()

    class Slow(Counted):
        """Hashing that takes as long as the test wants."""

        def matches(self, digest: str, secret: Secret, ticket: Ticket | None = None) -> bool:
            entered.set()
            let_go.wait(20)
            return super().matches(digest, secret, ticket)

    desk = Desk(tmp_path)
    slow = Slow()
    desk.tombstones._schemes = Schemes(hashing=slow)
    every = [desk.add(seed, VersionState.RETIRED) for seed in range(60)]
    desk.refuses(every[0][1])
    assert entered.wait(20)
    for _, secret in every[1:]:
        desk.refuses(secret)
    assert desk.tombstones._queue.qsize() == 32
    assert desk.tombstones.dropped == 59 - 32
    let_go.set()
    assert len(desk.seen()) == 33
    desk.usage.close()
    assert desk.usage.counts["dropped"] == 27


def test_its_hashes_take_a_tenth_of_a_core() -> None:
    """After each look the thread rests for nine times as long as that took."""
    now = iter(range(0, 1_000, 2))
    rests: list[float] = []
    made = Tombstones(lambda: timedelta(0), timer=lambda: float(next(now)))

    class Resting(threading.Event):
        """Notes how long it would have waited."""

        def wait(self, timeout: float | None = None) -> bool:
            rests.append(timeout or 0)
            return True

    made._stop = Resting()
    _, secret = mint(random_bytes=seeded(1))
    made.row("A" * 14, secret)
    wait(lambda: bool(rests))
    made.close()
    assert rests[0] == pytest.approx(18.0)


def test_a_verifier_without_usage_counts_as_before(tmp_path: Path) -> None:
    """It is optional: no thread, no file, the same answers."""
    desk = Desk(tmp_path)
    plain = Verifier(desk.rows, desk.spool, desk.clock, hashing=Hashing(cost=CHEAP_FOR_TESTS))
    version_id, secret = desk.add(1, VersionState.RETIRED)
    with pytest.raises(VerificationFailed):
        plain.verify("a", secret)
    desk.rows.rows[version_id] = replace(desk.rows.rows[version_id], state=VersionState.CURRENT)
    assert plain.verify("a", secret).version_id == version_id
    assert plain.counts == {"refused": 1, "accepted": 1}
    desk.usage.close()
    assert desk.kept.uses == {}
