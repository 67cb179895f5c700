"""The names that can be typed, for completion in a shell."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from keyturn.core.model import ACCEPTED
from keyturn.storage.tables import versions
from keyturn.wiring import Parts

_MOST = 1000  # nobody finds one among more, and an answer has to come within 0.1 s


def offered(parts: Parts) -> dict[str, list[str]]:
    """Return names by their kind; `destinations` are written AGENT=CONNECTION:PATH."""
    agents = parts.store.agents()
    return {
        "agents": sorted(agent.name for agent in agents),
        "connections": sorted(parts.settings.connections),
        "policies": sorted(parts.settings.policies),
        "owners": sorted({agent.owner for agent in agents if agent.owner}),
        "logins": sorted(agent.login for agent in agents),
        "destinations": sorted(f"{agent.name}={t.key}" for agent in agents for t in agent.targets),
        "versions": parts.store.database.read(_accepted),
    }


def _accepted(connection: Connection) -> list[str]:
    query = sa.select(versions.c.id).where(versions.c.state.in_(sorted(ACCEPTED)))
    return list(connection.execute(query.order_by(versions.c.id).limit(_MOST)).scalars())
