"""The memory destination keeps every promise, whatever kind of store it plays."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from keyturn.core.model import Target
from keyturn.destinations.memory import MemoryDestination, MemoryOptions
from keyturn.errors import Conflict, DestinationUnavailable, Rejected
from keyturn.testing import FakeClock
from keyturn.testing.contract import (
    OTHER_STORE_ID,
    STORE_ID,
    DestinationContract,
    new_entry,
    parts,
    publish,
)

KINDS = [
    MemoryOptions(can_stage=stage, has_cas=cas, keeps_versions=keeps)
    for stage, cas, keeps in itertools.product((True, False), repeat=3)
]


class TestMemory(DestinationContract):
    """All eight combinations of traits."""

    @pytest.fixture(params=KINDS, ids=lambda o: f"{o.can_stage}-{o.has_cas}-{o.keeps_versions}")
    def destination(self, request: pytest.FixtureRequest) -> Iterator[MemoryDestination]:
        """Give an empty one."""
        made = MemoryDestination(
            request.param, name="contract", store_id=STORE_ID, clock=FakeClock()
        )
        yield made
        made.close()

    def read_raw(self, destination: Any, target: Target) -> Mapping[str, Any] | None:
        """Read past the port."""
        return destination.raw_get(target)

    def write_raw(self, destination: Any, target: Target, values: Mapping[str, Any]) -> None:
        """Write past the port."""
        destination.raw_put(target, values)

    def sibling(self, destination: Any) -> MemoryDestination:
        """Return a connection of another Keyturn to the same entries."""
        return MemoryDestination(
            destination.options,
            name="contract",
            store_id=OTHER_STORE_ID,
            clock=FakeClock(),
            store=destination.store,
        )


@pytest.fixture
def memory() -> Iterator[MemoryDestination]:
    """Give one that can do everything."""
    made = MemoryDestination(MemoryOptions(), name="m", store_id=STORE_ID, clock=FakeClock())
    yield made
    made.close()


TARGET = Target(to="m", path="bot")


def test_a_lost_answer_has_landed(memory: MemoryDestination) -> None:
    """A fault after the effect is an unknown end for the caller, though agents read the value."""

    def lose(operation: str, moment: str) -> None:
        if (operation, moment) == ("activate", "after"):
            raise OSError("connection reset")

    memory.fault = lose
    with pytest.raises(DestinationUnavailable) as error:
        publish(memory, TARGET, new_entry(1))
    assert error.value.sent
    assert memory.raw_get(TARGET) == parts(TARGET.keys, new_entry(1))


def test_a_fault_before_leaves_nothing(memory: MemoryDestination) -> None:
    """A fault before the effect prevents it."""

    def fail(operation: str, moment: str) -> None:
        if moment == "before" and operation == "stage":
            raise Conflict

    memory.fault = fail
    with pytest.raises(Conflict):
        publish(memory, TARGET, new_entry(1))
    assert memory.raw_get(TARGET) is None


def test_a_first_value_is_shown_when_it_is_staged(memory: MemoryDestination) -> None:
    """Staging into an entry without a value is an activation (rule 8)."""
    memory.stage(TARGET, new_entry(1), expected=memory.observe(TARGET).token)
    assert memory.raw_get(TARGET) == parts(TARGET.keys, new_entry(1))


def test_a_foreign_staged_copy_is_never_stolen(memory: MemoryDestination) -> None:
    """What somebody else has staged is seen as foreign and blocks our staging."""
    publish(memory, TARGET, new_entry(1))
    memory.raw_stage(TARGET, {"secret": "theirs"})
    assert memory.observe(TARGET).staged == ""
    with pytest.raises(Conflict):
        memory.stage(TARGET, new_entry(2), expected=memory.observe(TARGET).token)


def test_an_outside_deletion_voids_the_token(memory: MemoryDestination) -> None:
    """A removed entry is missing, keeps its owner, and is written anew with a fresh token only."""
    publish(memory, TARGET, new_entry(1))
    token = memory.observe(TARGET).token
    memory.raw_delete(TARGET)
    found = memory.observe(TARGET)
    assert (found.exists, found.owner) == (False, STORE_ID)
    with pytest.raises(Conflict):
        memory.activate(TARGET, new_entry(2), expected=token)
    publish(memory, TARGET, new_entry(2))
    assert memory.raw_get(TARGET) == parts(TARGET.keys, new_entry(2))


def test_retiring_takes_the_staging_label_off(memory: MemoryDestination) -> None:
    """Abandoning a staged version leaves no label that would block the next rotation."""
    publish(memory, TARGET, new_entry(1))
    new = new_entry(2)
    locator = memory.stage(TARGET, new, expected=memory.observe(TARGET).token)
    memory.retire(TARGET, version_id=new.version_id, locator=locator, how="disable")
    assert memory.observe(TARGET).staged is None
    assert memory.disabled(TARGET, locator)


def test_a_copy_is_retired_by_its_own_name_only(memory: MemoryDestination) -> None:
    """A locator that holds another version than the caller believes is left alone."""
    first = publish(memory, TARGET, new_entry(1))
    publish(memory, TARGET, new_entry(2))
    with pytest.raises(Rejected):
        memory.retire(TARGET, version_id=new_entry(3).version_id, locator=first, how="destroy")
    assert not memory.disabled(TARGET, first)
