"""Files keep the contract, and what only files can be attacked by."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from keyturn.core.model import Target
from keyturn.destinations.file import FileDestination, FileOptions
from keyturn.errors import ConfigError, KeyturnError, Rejected
from keyturn.testing.contract import PLACE, STORE_ID, DestinationContract, new_entry
from keyturn.testing.fakes import FakeClock


def make(root: Path) -> FileDestination:
    """Make a destination over a folder."""
    return FileDestination(
        FileOptions(root=str(root)), name="f", store_id=STORE_ID, clock=FakeClock()
    )


def path_of(destination: FileDestination, target: Target) -> Path:
    """Return where an agent reads."""
    return destination.options.root / destination.place(target)


class TestFile(DestinationContract):
    """A folder of this host."""

    @pytest.fixture
    def destination(self, tmp_path: Path) -> FileDestination:
        return make(tmp_path / "agents")

    def read_raw(self, destination: Any, target: Target) -> dict[str, Any] | None:
        path = path_of(destination, target)
        return json.loads(path.read_text()) if path.exists() else None

    def write_raw(self, destination: Any, target: Target, values: Mapping[str, str]) -> None:
        path = path_of(destination, target)
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        path.write_text(json.dumps(values))

    def test_modes_are_tight(self, destination: FileDestination) -> None:
        """Agents' group may read, nobody else, and what is ours alone nobody but us."""
        self.publish(destination, PLACE, new_entry(1))
        root = destination.options.root
        modes = {
            name: f"{(root / name).stat().st_mode & 0o7777:o}"
            for name in ("team", "team/agent-1.json", "team/.keyturn")
        }

        assert modes == {"team": "2750", "team/agent-1.json": "640", "team/.keyturn": "700"}

    def test_a_link_is_never_followed(self, destination: FileDestination, tmp_path: Path) -> None:
        """A link in place of a folder or of the entry leads nowhere."""
        victim = tmp_path / "victim"
        victim.mkdir()
        self.publish(destination, PLACE, new_entry(1))
        root = destination.options.root
        (root / "linked").symlink_to(victim)
        with pytest.raises(KeyturnError):
            self.publish(destination, Target(to="f", path="linked/x"), new_entry(2))
        (root / "entry.json").symlink_to(victim / "target")
        with pytest.raises(KeyturnError):
            self.publish(destination, Target(to="f", path="entry"), new_entry(3))

        assert list(victim.iterdir()) == []

    def test_a_folder_that_others_can_write_is_refused(self, destination: FileDestination) -> None:
        """Whoever can write the folder could swap what we put there."""
        self.publish(destination, PLACE, new_entry(1))
        (destination.options.root / "team").chmod(0o2770)

        with pytest.raises(Rejected):
            self.publish(destination, PLACE, new_entry(2))

    @pytest.mark.parametrize("garbage", ["", "{", "[]", '"text"', "null", "\x00\xff"])
    def test_garbage_counts_as_somebody_elses(
        self, destination: FileDestination, garbage: str
    ) -> None:
        """What is no JSON object is never overwritten."""
        path = path_of(destination, PLACE)
        path.parent.mkdir(mode=0o750, parents=True)
        path.write_text(garbage)

        assert destination.observe(PLACE).other_keys
        with pytest.raises(Rejected):
            self.publish(destination, PLACE, new_entry(1))

        assert garbage == path.read_text()

    def test_an_endless_file_counts_as_somebody_elses(self, destination: FileDestination) -> None:
        """No entry is read beyond 1 MiB, and none is replaced."""
        path = path_of(destination, PLACE)
        path.parent.mkdir(mode=0o750, parents=True)
        path.write_bytes(b" " * (1024 * 1024 + 1))

        assert destination.observe(PLACE).other_keys
        with pytest.raises(Rejected):
            self.publish(destination, PLACE, new_entry(1))

    def test_two_connections_to_one_folder_share_identities(self, tmp_path: Path) -> None:
        """The same file by another connection, a link or a suffix is the same entry."""
        root = tmp_path / "agents"
        root.mkdir(mode=0o750)
        (tmp_path / "link").symlink_to(root)
        one, other = make(root), make(tmp_path / "link")

        assert one.identity(PLACE) == other.identity(PLACE)
        assert one.identity(PLACE) == one.identity(Target(to="f", path="team/agent-1.json"))


def spellings(count: int, seed: int) -> list[str]:
    """Make paths of dots, slashes, cases and segments, many of them nearly alike."""
    draw = random.Random(seed)
    parts = ["a", "b", "A", "x", "..", ".", "", "a.json", "b.json", ".keyturn", "%2e%2e", "a ", "~"]
    return ["/".join(draw.choices(parts, k=draw.randint(1, 4))) for _ in range(count)]


@pytest.mark.parametrize(
    "count", [1000, pytest.param(10_000, marks=pytest.mark.full)], ids=["tenth", "whole"]
)
def test_two_spellings_are_one_entry_or_two_files(tmp_path: Path, count: int) -> None:
    """Of all spellings none leaves the root, and two share an identity only if they share a file."""
    destination = make(tmp_path / "agents")
    files: dict[str, str] = {}
    for path in spellings(count, seed=7):
        target = Target(to="f", path=path)
        try:
            identity = destination.identity(target)
        except ConfigError:
            continue
        real = os.path.realpath(path_of(destination, target))
        assert real.startswith(f"{tmp_path}/agents/")
        assert files.setdefault(identity, real) == real
    assert len(set(files.values())) == len(files)
    assert files
