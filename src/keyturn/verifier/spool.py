"""`revoked.d/`: one file per revoked version, looked at before every yes.

A revoke comes here first. Any reader of an SQLite file, or a daemon stopped inside a write, can lock
commits out, and so could veto a revocation; nobody can keep a file from being created. A person can
`touch` one by hand. The files are tombstones: they survive a restore of the store.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from keyturn.core.secret import is_version_id
from keyturn.errors import StoreUnavailable, UnknownVersion

NOTE_LIMIT = 64 * 1024


class Spool:
    """A folder of tombstones. Every method is safe in any process that may write there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = os.fspath(folder)

    def revoke(self, version_id: str, note: Mapping[str, Any]) -> None:
        """Refuse a version from now on; durable when this returns. Idempotent.

        `note` says who and why, for the store's audit; it holds no secret. Raises UnknownVersion
        for a text that is no version id, StoreUnavailable where the file cannot be made.
        """
        if not is_version_id(version_id):
            raise UnknownVersion("that is no version id")
        try:
            self._create(version_id, json.dumps(dict(note), sort_keys=True).encode())
        except OSError as error:
            raise StoreUnavailable(
                f"no tombstone could be made in {self._folder} (errno {error.errno})",
                hint="look at disk space and rights; the version is NOT refused yet",
            ) from error

    def holds(self, version_id: str) -> bool:
        """Tell whether a version is revoked here: one stat, a few microseconds.

        Raises StoreUnavailable where the folder cannot be looked at: never a yes by mistake.
        """
        try:
            os.stat(f"{self._path}/{version_id}", follow_symlinks=False)  # noqa: PTH116 - hot path
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StoreUnavailable(f"the spool cannot be read (errno {error.errno})") from error
        return True

    def pending(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield every tombstone with its note; one made by hand has an empty note."""
        try:
            names = sorted(entry.name for entry in self._folder.iterdir())
        except FileNotFoundError:
            return
        for name in names:
            if is_version_id(name):
                yield name, self._note(name)

    def _create(self, version_id: str, note: bytes) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                number = os.open(version_id, flags, 0o600, dir_fd=folder)
            except FileExistsError:
                os.fsync(folder)  # whoever made it may not have got this far
                return
            try:
                os.write(number, note)
                os.fsync(number)
            finally:
                os.close(number)
            os.fsync(folder)
        finally:
            os.close(folder)

    def _note(self, version_id: str) -> dict[str, Any]:
        try:
            with (self._folder / version_id).open("rb") as file:
                found = json.loads(file.read(NOTE_LIMIT) or b"{}")
        except (OSError, ValueError):
            return {}  # a crash may have cut the note off: the file itself is what counts
        return found if isinstance(found, dict) else {}
