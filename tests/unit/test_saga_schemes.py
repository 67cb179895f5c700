"""The saga when the scheme of hashes changes, and when a key is not there: nobody is ever refused (I1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta

import pytest

from keyturn.core.model import RotationState, VersionState
from keyturn.errors import StoreUnavailable, VerifierBusy
from keyturn.storage.decisions import Decision
from keyturn.storage.hashes import in_use
from keyturn.verifier.gate import Gate
from keyturn.verifier.keyed import Key
from keyturn.verifier.keyring import KeyRing
from support.bench import Bench, Crash

HMAC, ARGON2 = "hmac-sha256", "argon2id"
Make = Callable[..., Bench]


@pytest.fixture
def make() -> Iterator[Make]:
    """Build benches of a scheme, and give back what they hold."""
    made: list[Bench] = []

    def build(*shapes: str, scheme: str = HMAC) -> Bench:
        made.append(Bench(*shapes, scheme=scheme))
        made[-1].go()
        made[-1].assert_home()
        return made[-1]

    yield build
    for bench in made:
        bench.close()


def change(bench: Bench, scheme: str) -> None:
    """Give the policy another scheme, as a reload does."""
    bench.policy = replace(bench.policy, scheme=scheme)


def schemes(bench: Bench) -> dict[VersionState, str]:
    """Return the scheme of each accepted version."""
    return {version.state: version.scheme for version in bench.case.accepted}


def _story(bench: Bench, then: str) -> None:
    """Mint the first version, change the scheme, rotate, retire the old one."""
    scheme = bench.policy.scheme
    while True:
        change(bench, scheme)
        bench.crashing_run()
        if bench.case.rotation is None and bench.at_home():
            break
        bench.pass_time(timedelta(seconds=30))
    change(bench, then)
    bench.ask()
    bench.go(until=lambda: bench.quiet() and bench.case.credential.request is None)


@pytest.mark.parametrize(
    ("shapes", "then"),
    [
        (("staging",), ARGON2),
        pytest.param(("staging", "azure"), HMAC, marks=pytest.mark.full),
        pytest.param(("staging", "azure"), ARGON2, marks=pytest.mark.full),
        pytest.param(("vault", "file"), HMAC, marks=pytest.mark.full),
    ],
)
def test_a_crash_at_every_point_converges(shapes: tuple[str, ...], then: str) -> None:
    """Also under hmac-sha256, and while the scheme changes, with at most one version more (I1, I4, I5)."""
    whole = Bench(*shapes, scheme=HMAC)
    _story(whole, then)
    whole.close()
    for number, name in enumerate(whole.points):
        bench = Bench(*shapes, scheme=HMAC)
        bench.crash_at = lambda at, _name, number=number: at == number
        try:
            _story(bench, then)
            bench.assert_home()
            minted = len(bench.versions())
            assert schemes(bench) == {VersionState.CURRENT: then}
        finally:
            bench.close()

        assert bench.crashes == 1, (number, name)
        assert minted <= 3, (number, name, bench.steps.done)


@pytest.mark.parametrize(("before", "after"), [(ARGON2, HMAC), (HMAC, ARGON2)])
def test_a_change_of_scheme_refuses_nobody(make: Make, before: str, after: str) -> None:
    """Both versions are accepted through the grace, each by its own scheme; I1 is looked at all along."""
    bench = make("staging", "azure", scheme=before)
    change(bench, after)
    bench.ask()
    bench.run()

    assert schemes(bench) == {VersionState.PREVIOUS: before, VersionState.CURRENT: after}
    assert len(bench.texts) == 2
    assert all(bench.accepts(*text) for text in bench.texts.values())
    bench.go()
    assert schemes(bench) == {VersionState.CURRENT: after}
    assert [(one.scheme, one.versions) for one in in_use(bench.database)] == [(after, 1)]


@pytest.mark.parametrize(("before", "after"), [(ARGON2, HMAC), (HMAC, ARGON2)])
def test_a_pending_version_of_the_old_scheme_is_recovered(
    make: Make, before: str, after: str
) -> None:
    """A crash, and another policy at the restart: the copy is proven by the scheme of its row."""
    bench = make("staging", scheme=before)
    bench.crash_at = lambda _at, name: name == "after stage d0"
    bench.ask()
    assert bench.crashing_run()
    change(bench, after)
    bench.go()

    assert bench.case.current is not None
    assert bench.case.current.scheme == before
    assert len(bench.versions()) == 2  # rolled forward, not minted anew
    bench.ask()
    bench.go()
    assert schemes(bench) == {VersionState.CURRENT: after}


def test_without_its_key_nothing_is_minted_and_nobody_is_told_no(make: Make) -> None:
    """A rotation waits and says for which key; what the key made gets 503; with it all goes on."""
    bench = make("vault")
    bench.watched = False
    keys = bench.ring.keys
    bench.use(keys={}, unusable={"k1": "its file cannot be read"})
    ((login, text),) = bench.texts.values()
    with pytest.raises(StoreUnavailable, match="k1"):
        bench.verifier.verify(login, text)
    assert ["k1" in one for one in bench.verifier.lacking()] == [True]

    bench.ask()
    for _ in range(3):
        bench.run()
        bench.clock.advance(timedelta(seconds=30))
    rotation = bench.case.rotation
    assert rotation is not None
    assert rotation.state is RotationState.WAITING
    assert rotation.waiting is not None
    assert (rotation.waiting.code, "k1" in rotation.waiting.detail) == ("key-missing", True)
    assert len(bench.versions()) == 1

    bench.use(keys=keys, unusable={})
    bench.watched = True
    assert bench.accepts(login, text)
    assert bench.verifier.lacking() == []
    bench.go()
    assert len(bench.versions()) == 2


def test_a_copy_that_cannot_be_judged_is_neither_taken_nor_dropped(make: Make) -> None:
    """Recovery without the key waits: the pending version is neither minted anew nor let go."""
    bench = make("staging")
    keys = bench.ring.keys
    bench.crash_at = lambda _at, name: name == "after stage d0"
    bench.ask()
    with pytest.raises(Crash):
        bench.run()
    bench.restart()
    bench.watched = False
    bench.use(keys={"k1": Key(bytes(32))})  # a wrong file under the same id
    bench.run()
    bench.clock.advance(timedelta(minutes=2))
    bench.run()

    assert len(bench.versions()) == 2
    assert bench.case.pending is not None
    bench.use(keys=keys)
    bench.watched = True
    bench.go()
    assert len(bench.versions()) == 2


def test_a_new_key_takes_over_at_the_next_rotation(make: Make) -> None:
    """Both keys are good through the grace; then the old one can go, and what it proved is forgotten."""
    bench = make("azure")
    old = bench.ring.keys["k1"]
    bench.use(keys={"k1": old, "k2": Key(b"2" * 32)}, current="k2")
    bench.ask()
    bench.run()
    assert all(bench.accepts(*text) for text in bench.texts.values())
    (first, text), *_ = bench.texts.items()
    bench.watched = False
    bench.use(keys={"k2": bench.ring.keys["k2"]})
    with pytest.raises(StoreUnavailable):  # it was remembered as right until the reload
        bench.verifier.verify(*text)
    assert len(bench.verifier.lacking()) == 1
    bench.use(keys={"k1": old, "k2": bench.ring.keys["k2"]})
    bench.watched = True
    bench.go()

    bench.use(keys={"k2": bench.ring.keys["k2"]})
    assert bench.verifier.lacking() == []
    assert bench.version(first).state is VersionState.RETIRED
    bench.assert_home()


@pytest.mark.parametrize("scheme", [HMAC, ARGON2])
def test_a_keyed_check_passes_no_gate_and_looks_once(
    make: Make, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where argon2id is turned away at a full gate, a keyed hash is judged by one look at the store."""
    bench = make("vault", scheme=scheme)
    (text,) = bench.texts.values()
    bench.verifier.use(KeyRing())  # nothing is remembered
    bench.verifier.use(bench.ring)
    looked: list[str] = []
    lookup = bench.verifier._reader.lookup

    def counted(version_id: str, login: str = "") -> Decision | None:
        looked.append(version_id)
        return lookup(version_id, login)

    monkeypatch.setattr(bench.verifier._reader, "lookup", counted)
    object.__setattr__(bench.hashing, "gate", Gate(1, queue=0))
    if scheme == HMAC:
        assert bench.accepts(*text)
    else:
        with pytest.raises(VerifierBusy):
            bench.verifier.verify(*text)
    assert len(looked) == 1
