"""What is asked of a store about keys, on both databases and by the least of its roles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keyturn.core.model import Case, VersionState
from keyturn.core.secret import Secret, mint
from keyturn.ports import AuditEntry
from keyturn.storage.decisions import DecisionReader
from keyturn.storage.hashes import in_use
from keyturn.storage.roles import VERIFIER
from keyturn.testing.fakes import seeded
from keyturn.verifier.decision import Verifier
from keyturn.verifier.hashing import tag
from keyturn.verifier.keyed import MAC_LENGTH, Key
from keyturn.verifier.keyring import KeyRing
from support.least_rights import LeastRights, least_rights, put
from support.postgres import Cluster, postgres  # noqa: F401 - a fixture
from support.stores import NOW, Place, RealClock, either_place, entry, version  # noqa: F401 - a fixture

KEYS = {"k1": Key(b"1" * 32), "k2": Key(b"2" * 32)}
READERS = {"web": ["web-bot"]}


def keyed_version(
    store: Any, credential: str, login: str, *, key: str, seed: int, seq: int
) -> Secret:
    """Put a version in that was hashed with a key."""
    version_id, secret = mint(random_bytes=seeded(seed))
    digest = KEYS[key].digest(key, credential_uid=credential, version_id=version_id, secret=secret)
    made = version(
        credential, seq, VersionState.KEPT, id=version_id, login=login, scheme="hmac-sha256",
        digest=digest, tag=tag(version_id, secret),
    )  # fmt: skip
    store.amend(
        credential, lambda case: (replace(case, versions=(*case.versions, made)), [entry()])
    )
    return secret


def ended(case: Case) -> tuple[Case, list[AuditEntry]]:
    """Refuse every version of a case."""
    over = (replace(v, state=VersionState.REVOKED, ended_at=NOW) for v in case.versions)
    return replace(case, versions=tuple(over)), [entry()]


def numbers(found: Any) -> dict[str, int]:
    """Return the number of versions by what a digest begins with."""
    return {
        one.head.rpartition("$k=")[2].partition(",")[0] or one.scheme: one.versions for one in found
    }


def test_keys_in_use_are_counted(place: Place) -> None:
    """By scheme and key, over what may be accepted: nothing that ended, no removed agent."""
    store = place.open()
    put(store, "one-bot", seed=1)
    put(store, "two-bot", seed=2)
    assert numbers(in_use(store.database)) == {"argon2id": 2}
    keyed_version(store, "cred-one-bot", "one-bot", key="k1", seed=3, seq=2)
    keyed_version(store, "cred-one-bot", "one-bot", key="k2", seed=4, seq=3)
    keyed_version(store, "cred-two-bot", "two-bot", key="k1", seed=5, seq=2)
    reader = DecisionReader.open(place.url)

    assert numbers(in_use(store.database)) == {"argon2id": 2, "k1": 2, "k2": 1}
    assert numbers(reader.in_use()) == {"argon2id": 2, "k1": 2, "k2": 1}
    store.amend("cred-two-bot", ended)
    assert numbers(reader.in_use()) == {"argon2id": 1, "k1": 1, "k2": 1}
    reader.close()
    assert MAC_LENGTH == 43  # what the SQL cuts off


@pytest.fixture
def rights(postgres: Cluster, tmp_path: Path) -> Iterator[LeastRights]:  # noqa: F811
    """Give a store with a reader."""
    with least_rights(postgres, tmp_path, READERS) as made:
        yield made


def test_a_verifier_judges_and_a_foreign_one_sees_nothing(
    rights: LeastRights, tmp_path: Path
) -> None:
    """The verifier's role is enough to check and to miss a key; the view shows argon2id alone."""
    store = rights.open()
    put(store, "web-bot", seed=1)
    secret = keyed_version(store, "cred-web-bot", "web-bot", key="k1", seed=2, seq=2)
    verifier = Verifier.open(
        rights.url(VERIFIER), state_dir=tmp_path, clock=RealClock(),
        ring=KeyRing(keys=KEYS, current="k1"),
    )  # fmt: skip

    assert verifier.verify("web-bot", secret).agent == "web-bot"
    assert verifier.lacking() == []
    verifier.use(KeyRing(keys={"k2": KEYS["k2"]}, current="k2"))
    assert ["k1" in one for one in verifier.lacking()] == [True]
    verifier.close()
    with rights.connect("keyturn_reader_web") as connection:
        hashes = connection.execute("SELECT hash FROM keyturn_readers.web").fetchall()
    assert [one.startswith("$argon2id$") for (one,) in hashes] == [True]
