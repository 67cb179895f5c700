"""Bytes to requests and answers to bytes: one connection, and what it may hold for how long.

llhttp reads the protocol (httptools), strictly: a request with two lengths, or a broken chunk, is none.
Requests that come together are answered one after the other, in their order.

SECURITY: neither uvicorn nor granian closes all of silent, half-headed and half-bodied connections; here
each one has an instant at which it goes, whatever it is at.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any, cast

import httptools

from keyturn.verifier.http.callers import Caller, Callers
from keyturn.verifier.http.desk import Desk
from keyturn.verifier.http.messages import Answer, Request, date_line
from keyturn.verifier.http.routes import problem, route_of

REQUEST_DEADLINE = 10.0  # seconds for all of a request, from the connection's or its first byte on
IDLE = 75.0  # seconds between two requests; nginx keeps its upstreams for 60
HEAD_LIMIT = 16 * 1024  # bytes
BODY_LIMIT = 16 * 1024
IGNORED_LIMIT = 1024 * 1024  # of a body that nobody reads
HEADERS = 64
LINGER = 1.0  # seconds in which a last answer can arrive
AHEAD = 64  # requests that wait for the answer to the one before
_AT_ONCE = 16 * 1024  # bytes that are read before a limit is looked at
_ROOM = 64  # of so many connections one goes, where all places are taken and another one comes
_LOOKED_AT = frozenset({b"host", b"expect", b"transfer-encoding"})
_NEVER = float("inf")
_EXPECT = b"HTTP/1.1 100 Continue\r\n\r\n"
_TOO_LARGE = {
    limit: problem(413, "invalid_request", f"a body above {limit} bytes")
    for limit in (BODY_LIMIT, IGNORED_LIMIT)
}
_TOO_MANY = problem(431, "invalid_request", "too many headers, or too long ones")
_BROKEN = problem(400, "invalid_request", "no HTTP/1.1 request")


class Registry:
    """All connections of a server, and the clock that they share."""

    def __init__(
        self, *, most: int, deadline: float = REQUEST_DEADLINE, idle: float = IDLE
    ) -> None:
        """`most` at once; `deadline` and `idle` in seconds."""
        self.most = most
        self.deadline = deadline
        self.idle = idle
        self.draining = False
        self.date = date_line(time.time())
        self.rested = _NEVER  # when who rests from now on is dropped; exact to a sweep
        self._all: dict[Held, None] = {}  # the oldest first
        self._new: dict[Held, None] = {}  # those that have not asked anything yet

    def __len__(self) -> int:
        return len(self._all)

    def add(self, one: Held) -> None:
        """Take one in; where there are too many one goes that has asked nothing, or rests longest."""
        self._all[one] = self._new[one] = None
        if len(self._all) > self.most:
            self._make_room(one)

    def _make_room(self, newest: Held) -> None:
        if len(self._new) > 1:
            next(iter(self._new)).drop()
            return
        # Whoever is owed an answer stays. Several go at once: this looks at all of them.
        resting = [one for one in self._all if one.until < _NEVER and one is not newest]
        resting.sort(key=lambda one: one.until)
        for one in resting[: max(1, self.most // _ROOM)] or [newest]:
            one.drop()

    def useful(self, one: Held) -> None:
        """Note that it has asked something."""
        self._new.pop(one, None)

    def remove(self, one: Held) -> None:
        """Forget one."""
        self._all.pop(one, None)
        self._new.pop(one, None)

    def sweep(self, now: float) -> None:
        """Drop those whose time is over, and turn the date."""
        self.date = date_line(time.time())
        self.rested = now + self.idle
        for one in [one for one in self._all if one.until < now]:
            one.drop()

    def drop(self) -> None:
        """Drop all."""
        for one in list(self._all):
            one.drop()

    def drain(self) -> None:
        """Close what is idle; the others close after their answer."""
        self.draining = True
        for one in list(self._all):
            one.leave()


class Held:
    """Something that holds a descriptor until an instant of the loop's clock."""

    until: float = _NEVER

    def drop(self) -> None:
        """Close it now."""
        raise NotImplementedError

    def leave(self) -> None:
        """Close it as soon as it owes nothing."""
        raise NotImplementedError


