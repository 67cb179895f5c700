"""What `keyturn check` looks at: the files, offline; with `--probe` the destinations as well."""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, make_url

from keyturn import advice, wiring
from keyturn.config import AgentDefinition, Settings
from keyturn.config.file import read_trusted
from keyturn.config.models import HookSection
from keyturn.core.model import Agent, Case, Credential, Target
from keyturn.core.revocations import parse_revocations
from keyturn.daemon import keys, own_checks
from keyturn.daemon.certificates import Certificates
from keyturn.daemon.checking import become_daemon, settings_of
from keyturn.daemon.embedded import Wanted
from keyturn.daemon.notifying import spec_of
from keyturn.daemon.service import load, missing_groups, roles_of
from keyturn.daemon.verifier_service import look_at
from keyturn.destinations import registry
from keyturn.destinations.base import DestinationBase
from keyturn.errors import (
    ConfigError,
    KeyturnError,
    Refused,
    Rejected,
    StorageError,
    StoreUnavailable,
)
from keyturn.notify import events, in_words
from keyturn.notify.hook import send
from keyturn.ports import Observed
from keyturn.sight import look
from keyturn.storage import hashes, queries, roles
from keyturn.storage.engine import is_sqlite, open_database, refuse_open, sqlite_path
from keyturn.storage.hashes import InUse
from keyturn.storage.migrations import HEAD, revision
from keyturn.storage.tables import meta
from keyturn.verifier.authority import BuiltinAuthority

Check = dict[str, Any]
_UNSEEN = "not looked at"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """One entry that an agent of the files reads, and what becomes of old copies there."""

    agent: AgentDefinition
    target: Target
    retire: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What the store says: its id, "" where there is none yet, and what it has of each agent."""

    store_id: str = ""
    cases: Mapping[str, Case] = field(default_factory=dict)
    used: tuple[InUse, ...] = ()


def check(path: Path, *, probe: bool = False, in_checkout: bool = False) -> dict[str, Any]:
    """Return one row per check. Raises ConfigError where the files cannot be used at all.

    `in_checkout`: nothing of this host is looked at, and it does not matter who may write the files.
    """
    user = "" if in_checkout else become_daemon(path)
    by = f"; looked at as the user {user}" if user else ""
    try:
        settings = settings_of(path, in_checkout=in_checkout)
    except ConfigError as error:
        error.hint += by
        raise
    rows = [_good("configuration", _summary(settings) + by)]
    if in_checkout:
        return {"ok": True, "checks": rows + [_good("note", note) for note in settings.notes]}
    if not probe:
        rows.append(_tried("store", lambda: f"{_store(settings)}; not opened"))
    rows += _revocations_file(settings)
    notes = [*settings.notes, *_missing(settings), *missing_groups(roles_of(settings))]
    if settings.generation.is_mounted and not settings.reload.on_change:
        notes.append("changes of this volume are taken over with `reload: {on_change: true}` only")
    rows += [_good("note", note) for note in notes]
    rows += [_file_of_ours(*one) for one in own_checks.problems(settings)]
    if not probe:
        rows += keys.checked(settings, None)
    if probe:
        row, known = _looked_at_store(settings)
        rows.append(row)
        rows += keys.checked(settings, known.used if known else None)
        rows += _listener(settings) + _verifier(settings)
        destinations = wiring.connect(settings, store_id="", clock=wiring.SystemClock())
        for name, destination in destinations.items():
            rows += _probed(name, destination, _wanted(settings, name), known)
            destination.close()
        rows += [_pinged(hook) for hook in settings.notify]
    return {"ok": all(row["ok"] for row in rows), "checks": rows}


def least_policy(path: Path, kind: str, connection: str = "") -> dict[str, Any]:
    """Return the least rights that a configuration needs at one connection of a type, and notes.

    Raises ConfigError, and Refused where it is not clear which connection is meant.
    """
    if kind == "postgresql":
        return _policy_of_store(load(path))
    adapter = registry.load(kind)
    settings = load(path)
    names = [name for name, one in settings.connections.items() if one.type == kind]
    wanted = [name for name in names if connection in ("", name)]
    if len(wanted) != 1:
        listed = ", ".join(names) or "none"
        problem = f"there is no connection {connection}" if connection and names else ""
        raise Refused(
            problem or f"there are {len(names)} connections of type {kind}",
            hint=f"name one with --connection: {listed}" if names else "add one to the file",
        )
    options = settings.connections[wanted[0]].options
    entries = [(one.target, one.retire) for one in _wanted(settings, wanted[0])]
    note = f"connection {wanted[0]}, {len(entries)} entries of the agents in these files; what was"
    note += " added by a command needs its own rules beside them"
    return {"text": adapter.least_policy(options, entries), "notes": [note]}


def _policy_of_store(settings: Settings) -> dict[str, Any]:
    """Return the roles of the store's database. Raises Refused where the store is another one."""
    url = settings.store.url
    if is_sqlite(url):
        raise Refused("the store is an SQLite file", hint="set store.url to postgresql://…")
    notes = [f"run this in the database {make_url(url).database} as its administrator"]
    if make_url(url).username != roles.DAEMON:
        notes.append(f"store.url does not log in as {roles.DAEMON} yet")
    return {"text": roles.policy(url, settings.store.read_by), "notes": notes}


