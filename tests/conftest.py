"""The canary over the whole suite: no run ends well whose output holds a piece of a secret."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support import canary_watch, postgres

_STATE = pytest.StashKey[tuple[canary_watch.Watch, canary_watch.Hooks, Path]]()
_SAID = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Begin before the first test module is imported: some mint at import."""
    if not config.option.collectonly:
        config.stash[_STATE] = canary_watch.start()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep what a test printed."""
    if _WATCH:
        _WATCH[0].keep(f"printed by {report.nodeid}", report.capstdout + report.capstderr)


_WATCH: list[canary_watch.Watch] = []


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Give the hooks above, which know no session, what they need."""
    state = session.config.stash.get(_STATE, None)
    _WATCH[:] = [state[0]] if state else []


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Search everything that the session has left."""
    state = session.config.stash.get(_STATE, None)
    if state is None:
        return
    watch, hooks, notes = state
    hooks.undo()
    watch.take_notes(notes)
    shutil.rmtree(notes)
    watch.search_kept()
    watch.search_postgres(postgres.left_databases())
    factory = session.config._tmp_path_factory  # type: ignore[attr-defined]
    if factory._basetemp is not None:
        watch.search_tree(factory.getbasetemp())
    said = (
        f"canary: {watch.minted} secrets, {watch.searched / 1e6:.0f} MB searched"
        f" in {watch.seconds:.1f} s, {len(watch.hits)} hits"
    )
    session.config.stash[_SAID] = "\n".join(
        [said, *(f"LEAK in {place}: {form}" for place, form in sorted(watch.hits))]
    )
    if watch.hits:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say what was found, by place and form."""
    terminalreporter.write_line(config.stash.get(_SAID, "canary: nothing was watched"))
