"""The files of the key ring: what is taken for a key, from whom, and how one is made."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from keyturn.cli.main import main
from keyturn.core.secret import Secret
from keyturn.daemon.keys import make
from keyturn.errors import ConfigError
from keyturn.testing.canary import leaks
from keyturn.verifier.keyed import Key
from keyturn.verifier.keyring import KeyRing, make_key, read_key

RAW = bytes(range(200, 232))


def put(path: Path, content: bytes, mode: int = 0o600) -> Path:
    """Write a file with this mode."""
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("mode", [0o400, 0o600])
@pytest.mark.parametrize(
    "content",
    [RAW, RAW.hex().encode(), RAW.hex().encode() + b"\n", RAW.hex().upper().encode()],
    ids=["raw", "hex", "hex and newline", "HEX"],
)
def test_every_way_to_write_a_key(tmp_path: Path, content: bytes, mode: int) -> None:
    """32 bytes are the same key raw and as hexadecimal digits, in a file that only we can read."""
    assert read_key(put(tmp_path / "k", content, mode)).check == Key(RAW).check


@pytest.mark.parametrize("content", [RAW + b"\n", RAW.hex().encode() + b"\r\n", bytes(1024)])
def test_what_is_no_hexadecimal_key_is_taken_as_it_is(tmp_path: Path, content: bytes) -> None:
    """Every byte counts then, also one at the end."""
    assert read_key(put(tmp_path / "k", content)).check == Key(content).check


@pytest.mark.parametrize("content", [b"", RAW[:31], bytes(1025), bytes(4096)])
def test_a_file_of_another_size_holds_no_key(tmp_path: Path, content: bytes) -> None:
    """Too short, too long: the error says what is expected."""
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        read_key(put(tmp_path / "k", content))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o700, 0o602])
def test_a_file_that_others_can_read_holds_no_key(tmp_path: Path, mode: int) -> None:
    """A key that somebody may have read is named by its file and mode, and not used."""
    with pytest.raises(ConfigError, match=f"mode {mode:04o}") as raised:
        read_key(put(tmp_path / "k", RAW, mode))
    assert "make-key" in raised.value.hint


def test_a_file_of_somebody_elses_holds_no_key(tmp_path: Path) -> None:
    """Neither theirs, nor ours in a folder where they could replace it; a pipe does not block."""
    theirs = put(tmp_path / "k", RAW)
    os.chown(theirs, 12345, 12345)
    with pytest.raises(ConfigError, match="could be replaced by others"):
        read_key(theirs)
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="could be replaced by others"):
        read_key(put(folder / "k", RAW))
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key(tmp_path / "pipe")


def test_a_key_is_made_once_and_for_us_alone(tmp_path: Path) -> None:
    """0600 whatever the umask, readable as it was made, and never over another file."""
    before = os.umask(0)
    try:
        made = make_key(tmp_path / "k", RAW)
    finally:
        os.umask(before)

    assert made.check == Key(RAW).check == read_key(tmp_path / "k").check
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="there already"):
        make_key(tmp_path / "k", bytes(32))
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="there already"):
        make_key(tmp_path / "link", bytes(32))
    assert read_key(tmp_path / "k").check == Key(RAW).check


def test_a_key_that_would_not_be_safe_is_not_left_behind(tmp_path: Path) -> None:
    """In a folder where others write nothing is made."""
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="could be replaced"):
        make_key(tmp_path / "k", RAW)
    assert not (tmp_path / "k").exists()
    tmp_path.chmod(0o700)


def test_a_ring_says_why_a_key_cannot_be_used(tmp_path: Path) -> None:
    """One bad file keeps no other from working; nothing of any file is in what is said."""
    files = {
        "good": put(tmp_path / "good", RAW.hex().encode()),
        "open": put(tmp_path / "open", RAW.hex().encode(), 0o644),
        "gone": tmp_path / "gone",
    }
    ring = KeyRing.read(files, current="good")

    assert set(ring.keys) == {"good"}
    assert "mode 0644" in ring.unusable["open"]
    assert "errno 2" in ring.unusable["gone"]
    assert leaks(repr(ring), Secret(RAW.hex())) == []


def test_the_command_makes_keys_where_they_belong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not in the store's folder, not over another file, and without a word of the key."""
    (tmp_path / "state").mkdir(mode=0o700)
    config = tmp_path / "keyturn.yaml"
    config.write_text(f"version: 1\nstore: {{url: 'sqlite:///{tmp_path}/state/keyturn.db'}}\n")
    config.chmod(0o600)
    path = tmp_path / "k1"

    def run(file: Path, *more: str) -> tuple[int, str]:
        code = main(["make-key", str(file), "-c", str(config), *more])
        found = capsys.readouterr()
        return code, found.out + found.err

    code, said = run(path)
    assert (code, str(path) in said) == (0, True)
    before = path.read_text()
    assert leaks(said, Secret(before.strip())) == []
    assert run(path)[0] == 78
    assert path.read_text() == before
    code, said = run(tmp_path / "state" / "k1", "--json")
    assert (code, "the store's folder" in said) == (4, True)
    assert not (tmp_path / "state" / "k1").exists()


def test_root_gives_a_new_key_to_the_stores_user(tmp_path: Path) -> None:
    """Else the daemon could not read what an administrator made for it."""
    (tmp_path / "state").mkdir(mode=0o700)
    os.chown(tmp_path / "state", 12345, 12346)
    config = tmp_path / "keyturn.yaml"
    config.write_text(f"version: 1\nstore: {{url: 'sqlite:///{tmp_path}/state/keyturn.db'}}\n")
    config.chmod(0o600)
    assert make(tmp_path / "k1", config)["owner"] == 12345
    found = (tmp_path / "k1").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (12345, 12346, 0o600)
