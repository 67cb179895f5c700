"""AWS Secrets Manager, through boto3.

An entry is a secret whose value is a JSON object. What is compared is the VersionId under AWSCURRENT:
a version never changes, and AWSCURRENT moves only from the version that we name (RemoveFromVersionId).
A version is staged under AWSPENDING with a ClientRequestToken that is a function of its bytes, so a
retry makes no second one. The owner marker stands in the secret's tags. The service can neither
disable nor destroy a version: one without labels is deprecated, and the service deletes it in time.
Sources: the API reference, "Quotas" and "Rotation" of AWS Secrets Manager.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

from keyturn.core.model import Target, Traits
from keyturn.destinations.aws_budget import line_of
from keyturn.destinations.aws_door import Door, Keys
from keyturn.destinations.aws_errors import WORN_OUT, code_of, understand
from keyturn.destinations.aws_login import Login, Role
from keyturn.destinations.aws_options import (
    DAY,
    AwsOptions,
    is_of_aws,
    least_rights,
    placed,
)
from keyturn.destinations.aws_secret import (
    AWS_ROTATES,
    CURRENT,
    FENCE,
    OWNER,
    PENDING,
    PREVIOUS,
    WITHDRAWN,
    AwsSecret,
    made,
    name_of,
    secret_of,
)
from keyturn.destinations.base import LONGEST_PAUSE, DestinationBase, WriteLimit
from keyturn.destinations.entry import merged, observed, parsed, refuse_foreign, without_ours
from keyturn.errors import (
    ConfigError,
    Conflict,
    DestinationError,
    DestinationUnavailable,
    Rejected,
)
from keyturn.ports import Clock, Entry, Observed, OwnLogin

T = TypeVar("T")

LONGEST_NAME = 512
READS = 4  # how often an answer that is behind, or changes while it is read, is asked for
READ_PAUSE = 0.1
_WRITES = {"create_secret": "CreateSecret", "put_secret_value": "PutSecretValue",
           "tag_resource": "TagResource",
           "update_secret_version_stage": "UpdateSecretVersionStage"}  # fmt: skip
_NAMES = {"describe_secret": "DescribeSecret", "get_secret_value": "GetSecretValue",
          "get_caller_identity": "GetCallerIdentity", **_WRITES}  # fmt: skip
_ABSENT = "ResourceNotFoundException"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """Our own last move of AWSCURRENT: an answer that does not know it is older."""

    version: str
    at: float


class _Changed(Exception):
    """The version that was described is not there: it changed between two calls."""


class AwsDestination(DestinationBase):
    """One region of one account."""

    Options = AwsOptions
    TRAITS = Traits(can_stage=True, has_cas=True, keeps_versions=True)

    def __init__(self, options: Any, *, name: str, store_id: str, clock: Clock) -> None:
        super().__init__(options, name=name, store_id=store_id, clock=clock)
        # Not per call but per request, where a call can be three of them: see `_ask`.
        self._limit = WriteLimit(None, clock)
        login = options.in_account or (options.auth, options.role_arn)
        line = line_of(clock, options.endpoint, options.region, login)
        self._budget = WriteLimit(options.write_limit, clock, line)
        self._door = Door(
            region=options.region,
            ca_file=options.ca_file,
            timeout=options.call_deadline,
            parallel=options.parallel,
        )
        role = None
        if options.role_arn is not None:
            role = Role(
                arn=options.role_arn,
                session_name=options.session_name,
                external_id=options.external_id,
            )
        self._login = Login(
            options.auth, role=role, sts=self._sts, timeout=options.call_deadline, name=name
        )
        self._made: Any = None
        self._guard = threading.Lock()
        self._born = time.monotonic()
        self._written: dict[str, _Written] = {}

    @property
    def traits(self) -> Traits:
        """What this destination can do."""
        seconds = -(-int(DAY.total_seconds()) // self.options.versions_per_day)
        return replace(
            super().traits,
            staleness=self.options.staleness,
            minimum_interval=timedelta(seconds=seconds),
        )

    @property
    def login_ends_in(self) -> timedelta | None:
        """How long our credentials live unless they are renewed."""
        return self._login.ends_in

    def own_login(self) -> OwnLogin:
        """Say that none of ours ends by a date: keys have none, everything else is renewed."""
        method = self.options.auth.method
        own = method in ("keys", "profile")
        note = "access keys do not end" if own else "the platform renews it"
        return OwnLogin(method=method, note=note)

    def identity(self, target: Target) -> str:
        """Return region, account where it is known, and name in one. Names are case-sensitive."""
        where = "" if is_of_aws(self.options.endpoint) else urlsplit(self.options.endpoint).netloc
        account = self.options.in_account or ""
        return f"aws:{where.lower()}/{self.options.region}/{account}/{self.place(target)}"

    def place(self, target: Target) -> str:
        """Return the checked name of an entry, prefix included. Raises ConfigError."""
        name = super().place(target)
        if len(name) > LONGEST_NAME:
            raise ConfigError(f"expected a name of at most {LONGEST_NAME} characters, with prefix")
        return name

    @classmethod
    def least_policy(cls, options: Any, entries: Sequence[tuple[Target, str]]) -> str:
        """Return an IAM policy. Where the account is not known it stands as `*`."""
        return least_rights(options, placed(options, entries))

    def close(self) -> None:
        """Give the connections back."""
        super().close()
        self._door.close()

    # --- looking ----------------------------------------------------------------------------

    def _probe(self) -> str:
        region = self.options.region
        if self.options.sts_endpoint is None and not is_of_aws(self.options.endpoint):
            self._login.ready()
            return f"{self.options.endpoint}, {region}: logged in; say sts_endpoint to see as whom"
        answer = self._requested(
            self._sts(self._login.keys), "get_caller_identity", what="itself", write=False
        )
        account, arn = answer.get("Account"), answer.get("Arn")
        if not isinstance(account, str) or not isinstance(arn, str):
            raise DestinationUnavailable(f"{self.name}: the answer makes no sense", sent=False)
        wanted = self.options.in_account
        if wanted not in (None, account):
            raise Rejected(
                f"{self.name}: the login is of account {account[:12]}, and not {wanted}",
                hint="correct `auth`, `role_arn` or `account` of the connection",
            )
        who = arn.partition(f":{account}:")[2]
        return f"{region}, account {account[:12]}: logged in as {who[:256]!r}"

    def _probe_entry(self, target: Target, retire: str) -> Observed:
        """Read it: AWS tells nobody which rights they have, so those to write show with a write."""
        del retire
        found = self._observe(target)
        secret = self._described(self.place(target))
        if secret is None:
            return found
        self._refuse_locked(secret)
        if secret.failed:
            raise Rejected(
                f"{self.name}: the replica of {secret.name} in {', '.join(secret.failed)} has failed",
                hint="nothing is retired until it shows what the primary shows: repair or remove it",
            )
        if found.staged == "":
            raise Conflict(f"{self.name}: somebody else's {PENDING} is on {secret.name}")
        return found

    def _observe(self, target: Target) -> Observed:
        name = self.place(target)
        found: Observed | None = None
        for attempt in range(READS):
            time.sleep(READ_PAUSE * attempt)
            try:
                secret = self._described(name)
                found = self._seen(target, secret)
            except _Changed:
                found = None
                continue
            if not self._is_behind(name, secret):
                return replace(found, fresh=self._is_fresh(name, secret))
        if found is None:
            raise DestinationUnavailable(
                f"{self.name}: {name} changes while it is read", sent=False
            )
        return replace(found, fresh=False)

    def _seen(self, target: Target, secret: AwsSecret | None) -> Observed:
        """Read exactly the version that was described: id, secret and labels are of one moment."""
        if secret is None:
            return Observed()
        if secret.deleted:
            raise self._is_deleted(secret)
        token = secret.token
        values = self._values(secret, token) if token else None
        staged = self._staged(target, secret)
        if token and values is None:
            return Observed(
                exists=True, other_keys=True, owner=secret.owner, token=token, locator=token,
                staged=staged,
            )  # fmt: skip
        found = observed(target.keys, values, owner=secret.owner, token=token, locator=token)
        return replace(found, staged=staged)

    def _staged(self, target: Target, secret: AwsSecret) -> str | None:
        """Return which version of ours is staged, "" for somebody else's, None for none.

        On the version that has AWSCURRENT the label is what every finished rotation may leave.
        """
        pending = secret.labels.get(PENDING)
        if pending is None or pending == secret.token:
            return None
        values = self._values(secret, pending) or {}
        version_id = values.get(target.keys.version)
        if secret.owner != self.store_id or not isinstance(version_id, str):
            return ""
        return version_id if name_of(target, values, version_id) == pending else ""

    def _read(self, target: Target, version_id: str) -> Observed:
        """Look under the two labels that a copy of ours can have."""
        secret = self._described(self.place(target))
        if secret is None or secret.deleted:
            return Observed()
        for label in (PENDING, CURRENT):
            version = secret.labels.get(label)
            if version is None:
                continue
            with contextlib.suppress(_Changed):
                values = self._values(secret, version)
                if values is not None and values.get(target.keys.version) == version_id:
                    return observed(
                        target.keys, values, owner=secret.owner, token=secret.token,
                        locator=version,
                    )  # fmt: skip
        return Observed(token=secret.token)

    def _is_behind(self, name: str, secret: AwsSecret | None) -> bool:
        """Whether an answer is older than our own last write: it shows it under neither label."""
        with self._guard:
            last = self._written.get(name)
        if last is None or time.monotonic() - last.at >= self._staleness:
            return False
        labels = secret.labels_of(last.version) if secret is not None else []
        return CURRENT not in labels and PREVIOUS not in labels

    def _is_fresh(self, name: str, secret: AwsSecret | None) -> bool:
        """Whether a read may let a version go (rule 5): nothing else can still be on its way.

        The service promises no order of reads after writes, so it is waited for: since this process
        knows of all writes, or since its own last one, unless the answer shows that very write.
        """
        if secret is not None and secret.lagging:
            return False
        with self._guard:
            last = self._written.get(name)
        if last is not None and secret is not None and secret.token == last.version:
            return True
        since = self._born if last is None else last.at
        return time.monotonic() - since >= self._staleness

    @property
    def _staleness(self) -> float:
        return float(self.options.staleness.total_seconds())

    def _described(self, name: str) -> AwsSecret | None:
        try:
            answer = self._ask("describe_secret", what=name, SecretId=name)
        except _Absent:
            return None
        found = secret_of(answer, region=self.options.region)
        if found is None:
            raise DestinationUnavailable(f"{self.name}: the answer makes no sense", sent=False)
        if found.name != name:
            # SECURITY: a name that ends like the suffix of an ARN can mean another entry.
            raise Rejected(f"{self.name}: asked for {name}, the service answers of another entry")
        account = self.options.in_account
        if account is not None and f":{account}:" not in found.arn:
            raise Rejected(
                f"{self.name}: {name} is not in account {account}",
                hint="correct `auth`, `role_arn` or `account` of the connection",
            )
        return found

    def _values(self, secret: AwsSecret, version: str) -> dict[str, Any] | None:
        """Return the values of one version, None where they are no JSON object."""
        try:
            answer = self._ask(
                "get_secret_value", what=secret.name, SecretId=secret.arn, VersionId=version
            )
        except _Absent:
            raise _Changed from None
        if answer.get("VersionId") != version or answer.get("ARN") != secret.arn:
            raise DestinationUnavailable(f"{self.name}: the answer makes no sense", sent=False)
        if not isinstance(answer.get("SecretString"), str):
            if isinstance(answer.get("SecretBinary"), bytes):
                return None
            raise DestinationUnavailable(f"{self.name}: the answer makes no sense", sent=False)
        return parsed(answer["SecretString"])

    # --- writing ----------------------------------------------------------------------------

    def _stage(self, target: Target, entry: Entry, expected: str) -> str:
        secret = self._described(self.place(target))
        if secret is None:
            return self._created(target, entry, expected)
        shown = self._shown(secret)
        text, version = made(target, merged(target, shown or {}, entry), entry.version_id)
        if version == secret.token:
            return version  # it is what agents read already
        self._refuse(target, secret, shown, expected)
        self._place_copy(target, secret, entry, text, version)
        return version

    def _activate(self, target: Target, entry: Entry, expected: str) -> str:
        secret = self._described(self.place(target))
        if secret is None:
            return self._created(target, entry, expected)
        shown = self._shown(secret)
        text, version = made(target, merged(target, shown or {}, entry), entry.version_id)
        pending = secret.labels.get(PENDING) == version
        if version != secret.token:
            self._refuse(target, secret, shown, expected)
            pending = self._place_copy(target, secret, entry, text, version) or pending
            self._move(secret, version)
        if pending:
            self._unlabel(secret, version, PENDING)
        return version

    def _withdraw(self, target: Target, owner: str, version_id: str, expected: str) -> str:
        """Write a version without our keys under a label of its own, then move AWSCURRENT there."""
        secret = self._described(self.place(target))
        if secret is None:
            return ""
        shown = self._shown(secret) or {}
        left = without_ours(target, shown, marked=secret.owner, owner=owner, version_id=version_id)
        if left is None:
            return secret.token
        if secret.token != expected:
            raise Conflict
        self._refuse_locked(secret)
        secret_text = str(shown.get(target.keys.secret))
        text, version = made(target, left, f"without {version_id}", key=secret_text)
        if not secret.labels_of(version):
            self._put(secret, text, version, WITHDRAWN)
        self._move(secret, version)
        self._unlabel(secret, version, WITHDRAWN)
        return version

    def _retire(self, target: Target, version_id: str, locator: str, how: str) -> None:
        """Take our labels from exactly one version, never the one shown.

        A VersionId is never another version's: it is made from the bytes. What has no label is
        deprecated, and the service deletes it.
        """
        del version_id, how
        secret = self._described(self.place(target))
        labels = secret.labels_of(locator) if secret is not None else []
        if secret is None or not labels:
            return
        if CURRENT in labels:
            raise Rejected(f"{self.name}: that copy is the one shown")
        if secret.lagging:
            raise DestinationUnavailable(
                f"{self.name}: the replica of {secret.name} in {', '.join(secret.lagging)} is behind",
                sent=False,
            )
        ours = [label for label in labels if label in (PENDING, PREVIOUS, WITHDRAWN)]
        for label in ours:
            self._update(secret, label, remove_from=locator)
        if len(labels) > len(ours):
            raise Rejected(
                f"{self.name}: an old copy of {secret.name} has a label of somebody else",
                hint="it stays readable there until they take it away",
            )

    def _shown(self, secret: AwsSecret) -> dict[str, Any] | None:
        """Return what agents read, {} where that is nothing, None where it is no entry."""
        if secret.deleted:
            raise self._is_deleted(secret)
        try:
            return self._values(secret, secret.token) if secret.token else {}
        except _Changed:
            raise Conflict from None

    def _refuse(
        self, target: Target, secret: AwsSecret, shown: dict[str, Any] | None, expected: str
    ) -> None:
        if secret.token != expected:
            raise Conflict
        self._refuse_locked(secret)
        if shown is None:
            raise Rejected(f"{self.name}: {secret.name} is no JSON object")
        refuse_foreign(target, shown, owner=secret.owner, store_id=self.store_id)

    def _refuse_locked(self, secret: AwsSecret) -> None:
        if not secret.locked:
            return
        hint = "choose another path"
        if secret.locked == AWS_ROTATES:
            hint = "one of us only: `aws secretsmanager cancel-rotate-secret --secret-id NAME`"
        raise Rejected(f"{self.name}: {secret.name}: {secret.locked}", hint=hint)

    def _is_deleted(self, secret: AwsSecret) -> Rejected:
        return Rejected(
            f"{self.name}: {secret.name} is marked for deletion",
            hint=f"`aws secretsmanager restore-secret --secret-id {secret.name}`, or another path",
        )

    def _created(self, target: Target, entry: Entry, expected: str) -> str:
        """Make the entry. A first value is shown at once (rule 8)."""
        if expected:
            raise Conflict
        name = self.place(target)
        text, version = made(target, merged(target, {}, entry), entry.version_id)
        more = {"KmsKeyId": self.options.kms_key_id} if self.options.kms_key_id else {}
        answer = self._ask(
            "create_secret",
            what=name,
            Name=name,
            ClientRequestToken=version,
            SecretString=text,
            Tags=self._marks(entry, made=True),
            **more,
        )
        if answer.get("Name") != name or answer.get("VersionId") != version:
            raise DestinationUnavailable(f"{self.name}: the answer to a write makes no sense")
        self._remember(name, version)
        return version

    def _place_copy(
        self, target: Target, secret: AwsSecret, entry: Entry, text: str, version: str
    ) -> bool:
        """See that the copy is there; returns whether it was put now, under AWSPENDING.

        That label is stolen from nobody: what we staged and gave up we may move it from.
        """
        if secret.owner != entry.owner:
            marks = self._marks(entry, made=False)
            self._ask("tag_resource", what=secret.name, SecretId=secret.arn, Tags=marks)
        if secret.labels_of(version):
            return False
        try:
            if self._staged(target, secret) == "":
                raise Conflict(f"{self.name}: somebody else's {PENDING} is on {secret.name}")
        except _Changed:
            raise Conflict from None
        self._put(secret, text, version, PENDING)
        return True

    def _marks(self, entry: Entry, *, made: bool) -> list[dict[str, str]]:
        tags = {**(self.options.tags if made else {}), OWNER: entry.owner, FENCE: str(entry.fence)}
        return [{"Key": key, "Value": text} for key, text in tags.items()]

    def _put(self, secret: AwsSecret, text: str, version: str, label: str) -> None:
        answer = self._ask(
            "put_secret_value",
            what=secret.name,
            SecretId=secret.arn,
            ClientRequestToken=version,
            SecretString=text,
            VersionStages=[label],
        )
        if answer.get("ARN") != secret.arn or answer.get("VersionId") != version:
            raise DestinationUnavailable(f"{self.name}: the answer to a write makes no sense")

    def _move(self, secret: AwsSecret, version: str) -> None:
        """Move AWSCURRENT, only from where we saw it."""
        try:
            self._update(secret, CURRENT, move_to=version, remove_from=secret.token)
        except (Rejected, Conflict):
            # Perhaps somebody was faster: the codes do not tell that from a request in bad form.
            now = self._described(secret.name)
            if now is None or now.token not in (version, secret.token):
                raise Conflict from None
            if now.token != version:
                raise
        self._remember(secret.name, version)

    def _unlabel(self, secret: AwsSecret, version: str, label: str) -> None:
        """Take a label of ours away; what is done is done, and the next rotation moves it anyway."""
        with contextlib.suppress(DestinationError):
            self._update(secret, label, remove_from=version, patient=True)

    def _update(
        self,
        secret: AwsSecret,
        label: str,
        *,
        move_to: str = "",
        remove_from: str = "",
        patient: bool = False,
    ) -> None:
        ends = {"MoveToVersionId": move_to, "RemoveFromVersionId": remove_from}
        answer = self._ask(
            "update_secret_version_stage",
            what=secret.name,
            patient=patient,
            SecretId=secret.arn,
            VersionStage=label,
            **{key: version for key, version in ends.items() if version},
        )
        if answer.get("ARN") != secret.arn:
            raise DestinationUnavailable(f"{self.name}: the answer to a write makes no sense")

    def _remember(self, name: str, version: str) -> None:
        with self._guard:
            self._written[name] = _Written(version=version, at=time.monotonic())

    # --- requests ---------------------------------------------------------------------------

    def _call(self, body: Callable[[], T], *, used: timedelta = timedelta(0)) -> T:
        """Make the client in the caller's thread: it takes longer than many a call may."""
        self._client()
        return super()._call(body, used=used)

    def _client(self) -> Any:
        with self._guard:
            if self._made is None:
                self._made = self._door.client(
                    "secretsmanager", endpoint=self.options.endpoint, keys=self._login.keys
                )
            return self._made

    def _sts(self, keys: Callable[[], Keys] | None) -> Any:
        return self._door.client("sts", endpoint=self.options.sts_endpoint, keys=keys)

    def _ask(self, method: str, *, what: str, patient: bool = False, **parameters: Any) -> Any:
        """Make one request; a write waits for its turn first. Raises DestinationError, _Absent."""
        write = method in _WRITES
        if write:
            deadline = self.options.call_deadline
            longest = deadline / 2 if patient else min(LONGEST_PAUSE, deadline / 2)
            time.sleep(self._budget.take(longest).total_seconds())
        return self._requested(self._client(), method, what=what, write=write, **parameters)

    def _requested(
        self, client: Any, method: str, *, what: str, write: bool, **parameters: Any
    ) -> Any:
        """Ask once; with other credentials once more where these have run out, which did nothing."""
        keys, first = self._login.ready(), True
        while True:
            try:
                answer = getattr(client, method)(**parameters)
            except Exception as error:  # noqa: BLE001 - the SDK's; none of its text goes on
                code = code_of(error)
                if first and code in WORN_OUT and self._login.again(keys):
                    first = False
                    continue
                if code == _ABSENT and not write:
                    raise _Absent from None
                refusal = understand(
                    error, name=self.name, operation=_NAMES[method], what=what, write=write
                )
                raise refusal from None
            if not isinstance(answer, dict):
                raise DestinationUnavailable(f"{self.name}: the answer makes no sense", sent=write)
            return answer

    def _translate(self, error: Exception) -> DestinationError:
        return understand(error, name=self.name, operation="the call", what="it", write=True)


class _Absent(Exception):
    """The service has no such entry, or no such version of it."""
