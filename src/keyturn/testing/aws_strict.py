"""What moto lets pass, enforced: Secrets Manager by its API reference, in front of moto's backend.

moto keeps the secrets and makes the answers. Before it is asked, everything here must hold that the
real service holds to: a ClientRequestToken is one version's for ever, 65,536 bytes, 20 labels over all
versions, 100 versions of which none younger than a day goes, nothing on what is marked for deletion,
AWSCURRENT never without a version and moved only from where it is, 50 writes a second. Where labels
go is decided here: moto drops others' when AWSCURRENT moves, and shows versions that have none.
Sources: the API reference and "Quotas" of AWS Secrets Manager.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from moto.secretsmanager.models import FakeSecret, ReplicaSecret, secretsmanager_backends

from keyturn.testing.aws_access import AccessRefused

LARGEST_VALUE = 65_536
MOST_LABELS, MOST_VERSIONS, MOST_TAGS = 20, 100, 50
DAY = 24 * 60 * 60
WRITES = frozenset(
    {"CreateSecret", "PutSecretValue", "UpdateSecret", "UpdateSecretVersionStage", "DeleteSecret",
     "RestoreSecret", "TagResource", "UntagResource", "RotateSecret", "CancelRotateSecret",
     "ReplicateSecretToRegions", "RemoveRegionsFromReplication", "PutResourcePolicy",
     "DeleteResourcePolicy"}
)  # fmt: skip
_ON_DELETED = frozenset({"DescribeSecret", "RestoreSecret", "DeleteSecret"})
_NAME = re.compile(r"[A-Za-z0-9/_+=.@-]{1,512}", re.ASCII)
Found = FakeSecret | ReplicaSecret
Json = dict[str, Any]
Moto = Callable[[], Json]  # asks moto, and returns what it answers


class Strict:
    """The rules of one account and region above moto's backend."""

    def __init__(self, account: str, region: str, *, rate: float) -> None:
        self.backend = secretsmanager_backends[account][region]
        self.guard = threading.Lock()
        self.rate = rate
        self.now: Callable[[], float] = time.time
        self._writes: deque[float] = deque()

    def find(self, secret_id: object) -> Found | None:
        """Return the secret of this name or ARN."""
        found = self.backend.secrets.get(secret_id) if isinstance(secret_id, str) else None
        return found if isinstance(found, FakeSecret | ReplicaSecret) else None

    def serve(self, operation: str, asked: Json, ask: Moto) -> Json:
        """Hold a request against the rules, have moto do it, return the answer. Raises AccessRefused."""
        with self.guard:
            if operation in WRITES:
                self._throttle()
            secret = self.find(asked.get("SecretId"))
            if operation not in (
                "CreateSecret",
                "ListSecrets",
                "GetRandomPassword",
                "BatchGetSecretValue",
            ):
                secret = self._usable(operation, secret)
            special = _SPECIAL.get(operation)
            return special(self, secret, asked, ask) if special is not None else ask()

    def _throttle(self) -> None:
        now = time.monotonic()
        while self._writes and self._writes[0] <= now - 1:
            self._writes.popleft()
        if len(self._writes) >= self.rate:
            raise AccessRefused("ThrottlingException", "Rate exceeded")
        self._writes.append(now)

    def _usable(self, operation: str, secret: Found | None) -> Found:
        if secret is None:
            raise AccessRefused(
                "ResourceNotFoundException", "Secrets Manager can't find the specified secret."
            )
        if isinstance(secret, ReplicaSecret) and operation in WRITES:
            raise AccessRefused(
                "InvalidParameterException", "Operation not permitted on a replica secret."
            )
        if secret.is_deleted() and operation not in _ON_DELETED:
            raise AccessRefused(
                "InvalidRequestException",
                "You can't perform this operation on the secret because it was marked for deletion.",
            )
        return secret

    # --- operations -------------------------------------------------------------------------

    def create(self, _secret: Found | None, asked: Json, ask: Moto) -> Json:
        """Make a secret; again with the same token and data nothing happens."""
        name = asked.get("Name")
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            raise AccessRefused("ValidationException", "Invalid name.")
        self._check_value(asked, needed=False)
        self._check_tags(asked.get("Tags") or [])
        there = self.find(name)
        if there is not None and there.is_deleted():
            raise AccessRefused(
                "InvalidRequestException",
                "You can't create this secret because a secret with this name is already"
                " scheduled for deletion.",
            )
        if there is not None and not self._is_same(there, asked):
            raise AccessRefused("ResourceExistsException", f"the secret {name} already exists.")
        if there is not None:
            version = asked["ClientRequestToken"]
            return {"ARN": there.arn, "Name": there.name, "VersionId": version}
        return ask()

    def put(self, secret: Found, asked: Json, ask: Moto) -> Json:
        """Add a version; again with the same token and data nothing happens."""
        self._check_value(asked, needed=True)
        stages = asked.get("VersionStages") or ["AWSCURRENT"]
        self._check_stages(stages)
        if self._is_same(secret, asked):
            version = asked["ClientRequestToken"]
            held = secret.versions[version]["version_stages"]
            return {"ARN": secret.arn, "Name": secret.name, "VersionId": version,
                    "VersionStages": list(held)}  # fmt: skip
        before = labels_of(secret)
        wanted = [*stages] if before.get("AWSCURRENT") else [*stages, "AWSCURRENT"]
        self._check_quota(secret, {**before, **dict.fromkeys(wanted, "new")})
        answer = ask()
        version = answer["VersionId"]
        secret.versions[version]["createdate"] = int(self.now())
        set_labels(secret, _moved(before, wanted, version))
        return {**answer, "VersionStages": list(secret.versions[version]["version_stages"])}

    def update(self, secret: Found, asked: Json, ask: Moto) -> Json:
        """Change a secret; a new value takes AWSCURRENT."""
        if "SecretString" not in asked and "SecretBinary" not in asked:
            return ask()
        self._check_value(asked, needed=True)
        if self._is_same(secret, asked):
            return {"ARN": secret.arn, "Name": secret.name}
        before = labels_of(secret)
        self._check_quota(secret, {**before, "AWSCURRENT": "new"})
        answer = ask()
        set_labels(secret, _moved(before, ["AWSCURRENT"], str(secret.default_version_id)))
        return answer

    def stage(self, secret: Found, asked: Json, _ask: Moto) -> Json:
        """Move or remove one label, from where it is only."""
        label, to = asked.get("VersionStage"), asked.get("MoveToVersionId")
        source = asked.get("RemoveFromVersionId")
        self._check_stages([label])
        labels = labels_of(secret)
        holder = labels.get(str(label))
        for version in (to, source):
            if version is not None and version not in secret.versions:
                raise AccessRefused("ResourceNotFoundException", "no such version of the secret")
        if to is None and source is None:
            raise AccessRefused("InvalidParameterException", "neither version is named")
        if source is not None and source != holder:
            raise AccessRefused(
                "InvalidParameterException", "RemoveFromVersionId has not the staging label"
            )
        if to is not None and holder not in (None, to) and source is None:
            raise AccessRefused(
                "InvalidParameterException", "The parameter RemoveFromVersionId can't be empty."
            )
        if label == "AWSCURRENT" and to is None:
            raise AccessRefused("InvalidParameterException", "You can't remove AWSCURRENT.")
        if to is None:
            labels.pop(str(label))
        else:
            labels = _moved(labels, [str(label)], to)
            self._check_labels(labels)
        set_labels(secret, labels)
        return {"ARN": secret.arn, "Name": secret.name}

    def describe(self, secret: Found, _asked: Json, ask: Moto) -> Json:
        """Leave out the versions that have no label."""
        answer = ask()
        shown = answer.get("VersionIdsToStages") or {}
        answer["VersionIdsToStages"] = {v: named for v, named in shown.items() if named}
        answer.pop("SecretVersionsToStages", None)
        return {key: value for key, value in answer.items() if value not in (None, {})}

    def tag(self, secret: Found, asked: Json, ask: Moto) -> Json:
        """Add tags."""
        added = asked.get("Tags") or []
        self._check_tags([*(secret.tags or []), *added])
        return ask()

    # --- rules ------------------------------------------------------------------------------

    def _check_value(self, asked: Json, *, needed: bool) -> None:
        text, binary = asked.get("SecretString"), asked.get("SecretBinary")
        if text is not None and binary is not None:
            raise AccessRefused("InvalidParameterException", "You can't specify both.")
        if needed and not text and not binary:
            raise AccessRefused("InvalidParameterException", "You must provide a value.")
        size = len(text.encode()) if isinstance(text, str) else len(binary or "") * 3 // 4
        if size > LARGEST_VALUE:
            raise AccessRefused(
                "ValidationException", "Member must have length less than or equal to 65536"
            )
        token = asked.get("ClientRequestToken")
        if not isinstance(token, str) or not 32 <= len(token) <= 64:
            raise AccessRefused(
                "InvalidParameterException", "ClientRequestToken must be 32-64 characters long."
            )

    def _is_same(self, secret: Found, asked: Json) -> bool:
        """Whether the token is of a version with these very data. Raises AccessRefused if of others."""
        version = secret.versions.get(asked["ClientRequestToken"])
        if version is None:
            return False
        if version.get("secret_string") == asked.get("SecretString") and (
            version.get("secret_binary") == asked.get("SecretBinary")
        ):
            return True
        raise AccessRefused(
            "ResourceExistsException",
            "You can't use this ClientRequestToken because that value is already in use.",
        )

    def _check_stages(self, stages: Any) -> None:
        good = isinstance(stages, list) and 1 <= len(stages) <= MOST_LABELS
        if not good or not all(isinstance(one, str) and 1 <= len(one) <= 256 for one in stages):
            raise AccessRefused("ValidationException", "Invalid version stages.")

    def _check_quota(self, secret: Found, labels: Mapping[str, str]) -> None:
        self._check_labels(labels)
        held = set(labels_of(secret).values())
        old = self.now() - DAY
        bare = [
            version
            for version, one in secret.versions.items()  # the oldest first
            if version not in held and one["createdate"] < old
        ]
        while len(secret.versions) >= MOST_VERSIONS and bare:
            del secret.versions[bare.pop(0)]
        if len(secret.versions) >= MOST_VERSIONS:
            raise AccessRefused("LimitExceededException", "The secret has too many versions.")

    def _check_labels(self, labels: Mapping[str, str]) -> None:
        if len(labels) > MOST_LABELS:
            raise AccessRefused("LimitExceededException", "The secret has too many staging labels.")

    def _check_tags(self, tags: list[Json]) -> None:
        keys = {tag.get("Key") for tag in tags}
        if len(keys) > MOST_TAGS:
            raise AccessRefused("InvalidParameterException", "too many tags")
        for tag in tags:
            key, text = tag.get("Key"), tag.get("Value")
            if not isinstance(key, str) or not 1 <= len(key) <= 128 or len(str(text)) > 256:
                raise AccessRefused("ValidationException", "Invalid tag.")


