"""The daemon looks after its own logins: replaces secret ids, says in time what ends, shows both.

Each connection has a thread of its own while it is looked at: one server that is away delays the
logins at no other (I7), and no rotation of an agent waits for any of this.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import structlog

from keyturn.core.own import Own, OwnPlan, OwnProblem, OwnVersion, due_at
from keyturn.core.walltime import rfc3339
from keyturn.daemon.metrics import Metrics
from keyturn.destinations.base import DestinationBase
from keyturn.errors import DestinationError, StoreUnavailable
from keyturn.own import Held, OwnWorld, run
from keyturn.ports import NOT_KNOWN, OwnLogin
from keyturn.wiring import Parts

LOOK_EVERY = timedelta(hours=1)
LOOK_AGAIN = timedelta(minutes=5)  # after trouble
WARN_BEFORE = timedelta(days=7)
WARN_EVERY = timedelta(days=1)

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Watched:
    """What is known of one connection in this process."""

    destination: DestinationBase
    run_at: datetime | None = None
    look_at: datetime | None = None
    warned_at: datetime | None = None
    login: OwnLogin | None = None
    known: Own | None = None
    busy: bool = False
    held: Held = field(default_factory=Held)


class OwnLogins:
    """Our logins at every connection. Thread-safe; `tick` never waits and raises nothing."""

    def __init__(self, parts: Parts, metrics: Metrics, stopping: Callable[[], bool]) -> None:
        self._parts, self._metrics, self._stopping = parts, metrics, stopping
        self._host = os.uname().nodename
        self._watched: dict[str, _Watched] = {}
        self._guard = threading.Lock()

    def tick(self) -> None:
        """Look at what is due, each connection beside the others."""
        try:
            now = self._parts.store_clock.now()
        except StoreUnavailable:
            return  # the tick of the due-queue says so
        for name, one in self._in_force().items():
            due = [at for at in (one.run_at, one.look_at) if at is not None]
            fresh = one.look_at is None
            if one.busy or self._stopping() or not (fresh or min(due) <= now):
                continue
            one.busy = True
            threading.Thread(
                target=self._work, args=(name, one, now), name=f"own-{name}", daemon=True
            ).start()

    def rows(self) -> list[dict[str, Any]]:
        """Say of every connection how it logs in, until when, and what is next."""
        now = self._parts.store_clock.now()
        return [
            self._described(name, one, now)
            for name, one in sorted(self._in_force().items())
            if one.login is not None or one.known is not None
        ]

    def _described(self, name: str, one: _Watched, now: datetime) -> dict[str, Any]:
        row = _row(name, self._kind(name), one.login, one.known, plan_of(one.destination), now=now)
        left = one.destination.login_ends_in
        return {**row, "session_ends_at": _text(now + left) if left is not None else None}

    def finish(self, seconds: float) -> None:
        """Give runs that are under way a moment to end; each step of theirs is journalled."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(one.busy for one in self._watched.values()):
            time.sleep(0.02)

    def _in_force(self) -> dict[str, _Watched]:
        """Follow the connections: one that was changed by a reload begins anew."""
        with self._parts.defining:
            there = dict(self._parts.destinations)
        with self._guard:
            for name in set(self._watched) - set(there):
                self._forget(name)
            for name, destination in there.items():
                known = self._watched.get(name)
                if known is None or known.destination is not destination:
                    self._forget(name)
                    self._watched[name] = _Watched(destination=destination)
            return dict(self._watched)

    def _kind(self, name: str) -> str:
        connection = self._parts.settings.connections.get(name)
        return connection.type if connection else ""

    def _forget(self, name: str) -> None:
        if self._watched.pop(name, None) is not None:
            self._unset(name)

    def _unset(self, name: str) -> None:
        with suppress(KeyError):  # there is none
            self._metrics.own_credential_expiry.remove(name)

    # --- one connection ---------------------------------------------------------------------

    def _work(self, name: str, one: _Watched, now: datetime) -> None:
        try:
            if one.destination.own_authority is not None:
                self._rotate(name, one, now)
            if one.look_at is None or one.look_at <= now:
                self._look(name, one, now)
            self._tell(name, one, now)
        except StoreUnavailable as error:
            _log.warning("store.unavailable", code=error.code)
            one.run_at = now + LOOK_AGAIN / 10
        except Exception:  # noqa: BLE001  # loop top: the next tick must still come
            _log.error("own-login.failed", connection=name, exc_info=True)
            one.run_at = one.look_at = now + LOOK_AGAIN
        finally:
            one.busy = False

    def _rotate(self, name: str, one: _Watched, now: datetime) -> None:
        authority, plan = one.destination.own_authority, plan_of(one.destination)
        if authority is None or plan is None or (one.run_at is not None and one.run_at > now):
            return
        world = OwnWorld(
            journal=self._parts.store,
            authority=authority,
            plan=plan,
            clock=self._parts.store_clock,
            new_id=lambda: uuid.uuid4().hex,
            store_id=self._parts.store.store_id,
            held=one.held,
            stopping=self._stopping,
        )
        before = one.known or self._parts.store.own(name, self._host)
        again = run(world, name, self._host)
        one.known = self._parts.store.own(name, self._host)
        # Looked at now and then in any case: a person may put another one into the file.
        one.run_at = min(again or now + LOOK_EVERY, now + LOOK_EVERY)
        _say(name, before, one.known)
        if before is None or one.known is None or before.rotated_at != one.known.rotated_at:
            one.look_at = None

    def _look(self, name: str, one: _Watched, now: datetime) -> None:
        try:
            one.login = one.destination.own_login()
            later = one.login is not None and one.login.note.startswith(NOT_KNOWN)
            one.look_at = now + (LOOK_AGAIN if later else LOOK_EVERY)
        except DestinationError as error:
            one.look_at = now + LOOK_AGAIN
            _log.warning("own-login.unknown", connection=name, code=error.code, problem=str(error))

    def _tell(self, name: str, one: _Watched, now: datetime) -> None:
        ends_at = one.login.ends_at if one.login else None
        near = ends_at is not None and ends_at - now <= WARN_BEFORE
        if ends_at is None or (near and cared_for(one.known, plan_of(one.destination), now)):
            self._unset(name)
            return
        self._metrics.own_credential_expiry.labels(name).set(ends_at.timestamp())
        if not near or (one.warned_at and now - one.warned_at < WARN_EVERY):
            return
        one.warned_at = now
        _log.warning(
            "own-login.ends",
            connection=name,
            method=one.login.method if one.login else "",
            ends_at=rfc3339(ends_at.replace(microsecond=0)),
            hint="`keyturn status --own` shows it; put a new one into its file in time",
        )


