"""What the rotation of one of the daemon's own credentials does.

A loop like the saga's: load, decide, write the intent, act, write the outcome. `core.own` decides
everything. Its own procedure and journal, because nothing here is a credential of an agent: no
verifier may ever accept it, and the authority mints it, which no copy elsewhere can undo (ADR 22).

What a crash leaves, and what the next run does about it:

  intent to mint     a row                      asks the authority for that very id: there → destroys it
  made               a row, a secret id         as above, for its text died with the process
  accessor saved     a row with its name        what the file shows: proves it, promotes; else destroys it
  proven             the same                   the same
  file replaced      the file shows it          proves what the file holds, promotes
  promoted           current, previous          nothing
  destroyed          a row                      finds it gone
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from keyturn.core import own as life
from keyturn.core.own import Own, OwnAction, OwnPlan, OwnRun, OwnState, OwnStep, OwnVersion
from keyturn.core.secret import Secret
from keyturn.errors import Conflict, Denied, DestinationError, StaleRevision
from keyturn.ports import AuditEntry, Clock, OwnAuthority, OwnJournal

ACTOR = "daemon:own-login"
CONFLICTS_PER_RUN = 3
LONGEST_DETAIL = 300


@dataclass(slots=True)
class Held:
    """The plaintext of an attempt that waits, so that each try does not mint another one."""

    version_id: str | None = None
    plain: Secret | None = None

    def drop(self) -> None:
        """Forget it."""
        self.version_id = self.plain = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnWorld:
    """Everything that a run touches."""

    journal: OwnJournal
    authority: OwnAuthority
    plan: OwnPlan
    clock: Clock
    new_id: Callable[[], str]
    store_id: str
    held: Held
    stopping: Callable[[], bool] = lambda: False


def run(world: OwnWorld, connection: str, host: str) -> datetime | None:
    """Carry one own credential as far as it goes now. Returns when it must be looked at again.

    Trouble with the authority or the file is written down and tried again. Raises StoreUnavailable;
    at StaleRevision, since another run was quicker, it returns at once.
    """
    one = _Run(world, world.journal.own(connection, host) or Own(connection=connection, host=host))
    try:
        return one.run()
    except StaleRevision:
        return world.clock.now()


@dataclass(slots=True)
class _Run:
    world: OwnWorld
    own: Own
    seen: OwnRun = field(default_factory=OwnRun)
    conflicts: int = 0
    barred_by: tuple[OwnAction, DestinationError] | None = None

    def __post_init__(self) -> None:
        self.seen = OwnRun(holding=self.world.held.version_id)

    def run(self) -> datetime | None:
        while not self.world.stopping():
            action = life.decide(self.own, self.seen, self.world.plan, self._now())
            if action.step is OwnStep.REST:
                return self._failed(*self.barred_by) if self.barred_by else self._rested(action)
            try:
                _PERFORM[action.step](self, action)
            except Conflict:
                self.conflicts += 1
                self.seen = replace(self.seen, shown=None)
                if self.conflicts > CONFLICTS_PER_RUN:
                    return self._failed(action, Conflict("the file changes too fast"))
            except DestinationError as error:
                if action.step is not OwnStep.DESTROY:
                    return self._failed(action, error)
                self.barred_by = action, error
                self.seen = replace(self.seen, barred=True)
        return self._now()

    # --- the steps --------------------------------------------------------------------------

    def look(self, action: OwnAction) -> None:
        """Read the file, and ask the authority what that is."""
        del action
        found = self.world.authority.look()
        if found.owner not in ("", self.world.store_id):
            raise Denied(
                "another Keyturn has made what the credential file holds",
                hint="give each daemon a secret id and a file of its own",
            )
        self.seen = replace(self.seen, shown=found.accessor)

    def adopt(self, action: OwnAction) -> None:
        """Somebody put another one there: it is the current one from now on."""
        del action
        found = self.world.authority.look()
        known = self.own.by_accessor(found.accessor)
        version = known or OwnVersion(
            id=self.world.new_id(),
            state=OwnState.CURRENT,
            at=found.made_at or self._now(),
            accessor=found.accessor,
            ends_at=found.ends_at,
        )
        self._show(version, "own-login.adopted")
        self.seen = replace(self.seen, shown=found.accessor)

    def search(self, action: OwnAction) -> None:
        """Look for those whose making was never answered."""
        del action
        asked = [one.id for one in self.own.only(OwnState.MINTING)]
        found = self.world.authority.find(asked)
        changed = life.not_found(self.own, found, self.world.plan, now=self._now())
        for version_id, one in found.items():
            changed = life.made(changed, version_id, accessor=one.accessor, ends_at=one.ends_at)
            changed = life.discarded(changed, version_id)
        self._save(changed, "own-login.surplus" if found else "", *found)
        self.seen = replace(self.seen, searched=True)

    def mint(self, action: OwnAction) -> None:
        """Have one made. Whatever comes of it, the intent names it."""
        del action
        self.world.authority.refuse_unwritable()
        version_id = self.world.new_id()
        self._save(life.minting(self.own, version_id, now=self._now()), "", version_id)
        issued = self.world.authority.issue(version_id, owner=self.world.store_id)
        self._save(
            life.made(self.own, version_id, accessor=issued.accessor, ends_at=issued.ends_at),
            "own-login.minted",
            version_id,
        )
        self.world.held.version_id, self.world.held.plain = version_id, issued.secret
        self.seen = replace(self.seen, holding=version_id)

    def prove(self, action: OwnAction) -> None:
        """Log in with it: from memory before the file has it, from the file afterwards."""
        shown = self.own.version(action.version_id).accessor == self.seen.shown
        try:
            self.world.authority.prove(None if shown else self.world.held.plain)
        except Denied:
            if not shown:  # of no use: another one is made after a pause
                self.discard(action)
            raise
        self.seen = replace(self.seen, proven=action.version_id)

    def publish(self, action: OwnAction) -> None:
        """Put it where the daemon reads it, and read that again. Its row says which one it is."""
        del action
        plain = self.world.held.plain
        if plain is not None:
            self.world.authority.publish(plain, expected=self.seen.shown or "")
        self.seen = replace(self.seen, shown=None)

    def promote(self, action: OwnAction) -> None:
        """It is what the file shows, and a login with it was good."""
        self.world.held.drop()
        version = self.own.version(action.version_id)
        self.own = replace(self.own, rotated_at=self._now())
        self._show(version, "own-login.promoted")
        self.seen = replace(self.seen, holding=None)

    def discard(self, action: OwnAction) -> None:
        """Its text is gone and the file shows another one."""
        self.world.held.drop()
        self._save(
            life.discarded(self.own, action.version_id), "own-login.surplus", action.version_id
        )
        self.seen = replace(self.seen, holding=None)

    def destroy(self, action: OwnAction) -> None:
        """Have the authority refuse it: only while a fresh look at the file shows a good other one."""
        version, found = self.own.version(action.version_id), self.world.authority.look()
        if found.accessor != self.seen.shown or found.accessor == version.accessor:
            raise Conflict
        self.world.authority.destroy(version.accessor)
        self._save(
            life.retired(self.own, action.version_id), "own-login.destroyed", action.version_id
        )

    # --- the journal ------------------------------------------------------------------------

    def _show(self, version: OwnVersion, action: str) -> None:
        grace, now = self.world.plan.grace, self._now()
        self._save(life.shows(self.own, version, grace=grace, now=now), action, version.id)

    def _save(self, after: Own, action: str, *version_ids: str) -> None:
        entries = [self._entry(action, version_id) for version_id in version_ids if action]
        self.own = self.world.journal.save_own(after, audit=entries)

    def _entry(self, action: str, version_id: str = "", outcome: str = "ok") -> AuditEntry:
        return AuditEntry(
            action=action,
            actor=ACTOR,
            version_id=version_id,
            outcome=outcome,
            detail=(("connection", self.own.connection), ("host", self.own.host)),
        )

    def _rested(self, action: OwnAction) -> datetime | None:
        if self.own.problem is not None:
            self._save(replace(self.own, problem=None), "own-login.mended", "")
        return action.until

    def _failed(self, action: OwnAction, error: DestinationError) -> datetime:
        if self.world.stopping():
            return self._now()  # our own doing: connections are closed
        words = " ".join(f"{action.step}: {error}".split())[:LONGEST_DETAIL]
        before = self.own.problem
        failed = life.failed(self.own, error.code, words, now=self._now())
        news = before is None or (before.code, before.detail) != (error.code, words)
        entries = [self._entry("own-login.failing", outcome=error.code)] if news else []
        self.own = self.world.journal.save_own(failed, audit=entries)
        until = failed.problem.until if failed.problem else self._now()
        return max(until, self._now() + error.retry_after) if error.retry_after else until

    def _now(self) -> datetime:
        return self.world.clock.now()


_PERFORM: Mapping[OwnStep, Callable[[_Run, OwnAction], None]] = {
    OwnStep.LOOK: _Run.look,
    OwnStep.ADOPT: _Run.adopt,
    OwnStep.SEARCH: _Run.search,
    OwnStep.MINT: _Run.mint,
    OwnStep.PROVE: _Run.prove,
    OwnStep.PUBLISH: _Run.publish,
    OwnStep.PROMOTE: _Run.promote,
    OwnStep.DISCARD: _Run.discard,
    OwnStep.DESTROY: _Run.destroy,
}
