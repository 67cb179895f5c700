"""What a hook tells of a real store, to a receiver that is a function."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from keyturn import config, incidents
from keyturn.core.model import Agent
from keyturn.errors import ConfigError, StoreUnavailable
from keyturn.notify import Notifier
from keyturn.notify.hook import OLDEST, REFUSALS, REFUSED_FOR, Hook, Spec, Surroundings
from keyturn.notify.sending import Answer
from keyturn.ports import AuditEntry
from keyturn.storage import hooks
from keyturn.storage.hooks import HookRecords
from keyturn.storage.store import Store
from support.receiver import key_file
from support.running import Keyturn
from support.stores import Place, add, entry

ALL = frozenset({"promoted", "stalled", "revoked", "incident"})
YES, NO, GONE = Answer(status=204), Answer(status=500), Answer(status=410)
PICKY = Answer(status=400)


@dataclass
class World:
    """A store, a receiver and the time; `hook()` is what one daemon has of them."""

    folder: Path
    place: Place
    answer: Answer = YES
    taken: list[dict[str, Any]] = field(default_factory=list)
    tried: list[str] = field(default_factory=list)
    passed: float = 0.0
    results: list[str] = field(default_factory=list)
    gauge: tuple[int, float] = (0, 0.0)

    def __post_init__(self) -> None:
        self.store: Store = self.place.open()
        self.key = key_file(self.folder)

    def spec(self, *on: str) -> Spec:
        """Return the configuration of the hook."""
        return Spec(
            name="pager",
            url="https://hooks.example/x",
            key_file=self.key,
            on=frozenset(on) or ALL,
        )

    def hook(self, *on: str, store: Store | None = None) -> Hook:
        """Return the hook as it is after a start; `_turn` is one look of its thread."""
        made = Hook(self.spec(*on), self.around(store or self.store), "receiver")
        made.begin()
        return made

    def around(self, store: Store) -> Surroundings:
        """Return what hooks need."""
        return Surroundings(
            records=HookRecords(store.database),
            store_id="s1",
            now=self.now,
            agent=self.agent,
            audit=store.append_audit,
            instruments=self,
            send=self.send,
            elapsed=lambda: self.passed,
        )

    def now(self) -> datetime:
        """Return the store's time."""
        return datetime.now(UTC) + timedelta(seconds=self.passed)

    def agent(self, name: str) -> Agent | None:
        """Return who an event is about."""
        return Agent(uid="u", name=name, login=name, owner="team-a") if name != "gone" else None

    def send(self, _url: str, body: bytes, headers: dict[str, str], **_more: object) -> Answer:
        """Answer as told."""
        self.tried.append(headers["webhook-id"])
        if self.answer.delivered:
            self.taken.append(json.loads(body))
        return self.answer

    def delivered(self, _hook: str, result: str) -> None:
        """Count."""
        self.results.append(result)

    def waiting(self, _hook: str, number: int, oldest: float) -> None:
        """Note."""
        self.gauge = (number, oldest)

    def told(self) -> list[tuple[str, str | None]]:
        """Return what was taken, as type and version or code."""
        return [(m["type"], m["data"].get("version") or m["data"].get("code")) for m in self.taken]

    def promoted(self, *versions: str, agent: str = "a", store: Store | None = None) -> None:
        """Commit promotions."""
        for one in versions:
            (store or self.store).append_audit(
                entry("version.promoted", agent=agent, version_id=one)
            )


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store, to be copied: making one takes longer than most tests."""
    folder = tmp_path_factory.mktemp("empty")
    place = Place(url=f"sqlite:///{folder}/k.db", state_dir=folder)
    place.open()
    place.close()
    return folder / "k.db"


@pytest.fixture
def world(tmp_path: Path, empty: Path) -> Iterator[World]:
    """A world with an empty store."""
    (tmp_path / "state").mkdir(mode=0o700)
    shutil.copy(empty, tmp_path / "state" / "k.db")  # with its mode
    place = Place(url=f"sqlite:///{tmp_path}/state/k.db", state_dir=tmp_path / "state")
    yield World(tmp_path, place)
    place.close()


# --- what is told -------------------------------------------------------------------------


def test_events_are_told_with_what_a_person_needs(world: World) -> None:
    """Each has its type, who, what and the next command; nothing else of the audit gets out."""
    hook = world.hook()
    add(world.store, "a")
    for one in (
        entry("version.promoted", agent="a", version_id="v1"),
        entry(
            "rotation.stalled",
            agent="a",
            outcome="denied",
            detail=(("target", "vault-eu:billing"), ("why", "vendor said: hunter2")),
        ),
        entry(
            "revoke",
            agent="a",
            detail=(("reason", "INC hunter2"), ("reissue", True), ("revoked", ("v1", "v2"))),
        ),
        entry("drift.found", agent="a", outcome="missing", detail=(("target", "files:a"),)),
        entry("drift.found", agent="a", outcome="unknown", detail=(("target", "files:a"),)),
        entry("rotate", agent="a"),
    ):
        world.store.append_audit(one)
    hook._turn()

    promoted, stalled, revoked, drift = [one["data"] for one in world.taken]
    assert [one["type"] for one in world.taken] == ["promoted", "stalled", "revoked", "incident"]
    assert (promoted["agent"], promoted["owner"], promoted["version"]) == ("a", "team-a", "v1")
    assert (stalled["code"], stalled["destination"]) == ("denied", "vault-eu")
    assert stalled["hint"] == "keyturn check --probe"
    assert (revoked["versions"], revoked["reissue"]) == (["v1", "v2"], True)
    assert (drift["code"], drift["hint"]) == ("drift-unknown", "keyturn status a")
    assert "hunter2" not in json.dumps(world.taken)


def test_a_hook_is_told_what_it_asked_for(world: World) -> None:
    """What is not in `on` passes by and is not sent later either."""
    hook = world.hook("revoked")
    world.promoted("v1")
    world.store.append_audit(entry("revoke", agent="a"))
    hook._turn()
    assert [kind for kind, _ in world.told()] == ["revoked"]


def test_a_new_hook_begins_now(world: World) -> None:
    """It is not told the history of the store."""
    world.promoted("v1")
    hook = world.hook()
    world.promoted("v2")
    hook._turn()
    assert world.told() == [("promoted", "v2")]


@pytest.mark.parametrize("code", incidents.TABLE)
def test_every_incident_has_words(world: World, code: str) -> None:
    """An incident of the table is told with its meaning and a command."""
    hook = world.hook()
    world.store.append_audit(incidents.entry(code, actor="tester", agent="gone"))
    hook._turn()
    data = world.taken[0]["data"]
    assert (data["code"], data["meaning"]) == (code, incidents.TABLE[code].meaning)
    assert data["hint"].startswith("keyturn ")


def test_what_counts_as_an_incident_under_another_action() -> None:
    """The clock, drift that harms and a refused reload are incidents; ordinary entries are not."""
    found = {
        AuditEntry(action="clock.jumped", actor="d"): "clock-jumped",
        AuditEntry(action="config.reload", actor="d", outcome="mass-change"): "mass-change",
        AuditEntry(action="drift.found", actor="d", outcome="revoked"): "drift-revoked",
        AuditEntry(action="config.reload", actor="d"): None,
        AuditEntry(action="config.reload", actor="d", outcome="configuration"): None,
        AuditEntry(action="drift.found", actor="d", outcome="missing"): None,
        AuditEntry(action="clock.believed", actor="d"): None,
    }
    assert {one: incidents.code_of(one) for one in found} == found


# --- at least once, in order --------------------------------------------------------------


def test_order_is_that_of_the_commits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents in several lanes and two writers, more than one read takes: as they were committed."""
    monkeypatch.setattr(hooks, "SLICE", 5)
    hook = world.hook()
    other = world.place.open("w2")
    for number in range(60):
        writer = other if number % 7 == 0 else world.store
        world.promoted(f"v{number}", agent=f"agent-{number % 11}", store=writer)
    hook._turn()
    assert world.told() == [("promoted", f"v{number}") for number in range(60)]


