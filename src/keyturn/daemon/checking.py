"""The files as `keyturn check` judges them: everything that is wrong at once, and as whom."""

from __future__ import annotations

import os
import pwd
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from keyturn import config, wiring
from keyturn.config import BadFiles, Problem, Settings
from keyturn.daemon.cron import Crontab
from keyturn.daemon.offline import become_owner
from keyturn.errors import ConfigError, KeyturnError


def settings_of(path: Path, *, in_checkout: bool = False) -> Settings:
    """Return the settings. Raises BadFiles with all problems, those that need adapters too."""
    settings, problems = config.load_all(
        path,
        environ=os.environ,
        cron=Crontab(),
        now=wiring.SystemClock().now(),
        in_checkout=in_checkout,
    )
    try:
        wiring.check_settings(_sound(settings), cron=Crontab())
    except BadFiles as error:
        problems += error.problems
    config.refuse(_in_order(problems))
    return settings


def _sound(settings: Settings) -> Settings:
    """Leave out what refers to something that is wrong itself, or is not there."""
    agents = {}
    for name, agent in settings.agents.items():
        kept = [
            (target, where)
            for target, where in zip(agent.targets, agent.at, strict=True)
            if target.to in settings.connections
        ]
        if agent.policy in settings.policies:
            targets, at = tuple(t for t, _ in kept), tuple(where for _, where in kept)
            agents[name] = replace(agent, targets=targets, at=at)
    return replace(settings, agents=agents)


def _in_order(problems: list[Problem]) -> list[Problem]:
    def place(problem: Problem) -> tuple[str, int]:
        file, _, line = problem.where.rpartition(":")
        return file, int(line) if line.isdecimal() else 0

    return sorted(problems, key=place)


def become_daemon(path: Path) -> str:
    """As root: look with the eyes of the daemon's user. Returns its name, "" where nothing changed.

    That is who owns the store, or, where there is none yet, who owns the main file. A file of that
    user's is a good one for the daemon, and one that only root may read is not.
    """
    if os.geteuid() != 0:
        return ""
    owned = path
    with suppress(KeyturnError, OSError):
        folder = config.load_store(path, environ=os.environ).store.folder
        owned = folder if folder.exists() else path
    with suppress(KeyturnError, OSError):
        become_owner(owned)
    me = os.geteuid()
    if me == 0:
        return ""
    try:
        return pwd.getpwuid(me).pw_name
    except KeyError:
        return f"#{me}"


def refuse_wrong(text: str) -> None:
    """Refuse a text that would be no good main file, wherever it lay. Raises BadFiles."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "keyturn.yaml")
        path.write_text(text, encoding="utf-8")
        try:
            settings_of(path, in_checkout=True)
        except BadFiles as error:
            lines = [f"{one.key}: {one.text}" for one in error.problems]
            raise ConfigError("\n".join(lines), hint="correct the options") from None
