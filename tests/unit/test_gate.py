"""The gate before what costs memory and cores: few at once, in order, and a time for the rest."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from keyturn.core.secret import Secret
from keyturn.errors import VerifierBusy
from keyturn.verifier.gate import Gate
from keyturn.verifier.hashing import CHEAP_FOR_TESTS, Hashing, text_of
from support.http_verifier import Counted, served


def test_the_gate_bounds_what_hashes_at_once() -> None:
    """No more hashes run than there are permits, whoever waits for them."""
    running, most, guard = 0, 0, threading.Lock()
    gate = Gate(2)

    def work(_: int) -> None:
        nonlocal running, most
        with gate.passing():
            with guard:
                running += 1
                most = max(most, running)
            time.sleep(0.005)
            with guard:
                running -= 1

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(64)))

    assert (most, gate.waiting) == (2, 0)


def test_the_gate_keeps_within_its_memory() -> None:
    """Two small ones go together, a big one alone, and one beyond the budget still gets its turn."""
    gate, used, most = Gate(4, memory_kib=100), 0, 0
    guard = threading.Lock()

    def work(size: int) -> None:
        nonlocal used, most
        with gate.passing(size):
            with guard:
                used += size
                most = max(most, used)
            time.sleep(0.005)
            with guard:
                used -= size

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, [40, 40, 100, 40, 40, 90] * 5))
    assert most <= 100
    work(500)


def test_the_gate_goes_by_the_order_of_arrival() -> None:
    """Each permit goes to whoever waits longest, also where somebody is quicker."""
    gate, order = Gate(1), list[int]()

    def work(number: int) -> None:
        with gate.passing():
            order.append(number)

    with ThreadPoolExecutor(20) as pool, gate.passing():
        for number in range(20):
            pool.submit(work, number)
            until = time.monotonic() + 20
            while len(gate._line) <= number:
                assert time.monotonic() < until
                time.sleep(0.001)
    assert order == list(range(20))


def test_a_place_in_the_queue_is_used_or_given_back_once() -> None:
    """None is lost, and none is free twice."""
    gate = Gate(1, queue=2)
    used, left = gate.queue_up(), gate.queue_up()
    with pytest.raises(VerifierBusy):
        gate.queue_up()
    left.give_back()
    left.give_back()
    assert gate.waiting == 1
    with gate.passing(ticket=used):
        assert gate.waiting == 0
    used.give_back()
    assert gate.waiting == 0


def test_a_full_gate_gives_each_one_a_time_of_its_own() -> None:
    """Whoever is turned away comes back in a line, not in a crowd."""
    gate, hold = Gate(1, queue=1, clock=lambda: 100.0), threading.Event()
    entered = threading.Event()

    def occupy() -> None:
        with gate.passing():
            entered.set()
            hold.wait()

    def queue() -> None:
        with gate.passing():
            pass

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(occupy)
        entered.wait()
        second = pool.submit(queue)
        while gate.waiting < 1:
            time.sleep(0.001)
        times = []
        for _ in range(5):
            with pytest.raises(VerifierBusy) as caught, gate.passing():
                pass
            times.append(caught.value.retry_after.total_seconds())
        hold.set()
        first.result()
        second.result()
    assert times == sorted(times)
    assert len({round(one, 6) for one in times}) == 5


def turned_away(gate: Gate, who: str) -> float:
    """Return in how many seconds this one may come back to a gate that is full."""
    with pytest.raises(VerifierBusy) as caught:
        gate.queue_up(who)
    assert caught.value.retry_after is not None
    return caught.value.retry_after.total_seconds()


def test_who_asks_again_and_again_does_not_make_the_line_longer() -> None:
    """Each has one place in it: whoever honours a time must not pay for those who do not."""
    now = [100.0]
    gate = Gate(1, queue=1, clock=lambda: now[0])
    gate.queue_up()
    first = turned_away(gate, "first")
    for _ in range(10_000):
        impatient = turned_away(gate, "impatient")
    assert turned_away(gate, "good") < first + 0.1
    now[0] += impatient / 2
    assert turned_away(gate, "impatient") == pytest.approx(impatient / 2)  # the same moment
    now[0] += impatient  # which is over: a new one
    assert turned_away(gate, "impatient") > 0


def test_a_gate_knows_whoever_guesses_again(tmp_path: Path) -> None:
    """Neither guesses at one hash nor one secret that is shown again and again push others back."""
    digest = Hashing(cost=CHEAP_FOR_TESTS).digest(Secret("x" * 20))
    guessed = Hashing(cost=CHEAP_FOR_TESTS, gate=Gate(1, queue=0))
    shown = Counted(gate=Gate(1, queue=0))
    with served(tmp_path, ["a"], hashing=shown) as service:
        (held,) = service.held
        for number in range(1000):
            guess = Secret(f"{number:020}")
            with pytest.raises(VerifierBusy):
                guessed.matches(digest, guess)
            with pytest.raises(VerifierBusy):
                service.verifier.begin(b"", held.login.encode(), text_of(held.secret))
    assert turned_away(guessed.gate, "good") < 1
    assert turned_away(shown.gate, "good") < 1


def test_a_process_that_was_stopped_in_a_hash_sends_nobody_away_for_hours() -> None:
    """What one hash took then says nothing of how long the next ones take."""
    now = [100.0]
    gate = Gate(1, clock=lambda: now[0])
    with gate.passing():
        now[0] += 3600.0
    for _ in range(64):
        gate.queue_up()
    assert turned_away(gate, "good") < 60
