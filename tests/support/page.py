"""Runs the commands of a page as a reader types them: one shell, in order, as printed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^```(sh|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_MARK = "== block"


@dataclass(frozen=True, slots=True)
class Block:
    """Commands, and lines that their output must have; `…` stands for whatever."""

    commands: str
    shown: tuple[str, ...] = ()


def blocks(page: str) -> list[Block]:
    """Return what a page tells to type, and what it says that one sees then."""
    found: list[Block] = []
    for kind, text in _BLOCK.findall(page):
        if kind == "sh":
            found.append(Block(text))
        else:
            found[-1] = Block(found[-1].commands, tuple(text.splitlines()))
    return found


def play(page: str, *, folder: Path, environ: Mapping[str, str], limit: float) -> list[str]:
    """Type all of it and return what each block printed.

    Raises AssertionError, with the block and its output, where a command fails or another output
    was promised.
    """
    todo = blocks(page)
    script = ["set -euo pipefail", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"]
    for number, block in enumerate(todo):
        script += [f"echo '{_MARK} {number}'", block.commands]
    seen = folder / "seen"
    # `timeout` ends the whole group, daemons that the page has started included.
    shell = ["timeout", "-k", "5", str(limit), "bash", "-c", "\n".join(script)]
    with seen.open("wb") as out:
        code = subprocess.call(
            shell, cwd=folder, env=dict(environ), stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
    outputs = [part.partition("\n")[2] for part in seen.read_text().split(_MARK)[1:]]
    last = todo[max(len(outputs) - 1, 0)].commands
    assert code == 0, f"exit {code} (124: no end) in\n{last}\n---\n{outputs[-1:]}"
    for block, output in zip(todo, outputs, strict=True):
        for line in block.shown:
            pattern = ".*".join(re.escape(part) for part in line.split("…"))
            assert re.search(rf"^\s*{pattern}\s*$", output, re.MULTILINE), (
                f"no line {line!r} after\n{block.commands}\n---\n{output}"
            )
    return outputs
