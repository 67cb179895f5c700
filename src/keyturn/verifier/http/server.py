"""Where the service listens: TCP with TLS or on loopback, and a Unix socket.

One event loop answers; several processes may share an address (SO_REUSEPORT, socket(7)). A certificate
that was renewed is shown to the next connection, and no connection is dropped for it.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import resource
import socket
import ssl
import stat
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog
import uvloop

from keyturn.errors import ConfigError
from keyturn.verifier.http.callers import Callers
from keyturn.verifier.http.connection import Connection, Handshake, Registry
from keyturn.verifier.http.desk import Desk

SWEEP = 1.0  # seconds between two looks at deadlines
FAREWELL = 5.0  # seconds for answers that are owed at the end
MOST = 8192  # connections at once, where the process may open that many files
TURN = 0.0002  # seconds that a thread may keep the interpreter while others wait: one for each request read
SPARE = 128  # descriptors for everything else
_BACKLOG = 1024
_HINTS = {
    errno.EADDRNOTAVAIL: "this host does not have that address: ip address",
    errno.EACCES: "take a port above 1023, or put a gateway before it",
}
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One address to listen at."""

    socket: socket.socket
    context: Callable[[], ssl.SSLContext] | None = None  # asked for each connection


def room() -> int:
    """Raise the limit of open files as far as it goes, and return how many connections that allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST + SPARE
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(16, min(MOST, soft - SPARE))


def settle() -> None:
    """Leave what is loaded out of every later search for garbage; once, before the first answer.

    All of a service's modules were searched each time that its memory had grown by a quarter, and
    nobody was answered meanwhile.
    """
    gc.collect()
    gc.freeze()


def listen_tcp(host: str, port: int) -> socket.socket:
    """Take an address; port 0 is any. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise ConfigError(
            f"verifier.listen: {host}:{port} cannot be used ({error.strerror or error})",
            hint=_HINTS.get(error.errno or 0, "see who listens there: ss -ltnp"),
        ) from None
    return found


def listen_unix(path: Path, *, group: int = -1, replace: bool = False) -> socket.socket:
    """Make a socket that its group may use, in the place of one that nobody serves any more.

    With `replace` one that is served may be ours from before: it keeps its connections, and new ones
    come here. Raises ConfigError.
    """
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made = path.with_name(f".v{os.getpid()}")  # shorter than most names: paths of sockets are short
    try:
        _make_room(path, replace=replace)
        made.unlink(missing_ok=True)
        before = os.umask(0o177)  # nobody may connect before it has its group
        try:
            found.bind(os.fspath(made))
        finally:
            os.umask(before)
        os.chown(made, -1, group)
        made.chmod(0o660)
        found.listen(_BACKLOG)  # nobody who comes by the path must be turned away
        made.replace(path)
    except OSError as error:
        found.close()
        raise ConfigError(
            f"verifier.listen: {path} cannot be used ({error.strerror or error})",
            hint="its folder must be there and writable, and no other process may serve it",
        ) from None
    return found


def _make_room(path: Path, *, replace: bool) -> None:
    """Raise FileExistsError where the path is no socket, or one that another process serves."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(errno.EEXIST, "it is there, and no socket")
        if replace:
            return
        with (
            suppress(ConnectionRefusedError),
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe,
        ):
            probe.connect(os.fspath(path))
            raise FileExistsError(errno.EEXIST, "another process serves it")


class Server:
    """Serves a desk at places, from `run` to `stop`."""

    def __init__(
        self,
        desk: Desk,
        callers: Callers,
        places: Sequence[Place],
        *,
        registry: Registry | None = None,
        refresh: Callable[[], None] = lambda: None,
        serving: Callable[[], None] = lambda: None,
    ) -> None:
        """`refresh` is called every second, `serving` once it answers; both are quick."""
        self._desk = desk
        self._callers = callers
        self._places = places
        self.registry = Registry(most=room()) if registry is None else registry
        self._refresh = refresh
        self._serving = serving
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Event | None = None
        self._stopped = threading.Event()

    def run(self) -> None:
        """Answer until `stop`; what is owed then is still answered."""
        # Threads that are ready take turns: in a burst of first uses the loop waited 80 turns of 5 ms.
        sys.setswitchinterval(TURN)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._run())

    def stop(self) -> None:
        """End; from any thread, also before the start."""
        self._stopped.set()
        loop, ended = self._loop, self._ended
        if loop is not None and ended is not None:
            with suppress(RuntimeError):  # the loop is over
                loop.call_soon_threadsafe(ended.set)

    async def _run(self) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        self._desk.open(self._loop)
        self.registry.sweep(self._loop.time())  # until then nobody who rests has a time
        servers = [await self._serve(self._loop, place) for place in self._places]
        tasks = [self._loop.create_task(one()) for one in (self._sweep, self._keep_fresh)]
        self._serving()
        if not self._stopped.is_set():
            await self._ended.wait()
        for server in servers:
            server.close()
        self.registry.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL):
                while len(self.registry):
                    await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        self.registry.drop()

    async def _serve(self, loop: asyncio.AbstractEventLoop, place: Place) -> asyncio.Server:
        def connection() -> Connection:
            return Connection(self._desk, self.registry, self._callers)

        def handshake() -> Handshake:
            return Handshake(connection, place.context, self.registry)

        factory = connection if place.context is None else handshake
        if place.socket.family == socket.AF_UNIX:
            return await loop.create_unix_server(factory, sock=place.socket, backlog=_BACKLOG)
        return await loop.create_server(factory, sock=place.socket, backlog=_BACKLOG)

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP)
            self.registry.sweep(loop.time())

    async def _keep_fresh(self) -> None:
        # Not by the sweeper: a store that hangs must not keep deadlines from being kept.
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP)
            try:
                await loop.run_in_executor(None, self._refresh)
            except Exception:  # noqa: BLE001  # loop top: deadlines must go on
                _log.error("verifier.refresh-failed", exc_info=True)
