"""A recording proxy: stands between an adapter and a real server, and can lie, stall and hang up."""

from __future__ import annotations

import contextlib
import http.client
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from keyturn.testing.wire import Answer, Call, Forward, Server

_OWN_HEADERS = {"host", "connection", "content-length", "transfer-encoding", "accept-encoding"}


class StandbyBehind:
    """Plays a read-enabled standby that is behind: reads get the answer that was true at `freeze`.

    As at a real one of OpenBao, a read that asks for wrapping is forwarded to the leader, and so is
    every call of a token with a limited number of uses (`limited`); writes are forwarded anyway.
    """

    def __init__(self, *, limited: bool = False) -> None:
        self.limited = limited
        self.frozen = False
        self.replayed = 0
        self._known: dict[str, Answer] = {}

    def __call__(self, call: Call, forward: Forward) -> Answer:
        local = call.method == "GET" and "/data/" in call.path and not self.limited
        if not local or "x-vault-wrap-ttl" in call.headers:
            return forward(call)
        if self.frozen and call.target in self._known:
            self.replayed += 1
            return self._known[call.target]
        return forward(call)

    def freeze(self, path: str, answer: Answer) -> None:
        """From now on reads of this path get this answer."""
        self._known[path] = answer
        self.frozen = True


class Proxy(Server):
    """A server in front of `upstream`."""

    def __init__(
        self,
        upstream: str,
        *,
        ca_file: Path | None = None,
        certificate: tuple[Path, Path] | None = None,
    ) -> None:
        self.upstream = upstream
        self._trusted = ssl.create_default_context(cafile=str(ca_file)) if ca_file else None
        super().__init__(self.forward, certificate=certificate)

    def calls(self) -> list[str]:
        """Return what was asked, in order, as `METHOD path`."""
        return [f"{call.method} {call.target.removeprefix('/v1/')}" for call, _ in self.seen]

    def forward(self, call: Call) -> Answer:
        """Make the call at the real server."""
        to = urlsplit(self.upstream)
        if self._trusted is not None:
            line: http.client.HTTPConnection = http.client.HTTPSConnection(
                to.netloc, timeout=30, context=self._trusted
            )
        else:
            line = http.client.HTTPConnection(to.netloc, timeout=30)
        with contextlib.closing(line):
            headers = {k: v for k, v in call.headers.items() if k not in _OWN_HEADERS}
            line.request(call.method, call.target, body=call.body or None, headers=headers)
            found = line.getresponse()
            kept = {k: v for k, v in found.getheaders() if k.lower() not in _OWN_HEADERS}
            return Answer(status=found.status, headers=kept, body=found.read())


@contextlib.contextmanager
def recording_proxy(upstream: str, **more: Any) -> Iterator[Proxy]:
    """Give a proxy until the block ends."""
    one = Proxy(upstream, **more)
    try:
        yield one
    finally:
        one.close()
