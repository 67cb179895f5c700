"""What verifiers saw, as it is stored: the same on a file of its own and in tables of a server."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from keyturn.errors import StorageError, StoreUnavailable
from keyturn.storage import usage
from keyturn.storage.usage import Count, Tally, UsageRecords
from keyturn.testing.fakes import FakeClock
from support.postgres import postgres  # noqa: F401 - a fixture
from support.stores import Place, either_place  # noqa: F401 - a fixture

ONE = "A" * 14
TWO = "B" * 14
MINUTE = timedelta(minutes=1)


class Bench:
    """Records as two processes have them open; `boot` is what time since boot counts from."""

    def __init__(self, place: Place) -> None:
        self.clock = FakeClock(datetime.now(UTC))
        self.store = place.open()
        self.state_dir = place.state_dir
        self.url = place.url
        self.first, self.second = self.open(), self.open()

    def open(self) -> UsageRecords:
        """Open them as one more process."""
        return UsageRecords.open(self.url, state_dir=self.state_dir, clock=self.clock)

    def tally(self, number: int, version: str = ONE, *, ago: timedelta = timedelta(0)) -> Tally:
        """Return uses of a version, some time ago."""
        at = self.clock.boottime() - ago
        return Tally(uses={version: Count(first=at, last=at, number=number)})

    def add(self, source: str, number: int, tally: Tally) -> None:
        """Add what a process counted."""
        self.first.add(source, number, tally, boottime=self.clock.boottime())


@pytest.fixture
def bench(place: Place) -> Iterator[Bench]:
    """Give records of an empty store."""
    made = Bench(place)
    yield made
    made.first.close()
    made.second.close()


def test_a_store_that_nobody_counted_for_says_nothing(bench: Bench) -> None:
    """There is no time of a flush, and reading makes no file."""
    reader = UsageRecords.beside(bench.store.database, state_dir=bench.state_dir, clock=bench.clock)
    assert reader.flushed_at() is None
    assert reader.uses([ONE]) == {}
    assert reader.totals() == {}
    assert reader.presented() == []
    assert not (bench.state_dir / usage.FILE).exists()


def test_numbers_of_several_processes_add_up(bench: Bench) -> None:
    """Two processes that flush at once, many times over: nothing is lost, and neither waits for ever."""
    rounds = 20

    def added(records: UsageRecords, source: str, number: int, tally: Tally) -> bool:
        try:
            records.add(source, number, tally, boottime=bench.clock.boottime())
        except StoreUnavailable:
            return False
        return True

    def count(records: UsageRecords, source: str) -> None:
        for number in range(1, rounds + 1):
            tally = bench.tally(3)
            tally.uses[TWO] = tally.uses[ONE]
            tally.results = {(0, "refused"): 5}
            while not added(records, source, number, tally):
                pass  # the other one had the file for long: as after any flush that failed

    threads = [
        threading.Thread(target=count, args=pair)
        for pair in ((bench.first, "one"), (bench.second, "two"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = bench.second.uses([ONE, TWO, "C" * 14])
    assert {version: one.uses for version, one in found.items()} == {ONE: 120, TWO: 120}
    assert bench.first.totals() == {"refused": 200}


def test_first_and_last_stand_whatever_comes_late(bench: Bench) -> None:
    """A process that could not flush for long moves the first use back, and the last one never."""
    bench.add("one", 1, bench.tally(1))
    newest = bench.first.uses([ONE])[ONE].last_used_at
    bench.add("two", 1, bench.tally(1, ago=5 * MINUTE))
    found = bench.first.uses([ONE])[ONE]
    assert found.last_used_at == newest
    assert timedelta(minutes=4) < newest - found.first_used_at < timedelta(minutes=6)


def test_a_flush_whose_answer_was_lost_is_not_added_again(bench: Bench) -> None:
    """The same number of the same process counts once; the next one counts."""
    for number in (1, 1, 2, 1, 2):
        bench.add("one", number, bench.tally(10))
    assert bench.first.uses([ONE])[ONE].uses == 20


def test_the_last_hour_is_what_identify_says(bench: Bench) -> None:
    """Uses of this hour count, those of the hour before by the share of it that is not yet an hour ago."""
    bench.add("one", 1, bench.tally(6))
    assert bench.first.uses([ONE])[ONE].last_hour == 6
    bench.add("one", 2, bench.tally(100, ago=timedelta(hours=3)))
    found = bench.first.uses([ONE])[ONE]
    assert (found.uses, found.last_hour) == (106, 6)


def test_an_hour_later_half_of_it_counts(place: Place) -> None:
    """On a clock that a test decides about: whole at first, then by the share, then nothing."""
    if not place.url.startswith("sqlite"):
        return  # a server has a clock of its own
    bench = Bench(place)
    bench.clock = FakeClock(datetime(2026, 3, 1, 12, 30, tzinfo=UTC))
    bench.first = bench.open()
    bench.add("one", 1, bench.tally(8))
    shown = []
    for _ in range(4):
        shown.append(bench.first.uses([ONE])[ONE].last_hour)
        bench.clock.advance(timedelta(minutes=45))
    bench.first.close()
    assert shown == [8, 6, 0, 0]


def test_minutes_and_hours_are_rings(bench: Bench) -> None:
    """A hundred days of refusals leave a row a day and no more minutes and hours than a ring has."""
    now = bench.clock.boottime() // MINUTE
    minutes = range(now - 100 * 1440, now, 61)
    bench.add("one", 1, Tally(results={(minute, "refused"): 7 for minute in minutes}))
    query = sa.text("SELECT span, count(*) FROM usage_results GROUP BY span")
    found = bench.first._open().read(lambda connection: connection.execute(query).all())
    rows = {str(span): int(number) for span, number in found}
    assert rows["day"] in {100, 101}
    assert rows["minute"] == 1440
    assert 2000 < rows["hour"] <= 24 * 90 < len(minutes)
    assert bench.second.totals() == {"refused": 7 * len(minutes)}


def test_an_ended_version_is_one_row_and_told_once(bench: Bench) -> None:
    """Whoever raises it marks it; what comes later is due again, and not before."""
    at = bench.clock.boottime()
    seen = Tally(presented={(ONE, "retired"): Count(first=at, last=at, number=1)})
    bench.add("one", 1, seen)
    [one] = bench.second.presented(untold=True)
    assert (one.version_id, one.state, one.number, one.told_at) == (ONE, "retired", 1, None)
    bench.second.told(one, bench.store.now())
    assert bench.second.presented(untold=True) == []
    assert [found.number for found in bench.second.presented()] == [1]
    seen = Tally(presented={(ONE, "revoked"): Count(first=at, last=at, number=2)})
    bench.add("one", 2, seen)
    [again] = bench.second.presented(untold=True)
    assert (again.state, again.number, again.told_number) == ("revoked", 3, 1)
    assert again.told_at is not None


def test_processes_that_are_long_gone_are_forgotten(bench: Bench) -> None:
    """All but the newest: it is what says that somebody has counted."""
    bench.add("one", 1, bench.tally(1))
    bench.add("two", 1, bench.tally(1))
    flushed = bench.first.flushed_at()
    assert flushed is not None
    bench.first.forget(flushed + timedelta(days=30))
    assert bench.first.flushed_at() == flushed
    bench.add("two", 1, bench.tally(1))
    assert bench.first.uses([ONE])[ONE].uses == 2


def test_the_file_is_private_and_may_be_taken_away(bench: Bench) -> None:
    """On SQLite it is 0600, and after somebody removed it the next flush makes another one."""
    path = bench.state_dir / usage.FILE
    bench.add("one", 1, bench.tally(1))
    if not bench.url.startswith("sqlite"):
        assert not path.exists()
        return
    assert path.stat().st_mode & 0o777 == 0o600
    path.unlink()
    bench.add("one", 2, bench.tally(4))
    assert bench.second.uses([ONE])[ONE].uses == 4
    path.unlink()
    path.symlink_to(Path(os.devnull))
    with pytest.raises(StorageError):
        bench.add("one", 3, bench.tally(4))
