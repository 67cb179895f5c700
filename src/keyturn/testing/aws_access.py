"""Who may do what at the AWS stand-in: signatures, keys that run out, policies, STS.

As strict as the real service about what is signed (Signature Version 4, all of it), about keys,
session tokens and their ends, and about policies: what no statement allows is refused, and a
condition that is not understood allows nothing. Sources: "Signature Version 4", the policy evaluation
logic of IAM, the STS API reference.
"""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import json
import re
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs
from xml.sax.saxutils import escape

from keyturn.testing.wire import Answer, Call

SKEW = timedelta(minutes=15)
_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/,]+)/(\d{8})/([a-z0-9-]+)/([a-z]+)/aws4_request, ?"
    r"SignedHeaders=([a-z0-9;-]+), ?Signature=([0-9a-f]{64})"
)
_NEEDED = {"host", "x-amz-date"}
Policy = Mapping[str, Any]


class AccessRefused(Exception):
    """A request is refused before it reaches a service: code, status and text."""

    def __init__(self, code: str, text: str = "refused", *, status: int = 400) -> None:
        super().__init__(code)
        self.code, self.text, self.status = code, text, status


@dataclass(slots=True, kw_only=True)
class Principal:
    """Whoever holds a pair of keys. `policy` None: may do everything in the account."""

    account: str
    arn: str
    access: str
    secret: str = field(repr=False)
    token: str | None = field(default=None, repr=False)
    ends_at: datetime | None = None
    policy: Policy | None = None


@dataclass(slots=True, kw_only=True)
class AssumableRole:
    """A role: who may assume it, and what it may then do."""

    arn: str
    policy: Policy | None = None
    external_id: str | None = None
    web_identity_token: str | None = None  # the only one that is taken
    life: timedelta = timedelta(hours=1)

    @property
    def account(self) -> str:
        """The account that it belongs to."""
        return self.arn.split(":")[4]


