"""What people, and the services that show pull requests, see of a configuration's files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keyturn.cli import render
from keyturn.cli.render import Row, safe
from keyturn.daemon.masking import mask, printable
from keyturn.errors import ConfigError

_SIGN = {"added": "+", "unmanaged": "-", "changed": "~", "handed-over": ">", "moved": "!"}


def failed(error: ConfigError, path: Path) -> Row:
    """Return the report of a configuration that cannot be used: one row for each problem."""
    rows = [_problem(one) for one in getattr(error, "problems", ())]
    whole = {"file": str(path), "line": 1, "column": 1, "key": "(file)"}
    rows = rows or [whole | {"code": error.code, "message": str(error)}]
    return {"ok": False, "checks": [], "problems": rows, "hint": error.hint}


def _problem(problem: Any) -> Row:
    file, _, line = str(problem.where).rpartition(":")
    has_line = line.isdecimal()  # a variable of the environment has none
    return {
        "file": file if has_line else str(problem.where),
        "line": int(line) if has_line else 1,
        "column": getattr(problem.where, "column", 1),
        "key": problem.key,
        "code": problem.code,
        "message": problem.text,
    }


def github(report: Row) -> str:
    """Return workflow commands, which GitHub shows beside the lines of a pull request.

    docs.github.com, "Workflow commands for GitHub Actions", Setting an error message.
    """
    return "\n".join(_commands(report)) or "::notice::nothing to say"


def _commands(report: Row) -> Iterator[str]:
    for one in report.get("problems") or ():
        place = {"file": _here(one["file"]), "line": one["line"], "col": one["column"]}
        given = ",".join(f"{key}={_property(value)}" for key, value in place.items())
        title = _property(f"keyturn: {one['code']}")
        yield f"::error {given},title={title}::{_data(one['key'] + ': ' + one['message'])}"
    for one in report.get("checks") or ():
        kind = "error" if not one["ok"] else "warning" if one["name"] == "note" else "notice"
        yield f"::{kind} title=keyturn::{_data(one['name'] + ': ' + one['detail'])}"


def _data(text: object) -> str:
    cleaned = str(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return mask(printable(cleaned))


def _property(text: object) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def gitlab(report: Row) -> str:
    """Return a code quality report (docs.gitlab.com, "Code Quality report format")."""
    rows = [
        {
            "description": f"{one['key']}: {one['message']}",
            "check_name": f"keyturn-{one['code']}",
            "fingerprint": _fingerprint(one),
            "severity": "blocker",
            "location": {"path": _here(one["file"]), "lines": {"begin": one["line"]}},
        }
        for one in report.get("problems") or ()
    ]
    return render.as_json(rows)


def _fingerprint(one: Row) -> str:
    """Return what stays the same while lines above a problem come and go."""
    message = re.sub(r":[0-9]+", "", one["message"])
    parts = (_here(one["file"]), one["key"], one["code"], message)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _here(file: str) -> str:
    """Return the path as a repository has it: commands run at its top."""
    try:
        return str(Path(file).absolute().relative_to(Path.cwd()))
    except ValueError:
        return file


def reloaded(result: Row) -> str:
    """Return what a reload changed."""
    moved = result.get("moved", 0)
    notes = [f"{moved} agents have entries at another place now"] if moved else []
    notes += result.get("notes", ())
    lines = [f"configuration taken over: {_counts(result)}"]
    return "\n".join([*lines, *(f"note: {safe(note)}" for note in notes)])


def _counts(result: Row) -> str:
    names = ("added", "changed", "unmanaged", "unchanged")
    words = [f"{result.get(name, 0)} {name}" for name in names]
    if result.get("handed_over"):
        words.append(f"{result['handed_over']} handed over to another file")
    return ", ".join(words)


def rehearsed(result: Row) -> str:
    """Return what a reload would do, a line each, and whether it would be refused."""
    lines = []
    if result["changes"]:
        rows = [_change(one) for one in result["changes"]]
        lines.append(render.table(("", "AGENT", "CHANGE", "WHAT", "WHERE", "WAS IN"), rows))
    refused = result.get("refused")
    if refused:
        lines += [f"would be refused: {safe(one)}" for one in refused["message"].splitlines()]
        lines.append(f"hint: {safe(refused['hint'])}")
    else:
        lines.append(f"would be taken over: {_counts(result)}; nothing was changed")
    return "\n".join(lines)


def _change(one: Row) -> tuple[str, ...]:
    where = f"{one['file']}:{one['line']}" if one["line"] else one["file"]
    what = ", ".join(one["what"])
    return (
        _SIGN.get(one["change"], ""),
        safe(one["agent"]),
        safe(one["change"]),
        safe(what),
        safe(where),
        safe(one["was_in"]),
    )
