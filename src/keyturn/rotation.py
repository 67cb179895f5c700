"""What a rotation does. One `run` serves one credential under one claim.

The loop is: load, decide, write the intent, act, write the outcome. `core.decision` decides
everything; this module only carries it out. The steps of a rotation, in their order:

  1. open       its list of destinations is fixed; nothing outside has happened yet
  2. observe    every destination is read before the first side effect
  3. mint       a new secret, in memory only
  4. accept     its hash is committed: from here on the verifier says yes to it
  5. verifiers  wait until every verifier knows
  6. stage      where a destination can: written, read back by version id, compared
  7. activate   intent, write, and the ordinary read again: agents now read the new version
  8. promote    one transaction: new is current, old is previous with a deadline
  9. retire     when the deadline has passed and a fresh read shows it nowhere

What a crash leaves, and what the next run does about it:

  after open        a row                    mint
  after mint        nothing                  mint again; no version is used up
  after accept      hash, pending            no copy anywhere and not exposed: retire it, mint again
  intent to stage   intent                   found by version id: go on; else mint again
  staged            a copy                   take the secret from the copy, go on
  intent to show    intent, exposed          shown: confirm; a copy elsewhere: new intent with a newly
                                             read token; no copy: kept, mint again; unreadable: wait
  write answered    outcome                  read again
  confirmed         nothing more             confirmations are void: read all again
  promoted          current, previous        nothing
  grace             deadlines                settle, read everywhere, set the deadline
  retirement        intent per copy          repeat until gone; never the one shown
  intent to copy    intent                   as an intent to show: current is there, or it is copied again
  intent to withdraw  intent                 shows none of ours: done; the revoked one: again, by the
                                             sweep; a later one: left alone
  claim lost        as above                 the loser drops its memory; it may report its own intents
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from keyturn.core import lifecycle, repair, secret, steps
from keyturn.core.decision import decide, nowhere
from keyturn.core.model import Cause, Effect, Look, Target, WaitReason
from keyturn.core.secret import Secret
from keyturn.core.steps import Action, Plan, Run, Sight, Trouble
from keyturn.errors import (
    ClaimLost,
    Conflict,
    DestinationError,
    DestinationUnavailable,
    IllegalTransition,
    KeyMissing,
    KeyturnError,
    Rejected,
    StaleRevision,
    StoreUnavailable,
)
from keyturn.mending import Mending
from keyturn.ports import Destination, Entry, Observed
from keyturn.sight import look
from keyturn.world import Parked, World

CLAIM_TTL = timedelta(seconds=60)
CONFLICTS_PER_RUN = 3
LONGEST_DETAIL = 300
KEY_AGAIN = timedelta(seconds=5)


def run(world: World, credential_uid: str, *, holder: str) -> datetime | None:
    """Carry one credential as far as it goes now. Returns when it must be looked at again.

    Raises StoreUnavailable where the store does; the claim is then given back as soon as the store
    takes that (`Carried.give_back`), or runs out by itself. Returns at once where somebody else has
    the claim.
    """
    claim = None
    try:
        taken = world.journal.claim(credential_uid, holder=holder, ttl=CLAIM_TTL)
        if taken is None:
            return None
        claim, saved = taken
        until = _Saga(world, claim, saved).run()
    except ClaimLost:
        until = None  # the taker starts at its row; what we knew is void
    except StoreUnavailable as error:
        parked = Parked(code=error.code, since=_now_if_known(world), claim=claim)
        world.carried.park(credential_uid, parked)
        raise
    world.carried.unpark(credential_uid)
    return until


def _now_if_known(world: World) -> datetime | None:
    """Return the store's time; a database that is away cannot be asked for it."""
    try:
        return world.clock.now()
    except StoreUnavailable:
        return None


