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


async def flood(port: int, rate: float, connections: int, headers: list[str]) -> Counter[str]:
    """Send until the input ends."""
    seen: Counter[str] = Counter()
    began, number, over = time.monotonic(), count(), asyncio.Event()

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while not over.is_set():
            n = next(number)
            await asyncio.sleep(max(0.0, began + n / rate - time.monotonic()))
            header = headers[n % len(headers)]
            writer.write(
                f"POST /v1/verify HTTP/1.1\r\nHost: x\r\nAuthorization: {header}\r\n\r\n".encode()
            )
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            seen[head[9:12].decode()] += 1
        writer.close()

    running = [asyncio.create_task(one()) for _ in range(connections)]
    print("flooding", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    over.set()
    await asyncio.gather(*running)
    return seen


def main() -> None:
    """Obey the arguments."""
    port, rate, connections = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    headers = [line.strip() for line in iter(sys.stdin.readline, "\n")]
    print(json.dumps(asyncio.run(flood(port, rate, connections, headers))), flush=True)


if __name__ == "__main__":
    main()
