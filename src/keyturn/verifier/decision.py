"""Is this secret good? The library call behind every verification.

What was proven is remembered, bound to the store's epoch, to the deadline and to the spool, which are
asked anew for each yes (`storage.freshness`): so no memory can make a stale one. Else, each step
cheaper than the next:

  1. parse     our form, one spelling, right checksum
  2. spool     revoked here, whatever the store says, and also where it cannot be read
  3. row       by the version id in the text: exactly one hash to try
  4. state     login, agent, state, deadline
  5. tag       constant time; a dummy compare where there is no row
  6. hash      at most one, through the gate, one flight per secret; none where it was proven before;
               a keyed one costs what the tag costs, and needs neither gate nor flight
  7. again     after a hash spool and row once more: a revoke during it wins
"""

from __future__ import annotations

import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from keyturn.core.secret import MAX_SECRET_BYTES, ParsedSecret, Secret, parse
from keyturn.errors import StoreUnavailable, VerificationFailed, VerifierBusy
from keyturn.ports import Clock
from keyturn.storage.decisions import Decision, DecisionReader
from keyturn.storage.engine import is_sqlite, sqlite_path
from keyturn.storage.freshness import NO_EPOCH, Epoch, Freshness, SharedFile
from keyturn.storage.hashes import InUse
from keyturn.storage.leases import Leased, Leasing
from keyturn.storage.postgresql import Password, no_password
from keyturn.verifier import keyed
from keyturn.verifier.gate import Gate, Ticket
from keyturn.verifier.guesses import Guesses
from keyturn.verifier.hashing import Fingerprint, Hashing, same_tag, text_of
from keyturn.verifier.keyring import KeyRing
from keyturn.verifier.recent import keep
from keyturn.verifier.schemes import Schemes, Stored
from keyturn.verifier.spool import Spool
from keyturn.verifier.tombstones import ENDED
from keyturn.verifier.usage import Usage

REMEMBERED = 100_000
IMPORTED_QUEUE = 16  # of agents whose imported secret waits for its hash
_ANSWERED_STATES = frozenset({"enabled"})
_ACCEPTED_STATES = frozenset({"pending", "current", "previous", "kept"})
_DUMMY_ID = "0" * 14
_DUMMY_TAG = bytes(8)
_CANDIDATE = re.compile(r"[0-9A-Za-z]{1,16}_[0-9A-Za-z]{14}_[0-9A-Za-z]{49}")


class Reader(Protocol):
    """Where decisions are read from; `storage.decisions.DecisionReader` is the real one."""

    def lookup(self, version_id: str, login: str = "") -> Decision | None:
        """Return the row of a version as it stands now; `login` is whoever presents it."""

    def imported(self, login: str) -> Sequence[Decision]:
        """Return the accepted imported secrets of a login."""

    def in_use(self) -> Sequence[InUse]:
        """Return which schemes and keys accepted versions have."""

    def close(self) -> None:
        """Give the connection back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """A yes: whose secret it is, in which state, and until when if that is limited."""

    agent: str
    login: str
    version_id: str
    state: str
    deadline: datetime | None


class Look(NamedTuple):
    """How things stand at one instant; good for everything that was asked before it.

    `epoch` is None where only the store can tell.
    """

    epoch: Epoch | None
    revoked: Container[str]  # version ids
    now: Callable[[], datetime]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """That a login's secret was right, as of an epoch; `stands` tells whether it still counts."""

    verified: Verified
    digest: str
    epoch: Epoch
    ends: datetime | None
    said: dict[str, Any] = field(
        default_factory=dict, compare=False, repr=False
    )  # the caller's own

    def stands(self, look: Look) -> bool:
        """Whether it is a yes at this look. Raises StoreUnavailable where the spool cannot tell."""
        return (
            self.epoch == look.epoch  # also no later one: a store may go back
            and (self.ends is None or look.now() < self.ends)
            and self.verified.version_id not in look.revoked
        )


# What is left to do where only a hash can tell, with a place in its queue.
_Left = Callable[[Ticket | None], "Decision | None"]


