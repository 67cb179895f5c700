"""Attacks on files: names that mean something else, links, swaps, foreign folders, broken entries."""

from __future__ import annotations

import contextlib
import grp
import itertools
import json
import os
import random
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from keyturn.core.model import Target
from keyturn.destinations import beneath
from keyturn.destinations.file import SIDE, FileDestination, FileOptions
from keyturn.errors import (
    ConfigError,
    Conflict,
    Denied,
    DestinationError,
    DestinationUnavailable,
    NotFound,
    Rejected,
)
from keyturn.testing import FakeClock
from keyturn.testing.contract import STORE_ID, new_entry, parts, publish

BOT = Target(to="f", path="bot")
STRANGER = 12345
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def make(root: Path, **options: Any) -> FileDestination:
    """Make a connection to a folder."""
    read = FileOptions.model_validate({"root": str(root), **options})
    return FileDestination(read, name="f", store_id=STORE_ID, clock=FakeClock())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Give a folder that is ours alone."""
    folder = tmp_path / "agents"
    folder.mkdir(mode=0o750)
    return folder


@pytest.fixture
def files(root: Path) -> Iterator[FileDestination]:
    """Give a connection to it."""
    made = make(root)
    yield made
    made.close()


def everything(folder: Path) -> dict[str, bytes | str]:
    """Return all names beneath a folder, with their bytes or where they link to."""
    return {
        str(path.relative_to(folder)): (
            str(path.readlink())
            if path.is_symlink()
            else path.read_bytes()
            if path.is_file()
            else "/"
        )
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file() or path.is_dir()
    }


# --- names --------------------------------------------------------------------------------


def spelling(draw: random.Random) -> str:
    """Make a path of dots, slashes, cases and segments, many of them nearly alike."""
    segments = ["a", "b", "A", "a.json", "a.b", "a.", "-", "_", "a-b", "json", "a.json.json"]
    wrong = [
        "..",
        ".",
        "",
        ".a",
        ".keyturn",
        "%2e%2e",
        "a ",
        "~",
        "a\0",
        "é",
        "a\\b",
        "a..b",
        "a\n",
    ]
    pool = segments if draw.random() < 0.7 else segments + wrong
    return "/".join(draw.choices(pool, k=draw.randint(1, 3)))


@pytest.mark.parametrize(
    "count", [1_000, pytest.param(10_000, marks=pytest.mark.full)], ids=["tenth", "whole"]
)
def test_one_identity_is_one_file(tmp_path: Path, count: int) -> None:
    """Of pairs of spellings over two roots and a prefix, identities are equal where files are."""
    draw = random.Random(7)
    outer, inner = make(tmp_path / "agents"), make(tmp_path / "agents", prefix="a")
    deeper = make(tmp_path / "agents" / "a")
    accepted = same = 0
    for _ in range(count):
        pair = [(draw.choice((outer, inner, deeper)), spelling(draw)) for _ in range(2)]
        if draw.random() < 0.3:
            pair[1] = (pair[1][0], pair[0][1])
        try:
            names = [files.identity(Target(to="f", path=path)) for files, path in pair]
        except ConfigError:
            continue
        places = [
            files.options.root / files.place(Target(to="f", path=path)) for files, path in pair
        ]
        real = [os.path.realpath(place) for place in places]
        assert all(place.startswith(f"{tmp_path}/agents/") for place in real)
        assert (names[0] == names[1]) is (real[0] == real[1])
        accepted += 1
        same += names[0] == names[1]
    assert accepted > count / 4
    assert same > count / 50


@pytest.mark.parametrize(
    "count", [300, pytest.param(3_000, marks=pytest.mark.full)], ids=["tenth", "whole"]
)
def test_no_spelling_writes_outside_or_into_another_entry(tmp_path: Path, count: int) -> None:
    """By whatever name one writes: each identity shows its own version, nothing else appears."""
    files, draw = make(tmp_path / "agents", prefix="p"), random.Random(11)
    written: dict[str, tuple[Target, str]] = {}
    for seed in range(count):
        target = Target(to="f", path=spelling(draw))
        entry = new_entry(seed)
        try:
            publish(files, target, entry)
        except (ConfigError, DestinationError):
            continue
        written[files.identity(target)] = (target, entry.version_id)
    for target, version_id in written.values():
        assert files.observe(target).version_id == version_id
    entries = {
        path
        for path in tmp_path.rglob("*")
        if path.is_file() and SIDE not in path.relative_to(tmp_path).parts
    }
    assert entries == {files.options.root / files.place(target) for target, _ in written.values()}
    assert [path.name for path in tmp_path.iterdir()] == ["agents"]
    assert [path.name for path in (tmp_path / "agents").iterdir()] == ["p"]
    files.close()


def test_a_link_to_the_root_is_the_same_place(root: Path, tmp_path: Path) -> None:
    """Two connections to one folder by two names are found to share their entries, offline."""
    (tmp_path / "link").symlink_to(root)
    assert make(root).identity(BOT) == make(tmp_path / "link").identity(BOT)
    assert make(root).identity(BOT) == make(root).identity(Target(to="f", path="bot.json"))


def test_names_that_the_file_system_cannot_hold_are_refused(files: FileDestination) -> None:
    """A name that would fail at every write is refused when the file is loaded."""
    for path in ("x" * 197, "/".join(["x" * 100] * 11)):
        with pytest.raises(ConfigError):
            files.identity(Target(to="f", path=path))
    longest = Target(to="f", path="x" * 195)
    publish(files, longest, new_entry(1))
    assert files.observe(longest).version_id == new_entry(1).version_id


def test_an_entry_cannot_stand_for_the_lock_of_another(files: FileDestination) -> None:
    """Entries named like locks, side files and temporaries live beside those of others."""
    names = [
        "bot",
        "bot.json.lock",
        "bot.json.side",
        "bot.lock",
        "bot.side",
        "keyturn-new-bot.json",
    ]
    for seed, name in enumerate(names):
        publish(files, Target(to="f", path=name), new_entry(seed))
    for seed, name in enumerate(names):
        found = files.observe(Target(to="f", path=name))
        assert (found.version_id, found.owner) == (new_entry(seed).version_id, STORE_ID)


# --- links and folders --------------------------------------------------------------------


def test_links_lead_nowhere(files: FileDestination, root: Path, tmp_path: Path) -> None:
    """A link in place of a folder, the entry, the side folder or the root is refused."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "bot.json").write_text('{"id": "theirs"}')
    (root / "folder").symlink_to(victim)
    (root / "bot.json").symlink_to(victim / "bot.json")
    (root / "new.json").symlink_to(victim / "new.json")
    (root / "side").mkdir()
    (root / "side" / SIDE).symlink_to(victim)
    (tmp_path / "root").symlink_to(root)
    before = everything(victim)
    through = make(tmp_path / "root")
    for path in ("folder/bot", "bot", "new", "side/bot"):
        target = Target(to="f", path=path, merge=True, adopt=True)
        for call in (files.observe, lambda t: files.activate(t, new_entry(1), expected="0/-")):
            with pytest.raises(Rejected):
                call(target)
    with pytest.raises(Rejected, match="link"):
        through.observe(Target(to="f", path="x"))
    assert everything(victim) == before
    through.close()


