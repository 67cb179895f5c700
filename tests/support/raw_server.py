"""A server of bare sockets: for answers that no HTTP library would give."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def listening(
    answer: Callable[[socket.socket], None], *, tls: ssl.SSLContext | None = None
) -> Iterator[int]:
    """Answer each connection by a function in a thread of its own; gives the port."""
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.1)
    ended = threading.Event()
    threads: list[threading.Thread] = []

    def handle(line: socket.socket) -> None:
        with contextlib.suppress(OSError):
            line.settimeout(1.5)
            with tls.wrap_socket(line, server_side=True) if tls else line as spoken:
                answer(spoken)

    def serve() -> None:
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                line, _ = server.accept()
                threads.append(threading.Thread(target=handle, args=(line,), daemon=True))
                threads[-1].start()

    accepting = threading.Thread(target=serve, daemon=True)
    accepting.start()
    try:
        yield server.getsockname()[1]
    finally:
        ended.set()
        for one in (accepting, *threads):
            one.join(12)
        server.close()


def dripping(drips: threading.Event, begin: bytes, then: bytes) -> Callable[[socket.socket], None]:
    """Answer a byte at a time as long as `drips` is set, after `begin`; else with `then`."""

    def answer(line: socket.socket) -> None:
        while line.recv(65536):
            if drips.is_set():
                line.sendall(begin)
            while drips.is_set():
                line.sendall(b" " if begin else b"H")
                time.sleep(0.3)
            line.sendall(then)

    return answer


BEGINNINGS = {
    "status": b"",
    "headers": b"HTTP/1.1 200 OK\r\nX-A: ",
    "body": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n",
}
