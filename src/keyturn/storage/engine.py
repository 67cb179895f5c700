"""Connections, transactions and the translation of database errors; nothing about rotations.

SQLite: rollback journal on every library version, because WAL can lose commits with two writers
before 3.51.3 (sqlite.org/wal.html, "the WAL-reset bug") and one mode everywhere is one thing to
test. Every write begins IMMEDIATE: an upgrade from a read fails at once, whatever the busy timeout.
PostgreSQL: no session state that a statement needs, so PgBouncer in transaction mode is fine.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.engine import URL, Connection, Engine, make_url

from keyturn.errors import (
    ConfigError,
    IllegalTransition,
    StorageError,
    StoreFull,
    StoreUnavailable,
)
from keyturn.ports import Clock
from keyturn.storage.codec import micros
from keyturn.storage.group import Group
from keyturn.storage.postgresql import (
    IDLE_MS,
    LOCK_MS,
    STATEMENT_MS,
    Password,
    asked,
    no_password,
    postgresql_arguments,
    refusal,
)
from keyturn.storage.tables import SQLITE_NOW

T = TypeVar("T")

BUSY = 5.0  # seconds a write waits for another one
TRIES = 6  # of a transaction that PostgreSQL asks to repeat
PREPARE_AFTER = 3  # uses of a statement in one session of PostgreSQL
READ = {"keyturn_read": True}
_NO_TEXT = "the store takes no text with characters that do not exist"
SERIALIZATION = frozenset({"40001", "40P01"})
# Local to the transaction: a session setting would end up with another client of the pooler. One
# message with the BEGIN, since every transaction pays for it.
_TIMEOUTS = (
    f"SET LOCAL statement_timeout = {STATEMENT_MS}; SET LOCAL lock_timeout = {LOCK_MS};"
    f" SET LOCAL idle_in_transaction_session_timeout = {IDLE_MS}"
)
BEGIN_WRITE = f"BEGIN; {_TIMEOUTS}"
BEGIN_READ = f"BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; {_TIMEOUTS}"


class Database:
    """One engine with two verbs: `read` a consistent snapshot, `write` all or nothing.

    Both raise StoreUnavailable where the store is locked, full or unreachable, and StorageError
    where it is damaged; a broken constraint is an IllegalTransition, a bug of ours. Messages name
    neither SQL nor values.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.is_sqlite = engine.dialect.name == "sqlite"
        # Threads of one process queue here: SQLite's own waiting is a poll and not fair.
        self._group = Group(engine, patience=BUSY) if self.is_sqlite else None
        self._reading = engine.execution_options(**READ)

    def read(self, body: Callable[[Connection], T]) -> T:
        """Run reads that see one moment of the store."""
        return self._repeat(self._reading, body)

    def write(self, body: Callable[[Connection], T]) -> T:
        """Run one transaction; `body` may run again where the database asks for it."""
        if self._group is None:
            return self._repeat(self.engine, body)
        try:
            return self._group.write(body)
        except exc.SQLAlchemyError as error:
            _translate(error)
        except UnicodeEncodeError:
            raise StorageError(_NO_TEXT) from None

    def close(self) -> None:
        """Give back every connection."""
        self.engine.dispose()

    def _repeat(self, engine: Engine, body: Callable[[Connection], T]) -> T:
        for left in reversed(range(TRIES)):
            committing = False
            try:
                with engine.connect() as connection, connection.begin():
                    result = body(connection)
                    committing = True
            except exc.SQLAlchemyError as error:
                if not (left and _may_repeat(error, committing=committing)):
                    _translate(error)
                time.sleep(0.01 * (TRIES - left))
            except UnicodeEncodeError:
                raise StorageError(_NO_TEXT) from None
            else:
                return result
        raise AssertionError("unreachable")