class Connection(asyncio.Protocol, Held):
    """One client."""

    def __init__(self, desk: Desk, registry: Registry, callers: Callers) -> None:
        self._desk = desk
        self._registry = registry
        self._callers = callers
        self._loop = asyncio.get_running_loop()
        self._parser: Any = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._early: list[bytes] = []  # what came with the end of a handshake
        self._request = Request()
        self._body = bytearray()  # not a list: bytes that come one by one cost 50 times their size
        self._size = 0  # of the body so far, also of one that nobody reads
        self._framing = (
            0  # bytes of this request that are no body: lines, headers, chunks, trailers
        )
        self._in_head = False
        self._begun = False
        self._stuck = False  # it does not read its answers
        self._complete = 0
        self._queue: deque[Request] = deque()
        self._busy = False
        self._ending = False
        self._useful = False
        self.certified: Caller | None = None

    # --- the transport ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        if self._ending:
            return  # it hung up at the end of its handshake, and holds nothing
        self._transport = cast("asyncio.Transport", transport)
        self.until = self._loop.time() + self._registry.deadline
        self.certified = self._callers.by_certificate(transport.get_extra_info("peercert"))
        self._registry.add(self)
        for data in self._early:
            self.data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._registry.remove(self)
        self._ending = True
        self._transport = None
        self._parser = None
        self._queue.clear()

    def pause_writing(self) -> None:
        """Read nothing more from who does not read; it has the time of a request for that."""
        if self._transport is not None:
            self._stuck = True
            self._transport.pause_reading()
            self.until = self._loop.time() + self._registry.deadline

    def resume_writing(self) -> None:
        """Go on."""
        self._stuck = False
        if self._transport is None or self._ending:
            return
        if len(self._queue) < AHEAD:
            self._transport.resume_reading()
        if not self._busy:
            self._rest()
            self._next()

    def drop(self) -> None:
        """Close it now; what was asked is not answered any more."""
        self._registry.remove(self)
        if self._transport is not None:
            self._transport.abort()

    def leave(self) -> None:
        """Close it if it owes no answer."""
        if not self._busy and not self._begun and self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        """Read."""
        if self._transport is None:
            self._early.append(data)
            return
        if len(data) > _AT_ONCE:
            for at in range(0, len(data), _AT_ONCE):
                self.data_received(data[at : at + _AT_ONCE])
            return
        if self._ending:
            return
        complete, begun = self._complete, self._begun
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._ending = True  # h2c and the like are not for us; what was asked is answered
        except httptools.HttpParserCallbackError:
            raise
        except httptools.HttpParserError:
            self._refuse(_BROKEN)
            return
        if not self._begun:
            return
        if not begun and not self._busy:
            self.until = self._loop.time() + self._registry.deadline
        if self._complete == complete:
            self._framing += len(data)
            if self._framing > HEAD_LIMIT:
                self._refuse(_TOO_MANY)

    # --- the parser -------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._request, self._size, self._framing = Request(), 0, 0
        self._in_head = self._begun = True

    def on_url(self, url: bytes) -> None:
        """Take a part of the target."""
        self._request.path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        if not self._in_head:
            return  # SECURITY: a trailer is no header (RFC 9110, 6.5.1)
        name, request = name.lower(), self._request
        if name == b"authorization":
            request.authorization.append(value)
        else:
            request.headers.append((name, value))
            if len(request.headers) > HEADERS:
                request.headers.clear()
                self._refuse(_TOO_MANY)

    def on_headers_complete(self) -> None:
        """Look whether the body may come."""
        request = self._request
        request.method = self._parser.get_method()
        if b"?" in request.path:
            request.path, _, _ = request.path.partition(b"?")
            request.query = True
        if request.path[:1] != b"/":
            request.path = _origin_form(request.path)
        request.keep_alive = self._parser.should_keep_alive()
        self._in_head = False
        special = [pair for pair in request.headers if pair[0] in _LOOKED_AT]
        usual = len(special) == 1 and special[0][0] == b"host" and request.keep_alive
        if not usual or request.method == b"CONNECT":
            self._look_closer(request, special)

    def _look_closer(self, request: Request, special: list[tuple[bytes, bytes]]) -> None:
        """Refuse what two servers may understand in two ways, and let a body come."""
        version = self._parser.get_http_version()
        values = dict(special)
        coding = values.get(b"transfer-encoding", b"chunked").strip().lower()
        if (
            version not in ("1.0", "1.1")
            or len(values) != len(special)  # also of Host (RFC 9112, 3.2)
            or (version == "1.1" and b"host" not in values)
            or coding != b"chunked"
            or (version == "1.0" and b"transfer-encoding" in values)  # RFC 9112, 6.1
            or request.method == b"CONNECT"
        ):
            self._refuse(_BROKEN)
        elif values.get(b"expect", b"").lower() == b"100-continue" and version == "1.1":
            self._let_come(request)

    def _let_come(self, request: Request) -> None:
        length, limit = b"".join(request.header(b"content-length")), _limit(request)
        if len(length) > 9 or int(length or b"0") > limit:
            self._refuse(_TOO_LARGE[limit])
        elif self._transport is not None and not (self._ending or self._busy):
            # With an answer still owed this would pass for a part of that one.
            self._transport.write(_EXPECT)

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._size += len(body)
        self._framing -= len(body)
        limit = _limit(self._request)
        if self._size > limit:
            self._body.clear()
            self._refuse(_TOO_LARGE[limit])
        elif limit == BODY_LIMIT:
            self._body += body

    def on_message_complete(self) -> None:
        """Hand the request over, or let it wait for the one before."""
        request = self._request
        if self._body:
            request.body = bytes(self._body)
            self._body = bytearray()
        self._begun = False
        self._complete += 1
        if self._ending:
            return
        if self._busy or self._stuck:
            self._wait(request)
        else:
            self._hand_over(request)

    def _wait(self, request: Request) -> None:
        if len(self._queue) > AHEAD:
            return  # the one before is the last one
        self._queue.append(request)
        if len(self._queue) == AHEAD and self._transport is not None:
            self._transport.pause_reading()
        elif len(self._queue) > AHEAD:
            request.keep_alive = False

    # --- answers ----------------------------------------------------------------------------

    def reply(self, request: Request, answer: Answer) -> None:
        """Send an answer, and go on with the next request."""
        self._busy = False
        transport = self._transport
        if transport is None:
            return
        if request.method == b"HEAD":
            answer = answer.without_body()
        if not request.keep_alive or self._ending or self._registry.draining:
            self._ending = True
            self.until = self._loop.time() + LINGER
            transport.write(answer.last(self._registry.date))
            transport.close()
            return
        transport.write(answer.kept_alive(self._registry.date))
        if self._stuck:
            return  # it has its time already
        self._rest()
        if self._queue:
            self._next()

    def _rest(self) -> None:
        if self._begun:
            self.until = self._loop.time() + self._registry.deadline
        else:
            self.until = self._registry.rested

    def _hand_over(self, request: Request) -> None:
        self._busy = True
        self.until = _NEVER
        if not self._useful:
            self._useful = True
            self._registry.useful(self)
        self._desk.take(self, request)

    def _next(self) -> None:
        if self._queue and not self._busy:
            request = self._queue.popleft()
            if len(self._queue) == AHEAD - 1 and self._transport is not None:
                self._transport.resume_reading()
            self._hand_over(request)

    def _refuse(self, answer: Answer) -> None:
        """Say what is wrong with what is being read, and read no more."""
        if self._ending or self._transport is None:
            return
        self._ending = True
        if self._busy:
            return  # the answer to an earlier request is the last one
        self._transport.write(answer.last(self._registry.date))
        self.until = self._loop.time() + LINGER
        if self._transport.can_write_eof():
            self._transport.write_eof()  # closed with bytes unread, the answer might not arrive
        else:
            self._transport.close()