def test_what_a_dead_process_did_not_tell_is_told(world: World) -> None:
    """Whatever was committed and not written down as told is sent by the next process, same id."""
    first = world.hook()
    world.promoted("v1", "v2")
    first._read()
    first._deliver_next()  # v1 is taken, and the process dies before it writes that down
    world.hook()._turn()

    assert world.told() == [("promoted", "v1"), ("promoted", "v1"), ("promoted", "v2")]
    assert world.tried[0] == world.tried[1] != world.tried[2]


def test_what_was_told_is_not_told_again(world: World) -> None:
    """A look that ends well has written down how far it is."""
    world.promoted("v0")
    first = world.hook()
    world.promoted("v1", "v2")
    first._turn()
    world.hook()._turn()
    assert world.told() == [("promoted", "v1"), ("promoted", "v2")]


def test_a_failing_receiver_is_tried_again_later(world: World) -> None:
    """It backs off, keeps the order, and goes on where it was."""
    hook = world.hook()
    world.answer = NO
    world.promoted("v1", "v2")
    for _ in range(50):
        hook._turn()
    assert len(world.tried) == 1
    assert world.gauge[0] == 2
    for _ in range(3):
        world.passed += 10
        hook._turn()
    assert len(set(world.tried)) == 1
    assert len(world.tried) == 4
    assert hook.status()["state"] == "failing"
    world.answer, world.passed = YES, world.passed + 400
    hook._turn()
    assert world.told() == [("promoted", "v1"), ("promoted", "v2")]
    assert (hook.status()["state"], world.gauge) == ("ok", (0, 0.0))


