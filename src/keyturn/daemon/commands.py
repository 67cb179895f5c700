"""What the admin socket can be asked: argument checks, one call each, plain JSON out.

The command line uses the same functions straight on the store while the daemon is down; what needs
the daemon (waiting for a saga, reloading) comes in as `Daemon` and is absent there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Protocol

from keyturn.core.duration import format_duration
from keyturn.core.model import (
    Agent,
    AgentState,
    Case,
    Policy,
    RotationState,
    Target,
)
from keyturn.core.walltime import rfc3339
from keyturn.daemon import answers, names, report
from keyturn.daemon.own_logins import stored_rows
from keyturn.daemon.peer import Peer, Role
from keyturn.daemon.recovery import Recovery, in_doubt
from keyturn.daemon.socket import Command, Progress
from keyturn.errors import KeyturnError, Refused, UnknownAgent
from keyturn.laggards import Seen, last_hour, look
from keyturn.leaks import Caller, Leak
from keyturn.ports import AuditEntry
from keyturn.status import describe
from keyturn.storage.audit import MOST
from keyturn.storage.requests import Once
from keyturn.storage.standing import standing
from keyturn.wiring import Parts

Args = dict[str, Any]
WAIT_POLL = 0.05
LONGEST_GRACE = timedelta(days=90)  # without --force, where the policy has no maximum age
WAIT_LIMIT = timedelta(hours=1)
CLEANUP_LIMIT = timedelta(minutes=2)
CLOSED = {RotationState.DONE: "promoted", RotationState.CLOSED: "revoked"}


class Daemon(Protocol):
    """What only a running daemon can do."""

    def kick(self) -> None:
        """Look at the due-queue now."""

    def reload(
        self, *, allow_mass_change: bool, actor: str, take_over: frozenset[str]
    ) -> dict[str, Any]:
        """Validate the files, then swap."""

    def rehearse(self, *, allow_mass_change: bool, take_over: frozenset[str]) -> dict[str, Any]:
        """Tell what a reload would do."""

    def metrics_text(self) -> str:
        """Return the metrics as text."""

    def health(self) -> dict[str, Any]:
        """Tell whether it lives and is ready, and why not."""

    def own_rows(self) -> list[dict[str, Any]]:
        """Return the daemon's own logins."""


