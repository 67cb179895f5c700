"""Files that agents read: one JSON object per entry, replaced by rename.

    <root>/<prefix>/<path>         {"id", "secret", "version"}, 0640, group of the agents; a name
                                   without a suffix gets `.json`
    <the same folder>/.keyturn/    0700: a lock and a side file per entry, so that one file has one
                                   lock, however root and prefix spell it

The side file holds generation and owner. Lock and generation make this a compare-and-set
destination: the token is the generation with the identity of the entry file, and both are compared
under the lock. An edit from outside changes the identity, a write of ours both.

A write puts the side file first, then the entry. The side file therefore names what it replaces
(`before`): a crash between the two leaves an entry that still is `before`, and with it the owner
that it had, while the bumped generation voids every older token.

An entry that cannot be read as one JSON object in UTF-8 with each key once and of at most 1 MiB
counts as existing, without our parts and with somebody else's keys. Nothing can be merged into it
and there are no keys of ours to adopt, so it is replaced only where it carries our owner marker:
then somebody broke what we wrote. Links, pipes and folders in its place are always refused.
"""

from __future__ import annotations

import contextlib
import grp
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from keyturn.core.model import Target, Traits
from keyturn.destinations import beneath
from keyturn.destinations.base import ConnectionOptions, DestinationBase, Form
from keyturn.destinations.beneath import NOTHING, Making
from keyturn.destinations.entry import merged, observed, parsed, refuse_foreign, without_ours
from keyturn.errors import (
    ConfigError,
    Conflict,
    Denied,
    DestinationError,
    DestinationUnavailable,
    NotFound,
    Rejected,
)
from keyturn.ports import Entry, Observed

SIDE = ".keyturn"
LONGEST_NAME = (
    200  # bytes of a segment: the file system takes 255, our temporaries have longer ones
)
LONGEST_PATH = 1000
_MODE = re.compile(r"0[46][04]0", re.ASCII)
_UNREADABLE: dict[str, Any] = {"": None}  # shown as a key that is nobody's


def _root(value: object) -> Path:
    if not isinstance(value, str) or not value.startswith("/") or ".." in value.split("/"):
        raise ValueError
    root = Path("/" + value.lstrip("/"))
    if root == Path("/"):
        raise ValueError
    return root


def _mode(value: object) -> int:
    if not isinstance(value, str) or not _MODE.fullmatch(value):
        raise ValueError
    return int(value, 8)


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
        Form("the name of a unix group, or its number as text"),
        Field(description="group that may read them", min_length=1),
    ] = None
    mode: Annotated[
        int,
        BeforeValidator(_mode),
        Form('"0640", "0440", "0600" or "0400" in quotes'),
        Field(description="mode of the files"),
    ] = 0o640


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """What we remember about an entry where the agent cannot write."""

    generation: int = 0
    owner: str | None = None
    fence: int = 0
    before: str = ""
    before_owner: str | None = None

    def owner_of(self, identity: str) -> str | None:
        """Whose the entry is: what the last write was to replace is still its former owner's."""
        return self.before_owner if identity == self.before else self.owner


