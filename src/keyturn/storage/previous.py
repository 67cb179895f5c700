"""The versions that were replaced and are accepted still, of all agents in one question."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from keyturn.core.model import AgentState, VersionState
from keyturn.storage.tables import agents, credentials, versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Previous:
    """A version in its grace; `replaced_at` is when the next one was promoted."""

    version_id: str
    policy: str
    replaced_at: datetime
    deadline: datetime | None


def previous(connection: Connection) -> list[Previous]:
    """Return them all."""
    later = versions.alias("later")
    replaced = (
        sa.select(sa.func.min(later.c.promoted_at))
        .where(later.c.credential_uid == versions.c.credential_uid, later.c.seq > versions.c.seq)
        .scalar_subquery()
        .label("replaced_at")
    )
    query = (
        sa.select(versions.c.id, agents.c.policy, versions.c.deadline, replaced)
        .join_from(versions, credentials, versions.c.credential_uid == credentials.c.uid)
        .join(agents, credentials.c.agent_uid == agents.c.uid)
        .where(versions.c.state == VersionState.PREVIOUS, agents.c.state == AgentState.ENABLED)
    )
    return [
        Previous(
            version_id=row.id,
            policy=row.policy,
            replaced_at=row.replaced_at,
            deadline=row.deadline,
        )
        for row in connection.execute(query)
        if row.replaced_at is not None
    ]
