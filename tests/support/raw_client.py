"""Bytes to a server and bytes back, for tests of what no client library would send."""

from __future__ import annotations

import re
import selectors
import socket
import ssl
import time
from collections.abc import Sequence

_STATUS = re.compile(rb"HTTP/1\.1 ([0-9]{3})")


def statuses(data: bytes) -> list[int]:
    """Return the status of each answer in a stream; bodies of ours have no such line."""
    return [int(found) for found in _STATUS.findall(data)]


def connect(port: int) -> socket.socket:
    """Open a connection."""
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def exchange(
    port: int, data: bytes, *, context: ssl.SSLContext | None = None, size: int = 0
) -> bytes:
    """Send, and return everything until the server closes; `size` is a piece of it at a time."""
    one = connect(port)
    if context is not None:
        one = context.wrap_socket(one)
    with one:
        try:
            for at in range(0, len(data), size or max(1, len(data))):
                one.sendall(data[at : at + size] if size else data)
        except OSError:
            pass  # it has closed already; what it said is still there
        found = bytearray()
        try:
            while piece := one.recv(65536):
                found += piece
        except OSError:
            pass
        return bytes(found)


def wait_until_closed(held: Sequence[socket.socket], *, within: float) -> list[float]:
    """Return after how many seconds each of these was closed; `inf` for one that was not."""
    began, closed = time.monotonic(), dict.fromkeys(held, float("inf"))
    with selectors.DefaultSelector() as selector:
        for one in held:
            one.setblocking(False)
            selector.register(one, selectors.EVENT_READ)
        left = len(held)
        while left and (rest := began + within - time.monotonic()) > 0:
            for key, _ in selector.select(rest):
                try:
                    ended = not key.fileobj.recv(65536)  # type: ignore[union-attr]
                except BlockingIOError:
                    continue
                except OSError:
                    ended = True
                if ended:
                    closed[key.fileobj] = time.monotonic() - began  # type: ignore[index]
                    selector.unregister(key.fileobj)
                    left -= 1
    return list(closed.values())
