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
    OTHER_STORE_ID,
    STORE_ID,
    DestinationContract,
    new_entry,
    parts,
    publish,
)


def make(root: Path, *, store_id: str = STORE_ID, **options: Any) -> FileDestination:
    """Make a connection to a folder."""
    read = FileOptions.model_validate({"root": str(root), **options})
    return FileDestination(read, name="f", store_id=store_id, clock=FakeClock())


def path_of(destination: FileDestination, target: Target) -> Path:
    """Return where an agent reads."""
    return destination.options.root / destination.place(target)


class TestFile(DestinationContract):
    """A folder of this host, under a prefix."""

    @pytest.fixture
    def destination(self, tmp_path: Path) -> Iterator[FileDestination]:
        """Give an empty one, whose root is not there yet."""
        made = make(tmp_path / "agents", prefix="p")
        yield made
        made.close()

    def read_raw(self, destination: Any, target: Target) -> Mapping[str, Any] | None:
        """Read as an agent does."""
        path = path_of(destination, target)
        return json.loads(path.read_text()) if path.exists() else None

    def write_raw(self, destination: Any, target: Target, values: Mapping[str, Any]) -> None:
        """Write as an editor does: another file, renamed."""
        path = path_of(destination, target)
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        path.with_suffix(".new").write_text(json.dumps(values))
        path.with_suffix(".new").rename(path)

    def sibling(self, destination: Any) -> FileDestination:
        """Return a connection of another Keyturn to the same folder."""
        return make(destination.options.root, store_id=OTHER_STORE_ID, prefix="p")

    def write_garbage(self, destination: Any, target: Target) -> bool:
        """Write a file that is no object."""
        path = path_of(destination, target)
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        path.write_text('["not", "an object"]')
        return True

    def test_modes_let_agents_read_and_nobody_else(self, destination: FileDestination) -> None:
        """Files are 0640, folders 2750, and what is ours alone is 0700."""
        target = Target(to="contract", path="team/bot")
        publish(destination, target, new_entry(1))
        modes = {
            path.name: stat.S_IMODE(path.stat().st_mode)
            for path in (destination.options.root, *destination.options.root.rglob("*"))
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
            publish(destination, target, new_entry(seed))
        secrets = [new_entry(seed).secret.reveal().encode() for seed in (1, 2)]
        holders = [
            path.name
            for path in destination.options.root.rglob("*")
            if path.is_file() and any(secret in path.read_bytes() for secret in secrets)
        ]
        assert holders == ["bot.json"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_agent_of_the_group_reads_and_cannot_write(tmp_path: Path) -> None:
    """As another user of the group: the entry can be read, nothing beside it changed or listed."""
    group = grp.getgrgid(65534) if 65534 in {g.gr_gid for g in grp.getgrall()} else grp.getgrgid(1)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    destination = make(tmp_path / "agents", group=group.gr_name)
    target = Target(to="f", path="bot")
    publish(destination, target, new_entry(1))
    destination.close()
    answers = _as_agent(tmp_path / "agents", group.gr_gid)
    assert answers == {
        "read": parts(target.keys, new_entry(1)),
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
