"""The memory destination keeps the contract, in every shape that it can take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from keyturn.core.model import Target
from keyturn.destinations.memory import MemoryDestination, MemoryOptions
from keyturn.testing.contract import STORE_ID, DestinationContract
from keyturn.testing.fakes import FakeClock

SHAPES = {
    "like AWS": {"can_stage": True, "has_cas": True, "keeps_versions": True},
    "like Vault": {"can_stage": False, "has_cas": True, "keeps_versions": True},
    "like a file": {"can_stage": False, "has_cas": True, "keeps_versions": False},
    "like Azure": {"can_stage": False, "has_cas": False, "keeps_versions": True},
}


class TestMemory(DestinationContract):
    """Memory, four times."""

    @pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
    def destination(self, request: pytest.FixtureRequest) -> MemoryDestination:
        options = MemoryOptions(**request.param)
        return MemoryDestination(options, name="m", store_id=STORE_ID, clock=FakeClock())

    def read_raw(self, destination: Any, target: Target) -> dict[str, Any] | None:
        return destination.raw_get(target)

    def write_raw(self, destination: Any, target: Target, values: Mapping[str, str]) -> None:
        destination.raw_put(target, values)
