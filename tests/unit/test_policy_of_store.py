"""`keyturn policy postgresql`: what it prints, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from keyturn.config import load
from keyturn.daemon.checks import least_policy
from keyturn.errors import ConfigError, Refused
from keyturn.storage import roles
from keyturn.storage.tables import metadata

URL = "postgresql://keyturn_daemon@/keyturn?host=/run/postgresql"


def file(folder: Path, **store: object) -> Path:
    """Write a configuration with this store."""
    path = folder / "keyturn.yaml"
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump({"version": 1, "store": store}))
    return path


def test_it_prints_each_role_and_says_where_to_run_it(tmp_path: Path) -> None:
    """The text holds a role per login and per group, and no password."""
    path = file(tmp_path, url=URL, readers={"web": {"agents": ["a-bot"]}})
    found = least_policy(path, "postgresql")
    for role in (roles.MIGRATOR, roles.DAEMON, roles.VERIFIER, "keyturn_reader_web"):
        assert f"CREATE ROLE {role};" in found["text"]
    assert not re.search(r"PASSWORD '", found["text"])
    assert found["notes"] == ["run this in the database keyturn as its administrator"]


def test_it_says_when_the_daemon_logs_in_as_another(tmp_path: Path) -> None:
    """A store.url of another user is noted, since then none of this holds."""
    path = file(tmp_path, url=URL.replace("keyturn_daemon", "admin"))
    assert "does not log in as keyturn_daemon" in least_policy(path, "postgresql")["notes"][1]


def test_an_sqlite_file_has_no_roles(tmp_path: Path) -> None:
    """There is nothing to print, and the hint says what to set."""
    with pytest.raises(Refused, match="SQLite"):
        least_policy(file(tmp_path, url=f"sqlite:///{tmp_path}/k.db"), "postgresql")


@pytest.mark.parametrize(
    ("readers", "says"),
    [
        ({"Web": {"agents": ["a"]}}, "a-z 0-9 _"),
        ({"w;drop": {"agents": ["a"]}}, "a-z 0-9 _"),
        ({"web": {"agents": []}}, "a list of agents' ids"),
        ({"web": {"agents": ["a'); DROP"]}}, "a list of agents' ids"),
        ({"web": {}}, "required"),
        ({"web": {"agents": ["a"], "more": 1}}, "unknown key"),
    ],
)
def test_groups_have_names_that_need_no_quotes(tmp_path: Path, readers: object, says: str) -> None:
    """What becomes a part of SQL is looked at before, and the error says what is expected."""
    with pytest.raises(ConfigError, match=re.escape(says)):
        load(file(tmp_path, url=URL, readers=readers), environ={})


def test_readers_need_postgresql(tmp_path: Path) -> None:
    """On SQLite another uid never opens the file, so there is no view."""
    path = file(tmp_path, url=f"sqlite:///{tmp_path}/k.db", readers={"web": {"agents": ["a"]}})
    with pytest.raises(ConfigError, match="readers with PostgreSQL only"):
        load(path, environ={})


def test_every_table_has_its_rights() -> None:
    """A table that is added gets rights of the daemon's without a line here; the fixed ones exist."""
    granted = " ".join(roles.rights({}))
    for table in metadata.tables.values():
        assert f" ON public.{table.name} TO {roles.DAEMON}" in granted
    for name, columns in roles._FIXED.items():
        assert columns <= {column.name for column in metadata.tables[name].columns}
