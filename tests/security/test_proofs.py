"""What a verifier remembers: one secret costs one hash, and no memory outlives a change of the ring."""

from __future__ import annotations

import base64
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from keyturn.daemon.verifier_service import VerifierService
from keyturn.errors import KeyMissing, VerificationFailed
from keyturn.storage.freshness import Epoch, SharedFile
from keyturn.verifier.decision import Verifier
from keyturn.verifier.hashing import CHEAP_FOR_TESTS, Hashing
from keyturn.verifier.keyed import Key
from keyturn.verifier.keyring import KeyRing
from support.cutter import open_store
from support.http_verifier import Counted, Held, fill, served
from support.stores import RealClock

RING = KeyRing(keys={"k1": Key(bytes(range(32)))}, current="k1")


class Turning(SharedFile):
    """Freshness that does something when it is asked for the second time: the hash is over then."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.asked = 0
        self.turn = lambda: None

    def epoch(self) -> Epoch | None:
        self.asked += 1
        if self.asked == 2:
            self.turn()
        return super().epoch()


@contextmanager
def opened(folder: Path, ring: KeyRing | None = None) -> Iterator[tuple[Verifier, Held, Turning]]:
    """Open a verifier that remembers, on a new store with one agent."""
    (folder / "revoked.d").mkdir(mode=0o700)
    held = fill(open_store(folder, writer="w"), ["a"], hashing=_cheap(), ring=ring)[0]
    verifier = Verifier.open(
        f"sqlite:///{folder / 'keyturn.db'}",
        state_dir=folder,
        clock=RealClock(),
        hashing=_cheap(),
        ring=ring,
    )
    verifier._freshness = turning = Turning(folder / "keyturn.db")
    with closing(verifier):
        yield verifier, held, turning


def _cheap() -> Hashing:
    return Hashing(cost=CHEAP_FOR_TESTS)


def spelled(login: str, secret: str, at: int) -> str:
    """Return a header Basic that has one character of the secret percent-encoded."""
    text = f"{secret[:at]}%{ord(secret[at]):02X}{secret[at + 1 :]}"
    return "Basic " + base64.b64encode(f"{login}:{text}".encode()).decode()


def test_a_secret_costs_one_hash_however_it_is_spelled(tmp_path: Path) -> None:
    """Whoever has one good secret cannot keep every core busy by showing it in ever new ways."""
    hashing = Counted()
    with served(tmp_path, ["a"], hashing=hashing) as service:
        held = service.held[0]
        shown = [spelled("a", held.secret.reveal(), at) for at in range(30)]
        shown += [held.basic, f"Bearer {held.secret.reveal()}"]
        for header in shown:
            assert service.ask("/v1/auth", headers={"Authorization": header})[0] == 200
        assert len(service.hashes) == 1


def test_what_the_ring_before_has_proven_is_nowhere_to_be_found(tmp_path: Path) -> None:
    """A key that is taken away while somebody is answered by it answers nobody after that."""
    with opened(tmp_path, RING) as (verifier, held, freshness):
        freshness.turn = lambda: verifier.use(KeyRing())
        key = verifier.key(b"a", held.secret.reveal().encode())  # a desk keeps it beside the header
        assert (
            verifier.decide(key, b"a", held.secret.reveal().encode()) is not None
        )  # it began before
        assert verifier.recall(key, verifier.look()) is None
        with pytest.raises(KeyMissing):
            verifier.verify("a", held.secret)


def test_a_lock_on_the_store_makes_no_doubt_of_a_revocation(tmp_path: Path) -> None:
    """Who can lock the file cannot turn the no of the spool into a 503, also before it was read."""
    with opened(tmp_path) as (verifier, held, _):
        (tmp_path / "revoked.d" / held.version_id).touch()
        with closing(sqlite3.connect(tmp_path / "keyturn.db", isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(VerificationFailed):
                verifier.verify("a", held.secret)
            other.execute("ROLLBACK")


def test_a_reload_with_the_same_keys_has_nobody_hashed_again(tmp_path: Path) -> None:
    """`keyturn reload` reaches every verifier: a fleet must not queue up for hashes at each one."""
    with opened(tmp_path, RING) as (verifier, held, _):
        verifier.verify("a", held.secret)
        key = verifier.key(b"a", held.secret.reveal().encode())
        verifier.use(KeyRing(keys={"k1": Key(bytes(range(32)))}, current="k1"))
        assert verifier.recall(key, verifier.look()) is not None
        verifier.use(KeyRing(keys={"k1": Key(bytes(range(1, 33)))}, current="k1"))
        assert verifier.recall(key, verifier.look()) is None


def test_the_description_of_the_service_is_made_once() -> None:
    """Anybody may ask for it, and nobody who waits for an answer shall wait for that."""
    pages = [
        VerifierService._page(object.__new__(VerifierService), b"/openapi.json") for _ in range(2)
    ]
    assert pages[0] is pages[1]
