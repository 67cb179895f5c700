"""One YAML file as plain data, with the line of every key, and problems that quote nothing.

The data is built from the parser's events and not by a YAML constructor: so there are no types but
text, whole numbers, decimals, true, false and null (`yes`, dates and 0777 stay text), no aliases
that multiply, no tags that construct, no key that hides an earlier one.

SECURITY: configuration files hold what people paste by mistake. A problem names the file, the line,
the key and what was expected; the text that was found never gets into it, and parser errors,
which quote their surroundings, are dropped here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

import yaml

from keyturn.core.secret import looks_like_ours
from keyturn.credential_file import changeable_by_others, plain_file
from keyturn.errors import ConfigError

Loc = tuple[str | int, ...]

MAX_BYTES = 32 * 2**20
_MAX_DEPTH = 16
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,17})", re.ASCII)
_DECIMAL = re.compile(r"-?(0|[1-9][0-9]{0,17})\.[0-9]{1,17}", re.ASCII)
_NULL = frozenset({"", "~", "null"})
_BOOL = {"true": True, "false": False}
# What some YAML reader somewhere takes for a number or a date is not a good id.
_NOT_TEXT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|0o?[0-7]+|0x[0-9a-fA-F]+"
    r"|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}",
    re.ASCII,
)
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}", re.ASCII)


class Place(str):
    """`file:line` of a key; the parts of it, with the column, for programs that mark the place."""

    __slots__ = ("column", "file", "line")
    file: str
    line: int
    column: int

    def __new__(cls, file: object, line: int, column: int = 1) -> Self:
        """Lines and columns count from 1."""
        made = super().__new__(cls, f"{file}:{line}")
        made.file, made.line, made.column = str(file), line, column
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong: `where` is `file:line`, `text` names the expected form.

    `code` is one stable word for its kind.
    """

    where: str
    key: str
    text: str
    code: str = "value"

    def __str__(self) -> str:
        return f"{self.where}: {self.key}: {self.text}"


class BadFiles(ConfigError):
    """Configuration files that cannot be used; `problems` has all that is wrong with them."""

    def __init__(self, problems: Collection[Problem]) -> None:
        super().__init__("\n".join(dict.fromkeys(map(str, problems))))
        self.problems = tuple(dict.fromkeys(problems))


@dataclass(slots=True, kw_only=True)
class Document:
    """The data of one file, and where each key of it stands."""

    path: Path
    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[Loc, str] = field(default_factory=dict)

    def where(self, loc: Loc) -> str:
        """Return `file:line` of a key, or of what holds it where it is missing."""
        for end in range(len(loc), -1, -1):
            if loc[:end] in self.lines:
                return self.lines[loc[:end]]
        return Place(self.path, 1)

    def problem(self, loc: Loc, text: str, code: str = "value") -> Problem:
        """Return a problem of this key."""
        return Problem(where=self.where(loc), key=key_name(loc), text=text, code=code)


def key_name(loc: Loc) -> str:
    """Write a place as `agents.bot.destinations[0].path`.

    A key that is no plain word, or that looks like a secret of ours, is left out: a value ends up as
    a key when a colon or an indentation is wrong.
    """
    name = ""
    for part in loc:
        if isinstance(part, int):
            name += f"[{part}]"
            continue
        plain = _PLAIN_KEY.fullmatch(part) and not looks_like_ours(part.encode())
        name += ("." if name else "") + (part if plain else "(?)")
    return name or "(file)"