def test_a_folder_that_is_swapped_for_a_link_gets_no_write(
    files: FileDestination, root: Path, tmp_path: Path
) -> None:
    """While somebody swaps a folder and a link to and fro, every write lands inside or not at all."""
    victim, inside = tmp_path / "victim", root / "team"
    for folder in (victim, inside):
        folder.mkdir(mode=0o750)
    stop, refused = threading.Event(), 0

    def swap() -> None:
        for number in itertools.count():
            with contextlib.suppress(OSError):
                inside.rename(root / f"aside-{number}")
            with contextlib.suppress(OSError):
                inside.symlink_to(victim)
            time.sleep(0.0005)
            with contextlib.suppress(OSError):
                inside.unlink()
            time.sleep(0.0005)
            if stop.is_set():
                return

    swapper = threading.Thread(target=swap)
    swapper.start()
    target = Target(to="f", path="team/bot")
    for seed in range(200):
        try:
            publish(files, target, new_entry(seed))
        except DestinationError:
            refused += 1
    stop.set()
    swapper.join()
    assert list(victim.iterdir()) == []
    assert refused
    publish(files, target, new_entry(1))
    assert files.observe(target).version_id == new_entry(1).version_id


@pytest.mark.parametrize("mode", [0o770, 0o757, 0o2770, 0o777, 0o1777])
@pytest.mark.parametrize("where", ["parent", "root", "folder", "side"])
def test_folders_that_others_can_write_are_refused(tmp_path: Path, where: str, mode: int) -> None:
    """Whoever can write a folder on the way could swap what we put there, so nothing is put there."""
    parent = tmp_path / "parent"
    files = make(parent / "agents")
    target = Target(to="f", path="team/bot")
    publish(files, target, new_entry(1))
    folders = {"parent": "", "root": "agents", "folder": "agents/team"}
    changed = parent / folders.get(where, f"agents/team/{SIDE}")
    changed.chmod(mode)
    if where == "parent" and mode == 0o1777:  # as /tmp: nobody can rename what is not theirs
        assert files.observe(target).exists
        files.close()
        return
    for call in (lambda: files.observe(target), lambda: publish(files, target, new_entry(2))):
        with pytest.raises(Rejected, match="can be changed by others"):
            call()
    changed.chmod(0o750)
    assert files.observe(target).version_id == new_entry(1).version_id
    files.close()


