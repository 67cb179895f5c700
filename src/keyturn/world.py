"""What a saga is given: everything outside of it, and what its process carries from run to run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Protocol

from keyturn.core import secret
from keyturn.core.model import Case, Target
from keyturn.core.secret import Secret
from keyturn.core.steps import Plan
from keyturn.errors import DestinationUnavailable, StorageError
from keyturn.ports import Authority, Claim, Clock, Destination, Journal


class Watcher(Protocol):
    """Told about each step as it ends: for progress, logs and metrics. Must not raise."""

    def step(
        self, *, step: str, case: Case, where: str, seconds: float, code: str, detail: str
    ) -> None:
        """One step has ended.

        `code` is the error's code or ""; `detail` what it says, or why the rotation stops here.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Parked:
    """A run that the store broke off: its code, since when, and the claim that it could not give back."""

    code: str
    since: datetime | None
    claim: Claim | None = None


class Carried:
    """What outlives a run but not its process. Thread-safe.

    The plaintext of an open attempt, so that a rotation that waits keeps its version instead of
    minting one per try until the accepted versions are used up. And the calls that have not returned:
    whatever run looks at their intents, they are unresolved until then (rule 2). A crash loses both;
    recovery goes by what destinations hold.
    """

    def __init__(self) -> None:
        self._plain: dict[str, tuple[str, Secret]] = {}
        self._calls: dict[str, Future[Any]] = {}
        self._parked: dict[str, Parked] = {}
        self._awaited: dict[str, tuple[str, int]] = {}
        self._guard = threading.Lock()

    def hold(self, credential_uid: str, version_id: str, plain: Secret) -> None:
        """Keep the plaintext of a credential's open attempt."""
        with self._guard:
            self._plain[credential_uid] = version_id, plain

    def held(self, credential_uid: str, version_id: str | None) -> Secret | None:
        """Return the plaintext of this attempt; that of any other attempt is dropped."""
        with self._guard:
            known, plain = self._plain.get(credential_uid, (None, None))
            if known == version_id:
                return plain
            self._plain.pop(credential_uid, None)
            return None

    def drop(self, credential_uid: str) -> None:
        """Forget the plaintext."""
        with self._guard:
            self._plain.pop(credential_uid, None)

    def awaited(self, credential_uid: str, version_id: str, epoch: int) -> int:
        """Return the first epoch that verifiers were asked about for this version.

        Others move the epoch on: a verifier that is waited for must not be behind anew each time.
        """
        with self._guard:
            known = self._awaited.get(credential_uid)
            if known is None or known[0] != version_id:
                known = self._awaited[credential_uid] = version_id, epoch
            return known[1]

    def follow(self, intent_uid: str, call: Future[Any], journal: Journal) -> None:
        """Report a call's end when it comes: a writer may always report its own intent (rule 2)."""
        with self._guard:
            self._calls[intent_uid] = call

        def report(ended: Future[Any]) -> None:
            with self._guard:
                self._calls.pop(intent_uid, None)
            error = None if ended.cancelled() else ended.exception()
            if isinstance(error, DestinationUnavailable) and error.sent:
                return  # still unknown: it settles by time
            try:
                journal.report(intent_uid, landed=error is None and not ended.cancelled())
            except StorageError:
                return  # the intent stays unresolved and settles by time

        call.add_done_callback(report)

    def park(self, credential_uid: str, parked: Parked) -> None:
        """Remember that a run was broken off: the store, which is why, cannot tell."""
        with self._guard:
            before = self._parked.get(credential_uid)
            if before is not None:
                claim = parked.claim or before.claim
                parked = replace(parked, since=before.since or parked.since, claim=claim)
            self._parked[credential_uid] = parked

    def unpark(self, credential_uid: str) -> None:
        """A run has the claim again."""
        with self._guard:
            self._parked.pop(credential_uid, None)

    def parked(self, credential_uid: str) -> Parked | None:
        """Return why the last run of a credential was broken off, if it was."""
        with self._guard:
            return self._parked.get(credential_uid)

    def give_back(self, journal: Journal, now: datetime) -> None:
        """Give back the claims of runs that were broken off, as soon as the store takes that.

        Until then nobody goes on with those credentials: after a revoke on a full disk the
        successor would wait for a claim to run out.
        """
        with self._guard:
            left = [(uid, one) for uid, one in self._parked.items() if one.claim is not None]
        for uid, one in left:
            if one.claim is not None:
                journal.release(one.claim, wake_at=now)
            with self._guard:
                if self._parked.get(uid) == one:
                    self._parked[uid] = replace(one, claim=None)

    def flying(self) -> frozenset[str]:
        """Return the intents whose call has not returned."""
        with self._guard:
            return frozenset(self._calls)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Everything a saga touches. Time, randomness and ids come in here."""

    journal: Journal
    authority: Authority
    destinations: Mapping[str, Destination]  # by connection name
    plan: Callable[[Case], Plan]
    schedule: Callable[[Case, datetime], datetime | None]  # the next rotation after a promotion
    backoff: Callable[[Plan, int], timedelta]
    sweep_every: timedelta
    clock: Clock
    random_bytes: Callable[[int], bytes]
    new_id: Callable[[], str]
    watcher: Watcher
    stopping: Callable[[], bool] = lambda: False
    prefix: str = secret.DEFAULT_PREFIX
    carried: Carried = field(default_factory=Carried)

    def destination(self, target: Target) -> Destination:
        """Return where a target is. Raises DestinationUnavailable: nothing was sent."""
        found = self.destinations.get(target.to)
        if found is None:
            raise DestinationUnavailable(
                f"no connection is called {target.to}",
                hint="add it under `connections:` and `keyturn reload`",
                sent=False,
            )
        return found
