"""Peers: the work of one rotation by the vendors' own clients, in the order of a script, no more.

A script is what one rotation of Keyturn was seen to do: "hash", "commit" and "append", which are
the same everywhere, and the requests, for which each peer has words of its own.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hvac
import psycopg

from keyturn.core.secret import Secret, mint
from keyturn.testing import openbao
from keyturn.verifier.gate import Gate
from keyturn.verifier.hashing import Hashing

Commit = Callable[[bytes], None]
IN_FLIGHT = 16


@dataclass(slots=True, kw_only=True)
class Turn:
    """One rotation of one entry. `newest` and `older` are versions as the service names them."""

    number: int
    name: str
    version_id: str
    secret: Secret
    digest: bytes = b""
    newest: Any = None
    older: Any = None
    made: str = ""

    @property
    def values(self) -> dict[str, str]:
        """What agents read."""
        return {"id": "x", "secret": self.secret.reveal(), "version": self.version_id}


class Peer(ABC):
    """What all have in common: hash, commits and the ledger's appends."""

    def __init__(self, commit: Commit, *, script: Sequence[str], folder: Path) -> None:
        self._script = script
        self._hashing = Hashing(gate=Gate(1, queue=None))
        self._prefix = f"peer-{uuid.uuid4().hex[:6]}"
        self._folder = folder / "peer-ledger"
        self._folder.mkdir()
        self._commit = commit
        self._work: dict[str, Callable[[Turn], Any]] = {
            "hash": self._hash,
            "commit": lambda turn: self._commit(turn.digest),
            "append": self._append,
            **self.requests(),
        }

    def prepare(self) -> None:  # noqa: B027 - every peer is as ready as this
        """Nothing to prepare."""

    def begin(self, number: int) -> None:
        """Make an entry with an old version; not timed."""
        for _ in range(2):
            self.write_first(self._turn(number))

    def one(self, number: int) -> None:
        """Rotate one agent."""
        turn = self._turn(number)
        for what in self._script:
            self._work[what](turn)

    @abstractmethod
    def requests(self) -> Mapping[str, Callable[[Turn], Any]]:
        """Return how each request of a script is made."""

    @abstractmethod
    def write_first(self, turn: Turn) -> None:
        """Write, whether there is an entry or not."""

    def name(self, number: int) -> str:
        """Name an entry."""
        return f"{self._prefix}/agent-{number}"

    def _turn(self, number: int) -> Turn:
        version_id, secret = mint(random_bytes=secrets.token_bytes)
        return Turn(number=number, name=self.name(number), version_id=version_id, secret=secret)

    def _hash(self, turn: Turn) -> None:
        turn.digest = self._hashing.digest(turn.secret).encode()

    def _append(self, turn: Turn) -> None:
        with (self._folder / f"{turn.number}.jsonl").open("ab") as file:
            file.write(turn.digest + b"\n")
            file.flush()
            os.fsync(file.fileno())


class VaultPeer(Peer):
    """Bare hvac, a client per thread: one holds a session of requests, which is no thread's else."""

    def __init__(self, server: openbao.Server, commit: Commit, **more: Any) -> None:
        super().__init__(commit, **more)
        self._clients = threading.local()
        self._server = server

    def requests(self) -> Mapping[str, Callable[[Turn], Any]]:
        return {
            "read": self._read,
            "read old": lambda turn: self._read_version(turn, turn.newest - 1),
            "write": lambda turn: self._write(turn, cas=turn.newest),
            "delete": lambda turn: self._kv.delete_secret_versions(
                turn.name, [turn.newest - 1], mount_point="kv"
            ),
        }

    def write_first(self, turn: Turn) -> None:
        self._write(turn, cas=None)

    @property
    def _kv(self) -> Any:
        if not hasattr(self._clients, "client"):
            self._clients.client = hvac.Client(url=self._server.address, token=self._server.token)
        return self._clients.client.secrets.kv.v2

    def _write(self, turn: Turn, cas: int | None) -> None:
        self._kv.create_or_update_secret(turn.name, turn.values, cas=cas, mount_point="kv")

    def _read(self, turn: Turn) -> None:
        turn.newest = int(self._read_version(turn, None)["data"]["metadata"]["version"])

    def _read_version(self, turn: Turn, version: int | None) -> Any:
        return self._kv.read_secret_version(
            turn.name, version=version, mount_point="kv", raise_on_deleted_version=True
        )


