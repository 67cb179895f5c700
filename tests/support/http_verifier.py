"""A verifier over HTTP on a store of its own, in a thread of this process; `serve` for any other one."""

from __future__ import annotations

import base64
import http.client
import json
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from keyturn.core.model import VersionState
from keyturn.core.secret import Secret, mint
from keyturn.storage.store import Store
from keyturn.verifier import keyed
from keyturn.verifier.decision import Verifier
from keyturn.verifier.gate import Gate, Ticket
from keyturn.verifier.hashing import CHEAP_FOR_TESTS, SCHEME, Cost, Hashing, tag
from keyturn.verifier.http.callers import Callers, RelyingParty
from keyturn.verifier.http.desk import Desk, Page
from keyturn.verifier.http.server import Place, Server, listen_tcp, listen_unix
from keyturn.verifier.keyring import KeyRing
from keyturn.verifier.schemes import Schemes
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


def fill(
    store: Store,
    names: Sequence[str],
    *,
    hashing: Hashing,
    seed: int = 1,
    ring: KeyRing | None = None,
) -> list[Held]:
    """Give each of these agents a current version, by the key ring's current key if there is one."""
    draw, held = random.Random(seed).randbytes, []
    minted = [mint(random_bytes=draw) for _ in names]
    schemes = Schemes(hashing=hashing, ring=lambda: ring or KeyRing())
    scheme = SCHEME if ring is None else keyed.SCHEME

    def digest_of(name: str, of: tuple[str, Secret]) -> str:
        return schemes.digest(scheme, of[1], credential_uid=f"cred-{name}", version_id=of[0])

    with ThreadPoolExecutor(2) as pool:  # hashes take cores, not the interpreter
        digests = list(pool.map(digest_of, names, minted))
    for name, (version_id, secret), digest in zip(names, minted, digests, strict=True):
        add(store, name)
        first = version(
            f"cred-{name}",
            login=name,
            id=version_id,
            state=VersionState.CURRENT,
            scheme=scheme,
            digest=digest,
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
    hashes: list[str] = field(default_factory=list)  # that were checked, one by one

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

    def amend(self, agent: str, **changes: Any) -> None:
        """Change the one version of an agent in the store."""

        def change(case: Any) -> Any:
            (one,) = case.versions
            return replace(case, versions=(replace(one, **changes),)), [entry()]

        self.store.amend(f"cred-{agent}", change)


class Counted(Hashing):
    """Hashing that notes every check, and can be held up before one."""

    def __init__(self, cost: Cost = CHEAP_FOR_TESTS, gate: Gate | None = None) -> None:
        super().__init__(cost=cost, **({} if gate is None else {"gate": gate}))
        object.__setattr__(self, "checked", [])
        object.__setattr__(self, "before", lambda: None)

    checked: list[str]
    before: Callable[[], None]

    def hold(self, before: Callable[[], None]) -> None:
        """Call this before each check."""
        object.__setattr__(self, "before", before)

    def matches(self, digest: str, secret: Secret, ticket: Ticket | None = None) -> bool:
        self.checked.append(digest)
        self.before()
        return super().matches(digest, secret, ticket)


@contextmanager
def serve(
    verifier: Verifier,
    *,
    parties: Sequence[RelyingParty] = (),
    path: Path | None = None,
    pages: Page = lambda _path: None,
    **more: Any,
) -> Iterator[Any]:
    """Serve a verifier on loopback, or at a path, until the block ends; gives (port, desk, server)."""
    callers = Callers(parties)
    place = Place(socket=listen_unix(path) if path else listen_tcp("127.0.0.1", 0))
    desk = Desk(verifier, callers, threads=2, pages=pages)
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
    ring: KeyRing | None = None,
    **more: Any,
) -> Iterator[Served]:
    """Serve a new store with these agents."""
    hashing = hashing or Counted()
    store = open_store(folder, writer="w")
    (folder / "revoked.d").mkdir(mode=0o700, exist_ok=True)
    held = fill(store, names, hashing=Hashing(cost=hashing.cost), ring=ring)
    verifier = Verifier.open(
        f"sqlite:///{folder}/keyturn.db",
        state_dir=folder,
        clock=RealClock(),
        hashing=hashing,
        ring=ring,
    )
    try:
        with serve(verifier, parties=parties, **more) as (port, desk, server):
            yield Served(
                port=port,
                verifier=verifier,
                desk=desk,
                server=server,
                store=store,
                held=held,
                hashes=hashing.checked if isinstance(hashing, Counted) else [],
            )
    finally:
        verifier.close()
        store.close()
