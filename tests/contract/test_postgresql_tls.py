"""PostgreSQL on another host: TLS that is verified, and a password that comes from a file."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest

from keyturn.core.secret import Secret
from keyturn.credential_file import read_credential
from keyturn.errors import StoreUnavailable
from keyturn.storage.decisions import DecisionReader
from keyturn.storage.engine import Database, open_database
from keyturn.testing.certificates import CertificateAuthority, new_authority
from keyturn.testing.fakes import FakeClock
from support.postgres import Cluster, binaries
from support.stores import NOW

_HBA = """\
local all all trust
hostssl all app all scram-sha-256
"""


@dataclass
class Remote:
    """A server that is reached over TCP."""

    cluster: Cluster
    authority: CertificateAuthority
    other: CertificateAuthority
    port: int
    password_file: Path

    def show(self, issued: tuple[Path, Path]) -> None:
        """Let the server show another certificate."""
        for name, path in zip(("server.crt", "server.key"), issued, strict=True):
            self.cluster.own(name, path.read_bytes())
        self.cluster.reload()

    def url(
        self, host: str = "localhost", *, ca: Path | None = None, mode: str = "verify-full"
    ) -> str:
        """Return the URL as a configuration has it."""
        root = f"&sslrootcert={ca or self.authority.ca_file}" if mode == "verify-full" else ""
        return f"postgresql://app@{host}:{self.port}/app?sslmode={mode}{root}"

    def sql(self, text: str) -> None:
        """Run a statement as the administrator."""
        with psycopg.connect(self.cluster.url("postgres"), autocommit=True) as connection:
            connection.execute(text.encode())

    def password(self) -> Secret:
        """Read the password's file."""
        return Secret(read_credential(self.password_file).removesuffix("\n"))

    def change_password(self, text: str, *, at_server: bool = True) -> None:
        """Change it at the server, and in the file."""
        if at_server:
            self.sql(f"ALTER ROLE app PASSWORD '{text}'")
        self.password_file.unlink(missing_ok=True)
        self.password_file.touch(mode=0o600)
        self.password_file.write_text(text + "\n")

    def open(self, url: str) -> Database:
        """Prepare the store's database."""
        return open_database(url, clock=FakeClock(NOW), password=self.password)


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    """Give a server with TLS and passwords."""
    folder = binaries()
    assert folder is not None, "PostgreSQL is not installed"
    tmp = tmp_path_factory.mktemp("tls")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    cluster = Cluster(folder)
    try:
        authority, other = new_authority(tmp / "ca"), new_authority(tmp / "other", name="other")
        one = Remote(cluster, authority, other, port, tmp / "password")
        cluster.own("data/pg_hba.conf", _HBA.encode())
        cluster.own("server.crt", authority.issue("db")[0].read_bytes())
        cluster.own("server.key", (authority.folder / "db.key").read_bytes())
        cluster.stop()
        cluster.settings.update(
            listen_addresses="127.0.0.1,127.0.0.2", port=str(port),
            ssl_cert_file=str(cluster.folder / "server.crt"),
            ssl_key_file=str(cluster.folder / "server.key"),
        )  # fmt: skip
        cluster.port = port
        cluster.start()
        one.sql("ALTER SYSTEM SET ssl = on")
        cluster.reload()
        one.sql("CREATE ROLE app LOGIN")
        one.sql("CREATE DATABASE app OWNER app")
        one.change_password("first-of-them")
        yield one
    finally:
        cluster.remove()


@pytest.fixture(autouse=True)
def _good_again(remote: Remote) -> Iterator[None]:
    yield
    remote.show((remote.authority.folder / "db.crt", remote.authority.folder / "db.key"))


def asks(database: Database) -> object:
    """Ask who we are, and whether that is over TLS."""
    query = "SELECT current_user, ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    return database.read(lambda connection: tuple(connection.exec_driver_sql(query).one()))


