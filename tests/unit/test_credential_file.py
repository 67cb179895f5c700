"""Files that hold our own credentials: whose they may be, and what is in their place instead."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from keyturn.config.file import Problem, read_document
from keyturn.credential_file import credential_path, read_credential
from keyturn.errors import ConfigError

ROOT = os.geteuid() == 0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Give a good credential file in a folder of its own."""
    folder = tmp_path / "credentials"
    folder.mkdir(mode=0o700)
    path = folder / "token"
    path.touch(mode=0o600)
    path.write_text("the-token\n")
    return path


def test_a_good_file_is_read(file: Path) -> None:
    """Root's or ours, in folders that nobody else can write; also through a link."""
    assert read_credential(file) == "the-token\n"
    (file.parent / "link").symlink_to(file)
    assert read_credential(file.parent / "link") == "the-token\n"


def owned_by_another(path: Path) -> None:
    """Give the file away."""
    os.chown(path, 65534, -1)


def in_an_open_folder(path: Path) -> None:
    """Let others replace the file."""
    path.parent.chmod(0o777)


def led_through_an_open_folder(path: Path) -> None:
    """Put a link in its place that leads through such a folder."""
    other = path.parent / "open"
    other.mkdir()
    path.rename(other / "token")
    path.symlink_to(other / "token")
    other.chmod(0o777)


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(
            owned_by_another, marks=pytest.mark.skipif(not ROOT, reason="root gives files away")
        ),
        in_an_open_folder,
        led_through_an_open_folder,
    ],
)
def test_a_file_that_others_can_replace_is_refused(
    file: Path, harm: Callable[[Path], None]
) -> None:
    """Whoever can put another token there chooses with whose rights we act; also a projected one."""
    harm(file)
    for anybody in (False, True):
        with pytest.raises(ConfigError, match="could be replaced by others"):
            read_credential(file, anybody_may_read=anybody)


def test_a_projected_token_may_lie_in_a_sticky_folder(file: Path) -> None:
    """As kubelet makes it: readable for anybody, in the sticky folder of a volume in memory."""
    file.parent.chmod(0o1777)
    file.chmod(0o644)
    assert read_credential(file, anybody_may_read=True) == "the-token\n"


def test_an_empty_file_is_named_so(file: Path) -> None:
    """Whoever has redirected nothing into it is told that, and not that a login was refused."""
    file.write_text("\n")
    with pytest.raises(ConfigError, match="token is empty"):
        read_credential(file)


def test_pipes_and_folders_are_refused_at_once(file: Path, tmp_path: Path) -> None:
    """What would block for ever is no file, neither as a credential nor as configuration."""
    file.unlink()
    os.mkfifo(file, 0o600)
    ended: list[str] = []
    problems: list[Problem] = []

    def look() -> None:
        for path in (file, file.parent):
            with pytest.raises(ConfigError, match="cannot be read"):
                read_credential(path)
            read_document(path, problems)
        ended.append("yes")

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(5)
    assert ended
    assert ["no plain file" in problem.text for problem in problems] == [True, True]


def test_a_credential_of_systemds_is_named_and_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As systemd makes it: a read-only folder, a file that nobody else reads, replaced as a whole."""
    folder = tmp_path / "keyturn.service"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    path = credential_path("credential:vault-token")
    assert path == folder / "vault-token"
    # 0440 is 0400 with an access control list: its mask shows as the rights of the group.
    for mode, text in [(0o400, "first"), (0o440, "second")]:
        folder.chmod(0o700)
        (folder / "new").write_text(text)
        (folder / "new").chmod(mode)
        (folder / "new").rename(path)
        folder.chmod(0o500)
        assert read_credential(path) == text
    folder.chmod(0o700)


def test_without_systemd_it_is_looked_for_where_our_unit_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So root's `keyturn check --probe` finds it, and `check` in a pull request needs none."""
    for folder in (None, "relative"):
        monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
        if folder:
            monkeypatch.setenv("CREDENTIALS_DIRECTORY", folder)
        found = credential_path("credential:vault-token")
        assert found == Path("/run/credentials/keyturn.service/vault-token")
    assert credential_path("/etc/keyturn/token") == Path("/etc/keyturn/token")


@pytest.mark.parametrize(
    "value",
    ["", "token", "credential:", "credential:..", "credential:../x", "credential:a/b",
     "credential:.a", "credential:a\n", "Credential:a", 7, None],
)  # fmt: skip
def test_what_names_no_credential(value: object) -> None:
    """No name leads out of the folder."""
    with pytest.raises(ValueError):
        credential_path(value)
