"""Is this secret good? The library call behind every verification.

The order, each step cheaper than the next:

  1. parse     our form, one spelling, right checksum
  2. spool     revoked here, whatever the store says, and also where it cannot be read
  3. row       by the version id in the text: exactly one hash to try
  4. state     login, agent, state, deadline
  5. tag       constant time; a dummy compare where there is no row
  6. hash      at most one argon2, through the gate, one flight per secret
  7. again     spool and row once more: a revoke during the hash wins

Only the result of argon2 is remembered, never a decision: row, spool and deadline are read anew for
each call, so no memory can make a stale yes.
"""

from __future__ import annotations

import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from keyturn.core.secret import MAX_SECRET_BYTES, Secret, parse
from keyturn.errors import StoreUnavailable, VerificationFailed
from keyturn.ports import Clock
from keyturn.storage.decisions import Decision, DecisionReader
from keyturn.storage.engine import is_sqlite
from keyturn.storage.postgresql import Password, no_password
from keyturn.verifier.hashing import Hashing, fingerprint, same_tag, text_of
from keyturn.verifier.spool import Spool

REMEMBERED = 100_000
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

    def close(self) -> None:
        """Give the connection back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """A yes: whose secret it is, in which state, and until when if that is limited."""

    agent: str
    version_id: str
    state: str
    deadline: datetime | None


class Verifier:
    """Answers for one store. Thread-safe; never writes to the store."""

    def __init__(
        self,
        reader: Reader,
        spool: Spool,
        clock: Clock,
        *,
        hashing: Hashing | None = None,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._reader = reader
        self._spool = spool
        self._clock = clock
        self._hashing = hashing or Hashing()
        # Imported secrets have no tag, so their guesses reach argon2: one at a time, apart.
        self._imported = Hashing(gate=threading.BoundedSemaphore(1))
        self._key = random_bytes(32)
        self._known: OrderedDict[bytes, None] = OrderedDict()
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
    ) -> Verifier:
        """Open a verifier on a store; it reads the spool of this host's state folder."""
        reader = DecisionReader.open(store_url, password=password)
        # On the host of an SQLite file the spool lies beside it; elsewhere there may be none.
        spool = Spool(state_dir / "revoked.d", required=is_sqlite(store_url))
        return cls(reader, spool, clock, hashing=hashing)

    def close(self) -> None:
        """Give the connection back."""
        self._reader.close()

    def verify(self, login: str, secret: Secret | str | bytes) -> Verified:
        """Return whose secret this is.

        Raises VerificationFailed for every no, with one text for all of them, and StoreUnavailable
        where nobody can tell now: that is neither a yes nor a no.
        """
        try:
            row = self._decide(login, _as_secret(secret))
        except StoreUnavailable:
            self.counts["unavailable"] += 1
            raise
        if row is None:
            self.counts["refused"] += 1
            raise VerificationFailed
        late = row.state == "previous"
        self.counts["accepted_previous" if late else "accepted"] += 1
        return Verified(
            agent=row.agent_name,
            version_id=row.version_id,
            state=row.state,
            deadline=row.deadline,
        )

    def _decide(self, login: str, secret: Secret | None) -> Decision | None:
        # No login of ours has another character; a database may choke on one, and that is no answer.
        if secret is None or not (login.isascii() and login.isprintable()):
            return None
        parsed = parse(text_of(secret))
        if parsed is None:
            return self._decide_imported(login, secret)
        # SECURITY: before the store is touched: whoever can lock it must not turn this no into
        # "cannot tell", which some callers let through, nor make it wait for the lock.
        revoked = self._spool.holds(parsed.version_id)
        row = None if revoked else self._reader.lookup(parsed.version_id, login)
        good = row is not None and self._stands(login, row)
        # SECURITY: unknown, revoked and wrong all end at a compare of one tag.
        expected = row.tag if row is not None and row.tag else _DUMMY_TAG
        tagged = same_tag(expected, parsed.version_id if row else _DUMMY_ID, secret)
        if row is None or not good or not tagged or not self._hashed(login, row, secret):
            return None
        return self._once_more(login, row)

    def _decide_imported(self, login: str, secret: Secret) -> Decision | None:
        for row in self._reader.imported(login):
            if self._stands(login, row) and self._imported.matches(row.digest, secret):
                return self._once_more(login, row)
        return None

    def _once_more(self, login: str, row: Decision) -> Decision | None:
        again = self._reader.lookup(row.version_id, login)
        if again is None or again.digest != row.digest or not self._stands(login, again):
            return None
        return again

    def _stands(self, login: str, row: Decision) -> bool:
        """Whether spool, login, states and deadline allow a yes right now."""
        return (
            not self._spool.holds(row.version_id)
            and row.login == login
            and row.agent_state in _ANSWERED_STATES
            and row.state in _ACCEPTED_STATES
            and all(end is None or self._now(row) < end for end in (row.deadline, row.not_after))
        )

    def _now(self, row: Decision) -> datetime:
        """The store's time: it came with the row, or this host's clock is the one that counts.

        What has passed since the look-up is left out: nobody is refused before that is sure.
        """
        return row.now or self._clock.now()

    def _hashed(self, login: str, row: Decision, secret: Secret) -> bool:
        """Check the hash, or remember that it was checked; one flight for many callers."""
        parts = (login.encode(), row.version_id.encode(), row.digest.encode())
        key = fingerprint(self._key, *parts, secret=secret)
        with self._guard:
            if key in self._known:
                self._known.move_to_end(key)
                return True
            flight = self._flights.get(key)
            mine = flight is None
            if flight is None:
                flight = self._flights[key] = Future()
        if mine:
            self._fly(key, flight, row.digest, secret)
        return flight.result()

    def _fly(self, key: bytes, flight: Future[bool], digest: str, secret: Secret) -> None:
        try:
            right = self._hashing.matches(digest, secret)
        except BaseException as error:
            with self._guard:
                del self._flights[key]
            flight.set_exception(error)
            raise
        with self._guard:
            del self._flights[key]
            if right:
                self._known[key] = None
                while len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)
        flight.set_result(right)


def identify(text: str) -> list[str]:
    """Return the public version ids of every secret of our form in a text, first ones first."""
    parsed = (parse(candidate.encode()) for candidate in _CANDIDATE.findall(text))
    return list(dict.fromkeys(found.version_id for found in parsed if found is not None))


def _as_secret(value: Secret | str | bytes) -> Secret | None:
    """Take what was presented, if it can be a secret at all."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            return None
    secret = value if isinstance(value, Secret) else Secret(value)
    try:
        return secret if 0 < len(secret) <= MAX_SECRET_BYTES else None
    except UnicodeEncodeError:  # a lone surrogate is no text
        return None