_SPECIAL: dict[str, Callable[..., Json]] = {
    "CreateSecret": Strict.create,
    "PutSecretValue": Strict.put,
    "UpdateSecret": Strict.update,
    "UpdateSecretVersionStage": Strict.stage,
    "DescribeSecret": Strict.describe,
    "TagResource": Strict.tag,
}


def labels_of(secret: Found) -> dict[str, str]:
    """Return which version has which label."""
    return {
        label: version
        for version, one in secret.versions.items()
        for label in one["version_stages"]
    }


def set_labels(secret: Found, labels: Mapping[str, str]) -> None:
    """Put the labels where they belong."""
    for version, one in secret.versions.items():
        one["version_stages"] = [label for label, holder in labels.items() if holder == version]
    source = secret.source if isinstance(secret, ReplicaSecret) else secret
    source.default_version_id = labels.get("AWSCURRENT")


def _moved(labels: Mapping[str, str], wanted: list[str], to: str) -> dict[str, str]:
    """Return the labels after these were put on a version: AWSPREVIOUS follows AWSCURRENT."""
    after = {**labels, **dict.fromkeys(wanted, to)}
    left = labels.get("AWSCURRENT")
    if "AWSCURRENT" in wanted and left not in (None, to):
        after["AWSPREVIOUS"] = str(left)
    return after
