"""Logins at Azure by the unmodified azure-identity: each method, their ends, and strangers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from azure.core.exceptions import HttpResponseError
from azure.identity import ClientSecretCredential
from azure.keyvault.secrets import SecretClient
from azure.keyvault.secrets._shared import http_challenge_cache

from keyturn.destinations.azure_login import AuthOptions, Login, https_origin
from keyturn.errors import Denied, DestinationUnavailable
from keyturn.testing.azure import Cloud, Identity
from keyturn.testing.contract import PLACE, new_entry
from keyturn.testing.wire import Answer, Call, Forward, as_json
from support.azure import by_secret, connect, reachable_cloud, root, shown

SUBJECT = "system:serviceaccount:keyturn:keyturn"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """Give one cloud to all tests; each has a prefix of its own."""
    with reachable_cloud(tmp_path_factory.mktemp("azure")) as cloud:
        yield cloud


@pytest.fixture(autouse=True)
def as_before(one: Cloud) -> Iterator[None]:
    """Leave no rule behind."""
    yield
    one.server.rule = one.metadata.rule = lambda call, app: app(call)
    one.entra.life = 3599


def login(one: Cloud, method: str) -> tuple[AuthOptions, Identity]:
    """Make an identity with every right that logs in by this method."""
    named: dict[str, Any] = {"method": method, "tenant_id": one.entra.tenant}
    if method == "managed-identity":
        identity, named = one.machine(), {"method": method}
    elif method == "client-secret":
        identity, path = one.application()
        named["secret_file"] = str(path)
    elif method == "client-certificate":
        identity, path = one.certified()
        named["certificate_file"] = str(path)
    else:
        identity, path = one.federated(SUBJECT)
        named["token_file"] = str(path)
    one.vault.grant(identity)
    return AuthOptions(client_id=identity.client_id, **named), identity


METHODS = ["managed-identity", "workload-identity", "client-secret", "client-certificate"]


@pytest.mark.parametrize("method", METHODS)
def test_each_method_logs_in_once_and_rotates(one: Cloud, method: str) -> None:
    """One login serves many calls; its class asks nobody but the place that the file names."""
    auth, _ = login(one, method)
    destination = connect(one, auth)
    before = len(one.server.seen), len(one.metadata.seen)

    for seed in (1, 2, 3):
        destination.activate(PLACE, new_entry(seed), expected="")
        assert destination.observe(PLACE).version_id == new_entry(seed).version_id

    calls = [*one.server.seen[before[0] :], *one.metadata.seen[before[1] :]]
    asked = [call for call, _ in calls if call.path.endswith("/token")]
    assert len(asked) == 1
    assert not [call for call, _ in calls if "discovery/instance" in call.path]
    assert method in destination.probe()
    assert (destination.login_ends_in is not None) is (method == "client-certificate")
    destination.close()


def test_the_end_of_a_certificate_is_known_beforehand(one: Cloud) -> None:
    """The metric that warns a week ahead has what it needs."""
    auth, _ = login(one, "client-certificate")
    destination = connect(one, auth)
    assert destination.login_ends_in is None
    destination.observe(PLACE)
    left = destination.login_ends_in
    assert left is not None
    assert timedelta(days=29) < left < timedelta(days=31)
    destination.close()


@pytest.mark.parametrize("method", METHODS)
def test_a_token_that_is_refused_midway_is_replaced_once(one: Cloud, method: str) -> None:
    """After a revocation of tokens, or a token of seconds, work goes on by a new login."""
    auth, _ = login(one, method)
    destination = connect(one, auth)
    destination.activate(PLACE, new_entry(1), expected="")
    time.sleep(0.01)
    one.entra.void()
    before = len(one.server.seen) + len(one.metadata.seen)

    destination.activate(PLACE, new_entry(2), expected="")

    assert destination.observe(PLACE).version_id == new_entry(2).version_id
    assert len(one.server.seen) + len(one.metadata.seen) - before < 16
    one.entra.life = 1
    one.entra.void()
    for seed in (3, 4):
        time.sleep(1.1)
        destination.activate(PLACE, new_entry(seed), expected="")
    assert len(one.vault.secrets[destination.place(PLACE)].versions) == 4
    destination.close()


def test_a_vault_that_refuses_every_token_is_denied(one: Cloud) -> None:
    """A second refusal after a new login is no endless loop."""
    destination = connect(one, root(one))
    destination.observe(PLACE)

    def refuse(call: Call, app: Forward) -> Answer:
        if not call.path.startswith("/secrets"):
            return app(call)
        return app(replace(call, headers={"host": call.headers["host"]}))

    one.server.rule = refuse
    before = len(one.server.seen)
    with pytest.raises(Denied, match="refuses the token") as refused:
        destination.observe(PLACE)
    assert refused.value.hint
    assert len(one.server.seen) - before < 12
    destination.close()


@pytest.mark.parametrize("method", ["client-secret", "client-certificate", "workload-identity"])
def test_a_credential_file_that_was_replaced_is_read_anew(one: Cloud, method: str) -> None:
    """Whoever rotates our own login puts a new file there, and nothing is restarted."""
    auth, _ = login(one, method)
    assert auth.file is not None
    good = auth.file.read_text()
    auth.file.write_text(good[: len(good) // 2])
    destination = connect(one, auth)
    with pytest.raises(Denied) as refused:
        destination.observe(PLACE)
    assert refused.value.hint
    assert good[:20] not in f"{refused.value} {refused.value.hint}"

    auth.file.write_text(good)

    assert destination.observe(PLACE).exists is False
    destination.close()


def test_a_refusal_says_what_to_do_and_quotes_nothing(one: Cloud) -> None:
    """The number of Entra's error is named with its remedy; its text is not."""
    auth, identity = login(one, "client-secret")
    wrong = {
        "7000222": {}, "90002": {"tenant_id": "11111111-2222-3333-4444-555555555555"},
        "700016": {"client_id": "11111111-2222-3333-4444-555555555555"},
    }  # fmt: skip
    for number, change in wrong.items():
        identity.secret_over = number == "7000222"
        destination = connect(one, auth.model_copy(update=change))
        with pytest.raises(Denied, match="login") as refused:
            destination.observe(PLACE)
        assert "Trace" not in f"{refused.value} {refused.value.hint}"
        if number != "90002":  # msal asks for the tenant's endpoints, and gives no number then
            assert f"AADSTS{number}" in refused.value.hint
        destination.close()


