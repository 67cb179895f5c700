"""The verifier that `keyturn run` starts beside itself, on SQLite: a process, never a part of this one.

    start     its own session, a cleaned environment, no descriptor but the two of the log
    hear      READY and beats, as systemd hears them; only from the child itself
    replace   another `verifier:` section: the new one answers before the old one is told to end
    restart   with a back-off; `keyturn health`, the log and the metrics say that it is down
    end       TERM, KILL after a while; a daemon that is killed takes it along (PR_SET_PDEATHSIG)

SECURITY: the two share a uid because only this uid may open the store. The child reads `store`,
`log` and `verifier` of the configuration: it learns neither where secrets go nor how we log in there.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog

from keyturn.config.models import LogSettings
from keyturn.config.settings import Settings
from keyturn.config.verifying import VerifierSection
from keyturn.daemon.metrics import Metrics
from keyturn.daemon.readiness import Readiness, Reason
from keyturn.daemon.tied import PARENT
from keyturn.storage.engine import is_sqlite

ROUND = 0.25  # seconds between two looks at the child
PATIENCE = 60.0  # seconds until it has to answer
BEAT = 30.0  # seconds in which it has to show that it comes round
LEAVE = 8.0  # seconds that it gets at TERM: what is owed is answered in 5
BACK_OFF, BACK_OFF_MOST = 0.5, 30.0  # seconds until it is started again
STEADY = 60.0  # seconds of life after which an end is the first one again

# The interpreter, the language of messages, the clock's zone: what a process cannot do without.
_KEPT = ("PATH", "LANG", "LANGUAGE", "TZ", "LD_LIBRARY_PATH")
_KEPT_BEGINNINGS = ("LC_", "KEYTURN_STORE__", "KEYTURN_LOG__")
_EAR = ".notify-"
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: unix(7)
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a child is started for; another one of these means another child."""

    path: Path
    section: VerifierSection
    log: LogSettings
    here: bool

    @classmethod
    def of(cls, settings: Settings) -> Wanted:
        """Read it from settings; `here` tells whether there is to be a child at all."""
        section = settings.verifier
        here = section.embedded and section.listen is not None and is_sqlite(settings.store.url)
        return cls(path=settings.path.absolute(), section=section, log=settings.log, here=here)


def command(path: Path) -> list[str]:
    """Return what starts a verifier with the interpreter that runs us."""
    return [sys.executable, "-I", "-m", "keyturn", "verifier", "-c", os.fspath(path)]


def clean(environ: Mapping[str, str], **more: str) -> dict[str, str]:
    """Return the environment of the child: no credentials' folder, no supervisor of ours, no login."""
    kept = {
        name: value
        for name, value in environ.items()
        if name in _KEPT or name.startswith(_KEPT_BEGINNINGS)
    }
    return kept | more


class Ear:
    """Hears what children say of themselves, as `NOTIFY_SOCKET` has it, at a file in a private folder.

    SECURITY: the abstract names of this host are listed for everybody (/proc/net/unix), and whoever
    fills such a socket keeps the child from being heard. Only a folder that can have no socket gets an
    abstract one: its path is too long for one (unix(7)), or its file system has none, as some that
    containers share with their host.
    """

    def __init__(self, folder: Path) -> None:
        _remove_deserted(folder)
        path = folder / f"{_EAR}{secrets.token_hex(8)}"
        try:
            self._path: Path | None = path
            self.address = os.fspath(path)
            self._socket = _bound(self.address)
            self._file = _file(path)
        except OSError:
            self._path, self.address = None, f"@keyturn{path.name}"
            self._socket = _bound("\0" + self.address[1:])
        self._woken = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._poll.register(self._woken, select.POLLIN)

    def wake(self) -> None:
        """End the wait of `heard`; from any thread."""
        os.eventfd_write(self._woken, 1)

    def heard(self, seconds: float) -> Iterator[tuple[int, frozenset[str]]]:
        """Wait at most so long, then yield who said what, as pid and lines."""
        self._poll.poll(seconds * 1000)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._woken)
        with contextlib.suppress(BlockingIOError):
            while True:
                text, told, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(_CREDENTIALS.size))
                for level, kind, value in told:
                    if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                        lines = text.decode("ascii", "replace").splitlines()
                        yield _CREDENTIALS.unpack(value)[0], frozenset(lines)
        self._come_back()

    def _come_back(self) -> None:
        """Listen again at a file that somebody removed: a child that nobody hears is killed."""
        if self._path is None or _file(self._path) == self._file:
            return
        with contextlib.suppress(OSError):  # in the next round, if the folder is there then
            self._path.unlink(missing_ok=True)
            found = _bound(self.address)
            self._file = _file(self._path)
            self._poll.register(found, select.POLLIN)
            self._poll.unregister(self._socket)
            self._socket.close()
            self._socket = found

    def close(self) -> None:
        """Hear no more."""
        self._socket.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        os.close(self._woken)


