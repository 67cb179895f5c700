"""The stand-in for Azure is as strict as the service, and can be started by anybody."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from azure.core.exceptions import HttpResponseError
from azure.keyvault.secrets import SecretClient

from keyturn.destinations.azure import AzureDestination
from keyturn.errors import Throttled
from keyturn.testing.azure import ALL, Cloud
from keyturn.testing.contract import MINTED_AT, PLACE, new_entry
from support.azure import connect, reachable_cloud, root


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """Give one cloud to all tests."""
    with reachable_cloud(tmp_path_factory.mktemp("azure")) as cloud:
        yield cloud


@pytest.fixture
def destination(one: Cloud) -> Iterator[AzureDestination]:
    """Give a connection with every right."""
    made = connect(one, root(one))
    yield made
    made.close()


def refusal(client: SecretClient, act: Any) -> tuple[int, str]:
    """Return status and inner code of a refusal."""
    with pytest.raises(HttpResponseError) as refused:
        act(client)
    body = json.loads(refused.value.response.text())["error"]
    return refused.value.status_code, body.get("innererror", {}).get("code", body["code"])


def test_the_stand_in_refuses_what_the_service_refuses(one: Cloud) -> None:
    """Limits of values, tags, names, times and pages, by the unmodified SDK."""
    from azure.identity import ClientSecretCredential

    identity, _ = one.application()
    one.vault.grant(identity, ALL)
    trust = {"connection_verify": str(one.ca_file)}
    credential = ClientSecretCredential(
        one.entra.tenant, identity.client_id, str(identity.secret), **trust
    )
    client = SecretClient(one.vault.base, credential, retry_total=0, **trust)
    bad = (400, "BadParameter")
    assert refusal(client, lambda c: c.set_secret("x", "v" * 25_601)) == bad
    assert refusal(client, lambda c: c.set_secret("x_y", "v")) == bad
    assert refusal(client, lambda c: c.set_secret("x" * 128, "v")) == bad
    many = {str(number): "x" for number in range(16)}
    assert refusal(client, lambda c: c.set_secret("x", "v", tags=many)) == bad
    assert refusal(client, lambda c: c.set_secret("x", "v", tags={"t" * 513: "x"})) == bad
    assert refusal(client, lambda c: c.set_secret("x", "v", tags={"t": "x" * 257})) == bad
    times = {"not_before": MINTED_AT, "expires_on": MINTED_AT}
    assert refusal(client, lambda c: c.set_secret("x", "v", **times)) == bad
    pages = client.list_properties_of_secret_versions("x", max_page_size=26)
    assert refusal(client, lambda _: list(pages)) == bad
    assert refusal(client, lambda c: c.get_secret("nobody")) == (404, "SecretNotFound")
    made = client.set_secret("mine", "v")
    client.update_secret_properties("mine", str(made.properties.version), enabled=False)
    assert refusal(client, lambda c: c.get_secret("MINE")) == (403, "SecretDisabled")
    one.vault.recovery = 0.2
    client.begin_delete_secret("mine")
    assert refusal(client, lambda c: c.set_secret("mine", "v")) == (409, "ObjectIsBeingDeleted")
    time.sleep(0.25)
    again = (409, "ObjectIsDeletedButRecoverable")
    assert refusal(client, lambda c: c.set_secret("Mine", "v")) == again
    client.begin_recover_deleted_secret("mine")
    assert refusal(client, lambda c: c.set_secret("mine", "v")) == (409, "ObjectIsBeingRecovered")
    time.sleep(0.25)
    client.set_secret("mine", "v")
    one.vault.recovery = 0.0
    client.close()
    credential.close()


def test_the_stand_in_throttles(one: Cloud, destination: AzureDestination) -> None:
    """Past its limit it says 429 with a time, and what failed does not count."""
    one.vault.most_writes = 3
    try:
        one.vault._done[True].clear()
        for seed in range(3):
            destination.activate(PLACE, new_entry(seed), expected="")
        for _ in range(2):
            with pytest.raises(Throttled) as slowed:
                destination.activate(PLACE, new_entry(9), expected="")
            assert timedelta(0) < slowed.value.retry_after <= timedelta(seconds=10)
    finally:
        one.vault.most_writes = 10**6


def test_the_stand_in_starts_from_the_command_line(tmp_path: Path) -> None:
    """It prints a configuration that `keyturn check --probe` finds good, in a process of its own."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "keyturn.testing.azure", "--folder", str(tmp_path / "cloud")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = ""
            while "keyturn.testing.resolver" not in said:
                line = process.stdout.readline()
                assert line, said
                said += line
            places = said.rpartition("keyturn.testing.resolver ")[2].split()[0].strip("'")
            connections = said.partition("connections:\n")[2].partition("\n\n")[0]
            config = tmp_path / "keyturn.yaml"
            config.touch(mode=0o600)
            config.write_text(
                f"version: 1\nstore: {{url: 'sqlite:///{tmp_path}/state/keyturn.db'}}\n"
                f"connections:\n{connections}\n"
                "agents:\n  bot: {destinations: [{to: azure, path: bot}]}\n"
            )
            done = subprocess.run(
                [sys.executable, "-m", "keyturn.testing.resolver", places, "keyturn", "check",
                 "--probe", "-c", str(config)],
                capture_output=True, text=True, check=False, timeout=60,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
            assert "1 of 1 can be rotated" in done.stdout
        finally:
            process.terminate()