def test_a_machine_without_that_identity_is_denied(one: Cloud) -> None:
    """The metadata service knows no such identity: a person has to assign it."""
    destination = connect(one, AuthOptions(client_id="11111111-2222-3333-4444-555555555555"))
    with pytest.raises(Denied, match="login is refused") as refused:
        destination.observe(PLACE)
    assert "identity" in refused.value.hint
    destination.close()


def test_a_login_that_is_away_is_waited_for(one: Cloud) -> None:
    """An authority that does not answer stalls nothing: nothing was sent to the vault."""
    auth, _ = login(one, "client-secret")
    destination = connect(one, auth, authority="https://login.example.test")
    with pytest.raises(DestinationUnavailable, match="login") as away:
        destination.activate(PLACE, new_entry(1), expected="")
    assert away.value.sent is False
    destination.close()


def test_a_credential_file_open_to_others_is_refused(one: Cloud) -> None:
    """What anybody on the host could read counts as known."""
    auth, _ = login(one, "workload-identity")
    assert auth.file is not None
    auth.file.chmod(0o644)
    destination = connect(one, auth)
    with pytest.raises(Denied, match="open to other users"):
        destination.observe(PLACE)
    destination.close()


# --- strangers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "resource",
    ["https://storage.azure.com", "https://vault.azure.net.evil.example", "https://net2"],
)
def test_a_challenge_for_a_foreign_resource_gets_no_token(one: Cloud, resource: str) -> None:
    """Somebody between who asks for a token of another service gets none, and none is asked for."""
    http_challenge_cache.clear()
    destination = connect(one, root(one))
    header = (
        f'Bearer authorization="{one.entra.authority}/{one.entra.tenant}", resource="{resource}"'
    )

    def ask(call: Call, app: Forward) -> Answer:
        if call.path.startswith("/secrets"):
            return as_json(401, {"error": {"code": "Unauthorized"}}, WWW_Authenticate=header)
        return app(call)

    one.server.rule = ask
    before = len(one.server.seen)
    for act in (
        lambda: destination.observe(PLACE),
        lambda: destination.activate(PLACE, new_entry(1), expected=""),
        destination.probe,
    ):
        with pytest.raises(Denied, match="no token was sent") as refused:
            act()
        assert refused.value.hint
    calls = [call for call, _ in one.server.seen[before:]]
    assert not [call for call in calls if "authorization" in call.headers]
    assert not [call for call in calls if call.path.endswith("/token")]
    assert not any(call.body for call in calls)
    destination.close()


