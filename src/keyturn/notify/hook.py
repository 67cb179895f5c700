"""One webhook and its thread: reads the audit, sends, writes down how far it is.

At least once: the cursors move only behind an answer of 2xx, and an event's id follows from its place
in the audit, so what is sent again after a crash has the id that it had. One after the other, in the
order of the commits. What a receiver does not take for days, or what is too much, is told in sum:
silence would look as if nothing had happened.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import structlog

from keyturn import incidents
from keyturn.core.model import Agent, Retry
from keyturn.core.policy import backoff
from keyturn.core.walltime import rfc3339
from keyturn.errors import ConfigError, KeyturnError, StorageError
from keyturn.notify import events, signing
from keyturn.notify.events import Message
from keyturn.notify.sending import Answer, deliver
from keyturn.ports import AuditEntry
from keyturn.storage.audit import Recorded
from keyturn.storage.hooks import Cursors, HookRecords

POLL = 1.0  # seconds between two looks at the audit
MOST = 5_000  # events that wait; more are told in sum
OLDEST = timedelta(days=3)  # that an event waits; then it is told in sum
SUMMARIES = 4  # of different reasons; the last one then takes whatever comes
FLUSH = 1.0  # seconds of deliveries between two commits: a crash repeats no more than those
IDLE_FLUSH = 60.0  # seconds between two commits that only pass over what is not told
RETRY = Retry(first=timedelta(seconds=1), max=timedelta(minutes=5))
REFUSALS, REFUSED_FOR = 8, 3600.0  # tries and seconds until a message that is refused is let go
LONG = timedelta(hours=1)  # a hook that fails for longer is mentioned by `keyturn status`

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """A hook as the configuration has it."""

    name: str
    url: str
    key_file: Path
    on: frozenset[str]
    ca_file: Path | None = None


def send(spec: Spec, message: Message, *, by: Callable[..., Answer] = deliver) -> Answer:
    """Sign with the keys as they are now, and send. Never raises for what a receiver does."""
    try:
        keys = signing.read_keys(spec.key_file)
    except ConfigError as error:
        return Answer(trouble=str(error))
    # The clock that receivers compare with theirs, not the store's.
    headers = signing.headers(keys, id=message.id, seconds=int(time.time()), body=message.body)
    return by(spec.url, message.body, headers, ca_file=spec.ca_file)


class Instruments(Protocol):
    """Where a hook counts. Nothing here raises."""

    def delivered(self, hook: str, result: str) -> None:
        """Count one try."""

    def waiting(self, hook: str, number: int, oldest: float) -> None:
        """Note how many events wait, and for how many seconds the oldest of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a hook needs of the rest. `send` is `sending.deliver` but in tests."""

    records: HookRecords
    store_id: str
    now: Callable[[], datetime]
    agent: Callable[[str], Agent | None]
    audit: Callable[[AuditEntry], None]
    instruments: Instruments
    send: Callable[..., Answer] = deliver
    retry: Retry = RETRY
    elapsed: Callable[[], float] = time.monotonic


class Hook:
    """The worker of one hook. `start` it; `change` and `leave` come from a reload."""

    def __init__(self, spec: Spec, around: Surroundings, receiver: str) -> None:
        self.spec = spec
        self._around = around
        self._receiver = receiver
        self._guard = threading.Lock()  # held for what is written: a hook that left writes nothing
        self._woken = threading.Event()
        self._most = MOST
        self._stopping = False
        self._left = False
        self._begun = False
        self._queue: deque[Recorded] = deque()
        self._seen: Cursors = {}
        self._kept: Cursors = {}
        self._summaries: list[dict[str, Any]] = []
        self._number = 0
        self._gone_at: datetime | None = None
        self._dirty = False
        self._flushed = around.elapsed()
        self._tries = 0
        self._refused: tuple[int, float] = (0, 0.0)  # how often, since when
        self._next_try = 0.0
        self.failing_since: datetime | None = None
        self.last = ""
        self._thread = threading.Thread(target=self._run, name=f"hook-{spec.name}", daemon=True)

    # --- from outside -----------------------------------------------------------------------

    def begin(self) -> None:
        """Read how far it is; a new one begins here. Raises StoreUnavailable."""
        told = self._around.records.begin(self.spec.name, self._receiver)
        self._seen, self._kept = dict(told.cursors), dict(told.cursors)
        self._summaries, self._number = list(told.summaries), told.number
        self._gone_at = told.gone_at
        self._begun = True

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def change(self, spec: Spec, receiver: str) -> None:
        """Go on by other lines of the configuration; nothing that waits is lost."""
        moved, self.spec, self._receiver = receiver != self._receiver, spec, receiver
        if moved:
            self.enable()
            with suppress(StorageError):  # else the next start learns it from the file
                self._around.records.begin(spec.name, receiver)
        self._woken.set()

    def enable(self) -> None:
        """Send again to a receiver that said it was gone."""
        with self._guard:
            self._gone_at, self._dirty = None, True
        self._again()
        self._woken.set()

    def stop(self, patience: float) -> None:
        """End, and write down how far it is; a delivery that hangs is not waited for."""
        self._stopping = True
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join(patience)

    def leave(self) -> None:
        """End for good: the configuration names it no more."""
        self._stopping = True
        with self._guard:
            self._left = True
            self._around.records.forget(self.spec.name)
        self._woken.set()

    def test(self) -> tuple[Message, Answer]:
        """Send a ping now, beside what waits."""
        message = events.ping(
            store_id=self._around.store_id, at=self._around.now(), nonce=secrets.token_hex(16)
        )
        return message, self._send(message)

    def status(self) -> dict[str, Any]:
        """Describe it for people and machines."""
        oldest, waiting = self._oldest(), len(self._queue)
        since = self.failing_since
        return {
            "name": self.spec.name,
            "on": sorted(self.spec.on),
            "state": "gone" if self._gone_at else "failing" if since else "ok",
            "waiting": waiting,
            "oldest_at": rfc3339(oldest) if oldest else None,
            "in_sum": sum(sum(one["counts"].values()) for one in list(self._summaries)),
            "failing_since": rfc3339(since) if since else None,
            "tries": self._tries,
            "last": self.last,
            "problem": self._problem(),
        }

    def _problem(self) -> str:
        """Say that it has failed for long; "" where it has not."""
        name, since = self.spec.name, self.failing_since
        if self._gone_at is not None:
            return (
                f"webhook {name}: its receiver said that it is gone, and nothing is sent to it:"
                f" take it out of `notify:`, or `keyturn notify enable {name}`"
            )
        if since is None or self._around.now() - since < LONG:
            return ""
        return (
            f"webhook {name} fails since {rfc3339(since)} ({self.last}), {len(self._queue)}"
            f" events wait: `keyturn notify test --name {name}`"
        )

    # --- the loop ---------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._turn()
            except StorageError as error:
                _log.warning("webhook.store-away", hook=self.spec.name, code=error.code)
            except Exception:  # noqa: BLE001  # loop top: the next turn must still come
                _log.error("webhook.broken", hook=self.spec.name, exc_info=True)
            self._woken.wait(POLL)
            self._woken.clear()
        try:
            self._flush()
        except StorageError as error:  # sent again after the next start, under the same ids
            _log.warning("webhook.store-away", hook=self.spec.name, code=error.code)

    def _turn(self) -> None:
        if not self._begun:
            self.begin()
        more = True
        while more and self._gone_at is None and not self._stopping:
            more = self._read()
            self._cut()
            while not self._stopping and self._deliver_next():
                self._flush_after(FLUSH)
        self._flush_after(IDLE_FLUSH if not self._dirty else 0.0)
        self._measure()

    def _read(self) -> bool:
        """Take a slice of what is new; tell whether there may be more."""
        found = self._around.records.after(self._seen)
        for one in found:
            self._seen[one.chain] = one.seq
            if events.kind_of(one) in self.spec.on:
                self._queue.append(one)
        return bool(found)

    def _measure(self) -> None:
        oldest = self._oldest()
        age = (self._around.now() - oldest).total_seconds() if oldest else 0.0
        waiting = len(self._queue) + len(self._summaries)
        if self._left:
            return
        self._around.instruments.waiting(self.spec.name, waiting, max(0.0, age))

    def _oldest(self) -> datetime | None:
        with self._guard:
            if self._summaries:
                return datetime.fromisoformat(self._summaries[0]["from"])
            return self._queue[0].at if self._queue else None

    # --- what waits too long ----------------------------------------------------------------

    def _cut(self) -> None:
        """Tell in sum what is too old or too much."""
        limit = self._around.now() - OLDEST
        cut: list[Recorded] = []
        with self._guard:
            while self._queue and (len(self._queue) > self._most or self._queue[0].at < limit):
                cut.append(self._queue.popleft())
        if cut:
            self._sum_up(
                cut, "too many events waited" if cut[-1].at >= limit else "not taken for days"
            )

    def _sum_up(self, cut: list[Recorded], why: str) -> None:
        """Add events to the last summary, or begin one where that may have been sent already."""
        with self._guard:
            last = self._summaries[-1] if self._summaries else None
            other = last is not None and last["why"] != why and len(self._summaries) < SUMMARIES
            if last is None or last["sent"] or other:
                self._number += 1
                last = {
                    "number": self._number,
                    "counts": {},
                    "from": rfc3339(cut[0].at),
                    "why": why,
                    "sent": False,
                }
                self._summaries.append(last)
                _log.error("webhook.summed-up", hook=self.spec.name, why=why)
            for kind, number in events.counted(cut).items():
                last["counts"][kind] = last["counts"].get(kind, 0) + number
            last["to"] = rfc3339(cut[-1].at)
            self._dirty = True
            self._refused = (0, 0.0)  # another message comes first now; the receiver is as it was

    # --- sending ----------------------------------------------------------------------------

    def _deliver_next(self) -> bool:
        """Send what comes next, if it is time; tell whether to go on at once."""
        if self._around.elapsed() < self._next_try or not (self._summaries or self._queue):
            return False
        if self._summaries:
            return self._deliver(self._summary(), lambda: self._summaries.pop(0))
        found = self._queue[0]
        if events.kind_of(found) not in self.spec.on:  # by a reload, after it was read
            self._over(self._queue.popleft)
            return True
        agent = self._around.agent(found.entry.agent) if found.entry.agent else None
        message = events.message_of(found, store_id=self._around.store_id, agent=agent)
        return self._deliver(message, self._queue.popleft)

    def _summary(self) -> Message:
        told = self._summaries[0]
        if not told["sent"]:  # from here on it must stay as it is: its id may be known
            told["sent"], self._dirty = True, True
            self._flush()
        at = datetime.fromisoformat(told["to"])
        return events.summary(told, hook=self.spec.name, store_id=self._around.store_id, at=at)

    def _deliver(self, message: Message, over: Callable[[], Any]) -> bool:
        answer = self._send(message)
        if answer.delivered:
            self._over(over)
            self._went_well(message)
            return True
        self.last = answer.words
        if answer.gone:
            self._lose_receiver()
            return False
        self._failed(message, answer)
        if self._is_hopeless(answer):
            self._let_go(message)
        return False

    def _send(self, message: Message) -> Answer:
        return send(self.spec, message, by=self._around.send)

    def _over(self, over: Callable[[], Any]) -> None:
        with self._guard:
            over()
            self._dirty = True

    def _went_well(self, message: Message) -> None:
        self._around.instruments.delivered(self.spec.name, "delivered")
        _log.debug("webhook.delivered", hook=self.spec.name, type=message.kind, id=message.id)
        if self.failing_since is not None:
            _log.info("webhook.again", hook=self.spec.name, waiting=len(self._queue))
        self.last = "delivered"
        self._again()

    def _again(self) -> None:
        """Begin to count tries anew."""
        self.failing_since, self._tries, self._refused, self._next_try = None, 0, (0, 0.0), 0.0

    def _failed(self, message: Message, answer: Answer) -> None:
        self._tries += 1
        pause = backoff(
            self._around.retry, self._tries, unit=secrets.randbelow(1 << 30) / (1 << 30)
        )
        pause = max(pause, answer.retry_after or timedelta(0))
        self._next_try = self._around.elapsed() + pause.total_seconds()
        self._around.instruments.delivered(
            self.spec.name, "refused" if answer.refused else "failed"
        )
        if self.failing_since is None:
            self.failing_since = self._around.now()
        # Once at 1, 2, 4, 8 … tries: a dead receiver must not fill the log.
        if self._tries & (self._tries - 1) == 0:
            _log.warning(
                "webhook.failed",
                hook=self.spec.name,
                type=message.kind,
                id=message.id,
                why=answer.words,
                tries=self._tries,
                waiting=len(self._queue),
            )

    def _is_hopeless(self, answer: Answer) -> bool:
        """Whether the receiver goes on refusing this very message: the others must not wait for it."""
        if not answer.refused:
            return False
        number, since = self._refused
        self._refused = (number + 1, since or self._around.elapsed())
        return number + 1 >= REFUSALS and self._around.elapsed() - self._refused[1] >= REFUSED_FOR

    def _let_go(self, message: Message) -> None:
        """Tell an event in sum that is refused again and again; a summary that is has no other way."""
        _log.error("webhook.let-go", hook=self.spec.name, type=message.kind, id=message.id)
        if message.kind == "summary":
            self._over(lambda: self._summaries.pop(0))
            self._refused = (0, 0.0)
        else:
            self._sum_up([self._queue.popleft()], "refused by the receiver")

    def _lose_receiver(self) -> None:
        self._around.instruments.delivered(self.spec.name, "gone")
        with self._guard:
            self._gone_at, self._dirty = self._around.now(), True
        self._flush()
        _log.error(
            "webhook.gone",
            hook=self.spec.name,
            hint=f"take it out of `notify:`, or `keyturn notify enable {self.spec.name}`",
        )
        found = incidents.entry("webhook-gone", actor="daemon:notify", hook=self.spec.name)
        try:
            self._around.audit(found)
        except KeyturnError as error:
            _log.warning("webhook.store-away", hook=self.spec.name, code=error.code)

    # --- how far it is ----------------------------------------------------------------------

    def _flush_after(self, seconds: float) -> None:
        if self._around.elapsed() - self._flushed >= seconds:
            self._flush()

    def _flush(self) -> None:
        """Write down how far it is, where that has changed."""
        with self._guard:
            if self._left or not self._begun:
                return
            reached = self._reached()
            moved = {c: seq for c, seq in reached.items() if self._kept.get(c) != seq}
            if moved or self._dirty:
                self._around.records.keep(
                    self.spec.name,
                    moved,
                    summaries=self._summaries,
                    number=self._number,
                    gone_at=self._gone_at,
                )
            self._kept, self._dirty = reached, False
            self._flushed = self._around.elapsed()

    def _reached(self) -> Cursors:
        """Return up to where each chain is over with: what waits still is not."""
        reached = dict(self._seen)
        for one in self._queue:
            reached[one.chain] = min(reached[one.chain], one.seq - 1)
        return reached