@dataclass(slots=True)
class _Saga(Mending):
    """The state of one run: its casework, and what was seen."""

    plan: Plan = field(init=False)
    plain: Secret | None = None
    conflicts: int = 0
    rest: steps.Rest | None = None  # the claim was given back, and this is what was decided

    def __post_init__(self) -> None:
        self._take_up()

    # --- the loop ---------------------------------------------------------------------------

    def run(self) -> datetime | None:
        """Decide and act until there is nothing to do; all is saved and the claim free by then."""
        try:
            while self.rest is None:
                self._turn()
        except ClaimLost:
            self._report()
            self.world.carried.drop(self.claim.credential_uid)
            raise
        return self.rest.until

    def _turn(self) -> None:
        action = self._next()
        if not isinstance(action, steps.Rest):
            self._perform(action)
            return
        try:
            self._give_back(action)
        except StaleRevision:
            self._start_over()

    def _next(self) -> Action:
        if self.world.stopping():
            return steps.Rest(until=self._now())
        self._refresh()
        return decide(self.case, self.seen, self.plan, self._now())

    def _perform(self, action: Action) -> None:
        began, code, where, detail = time.monotonic(), "", _where(action), _detail(action)
        case = self.case
        try:
            _PERFORM[type(action)](self, action)
        except StaleRevision:
            code = StaleRevision.code
            self._start_over()
        except DestinationError as error:
            code, detail = error.code, _words(error)
            self._trouble(action, where, error)
        except KeyMissing as error:
            code, detail = error.code, _words(error)
            self._without_key(action, error)
        self.world.watcher.step(
            step=type(action).__name__.lower(),
            case=case,
            where=where,
            seconds=time.monotonic() - began,
            code=code,
            detail=detail,
        )

    def _take_up(self) -> None:
        self.case = self.saved.case
        self.plan = self.world.plan(self.case)
        died = {i.writer: self.world.journal.writer_died_at(i.writer) for i in self.case.intents}
        self.seen = Run(
            writer=self.world.journal.writer,
            died={writer: at for writer, at in died.items() if at is not None},
        )
        # A rotation that waited keeps its version: without its plaintext each try would mint one.
        own = self.case.rotation.version_id if self.case.rotation else None
        self.plain = self.world.carried.held(self.claim.credential_uid, own)
        if self.plain is not None:
            self.seen = replace(self.seen, holding=own)

    def _start_over(self) -> None:
        """Somebody changed the case: what was seen is void (rule 6), outcomes are reported."""
        self._report()
        self.audit.clear()
        self.saved = self.world.journal.load(self.claim)
        self._take_up()

    def _refresh(self) -> None:
        self.seen = replace(self.seen, in_flight=self.world.carried.flying())
        if self.claim.until - self._now() < CLAIM_TTL / 2:
            self.claim = self.world.journal.renew(self.claim, ttl=CLAIM_TTL)

    def _give_back(self, rest: steps.Rest) -> None:
        """Commit what has changed, and the claim with it: one transaction less for everybody."""
        if self.case == self.saved.case and not self.audit:
            self.world.journal.release(self.claim, wake_at=rest.until)
        else:
            credential = replace(self.case.credential, wake_at=rest.until)
            self.saved = self.world.journal.save(
                self.claim,
                before=self.saved.case,
                after=replace(self.case, credential=credential),
                audit=tuple(self.audit),
                release=True,
            )
            self._committed()
        self.rest = rest

    # --- what was seen ----------------------------------------------------------------------

    def _trouble(self, action: Action, where: str, error: DestinationError) -> None:
        if isinstance(error, Conflict):
            # Read again and decide: a conflict is an answer, never a stall by itself.
            self.conflicts += 1
            if self.conflicts <= CONFLICTS_PER_RUN:
                self.seen = self.seen.unsaw(where)
                return
        if isinstance(action, steps.CopyForward):
            self._not_mended(action, error)
            return
        if isinstance(action, steps.Withdraw | steps.Clean):
            # What agents read there can still be read: reported as it is, tried by the sweep.
            effect = Effect.WITHDRAW if isinstance(action, steps.Withdraw) else Effect.RETIRE
            self.seen = self.seen.wrote(where, effect).unsaw(where)
            return
        permanent = not error.retryable and not isinstance(error, Conflict)
        trouble = Trouble(
            code=error.code,
            detail=_words(error),
            permanent=permanent,
            retry_after=error.retry_after,
        )
        self.seen = self.seen.met(where, trouble)

    def _without_key(self, action: Action, error: KeyMissing) -> None:
        """Nobody can make a hash, or judge a copy: wait. What else mends an entry goes on."""
        if isinstance(action, steps.CopyForward):
            return
        if self.case.rotation is None:
            raise error
        why, code, detail = WaitReason.VERIFIERS, error.code, _words(error)
        self.wait(steps.Wait(reason=why, code=code, detail=detail, retry_after=KEY_AGAIN))

    def _sight(self, target: Target, found: Observed) -> Sight:
        return look(
            self.case,
            target,
            found,
            authority=self.world.authority,
            store_id=self.world.journal.store_id,
            holding=self.seen.holding,
            plain=self.plain,
        )

    # --- the steps --------------------------------------------------------------------------

    def open(self, action: steps.Open) -> None:
        """1. Open; it becomes durable with the next save."""
        self.case = lifecycle.open_rotation(
            self.case, uid=self.world.new_id(), cause=action.cause, now=self._now()
        )
        self._note("rotation.opened", cause=str(action.cause))
        self._opened_for(action.drift)
        self.seen = self.seen.wiped()  # what was tried before it is no try of its own

    def observe(self, action: steps.Observe) -> None:
        """2. and 7. Read what agents read."""
        key = action.target.key
        sight = self._sight(
            action.target, self.world.destination(action.target).observe(action.target)
        )
        self.seen = self.seen.saw(key, sight)
        if sight.shown is not None and sight.locator:  # also one that nobody lived to report
            self.case = lifecycle.place(self.case, sight.shown, key, sight.locator)

    def mint(self, action: steps.Mint) -> None:
        """3. and 4. Mint in memory, have it accepted, commit its hash."""
        del action
        version_id, plain = secret.mint(
            random_bytes=self.world.random_bytes, prefix=self.world.prefix
        )
        accepted = self.world.authority.accept(
            version_id=version_id,
            secret=plain,
            credential_uid=self.claim.credential_uid,
            scheme=self.plan.policy.scheme,
        )
        self.case = lifecycle.accept(
            lifecycle.go_on(self.case),
            version_id=version_id,
            scheme=accepted.scheme,
            digest=accepted.digest,
            tag=accepted.tag,
            fence=self.claim.fence,
            lifetime=self.plan.policy.lifetime,
            now=self._now(),
        )
        self._note("version.accepted", version_id=version_id)
        self._commit()
        self._hold(version_id, accepted.secret)
        self.seen = replace(self.seen, settled=False)

    def recover(self, action: steps.Recover) -> None:
        """Take the secret from a copy, if the full check says that it is this very version."""
        own = self._own_id()
        found = self.world.destination(action.target).read(action.target, own)
        version = self.case.version(own)
        if (
            version is None
            or found.secret is None
            or found.login != version.login
            or not self.world.authority.matches(version, found.secret)
        ):
            self.seen = self.seen.searched(action.target.key)
            return
        self._hold(own, found.secret)
        # What is shown elsewhere is compared with the plaintext now: read it again.
        self.seen = replace(self.seen, sights={})
        self.case = lifecycle.go_on(self.case)

    def drop_attempt(self, action: steps.DropAttempt) -> None:
        """Let an attempt go that no destination can give back."""
        del action
        own = self._own_id()
        self.case = lifecycle.drop_attempt(self.case, now=self._now())
        version = self.case.version(own)
        self._note("attempt.dropped", version_id=own, state=str(version.state) if version else "")
        self._wipe()

    def await_verifiers(self, action: steps.AwaitVerifiers) -> None:
        """5. No destination shows it before every verifier accepts it."""
        del action
        uid, own = self.claim.credential_uid, self._own_id()
        epoch = self.world.carried.awaited(uid, own, self.saved.epoch)
        if self.world.authority.settled(epoch):
            self.seen = replace(self.seen, settled=True)
        else:
            self.wait(steps.Wait(reason=WaitReason.VERIFIERS, retry_after=timedelta(seconds=1)))

    def stage(self, action: steps.Stage) -> None:
        """6. Write it where it is not shown yet."""
        key = action.target.key
        self._effect(
            action.target,
            Effect.STAGE,
            expected=action.expected,
            exposes=action.exposes,
            call=lambda d, e: d.stage(action.target, e, expected=action.expected),
        )
        seen = replace(self.seen.wrote(key, Effect.STAGE), settled=not action.exposes)
        staged = replace(seen.sights[key], staged=self._own_id(), empty=False)
        self.seen = seen.unsaw(key) if action.exposes else seen.saw(key, staged)

    def read_back(self, action: steps.ReadBack) -> None:
        """6. Read the staged copy by its version id and compare it byte for byte."""
        key = action.target.key
        found = self.world.destination(action.target).read(action.target, self._own_id())
        if found.secret is None and (key, Effect.STAGE) not in self.seen.written:
            # Its label is there and its value is not: staged again, under the same id.
            self.seen = self.seen.saw(key, replace(self.seen.sights[key], staged=None))
        elif self.plain is None or found.secret is None:
            raise DestinationUnavailable("the staged copy cannot be read back yet", sent=False)
        elif found.secret != self.plain:
            raise Rejected("the staged copy is not what was staged")
        else:
            self.seen = replace(self.seen, read_back=self.seen.read_back | {key})

    def activate(self, action: steps.Activate) -> None:
        """7. Make it what agents read; the next step reads that again."""
        self._effect(
            action.target,
            Effect.ACTIVATE,
            expected=action.expected,
            exposes=True,
            call=lambda d, e: d.activate(action.target, e, expected=action.expected),
        )
        # Before each further one every verifier is asked anew (rule 18).
        seen = replace(self.seen, settled=False).wrote(action.target.key, Effect.ACTIVATE)
        self.seen = seen.unsaw(action.target.key)

    def promote(self, action: steps.Promote) -> None:
        """8. One transaction: new is current, old is previous."""
        del action
        own, now = self._own_id(), self._now()
        rotation = self.case.rotation
        grace = rotation.grace if rotation and rotation.grace is not None else None
        for key, sight in self.seen.sights.items():
            if sight.shown == own:
                self.case = lifecycle.place(self.case, own, key, sight.locator)
        if rotation is not None and rotation.cause is Cause.DRIFT:
            self.case = repair.rotated(self.case, now)
        held = {
            v.id for v in self.case.versions if not nowhere(self.case, v, self.seen, self.plan, now)
        }
        self.case = lifecycle.promote(
            self.case,
            grace=self.plan.policy.grace if grace is None else grace,
            held=frozenset(held),
            next_rotation_at=self.world.schedule(self.case, now),
            now=now,
        )
        self._note("version.promoted", version_id=own)
        after = self._next()
        if isinstance(after, steps.Rest):
            self._give_back(after)
        elif not isinstance(after, steps.Retire):  # which needs no look at anything: saved with it
            self._commit()
        self._wipe()

    def settle(self, action: steps.Settle) -> None:
        """An unreported write can no longer land; what was read there before counts no more."""
        self.case = lifecycle.settle(self.case, action.intent.uid, now=self._now())
        self.seen = self.seen.unsaw(action.intent.target)

    def set_deadline(self, action: steps.SetDeadline) -> None:
        """The grace of a kept or settled version begins."""
        deadline = self._now() + self.plan.policy.grace
        self.case = lifecycle.set_deadline(self.case, action.version_id, deadline=deadline)
        self._note("version.deadline", version_id=action.version_id)

    def retire(self, action: steps.Retire) -> None:
        """9. Its grace has passed and nothing shows it."""
        # Durable with the next save: that of the intent to clean its copy, if not before.
        self.case = lifecycle.retire(self.case, action.version_id, now=self._now())
        self._note("version.retired", version_id=action.version_id)

    def clean(self, action: steps.Clean) -> None:
        """9. Disable or destroy an old copy, never the one shown."""
        placement, how = action.placement, self.plan.policy.retire

        def retire(destination: Destination) -> str:
            destination.retire(
                action.target,
                version_id=placement.version_id,
                locator=placement.locator,
                how=how,
            )
            return placement.locator

        self._write(action.target, Effect.RETIRE, placement.version_id, call=retire)

    def withdraw(self, action: steps.Withdraw) -> None:
        """Take a revoked value out of what agents read; whatever comes of it, that is read again."""
        self._write(
            action.target,
            Effect.WITHDRAW,
            action.version_id,
            expected=action.expected,
            call=lambda d: d.withdraw(
                action.target,
                owner=self.world.journal.store_id,
                version_id=action.version_id,
                expected=action.expected,
            ),
        )
        self._note("entry.withdrawn", version_id=action.version_id, target=action.target.key)
        key = action.target.key
        self.seen = self.seen.wrote(key, Effect.WITHDRAW).unsaw(key)

    def forget(self, action: steps.Forget) -> None:
        """Leave a copy where it is, by policy."""
        place = action.placement
        self.case = lifecycle.gone(self.case, place.version_id, place.target, place.locator)

    def leave(self, action: steps.Leave) -> None:
        """A dropped destination is empty: stop looking at it."""
        self.case = lifecycle.left(self.case, action.target)
        self._note("destination.left", target=action.target)

    def record_sweep(self, action: steps.RecordSweep) -> None:
        """Store what differs; news is audited."""
        self._tell(action.drift)
        now = self._now()
        sweep_at = None if action.last else now + self.world.sweep_every
        looks = (
            Look(target=key, at=now, shown=sight.shown or "")
            for key, sight in self.seen.sights.items()
        )
        self.case = lifecycle.record_sweep(self.case, action.drift, sweep_at=sweep_at, looks=looks)
        self._judge(action.drift)

    def wait(self, action: steps.Wait) -> None:
        """Park the rotation; it goes on by itself."""
        now, tries = self._now(), lifecycle.tries(self.case, action.reason, action.where)
        pause = max(self.world.backoff(self.plan, tries), action.retry_after or timedelta(0))
        waiting = lifecycle.waiting(
            action.reason,
            now=now,
            until=action.until or now + pause,
            where=action.where,
            code=action.code,
            detail=action.detail,
        )
        self.case = lifecycle.wait(self.case, waiting)
        if tries == 1:
            outcome = action.code or str(action.reason)
            self._note("rotation.waiting", outcome=outcome, target=action.where, why=action.detail)

    def stall(self, action: steps.Stall) -> None:
        """Stop for a person."""
        self.case = lifecycle.stall(
            self.case, code=action.code, where=action.where, detail=action.detail
        )
        self._note("rotation.stalled", outcome=action.code, target=action.where, why=action.detail)

    # --- effects ----------------------------------------------------------------------------

    def _effect(
        self,
        target: Target,
        effect: Effect,
        *,
        expected: str,
        exposes: bool,
        call: Callable[[Destination, Entry], str],
    ) -> None:
        """Write our version there."""
        own = self.case.version(self._own_id())
        if own is None or self.plain is None:
            raise IllegalTransition("there is no plaintext to publish")
        entry = self._entry(own, self.plain)
        self._write(
            target,
            effect,
            own.id,
            expected=expected,
            exposes=exposes,
            call=lambda destination: call(destination, entry),
        )
        # Only now: one that can be read and not written would be tried without ever backing off.
        self.case = lifecycle.go_on(self.case)

    # --- small things -----------------------------------------------------------------------

    def _hold(self, version_id: str, plain: Secret) -> None:
        self.plain = plain
        self.seen = replace(self.seen, holding=version_id)
        self.world.carried.hold(self.claim.credential_uid, version_id, plain)

    def _wipe(self) -> None:
        """Forget the plaintext, and what was seen of its version."""
        self.plain = None
        self.world.carried.drop(self.claim.credential_uid)
        self.seen = self.seen.wiped()

    def _own_id(self) -> str:
        rotation = self.case.rotation
        if rotation is None or rotation.version_id is None:
            raise IllegalTransition("the rotation has no version")
        return rotation.version_id


