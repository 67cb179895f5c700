"""What an administrator does: revoke, suspend, resume, rotate, retry, abandon, remove, look.

The daemon's socket and, while the daemon is down, the command line call the same functions; each
is one transaction with its audit entry. Revocation alone does not wait for the store: it goes to the
spool first, which every verifier of this host looks at before each yes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, TypeVar

from keyturn.config import is_id
from keyturn.core import lifecycle
from keyturn.core.duration import format_duration
from keyturn.core.model import (
    AgentState,
    Case,
    ManagedBy,
    Request,
    RotationState,
    Version,
    VersionState,
)
from keyturn.core.secret import is_version_id, mask
from keyturn.errors import Refused, StoreFull, StoreUnavailable, UnknownAgent, UnknownVersion
from keyturn.ports import AuditEntry, Authority, Clock, Saved
from keyturn.storage.ledger import Ledger
from keyturn.storage.requests import KEPT, Begun, Once
from keyturn.storage.store import Change, Store
from keyturn.verifier.spool import Spool

STORE_PATIENCE = timedelta(seconds=5)  # how long a revoke waits for a locked store
VERIFIER_POLL = 0.02
STORE_AWAY = (
    "the store could not be written: every verifier of this host refuses already, the daemon writes"
    " the rest as soon as it can"
)

NO_TOMBSTONE = (
    "the store has it, but no tombstone could be made: after a restore of the store revoke it again"
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks, and how it reached us: `socket`, `command`, `signal`, `file` or `reload`."""

    name: str
    trigger: str = "command"


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """What is to be revoked: an agent or one version, everything minted up to `at`."""

    agent: str | None = None
    version: str | None = None
    reissue: bool = False
    reason: str = ""
    at: datetime | None = None
    withhold: tuple[str, ...] = ()  # connections where the successor is not published

    def __post_init__(self) -> None:
        """Mask a secret that was pasted into the reason: never a cause to refuse a revoke."""
        object.__setattr__(self, "reason", mask(self.reason))

    @property
    def target(self) -> str:
        """The typed target, as the revocations file writes it."""
        return f"agent:{self.agent}" if self.agent else f"version:{self.version}"


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
    applied: set[str] = field(default_factory=set)  # spool files that the store knows of

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
        cannot be written the result says so (`complete` false): this host refuses already, the
        daemon writes the rest as soon as it can. With `once` a repeat refuses what the first try
        refused, and no successor.
        """
        began = time.monotonic()
        self._check_withheld(leak)
        ids = self._begun(once)
        if ids is None:
            ids = self._resolve(leak)
        if dry_run:
            return self._result(leak, ids, began, complete=False, dry_run=True)
        if leak.at is not None and not ids:
            # A line that stays in a list and was applied before: no second suspension, no second
            # successor, however often the daemon starts.
            return self._result(leak, ids, began, complete=True)
        if once is not None:
            self.begun.note(once, ids)
        note = self._note(leak, caller, once)
        trouble = self._entomb(ids, note)
        refused_after = time.monotonic() - began
        try:
            case, epoch, revoked = self._commit(leak, caller, once)
        except StoreUnavailable:
            if trouble is not None:
                raise trouble from None
            if not ids:
                raise  # nothing remembers it: nobody would write the rest
            return self._result(leak, ids, began, complete=False, refused_after=refused_after)
        trouble = self._entomb(revoked, note) or trouble  # accepted between our look and the commit
        self.applied.update(revoked)
        self._await_verifiers(epoch)
        done = sorted({*ids, *revoked})
        result = self._result(
            leak, done, began, complete=True, refused_after=refused_after, case=case
        )
        return result if trouble is None else result | {"warnings": [NO_TOMBSTONE]}

    def _entomb(self, ids: Iterable[str], note: dict[str, Any]) -> StoreUnavailable | None:
        """Write the tombstones. What went wrong is returned: the store may still take the revoke."""
        trouble = None
        for version_id in ids:
            try:
                self.spool.revoke(version_id, note)
            except StoreUnavailable as error:
                trouble = error
        return trouble

    def apply_spool(self, caller: Caller) -> int:
        """Write to the store what only the spool knows yet; returns how many that were."""
        found = 0
        for version_id, note in self.spool.pending():
            if version_id in self.applied:
                continue
            known = self.store.find_version(version_id)
            if known is not None and known[1].state is not VersionState.REVOKED:
                leak = _leak_of(version_id, note, agent=known[0].name)
                self._commit(leak, caller, _once_of(note))
                found += 1
            if known is not None:
                self.applied.add(version_id)
        return found

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
            names = {target.to for target in self._case(leak.agent or "").agent.targets}
        except StoreUnavailable:
            return  # never a cause to refuse a revoke
        if unknown := set(leak.withhold) - names:
            raise Refused(
                f"NOTHING WAS CUT: {leak.agent} has no destination at {', '.join(sorted(unknown))}",
                hint=f"it reads at: {', '.join(sorted(names))}",
            )
        if names <= set(leak.withhold):
            raise Refused(
                "NOTHING WAS CUT: --except leaves nowhere to publish a successor",
                hint=f"cut it without one: `keyturn revoke {leak.agent}`",
            )

    def queued(self) -> int:
        """Count the revocations in the spool that the store and its audit do not have yet."""
        return sum(1 for version_id, _ in self.spool.pending() if self._waits(version_id))

    def _waits(self, version_id: str) -> bool:
        if version_id in self.applied:
            return False
        try:
            known = self.store.find_version(version_id)
        except StoreUnavailable:
            return True
        return known is not None and known[1].state is not VersionState.REVOKED

    def _resolve(self, leak: Leak) -> list[str]:
        """Find the version ids without the store: it may be locked, and that is no excuse.

        A line with an `at` asks the store what was done already, if it can be asked.
        """
        if leak.version is not None:
            if not is_version_id(leak.version):
                raise UnknownVersion("that is no version id", hint="`keyturn identify` finds it")
            return [] if leak.at is not None and self._is_revoked(leak.version) else [leak.version]
        if not is_id(leak.agent or ""):
            raise UnknownAgent("that is no agent's id")
        ids = self.ledger.accepted(leak.agent or "")
        if leak.at is None:
            return ids
        minted = self._minted(leak.agent or "")
        return [i for i in ids if i in minted and minted[i] <= leak.at]

    def _is_revoked(self, version_id: str) -> bool:
        try:
            known = self.store.find_version(version_id)
        except StoreUnavailable:
            return self.spool.holds(version_id)
        return known is not None and known[1].state is VersionState.REVOKED

    def _minted(self, agent: str) -> dict[str, datetime]:
        """Tell when what may still be accepted was minted."""
        try:
            return {v.id: v.minted_at for v in self._case(agent).versions}
        except StoreUnavailable:
            minted = self.ledger.minted(agent)
            return {i: at for i, at in minted.items() if not self.spool.holds(i)}

    def _commit(
        self, leak: Leak, caller: Caller, once: Once | None = None
    ) -> tuple[Case, int, list[str]]:
        revoked: list[str] = []

        def change(case: Case) -> tuple[Case, Sequence[AuditEntry]]:
            after = self._revoked(case, leak)
            revoked[:] = [
                v.id
                for v in after.versions
                if v.state is VersionState.REVOKED and _state(case, v) is not VersionState.REVOKED
            ]
            if once is not None:
                once.outcome = {"revoked": list(revoked)}
            return after, [_revoke_entry(case, leak, caller, revoked)]

        case = self._with_patience(lambda: self._target_case(leak))
        uid = case.credential.uid
        saved = self._with_room(lambda: self._amend(uid, change, once))
        if once is not None and once.repeated:
            revoked[:] = once.outcome["revoked"]
        return saved.case, saved.epoch, revoked

    def _revoked(self, case: Case, leak: Leak) -> Case:
        now = self.clock.now()
        if leak.version is not None:
            return lifecycle.revoke_version(case, leak.version, reissue=leak.reissue, now=now)
        until = leak.at or now
        older = [v for v in case.accepted if v.minted_at <= until]
        if len(older) == len(case.accepted):
            return lifecycle.revoke_agent(
                case, reissue=leak.reissue, now=now, withhold=leak.withhold
            )
        for version in older:  # a list that stays in place never kills a successor
            case = lifecycle.revoke_version(case, version.id, reissue=leak.reissue, now=now)
        return case

    def _target_case(self, leak: Leak) -> Case:
        if leak.version is None:
            return self._case(leak.agent or "")
        known = self.store.find_version(leak.version)
        if known is None:
            raise UnknownVersion(f"no version {leak.version} was ever minted here")
        return self._case(known[0].name)

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
                time.sleep(VERIFIER_POLL)

    def _with_room(self, attempt: Callable[[], T]) -> T:
        """Spend the ballast on a full disk, piece by piece: for a revoke alone."""
        while True:
            try:
                return self._with_patience(attempt)
            except StoreFull:
                if not self.make_room():
                    raise

    def _await_verifiers(self, epoch: int) -> None:
        while not self.authority.settled(epoch):
            time.sleep(VERIFIER_POLL)

    def _note(self, leak: Leak, caller: Caller, once: Once | None = None) -> dict[str, Any]:
        return {
            "scope": "version" if leak.version else "agent",
            "agent": leak.agent or "",
            "actor": caller.name,
            "reason": leak.reason,
            "reissue": leak.reissue,
            "at": (leak.at or self.clock.now()).isoformat(),
            "withhold": list(leak.withhold),
            "request": [once.id, once.digest] if once else None,
        }

    def _result(
        self,
        leak: Leak,
        ids: Sequence[str],
        began: float,
        *,
        complete: bool,
        dry_run: bool = False,
        refused_after: float = 0.0,
        case: Case | None = None,
    ) -> dict[str, Any]:
        known = 1 if complete else 0
        return {
            "target": leak.target,
            "agent": case.agent.name if case else leak.agent,
            "versions": list(ids),
            "reissue": leak.reissue,
            "dry_run": dry_run,
            "incomplete": not complete and not dry_run,
            "delay_seconds": None if dry_run else round(time.monotonic() - began, 6),
            "refused_here_after_seconds": round(refused_after, 6),
            "verifiers": {"acknowledged": known, "live": 1},
            "destinations": [t.key for t in case.next_targets] if case else [],
            "withheld": list(case.credential.withheld if case else leak.withhold),
            "warnings": [] if complete or dry_run else [STORE_AWAY],
        }

    # --- the other verbs --------------------------------------------------------------------

    def suspend(self, agent: str, caller: Caller, *, reason: str = "") -> dict[str, Any]:
        """Refuse everything of an agent until it is resumed; returns once verifiers know (I3)."""
        return self._change(agent, caller, "suspend", lifecycle.suspend, reason=mask(reason))

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
        managed = case.agent.managed_by is ManagedBy.FILE
        if managed and case.agent.state is not AgentState.UNMANAGED:
            raise Refused(
                f"NOTHING WAS CUT: {agent} stands in the configuration, which would bring it back",
                hint="take it out of the file and `keyturn reload`, then repeat this; to cut it"
                f" now: `keyturn revoke {agent}`",
            )
        for version in case.accepted:
            self.spool.revoke(version.id, self._note(Leak(agent=agent, reason="removed"), caller))
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
        self._await_verifiers(saved.epoch)
        return {"agent": agent, "state": str(saved.case.agent.state)}

    def _amend(self, uid: str, change: Change, once: Once | None) -> Saved:
        """Change a case in one transaction, and tell where that ended its rotation."""
        ends: list[str] = []

        def noting(case: Case) -> tuple[Case, Sequence[AuditEntry]]:
            after, entries = change(case)
            ends[:] = [_END[state] for state in _ended(case, after)]
            return after, entries

        saved = self.store.amend(uid, noting, once=once)
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


_END = {RotationState.ABANDONED: "abandoned", RotationState.CLOSED: "revoked"}


def _ended(before: Case, after: Case) -> list[RotationState]:
    """Return the state in which a change ended the open rotation, if it did."""
    was, now = before.rotation, after.rotation
    ended = was is not None and was.open and now is not None and now.state in _END
    return [now.state] if ended and now is not None else []


def _state(case: Case, version: Version) -> VersionState | None:
    known = case.version(version.id)
    return known.state if known else None


def _revoke_entry(case: Case, leak: Leak, caller: Caller, revoked: Sequence[str]) -> AuditEntry:
    return AuditEntry(
        action="revoke",
        actor=caller.name,
        agent=case.agent.name,
        version_id=leak.version or "",
        detail=(
            ("reason", leak.reason),
            ("reissue", leak.reissue),
            ("revoked", tuple(revoked)),
            ("trigger", caller.trigger),
            ("withheld", leak.withhold),
        ),
    )


def _leak_of(version_id: str, note: dict[str, Any], *, agent: str) -> Leak:
    """Read a spool note back; a file that was made by hand has none and means that version."""
    reissue, reason = bool(note.get("reissue")), str(note.get("reason", ""))
    if note.get("scope") != "agent":
        return Leak(version=version_id, reissue=reissue, reason=reason)
    at = datetime.fromisoformat(str(note["at"])) if note.get("at") else None
    withhold = tuple(str(name) for name in note.get("withhold") or ())
    return Leak(agent=agent, reissue=reissue, reason=reason, at=at, withhold=withhold)


def _once_of(note: dict[str, Any]) -> Once | None:
    """Read the request of a spool note back: a repeat must find that the daemon completed it."""
    request = note.get("request")
    return Once(id=str(request[0]), digest=str(request[1])) if request else None
