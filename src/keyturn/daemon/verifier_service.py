"""`keyturn verifier`: the HTTP service in a process of its own, without a login to any destination.

It reads the store and, on the store's host, the spool; it holds no claim, writes no state, and any
number of it may run. What it needs of the configuration is `store` and `verifier`.
"""

from __future__ import annotations

import grp
import os
import signal
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from keyturn import config, verifying, wiring
from keyturn.config.listening import host_of, port_of
from keyturn.config.verifying import VerifierListen, VerifierSection
from keyturn.daemon import logs
from keyturn.daemon.certificates import Certificates
from keyturn.daemon.confinement import confine, program
from keyturn.daemon.keys import Missing
from keyturn.daemon.listener import Listener
from keyturn.daemon.pages import Pages
from keyturn.daemon.readiness import Readiness, Reason
from keyturn.daemon.signals import WAITED_FOR, Signals
from keyturn.daemon.supervision import Supervisor
from keyturn.daemon.tied import tie
from keyturn.daemon.verifier_metrics import VerifierMetrics
from keyturn.errors import ConfigError, StoreQuarantined, StoreUnavailable
from keyturn.storage.engine import is_sqlite, sqlite_path
from keyturn.verifier.decision import Verifier
from keyturn.verifier.hashing import share_memory
from keyturn.verifier.http.callers import Caller, Callers, RelyingParty
from keyturn.verifier.http.desk import Desk
from keyturn.verifier.http.messages import Answer, json_answer
from keyturn.verifier.http.openapi import DOCUMENT
from keyturn.verifier.http.server import Place, Server, listen_tcp, listen_unix, settle

KEYS_EVERY = 10.0  # seconds
_PAGES = ("/healthz", "/readyz")
_OPENAPI = json_answer(200, DOCUMENT)  # once: it takes the loop as long as ten answers
_log = structlog.get_logger(__name__)


def run(path: Path) -> int:
    """Serve until TERM. Returns the exit code. Raises ConfigError."""
    embedded = tie(os.environ)
    share_memory()
    settings = config.load_verifier(path, environ=os.environ)
    if settings.verifier.listen is None:
        raise ConfigError(
            "verifier.listen is missing: there is nowhere to listen",
            hint="verifier: {listen: {address: 127.0.0.1:8700}}, or {socket: /run/…}",
        )
    logs.configure(level=settings.log.level, form=settings.log.format)
    supervisor = Supervisor.take(os.environ, pid=os.getpid())
    supervisor.starting("opening the store")
    _close_files(settings)
    # Before anything can start a thread: a signal goes to any thread that lets it.
    signal.pthread_sigmask(signal.SIG_BLOCK, WAITED_FOR)
    service = VerifierService(settings, supervisor=supervisor, replaces=embedded)
    signals = Signals(revoke=lambda: None, reload=service.reload, stop=service.stop)
    signals.start()
    settle()
    try:
        service.run()
    finally:
        signals.close()
    return 0


def _close_files(settings: config.Settings) -> None:
    """On SQLite the uid is the daemon's: leave open to us what we need, and not what it could open."""
    if not is_sqlite(settings.store.url):
        return
    abi = confine(read=[*program(), *folders_of(settings.verifier)], write=writable(settings))
    if abi:
        _log.info("verifier.confined", landlock=abi)
    else:
        _log.warning("verifier.not-confined", problem="this kernel has no Landlock, or forbids it")


def folders_of(section: VerifierSection) -> list[Path]:
    """Return where its tokens, keys and certificates are: folders, since files are replaced by others."""
    tls = [one.tls for one in (section.listen, section.metrics) if one and one.tls]
    files = [file for one in tls for file in (one.certificate, one.key, one.client_ca)]
    files += [one.token_file for one in section.relying_parties.values()]
    files += [one.file for one in section.keys.values()]
    found = [file for file in files if file is not None]
    # Links lead to another folder: certbot's do.
    return [one.parent for file in found for one in (file, file.resolve())]


def writable(settings: config.Settings) -> list[Path]:
    """Return where it writes: its socket's folder, and that of SQLite, which mends what was cut off."""
    listen = settings.verifier.listen
    socket = [listen.socket.parent] if listen and listen.socket else []
    database = sqlite_path(settings.store.url).parent
    return [settings.store.folder, database, Path(os.devnull), *socket]


