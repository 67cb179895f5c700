"""A real PgBouncer in transaction mode before the tests' PostgreSQL."""

from __future__ import annotations

import atexit
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.engine import make_url

from support.postgres import Cluster

PORT = 6432  # of a unix socket: only a part of its name
_BINARY = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
_SETTINGS = """\
[databases]
* = host={server}
[pgbouncer]
listen_addr =
listen_port = {port}
unix_socket_dir = {folder}
auth_type = trust
auth_file = {folder}/users
pool_mode = transaction
default_pool_size = 6
max_client_conn = 200
server_idle_timeout = 5
server_login_retry = 1
query_wait_timeout = 5
"""


class PgBouncer:
    """One pooler that we started, ended by its pid."""

    def __init__(self, cluster: Cluster, users: tuple[str, ...] = ("keyturn",)) -> None:
        self._cluster = cluster
        self.folder = Path(tempfile.mkdtemp(prefix="keyturn-pgb-"))
        text = _SETTINGS.format(server=cluster.folder, port=PORT, folder=self.folder)
        (self.folder / "pgbouncer.ini").write_text(text)
        (self.folder / "users").write_text("".join(f'"{user}" ""\n' for user in users))
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            for path in (self.folder, *self.folder.iterdir()):
                os.chown(path, user.pw_uid, user.pw_gid)
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it and wait until it listens."""
        assert _BINARY is not None
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*Cluster._user(), _BINARY, str(self.folder / "pgbouncer.ini")],
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )
        end = time.monotonic() + 20
        while True:
            try:
                psycopg.connect(self.url(self._cluster.url("postgres"))).close()
            except psycopg.OperationalError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
            else:
                return

    def stop(self) -> None:
        """End it: every connection through it is cut."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(timeout=30)
            self._process = None

    def remove(self) -> None:
        """End it and delete its files."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def url(self, direct: str) -> str:
        """Return the URL of a database through the pooler, its port in the query of the socket."""
        url = make_url(direct).update_query_dict({"host": str(self.folder)}).set(port=PORT)
        return url.render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def pgbouncer(postgres: Cluster) -> PgBouncer:
    """Give the one pooler of this test run; without it skip here, but fail in CI."""
    if _BINARY is None:
        if os.environ.get("CI") == "true":
            pytest.fail("pgbouncer is not installed, and CI skips no contract")
        pytest.skip("pgbouncer is not installed")
    return _made(postgres)


_RUNNING: dict[Path, PgBouncer] = {}


def _made(cluster: Cluster) -> PgBouncer:
    if cluster.folder not in _RUNNING:
        _RUNNING[cluster.folder] = PgBouncer(cluster)
        atexit.register(_RUNNING[cluster.folder].remove)
    return _RUNNING[cluster.folder]
