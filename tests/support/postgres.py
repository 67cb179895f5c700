"""A private PostgreSQL for tests: a unix socket only, fsync on, one database per test."""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psycopg
import pytest

_NUMBERS = itertools.count(1)


class Cluster:
    """One server process that we started, ended by its pid."""

    def __init__(self, binaries: Path, *, settings: Mapping[str, str] | None = None) -> None:
        self._binaries = binaries
        self.settings = dict(settings or {})
        self.port = 5432  # of the unix socket: a part of its name
        self.folder = Path(tempfile.mkdtemp(prefix="keyturn-pg-"))
        self._data = self.folder / "data"
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(self.folder, user.pw_uid, user.pw_gid)
        self._run("initdb", "-A", "trust", "-U", "keyturn", "-N", "-D", str(self._data))
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.folder),
            "fsync": "on",
            "max_connections": "60",
            "shared_buffers": "32MB",
            **self.settings,
        }
        options = [f"-c{name}={value}" for name, value in settings.items()]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._user(), str(self._binaries / "postgres"), "-D", str(self._data), *options],
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )
        self._wait()

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End the server: connections are cut, nothing is lost. SIGQUIT: as in a crash."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(timeout=120)  # it writes all that it has to disk first
            self._process = None

    def remove(self) -> None:
        """End the server and delete its files."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def own(self, name: str, content: bytes) -> Path:
        """Put a file into the server's folder that only the server reads."""
        path = self.folder / name
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
        path.write_bytes(content)
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(path, user.pw_uid, user.pw_gid)
        return path

    def reload(self) -> None:
        """Let the server read its files again, and wait until it has."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            before = connection.execute("SELECT pg_conf_load_time()").fetchone()
            connection.execute("SELECT pg_reload_conf()")
            while connection.execute("SELECT pg_conf_load_time()").fetchone() == before:
                time.sleep(0.02)

    def url(self, database: str) -> str:
        """Return the URL of a database."""
        at = "" if self.port == 5432 else f":{self.port}"
        return f"postgresql://keyturn@{at}/{database}?host={self.folder}"

    def new_database(self) -> str:
        """Make an empty database and return its URL."""
        name = f"test_{next(_NUMBERS)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.url(name)

    def _wait(self) -> None:
        end = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(self.url("postgres")).close()
            except psycopg.OperationalError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
            else:
                return

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [*self._user(), str(self._binaries / program), *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=self.folder,
        )

    @staticmethod
    def _user() -> list[str]:
        """Return what runs a command as another user where we are root: PostgreSQL refuses root."""
        if os.geteuid() != 0:
            return []
        return ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"]


class Standby(Cluster):
    """A hot standby that follows another server; `promote` makes it one of its own."""

    def __init__(self, binaries: Path, primary: Cluster) -> None:
        self._primary = primary
        super().__init__(binaries)

    def _run(self, program: str, *arguments: str) -> None:
        if program == "initdb":
            where = str(self._data)
            source = ["-h", str(self._primary.folder), "-U", "keyturn", "-D", where]
            super()._run("pg_basebackup", *source, "-R", "-X", "stream", "-c", "fast")
            return
        super()._run(program, *arguments)

    def promote(self) -> None:
        """Let it take over."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute("SELECT pg_promote(wait => true)")


def binaries() -> Path | None:
    """Return the folder of the newest installed PostgreSQL."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]))
    return found[-1].parent if found else None


def left_databases() -> Iterator[str]:
    """Yield the URL of every database that tests have left in the one server."""
    folder = binaries()
    if folder is not None and _shared.cache_info().currsize:
        cluster = _shared(folder)
        with psycopg.connect(cluster.url("postgres")) as connection:
            query = "SELECT datname FROM pg_database WHERE datname LIKE 'test%'"
            names = [name for (name,) in connection.execute(query).fetchall()]
        yield from (cluster.url(name) for name in names)


@functools.cache
def _shared(folder: Path) -> Cluster:
    cluster = Cluster(folder)
    atexit.register(cluster.remove)
    return cluster


@pytest.fixture(scope="session")
def postgres() -> Cluster:
    """Give the one server of this test run; without PostgreSQL skip here, but fail in CI."""
    folder = binaries()
    if folder is None:
        if os.environ.get("CI") == "true":
            pytest.fail("PostgreSQL is not installed, and CI skips no contract")
        pytest.skip("PostgreSQL is not installed")
    return _shared(folder)
