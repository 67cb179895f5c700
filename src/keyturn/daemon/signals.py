"""Signals of the daemon: one thread waits for them, one per kind of work acts on them.

    USR1        apply the revocations file now
    HUP         read the configuration again
    TERM, INT   stop: finish or park what is running; a second one quits at once

USR1 and HUP are blocked since the first statement of `entry`; `start` blocks the others too and
must come before any other thread is started, because a signal goes to any thread that lets it.
Children inherit the blocks: a child that should end by TERM has to unblock it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import structlog

Callback = Callable[[], None]

WAITED_FOR = frozenset({signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM, signal.SIGINT})
_LOOK_UP = 0.5  # seconds between two looks at the closed flag
_QUIT_CODE = 1

_log = structlog.get_logger(__name__)


def quit_at_once() -> None:
    """End the process without finishing anything; recovery does the rest at the next start."""
    os._exit(_QUIT_CODE)


class _Worker(threading.Thread):
    """Runs one callback whenever asked; asked while it runs means run once more."""

    def __init__(self, name: str, callback: Callback) -> None:
        super().__init__(name=f"signal-{name}", daemon=True)
        self._callback = callback
        self._changed = threading.Condition()
        self._asked = False
        self._closed = False

    def ask(self) -> None:
        with self._changed:
            self._asked = True
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def run(self) -> None:
        while self._wait_until_asked():
            try:
                self._callback()
            except Exception:  # noqa: BLE001  # loop top: the next signal must still be heard
                _log.error("signal.failed", signal=self.name, exc_info=True)

    def _wait_until_asked(self) -> bool:
        """Take the request back before the work: what comes later was perhaps not read any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._asked or self._closed)
            asked, self._asked = self._asked, False
            return asked


class Signals:
    """Waits for signals and calls back, never from a signal handler.

    `revoke` and `reload` run on threads of their own, so that a reload that hangs delays neither a
    revocation nor the end. `stop` must return at once. Storms coalesce.
    """

    def __init__(
        self,
        *,
        revoke: Callback,
        reload: Callback,
        stop: Callback,
        quit_now: Callback = quit_at_once,
    ) -> None:
        self._workers = {
            signal.SIGUSR1: _Worker("revoke", revoke),
            signal.SIGHUP: _Worker("reload", reload),
        }
        self._stop = stop
        self._quit_now = quit_now
        self._stopping = False
        self._closed = False
        self._waiter = threading.Thread(target=self._wait, name="signal-wait", daemon=True)

    def start(self) -> None:
        """Block the signals in this thread, so in all that follow, and begin to wait."""
        signal.pthread_sigmask(signal.SIG_BLOCK, WAITED_FOR)
        for worker in self._workers.values():
            worker.start()
        self._waiter.start()

    def close(self, wait_seconds: float = 5.0) -> None:
        """Stop waiting, and give what was asked for before that `wait_seconds` to be done."""
        self._closed = True
        self._waiter.join()
        deadline = time.monotonic() + wait_seconds
        for worker in self._workers.values():
            worker.close()
        for worker in self._workers.values():
            worker.join(max(0.0, deadline - time.monotonic()))

    def _wait(self) -> None:
        while True:
            # The last look takes what is pending: a USR1 just before the end is still done.
            closing = self._closed
            arrived = signal.sigtimedwait(WAITED_FOR, 0 if closing else _LOOK_UP)
            # After SIGSTOP and SIGCONT CPython can return a record without a signal in it: taken for
            # one, it would end this thread, and no signal would be heard any more.
            if arrived is not None and arrived.si_signo in WAITED_FOR:
                self._dispatch(signal.Signals(arrived.si_signo))
            elif closing:
                return

    def _dispatch(self, number: signal.Signals) -> None:
        worker = self._workers.get(number)
        if worker is not None:
            worker.ask()
        elif self._stopping:
            self._quit_now()
        else:
            self._stopping = True
            _log.info("signal.stop", signal=number.name)
            try:
                self._stop()
            except Exception:  # noqa: BLE001  # loop top: the second TERM must still be heard
                _log.error("signal.failed", signal=number.name, exc_info=True)
