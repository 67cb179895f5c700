"""A daemon under a small supervisor that does what systemd does with `Type=notify`.

It hears READY, WATCHDOG and the rest at a datagram socket, kills what misses its beat, and starts
again what ended.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

Said = dict[str, str]
CONFIGURATION = 78  # RestartPreventExitStatus=


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start up to READY, in seconds: by the wall, and how much of it no processor was free."""

    wall: float
    waited: float

    @property
    def own(self) -> float:
        """What it would have taken with a processor of its own."""
        return self.wall - self.waited


def waited_for_cpu(pid: int) -> float:
    """Return the seconds that a process stood ready to run and did not (Linux, sched-stats.rst)."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


class Supervised:
    """Runs `command` until `stop`, each time with its own variables. `with` it."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        environ: Mapping[str, str],
        log: Path,
        address: str,
        watchdog: float = 0.0,
    ) -> None:
        self._command, self._log = list(command), log
        self._ear = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._ear.bind("\0" + address[1:] if address.startswith("@") else address)
        self._ear.settimeout(0.1)
        self._environ = {**environ, "NOTIFY_SOCKET": address}
        self._watchdog = watchdog
        self._ended = False
        self._guard = threading.Condition()
        self.said: list[Said] = []
        self.took: list[Start] = []
        self.starts = self.readies = self.watchdog_kills = 0
        self.started_at = self.ready_at = self._beat = 0.0
        self.process: subprocess.Popen[bytes]
        self._ready = False
        self._start()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def wait(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        """Wait until something is so that the supervisor has heard; fail with the daemon's log."""
        with self._guard:
            until = time.monotonic() + seconds
            while not condition() and time.monotonic() < until and self._thread.is_alive():
                self._guard.wait(0.5)
            if not condition():
                raise AssertionError(self.said[-5:], self._log.read_text()[-3000:])

    def wait_ready(self, number: int = 1) -> float:
        """Wait for the n-th READY; returns the seconds since that start."""
        self.wait(lambda: self.readies >= number)
        return self.ready_at - self.started_at

    def values(self, name: str) -> list[str]:
        """Return what was said under a name, in order."""
        with self._guard:
            return [one[name] for one in self.said if name in one]

    def stop(self) -> int:
        """End it as systemd does: TERM, and KILL after a while."""
        self._ended = True
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            return self.process.wait(45)
        finally:
            with contextlib.suppress(OSError):
                self.process.kill()
            self.process.wait()
            self._thread.join()
            self._ear.close()

    def _start(self) -> None:
        environ = dict(self._environ)
        if self._watchdog:
            environ["WATCHDOG_USEC"] = str(int(self._watchdog * 1e6))
        with self._log.open("ab") as log:
            self.started_at, self._ready = time.monotonic(), False
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, env=environ)
        self.starts += 1

    def _run(self) -> None:
        while True:
            self._hear()
            if self.process.poll() is not None:
                self._hear()
                if self._ended or self.process.returncode == CONFIGURATION:
                    return
                self._start()
            elif self._missed() and not self._ended:
                with self._guard:
                    self.watchdog_kills += 1
                    self._ready = False
                    self._guard.notify_all()
                self.process.kill()

    def _missed(self) -> bool:
        late = time.monotonic() - self._beat > self._watchdog
        return bool(self._watchdog and self._ready and late)

    def _waited(self) -> float:
        with contextlib.suppress(OSError):  # killed in this very moment
            return waited_for_cpu(self.process.pid)
        return 0.0

    def _hear(self) -> None:
        with contextlib.suppress(TimeoutError):
            text = self._ear.recv(4096).decode()
            now = time.monotonic()
            said = dict(line.split("=", 1) for line in text.splitlines())
            with self._guard:
                self.said.append(said)
                if said.get("WATCHDOG") or said.get("READY"):
                    self._beat = now
                if said.get("READY") and not self._ready:
                    self._ready, self.ready_at = True, now
                    self.took.append(Start(wall=now - self.started_at, waited=self._waited()))
                    self.readies += 1
                self._guard.notify_all()
