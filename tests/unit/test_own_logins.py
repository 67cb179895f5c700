"""The daemon's own logins: what is decided, what is warned of and when, and files that are replaced."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from keyturn.core import own as life
from keyturn.core.own import Own, OwnPlan, OwnRun, OwnState, OwnStep, OwnVersion, decide
from keyturn.credential_file import read_credential, refuse_unwritable, replace_credential
from keyturn.daemon import own_logins
from keyturn.daemon.metrics import Metrics
from keyturn.daemon.own_logins import OwnLogins
from keyturn.errors import ConfigError, Denied
from keyturn.ports import OwnLogin
from keyturn.testing.fakes import START, FakeClock
from keyturn.wiring import Parts

DAY = timedelta(days=1)
PLAN = OwnPlan(every=7 * DAY, grace=DAY)
S = OwnState


def version(name: str, state: OwnState, **more: Any) -> OwnVersion:
    """Return a version that is called as its accessor is."""
    return OwnVersion(id=name, state=state, at=more.pop("at", START), accessor=name, **more)


def own(*versions: OwnVersion, **more: Any) -> Own:
    """Return what is known of a connection."""
    return Own(connection="bao", host="host", versions=versions, **more)


OLD = version("old", S.CURRENT, at=START - 8 * DAY)
GOOD = version("good", S.CURRENT)
PENDING = version("new", S.PENDING)
GONE = version("gone", S.PREVIOUS, deadline=START)
LEFT = version("left", S.PREVIOUS, deadline=START + DAY)
MADE = version("made", S.SURPLUS)
THREE = [version(f"made {n}", S.SURPLUS) for n in range(3)]
ASKED = OwnVersion(id="asked", state=S.MINTING, at=START)

DECISIONS: list[tuple[Own, OwnRun, OwnStep, str]] = [
    (own(), OwnRun(), OwnStep.LOOK, ""),
    (own(), OwnRun(shown="x"), OwnStep.ADOPT, ""),
    (own(GOOD, LEFT), OwnRun(shown="left"), OwnStep.ADOPT, ""),
    (own(GOOD), OwnRun(shown="good"), OwnStep.REST, ""),
    (own(OLD), OwnRun(shown="old"), OwnStep.MINT, ""),
    (own(OLD, ASKED), OwnRun(shown="old"), OwnStep.SEARCH, ""),
    (own(OLD, ASKED), OwnRun(shown="old", searched=True), OwnStep.MINT, ""),
    (own(OLD, MADE), OwnRun(shown="old"), OwnStep.DESTROY, "made"),
    (own(OLD, GONE), OwnRun(shown="old"), OwnStep.DESTROY, "gone"),
    (own(OLD, GONE, MADE), OwnRun(shown="old", barred=True), OwnStep.MINT, ""),
    (own(OLD, *THREE), OwnRun(shown="old", barred=True), OwnStep.REST, ""),
    (own(OLD, PENDING), OwnRun(shown="old"), OwnStep.DISCARD, "new"),
    (own(OLD, PENDING), OwnRun(shown="old", holding="new"), OwnStep.PROVE, "new"),
    (own(OLD, PENDING), OwnRun(shown="old", holding="new", proven="new"), OwnStep.PUBLISH, "new"),
    (own(OLD, PENDING), OwnRun(shown="new"), OwnStep.PROVE, "new"),
    (own(OLD, PENDING), OwnRun(shown="new", proven="new"), OwnStep.PROMOTE, "new"),
    (own(GOOD, GONE), OwnRun(shown="good"), OwnStep.DESTROY, "gone"),
    (own(GOOD, LEFT), OwnRun(shown="good"), OwnStep.REST, ""),
]


@pytest.mark.parametrize(("known", "seen", "step", "about"), DECISIONS)
def test_what_comes_next(known: Own, seen: OwnRun, step: OwnStep, about: str) -> None:
    """Each state of file, journal and memory has one next step."""
    action = decide(known, seen, PLAN, START)
    assert (action.step, action.version_id) == (step, about)


def test_what_the_file_shows_is_never_destroyed() -> None:
    """Whatever is known: the version that is destroyed is never the one that is shown."""
    for known, seen, _, _ in DECISIONS:
        action = decide(known, seen, PLAN, START + 30 * DAY)
        if action.step is OwnStep.DESTROY:
            assert known.version(action.version_id).accessor != seen.shown


def test_trouble_is_tried_again_later_and_later() -> None:
    """After five seconds at first, a quarter of an hour at last; since when stays."""
    known, pauses = own(GOOD), []
    for number in range(12):
        now = START + timedelta(hours=number)
        known = life.failed(known, "denied", "mint: no", now=now)
        assert known.problem is not None
        pauses.append(known.problem.until - now)
        assert known.problem.since == START
    assert pauses[0] == timedelta(seconds=5)
    assert pauses == sorted(pauses)
    assert pauses[-1] == timedelta(minutes=15)


# --- what is warned of ------------------------------------------------------------------------


class Scene:
    """The daemon's view of one connection, with a clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self.clock, self.metrics = FakeClock(), Metrics()
        self.login: OwnLogin | None = None
        options = SimpleNamespace(auth=SimpleNamespace(rotate=None))
        self.destination: Any = SimpleNamespace(
            own_login=self._login, own_authority=None, login_ends_in=None, options=options
        )
        store = SimpleNamespace(now=self.clock.now)
        parts = SimpleNamespace(
            destinations={"bao": self.destination},
            store_clock=self.clock,
            store=store,
            defining=threading.RLock(),
            settings=SimpleNamespace(connections={}),
        )
        self.parts = parts
        self.logins = OwnLogins(cast("Parts", parts), self.metrics, lambda: False)
        said = self.said

        class Log:
            def __getattr__(self, level: str) -> Any:
                return lambda event, **_named: said.append(event)

        monkeypatch.setattr(own_logins, "_log", Log())

    def _login(self) -> OwnLogin | None:
        if self.login is None:
            raise Denied("no")
        return self.login

    def tick(self, by: timedelta = timedelta(0)) -> None:
        self.clock.advance(by)
        self.logins.tick()
        self.logins.finish(10)

    def metric(self) -> float | None:
        name = "keyturn_own_credential_expiry_timestamp_seconds"
        return self.metrics.registry.get_sample_value(name, {"connection": "bao"})


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    """Give a connection whose login a test decides about."""
    return Scene(monkeypatch)


