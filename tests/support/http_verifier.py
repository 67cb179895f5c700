"""A verifier over HTTP on a store of its own, in a thread of this process; `serve` for any other one."""

from __future__ import annotations

import base64
import http.client
import json
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keyturn.core.model import VersionState
from keyturn.core.secret import Secret, mint
from keyturn.storage.store import Store
from keyturn.verifier.decision import Verifier
from keyturn.verifier.hashing import CHEAP_FOR_TESTS, Hashing, tag
from keyturn.verifier.http.callers import Callers, RelyingParty
from keyturn.verifier.http.desk import Desk
from keyturn.verifier.http.server import Place, Server, listen_tcp, listen_unix
from support.cutter import open_store
from support.stores import RealClock, add, entry, version


@dataclass(frozen=True, kw_only=True)
class Held:
    """What an agent holds."""

    agent: str
    login: str
    version_id: str
    secret: Secret

    @property
    def basic(self) -> str:
        """The header Authorization."""
        return basic(self.login, self.secret.reveal())


def basic(login: str, secret: str) -> str:
    """Return a header Authorization as it is."""
    return "Basic " + base64.b64encode(f"{login}:{secret}".encode()).decode()


def fill(store: Store, names: Sequence[str], *, hashing: Hashing, seed: int = 1) -> list[Held]:
    """Give each of these agents a current version."""
    draw, held = random.Random(seed).randbytes, []
    for name in names:
        version_id, secret = mint(random_bytes=draw)
        add(store, name)
        first = version(
            f"cred-{name}",
            login=name,
            id=version_id,
            state=VersionState.CURRENT,
            digest=hashing.digest(secret),
            tag=tag(version_id, secret),
        )
        store.amend(f"cred-{name}", lambda case, v=first: (replace(case, versions=(v,)), [entry()]))
        held.append(Held(agent=name, login=name, version_id=version_id, secret=secret))
    return held


@dataclass(kw_only=True)
class Served:
    """A service that answers."""

    port: int
    verifier: Verifier
    desk: Desk
    server: Server
    store: Store
    held: list[Held]

    def ask(
        self,
        path: str,
        *,
        method: str = "POST",
        headers: Mapping[str, str] | None = None,
        body: bytes | str | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """Send one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body=body, headers=dict(headers or {}))
            found = connection.getresponse()
            return found.status, {k.lower(): v for k, v in found.getheaders()}, found.read()
        finally:
            connection.close()

    def verify(self, held: Held, **more: Any) -> tuple[int, Any]:
        """Ask about a secret in JSON."""
        content = json.dumps({"login": held.login, "secret": held.secret.reveal()} | more)
        status, _, body = self.ask(
            "/v1/verify", headers={"Content-Type": "application/json"}, body=content
        )
        return status, json.loads(body)


@contextmanager
def serve(
    verifier: Verifier,
    *,
    parties: Sequence[RelyingParty] = (),
    path: Path | None = None,
    **more: Any,
) -> Iterator[Any]:
    """Serve a verifier on loopback, or at a path, until the block ends; gives (port, desk, server)."""
    callers = Callers(parties)
    place = Place(socket=listen_unix(path) if path else listen_tcp("127.0.0.1", 0))
    desk = Desk(verifier, callers, threads=2, pages=lambda _path: None)
    ready = threading.Event()
    server = Server(desk, callers, [place], serving=ready.set, **more)
    thread = threading.Thread(target=server.run, name="served")
    thread.start()
    try:
        assert ready.wait(20)
        yield place.socket.getsockname()[1], desk, server
    finally:
        server.stop()
        thread.join(20)
        desk.close()


@contextmanager
def served(
    folder: Path,
    names: Sequence[str] = ("a",),
    *,
    hashing: Hashing | None = None,
    parties: Sequence[RelyingParty] = (),
    **more: Any,
) -> Iterator[Served]:
    """Serve a new store with these agents."""
    hashing = hashing or Hashing(cost=CHEAP_FOR_TESTS)
    store = open_store(folder, writer="w")
    (folder / "revoked.d").mkdir(mode=0o700, exist_ok=True)
    held = fill(store, names, hashing=Hashing(cost=hashing.cost))
    verifier = Verifier.open(
        f"sqlite:///{folder}/keyturn.db", state_dir=folder, clock=RealClock(), hashing=hashing
    )
    try:
        with serve(verifier, parties=parties, **more) as (port, desk, server):
            yield Served(
                port=port, verifier=verifier, desk=desk, server=server, store=store, held=held
            )
    finally:
        verifier.close()
        store.close()
