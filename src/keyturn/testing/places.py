"""Where agents read, each as it is in the wild: a folder, a real OpenBao, the stand-ins of the clouds.

A place gives a connection for the configuration, and how an agent reads there by the vendor's own
library, without any code of ours. For demonstrations, tests and benchmarks.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keyturn.testing import resolver
from keyturn.testing.certificates import new_authority
from keyturn.testing.wire import Server, served

KINDS = ("file", "vault", "aws", "azure")
PREFIX = "agents"

Read = Callable[[str], dict[str, Any] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One destination; `read` gives an agent's entry, None where there is none.

    `names` lead a daemon to a stand-in. `door` is the server that daemons come to and agents do not:
    a rule put there is between the two. None for files and for OpenBao.
    """

    kind: str
    connection: Mapping[str, Any]
    read: Read
    names: Mapping[resolver.Place, resolver.Place] = field(default_factory=dict)
    door: Server | None = None


@contextlib.contextmanager
def place(kind: str, folder: Path) -> Iterator[Place]:
    """Give a place of a kind until the block ends. Raises KeyError for another kind."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _PLACES[kind](folder) as one:
        yield one


def daemon(
    *arguments: str, places: Mapping[resolver.Place, resolver.Place], module: str = "keyturn"
) -> list[str]:
    """Return the command line of a process for which the names of the stand-ins resolve."""
    led = ["keyturn.testing.resolver", resolver.as_text(places)] if places else []
    modules = [*led, module]
    return [sys.executable, "-m", *modules, *arguments]


@contextlib.contextmanager
def _file(folder: Path) -> Iterator[Place]:
    root = folder / PREFIX

    def read(agent: str) -> dict[str, Any] | None:
        try:
            return _object((root / f"{agent}.json").read_text())
        except FileNotFoundError:
            return None

    yield Place(kind="file", connection={"type": "file", "root": str(root)}, read=read)


@contextlib.contextmanager
def _vault(folder: Path) -> Iterator[Place]:
    import hvac

    from keyturn.testing import openbao

    with openbao.dev_server(folder) as server:
        client = hvac.Client(url=server.address, token=server.token)

        def read(agent: str) -> dict[str, Any] | None:
            try:
                found = client.secrets.kv.v2.read_secret_version(
                    f"{PREFIX}/{agent}", mount_point="kv", raise_on_deleted_version=True
                )
            except hvac.exceptions.InvalidPath:
                return None
            values: dict[str, Any] = found["data"]["data"]
            return values

        auth = {"method": "token", "token_file": str(server.token_file)}
        connection = {"type": "vault", "address": server.address, "auth": auth, "prefix": PREFIX}
        yield Place(kind="vault", connection=connection, read=read)


@contextlib.contextmanager
def _aws(folder: Path) -> Iterator[Place]:
    import boto3
    from botocore.config import Config

    from keyturn.testing import aws

    authority = new_authority(folder / "tls")
    with (
        aws.stand_in(folder) as one,
        served(one.serve, certificate=authority.issue("aws")) as door,
    ):
        client = boto3.session.Session().client(
            "secretsmanager",
            region_name=aws.REGION,
            endpoint_url=one.address,
            aws_access_key_id=one.root.access,
            aws_secret_access_key=one.root.secret,
            config=Config(proxies={}),
        )

        def read(agent: str) -> dict[str, Any] | None:
            try:
                found = client.get_secret_value(SecretId=f"{PREFIX}/{agent}")
            except client.exceptions.ResourceNotFoundException:
                return None
            return _object(found["SecretString"])

        connection = {
            **aws.connection(one, one.keys_file(folder)),
            "endpoint": door.address,
            "sts_endpoint": door.address,
            "ca_file": str(authority.ca_file),
            "prefix": PREFIX,
            "staleness": "0s",
            "write_limit": "40/s",
            # The service keeps 100 versions of a secret a day, and nobody would wait for that here.
            "versions_per_day": 100_000,
        }
        yield Place(kind="aws", connection=connection, read=read, door=door)


@contextlib.contextmanager
def _azure(folder: Path) -> Iterator[Place]:
    from azure.core.exceptions import ResourceNotFoundError
    from azure.identity import ClientSecretCredential
    from azure.keyvault.secrets import SecretClient

    from keyturn.testing import azure

    with (
        # A name of its own: the SDK remembers challenges by address, for the whole process.
        azure.cloud(folder, names=(f"place-{secrets.token_hex(4)}",)) as cloud,
        served(cloud.answer, certificate=cloud.certificate) as beside,
        resolver.resolving(dict.fromkeys(cloud.places, beside.place)),
    ):
        identity, secret_file = cloud.application()
        cloud.vault.grant(identity)
        cloud.vault.most_others = 10**6  # of a whole vault: agents ask more often here than there
        who = {"tenant_id": cloud.entra.tenant, "client_id": identity.client_id}
        verify = str(cloud.ca_file)
        credential = ClientSecretCredential(
            **who,
            client_secret=identity.secret or "",
            authority=cloud.entra.authority,
            connection_verify=verify,
        )
        client = SecretClient(cloud.vault.base, credential, connection_verify=verify)

        def read(agent: str) -> dict[str, Any] | None:
            try:
                return _object(client.get_secret(f"{PREFIX}-{agent}").value or "{}")
            except ResourceNotFoundError:
                return None

        login = {"method": "client-secret", **who, "secret_file": str(secret_file)}
        connection = {
            "type": "azure",
            "vault": cloud.vault.base,
            "authority": cloud.entra.authority,
            "ca_file": verify,
            "auth": login,
            "prefix": PREFIX,
        }
        yield Place(
            kind="azure",
            connection=connection,
            read=read,
            names=cloud.places,
            door=cloud.server,
        )
        client.close()
        credential.close()


def _object(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    return found


_PLACES: dict[str, Callable[[Path], contextlib.AbstractContextManager[Place]]] = {
    "file": _file,
    "vault": _vault,
    "aws": _aws,
    "azure": _azure,
}
