"""The template of destinations: deadline, bulkhead, write limit, error translation, paths."""

from __future__ import annotations

import contextlib
import gc
import logging
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from keyturn.core.model import Target
from keyturn.destinations.base import ConnectionOptions, DestinationBase, is_plain
from keyturn.errors import (
    ConfigError,
    Conflict,
    Denied,
    DestinationError,
    DestinationUnavailable,
    IllegalTransition,
    Rejected,
    Throttled,
)
from keyturn.ports import Entry, Observed
from keyturn.testing import FakeClock, leaks
from keyturn.testing.contract import ESCAPES, STORE_ID, new_entry

TARGET = Target(to="fake", path="bot")


class VendorError(Exception):
    """What somebody's library raises: its text quotes what was sent."""


class FakeDestination(DestinationBase):
    """Does in each call what a test says."""

    def __init__(self, clock: FakeClock, **options: Any) -> None:
        read = ConnectionOptions.model_validate(options)
        super().__init__(read, name="fake", store_id=STORE_ID, clock=clock)
        self.does: Callable[[], Any] = lambda: None

    def identity(self, target: Target) -> str:
        return f"fake:{self.place(target)}"

    def _probe(self) -> str:
        return str(self.does())

    def _observe(self, target: Target) -> Observed:
        self.does()
        return Observed()

    def _activate(self, target: Target, entry: Entry, expected: str) -> str:
        self.does()
        return "1"

    def _withdraw(self, target: Target, owner: str, version_id: str, expected: str) -> str:
        self.does()
        return "2"

    def _translate(self, error: Exception) -> DestinationError:
        if isinstance(error, VendorError):
            return Denied(f"{self.name}: {type(error).__name__}")
        return super()._translate(error)


@pytest.fixture
def clock() -> FakeClock:
    """Give a clock that stands."""
    return FakeClock()


@pytest.fixture
def make(clock: FakeClock) -> Iterator[Callable[..., FakeDestination]]:
    """Give a maker of destinations that are closed at the end."""
    made: list[FakeDestination] = []

    def maker(**options: Any) -> FakeDestination:
        made.append(FakeDestination(clock, **options))
        return made[-1]

    yield maker
    for destination in made:
        destination.close()


Make = Callable[..., FakeDestination]


# --- deadline and bulkhead ----------------------------------------------------------------


def test_a_call_that_hangs_gives_way_and_can_be_followed(make: Make) -> None:
    """At the deadline the caller goes on, with the future that tells how the call ends."""
    destination, go = make(call_deadline="100ms"), threading.Event()
    destination.does = lambda: go.wait(10)
    started = time.monotonic()
    with pytest.raises(DestinationUnavailable) as error:
        destination.activate(TARGET, new_entry(1), expected="")
    assert time.monotonic() - started < 1
    assert error.value.sent
    assert error.value.late is not None
    assert not error.value.late.done()
    go.set()
    assert error.value.late.result(5) == "1"


def test_a_call_that_never_started_is_certainly_not_sent(make: Make) -> None:
    """Behind calls that hang, a call is taken back at its deadline and does nothing later."""
    destination, go, done = make(call_deadline="100ms", parallel=2), threading.Event(), []
    destination.does = lambda: go.wait(10)
    with ThreadPoolExecutor(2) as pool:
        hung = [pool.submit(destination.probe) for _ in range(2)]
        for call in hung:
            with pytest.raises(DestinationUnavailable):
                call.result()
    destination.does = lambda: done.append(1)
    with pytest.raises(DestinationUnavailable) as error:
        destination.probe()
    assert not error.value.sent
    assert error.value.late is None
    go.set()
    destination.does = lambda: "free again"
    assert destination.probe() == "free again"
    assert done == []


def test_a_slow_destination_delays_no_other(make: Make) -> None:
    """Every thread of one connection hangs, and another answers at once (I7)."""
    slow, quick, go = make(call_deadline="300ms", parallel=1), make(), threading.Event()
    slow.does = lambda: go.wait(10)
    with ThreadPoolExecutor(4) as pool:
        hung = [pool.submit(slow.probe) for _ in range(4)]
        started = time.monotonic()
        for _ in range(20):
            quick.probe()
        assert time.monotonic() - started < 0.25
        go.set()
        for call in hung:
            call.exception()


def test_a_call_never_waits_behind_another_while_threads_are_left(make: Make) -> None:
    """Eight calls at once really run at once, however they are handed in, again and again."""
    destination = make(parallel=8, call_deadline="5s")
    for _ in range(30):
        together = threading.Barrier(8)
        destination.does = lambda together=together: together.wait(5)
        with ThreadPoolExecutor(8) as pool:
            for call in [pool.submit(destination.probe) for _ in range(8)]:
                call.result()
    running = [t for t in threading.enumerate() if t.name.startswith("call-fake-")]
    assert len(running) <= 8


