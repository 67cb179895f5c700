"""Which files a configuration was read from, as they were: so that no two generations get mixed.

A ConfigMap is replaced by one rename of the link `..data`. Whoever reads the main file before it and
an included one after it has a configuration that nobody wrote. So each file is looked at before it is
read, and all of them once more afterwards: what is the same at the end was the same all the time.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from keyturn.credential_file import way_to

Seen = tuple[tuple[object, ...], ...]


class Looks:
    """One look at many files: each folder on the way to them is looked up once."""

    def __init__(self) -> None:
        self._folders: dict[Path, Seen] = {}

    def at(self, path: Path) -> Seen:
        """Return what tells one content of a path from another: its file, and every link on the way."""
        path = path.absolute()
        folder = path.parent
        try:
            found = path.lstat()
            if stat.S_ISLNK(found.st_mode):
                return _way(path)
            if folder not in self._folders:
                self._folders[folder] = _way(folder)
        except OSError as error:
            return ((error.errno,),)
        return (*self._folders[folder], _identity(path, found))


def _way(path: Path) -> Seen:
    return tuple(_identity(one, found) for one, found in way_to(path))


def _identity(path: Path, found: os.stat_result) -> tuple[object, ...]:
    if stat.S_ISDIR(found.st_mode):  # what lies beside our files may come and go
        return (str(path), found.st_dev, found.st_ino)
    return (
        str(path),
        found.st_dev,
        found.st_ino,
        found.st_size,
        found.st_mtime_ns,
        found.st_ctime_ns,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Include:
    """The pattern of the included files, beginning at a folder."""

    folder: Path
    pattern: str

    @classmethod
    def of(cls, pattern: str, main: Path) -> Include:
        """Read a pattern; a relative one begins beside the main file."""
        if pattern.startswith("/"):
            return cls(folder=Path("/"), pattern=pattern.lstrip("/"))
        return cls(folder=main.absolute().parent, pattern=pattern)

    def files(self) -> list[Path]:
        """Return what the pattern matches, as a shell does: no hidden name unless it is written.

        Raises ValueError for what is no pattern.
        """
        named = self.pattern.split("/")

        def is_shown(path: Path) -> bool:
            parts = path.relative_to(self.folder).parts
            return all(not part.startswith(".") or part in named for part in parts)

        try:
            # Hidden ones: the generations of a ConfigMap, the locks of editors.
            return sorted(filter(is_shown, self.folder.glob(self.pattern)))
        except NotImplementedError as error:
            raise ValueError from error

    def closed(self) -> Iterator[Path]:
        """Yield the folders in which files may match that we cannot see.

        A glob leaves them out in silence, and their agents would seem to have disappeared.
        """
        parts = self.pattern.split("/")
        for end in range(len(parts)):
            found = self.folder.glob("/".join(parts[:end])) if end else [self.folder]
            for folder in found:
                if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
                    yield folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The files of one reading. Two are equal where nothing was written, replaced or added."""

    main: Path
    include: Include | None = None
    files: tuple[tuple[Path, Seen], ...] = ()

    def again(self) -> Generation:
        """Look at the same places as they are now."""
        included: list[Path] = self.include.files() if self.include else []
        looks = Looks()
        files = tuple((path, looks.at(path)) for path in (self.main, *included))
        return Generation(main=self.main, include=self.include, files=files)

    @property
    def included(self) -> list[Path]:
        """The files beside the main one."""
        return [path for path, _ in self.files[1:]]

    @property
    def is_mounted(self) -> bool:
        """Whether a file lies in a volume of Kubernetes, which is changed by the swap of one link."""
        return any(str(one[0]).endswith("/..data") for _, seen in self.files for one in seen)