@dataclass(slots=True, kw_only=True)
class Unproven:
    """A secret of which only a hash can tell. `prove` is the rest of the decision."""

    version_id: str  # "" of an imported one
    left: Callable[[Ticket | None], Proof | None]
    ticket: Ticket | None = None

    @property
    def imported(self) -> bool:
        """Whether it has no tag, and waits in a queue of its own."""
        return not self.version_id

    def prove(self) -> Proof | None:
        """Wait for a permit and hash; None is a no. To be called once. Raises StoreUnavailable."""
        try:
            return self.left(self.ticket)
        finally:
            if self.ticket is not None:
                self.ticket.give_back()


class Verifier:
    """Answers for one store. Thread-safe; never writes to the store.

    Without `freshness` it remembers no answer, and reads the store for each one.
    """

    def __init__(
        self,
        reader: Reader,
        spool: Spool,
        clock: Clock,
        *,
        freshness: Freshness | None = None,
        hashing: Hashing | None = None,
        ring: KeyRing | None = None,
        random_bytes: Callable[[int], bytes] = os.urandom,
        usage: Usage | None = None,
    ) -> None:
        self._reader = reader
        self._usage = usage
        if usage is not None:
            usage.look_up_by(reader.lookup, lambda: self._ring)
        self._spool = spool
        self._clock = clock
        self._freshness = freshness
        self._ring = ring or KeyRing()
        self._schemes = Schemes(hashing=hashing or Hashing(), ring=lambda: self._ring)
        # Imported secrets have no tag, so their guesses reach argon2: one at a time, apart, and few.
        self._imported = Schemes(
            hashing=Hashing(gate=Gate(1, queue=IMPORTED_QUEUE)), ring=lambda: self._ring
        )
        self._random_bytes = random_bytes
        self._guesses = Guesses()
        self._fingerprint = Fingerprint(random_bytes(32))
        self._proofs: OrderedDict[bytes, Proof] = OrderedDict()
        self._right: OrderedDict[bytes, None] = (
            OrderedDict()
        )  # hashes that were checked, by `_mark`
        self._flights: dict[bytes, Future[bool]] = {}
        self._guard = threading.Lock()
        self.counts: Counter[str] = Counter()

    @classmethod
    def open(
        cls,
        store_url: str,
        *,
        state_dir: Path,
        clock: Clock,
        password: Password = no_password,
        hashing: Hashing | None = None,
        leasing: Leasing | None = None,
        usage: Usage | None = None,
        ring: KeyRing | None = None,
    ) -> Verifier:
        """Open a verifier on a store; it reads the spool of this host's state folder.

        On PostgreSQL it remembers answers only with `leasing`, and is registered then until it is
        closed; for one or two answers it need not be. `usage` counts its answers; whoever opened that
        closes it, before this one.
        """
        reader = DecisionReader.open(store_url, password=password)
        here = is_sqlite(store_url)
        # On the host of an SQLite file the spool lies beside it; elsewhere there may be none.
        spool = Spool(state_dir / "revoked.d", required=here)
        freshness: Freshness | None = SharedFile(sqlite_path(store_url)) if here else None
        if leasing is not None and not here:
            clock = freshness = Leased.open(
                store_url, leasing, password=password
            )  # the store's time
        return cls(
            reader, spool, clock, freshness=freshness, hashing=hashing, ring=ring, usage=usage
        )

    @property
    def waiting(self) -> int:
        """How many wait for their turn to hash."""
        return self._schemes.hashing.gate.waiting

    def probe(self) -> None:
        """Do what a decision needs, for nobody's secret. Raises StoreUnavailable where it cannot."""
        self.look()
        self._spool.holds(_DUMMY_ID)
        self._reader.lookup(_DUMMY_ID)

    def close(self) -> None:
        """Give the connections back."""
        self._reader.close()
        if self._freshness is not None:
            self._freshness.close()

    def staleness(self) -> float:
        """Return how many seconds old what it remembers by is: a lease's newest answered poll."""
        return self._freshness.staleness() if self._freshness is not None else 0.0

    def verify(self, login: str | None, secret: Secret | str | bytes) -> Verified:
        """Return whose secret this is; without a login, whoever has it.

        Raises VerificationFailed for every no, with one text for all of them, and StoreUnavailable
        where nobody can tell now: that is neither a yes nor a no.
        """
        name, text = _bytes_of_login(login), _bytes_of(secret)
        try:
            found = None if name is None or text is None else self._answer(name, text)
        except StoreUnavailable as error:
            self.count(error)
            raise
        self.count(found)
        if found is None:
            raise VerificationFailed
        return found.verified

    def count(self, answer: Proof | StoreUnavailable | None) -> None:
        """Count an answer that was given."""
        if isinstance(answer, Proof):
            if self._usage is not None:
                self._usage.accepted(answer.verified)
            late = answer.verified.state == "previous"
            self.counts["accepted_previous" if late else "accepted"] += 1
            return
        result = "refused"
        if answer is not None:
            result = "limited" if isinstance(answer, VerifierBusy) else "unavailable"
        self.counts[result] += 1
        if self._usage is not None:
            self._usage.failed(result)

    # --- keys -------------------------------------------------------------------------------

    def use(self, ring: KeyRing) -> None:
        """Go by these keys and schemes from now on; what other ones have proven is forgotten."""
        if ring == self._ring:
            return  # a reload is no reason to have a whole fleet hashed again
        with self._guard:
            self._ring = ring
            # Whoever decides by the old ring just now remembers nothing: `_remember` looks at the key.
            self._fingerprint = Fingerprint(self._random_bytes(32))
            self._proofs.clear()
            self._right.clear()

    def lacking(self) -> list[str]:
        """Say which keys of accepted versions are missing here; any makes a verifier not ready.

        Raises StoreUnavailable.
        """
        return list(self._ring.lacking(self._reader.in_use()))

    # --- what is remembered -----------------------------------------------------------------

    def look(self) -> Look:
        """Look once, for any number of `recall`s: microseconds, and it waits for nothing.

        Raises StoreUnavailable where this process may not answer now.
        """
        epoch = self._freshness.epoch() if self._freshness is not None else None
        return Look(epoch, self._spool.glance(), self._clock.now)

    def is_tombstoned(self, text: bytes, look: Look) -> bool:
        """Whether the spool refuses this secret, so that `begin` will not ask the store."""
        parsed = parse(text)
        try:
            return parsed is not None and parsed.version_id in look.revoked
        except StoreUnavailable:
            return False

    def key(self, *shown: bytes) -> bytes:
        """Return under what an answer is remembered: login, b"" for whoever has it, secret, and more."""
        return self._fingerprint.of(*shown)

    def recall(self, key: bytes, look: Look) -> Proof | None:
        """Return the yes that is remembered, None where it must be decided. Waits for nothing.

        Raises StoreUnavailable where the spool cannot tell.
        """
        proof = self._proofs.get(key)
        return proof if proof is not None and proof.stands(look) else None

    def was_right(self, key: bytes) -> bool:
        """Whether what was shown was a yes here, at some time: what it is now must be decided."""
        return key in self._proofs

    def _remember(self, key: bytes, proof: Proof, text: bytes, ours: Fingerprint) -> None:
        mark = ours.of(proof.digest.encode(), text)
        with self._guard:
            # SECURITY: callers keep keys, and would find under one what the ring before has proven.
            if self._fingerprint is ours:
                keep(self._proofs, key, proof, most=REMEMBERED)
                keep(self._right, mark, None, most=REMEMBERED)

    # --- what is decided --------------------------------------------------------------------

    def _answer(self, login: bytes, text: bytes) -> Proof | None:
        key = self.key(login, text)
        look = self.look()
        if (proof := self.recall(key, look)) is not None:
            return proof
        return self.decide(key, login, text)

    def decide(
        self, key: bytes, login: bytes, text: bytes, *, agents: Container[str] | None = None
    ) -> Proof | None:
        """Ask the store, and hash where need be; None is a no. May wait for both.

        `agents` are the only ones that whoever asks may hear of: a secret of another one is not even
        hashed, or the time would tell what the answer does not. Raises StoreUnavailable.
        """
        found = self._begin(key, login, text, agents)
        return found.prove() if isinstance(found, Unproven) else found

    def begin(
        self, key: bytes, login: bytes, text: bytes, *, agents: Container[str] | None = None
    ) -> Proof | Unproven | None:
        """Decide as far as that goes without a hash; a place in the queue for it is taken then.

        Raises StoreUnavailable, VerifierBusy where that queue is full.
        """
        found = self._begin(key, login, text, agents)
        if isinstance(found, Unproven) and not found.imported:
            found.ticket = self._schemes.hashing.gate.queue_up(found.version_id)
        return found

    def _begin(
        self, key: bytes, login: bytes, text: bytes, agents: Container[str] | None
    ) -> Proof | Unproven | None:
        ours = self._fingerprint
        parsed, secret = parse(text), Secret(text.decode())
        before = self._known_epoch(parsed)
        found = (
            self._decide_imported(login.decode("ascii"), secret, agents)
            if parsed is None
            else self._decide(login.decode("ascii"), parsed.version_id, secret, agents)
        )

        def end(row: Decision | None) -> Proof | None:
            if self._freshness is not None:
                self._freshness.epoch()  # a lease may have run out meanwhile
            if row is None:
                return None
            if row.epoch[:2] < before[:2]:  # some other server than the one that the epoch is from
                raise StoreUnavailable("the store answered with what it said before")
            proof = _proof(row, before if before.same_store(row.epoch) else NO_EPOCH)
            self._remember(key, proof, text, ours)
            return proof

        if found is None or isinstance(found, Decision):
            return end(found)
        left = found
        return Unproven(
            version_id=parsed.version_id if parsed else "",
            left=lambda ticket: end(left(ticket)),
        )

    def _known_epoch(self, parsed: ParsedSecret | None) -> Epoch:
        """Return what the next look will say unless something happens; asks the store if need be."""
        if self._freshness is None:
            return NO_EPOCH
        if (known := self._freshness.epoch()) is not None:
            return known
        # SECURITY: as in `_decide`: whom the spool refuses is refused also while the store is locked.
        refused = parsed is not None and self._spool.holds(parsed.version_id)
        return NO_EPOCH if refused else self._freshness.learn()

    def _decide(
        self, login: str, version_id: str, secret: Secret, agents: Container[str] | None
    ) -> Decision | _Left | None:
        # SECURITY: before the store is touched: whoever can lock it must not turn this no into
        # "cannot tell", which some callers let through, nor make it wait for the lock.
        revoked = self._spool.holds(version_id)
        row = None if revoked else self._reader.lookup(version_id, login)
        good = row is not None and self._stands(login, row) and _among(agents, row)
        shown = self._tombstone(version_id, secret) if revoked else row
        # SECURITY: unknown, revoked and wrong all end at a compare of one tag.
        expected = shown.tag if shown is not None and shown.tag else _DUMMY_TAG
        tagged = same_tag(expected, version_id if shown else _DUMMY_ID, secret)
        if shown is not None and tagged:
            self._watch(shown, secret)
        if row is None or not good or not tagged:
            return None
        if self._was_proven(row, secret):
            return row
        if row.scheme == keyed.SCHEME:
            return row if self._schemes.matches(Stored.of(row), secret) else None
        proven = row

        def left(ticket: Ticket | None) -> Decision | None:
            # Another one, who wrote the same secret in another way, may have been first.
            right = self._was_proven(proven, secret) or self._hashed(proven, secret, ticket)
            return self._once_more(login, proven) if right else None

        return left

    def _tombstone(self, version_id: str, secret: Secret) -> Decision | None:
        return None if self._usage is None else self._usage.tombstone(version_id, secret)

    def _watch(self, shown: Decision, secret: Secret) -> None:
        if self._usage is not None and shown.state in ENDED:
            self._usage.presented(shown, secret)

    def _decide_imported(
        self, login: str, secret: Secret, agents: Container[str] | None
    ) -> Decision | _Left | None:
        rows = [
            row
            for row in (self._reader.imported(login) if login else ())
            if self._stands(login, row) and _among(agents, row)
        ]
        for row in rows:
            if self._was_proven(row, secret):
                return row

        def left(_ticket: Ticket | None) -> Decision | None:
            for row in rows:
                with self._guesses.one(row.credential_uid) as guess:
                    guess.right = self._imported.matches(Stored.of(row), secret)
                if guess.right:
                    return self._once_more(login, row)
            return None

        return left if rows else None

    def _once_more(self, login: str, row: Decision) -> Decision | None:
        again = self._reader.lookup(row.version_id, login)
        if again is None or again.digest != row.digest or not self._stands(login, again):
            return None
        return again

    def _stands(self, login: str, row: Decision) -> bool:
        """Whether spool, login, states and deadline allow a yes right now."""
        return (
            not self._spool.holds(row.version_id)
            and login in ("", row.login)
            and row.agent_state in _ANSWERED_STATES
            and row.state in _ACCEPTED_STATES
            and all(end is None or self._now(row) < end for end in (row.deadline, row.not_after))
        )

    def _now(self, row: Decision) -> datetime:
        """The store's time: it came with the row, or this host's clock is the one that counts.

        What has passed since the look-up is left out: nobody is refused before that is sure.
        """
        return row.now or self._clock.now()

    def _mark(self, row: Decision, secret: Secret) -> bytes:
        """Return what a check of this hash is known by.

        SECURITY: not by how the secret was shown. One can be written in more ways than anybody counts
        (each character percent-encoded or not), and each would cost a hash.
        """
        return self._fingerprint.of(row.digest.encode(), text_of(secret))

    def _was_proven(self, row: Decision, secret: Secret) -> bool:
        """Whether this text had this very hash before: that does not change."""
        return self._mark(row, secret) in self._right

    def _hashed(self, row: Decision, secret: Secret, ticket: Ticket | None) -> bool:
        """Check the hash; one flight for many callers."""
        key = self._mark(row, secret)
        with self._guard:
            flight = self._flights.get(key)
            mine = flight is None
            if flight is None:
                flight = self._flights[key] = Future()
        if mine:
            self._fly(key, flight, lambda: self._schemes.matches(Stored.of(row), secret, ticket))
        return flight.result()

    def _fly(self, key: bytes, flight: Future[bool], check: Callable[[], bool]) -> None:
        try:
            right = check()
        except BaseException as error:
            with self._guard:
                del self._flights[key]
            flight.set_exception(error)
            raise
        with self._guard:
            del self._flights[key]
        flight.set_result(right)