def test_no_more_calls_at_once_than_allowed(make: Make) -> None:
    """`parallel` bounds what a destination sees at once."""
    destination, guard, now, most = make(parallel=3), threading.Lock(), [0], [0]

    def count() -> None:
        with guard:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.005)
        with guard:
            now[0] -= 1

    destination.does = count
    with ThreadPoolExecutor(12) as pool:
        for call in [pool.submit(destination.probe) for _ in range(60)]:
            call.result()
    assert most[0] == 3


def test_closing_waits_for_nobody(make: Make) -> None:
    """A call that hangs keeps nobody from closing; waiting and later ones are surely not sent."""
    destination, go = make(parallel=1, call_deadline="5s"), threading.Event()
    started = threading.Event()
    destination.does = lambda: (started.set(), go.wait(10))
    with ThreadPoolExecutor(2) as pool:
        pool.submit(destination.probe)
        started.wait(5)
        queued = pool.submit(destination.probe)
        while destination._lane._jobs.qsize() == 0:
            time.sleep(0.001)
        before = time.monotonic()
        destination.close()
        destination.close()
        error = queued.exception()
        assert time.monotonic() - before < 1
        go.set()
    assert isinstance(error, DestinationUnavailable)
    assert not error.sent
    with pytest.raises(DestinationUnavailable) as after:
        destination.probe()
    assert not after.value.sent


def test_idle_threads_end_when_it_is_closed(make: Make) -> None:
    """A reload that drops a connection leaves no threads behind."""
    destination = make(parallel=3)
    destination.probe()
    threads = [t for t in threading.enumerate() if t.name.startswith("call-fake-")]
    destination.close()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_a_call_that_hangs_does_not_keep_the_process() -> None:
    """The process ends by itself while a thread of a connection is still waiting."""
    code = """
import threading
from keyturn.destinations.memory import MemoryDestination, MemoryOptions
from keyturn.core.model import Target
from keyturn.testing import FakeClock
options = MemoryOptions(call_deadline="50ms")
made = MemoryDestination(options, name="m", store_id="s", clock=FakeClock())
made.fault = lambda operation, moment: threading.Event().wait()
try:
    made.observe(Target(to="m", path="x"))
except Exception as error:
    print(type(error).__name__)
made.close()
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "DestinationUnavailable\n", "")


# --- write limit --------------------------------------------------------------------------


def test_writes_are_spaced_and_reads_are_not(make: Make, clock: FakeClock) -> None:
    """The limit counts writes, waits for a near slot, and lets time give new ones."""
    destination = make(write_limit="20/s")
    started = time.monotonic()
    for _ in range(4):  # the fake clock stands: slots at 0, 50, 100 and 150 ms from now
        destination.activate(TARGET, new_entry(1), expected="")
    assert time.monotonic() - started >= 0.3
    clock.advance(timedelta(seconds=1))
    started = time.monotonic()
    destination.activate(TARGET, new_entry(1), expected="")
    for _ in range(50):
        destination.observe(TARGET)
    assert time.monotonic() - started < 0.3


def test_a_far_slot_is_throttled_and_says_when(make: Make, clock: FakeClock) -> None:
    """Rather than wait long, a write gives way, without having been sent."""
    destination, sent = make(write_limit="1/s", call_deadline="1s"), []
    destination.does = lambda: sent.append(1)
    destination.activate(TARGET, new_entry(1), expected="")
    with pytest.raises(Throttled) as error:
        destination.activate(TARGET, new_entry(1), expected="")
    assert error.value.retry_after == timedelta(seconds=1)
    assert sent == [1]
    clock.advance(timedelta(seconds=1))
    destination.activate(TARGET, new_entry(1), expected="")
    assert sent == [1, 1]


def test_the_wait_for_a_slot_is_part_of_the_deadline(make: Make) -> None:
    """A write that waited for its slot has only the rest of its deadline for the answer."""
    destination, go = make(write_limit="5/s", call_deadline="500ms"), threading.Event()
    destination.activate(TARGET, new_entry(1), expected="")
    destination.does = lambda: go.wait(10)
    started = time.monotonic()
    with pytest.raises(DestinationUnavailable):
        destination.activate(TARGET, new_entry(1), expected="")
    assert 0.45 < time.monotonic() - started < 0.65
    go.set()


# --- errors -------------------------------------------------------------------------------


def _raise(error: BaseException) -> Callable[[], Any]:
    def does() -> Any:
        raise error

    return does


def test_nothing_of_a_vendors_error_gets_through(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Its text quotes a secret; type alone survives, with no context, cause or argument of it."""
    destination, secret = make(), new_entry(1).secret
    destination.does = _raise(VendorError(f"bad payload {secret.reveal()}"))
    with caplog.at_level(logging.DEBUG), pytest.raises(Denied) as error:
        destination.probe()
    logging.getLogger("test").error("failed", exc_info=error.value)
    text = "".join(traceback.format_exception(error.value)) + repr(error.value.__dict__)
    assert error.value.__context__ is None
    assert error.value.__cause__ is None
    assert leaks(text + caplog.text, secret) == []