class Access:
    """Keys, roles and the answers of STS. Thread-safe."""

    def __init__(self) -> None:
        self.principals: dict[str, Principal] = {}
        self.roles: dict[str, AssumableRole] = {}
        self._guard = threading.Lock()

    def new_keys(self, account: str, *, user: str, policy: Policy | None = None) -> Principal:
        """Make a user with keys that do not end."""
        return self._made(account, f"arn:aws:iam::{account}:user/{user}", "AKIA", policy=policy)

    def new_role(self, account: str, name: str, **more: Any) -> AssumableRole:
        """Make a role that can be assumed."""
        role = AssumableRole(arn=f"arn:aws:iam::{account}:role/{name}", **more)
        self.roles[role.arn] = role
        return role

    def session(self, role: AssumableRole, name: str) -> Principal:
        """Make keys of a role that end."""
        short = role.arn.rpartition("/")[2]
        arn = f"arn:aws:sts::{role.account}:assumed-role/{short}/{name}"
        return self._made(role.account, arn, "ASIA", policy=role.policy, life=role.life)

    def _made(
        self,
        account: str,
        arn: str,
        start: str,
        *,
        policy: Policy | None,
        life: timedelta | None = None,
    ) -> Principal:
        one = Principal(
            account=account,
            arn=arn,
            access=start + secrets.token_hex(8).upper(),
            secret=secrets.token_urlsafe(30),
            token=None if life is None else secrets.token_urlsafe(60),
            ends_at=None if life is None else datetime.now(UTC) + life,
            policy=policy,
        )
        with self._guard:
            self.principals[one.access] = one
        return one

    # --- who is it --------------------------------------------------------------------------

    def known(self, call: Call, *, service: str) -> tuple[Principal, str]:
        """Return who has signed a call, and for which region. Raises AccessRefused."""
        found = _AUTHORIZATION.fullmatch(call.headers.get("authorization", ""))
        if found is None:
            raise AccessRefused(_name("MissingAuthenticationToken", service), status=403)
        access, day, region, signed_for, names, signature = found.groups()
        one = self.principals.get(access)
        if one is None or signed_for != service:
            code = "UnrecognizedClientException" if service != "sts" else "InvalidClientTokenId"
            raise AccessRefused(code, "The security token included in the request is invalid.")
        wrong = AccessRefused(
            "InvalidSignatureException" if service != "sts" else "SignatureDoesNotMatch", status=403
        )
        signed = set(names.split(";"))
        must = _NEEDED | {n for n in call.headers if n.startswith("x-amz-")}
        if not must <= signed or not _is_now(call.headers.get("x-amz-date", ""), day):
            raise wrong
        scope = f"{day}/{region}/{service}/aws4_request"
        if not hmac.compare_digest(signature, _signature(call, names, scope, one.secret)):
            raise wrong
        if call.headers.get("x-amz-security-token") != one.token:
            code = "UnrecognizedClientException" if service != "sts" else "InvalidClientTokenId"
            raise AccessRefused(code)
        if one.ends_at is not None and one.ends_at <= datetime.now(UTC):
            raise AccessRefused(_name("ExpiredToken", service), status=403)
        return one, region

    def refuse(
        self, one: Principal, action: str, resource: str, context: Mapping[str, str] | None = None
    ) -> None:
        """Refuse what the policy of a principal does not allow. Raises AccessRefused."""
        if one.policy is None or allows(one.policy, action, resource, context or {}):
            return
        if action.startswith("kms:"):
            raise AccessRefused("AccessDeniedException", "Access to KMS is not allowed")
        raise AccessRefused(
            "AccessDeniedException",
            f"User: {one.arn} is not authorized to perform: {action} on resource: {resource}"
            f" because no identity-based policy allows the {action} action",
        )

    # --- STS --------------------------------------------------------------------------------

    def sts(self, call: Call) -> Answer:
        """Answer a call of STS."""
        form = {key: values[0] for key, values in parse_qs(call.body.decode()).items()}
        try:
            if call.operation == "AssumeRoleWithWebIdentity":
                return self._by_web_identity(form)
            one, _ = self.known(call, service="sts")
            if call.operation == "AssumeRole":
                return self._assumed(one, form)
            if call.operation != "GetCallerIdentity":
                return _xml_refusal(AccessRefused("InvalidAction"))
            inner = f"<Arn>{one.arn}</Arn><UserId>{one.access}</UserId>"
            return _xml(call.operation, f"{inner}<Account>{one.account}</Account>")
        except AccessRefused as refused:
            return _xml_refusal(refused)

    def _assumed(self, one: Principal, form: Mapping[str, str]) -> Answer:
        role = self.roles.get(form.get("RoleArn", ""))
        if role is None or role.web_identity_token is not None:
            raise AccessRefused(
                "AccessDenied", "not authorized to perform: sts:AssumeRole", status=403
            )
        if role.external_id != form.get("ExternalId"):
            raise AccessRefused(
                "AccessDenied", "not authorized to perform: sts:AssumeRole", status=403
            )
        if one.policy is not None and not allows(one.policy, "sts:AssumeRole", role.arn, {}):
            raise AccessRefused(
                "AccessDenied", "not authorized to perform: sts:AssumeRole", status=403
            )
        return self._lent("AssumeRole", role, form)

    def _by_web_identity(self, form: Mapping[str, str]) -> Answer:
        role = self.roles.get(form.get("RoleArn", ""))
        if role is None or role.web_identity_token is None:
            raise AccessRefused("AccessDenied", "not authorized", status=403)
        if form.get("WebIdentityToken") != role.web_identity_token:
            raise AccessRefused("InvalidIdentityToken", "the token is not valid")
        return self._lent("AssumeRoleWithWebIdentity", role, form)

    def _lent(self, operation: str, role: AssumableRole, form: Mapping[str, str]) -> Answer:
        name = form.get("RoleSessionName", "")
        if not re.fullmatch(r"[\w+=,.@-]{2,64}", name):
            raise AccessRefused("ValidationError")
        made = self.session(role, name)
        ends = made.ends_at.strftime("%Y-%m-%dT%H:%M:%SZ") if made.ends_at else ""
        inner = (
            f"<Credentials><AccessKeyId>{made.access}</AccessKeyId>"
            f"<SecretAccessKey>{escape(made.secret)}</SecretAccessKey>"
            f"<SessionToken>{escape(made.token or '')}</SessionToken>"
            f"<Expiration>{ends}</Expiration></Credentials>"
            f"<AssumedRoleUser><Arn>{made.arn}</Arn><AssumedRoleId>x:{name}</AssumedRoleId></AssumedRoleUser>"
        )
        return _xml(operation, inner)