def _among(agents: Container[str] | None, row: Decision) -> bool:
    return agents is None or row.agent_name in agents


def _proof(row: Decision, epoch: Epoch) -> Proof:
    ends = [end for end in (row.deadline, row.not_after) if end is not None]
    verified = Verified(
        agent=row.agent_name,
        login=row.login,
        version_id=row.version_id,
        state=row.state,
        deadline=row.deadline,
    )
    return Proof(verified=verified, digest=row.digest, epoch=epoch, ends=min(ends, default=None))


def identify(text: str) -> list[str]:
    """Return the public version ids of every secret of our form in a text, first ones first."""
    parsed = (parse(candidate.encode()) for candidate in _CANDIDATE.findall(text))
    return list(dict.fromkeys(found.version_id for found in parsed if found is not None))


def _bytes_of_login(login: str | None) -> bytes | None:
    """Return the bytes of a login, b"" for none; None for what no login of ours can be."""
    if login is None:
        return b""
    # A database may choke on another character, and that is no answer.
    return login.encode() if login and login.isascii() and login.isprintable() else None


def _bytes_of(value: Secret | str | bytes) -> bytes | None:
    """Return what was presented as bytes, None where it can be no secret at all."""
    if isinstance(value, Secret):
        value = value.reveal()
    try:
        if isinstance(value, str):
            value = value.encode()
        else:
            value.decode()
    except UnicodeError:  # no text, or a lone surrogate
        return None
    return value if 0 < len(value) <= MAX_SECRET_BYTES else None
