"""Builders for store tests: places to put a store, and small values to put in it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from keyturn.core.model import (
    Agent,
    Cause,
    Credential,
    Effect,
    Intent,
    Rotation,
    Target,
    Version,
    VersionState,
)
from keyturn.ports import AuditEntry, Claim
from keyturn.storage.store import Store
from keyturn.storage.tables import metadata
from keyturn.storage.usage_tables import usage_metadata

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
TTL = timedelta(seconds=60)


class RealClock:
    """The host's time."""

    def now(self) -> datetime:
        """Return the time of the host, as PostgreSQL on this host sees it."""
        return datetime.now(UTC)

    def boottime(self) -> timedelta:
        """Return nothing that store tests need."""
        return timedelta(0)


@dataclass
class Place:
    """Where a store is: opens as many of them as a test wants, and closes them."""

    url: str
    state_dir: Path
    opened: list[Store] = field(default_factory=list)

    def open(self, writer: str = "w1", **more: Any) -> Store:
        """Open the store as one more process would."""
        draw = random.Random(f"{self.url} {writer} {len(self.opened)}")
        store = Store.open(
            self.url,
            state_dir=self.state_dir,
            clock=RealClock(),
            random_bytes=draw.randbytes,
            writer=writer,
            **more,
        )
        self.opened.append(store)
        return store

    def close(self) -> None:
        """Close what was opened."""
        for store in self.opened:
            store.close()


@pytest.fixture(name="place", params=["sqlite", "postgresql"])
def either_place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Give an empty place for a store on each database; wants the fixture `postgres` beside it."""
    url = f"sqlite:///{tmp_path}/keyturn.db"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").new_database()
    found = Place(url, tmp_path)
    yield found
    found.close()


def declared(engine: sa.Engine) -> Any:
    """Return the tables that a store on this database has."""
    return metadata if engine.dialect.name == "sqlite" else [metadata, usage_metadata]


def claim_of(store: Store, uid: str, *, holder: str, ttl: timedelta) -> Claim | None:
    """Take the claim; what was loaded with it is not looked at."""
    taken = store.claim(uid, holder=holder, ttl=ttl)
    return None if taken is None else taken[0]


def target(name: str = "a", to: str = "files") -> Target:
    """Return a destination."""
    return Target(to=to, path=name)


def add(
    store: Store, name: str = "a", *, targets: Sequence[Target] | None = None, **more: Any
) -> str:
    """Add an agent that is due now and return its credential's uid."""
    targets = (target(name),) if targets is None else tuple(targets)
    uid = more.pop("uid", name)
    agent = Agent(uid=f"agent-{uid}", name=name, login=more.pop("login", name), targets=targets)
    credential = Credential(
        uid=f"cred-{uid}", agent_uid=agent.uid, wake_at=more.pop("wake_at", NOW)
    )
    identities = {t.key: f"file:///{t.key}" for t in targets}
    store.add_agent(agent, credential, identities=identities, audit=[entry("agent.add")])
    return credential.uid


def version(
    uid: str, seq: int = 1, state: VersionState = VersionState.PENDING, **more: Any
) -> Version:
    """Return a version whose id follows from its credential and number."""
    if state in {VersionState.RETIRED, VersionState.REVOKED}:
        more.setdefault("ended_at", NOW)
    values: dict[str, Any] = {
        "id": f"{uid.replace('-', '')}v{seq:03d}".ljust(14, "0"),
        "login": "bot",
        "scheme": "argon2id",
        "digest": "$argon2id$…",
        "tag": b"12345678",
        "minted_at": NOW,
    }
    return Version(credential_uid=uid, seq=seq, state=state, **values | more)


def rotation(uid: str, number: int = 1, **more: Any) -> Rotation:
    """Return an open rotation."""
    values = {"cause": Cause.SCHEDULE, "opened_at": NOW + timedelta(seconds=number)}
    return Rotation(uid=f"rot-{uid}-{number}", credential_uid=uid, **values | more)


def intent(of: Version, number: int = 1, **more: Any) -> Intent:
    """Return an unresolved activation intent of writer w1."""
    values: dict[str, Any] = {
        "effect": Effect.ACTIVATE,
        "target": "files:a",
        "writer": "w1",
        "fence": 1,
        "incarnation": 1,
        "at": NOW,
    }
    return Intent(
        uid=f"int-{of.id}-{number}",
        credential_uid=of.credential_uid,
        version_id=of.id,
        **values | more,
    )


def entry(action: str = "test", **more: Any) -> AuditEntry:
    """Return an audit entry."""
    return AuditEntry(action=action, actor="tester", **more)
