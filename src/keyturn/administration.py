"""What an administrator does: revoke, suspend, resume, rotate, retry, abandon, remove, look.

The daemon's socket and, while the daemon is down, the command line call the same functions; each
is one transaction with its audit entry. Revocation alone does not wait for the store: it goes to the
spool first, which every verifier of this host looks at before each yes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, TypeVar

import structlog

from keyturn import settling
from keyturn.config import is_id
from keyturn.core import lifecycle
from keyturn.core.duration import format_duration
from keyturn.core.model import (
    Agent,
    Case,
    ManagedBy,
    Request,
    RotationState,
    Version,
    VersionState,
)
from keyturn.core.secret import is_version_id, mask
from keyturn.errors import (
    KeyturnError,
    Refused,
    StoreFull,
    StoreUnavailable,
    UnknownAgent,
    UnknownVersion,
)
from keyturn.leaks import (
    NO_TOMBSTONE,
    STORE_AWAY,
    Caller,
    Leak,
    Order,
    is_cut,
    note_of,
    older,
    orders_of,
    revoke_entry,
    revoked,
    text_of,
    warnings_of,
)
from keyturn.ports import AuditEntry, Authority, Clock, Saved
from keyturn.storage.ledger import Ledger
from keyturn.storage.requests import KEPT, Begun, Once
from keyturn.storage.store import Change, Store
from keyturn.verifier.spool import Spool

STORE_PATIENCE = timedelta(seconds=5)  # how long a revoke waits for a locked store
STORE_POLL = 0.02
AGAIN_AT_MOST = 600.0  # seconds until a tombstone of no known version is looked at again
SPOOL_PATIENCE = 10.0  # seconds for tombstones whose rows the store does not take
BATCH = 500  # tombstones that one query looks up

T = TypeVar("T")
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Committed:
    """What a commit of orders did. `until` is the store's time up to which it refused everything."""

    case: Case
    epoch: int
    revoked: list[str]
    until: datetime
    already: bool
    cancelled: bool  # a successor that was owed


