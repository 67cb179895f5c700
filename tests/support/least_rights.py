"""A store on PostgreSQL whose roles are those that `keyturn policy postgresql` prints."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy.engine import make_url

from keyturn.core.model import VersionState
from keyturn.core.secret import Secret, mint
from keyturn.storage import roles
from keyturn.storage.store import Store
from keyturn.testing.fakes import seeded
from keyturn.verifier.hashing import CHEAP_FOR_TESTS, Hashing, tag
from support.postgres import Cluster, binaries
from support.stores import Place, add, entry, version

READERS = {"web": ["web-bot", "off-bot"], "shop": ["shop-bot"]}
HASHING = Hashing(cost=CHEAP_FOR_TESTS)


def psql(url: str, text: str) -> None:
    """Pipe SQL into psql as the how-to says, and let any error fail it."""
    folder = binaries()
    assert folder is not None
    done = subprocess.run(
        [str(folder / "psql"), "-q", "-v", "ON_ERROR_STOP=1", url],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def as_role(url: str, role: str) -> str:
    """Return the URL of another login."""
    return make_url(url).set(username=role).render_as_string(hide_password=False)


@dataclass
class LeastRights:
    """A database with every role, its tables made by the migrator."""

    place: Place
    database: str

    def url(self, role: str) -> str:
        """Return the URL of a role."""
        return as_role(self.place.url, role)

    def connect(self, role: str = "keyturn") -> psycopg.Connection[Any]:
        """Connect as a role; without one as the administrator."""
        return psycopg.connect(self.url(role), autocommit=True)

    def open(self, role: str = roles.DAEMON) -> Store:
        """Open the store as a role does."""
        one = Place(self.url(role), self.place.state_dir)
        store = one.open(role)
        self.place.opened.append(store)
        return store


def upgrade(url: str, state_dir: Path, readers: roles.Readers) -> None:
    """Make the tables and the rights as their owner, as `keyturn store upgrade` does."""
    place = Place(as_role(url, roles.MIGRATOR), state_dir)
    store = place.open("migrator")
    store.database.write(lambda connection: roles.apply(connection, readers))
    place.close()


@contextmanager
def least_rights(
    cluster: Cluster, state_dir: Path, readers: roles.Readers = READERS
) -> Iterator[LeastRights]:
    """Make it as the how-to does: the administrator's part, the tables, the owner's part."""
    url = cluster.new_database()
    psql(url, roles.policy(url, readers))
    upgrade(url, state_dir, readers)
    made = LeastRights(Place(url, state_dir), str(make_url(url).database))
    yield made
    made.place.close()


def put(store: Store, name: str, *, seed: int, **more: Any) -> tuple[str, Secret]:
    """Add an agent with one version; return its id and its secret."""
    uid = add(store, name)
    return put_version(store, uid, name, seed=seed, **more)


def put_version(
    store: Store, uid: str, login: str, *, seed: int, seq: int = 1, **more: Any
) -> tuple[str, Secret]:
    """Add a version to a credential; return its id and its secret."""
    version_id, secret = mint(random_bytes=seeded(seed))
    made = version(
        uid,
        seq,
        more.pop("state", VersionState.CURRENT),
        id=version_id,
        login=login,
        digest=HASHING.digest(secret),
        tag=tag(version_id, secret),
        **more,
    )
    store.amend(uid, lambda case: (replace(case, versions=(*case.versions, made)), [entry()]))
    return version_id, secret


def ago(now: datetime, seconds: float) -> datetime:
    """Return an earlier instant."""
    return now - timedelta(seconds=seconds)
