"""The stand-in for Azure keeps the contract: with every right, and with the printed ones alone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from keyturn.core.model import Target
from keyturn.destinations.azure import AzureDestination
from keyturn.destinations.azure_login import AuthOptions
from keyturn.testing.azure import Cloud
from support.azure import AzureContract, by_secret, connect, new_prefix, reachable_cloud


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """Give one cloud to all tests; each has a prefix of its own."""
    with reachable_cloud(tmp_path_factory.mktemp("azure")) as cloud:
        yield cloud


class TestAzureWithEveryRight(AzureContract):
    """An application with a client secret."""

    @pytest.fixture
    def destination(self, one: Cloud) -> Iterator[AzureDestination]:
        self.cloud = one
        self.identity, path = one.application()
        one.vault.grant(self.identity)
        made = connect(one, by_secret(one, self.identity, path))
        yield made
        made.close()

    @contextlib.contextmanager
    def denied(self, destination: Any) -> Iterator[bool]:
        self.cloud.vault.revoke(self.identity)
        yield True
        self.cloud.vault.grant(self.identity)


class TestAzureByPolicy(AzureContract):
    """A managed identity with what `keyturn policy azure` prints for the entries, and no more."""

    @pytest.fixture
    def destination(self, one: Cloud) -> Iterator[AzureDestination]:
        self.cloud, self.identity, self.granted = one, one.machine(), []
        auth = AuthOptions(client_id=self.identity.client_id)
        self.made = connect(one, auth, prefix=new_prefix())
        yield self.made
        self.made.close()

    def _target(self, name: str, **more: Any) -> Target:
        target = super()._target(name, **more)
        self.granted.append(target)
        self.grant(self.granted)
        return target

    def grant(self, targets: list[Target]) -> None:
        """Assign the printed role at the printed scopes; it holds at once."""
        vault = self.cloud.vault
        entries = [(target, how) for target in targets for how in ("disable", "leave")]
        found = json.loads(AzureDestination.least_policy(self.made.options, entries))
        vault.revoke(self.identity)
        for scope in found["scopes"]:
            assert "/providers/Microsoft.KeyVault/vaults/example/secrets/" in scope
            vault.grant(
                self.identity, set(found["role"]["DataActions"]), secret=scope.rpartition("/")[2]
            )

    @contextlib.contextmanager
    def denied(self, destination: Any) -> Iterator[bool]:
        self.grant([])
        yield True
        self.grant(self.granted)
