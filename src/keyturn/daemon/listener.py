"""A small HTTP listener for probes and scrapes: one request a connection, and limits on everything.

A thread of its own with an event loop; h11 reads and writes the protocol. Whoever is silent, slow or
broken holds a connection for `DEADLINE` at most, and where all are taken the oldest one goes: so no
crowd keeps a scrape out, and none of it costs the daemon a thread.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import h11
import structlog

from keyturn.config.listening import ListenSettings
from keyturn.daemon.certificates import Certificates
from keyturn.errors import ConfigError

DEADLINE = 10.0  # seconds for all of a connection: handshake, request, answer, farewell
MOST = 200  # connections at once; the process may open 1024 files, and sagas need some
HEAD_LIMIT = 16 * 1024  # bytes
BODY_LIMIT = 64 * 1024  # bytes that are read of a body, to be thrown away
LINGER = 1.0  # seconds for that
BIND_AGAIN = 1.0
_CHUNK = 4096
_BACKLOG = 256
_OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What is sent back. `allow` names the methods where another one was used."""

    status: int
    kind: str
    body: bytes
    allow: str = ""


Handler = Callable[[str, str, str], Answer]  # method, target and Accept; quick, it holds the loop


class Listener:
    """Answers at one address from `start` to `close`."""

    def __init__(
        self,
        settings: ListenSettings,
        handler: Handler,
        *,
        deadline: float = DEADLINE,
        most: int = MOST,
    ) -> None:
        """`deadline` in seconds, `most` connections at once. Raises ConfigError for unusable files."""
        self._settings = settings
        self._handler = handler
        self._deadline = deadline
        self._most = most
        self._certificates = Certificates(settings.tls) if settings.tls else None
        self._open: dict[asyncio.Task[None], None] = {}  # the oldest first
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[None] | None = None
        self._running = threading.Event()
        self._thread = threading.Thread(target=self._live, name="http-listener", daemon=True)
        self._socket: socket.socket | None = None
        self.refused: ConfigError | None = None

    def start(self) -> None:
        """Take the address and begin to answer.

        Where another process has it, `refused` says so and it is tried again until it is free: a
        standby on the leader's host gets it with the lead. Raises ConfigError for an address that
        this host does not have, or may not have.
        """
        try:
            self._socket = self._bind()
        except OSError as error:
            self.refused = self._explained(error)
            if error.errno != errno.EADDRINUSE:
                raise self.refused from None
        self._thread.start()
        self._running.wait()

    @property
    def port(self) -> int:
        """The port that was taken, 0 while there is none."""
        return int(self._socket.getsockname()[1]) if self._socket else 0

    def close(self) -> None:
        """End it, with every connection. Does nothing where it was not started."""
        if self._loop is not None and self._main is not None:
            with suppress(RuntimeError):  # it has ended by itself
                self._loop.call_soon_threadsafe(self._main.cancel)
            self._thread.join(5.0)
        if self._socket is not None:
            self._socket.close()

    # --- the address ------------------------------------------------------------------------

    def _bind(self) -> socket.socket:
        host = self._settings.host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((host, self._settings.port))
            made.listen(_BACKLOG)
        except OSError:
            made.close()
            raise
        made.setblocking(False)
        return made

    def _explained(self, error: OSError) -> ConfigError:
        address, port = self._settings.address, self._settings.port
        if error.errno == errno.EADDRINUSE:
            return ConfigError(
                f"listen.address: {address} is taken by another process",
                hint=f"`ss -ltnp 'sport = :{port}'` shows it; end it, or choose another port",
            )
        return ConfigError(
            f"listen.address: cannot listen at {address} (errno {error.errno})",
            hint="choose an address of this host, and a port from 1024 on unless it starts as root",
        )

    async def _bound(self) -> socket.socket:
        while self._socket is None:
            await asyncio.sleep(BIND_AGAIN)
            with suppress(OSError):
                self._socket = self._bind()
                self.refused = None
                _log.info("listener.address-taken", address=self._settings.address)
        return self._socket

    # --- the loop ---------------------------------------------------------------------------

    def _live(self) -> None:
        try:
            with suppress(asyncio.CancelledError):
                asyncio.run(self._accept())
        except Exception:  # noqa: BLE001  # thread top: rotation goes on without it
            _log.error("listener.ended", exc_info=True)
        finally:
            self._running.set()

    async def _accept(self) -> None:
        self._loop, self._main = asyncio.get_running_loop(), asyncio.current_task()
        self._loop.set_exception_handler(_say_type)
        self._running.set()
        listener = await self._bound()
        try:
            while True:
                try:
                    connection, _ = await self._loop.sock_accept(listener)
                except OSError as error:
                    if error.errno in _OUT_OF_DESCRIPTORS:
                        self._evict()
                    await asyncio.sleep(0.05)  # accept() would fail at once again and again
                    continue
                self._admit(connection)
                await asyncio.sleep(0)  # a full backlog must not keep the others from their turn
        finally:
            await self._end_all()

    def _admit(self, connection: socket.socket) -> None:
        if len(self._open) >= self._most:
            self._evict()
        task = asyncio.get_running_loop().create_task(self._serve(connection))
        self._open[task] = None
        task.add_done_callback(lambda done: self._open.pop(done, None))

    def _evict(self) -> None:
        """End the oldest connection: a good one is answered in milliseconds and is not among them."""
        for task in self._open:
            del self._open[task]
            task.cancel()
            return

    async def _end_all(self) -> None:
        tasks = list(self._open)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- one connection ---------------------------------------------------------------------

    async def _serve(self, connection: socket.socket) -> None:
        try:
            async with asyncio.timeout(self._deadline):
                await self._talk(connection)
        except OSError:  # among them TimeoutError and what TLS refuses
            pass
        except Exception:  # noqa: BLE001  # loop top: one caller must not close it for all
            _log.error("listener.connection", exc_info=True)

    async def _talk(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=HEAD_LIMIT)
        protocol = asyncio.StreamReaderProtocol(reader)
        tls = self._certificates.context() if self._certificates else None
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, connection, ssl=tls)
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        try:
            await self._exchange(reader, writer)
            writer.close()
            await writer.wait_closed()
        finally:
            transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_LIMIT)
        try:
            request = await _request(parser, reader)
            more = request is not None and not isinstance(parser.next_event(), h11.EndOfMessage)
        except h11.RemoteProtocolError as error:
            if parser.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                answer = Answer(status=error.error_status_hint, kind="text/plain", body=b"")
                await _send(parser, writer, answer)
            return
        if request is None:
            return
        method, target = request.method.decode(), request.target.decode("ascii", "replace")
        accept = b", ".join(value for name, value in request.headers if name == b"accept")
        answer = self._handler(method, target, accept.decode("latin-1"))
        await _send(parser, writer, answer, with_body=method != "HEAD")
        if more:
            await _discard(reader, writer)


