"""Rotating many in growing groups: each wave goes only when the one before it has come through.

The waves are this command's: where it ends, by a key or a lost connection, no further one begins, and
the same command with the same --request-id goes on without doing anything twice.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import typer

from keyturn.cli import output, render
from keyturn.core.duration import format_duration
from keyturn.errors import Refused

Row = dict[str, Any]
REST = "rest"


def owned(rows: Sequence[Row], owner: str) -> list[str]:
    """Return the agents of an owner that rotate. Raises Refused where there are none."""
    mine = [row for row in rows if row.get("owner") == owner]
    found = sorted(row["agent"] for row in mine if row["state"] == "enabled")
    for row in mine:
        if row["state"] != "enabled":
            left = f"note: {render.safe(row['agent'])} is {render.safe(row['state'])}: left out"
            print(left, file=sys.stderr)  # noqa: T201
    if not found:
        raise Refused(f"no agent that rotates is owned by {owner}", hint="see: keyturn agents list")
    return found


def split(agents: Sequence[str], wave: str) -> list[list[str]]:
    """Return the waves of `3,30,rest`. Raises a usage error where agents would be left over."""
    words, left, found = [word.strip() for word in wave.split(",")], list(agents), []
    for number, word in enumerate(words):
        is_rest = word == REST and number == len(words) - 1
        if not is_rest and not (word.isascii() and word.isdecimal() and int(word)):
            raise typer.BadParameter("expected --wave as sizes and `rest`, such as 3,30,rest")
        size = len(left) if is_rest else int(word)
        found.append(left[:size])
        left = left[size:]
    if left:
        raise typer.BadParameter(f"{len(left)} agents are left over: end --wave with `rest`")
    return [one for one in found if one]


def rotate(
    waves: Sequence[Sequence[str]],
    ask: Callable[[int, Sequence[str]], list[Row]],
    *,
    pause: timedelta,
    told: bool,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Row]:
    """Rotate one wave after the other, and stop after one that did not come through whole.

    `ask` rotates one wave, by its number, and waits for it.
    """
    results: list[Row] = []
    for number, wave in enumerate(waves):
        if number and pause:
            _tell(
                told,
                f"wave {number} of {len(waves)} is through; {format_duration(pause)} until the next",
            )
            sleep(pause.total_seconds())
        _tell(told, f"wave {number + 1} of {len(waves)}: {len(wave)} agents")
        done = ask(number, wave)
        results += done
        if output.code_of(done):
            results += _left(waves[number + 1 :])
            break
    return results


def _left(waves: Sequence[Sequence[str]]) -> Iterator[Row]:
    error = {
        "code": "wave-stopped",
        "message": "a wave before it did not come through",
        "hint": "mend that, and repeat the command with these agents",
        "exit_code": output.PARTIAL,
    }
    for wave in waves:
        for agent in wave:
            yield {"agent": agent, "outcome": "not asked", "error": error}


def _tell(told: bool, text: str) -> None:
    if told:
        print(text, file=sys.stderr, flush=True)  # noqa: T201