@as_root
@pytest.mark.parametrize("where", ["parent", "root", "folder"])
def test_folders_of_somebody_else_are_refused(tmp_path: Path, where: str) -> None:
    """The owner of a folder can give himself the right to write it, so his folders are not ours."""
    parent = tmp_path / "parent"
    files = make(parent / "agents")
    target = Target(to="f", path="team/bot")
    publish(files, target, new_entry(1))
    changed = {"parent": parent, "root": parent / "agents", "folder": parent / "agents/team"}[where]
    os.chown(changed, STRANGER, -1)
    with pytest.raises(Rejected, match="can be changed by others"):
        files.observe(target)
    files.close()


def test_no_group_is_a_clear_error(root: Path) -> None:
    """A group that does not exist is named, and nothing is written."""
    files = make(root, group="no-such-group-here")
    for call in (files.probe, lambda: publish(files, BOT, new_entry(1))):
        with pytest.raises(NotFound, match="no-such-group-here"):
            call()
    assert everything(root) == {}
    files.close()


def test_a_probe_makes_no_root(tmp_path: Path) -> None:
    """A probe makes nothing: it says what the first rotation will make."""
    files = make(tmp_path / "not-there")
    assert "the first rotation makes it" in files.probe()
    assert list(tmp_path.iterdir()) == []
    files.close()


@as_root
def test_a_folder_that_was_there_gets_entries_for_the_group(root: Path) -> None:
    """Where an operator made the folder, without setgid, agents can read what we put there."""
    group = next(group for group in grp.getgrall() if group.gr_gid)
    for option in (group.gr_name, str(group.gr_gid)):
        files = make(root, group=option, mode="0440")
        target = Target(to="f", path=f"bot-{option}")
        publish(files, target, new_entry(1))
        found = (root / f"bot-{option}.json").stat()
        assert (found.st_gid, stat.S_IMODE(found.st_mode)) == (group.gr_gid, 0o440)
        files.close()


