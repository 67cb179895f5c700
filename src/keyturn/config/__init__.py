"""Files and environment to frozen settings: `load`, and the checks that need adapters.

    1  read         the main file and the includes: permissions, YAML, lines     (file)
    2  shape        each section by its model, each connection by its adapter's  (shape, models)
    3  connect      policies along `extends`, agents to policies and connections
    4  check        what cannot work: cadence, grace, age; later, with adapters: quotas and owners

All problems of all steps are reported together, a line each, and none quotes a value.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from keyturn.config.file import BadFiles, Problem, refuse
from keyturn.config.loading import Adapter, Loading, check_policy
from keyturn.config.models import ID_FORM, is_id
from keyturn.config.settings import AgentDefinition, Connection, Settings
from keyturn.core.model import Agent, Target, Traits
from keyturn.core.policy import CronCalculator
from keyturn.errors import ConfigError

READ_TRIES = 8
__all__ = [
    "ID_FORM",
    "AgentDefinition",
    "BadFiles",
    "Connection",
    "Problem",
    "Settings",
    "check_owners",
    "check_policies",
    "is_id",
    "load",
    "load_all",
    "load_store",
    "load_verifier",
    "refuse",
    "store_alone",
]


def load(
    path: Path,
    *,
    environ: Mapping[str, str],
    cron: CronCalculator | None = None,
    now: datetime | None = None,
    adapter: Callable[[str], Adapter] | None = None,
) -> Settings:
    """Return the settings, or raise one ConfigError with all problems, a line each.

    Offline, and needs no credentials. Without `cron` crontab lines are checked by their form only;
    without `now` inline revocations may lie in the future; `adapter` finds an adapter's class by its
    type (default: the registry of installed ones).
    """
    settings, problems = load_all(path, environ=environ, cron=cron, now=now, adapter=adapter)
    refuse(problems)
    return settings


def load_all(
    path: Path,
    *,
    environ: Mapping[str, str],
    cron: CronCalculator | None = None,
    now: datetime | None = None,
    adapter: Callable[[str], Adapter] | None = None,
    in_checkout: bool = False,
) -> tuple[Settings, list[Problem]]:
    """Return the settings as far as they can be understood, and all that is wrong with them.

    They are those of one generation of the files: where one is replaced meanwhile, all are read
    again. `in_checkout`: nothing runs from these files, so it does not matter who may write them,
    and an include that matches nothing is a problem. Raises ConfigError where there is nothing to be
    understood.
    """
    for _ in range(READ_TRIES):
        loading = Loading(
            path, cron=cron, now=now, adapter=adapter or _registered, in_checkout=in_checkout
        )
        try:
            settings = loading.run(environ)
        except ConfigError:
            if loading.is_steady:
                raise
            continue
        if loading.is_steady:
            return settings, loading.problems
    raise ConfigError(
        f"{path}: the files are being written to, again and again",
        hint="repeat this when they are whole",
    )


def load_store(path: Path, *, environ: Mapping[str, str]) -> Settings:
    """Return settings of which only the store's place can be relied on.

    For commands on the bare store: at 3 a.m. a wrong line elsewhere in the file must not stand between
    an administrator and a revoke. Raises ConfigError where the store's own section is wrong.
    """
    loading = Loading(path, cron=None, now=None, adapter=_registered)
    settings = loading.run(environ)
    refuse([problem for problem in loading.problems if problem.key.startswith("store")])
    return settings


def load_verifier(path: Path, *, environ: Mapping[str, str]) -> Settings:
    """Return settings of which only store, log and verifier can be relied on; no adapter is loaded.

    A wrong line about agents must not keep a verifier from its start, and it need not know where
    secrets go. Raises ConfigError.
    """
    sections = ("version", "store", "log", "verifier")
    loading = Loading(path, cron=None, now=None, adapter=_registered, only=sections)
    settings = loading.run(environ)
    refuse(loading.problems)
    return settings


def store_alone(path: Path, *, environ: Mapping[str, str]) -> Settings:
    """Return settings of which only the store's place can be relied on, where the file is no YAML.

    It comes from the environment, from what looks like the store's section, or is the default one.
    Raises ConfigError.
    """
    with contextlib.suppress(OSError):
        text = _COMMENT.sub("", path.read_text(errors="replace"))
        found = {f"KEYTURN_STORE__{m[1].upper()}": m[2] for m in _STORE_LINE.finditer(text)}
        environ = found | dict(environ)
    loading = Loading(path, cron=None, now=None, adapter=_registered)
    settings = loading.run(environ, without_file=True)
    refuse([problem for problem in loading.problems if problem.key.startswith("store")])
    return settings


_COMMENT = re.compile(r"^\s*#.*$", re.MULTILINE)
# No other section has a key that begins like one of these.
_STORE_LINE = re.compile(
    r"""\b(url|state_dir)["']?\s*:\s*["']?((?:sqlite:/|postgresql:/|/)[^\s"',}]+)"""
)


def check_owners(settings: Settings, identity: Callable[[Target], str]) -> None:
    """Refuse two owners of one remote entry, under whatever spelling.

    `identity` gives the canonical remote key (the adapter's, offline). Raises ConfigError.
    """
    problems: list[Problem] = []
    owners: dict[str, str] = {}
    for agent in settings.agents.values():
        for number, (target, where) in enumerate(zip(agent.targets, agent.at, strict=True)):
            key = f"agents.{agent.name}.destinations[{number}]"
            try:
                entry = identity(target)
            except ConfigError as error:
                problems.append(
                    Problem(where=where, key=f"{key}.path", text=str(error), code="value")
                )
                continue
            first = owners.setdefault(entry, f"{key} ({where})")
            if not first.startswith(f"{key} "):
                text = f"expected an entry of its own: {first} is the same one"
                problems.append(
                    Problem(where=where, key=f"{key}.path", text=text, code="shared-entry")
                )
    refuse(problems)


def check_policies(
    settings: Settings,
    traits: Callable[[str], Traits],
    *,
    cron: CronCalculator | None = None,
    agents: Iterable[Agent] = (),
) -> None:
    """Refuse policies that their agents' destinations cannot carry.

    `traits` gives those of a connection by its name; `agents` are those of the command line. Raises
    ConfigError.
    """
    used: dict[str, set[str]] = defaultdict(set)
    others: dict[str, list[str]] = defaultdict(list)
    for agent in settings.agents.values():
        used[agent.policy].update(target.to for target in agent.targets)
    for one in agents:
        name = one.policy if one.policy in settings.policies else "default"
        used[name].update(target.to for target in one.targets)
        others[name].append(one.name)
    problems: list[Problem] = []
    for name, connections in used.items():
        policy = settings.policies[name]
        found = {connection: traits(connection) for connection in connections}
        where = settings.policy_places[name]
        found_problems = check_policy(policy, where, found, settings.lease, cron)
        by = f" (used by {', '.join(others[name])} of the command line)" if others[name] else ""
        problems += [replace(one, text=one.text + by) for one in found_problems]
    refuse(problems)


def _registered(kind: str) -> Adapter:
    from keyturn.destinations import registry  # an SDK loads only where a file names its type

    return registry.load(kind)
