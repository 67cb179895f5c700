"""An OpenBao in production shape: TLS, raft storage, AppRole with short tokens, `cas_required`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hvac.exceptions import Forbidden

from keyturn.destinations.vault import VaultDestination
from keyturn.destinations.vault_auth import AuthOptions
from keyturn.errors import Denied, DestinationUnavailable
from keyturn.testing.certificates import new_authority
from keyturn.testing.contract import PLACE, new_entry
from keyturn.testing.production import Production, production
from support.recording_proxy import recording_proxy
from support.vault import (
    ByPolicyContract,
    approle,
    connect,
    new_prefix,
    printed_policy,
    sibling_of,
)

MOUNT = "teams-secrets"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Production]:
    """Give one server for all tests; each has a prefix of its own."""
    with production(tmp_path_factory.mktemp("openbao")) as one:
        one.mount(MOUNT)
        yield one


class InProduction(ByPolicyContract):
    """TLS with a CA of its own, a mount of another name, and the printed policy to the letter."""

    uses = 0

    @pytest.fixture
    def destination(self, server: Production, tmp_path: Path) -> Iterator[VaultDestination]:
        self.root, self.server, self.folder = server.call, server, tmp_path
        one = self.by_policy(
            server.address, tmp_path, mount=MOUNT, uses=self.uses, ca_file=str(server.ca_file)
        )
        yield one
        one.close()

    def sibling(self, destination: Any) -> VaultDestination:
        path = self.folder / "root"
        path.touch(mode=0o600)
        path.write_text(self.server.token)
        auth = AuthOptions(method="token", token_file=str(path))
        one = sibling_of(destination, self.server.address, auth)
        one.close()
        options = one.options.model_copy(update={"ca_file": str(self.server.ca_file)})
        return VaultDestination(
            options, name="other", store_id=one.store_id, clock=destination.clock
        )


class TestByAppRole(InProduction):
    """Tokens without a limit: reads reach the leader by wrapped answers."""


class TestByLimitedTokens(InProduction):
    """Tokens with a limited number of uses, each of which the leader counts: reads are plain."""

    uses = 1_000_000


def login(server: Production, folder: Path, **role: Any) -> tuple[AuthOptions, dict[str, Any]]:
    """Make a role for one entry; returns the login and the other options of its connection."""
    name = new_prefix()
    policy = printed_policy(MOUNT, name, [PLACE])
    auth = approle(server.call, folder, name, policy=policy, **role)
    return auth, {"mount": MOUNT, "prefix": name, "ca_file": str(server.ca_file)}


def move(destination: VaultDestination, seed: int) -> None:
    """Publish one version."""
    token = destination.observe(PLACE).token
    destination.activate(PLACE, new_entry(seed), expected=token)


def test_a_server_of_another_authority_is_told_nothing(server: Production, tmp_path: Path) -> None:
    """A certificate that ca_file did not sign ends the connection before a word is said."""
    auth, options = login(server, tmp_path)
    strange = new_authority(tmp_path / "strange", name="stranger")
    with recording_proxy(
        server.address, ca_file=server.ca_file, certificate=strange.issue("impostor")
    ) as impostor:
        fooled = connect(impostor.address, auth, **options)
        unaware = connect(server.address, auth, **{**options, "ca_file": str(strange.ca_file)})
        system = connect(server.address, auth, **{**options, "ca_file": None})
        for destination in (fooled, unaware, system):
            with pytest.raises(
                DestinationUnavailable, match="its certificate is not trusted"
            ) as caught:
                destination.observe(PLACE)
            assert "ca_file" in (caught.value.hint or "")
            assert caught.value.sent is False
            destination.close()
        assert impostor.seen == []


def test_sealing_is_waited_out(server: Production, tmp_path: Path) -> None:
    """Sealed, everything is retryable and says so; unsealed, the same connection works again."""
    auth, options = login(server, tmp_path)
    destination = connect(server.address, auth, **options)
    move(destination, 1)
    token = destination.observe(PLACE).token

    server.seal()
    try:
        for attempt in (
            lambda: destination.observe(PLACE),
            lambda: destination.activate(PLACE, new_entry(2), expected=token),
            destination.probe,
        ):
            with pytest.raises(DestinationUnavailable, match="sealed") as caught:
                attempt()
            assert caught.value.retryable
    finally:
        server.unseal(server.nodes[0])

    assert destination.observe(PLACE).version_id == new_entry(1).version_id
    destination.activate(PLACE, new_entry(2), expected=token)
    assert destination.observe(PLACE).version_id == new_entry(2).version_id
    destination.close()


def test_a_restart_is_waited_out(server: Production, tmp_path: Path) -> None:
    """A server that is ended and started again has lost nothing, and neither have we."""
    auth, options = login(server, tmp_path)
    destination = connect(server.address, auth, **options)
    move(destination, 1)

    server.nodes[0].stop()
    with pytest.raises(DestinationUnavailable) as caught:
        destination.observe(PLACE)
    assert caught.value.retryable
    server.nodes[0].start()
    server.unseal(server.nodes[0])

    assert destination.observe(PLACE).version_id == new_entry(1).version_id
    destination.close()


def test_tokens_that_end_are_replaced(server: Production, tmp_path: Path) -> None:
    """A token that cannot be renewed beyond two seconds, or that has five uses, stops nothing."""
    for role in ({"ttl": "1s", "token_max_ttl": "2s"}, {"token_num_uses": 5}):
        auth, options = login(server, tmp_path, **role)
        destination = connect(server.address, auth, **options)
        for seed in range(1, 6):
            move(destination, seed)
            time.sleep(0.7 if "ttl" in role else 0)
        assert destination.observe(PLACE).token == "5"
        destination.close()


def test_a_revoked_token_is_replaced(server: Production, tmp_path: Path) -> None:
    """Somebody who revokes our token costs us one more login; without the role we are denied."""
    auth, options = login(server, tmp_path)
    destination = connect(server.address, auth, **options)
    move(destination, 1)
    for step in (destination.observe, lambda place: move(destination, 2)):
        token = destination._login._client.token
        server.call("POST", "auth/token/revoke", {"token": token})
        step(PLACE)
        assert destination._login._client.token != token

    token = destination._login._client.token
    server.call("DELETE", f"auth/approle/role/{options['prefix']}")
    server.call("POST", "auth/token/revoke", {"token": token})
    with pytest.raises(Denied) as caught:
        destination.observe(PLACE)
    assert "secret id" in (caught.value.hint or "")
    destination.close()


def test_the_printed_policy_reaches_nothing_else(server: Production, tmp_path: Path) -> None:
    """Neither a neighbour's entry, nor the list of entries, nor another mount."""
    auth, options = login(server, tmp_path)
    destination = connect(server.address, auth, **options)
    move(destination, 1)
    neighbour = connect(server.address, auth, **{**options, "prefix": f"{options['prefix']}x"})

    for attempt in (
        lambda: neighbour.observe(PLACE),
        lambda: neighbour.activate(PLACE, new_entry(2), expected="0"),
    ):
        with pytest.raises(Denied):
            attempt()
    reach = destination._login
    for method, path in (
        ("list", f"{MOUNT}/metadata"),
        ("get", "sys/mounts"),
        ("post", "sys/seal"),
    ):
        with pytest.raises(Forbidden):
            reach.send(method, f"/v1/{path}", {} if method == "post" else None)
    for one in (destination, neighbour):
        one.close()