@dataclass(frozen=True, slots=True, kw_only=True)
class Administration:
    """The verbs, over one store and one spool.

    The ledger is the plain-file index from agents to their accepted versions: a revoke resolves
    from it, because the store may be locked.
    """

    open_store: Callable[[], Store]
    ledger: Ledger
    spool: Spool
    begun: Begun
    authority: Authority
    clock: Clock
    schedule: Callable[[Case, datetime], datetime | None]
    on_rotation_end: Callable[[str], None] = lambda _outcome: None
    make_room: Callable[[], bool] = lambda: False  # on a full disk; tells whether it did
    patience: timedelta = STORE_PATIENCE
    applied: set[str] = field(default_factory=set)  # tombstones that the store knows of
    made: set[str] = field(default_factory=set)  # tombstones of this process
    unknown: set[str] = field(default_factory=set)  # tombstones of versions that it does not know
    later: dict[str, tuple[float, float]] = field(default_factory=dict)  # when to look again, wait

    @property
    def store(self) -> Store:
        """The store; a revoke must not need it before the spool is written."""
        return self.open_store()

    # --- revoke -----------------------------------------------------------------------------

    def revoke(
        self, leak: Leak, caller: Caller, *, dry_run: bool = False, once: Once | None = None
    ) -> dict[str, Any]:
        """Refuse now and for ever; returns once every verifier refuses (I3).

        The order is the promise: spool (nobody can block it), store, verifiers. Where the store
        cannot be written the result says so (`incomplete`): this host refuses already, the daemon
        writes the rest as soon as it can. With `once` a repeat refuses what the first try refused,
        and no successor. A line (a leak with a time) that was applied before does nothing: no second
        suspension, no second successor, however often the daemon starts.
        """
        began = time.monotonic()
        self._check_withheld(leak)
        ids = self._begun(once)
        if ids is None:
            ids = self._resolve(leak)
        if dry_run:
            return self._result(leak, ids, began, complete=False, dry_run=True)
        if once is not None:
            self.begun.note(once, ids)
        note = note_of(leak, caller, once)
        trouble = self._entomb(ids, note)
        refused_after = time.monotonic() - began
        try:
            done = self._commit([Order(leak=leak, caller=caller, once=once)])
        except UnknownVersion:
            # The store has none of that id, and the ledger none that it is about to have.
            for version_id in ids:
                self._disown(version_id, note)
            raise
        except StoreUnavailable:
            if trouble is not None:
                raise trouble from None
            if not ids:
                raise  # nothing remembers it: nobody would write the rest
            return self._result(leak, ids, began, complete=False, refused_after=refused_after)
        if done is None:
            return self._result(leak, [], began, complete=True)
        # Also what was accepted between our look and the commit; and that this much is done: what was
        # minted since is not meant, should the store be restored to a time before this.
        if leak.version is None:
            note |= {"at": done.until.isoformat(), "done": True, "request": None}
        found = sorted({*ids, *done.revoked})
        trouble = self._entomb(found, note)
        self.applied.update(done.revoked)
        standing = settling.wait(self.authority, done.epoch)
        result = self._result(
            leak, found, began, complete=True, refused_after=refused_after, done=done
        ) | {"verifiers": settling.numbers(standing)}
        result["warnings"] += [] if trouble is None else [NO_TOMBSTONE]
        return result

    def refuse_first(self, leaks: Iterable[tuple[Leak, Caller]]) -> None:
        """Refuse on this host what many lines name, before any of them waits for the store."""
        for leak, caller in leaks:
            with contextlib.suppress(KeyturnError):  # `revoke` says what is wrong with it
                self._entomb(self._resolve(leak), note_of(leak, caller, None))

    def refused_here(self, case: Case) -> Case:
        """Return a case as the verifiers of this host see it: what has a tombstone is revoked."""
        with contextlib.suppress(StoreUnavailable):
            held = {v.id for v in case.accepted if self.spool.holds(v.id)}
            return replace(
                case,
                versions=tuple(
                    replace(v, state=VersionState.REVOKED) if v.id in held else v
                    for v in case.versions
                ),
            )
        return case

    def _entomb(self, ids: Iterable[str], note: dict[str, Any]) -> StoreUnavailable | None:
        """Write the tombstones. What went wrong is returned: the store may still take the revoke."""
        trouble = None
        for version_id in ids:
            try:
                if self.spool.revoke(version_id, note):
                    self.made.add(version_id)
            except StoreUnavailable as error:
                trouble = error
        return trouble

    def _disown(self, version_id: str, note: dict[str, Any]) -> None:
        with contextlib.suppress(StoreUnavailable):
            if version_id in self.made and not self.ledger.knows(version_id):
                self.spool.withdraw(version_id, note)

    def apply_spool(self, caller: Caller) -> int:
        """Write to the store what only the spool knows yet; returns how many that were.

        Each tombstone for itself: one that cannot be applied is logged, tried again later, and keeps
        no other from the store.
        """
        found, now, trouble = 0, time.monotonic(), None
        for some in _batches([i for i in self._unfinished() if self._look_at(i) <= now]):
            known = self.store.find_versions(some)
            for version_id in some:
                try:
                    found += self._apply_tombstone(version_id, known.get(version_id), caller)
                except StoreUnavailable as error:
                    if time.monotonic() - now > SPOOL_PATIENCE:
                        raise
                    trouble = error
        if trouble is not None:
            raise trouble
        return found

    def _apply_tombstone(
        self, version_id: str, known: tuple[Agent, Version] | None, caller: Caller
    ) -> int:
        if known is None:
            self.unknown.add(version_id)
            self._try_later(version_id)
            return 0
        self.unknown.discard(version_id)
        agent, version = known
        try:
            orders = orders_of(version, self.spool.notes(version_id), agent.name, caller)
            if orders:
                self._apply_orders(orders, version)
        except StoreUnavailable:
            raise
        except Exception as error:  # noqa: BLE001  # or one tombstone would veto all after it
            _log.error(
                "spool.not-applied",
                version=version_id,
                agent=agent.name,
                code=getattr(error, "code", type(error).__name__),
            )
            self._try_later(version_id)
            return 0
        self.applied.add(version_id)
        self.later.pop(version_id, None)
        return 1 if orders else 0

    def _apply_orders(self, orders: Sequence[Order], version: Version) -> None:
        uid = version.credential_uid
        self._commit(orders, uid=uid, also=version.id)
        found = self.store.find_versions([version.id])[version.id][1]
        if found.accepted:  # the command was done, and a restore undid it
            self._commit([replace(order, once=None) for order in orders], uid=uid, also=version.id)

    def _look_at(self, version_id: str) -> float:
        return self.later.get(version_id, (0.0, 0.0))[0]

    def _try_later(self, version_id: str) -> None:
        """Look again after twice the time: what a command is about to accept is known in a moment."""
        wait = min(self.later.get(version_id, (0.0, 1.0))[1] * 2, AGAIN_AT_MOST)
        self.later[version_id] = (time.monotonic() + wait, wait)

    def forget_requests(self) -> None:
        """Forget which commands were done more than a day ago."""
        before = self.clock.now() - KEPT
        self.begun.clean(before=before)
        self.store.forget_requests(before=before)

    def _begun(self, once: Once | None) -> list[str] | None:
        return None if once is None else self.begun.versions(once)

    def _check_withheld(self, leak: Leak) -> None:
        """Refuse a name that is none of the agent's: the successor would go where it leaked."""
        if not leak.withhold:
            return
        if leak.version is not None or not leak.reissue:
            raise Refused(
                "--except says where a successor is not published: it goes with AGENT --reissue",
                hint="without --reissue nothing is published anyhow",
            )
        try:
            case = self._case(leak.agent or "")
        except StoreUnavailable:
            return  # never a cause to refuse a revoke
        names = {target.to for target in case.agent.targets}
        if unknown := set(leak.withhold) - names:
            raise Refused(
                f"NOTHING WAS CUT: {leak.agent} has no destination at {', '.join(sorted(unknown))}",
                hint=f"it reads at: {', '.join(sorted(names))}",
            )
        before = names & set(case.credential.withheld)
        if names <= before | set(leak.withhold):
            also = f", with what was left out before ({', '.join(sorted(before))})"
            raise Refused(
                f"NOTHING WAS CUT: --except{also if before else ''} leaves nowhere to publish a"
                " successor",
                hint=f"cut it without one: `keyturn revoke {leak.agent}`",
            )

    def queued(self) -> int:
        """Count the revocations in the spool that the store and its audit do not have yet."""
        ids = [i for i in self._unfinished() if i not in self.unknown]
        try:
            known = [
                one for some in _batches(ids) for one in self.store.find_versions(some).values()
            ]
        except StoreUnavailable:
            return len(ids)
        return sum(1 for _, version in known if version.state is not VersionState.REVOKED)

    def _unfinished(self) -> list[str]:
        return [i for i in self.spool.ids() if i not in self.applied]

    def _resolve(self, leak: Leak) -> list[str]:
        """Find the version ids without the store: it may be locked, and that is no excuse."""
        if leak.version is not None:
            if not is_version_id(leak.version):
                raise UnknownVersion("that is no version id", hint="`keyturn identify` finds it")
            return [leak.version]
        if not is_id(leak.agent or ""):
            raise UnknownAgent("that is no agent's id")
        ids = self.ledger.accepted(leak.agent or "")
        if leak.at is None:
            return ids
        minted = self.ledger.minted(leak.agent or "")
        return [i for i in ids if i in minted and minted[i] <= leak.at]

    def _commit(
        self, orders: Sequence[Order], *, uid: str = "", also: str = ""
    ) -> _Committed | None:
        """Carry out orders about one credential in one transaction, as if one after the other.

        None where they are lines that were applied before. Its time is the store's: `minted_at` is.
        """
        first = orders[0]
        also = also or first.leak.version or ""
        found = self._with_patience(lambda: self._look(first.leak, uid, also))
        if found is None:
            return None
        uid, now = found
        cases, refused = list[Case](), list[str]()
        onces = [order.once for order in orders if order.once is not None]
        once = onces[0] if onces else None

        def change(case: Case) -> tuple[Case, Sequence[AuditEntry]]:
            entries = []
            cases[:], refused[:] = [case], []
            for order in orders:
                after = revoked(case, order.leak, now)
                cut = [v.id for v in after.versions if is_cut(case, v)]
                entries.append(revoke_entry(case, order, cut))
                refused.extend(cut)
                case = after
            for one in onces:
                one.outcome = {"revoked": list(refused)}
            return case, entries

        saved = self._with_room(lambda: self._amend(uid, change, once, also=also))
        for one in onces[1:]:  # a repeat of any of these commands must find it done
            self._keep(uid, one)
        repeated = once is not None and once.repeated
        if once is not None and repeated:
            refused[:] = once.outcome["revoked"]
        before = cases[0] if cases and not repeated else saved.case
        minted = [v.minted_at for v in before.versions if v.id in refused]
        return _Committed(
            case=saved.case,
            epoch=saved.epoch,
            revoked=refused,
            until=max([now, *minted]),
            already=not refused,
            cancelled=before.credential.successor_owed and not saved.case.credential.successor_owed,
        )

    def _keep(self, uid: str, once: Once) -> None:
        """Note that a command was done by the change before."""
        self._with_room(lambda: self._amend(uid, lambda case: (case, []), once))

    def _look(self, leak: Leak, uid: str, also: str) -> tuple[str, datetime] | None:
        """Find the credential and the store's time; None for a line with nothing left to refuse."""
        known = self.store.find_version(also) if also else None
        if also and known is None:
            raise UnknownVersion(f"no version {also} was ever minted here")
        if not uid:
            uid = known[1].credential_uid if known else self._case(leak.agent or "").credential.uid
            line = leak.at is not None
            if line and known and known[1].state is VersionState.REVOKED:
                return None
            if line and not known and not older(self._case(leak.agent or ""), leak):
                return None
        return uid, self.store.now()

    def _with_patience(self, attempt: Callable[[], T]) -> T:
        until = time.monotonic() + self.patience.total_seconds()
        while True:
            try:
                return attempt()
            except StoreFull:
                raise  # waiting makes no room
            except StoreUnavailable:
                if time.monotonic() >= until:
                    raise
                time.sleep(STORE_POLL)

    def _with_room(self, attempt: Callable[[], T]) -> T:
        """Spend the ballast on a full disk, piece by piece: for a revoke alone."""
        while True:
            try:
                return self._with_patience(attempt)
            except StoreFull:
                if not self.make_room():
                    raise

    def _result(
        self,
        leak: Leak,
        ids: Sequence[str],
        began: float,
        *,
        complete: bool,
        dry_run: bool = False,
        refused_after: float = 0.0,
        done: _Committed | None = None,
    ) -> dict[str, Any]:
        case = done.case if done else None
        return {
            "target": leak.target,
            "agent": case.agent.name if case else leak.agent,
            "versions": list(ids),
            "reissue": leak.reissue,
            "dry_run": dry_run,
            "incomplete": not complete and not dry_run,
            "delay_seconds": None if dry_run else round(time.monotonic() - began, 6),
            "refused_here_after_seconds": round(refused_after, 6),
            "verifiers": {"acknowledged": int(complete), "live": 1},
            "destinations": [t.key for t in case.next_targets] if case else [],
            "withheld": list(case.credential.withheld if case else leak.withhold),
            "state": str(case.agent.state) if case else None,
            "already": done is not None and done.already,
            "warnings": [] if complete or dry_run else [STORE_AWAY],
        } | ({"warnings": warnings_of(leak, done.case, cancelled=done.cancelled)} if done else {})

    # --- the other verbs --------------------------------------------------------------------

    def suspend(self, agent: str, caller: Caller, *, reason: str = "") -> dict[str, Any]:
        """Refuse everything of an agent until it is resumed; returns once verifiers know (I3)."""
        return self._change(
            agent, caller, "suspend", lifecycle.suspend, reason=mask(text_of(reason))
        )

    def resume(self, agent: str, caller: Caller) -> dict[str, Any]:
        """Accept again what is still accepted."""
        return self._change(agent, caller, "resume", lifecycle.resume)

    def readmit(self, agent: str, connection: str, caller: Caller) -> dict[str, Any]:
        """Publish again at a connection that a revoke left out."""

        def change(case: Case, *, now: datetime) -> Case:
            return lifecycle.readmit(case, connection, now=now)

        return self._change(agent, caller, "destination.readmit", change, connection=connection)

    def forget(self, agent: str, destination: str, caller: Caller) -> dict[str, Any]:
        """Look no more at a destination that an agent is leaving (protocol.md, 12)."""

        def change(case: Case, *, now: datetime) -> Case:
            return lifecycle.forget(case, destination, now=now)

        return self._change(agent, caller, "destination.forgotten", change, target=destination)

    def retry(self, agent: str, caller: Caller) -> dict[str, Any]:
        """Let a waiting or stalled rotation go on now."""
        return self._change(agent, caller, "rotation.retry", lifecycle.retry)

    def abandon(self, agent: str, caller: Caller) -> dict[str, Any]:
        """End a rotation; current stays current, and a due one comes at its next slot."""

        def change(case: Case, *, now: datetime) -> Case:
            after = lifecycle.abandon(case, now=now)
            due = after.credential.next_rotation_at
            if due is None or due > now:
                return after
            # Or what was given up would open again at once.
            later = replace(after.credential, next_rotation_at=self.schedule(case, now))
            return replace(after, credential=later)

        return self._change(agent, caller, "rotation.abandon", change)

    def remove(self, agent: str, caller: Caller) -> dict[str, Any]:
        """End an agent: everything is revoked, its name is free again."""
        case = self._case(agent)
        if case.agent.managed_by is ManagedBy.FILE and case.agent.listed:
            raise Refused(
                f"NOTHING WAS CUT: {agent} stands in the configuration, which would bring it back",
                hint="take it out of the file and `keyturn reload`, then repeat this; to cut it"
                f" now: `keyturn revoke {agent}`",
            )
        for version in case.accepted:
            self.spool.revoke(
                version.id, note_of(Leak(agent=agent, reason="removed"), caller, None)
            )
        return self._with_room(
            lambda: self._change(agent, caller, "revoke.removed", lifecycle.remove)
        )

    def rotate(
        self,
        agent: str,
        caller: Caller,
        *,
        grace: timedelta | None = None,
        force: bool = False,
        once: Once | None = None,
    ) -> dict[str, Any]:
        """Ask for a rotation; the saga opens it. `after` is the version that it replaces.

        With `once` a repeat asks for nothing, and returns what the first try did.
        """
        asked = Request(grace=grace, by=caller.name)
        kept = once or Once(id="", digest="")

        def change(case: Case, *, now: datetime) -> Case:
            kept.outcome = {"after": case.current.seq if case.current else 0}
            return lifecycle.request(case, asked, now=now)

        detail: dict[str, Any] = {} if grace is None else {"grace": format_duration(grace)}
        if force:
            detail["force"] = True
        return self._change(agent, caller, "rotate", change, once=once, **detail) | kept.outcome

    def _change(
        self,
        agent: str,
        caller: Caller,
        action: str,
        change: Callable[..., Case],
        *,
        once: Once | None = None,
        **detail: Any,
    ) -> dict[str, Any]:
        def amended(case: Case) -> tuple[Case, Sequence[AuditEntry]]:
            after = change(case, now=self.clock.now())
            entry = AuditEntry(
                action=action,
                actor=caller.name,
                agent=agent,
                detail=tuple(sorted({**detail, "trigger": caller.trigger}.items())),
            )
            return after, [entry]

        case = self._case(agent)
        uid = case.credential.uid
        saved = self._with_patience(lambda: self._amend(uid, amended, once))
        done = {"agent": agent, "state": str(saved.case.agent.state)}
        if action not in _AWAITED:  # nothing else is refused from now on, or accepted again
            return done
        return done | {"verifiers": settling.numbers(settling.wait(self.authority, saved.epoch))}

    def _amend(self, uid: str, change: Change, once: Once | None, *, also: str = "") -> Saved:
        """Change a case in one transaction, and tell where that ended its rotation."""
        ends: list[str] = []

        def noting(case: Case) -> tuple[Case, Sequence[AuditEntry]]:
            after, entries = change(case)
            ends[:] = [_END[state] for state in _ended(case, after)]
            return after, entries

        saved = self.store.amend(uid, noting, once=once, also=also)
        for outcome in ends:
            self.on_rotation_end(outcome)
        return saved

    def _case(self, agent: str) -> Case:
        return self.store.case_of(agent)

    def identify(self, version_ids: Iterable[str]) -> list[dict[str, Any]]:
        """Say whose versions these are; unknown ids are left out."""
        found = ((i, self.store.find_version(i)) for i in version_ids)
        return [
            {"version": i, "agent": known[0].name, "state": str(known[1].state)}
            for i, known in found
            if known is not None
        ]


_AWAITED = frozenset({"suspend", "resume", "revoke.removed"})
_END = {RotationState.ABANDONED: "abandoned", RotationState.CLOSED: "revoked"}


def _ended(before: Case, after: Case) -> list[RotationState]:
    """Return the state in which a change ended the open rotation, if it did."""
    was, now = before.rotation, after.rotation
    ended = was is not None and was.open and now is not None and now.state in _END
    return [now.state] if ended and now is not None else []


def _batches(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (ids[start : start + BATCH] for start in range(0, len(ids), BATCH))