@as_root
def test_an_unprivileged_daemon_is_denied_in_our_words(tmp_path: Path) -> None:
    """Without the right to write there the error is Denied, with what to do."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    root = tmp_path / "agents"
    root.mkdir(mode=0o755)
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setresgid(STRANGER, STRANGER, STRANGER)
        os.setresuid(STRANGER, STRANGER, STRANGER)
        try:
            publish(make(root), BOT, new_entry(1))
            said = "written"
        except DestinationError as error:
            said = f"{type(error).__name__}|{bool(error.hint)}"
        os.write(into, said.encode())
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as answer:
        assert answer.read() == f"{Denied.__name__}|True"
    os.waitpid(child, 0)


# --- broken and hostile entries -----------------------------------------------------------

GARBAGE = {
    "empty": b"",
    "half": b'{"secret": "x',
    "list": b"[]",
    "text": b'"text"',
    "null": b"null",
    "bytes": b"\x00\xff\xfe",
    "utf-16": '{"secret": "x"}'.encode("utf-16"),
    "bom": b'\xef\xbb\xbf{"secret": "x"}',
    "twice": b'{"secret": "one", "secret": "two"}',
    "twice within": b'{"other": {"a": 1, "a": 2}}',
    "nan": b'{"other": NaN}',
    "infinite": b'{"other": 1e999}',
    "deep": b'{"other": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "digits": b'{"other": ' + b"1" * 5_000 + b"}",
    "padded": b'{"other": "x"}' + b" " * (1024 * 1024),
    "endless": b'{"other": "' + b"x" * (1024 * 1024) + b'"}',
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_somebody_elses(files: FileDestination, root: Path, garbage: bytes) -> None:
    """What no strict reader can read exists, holds keys that are not ours, and is not replaced."""
    (root / "bot.json").write_bytes(garbage)
    found = files.observe(BOT)
    assert (found.exists, found.has_value, found.other_keys) == (True, False, True)
    taking = Target(to="f", path="bot", merge=True, adopt=True)
    for target in (BOT, taking):
        with pytest.raises(Rejected):
            publish(files, target, new_entry(1))
    assert (root / "bot.json").read_bytes() == garbage


def test_what_we_wrote_is_repaired_when_it_was_broken(files: FileDestination, root: Path) -> None:
    """An entry with our marker that somebody made unreadable can be written anew."""
    publish(files, BOT, new_entry(1))
    (root / "bot.json").write_bytes(b"garbage")
    publish(files, BOT, new_entry(2))
    assert json.loads((root / "bot.json").read_text()) == parts(BOT.keys, new_entry(2))


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


@pytest.mark.parametrize("put", [Path.mkdir, _pipe, _socket], ids=["folder", "pipe", "socket"])
def test_what_is_no_plain_file_is_refused_at_once(
    files: FileDestination, root: Path, put: Callable[[Path], None]
) -> None:
    """Neither a pipe that would block us nor a folder or socket is read or replaced."""
    put(root / "bot.json")
    for call in (lambda: files.observe(BOT), lambda: publish(files, BOT, new_entry(1))):
        with pytest.raises(Rejected):
            call()


@pytest.mark.parametrize(
    "count", [100, pytest.param(1_000, marks=pytest.mark.full)], ids=["tenth", "whole"]
)
def test_an_edit_in_place_with_its_old_times_voids_the_token(
    files: FileDestination, root: Path, count: int
) -> None:
    """A writer who keeps inode, size and modification time is noticed all the same."""
    path = root / "bot.json"
    for seed in range(count):
        publish(files, BOT, new_entry(seed))
        token, before = files.observe(BOT).token, path.stat()
        changed = path.read_text().replace(new_entry(seed).secret.reveal()[-6:], "xxxxxx")
        while path.stat().st_ctime_ns == before.st_ctime_ns:  # until the clock of files has moved
            with path.open("r+") as file:
                file.write(changed)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        after = path.stat()
        assert (after.st_ino, after.st_size, after.st_mtime_ns) == (
            before.st_ino,
            before.st_size,
            before.st_mtime_ns,
        )
        with pytest.raises(Conflict):
            files.activate(BOT, new_entry(seed + 1), expected=token)


# --- crashes ------------------------------------------------------------------------------


class Crash(BaseException):
    """The process ends here."""


def test_a_crash_between_side_file_and_entry_heals(
    files: FileDestination, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entry keeps the owner that it had, the old token is void, and a fresh one writes."""
    (root / "bot.json").write_text('{"id": "x", "secret": "somebody elses secret"}')
    adopting = Target(to="f", path="bot", adopt=True)
    token = files.observe(adopting).token
    real = beneath.replace

    def crash(outer: int, name: str, data: bytes, **more: Any) -> None:
        if name == "bot.json":
            raise Crash
        real(outer, name, data, **more)

    with monkeypatch.context() as patch:
        patch.setattr(beneath, "replace", crash)
        with pytest.raises(Crash):
            files.activate(adopting, new_entry(1), expected=token)
    found = files.observe(adopting)
    assert found.owner is None
    assert not found.version_id
    with pytest.raises(Conflict):
        files.activate(adopting, new_entry(1), expected=token)
    with pytest.raises(Rejected):
        files.activate(BOT, new_entry(1), expected=found.token)  # still nobody's but theirs
    files.activate(adopting, new_entry(1), expected=found.token)
    assert files.observe(BOT).owner == STORE_ID


