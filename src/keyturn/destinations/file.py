"""Files that agents read: one JSON object per entry, replaced by rename.

    <root>/<prefix>/<path>[.json]      {"id", "secret", "version"}, 0640, group of the agents
    <root>/.keyturn/                   0700: lock and side file per entry

The side file holds generation and owner. Lock and generation make it a compare-and-set destination:
the token is the generation with the identity of the entry file, and both are compared under the
lock. The generation is bumped, durably, before the entry is renamed into place: after a crash between
the two an old token is void and the owner marker stands already.

What cannot be read as a JSON object counts as an entry with somebody else's keys: nothing of it is
ever replaced without `adopt` and `merge` both saying so.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import json
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from keyturn.core.model import Target, Traits
from keyturn.destinations.base import ConnectionOptions, DestinationBase, Form
from keyturn.destinations.entry import merged, observed, refuse_foreign
from keyturn.errors import (
    Conflict,
    Denied,
    DestinationError,
    DestinationUnavailable,
    NotFound,
    Rejected,
)
from keyturn.ports import Clock, Entry, Observed

SIDE = ".keyturn"
LIMIT = 1024 * 1024  # bytes of an entry
FILE_MODE = 0o640
FOLDER_MODE = 0o2750
TEMPORARY = ".keyturn-new-"
_LOCK_POLL = 0.005
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_UNREADABLE: dict[str, Any] = {"": None}  # a key that is nobody's: other_keys


def _root(value: object) -> Path:
    if not isinstance(value, str) or not value.startswith("/") or ".." in value.split("/"):
        raise ValueError
    return Path(value)


class FileOptions(ConnectionOptions):
    """Where the files lie and who may read them."""

    root: Annotated[
        Path,
        BeforeValidator(_root),
        Form("an absolute path without .."),
        Field(description="folder of the entries"),
    ]
    group: Annotated[
        str | None,
        Form("the name of a unix group"),
        Field(description="group that may read them"),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """What we remember about an entry where the agent cannot write."""

    generation: int = 0
    owner: str | None = None
    fence: int = 0


class FileDestination(DestinationBase):
    """A folder of this host."""

    Options = FileOptions
    TRAITS = Traits(has_cas=True, settles_with_writer=True)

    def __init__(self, options: Any, *, name: str, store_id: str, clock: Clock) -> None:
        super().__init__(options, name=name, store_id=store_id, clock=clock)
        self._root: Path = options.root

    def place(self, target: Target) -> str:
        """Return the path under the root, with its suffix."""
        path = super().place(target)
        return path if "." in path.rpartition("/")[2] else f"{path}.json"

    def identity(self, target: Target) -> str:
        """Return the real path: two connections to one folder share their entries."""
        return f"file:{os.path.realpath(self._root)}/{self.place(target)}"

    def _probe(self) -> str:
        with self._folder((), create=False) as folder:
            return f"{self._root}, mode {stat.S_IMODE(os.fstat(folder).st_mode):04o}"

    # --- reading ----------------------------------------------------------------------------

    def _observe(self, target: Target) -> Observed:
        try:
            with self._entry(target, create=False) as entry:
                return entry.observe(target)
        except FileNotFoundError:
            return Observed(token="0:-")  # noqa: S106 - a generation

    # --- writing ----------------------------------------------------------------------------

    def _activate(self, target: Target, entry: Entry, expected: str) -> str:
        with self._entry(target, create=True) as place:
            side, values = place.side(), place.values()
            wanted = merged(target, values or {}, entry)
            if values == wanted and side.owner == entry.owner:
                return ""  # the same version again
            if place.token(side) != expected:
                raise Conflict
            refuse_foreign(target, values or {}, owner=side.owner, store_id=self.store_id)
            fresh = _Side(generation=side.generation + 1, owner=entry.owner, fence=entry.fence)
            place.write_side(fresh)
            place.write(json.dumps(wanted).encode(), gid=self._gid())
        return ""

    def _gid(self) -> int:
        if self.options.group is None:
            return -1
        try:
            return grp.getgrnam(self.options.group).gr_gid
        except KeyError:
            raise NotFound(f"there is no unix group {self.options.group}") from None

    # --- folders ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _entry(self, target: Target, *, create: bool) -> Iterator[_Place]:
        """Open the folder of an entry and lock its side file."""
        *folders, name = self.place(target).split("/")
        if folders and folders[0] == SIDE:
            raise Rejected("that folder is Keyturn's own")
        with (
            self._folder(tuple(folders), create=create) as folder,
            self._folder((SIDE,), create=create) as side,
        ):
            label = "%2F".join((*folders, name))
            with self._locked(side, f"{label}.lock"):
                yield _Place(folder=folder, name=name, side_folder=side, label=label)

    @contextlib.contextmanager
    def _folder(self, parts: tuple[str, ...], *, create: bool) -> Iterator[int]:
        """Open a folder beneath the root, no component of it through a link."""
        if create:
            self._root.mkdir(mode=0o750, parents=True, exist_ok=True)
        number = os.open(self._root, _FOLDER_FLAGS)
        try:
            _refuse_writable(number)
            for part in parts:
                inner = self._step(number, part, create=create)
                os.close(number)
                number = inner
                _refuse_writable(number)
            yield number
        finally:
            os.close(number)

    def _step(self, folder: int, part: str, *, create: bool) -> int:
        try:
            return os.open(part, _FOLDER_FLAGS, dir_fd=folder)
        except FileNotFoundError:
            if not create:
                raise
        with contextlib.suppress(FileExistsError):
            os.mkdir(part, 0o700, dir_fd=folder)
        number = os.open(part, _FOLDER_FLAGS, dir_fd=folder)
        if part != SIDE:
            os.fchown(number, -1, self._gid())
            os.fchmod(number, FOLDER_MODE)
        os.fsync(folder)
        return number

    @contextlib.contextmanager
    def _locked(self, side: int, name: str) -> Iterator[None]:
        """Hold an entry's lock. A writer that was stopped inside makes others wait, not overwrite."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        number = os.open(name, flags, 0o600, dir_fd=side)
        try:
            until = time.monotonic() + self.options.call_deadline.total_seconds() / 2
            while True:
                try:
                    fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise DestinationUnavailable(
                            f"{self.name}: the entry is locked by another writer", sent=False
                        ) from None
                    time.sleep(_LOCK_POLL)
            yield
        finally:
            os.close(number)

    def _translate(self, error: Exception) -> DestinationError:
        if isinstance(error, PermissionError):
            return Denied(f"{self.name}: no right in {self._root}", hint="check owner and mode")
        if isinstance(error, FileNotFoundError):
            return NotFound(f"{self.name}: {self._root} is not there")
        if isinstance(error, OSError) and error.errno in (20, 40):  # ENOTDIR, ELOOP
            return Rejected(f"{self.name}: a link or a file stands where a folder should")
        number = error.errno if isinstance(error, OSError) else None
        return DestinationUnavailable(f"{self.name}: {type(error).__name__} (errno {number})")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """One entry, its folder open and its lock held."""

    folder: int
    name: str
    side_folder: int
    label: str

    def observe(self, target: Target) -> Observed:
        side, values = self.side(), self.values()
        return observed(target.keys, values, owner=side.owner, token=self.token(side))

    def side(self) -> _Side:
        raw = _read(self.side_folder, self.label)
        if raw is None:
            return _Side()
        found = json.loads(raw)
        return _Side(
            generation=int(found["generation"]), owner=found["owner"], fence=int(found["fence"])
        )

    def values(self) -> dict[str, Any] | None:
        raw = _read(self.folder, self.name)
        if raw is None:
            return None
        try:
            found = json.loads(raw)
        except ValueError:
            return dict(_UNREADABLE)
        return found if isinstance(found, dict) else dict(_UNREADABLE)

    def token(self, side: _Side) -> str:
        try:
            found = os.stat(self.name, dir_fd=self.folder, follow_symlinks=False)
        except FileNotFoundError:
            return f"{side.generation}:-"
        return f"{side.generation}:{found.st_ino}:{found.st_mtime_ns}:{found.st_size}"

    def write_side(self, side: _Side) -> None:
        values = {"generation": side.generation, "owner": side.owner, "fence": side.fence}
        _replace(self.side_folder, self.label, json.dumps(values).encode(), mode=0o600, gid=-1)

    def write(self, data: bytes, *, gid: int) -> None:
        _replace(self.folder, self.name, data, mode=FILE_MODE, gid=gid)