def _wanted(settings: Settings, connection: str) -> list[_Wanted]:
    """Return what the files' agents read at a connection."""
    return [
        _Wanted(agent=agent, target=target, retire=settings.policies[agent.policy].retire)
        for agent in settings.agents.values()
        for target in agent.targets
        if target.to == connection
    ]


def _listener(settings: Settings) -> list[Check]:
    """See whether certificate and key of the listener can be used, as the daemon's user."""
    tls, address = settings.listen.tls, settings.listen.address
    if tls is None:
        return []

    def attempt() -> str:
        Certificates(tls)
        return f"{address}: certificate and key can be used"

    return [_tried("listen", attempt)]


def _verifier(settings: Settings) -> list[Check]:
    """See whether the verifier that we start can: a reload that it cannot follow is only in the log."""
    wanted = Wanted.of(settings)
    return [_tried("verifier", lambda: look_at(wanted.section))] if wanted.here else []


def _summary(settings: Settings) -> str:
    return (
        f"{len(settings.agents)} agents, {len(settings.connections)} connections,"
        f" {len(settings.policies)} policies"
    )


def _missing(settings: Settings) -> Iterator[str]:
    """Name the ca_files that are not on this host; a pull request's host need not have them."""
    for name, connection in settings.connections.items():
        path = getattr(connection.options, "ca_file", None)
        if path is not None and not os.access(path, os.R_OK):
            yield f"connection {name}: ca_file {path} is not there, or not readable, on this host"


# --- the store --------------------------------------------------------------------------------


def _store(settings: Settings) -> str:
    """Describe the store; a folder that is not there yet is made by `keyturn run`."""
    with suppress(FileNotFoundError, PermissionError):  # not ours to look at: a pull request's host
        refuse_open(settings.store.folder, 0o700)
    if not settings.store.url.startswith("sqlite:"):
        return "PostgreSQL"
    return f"SQLite {sqlite3.sqlite_version}, journal mode PERSIST, synchronous FULL"


def _revocations_file(settings: Settings) -> list[Check]:
    """Say which lines would not be applied, or that none would; one that is not there is fine."""
    path, name = settings.revocations_file, "revocations file"
    if path is None:
        return []
    try:
        lines, problems = parse_revocations(read_trusted(path), now=wiring.SystemClock().now())
    except (FileNotFoundError, PermissionError):
        return []  # not there, or not ours to look at
    except OSError as error:
        detail = f"{path} cannot be read (errno {error.errno})"
        return [{"name": name, "ok": False, "detail": detail, "hint": "expected a file"}]
    except ConfigError as error:
        return [{"name": name, "ok": False, "detail": str(error), "hint": error.hint}]
    hint = "`keyturn check` shows them all; the others are applied"
    bad = [
        {"name": name, "ok": False, "detail": f"line {one.line}: {one.text}", "hint": hint}
        for one in problems
    ]
    return bad or [_good(name, f"{len(lines)} lines")]


def _looked_at_store(settings: Settings) -> tuple[Check, _Known | None]:
    """Open the store, write nothing, and return what it knows; None where that cannot be told."""
    known: list[_Known] = []

    def attempt() -> str:
        found = _read_store(settings)
        if found is None:
            return f"{_store(settings)}; its tables are brought up to date by `keyturn run`"
        known.append(found)
        if not found.store_id:
            return f"{_store(settings)}; not there yet: `keyturn run` makes it"
        return f"{_store(settings)}; opened, {len(found.cases)} agents"

    return _tried("store", attempt), known[0] if known else None


