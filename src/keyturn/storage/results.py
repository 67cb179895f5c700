"""What the store answers besides cases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from keyturn.core.model import Rotation, Version


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """A credential that must be looked at now, and the connections that this may touch."""

    credential_uid: str
    agent_name: str
    connections: tuple[str, ...]
    wake_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Versions and rotations of a credential, newest first."""

    versions: tuple[Version, ...]
    rotations: tuple[Rotation, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Numbers by state, for status and metrics; states without a row are missing."""

    agents: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, int] = field(default_factory=dict)
    rotations: Mapping[str, int] = field(default_factory=dict)
    overdue: int = 0
    longest_overdue: timedelta = timedelta(0)
    over_max_age: int = 0
    cleanup_pending: int = 0  # destinations that hold a revoked version
    audit_head: int = 0  # number of the newest audit entry
