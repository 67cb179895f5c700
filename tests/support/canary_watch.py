"""The canary over the whole run of a suite: every secret that is minted, and all that is written out.

Nothing of the product knows of it: the one place where secrets are made is wrapped from outside, in
this process here and in every daemon by `tests/sitecustomize.py`. What is written out is kept, or
stays in the temporary folder, until the end of the session and is searched there, when every secret
is known. A hit names the place and the form, never the value.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from keyturn import errors
from keyturn.cli.client import AdminClient
from keyturn.core import secret
from keyturn.daemon import logs
from keyturn.daemon.metrics import Metrics
from keyturn.destinations.file import FileDestination
from keyturn.testing.canary import Scanner

FOLDER = "TESTS_CANARY"  # environment: where processes note what they mint
_ROOT = re.compile(r"\broot\"?: *[\"']?(/[^\s\"'}]+)")
_PRODUCT = str(Path(errors.__file__).parent)
_HOLE = bytes(32)  # pages of a database are mostly empty
_QUICK = "keyturn-"  # folders in memory that tests remove themselves


class Watch:
    """Collects secrets and output, and searches one for the other."""

    def __init__(self) -> None:
        self.scanner = Scanner()
        self.declared: set[Path] = set()  # folders whose purpose is to hold secrets
        self.hits: set[tuple[str, str]] = set()
        self.minted = self.searched = 0
        self.seconds = 0.0
        self._kept: dict[bytes, str] = {}
        self._clean: set[bytes] = set()  # of folders that went before the end

    def mints(self, hidden: str) -> None:
        """Take the random part of a new secret."""
        self.minted += 1
        self.scanner.add(hidden)

    def holds(self, folder: Path) -> None:
        """Declare a folder as one that holds secrets by its purpose: the root of a destination."""
        self.declared.add(folder.resolve())

    def keep(self, place: str, output: str | bytes | None) -> None:
        """Keep output until the end; the place where it came up first is the one that is named."""
        if output:
            data = output.encode("utf-8", "replace") if isinstance(output, str) else output
            self._kept.setdefault(data, place)

    def search(self, place: str, data: bytes, known: set[bytes] | None = None) -> None:
        """Search output at once, for the secrets that are known by now."""
        began = time.monotonic()
        self.searched += len(data)
        self.hits.update((place, form) for form in self.scanner.find(data, known=known))
        self.seconds += time.monotonic() - began

    def search_kept(self) -> None:
        """Search what was kept."""
        known: set[bytes] = set()
        for data, place in self._kept.items():
            self.search(place, data, known)

    def search_leaving(self, root: Path) -> None:
        """Search a folder that is about to be removed, for what this process has minted.

        What was clean stays so: nobody can leak a secret before it is minted.
        """
        for file in _files(root):
            data = b"".join(file.read_bytes().split(_HOLE))
            self.search(f"file {file.name} of a folder in memory", data, self._clean)

    def search_tree(self, root: Path) -> None:
        """Search every file below a folder, except in what was declared."""
        known: set[bytes] = set()
        self._learn_roots(root)
        for file in _files(root):
            if not any(folder in file.parents for folder in self.declared):
                self.search(f"file {file.relative_to(root)}", file.read_bytes(), known)

    def search_postgres(self, urls: Iterator[str]) -> None:
        """Search a dump of every table of these databases."""
        known: set[bytes] = set()
        for url in urls:
            with psycopg.connect(url) as connection:
                for table, data in _dump(connection):
                    self.search(f"PostgreSQL table {table}", data, known)

    def take_notes(self, folder: Path) -> None:
        """Take what other processes have minted, and delete it."""
        for file in folder.glob("*"):
            for line in file.read_text().split():
                self.mints(line)
            file.unlink()

    def _learn_roots(self, root: Path) -> None:
        for file in _files(root):
            if file.suffix == ".yaml":
                for found in _ROOT.findall(file.read_text(errors="replace")):
                    self.holds(Path(found))


def _files(root: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                yield path.resolve()


def _dump(connection: psycopg.Connection[Any]) -> Iterator[tuple[str, bytes]]:
    tables = connection.execute(
        "SELECT schemaname, tablename FROM pg_tables"
        " WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
    ).fetchall()
    for schema, name in tables:
        query = sql.SQL("COPY {} TO STDOUT").format(sql.Identifier(schema, name))
        with connection.cursor() as cursor, cursor.copy(query) as copy:
            yield name, b"".join(bytes(block) for block in copy)


# --- what is wrapped ------------------------------------------------------------------------


class Hooks:
    """Wraps the places where secrets are made and where output leaves, until `undo`."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._undo: list[Callable[[], None]] = []
        self._make()

    def undo(self) -> None:
        """Put everything back."""
        while self._undo:
            self._undo.pop()()

    def _wrap(self, owner: Any, name: str, after: Callable[..., None]) -> None:
        """Call `after(result, *arguments)` once the original has returned."""
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            after(result, *args, **kwargs)
            return result

        setattr(owner, name, wrapped)
        self._undo.append(lambda: setattr(owner, name, original))

    def _make(self) -> None:
        watch = self._watch
        self._wrap(secret, "_base62", self._mint)
        self._wrap(FileDestination, "__init__", self._root)
        self._wrap(errors.KeyturnError, "__init__", self._error)
        self._wrap(subprocess.Popen, "__init__", self._process)
        self._wrap(subprocess.Popen, "communicate", self._printed)
        self._wrap(logs, "_masked", lambda line, *_: watch.keep("a log line", line))
        self._wrap(Metrics, "text", lambda text, *_: watch.keep("the metrics", text))
        self._wrap(
            AdminClient, "call", lambda found, *_, **__: watch.keep("an answer", repr(found))
        )
        original = shutil.rmtree

        def rmtree(path: Any, *args: Any, **kwargs: Any) -> None:
            if Path(path).name.startswith(_QUICK):
                watch.search_leaving(Path(path))
            original(path, *args, **kwargs)

        shutil.rmtree = rmtree  # type: ignore[assignment]
        self._undo.append(lambda: setattr(shutil, "rmtree", original))

    def _mint(self, digits: str, *_args: Any) -> None:
        if len(digits) == secret.RANDOM_LENGTH:
            self._watch.mints(digits)

    def _root(self, _none: None, destination: Any, *_args: Any, **_more: Any) -> None:
        self._watch.holds(Path(destination.options.root))

    def _error(self, _none: None, error: Any, *_args: Any, **_more: Any) -> None:
        """Keep the texts of errors that the product itself makes, not those that tests make up."""
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_code.co_name in ("__init__", "wrapped"):
            frame = frame.f_back
        if frame.f_code.co_filename.startswith(_PRODUCT):
            self._watch.keep(
                f"{type(error).__name__} of {Path(frame.f_code.co_filename).name}",
                f"{error!r} {getattr(error, 'hint', '')}",
            )

    def _process(self, _none: None, _process: Any, args: Any, *_more: Any, **options: Any) -> None:
        words = [args] if isinstance(args, str | bytes | os.PathLike) else list(args)
        self._watch.keep("argv", b"\0".join(os.fsencode(word) for word in words))
        given = options.get("env") or os.environ
        environ = (f"{name}={value}" for name, value in given.items())
        self._watch.keep("an environment", "\0".join(environ))

    def _printed(self, printed: Any, process: Any, *_args: Any, **_options: Any) -> None:
        for stream in printed:
            self._watch.keep("what a command printed", stream)


def start() -> tuple[Watch, Hooks, Path]:
    """Begin to watch this process and those that it starts."""
    watch = Watch()
    notes = Path(tempfile.mkdtemp(prefix="tests-canary-"))
    os.environ[FOLDER] = str(notes)
    return watch, Hooks(watch), notes