def test_a_token_endpoint_elsewhere_gets_no_credential(one: Cloud) -> None:
    """A discovery document that leads to another host is not followed."""
    destination = connect(one, root(one))
    elsewhere = f"https://example.vault.azure.net/{one.entra.tenant}/oauth2/v2.0/token"

    def lead(call: Call, app: Forward) -> Answer:
        if call.path.endswith("openid-configuration"):
            base = one.entra.authority
            found = {"token_endpoint": elsewhere, "authorization_endpoint": base, "issuer": base}
            return as_json(200, found)
        return app(call)

    one.server.rule = lead
    before = len(one.server.seen)
    with pytest.raises(DestinationUnavailable, match="another host|does not name"):
        destination.observe(PLACE)
    assert not [call for call, _ in one.server.seen[before:] if call.body]
    destination.close()


def test_a_link_to_a_next_page_elsewhere_is_not_followed(one: Cloud) -> None:
    """A list that goes on at another host is a broken answer."""
    destination = connect(one, root(one))
    destination.activate(PLACE, new_entry(1), expected="")
    for link in ("https://login.microsoftonline.com/x?y=1", "http://example.vault.azure.net/x"):
        one.server.rule = lambda call, app, link=link: (
            as_json(200, {"value": [], "nextLink": link}) if "/versions" in call.path else app(call)
        )
        before = len(one.server.seen)
        with pytest.raises(DestinationUnavailable, match="makes no sense"):
            destination.activate(PLACE, new_entry(2), expected="")
        assert len(one.server.seen) == before + 1
    destination.close()