def test_an_adapters_from_none_leaves_no_vendor_error_behind(make: Make) -> None:
    """`from None` only hides: the vendor's error is taken off as well."""

    def does() -> None:
        try:
            raise VendorError("quotes what was sent")
        except VendorError:
            raise Rejected("refused") from None

    destination = make()
    destination.does = does
    with pytest.raises(Rejected) as error:
        destination.probe()
    assert error.value.__context__ is None


@pytest.mark.parametrize("ours", [Conflict(), Throttled(), Denied(), ConfigError("x")])
def test_our_errors_pass_as_they_are(make: Make, ours: Exception) -> None:
    """An adapter's own decision is not translated again."""
    destination = make()
    destination.does = _raise(ours)
    with pytest.raises(type(ours)) as error:
        destination.observe(TARGET)
    assert error.value is ours


def test_a_broken_promise_of_ours_is_never_disguised(make: Make) -> None:
    """An illegal transition is a bug and passes through every boundary."""
    destination = make()
    destination.does = _raise(IllegalTransition("bug"))
    with pytest.raises(IllegalTransition):
        destination.observe(TARGET)


@pytest.mark.parametrize("kind", [TypeError, AttributeError, KeyError, IndexError, NameError])
def test_a_bug_in_an_adapter_names_its_place(make: Make, kind: type[Exception]) -> None:
    """A bug looks like no outage: the message says where it is, and never what was in its text."""
    destination = make()
    destination.does = _raise(kind("secret text"))
    with pytest.raises(DestinationUnavailable) as error:
        destination.observe(TARGET)
    assert f"{kind.__name__} at test_destination_base.py:" in str(error.value)
    assert "report it" in error.value.hint
    assert "secret text" not in str(error.value)


def test_a_finished_call_keeps_no_entry_alive(make: Make) -> None:
    """Idle threads and failed calls hold on to no secret, not even until the next call."""

    class Held:
        """Stands for a secret."""

    destination = make()
    for kind in (None, Conflict, VendorError):
        held = Held()
        watch = weakref.ref(held)

        def does(held: Held = held, kind: type[Exception] | None = kind) -> None:
            if kind is not None:
                raise kind

        destination.does = does
        with contextlib.suppress(DestinationError):
            destination.probe()
        destination.does = lambda: None
        del held, does
        until = time.monotonic() + 5
        while watch() is not None and time.monotonic() < until:
            gc.collect()
            time.sleep(0.001)  # its thread is just about to let go
        assert watch() is None


# --- paths and options --------------------------------------------------------------------


def test_paths_mean_one_place() -> None:
    """Plain paths pass; whatever some store could read as another place does not."""
    good = ["a", "A-b_c.d", "a/b/c", "-", "_x", "0", "a.json", "a./b"]
    assert all(map(is_plain, good))
    assert [path for path in ESCAPES if is_plain(path)] == []


def test_the_prefix_is_part_of_the_identity(make: Make) -> None:
    """Prefix and path give one place, however they are split."""
    split, whole = make(prefix="a/b"), make()
    assert split.identity(TARGET) == whole.identity(Target(to="fake", path="a/b/bot"))
    assert make(prefix="").identity(TARGET) == whole.identity(TARGET)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prefix": "/a"},
        {"prefix": "a/"},
        {"prefix": "../a"},
        {"prefix": "a..b"},
        {"write_limit": "0/s"},
        {"write_limit": "20/m"},
        {"write_limit": 20},
        {"parallel": 0},
        {"parallel": 65},
        {"parallel": "8"},
        {"call_deadline": "soon"},
        {"call_deadline": 10},
        {"unknown": "secret-value"},
    ],
)
def test_wrong_options_are_refused_unseen(wrong: dict[str, Any]) -> None:
    """What cannot be used is refused, and its value is printed nowhere."""
    with pytest.raises(ValueError) as error:
        ConnectionOptions.model_validate(wrong)
    assert "input_value" not in str(error.value)
    assert "secret-value" not in str(error.value)
