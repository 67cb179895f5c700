"""The template of every destination: deadlines, bulkhead, write limit, error translation, paths.

Adapters write only the underscored methods and hold no retry code. Whatever a vendor's library
raises leaves here as one of our errors, raised `from None`: a vendor's message can quote what it was
sent, so only its type and status survive.
"""

from __future__ import annotations

import re
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from datetime import timedelta
from pathlib import Path, PurePath
from queue import Empty, SimpleQueue
from typing import Annotated, Any, ClassVar, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from keyturn.core.duration import FORM, parse_duration
from keyturn.core.model import Target, Traits
from keyturn.credential_file import CREDENTIAL_FORM, credential_path
from keyturn.errors import (
    ConfigError,
    DestinationError,
    DestinationUnavailable,
    IllegalTransition,
    KeyturnError,
    Refused,
    Rejected,
    Throttled,
)
from keyturn.ports import Clock, Entry, Observed, OwnAuthority, OwnLogin

T = TypeVar("T")

PATH_FORM = "a relative path of segments of A-Z a-z 0-9 . _ - without . and .."
_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", re.ASCII)
_RATE = re.compile(r"([0-9]{1,5})/s", re.ASCII)
LONGEST_PAUSE = timedelta(seconds=1)  # that a call waits for the write limit; then it gives way
LONGEST_RETRY_AFTER = 300
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_NO_TIME = timedelta(0)
# What a vendor's library raises to say something is none of these; they are bugs, ours or theirs.
_BUGS = (TypeError, AttributeError, NameError, AssertionError, LookupError)


class Form:
    """What is expected of an option, to be read after "expected"."""

    def __init__(self, text: str) -> None:
        self.text = text


def rate(value: object) -> float:
    """Read an option that is a number of writes a second. Raises ValueError."""
    found = _RATE.fullmatch(value) if isinstance(value, str) else None
    if found is None or not int(found[1]):
        raise ValueError
    return float(found[1])


def duration(value: object) -> timedelta:
    """Read an option that is a duration. Raises ValueError."""
    if isinstance(value, timedelta):
        return value
    if not isinstance(value, str):
        raise ValueError  # noqa: TRY004 - pydantic turns only a ValueError into a problem
    return parse_duration(value)


def safe_address(value: object) -> str:
    """Read an option that is the bare address of a server. Raises ValueError."""
    if not isinstance(value, str) or not is_safe_address(value):
        raise ValueError
    return value.rstrip("/")


def is_safe_address(
    address: str, *, plain_hosts: Collection[str] = LOOPBACK, bare: bool = True
) -> bool:
    """Whether an address is https, or http at one of `plain_hosts`, without user and fragment.

    `bare`: nothing but scheme, host and port.
    """
    parts = urlsplit(address)
    more = (
        parts.fragment or "@" in parts.netloc or (bare and (parts.path.strip("/") or parts.query))
    )
    safe = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in plain_hosts)
    return safe and not more and bool(parts.hostname)


CredentialFile = Annotated[Path | None, BeforeValidator(credential_path), Form(CREDENTIAL_FORM)]


def checked_tags(value: object, *, most: int, name_is_good: Callable[[str], bool]) -> object:
    """Read an option that is a mapping of tags, texts of at most 256 characters. Raises ValueError."""
    if not isinstance(value, dict) or len(value) > most:
        raise ValueError
    for name, text in value.items():
        good = isinstance(name, str) and isinstance(text, str) and len(text) <= 256
        if not good or name.lower().startswith("keyturn-") or not name_is_good(name):
            raise ValueError
    return value


def pause(retry_after: object) -> timedelta:
    """Read a Retry-After of seconds (RFC 9110, 10.2.3), bounded: a server must not park us."""
    seconds = int(retry_after) if isinstance(retry_after, str) and retry_after.isdecimal() else 1
    return timedelta(seconds=min(max(seconds, 1), LONGEST_RETRY_AFTER))


def _prefix(value: object) -> object:
    if not isinstance(value, str) or (value and not is_plain(value)):
        raise ValueError
    return value


def is_plain(path: str) -> bool:
    """Tell whether a path is relative, of plain segments, and can mean one place only.

    SECURITY: `x/../y`, `./x`, `x//y` and `x/` all reach somebody else's entry at some store.
    """
    return ".." not in path and all(map(_SEGMENT.fullmatch, path.split("/")))