class VerifierService:
    """One verifier process. One that `replaces` takes the socket of another that answers still."""

    def __init__(
        self,
        settings: config.Settings,
        *,
        supervisor: Supervisor | None = None,
        replaces: bool = False,
    ) -> None:
        self._settings = settings
        self._supervisor = supervisor or Supervisor()
        self._readiness = Readiness()
        self._missing = Missing(self._readiness, reload="send it HUP")
        self._keys_again = 0.0
        self._usage = verifying.open_usage(settings)
        self._verifier: Verifier = verifying.open_verifier(
            settings, serving=True, usage=self._usage
        )
        section = settings.verifier
        self._callers = Callers(parties(section))
        self._desk = Desk(
            self._verifier, self._callers, threads=os.cpu_count() or 1, pages=self._page
        )
        metrics = VerifierMetrics(self._verifier, self._desk, self._readiness)
        self._pages = Pages(self._readiness, metrics)
        self._listener = Listener(section.metrics, self._pages) if section.metrics else None
        places = places_of(section, replace=replaces)
        self.server = Server(
            self._desk, self._callers, places, refresh=self.refresh, serving=self._serving
        )
        metrics.follow(self.server.registry)

    def run(self) -> None:
        """Answer until `stop`."""
        if self._listener is not None:
            self._listener.start()
        try:
            self.server.run()
        finally:
            self._desk.close()
            self._usage.close()
            self._verifier.close()
            if self._listener is not None:
                self._listener.close()

    def stop(self) -> None:
        """End, once what is owed is answered."""
        self._readiness.hold(Reason.STOPPING)
        self._supervisor.stopping()
        self.server.stop()

    def reload(self) -> None:
        """Read the key ring again, and whatever `refresh` does."""
        with self._supervisor.reloading():
            self._verifier.use(wiring.ring_of(self._settings))
            self._keys_again = 0.0
            self.refresh()

    def refresh(self) -> None:
        """See whether we can answer, and read the tokens that were replaced; once a second."""
        self._callers.refresh()
        self._supervisor.pulse()
        try:
            self._verifier.probe()
            self._look_at_keys()
        except StoreQuarantined:
            self._readiness.hold(Reason.QUARANTINED)
            self._readiness.looked(store_answers=True)
        except StoreUnavailable:
            self._readiness.looked(store_answers=False)
        else:
            self._readiness.release(Reason.QUARANTINED)
            self._readiness.looked(store_answers=True)

    def _look_at_keys(self) -> None:
        """Every few seconds: it reads which keys accepted versions name."""
        now = time.monotonic()
        if now < self._keys_again:
            return
        self._keys_again = now + KEYS_EVERY
        self._missing.show(self._verifier.lacking())

    def _serving(self) -> None:
        self.refresh()
        self._readiness.release(Reason.STARTING)
        self._supervisor.ready("answering")
        _log.info("verifier.answering", reasons=list(self._readiness.reasons))

    def _page(self, path: bytes) -> Answer | None:
        if path == b"/openapi.json":
            return _OPENAPI
        text = path.decode("ascii", "replace")
        if text not in _PAGES:
            return None
        found = self._pages("GET", text, "")
        return Answer(found.status, found.body, kind=found.kind.encode())


def look_at(section: VerifierSection) -> str:
    """Say whether this host has what the service needs; takes no address. Raises ConfigError."""
    listen = section.listen or VerifierListen()
    Callers(parties(section))
    _context(section)
    if listen.socket is not None:
        _group(listen.group)
        folder = listen.socket.parent
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(
                f"verifier.listen: {folder} is not there, or not ours to write",
                hint="make the socket's folder, for the daemon's user; systemd/tmpfiles.conf has one",
            )
    return f"{listen.address or listen.socket}: what it needs of this host is there"


def parties(section: VerifierSection) -> list[RelyingParty]:
    """Return the relying parties of the file."""
    return [
        RelyingParty(
            caller=Caller(name=name, agents=None if one.agents is None else frozenset(one.agents)),
            token_file=one.token_file,
            certificate=one.certificate or "",
        )
        for name, one in section.relying_parties.items()
    ]


def places_of(section: VerifierSection, *, replace: bool = False) -> list[Place]:
    """Take the addresses of the file. Raises ConfigError."""
    listen = section.listen or VerifierListen()
    found = []
    if listen.address is not None:
        taken = listen_tcp(host_of(listen.address), port_of(listen.address))
        found.append(Place(socket=taken, context=_context(section)))
    if listen.socket is not None:
        one = listen_unix(listen.socket, group=_group(listen.group), replace=replace)
        found.append(Place(socket=one))
    return found


def _context(section: VerifierSection) -> Callable[[], ssl.SSLContext] | None:
    tls = section.listen.tls if section.listen else None
    if tls is None:
        return None
    # A client without a certificate can still show a token.
    by_token = any(one.token_file for one in section.relying_parties.values())
    wanted = ssl.CERT_OPTIONAL if by_token else ssl.CERT_REQUIRED
    return Certificates(tls, clients=wanted).context


def _group(name: str | None) -> int:
    if name is None:
        return -1
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(
            f"verifier.listen: no group is called {name} on this host",
            hint=f"groupadd --system {name}",
        ) from None
