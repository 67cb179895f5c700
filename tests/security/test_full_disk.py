"""A full disk keeps nobody from being refused: the ballast is there for that, and for nothing else."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from keyturn.administration import Administration
from keyturn.daemon import service
from keyturn.daemon.service import Service
from keyturn.errors import StoreFull, StoreUnavailable
from keyturn.leaks import Leak
from keyturn.storage import ballast as module
from keyturn.storage.ballast import PIECE, PIECES, Ballast
from keyturn.storage.store import Store
from keyturn.verifier.spool import Spool
from support.cutter import CALLER, administration, open_store
from support.peers import needs_root
from support.running import Keyturn, accepts
from support.stores import add

VERSION = "0" * 14

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


# --- who may use it -----------------------------------------------------------------------


class Full:
    """A disk that is full until so many pieces of the ballast were given up."""

    def __init__(self, pieces: int, most: int = PIECES) -> None:
        self.pieces, self.given, self.most = pieces, 0, most

    def check(self) -> None:
        """Raise what a full disk raises."""
        if self.given < self.pieces:
            raise OSError(errno.ENOSPC, "no")

    def make_room(self) -> bool:
        """Give up one more piece."""
        self.given += 1
        return self.given <= self.most

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Let a call of the operating system meet the full disk."""

        def checked(*args: Any, **kwargs: Any) -> Any:
            self.check()
            return call(*args, **kwargs)

        return checked


@pytest.mark.parametrize("call", ["write", "open", "mkdir"])
def test_a_tombstone_with_its_note_gets_its_room_from_the_ballast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Wherever the disk is found full, pieces go until it works, and no more of them."""
    disk = Full(3)
    spool = Spool(tmp_path / "revoked.d", make_room=disk.make_room)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, disk.around(getattr(os, call)))
        spool.revoke(VERSION, {"reason": "why"})

    assert spool.notes(VERSION) == [{"reason": "why"}]
    assert disk.given == 3


def test_a_tombstone_without_its_note_refuses_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No block is left for the note and no ballast: the file is there, and a later try adds it."""
    disk = Full(1 << 20, most=0)
    spool = Spool(tmp_path / "revoked.d", make_room=disk.make_room)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", disk.around(os.write))
        spool.revoke(VERSION, {"reason": "why"})
    assert spool.holds(VERSION)
    assert (spool.ids(), spool.notes(VERSION)) == ([VERSION], [])

    spool.revoke(VERSION, {"reason": "why"})
    assert spool.notes(VERSION) == [{"reason": "why"}]


def test_a_note_that_was_cut_off_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a note would lose who, why and how much was revoked."""
    disk, write = Full(1), os.write

    def short(number: int, data: bytes) -> int:
        return write(number, data if disk.given else data[:5])

    spool = Spool(tmp_path / "revoked.d", make_room=disk.make_room)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", short)
        spool.revoke(VERSION, {"scope": "agent"})

    assert spool.notes(VERSION) == [{"scope": "agent"}]


def test_what_is_no_file_under_a_versions_name_refuses(tmp_path: Path) -> None:
    """A link, a folder or a pipe there is a tombstone; nothing follows it or waits for it."""
    spool, folder = Spool(tmp_path), tmp_path
    (folder / "target").touch()
    for number, make in enumerate(
        (lambda path: path.symlink_to("target"), lambda path: path.mkdir(), os.mkfifo)
    ):
        version = f"{number:014}"
        make(folder / version)
        spool.revoke(version, {"reason": "why"})
        assert spool.holds(version)
    assert (folder / "target").read_bytes() == b""


def test_a_long_reason_does_not_cost_the_note(tmp_path: Path) -> None:
    """The longest reason that the socket takes, escaped, comes back whole."""
    note = {"reason": "ж" * 32_000, "scope": "agent"}
    spool = Spool(tmp_path)
    spool.revoke(VERSION, note)

    assert spool.notes(VERSION) == [note]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Give a store with one agent and one version of it."""
    one = open_store(tmp_path, writer="w1")
    add(one, "a")
    with sqlite3.connect(tmp_path / "keyturn.db") as raw:
        raw.execute(
            "INSERT INTO versions (id, login, credential_uid, seq, state, scheme, digest, origin, exposed,"
            " fence, minted_at) VALUES (?, 'a', 'cred-a', 1, 'kept', 'argon2id', '', 'minted', 1, 1, 1)",
            [VERSION],
        )
    raw.close()
    yield one
    one.close()


def verbs_on(tmp_path: Path, store: Store, disk: Full) -> Administration:
    """Return the verbs over a store that is full as long as the disk is."""

    def amend(*args: Any, **kwargs: Any) -> Any:
        try:
            disk.check()
        except OSError:
            raise StoreFull from None
        return Store.amend(store, *args, **kwargs)

    store.amend = amend  # type: ignore[method-assign]
    verbs = administration(tmp_path, store, patience=0.0)
    return replace(verbs, make_room=disk.make_room)


def test_the_store_gets_its_room_for_a_revoke_from_the_ballast(
    tmp_path: Path, store: Store
) -> None:
    """Piece by piece until the commit goes through; without any it is incomplete, and refused."""
    disk = Full(3)
    result = verbs_on(tmp_path, store, disk).revoke(Leak(version=VERSION), CALLER)
    assert (result["incomplete"], disk.given) == (False, 3)

    empty = Full(1 << 20, most=0)
    result = verbs_on(tmp_path, store, empty).revoke(Leak(version=VERSION), CALLER)
    assert result["incomplete"]
    assert Spool(tmp_path / "revoked.d").holds(VERSION)


def test_nothing_but_a_revoke_uses_the_ballast(tmp_path: Path, store: Store) -> None:
    """A suspension says that the disk is full, and changes nothing."""
    disk = Full(3)
    with pytest.raises(StoreFull, match="no space left"):
        verbs_on(tmp_path, store, disk).suspend("a", CALLER)
    assert disk.given == 0
    assert store.agent("a").state == "enabled"


def test_a_spool_that_takes_nothing_is_no_veto(tmp_path: Path, store: Store) -> None:
    """Where no tombstone can be made the store refuses; where neither works nothing is promised."""
    (tmp_path / "revoked.d").write_text("")
    verbs = verbs_on(tmp_path, store, Full(0))
    result = verbs.revoke(Leak(version=VERSION), CALLER)
    assert (result["incomplete"], len(result["warnings"])) == (False, 1)

    with pytest.raises(StoreUnavailable, match="no tombstone"):
        verbs_on(tmp_path, store, Full(1, most=0)).revoke(Leak(version=VERSION), CALLER)


def test_a_revoke_that_nothing_remembers_is_an_error(tmp_path: Path, store: Store) -> None:
    """No version yet and no room for the row: nobody would write the rest, so nobody says so."""
    with pytest.raises(StoreFull):
        verbs_on(tmp_path, store, Full(1, most=0)).revoke(Leak(agent="a"), CALLER)


def test_a_full_store_makes_no_busy_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is due stays due on a full disk: it is tried again every second, not all the time."""
    tries = []

    def run(*args: Any, **kwargs: Any) -> None:
        tries.append(args)
        raise StoreFull

    monkeypatch.setattr(service.rotation, "run", run)
    settings = service.load(Keyturn(tmp_path).config)
    daemon = Service(settings, socket=tmp_path / "socket")
    due = SimpleNamespace(credential_uid="c", connections=())
    monkeypatch.setattr(daemon.parts.store, "due", lambda **_: [due])
    daemon._tick()
    time.sleep(0.5)
    daemon.stop()
    daemon._pool.shutdown()
    daemon.parts.close()

    assert len(tries) == 1


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
