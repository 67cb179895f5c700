"""A full disk keeps nobody from being refused: the ballast is there for that, and for nothing else."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from keyturn.storage import ballast as module
from keyturn.storage.ballast import PIECE, PIECES, Ballast
from support.peers import needs_root
from support.running import Keyturn, accepts

SIZE = 16  # MiB of the small disk


@contextmanager
def small_disk(place: Path) -> Iterator[None]:
    """Put a file system of a few mebibytes at a place."""
    place.mkdir(mode=0o700)
    options = f"size={SIZE}m,mode=0700,nr_inodes=4096"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "keyturn", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def fill(place: Path, *, entries: bool = False) -> None:
    """Use up every block of a disk, and with `entries` every inode, as a neighbour would."""
    with (place / "neighbour").open("ab", buffering=0) as file, suppress(OSError):
        for size in (1 << 20, 1 << 12, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
    if entries:
        (place / "many").mkdir()
        with suppress(OSError):
            for number in range(1 << 20):
                (place / "many" / str(number)).touch()


def free(place: Path) -> None:
    """Give the space back."""
    (place / "neighbour").unlink()


@pytest.fixture
def keyturn(tmp_path: Path) -> Iterator[Keyturn]:
    """Give a running Keyturn whose state has a small disk of its own."""
    with small_disk(tmp_path / "state"), Keyturn(tmp_path, agents=4) as one:
        one.wait_first()
        yield one


def kept(keyturn: Keyturn) -> int:
    """Count the bytes of the ballast."""
    folder = keyturn.store.parent / "ballast"
    return sum(path.stat().st_size for path in folder.iterdir())


@needs_root
@pytest.mark.parametrize("daemon", ["up", "down"])
def test_a_revoke_works_on_a_full_disk(keyturn: Keyturn, daemon: str) -> None:
    """Every agent is revoked, one after the other, with its rows and audit; then room comes back."""
    state = keyturn.store.parent
    verifier = keyturn.verifier()
    names = [f"agent-{number}" for number in range(4)]
    held = {name: keyturn.held(name) for name in names}
    assert kept(keyturn) == PIECE * PIECES
    fill(state)
    if daemon == "down":
        keyturn.stop()
        fill(state)

    for name in names:
        code, result = keyturn.ask("revoke", name, "--reason", "INC-7 " + "x" * 3000)
        assert (code, result["incomplete"], result["warnings"]) == (0, False, [])
        assert accepts(verifier, held[name]) is False
        assert (state / "revoked.d" / held[name]["version"]).read_bytes().endswith(b"}")

    assert kept(keyturn) < PIECE * PIECES
    free(state)
    if daemon == "down":
        keyturn.start()
    keyturn.wait_for(lambda: kept(keyturn) == PIECE * PIECES)
    assert {row["state"] for row in keyturn.ask("status")[1]} == {"suspended"}
    assert keyturn.ask("audit", "--verify")[1]["chain"]["ok"]
    verifier.close()


@needs_root
def test_a_disk_without_file_entries_keeps_nobody_from_being_refused(keyturn: Keyturn) -> None:
    """Blocks and inodes are both used up: the pieces of the ballast are inodes too."""
    verifier = keyturn.verifier()
    held = {f"agent-{n}": keyturn.held(f"agent-{n}") for n in range(4)}
    fill(keyturn.store.parent, entries=True)

    for name, of_agent in held.items():
        assert keyturn.ask("revoke", name)[0] == 0
        assert accepts(verifier, of_agent) is False
    verifier.close()


@needs_root
def test_everything_else_says_that_the_disk_is_full(keyturn: Keyturn) -> None:
    """What is no revoke leaves the ballast alone, says why, spins nowhere, and loses nothing."""
    state = keyturn.store.parent
    verifier = keyturn.verifier()
    before = {f"agent-{n}": keyturn.held(f"agent-{n}") for n in range(4)}
    fill(state)
    logged = keyturn.log.stat().st_size
    failed = 0
    for number in range(40):  # pages that are half empty take the first ones
        done = keyturn.run("agents", "add", f"more-{number}", "--to", f"files:more-{number}")
        failed += done.returncode != 0
        if done.returncode:
            assert done.returncode == 69
            assert "no space left" in done.stderr
        if failed > 3:
            break
    time.sleep(3)

    assert failed > 3
    assert kept(keyturn) == PIECE * PIECES
    assert keyturn.log.stat().st_size - logged < 100_000
    for held in before.values():
        assert accepts(verifier, held) is True
    assert keyturn.ask("status")[0] == 0
    free(state)
    assert keyturn.run("rotate", "agent-0", "--wait").returncode == 0
    assert accepts(verifier, keyturn.held("agent-0")) is True
    assert keyturn.ask("audit", "--verify")[1]["chain"]["ok"]
    verifier.close()


# --- the ballast itself -------------------------------------------------------------------


def test_the_ballast_is_a_private_mebibyte_that_goes_piece_by_piece(tmp_path: Path) -> None:
    """Sixteen pieces of 64 KiB, 0600, incompressible; each release gives one, then there is none."""
    ballast = Ballast(tmp_path / "ballast")
    assert ballast.keep() == 1024 * 1024
    pieces = sorted((tmp_path / "ballast").iterdir())
    assert {piece.stat().st_mode & 0o777 for piece in pieces} == {0o600}
    assert len({piece.read_bytes()[:64] for piece in pieces}) == PIECES

    assert [ballast.release() for _ in range(PIECES + 1)] == [True] * PIECES + [False]
    assert list((tmp_path / "ballast").iterdir()) == []
    assert ballast.keep() == 1024 * 1024


def test_a_torn_piece_is_made_again(tmp_path: Path) -> None:
    """A crash while it was written leaves a short piece: that holds nothing back."""
    ballast = Ballast(tmp_path / "ballast")
    ballast.keep()
    os.truncate(tmp_path / "ballast" / "07", 100)

    assert ballast.keep() == 1024 * 1024


def test_the_ballast_never_fills_the_disk_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is hardly any room it is not made; where writing it fails no piece is left."""
    ballast = Ballast(tmp_path / "ballast")
    with monkeypatch.context() as patch:
        patch.setattr(module, "SPARE", 1 << 62)
        assert ballast.keep() == 0

    def full(_number: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, "no")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert ballast.keep() == 0
    assert list((tmp_path / "ballast").iterdir()) == []