def test_what_a_pod_or_a_proxy_sets_is_not_looked_at(
    one: Cloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Even with the variables in this process requests go where the connection says, or nowhere."""
    for name in ("MSI_ENDPOINT", "IDENTITY_ENDPOINT", "AZURE_POD_IDENTITY_AUTHORITY_HOST",
                 "HTTPS_PROXY", "https_proxy", "AZURE_AUTHORITY_HOST"):  # fmt: skip
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("AZURE_FEDERATED_TOKEN_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AZURE_TENANT_ID", "trap")
    monkeypatch.setenv("AZURE_CLIENT_ID", "trap")
    monkeypatch.setenv("AZURE_REGIONAL_AUTHORITY_NAME", "westeurope")
    for method in ("workload-identity", "client-secret"):
        destination = connect(one, login(one, method)[0])
        if method == "workload-identity":
            assert destination.observe(PLACE).exists is False
        else:  # msal would go to the region's own host: refused before anything is sent
            with pytest.raises(DestinationUnavailable, match="does not name"):
                destination.observe(PLACE)
        destination.close()
    assert os.environ["MSI_ENDPOINT"]


# --- other clouds, emulators, agents ----------------------------------------------------------


def test_an_emulator_at_a_port_works(tmp_path: Path) -> None:
    """Its resource has no port, its ids and links have: nothing of the real names is assumed."""
    more = {"names": ("kv",), "domain": "example.test", "authority": "login.example.test"}
    with reachable_cloud(tmp_path / "emulator", port=8443, **more) as cloud:
        assert cloud.vault.base == "https://kv.example.test:8443"
        assert cloud.entra.resource == "https://example.test"
        destination = connect(cloud, root(cloud))
        for seed in range(40):
            located = destination.activate(PLACE, new_entry(seed), expected="")
        found = destination.observe(PLACE)
        assert (found.locator, found.version_id) == (located, new_entry(39).version_id)
        pages = [call for call, _ in cloud.server.seen if "$skiptoken" in call.query]
        assert pages
        assert destination.identity(PLACE).startswith("azure:kv.example.test:8443/")
        destination.close()


def test_a_sovereign_cloud_works(tmp_path: Path) -> None:
    """Another domain and another authority are two options."""
    more = {"domain": "vault.azure.cn", "authority": "login.chinacloudapi.cn"}
    with reachable_cloud(tmp_path / "china", **more) as cloud:
        destination = connect(cloud, root(cloud))
        destination.activate(PLACE, new_entry(1), expected="")
        assert destination.observe(PLACE).version_id == new_entry(1).version_id
        destination.close()


def test_several_vaults_do_not_get_into_each_other(tmp_path: Path) -> None:
    """Two connections with logins of their own: each has its entries, and its rights."""
    with reachable_cloud(tmp_path / "two", names=("one", "two")) as cloud:
        first, second = cloud.vaults.values()
        logins = []
        for vault in (first, second):
            identity, path = cloud.application()
            vault.grant(identity)
            logins.append(by_secret(cloud, identity, path))
        made = [
            connect(cloud, auth, vault=vault.base, prefix="p")
            for auth, vault in zip(logins, (first, second), strict=True)
        ]
        for number, destination in enumerate(made):
            destination.activate(PLACE, new_entry(number), expected="")
        names = [destination.place(PLACE) for destination in made]
        held = [
            shown(vault, name)["version"]
            for vault, name in zip((first, second), names, strict=True)
        ]
        assert held == [new_entry(0).version_id, new_entry(1).version_id]
        assert made[0].identity(PLACE) != made[1].identity(PLACE)
        crossed = connect(cloud, logins[0], vault=second.base, prefix="p")
        with pytest.raises(Denied, match="getSecret/action"):
            crossed.observe(PLACE)
        for destination in (*made, crossed):
            destination.close()


def test_an_agent_reads_with_the_plain_client(one: Cloud) -> None:
    """The unmodified SDK with its challenge verification on reads what was published, and only reads."""
    destination = connect(one, root(one))
    destination.activate(PLACE, new_entry(1), expected="")
    identity, _ = one.application()
    name = destination.place(PLACE)
    one.vault.grant(identity, {"getSecret/action"}, secret=name)
    credential = ClientSecretCredential(
        one.entra.tenant,
        identity.client_id,
        str(identity.secret),
        connection_verify=str(one.ca_file),
    )
    agent = SecretClient(one.vault.base, credential, connection_verify=str(one.ca_file))
    assert new_entry(1).secret.reveal() in str(agent.get_secret(name).value)
    with pytest.raises(HttpResponseError) as refused:
        agent.set_secret(name, "x")
    assert refused.value.status_code == 403
    for closing in (agent, credential, destination):
        closing.close()


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"method": "client-secret"},
        {"method": "client-secret", "tenant_id": "t", "client_id": "c"},
        {"method": "client-secret", "tenant_id": "t", "client_id": "c", "token_file": "/x"},
        {"method": "workload-identity", "client_id": "c", "token_file": "/x"},
        {"method": "managed-identity", "tenant_id": "t"},
        {"method": "managed-identity", "secret_file": "/x"},
        {"method": "client-certificate", "tenant_id": "t", "client_id": "c", "certificate_file": "x"},
        {"method": "default"},
    ],
)  # fmt: skip
def test_a_login_names_exactly_what_its_method_needs(options: dict[str, str]) -> None:
    """What a method does not use would be a mistake that nobody sees."""
    with pytest.raises(ValueError, match=r".*"):
        AuthOptions(**options)


def test_addresses_are_https_and_nothing_but_host_and_port() -> None:
    """No path, no user, no other scheme; the usual port and upper case make no other address."""
    assert https_origin("https://Name.Vault.Azure.net:443/") == "https://name.vault.azure.net"
    assert https_origin("https://kv.example.test:8443") == "https://kv.example.test:8443"
    for text in ("http://x.vault.azure.net", "https://", "https://u@x", "https://x/y", "https://x?y",
                 "https://x\\@y", "x.vault.azure.net", 7):  # fmt: skip
        with pytest.raises(ValueError, match=r".*"):
            https_origin(text)


def test_no_credential_is_in_a_text_of_the_login(one: Cloud) -> None:
    """A login that is printed by mistake shows nothing."""
    auth, identity = login(one, "client-secret")
    made = Login(
        auth=auth, vault=one.vault.base, authority=one.entra.authority, ca_file=str(one.ca_file),
        timeout=timedelta(seconds=5), name="kv",
    )  # fmt: skip
    token = made.get_token_info("https://vault.azure.net/.default").token
    for text in (repr(made), str(vars(made)), repr(auth), str(auth)):
        assert str(identity.secret) not in text or text == str(vars(made))
        assert token not in text
    made.close()
