"""Anything may happen in any order: the invariants hold at every instant and it ends at home.

A failure prints the steps to repeat it. The long profile runs more and longer stories.
"""

from __future__ import annotations

import random
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from keyturn.core import lifecycle, repair
from keyturn.core.model import AgentState, VersionState
from keyturn.errors import (
    Denied,
    DestinationUnavailable,
    KeyturnError,
    StaleRevision,
    Throttled,
)
from support.bench import CACHE, SETTLE, SHAPES, SWEEP, Bench

STORIES: list[tuple[str, ...]] = [
    *((shape,) for shape in SHAPES),
    *((one, two) for one in SHAPES for two in SHAPES),
]
NAMES = st.sampled_from(["d0", "d1"])
FAULTS = st.lists(st.sampled_from(["", "before", "after", "unsent", "late"]), max_size=4)
SPANS = st.sampled_from(
    [timedelta(seconds=3), timedelta(seconds=40), SETTLE, SWEEP, timedelta(hours=1), 30 * SWEEP]
)
ERRORS = st.sampled_from([DestinationUnavailable, Throttled, Denied])
REFUSED = frozenset({VersionState.RETIRED, VersionState.REVOKED})


class RotationMachine(RuleBasedStateMachine):
    """One agent, its consumers with a cache, an administrator, and a world that fails."""

    @initialize(shapes=st.sampled_from(STORIES))
    def begin(self, shapes: tuple[str, ...]) -> None:
        """Start with nothing: the first version is part of the story."""
        self.bench = Bench(*shapes)
        self.cached: list[tuple[str, str, str, Any]] = []

    # --- time and runs ----------------------------------------------------------------------

    @rule(span=SPANS)
    def time_passes(self, span: timedelta) -> None:
        """Let time pass; a call that hangs ends before it can no longer be told from a pause."""
        now = self.bench.clock.now()
        for played in self.bench.played.values():
            if any(now + span > at + SETTLE for _, _, at in played.lates):
                played.land()
        self.bench.pass_time(span)

    @rule()
    def it_runs(self) -> None:
        """Run as the daemon does."""
        self.bench.crashing_run()

    @rule(number=st.integers(0, 40))
    def it_crashes(self, number: int) -> None:
        """Crash after so many points of the next run."""
        end = len(self.bench.points) + number
        self.bench.crash_at = lambda at, _name: at >= end
        self.bench.crashing_run()
        self.bench.crash_at = lambda _at, _name: False

    @rule()
    def it_restarts(self) -> None:
        """Start a new process between two runs."""
        self.bench.crashes += 1
        self.bench.restart()

    # --- destinations -----------------------------------------------------------------------

    @rule(name=NAMES, faults=FAULTS)
    def writes_fail(self, name: str, faults: list[str]) -> None:
        """Let the next writes fail in some way."""
        if name in self.bench.played:
            self.bench.played[name].faults = faults

    @rule(name=NAMES, error=ERRORS)
    def a_read_fails(self, name: str, error: type[KeyturnError]) -> None:
        """Let the next read fail."""
        if name in self.bench.played:
            self.bench.played[name].read_faults = [error()]

    @rule(name=NAMES, lands=st.booleans())
    def a_late_call_ends(self, name: str, lands: bool) -> None:
        """End the calls that hang, with or without their effect."""
        if name in self.bench.played:
            played = self.bench.played[name]
            _ = played.land() if lands else played.fall()

    @rule(name=NAMES)
    def reads_are_stale(self, name: str) -> None:
        """Switch whether the reads of a destination are fresh."""
        if name in self.bench.played:
            self.bench.played[name].stale = not self.bench.played[name].stale

    @rule(name=NAMES)
    def an_entry_is_deleted(self, name: str) -> None:
        """Delete an entry from outside."""
        if name in self.bench.played:
            self.bench.played[name].inner.raw_delete(self.bench.targets[name])

    @rule(name=NAMES, data=st.data())
    def an_old_value_comes_back(self, name: str, data: st.DataObject) -> None:
        """Write a value from outside that was shown once: a restore, or a tool that holds it."""
        if name in self.bench.played and self.bench.texts:
            known = sorted(self.bench.texts)
            version = data.draw(st.sampled_from(known), label="version")
            login, text = self.bench.texts[version]
            self.bench.edit(name, id=login, secret=text, version=version)

    @rule(name=NAMES)
    def a_stranger_edits(self, name: str) -> None:
        """Write something that never was ours; a person takes it away before the end."""
        if name in self.bench.played:
            self.bench.edit(name, id="bot", secret="hand-made", version="x")

    @rule(names=st.sampled_from([("d0",), ("d1",), ("d0", "d1")]))
    @precondition(lambda self: len(self.bench.played) == 2)
    def destinations_change(self, names: tuple[str, ...]) -> None:
        """Drop a destination or take it back, as a reload does; what is dropped is still read."""
        self.bench.retarget(*names)

    # --- people -----------------------------------------------------------------------------

    @rule()
    def somebody_asks(self) -> None:
        """Ask for a rotation."""
        with suppress(KeyturnError):
            self.bench.ask()

    @rule(reissue=st.booleans())
    def the_agent_is_revoked(self, reissue: bool) -> None:
        """Revoke everything: from now on no version of before is accepted (I3)."""
        before = [v.id for v in self.bench.case.accepted]
        self.bench.amend(lifecycle.revoke_agent, reissue=reissue)
        self._refused(before)

    @rule(name=NAMES)
    @precondition(lambda self: len(self.bench.played) == 2)
    def a_secret_leaked_somewhere(self, name: str) -> None:
        """Revoke everything; the successor goes everywhere but there."""
        before = [v.id for v in self.bench.case.accepted]
        self.bench.amend(lifecycle.revoke_agent, reissue=True, withhold=(name,))
        self._refused(before)

    @rule(reissue=st.booleans(), data=st.data())
    @precondition(lambda self: self.bench.case.accepted)
    def a_version_is_revoked(self, reissue: bool, data: st.DataObject) -> None:
        """Revoke one version (I3)."""
        version = data.draw(st.sampled_from([v.id for v in self.bench.case.accepted]))
        self.bench.amend(lifecycle.revoke_version, version, reissue=reissue)
        self._refused([version])

    @rule(reissue=st.booleans(), number=st.integers(0, 30))
    def a_revoke_meets_a_run(self, reissue: bool, number: int) -> None:
        """Revoke the agent in the middle of a run."""
        end = len(self.bench.points) + number
        named: list[str] = []

        def revoke(_name: str) -> None:
            if len(self.bench.points) >= end and not named:
                named.extend(["", *(v.id for v in self.bench.case.accepted)])
                self.bench.amend(lifecycle.revoke_agent, reissue=reissue)

        self.bench.on_point = revoke
        self.bench.crashing_run()
        self.bench.on_point = lambda _name: None
        self._refused(named[1:])

    @rule(back=st.booleans())
    def it_is_suspended_or_resumed(self, back: bool) -> None:
        """Suspend or resume."""
        self.bench.amend(lifecycle.resume if back else lifecycle.suspend)

    @rule(abandon=st.booleans())
    def somebody_helps_out(self, abandon: bool) -> None:
        """Retry or abandon, where that is allowed."""
        with suppress(KeyturnError):
            self.bench.amend(lifecycle.abandon if abandon else lifecycle.retry)

    # --- consumers --------------------------------------------------------------------------

    @rule(name=NAMES)
    def a_consumer_reads(self, name: str) -> None:
        """Read a secret and keep it in a cache."""
        if name in self.bench.played:
            values = self.bench.played[name].inner.raw_get(self.bench.targets[name])
            edited = values == self.bench.edited.get(name)  # nothing is promised of that
            if values is not None and "secret" in values and not edited:  # else it was withdrawn
                now = self.bench.clock.now()
                self.cached.append((values["id"], values["secret"], values["version"], now))

    @rule()
    def consumers_call(self) -> None:
        """Whatever is cached no longer than promised is accepted, unless somebody cut it off."""
        now = self.bench.clock.now()
        self.cached = [known for known in self.cached if now - known[3] < CACHE]
        for login, text, version_id, _ in self.cached:
            cut = self.bench.version(version_id).state is VersionState.REVOKED
            if not cut and self.bench.case.agent.state is AgentState.ENABLED:
                assert self.bench.accepts(login, text)

    # --- what must hold -----------------------------------------------------------------------

    @invariant()
    def nothing_accepted_is_refused_and_nothing_refused_is_accepted(self) -> None:
        """I1, I3 and I4, and never more accepted versions than the limit."""
        if not hasattr(self, "bench"):
            return
        bench = self.bench
        bench.look()
        assert len(bench.case.accepted) <= 4
        self._refused([v.id for v in bench.versions() if v.state in REFUSED])

    def _refused(self, version_ids: list[str]) -> None:
        for version_id in version_ids:
            if version_id in self.bench.texts:
                assert not self.bench.accepts(*self.bench.texts[version_id])

    def teardown(self) -> None:
        """When the world is whole again, everything ends at home by itself (I5)."""
        if not hasattr(self, "bench"):
            return
        try:
            self._goes_home()
        finally:
            self.bench.close()

    def _goes_home(self) -> None:
        bench = self.bench
        for played in bench.played.values():
            played.faults, played.read_faults, played.stale = [], [], False
            played.land()
        for name, values in bench.edited.items():
            # What still stands there may be good by now, so that nothing replaces it: I1 holds again.
            if bench.played[name].inner.raw_get(bench.targets[name]) == values:
                bench.played[name].inner.raw_delete(bench.targets[name])
        bench.edited.clear()
        bench.retarget(*bench.played)
        bench.amend(lifecycle.resume)
        for name in bench.case.credential.withheld:
            bench.amend(lambda case, now, name=name: lifecycle.readmit(case, name, now=now))
        with suppress(KeyturnError):
            bench.amend(lifecycle.retry)
        bench.amend(repair.peace)
        with suppress(StaleRevision):
            bench.crashing_run()
        bench.go(runs=80)
        bench.assert_home()
        assert bench.store.verify_audit() == []


COMMON: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "print_blob": True,
    "database": None,
}


def _play(seed: int, **options: Any) -> None:
    print(f"seed {seed}")
    machine = RotationMachine
    machine._hypothesis_internal_use_seed = seed  # type: ignore[attr-defined]
    run_state_machine_as_test(machine, settings=settings(**COMMON, **options))


def test_any_story_keeps_the_invariants() -> None:
    """Sixty seconds of stories, the same ones each time."""
    # Without shrinking: a failure is told within the minute, the long profile makes it small.
    _play(20260302, max_examples=120, stateful_step_count=30, phases=[Phase.generate])


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_many_long_stories_keep_the_invariants() -> None:
    """Longer stories with a seed of their own each time; the seed is printed."""
    _play(random.SystemRandom().randrange(1 << 32), max_examples=1500, stateful_step_count=60)