class AwsPeer(Peer):
    """Bare boto3, one client for all threads."""

    def __init__(self, found: Mapping[str, Any], commit: Commit, **more: Any) -> None:
        import boto3
        from botocore.config import Config

        super().__init__(commit, **more)
        connection = found["connection"]
        self._client = boto3.session.Session().client(
            "secretsmanager",
            region_name=connection["region"],
            endpoint_url=connection["endpoint"],
            aws_access_key_id=found["access"],
            aws_secret_access_key=found["secret"],
            verify=connection["ca_file"],
            config=Config(proxies={}, max_pool_connections=IN_FLIGHT),
        )

    def requests(self) -> Mapping[str, Callable[[Turn], Any]]:
        return {
            "describe": self._describe,
            "get AWSCURRENT": lambda turn: self._get(turn, turn.newest),
            "get AWSPREVIOUS": lambda turn: self._get(turn, turn.older),
            "get AWSPENDING": lambda turn: self._get(turn, turn.made),
            "put AWSPENDING": self._put,
            "move AWSCURRENT": lambda turn: self._update(
                turn, "AWSCURRENT", MoveToVersionId=turn.made, RemoveFromVersionId=turn.newest
            ),
            "remove AWSPENDING": lambda turn: self._update(
                turn, "AWSPENDING", RemoveFromVersionId=turn.made
            ),
            "remove AWSPREVIOUS": lambda turn: self._update(
                turn, "AWSPREVIOUS", RemoveFromVersionId=turn.older
            ),
        }

    def write_first(self, turn: Turn) -> None:
        value = json.dumps(turn.values)
        try:
            self._client.put_secret_value(SecretId=turn.name, SecretString=value)
        except self._client.exceptions.ResourceNotFoundException:
            self._client.create_secret(Name=turn.name, SecretString=value)

    def _describe(self, turn: Turn) -> None:
        found = self._client.describe_secret(SecretId=turn.name)["VersionIdsToStages"]
        labels = {label: version for version, named in found.items() for label in named}
        turn.newest, turn.older = labels["AWSCURRENT"], labels.get("AWSPREVIOUS")

    def _get(self, turn: Turn, version: str) -> None:
        self._client.get_secret_value(SecretId=turn.name, VersionId=version)

    def _put(self, turn: Turn) -> None:
        turn.made = str(uuid.uuid4())
        self._client.put_secret_value(
            SecretId=turn.name,
            ClientRequestToken=turn.made,
            SecretString=json.dumps(turn.values),
            VersionStages=["AWSPENDING"],
        )

    def _update(self, turn: Turn, label: str, **ends: str) -> None:
        self._client.update_secret_version_stage(SecretId=turn.name, VersionStage=label, **ends)


class AzurePeer(Peer):
    """Bare azure-keyvault-secrets, one client for all threads."""

    def __init__(self, found: Mapping[str, Any], commit: Commit, **more: Any) -> None:
        import requests
        from azure.core.pipeline.transport import RequestsTransport
        from azure.identity import ClientSecretCredential
        from azure.keyvault.secrets import SecretClient
        from requests.adapters import HTTPAdapter

        super().__init__(commit, **more)
        connection = found["connection"]
        verify, auth = connection["ca_file"], connection["auth"]
        credential = ClientSecretCredential(
            auth["tenant_id"],
            auth["client_id"],
            found["secret"],
            authority=connection["authority"],
            connection_verify=verify,
        )
        session = requests.Session()  # by itself it would keep ten connections for sixteen threads
        session.mount("https://", HTTPAdapter(pool_maxsize=IN_FLIGHT, max_retries=0))
        transport = RequestsTransport(session=session, connection_verify=verify)
        self._client = SecretClient(connection["vault"], credential, transport=transport)

    def requests(self) -> Mapping[str, Callable[[Turn], Any]]:
        return {
            "get": self._get,
            "get version": lambda turn: self._client.get_secret(turn.name, turn.older),
            "list": self._list,
            "set": self._set,
            "disable": lambda turn: self._client.update_secret_properties(
                turn.name, turn.older, enabled=False
            ),
        }

    def name(self, number: int) -> str:
        return super().name(number).replace("/", "-")

    def write_first(self, turn: Turn) -> None:
        self._set(turn)

    def _get(self, turn: Turn) -> None:
        turn.newest = self._client.get_secret(turn.name).properties.version

    def _list(self, turn: Turn) -> None:
        found = list(self._client.list_properties_of_secret_versions(turn.name))
        older = [one for one in found if one.version != turn.newest and one.enabled]
        turn.older = max(older, key=lambda one: one.created_on).version

    def _set(self, turn: Turn) -> None:
        tags = {"owner": "peer", "version": turn.version_id, "fence": "1"}
        made = self._client.set_secret(
            turn.name, json.dumps(turn.values), content_type="application/json", tags=tags
        )
        turn.made = made.properties.version


# --- durable commits by hand --------------------------------------------------------------


def sqlite_commit(path: Path) -> Commit:
    """Return a commit on SQLite with the pragmas of the store, one writer at a time."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode=PERSIST")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, v BLOB)")
    guard = threading.Lock()

    def commit(value: bytes) -> None:
        with guard:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT INTO t (v) VALUES (?)", (value,))
            connection.execute("COMMIT")

    return commit


def postgres_commit(url: str) -> Commit:
    """Return a commit on PostgreSQL, a connection per thread."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE peer (n BIGSERIAL PRIMARY KEY, v BYTEA)")
    local = threading.local()

    def commit(value: bytes) -> None:
        if not hasattr(local, "connection"):
            local.connection = psycopg.connect(url, autocommit=True)
        local.connection.execute("INSERT INTO peer (v) VALUES (%s)", (value,))

    return commit