def _read(folder: int, name: str) -> bytes | None:
    """Read a plain file of at most the limit; None if there is none."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        number = os.open(name, flags, dir_fd=folder)
    except FileNotFoundError:
        return None
    with open(number, "rb") as file:  # noqa: PTH123 - a descriptor, not a path
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise Rejected("the entry is no plain file")
        data = file.read(LIMIT + 1)
    if len(data) > LIMIT:
        raise Rejected("the entry is larger than 1 MiB")
    return data


def _replace(folder: int, name: str, data: bytes, *, mode: int, gid: int) -> None:
    """Replace a file in one instant: owner and mode are right before it can be seen."""
    temporary = f"{TEMPORARY}{name}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=folder)  # of a writer that died: we hold the lock
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    number = os.open(temporary, flags, 0o600, dir_fd=folder)
    try:
        with open(number, "wb", closefd=False) as file:
            file.write(data)
        if gid != -1:
            os.fchown(number, -1, gid)
        os.fchmod(number, mode)
        os.fsync(number)
    finally:
        os.close(number)
    os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    os.fsync(folder)


def _refuse_writable(folder: int) -> None:
    """Refuse a folder in which others could swap what we write."""
    found = os.fstat(folder)
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Rejected(
            "a folder of the entry can be written by others",
            hint="it must belong to the daemon's user, without write permission for group or others",
        )