def _where(action: Action) -> str:
    target = getattr(action, "target", "") or getattr(action, "where", "")
    return target.key if isinstance(target, Target) else str(target)


def _detail(action: Action) -> str:
    """Say why a rotation stops here or what is mended; "" for every other step."""
    mended = getattr(action, "drift", ())
    if isinstance(action, steps.Open | steps.CopyForward) and mended:
        found = mended if isinstance(mended, tuple) else (mended,)
        return ", ".join(f"{one.kind} at {one.target}" for one in found)
    if not isinstance(action, steps.Wait | steps.Stall):
        return ""
    why = action.code or str(getattr(action, "reason", ""))
    return f"{why}: {action.detail}" if action.detail else why


def _words(error: KeyturnError) -> str:
    """Return what an error of ours says, in one line of bounded length."""
    return " ".join(str(error).split())[:LONGEST_DETAIL]


_PERFORM: dict[type[Action], Callable[[_Saga, Any], None]] = {
    steps.Open: _Saga.open,
    steps.Observe: _Saga.observe,
    steps.Mint: _Saga.mint,
    steps.Recover: _Saga.recover,
    steps.DropAttempt: _Saga.drop_attempt,
    steps.AwaitVerifiers: _Saga.await_verifiers,
    steps.Stage: _Saga.stage,
    steps.ReadBack: _Saga.read_back,
    steps.Activate: _Saga.activate,
    steps.Promote: _Saga.promote,
    steps.Settle: _Saga.settle,
    steps.SetDeadline: _Saga.set_deadline,
    steps.Retire: _Saga.retire,
    steps.Clean: _Saga.clean,
    steps.Withdraw: _Saga.withdraw,
    steps.CopyForward: _Saga.copy_forward,
    steps.Forget: _Saga.forget,
    steps.Leave: _Saga.leave,
    steps.RecordSweep: _Saga.record_sweep,
    steps.Wait: _Saga.wait,
    steps.Stall: _Saga.stall,
}
