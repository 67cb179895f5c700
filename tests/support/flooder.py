"""Floods a verifier in a process of its own: `python -m support.flooder PORT RATE CONNECTIONS`.

Reads headers Authorization, one a line, until an empty one; then sends them in turn, so many a second,
until its input ends. Prints how many answers of each status there were, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from itertools import count
from typing import cast

import uvloop


class One(asyncio.Protocol):
    """A connection that sends the next one when it was answered and it is time."""

    def __init__(self, flood: Flood) -> None:
        self.flood = flood

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = cast("asyncio.Transport", transport)
        self.next()

    def next(self) -> None:
        """Send the next one when it is due."""
        n = next(self.flood.number)
        delay = self.flood.began + n / self.flood.rate - time.monotonic()
        request = self.flood.requests[n % len(self.flood.requests)]
        if delay > 0.001:
            self.flood.loop.call_later(delay, self.transport.write, request)
        else:
            self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Count an answer; each comes as one piece."""
        self.flood.seen[data[9:12].decode()] += 1
        if self.flood.over:
            self.transport.close()
        else:
            self.next()


class Flood:
    """All that its connections share."""

    def __init__(self, rate: float, headers: list[str]) -> None:
        self.loop, self.rate, self.over = asyncio.get_running_loop(), rate, False
        self.requests = [
            f"POST /v1/verify HTTP/1.1\r\nHost: x\r\nAuthorization: {one}\r\n\r\n".encode()
            for one in headers
        ]
        self.seen, self.began, self.number = Counter[str](), time.monotonic(), count()


async def flood(port: int, rate: float, connections: int, headers: list[str]) -> Counter[str]:
    """Send until the input ends."""
    one = Flood(rate, headers)
    for _ in range(connections):
        await one.loop.create_connection(lambda: One(one), "127.0.0.1", port)
    print("flooding", flush=True)
    await one.loop.run_in_executor(None, sys.stdin.read)
    one.over = True
    return one.seen


def main() -> None:
    """Obey the arguments."""
    port, rate, connections = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    headers = [line.strip() for line in iter(sys.stdin.readline, "\n")]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(flood(port, rate, connections, headers))), flush=True)


if __name__ == "__main__":
    main()
