"""The daemon's own view of sagas: which steps are ends, which are calls, and our own logins."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from keyturn.core.model import Agent, Case, Credential, VersionState
from keyturn.daemon.metrics import OUTCOMES, Metrics
from keyturn.daemon.watching import Watching
from keyturn.errors import StoreUnavailable
from keyturn.ports import Claim
from keyturn.wiring import Parts
from keyturn.world import Carried, Parked
from support.stores import NOW, rotation, target, version

S = VersionState


def case(state: VersionState = S.PENDING, *, exposed: bool = False) -> Case:
    """Return a case whose rotation has a version of its own."""
    own = replace(version("cred", 1, state), exposed=exposed)
    return Case(
        agent=Agent(uid="a", name="bot", login="bot", targets=(target(),)),
        credential=Credential(uid="cred", agent_uid="a"),
        versions=(own,),
        rotation=rotation("cred", version_id=own.id),
    )


@pytest.fixture
def watching() -> Watching:
    """Watch without any store."""
    return Watching(Metrics(), cast("Parts", SimpleNamespace(destinations={})))


def counted(watching: Watching, metric: str, **labels: str) -> float | None:
    """Return one sample."""
    return watching.metrics.registry.get_sample_value(f"keyturn_{metric}", labels)


ENDS: list[tuple[str, Case, str, str]] = [
    ("promote", case(), "", "promoted"),
    ("promote", case(), "stale-revision", ""),
    ("stall", case(), "", "stalled"),
    ("dropattempt", case(exposed=True), "", "kept"),
    ("dropattempt", case(), "", "retired"),
    ("dropattempt", case(S.REVOKED), "", ""),
    ("activate", case(), "", ""),
]


@pytest.mark.parametrize(("step", "of", "code", "outcome"), ENDS)
def test_each_end_has_one_outcome(
    watching: Watching, step: str, of: Case, code: str, outcome: str
) -> None:
    """A rotation or an attempt is counted once, where it ended; what is not there is zero."""
    watching.step(step=step, case=of, where="", seconds=0.1, code=code, detail="")
    found = {name: counted(watching, "rotations_total", outcome=name) for name in OUTCOMES}
    assert found == {name: float(name == outcome) for name in OUTCOMES}


def test_only_calls_tell_whether_a_destination_is_up(watching: Watching) -> None:
    """An answer, even a refusal, is a sign of life; silence is none; a decision is no call."""
    for step, code, up in [
        ("observe", "destination-unavailable", 0.0),
        ("leave", "", 0.0),
        ("activate", "denied", 1.0),
        ("observe", "throttled", 0.0),
        ("observe", "", 1.0),
    ]:
        watching.step(step=step, case=case(), where="v:p", seconds=0.1, code=code, detail="")
        assert counted(watching, "destination_up", destination="v") == up, step
    labels = {"operation": "activate", "result": "denied"}
    assert counted(watching, "destination_requests_total", **labels) == 1.0
    assert counted(watching, "destination_requests_total", operation="leave", result="ok") is None


def test_a_stall_is_logged_for_a_person(
    watching: Watching, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why and where a rotation stops is in the log, as an error; that it waits, as a warning."""
    said: list[tuple[str, dict[str, Any]]] = []

    class Log:
        def __getattr__(self, level: str) -> Any:
            return lambda event, **named: said.append((level, {"event": event, **named}))

    monkeypatch.setattr("keyturn.daemon.watching._log", Log())
    for step in ("stall", "wait"):
        watching.step(
            step=step, case=case(), where="v:p", seconds=0.1, code="", detail="denied: no read"
        )
    levels = [level for level, _ in said]
    assert levels == ["error", "warning"]
    assert said[0][1] == {
        "event": "rotation.stall",
        "agent": "bot",
        "where": "v:p",
        "code": "denied",
        "detail": "denied: no read",
    }


def test_a_revoke_lets_broken_off_runs_go_on(watching: Watching) -> None:
    """With the ballast's room the claim goes back, so the successor waits for no claim to run out."""
    released: list[Any] = []
    parts = cast("Any", watching)._parts
    parts.store = SimpleNamespace(
        release=lambda claim, wake_at: released.append((claim, wake_at)), now=lambda: NOW
    )
    parts.carried = Carried()
    claim = Claim(credential_uid="cred", holder="h", fence=1, incarnation=1, until=NOW)
    parts.carried.park("cred", Parked(code="store-full", since=NOW, claim=claim))

    for _ in range(2):
        watching.revocation(
            {"target": "agent:bot", "versions": [], "incomplete": False, "delay_seconds": 0.0},
            "command",
        )

    assert released == [(claim, NOW)]
    assert parts.carried.parked("cred").code == "store-full"


def test_what_is_no_connection_any_more_is_no_alert(watching: Watching) -> None:
    """A connection that a reload drops takes its samples along; nothing says for ever that it is down."""
    parts = cast("Any", watching)._parts
    parts.destinations = {"old": SimpleNamespace()}
    watching.step(
        step="observe",
        case=case(),
        where="old:p",
        seconds=0.1,
        code="destination-unavailable",
        detail="",
    )
    watching.metrics.own_credential_expiry.labels("old").set(1)
    watching._forget_dropped()
    assert counted(watching, "destination_up", destination="old") == 0
    assert counted(watching, "own_credential_expiry_timestamp_seconds", connection="old")

    parts.destinations = {"new": SimpleNamespace()}
    watching._forget_dropped()

    assert counted(watching, "destination_up", destination="old") is None
    assert counted(watching, "own_credential_expiry_timestamp_seconds", connection="old") is None


def test_revocations_of_other_processes_are_counted_once(watching: Watching) -> None:
    """From this daemon's start on, by triggers that there are."""
    found = {(7, 9): ["command", "made-up"], (9, 12): ["command"]}
    asked: list[tuple[int, int]] = []

    def others(*, after: int, upto: int) -> list[str]:
        asked.append((after, upto))
        return found[after, upto]

    cast("Any", watching)._parts.store = SimpleNamespace(revocations_of_others=others)
    for head in (7, 7, 9, 12, 12):
        watching._count_others(head)
    assert asked == [(7, 9), (9, 12)]
    assert counted(watching, "revocations_total", trigger="command") == 2
    assert counted(watching, "revocations_total", trigger="made-up") is None


def test_a_look_that_the_store_refused_is_no_look(watching: Watching) -> None:
    """The time of the last look stands still, and the daemon lives on."""
    watching.looked(NOW)
    watching.store_away(StoreUnavailable())
    assert counted(watching, "scheduler_last_tick_timestamp_seconds") == NOW.timestamp()
    assert counted(watching, "store_up") == 0
    assert watching._readiness.live
