"""Nothing of the surroundings is trusted: among traps alone everything works, and none is touched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keyturn.testing import openbao
from keyturn.testing.aws import StandIn, connection, stand_in
from keyturn.testing.azure import Cloud, cloud
from keyturn.testing.resolver import as_text
from support.postgres import Cluster, postgres
from support.running import Keyturn
from support.traps import Traps, traps

__all__ = ["postgres"]  # a fixture


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openbao.Server]:
    """Give an OpenBao that speaks TLS, as it does in production: TLS libraries have traps as well."""
    with openbao.dev_server(tmp_path_factory.mktemp("openbao"), tls=True) as one:
        yield one


@pytest.fixture
def laid(tmp_path: Path) -> Iterator[Traps]:
    """Give surroundings full of traps."""
    with traps(tmp_path / "traps") as one:
        yield one


@pytest.fixture
def aws(tmp_path: Path) -> Iterator[StandIn]:
    """Give a stand-in for AWS that speaks TLS."""
    with stand_in(tmp_path / "aws", tls=True) as one:
        yield one


def installation(
    folder: Path, server: openbao.Server | None, laid: Traps, aws: StandIn | None = None
) -> Keyturn:
    """Make a Keyturn with a file and an OpenBao per agent, perhaps AWS, that runs among the traps."""
    (folder / "keyturn").mkdir()
    one = Keyturn(folder / "keyturn", agents=0)
    places = [{"to": "files", "path": "one"}]
    if server is not None:
        one.content["connections"]["bao"] = {
            "type": "vault",
            "call_deadline": "1s",
            "address": server.address,
            "ca_file": str(server.ca_file),
            "auth": {"method": "token", "token_file": str(server.token_file)},
            "prefix": folder.name,
        }
        places.append({"to": "bao", "path": "one"})
    one.content["agents"] = {"one": {"destinations": places}}
    one.write()
    if aws is not None:
        where = {**connection(aws, aws.keys_file(folder)), "staleness": "0s"}
        role = aws.access.new_role(aws.account, "among-traps")
        one.content["connections"]["aws"] = {
            **where, "call_deadline": "1s", "prefix": folder.name, "role_arn": role.arn,
        }  # fmt: skip
        places.append({"to": "aws", "path": "one"})
        one.write()
    # As systemd starts it: `python -I` closes what Python itself takes from the environment.
    one.python = [sys.executable, "-I"]
    one.environ = laid.environ()
    return one


def shown(server: openbao.Server, path: str) -> dict[str, Any]:
    """Read the entry as root, without any code of ours."""
    found = json.loads(openbao.call(server, "GET", f"kv/data/{path}"))
    values: dict[str, Any] = found["data"]["data"]
    return values


def life(keyturn: Keyturn) -> None:
    """Do everything that reaches out: publish, rotate, look, probe, revoke with and without more."""
    keyturn.wait_first()
    assert keyturn.ask("rotate", "one", "--wait")[0] == 0
    assert keyturn.ask("check", "--probe")[0] == 0
    assert keyturn.ask("reload")[0] == 0
    assert keyturn.ask("revoke", "one", "--reissue", "--wait", "--reason", "trap")[0] == 0
    held = keyturn.held("one")
    keyturn.revocations.write_text(f"version:{held['version']} at=2020-01-01T00:00:00Z\n")
    keyturn.signal(signal.SIGUSR1)
    assert keyturn.ask("suspend", "one")[0] == 0
    assert keyturn.ask("resume", "one")[0] == 0
    assert keyturn.run("audit", "--verify").returncode == 0


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_whole_life_among_traps_touches_none(
    tmp_path: Path, server: openbao.Server, laid: Traps, postgres: Cluster, kind: str
) -> None:
    """Daemon and commands: 0 bytes to a trap, 0 programs run, 0 trap files opened, TLS verified."""
    keyturn = installation(tmp_path, server, laid)
    if kind == "postgresql":
        keyturn.content["store"] = {
            "url": postgres.new_database(), "state_dir": str(keyturn.folder / "state"),
        }  # fmt: skip
        keyturn.write()
    with keyturn:
        life(keyturn)
        held = shown(server, f"{tmp_path.name}/one")
        assert held == keyturn.held("one")
    assert laid.caught() == []


def test_a_whole_life_with_aws_among_traps_touches_none(
    tmp_path: Path, server: openbao.Server, laid: Traps, aws: StandIn
) -> None:
    """A role by keys of a named file: no ~/.aws, no AWS_*, no metadata service, no program."""
    keyturn = installation(tmp_path, server, laid, aws)
    with keyturn:
        life(keyturn)
        secret = aws.secret(f"{tmp_path.name}/one")
        assert secret is not None
        text = secret.versions[str(secret.default_version_id)]["secret_string"]
        assert json.loads(text) == keyturn.held("one")
    assert laid.caught() == []
    assert {call.operation for call, _ in aws.front.seen} >= {
        "AssumeRole", "GetCallerIdentity", "CreateSecret", "PutSecretValue",
    }  # fmt: skip


def test_with_the_daemon_down_no_trap_is_touched(
    tmp_path: Path, server: openbao.Server, laid: Traps
) -> None:
    """Commands that work on the store itself take nothing of the surroundings either."""
    keyturn = installation(tmp_path, server, laid)
    with keyturn:
        keyturn.wait_first()
    for words in (("status",), ("suspend", "one"), ("audit",), ("revoke", "one", "--reason", "x")):
        assert keyturn.ask(*words)[0] == 0, words

    assert laid.caught() == []


# Leads the names of Azure to the stand-in after the first statements of every process of ours.
LED = """
import sys
import keyturn.entry
import runpy
from keyturn.testing.resolver import from_text, resolving
with resolving(from_text(sys.argv[1])):
    sys.argv = sys.argv[3:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """Give an Azure under the real names."""
    with cloud(tmp_path_factory.mktemp("azure")) as one:
        yield one


@pytest.mark.parametrize("method", ["managed-identity", "workload-identity", "client-secret"])
def test_a_whole_life_with_azure_among_traps_touches_none(
    tmp_path: Path, azure: Cloud, laid: Traps, method: str
) -> None:
    """No variable of a pod, a function or a command line, no cache of a login, no other program."""
    keyturn = installation(tmp_path, None, laid)
    auth = {"method": method, "tenant_id": azure.entra.tenant}
    if method == "managed-identity":
        identity, auth = azure.machine(), {"method": method}
    elif method == "client-secret":
        identity, path = azure.application()
        auth["secret_file"] = str(path)
    else:
        identity, path = azure.federated("system:serviceaccount:keyturn:keyturn")
        auth["token_file"] = str(path)
    azure.vault.grant(identity)
    keyturn.content["connections"]["azure"] = {
        "type": "azure",
        "vault": azure.vault.base,
        "ca_file": str(azure.ca_file),
        "call_deadline": "1900ms",
        "auth": {**auth, "client_id": identity.client_id},
        "prefix": method,
    }
    keyturn.content["agents"]["one"]["destinations"].append({"to": "azure", "path": "one"})
    keyturn.write()
    keyturn.python = [sys.executable, "-I", "-c", LED, as_text(azure.places)]
    with keyturn:
        life(keyturn)
        found = azure.vault.latest(f"{method}-one")
        assert found is not None
        assert json.loads(found.value) == keyturn.held("one")
    assert laid.caught() == []
    assert any(call.method == "PUT" for call, _ in azure.server.seen)


# --- the traps themselves -------------------------------------------------------------------


def test_the_traps_can_catch(tmp_path: Path, laid: Traps, server: openbao.Server) -> None:
    """What trusts its surroundings is caught: a proxy, a program, a module, netrc, TLS keys, libpq."""
    code = {
        "proxy": "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9/', timeout=2)",
        "program": "import subprocess; subprocess.run(['vault', 'login'])",
        "netrc": "import requests; requests.get('http://127.0.0.1:9/', timeout=2)",
        "hvac": "import hvac; hvac.Client().sys.read_health_status()",
        "token": "import os; os.environ.pop('VAULT_TOKEN'); import hvac; hvac.Client()",
        "libpq": "import psycopg; psycopg.connect('dbname=x', connect_timeout=2)",
        "keys": "import ssl; ssl.create_default_context()",
        "boto3": "import boto3; boto3.client('sts', region_name='eu-west-1')",
        "models": "import os; [os.environ.pop(n) for n in list(os.environ) if n.startswith('AWS_')]; import boto3; boto3.client('sts', region_name='eu-west-1')",
        "instance": "import botocore.utils as u; u.InstanceMetadataFetcher(timeout=1, num_attempts=1, base_url=__import__('os').environ['IMDS_ENDPOINT']).retrieve_iam_role_credentials()",
        "azure": "import os; del os.environ['IDENTITY_SERVER_THUMBPRINT']; import azure.identity as a; a.ManagedIdentityCredential().get_token('https://x/.default')",
    }
    expected = {
        "proxy": "sent", "program": "ran vault login", "netrc": "opened", "hvac": "sent",
        "token": ".vault-token", "libpq": "pg_service", "keys": "tls-keys",
        "boto3": ".aws/config", "models": "models/endpoints.json", "instance": "sent",
        "azure": "sent",
    }  # fmt: skip
    environ = {k: v for k, v in laid.environ().items() if not k.startswith("PYTHON")}
    for name, text in code.items():
        done = subprocess.run(
            [sys.executable, "-c", text], env=environ, capture_output=True, timeout=60, check=False
        )
        caught = " ".join(laid.caught())
        assert expected[name] in caught, (name, caught, done.stderr[-300:])
    subprocess.run(
        [sys.executable, "-c", ""], env={**environ, "PYTHONPATH": str(laid.modules)}, check=True
    )
    assert "ran module" in laid.caught()


def test_every_trap_is_named_in_the_environment(laid: Traps) -> None:
    """The list does not shrink unnoticed."""
    names = set(laid.environ())
    for name in ("http_proxy", "HTTPS_PROXY", "ALL_PROXY", "VAULT_ADDR", "BAO_TOKEN", "NETRC",
                 "REQUESTS_CA_BUNDLE", "SSL_CERT_DIR", "PGHOSTADDR", "PGPASSFILE", "PYTHONPATH",
                 "SSLKEYLOGFILE", "VAULT_CLIENT_CERT", "XDG_CONFIG_HOME", "AWS_PROFILE",
                 "AWS_ENDPOINT_URL", "AWS_CONFIG_FILE", "BOTO_CONFIG",
                 "AZURE_CLIENT_SECRET",
                 "MSI_ENDPOINT", "IDENTITY_ENDPOINT", "IMDS_ENDPOINT"):  # fmt: skip
        assert name in names
    assert len(names) > 80
    assert os.access(laid.programs / "openssl", os.X_OK)
