"""The running daemon: who leads, what is due, who asks, which signals came.

lead        one daemon works on a store, a second one waits as standby
dispatch    APScheduler wakes the due-queue of the store; a pool of threads runs sagas, never more
            at once on one connection than it allows (I7)
revoke      the spool, the revocations file and the `revocations:` of the main file
ask         the admin socket
stop        SIGTERM lets running sagas finish for a while, then parks them: every step is journalled
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import structlog
from apscheduler.schedulers.background import BackgroundScheduler

from keyturn import __version__, config, rotation, wiring
from keyturn.daemon import (
    anchoring,
    filewatch,
    logs,
    own_checks,
    rehearsal,
    revoking,
    usage_watch,
)
from keyturn.daemon.anchoring import AnchorCommands, Anchoring
from keyturn.daemon.commands import Commands
from keyturn.daemon.cron import Crontab
from keyturn.daemon.embedded import Embedded
from keyturn.daemon.front import Front
from keyturn.daemon.keys import LOOK as LOOK_AT_KEYS
from keyturn.daemon.keys import Keys
from keyturn.daemon.metrics import Metrics
from keyturn.daemon.notifying import NotifyCommands, notifier_of, specs_of
from keyturn.daemon.own_logins import OwnLogins
from keyturn.daemon.peer import Roles
from keyturn.daemon.readiness import Readiness, Reason
from keyturn.daemon.recovery import Recovery
from keyturn.daemon.registered import VerifierCommands
from keyturn.daemon.revoking import Revoking
from keyturn.daemon.signals import Signals
from keyturn.daemon.socket import AdminServer
from keyturn.daemon.supervision import Supervisor, beating
from keyturn.daemon.usage_watch import UsageWatch
from keyturn.daemon.watching import Watching
from keyturn.errors import ClaimLost, ConfigError, KeyturnError, Refused, StoreUnavailable
from keyturn.notify import Notifier
from keyturn.ports import AuditEntry
from keyturn.storage.membership import Membership
from keyturn.storage.results import Due
from keyturn.verifier.hashing import share_memory
from keyturn.wiring import Parts

TICK = 0.25  # seconds between two looks at the due-queue
OWN_LOGINS = 1.0  # seconds between two looks at which of our own logins is due
MEASURE = 5.0  # seconds between two counts for the metrics
FORGET_REQUESTS = 3600.0
LEAD_TTL = timedelta(seconds=15)
LEAD_RENEW = 5.0
LEAD_AWAY = 2.0  # seconds until a standby asks a store again that was away
FINISH = 20.0  # seconds that running sagas get at SIGTERM before they are parked
PARK = 8.0
WORKERS_AT_MOST = 64
LOOK = WORKERS_AT_MOST * 4  # due credentials in one look: more than can be at work unclaimed

_log = structlog.get_logger(__name__)


def run(path: Path, *, socket: Path | None = None, standby: bool = True) -> int:
    """Run the daemon until it is told to stop. Returns the exit code."""
    share_memory()
    settings = load(path)
    logs.configure(level=settings.log.level, form=settings.log.format)
    supervisor = Supervisor.take(os.environ, pid=os.getpid())
    supervisor.starting("opening the store")
    service = Service(settings, socket=socket or settings.admin.socket, supervisor=supervisor)
    # Before anything can start a thread: a signal goes to any thread that lets it.
    signals = Signals(
        revoke=service.apply_revocations, reload=service.reload_by_signal, stop=service.stop
    )
    signals.start()
    try:
        return service.run(standby=standby)
    finally:
        signals.close()


def load(path: Path) -> config.Settings:
    """Load and check the settings as the daemon needs them. Raises ConfigError."""
    settings = config.load(path, environ=os.environ, cron=Crontab(), now=wiring.SystemClock().now())
    wiring.check_settings(settings, cron=Crontab())
    own_checks.rotated_files(settings)
    return settings


def roles_of(settings: config.Settings) -> Roles:
    """Look up the groups that the settings name."""
    groups = settings.admin.groups
    return Roles.from_names(
        view=groups.view or "", respond=groups.respond or "", admin=groups.admin or ""
    )


def missing_groups(roles: Roles) -> list[str]:
    """Return a sentence for each group that this host does not have."""
    return [f"admin.groups: no group is called {name} on this host" for name in roles.missing]


class Service:
    """One daemon process."""

    def __init__(
        self, settings: config.Settings, *, socket: Path, supervisor: Supervisor | None = None
    ) -> None:
        self._socket = socket
        self._supervisor = supervisor or Supervisor()
        self.metrics = Metrics()
        self.readiness = Readiness()
        self.metrics.follow(self.readiness)
        self.parts: Parts = wiring.build(settings, cron=Crontab(), create=True)
        self.watching = Watching(self.metrics, self.parts, self.readiness)
        self.front = Front(settings, socket, roles_of(settings), self.readiness, self.metrics)
        self.parts.on_revocation = self.watching.revocation
        self.parts.on_rotation_end = self.watching.rotation_ended
        self._usage = UsageWatch(self.parts, self.metrics)
        self._keys = Keys(lambda: self.parts, self.readiness)
        self.embedded = Embedded(settings, self.readiness, self.metrics)
        self._anchoring = Anchoring(self.parts, self.metrics, self.watching.incident)
        self._stop = threading.Event()
        self.own_logins = OwnLogins(self.parts, self.metrics, self._stop.is_set)
        self._ready = threading.Event()
        self._server: AdminServer | None = None
        self._notifier: Notifier | None = None
        self._parked = threading.Event()
        self._busy: Counter[str] = Counter()
        self._running: set[str] = set()
        self._guard = threading.Lock()
        self._reloading = threading.Lock()
        self.revoking = Revoking(self.parts, self.metrics, self.kick)
        self._away = False
        self._files = filewatch.FileWatch(
            lambda: self.parts.settings,
            lambda: self.reload(allow_mass_change=False, actor="daemon:files"),
        )
        self._pool = ThreadPoolExecutor(WORKERS_AT_MOST, thread_name_prefix="saga")
        self._scheduler = BackgroundScheduler(
            timezone="UTC",
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
        )

    # --- life -------------------------------------------------------------------------------

    def run(self, *, standby: bool) -> int:
        """Lead, work until told to stop, park, and leave."""
        try:
            self.front.open()
            self.embedded.start()
            return self._run(standby=standby)
        finally:
            self.embedded.close()
            self.front.close()

    def _run(self, *, standby: bool) -> int:
        parts = self.parts
        membership = Membership(parts.store)
        if not self._lead(membership, standby=standby):
            self._supervisor.stopping()
            parts.close()
            return 0 if self._stop.is_set() else StoreUnavailable.exit_code
        self.front.confirm()
        self.readiness.take_lead()
        clock = parts.store_clock
        clock.anchor = membership.anchor(clock.boot_id)
        self._supervisor.starting("taking the configuration over")
        self._connect()
        recovery = Recovery(parts=parts, actor="daemon:start")
        quarantined = recovery.at_start()
        if quarantined:
            self.readiness.hold(Reason.QUARANTINED)
        self.revoking.apply_spool_alone()
        self._notifier = notifier = notifier_of(parts, self.metrics)
        notifier.apply(specs_of(parts.settings))
        self._reconcile_at_start()
        self.revoking.apply_inline()
        self._ready.set()
        self._supervisor.starting("applying revocations")
        self.revoking.apply()
        roles = roles_of(parts.settings)
        for name in roles.missing:
            _log.warning("admin.no-such-group", group=name)
        groups = (
            Commands(lambda: parts, self),
            AnchorCommands(lambda: parts),
            VerifierCommands(lambda: parts),
            NotifyCommands(notifier),
        )
        table = {name: one for group in groups for name, one in group.table().items()}
        server = AdminServer(self._socket, table, roles)
        server.start()
        self._server = server
        self.front.lead()
        self._keys.begin()
        self._schedule(membership)
        self.readiness.release(Reason.STARTING)
        if quarantined:
            self._pool.submit(self._let_go, recovery)
        agents = len(parts.store.agents())
        _log.info("daemon.ready", version=__version__, agents=agents)
        self._supervisor.ready(f"leads, {agents} agents")
        self._stop.wait()
        self._wind_down(server, membership)
        return 0

    def stop(self) -> None:
        """Ask the daemon to stop. Returns at once."""
        self._stop.set()

    def _lead(self, membership: Membership, *, standby: bool) -> bool:
        """Take the lead; as standby wait for it (live, not ready)."""
        said, look_at = False, 0.0
        while not self._stop.is_set():
            try:
                leads = membership.try_lead(ttl=LEAD_TTL)
                self.metrics.store_up.set(1)
                self.readiness.release(Reason.STORE_DOWN)
                if leads:
                    return True
            except StoreUnavailable as error:
                # Whoever leads may be away with it: this is the very moment to be a standby.
                if not standby:
                    raise
                self.metrics.store_up.set(0)
                self.readiness.hold(Reason.STORE_DOWN)
                _log.warning("store.unavailable", code=error.code)
                self._supervisor.starting("standby: the store is away")
                self._stop.wait(LEAD_AWAY)
                continue
            if not standby:
                _log.error("daemon.other-leads", hint="another daemon has this store")
                return False
            if not said:
                _log.info("daemon.standby")
                self.readiness.stand_by()
                said = True
            self._supervisor.starting("standby: another daemon leads on this store")
            if time.monotonic() >= look_at:
                # What was revoked on this host while the store was away stands in no other spool.
                self.revoking.apply_spool_alone()
                look_at = time.monotonic() + revoking.POLL
            self._stop.wait(1.0)
        return False

    def _schedule(self, membership: Membership) -> None:
        every = self._scheduler.add_job
        tick = beating(self._tick, self._supervisor)
        every(tick, "interval", seconds=TICK, id="tick")
        every(self.watching.measure, "interval", seconds=MEASURE, id="measure")
        every(self._usage.look, "interval", seconds=usage_watch.EVERY, id="usage")
        every(self._keys.look, "interval", seconds=LOOK_AT_KEYS, id="keys")
        every(self.own_logins.tick, "interval", seconds=OWN_LOGINS, id="own-logins")
        every(self.revoking.poll, "interval", seconds=revoking.POLL, id="revocations")
        every(self._forget_requests, "interval", seconds=FORGET_REQUESTS, id="requests")
        every(self._files.look, "interval", seconds=filewatch.POLL, id="files")
        every(self._anchoring.start, id="anchor-start")  # once, now
        every(self._anchoring.hourly, "interval", seconds=anchoring.EVERY, id="anchor")
        every(self._anchoring.look, "interval", seconds=anchoring.LOOK, id="audit")
        every(self._renew, "interval", seconds=LEAD_RENEW, id="lead", args=[membership])
        self._scheduler.start()

    def _wind_down(self, server: AdminServer, membership: Membership) -> None:
        """Let running sagas finish, then park them; nothing is lost where one is cut off."""
        self._supervisor.stopping()
        self.readiness.hold(Reason.STOPPING)
        _log.info("daemon.stopping", running=len(self._running))
        self._scheduler.shutdown(wait=False)
        if not self._wait_idle(FINISH):
            self._parked.set()
            self._wait_idle(PARK)
        self.own_logins.finish(PARK / 4)
        server.close()
        if self._notifier is not None:
            self._notifier.stop()
        self._anchoring.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for destination in self.parts.destinations.values():
            destination.close()
        if not self._running:
            membership.leave()
        self.parts.close()
        _log.info("daemon.stopped", parked=len(self._running))

    def _wait_idle(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while self._running and time.monotonic() < until:
            time.sleep(0.02)
        return not self._running

    def _renew(self, membership: Membership) -> None:
        try:
            clock = self.parts.store_clock
            jumped = bool(clock.look()[1])
            membership.renew(ttl=LEAD_TTL, anchor=None if jumped else clock.anchor)
            if self._away:  # it may be another server now, and one that is behind
                self._away = False
                self._pool.submit(self._compare_again)
        except ClaimLost:
            _log.error("daemon.lead-lost", hint="another daemon took over; this one ends")
            self._parked.set()
            self.stop()
        except StoreUnavailable as error:
            self._away = True
            _log.warning("store.unavailable", code=error.code)

    def _compare_again(self) -> None:
        """Look whether a store that was away came back as an older one."""
        recovery = Recovery(parts=self.parts, actor="daemon:failover")
        try:
            quarantined = recovery.at_start()
        except KeyturnError as error:
            self._away = True
            _log.error("store.not-compared", code=error.code, hint=error.hint)
            return
        if quarantined:
            self._let_go(recovery)

    def _let_go(self, recovery: Recovery) -> None:
        """Read the destinations and lift the quarantine; the socket answers meanwhile."""
        self.readiness.hold(Reason.QUARANTINED)
        while not self._stop.is_set() and not recovery.let_go_later():
            self._stop.wait(LEAD_RENEW)
        self.readiness.release(Reason.QUARANTINED)
        self.kick()

    def _forget_requests(self) -> None:
        try:
            self.parts.administration.forget_requests()
        except StoreUnavailable as error:
            _log.warning("store.unavailable", code=error.code)

    def _connect(self) -> None:
        parts = self.parts
        parts.destinations = wiring.connect(
            parts.settings, store_id=parts.store.store_id, clock=parts.clock
        )

    def _reconcile_at_start(self) -> None:
        """Take the files over. Where they are refused, go on with the agents of the store.

        Whoever cut the file too short, or named an agent of the command line in it, must not find
        that nothing rotates and no list of revocations is applied, since the next start may be that
        of the standby at night.
        """
        actor = "daemon:start"
        try:
            done = self.parts.reconcile(actor=actor)
        except Refused as error:
            self.parts.reconcile(actor=actor, leave_agents=True)
            _log.error(
                "config.rejected",
                problem=f"{error}; every agent stays as it was before this start",
                hint=error.hint,
            )
            self.metrics.config_last_reload_successful.set(0)
            self._note_reload(actor, error.code)
            return
        _log.info("config.taken-over", **done)
        self.metrics.config_last_reload_successful.set(1)

    # --- due work ---------------------------------------------------------------------------

    def kick(self) -> None:
        """Look at the due-queue now."""
        if not self._stop.is_set() and self._ready.is_set():
            self._pool.submit(self._tick)

    def _tick(self) -> None:
        """Hand out what is due; a connection that is full leaves its agents in the queue."""
        if self._stop.is_set():
            return
        try:
            now, jump = self.parts.store_clock.look()
            self.watching.clock(jump)
            self._hand_out(now)
            self.watching.looked(now)
        except StoreUnavailable as error:
            self.watching.store_away(error)
        except Exception:  # noqa: BLE001  # loop top: the next tick must still come
            _log.error("scheduler.tick", exc_info=True)

    def _hand_out(self, now: datetime) -> None:
        """Start what there is room for, past whatever waits for a connection without any (I7).

        Each look but the last fills a connection or all the workers, so there are few of them.
        """
        after: Due | None = None
        while len(self._running) < WORKERS_AT_MOST:
            found = self.parts.store.due(now=now, limit=LOOK, full=self._full(), after=after)
            for due in found:
                if self._take(due.credential_uid, due.connections):
                    self._pool.submit(self._work, due.credential_uid, due.connections)
            if len(found) < LOOK:
                return
            after = found[-1]

    def _full(self) -> frozenset[str]:
        with self._guard:
            return frozenset(to for to, busy in self._busy.items() if 0 < self._room(to) <= busy)

    def _take(self, credential_uid: str, connections: tuple[str, ...]) -> bool:
        with self._guard:
            if credential_uid in self._running or len(self._running) >= WORKERS_AT_MOST:
                return False
            if any(self._busy[name] >= self._room(name) for name in connections):
                return False
            self._running.add(credential_uid)
            self._busy.update(connections)
            return True

    def _room(self, connection: str) -> int:
        destination = self.parts.destinations.get(connection)
        return destination.parallel if destination is not None else 1

    def _work(self, credential_uid: str, connections: tuple[str, ...]) -> None:
        try:
            world = self.parts.world(self.watching, self._parked.is_set)
            holder = f"{self.parts.store.writer}/{threading.get_ident()}"
            rotation.run(world, credential_uid, holder=holder)
        except StoreUnavailable as error:
            _log.warning("store.unavailable", code=error.code)
            self._stop.wait(1.0)  # a full disk answers at once: neither its log nor we may spin
        except Exception:  # noqa: BLE001  # loop top: one agent's trouble never stops another's
            _log.error("saga.failed", credential=credential_uid, exc_info=True)
            time.sleep(1.0)  # a bug must not become a busy loop
        finally:
            with self._guard:
                self._running.discard(credential_uid)
                self._busy.subtract(connections)
        if self._busy_with_others():
            self._tick()

    def _busy_with_others(self) -> bool:
        """Whether something may wait for the room that was just given back."""
        return not self._stop.is_set() and len(self._running) < WORKERS_AT_MOST

    def apply_revocations(self) -> None:
        """Apply the spool and the revocations file, for SIGUSR1; a start has done so before it is ready."""
        if self._ready.is_set():
            self.revoking.apply()

    # --- reload -----------------------------------------------------------------------------

    def reload_by_signal(self) -> None:
        """Reload for SIGHUP: errors go to the log, the old settings stay."""
        if not self._ready.is_set():
            return
        try:
            self.reload(allow_mass_change=False, actor="signal")
        except KeyturnError as error:
            for line in str(error).splitlines():
                _log.error("config.rejected", problem=line, hint=error.hint)

    def rehearse(self, *, allow_mass_change: bool, take_over: frozenset[str]) -> dict[str, Any]:
        """Tell what a reload would do now."""
        settings = load(self.parts.settings.path)
        self._same_store(self.parts.settings, settings)
        self._keys.read(settings)
        return rehearsal.rehearse(
            self.parts, settings, allow_mass_change=allow_mass_change, take_over=take_over
        )

    def reload(
        self, *, allow_mass_change: bool, actor: str, take_over: frozenset[str] = frozenset()
    ) -> dict[str, Any]:
        """Check the files and every agent, then swap; on any error all stays as it was."""
        with self._reloading, self._supervisor.reloading():
            before = self.parts.settings
            try:
                settings = load(before.path)
                self._same_store(before, settings)
                # Revoked first: no other line of the file may keep a revocation from working.
                self.revoking.apply_entries(settings.revocations, trigger="reload")
                done = self._take_over(
                    settings, actor, allow_mass_change=allow_mass_change, take_over=take_over
                )
            except KeyturnError as error:
                self.metrics.config_last_reload_successful.set(0)
                self._note_reload(actor, error.code)
                raise
            self.metrics.config_last_reload_successful.set(1)
            self._note_reload(actor, "ok")
            self._keys.look()
            notes = self._regroup(before, settings)
            _log.info("config.taken-over", **done)
            for note in notes:
                _log.warning("config.note", note=note)
            self.kick()
            return {**done, "notes": notes}

    def _regroup(self, before: config.Settings, after: config.Settings) -> list[str]:
        """Open the socket to the groups of the settings; returns what a person has to do yet."""
        roles = roles_of(after)
        notes = missing_groups(roles)
        if self._server is not None:
            notes += self._server.regroup(roles)
        changed = (
            ("admin.socket", before.admin.socket != after.admin.socket),
            ("listen", before.listen != after.listen),
            ("log", before.log != after.log),
        )
        return notes + [
            f"{key}: restart the daemon for this" for key, differs in changed if differs
        ]

    def _take_over(
        self,
        settings: config.Settings,
        actor: str,
        *,
        allow_mass_change: bool,
        take_over: frozenset[str],
    ) -> dict[str, Any]:
        """Put settings in force. What a connection has open stays open where its lines are the same."""
        parts, old = self.parts, self.parts.destinations
        ring = self._keys.read(settings)
        fresh = wiring.connect(
            settings,
            store_id=parts.store.store_id,
            clock=parts.clock,
            before=parts.settings,
            kept=old,
        )
        try:
            with parts.defining:
                done = parts.reconcile(
                    actor=actor,
                    allow_mass_change=allow_mass_change,
                    settings=settings,
                    destinations=fresh,
                    take_over=take_over,
                )
                parts.ring, parts.settings, parts.destinations = ring, settings, fresh
            self.embedded.apply(settings)
            if self._notifier is not None:
                self._notifier.apply(specs_of(settings))
        finally:
            in_force = parts.destinations.values()
            for destination in (*old.values(), *fresh.values()):
                if all(destination is not one for one in in_force):
                    destination.close()
        return done

    def _note_reload(self, actor: str, outcome: str) -> None:
        entry = AuditEntry(action="config.reload", actor=actor, outcome=outcome)
        self.parts.store.append_audit(entry)

    def _same_store(self, before: config.Settings, after: config.Settings) -> None:
        if before.store != after.store:
            raise ConfigError(
                "store: cannot be changed while the daemon runs",
                hint="restart the daemon to use another store",
            )

    def health(self) -> dict[str, Any]:
        """Return whether the daemon lives and is ready, and why not."""
        return self.readiness.describe()

    def own_rows(self) -> list[dict[str, Any]]:
        """Return how each connection logs in, until when, and what is next."""
        return self.own_logins.rows()

    def metrics_text(self) -> str:
        """Return the metrics in the Prometheus text format."""
        self.watching.measure()
        self._usage.look()
        return self.metrics.text()