def did_you_mean(found: object, known: Collection[str]) -> str:
    """Return a hint that names known words only, or nothing."""
    close = get_close_matches(str(found)[:64], known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"expected one of: {', '.join(sorted(known))}"


def refuse(problems: Collection[Problem]) -> None:
    """Raise one ConfigError for all problems, a line each; nothing where there are none."""
    if problems:
        raise BadFiles(problems)


def read_document(path: Path, problems: list[Problem], *, judge_writers: bool = True) -> Document:
    """Return the data of a file; what is wrong with it is added to the problems.

    The file and all folders on the way must belong to root or to this uid and be writable by nobody
    else: whoever can write it decides where secrets go. Without `judge_writers` that is not looked
    at: for a checkout that nothing runs from.
    """
    document = Document(path=path)
    text = _read_text(document, problems, judge_writers=judge_writers)
    if text is not None:
        _Builder(document, problems).build(text)
    return document


def _read_text(document: Document, problems: list[Problem], *, judge_writers: bool) -> str | None:
    path = document.path
    writable: list[str] = []
    try:
        with plain_file(path) as (file, status):
            raw = file.read(MAX_BYTES + 1)
            if judge_writers:
                writable += changeable_by_others(path, status)
    except OSError as error:
        text = f"expected a readable file ({error.strerror})"
        problems.append(document.problem((), text, "unreadable"))
        return None
    if len(raw) > MAX_BYTES:
        text = f"expected a file of at most {MAX_BYTES >> 20} MiB"
        problems.append(document.problem((), text, "unreadable"))
        return None
    problems += [
        document.problem(
            (),
            f"{name} is writable by others: expected owner root or the daemon's uid "
            "and no write permission for group and others",
            "writable-by-others",
        )
        for name in writable
    ]
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        where = Place(path, line)
        problems.append(Problem(where=where, key="(file)", text="expected UTF-8", code="syntax"))
        return None


def read_trusted(path: Path) -> bytes:
    """Return what is in a file whose lines are obeyed, under the same rule as `read_document`.

    Raises ConfigError where others can write it, OSError where it cannot be read.
    """
    with plain_file(path) as (file, found):
        for name in changeable_by_others(path, found):
            raise ConfigError(
                f"{path}: none of its lines is applied: {name} is writable by others",
                hint=f"expected owner root or the daemon's uid: `chmod go-w {name}`, and look at its"
                " lines before",
            )
        return file.read(MAX_BYTES)


class _Stop(Exception):  # it ends the building, the problem is in the list
    """The rest of the file cannot be understood."""


class _Builder:
    """Builds the data of one document from parser events."""

    def __init__(self, document: Document, problems: list[Problem]) -> None:
        self._document = document
        self._problems = problems
        self._at: Loc = ()

    def build(self, text: str) -> None:
        """Fill the document, as far as the text can be understood."""
        self._events: Iterator[Any] = yaml.parse(text, Loader=_LOADER)
        try:
            self._root()
        except _Stop:
            pass
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
            words = "expected valid YAML here (see indentation, quotes and colons)"
            if mark is not None:
                self._problem(mark, words)
            else:  # a character that YAML does not have
                line = text.count("\n", 0, getattr(error, "position", None) or 0)
                self._add(Place(self._document.path, line + 1), words, "syntax")

    def _root(self) -> None:
        next(self._events)  # stream start
        event = next(self._events)
        if isinstance(event, yaml.DocumentStartEvent):
            event = next(self._events)
        if not isinstance(event, yaml.MappingStartEvent):
            empty = isinstance(event, yaml.StreamEndEvent) or getattr(event, "value", "-") == ""
            words = "expected a mapping at the top"
            # A file that is being written, or was lost, must not mean that its agents are gone.
            words += ": the file is empty (`agents: {}` says that there are none)" if empty else ""
            self._add(Place(self._document.path, 1), words, "syntax")
            raise _Stop
        self._document.data = self._node(event, ())
        next(self._events)  # document end
        event = next(self._events)
        if not isinstance(event, yaml.StreamEndEvent):
            self._problem(event.start_mark, "expected one document")

    def _node(self, event: Any, loc: Loc) -> Any:
        self._at = loc
        mark = event.start_mark
        self._document.lines.setdefault(loc, self._place(mark))
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            self._problem(mark, "expected no anchor and no alias (& and *): write it out")
        if getattr(event, "tag", None) is not None:
            self._problem(mark, "expected no tag (!)")
        if len(loc) > _MAX_DEPTH:
            self._problem(mark, f"expected at most {_MAX_DEPTH} levels")
            raise _Stop
        if isinstance(event, yaml.ScalarEvent):
            return event.value if event.style else _plain(event.value)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(loc)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(loc)
        return None

    def _sequence(self, loc: Loc) -> list[Any]:
        found: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            found.append(self._node(event, (*loc, len(found))))
        return found

    def _mapping(self, loc: Loc) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._key(event, loc)
            place = (*loc, key)
            mark = event.start_mark
            if key in found:
                self._at = place
                first = self._document.lines[place].rpartition(":")[2]
                words = f"expected this key once; it is also in line {first}"
                self._problem(mark, words, "duplicate-key")
            self._document.lines.setdefault(place, self._place(mark))
            value = self._node(next(self._events), place)
            found.setdefault(key, value)
        return found

    def _key(self, event: Any, loc: Loc) -> str:
        self._at = loc
        mark = event.start_mark
        if not isinstance(event, yaml.ScalarEvent):
            self._problem(mark, "expected text as a key")
            raise _Stop
        if event.anchor is not None or event.tag is not None:
            self._problem(mark, "expected a key without anchor and tag")
        if not event.style and _is_not_text(event.value):
            self._at = (*loc, event.value)
            self._problem(mark, "expected text as a key: put it in quotes")
        return str(event.value)

    def _place(self, mark: Any) -> Place:
        return Place(self._document.path, mark.line + 1, mark.column + 1)

    def _problem(self, mark: Any, text: str, code: str = "syntax") -> None:
        self._add(self._place(mark), text, code)

    def _add(self, where: Place, text: str, code: str) -> None:
        self._problems.append(Problem(where=where, key=key_name(self._at), text=text, code=code))


def _plain(text: str) -> Any:
    """Return what an unquoted scalar means."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _DECIMAL.fullmatch(text) else text


def _is_not_text(text: str) -> bool:
    return not isinstance(_plain(text), str) or _NOT_TEXT.fullmatch(text) is not None
