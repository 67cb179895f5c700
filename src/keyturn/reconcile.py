"""The store's agents in line with the files: everything is looked at first, then all or nothing.

added       stands in the files and not in the store
changed     stands in both, and not the same
unmanaged   disappeared from the files: stays accepted, is rotated no more; nothing is ever revoked
            by a file, and no suspension is lifted by one
moved       its connection leads elsewhere now; refused where something of ours may be at the old place

Agents of the command line are looked at as well: their connections and policies stand in the files.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from keyturn import config
from keyturn.config import AgentDefinition, Settings
from keyturn.core.model import Agent, Credential, ManagedBy, Target, Traits
from keyturn.core.policy import CronCalculator
from keyturn.errors import ConfigError, Refused
from keyturn.ports import AuditEntry
from keyturn.storage.takeover import Owned, TakeOver, Wanted

SWEEP_EVERY = timedelta(minutes=5)
MASS_CHANGE = 0.1


class MassChange(Refused):
    """More agents would disappear than a person would take out in passing."""


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


@dataclass(slots=True, kw_only=True)
class Reconciling:
    """One look at the files and the store; `plan` gives what is to be written."""

    settings: Settings
    identity: Callable[[Target], str]  # raises ConfigError
    known: list[Agent]
    owned: list[Owned]
    now: datetime
    actor: str
    after: list[Agent] = field(default_factory=list)  # every agent as the last plan makes it
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
        """Raise MassChange where more agents disappear than a person would mean by one edit."""
        gone = len(self.gone())
        if gone > max(1, len(self.known) * MASS_CHANGE):
            raise MassChange(
                f"{gone} of {len(self.known)} agents would disappear",
                hint="if that is meant: keyturn reload --allow-mass-change",
            )

    def plan(self, *, leave_agents: bool = False) -> tuple[TakeOver, dict[str, int]]:
        """Return what is to be written, and how many agents it concerns in which way.

        With `leave_agents` the files' agents are left alone. Raises Refused, ConfigError.
        """
        moved = [one for one in self.owned if self._leads_to(one) not in (None, one.identity)]
        by_uid = {agent.uid: agent for agent in self.known}
        by_name = {agent.name: agent for agent in self.known}
        done = {"added": 0, "changed": 0, "unmanaged": 0, "unchanged": 0, "moved": 0}
        wanted: list[Wanted] = []
        after = dict(by_uid)
        definitions = {} if leave_agents else self.settings.agents
        for definition in definitions.values():
            known = by_name.get(definition.name)
            agent = self._defined(definition, known)
            what = "added" if known is None else "unchanged" if agent == known else "changed"
            done[what] += 1
            after[agent.uid] = agent
            if what != "unchanged":
                wanted.append(self._wanted(agent, what, is_new=known is None))
        for agent in [] if leave_agents else self.gone():
            after[agent.uid] = replace(agent, listed=False)
            wanted.append(self._wanted(after[agent.uid], "unmanaged"))
            done["unmanaged"] += 1
        named = {one.agent.uid for one in wanted}
        elsewhere = sorted({one.agent_uid for one in moved} - named)
        wanted += [self._wanted(by_uid[uid], "moved") for uid in elsewhere]
        done["moved"] = len({one.agent_uid for one in moved})
        taken = TakeOver(known=self.known, owned=self.owned, moved=moved, wanted=wanted)
        self.after = list(after.values())
        return taken, done

    def _defined(self, definition: AgentDefinition, known: Agent | None) -> Agent:
        if known is not None and known.managed_by is not ManagedBy.FILE:
            raise Refused(
                f"{definition.where}: {known.name} belongs to the command line",
                hint=f"`keyturn agents remove {known.name}`, or take it out of the file",
            )
        before = known or Agent(uid=uuid.uuid4().hex, name=definition.name, login="")
        return replace(
            before,
            login=definition.login,
            owner=definition.owner,
            policy=definition.policy,
            targets=definition.targets,
            listed=True,
        )

    def _wanted(self, agent: Agent, what: str, *, is_new: bool = False) -> Wanted:
        return Wanted(
            agent=agent,
            claimed=self._claimed(agent, anew=what in ("added", "changed")),
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
