"""Reaches a stand-in under the real service's name: names resolve as one says, for one process.

The adapters know nothing of it: addresses, certificates and challenges are checked for the names of
the real service. For a process of its own:

    python -m keyturn.testing.resolver 'example.vault.azure.net:443=127.0.0.1:9443,…' MODULE [ARGS…]
"""

from __future__ import annotations

import contextlib
import runpy
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Any

Place = tuple[str, int]  # a host, or its address, and a port


@contextlib.contextmanager
def resolving(places: Mapping[Place, Place]) -> Iterator[None]:
    """Let these names and addresses lead to addresses of loopback until the block ends."""
    ask = socket.getaddrinfo

    def answer(host: Any, port: Any, *more: Any, **named: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        found = places.get((name, int(port or 0)))
        return ask(*(found or (host, port)), *more, **named)

    socket.getaddrinfo = answer
    try:
        yield
    finally:
        socket.getaddrinfo = ask


def as_text(places: Mapping[Place, Place]) -> str:
    """Write places as an argument of this module."""
    return ",".join(f"{a}:{b}={c}:{d}" for (a, b), (c, d) in places.items())


def from_text(text: str) -> dict[Place, Place]:
    """Read what `as_text` wrote. Raises ValueError."""
    pairs = (pair.split("=") for pair in text.split(","))
    return {_place(name): _place(to) for name, to in pairs}


def _place(text: str) -> Place:
    host, _, port = text.rpartition(":")
    return host, int(port)


if __name__ == "__main__":
    with resolving(from_text(sys.argv[1])):
        sys.argv = sys.argv[2:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
