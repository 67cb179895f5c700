"""The page about PostgreSQL, its commands as they are typed, on a server with TLS and passwords."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import yaml

from keyturn.storage.roles import DAEMON, MIGRATOR
from keyturn.testing.certificates import new_authority
from support.postgres import Cluster, binaries
from support.running import Keyturn

PAGE = (Path(__file__).parents[2] / "docs" / "howto" / "postgresql.md").read_text()
_LOCAL = "local all all trust\n"


def blocks(language: str) -> list[str]:
    """Return the page's blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


class Reader:
    """Somebody who follows the page; only names and places are others."""

    def __init__(self, cluster: Cluster, folder: Path, port: int) -> None:
        self.cluster, self.folder = cluster, folder
        self.keyturn = Keyturn(folder, agents=1)
        self.places = {
            "db.example/": f"localhost:{port}/",
            "/etc/keyturn/keyturn.yaml": str(self.keyturn.config),
            "/etc/keyturn/postgresql-ca.pem": str(folder / "ca" / "test-authority.pem"),
            "/etc/keyturn/postgresql-password": str(folder / "postgresql-password"),
            "/etc/keyturn/migrator-password": str(folder / "migrator-password"),
            "/var/lib/keyturn": str(folder / "state"),
            "10.0.0.0/8": "127.0.0.1/32",
        }

    def here(self, text: str) -> str:
        """Put this test's places in."""
        for theirs, ours in self.places.items():
            text = text.replace(theirs, ours)
        return text

    def types(self, text: str) -> subprocess.CompletedProcess[str]:
        """Type it into a shell, on the host of the server."""
        found = binaries()
        assert found is not None
        path = os.pathsep.join([str(Path(sys.executable).parent), str(found), os.environ["PATH"]])
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.here(text)],
            env={
                **self.keyturn.environ,
                "PATH": path,
                "PGHOST": str(self.cluster.folder),
                "PGPORT": str(self.cluster.port),
                "PGUSER": "keyturn",
            },
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    def password(self, role: str, name: str) -> None:
        """Give it at the server, as psql does, and put it into the file."""
        text = f"made-up-for-{role}"
        with psycopg.connect(self.cluster.url("keyturn"), autocommit=True) as connection:
            connection.execute(f"ALTER ROLE {role} PASSWORD '{text}'".encode())
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_text(text + "\n")


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    """Give an empty server, as the page's first part leaves it."""
    folder = binaries()
    assert folder is not None, "PostgreSQL is not installed"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    cluster = Cluster(folder)
    try:
        one = Reader(cluster, tmp_path, port)
        certificate, key = new_authority(tmp_path / "ca").issue("db")
        plain = blocks("")
        settings = next(text for text in plain if text.startswith("ssl = on"))
        hba = next(text for text in plain if text.startswith("hostssl"))
        kept = (cluster.folder / "data" / "postgresql.conf").read_bytes()
        cluster.own("data/postgresql.conf", kept + settings.encode())
        cluster.own("data/pg_hba.conf", (_LOCAL + one.here(hba)).encode())
        cluster.own("data/server.crt", certificate.read_bytes())
        cluster.own("data/server.key", key.read_bytes())
        cluster.stop()
        cluster.settings.update(listen_addresses="127.0.0.1", port=str(port))
        cluster.port = port
        cluster.start()
        yield one
        one.keyturn.stop()
    finally:
        cluster.remove()


def test_from_an_empty_server_to_a_running_daemon(reader: Reader) -> None:
    """Each command works as it is typed, in this order; out of order the error says what is missing."""
    (configuration,) = blocks("yaml")
    keyturn = reader.keyturn
    keyturn.content |= yaml.safe_load(reader.here(configuration))
    keyturn.write()
    roles, tables, daemon = blocks("sh")
    done = reader.types(roles)
    assert done.returncode == 0, done.stderr
    reader.password(MIGRATOR, "migrator-password")
    reader.password(DAEMON, "postgresql-password")
    (reader.folder / "state").mkdir(mode=0o700)
    early = reader.types("keyturn run -c /etc/keyturn/keyturn.yaml")
    assert early.returncode != 0
    assert "keyturn store upgrade" in early.stderr
    done = reader.types(tables)
    assert done.returncode == 0, done.stderr
    check, run = daemon.splitlines()
    assert run == "keyturn run -c /etc/keyturn/keyturn.yaml"
    done = reader.types(check)
    assert done.returncode == 0, done.stdout + done.stderr
    keyturn.start()
    keyturn.wait_first()
    with psycopg.connect(reader.cluster.url("keyturn")) as connection:
        query = (
            "SELECT DISTINCT usename, ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)"
            " WHERE application_name = 'keyturn'"
        )
        connection.autocommit = True  # what shows is what was there at a transaction's first look
        keyturn.wait_for(lambda: connection.execute(query).fetchall() == [(DAEMON, True)])
    again = reader.types(roles.splitlines()[1])
    assert again.returncode == 0, again.stderr
    code, said = keyturn.ask("rotate", "agent-0", "--wait")
    assert code == 0, said