async def _request(parser: h11.Connection, reader: asyncio.StreamReader) -> h11.Request | None:
    """Read the head of a request; None where the caller hung up. Raises RemoteProtocolError."""
    while (event := parser.next_event()) is h11.NEED_DATA:
        parser.receive_data(await reader.read(_CHUNK))
    return event if isinstance(event, h11.Request) else None


async def _send(
    parser: h11.Connection, writer: asyncio.StreamWriter, answer: Answer, *, with_body: bool = True
) -> None:
    headers = [
        ("Content-Type", answer.kind),
        ("Content-Length", str(len(answer.body))),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("Connection", "close"),
    ]
    if answer.allow:
        headers.append(("Allow", answer.allow))
    parts = [parser.send(h11.Response(status_code=answer.status, headers=headers))]
    if with_body:
        parts.append(parser.send(h11.Data(data=answer.body)))
        parts.append(parser.send(h11.EndOfMessage()))
    writer.write(b"".join(part for part in parts if part))
    await writer.drain()


async def _discard(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read what else is sent: closing on it would take the answer away from its reader."""
    if writer.can_write_eof():
        writer.write_eof()
    left = BODY_LIMIT
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while left > 0 and (data := await reader.read(_CHUNK)):
                left -= len(data)


def _say_type(_loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    """Log what asyncio would print with a traceback: strangers cause most of it."""
    error = context.get("exception")
    if not isinstance(error, OSError):
        _log.warning("listener.loop", error=type(error).__name__)
