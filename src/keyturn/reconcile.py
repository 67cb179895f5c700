"""The store's agents in line with the files: everything is looked at first, then all or nothing.

added       stands in the files and not in the store
changed     stands in both, and not the same
unmanaged   disappeared from the files: stays accepted, is rotated no more; nothing is ever revoked
            by a file, and no suspension is lifted by one
handed over stands in another file than before, and is otherwise the same
moved       its connection leads elsewhere now; refused where something of ours may be at the old place

Agents of the command line are looked at as well: their connections and policies stand in the files.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta

from sqlalchemy.engine import Connection

from keyturn import config
from keyturn.config import AgentDefinition, Settings
from keyturn.core.model import Agent, Credential, ManagedBy, Target, Traits
from keyturn.core.policy import CronCalculator
from keyturn.errors import ConfigError, Refused
from keyturn.ports import AuditEntry
from keyturn.storage import takeover
from keyturn.storage.store import Store
from keyturn.storage.takeover import Owned, TakeOver, Wanted

SWEEP_EVERY = timedelta(minutes=5)
MASS_CHANGE = 0.1
HALF = 0.5


class MassChange(Refused):
    """More agents would disappear than a person would take out in passing."""

    code = "mass-change"


def credential_of(agent: Agent, now: datetime) -> Credential:
    """Return the credential of a new agent; its first version is due at once."""
    return Credential(
        uid=uuid.uuid4().hex, agent_uid=agent.uid, wake_at=now, sweep_at=now + SWEEP_EVERY
    )


def check_use(
    settings: Settings,
    agents: Iterable[Agent],
    traits: Mapping[str, Traits],
    *,
    cron: CronCalculator,
) -> None:
    """Refuse what the destinations of these agents cannot carry (rule 19). Raises ConfigError."""
    config.check_policies(settings, traits.__getitem__, cron=cron, agents=_known(agents, traits))


def _known(agents: Iterable[Agent], traits: Mapping[str, Traits]) -> list[Agent]:
    """Return the agents with those destinations only whose connection is there."""
    return [
        replace(agent, targets=tuple(t for t in agent.targets if t.to in traits))
        for agent in agents
    ]


KINDS = ("added", "changed", "unmanaged", "unchanged", "handed_over", "moved")


def _differing(known: Agent | None, agent: Agent) -> tuple[str, ...]:
    if known is None:
        return ()
    return tuple(f.name for f in fields(Agent) if getattr(known, f.name) != getattr(agent, f.name))


def _kind(known: Agent | None, differing: tuple[str, ...]) -> str:
    if known is None:
        return "added"
    if differing == ("file",):
        return "handed-over"
    return "changed" if differing else "unchanged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What becomes of one agent, and where it stands now; `what` names the fields that differ."""

    agent: str
    kind: str
    what: tuple[str, ...] = ()
    file: str | None = None
    line: int | None = None
    was_in: str | None = None


class _Undone(Exception):
    """Ends a transaction that was to show whether it could be written."""


def undone(store: Store, taken: TakeOver) -> None:
    """Write a change and undo it: whatever the store would refuse it refuses here. Raises Refused."""

    def body(connection: Connection) -> None:
        takeover.apply(connection, taken, now=store.now_in(connection))
        raise _Undone

    with suppress(_Undone):
        store.database.write(body)


