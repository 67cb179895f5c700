"""What a run does about drift: copy current forward, count it, and tell of a fight.

`core.repair` says what is wrong and how often it is mended; a rotation is the other way to mend it.
Each copy is a journalled write like any other: under the claim, conditional on what was read, and
what a crash leaves of it is an activation intent of a version that is current already. No verifier
is asked before it: each had to know that version before it was first shown.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from keyturn.casework import Casework
from keyturn.core import repair, steps
from keyturn.core.model import Drift, Effect, Version
from keyturn.core.secret import Secret
from keyturn.core.steps import Run
from keyturn.errors import Conflict, DestinationError, DestinationUnavailable, Rejected
from keyturn.ports import Destination, Entry


@dataclass(slots=True)
class Mending(Casework):
    """The casework of one run, and what it has seen."""

    seen: Run = field(init=False)

    def copy_forward(self, action: steps.CopyForward) -> None:
        """Mend an entry with what another one shows, if the full check says that it is current."""
        entry = self._copied(action)
        key = action.target.key
        self._tell((action.drift,))
        self.case = repair.charged(self.case, [key], self._now())
        try:
            if action.stages:
                self._copy(action, Effect.STAGE, entry)
            if not (action.stages and action.empty):  # else staging has shown it (rule 8)
                self._copy(action, Effect.ACTIVATE, entry)
        except DestinationError as error:
            if not (isinstance(error, DestinationUnavailable) and error.sent):
                self.case = repair.given_back(self.case, key)  # nothing of it was shown
            raise
        kind, source = action.drift.kind, action.source.key
        self._note(
            "entry.repaired", version_id=entry.version_id, outcome=kind, target=key, source=source
        )
        self.seen = self.seen.wrote(key, Effect.ACTIVATE).unsaw(key)

    def _copied(self, action: steps.CopyForward) -> Entry:
        """Read the copy and build the entry anew: only the secret comes from it.

        SECURITY: what is merely found is never published. It must be ours by its marker, name this
        very version and login, and prove by tag and argon2 to be its secret. Raises DestinationError.
        """
        version = self.case.version(action.version_id)
        self.seen = self.seen.searched(action.source.key)  # until it has proven right
        found = self.world.destination(action.source).read(action.source, action.version_id)
        if (
            version is None
            or found.secret is None
            or found.version_id != version.id
            or found.login != version.login
            or found.owner != self.world.journal.store_id
            or not self.world.authority.matches(version, found.secret)
        ):
            raise Rejected(f"what {action.source.key} holds is not the current version")
        self.seen = self.seen.searched(action.source.key, found=True)
        return self._entry(version, found.secret)

    def _copy(self, action: steps.CopyForward, effect: Effect, entry: Entry) -> None:
        def write(destination: Destination) -> str:
            call = destination.stage if effect is Effect.STAGE else destination.activate
            return call(action.target, entry, expected=action.expected)

        self._write(
            action.target,
            effect,
            entry.version_id,
            expected=action.expected,
            exposes=True,
            call=write,
        )

    def _not_mended(self, action: steps.CopyForward, error: DestinationError) -> None:
        """Try no more in this run; one that refuses us for good is left to a rotation to tell of."""
        if action.source.key in self.seen.no_copy:
            return  # it was the copy: another one, or a rotation
        key = action.target.key
        self.seen = self.seen.wrote(key, Effect.ACTIVATE).unsaw(key)
        if not error.retryable and not isinstance(error, Conflict):
            self.seen = self.seen.gave_up(key)

    def _entry(self, version: Version, plain: Secret) -> Entry:
        return Entry(
            login=version.login,
            secret=plain,
            version_id=version.id,
            owner=self.world.journal.store_id,
            fence=version.fence,
            minted_at=version.minted_at,
            not_after=version.not_after,
        )

    # --- what is told -------------------------------------------------------------------------

    def _tell(self, drift: Iterable[Drift]) -> None:
        """Note what was not known yet, and store it: a repair that breaks off leaves it told."""
        drift = tuple(drift)
        known = {(d.target, d.kind) for d in self.case.credential.drift}
        for one in drift:
            if (one.target, one.kind) not in known:
                self._note("drift.found", outcome=one.kind, target=one.target)
        self.case = repair.found(self.case, drift)

    def _opened_for(self, drift: tuple[Drift, ...]) -> None:
        """Count a rotation that mends; one for a current version that is too old mends nothing."""
        self._tell(drift)
        current = self.case.current
        shown = {key: sight.shown for key, sight in self.seen.sights.items()}
        foreign = [d.target for d in drift if current is None or shown[d.target] != current.id]
        if foreign:
            self.case = repair.charged(self.case, [*foreign, repair.WHOLE_AGENT], self._now())

    def _judge(self, drift: Iterable[Drift]) -> None:
        """After a sweep: whether a fight has begun, or is over."""
        before = {one.target for one in repair.fights(self.case)}
        self.case = repair.swept(self.case, drift, self._now())
        after = {one.target for one in repair.fights(self.case)}
        for target in sorted(after - before):
            self._note("repair.fight", outcome="left", target=target)
        for target in sorted(before - after):
            self._note("repair.over", target=target)