def test_retry_after_is_waited_for(world: World) -> None:
    """A receiver that asks for an hour is left alone for one."""
    hook = world.hook()
    world.answer = Answer(status=503, retry_after=timedelta(hours=1))
    world.promoted("v1")
    for world.passed in (0.0, 600.0, 3599.0, 3601.0):
        hook._turn()
    assert len(world.tried) == 2


def test_one_that_fails_for_an_hour_is_mentioned(world: World) -> None:
    """`keyturn status` says so, with the command that shows what the receiver answers."""
    hook = world.hook()
    world.answer = NO
    world.promoted("v1")
    hook._turn()
    assert hook.status()["problem"] == ""
    world.passed += 3700
    hook._turn()
    assert "keyturn notify test --name pager" in hook.status()["problem"]


# --- bounds -------------------------------------------------------------------------------


def test_too_many_are_told_in_sum(world: World) -> None:
    """What is kept is bounded; what goes is counted and told before the rest, once."""
    hook = world.hook()
    world.answer = NO
    cut = 30
    hook._most = 20
    world.promoted(*[f"v{n}" for n in range(20 + cut)])
    hook._turn()
    world.answer, world.passed = YES, 400
    hook._turn()

    summary = world.taken[0]
    assert summary["type"] == "summary"
    assert summary["data"]["counts"] == {"promoted": cut}
    assert world.told()[1:] == [("promoted", f"v{n}") for n in range(cut, 20 + cut)]


def test_the_old_are_told_in_sum(world: World) -> None:
    """A receiver that is dead for days finds a summary, also after restarts in between."""
    world.answer = NO
    world.hook()
    world.promoted("v1", "v2")
    world.passed += OLDEST.total_seconds() + 60
    world.promoted("v3")
    for _ in range(3):
        world.hook()._turn()
    world.answer = YES
    world.hook()._turn()
    kinds = [(one["type"], one["data"].get("counts")) for one in world.taken]
    # `at` of an entry is the real time, so by this clock all three are old.
    assert kinds == [("summary", {"promoted": 3})]


def test_a_summary_that_may_be_known_stays_as_it_is(world: World) -> None:
    """After its first try more goes into the next one: an id never means two things."""
    hook = world.hook()
    world.answer = NO
    hook._most = 1
    world.promoted("v1", "v2")
    hook._turn()
    world.promoted("v3", "v4")
    hook._turn()
    world.answer, world.passed = YES, 400
    hook._turn()
    assert [one["data"].get("counts") for one in world.taken] == [
        {"promoted": 1},
        {"promoted": 2},
        None,
    ]
    assert len({one["id"] for one in world.taken}) == 3


def test_a_full_queue_does_not_hasten_a_dead_receiver(world: World) -> None:
    """What is cut resets no back-off, and `keyturn status` still says since when it fails."""
    hook = world.hook()
    hook._most, world.answer = 2, NO
    for number in range(20):
        world.promoted(f"v{number}")
        hook._turn()
    assert len(world.tried) == 1
    world.passed = 3700
    assert "fails since" in hook.status()["problem"]
    assert len(hook._summaries) <= 2


def test_one_message_that_is_refused_does_not_hold_the_others(world: World) -> None:
    """After an hour of 400s it goes into a summary; a receiver that is merely away loses nothing."""
    hook = world.hook()
    world.answer = PICKY
    world.promoted("bad", "good")
    for number in range(REFUSALS + 1):
        world.passed = number * REFUSED_FOR / REFUSALS + 1
        hook._turn()
    assert [one["counts"] for one in hook._summaries] == [{"promoted": 1}]
    world.answer, world.passed = YES, world.passed + 400
    hook._turn()
    assert [kind for kind, _ in world.told()] == ["summary", "promoted"]