def test_the_right_authority_and_name_are_good(remote: Remote) -> None:
    """With verify-full, the authority's file and a password's file a session begins, over TLS."""
    database = remote.open(remote.url())
    assert asks(database) == ("app", True)
    database.close()
    reader = DecisionReader.open(remote.url(), password=remote.password)
    with pytest.raises(StoreUnavailable, match="sees no tables"):
        reader.lookup("x")  # it got in, and there is no store yet
    reader.close()


def _wrong_authority(remote: Remote) -> str:
    return remote.url(ca=remote.other.ca_file)


def _wrong_name(remote: Remote) -> str:
    return remote.url("127.0.0.2")


def _expired(remote: Remote) -> str:
    remote.show(remote.authority.issue("old", life=timedelta(minutes=-1)))
    return remote.url()


def _of_another_authority(remote: Remote) -> str:
    remote.show(remote.other.issue("db"))
    return remote.url()


def _no_tls(remote: Remote) -> str:
    remote.sql("ALTER SYSTEM SET ssl = off")
    remote.cluster.reload()
    return remote.url()


def _unencrypted(remote: Remote) -> str:
    return remote.url(mode="disable")


def _no_authority(remote: Remote) -> str:
    return remote.url(ca=Path("/nowhere/ca.pem"))


def _nobody(remote: Remote) -> str:
    return remote.url().replace("app@", "nobody@")


def _no_database(remote: Remote) -> str:
    return remote.url().replace("/app?", "/nothing?")


def _wrong_password(remote: Remote) -> str:
    remote.change_password("wrong-one", at_server=False)
    return remote.url()


@pytest.mark.parametrize(
    ("broken", "says", "hint"),
    [
        (_wrong_authority, "no authority that is trusted here", "sslrootcert="),
        (_of_another_authority, "no authority that is trusted", "sslrootcert="),
        (_wrong_name, "for another name", "write the host"),
        (_expired, "has expired", "openssl x509 -enddate"),
        (_no_tls, "does not offer TLS", "ssl = on"),
        (_unencrypted, "does not let this user in", "hostssl"),
        (_no_authority, "sslrootcert names is not there", "sslrootcert"),
        (_nobody, "does not let this user in", "pg_hba.conf"),
        (_no_database, "no such user or database", "keyturn policy postgresql"),
        (_wrong_password, "refuses the user or its password", "store.password_file"),
    ],
)
def test_whatever_is_wrong_is_refused_and_said(
    remote: Remote, broken: Callable[[Remote], str], says: str, hint: str
) -> None:
    """No session begins, and the error says what is wrong and what to do; the password is in none."""
    try:
        url = broken(remote)
        database = remote.open(url)
        reader = DecisionReader.open(url, password=remote.password)
        for ask in (lambda: asks(database), lambda: reader.lookup("x")):
            with pytest.raises(StoreUnavailable, match=says) as refused:
                ask()
            assert hint in refused.value.hint
            assert remote.password().reveal() not in f"{refused.value} {refused.value.hint}"
        database.close()
        reader.close()
    finally:
        remote.sql("ALTER SYSTEM SET ssl = on")
        remote.change_password("first-of-them")


def test_a_changed_password_is_used_for_new_connections(remote: Remote) -> None:
    """The file is read for each connection: a change needs no restart, also while it was wrong."""
    database = remote.open(remote.url())
    reader = DecisionReader.open(remote.url(), password=remote.password)
    assert asks(database) == ("app", True)
    cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'"
    remote.sql("ALTER ROLE app PASSWORD 'second-of-them'")
    remote.sql(cut)
    for ask in (lambda: asks(database), lambda: reader.lookup("x")):
        with pytest.raises(StoreUnavailable, match="refuses the user or its password"):
            ask()
    remote.change_password("second-of-them")
    assert asks(database) == ("app", True)
    with pytest.raises(StoreUnavailable, match="sees no tables"):
        reader.lookup("x")
    remote.password_file.unlink()
    remote.sql(cut)
    with pytest.raises(StoreUnavailable, match="cannot be read"):
        asks(database)
    remote.change_password("third-of-them")
    assert asks(database) == ("app", True)
    database.close()
    reader.close()
