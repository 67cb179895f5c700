"""AWS Secrets Manager: the contract against the strict stand-in, over TLS, by the printed policy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from moto.server import ThreadedMotoServer

from keyturn.core.model import Target
from keyturn.destinations.aws import AwsDestination
from keyturn.testing.aws import StandIn, stand_in
from support.aws import AwsContract, ByPolicyContract, agent, connect


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    """Give one stand-in that speaks TLS; each test has a prefix of its own."""
    with stand_in(tmp_path_factory.mktemp("aws"), tls=True, rate=1000) as one:
        yield one


class TestAws(AwsContract):
    """With keys that may do everything."""

    @pytest.fixture
    def destination(self, aws: StandIn, tmp_path: Path) -> Iterator[AwsDestination]:
        self.aws, self.raw = aws, agent(aws)
        one = connect(aws, aws.keys_file(tmp_path))
        yield one
        one.close()


class TestAwsByPolicy(ByPolicyContract):
    """With a role that has the printed policy and nothing else, and a KMS key."""

    @pytest.fixture
    def destination(self, aws: StandIn, tmp_path: Path) -> Iterator[AwsDestination]:
        self.aws, self.raw, self.granted = aws, agent(aws), []
        self.who = aws.access.new_keys(aws.account, user="keyturn")
        key = f"arn:aws:kms:eu-west-1:{aws.account}:key/11111111-2222-3333-4444-555555555555"
        one = connect(aws, aws.keys_file(tmp_path, self.who), kms_key_id=key, account=aws.account)
        self.options = one.options
        self.grant([])
        yield one
        one.close()


@pytest.fixture(scope="module")
def emulator() -> Iterator[Any]:
    """Give somebody else's emulator: moto as it is, without any rule of ours."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    _, port = server.get_host_and_port()
    root = SimpleNamespace(access="AKIAANYTHING", secret="anything", token=None)
    yield SimpleNamespace(address=f"http://127.0.0.1:{port}", root=root, ca_file=None)
    server.stop()


class TestSomebodyElsesEmulator(AwsContract):
    """Nothing of our stand-in is in the adapter: it keeps its promises where ours enforces none."""

    @pytest.fixture
    def destination(self, emulator: Any, tmp_path: Path) -> Iterator[AwsDestination]:
        self.aws, self.raw = emulator, agent(emulator)
        keys = tmp_path / "keys"
        keys.touch(mode=0o600)
        root = emulator.root
        keys.write_text(json.dumps({"AccessKeyId": root.access, "SecretAccessKey": root.secret}))
        one = connect(emulator, keys)
        yield one
        one.close()

    def read_raw(self, destination: Any, target: Target) -> Mapping[str, Any] | None:
        """Name the label: without it moto 5.2 gives what was current before the last move."""
        name = destination.place(target)
        try:
            found = self.raw.get_secret_value(SecretId=name, VersionStage="AWSCURRENT")
        except self.raw.exceptions.ResourceNotFoundException:
            return None
        values: Mapping[str, Any] = json.loads(found["SecretString"])
        return values
