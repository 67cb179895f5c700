"""The listener's certificate: read again when its files change, as a renewal replaces them."""

from __future__ import annotations

import ssl

import structlog

from keyturn.config.listening import TlsSection
from keyturn.credential_file import Mark, mark, read_credential
from keyturn.errors import ConfigError

_log = structlog.get_logger(__name__)

_Seen = tuple[Mark | None, ...]


class Certificates:
    """What a listener shows of itself. Raises ConfigError where the files cannot be used at first."""

    def __init__(
        self, settings: TlsSection, *, clients: ssl.VerifyMode = ssl.CERT_REQUIRED
    ) -> None:
        """`clients` is what is asked of them where there is a `client_ca`."""
        self._settings = settings
        self._clients = clients
        self._seen = self._look()
        self._context = self._load()

    def context(self) -> ssl.SSLContext:
        """Return what the next connection is answered with; the last good one, whatever is there."""
        seen = self._look()
        if seen != self._seen:
            self._seen = seen  # a half of a renewal is tried once; its other half is a change too
            try:
                self._context = self._load()
            except ConfigError as error:
                _log.error("listener.certificate-refused", problem=str(error), hint=error.hint)
            else:
                _log.info("listener.certificate-taken-over")
        return self._context

    def _look(self) -> _Seen:
        tls = self._settings
        return tuple(mark(path) for path in (tls.certificate, tls.key, tls.client_ca) if path)

    def _load(self) -> ssl.SSLContext:
        tls = self._settings
        read_credential(tls.key)  # refuses one that others can read
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            # Without a text OpenSSL would ask for the passphrase at the terminal.
            context.load_cert_chain(tls.certificate, tls.key, password=lambda: "")
            if tls.client_ca is not None:
                context.load_verify_locations(tls.client_ca)
                context.verify_mode = self._clients
        except OSError as error:  # SSLError is one
            what = error.reason if isinstance(error, ssl.SSLError) else error.strerror
            raise ConfigError(
                f"{tls.certificate}, its key and client_ca cannot be used together ({what})",
                hint="PEM files, a key without a passphrase, and of this certificate",
            ) from None
        return context