class ConnectionOptions(BaseModel):
    """What every connection can be given. Addresses and logins stand in the main file only."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, hide_input_in_errors=True, validate_default=False
    )

    prefix: Annotated[
        str,
        BeforeValidator(_prefix),
        Form(PATH_FORM),
        Field(description="folder under which every entry of this connection lies"),
    ] = ""
    write_limit: Annotated[
        float | None,
        BeforeValidator(rate),
        Form("a number of writes a second such as 20/s"),
        Field(description="most writes a second"),
    ] = None
    parallel: Annotated[
        int,
        Form("a number from 1 to 64"),
        Field(ge=1, le=64, description="most calls at once"),
    ] = 8
    call_deadline: Annotated[
        timedelta,
        BeforeValidator(duration),
        Form(FORM),
        Field(description="time for the whole answer of one call"),
    ] = timedelta(seconds=10)


class DestinationBase(ABC):
    """One connection. Thread-safe; see `ports.Destination` for the promises."""

    Options: ClassVar[type[ConnectionOptions]] = ConnectionOptions
    TRAITS: ClassVar[Traits] = Traits()

    def __init__(self, options: Any, *, name: str, store_id: str, clock: Clock) -> None:
        self.options = options
        self.name = name
        self.store_id = store_id
        self.clock = clock
        self._lane = _Lane(name, options.parallel)
        self._limit = WriteLimit(options.write_limit, clock)

    @property
    def traits(self) -> Traits:
        """What this destination can do."""
        return replace(self.TRAITS, call_deadline=self.options.call_deadline)

    @property
    def parallel(self) -> int:
        """How many agents may be under way on this connection at once."""
        return int(self.options.parallel)

    @property
    def login_ends_in(self) -> timedelta | None:
        """How long our session lives unless it is renewed; None where it does not end."""
        return None

    def own_login(self) -> OwnLogin | None:
        """Say how we log in and when that ends; may ask. None where there is no login."""
        return None

    @property
    def own_authority(self) -> OwnAuthority | None:
        """What replaces our own credential, where the connection is told to have that done."""
        return None

    # --- the port ---------------------------------------------------------------------------

    @abstractmethod
    def identity(self, target: Target) -> str:
        """Return the canonical remote key, offline. Raises ConfigError for a path out of bounds.

        It names the store and the entry, never the connection: two connections can lead to one
        entry, and then it must have one owner only.
        """

    def probe(self) -> str:
        """Log in, touch nothing, and return one line about what was reached."""
        return self._call(self._probe)

    def probe_entry(self, target: Target, *, retire: str) -> Observed | None:
        """Raise what a rotation of this entry would meet, as far as it shows without a write."""
        return self._call(lambda: self._probe_entry(target, retire))

    @classmethod
    def least_policy(cls, options: Any, entries: Sequence[tuple[Target, str]]) -> str:
        """Return the least rights for these entries, in the store's own language. Offline.

        Each entry comes with what becomes of its old copies. Raises Refused where there are none.
        """
        del options, entries
        raise Refused("this type of destination has no policies of its own", hint="see its how-to")

    def observe(self, target: Target) -> Observed:
        """Read what agents read."""
        return self._call(lambda: self._observe(target))

    def read(self, target: Target, version_id: str) -> Observed:
        """Read a staged or shown version by its version id."""
        return self._call(lambda: self._read(target, version_id))

    def stage(self, target: Target, entry: Entry, *, expected: str) -> str:
        """Write without showing it."""
        return self._write(lambda: self._stage(target, entry, expected))

    def activate(self, target: Target, entry: Entry, *, expected: str) -> str:
        """Make this version what agents read."""
        return self._write(lambda: self._activate(target, entry, expected))

    def retire(self, target: Target, *, version_id: str, locator: str, how: str) -> None:
        """Disable or destroy one immutable copy."""
        self._write(lambda: self._retire(target, version_id, locator, how))

    def withdraw(self, target: Target, *, owner: str, version_id: str, expected: str) -> str:
        """Write the entry without our secret and version keys."""
        return self._write(lambda: self._withdraw(target, owner, version_id, expected))

    def close(self) -> None:
        """Give back logins and connections; calls that hang are not waited for."""
        self._lane.close()

    # --- what adapters write ----------------------------------------------------------------

    @abstractmethod
    def _probe(self) -> str: ...

    @abstractmethod
    def _observe(self, target: Target) -> Observed: ...

    @abstractmethod
    def _activate(self, target: Target, entry: Entry, expected: str) -> str: ...

    @abstractmethod
    def _withdraw(self, target: Target, owner: str, version_id: str, expected: str) -> str: ...

    def _probe_entry(self, target: Target, retire: str) -> Observed | None:
        del retire
        return self._observe(target)

    def _read(self, target: Target, version_id: str) -> Observed:
        """Where nothing is staged, the shown entry is the only copy that can be found by its id."""
        found = self._observe(target)
        return found if found.version_id == version_id else Observed(token=found.token)

    def _stage(self, target: Target, entry: Entry, expected: str) -> str:
        raise Rejected(f"{self.name} cannot stage")

    def _retire(self, target: Target, version_id: str, locator: str, how: str) -> None:
        raise Rejected(f"{self.name} keeps no old copies")

    def _translate(self, error: Exception) -> DestinationError:
        """Turn what a vendor's library raised into one of ours; never quote its text."""
        return DestinationUnavailable(f"{self.name}: {type(error).__name__}")

    # --- shared -----------------------------------------------------------------------------

    def place(self, target: Target) -> str:
        """Return the checked path of an entry, prefix included. Raises ConfigError."""
        if not is_plain(target.path):
            raise ConfigError(f"expected {PATH_FORM}", hint="name the entry by one plain path")
        return f"{self.options.prefix}/{target.path}" if self.options.prefix else target.path

    def _write(self, body: Callable[[], T]) -> T:
        """Wait for the write limit, inside the deadline of the call. Raises Throttled."""
        pause = self._limit.take(min(LONGEST_PAUSE, self.options.call_deadline / 2))
        time.sleep(pause.total_seconds())
        return self._call(body, used=pause)

    def _call(self, body: Callable[[], T], *, used: timedelta = _NO_TIME) -> T:
        """Run on the connection's own threads and wait for the whole answer, at most so long."""
        future = self._lane.submit(lambda: self._guarded(body))
        try:
            return future.result((self.options.call_deadline - used).total_seconds())
        except CancelledError:
            raise DestinationUnavailable(f"{self.name}: closed", sent=False) from None
        except TimeoutError:
            pass
        if future.cancel():
            raise DestinationUnavailable(f"{self.name}: every connection is busy", sent=False)
        if future.done():
            return future.result()  # it answered in this very moment: then its end is known
        raise DestinationUnavailable(
            f"{self.name}: no answer within {self.options.call_deadline}", late=future
        )

    def _guarded(self, body: Callable[[], T]) -> T:
        try:
            return body()
        except KeyturnError as error:
            if error.__cause__ is None:
                # SECURITY: `from None` only hides a vendor's error, which quotes what was sent.
                error.__context__ = None
            raise
        except IllegalTransition:
            raise
        except Exception as error:  # noqa: BLE001 - the boundary: nothing of a vendor's gets through
            translated = self._fault(error) if isinstance(error, _BUGS) else self._translate(error)
        # Outside of the handler, or the vendor's error would hang on ours as its context.
        raise translated

    def _fault(self, error: Exception) -> DestinationError:
        """Name a bug by its place, never by its text; a broken answer can bring it about as well."""
        last = traceback.extract_tb(error.__traceback__)[-1]
        return DestinationUnavailable(
            f"{self.name}: {type(error).__name__} at {PurePath(last.filename).name}:{last.lineno}",
            hint="the answer made no sense, or this is a bug in the adapter: report it",
        )