# --- policies -------------------------------------------------------------------------------


def allows(policy: Policy, action: str, resource: str, context: Mapping[str, str]) -> bool:
    """Whether a policy allows it: one statement must, and none may deny it."""
    statements = policy.get("Statement", [])
    statements = [statements] if isinstance(statements, dict) else statements
    effects = [one.get("Effect") for one in statements if _matches(one, action, resource, context)]
    return "Allow" in effects and "Deny" not in effects


def _matches(
    statement: Mapping[str, Any], action: str, resource: str, context: Mapping[str, str]
) -> bool:
    actions, resources = _listed(statement.get("Action")), _listed(statement.get("Resource"))
    return (
        any(_like(action.lower(), one.lower()) for one in actions)
        and any(_like(resource, one) for one in resources)
        and _holds(statement.get("Condition", {}), context)
    )


def _holds(conditions: Mapping[str, Any], context: Mapping[str, str]) -> bool:
    for operator, pairs in conditions.items():
        if operator not in ("StringEquals", "StringLike", "ForAnyValue:StringEquals"):
            return False
        for key, wanted in pairs.items():
            has = context.get(key)
            like = operator == "StringLike"
            if has is None or not any(_like(has, w) if like else has == w for w in _listed(wanted)):
                return False
    return True


def _like(text: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(text, pattern.replace("[", "[[]"))


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


# --- signatures -----------------------------------------------------------------------------


def _signature(call: Call, names: str, scope: str, secret: str) -> str:
    path, _, query = call.path.partition("?")
    lines = "".join(f"{n}:{' '.join(call.headers.get(n, '').split())}\n" for n in names.split(";"))
    digest = hashlib.sha256(call.body).hexdigest()
    request = f"{call.method}\n{path}\n{query}\n{lines}\n{names}\n{digest}"
    whole = hashlib.sha256(request.encode()).hexdigest()
    text = f"AWS4-HMAC-SHA256\n{call.headers['x-amz-date']}\n{scope}\n{whole}"
    key = f"AWS4{secret}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    return hmac.digest(key, text.encode(), "sha256").hex()


def _is_now(stamp: str, day: str) -> bool:
    try:
        at = datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        return False
    return stamp.startswith(day) and abs(at - datetime.now(UTC)) <= SKEW


def _name(code: str, service: str) -> str:
    """JSON services put a word behind what the others call by the bare name."""
    return code if service == "sts" else f"{code}Exception"


def refusal(code: str, text: str, *, status: int = 400, **headers: str) -> Answer:
    """Return what a JSON service of AWS answers to what it refuses."""
    body = json.dumps({"__type": code, "message": text}).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(
        status=status, headers={"Content-Type": "application/x-amz-json-1.1", **named}, body=body
    )


def _xml(operation: str, inner: str) -> Answer:
    body = (
        f'<{operation}Response xmlns="https://sts.amazonaws.com/doc/2011-06-15/">'
        f"<{operation}Result>{inner}</{operation}Result>"
        f"<ResponseMetadata><RequestId>{secrets.token_hex(8)}</RequestId></ResponseMetadata>"
        f"</{operation}Response>"
    )
    return Answer(status=200, headers={"Content-Type": "text/xml"}, body=body.encode())


def _xml_refusal(refused: AccessRefused) -> Answer:
    body = (
        '<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error>'
        f"<Type>Sender</Type><Code>{refused.code}</Code><Message>{escape(refused.text)}</Message>"
        "</Error><RequestId>x</RequestId></ErrorResponse>"
    )
    return Answer(status=refused.status, headers={"Content-Type": "text/xml"}, body=body.encode())