def _bound(address: str) -> socket.socket:
    """Return a socket that can be sent to at this address, and is told by the kernel who sends."""
    found = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        found.bind(address)
        found.setblocking(False)
    except OSError:
        found.close()
        raise
    return found


def _file(path: Path) -> tuple[int, int] | None:
    """Return which file is there."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _remove_deserted(folder: Path) -> None:
    """Remove the sockets of daemons that were killed; another one's, such as a standby's, is heard."""
    for path in folder.glob(f"{_EAR}*"):
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe,
            contextlib.suppress(OSError),
        ):
            try:
                probe.connect(os.fspath(path))
            except ConnectionRefusedError:
                path.unlink()


class Child:
    """One verifier process. Made, and so mourned, by the thread that made it."""

    def __init__(self, wanted: Wanted, ear: Ear) -> None:
        """Raise OSError where no process can be had."""
        self.wanted = wanted
        self.ready = False
        self.began = self.beat = time.monotonic()
        self.until = 0.0
        self.process = subprocess.Popen(
            command(wanted.path),
            stdin=subprocess.DEVNULL,
            close_fds=True,
            start_new_session=True,
            env=clean(
                os.environ,
                NOTIFY_SOCKET=ear.address,
                WATCHDOG_USEC=str(int(BEAT * 1e6)),
                **{PARENT: str(os.getpid())},
            ),
        )

    def says(self, lines: frozenset[str]) -> None:
        """Take in what it said."""
        self.beat = time.monotonic()
        self.ready = self.ready or "READY=1" in lines

    @property
    def dead(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    @property
    def stuck(self) -> bool:
        """Whether it neither starts nor comes round; a machine that slept is no reason."""
        return time.monotonic() - self.beat > (BEAT if self.ready else PATIENCE)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it is there."""
        if not self.dead:
            self.process.send_signal(number)

    def leave(self) -> None:
        """Tell it to end; `bury` does the rest."""
        self.signal(signal.SIGTERM)
        self.until = time.monotonic() + LEAVE

    def bury(self) -> bool:
        """Whether it is gone; one that does not go in time is killed."""
        if self.dead:
            return True
        if time.monotonic() > self.until:
            self.signal(signal.SIGKILL)
        return False


