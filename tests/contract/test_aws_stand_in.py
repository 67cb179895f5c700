"""The stand-in for AWS is at least as strict as the service: each rule is met by plain boto3."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.config import Config
from botocore.exceptions import ClientError

from keyturn.testing.aws import REGION, StandIn, stand_in
from keyturn.testing.aws_access import allows
from keyturn.testing.aws_strict import DAY
from support.aws import agent, labels, new_prefix, versions


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    """Give one stand-in to all tests."""
    with stand_in(tmp_path_factory.mktemp("aws"), rate=100_000) as one:
        yield one


@pytest.fixture
def name() -> str:
    """Give a name that no other test uses."""
    return f"{new_prefix()}/entry"


def code(call: Callable[[], object]) -> str:
    """Return the code with which a call is refused."""
    with pytest.raises(ClientError) as refused:
        call()
    found: str = refused.value.response["Error"]["Code"]
    return found


def token() -> str:
    """Return a new ClientRequestToken."""
    return str(uuid.uuid4())


# --- versions and labels --------------------------------------------------------------------


def test_a_token_is_one_versions_for_ever(server: StandIn, name: str) -> None:
    """The same data again do nothing, wherever the labels are; others are refused."""
    raw, one = agent(server), token()
    raw.create_secret(Name=name, SecretString="a", ClientRequestToken=one)
    raw.create_secret(Name=name, SecretString="a", ClientRequestToken=one)
    for stages in (["AWSCURRENT"], ["AWSPENDING"]):
        for text, fine in (("a", True), ("b", False)):
            wanted = {"SecretId": name, "SecretString": text, "ClientRequestToken": one}
            put = lambda w=wanted, s=stages: raw.put_secret_value(**w, VersionStages=s)  # noqa: E731
            assert (put()["VersionId"] == one) if fine else (code(put) == "ResourceExistsException")
    staged = token()
    raw.put_secret_value(
        SecretId=name, SecretString="c", ClientRequestToken=staged, VersionStages=["AWSPENDING"]
    )
    again = {"SecretId": name, "SecretString": "d", "ClientRequestToken": staged}
    assert code(lambda: raw.put_secret_value(**again)) == "ResourceExistsException"
    assert code(lambda: raw.update_secret(**again)) == "ResourceExistsException"
    assert labels(server, name) == {"AWSCURRENT": one, "AWSPENDING": staged}
    assert code(lambda: raw.create_secret(Name=name, SecretString="a")) == "ResourceExistsException"


def test_awscurrent_moves_only_from_where_it_is(server: StandIn, name: str) -> None:
    """Without its holder, with another one, and off the last version are all refused."""
    raw, first, second = agent(server), token(), token()
    raw.create_secret(Name=name, SecretString="a", ClientRequestToken=first)
    raw.put_secret_value(
        SecretId=name, SecretString="b", ClientRequestToken=second, VersionStages=["AWSPENDING"]
    )

    def move(**ends: str) -> Any:
        return raw.update_secret_version_stage(SecretId=name, VersionStage="AWSCURRENT", **ends)

    refused = "InvalidParameterException"
    assert code(lambda: move(MoveToVersionId=second)) == refused
    assert code(lambda: move(MoveToVersionId=second, RemoveFromVersionId=second)) == refused
    assert code(lambda: move(RemoveFromVersionId=first)) == refused
    assert code(move) == refused
    unknown = token()
    ends = {"MoveToVersionId": unknown, "RemoveFromVersionId": first}
    assert code(lambda: move(**ends)) == "ResourceNotFoundException"
    move(MoveToVersionId=second, RemoveFromVersionId=first)
    held = {"AWSCURRENT": second, "AWSPREVIOUS": first, "AWSPENDING": second}
    assert labels(server, name) == held
    assert raw.get_secret_value(SecretId=name)["SecretString"] == "b"


def test_labels_of_others_survive_a_move(server: StandIn, name: str) -> None:
    """A new value takes AWSCURRENT and nothing else from the version before."""
    raw, first = agent(server), token()
    raw.create_secret(Name=name, SecretString="a", ClientRequestToken=first)
    raw.update_secret_version_stage(SecretId=name, VersionStage="mine", MoveToVersionId=first)
    raw.put_secret_value(SecretId=name, SecretString="b")
    raw.update_secret(SecretId=name, SecretString="c")
    assert labels(server, name)["mine"] == first
    assert len(set(labels(server, name).values())) == 3


def test_versions_without_labels_are_not_described(server: StandIn, name: str) -> None:
    """They can be read by their id until the service deletes them."""
    raw = agent(server)
    first = raw.create_secret(Name=name, SecretString="a")["VersionId"]
    for text in "bc":
        raw.put_secret_value(SecretId=name, SecretString=text)
    assert first not in raw.describe_secret(SecretId=name)["VersionIdsToStages"]
    assert raw.get_secret_value(SecretId=name, VersionId=first)["SecretString"] == "a"


def test_a_first_value_gets_awscurrent(server: StandIn, name: str) -> None:
    """Whatever labels were asked for (rule 8)."""
    raw = agent(server)
    raw.create_secret(Name=name)
    raw.put_secret_value(SecretId=name, SecretString="a", VersionStages=["AWSPENDING"])
    assert labels(server, name).keys() == {"AWSCURRENT", "AWSPENDING"}


# --- quotas ---------------------------------------------------------------------------------


def test_a_value_has_at_most_65536_bytes(server: StandIn, name: str) -> None:
    """Bytes, not characters; text and binary, made and added."""
    raw = agent(server)
    raw.create_secret(Name=name, SecretString="x" * 65_536)
    for value in ({"SecretString": "é" * 32_769}, {"SecretBinary": b"x" * 65_538}):
        assert (
            code(lambda v=value: raw.put_secret_value(SecretId=name, **v)) == "ValidationException"
        )
        assert (
            code(lambda v=value: raw.create_secret(Name=f"{name}2", **v)) == "ValidationException"
        )


def test_all_versions_together_have_at_most_20_labels(server: StandIn, name: str) -> None:
    """By a put and by a move."""
    raw, first = agent(server), token()
    raw.create_secret(Name=name, SecretString="a", ClientRequestToken=first)
    for number in range(19):
        raw.update_secret_version_stage(
            SecretId=name, VersionStage=f"l{number}", MoveToVersionId=first
        )
    more = {"SecretId": name, "VersionStage": "one-more", "MoveToVersionId": first}
    assert code(lambda: raw.update_secret_version_stage(**more)) == "LimitExceededException"
    put = {"SecretId": name, "SecretString": "b", "VersionStages": ["one-more"]}
    assert code(lambda: raw.put_secret_value(**put)) == "LimitExceededException"


def test_a_secret_has_100_versions_and_none_goes_within_a_day(server: StandIn, name: str) -> None:
    """The hundred and first is refused; a day later the oldest without a label gives way."""
    raw, strict = agent(server), server.strict()
    first = raw.create_secret(Name=name, SecretString="a")["VersionId"]
    for number in range(99):
        raw.put_secret_value(SecretId=name, SecretString=str(number))
    put = {"SecretId": name, "SecretString": "one more"}
    assert code(lambda: raw.put_secret_value(**put)) == "LimitExceededException"
    now = strict.now
    try:
        strict.now = lambda: now() + DAY + 60
        raw.put_secret_value(**put)
    finally:
        strict.now = now
    assert versions(server, name) == 100
    gone = {"SecretId": name, "VersionId": first}
    assert code(lambda: raw.get_secret_value(**gone)) == "ResourceNotFoundException"


def test_writes_are_throttled_and_reads_are_not(tmp_path: Path) -> None:
    """At most so many in a second, of all kinds together."""
    with stand_in(tmp_path, rate=5) as one:
        raw = agent(one)
        raw.create_secret(Name="x", SecretString="a")
        seen = [
            code_or_ok(lambda n=n: raw.put_secret_value(SecretId="x", SecretString=str(n)))
            for n in range(40)
        ]
        assert "ThrottlingException" in seen
        assert seen[0] == "ok"
        assert all(raw.get_secret_value(SecretId="x") for _ in range(10))


def code_or_ok(call: Callable[[], object]) -> str:
    """Return how a call ends."""
    try:
        call()
    except ClientError as error:
        return str(error.response["Error"]["Code"])
    return "ok"


# --- deleted secrets, replicas --------------------------------------------------------------


def test_what_is_marked_for_deletion_takes_nothing(server: StandIn, name: str) -> None:
    """Neither reads nor writes, nor the same name again, until it is restored."""
    raw = agent(server)
    version = raw.create_secret(Name=name, SecretString="a")["VersionId"]
    raw.delete_secret(SecretId=name)
    moved = {"SecretId": name, "VersionStage": "x", "MoveToVersionId": version}
    for call in (
        lambda: raw.get_secret_value(SecretId=name),
        lambda: raw.put_secret_value(SecretId=name, SecretString="b"),
        lambda: raw.update_secret_version_stage(**moved),
        lambda: raw.tag_resource(SecretId=name, Tags=[{"Key": "a", "Value": "b"}]),
        lambda: raw.create_secret(Name=name, SecretString="a"),
    ):
        assert code(call) == "InvalidRequestException"
    assert raw.describe_secret(SecretId=name)["DeletedDate"]
    raw.restore_secret(SecretId=name)
    assert raw.get_secret_value(SecretId=name)["SecretString"] == "a"


def test_a_replica_takes_no_writes(server: StandIn, name: str) -> None:
    """It shows what its primary shows."""
    raw = agent(server)
    raw.create_secret(Name=name, SecretString="a", AddReplicaRegions=[{"Region": "eu-central-1"}])
    there = agent(server, region="eu-central-1")
    assert there.get_secret_value(SecretId=name)["SecretString"] == "a"
    put = {"SecretId": name, "SecretString": "b"}
    assert code(lambda: there.put_secret_value(**put)) == "InvalidParameterException"


# --- who may --------------------------------------------------------------------------------


def test_what_is_not_signed_right_is_refused(server: StandIn, name: str) -> None:
    """No signature, unknown keys, another secret, an ended session, a body changed on its way."""
    role = server.access.new_role(server.account, "ended", life=timedelta(seconds=-1))
    wrong = [
        ({"access": "AKIAUNKNOWN"}, "UnrecognizedClientException"),
        ({"secret": "another"}, "InvalidSignatureException"),
        ({"token": "another"}, "UnrecognizedClientException"),
    ]
    for change, expected in wrong:
        who = server.access.new_keys(server.account, user="x")
        for key, value in change.items():
            kept = type(who)(**{f: getattr(who, f) for f in who.__slots__})
            setattr(kept, key, value)
        assert code(lambda k=kept: agent(server, k).describe_secret(SecretId=name)) == expected
    ended = server.access.session(role, "over")
    call = lambda: agent(server, ended).describe_secret(SecretId=name)  # noqa: E731
    assert code(call) == "ExpiredTokenException"
    line = http.client.HTTPConnection("127.0.0.1", server.front.place[1])
    headers = {"X-Amz-Target": "secretsmanager.DescribeSecret"}
    line.request("POST", "/", body=b"{}", headers=headers)
    answer = line.getresponse()
    assert (answer.status, b"MissingAuthenticationToken" in answer.read()) == (403, True)
    seen, _ = server.front.seen[0]
    signed = {key: value for key, value in seen.headers.items() if key != "content-length"}
    line.request("POST", "/", body=seen.body + b" ", headers=signed)
    answer = line.getresponse()
    assert (answer.status, b"InvalidSignature" in answer.read()) == (403, True)
    line.close()


def test_a_policy_allows_what_it_says(server: StandIn, name: str) -> None:
    """Wildcards match, a deny wins, an unknown condition allows nothing, silence refuses."""
    arn = f"arn:aws:secretsmanager:{REGION}:{server.account}:secret:{name}"
    allow = {"Effect": "Allow", "Action": "secretsmanager:Get*", "Resource": f"{arn}-??????"}
    get = "secretsmanager:GetSecretValue"
    assert allows({"Statement": allow}, get, f"{arn}-abcdef", {})
    assert not allows({"Statement": allow}, get, f"{arn}-abcdefg", {})
    assert not allows({"Statement": allow}, "secretsmanager:PutSecretValue", f"{arn}-abcdef", {})
    assert not allows(
        {"Statement": {**allow, "Condition": {"Bool": {"x": "y"}}}}, get, f"{arn}-abcdef", {}
    )
    deny = {"Effect": "Deny", "Action": "*", "Resource": "*"}
    assert not allows({"Statement": [allow, deny]}, get, f"{arn}-abcdef", {})

    agent(server).create_secret(Name=name, SecretString="a")
    who = server.access.new_keys(server.account, user="reader", policy={"Statement": [allow]})
    assert agent(server, who).get_secret_value(SecretId=name)["SecretString"] == "a"
    put = lambda: agent(server, who).put_secret_value(SecretId=name, SecretString="b")  # noqa: E731
    assert code(put) == "AccessDeniedException"
    absent = lambda: agent(server, who).get_secret_value(SecretId=f"{name}x")  # noqa: E731
    assert code(absent) == "AccessDeniedException"  # not even that it is not there


def test_an_account_sees_its_own_secrets_only(server: StandIn, name: str) -> None:
    """The keys say in which account a request is made."""
    agent(server).create_secret(Name=name, SecretString="a")
    other = server.access.new_keys("999999999999", user="other")
    call = lambda: agent(server, other).get_secret_value(SecretId=name)  # noqa: E731
    assert code(call) == "ResourceNotFoundException"


# --- from the command line ------------------------------------------------------------------


def test_it_starts_from_the_command_line(tmp_path: Path) -> None:
    """It prints what to put in a configuration, and that works."""
    command = [
        sys.executable,
        "-m",
        "keyturn.testing.aws",
        "--port",
        "0",
        "--folder",
        str(tmp_path),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={"PATH": os.environ["PATH"]}
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(7)]
        try:
            found = yaml.safe_load("".join(lines))["connections"]["aws"]
            keys = json.loads(Path(found["auth"]["file"]).read_text())
            client = boto3.session.Session().client(
                "secretsmanager", region_name=found["region"], endpoint_url=found["endpoint"],
                aws_access_key_id=keys["AccessKeyId"], aws_secret_access_key=keys["SecretAccessKey"],
                config=Config(proxies={}),
            )  # fmt: skip
            client.create_secret(Name="hello", SecretString="{}")
            assert client.get_secret_value(SecretId="hello")["SecretString"] == "{}"
        finally:
            process.terminate()
    assert found["type"] == "aws"
