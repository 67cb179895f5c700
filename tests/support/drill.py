"""Random histories of a whole Keyturn in this process, with real files: what a restore is drilled on.

`Drill` does what people and the daemon do, ends like a killed process wherever it is told to, and
keeps every secret that an agent could ever have read.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from keyturn import rotation, wiring
from keyturn.core.model import AgentState, Case, Target
from keyturn.daemon.cron import Crontab
from keyturn.daemon.recovery import Recovery
from keyturn.daemon.service import load
from keyturn.errors import KeyturnError
from keyturn.leaks import Caller, Leak
from keyturn.storage import restoring
from keyturn.storage.membership import Membership
from keyturn.verifier.authority import BuiltinAuthority
from keyturn.verifier.decision import Verifier
from keyturn.verifier.hashing import CHEAP_FOR_TESTS, Hashing
from support.running import QUIET, accepts, file_at

CALLER = Caller(name="drill")
HASHING = Hashing(cost=CHEAP_FOR_TESTS)
AUTHORITY = BuiltinAuthority(hashing=HASHING)
OF_FILES = ("one", "two")


class Killed(BaseException):
    """The process ends here."""


@dataclass
class _Watcher:
    """Ends the process after so many steps; told of none it never does."""

    left: int = 1 << 30

    def step(self, *, step: str, case: Case, where: str, **_more: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed


@dataclass
class Drill:
    """One installation, one history."""

    folder: Path
    seed: int
    url: str = ""
    held: dict[str, dict[str, str]] = field(default_factory=dict)  # by version
    said: list[str] = field(default_factory=list)  # the history, for whoever reads a failure
    numbers: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.url = self.url or f"sqlite:///{self.folder / 'state' / 'keyturn.db'}"
        self.config = self.folder / "keyturn.yaml"
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.write()
        self.parts = self.open()

    def write(self) -> None:
        """Write the configuration."""
        content = {
            "version": 1,
            "store": {"url": self.url, "state_dir": str(self.folder / "state")},
            "connections": {"files": file_at(self.folder / "agents")},
            "policies": {"default": {**QUIET, "every": "4h", "grace": "1h"}},
            "agents": {
                name: {"destinations": [{"to": "files", "path": name}]} for name in OF_FILES
            },
        }
        self.config.touch(mode=0o600)
        self.config.write_text(yaml.safe_dump(content))

    def open(self) -> wiring.Parts:
        """Start as the daemon does, without its threads."""
        settings = load(self.config)
        parts = wiring.build(settings, cron=Crontab(), create=True)
        parts.authority = AUTHORITY
        parts.administration = replace(parts.administration, authority=AUTHORITY)
        self.membership = Membership(parts.store)
        until = time.monotonic() + 5
        while not self.membership.try_lead(ttl=timedelta(seconds=1)):
            assert time.monotonic() < until  # on PostgreSQL a dump holds a lease
            time.sleep(0.05)
        parts.destinations = wiring.connect(
            settings, store_id=parts.store.store_id, clock=parts.clock
        )
        self.recovery = Recovery(parts=parts, actor="drill")
        if self.recovery.at_start():
            held = self.recovery.everybody
            assert self.recovery.let_go_later() is (held is None or held.reason != restoring.HELD)
        parts.administration.apply_spool(CALLER)
        parts.reconcile(actor="drill")
        return parts

    def close(self) -> None:
        """End in good order."""
        self.membership.leave()
        self.parts.close()

    def kill(self) -> None:
        """End at once: what is not on disk is gone."""
        if self.membership._lock is not None:
            self.membership._lock.drop()
        else:
            self.membership.leave()  # its lease has run out
        self.parts.close()

    # --- what happens -----------------------------------------------------------------------

    def run(self, name: str, *, steps: int = 1 << 30) -> None:
        """Let the saga of an agent go as far as it gets; after so many steps the process dies."""
        case = self.parts.store.case_of(name)
        world = self.parts.world(_Watcher(steps), lambda: False)
        try:
            rotation.run(world, case.credential.uid, holder=f"{self.parts.store.writer}/drill")
        finally:
            self.read(case.agent.targets)

    def read(self, targets: Sequence[Target]) -> None:
        """Keep what the agent reads now."""
        for target in targets:
            found = self.parts.destinations[target.to].observe(target)
            if found.secret is not None and found.login and found.version_id:
                self.held[found.version_id] = {"id": found.login, "secret": found.secret.reveal()}

    def happen(self, count: int) -> None:
        """Let so many things happen."""
        for _ in range(count):
            names = [agent.name for agent in self.parts.store.agents()]
            name = self.random.choice(names)
            verb = self.random.choice(VERBS)
            self.said.append(f"{verb.__name__} {name}")
            try:
                verb(self, name)
            except KeyturnError as error:
                self.said.append(f"  {error.code}")
            except Killed:
                self.said.append("  killed")
                self.kill()
                self.parts = self.open()

    def verdicts(self) -> dict[str, bool | None]:
        """Ask about every secret that was ever held."""
        verifier = Verifier.open(
            self.url,
            state_dir=self.folder / "state",
            clock=wiring.SystemClock(),
            hashing=HASHING,
        )
        try:
            return {version: accepts(verifier, one) for version, one in self.held.items()}
        finally:
            verifier.close()

    def quiet(self) -> list[str]:
        """Let every saga go on to its end; returns the agents whose secret is not accepted then."""
        wrong = []
        for agent in self.parts.store.agents():
            for _ in range(3):
                self.run(agent.name)
            shown = self.parts.destinations["files"].observe(agent.targets[0])
            if agent.state is AgentState.ENABLED and agent.listed:
                verdict = self.verdicts().get(shown.version_id or "")
                if verdict is not True:
                    wrong.append(f"{agent.name}: {shown.version_id} is {verdict}")
        return wrong


def rotate(drill: Drill, name: str) -> None:
    """Rotate, and let it be done."""
    drill.parts.administration.rotate(name, CALLER)
    drill.run(name)


def rotate_and_die(drill: Drill, name: str) -> None:
    """Die somewhere in a rotation."""
    drill.parts.administration.rotate(name, CALLER)
    drill.run(name, steps=drill.random.randrange(12))


def begin(drill: Drill, name: str) -> None:
    """Go a few steps only, and leave the rest for later."""
    drill.run(name)


def revoke(drill: Drill, name: str) -> None:
    """Cut an agent off."""
    drill.parts.administration.revoke(Leak(agent=name), CALLER)


def reissue(drill: Drill, name: str) -> None:
    """Cut an agent off, and give it a new secret sooner or later."""
    drill.parts.administration.revoke(Leak(agent=name, reissue=True), CALLER)
    if drill.random.random() < 0.7:
        drill.run(name)


def revoke_version(drill: Drill, name: str) -> None:
    """Cut one version off."""
    case = drill.parts.store.case_of(name)
    if case.accepted:
        version = drill.random.choice(case.accepted)
        reissued = drill.random.random() < 0.5
        drill.parts.administration.revoke(Leak(version=version.id, reissue=reissued), CALLER)


def suspend(drill: Drill, name: str) -> None:
    """Stop an agent."""
    drill.parts.administration.suspend(name, CALLER)


def resume(drill: Drill, name: str) -> None:
    """Let every agent that is stopped go on."""
    del name
    for agent in drill.parts.store.agents():
        if agent.state is AgentState.SUSPENDED:
            drill.parts.administration.resume(agent.name, CALLER)


def add(drill: Drill, name: str) -> None:
    """Add an agent; some names are used again."""
    del name
    fresh = f"made-{drill.random.randrange(4)}"
    drill.numbers += 1
    drill.parts.add_agent(
        fresh,
        login=drill.random.choice([fresh, f"{fresh}@{drill.random.randrange(2)}"]),
        owner=None,
        policy="default",
        targets=(Target(to="files", path=f"{fresh}-{drill.numbers}"),),
        actor="drill",
    )
    drill.run(fresh)


def remove(drill: Drill, name: str) -> None:
    """End an agent of the command line."""
    if name not in OF_FILES:
        drill.parts.administration.remove(name, CALLER)


VERBS: list[Callable[[Drill, str], None]] = [
    rotate, rotate, rotate, rotate_and_die, rotate_and_die, begin, revoke, reissue, revoke_version,
    suspend, resume, resume, add, add, remove,
]  # fmt: skip