def _say(name: str, before: Own | None, after: Own | None) -> None:
    """Log what a run has changed."""
    if after is None:
        return
    problem, known = after.problem, before.problem if before else None
    if problem is not None and (known is None or known.detail != problem.detail):
        _log.error("own-login.failing", connection=name, code=problem.code, problem=problem.detail)
    if problem is None and known is not None:
        _log.info("own-login.mended", connection=name)
    if after.rotated_at is not None and (before is None or before.rotated_at != after.rotated_at):
        _log.info("own-login.rotated", connection=name)


def plan_of(destination: DestinationBase) -> OwnPlan | None:
    """Return how a connection's own credential is replaced, None where it is not."""
    rotate = getattr(getattr(destination.options, "auth", None), "rotate", None)
    return None if rotate is None else OwnPlan(every=rotate.every, grace=rotate.grace)


def cared_for(known: Own | None, plan: OwnPlan | None, now: datetime) -> bool:
    """Tell whether we replace it in time, so that its end is nobody's business."""
    if known is None or plan is None or known.problem is not None:
        return False
    due = due_at(known, plan)
    return due is not None and now < due + LOOK_EVERY


# --- what one sees ----------------------------------------------------------------------------


def stored_rows(owns: Iterable[Own], *, now: datetime) -> list[dict[str, Any]]:
    """Return what the store alone can say, while the daemon is down."""
    return [_row(one.connection, "", None, one, None, now=now) for one in owns]


def _row(
    name: str,
    kind: str,
    login: OwnLogin | None,
    known: Own | None,
    plan: OwnPlan | None,
    *,
    now: datetime,
) -> dict[str, Any]:
    current = known.current if known else None
    ends_at = login.ends_at if login else current.ends_at if current else None
    due = due_at(known, plan) if known and plan else None
    problem = known.problem if known else None
    soon = ends_at is not None and ends_at - now <= WARN_BEFORE
    return {
        "connection": name,
        "type": kind or None,
        "host": known.host if known else None,
        "method": login.method if login else "approle" if known else None,
        "expires_at": _text(ends_at),
        "note": login.note if login else "",
        "ends_soon": soon and not cared_for(known, plan, now),
        "rotated_by_keyturn": plan is not None or known is not None,
        "last_rotation_at": _text(known.rotated_at) if known else None,
        "next_rotation_at": _text(due),
        "versions": [_version(one) for one in known.versions] if known else [],
        "error": _problem(problem) if problem else None,
    }


def _version(one: OwnVersion) -> dict[str, Any]:
    return {
        "version": one.id,
        "state": str(one.state),
        "accessor": one.accessor or None,
        "made_at": _text(one.at),
        "expires_at": _text(one.ends_at),
        "destroyed_at": _text(one.deadline),
    }


def _problem(problem: OwnProblem) -> dict[str, Any]:
    return {
        "code": problem.code,
        "detail": problem.detail,
        "since": _text(problem.since),
        "tries": problem.tries,
        "next_try_at": _text(problem.until),
    }


def _text(at: datetime | None) -> str | None:
    return None if at is None else rfc3339(at.replace(microsecond=0))
