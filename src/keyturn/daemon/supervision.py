"""What the daemon tells whoever runs it: the protocol of sd_notify(3), one datagram a message.

STATUS, EXTEND_TIMEOUT_USEC    while it starts, or waits as standby: live, not ready
READY=1                        it leads, and answers
RELOADING=1, MONOTONIC_USEC    then READY=1 again, whatever came of it
STOPPING=1                     it parks what runs
WATCHDOG=1                     the scheduler is alive
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping

START_PATIENCE = 90_000_000  # microseconds that one part of a start may take
_SEND_DEADLINE = 1.0  # seconds, for a supervisor that does not read
_USEC = 1_000_000


class Supervisor:
    """Says how we are. Nothing here raises: whoever does not hear us must not stop us.

    `address` is `$NOTIFY_SOCKET`, "" where nobody listens; `watchdog` the seconds in which a beat
    must come, 0 for none.
    """

    def __init__(self, *, address: str = "", watchdog: float = 0.0) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._status = ""
        self._pulse = time.monotonic()
        self._watchdog = watchdog
        self._ended = threading.Event()

    @classmethod
    def take(cls, environ: MutableMapping[str, str], *, pid: int) -> Supervisor:
        """Take the supervisor's variables out of the environment, so that no child speaks for us."""
        address = environ.pop("NOTIFY_SOCKET", "")
        microseconds = environ.pop("WATCHDOG_USEC", "")
        meant = environ.pop("WATCHDOG_PID", "") in ("", str(pid))
        watchdog = int(microseconds) / _USEC if meant and microseconds.isdecimal() else 0.0
        return cls(address=address if address[:1] in ("/", "@") else "", watchdog=watchdog)

    # --- states -----------------------------------------------------------------------------

    def starting(self, status: str) -> None:
        """Say what the start is at, which gives it time for that; a standby repeats it."""
        self.pulse()
        self._say(f"STATUS={status}", f"EXTEND_TIMEOUT_USEC={START_PATIENCE}")

    def ready(self, status: str) -> None:
        """Say that we lead and answer; the beats begin."""
        self._status = status
        self.pulse()
        self._say("READY=1", f"STATUS={status}")
        if self._watchdog and self._address:
            threading.Thread(target=self._beat, name="watchdog", daemon=True).start()

    @contextlib.contextmanager
    def reloading(self) -> Iterator[None]:
        """Say that the configuration is read again, and afterwards that we are ready."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._say("RELOADING=1", f"MONOTONIC_USEC={now}", "STATUS=reading the configuration")
        status = f"{self._status}; the last reload was refused, see the log"
        try:
            yield
            status = self._status
        finally:
            self._say("READY=1", f"STATUS={status}")

    def stopping(self) -> None:
        """Say that the end has begun."""
        self._ended.set()
        self._say("STOPPING=1", "STATUS=stopping: what runs is finished or parked")

    # --- the watchdog -----------------------------------------------------------------------

    def pulse(self) -> None:
        """Note that the scheduler has come round."""
        self._pulse = time.monotonic()

    @property
    def since_pulse(self) -> float:
        """Seconds since the scheduler came round."""
        return time.monotonic() - self._pulse

    def _beat(self) -> None:
        """Beat as long as the scheduler does. Shares nothing with anything that serves callers."""
        while not self._ended.wait(self._watchdog / 4):
            if self.since_pulse < self._watchdog / 2:
                self._say("WATCHDOG=1")

    def _say(self, *lines: str) -> None:
        if not self._address:
            return
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as speaker,
        ):
            speaker.settimeout(_SEND_DEADLINE)
            speaker.sendto("\n".join(lines).encode(), self._address)


def beating(act: Callable[[], None], supervisor: Supervisor) -> Callable[[], None]:
    """Return a job of the scheduler that notes each time that it has come round."""

    def round_() -> None:
        act()
        supervisor.pulse()

    return round_