def open_database(
    url: str, *, clock: Clock, password: Password = no_password, create: bool = True
) -> Database:
    """Return the database behind a URL, with its file made private where it is a file.

    `clock` is the store's time where the database has no clock of its own that counts (SQLite).

    Raises ConfigError for a URL of another kind, StorageError for a file that is not there or that
    others may reach.
    """
    try:
        parsed = make_url(url)
    except exc.ArgumentError:
        raise ConfigError("the store's url is not a URL", hint=_URL_HINT) from None
    match parsed.get_backend_name():
        case "sqlite":
            return Database(_sqlite(parsed, clock, create=create))
        case "postgresql":
            return Database(_postgresql(parsed, password))
    raise ConfigError("the store's url names an unknown database", hint=_URL_HINT)


_URL_HINT = "use sqlite:////absolute/path/keyturn.db or postgresql://user@host/database"


def is_sqlite(url: str) -> bool:
    """Tell whether a URL names an SQLite file."""
    return url.startswith("sqlite:")


def sqlite_path(url: str) -> Path:
    """Return the file of an SQLite URL. Raises ConfigError where there is none."""
    database = make_url(url).database
    if not database or database == ":memory:":
        raise ConfigError("the store must be a file", hint=_URL_HINT)
    return Path(database)


# --- SQLite -------------------------------------------------------------------------------


def _sqlite(url: URL, clock: Clock, *, create: bool) -> Engine:
    path = sqlite_path(url.render_as_string())
    private_file(path, create=create)
    engine = sa.create_engine(
        f"sqlite:///{path}",
        hide_parameters=True,
        pool_size=4,
        max_overflow=28,
        pool_timeout=BUSY,
        connect_args={"timeout": BUSY, "isolation_level": None, "check_same_thread": False},
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "connect", _give_clock(clock))
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def private_file(path: Path, *, create: bool) -> None:
    """Make sure that a store's file is ours alone (0600 in a 0700 folder), or refuse it.

    Raises StoreUnavailable, since a chmod makes it usable again: a revoke is incomplete until then,
    and not failed. Raises StorageError where there is none.
    """
    if create:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Made by us, with its mode, before SQLite can make it with the umask's.
        with _quietly():
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
    for place, allowed in ((path.parent, 0o700), (path, 0o600)):
        try:
            found = place.stat()
            refuse_open(place, allowed)
        except StorageError as error:
            raise StoreUnavailable(str(error), hint=error.hint) from None
        except OSError:
            raise StorageError(
                f"there is no store at {path}",
                hint="check store.url; the first `keyturn run` makes it, and one that was lost comes"
                " back by `keyturn store restore BACKUP`",
            ) from None
        if found.st_uid != os.geteuid():
            raise StoreUnavailable(f"{place} belongs to another user", hint="run as its owner")


def refuse_open(place: Path, allowed: int) -> None:
    """Refuse a file or folder that gives others more than `allowed`. Raises StorageError, OSError."""
    if stat.S_IMODE(place.stat().st_mode) & ~allowed & 0o077:
        raise StorageError(f"{place} is open to other users", hint=f"chmod {allowed:o} {place}")


@contextmanager
def _quietly() -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        return
    except OSError as error:
        raise StoreUnavailable(f"the store's file cannot be created ({error.errno})") from None


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.execute("PRAGMA trusted_schema=OFF")
    # PERSIST with FULL syncs the journal's end, so a returned commit survives a power cut;
    # DELETE leaves that to the folder.
    (mode,) = connection.execute("PRAGMA journal_mode=PERSIST").fetchone()
    if mode != "persist":
        raise sqlite3.OperationalError("journal mode")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA mmap_size=0")  # a broken disk would be a SIGBUS
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute("PRAGMA temp_store=MEMORY")


def _give_clock(clock: Clock) -> Callable[[sqlite3.Connection, object], None]:
    def give(connection: sqlite3.Connection, _record: object) -> None:
        connection.create_function(SQLITE_NOW, 0, lambda: micros(clock.now()))

    return give


def _begin_sqlite(connection: Connection) -> None:
    reading = connection.get_execution_options().get("keyturn_read")
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


# --- PostgreSQL ---------------------------------------------------------------------------


