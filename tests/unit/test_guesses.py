"""Guesses at an imported secret are few, and keep nobody else waiting."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from keyturn.core.secret import Secret
from keyturn.errors import VerificationFailed, VerifierBusy
from keyturn.storage.decisions import Decision
from keyturn.testing.fakes import FakeClock
from keyturn.verifier.decision import Verifier
from keyturn.verifier.gate import Ticket
from keyturn.verifier.guesses import AT_ONCE, BURST, EVERY, Guesses
from keyturn.verifier.hashing import CHEAP_FOR_TESTS, Hashing
from keyturn.verifier.keyring import KeyRing
from keyturn.verifier.schemes import Schemes
from keyturn.verifier.spool import Spool


class Time:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def guess(guesses: Guesses, who: str, *, right: bool = False) -> bool:
    """Make one guess; tell whether it was let through."""
    try:
        with guesses.one(who) as attempt:
            attempt.right = right
    except VerifierBusy:
        return False
    return True


def test_wrong_guesses_have_a_budget_that_comes_back_slowly() -> None:
    """So many at once, then one every few seconds, for each credential apart."""
    time = Time()
    guesses = Guesses(clock=time)
    assert [guess(guesses, "a") for _ in range(BURST + 3)].count(True) == BURST
    with pytest.raises(VerifierBusy) as raised, guesses.one("a"):
        pass
    assert raised.value.retry_after is not None
    assert raised.value.retry_after.total_seconds() == pytest.approx(EVERY)
    assert guess(guesses, "b")
    time.now += EVERY
    assert [guess(guesses, "a") for _ in range(3)] == [True, False, False]
    time.now += EVERY * BURST * 10
    assert [guess(guesses, "a") for _ in range(BURST + 3)].count(True) == BURST


def test_right_ones_and_those_without_an_answer_cost_nothing() -> None:
    """A crowd of good replicas, or a full gate, spends nobody's budget."""
    guesses = Guesses(clock=Time())
    assert all(guess(guesses, "a", right=True) for _ in range(BURST * 5))
    for _ in range(BURST * 5):
        with pytest.raises(VerifierBusy, match="first uses"), guesses.one("a"):
            raise VerifierBusy("too many first uses")
    assert guess(guesses, "a")


class Rows:
    """Agents with an imported secret each."""

    def __init__(self, hashing: Hashing, names: list[str]) -> None:
        self.rows = {name: [row(hashing, name)] for name in names}

    def lookup(self, version_id: str, login: str = "") -> Decision | None:
        return next((r for [r] in self.rows.values() if r.version_id == version_id), None)

    def imported(self, login: str) -> list[Decision]:
        return self.rows.get(login, [])

    def close(self) -> None:
        pass


def row(hashing: Hashing, name: str) -> Decision:
    """Return an imported current version."""
    return Decision(
        not_after=None,
        agent_uid=name,
        agent_name=name,
        login=name,
        agent_state="enabled",  # type: ignore[arg-type]
        credential_uid=f"cred-{name}",
        version_id=name.ljust(14, "x"),
        state="current",  # type: ignore[arg-type]
        scheme="argon2id",
        digest=hashing.digest(Secret(f"imported secret of {name}")),
        tag=None,
        deadline=None,
    )


def says(verifier: Verifier, login: str, text: str) -> bool | None:
    """Return the answer, None where there is none now."""
    try:
        verifier.verify(login, text)
    except VerificationFailed:
        return False
    except VerifierBusy:
        return None
    return True


def test_a_guesser_spends_the_budget_of_one_agent_and_no_thread_of_anybody(tmp_path: Path) -> None:
    """From many threads at one login: few hashes, and the others' first uses go on."""
    names = [f"agent{n}" for n in range(12)]
    hashing = Hashing(cost=CHEAP_FOR_TESTS)
    verifier = Verifier(
        Rows(hashing, names), Spool(tmp_path / "revoked.d"), FakeClock(), hashing=hashing
    )
    hashes, matches = [], Hashing.matches
    right = "imported secret of agent0"
    assert says(verifier, "agent0", right) is True

    class Counting(Hashing):
        def matches(self, digest: str, secret: Secret, ticket: Ticket | None = None) -> bool:
            hashes.append(digest)
            return matches(self, digest, secret, ticket)

    gate = verifier._imported.hashing.gate
    verifier._imported = Schemes(hashing=Counting(gate=gate), ring=KeyRing)
    over = threading.Event()

    def flood(start: int) -> int:
        sent = start
        while not over.is_set():
            assert says(verifier, "agent0", f"a guess, number {sent}") is not True
            sent += 8
        return sent

    with ThreadPoolExecutor(8) as pool:
        floods = [pool.submit(flood, n) for n in range(8)]
        try:
            while len(hashes) < BURST:
                pass
            for name in names[1:]:
                assert says(verifier, name, f"imported secret of {name}") is True
            assert says(verifier, "agent0", right) is True
        finally:
            over.set()
        assert sum(one.result() for one in floods) > BURST
    assert len(hashes) <= BURST + AT_ONCE + len(names) + 5


def test_who_authenticated_before_goes_on_through_any_guessing(tmp_path: Path) -> None:
    """Row 3 of the advisories: 10,000 bad tries at a login refuse its agent not once."""
    hashing = Hashing(cost=CHEAP_FOR_TESTS)
    verifier = Verifier(
        Rows(hashing, ["a"]), Spool(tmp_path / "revoked.d"), FakeClock(), hashing=hashing
    )
    right = "imported secret of a"
    assert says(verifier, "a", right) is True
    for number in range(10_000):
        assert says(verifier, "a", f"a guess, number {number}") is not True
        if number % 100 == 0:
            assert says(verifier, "a", right) is True