class _Lane:
    """The threads of one connection: a slow destination fills its own lane and no other (I7).

    Daemon threads, because a call that hangs must not keep the process from ending; those of
    `ThreadPoolExecutor` are waited for at exit.
    """

    def __init__(self, name: str, width: int) -> None:
        self._name = name
        self._width = width
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads = 0
        self._idle = threading.Semaphore(
            0
        )  # threads that wait for a job and are not yet counted on
        self._closed = False
        self._guard = threading.Lock()

    def submit(self, body: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        with self._guard:
            if self._closed:
                future.cancel()
                return future
            self._jobs.put((future, body))
            if not self._idle.acquire(blocking=False) and self._threads < self._width:
                self._threads += 1
                name = f"call-{self._name}-{self._threads}"
                threading.Thread(target=self._run, name=name, daemon=True).start()
        return future

    def close(self) -> None:
        """Let idle threads go and cancel what has not started; what runs is not waited for."""
        with self._guard:
            self._closed = True
        while (job := self._next()) is not None:
            job[0].cancel()
        for _ in range(self._width):
            self._jobs.put(None)

    def _run(self) -> None:
        while True:
            job = self._next()
            if job is None and not self._closed:
                self._idle.release()
                job = self._jobs.get()
            if job is None:
                return
            future, body = job
            if future.set_running_or_notify_cancel():
                _settle(future, body)
            del job, future, body  # or the last secret would live as long as this thread waits

    def _next(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        try:
            return self._jobs.get_nowait()
        except Empty:
            return None


def _settle(future: Future[T], body: Callable[[], T]) -> None:
    try:
        result = body()
    except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
        future.set_exception(error)
        del future, body  # the error's traceback holds this frame, and with it a secret
    else:
        future.set_result(result)


class Timeline:
    """When the next write may be: shared by connections that have one quota between them."""

    def __init__(self) -> None:
        self.next = _NO_TIME
        self.guard = threading.Lock()


class WriteLimit:
    """At most so many writes a second; short pauses are waited for, long ones give way."""

    def __init__(self, rate: float | None, clock: Clock, line: Timeline | None = None) -> None:
        self._gap = timedelta(seconds=1 / rate) if rate else None
        self._clock = clock
        self._line = line or Timeline()

    def take(self, longest: timedelta) -> timedelta:
        """Take the next slot and return how far away it is. Raises Throttled if that is too far."""
        if self._gap is None:
            return _NO_TIME
        with self._line.guard:
            now = self._clock.boottime()
            slot = max(now, self._line.next)
            if slot - now > longest:
                raise Throttled("our own write limit is reached", retry_after=slot - now)
            self._line.next = slot + self._gap
        return slot - now
