"""Logins to AWS: each by its name, none from the surroundings; and the rights that they need."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from keyturn import ambient
from keyturn.core.model import Target
from keyturn.daemon import checks
from keyturn.destinations.aws import AwsDestination
from keyturn.destinations.aws_options import AwsOptions
from keyturn.errors import ConfigError, Denied, DestinationUnavailable
from keyturn.testing.aws import REGION, StandIn, connection, stand_in
from keyturn.testing.aws_access import Principal
from keyturn.testing.contract import PLACE, new_entry, publish
from keyturn.testing.resolver import resolving
from support.aws import agent, connect, options_for

ENTRIES = [(PLACE, "disable")]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StandIn]:
    """Give a stand-in to each test: some of them end the keys of others."""
    with stand_in(tmp_path / "aws", rate=1000) as one:
        yield one


def works(server: StandIn, keys: Path, **more: Any) -> AwsDestination:
    """Make a connection and publish by it."""
    destination = connect(server, keys, **more)
    publish(destination, PLACE, new_entry(1))
    assert destination.observe(PLACE).version_id == new_entry(1).version_id
    return destination


def file(path: Path, text: str) -> Path:
    """Write a credential file."""
    path.touch(mode=0o600)
    path.write_text(text)
    return path


def profile(one: Principal) -> str:
    """Return keys as a profile has them."""
    return f"aws_access_key_id = {one.access}\naws_secret_access_key = {one.secret}\n"


# --- where credentials come from ------------------------------------------------------------


def test_keys_of_a_file_in_each_form(server: StandIn, tmp_path: Path) -> None:
    """JSON as STS gives it, or an INI file with one section; replaced ones are read anew."""
    forms = [
        server.keys_file(tmp_path),
        file(tmp_path / "ini", f"[default]\n{profile(server.root)}"),
        file(tmp_path / "json", json.dumps({"aws_access_key_id": server.root.access,
                                            "aws_secret_access_key": server.root.secret})),
    ]  # fmt: skip
    for keys in forms:
        destination = works(server, keys)
        assert destination.login_ends_in is None
        assert "logged in as 'user/root'" in destination.probe()
        destination.close()


def test_replaced_keys_are_taken_without_a_restart(server: StandIn, tmp_path: Path) -> None:
    """Where the service knows the old ones no more the file is read again, and the call goes on."""
    old = server.access.new_keys(server.account, user="old")
    keys = server.keys_file(tmp_path, old)
    destination = works(server, keys)
    fresh = server.access.new_keys(server.account, user="new")
    server.keys_file(tmp_path, fresh).rename(keys)
    del server.access.principals[old.access]

    assert destination.observe(PLACE).exists
    assert "user/new" in destination.probe()
    destination.close()


@pytest.mark.parametrize(
    "text", ["", "{}", "[a]\n[b]\n", "no keys", "[a\n", '{"AccessKeyId": "x"}']
)
def test_a_file_without_keys_is_named(server: StandIn, tmp_path: Path, text: str) -> None:
    """The message names the file, and quotes nothing of it."""
    path = file(tmp_path / "keys", text)
    destination = connect(server, path)
    with pytest.raises(Denied, match="holds no keys" if text else "is empty") as refused:
        destination.observe(PLACE)
    assert str(path) in str(refused.value)
    destination.close()


def test_a_profile_of_a_named_file(server: StandIn, tmp_path: Path) -> None:
    """Its own keys, or a role by those of another profile; both ways to write its head."""
    role = server.access.new_role(server.account, "by-profile", external_id="outside")
    text = (
        f"[base]\n{profile(server.root)}[profile work]\nrole_arn = {role.arn}\n"
        "source_profile = base\nexternal_id = outside\nrole_session_name = from-profile\n"
    )
    path = file(tmp_path / "config", text)
    for name, who in (("base", "user/root"), ("work", "assumed-role/by-profile/from-profile")):
        auth = {"method": "profile", "profile": name, "file": str(path)}
        destination = works(server, path, auth=auth)
        assert who in destination.probe()
        destination.close()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("credential_process = /bin/false", "credential_process is refused"),
        ("sso_session = x", "sso_session is refused"),
        ("sso_start_url = https://x", "sso_start_url is refused"),
        ("credential_source = Environment", "credential_source is refused"),
        ("role_arn = arn:aws:iam::1:role/x\nsource_profile = work", "name each other"),
        ("source_profile = nobody\nrole_arn = arn:aws:iam::1:role/x", "no profile nobody"),
        ("region = eu-west-1", "holds no keys"),
    ],
)
def test_a_profile_can_name_no_program_and_no_browser(
    server: StandIn, tmp_path: Path, line: str, why: str
) -> None:
    """What would run something, or look elsewhere, is refused by its name."""
    path = file(tmp_path / "config", f"[profile work]\n{line}\n")
    auth = {"method": "profile", "profile": "work", "file": str(path)}
    destination = connect(server, path, auth=auth)
    with pytest.raises(Denied, match=why):
        destination.observe(PLACE)
    assert server.front.seen == []
    destination.close()


def test_a_role_on_top_in_another_account(server: StandIn, tmp_path: Path) -> None:
    """Several accounts are several connections with one login; each sees its own entries only."""
    made = []
    for account in ("111111111111", "222222222222"):
        role = server.access.new_role(account, "keyturn", external_id="outside")
        one = works(
            server, server.keys_file(tmp_path), role_arn=role.arn, external_id="outside",
            session_name="night@watch", prefix="same",
        )  # fmt: skip
        assert f"account {account}: logged in as 'assumed-role/keyturn/night@watch'" in one.probe()
        assert server.secret(f"same/{PLACE.path}", account=account) is not None
        assert one.login_ends_in is not None
        assert timedelta(minutes=55) < one.login_ends_in <= timedelta(hours=1)
        made.append(one)
    assert made[0].identity(PLACE) != made[1].identity(PLACE)
    assert server.secret(f"same/{PLACE.path}") is None
    for one in made:
        one.close()


def test_a_role_that_may_not_be_assumed_is_named(server: StandIn, tmp_path: Path) -> None:
    """With what is missing and on what, and nothing is sent to the secrets' service."""
    role = server.access.new_role(server.account, "locked", external_id="other")
    destination = connect(
        server, server.keys_file(tmp_path), role_arn=role.arn, external_id="wrong"
    )
    with pytest.raises(Denied, match=rf"lacks sts:AssumeRole on {role.arn}"):
        destination.observe(PLACE)
    assert {call.operation for call, _ in server.front.seen} == {"AssumeRole"}
    destination.close()


