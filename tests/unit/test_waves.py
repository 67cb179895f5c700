"""Rotating many in growing groups."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import typer

from keyturn.cli import main, waves
from keyturn.errors import Refused

NAMES = [f"a{number}" for number in range(10)]


@pytest.mark.parametrize(
    ("wave", "sizes"),
    [("3,30,rest", [3, 7]), ("1,2,rest", [1, 2, 7]), ("rest", [10]), ("4,6", [4, 6]), ("10", [10])],
)
def test_agents_go_into_waves_by_size(wave: str, sizes: list[int]) -> None:
    """In order, each once, and no empty wave."""
    found = waves.split(NAMES, wave)
    assert [len(one) for one in found] == sizes
    assert [name for one in found for name in one] == NAMES


@pytest.mark.parametrize("wave", ["3", "0,rest", "rest,3", "3,,rest", "-1,rest", "x", "3,4"])
def test_a_wave_that_says_nothing_or_leaves_some_over_is_refused(wave: str) -> None:
    """Whoever means all of them says `rest`."""
    with pytest.raises(typer.BadParameter):
        waves.split(NAMES, wave)


class Asked:
    """What a daemon would answer, and what it was asked when."""

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        self.log: list[Any] = []

    def ask(self, number: int, wave: Any) -> list[dict[str, Any]]:
        """Rotate one wave."""
        self.log.append((number, list(wave)))
        error = {"code": "x", "message": "m", "hint": "", "exit_code": 1}
        return [
            {"agent": name, "outcome": "stalled", "error": error}
            if name == self.failing
            else {"agent": name, "outcome": "promoted"}
            for name in wave
        ]


def test_a_wave_begins_after_the_pause_behind_the_one_before() -> None:
    """Not before the first, and not after the last."""
    daemon = Asked()
    done = waves.rotate(
        waves.split(NAMES, "1,2,rest"), daemon.ask, pause=timedelta(hours=1), told=False,
        sleep=daemon.log.append,
    )  # fmt: skip
    assert daemon.log == [(0, ["a0"]), 3600, (1, ["a1", "a2"]), 3600, (2, NAMES[3:])]
    assert [row["outcome"] for row in done] == ["promoted"] * 10


def test_after_a_wave_that_fails_none_follows() -> None:
    """What was not asked is listed, with its own code, and the pause is not waited for."""
    daemon = Asked(failing="a2")
    done = waves.rotate(waves.split(NAMES, "1,2,rest"), daemon.ask, pause=timedelta(0), told=False)
    assert daemon.log == [(0, ["a0"]), (1, ["a1", "a2"])]
    outcomes = [row["outcome"] for row in done]
    assert outcomes == ["promoted", "promoted", "stalled"] + ["not asked"] * 7
    assert done[-1]["error"]["exit_code"] == 3


def test_an_owner_names_those_that_rotate(capsys: pytest.CaptureFixture[str]) -> None:
    """By name; who is stopped is left out and said, and an owner of none is refused."""
    rows = [
        {"agent": "b", "owner": "x", "state": "enabled"},
        {"agent": "c", "owner": "x", "state": "suspended"},
        {"agent": "a", "owner": "x", "state": "enabled"},
        {"agent": "d", "owner": "y", "state": "unmanaged"},
    ]
    assert waves.owned(rows, "x") == ["a", "b"]
    assert "c is suspended: left out" in capsys.readouterr().err
    for owner in ("y", "z"):
        with pytest.raises(Refused, match=f"owned by {owner}"):
            waves.owned(rows, owner)


@pytest.mark.parametrize(
    "line",
    ["rotate", "rotate a --owner x", "rotate a --wave 1", "rotate a --wait --pause 1h",
     "rotate a --wait --wave 1 --pause soon", "rotate a b --wait --wave 1"],
)  # fmt: skip
def test_options_that_do_not_go_together_are_usage(line: str) -> None:
    """Before anybody is asked."""
    assert main.main(line.split()) == 2
