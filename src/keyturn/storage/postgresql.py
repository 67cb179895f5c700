"""How PostgreSQL is reached, and what a refusal of it means; imports no driver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy.engine import make_url

from keyturn.core.secret import Secret
from keyturn.errors import ConfigError, StorageError, StoreUnavailable

Password = Callable[[], Secret | None]  # asked for each new connection: its file may have changed

NO_FILE = "/nonexistent/"  # libpq complains on stderr about every other kind of file that is none
# All of them below the default lease: whoever is stuck gives up before a verifier has to.
STATEMENT_MS, LOCK_MS, IDLE_MS = 10_000, 5_000, 10_000


def no_password() -> Secret | None:
    """Return none: the server trusts the socket, or a certificate is the login."""
    return None


def postgresql_arguments(url: str, password: Secret | None) -> dict[str, Any]:
    """Return what every psycopg connection of ours is made with, beside its URL."""
    asked = make_url(url).query
    verified = asked.get("sslmode") == "verify-full"
    # SECURITY: libpq looks for whatever is not named in the home of whoever runs it, and goes by it:
    # passwords, the authorities to trust, a certificate to show, a ticket instead of TLS.
    named = {
        "passfile": f"{NO_FILE}pgpass",
        "sslrootcert": "system" if verified else f"{NO_FILE}root.crt",
        "sslcert": f"{NO_FILE}postgresql.crt",
        "sslkey": f"{NO_FILE}postgresql.key",
        "sslcrl": f"{NO_FILE}root.crl",
        "gssencmode": "disable",
    }
    arguments: dict[str, Any] = {
        "prepare_threshold": None,  # until it is known that no pooler stands between
        "connect_timeout": 5,
        "application_name": "keyturn",
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 20000,
        **{name: value for name, value in named.items() if name not in asked},
    }
    if password is not None:
        arguments["password"] = password.reveal()
    return arguments


def asked(password: Password) -> Secret | None:
    """Return the password as its file has it now. Raises StoreUnavailable where that cannot be read.

    It was good when we started: whoever puts it right again need not start us anew.
    """
    try:
        return password()
    except ConfigError as error:
        raise StoreUnavailable(str(error), hint=error.hint) from None


_NOT_GRANTED = {
    "42501": "this login lacks a right on the store's tables",
    "42P01": "this login sees no tables of a store",
}
_GRANT = (
    "`keyturn store upgrade`, with the login that owns the tables, makes and changes them;"
    " `keyturn policy postgresql -c FILE | psql …` makes the roles and grants what is missing"
)

# Somebody is stuck, we or others: what was begun has left nothing.
_STUCK = {
    "25P03": "the server ended a transaction of ours that stood still for too long",
    "25P04": "the server ended a transaction of ours that took too long",
    "55P03": "somebody else held a lock for too long",
    "57014": "the server stopped a statement of ours that took too long",
}
_WHO = "see who is stuck: SELECT pid, usename, state, xact_start FROM pg_stat_activity"

# What libpq and the server say when no session begins, by a piece of its text: there is no code. Ours
# goes on instead, since the other one may quote names of the server's.
_REFUSALS = (
    (
        "does not match host name",
        "the server's certificate is for another name",
        "write the host in store.url as the certificate has it",
    ),
    (
        "certificate verify failed",
        "the server's certificate has expired, or no authority that is trusted here has signed it",
        "see `openssl x509 -enddate`; the authority's file goes into store.url: &sslrootcert=/…",
    ),
    (
        "root certificate file",
        "the file that sslrootcert names is not there, or not readable",
        "correct sslrootcert in store.url, or let the daemon's user read the file",
    ),
    (
        "could not read root certificate",
        "the file that sslrootcert names holds no certificate",
        "put the authority's certificate there, as PEM",
    ),
    (
        "server does not support SSL",
        "the server, or the pooler before it, does not offer TLS",
        "set ssl = on in postgresql.conf (PgBouncer: client_tls_sslmode = require)",
    ),
    (
        "server closed the connection unexpectedly",
        "the server closed the connection before it was made",
        "see the server's log; is another service listening there?",
    ),
    (
        "password authentication failed",
        "the server refuses the user or its password",
        "put the password into store.password_file; it is read anew for the next connection",
    ),
    (
        "no password supplied",
        "the server asks for a password, and there is none",
        "put it into a file (mode 0600) and name that as store.password_file",
    ),
    (
        "no pg_hba.conf entry",
        "the server does not let this user in from this host",
        "add a hostssl line to its pg_hba.conf, and let it reload",
    ),
    (
        "is not permitted to log in",
        "this user may not log in",
        "`keyturn policy postgresql -c FILE` prints the roles that may",
    ),
    (
        "does not exist",
        "the server knows no such user or database",
        "create them first: `keyturn policy postgresql -c FILE` prints the SQL",
    ),
    (
        "no such database",
        "the pooler knows no such database",
        "name it under [databases] in pgbouncer.ini",
    ),
    (
        "too many connections",
        "the server has no connection left for this user",
        "raise its CONNECTION LIMIT or max_connections, or put a pooler before it",
    ),
    (
        "remaining connection slots",
        "the server has no connection left",
        "raise max_connections, or put a pooler before it",
    ),
    (
        "Connection refused",
        "nothing listens at the address of store.url",
        "start the server, or correct host and port",
    ),
    (
        "could not translate host name",
        "the host of store.url has no address",
        "correct the name, or the resolver of this host",
    ),
    (
        "timeout expired",
        "the server did not answer in time",
        "see whether a firewall stands between, and whether the server is up",
    ),
)


def refusal(origin: object) -> StorageError | None:
    """Return what an error of the driver means where that can be told, with what to do about it."""
    code = getattr(origin, "sqlstate", None)
    if code in _NOT_GRANTED:
        return StorageError(f"{_NOT_GRANTED[code]} ({code})", hint=_GRANT)
    if code in _STUCK:
        return StoreUnavailable(f"{_STUCK[code]} ({code})", hint=_WHO)
    text = "" if code and not code.startswith(("08", "28", "3D", "53")) else str(origin)
    for piece, message, hint in _REFUSALS:
        if piece in text:
            return StoreUnavailable(message, hint=hint)
    return None