@dataclass(slots=True, kw_only=True)
class Reconciling:
    """One look at the files and the store; `plan` gives what is to be written."""

    settings: Settings
    identity: Callable[[Target], str]  # raises ConfigError
    known: list[Agent]
    owned: list[Owned]
    now: datetime
    actor: str
    take_over: frozenset[str] = frozenset()  # names of the command line's that go to the files
    after: list[Agent] = field(default_factory=list)  # every agent as the last plan makes it
    changes: list[Change] = field(default_factory=list)  # and what becomes of whom
    _stored: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for one in self.owned:
            self._stored.setdefault(one.agent_uid, {})[one.target] = one.identity

    def gone(self) -> list[Agent]:
        """Return the agents that disappeared from the files."""
        wanted = self.settings.agents
        of_files = (a for a in self.known if a.managed_by is ManagedBy.FILE and a.listed)
        return [agent for agent in of_files if agent.name not in wanted]

    def refuse_mass_change(self) -> None:
        """Raise MassChange where more agents disappear than a person would mean by one edit.

        That is more than a tenth of all, more than half of a file that is still there (cut short,
        most likely), or any where the include matches nothing any more (a folder that is not
        mounted).
        """
        gone, files = self.gone(), {str(path) for path, _ in self.settings.generation.files}
        reason = ""
        if len(gone) > max(1, len(self.known) * MASS_CHANGE):
            reason = f"{len(gone)} of {len(self.known)} agents would disappear"
        main = str(self.settings.path.absolute())
        has_none = self.settings.generation.include and not self.settings.generation.included
        if not reason and has_none and any(agent.file not in (None, main) for agent in gone):
            reason = f"include matches no file any more: {len(gone)} agents would disappear"
        for file, left in Counter(agent.file for agent in gone).items():
            had = sum(1 for one in self.known if one.file == file and one.listed)
            if not reason and file in files and left > max(1, had * HALF):
                reason = f"{left} of the {had} agents of {file} would disappear"
        if reason:
            raise MassChange(reason, hint="if that is meant: keyturn reload --allow-mass-change")

    def plan(self, *, leave_agents: bool = False) -> tuple[TakeOver, dict[str, int]]:
        """Return what is to be written, and how many agents it concerns in which way.

        With `leave_agents` the files' agents are left alone. Raises Refused, ConfigError.
        """
        moved = [one for one in self.owned if self._leads_to(one) not in (None, one.identity)]
        by_uid = {agent.uid: agent for agent in self.known}
        by_name = {agent.name: agent for agent in self.known}
        done = dict.fromkeys(KINDS, 0)
        wanted: list[Wanted] = []
        after = dict(by_uid)
        self.changes = []
        definitions = {} if leave_agents else self.settings.agents
        self._refuse_of_commands(definitions, by_name)
        for definition in definitions.values():
            known = by_name.get(definition.name)
            agent = self._defined(definition, known)
            differing = _differing(known, agent)
            what = _kind(known, differing)
            done[what.replace("-", "_")] += 1
            self._note(agent, what, differing, definition, known)
            after[agent.uid] = agent
            if what != "unchanged":
                wanted.append(self._wanted(agent, what, is_new=known is None))
        for agent in [] if leave_agents else self.gone():
            after[agent.uid] = replace(agent, listed=False)
            wanted.append(self._wanted(after[agent.uid], "unmanaged"))
            done["unmanaged"] += 1
            self.changes.append(Change(agent=agent.name, kind="unmanaged", was_in=agent.file))
        named = {one.agent.uid for one in wanted}
        elsewhere = sorted({one.agent_uid for one in moved} - named)
        wanted += [self._wanted(by_uid[uid], "moved") for uid in elsewhere]
        leading = {one.agent_uid: one.target for one in moved}
        done["moved"] = len(leading)
        self.changes += [
            Change(agent=by_uid[uid].name, kind="moved", what=(key,), file=by_uid[uid].file)
            for uid, key in leading.items()
        ]
        taken = TakeOver(known=self.known, owned=self.owned, moved=moved, wanted=wanted)
        self.after = list(after.values())
        return taken, done

    def _refuse_of_commands(
        self, definitions: Mapping[str, AgentDefinition], known: Mapping[str, Agent]
    ) -> None:
        """Refuse agents of the command line that a file names, unless they are to be taken over."""
        both = [
            definition
            for name, definition in definitions.items()
            if name in known
            and known[name].managed_by is not ManagedBy.FILE
            and name not in self.take_over
        ]
        if both:
            names = [definition.name for definition in both]
            raise Refused(
                "\n".join(f"{one.where}: {one.name} belongs to the command line" for one in both),
                hint="give it to the file: `keyturn reload"
                + "".join(f" --take-over {name}" for name in names)
                + "`, or take it out of the file",
            )
        if unnamed := sorted(self.take_over - definitions.keys()):
            raise Refused(f"no file names {', '.join(unnamed)}", hint="write it into a file first")

    def _defined(self, definition: AgentDefinition, known: Agent | None) -> Agent:
        before = known or Agent(uid=uuid.uuid4().hex, name=definition.name, login="")
        return replace(
            before,
            login=definition.login,
            owner=definition.owner,
            policy=definition.policy,
            targets=definition.targets,
            managed_by=ManagedBy.FILE,
            listed=True,
            file=definition.file,
        )

    def _note(
        self,
        agent: Agent,
        what: str,
        differing: tuple[str, ...],
        definition: AgentDefinition,
        known: Agent | None,
    ) -> None:
        if what == "unchanged":
            return
        line = int(definition.where.rpartition(":")[2])
        was_in = known.file if known is not None and known.file != agent.file else None
        self.changes.append(
            Change(
                agent=agent.name,
                kind=what,
                what=differing,
                file=agent.file,
                line=line,
                was_in=was_in,
            )
        )

    def _wanted(self, agent: Agent, what: str, *, is_new: bool = False) -> Wanted:
        return Wanted(
            agent=agent,
            claimed=self._claimed(agent, anew=what in ("added", "changed", "handed-over")),
            audit=AuditEntry(action=f"agent.{what}", actor=self.actor, agent=agent.name),
            credential=credential_of(agent, self.now) if is_new else None,
        )

    def _claimed(self, agent: Agent, *, anew: bool) -> dict[str, str]:
        """Return an agent's identities; where a connection is gone, as they were."""
        found = {}
        stored = self._stored.get(agent.uid, {})
        for target in agent.targets:
            one = Owned(agent_uid=agent.uid, target=target.key, identity="")
            identity = self.identity(target) if anew else self._leads_to(one)
            if (identity := identity or stored.get(target.key)) is not None:
                found[target.key] = identity
        return found

    def _leads_to(self, one: Owned) -> str | None:
        """Return the identity of an entry by the new settings; None where they name none."""
        to, _, path = one.target.partition(":")
        try:
            return self.identity(Target(to=to, path=path))
        except ConfigError:
            return None