class Commands:
    """The functions behind the names; every one takes args, peer and progress."""

    def __init__(self, parts: Callable[[], Parts], daemon: Daemon | None = None) -> None:
        self._parts = parts
        self._daemon = daemon

    def table(self) -> Mapping[str, Command]:
        """Return every command with the least role that it needs (security.md, process)."""
        view, respond, admin = Role.VIEW, Role.RESPOND, Role.ADMIN
        return {
            "status": Command(role=view, function=self.status),
            "status.own": Command(role=view, function=self.status_own),
            "names": Command(role=view, function=self.names),
            "agents.list": Command(role=view, function=self.agents_list),
            "agents.show": Command(role=view, function=self.agents_show),
            "agents.add": Command(role=admin, function=self.agents_add),
            "agents.remove": Command(role=admin, function=self.agents_remove),
            "destinations.forget": Command(role=admin, function=self.destinations_forget),
            "rotate": Command(role=respond, function=self.rotate),
            "rotate.forced": Command(role=admin, function=self.rotate_forced),
            "suspend": Command(role=respond, function=self.suspend),
            "resume": Command(role=respond, function=self.resume),
            "revoke": Command(role=respond, function=self.revoke),
            "reload": Command(role=admin, function=self.reload),
            "reload.rehearsed": Command(role=admin, function=self.rehearse),
            "rotation.retry": Command(role=respond, function=self.retry),
            "rotation.abandon": Command(role=admin, function=self.abandon),
            "identify": Command(role=view, function=self.identify),
            "clock": Command(role=view, function=self.clock),
            "clock.trust": Command(role=admin, function=self.clock_trust),
            "audit": Command(role=view, function=self.audit),
            "store.status": Command(role=view, function=self.store_status),
            "store.release": Command(role=admin, function=self.store_release),
            "metrics": Command(role=view, function=self.metrics),
            "health": Command(role=view, function=self.health),
            "report": Command(role=view, function=self.report),
        }

    # --- look -------------------------------------------------------------------------------

    def status(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Describe one agent or all of them."""
        del peer, progress
        parts = self._parts()
        wanted = [_text(args, "agent")] if args.get("agent") else _names(parts)
        cases = [parts.store.case_of(name) for name in wanted]
        seen = look(parts.store, parts.usage, cases, parts.store.now())
        return [self._describe(case, seen) for case in cases]

    def status_own(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Describe the daemon's own logins; without it, what the store has of them."""
        del args, peer, progress
        if self._daemon is not None:
            return self._daemon.own_rows()
        store = self._parts().store
        return stored_rows(store.owns(), now=store.now())

    def _describe(self, case: Case, seen: Seen | None) -> dict[str, Any]:
        parts = self._parts()
        # A tombstone refuses before the store has it, and without a daemon for as long.
        case = parts.administration.refused_here(case)
        found = describe(
            case,
            policy=parts.policy_of(case),
            now=parts.store.now(),
            parked=parts.carried.parked(case.credential.uid),
            suspension=self._suspension(case.agent),
            seen=seen,
        )
        return found | in_doubt(parts.store, case.agent)

    def store_status(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Say what the store is, and what is in quarantine."""
        del args, peer, progress
        settings, database = self._parts().settings.store, self._parts().store.database
        return standing(database, settings.url, settings.folder)

    def store_release(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Let agents of a restored store go."""
        del progress
        self._running()
        recovery = Recovery(parts=self._parts(), actor=peer.actor)
        names = [str(name) for name in args.get("agents", ())]
        done = recovery.release(names, _caller(peer), reissue=bool(args.get("reissue")))
        self._kick()
        return done

    def _suspension(self, agent: Agent) -> dict[str, Any] | None:
        """Return who suspended an agent, when and why, as the audit has it."""
        if agent.state is not AgentState.SUSPENDED:
            return None
        entries = self._parts().store.audit_entries(agent=agent.name, limit=200)
        newest = max(
            (one for one in entries if one.entry.action in ("suspend", "revoke")),
            key=lambda one: one.at,
            default=None,
        )
        if newest is None:
            return None
        found = answers.recorded(newest)
        reason = found["detail"].get("reason")
        return {"by": found["actor"], "at": found["at"], "how": found["action"], "reason": reason}

    def names(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """List the names that can be typed, for completion."""
        del args, peer, progress
        return names.offered(self._parts())

    def agents_list(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """List the definitions."""
        del args, peer, progress
        store = self._parts().store
        return [answers.definition(store.case_of(name)) for name in _names(self._parts())]

    def agents_show(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Show one definition."""
        del peer, progress
        return answers.definition(self._parts().store.case_of(_text(args, "agent")))

    def identify(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Say whose versions these are."""
        del peer, progress
        ids = [str(one) for one in args.get("versions", ())][:1000]
        parts = self._parts()
        rows = parts.administration.identify(ids)
        return answers.with_uses(rows, last_hour(parts.usage, ids, parts.store.now()))

    def audit(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Return the newest entries, and whether the chains are whole."""
        del peer, progress
        store = self._parts().store
        limit = max(0, min(int(args.get("limit", 50)), MOST))
        found = store.audit_entries(agent=args.get("agent"), limit=limit)
        result: dict[str, Any] = {"entries": [answers.recorded(one) for one in found]}
        if args.get("verify"):
            problems = store.verify_audit()
            result["chain"] = {"ok": not problems, "problem": "; ".join(problems)}
        return result

    def metrics(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Return the metrics."""
        del args, peer, progress
        from keyturn.daemon.metrics import samples  # its library takes long to load

        text = self._running().metrics_text()
        return {"text": text, "samples": samples(text)}

    def health(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Return whether the daemon lives and is ready."""
        del args, peer, progress
        return self._running().health()

    def report(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Tell how often each agent's secret changed."""
        del peer, progress
        seconds = min(float(args.get("since_seconds", 0)), report.LONGEST.total_seconds())
        return report.report(self._parts(), since=timedelta(seconds=seconds))

    def clock(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Compare the wall clock with the time since boot."""
        del args, peer, progress
        self._running()
        now, jump = self._parts().store_clock.look()
        shown = rfc3339(now)
        return {"now": shown, "jump_seconds": jump.total_seconds(), "ok": not jump}

    # --- change -----------------------------------------------------------------------------

    def agents_add(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Add an agent that the command line owns."""
        name = _text(args, "name")
        targets = tuple(
            Target(
                to=_text(one, "to"),
                path=_text(one, "path"),
                merge=bool(one.get("merge")),
                adopt=bool(one.get("adopt")),
            )
            for one in args.get("targets", ())
        )
        self._parts().add_agent(
            name,
            login=str(args.get("login") or name),
            owner=args.get("owner"),
            policy=str(args.get("policy") or "default"),
            targets=targets,
            actor=peer.actor,
        )
        self._kick()
        if args.get("wait"):
            return self._wait_for(name, after=0, progress=progress)
        return {"agent": name, "outcome": "added"}

    def agents_remove(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """End an agent."""
        del progress
        return self._parts().administration.remove(_text(args, "agent"), _caller(peer))

    def destinations_forget(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Look no more at a destination that an agent is leaving."""
        del progress
        result = self._parts().administration.forget(
            _text(args, "agent"), _text(args, "destination"), _caller(peer)
        )
        self._kick()
        return result

    def rotate(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Ask for rotations; with `wait`, follow them to their end."""
        return self._rotate(args | {"force": False}, peer, progress)

    def rotate_forced(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Ask for rotations, also with a grace below the floor: that cuts agents off."""
        return self._rotate(args | {"force": True}, peer, progress)

    def _rotate(self, args: Args, peer: Peer, progress: Progress) -> Any:
        wanted = [str(name) for name in args.get("agents", ())]
        results = [self._ask_rotation(name, args, peer, _once("rotate", args)) for name in wanted]
        self._kick()
        if args.get("wait"):
            results = [
                one
                if "error" in one
                else self._wait_for(one["agent"], after=one["after"], progress=progress)
                for one in results
            ]
        for one in results:
            one.pop("after", None)
        return {"results": results}

    def _ask_rotation(self, name: str, args: Args, peer: Peer, once: Once | None) -> dict[str, Any]:
        parts = self._parts()
        grace = args.get("grace_seconds")
        try:
            case = parts.store.case_of(name)
            window = None if grace is None else timedelta(seconds=float(grace))
            if window is not None and not args.get("force"):
                parts.check_grace(case, window)
                _refuse_long(window, parts.policy_of(case))
            done = parts.administration.rotate(
                name, _caller(peer), grace=window, force=bool(args.get("force")), once=once
            )
        except KeyturnError as error:
            return {"agent": name, "outcome": "error", "error": answers.error_of(error)}
        return {"agent": name, "outcome": "asked", "after": done["after"]}

    def _wait_for(self, name: str, *, after: int, progress: Progress) -> dict[str, Any]:
        """Follow an agent until a version later than `after` is current, or a person is needed."""
        store, shown = self._parts().store, ""
        until = time.monotonic() + WAIT_LIMIT.total_seconds()
        while time.monotonic() < until and not getattr(progress, "gone", False):
            case = store.case_of(name)
            if case.current is not None and case.current.seq > after:
                return answers.promoted(case, case.current)
            if case.rotation is not None and case.rotation.state is RotationState.STALLED:
                return answers.stalled(name, case.rotation)
            parked = self._parts().carried.parked(case.credential.uid)
            shown = answers.tell(name, case, shown, progress, parked.code if parked else "")
            time.sleep(WAIT_POLL)
        return {"agent": name, "outcome": "waiting"}

    def suspend(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Suspend an agent."""
        del progress
        reason = str(args.get("reason", ""))
        return self._parts().administration.suspend(
            _text(args, "agent"), _caller(peer), reason=reason
        )

    def resume(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Resume an agent, or publish again at a connection that a revoke left out."""
        del progress
        verbs, agent = self._parts().administration, _text(args, "agent")
        if args.get("destination"):
            result = verbs.readmit(agent, _text(args, "destination"), _caller(peer))
        else:
            result = verbs.resume(agent, _caller(peer))
        self._kick()
        return result

    def revoke(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Revoke; with `wait`, also follow the successor. What was cut is told before that."""
        parts = self._parts()
        leak = Leak(
            agent=args.get("agent"),
            version=args.get("version"),
            reissue=bool(args.get("reissue")),
            reason=str(args.get("reason", "")),
            withhold=tuple(str(name) for name in args.get("except", ())),
        )
        result = parts.administration.revoke(
            leak, _caller(peer), dry_run=bool(args.get("dry_run")), once=_once("revoke", args)
        )
        if not result["dry_run"]:
            parts.note_revocation(result, trigger="command")
        self._kick()
        if result["dry_run"]:
            return result
        follow = bool(args.get("wait") and self._daemon and not result["incomplete"])
        if follow:  # nobody waits before knowing what was cut
            progress({"event": "revoked", "agent": result["agent"], "result": dict(result)})
        if leak.reissue:
            result["successor"] = (
                self._successor(result["agent"], progress)
                if follow
                else {"outcome": "asked" if self._daemon else "later"}
            )
        if args.get("wait"):
            result["cleanup"] = (
                self._cleanup(result["agent"], progress) if follow else {"outcome": "later"}
            )
        return result

    def _successor(self, name: str, progress: Progress) -> dict[str, Any]:
        """Follow what a revoke owes the agent."""
        case = self._parts().store.case_of(name)
        if case.agent.state is AgentState.SUSPENDED:
            return {"agent": name, "outcome": "waiting"}  # for a person
        after = max((v.seq for v in case.versions if not v.accepted), default=0)
        return self._wait_for(name, after=after, progress=progress)

    def _cleanup(self, name: str, progress: Progress) -> dict[str, Any]:
        """Wait until the destinations were looked at; tell which hold what was revoked, or may."""
        store = self._parts().store
        until = time.monotonic() + CLEANUP_LIMIT.total_seconds()
        while time.monotonic() < until and not getattr(progress, "gone", False):
            try:
                case = store.case_of(name)
            except UnknownAgent:
                return {
                    "outcome": "done",
                    "destinations": [],
                }  # removed: there is nothing to follow
            rotation, sweep_at = case.rotation, case.credential.sweep_at
            runs = rotation is not None and rotation.state is RotationState.RUNNING
            # A revoke puts the sweep to now, a sweep to minutes later.
            if not runs and sweep_at is not None and sweep_at > store.now():
                held = [
                    {"destination": drift.target, "code": drift.kind}
                    for drift in case.credential.drift
                    if drift.kind in ("revoked", "unreadable")
                ]
                return {"outcome": "waiting" if held else "done", "destinations": held}
            time.sleep(WAIT_POLL)
        return {"outcome": "waiting", "destinations": []}

    def retry(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Retry rotations, of some agents or all that stopped at a connection; `wait` follows them."""
        wanted = [str(name) for name in args.get("agents", ())] or self._stopped(args)
        results = [self._retry(name, peer) for name in wanted]
        self._kick()
        for one in results:
            after = one.pop("after", None)
            if args.get("wait") and after is not None:
                one.update(self._wait_for(one["agent"], after=after, progress=progress))
        return {"results": results}

    def _stopped(self, args: Args) -> list[str]:
        wanted = str(args.get("destination") or "")
        found = self._parts().store.stopped()
        return [name for name, where in found if wanted in ("", where.partition(":")[0])]

    def _retry(self, name: str, peer: Peer) -> dict[str, Any]:
        parts = self._parts()
        try:
            case = parts.store.case_of(name)
            parts.administration.retry(name, _caller(peer))
        except KeyturnError as error:
            return {"agent": name, "outcome": "error", "error": answers.error_of(error)}
        after = case.current.seq if case.current else 0
        # Repairs that are taken up again may bring no new version: there is nothing to follow.
        return {"agent": name, "outcome": "tried again", "after": after if case.rotation else None}

    def abandon(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Abandon a rotation."""
        del progress
        return self._parts().administration.abandon(_text(args, "agent"), _caller(peer))

    def reload(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Read the configuration again."""
        del progress
        return self._running().reload(
            allow_mass_change=bool(args.get("allow_mass_change")),
            actor=peer.actor,
            take_over=frozenset(map(str, args.get("take_over", ()))),
        )

    def rehearse(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Tell what a reload would do."""
        del peer, progress
        return self._running().rehearse(
            allow_mass_change=bool(args.get("allow_mass_change")),
            take_over=frozenset(map(str, args.get("take_over", ()))),
        )

    def clock_trust(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Believe the wall clock as it is now."""
        self._running()
        jump = self._parts().store_clock.trust()
        detail = (("seconds", round(jump.total_seconds())),)
        entry = AuditEntry(action="clock.trusted", actor=peer.actor, detail=detail)
        self._parts().store.append_audit(entry)
        self._kick()
        return self.clock(args, peer, progress)

    def _running(self) -> Daemon:
        if self._daemon is None:
            raise Refused("the daemon is not running", hint="start it: keyturn run -c FILE")
        return self._daemon

    def _kick(self) -> None:
        if self._daemon is not None:
            self._daemon.kick()


def _refuse_long(grace: timedelta, policy: Policy) -> None:
    """Refuse a grace that outlives what the old version may live: most likely a slip of the pen."""
    longest = policy.max_age or max(policy.grace, LONGEST_GRACE)
    if grace > longest:
        raise Refused(
            f"a grace of {format_duration(grace)} is longer than {format_duration(longest)}, and holds"
            " one of the few places for accepted versions that long",
            hint="give a shorter one, or add --force",
        )


def _once(command: str, args: Args) -> Once | None:
    """Return the request of a command that names itself; waiting is no part of what is done."""
    request_id = args.get("request_id")
    if not request_id:
        return None
    what = {key: value for key, value in args.items() if key not in ("request_id", "wait")}
    return Once.of(str(request_id), command, what)


def _caller(peer: Peer) -> Caller:
    return Caller(name=peer.actor, trigger="command")


def _text(args: Mapping[str, Any], key: str) -> str:
    found = args.get(key)
    if not isinstance(found, str) or not found:
        raise Refused(f"the command needs {key}", hint="see `keyturn COMMAND --help`")
    return found


def _names(parts: Parts) -> list[str]:
    return sorted(agent.name for agent in parts.store.agents())