def test_a_receiver_that_is_gone_is_left_alone(world: World) -> None:
    """410 ends it, with an incident, over restarts; `enable` sends what happened since."""
    hook = world.hook()
    world.promoted("v1")
    world.answer = GONE
    hook._turn()
    world.answer = YES
    again = world.hook()
    again._turn()
    assert (again.status()["state"], world.taken) == ("gone", [])
    assert incidents.code_of(world.store.audit_entries(limit=1)[0].entry) == "webhook-gone"
    again.enable()
    again._turn()
    assert world.told() == [("promoted", "v1"), ("incident", "webhook-gone")]


def test_another_address_is_another_receiver(world: World) -> None:
    """One that was gone is sent to again where the configuration names another place."""
    hook = world.hook()
    world.promoted("v1")
    world.answer = GONE
    hook._turn()
    world.answer = YES
    hook.change(world.spec(), "elsewhere")
    hook._turn()
    assert ("promoted", "v1") in world.told()


# --- reload -------------------------------------------------------------------------------


def test_a_reload_loses_nothing(world: World) -> None:
    """Another key, `on` or address: what waits is sent by the new lines."""
    hook = world.hook("promoted", "revoked")
    world.answer = NO
    world.promoted("v1")
    world.store.append_audit(entry("revoke", agent="a"))
    hook._turn()
    hook.change(world.spec("promoted"), "elsewhere")
    world.answer = YES
    hook._turn()
    assert world.told() == [("promoted", "v1")]


def test_a_hook_that_was_taken_out_writes_nothing_more(world: World) -> None:
    """Its rows are gone, and a look that is under way brings none back."""
    hook = world.hook()
    world.promoted("v1")
    hook._read()
    hook.leave()
    hook._deliver_next()
    hook._flush()
    assert HookRecords(world.store.database).names() == []


def test_the_notifier_goes_by_the_files(world: World) -> None:
    """Added, changed and removed hooks; a hook of an earlier run that is gone is forgotten too."""
    HookRecords(world.store.database).begin("old", "r")
    notifier = Notifier(world.store, now=world.now, instruments=world, send=world.send)
    try:
        notifier.apply([world.spec("promoted")])
        assert HookRecords(world.store.database).names() == ["pager"]
        assert [one["name"] for one in notifier.status()] == ["pager"]
        (tested,) = notifier.test("pager")
        assert (tested["ok"], world.taken[0]["type"]) == (True, "ping")
        notifier.apply([])
        assert HookRecords(world.store.database).names() == []
    finally:
        notifier.stop()


def test_a_store_that_is_away_stops_no_hook(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is committed before and after is told when it is back, and nothing twice under two ids."""
    hook = world.hook()
    world.promoted("v1")
    records = hook._around.records
    keep = records.keep

    def away(*_args: object, **_more: object) -> None:
        raise StoreUnavailable

    monkeypatch.setattr(records, "keep", away)
    with pytest.raises(StoreUnavailable):
        hook._turn()
    monkeypatch.setattr(records, "keep", keep)
    world.promoted("v2")
    hook._turn()
    world.hook()._turn()
    assert world.told() == [("promoted", "v1"), ("promoted", "v2")]


# --- configuration ------------------------------------------------------------------------


def test_what_the_files_may_not_say(tmp_path: Path) -> None:
    """Wrong hooks are refused with what is expected, and no value is shown."""
    kt = Keyturn(tmp_path)
    good = {"webhook": "https://hooks.example/T0KEN", "key_file": "/run/hook"}
    wrong: list[tuple[Any, str]] = [
        ([good | {"webhook": "http://hooks.example/T0KEN"}], "http on loopback only"),
        ([good | {"webhook": "https://me:T0KEN@hooks.example/"}], "without login"),
        ([good | {"on": ["laggard"]}], "laggard is not available yet"),
        ([good | {"on": []}], "expected a list of promoted"),
        ([good | {"key": "T0KEN"}], "unknown key"),
        ([good, dict(good)], "a name of its own"),
        ([{"webhook": "https://x/"}], "required"),
        ([good] * 17, "16 at most"),
    ]
    for lines, expected in wrong:
        kt.content["notify"] = [dict(hook) for hook in lines]
        kt.write()
        with pytest.raises(ConfigError, match=re.escape(expected)) as caught:
            config.load(kt.config, environ={})
        assert "T0KEN" not in str(caught.value)
