"""What is in an entry at AWS Secrets Manager, and what the service says of it. No requests."""

from __future__ import annotations

import hashlib
import hmac
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keyturn.core.model import Target
from keyturn.errors import Rejected

OWNER, FENCE = "keyturn-owner", "keyturn-fence"
CURRENT, PENDING, PREVIOUS = "AWSCURRENT", "AWSPENDING", "AWSPREVIOUS"
WITHDRAWN = "keyturn-withdrawn"  # a version needs a label until it has AWSCURRENT
LARGEST_VALUE = 65_536
AWS_ROTATES = "AWS's own rotation is on for the entry"


@dataclass(frozen=True, slots=True, kw_only=True)
class AwsSecret:
    """What the service says of an entry, without its values."""

    name: str
    arn: str
    tags: Mapping[str, str]
    labels: Mapping[str, str]  # label: version
    locked: str  # why nothing of ours can be written; ""
    deleted: bool
    lagging: tuple[str, ...]  # regions whose replica may show something else
    failed: tuple[str, ...]

    @property
    def owner(self) -> str | None:
        """The store in the owner marker."""
        return self.tags.get(OWNER)

    @property
    def token(self) -> str:
        """The version that agents read; "" where there is none."""
        return self.labels.get(CURRENT, "")

    def labels_of(self, version: str) -> list[str]:
        """Return every label of a version."""
        return [label for label, holder in self.labels.items() if holder == version]


def made(
    target: Target, values: Mapping[str, Any], version_id: str, *, key: str | None = None
) -> tuple[str, str]:
    """Return the bytes of an entry, and the name of the version that they make. For `key` see there."""
    text = json.dumps(values, allow_nan=False)
    if len(text.encode()) > LARGEST_VALUE:
        raise Rejected(
            f"the entry would be larger than {LARGEST_VALUE} bytes",
            hint="AWS takes no more: keep the other keys in an entry of their own",
        )
    return text, name_of(target, values, version_id, key=key)


def name_of(
    target: Target, values: Mapping[str, Any], version_id: str, *, key: str | None = None
) -> str:
    """Derive a VersionId from the version id and all that the bytes hold besides the secret.

    With the version id alone a merged entry that others edited between two tries would have other
    bytes under the same token, which the service refuses for ever (rule 9).
    SECURITY: VersionIds are public, and others' values may be easy to guess; keyed with the secret
    of the entry (`key` where it is not in it) the name tells nothing to who does not know that.
    """
    secret = key if key is not None else values.get(target.keys.secret)
    public = {name: value for name, value in values.items() if name != target.keys.secret}
    seed = json.dumps(["keyturn-aws-v1", version_id, list(values), public])
    digest = hmac.digest(str(secret).encode(errors="surrogatepass"), seed.encode(), hashlib.sha256)
    return str(uuid.UUID(bytes=digest[:16], version=4))


def secret_of(answer: Mapping[str, Any], *, region: str) -> AwsSecret | None:
    """Read what DescribeSecret says; None where it is no answer."""
    name, arn = answer.get("Name"), answer.get("ARN")
    if not isinstance(name, str) or not isinstance(arn, str) or not arn:
        return None
    labels = {
        label: version
        for version, named in (answer.get("VersionIdsToStages") or {}).items()
        for label in named
    }
    tags = {tag.get("Key"): tag.get("Value") for tag in answer.get("Tags") or ()}
    replicas = {
        one.get("Region"): one.get("Status") for one in answer.get("ReplicationStatus") or ()
    }
    return AwsSecret(
        name=name,
        arn=arn,
        tags=tags,
        labels=labels,
        locked=_lock_of(answer, region),
        deleted=answer.get("DeletedDate") is not None,
        lagging=tuple(sorted(str(r) for r, status in replicas.items() if status != "InSync")),
        failed=tuple(sorted(str(r) for r, status in replicas.items() if status == "Failed")),
    )


def _lock_of(answer: Mapping[str, Any], region: str) -> str:
    if answer.get("RotationEnabled"):
        return AWS_ROTATES
    if answer.get("OwningService"):
        return "it is managed by a service of AWS"
    if answer.get("PrimaryRegion") not in (None, region):
        return "it is a replica: connect to its primary region"
    return ""