def test_a_web_identity(server: StandIn, tmp_path: Path) -> None:
    """A token from a file, read anew at each login; a wrong one is a refused login."""
    role = server.access.new_role(server.account, "pod", web_identity_token="a.b.c")
    path = file(tmp_path / "token", "a.b.c\n")
    auth = {"method": "web-identity", "role_arn": role.arn, "token_file": str(path)}
    destination = works(server, path, auth=auth)
    assert "assumed-role/pod/keyturn" in destination.probe()
    for one in list(server.access.principals):
        if one.startswith("ASIA"):
            del server.access.principals[one]
    path.write_text("d.e.f")
    role.web_identity_token = "d.e.f"
    assert destination.observe(PLACE).exists
    path.write_text("wrong")
    destination.close()
    refused = connect(server, path, auth=auth)
    with pytest.raises(Denied, match="login is refused"):
        refused.observe(PLACE)
    refused.close()


def test_an_instance_by_the_second_version_of_the_service_only(
    server: StandIn, tmp_path: Path
) -> None:
    """A token is put first; whoever refuses that is not asked without one."""
    server.instance.role = server.access.new_role(server.account, "instance")
    places = {("169.254.169.254", 80): ("127.0.0.1", server.front.place[1])}
    with resolving(places):
        destination = works(server, tmp_path, auth={"method": "instance"})
        assert "assumed-role/instance/" in destination.probe()
        destination.close()
        asked = [f"{c.method} {c.path}" for c, _ in server.front.seen if c.path != "/"]
        assert asked == [
            "PUT /latest/api/token",
            "GET /latest/meta-data/iam/security-credentials/",
            "GET /latest/meta-data/iam/security-credentials/instance",
        ]
        server.instance.role = None
        without = connect(server, tmp_path, auth={"method": "instance"})
        with pytest.raises(Denied, match="is there a role"):
            without.observe(PLACE)
        without.close()
    nobody = {("169.254.169.254", 80): ("127.0.0.1", 9)}
    with resolving(nobody):
        away = connect(server, tmp_path, auth={"method": "instance"})
        with pytest.raises(DestinationUnavailable) as caught:
            away.stage(PLACE, new_entry(1), expected="")
        assert caught.value.sent is False
        away.close()


