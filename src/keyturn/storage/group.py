"""Group commit for SQLite: writes that wait for its one writer share the next commit.

A commit costs several syncs of the disk, everything else in a transaction next to nothing. So
whoever gets the turn carries out, in one transaction, all that has queued up meanwhile, each in a
savepoint of its own: one that fails takes nothing with it. Nobody waits for company: a lone write
is a plain transaction.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import exc
from sqlalchemy.engine import Connection, Engine

from keyturn.errors import StoreUnavailable

T = TypeVar("T")
Body = Callable[[Connection], Any]
MOST = 32  # writes in one commit; a revoke waits for at most so many


@dataclass(slots=True, eq=False)
class _Job:
    body: Body
    done: threading.Event = field(default_factory=threading.Event)
    result: Any = None
    error: BaseException | None = None

    def run(self, connection: Connection) -> None:
        self.result = self.body(connection)

    def finish(self, error: BaseException | None = None) -> None:
        self.error = error
        self.done.set()


class Group:
    """The queue of one process's writes. Thread-safe."""

    def __init__(self, engine: Engine, *, patience: float) -> None:
        self._engine = engine
        self._patience = patience
        self._queue: deque[_Job] = deque()
        self._guard = threading.Lock()
        self._turn = threading.Lock()

    def write(self, body: Callable[[Connection], T]) -> T:
        """Run one body, all or nothing; committed when this returns.

        `body` may run again, and in another thread. Raises what it raises, StoreUnavailable where
        its turn does not come, and SQLAlchemy's errors.
        """
        job = _Job(body)
        with self._guard:
            self._queue.append(job)
        if self._turn.acquire(timeout=self._patience):
            try:
                # Who gets the turn is not defined: thousands may be in front of one's own job, and
                # whoever queued those may be gone.
                while not job.done.is_set():
                    self._serve()
            finally:
                self._turn.release()
        elif self._withdraw(job):
            raise StoreUnavailable("the store is busy with another write")
        job.done.wait()
        if job.error is not None:
            raise job.error
        result: T = job.result
        return result

    def _withdraw(self, job: _Job) -> bool:
        """Take a job back; False where somebody is at it already."""
        with self._guard:
            waiting = job in self._queue
            if waiting:
                self._queue.remove(job)
        return waiting

    def _serve(self) -> None:
        with self._guard:
            jobs = [self._queue.popleft() for _ in range(min(MOST, len(self._queue)))]
        try:
            if len(jobs) == 1 or not self._together(jobs):
                for job in jobs:
                    self._alone(job)
        finally:
            for job in jobs:  # whatever happened to this thread, nobody waits for ever
                if not job.done.is_set():
                    job.finish(StoreUnavailable("the write was interrupted"))

    def _alone(self, job: _Job) -> None:
        try:
            with self._engine.connect() as connection, connection.begin():
                job.run(connection)
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that asked
            job.finish(error)
        else:
            job.finish()

    def _together(self, jobs: list[_Job]) -> bool:
        """Carry out several in one commit; False where each must try alone, nothing being done."""
        failed: dict[_Job, Exception] = {}
        inside = False
        try:
            with self._engine.connect() as connection, connection.begin():
                inside = True
                for job in jobs:
                    try:
                        with connection.begin_nested():
                            job.run(connection)
                    except exc.SQLAlchemyError:
                        raise  # a full disk or a broken file may have ended the whole transaction
                    except Exception as error:  # noqa: BLE001 - raised in the thread that asked
                        failed[job] = error
                inside = False
        except exc.SQLAlchemyError as error:
            if inside or not isinstance(error, exc.OperationalError):
                return False
            # Locked out at the begin or the commit: one after the other would each wait as long
            # again, and a revoke among them would return minutes later.
            failed = dict.fromkeys(jobs, error)
        for job in jobs:
            job.finish(failed.get(job))
        return True