def _limit(request: Request) -> int:
    route = route_of(request.path)
    return IGNORED_LIMIT if route is not None and route.header_only else BODY_LIMIT


def _origin_form(target: bytes) -> bytes:
    """Return the path of an absolute target (RFC 9112, 3.2.2); of any other one that is nowhere."""
    scheme, mark, rest = target.partition(b"://")
    if not mark or scheme.lower() not in (b"http", b"https"):
        return b""
    return b"/" + rest.partition(b"/")[2]


class Handshake(asyncio.Protocol, Held):
    """A client that has not finished its handshake: it has a time, and a place among the others."""

    def __init__(self, make: Any, context: Any, registry: Registry) -> None:
        self._make = make
        self._context = context
        self._registry = registry
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self._early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the handshake."""
        loop = asyncio.get_running_loop()
        self._transport = cast("asyncio.Transport", transport)
        self.until = loop.time() + self._registry.deadline
        self._registry.add(self)
        self._task = loop.create_task(self._upgrade(loop, self._transport))
        # uvloop starts to read after this call, so the client's hello may come to us: the handshake
        # gets it as soon as it has begun, before anything else is read. It is paused until then.
        loop.call_soon(loop.call_soon, self._hand_on)

    def data_received(self, data: bytes) -> None:
        """Keep what was read too early."""
        self._early.append(data)

    def _hand_on(self) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        protocol: Any = self._transport.get_protocol()
        for data in self._early:
            view = memoryview(data)
            while view and protocol is not self:
                room = protocol.get_buffer(len(view))[: len(view)]
                room[:] = view[: len(room)]
                protocol.buffer_updated(len(room))
                view = view[len(room) :]
        self._early.clear()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._registry.remove(self)

    def drop(self) -> None:
        """Close it now."""
        self._registry.remove(self)
        if self._task is not None:
            self._task.cancel()
        if self._transport is not None:
            self._transport.abort()

    def leave(self) -> None:
        """Close it: nothing was asked."""
        self.drop()

    async def _upgrade(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport) -> None:
        connection = self._make()
        try:
            secured = await loop.start_tls(
                transport,
                connection,
                self._context(),
                server_side=True,
                ssl_handshake_timeout=self._registry.deadline,
            )
        except (OSError, asyncio.CancelledError):
            transport.abort()
            return
        finally:
            self._registry.remove(self)
        if secured is not None:  # None where the client has gone
            connection.connection_made(secured)