def ends(at: datetime) -> OwnLogin:
    """Return a login that ends."""
    return OwnLogin(method="token", ends_at=at)


def test_an_end_is_warned_of_once_a_day_in_its_last_week(scene: Scene) -> None:
    """Not before, and then neither each second nor only once."""
    scene.login = ends(START + 10 * DAY)
    scene.tick()
    assert scene.metric() == (START + 10 * DAY).timestamp()
    assert scene.said == []
    for _ in range(20):
        scene.tick(4 * timedelta(hours=1))
    assert scene.said == ["own-login.ends"]
    for _ in range(12):
        scene.tick(4 * timedelta(hours=1))
    assert scene.said == ["own-login.ends"] * 3
    assert scene.logins.rows()[0]["ends_soon"] is True


def test_what_has_no_end_is_no_metric(scene: Scene) -> None:
    """It is shown with its reason, and the gauge is not there."""
    scene.login = OwnLogin(method="kubernetes", note="the platform renews it")
    scene.tick()
    (row,) = scene.logins.rows()
    assert (row["expires_at"], row["note"]) == (None, "the platform renews it")
    assert scene.metric() is None


def test_what_we_replace_in_time_alarms_nobody(scene: Scene) -> None:
    """Until that fails: then its end is everybody's business."""
    scene.login = ends(START + 3 * DAY)
    known = own(replace(GOOD, ends_at=START + 3 * DAY))
    assert own_logins.cared_for(known, PLAN, START)
    assert not own_logins.cared_for(known, PLAN, START + 3 * DAY)
    assert not own_logins.cared_for(life.failed(known, "x", "", now=START), PLAN, START)
    assert not own_logins.cared_for(known, None, START)


def test_a_connection_that_a_reload_drops_is_forgotten(scene: Scene) -> None:
    """Its metric and its row go with it."""
    scene.login = ends(START + 10 * DAY)
    scene.tick()
    assert scene.metric() is not None
    scene.parts.destinations = {}
    assert scene.logins.rows() == []
    assert scene.metric() is None


def test_a_login_that_fails_is_said_and_tried_again(scene: Scene) -> None:
    """And then shown, without a restart."""
    scene.tick()
    assert scene.said == ["own-login.unknown"]
    assert scene.logins.rows() == []
    scene.login = OwnLogin(method="token")
    scene.tick(timedelta(minutes=6))
    assert [row["method"] for row in scene.logins.rows()] == ["token"]


# --- the file ---------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Give a credential file in a folder of its own."""
    folder = tmp_path / "login"
    folder.mkdir(mode=0o700)
    path = folder / "secret-id"
    path.touch(mode=0o600)
    path.write_text("first\n")
    return path


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o440, 0o640])
def test_a_file_is_replaced_as_it_was(file: Path, mode: int) -> None:
    """At one stroke, with its mode, and whoever has it open still has the old one."""
    file.chmod(mode)
    with file.open() as old:
        replace_credential(file, "second")
        assert old.read() == "first\n"
    assert read_credential(file) == "second\n"
    assert file.stat().st_mode & 0o777 == mode
    assert [one.name for one in file.parent.iterdir()] == ["secret-id"]


def test_what_a_crash_has_left_is_replaced(file: Path) -> None:
    """A temporary of a process that ended is not followed, and not read by anybody."""
    other = file.parent / "other"
    other.write_text("untouched")
    (file.parent / ".secret-id.keyturn-new").symlink_to(other)
    replace_credential(file, "second")
    assert other.read_text() == "untouched"
    assert read_credential(file) == "second\n"


def test_a_full_disk_leaves_it_as_it_was(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither half of a secret id, nor a temporary."""

    def full(_number: int) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        replace_credential(file, "second")
    assert file.read_text() == "first\n"
    assert [one.name for one in file.parent.iterdir()] == ["secret-id"]


@pytest.mark.parametrize(
    "path", ["/run/credentials/keyturn.service/secret-id", "/run/secrets/id", "/proc/keyturn/id"]
)
def test_what_cannot_be_replaced_is_refused_with_what_to_do(path: str) -> None:
    """Handed over by systemd or a container, or in a folder that is read-only."""
    with pytest.raises(ConfigError) as caught:
        refuse_unwritable(Path(path))
    assert "StateDirectory=" in (caught.value.hint or "")
