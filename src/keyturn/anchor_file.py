"""Anchors of the audit in a file: up to where each chain went, and the hash that it had there.

Whoever can write the store can write its audit anew, hashes and all, but not what was copied away
before. Each line quotes the heads that changed since the line before it in the same file, is chained
to that line by a hash, and says when it was written. The first line of a file quotes all of them, so
a file that was moved away and begun again stands for itself, and so does every copy.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from keyturn.core.walltime import rfc3339
from keyturn.errors import StorageError

START = "0" * 64
NO_ANCHOR = "there is no anchor in the file"
LONGEST = 1 << 30  # bytes of a file


class Quote(NamedTuple):
    """One head as an anchor names it, and when."""

    chain: str
    seq: int
    hash: str
    at: str


class AnchorsUnusable(StorageError):
    """The file of anchors cannot be used."""

    code = "anchor-file"
    default_hint = (
        "see `audit: {anchor_file: …}` in the configuration: owner, mode, space on its disk"
    )


@dataclass(slots=True)
class Anchors:
    """What a file of anchors says. `problems` are what is wrong with the file itself."""

    quotes: set[Quote] = field(default_factory=set)
    stores: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    lines: int = 0
    newest_at: str = ""
    last: str = START
    heads: dict[str, tuple[int, str]] = field(default_factory=dict)

    def take(self, number: int, line: dict[str, Any]) -> None:
        """Take a line over, if it is what it was."""
        if "prev" in line:
            if line.get("hash") != _hash(line):
                self.problems.append(f"line {number} was changed")
                return
            if self.lines and line["prev"] not in (self.last, START):
                self.problems.append(f"lines are missing before line {number}")
            if line["prev"] == START:
                self.heads = {}
            self.last = line["hash"]
        at = str(line.get("at") or line.get("timestamp") or "")
        for chain, (seq, digest) in line["heads"].items():
            self.quotes.add(Quote(str(chain), int(seq), str(digest), at))
            self.heads[str(chain)] = (int(seq), str(digest))
        self.stores.add(str(line.get("store")))
        self.lines += 1
        self.newest_at = max(self.newest_at, at)


def read_anchors(path: Path) -> Anchors:
    """Read a file of anchors, or of the daemon's log as JSON. Raises AnchorsUnusable."""
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST)
    except OSError as error:
        raise AnchorsUnusable(f"{path} cannot be read (errno {error.errno})") from None
    found = _parsed(content)
    if not found.lines and not found.problems:
        found.problems.append(NO_ANCHOR)
    return found


def _parsed(content: bytes) -> Anchors:
    found = Anchors()
    for number, raw in enumerate(content.split(b"\n"), start=1):
        line = _line(raw)
        if line is not None:  # a crash tears lines; that none is missing shows in the next one
            try:
                found.take(number, line)
            except (TypeError, ValueError, AttributeError):
                found.problems.append(f"line {number} was changed")
    return found


def _line(raw: bytes) -> dict[str, Any] | None:
    if b'"heads"' not in raw:
        return None
    try:
        line = json.loads(raw)
        if isinstance(line, dict) and isinstance(line.get("heads"), str):  # as the log has them
            line["heads"] = json.loads(line["heads"])
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("heads"), dict) else None


def _hash(line: Mapping[str, Any]) -> str:
    body = {key: value for key, value in line.items() if key != "hash"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class AnchorFile:
    """The file that a daemon appends to. Several processes may; a lock keeps their lines apart."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: tuple[int, int, int] | None = (
            None  # device, inode and size after our last line
        )
        self._so_far = Anchors()

    def append(
        self,
        heads: Mapping[str, tuple[int, str]],
        *,
        store_id: str,
        writer: str,
        why: str,
        at: datetime,
    ) -> int:
        """Append an anchor and return how many heads it quotes. Raises AnchorsUnusable."""
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                said = {"store": store_id, "writer": writer, "why": why}
                shown = rfc3339(at)
                return self._append(handle, heads, {"at": shown, **said})
            finally:
                os.close(handle)
        except OSError as error:
            self._known = None
            raise AnchorsUnusable(f"{self.path} cannot be written (errno {error.errno})") from None

    def _append(
        self, handle: int, heads: Mapping[str, tuple[int, str]], said: Mapping[str, str]
    ) -> int:
        before = os.fstat(handle)
        stranger = before.st_uid not in (0, os.geteuid())
        if not stat.S_ISREG(before.st_mode) or before.st_mode & 0o022 or stranger:
            raise AnchorsUnusable(f"{self.path} can be written by others, or is no plain file")
        content = b""
        if self._known != _place(before):
            content = os.pread(handle, LONGEST, 0)
            self._so_far = _parsed(content)
        so_far = self._so_far
        line: dict[str, Any] = {
            **said,
            "heads": {c: list(h) for c, h in heads.items() if so_far.heads.get(c) != h},
            "chains": len(heads),
            "prev": so_far.last,
        }
        line["hash"] = _hash(line)
        # A line that a crash tore is ended first, so no repair is needed.
        torn = b"\n" if content and not content.endswith(b"\n") else b""
        data = torn + json.dumps(line, separators=(",", ":")).encode() + b"\n"
        if os.write(handle, data) != len(data):
            raise OSError(28, "no space left")
        os.fsync(handle)
        so_far.take(0, line)
        so_far.quotes.clear()  # only what the next line needs stays in memory
        self._known = _place(os.fstat(handle))
        return len(line["heads"])


def _place(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_dev, found.st_ino, found.st_size


def batches(quotes: Iterable[Quote], size: int) -> Iterable[list[Quote]]:
    """Return quotes in groups, in an order of their own."""
    ordered = sorted(quotes)
    return (ordered[start : start + size] for start in range(0, len(ordered), size))
