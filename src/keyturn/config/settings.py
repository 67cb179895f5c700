"""What the configuration becomes: frozen, checked, and without any secret."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from pydantic import BaseModel

from keyturn.config.generation import Generation
from keyturn.config.listening import ListenSettings
from keyturn.config.models import (
    AdminSettings,
    HookSection,
    LogSettings,
    ReloadSettings,
    StoreSettings,
)
from keyturn.config.verifying import VerifierSection
from keyturn.core.model import Policy, Target
from keyturn.core.revocations import RevocationEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """A named way to reach a destination. `options` is its adapter's own model."""

    name: str
    type: str
    options: BaseModel
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentDefinition:
    """An agent as a file has it. `at` is where each of its targets stands."""

    name: str
    login: str
    owner: str | None
    policy: str
    targets: tuple[Target, ...]
    where: str
    at: tuple[str, ...]

    @property
    def file(self) -> str:
        """The file that it belongs to, by the name that the main file gives it."""
        return str(Path(self.where.rpartition(":")[0]).absolute())


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that the files and the environment say, checked. Holds no secret.

    `lease` is what leased verifiers add to the floor of a grace: zero on SQLite, where each verifier
    looks at the store before each yes. `notes` are remarks for the operator.
    """

    path: Path
    store: StoreSettings
    log: LogSettings
    verifier: VerifierSection
    admin: AdminSettings
    listen: ListenSettings
    connections: Mapping[str, Connection]
    policies: Mapping[str, Policy]
    policy_places: Mapping[str, str]
    agents: Mapping[str, AgentDefinition]
    revocations_file: Path | None
    revocations: tuple[RevocationEntry, ...]
    lease: timedelta
    generation: Generation
    reload: ReloadSettings
    anchor_file: Path | None = None
    notify: tuple[HookSection, ...] = ()
    notes: tuple[str, ...] = ()
