"""Files keep every promise of a destination, also to those who read them as another user."""

from __future__ import annotations

import grp
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from keyturn.core.model import Target
from keyturn.destinations.file import FileDestination, FileOptions
from keyturn.testing import FakeClock
from keyturn.testing.contract import (
    OTHER_STORE,
    STORE,
    DestinationContract,
    entry_of,
    parts,
    publish,
)


class TestFile(DestinationContract):
    """A folder under a prefix."""

    @pytest.fixture
    def destination(self, tmp_path: Path) -> Iterator[FileDestination]:
        """Give an empty one, whose root is not there yet."""
        self.root = tmp_path / "agents"
        self.made = self.make(STORE)
        yield self.made
        self.made.close()

    def make(self, store_id: str) -> FileDestination:
        """Return a connection to the folder."""
        options = FileOptions.model_validate({"root": str(self.root), "prefix": "p"})
        return FileDestination(options, name="contract", store_id=store_id, clock=FakeClock())

    def path(self, target: Target) -> Path:
        """Return where an agent reads."""
        return self.root / "p" / f"{target.path}.json"

    def read_raw(self, target: Target) -> Mapping[str, Any] | None:
        """Read as an agent does."""
        path = self.path(target)
        return json.loads(path.read_text()) if path.exists() else None

    def write_raw(self, target: Target, values: Mapping[str, Any]) -> None:
        """Write as an editor does: another file, renamed."""
        path = self.path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".new").write_text(json.dumps(values))
        path.with_suffix(".new").rename(path)

    def sibling(self) -> FileDestination:
        """Return a connection of another Keyturn to the same folder."""
        return self.make(OTHER_STORE)

    def write_garbage(self, target: Target) -> bool:
        """Write a file that is no object."""
        self.path(target).parent.mkdir(parents=True, exist_ok=True)
        self.path(target).write_text('["not", "an object"]')
        return True

    def test_modes_let_agents_read_and_nobody_else(self, destination: FileDestination) -> None:
        """Files are 0640, folders 2750, and what is ours alone is 0700."""
        target = Target(to="contract", path="team/bot")
        publish(destination, target, entry_of(1))
        modes = {
            path.name: stat.S_IMODE(path.stat().st_mode)
            for path in (self.root, *self.root.rglob("*"))
        }
        assert modes == {
            "agents": 0o2750,
            "p": 0o2750,
            "team": 0o2750,
            "bot.json": 0o640,
            ".keyturn": 0o700,
            "bot.json.side": 0o600,
            "bot.json.lock": 0o600,
        }

    def test_nothing_but_the_entry_holds_the_secret(self, destination: FileDestination) -> None:
        """Neither the side file nor a temporary that is left holds the plaintext."""
        target = Target(to="contract", path="bot")
        for seed in (1, 2):
            publish(destination, target, entry_of(seed))
        secrets = [entry_of(seed).secret.reveal().encode() for seed in (1, 2)]
        holders = [
            path.name
            for path in self.root.rglob("*")
            if path.is_file() and any(secret in path.read_bytes() for secret in secrets)
        ]
        assert holders == ["bot.json"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_agent_of_the_group_reads_and_cannot_write(tmp_path: Path) -> None:
    """As another user of the group: the entry can be read, nothing beside it changed or listed."""
    group = grp.getgrgid(65534) if 65534 in {g.gr_gid for g in grp.getgrall()} else grp.getgrgid(1)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    options = FileOptions.model_validate({"root": str(tmp_path / "agents"), "group": group.gr_name})
    destination = FileDestination(options, name="f", store_id=STORE, clock=FakeClock())
    target = Target(to="f", path="bot")
    publish(destination, target, entry_of(1))
    destination.close()
    answers = _as_agent(tmp_path / "agents", group.gr_gid)
    assert answers == {
        "read": parts(target.keys, entry_of(1)),
        "write": "PermissionError",
        "create": "PermissionError",
        "remove": "PermissionError",
        "side": "PermissionError",
    }


def _as_agent(root: Path, gid: int) -> dict[str, Any]:
    """Try all that an agent could try, in a child of another user."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(12345, 12345, 12345)
        os.write(into, json.dumps(_attempts(root)).encode())
        os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as answers:
        data = answers.read()
    os.waitpid(child, 0)
    return json.loads(data)


def _attempts(root: Path) -> dict[str, Any]:
    entry = root / "bot.json"
    attempts = {
        "read": lambda: json.loads(entry.read_text()),
        "write": lambda: entry.write_text("x"),
        "create": lambda: (root / "new.json").write_text("x"),
        "remove": entry.unlink,
        "side": lambda: [path.name for path in (root / ".keyturn").iterdir()],
    }
    answers: dict[str, Any] = {}
    for name, attempt in attempts.items():
        try:
            answers[name] = attempt()
        except OSError as error:
            answers[name] = type(error).__name__
    return answers