@pytest.mark.parametrize("named", [True, False])
def test_a_container_by_its_agent(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """By the address in the configuration, or by what the platform handed to this very process."""
    server.instance.role = server.access.new_role(server.account, "task")
    server.instance.container_token = "let me in"
    token = file(tmp_path / "token", "let me in\n")
    address = f"{server.address}/container/v1"
    auth = {"method": "container"}
    if named:
        auth |= {"address": address, "token_file": str(token)}
    else:
        monkeypatch.setitem(ambient.kept, ambient.CONTAINER[1], address)
        monkeypatch.setitem(ambient.kept, ambient.CONTAINER[2], str(token))
    destination = works(server, tmp_path, auth=auth)
    assert "assumed-role/task/" in destination.probe()
    destination.close()


def test_a_container_without_an_address_is_refused(server: StandIn, tmp_path: Path) -> None:
    """The environment of this moment is not looked at, and no plain address elsewhere is taken."""
    destination = connect(server, tmp_path, auth={"method": "container"})
    with pytest.raises(Denied, match="names no address"):
        destination.observe(PLACE)
    destination.close()
    with pytest.raises(ValidationError):
        options_for(server, tmp_path, auth={"method": "container", "address": "http://10.0.0.1/x"})


def test_the_entry_keeps_what_a_container_was_handed(tmp_path: Path) -> None:
    """Three variables are kept aside for `method: container`; none stays in the environment."""
    code = (
        "import os, keyturn.entry; from keyturn import ambient;"
        " print(ambient.kept, [n for n in os.environ if n.startswith(('AWS_', 'BOTO_'))])"
    )
    given = dict.fromkeys((*ambient.CONTAINER, "AWS_PROFILE", "BOTO_CONFIG"), "x")
    said = subprocess.run(
        [sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == f"{dict.fromkeys(ambient.CONTAINER, 'x')} []"


# --- life of a login ------------------------------------------------------------------------


def test_a_login_that_runs_out_is_renewed_in_time(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions that live for three seconds: no call ever meets an expired one."""
    monkeypatch.setattr("keyturn.destinations.aws_login.SHORTEST_LIFE", 1.0)
    role = server.access.new_role(server.account, "short", life=timedelta(seconds=3))
    destination = connect(server, server.keys_file(tmp_path), role_arn=role.arn)
    import time

    until = time.monotonic() + 5
    while time.monotonic() < until:
        destination.observe(PLACE)
        time.sleep(0.2)
    statuses = {status for _, status in server.front.seen}
    logins = [call for call, _ in server.front.seen if call.operation == "AssumeRole"]
    assert statuses <= {200, 400}  # 400: the entry is not there
    assert len(logins) >= 3
    destination.close()


def test_a_session_that_was_ended_is_replaced_once(server: StandIn, tmp_path: Path) -> None:
    """ExpiredToken means one more login and the same request again; and no second time."""
    role = server.access.new_role(server.account, "ended")
    destination = connect(server, server.keys_file(tmp_path), role_arn=role.arn)
    publish(destination, PLACE, new_entry(1))

    def end_sessions() -> None:
        for one in server.access.principals.values():
            if one.ends_at is not None:
                one.ends_at -= timedelta(days=1)

    end_sessions()
    server.front.seen.clear()
    assert destination.observe(PLACE).exists
    assert sum(call.operation == "AssumeRole" for call, _ in server.front.seen) == 1

    role.life = timedelta(seconds=-60)
    end_sessions()
    server.front.seen.clear()
    with pytest.raises(Denied, match="login is refused"):
        destination.observe(PLACE)
    assert sum(call.operation == "AssumeRole" for call, _ in server.front.seen) == 1
    destination.close()


def test_wrong_keys_are_a_refused_login(server: StandIn, tmp_path: Path) -> None:
    """Unknown, or with another secret: Denied, with the clock named as a possible reason."""
    for access, secret in (("AKIAUNKNOWN", "x"), (server.root.access, "another")):
        keys = json.dumps({"AccessKeyId": access, "SecretAccessKey": secret})
        destination = connect(server, file(tmp_path / "wrong", keys))
        with pytest.raises(Denied, match="login is refused") as refused:
            destination.observe(PLACE)
        assert "clock" in refused.value.hint
        destination.close()


# --- rights ---------------------------------------------------------------------------------


def test_the_printed_policy_names_entries_and_no_more(server: StandIn, tmp_path: Path) -> None:
    """Region, account and both forms of each name; the account as `*` where it is not known."""
    known = options_for(server, tmp_path, prefix="agents", account="111122223333")
    policy = json.loads(AwsDestination.least_policy(known, ENTRIES))
    start = f"arn:aws:secretsmanager:{REGION}:111122223333:secret:agents/{PLACE.path}"
    assert [one["Resource"] for one in policy["Statement"]] == [[start, f"{start}-??????"]]
    unknown = AwsOptions.model_validate({"region": "cn-north-1", "kms_key_id": "alias/k"})
    policy = json.loads(AwsDestination.least_policy(unknown, ENTRIES))
    assert policy["Statement"][0]["Resource"][0].startswith(
        "arn:aws-cn:secretsmanager:cn-north-1:*:"
    )
    assert policy["Statement"][1]["Condition"] == {
        "StringEquals": {"kms:ViaService": "secretsmanager.cn-north-1.amazonaws.com.cn"},
        "ForAnyValue:StringEquals": {"kms:ResourceAliases": "alias/k"},
    }
    assert "*" not in "".join(policy["Statement"][0]["Action"])


@pytest.mark.parametrize("key", [None, "alias/agents", "1234abcd-12ab-34cd-56ef-1234567890ab"])
def test_a_rotation_works_with_exactly_the_printed_rights(
    server: StandIn, tmp_path: Path, key: str | None
) -> None:
    """Two rotations and a withdrawal, adopted and made, with the policy of a role in its account."""
    role = server.access.new_role(server.account, "least")
    adopted = Target(to="aws", path="adopted", adopt=True)
    destination = connect(server, server.keys_file(tmp_path), role_arn=role.arn, kms_key_id=key)
    text = AwsDestination.least_policy(destination.options, [*ENTRIES, (adopted, "disable")])
    role.policy = json.loads(text)
    agent(server).create_secret(
        Name=destination.place(adopted), SecretString='{"secret": "theirs"}'
    )
    for target in (PLACE, adopted):
        destination.probe_entry(target, retire="disable")
        for seed in (1, 2):
            publish(destination, target, new_entry(seed))
        found = destination.observe(target)
        previous = server.secret(destination.place(target))
        old = next(
            v for v, one in previous.versions.items() if one["version_stages"] == ["AWSPREVIOUS"]
        )  # type: ignore[union-attr]
        destination.retire(target, version_id=new_entry(1).version_id, locator=old, how="disable")
        destination.withdraw(
            target,
            owner="store-under-test",
            version_id=new_entry(2).version_id,
            expected=found.token,
        )
    with pytest.raises(Denied, match="secretsmanager:DescribeSecret"):
        destination.observe(Target(to="aws", path="another"))
    destination.close()


@pytest.mark.parametrize(
    "action",
    ["CreateSecret", "DescribeSecret", "GetSecretValue", "PutSecretValue", "TagResource",
     "UpdateSecretVersionStage", "kms:Decrypt", "kms:GenerateDataKey"],
)  # fmt: skip
def test_each_right_of_the_policy_is_needed(server: StandIn, tmp_path: Path, action: str) -> None:
    """Without any one of them a rotation is Denied, and the message says which."""
    key = "1234abcd-12ab-34cd-56ef-1234567890ab"
    role = server.access.new_role(server.account, "lacking")
    destination = connect(server, server.keys_file(tmp_path), role_arn=role.arn, kms_key_id=key)
    policy = json.loads(AwsDestination.least_policy(destination.options, ENTRIES))
    for statement in policy["Statement"]:
        statement["Action"] = [one for one in statement["Action"] if not one.endswith(action)]
    role.policy = policy

    def rotate_twice() -> None:
        for seed in (1, 2):
            publish(destination, PLACE, new_entry(seed))

    with pytest.raises(Denied) as refused:
        rotate_twice()
    assert ("KMS key" if ":" in action else f"secretsmanager:{action}") in str(refused.value)
    assert "keyturn policy aws" in refused.value.hint
    destination.close()


def configured(folder: Path, server: StandIn, **policy: str) -> Path:
    """Write a configuration with one agent at AWS."""
    content = {
        "version": 1,
        "store": {"url": f"sqlite:///{folder}/state/keyturn.db"},
        "connections": {
            "prod": {**connection(server, server.keys_file(folder)), "account": server.account}
        },
        "policies": {"default": policy},
        "agents": {"bot": {"destinations": [{"to": "prod", "path": "bot"}]}},
    }
    return file(folder / "keyturn.yaml", yaml.safe_dump(content))


def test_the_command_prints_the_policy(server: StandIn, tmp_path: Path) -> None:
    """`keyturn policy aws`: what is printed is JSON for exactly the configured entries."""
    found = checks.least_policy(configured(tmp_path, server), "aws")
    resources = json.loads(found["text"])["Statement"][0]["Resource"]
    arn = f"arn:aws:secretsmanager:{REGION}:{server.account}:secret:bot"
    assert resources == [arn, f"{arn}-??????"]


def test_check_probes_and_says_as_whom(server: StandIn, tmp_path: Path) -> None:
    """`keyturn check --probe` logs in and reads every entry; nothing is written."""
    found = checks.check(configured(tmp_path, server), probe=True)
    assert found["ok"], found
    said = {row["name"]: row["detail"] for row in found["checks"]}
    assert (
        said["connection prod"] == f"{REGION}, account {server.account}: logged in as 'user/root'"
    )
    assert said["entries prod"] == "1 of 1 can be rotated, as far as it shows without a write"
    assert server.writes() == []


def test_an_interval_below_the_quota_is_refused(server: StandIn, tmp_path: Path) -> None:
    """The file is not taken with a policy that would use up the versions of a secret."""
    short = {"every": "10m", "grace": "15m", "consumer_cache": "5m", "jitter": "0%"}
    with pytest.raises(ConfigError, match="one rotation every 14m24s"):
        checks.check(configured(tmp_path, server, **short))


# --- the options ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"region": "europe"}, {"region": ""}, {"endpoint": "http://10.0.0.1"},
        {"endpoint": "https://x/path"}, {"endpoint": "https://u@x"}, {"sts_endpoint": "ftp://x"},
        {"ca_file": "ca.pem"}, {"role_arn": "keyturn"}, {"account": "12"}, {"session_name": "a b"},
        {"role_arn": "arn:aws:iam::111122223333:role/x", "account": "999999999999"},
        {"tags": {"keyturn-owner": "x"}}, {"tags": {"aws:x": "y"}}, {"tags": {"a": 1}},
        {"versions_per_day": 0}, {"kms_key_id": "a b"}, {"auth": {"method": "keys"}},
        {"auth": {"method": "profile", "profile": "x"}}, {"auth": {"method": "env"}},
        {"auth": {"method": "instance", "file": "/x"}}, {"write_limit": "0/s"},
        {"auth": {"method": "container", "token_file": "/x"}}, {"access_key": "x"},
        {"auth": {"method": "web-identity", "token_file": "/x"}},
        {"endpoint": "https://emulator", "role_arn": "arn:aws:iam::111122223333:role/x"},
        {"endpoint": "https://evilamazonaws.com", "role_arn": "arn:aws:iam::111122223333:role/x"},
        {"external_id": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_cannot_be_meant_are_refused(wrong: dict[str, Any]) -> None:
    """Anything but the documented forms, secrets in the file among them."""
    with pytest.raises(ValidationError):
        AwsOptions.model_validate({"region": "eu-west-1", **wrong})