class Embedded:
    """Keeps one verifier beside the daemon, in a thread of its own, from `start` to `close`.

    All children are made in that thread: Linux sends PR_SET_PDEATHSIG when the thread that made a
    process ends, not the process (prctl(2)).
    """

    def __init__(self, settings: Settings, readiness: Readiness, metrics: Metrics) -> None:
        self._readiness, self._metrics = readiness, metrics
        self._wanted, self._asked = Wanted.of(settings), False
        self._folder = settings.store.folder
        self._current: Child | None = None
        self._next: Child | None = None
        self._leaving: list[Child] = []
        self._due, self._wait = 0.0, BACK_OFF
        self._closing = False
        self._ear: Ear  # made by `start`: a daemon that never starts has nothing to close
        self._thread = threading.Thread(target=self._run, name="embedded-verifier", daemon=True)
        self._show()

    @property
    def pid(self) -> int | None:
        """The process that answers now."""
        current = self._current
        return current.process.pid if current is not None and current.ready else None

    def start(self) -> None:
        """Begin; returns at once."""
        self._ear = Ear(self._folder)
        self._thread.start()

    def apply(self, settings: Settings) -> None:
        """Take over what was read anew: another child, or HUP for the one that there is."""
        self._wanted = Wanted.of(settings)
        self._asked = True
        if self._is_started:
            self._ear.wake()

    def close(self) -> None:
        """End the child and wait for that."""
        self._closing = True
        if not self._is_started:
            return
        self._ear.wake()
        self._thread.join()
        self._ear.close()

    @property
    def _is_started(self) -> bool:
        return self._thread.ident is not None

    # --- the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            try:
                self._look()
                self._hear(ROUND)
            except Exception:  # noqa: BLE001  # loop top: a verifier must be started again
                _log.error("verifier.supervision", exc_info=True)
                time.sleep(1.0)
        for child in filter(None, (self._current, self._next)):
            self._let_go(child)
        while self._leaving:
            self._leaving = [one for one in self._leaving if not one.bury()]
            self._hear(0.02)

    def _hear(self, seconds: float) -> None:
        for pid, lines in self._ear.heard(seconds):
            for child in filter(None, (self._current, self._next)):
                if child.process.pid == pid:
                    child.says(lines)

    def _look(self) -> None:
        if self._asked:
            self._asked = False
            self._take_over()
        self._leaving = [one for one in self._leaving if not one.bury()]
        self._look_at_next()
        self._look_at_current()
        if self._current is None and self._wanted.here and time.monotonic() >= self._due:
            self._current = self._born()
        self._show()

    def _take_over(self) -> None:
        wanted, newest = self._wanted, self._next or self._current
        if newest is None:
            self._due, self._wait = 0.0, BACK_OFF
        elif not wanted.here:
            for child in filter(None, (self._current, self._next)):
                self._let_go(child)
            self._current = self._next = None
        elif newest.wanted == wanted:
            newest.signal(signal.SIGHUP)
        else:
            if self._next is not None:
                self._let_go(self._next)
            self._next = self._born()

    def _look_at_next(self) -> None:
        """Put a child that answers in the place of the one before; a bad one changes nothing."""
        following = self._next
        if following is None:
            return
        if following.ready:
            if self._current is not None:
                self._let_go(self._current)
            self._current, self._next = following, None
            _log.info("verifier.replaced", pid=following.process.pid)
        elif following.dead or following.stuck:
            self._let_go(following)
            self._next = None
            hint = "the one before goes on; see its lines above, mend `verifier`, and reload"
            _log.error("verifier.not-replaced", hint=hint)

    def _look_at_current(self) -> None:
        child = self._current
        if child is None:
            return
        if child.stuck:
            _log.error("verifier.stuck", pid=child.process.pid)
            child.signal(signal.SIGKILL)
            child.process.wait()
        if child.dead:
            self._lost(child)

    def _lost(self, child: Child) -> None:
        if child.ready and time.monotonic() - child.began > STEADY:
            self._wait = BACK_OFF
        self._current, self._due = None, time.monotonic() + self._wait
        self._metrics.embedded_verifier_ends.inc()
        _log.error("verifier.ended", code=child.process.returncode, next_start_seconds=self._wait)
        self._wait = min(self._wait * 2, BACK_OFF_MOST)

    def _born(self) -> Child | None:
        try:
            child = Child(self._wanted, self._ear)
        except OSError as error:
            self._due = time.monotonic() + BACK_OFF_MOST
            _log.error("verifier.not-started", problem=os.strerror(error.errno or 0))
            return None
        _log.info("verifier.started", pid=child.process.pid)
        return child

    def _let_go(self, child: Child) -> None:
        child.leave()
        self._leaving.append(child)

    def _show(self) -> None:
        down = self._wanted.here and (self._current is None or not self._current.ready)
        (self._readiness.hold if down else self._readiness.release)(Reason.VERIFIER_DOWN)