def _read_store(settings: Settings) -> _Known | None:
    """Return what the store knows, None where its tables are of another release.

    Raises StorageError and ConfigError, with what is wrong with it.
    """
    sqlite = is_sqlite(settings.store.url)
    if sqlite and not _lies_there(sqlite_path(settings.store.url)):
        return _Known()
    database = open_database(
        settings.store.url,
        clock=wiring.SystemClock(),
        password=wiring.password_of(settings),
        create=False,
    )

    def body(connection: Connection) -> _Known | None:
        found = revision(connection)
        if found is None and not sqlite:
            return _Known()
        if found != HEAD:
            return None
        store_id = connection.execute(sa.select(meta.c.store_id)).scalar() or ""
        names = [agent.name for agent in queries.agents(connection, removed=False)]
        cases = {name: queries.case_of(connection, name, "default") for name in names}
        used = tuple(hashes.of_rows(connection.execute(sa.text(hashes.SELECT)).all()))
        return _Known(store_id=store_id, cases=cases, used=used)

    try:
        return database.read(body)
    except StoreUnavailable as error:
        url = make_url(settings.store.url)
        where = f" at {url.host}:{url.port or 5432}" if url.host else ""
        raise StoreUnavailable(f"{error}{where}", hint=error.hint) from error
    finally:
        database.close()


def _lies_there(path: Path) -> bool:
    """Tell whether there is a store's file. Raises StorageError where it could not be written."""
    try:
        there = path.exists()
    except PermissionError:
        raise StorageError(f"{path.parent} is not yours", hint="run as root or its owner") from None
    if there and not all(os.access(one, os.W_OK) for one in (path, path.parent)):
        raise StorageError(
            f"{path} cannot be written", hint="run as its owner; is the file system read-only?"
        )
    return there


# --- destinations -----------------------------------------------------------------------------


def _probed(
    name: str, destination: DestinationBase, entries: list[_Wanted], known: _Known | None
) -> list[Check]:
    """Look at a connection and then, where it can be reached, at each entry; one row per problem."""
    rows = [_tried(f"connection {name}", destination.probe)]
    if rows[0]["ok"]:
        login = _tried(f"login {name}", lambda: own_checks.looked_at(destination))
        rows += [login] if login["detail"] else []
    if not entries or not rows[0]["ok"]:
        return rows

    def judged(entry: _Wanted) -> Check:
        def attempt() -> str:
            found = destination.probe_entry(entry.target, retire=entry.retire)
            if found is not None:
                _refuse_blocked(entry, found, known)
            return "" if found is not None else _UNSEEN

        return _tried(f"entry {entry.target.key}", attempt)

    with ThreadPoolExecutor(destination.parallel) as pool:
        seen = list(pool.map(judged, entries))
    good = [row for row in seen if row["ok"]]
    number = f"{len(good)} of {len(entries)}"
    if any(row["detail"] == _UNSEEN for row in good):
        text = "not looked at: that would use the wrapped secret id up"
    elif known is not None:
        text = f"{number} can be rotated, as far as it shows without a write"
    else:
        text = f"rights on {number} are enough; whose they are shows only with the store"
    return [*rows, _good(f"entries {name}", text), *(row for row in seen if not row["ok"])]


def _file_of_ours(name: str, error: ConfigError | None) -> Check:
    if error is None:
        return _good(name, "its secret id can be replaced where it lies")
    return {"name": name, "ok": False, "detail": str(error), "hint": error.hint}


def _refuse_blocked(entry: _Wanted, found: Observed, known: _Known | None) -> None:
    """Refuse what a rotation would stall at, by the rule that it goes by. Raises Rejected."""
    if known is None and found.owner is not None:
        return  # ours or not: only the store can tell
    store = known or _Known()
    case = store.cases.get(entry.agent.name) or _new_case(entry.agent)
    sight = look(case, entry.target, found, authority=BuiltinAuthority(), store_id=store.store_id)
    if sight.blocked:
        said = advice.TABLE[sight.blocked]
        raise Rejected(f"{sight.blocked}: {said.meaning}", hint=said.mend)


def _new_case(agent: AgentDefinition) -> Case:
    """Return what the store would have of an agent that it does not know yet."""
    return Case(
        agent=Agent(uid="", name=agent.name, login=agent.login, targets=agent.targets),
        credential=Credential(uid="", agent_uid=""),
        versions=(),
    )


def _pinged(hook: HookSection) -> Check:
    """Send a ping to a receiver of webhooks."""
    spec, name = spec_of(hook), f"webhook {hook.label}"
    now, nonce = wiring.SystemClock().now(), secrets.token_hex(16)
    message = events.ping(store_id="", at=now, nonce=nonce)
    found = in_words(spec, message.id, send(spec, message))
    detail = f"{found['answer']} in {found['seconds']} s"
    hint = "see `notify:` in the configuration, and the receiver's own log"
    return {"name": name, "ok": found["ok"], "detail": detail, "hint": hint}


def _tried(name: str, attempt: Callable[[], str]) -> Check:
    try:
        return _good(name, attempt())
    except KeyturnError as error:
        return {"name": name, "ok": False, "detail": str(error), "hint": error.hint}


def _good(name: str, detail: str) -> Check:
    return {"name": name, "ok": True, "detail": detail, "hint": ""}
