"""Where the embedded verifier is heard: at a file, again when that is lost, elsewhere where none can be."""

from __future__ import annotations

import os
import socket
from contextlib import closing
from pathlib import Path

import pytest

from keyturn.daemon.embedded import Ear
from keyturn.daemon.supervision import Supervisor

READY = (os.getpid(), frozenset({"READY=1", "STATUS=here"}))


def say(one: Ear) -> None:
    """Say something as a child does."""
    Supervisor.take({"NOTIFY_SOCKET": one.address}, pid=os.getpid()).ready("here")


def test_it_hears_at_a_file_who_says_what(tmp_path: Path) -> None:
    """With the pid that the kernel tells; and nothing is left when it is closed."""
    with closing(Ear(tmp_path)) as one:
        assert [Path(one.address)] == list(tmp_path.iterdir())
        say(one)
        assert list(one.heard(5)) == [READY]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("instead", ["nothing", "file", "socket"])
def test_it_hears_again_at_a_file_that_was_removed(tmp_path: Path, instead: str) -> None:
    """Whoever mirrors or cleans the folder must not have a verifier killed that nobody hears."""
    with closing(Ear(tmp_path)) as one, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        Path(one.address).unlink()
        if instead == "file":
            Path(one.address).touch()
        elif instead == "socket":
            other.bind(one.address)
        assert list(one.heard(0)) == []
        say(one)
        assert list(one.heard(5)) == [READY]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_for_a_while_is_no_error(tmp_path: Path) -> None:
    """It hears as soon as it is back."""
    folder = tmp_path / "state"
    folder.mkdir()
    with closing(Ear(folder)) as one:
        folder.rename(tmp_path / "aside")
        assert list(one.heard(0)) == []
        folder.mkdir()
        assert list(one.heard(0)) == []
        say(one)
        assert list(one.heard(5)) == [READY]


@pytest.mark.parametrize("name", ["x" * 120, "missing"])
def test_where_no_file_can_be_it_hears_all_the_same(tmp_path: Path, name: str) -> None:
    """A path that is too long, a file system without sockets: no reason not to start."""
    folder = tmp_path / name
    if name != "missing":
        folder.mkdir()
    with closing(Ear(folder)) as one:
        assert one.address.startswith("@")
        say(one)
        assert list(one.heard(5)) == [READY]
        assert list(tmp_path.rglob(".notify-*")) == []


def test_what_killed_daemons_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """Another daemon's is heard, and stays; so does what a link leads to."""
    left, target = tmp_path / ".notify-left", tmp_path / "elsewhere"
    for path in (left, target):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as dead:
            dead.bind(os.fspath(path))
    (tmp_path / ".notify-link").symlink_to(target)
    (tmp_path / ".notify-file").touch()
    with closing(Ear(tmp_path)) as other, closing(Ear(tmp_path)) as one:
        names = {path.name for path in tmp_path.iterdir()}
        ours = {Path(each.address).name for each in (one, other)}
        assert ".notify-left" not in names
        assert names >= {"elsewhere"} | ours
