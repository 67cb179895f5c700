"""Printing, in one place: data to stdout, everything else to stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer

from keyturn.cli import render
from keyturn.cli.client import OnProgress

PARTIAL = 3
REFUSED = 4
INCOMPLETE = 75


def show(data: Any, *, as_json: bool, people: Callable[[Any], str]) -> None:
    """Print the same data for machines or for people."""
    typer.echo(render.as_json(data) if as_json else people(data))


def progress(*, as_json: bool) -> OnProgress | None:
    """Return what shows progress on stderr; nothing does where a machine reads."""
    return None if as_json else tell


def tell(event: dict[str, Any]) -> None:
    """Print one line of progress."""
    print(render.event(event), file=sys.stderr, flush=True)  # noqa: T201


def end_with(code: int) -> None:
    """End the command with this exit code."""
    if code:
        raise typer.Exit(code)


def code_of_revocation(result: dict[str, Any]) -> int:
    """Return 75 where something may still be accepted, 3 where all is cut and something is left to do.

    That is a successor that is not there, or a destination that still holds what was cut.
    """
    if result.get("incomplete"):
        return INCOMPLETE
    rest = (result.get("successor") or {}, result.get("cleanup") or {})
    return PARTIAL if any(_code(one) for one in rest) else 0


def code_of(results: list[dict[str, Any]]) -> int:
    """Return the exit code of several results: all good 0, some 3, none their own."""
    codes = [_code(one) for one in results]
    failed = [code for code in codes if code]
    if not failed:
        return 0
    return failed[0] if len(set(codes)) == 1 else PARTIAL


def _code(result: dict[str, Any]) -> int:
    error = result.get("error")
    if error:
        return int(error.get("exit_code", 1))
    # Waiting goes on by itself, stalled needs a person: only the second is a failure.
    return {"waiting": INCOMPLETE, "stalled": 1, "refused": REFUSED}.get(
        result.get("outcome", ""), 0
    )
