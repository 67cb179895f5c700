"""AWS Secrets Manager: the contract against the strict stand-in, over TLS, by the printed policy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

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
