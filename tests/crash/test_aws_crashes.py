"""The whole saga against AWS: ended at every point of it, each rotation owns one version."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from keyturn.core.model import Target
from keyturn.testing.aws import StandIn, stand_in
from support.aws import agent, connect, labels, versions
from support.bench import Bench
from support.real import Real

BOT = Target(to="d0", path="bot")
INTERRUPTED = 20  # rotations; ten times as many in the full version


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    """Give one stand-in to all tests."""
    with stand_in(tmp_path_factory.mktemp("aws"), rate=100_000) as one:
        yield one


class Region:
    """Where the bench's agent reads, by plain boto3."""

    def __init__(self, server: StandIn, folder: Path) -> None:
        self.server, self.raw = server, agent(server)
        self.folder = folder
        self.name = ""

    def play_in(self, bench: Bench) -> None:
        """Put AWS in the place of the bench's destination."""
        destination = connect(
            self.server, self.server.keys_file(self.folder), store_id=bench.store_id, name="d0"
        )
        self.name = destination.place(BOT)
        bench.played = {"d0": Real(bench, destination, self)}  # type: ignore[dict-item]

    def read(self, _target: Target) -> Any:
        """Read as an agent does; None where there is nothing."""
        try:
            found = self.raw.get_secret_value(SecretId=self.name)
        except self.raw.exceptions.ResourceNotFoundException:
            return None
        return json.loads(found["SecretString"])


def settled(bench: Bench, region: Region) -> bool:
    """Whether the agent reads the current version and no rotation is open."""
    values, current = region.read(BOT), bench.case.current
    home = values is not None and current is not None and values["version"] == current.id
    return home and bench.case.rotation is None


def rotate(bench: Bench, region: Region) -> None:
    """Ask for a rotation and let the daemon work until it is over and the old one is retired."""
    bench.ask()
    bench.go(until=lambda: settled(bench, region) and bench.case.credential.request is None)


def begun(server: StandIn, folder: Path, seed: str) -> tuple[Bench, Region]:
    """Make a bench with one agent whose first version is published."""
    bench, region = Bench("staging", seed=seed), Region(server, folder)
    bench.look = lambda: None  # type: ignore[method-assign]
    region.play_in(bench)
    bench.go(until=lambda: settled(bench, region))
    return bench, region


def test_a_rotation_by_the_saga_is_four_writes(server: StandIn, tmp_path: Path) -> None:
    """Put, move and unlabel; and the label of the version before, when its grace is over."""
    bench, region = begun(server, tmp_path, "four")
    for number in range(2, 5):
        server.front.seen.clear()
        rotate(bench, region)
        bench.go(until=bench.quiet)
        assert len(server.writes()) <= 4, server.writes()
        assert versions(server, region.name) == number
        assert labels(server, region.name).keys() == {"AWSCURRENT"}
        assert len(bench.versions()) == number
    bench.close()


@pytest.mark.parametrize(
    "rotations",
    [
        INTERRUPTED,
        pytest.param(10 * INTERRUPTED, marks=[pytest.mark.full, pytest.mark.timeout(2400)]),
    ],
    ids=["tenth", "whole"],
)
def test_interrupted_rotations_own_one_version_each(
    server: StandIn, tmp_path: Path, rotations: int
) -> None:
    """Ended at a random point, it goes on: at most one version more, never more than three labels.

    An entry for every twenty: the service keeps a hundred versions of one, and none goes in a day.
    """
    crashes = made = 0
    for part in range(rotations // INTERRUPTED):
        bench, region = begun(server, tmp_path, f"crashes {part}")
        interrupt(bench, region, random.Random(f"crashes {part}"))
        crashes, made = crashes + bench.crashes, made + len(bench.versions())
        bench.close()
    assert crashes > rotations / 3
    print(f"\naws: {rotations} rotations, {crashes} crashes, {made} versions")


def interrupt(bench: Bench, region: Region, draw: random.Random) -> None:
    """Rotate, each time ended somewhere."""
    held: set[str] = set()
    for _ in range(INTERRUPTED):
        before, minted, crashes = _count(region), len(bench.versions()), bench.crashes
        end = len(bench.points) + draw.randrange(14)
        bench.crash_at = lambda at, _name, end=end: at == end  # type: ignore[misc]
        rotate(bench, region)
        bench.crash_at = lambda _at, _name: False
        more = bench.crashes - crashes
        assert _count(region) - before <= 1 + more
        assert len(bench.versions()) - minted <= 1 + more
        held |= labels(region.server, region.name).keys()
        values = region.read(BOT)
        assert bench.accepts(values["id"], values["secret"])
        bench.clock.advance(timedelta(hours=3))
        bench.go(until=bench.quiet)
        assert len(labels(region.server, region.name)) <= 2
    assert held <= {"AWSCURRENT", "AWSPENDING", "AWSPREVIOUS"}


def _count(region: Region) -> int:
    return versions(region.server, region.name)
