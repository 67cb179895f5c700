"""The revocations file: one line for each thing that must be refused from now on.

    line     = target " " "at=" time [" reissue"] [" " reason]
    target   = "agent:" id | "version:" id
    time     = RFC 3339, with a zone

A line ends with a newline: what an editor or a full disk left half-written is not a line yet, and
is not applied. Blank lines and lines that begin with `#` are skipped. A line applies to what was
minted up to its time, so one that stays in place never kills a successor.

Nothing of a line is ever repeated in a problem: people paste leaked secrets here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime

from keyturn.core.secret import Secret, is_version_id, parse

LINE_FORM = "`agent:ID` or `version:ID`, then `at=` and an RFC 3339 time that is not in the future"
MAX_REASON = 200

_AGENT_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)
_RFC3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?"
    r"([Zz]|[+-][0-9]{2}:[0-9]{2})",
    re.ASCII,
)
_OUR_FORM = re.compile(r"[A-Za-z0-9]{1,16}_[0-9A-Za-z]{14}_[0-9A-Za-z]{49}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class RevocationEntry:
    """Refuse an agent (all it holds) or one version, as far as minted up to `at`.

    Exactly one of `agent` and `version_id` is set.
    """

    agent: str | None = None
    version_id: str | None = None
    at: datetime
    reissue: bool = False
    reason: str = ""
    line: int = field(default=0, compare=False)  # lines above it may go: it is the same entry

    @property
    def target(self) -> str:
        """Its typed target as one writes it."""
        return f"agent:{self.agent}" if self.agent else f"version:{self.version_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RevocationProblem:
    """A line that says nothing usable. `text` names what was expected, never what was found."""

    line: int
    text: str


def parse_revocations(
    data: bytes, *, now: datetime
) -> tuple[tuple[RevocationEntry, ...], tuple[RevocationProblem, ...]]:
    """Return what the lines ask for, and what is wrong with the others. Never raises.

    One broken line never hides another.
    """
    *lines, rest = data.split(b"\n")  # `rest` has no newline: it is not a line
    entries: list[RevocationEntry] = []
    problems: list[RevocationProblem] = []
    for number, raw in enumerate(lines, start=1):
        try:
            entry = parse_line(raw.decode(), number=number, now=now)
        except ValueError as error:
            # A UnicodeDecodeError quotes bytes of the line.
            text = LINE_FORM if isinstance(error, UnicodeDecodeError) else str(error)
            problems.append(RevocationProblem(line=number, text=text))
        else:
            entries.extend([entry] if entry else [])
    if rest.strip():
        problems.append(
            RevocationProblem(line=len(lines) + 1, text="the last line has no newline: not applied")
        )
    return tuple(entries), tuple(problems)


def parse_line(text: str, *, number: int, now: datetime | None) -> RevocationEntry | None:
    """Return what one line asks for; None where it is blank or a comment.

    With `now` None the time is not compared with the present. Raises ValueError, whose text never
    quotes the line.
    """
    words = text.strip().split()
    if not words or words[0].startswith("#"):
        return None
    if len(words) < 2:
        raise ValueError(f"expected {LINE_FORM}")
    agent, version_id = _target(words[0])
    at = _time(words[1])
    if now is not None and at > now:
        raise ValueError("the time is in the future: expected one up to now")
    reissue = words[2:3] == ["reissue"]
    reason = " ".join(words[3 if reissue else 2 :])
    return RevocationEntry(
        agent=agent,
        version_id=version_id,
        at=at,
        reissue=reissue,
        reason=_clean(reason),
        line=number,
    )


def _target(word: str) -> tuple[str | None, str | None]:
    """Return (agent, version id). A pasted secret counts as its version: the form has its id."""
    kind, _, name = word.partition(":")
    pasted = parse(word.encode()) or parse(name.encode())
    if pasted is not None:
        return None, pasted.version_id
    if kind == "version" and is_version_id(name):
        return None, name
    # SECURITY: an agent's id may look like anything, but nothing with a secret in it gets out.
    if kind == "agent" and _AGENT_ID.fullmatch(name) and ".." not in name:
        return name, None
    raise ValueError(f"expected {LINE_FORM}")


def _time(word: str) -> datetime:
    key, _, value = word.partition("=")
    if key != "at" or not _RFC3339.fullmatch(value):
        raise ValueError("expected `at=` and an RFC 3339 time such as at=2026-01-31T12:00:00Z")
    try:
        return datetime.fromisoformat(value.upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError("expected a time that exists after `at=`") from None


def _clean(reason: str) -> str:
    """Return the reason, cut to 200 characters, printable, with secrets of our form masked."""
    masked = _OUR_FORM.sub(repr(Secret("")), reason)
    return "".join(char if char.isprintable() else "?" for char in masked)[:MAX_REASON]