def _postgresql(url: URL, password: Password) -> Engine:
    try:
        engine = sa.create_engine(
            url.set(drivername="postgresql+psycopg"),
            hide_parameters=True,
            isolation_level="AUTOCOMMIT",  # the transaction is begun by our own statement
            pool_size=8,
            max_overflow=24,
            pool_timeout=BUSY,
            use_native_hstore=False,
            connect_args=postgresql_arguments(str(url), None),
        )
    except ModuleNotFoundError:
        raise ConfigError(
            "PostgreSQL needs another package", hint="pip install 'keyturn[postgres]'"
        ) from None
    event.listen(engine, "do_connect", _give_password(password))
    event.listen(engine, "connect", _prepare_postgresql)
    event.listen(engine, "begin", _begin_postgresql)
    return engine


def _give_password(password: Password) -> Callable[..., None]:
    def give(_dialect: object, _record: object, _args: object, named: dict[str, Any]) -> None:
        if (found := asked(password)) is not None:
            named["password"] = found.reveal()

    return give


def _prepare_postgresql(connection: Any, _record: object) -> None:
    """Let the server keep the plans of our statements, which halves its work, where it can.

    A pooler gives each transaction another session, which does not know them. It also answers a new
    connection with a process number of its own (PgBouncer: a random one), and that tells.
    """
    connection.autocommit = True
    (session,) = connection.execute("SELECT pg_backend_pid()").fetchone()
    if session == connection.info.backend_pid:
        connection.prepare_threshold = PREPARE_AFTER


def _begin_postgresql(connection: Connection) -> None:
    reading = connection.get_execution_options().get("keyturn_read")
    driver: Any = connection.dialect.loaded_dbapi
    # A bare cursor, since every transaction pays for this: SQLAlchemy's part with errors is ours.
    try:
        with closing(connection.connection.cursor()) as cursor:
            cursor.execute(BEGIN_READ if reading else BEGIN_WRITE)
    except driver.Error as error:
        # Whatever it was, the transaction has not begun. A server that restarted or failed over cut
        # the others that lie idle as well: without them the next try is a new connection.
        connection.invalidate()
        connection.engine.dispose()
        raise exc.OperationalError(
            "BEGIN", None, error, hide_parameters=True, connection_invalidated=True
        ) from None


# --- errors -------------------------------------------------------------------------------


def _may_repeat(error: exc.SQLAlchemyError, *, committing: bool) -> bool:
    """Tell whether the transaction certainly left nothing and may go through when repeated."""
    if not isinstance(error, exc.DBAPIError):
        return False
    if getattr(error.orig, "sqlstate", None) in SERIALIZATION:
        return True
    # A connection that died idle in the pool; during a commit nobody knows what happened.
    return error.connection_invalidated and not committing


def _translate(error: exc.SQLAlchemyError) -> NoReturn:
    """Raise our error for a database's; codes only, since its text may quote values."""
    origin = getattr(error, "orig", None)
    if isinstance(error, exc.IntegrityError):
        raise IllegalTransition(f"the store refused an illegal state ({code_of(origin)})") from None
    if isinstance(error, exc.OperationalError | exc.InterfaceError | exc.TimeoutError):
        if code_of(origin) in {"SQLITE_CORRUPT", "SQLITE_NOTADB"}:
            raise StorageError(
                "the store is damaged", hint="stop the daemon and restore a backup"
            ) from None
        if code_of(origin) == "SQLITE_FULL":
            raise StoreFull from None
        if (known := refusal(origin)) is not None:
            raise known from None
        raise StoreUnavailable(f"the store cannot be used now ({code_of(origin)})") from None
    if (known := refusal(origin)) is not None:
        raise known from None
    raise StorageError(
        f"the store did not understand ({type(error).__name__}, {code_of(origin)})",
        hint="see that the store belongs to this release and nobody changed its tables",
    ) from None


def code_of(origin: object) -> str:
    """Return the stable code of a driver's error: an SQLite name or a SQLSTATE."""
    for name in ("sqlite_errorname", "sqlstate"):
        if code := getattr(origin, name, None):
            return str(code)
    return type(origin).__name__ if origin is not None else "timeout"
