"""What a connection to AWS Secrets Manager can be given, and the rights that it needs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, ClassVar
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, model_validator

from keyturn.core.duration import FORM
from keyturn.core.model import Target
from keyturn.destinations.aws_errors import ACTIONS
from keyturn.destinations.aws_login import AuthOptions
from keyturn.destinations.base import (
    ConnectionOptions,
    Form,
    checked_tags,
    duration,
    rate,
    safe_address,
)

DAY = timedelta(hours=24)
_OF_AWS = (".amazonaws.com", ".amazonaws.com.cn", ".api.aws", ".on.aws")
_REGION = re.compile(r"[a-z]{2,4}(-[a-z]+)+-[0-9]{1,2}", re.ASCII)
_ROLE = re.compile(r"arn:(aws[a-z-]*):iam::([0-9]{12}):role/[\w+=,.@/-]{1,512}", re.ASCII)
_TAG = re.compile(r"[\w .:/=+@-]{1,128}")
_PARTITIONS = (("cn-", "aws-cn"), ("us-gov-", "aws-us-gov"), ("us-iso-", "aws-iso"),
               ("us-isob-", "aws-iso-b"), ("eusc-", "aws-eusc"))  # fmt: skip


def _region(value: object) -> object:
    if not isinstance(value, str) or _REGION.fullmatch(value) is None:
        raise ValueError
    return value


def _role(value: object) -> object:
    if not isinstance(value, str) or _ROLE.fullmatch(value) is None:
        raise ValueError
    return value


def _ca_file(value: object) -> object:
    if not isinstance(value, str) or not Path(value).is_absolute():
        raise ValueError
    return value


def _tags(value: object) -> object:
    return checked_tags(value, most=40, name_is_good=_is_tag)


def _is_tag(name: str) -> bool:
    return _TAG.fullmatch(name) is not None and not name.lower().startswith("aws:")


Endpoint = Annotated[
    str | None, BeforeValidator(safe_address), Form("https://host[:port] (http on loopback only)")
]
RoleArn = Annotated[str | None, BeforeValidator(_role), Form("arn:aws:iam::ACCOUNT:role/NAME")]


class AwsOptions(ConnectionOptions):
    """How to reach AWS Secrets Manager: one region of one account."""

    rule: ClassVar[str] = (
        "an account that is that of role_arn, and sts_endpoint wherever a role is assumed and"
        " endpoint is not one of AWS"
    )

    region: Annotated[
        str,
        BeforeValidator(_region),
        Form("a region such as eu-west-1"),
        Field(description="region"),
    ]
    auth: Annotated[AuthOptions, Form("a mapping with a method"), Field(description="login")] = (
        AuthOptions()
    )
    role_arn: Annotated[
        RoleArn, Field(description="role to assume with that login, in any account")
    ] = None
    external_id: Annotated[
        str | None,
        Form("2 to 1224 characters"),
        Field(min_length=2, max_length=1224, description="what that role's trust asks for"),
    ] = None
    session_name: Annotated[
        str,
        Form("2 to 64 characters of A-Z a-z 0-9 _ = , . @ -"),
        Field(
            pattern=r"^[A-Za-z0-9_=,.@-]{2,64}$", description="name of our sessions in CloudTrail"
        ),
    ] = "keyturn"
    account: Annotated[
        str | None,
        Form("12 digits, in quotes; that of role_arn where there is one"),
        Field(pattern=r"^[0-9]{12}$", description="account that the entries must lie in"),
    ] = None
    endpoint: Annotated[Endpoint, Field(description="address; by default the region's own")] = None
    sts_endpoint: Annotated[
        Endpoint, Field(description="address of STS; by default the region's own")
    ] = None
    ca_file: Annotated[
        str | None,
        BeforeValidator(_ca_file),
        Form("an absolute path"),
        Field(description="certificates of the authority that signed the server's"),
    ] = None
    kms_key_id: Annotated[
        str | None,
        Form("the ARN, the id or the alias/NAME of a KMS key"),
        Field(pattern=r"^[A-Za-z0-9_:/-]{1,256}$", description="key for entries that we make"),
    ] = None
    tags: Annotated[
        dict[str, str],
        BeforeValidator(_tags),
        Form("a mapping of at most 40 tags"),
        Field(description="tags for entries that we make"),
    ] = {}  # noqa: RUF012 - pydantic copies it
    write_limit: Annotated[
        float | None,
        BeforeValidator(rate),
        Form("a number of writes a second such as 5/s"),
        Field(description="most writes a second; AWS takes 50 of a whole account and region"),
    ] = 10.0
    staleness: Annotated[
        timedelta,
        BeforeValidator(duration),
        Form(FORM),
        Field(description="how long a write may take to be seen everywhere"),
    ] = timedelta(seconds=30)
    versions_per_day: Annotated[
        int,
        Form("a number from 1 to 100000"),
        Field(ge=1, le=100_000, description="versions that the service keeps of an entry in 24 h"),
    ] = 100

    @model_validator(mode="after")
    def _fits_together(self) -> AwsOptions:
        named = account_in(self.role_arn)
        if named and self.account not in (None, named):
            raise ValueError
        takes_role = self.role_arn is not None or self.auth.method == "web-identity"
        if takes_role and self.sts_endpoint is None and not is_of_aws(self.endpoint):
            # SECURITY: an emulator's keys, or a token meant for it, are nothing for the real STS.
            raise ValueError
        return self

    @property
    def in_account(self) -> str | None:
        """The account, where it is known without asking."""
        return self.account or account_in(self.role_arn)


def account_in(role_arn: str | None) -> str | None:
    """Return the account of a role."""
    found = _ROLE.fullmatch(role_arn) if role_arn else None
    return found[2] if found else None


def partition_of(region: str) -> str:
    """Return the part of AWS that a region belongs to, as ARNs name it."""
    return next((name for start, name in _PARTITIONS if region.startswith(start)), "aws")


def is_of_aws(endpoint: str | None) -> bool:
    """Whether an address leads to the service itself, by whatever way."""
    host = urlsplit(endpoint).hostname if endpoint else None
    return endpoint is None or (host or "").endswith(_OF_AWS)


def least_rights(options: AwsOptions, names: Iterable[str]) -> str:
    """Return an IAM policy for the entries of these names.

    The service puts a hyphen and six characters behind a name, and leaves them away where there is no
    entry yet: both forms are needed, and `-??????` is the least that matches the first.
    """
    wanted = sorted(set(names))
    statements: list[dict[str, Any]] = []
    if wanted:
        statements.append(
            {
                "Sid": "KeyturnEntries",
                "Effect": "Allow",
                "Action": [f"secretsmanager:{action}" for action in ACTIONS],
                "Resource": [_arn(options, f"{n}{end}") for n in wanted for end in ("", "-??????")],
            }
        )
    if options.kms_key_id is not None:
        statements.append(_key_rights(options, options.kms_key_id))
    return json.dumps({"Version": "2012-10-17", "Statement": statements}, indent=2)


def _arn(options: AwsOptions, name: str) -> str:
    partition, account = partition_of(options.region), options.in_account or "*"
    return f"arn:{partition}:secretsmanager:{options.region}:{account}:secret:{name}"


def _key_rights(options: AwsOptions, key: str) -> dict[str, Any]:
    """Return the rights on the key, only by way of Secrets Manager of this region."""
    partition, region, account = partition_of(options.region), options.region, options.in_account
    suffix = "amazonaws.com.cn" if partition == "aws-cn" else "amazonaws.com"
    condition: dict[str, Any] = {
        "StringEquals": {"kms:ViaService": f"secretsmanager.{region}.{suffix}"}
    }
    resource = key
    if not key.startswith("arn:"):
        resource = f"arn:{partition}:kms:{region}:{account or '*'}:key/"
        resource += "*" if key.startswith("alias/") else key.removeprefix("key/")
    if key.startswith("alias/"):
        condition["ForAnyValue:StringEquals"] = {"kms:ResourceAliases": key}
    return {
        "Sid": "KeyturnKey",
        "Effect": "Allow",
        "Action": ["kms:Decrypt", "kms:GenerateDataKey"],
        "Resource": resource,
        "Condition": condition,
    }


def placed(options: AwsOptions, entries: Sequence[tuple[Target, str]]) -> list[str]:
    """Return the names of entries."""
    return [f"{options.prefix}/{t.path}" if options.prefix else t.path for t, _ in entries]
