"""What the tests of Azure share: a cloud, connections to it, the contract's hooks."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from azure.keyvault.secrets._shared import http_challenge_cache

from keyturn.core.model import Target
from keyturn.destinations.azure import AzureDestination, AzureOptions
from keyturn.destinations.azure_login import AuthOptions
from keyturn.testing.azure import Cloud, Identity, Vault, cloud
from keyturn.testing.contract import OTHER_STORE_ID, STORE_ID, DestinationContract
from keyturn.testing.fakes import FakeClock
from keyturn.testing.resolver import resolving

_NUMBERS = itertools.count(1)


def new_prefix() -> str:
    """Return a folder that no other test uses."""
    return f"p{next(_NUMBERS)}"


@contextlib.contextmanager
def reachable_cloud(folder: Path, **more: Any) -> Iterator[Cloud]:
    """Run a cloud that is reached under the real names."""
    http_challenge_cache.clear()  # the SDK keeps those of the cloud before, with its tenant
    with cloud(folder, **more) as one, resolving(one.places):
        for vault in one.vaults.values():
            vault.most_writes = vault.most_others = 10**6  # the limits have tests of their own
        yield one


def connect(
    one: Cloud, auth: AuthOptions, *, store_id: str = STORE_ID, **options: Any
) -> AzureDestination:
    """Make a connection to the first vault."""
    values = {
        "vault": one.vault.base, "ca_file": str(one.ca_file), "write_limit": None,
        "authority": one.entra.authority, "prefix": new_prefix(), "auth": auth, **options,
    }  # fmt: skip
    limit = values.pop("write_limit")
    made = AzureOptions(**values)
    made = made.model_copy(update={"write_limit": limit})
    return AzureDestination(made, name="kv", store_id=store_id, clock=FakeClock())


def by_secret(one: Cloud, identity: Identity, path: Path) -> AuthOptions:
    """Log in by a client secret."""
    return AuthOptions(
        method="client-secret", tenant_id=one.entra.tenant, client_id=identity.client_id,
        secret_file=str(path),
    )  # fmt: skip


def root(one: Cloud) -> AuthOptions:
    """Make an application with every right at every vault."""
    identity, path = one.application()
    for vault in one.vaults.values():
        vault.grant(identity)
    return by_secret(one, identity, path)


def shown(vault: Vault, name: str) -> Any:
    """Return what an agent reads; None where there is nothing that it can read."""
    found = vault.latest(name)
    return json.loads(found.value) if found is not None and found.enabled else None


class AzureContract(DestinationContract):
    """The contract's hooks; `cloud` and `identity` are set by the fixture of the destination."""

    cloud: Cloud
    identity: Identity

    def read_raw(self, destination: Any, target: Target) -> Mapping[str, Any] | None:
        found: Mapping[str, Any] | None = shown(self.cloud.vault, destination.place(target))
        return found

    def write_raw(self, destination: Any, target: Target, values: Mapping[str, Any]) -> None:
        """Write as people do: their version has no tags, those of older ones stay where they are."""
        self.cloud.vault.add(destination.place(target), json.dumps(dict(values)))

    def write_garbage(self, destination: Any, target: Target) -> bool:
        text = '{"id": "a", "id": "b"}' if target.merge else "no object"
        self.cloud.vault.add(destination.place(target), text)
        return True

    def sibling(self, destination: Any) -> AzureDestination:
        return connect(
            self.cloud, root(self.cloud), store_id=OTHER_STORE_ID,
            prefix=destination.options.prefix,
        )  # fmt: skip
