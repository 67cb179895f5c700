"""Group commit: writes that wait for SQLite's one writer share the next commit."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.engine import Connection, Engine

from keyturn.errors import StaleRevision, StoreUnavailable
from keyturn.storage.group import MOST, Group

INSERT = sa.text("INSERT INTO t (n) VALUES (:n)")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """Give an SQLite engine that begins its transactions itself, as the store's does."""
    made = sa.create_engine(
        f"sqlite:///{tmp_path / 'g.db'}",
        connect_args={"isolation_level": None, "check_same_thread": False},
    )
    event.listen(made, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    with made.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (n INTEGER PRIMARY KEY CHECK (n > 0))")
    yield made
    made.dispose()


@pytest.fixture
def commits(engine: Engine) -> list[Connection]:
    """Give the list of what was committed from now on."""
    seen: list[Connection] = []
    event.listen(engine, "commit", seen.append)
    return seen


def numbers(engine: Engine) -> list[int]:
    """Return what is in the table."""
    with engine.connect() as connection:
        return list(connection.execute(sa.text("SELECT n FROM t ORDER BY n")).scalars())


def insert(n: int) -> Callable[[Connection], int]:
    """Return a body that inserts a number and returns it."""

    def body(connection: Connection) -> int:
        connection.execute(INSERT, {"n": n})
        return n

    return body


def behind_one(group: Group, bodies: list[Callable[[Connection], Any]]) -> list[Future[Any]]:
    """Queue bodies while another write has the turn, and let them all go at once."""
    inside, go = threading.Event(), threading.Event()

    def slow(_connection: Connection) -> None:
        inside.set()
        go.wait(10)

    with ThreadPoolExecutor(len(bodies) + 1) as pool:
        first = pool.submit(group.write, slow)
        inside.wait(10)
        queued = [pool.submit(group.write, body) for body in bodies]
        while len(group._queue) < len(bodies):
            threading.Event().wait(0.001)
        go.set()
    first.result()
    return queued


def test_what_has_queued_up_shares_a_commit(engine: Engine, commits: list[Connection]) -> None:
    """Ten writes that waited for one are committed once, and each gets its own result."""
    queued = behind_one(Group(engine, patience=5), [insert(n) for n in range(1, 11)])
    assert [write.result() for write in queued] == list(range(1, 11))
    assert numbers(engine) == list(range(1, 11))
    assert len(commits) == 2  # the one in front, and theirs


def test_one_that_fails_takes_nothing_with_it(engine: Engine, commits: list[Connection]) -> None:
    """A body that raises is undone alone; the others are committed together."""

    def stale(connection: Connection) -> None:
        connection.execute(INSERT, {"n": 99})
        raise StaleRevision

    queued = behind_one(Group(engine, patience=5), [insert(1), stale, insert(2)])
    with pytest.raises(StaleRevision):
        queued[1].result()
    assert (queued[0].result(), queued[2].result()) == (1, 2)
    assert numbers(engine) == [1, 2]
    assert len(commits) == 2


def test_a_database_error_concerns_its_own_write_only(engine: Engine) -> None:
    """One that the database refuses raises its error; the others are done all the same."""
    queued = behind_one(Group(engine, patience=5), [insert(1), insert(-1), insert(2)])
    with pytest.raises(exc.IntegrityError):
        queued[1].result()
    assert numbers(engine) == [1, 2]


def test_a_lock_is_waited_for_once(
    engine: Engine, commits: list[Connection], tmp_path: Path
) -> None:
    """Somebody's read keeps a commit out: all of the group hear it, none waits for it again."""
    event.listen(engine, "connect", lambda raw, _: raw.execute("PRAGMA busy_timeout=50"))
    engine.dispose()
    reader = sqlite3.connect(tmp_path / "g.db", isolation_level=None, check_same_thread=False)

    def read(_connection: Connection) -> None:
        reader.execute("BEGIN")
        reader.execute("SELECT n FROM t").fetchall()

    bodies = [read, *(insert(n) for n in range(1, 11))]
    for write in behind_one(Group(engine, patience=5), bodies):
        with pytest.raises(exc.OperationalError):
            write.result()

    assert len(commits) == 2  # the one in front, and the one try of all the others
    reader.close()
    assert numbers(engine) == []


def test_a_write_whose_turn_does_not_come_is_not_done_later(engine: Engine) -> None:
    """Reported as not done means not done: it is taken out of the queue."""
    group, go, inside = Group(engine, patience=0.05), threading.Event(), threading.Event()

    def slow(_connection: Connection) -> None:
        inside.set()
        go.wait(10)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(group.write, slow)
        inside.wait(10)
        with pytest.raises(StoreUnavailable, match="busy"):
            group.write(insert(1))
        go.set()
        first.result()
    group.write(insert(2))
    assert numbers(engine) == [2]


def test_nobody_waits_for_ever_when_the_one_that_serves_is_interrupted(engine: Engine) -> None:
    """Whatever ends the thread that serves a group, the others hear that nothing was done."""

    class Interrupted(BaseException):
        """Like KeyboardInterrupt."""

    def interrupted(_connection: Connection) -> None:
        raise Interrupted

    queued = behind_one(Group(engine, patience=5), [insert(1), interrupted, insert(2)])
    errors = [type(write.exception()) for write in queued]
    assert set(errors) <= {Interrupted, StoreUnavailable}
    assert Interrupted in errors
    assert numbers(engine) == []


class NewestFirst:
    """A lock that goes to who asked last: the documentation of `threading.Lock` allows any order."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken = False
        self._waiting: list[object] = []

    def acquire(self, timeout: float) -> bool:
        me = object()
        with self._changed:
            self._waiting.append(me)
            got = self._changed.wait_for(
                lambda: not self._taken and self._waiting[-1] is me, timeout
            )
            self._waiting.remove(me)
            self._taken = self._taken or got
            self._changed.notify_all()
            return got

    def release(self) -> None:
        with self._changed:
            self._taken = False
            self._changed.notify_all()


def test_whoever_has_the_turn_goes_on_until_its_own_write_is_done(engine: Engine) -> None:
    """More writes than one commit takes, and the last one gets the turn first: none is left over."""
    group = Group(engine, patience=5)
    group._turn = NewestFirst()  # type: ignore[assignment]
    inside, go = threading.Event(), threading.Event()

    def slow(_connection: Connection) -> None:
        inside.set()
        go.wait(10)

    many = MOST + 1
    with ThreadPoolExecutor(many + 1) as pool:
        first = pool.submit(group.write, slow)
        inside.wait(10)
        queued = []
        for n in range(1, many + 1):
            queued.append(pool.submit(group.write, insert(n)))
            while len(group._queue) < n or len(group._turn._waiting) < n:  # type: ignore[attr-defined]
                threading.Event().wait(0.001)
        go.set()
        try:
            done = [write.result(timeout=4) for write in queued]
        finally:
            group.write(lambda _connection: None)  # wakes what a lost turn has left over
        first.result()
    assert done == list(range(1, many + 1))
