"""A store that may be older than what happened: quarantined, merged, looked at, let go.

At each start of a daemon, and for `keyturn store restore`. The ledger decides who is accepted. What the
destinations show is read before anything is let go, so that a person can compare; one that cannot be
read is told and holds nobody up, since nothing is ever accepted for being found there.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import structlog

from keyturn.core.model import Agent, Case, Target
from keyturn.core.secret import parse
from keyturn.core.walltime import rfc3339
from keyturn.errors import ConfigError, DestinationError, Refused, StorageError, StoreUnavailable
from keyturn.leaks import Caller, Leak
from keyturn.sight import look
from keyturn.storage import restoring
from keyturn.storage.merge import merge
from keyturn.storage.restoring import EVERYBODY, FOREIGN, Difference
from keyturn.storage.store import Store
from keyturn.verifier.hashing import tag, text_of
from keyturn.wiring import Parts

READERS = 16
_log = structlog.get_logger(__name__)

DECIDE = "keyturn store release AGENT; with --reissue where what the store has may be too old"


def in_doubt(store: Store, agent: Agent) -> dict[str, Any]:
    """Return what `keyturn status` says of an agent in quarantine; `quarantine` is null for others."""
    mine = (EVERYBODY, agent.uid)
    found = next((one for one in restoring.doubts(store) if one.agent_uid in mine), None)
    if found is None:
        return {"quarantine": None}
    since = rfc3339(found.since)
    return {
        "quarantine": {"reason": found.reason, "since": since},
        "hint": _what_to_type(found, agent),
    }


def _what_to_type(found: restoring.Doubt, agent: Agent) -> str:
    if found.agent_uid != EVERYBODY:
        return (
            f"keyturn store release {agent.name}   # or with --reissue, where what the store has"
            " may be too old"
        )
    if found.reason == restoring.HELD:
        return "keyturn store release --all   # a restore was not let go: until then all get 503"
    return "keyturn store status   # the whole store is in quarantine, and is let go by itself"


@dataclass(slots=True, kw_only=True)
class Recovery:
    """What is done to a store in quarantine, by whoever leads on it."""

    parts: Parts
    actor: str
    differences: list[Difference] = field(default_factory=list)
    held_was_told: bool = False

    @property
    def everybody(self) -> restoring.Doubt | None:
        """Why the whole store is in quarantine, if it is."""
        found = restoring.doubts(self.parts.store)
        return next((one for one in found if one.agent_uid == EVERYBODY), None)

    def at_start(self) -> bool:
        """Compare store and ledger, and merge where need be. Tells whether it is in quarantine.

        Raises StorageError where the store is new and the ledger is that of another one.
        """
        if self.everybody is None:
            self._compare()
        if self.everybody is None:
            try:
                restoring.keep_ledger(self.parts.store)
            except StoreUnavailable as error:  # a full disk: the next start begins it
                _log.error("ledger.not-begun", code=error.code)
            return False
        self.merge()
        return True

    def _compare(self) -> None:
        store = self.parts.store
        reason = restoring.compare(store)
        if not reason:
            return
        if reason == FOREIGN and not store.agents():
            raise StorageError(
                f"the store is new, and the ledger in {store.ledger.folder} is that of another one",
                hint="restore a backup: `keyturn store restore FILE`; or, to begin anew, move the"
                " ledger and revoked.d away",
            )
        _log.error("store.quarantined", reason=reason, hint="`keyturn store status`")
        restoring.put_in_quarantine(store, reason, actor=self.actor)

    def merge(self) -> list[Difference]:
        """Bring the store up to ledger and spool. Verifiers still answer that nobody can tell."""
        parts = self.parts
        self.differences = merge(
            parts.store, schedule=parts.schedule, identify=self._identify, actor=self.actor
        )
        parts.administration.applied.clear()
        parts.administration.apply_spool(Caller(name=self.actor, trigger="spool"))
        for one in self.differences:
            level = _log.warning if one.what == "undecided" else _log.info
            level("store.merged", agent=one.agent, what=one.what, version=one.version or None)
        return self.differences

    def _identify(self, target: Target) -> str | None:
        try:
            return self.parts.identity(target)
        except ConfigError:
            return None

    def survey(self) -> list[dict[str, Any]]:
        """Read every destination of every agent; returns what differs from the merged store."""
        store = self.parts.store
        cases = [store.case_of(agent.name) for agent in store.agents()]
        places = [(case, target) for case in cases for target in case.targets]
        with ThreadPoolExecutor(READERS, thread_name_prefix="survey") as pool:
            rows = list(pool.map(lambda pair: self._compare_entry(*pair), places))
        return [row for row in rows if row is not None]

    def _compare_entry(self, case: Case, target: Target) -> dict[str, Any] | None:
        parts, current = self.parts, case.current
        row = {
            "agent": case.agent.name,
            "destination": target.key,
            "current": current.id if current else None,
            "shows": None,
            "state": None,
        }
        destination = parts.destinations.get(target.to)
        if destination is None:
            return row | {"what": "unreadable", "why": "no connection of this name here"}
        try:
            found = destination.observe(target)
        except DestinationError as error:
            return row | {"what": "unreadable", "why": error.code}
        sight = look(case, target, found, authority=parts.authority, store_id=parts.store.store_id)
        shown = case.version(sight.shown)
        if shown is None:
            if not found.has_value:
                return None if current is None else row | {"what": "missing", "why": ""}
            return row | {"what": "unknown", "why": sight.blocked, "shows": found.version_id}
        if current is not None and shown.id == current.id:
            return None
        what = "other" if shown.accepted else "refused"
        return row | {"what": what, "why": "", "shows": shown.id, "state": str(shown.state)}

    def finish(self, shown: Sequence[dict[str, Any]]) -> list[str]:
        """Lift the quarantine from whoever is certain; returns those that a person must decide."""
        undecided = restoring.let_go(self.parts.store, self.differences, actor=self.actor)
        for row in shown:
            _log.warning("store.differs", **row)
        for name in undecided:
            _log.error("store.undecided", agent=name, hint=DECIDE)
        _log.warning("store.released", undecided=len(undecided))
        return undecided

    def report(self, shown: Sequence[dict[str, Any]], undecided: Sequence[str]) -> dict[str, Any]:
        """Return all of it as plain JSON values."""
        store = self.parts.store
        return {
            "incarnation": store.incarnation,
            "merged": [asdict(one) for one in self.differences],
            "destinations": list(shown),
            "undecided": list(undecided),
        }

    def let_go_later(self) -> bool:
        """Look and let go, where that is nobody's decision; for the daemon. False to ask again."""
        try:
            found = self.everybody
            if found is None:
                return True
            if found.reason == restoring.HELD:
                if not self.held_was_told:
                    _log.error("store.held", hint="`keyturn store release --all` lets go")
                self.held_was_told = True
                return False
            self.finish(self.survey())
        except StoreUnavailable as error:
            _log.error("store.still-quarantined", code=error.code)
            return False
        return True

    def release(self, names: Sequence[str], caller: Caller, *, reissue: bool) -> dict[str, Any]:
        """Let agents go as the store has them, or with all of it revoked and a successor.

        Without names everybody. Raises UnknownAgent, and Refused where a name would stand for all.
        """
        everybody = self.everybody is not None
        if everybody and names:
            raise Refused(
                "the whole store is in quarantine, and nobody is let go from it alone",
                hint="`keyturn store status` shows why; `keyturn store release --all` lets go",
            )
        if everybody:
            self.merge()
            self.finish([])
        store = self.parts.store
        held = {one.agent_uid for one in restoring.doubts(store)}
        undecided = [agent.name for agent in store.agents() if agent.uid in held]
        released = []
        for name in names or undecided:
            case = store.case_of(name)
            if case.agent.uid not in held:
                continue
            if reissue:
                self._bury_shown(case)
                leak = Leak(agent=name, reissue=True, reason="restored without a ledger")
                self.parts.administration.revoke(leak, caller)
            restoring.release(store, name, actor=caller.name)
            released.append(name)
        left = [name for name in undecided if name not in released]
        return {
            "everybody": everybody,
            "released": released,
            "reissue": reissue,
            "undecided": left,
        }

    def _bury_shown(self, case: Case) -> None:
        """Make what destinations show of an unknown version of ours a tombstone: a successor may go there.

        SECURITY: as a refused one, never as an accepted one; and only with our marker, its own login
        and a text of our form that carries the id in the entry.
        """
        for target in case.targets:
            destination = self.parts.destinations.get(target.to)
            if destination is None:
                continue
            try:
                found = destination.observe(target)
            except DestinationError:
                continue  # its rotation stalls there, and says why
            ours = found.owner == self.parts.store.store_id and found.login == case.agent.login
            if not ours or found.secret is None:
                continue
            parsed = parse(text_of(found.secret))
            if parsed is None or parsed.version_id != found.version_id:
                continue
            if self.parts.store.find_version(parsed.version_id) is None:
                its_tag = tag(parsed.version_id, found.secret)
                restoring.bury(self.parts.store, case, version_id=parsed.version_id, tag=its_tag)
