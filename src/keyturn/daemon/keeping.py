"""`keyturn store …` where it is done without the daemon: upgrade, backup, restore.

Each works as the store's owner, whoever types it; files of the caller's are opened before that.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from keyturn import config, wiring
from keyturn.config import Settings
from keyturn.core.walltime import rfc3339
from keyturn.daemon import keys, logs, offline
from keyturn.daemon.cron import Crontab
from keyturn.daemon.recovery import Recovery
from keyturn.daemon.service import load
from keyturn.errors import ConfigError, KeyturnError, Refused, StorageError
from keyturn.leaks import Caller
from keyturn.storage import copying, migrations, reading, restoring, roles, standing
from keyturn.storage.copying import Facts
from keyturn.storage.engine import Database, is_sqlite, open_database, sqlite_path
from keyturn.storage.ledger import SealedLedger
from keyturn.storage.membership import FileLock, Membership, lock_of
from keyturn.storage.merge import merge
from keyturn.storage.store import Store
from keyturn.wiring import Parts, SystemClock

LEAD = timedelta(minutes=10)
LEASE_OVER = 20.0  # seconds: a little more than the lease of a daemon on PostgreSQL
_RUNS = "stop it first, and every standby: `systemctl stop keyturn`"
Ask = Callable[[dict[str, Any]], bool]


# --- look and upgrade ---------------------------------------------------------------------


def status(path: Path) -> dict[str, Any]:
    """Return what the store is, also where this release cannot work on it."""
    settings = _settings(path)
    offline.become_owner(settings.store.folder)
    with _database(settings) as database:
        return standing.standing(database, settings.store.url, settings.store.folder)


def upgrade(path: Path, *, contract: bool, dry_run: bool) -> dict[str, Any]:
    """Bring the schema up to this release; with `contract` give up what older ones need.

    Raises Refused where a daemon of an older release lives.
    """
    settings = _settings(path)
    offline.become_owner(settings.store.folder)
    with _database(settings) as database:

        def body(connection: Any) -> dict[str, Any]:
            found = _upgrade(connection, contract=contract, dry_run=dry_run)
            if not dry_run and not database.is_sqlite:
                roles.apply(connection, settings.store.read_by)
            return found

        return database.write(body)


def _upgrade(connection: Any, *, contract: bool, dry_run: bool) -> dict[str, Any]:
    found = migrations.revision(connection)
    if found is None:
        left = migrations.pending(None)
    else:
        left = migrations.pending(found)
        _refuse_older(connection, left if contract else [])
    if not contract and found is not None:
        first = next((n for n, step in enumerate(left) if step.contracts_to), len(left))
        left = left[:first]
    done = left if dry_run else migrations.upgrade(connection, contract=contract)
    after = done[-1].revision if done else found
    return {
        "before": found,
        "after": after,
        "dry_run": dry_run,
        "steps": [
            {"schema": one.revision, "kind": "contract" if one.contracts_to else "expand"}
            for one in done
        ],
        "left": [
            {"schema": one.revision, "kind": "contract" if one.contracts_to else "expand"}
            for one in migrations.pending(after)
        ],
    }


def _refuse_older(connection: Any, steps: list[migrations.Step]) -> None:
    """Refuse to take away what a living daemon still needs."""
    oldest = max((step.contracts_to for step in steps if step.contracts_to), default=None)
    if oldest is None:
        return
    old = [one for one in standing.live_daemons(connection) if one["schema"] < oldest]
    if old:
        names = ", ".join(one["writer"] for one in old)
        raise Refused(
            f"a daemon of an older release works on this store: {names} (schema {old[0]['schema']})",
            hint="replace it by this release and repeat this; one that was killed is forgotten after"
            " 15 seconds",
        )


# --- backup -------------------------------------------------------------------------------


def backup(path: Path, place: Path) -> dict[str, Any]:
    """Copy the store into a new file, also while the daemon runs. Raises Refused, StorageError."""
    settings = _settings(path)
    if not is_sqlite(settings.store.url):
        raise Refused(
            "a PostgreSQL store is copied by its own tools",
            hint="pg_dump -Fc -f FILE DATABASE; after pg_restore: `keyturn store restore --adopt`",
        )
    place = place.absolute()
    if place.exists():
        raise Refused(f"{place} is there already", hint="name another file")
    keys.refuse_beside_keys(settings, place)
    folder, live = settings.store.folder, sqlite_path(settings.store.url)
    draft = live.with_name(f".backup.{os.getpid()}")
    with _owner_of(folder) as as_caller:
        try:
            copying.snapshot(live, draft)
            found = copying.facts(draft)
            with as_caller():
                copying.publish(draft, place)
        finally:
            draft.unlink(missing_ok=True)
        note = _note(found, place)
        standing.note_backup(folder, note)
    return note


def _note(found: Facts, place: Path) -> dict[str, Any]:
    at = rfc3339(SystemClock().now())
    told = {"file": str(place), "at": at} | asdict(found)
    return told | {"created_at": rfc3339(found.created_at)}


@contextmanager
def _owner_of(folder: Path) -> Iterator[Callable[[], Any]]:
    """Work as the owner of a folder; what is given works as the caller again for a while.

    Root's own file is written by root, and nothing of root's is left beside the store.
    """
    me, owner = os.geteuid(), folder.stat()
    if me != 0 or owner.st_uid == 0:
        offline.become_owner(folder)

        @contextmanager
        def unchanged() -> Iterator[None]:
            yield

        yield unchanged
        return

    def become(uid: int, gid: int) -> None:
        if os.geteuid() != 0:
            os.seteuid(0)
        os.setegid(gid)
        os.seteuid(uid)

    @contextmanager
    def as_caller() -> Iterator[None]:
        become(0, 0)
        try:
            yield
        finally:
            become(owner.st_uid, owner.st_gid)

    become(owner.st_uid, owner.st_gid)
    try:
        yield as_caller
    finally:
        become(0, 0)


# --- restore ------------------------------------------------------------------------------


def restore(path: Path, file: Path | None, *, dry_run: bool, ask: Ask) -> dict[str, Any]:
    """Put a backup into the live store, merge what happened since, show it, and let go.

    Without a file the store is one that was restored already: by pg_restore, by hand, by a failover.
    `ask` is shown the differences before anything is let go. Raises Refused where a daemon runs, and
    ClaimLost where one took the lead while somebody thought about the answer.
    """
    settings = _whole_settings(path)
    logs.configure(level="critical", form=settings.log.format)  # what it does is shown, not logged
    copy = _taken(settings, file) if file is not None else None
    offline.become_owner(settings.store.folder)
    if dry_run:
        return _rehearse(settings, copy)
    sqlite = is_sqlite(settings.store.url)
    lock = lock_of(sqlite_path(settings.store.url)) if sqlite else None
    try:
        if lock is not None and not lock.take():
            raise Refused("the daemon runs on this store", hint=_RUNS)
        if copy is not None:
            _put_in(settings, copy)
        return _recover(settings, lock, adopt=copy is None, ask=ask)
    finally:
        _clear(copy)
        if lock is not None:
            lock.drop()


def _taken(settings: Settings, file: Path) -> Path:
    """Bring a backup beside the store, readable by its owner, and check it."""
    if not is_sqlite(settings.store.url):
        raise Refused(
            "a PostgreSQL store is restored by its own tools",
            hint="pg_restore, and then `keyturn store restore --adopt`",
        )
    folder = sqlite_path(settings.store.url).parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for left in folder.glob(".restore.*"):
        left.unlink()  # of a restore that was killed; it would be found a second time
    copy = folder / f".restore.{os.getpid()}"
    try:
        content = file.open("rb")
    except OSError as error:
        raise Refused(f"{file} cannot be read ({os.strerror(error.errno or 0)})") from None
    owner = folder.stat()
    handle = os.open(copy, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    with content, os.fdopen(handle, "wb") as target:
        while block := content.read(1 << 20):
            target.write(block)
        if os.geteuid() == 0:
            os.fchown(target.fileno(), owner.st_uid, owner.st_gid)
    try:
        copying.facts(copy)
    except KeyturnError:
        copy.unlink()
        raise
    return copy


def _clear(copy: Path | None) -> None:
    """Leave nothing of a copy beside the store."""
    if copy is not None:
        copy.unlink(missing_ok=True)
        for more in ("-journal", "-before"):
            copy.with_name(copy.name + more).unlink(missing_ok=True)


def _put_in(settings: Settings, copy: Path) -> None:
    """Quarantine the copy, and make the live store what it is."""
    live = sqlite_path(settings.store.url)
    there = _facts_of(live)
    found = copying.facts(copy, thorough=False)
    if there is not None and there.store_id != found.store_id:
        raise Refused(
            "the backup is of another store than the one that is there",
            hint=f"if that is meant: move {live} away first",
        )
    life = _begin_life(settings, copy, there)
    if there is not None:
        # What was there is kept: an older one may be wanted after all.
        with suppress(StorageError):
            draft = copy.with_name(copy.name + "-before")  # a killed restore leaves it half made
            copying.snapshot(live, draft)
            draft.replace(live.with_name(f"{live.name}.before-{life}"))
    copying.put_into(copy, live)


def _begin_life(settings: Settings, copy: Path, there: Facts | None) -> int:
    ledger = SealedLedger(settings.store.folder / "ledger")
    last = reading.incarnation(reading.read(ledger, whole=False).values())
    last = max(last, there.incarnation if there else 0)
    database = open_database(f"sqlite:///{copy}", clock=SystemClock(), create=False)
    try:

        def body(connection: Any) -> int:
            migrations.migrate(connection, create=False)
            now = SystemClock().now()
            return restoring.begin_life(connection, restoring.RESTORED, last=last, now=now)

        return database.write(body)
    finally:
        database.close()


def _facts_of(live: Path) -> Facts | None:
    try:
        return copying.facts(live, thorough=False)
    except KeyturnError:
        return None  # gone or damaged: that is why somebody restores


def _recover(settings: Settings, lock: FileLock | None, *, adopt: bool, ask: Ask) -> dict[str, Any]:
    parts = wiring.build(settings, cron=Crontab(), create=False)
    membership = _lead(parts, lock)
    try:
        _connect(parts)
        recovery = Recovery(parts=parts, actor="restore")
        if adopt:
            restoring.put_in_quarantine(parts.store, restoring.RESTORED, actor="restore")
        recovery.merge()
        shown = recovery.survey()
        undecided = [one.agent for one in recovery.differences if one.what == "undecided"]
        report = recovery.report(shown, undecided)
        report["keys"] = keys.lacking_after_restore(parts)
        answer = ask(report)
        membership.renew(ttl=LEAD)  # a daemon that took the lead meanwhile lets go by itself
        if not answer:
            restoring.hold(parts.store)
            return report | {"released": False, "dry_run": False}
        recovery.finish(shown)
        return report | {"released": True, "dry_run": False}
    finally:
        membership.leave()
        parts.close()


def _lead(parts: Parts, lock: FileLock | None) -> Membership:
    """Take the lead; a dump holds the lease of whoever led when it was made. Raises Refused."""
    membership = Membership(parts.store, lock=lock)
    patience = 0.0 if parts.store.database.is_sqlite else LEASE_OVER
    until = time.monotonic() + patience
    while not membership.try_lead(ttl=LEAD):
        if time.monotonic() >= until:
            parts.close()
            raise Refused("the daemon runs on this store", hint=_RUNS)
        time.sleep(0.2)
    return membership


def _rehearse(settings: Settings, copy: Path | None) -> dict[str, Any]:
    """Do it all on a copy of the copy, and write nothing that lasts."""
    if copy is None and not is_sqlite(settings.store.url):
        raise Refused(
            "a PostgreSQL store is not rehearsed", hint="restore into a database beside it"
        )
    live = sqlite_path(settings.store.url)
    if copy is None:
        copy = live.with_name(f".restore.{os.getpid()}")
        copying.snapshot(live, copy)
    try:
        _begin_life(settings, copy, _facts_of(live))
        parts = wiring.build(settings, cron=Crontab(), create=False)
        parts.open_store = lambda: _rehearsed(settings, copy)
        try:
            _connect(parts)
            recovery = Recovery(parts=parts, actor="restore")
            recovery.differences = merge(
                parts.store,
                schedule=parts.schedule,
                identify=lambda _target: None,
                actor="restore",
            )
            shown = recovery.survey()
            undecided = [one.agent for one in recovery.differences if one.what == "undecided"]
            report = recovery.report(shown, undecided)
            report["keys"] = keys.lacking_after_restore(parts)
            return report | {"released": False, "dry_run": True}
        finally:
            parts.close()
    finally:
        _clear(copy)


def _rehearsed(settings: Settings, copy: Path) -> Store:
    store = Store.open(
        f"sqlite:///{copy}",
        state_dir=settings.store.folder,
        clock=SystemClock(),
        random_bytes=os.urandom,
        writer="rehearsal",
        create=False,
    )
    store.ledger = SealedLedger(settings.store.folder / "ledger")
    return store


def release(path: Path, names: list[str], *, reissue: bool, actor: str) -> dict[str, Any]:
    """Let agents go while no daemon runs."""
    caller = Caller(name=actor, trigger="command")
    settings = _whole_settings(path)
    logs.configure(level="critical", form=settings.log.format)
    offline.become_owner(settings.store.folder)
    parts = wiring.build(settings, cron=Crontab(), create=False)
    membership = _lead(parts, None)
    try:
        _connect(parts)
        recovery = Recovery(parts=parts, actor=caller.name)
        return recovery.release(names, caller, reissue=reissue)
    finally:
        membership.leave()
        parts.close()


# --- shared -------------------------------------------------------------------------------


def _connect(parts: Parts) -> None:
    parts.destinations = wiring.connect(
        parts.settings, store_id=parts.store.store_id, clock=parts.clock
    )


def _settings(path: Path) -> Settings:
    return config.load_store(path, environ=os.environ)


def _whole_settings(path: Path) -> Settings:
    """Load everything; with a broken file only the store: no destination is looked at then."""
    try:
        return load(path)
    except ConfigError:
        return _settings(path)


@contextmanager
def _database(settings: Settings) -> Iterator[Database]:
    database = open_database(
        settings.store.url,
        clock=SystemClock(),
        password=wiring.password_of(settings),
        create=False,
    )
    try:
        yield database
    finally:
        database.close()