@pytest.mark.parametrize("call", ["open", "fchmod", "fsync", "rename"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_an_error_at_any_step_leaves_old_or_new_and_no_rest(
    files: FileDestination, root: Path, monkeypatch: pytest.MonkeyPatch, call: str, nth: int
) -> None:
    """A full or broken disk leaves a whole entry and no plaintext in a temporary; a retry works."""
    publish(files, BOT, new_entry(1))
    token = files.observe(BOT).token
    left, real = [nth], getattr(os, call)

    def fail(*args: Any, **kwargs: Any) -> Any:
        if call != "open" or (len(args) > 1 and args[1] & os.O_EXCL):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        try:
            files.activate(BOT, new_entry(2), expected=token)
            failed = None
        except DestinationUnavailable as error:
            failed = error
    assert (failed is None) is (left[0] > 0)
    found = files.observe(BOT)
    assert found.version_id in (new_entry(1).version_id, new_entry(2).version_id)
    if failed is not None and call in ("open", "fchmod"):  # surely before the rename
        assert not failed.sent
    if failed is not None and not failed.sent:
        assert found.version_id == new_entry(1).version_id
    assert [name for name in everything(root) if beneath.TEMPORARY in name] == []
    publish(files, BOT, new_entry(3))
    assert json.loads((root / "bot.json").read_text()) == parts(BOT.keys, new_entry(3))


def test_what_a_dead_writer_left_is_removed_by_a_read(files: FileDestination, root: Path) -> None:
    """A temporary can hold a secret; the next look at the entry removes it."""
    publish(files, BOT, new_entry(1))
    (root / f"{beneath.TEMPORARY}bot.json").write_text(new_entry(2).secret.reveal())
    files.observe(BOT)
    assert not (root / f"{beneath.TEMPORARY}bot.json").exists()


def test_a_folder_that_was_not_finished_is(files: FileDestination, root: Path) -> None:
    """A crash between making a folder and letting agents in is mended by the next write."""
    (root / "team").mkdir(mode=0o1700)
    (root / "team").chmod(0o1700)
    publish(files, Target(to="f", path="team/bot"), new_entry(1))
    assert stat.S_IMODE((root / "team").stat().st_mode) == beneath.FOLDER_MODE


def test_a_stopped_writer_makes_others_wait_not_overwrite(root: Path) -> None:
    """Who cannot get the lock gives way within the deadline, certain that nothing was sent."""
    files = make(root, call_deadline="200ms")
    publish(files, BOT, new_entry(1))
    token = files.observe(BOT).token
    side = os.open(root / SIDE, os.O_RDONLY)
    with (
        beneath.locked(side, "bot.json.lock", patience=1),
        pytest.raises(DestinationUnavailable) as error,
    ):
        files.activate(BOT, new_entry(2), expected=token)
    os.close(side)
    assert not error.value.sent
    files.activate(BOT, new_entry(2), expected=token)
    files.close()


def test_a_lost_side_folder_is_written_anew(files: FileDestination, root: Path) -> None:
    """Without what we remember an entry is nobody's, and `adopt` marks it again."""
    publish(files, BOT, new_entry(1))
    shutil.rmtree(root / SIDE)
    found = files.observe(BOT)
    assert found.owner is None
    with pytest.raises(Rejected):
        files.activate(BOT, new_entry(1), expected=found.token)
    adopting = Target(to="f", path="bot", adopt=True)
    files.activate(adopting, new_entry(1), expected=files.observe(BOT).token)
    assert files.observe(BOT).owner == STORE_ID


def test_a_damaged_side_file_is_named(files: FileDestination, root: Path) -> None:
    """What we remember and cannot read stops the entry, with the way out."""
    publish(files, BOT, new_entry(1))
    (root / SIDE / "bot.json.side").write_text("{")
    with pytest.raises(Rejected) as error:
        files.observe(BOT)
    assert "bot.json.side" in error.value.hint


@pytest.mark.parametrize(
    "wrong",
    [
        {"root": "agents"},
        {"root": "/"},
        {"root": "//"},
        {"root": "/a/../b"},
        {"root": "/a", "prefix": "../b"},
        {"root": "/a", "prefix": "b/"},
        {"root": "/a", "mode": "0666"},
        {"root": "/a", "mode": "0644"},
        {"root": "/a", "mode": 640},
        {"root": "/a", "group": ""},
        {"root": "/a", "more": 1},
    ],
)
def test_options_out_of_bounds_are_refused(wrong: dict[str, Any]) -> None:
    """A root that is no folder of its own, a climbing prefix or a mode for everybody: no."""
    with pytest.raises(ValueError) as error:
        FileOptions.model_validate(wrong)
    assert "input_value" not in str(error.value)
