"""What the tests of AWS share: a stand-in, connections to it, agents by plain boto3, the contract's hooks."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from keyturn.core.model import Target
from keyturn.destinations.aws import AwsDestination
from keyturn.destinations.aws_options import AwsOptions
from keyturn.testing.aws import REGION, StandIn
from keyturn.testing.aws_access import Principal
from keyturn.testing.contract import OTHER_STORE_ID, STORE_ID, DestinationContract
from keyturn.wiring import SystemClock

_NUMBERS = itertools.count(1)
_AGENTS: dict[tuple[str, ...], Any] = {}


def new_prefix() -> str:
    """Return a folder that no other test uses."""
    return f"p{next(_NUMBERS)}"


def options_for(one: StandIn, keys: Path, **more: Any) -> AwsOptions:
    """Return options that lead to a stand-in, as a configuration file gives them."""
    values = {
        "region": REGION,
        "endpoint": one.address,
        "sts_endpoint": one.address,
        "auth": {"method": "keys", "file": str(keys)},
        "prefix": new_prefix(),
        "write_limit": "1000/s",
        "staleness": "0s",
        "versions_per_day": 10_000,
        **({"ca_file": str(one.ca_file)} if one.ca_file else {}),
        **more,
    }
    given = {key: value for key, value in values.items() if value is not None}
    return AwsOptions.model_validate(given)


def connect(
    one: StandIn, keys: Path, *, store_id: str = STORE_ID, name: str = "aws", **more: Any
) -> AwsDestination:
    """Make a connection."""
    options = options_for(one, keys, **more)
    return AwsDestination(options, name=name, store_id=store_id, clock=SystemClock())


def agent(one: StandIn, who: Principal | None = None, region: str = REGION) -> Any:
    """Return a plain client of boto3, as agents have one: the same for the same, kept to the end."""
    who = who or one.root
    key = (one.address, who.access, who.secret, str(who.token), region)
    if key not in _AGENTS:
        _AGENTS[key] = _agent(one, who, region)
    return _AGENTS[key]


def _agent(one: StandIn, who: Principal, region: str) -> Any:
    return boto3.session.Session().client(
        "secretsmanager",
        region_name=region,
        endpoint_url=one.address,
        aws_access_key_id=who.access,
        aws_secret_access_key=who.secret,
        aws_session_token=who.token,
        verify=str(one.ca_file) if one.ca_file else None,
        config=Config(retries={"total_max_attempts": 1}, proxies={}),
    )


def labels(one: StandIn, name: str) -> dict[str, str]:
    """Return which version has which label, by the stand-in's own record."""
    secret = one.secret(name)
    assert secret is not None
    return {
        label: version for version, v in secret.versions.items() for label in v["version_stages"]
    }


def versions(one: StandIn, name: str) -> int:
    """Return how many versions there are, labelled or not."""
    secret = one.secret(name)
    return len(secret.versions) if secret is not None else 0


class AwsContract(DestinationContract):
    """The contract's hooks; `aws` and `raw` are set by the fixture of the destination."""

    aws: StandIn
    raw: Any

    def read_raw(self, destination: Any, target: Target) -> Mapping[str, Any] | None:
        try:
            found = self.raw.get_secret_value(SecretId=destination.place(target))
        except self.raw.exceptions.ResourceNotFoundException:
            return None
        values: Mapping[str, Any] = json.loads(found["SecretString"])
        return values

    def write_raw(self, destination: Any, target: Target, values: Mapping[str, Any]) -> None:
        name, text = destination.place(target), json.dumps(values)
        try:
            self.raw.put_secret_value(SecretId=name, SecretString=text)
        except self.raw.exceptions.ResourceNotFoundException:
            self.raw.create_secret(Name=name, SecretString=text)

    def sibling(self, destination: Any) -> AwsDestination | None:
        options = destination.options
        return AwsDestination(options, name="other", store_id=OTHER_STORE_ID, clock=SystemClock())

    def write_garbage(self, destination: Any, target: Target) -> bool:
        name = destination.place(target)
        if target.merge:
            self.raw.create_secret(Name=name, SecretBinary=b"\x00\xffno object")
        else:
            self.raw.create_secret(Name=name, SecretString='["no object"]')
        return True


class ByPolicyContract(AwsContract):
    """With what `keyturn policy aws` prints for the entries of the test, and no more."""

    who: Principal
    granted: list[Target]
    options: AwsOptions

    def _target(self, name: str, **more: Any) -> Target:
        target = super()._target(name, **more)
        self.granted.append(target)
        self.grant(self.granted)
        return target

    def grant(self, targets: list[Target]) -> None:
        """Give the login the policy for these entries; it holds at once."""
        entries = [(target, "disable") for target in targets]
        self.who.policy = json.loads(AwsDestination.least_policy(self.options, entries))

    @contextlib.contextmanager
    def denied(self, destination: Any) -> Iterator[bool]:
        """Take the entries out of the policy."""
        self.grant([])
        yield True
        self.grant(self.granted)
