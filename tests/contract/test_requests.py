"""A command with a request id is done once in a day, on both stores."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from keyturn.core.model import Case, Placement, Request, VersionState
from keyturn.errors import Refused
from keyturn.ports import AuditEntry
from keyturn.storage.requests import KEPT, Begun, Once
from keyturn.storage.store import Change, Store
from support.postgres import postgres  # noqa: F401 - a fixture
from support.stores import NOW, Place, add, entry, version


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """Give a new store of each kind."""
    url = f"sqlite:///{tmp_path / 'store' / 'k.db'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").new_database()
    place = Place(url=url, state_dir=tmp_path / "state")
    yield place.open()
    place.close()


def once(request_id: str = "r1", **args: Any) -> Once:
    """Return a request as a new call would make it."""
    return Once.of(request_id, "rotate", args)


def asking(kept: Once, made: list[str]) -> Change:
    """Return a change that leaves its mark where it is made."""

    def change(case: Case) -> tuple[Case, Sequence[AuditEntry]]:
        made.append(case.agent.name)
        kept.outcome = {"did": len(made)}
        asked = replace(case.credential, request=Request(by=str(len(made))))
        return replace(case, credential=asked), [entry("rotate")]

    return change


def test_a_repeat_changes_nothing_and_finds_the_outcome(store: Store) -> None:
    """The second call gets what the first one did; another agent is another piece of the command."""
    uid, other, made = add(store, "a"), add(store, "b"), list[str]()
    for _ in range(3):
        kept = once()
        saved = store.amend(uid, asking(kept, made), once=kept)
        assert kept.outcome == {"did": 1}
    assert (made, kept.repeated, saved.case.credential.request) == (["a"], True, Request(by="1"))
    store.amend(other, asking(again := once(), made), once=again)
    assert (made, again.repeated) == (["a", "b"], False)
    assert len([e for e in store.audit_entries() if e.entry.action == "rotate"]) == 2


def test_a_change_that_is_refused_keeps_no_request(store: Store) -> None:
    """What was not done can be tried again under the same id."""
    uid = add(store, "a")

    def refuse(_case: Case) -> tuple[Case, Sequence[AuditEntry]]:
        raise Refused("not now")

    with pytest.raises(Refused):
        store.amend(uid, refuse, once=once())
    made: list[str] = []
    store.amend(uid, asking(kept := once(), made), once=kept)
    assert (made, kept.repeated) == (["a"], False)


def test_an_id_means_one_command(store: Store) -> None:
    """The same id with other arguments is refused and changes nothing, for any agent."""
    uid, other, made = add(store, "a"), add(store, "b"), list[str]()
    store.amend(uid, asking(kept := once(grace=1), made), once=kept)
    for one in (uid, other):
        with pytest.raises(Refused, match="another command"):
            store.amend(one, asking(kept := once(grace=2), made), once=kept)
    assert made == ["a"]


def test_two_at_once_make_one(store: Store) -> None:
    """Repeats that meet wait for each other: one of them makes the change."""
    uid, made = add(store, "a"), list[str]()
    found: list[Once] = []

    def call() -> None:
        kept = once()
        store.amend(uid, asking(kept, made), once=kept)
        found.append(kept)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.repeated for one in found) == [False, True, True, True]
    assert store.case(uid).credential.revision == 1


def test_a_request_is_forgotten_after_a_day(store: Store) -> None:
    """Old ones go, newer ones stay."""
    uid, made = add(store, "a"), list[str]()
    store.amend(uid, asking(kept := once(), made), once=kept)
    store.forget_requests(before=store.now() - KEPT)
    store.amend(uid, asking(kept := once(), made), once=kept)
    assert made == ["a"]
    store.forget_requests(before=store.now() + timedelta(seconds=1))
    store.amend(uid, asking(kept := once(), made), once=kept)
    assert (made, kept.repeated) == (["a", "a"], False)


@pytest.mark.parametrize("request_id", ["", "x" * 129, "a\nb", "ü"])
def test_what_is_no_id_is_refused(request_id: str) -> None:
    """An id goes into logs and rows: short, printable, ASCII."""
    with pytest.raises(Refused, match="request id"):
        once(request_id)


def test_notes_of_what_was_begun(tmp_path: Path) -> None:
    """A note is found by its id, belongs to one command, and goes after its time."""
    begun = Begun(tmp_path / "requests.d")
    assert begun.versions(once()) is None
    begun.note(once(), ["v1", "v2"])
    assert begun.versions(once()) == ["v1", "v2"]
    assert begun.versions(once("../../r1")) is None
    with pytest.raises(Refused):
        begun.versions(once(grace=1))
    (note,) = (tmp_path / "requests.d").iterdir()
    assert note.stat().st_mode & 0o777 == 0o600
    begun.clean(before=NOW)
    os.utime(note, (1, 1))
    begun.clean(before=NOW)
    assert begun.versions(once()) is None
    note.write_text("{torn")
    assert begun.versions(once()) is None
    Begun(note / "nowhere").note(once(), ["v1"])


def test_what_alerts_need_is_counted(store: Store) -> None:
    """Over-aged current versions by their policy, copies of what was revoked, the audit's head."""
    uid = add(store, "a")
    revoked, current = version(uid, 1, VersionState.REVOKED), version(uid, 2, VersionState.CURRENT)
    copies = tuple(
        Placement(version_id=one.id, credential_uid=uid, target="files:a", locator=one.id)
        for one in (revoked, current)
    )
    store.amend(
        uid, lambda case: (replace(case, versions=(revoked, current), placements=copies), [])
    )

    found = store.counts(max_ages={"default": timedelta(0)})
    assert (found.over_max_age, found.cleanup_pending, found.audit_head) == (1, 1, 1)
    for ages in ({}, {"other": timedelta(0)}, {"default": timedelta(days=9999)}):
        assert store.counts(max_ages=ages).over_max_age == 0
