"""What the store keeps of hooks and anchors, on each database."""

from __future__ import annotations

import threading
from datetime import UTC, datetime

from keyturn.anchor_file import Quote
from keyturn.storage import anchors, audit
from keyturn.storage.hooks import Cursors, HookRecords
from keyturn.storage.store import Store
from support.postgres import postgres  # noqa: F401 - a fixture
from support.stores import Place, either_place, entry  # noqa: F401 - a fixture


def read_all(records: HookRecords, seen: Cursors) -> list[str]:
    """Read on until there is nothing more; return the versions that the entries name."""
    found: list[str] = []
    while rows := records.after(seen):
        for row in rows:
            assert row.seq == seen.get(row.chain, 0) + 1
            seen[row.chain] = row.seq
            found.append(row.entry.version_id)
    return found


def commit(store: Store, agent: str, numbers: range) -> None:
    """Commit entries, each in a transaction of its own."""
    for number in numbers:
        store.append_audit(entry(agent=agent, version_id=f"{agent}-{number}"))


def test_a_hook_is_kept_as_it_was_left(place: Place) -> None:
    """Cursors, summaries and whether it is gone; a second begin changes nothing, another place does."""
    store = place.open()
    commit(store, "a", range(2))
    records, now = HookRecords(store.database), datetime.now(UTC).replace(microsecond=5)
    first = records.begin("x", "r1")
    assert (sum(first.cursors.values()), first.gone_at, first.summaries, first.number) == (
        2, None, (), 0,
    )  # fmt: skip
    moved = {**dict.fromkeys(first.cursors, 7), "new/0": 3}
    records.keep("x", moved, summaries=[{"number": 1, "counts": {}}], number=1, gone_at=now)

    again = records.begin("x", "r1")
    assert again == records.find("x")
    assert (again.cursors, again.gone_at, again.number) == (moved, now, 1)
    assert again.summaries == ({"number": 1, "counts": {}},)
    assert records.begin("x", "r2").gone_at is None
    assert records.names() == ["x"]
    records.forget("x")
    assert (records.names(), records.find("x")) == ([], None)
    records.keep("x", {"new/0": 4}, summaries=[], number=1, gone_at=None)
    assert records.begin("x", "r1").cursors.get("new/0") is None


def test_nothing_is_passed_by_while_others_commit(place: Place) -> None:
    """Four writers at once: each entry is read once, in the order of its chain, none is left out."""
    stores = [place.open(f"w{n}") for n in range(4)]
    records, seen = HookRecords(stores[0].database), Cursors()
    found: list[str] = []
    threads = [
        threading.Thread(target=commit, args=[store, f"agent-{n}", range(15)])
        for n, store in enumerate(stores)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        found += read_all(records, seen)
    found += read_all(records, seen)
    assert len(found) == len(set(found)) == 60
    for agent in range(4):
        mine = [one for one in found if one.startswith(f"agent-{agent}-")]
        assert mine == [f"agent-{agent}-{number}" for number in range(15)]


def test_an_anchor_quotes_what_has_moved(place: Place) -> None:
    """All chains the first time, then only those with something new; other writers' as well."""
    one, two = place.open("w1"), place.open("w2")
    commit(one, "a", range(3))
    commit(two, "b", range(2))
    heads = one.anchor_audit(why="start")
    assert len(heads) == 3
    commit(two, "b", range(1))
    two.anchor_audit(why="hourly")
    two.anchor_audit(why="hourly")

    newest = [dict(found.entry.detail)["heads"] for found in one.audit_entries(limit=2)]
    assert newest[0] == []
    assert [(chain.partition("/")[0], seq) for chain, seq, _hash in newest[1]] == [("w2", 3)]
    assert one.verify_audit() == []


def test_a_chain_that_was_taken_away_is_named(place: Place) -> None:
    """Without any file: an anchor in another chain names it."""
    one, two = place.open("w1"), place.open("w2")
    commit(one, "a", range(3))
    commit(two, "b", range(2))
    one.anchor_audit(why="start")
    with one.engine.begin() as connection:
        for table in ("audit", "chains"):
            connection.exec_driver_sql(f"DELETE FROM {table} WHERE chain LIKE 'w2/_'")
    assert audit.problems(one.database.read) == []
    (problem,) = one.verify_audit()
    assert problem.startswith("w2/")
    assert "nothing of it can be believed" in problem


def test_what_was_good_is_said(place: Place) -> None:
    """A problem names the last anchor that still holds."""
    store = place.open("w1")
    commit(store, "a", range(2))
    (chain, (seq, digest)) = store.anchor_audit(why="start").popitem()
    good = Quote(chain, seq, digest, "monday")
    bad = Quote(chain, seq + 5, digest, "tuesday")
    (problem,) = anchors.unmet(store.database.read, [bad, good])
    assert f"entry {seq + 5}" in problem
    assert f"whole up to entry {seq} of monday" in problem


def test_following_a_chain_finds_what_the_walk_finds(place: Place) -> None:
    """Slice by slice: a changed entry, and an end that is not the head."""
    store = place.open("w1")
    commit(store, "a", range(4))
    read = store.database.read
    ((chain, head),) = audit.ends(read).items()
    assert audit.follow(read, chain, (0, audit.START)) == (head, "")
    assert audit.follow(read, chain, head) == (head, "")
    with store.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE audit SET actor = 'mallory' WHERE seq = 3")
    reached, problem = audit.follow(read, chain, (0, audit.START))
    assert (reached[0], problem) == (2, f"{chain}: entry 3 was changed")
    with store.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM audit WHERE seq > 2")
    assert audit.follow(read, chain, reached)[1] == f"{chain}: ends at entry 2, not at 4"
