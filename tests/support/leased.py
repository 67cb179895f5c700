"""Verifiers with leases as processes of their own, and a proxy between one of them and the database.

`python -m support.leased URL STATE_FOLDER LEASE POLL`: one line `LOGIN SECRET` in, one word out.
"""

from __future__ import annotations

import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import structlog
from sqlalchemy.engine import make_url

from keyturn.errors import StoreUnavailable, VerificationFailed
from keyturn.storage.leases import Leased, Leasing
from keyturn.verifier.decision import Verifier
from keyturn.verifier.hashing import CHEAP_FOR_TESTS, Hashing
from support.stores import RealClock

TESTS = Path(__file__).parents[1]


def answer(verifier: Verifier, login: str, secret: str) -> str:
    """Return the answer in a word."""
    try:
        verifier.verify(login, secret)
    except VerificationFailed:
        return "no"
    except StoreUnavailable:
        return "unavailable"
    return "yes"


class Process:
    """One verifier in a process, and what it is told and says."""

    def __init__(self, url: str, folder: Path, *, lease: float, poll: float) -> None:
        # A folder of its own: as on another host, no tombstone reaches it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.leased", url, str(folder), str(lease), str(poll)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        )

    def ready(self) -> None:
        """Wait until it has polled for the first time."""
        assert self.said() == "ready"

    def tell(self, login: str, secret: str) -> None:
        """Have it verify a pair."""
        assert self._process.stdin is not None
        print(login, secret, file=self._process.stdin, flush=True)

    def said(self) -> str:
        """Wait for its answer."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def ask(self, login: str, secret: str) -> str:
        """Do both."""
        self.tell(login, secret)
        return self.said()

    def stop(self) -> None:
        """Stop it where it is."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def go_on(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """Close it: it deregisters."""
        self.go_on()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def kill(self) -> None:
        """End it as a crash does."""
        self._process.kill()
        self.end()


class Proxy:
    """Stands between one verifier and the database, on a Unix socket; `cut` drops everything.

    Connections stay open and new ones are taken: nobody is told that nothing comes through.
    """

    def __init__(self, folder: Path, url: str) -> None:
        parsed = make_url(url)
        self._there = f"{parsed.query['host']}/.s.PGSQL.{parsed.port or 5432}"
        self.url = parsed.update_query_dict({"host": str(folder)}).render_as_string(
            hide_password=False
        )
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(f"{folder}/.s.PGSQL.{parsed.port or 5432}")
        self._listening.listen()
        self._cut = threading.Event()
        self._ended = threading.Event()
        self._pairs: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Drop what comes from now on."""
        self._cut.set()

    def mend(self) -> None:
        """Let new connections through; those from before stay dead."""
        for one in self._pairs:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._cut.clear()

    def close(self) -> None:
        """End it."""
        self._ended.set()
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        for one in [self._listening, *self._pairs]:
            one.close()

    def _serve(self) -> None:
        while not self._ended.is_set():
            try:
                here, _ = self._listening.accept()
            except OSError:
                return
            there = socket.socket(socket.AF_UNIX)
            there.connect(self._there)
            self._pairs += [here, there]
            threading.Thread(target=self._carry, args=[here, there], daemon=True).start()

    def _carry(self, here: socket.socket, there: socket.socket) -> None:
        with selectors.DefaultSelector() as watching:
            watching.register(here, selectors.EVENT_READ, there)
            watching.register(there, selectors.EVENT_READ, here)
            while not self._ended.is_set():
                for key, _ in watching.select(0.5):
                    try:
                        data = key.fileobj.recv(65536)  # type: ignore[union-attr]
                        if not self._cut.is_set() and data:
                            key.data.sendall(data)
                    except OSError:
                        return
                    if not data:
                        with suppress(OSError):
                            key.data.shutdown(socket.SHUT_RDWR)
                        return


def main() -> None:
    """Answer until the input ends."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    url, folder, lease, poll = sys.argv[1:]
    leasing = Leasing(
        id=secrets.token_hex(16),
        host="tests",
        release="1",
        lease=timedelta(seconds=float(lease)),
        poll=timedelta(seconds=float(poll)),
    )
    verifier = Verifier.open(
        url,
        state_dir=Path(folder),
        clock=RealClock(),
        hashing=Hashing(cost=CHEAP_FOR_TESTS),
        leasing=leasing,
    )
    freshness = verifier._freshness
    assert isinstance(freshness, Leased)
    assert freshness.wait(30)
    print("ready", flush=True)
    for line in sys.stdin:
        print(answer(verifier, *line.split()), flush=True)
    verifier.close()


if __name__ == "__main__":
    main()