class FileDestination(DestinationBase):
    """A folder of this host."""

    Options = FileOptions
    TRAITS = Traits(has_cas=True, settles_with_writer=True)

    def place(self, target: Target) -> str:
        """Return the path under the root, with its suffix."""
        path = super().place(target)
        path = path if "." in path.rpartition("/")[2] else f"{path}.json"
        if len(path) > LONGEST_PATH or any(len(part) > LONGEST_NAME for part in path.split("/")):
            raise ConfigError(f"expected segments of at most {LONGEST_NAME} characters")
        return path

    def identity(self, target: Target) -> str:
        """Return the real path: two connections to one folder share their entries."""
        return f"file:{os.path.realpath(self.options.root)}/{self.place(target)}"

    def _probe(self) -> str:
        self._refuse_group(self._gid())
        root = self.options.root
        with contextlib.suppress(FileNotFoundError), beneath.folder(root, make=None) as folder:
            return f"{root}, mode {stat.S_IMODE(os.fstat(folder).st_mode):04o}"
        self._refuse_unwritable(root)
        return f"{root} is not there yet: the first rotation makes it"

    def _probe_entry(self, target: Target, retire: str) -> Observed:
        """Read it without its lock, which would be a file of ours, and look at the rights."""
        del retire
        *parts, name = self.place(target).split("/")
        root = self.options.root
        self._refuse_unwritable(root.joinpath(*parts))
        try:
            with contextlib.ExitStack() as stack:
                folder = stack.enter_context(beneath.folder(root, tuple(parts), make=None))
                side = None
                with contextlib.suppress(FileNotFoundError):
                    side = stack.enter_context(beneath.folder(root, (*parts, SIDE), make=None))
                return _Place(folder=folder, name=name, side_folder=side).observe(target)
        except FileNotFoundError:
            return Observed(token=_token(_Side(), NOTHING))

    def _refuse_unwritable(self, path: Path) -> None:
        """Refuse a folder that could not be written, or made, by whom we are now."""
        there = next(one for one in (path, *path.parents) if one.exists())
        if not os.access(there, os.W_OK | os.X_OK, effective_ids=True):
            raise Denied(
                f"{self.name}: {there} cannot be written by the daemon's user",
                hint=f"make {self.options.root} for it: install -d -m 2750 -o USER -g GROUP FOLDER",
            )

    def _refuse_group(self, gid: int) -> None:
        if gid not in (-1, os.getegid(), *os.getgroups()) and os.geteuid() != 0:
            raise Denied(
                f"{self.name}: the daemon's user is no member of the group {self.options.group}",
                hint=f"usermod -aG {self.options.group} USER, then restart the daemon",
            )

    def _observe(self, target: Target) -> Observed:
        try:
            with self._entry(target) as entry:
                return entry.observe(target)
        except FileNotFoundError:
            return Observed(token=_token(_Side(), NOTHING))

    def _activate(self, target: Target, entry: Entry, expected: str) -> str:
        making = Making(gid=self._gid())
        with self._entry(target, making) as place:
            side, (values, identity) = place.side(), place.values()
            broken = values is _UNREADABLE
            shown = {} if broken else values or {}
            wanted = merged(target, shown, entry)
            owner = side.owner_of(identity)
            if values == wanted and owner == entry.owner:
                return ""  # the same version again
            if _token(side, identity) != expected:
                raise Conflict
            if broken and owner != self.store_id:
                raise Rejected("the entry exists and is no JSON object", hint="move it away")
            refuse_foreign(target, shown, owner=owner, store_id=self.store_id)
            place.write_side(
                _Side(
                    generation=side.generation + 1,
                    owner=entry.owner,
                    fence=entry.fence,
                    before=identity,
                    before_owner=owner,
                )
            )
            self._replace(place, wanted, gid=making.gid)
        return ""

    def _withdraw(self, target: Target, owner: str, version_id: str, expected: str) -> str:
        with contextlib.suppress(FileNotFoundError), self._entry(target) as place:
            side, (values, identity) = place.side(), place.values()
            marked = side.owner_of(identity)
            left = without_ours(
                target, values or {}, marked=marked, owner=owner, version_id=version_id
            )
            if left is None:
                return ""  # nothing of ours is in it
            if _token(side, identity) != expected:
                raise Conflict
            after = replace(
                side,
                generation=side.generation + 1,
                owner=owner,
                before=identity,
                before_owner=marked,
            )
            gid = self._gid()
            place.write_side(after)
            self._replace(place, left, gid=gid)
        return ""

    def _replace(self, place: _Place, values: dict[str, Any], *, gid: int) -> None:
        data = json.dumps(values, allow_nan=False).encode()
        beneath.replace(place.folder, place.name, data, mode=self.options.mode, gid=gid)

    def _gid(self) -> int:
        group = self.options.group
        if group is None or group.isdecimal():
            return -1 if group is None else int(group)
        try:
            return grp.getgrnam(group).gr_gid
        except KeyError:
            raise NotFound(
                f"there is no unix group {group}", hint="groupadd it, or correct `group`"
            ) from None

    @contextlib.contextmanager
    def _entry(self, target: Target, make: Making | None = None) -> Iterator[_Place]:
        """Open the folder of an entry and lock it. Raises FileNotFoundError where there is none."""
        *parts, name = self.place(target).split("/")
        root, patience = self.options.root, self.options.call_deadline.total_seconds() / 2
        private = Making(mode=0o700) if make else None
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(beneath.folder(root, tuple(parts), make=make))
            side = None  # where we never wrote
            with contextlib.suppress(FileNotFoundError):
                side = stack.enter_context(beneath.folder(root, (*parts, SIDE), make=private))
            if side is not None:
                stack.enter_context(beneath.locked(side, f"{name}.lock", patience=patience))
                beneath.remove_stale(folder, name)
            yield _Place(folder=folder, name=name, side_folder=side)

    def _translate(self, error: Exception) -> DestinationError:
        number = error.errno if isinstance(error, OSError) else None
        if isinstance(error, PermissionError):
            hint = "the daemon's user must own the folders and be a member of the group"
            return Denied(f"{self.name}: no right in {self.options.root}", hint=hint)
        if isinstance(error, FileNotFoundError):
            return NotFound(
                f"{self.name}: {self.options.root} is not there",
                hint="make the folder, or correct `root`: docs/howto/files.md",
            )
        # Whatever fails after the rename is reported by `beneath.replace` itself.
        return DestinationUnavailable(
            f"{self.name}: {type(error).__name__} (errno {number})", sent=False
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """One entry, its folder open and, where we have written before, its lock held."""

    folder: int
    name: str
    side_folder: int | None

    def observe(self, target: Target) -> Observed:
        side, (values, identity) = self.side(), self.values()
        owner = side.owner_of(identity)
        return observed(target.keys, values, owner=owner, token=_token(side, identity))

    def values(self) -> tuple[dict[str, Any] | None, str]:
        """Return what the entry holds, None where there is none, and its identity."""
        try:
            raw, identity = beneath.read(self.folder, self.name)
        except FileNotFoundError:
            return None, NOTHING
        found = None if raw is None else parsed(raw)
        return (_UNREADABLE if found is None else found), identity

    def side(self) -> _Side:
        if self.side_folder is None:
            return _Side()
        try:
            raw, _ = beneath.read(self.side_folder, f"{self.name}.side")
        except FileNotFoundError:
            return _Side()
        try:
            return _Side(**json.loads(raw or b""))
        except (ValueError, TypeError):
            hint = f"remove {SIDE}/{self.name}.side; then only `adopt` takes the entry over"
            raise Rejected("the side file of the entry is damaged", hint=hint) from None

    def write_side(self, side: _Side) -> None:
        if self.side_folder is not None:
            data = json.dumps(asdict(side)).encode()
            beneath.replace(self.side_folder, f"{self.name}.side", data, mode=0o600, gid=-1)


def _token(side: _Side, identity: str) -> str:
    return f"{side.generation}/{identity}"
