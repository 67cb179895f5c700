"""A stand-in for AWS Secrets Manager and STS on loopback, for demonstrations, tests and benchmarks.

moto keeps the secrets; in front of it stands what the real service enforces and moto does not:
signatures, policies, the rules and quotas of `aws_strict`. To try it out:

    python -m keyturn.testing.aws [--port 4599] [--folder DIR]

Needs the wheel `moto[server,secretsmanager]`.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import secrets
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moto.moto_server.werkzeug_app import create_backend_app
from werkzeug.test import EnvironBuilder, run_wsgi_app

from keyturn.testing.aws_access import (
    Access,
    AccessRefused,
    AssumableRole,
    Policy,
    Principal,
    refusal,
)
from keyturn.testing.aws_strict import WRITES, Found, Strict
from keyturn.testing.wire import Answer, Call, Server

ACCOUNT, REGION = "123456789012", "eu-west-1"
RATE = 50  # writes a second, of an account and region together
_METADATA = "/latest/meta-data/iam/security-credentials/"
_MANAGED_KEY = "alias/aws/secretsmanager"
_apps_guard = threading.Lock()


@dataclass(slots=True, kw_only=True)
class Instance:
    """What the metadata service and a container's agent give out, each of them strictly."""

    role: AssumableRole | None = None
    container_token: str | None = None
    tokens: set[str] = field(default_factory=set)


class StandIn:
    """A running stand-in. Each has accounts of its own, since moto's are of the whole process."""

    def __init__(
        self,
        *,
        account: str | None = None,
        port: int = 0,
        certificate: tuple[Path, Path] | None = None,
        ca_file: Path | None = None,
        rate: float = RATE,
    ) -> None:
        self.account = account or "".join(secrets.choice("123456789") for _ in range(12))
        self.access, self.rate, self.ca_file = Access(), rate, ca_file
        self.instance = Instance()
        self._strict: dict[tuple[str, str], Strict] = {}
        self._guard = threading.Lock()
        self._moto = create_backend_app("secretsmanager")
        self.root = self.access.new_keys(self.account, user="root")
        self.front = Server(self.serve, port=port, certificate=certificate)
        self.address = self.front.address

    def close(self) -> None:
        """Stop listening."""
        self.front.close()

    # --- what tests and people want of it ---------------------------------------------------

    def keys_file(self, folder: Path, one: Principal | None = None) -> Path:
        """Write keys into a file as an administrator would; by default those that may do everything."""
        found = one or self.root
        path = folder / f"{found.access}.json"
        path.touch(mode=0o600)
        content = {"AccessKeyId": found.access, "SecretAccessKey": found.secret}
        path.write_text(
            json.dumps({**content, "SessionToken": found.token} if found.token else content)
        )
        return path

    def strict(self, region: str = REGION, account: str | None = None) -> Strict:
        """Return the rules of an account and region."""
        key = account or self.account, region
        with self._guard:
            if key not in self._strict:
                self._strict[key] = Strict(*key, rate=self.rate)
            return self._strict[key]

    def secret(self, name: str, region: str = REGION, account: str | None = None) -> Found | None:
        """Return moto's own record of a secret."""
        return self.strict(region, account).find(name)

    def writes(self) -> list[str]:
        """Return the writes that were asked for, in order."""
        return [call.operation for call, _ in self.front.seen if call.operation in WRITES]

    # --- serving ----------------------------------------------------------------------------

    def serve(self, call: Call) -> Answer:
        """Answer one call, as the services of AWS do."""
        if call.path.startswith(("/latest/", "/container")):
            return self._metadata(call)
        if not call.headers.get("x-amz-target", "").startswith("secretsmanager."):
            return self.access.sts(call)
        try:
            return self._secrets_manager(call)
        except AccessRefused as refused:
            return refusal(refused.code, refused.text, status=refused.status)

    def _secrets_manager(self, call: Call) -> Answer:
        one, region = self.access.known(call, service="secretsmanager")
        try:
            asked = json.loads(call.body)
        except ValueError:
            raise AccessRefused("SerializationException") from None
        strict = self.strict(region, one.account)
        named = asked.get("SecretId", asked.get("Name", "*"))
        secret = strict.find(named)
        bare = (
            named
            if str(named).startswith("arn:")
            else f"arn:aws:secretsmanager:{region}:{one.account}:secret:{named}"
        )
        self.access.refuse(
            one, f"secretsmanager:{call.operation}", secret.arn if secret else str(bare)
        )
        if call.operation == "CreateSecret" and asked.get("Tags"):
            self.access.refuse(one, "secretsmanager:TagResource", str(bare))
        self._refuse_key(one, region, call.operation, asked, secret)
        answer = strict.serve(
            call.operation, asked, lambda: self._by_moto(call, one.account, asked, strict)
        )
        body = json.dumps(answer).encode()
        return Answer(status=200, headers={"Content-Type": "application/x-amz-json-1.1"}, body=body)

    def _refuse_key(
        self, one: Principal, region: str, operation: str, asked: dict[str, Any], secret: Any
    ) -> None:
        """Ask for the rights on the key, where it is not the service's own."""
        key = asked.get("KmsKeyId") or getattr(
            getattr(secret, "source", secret), "kms_key_id", None
        )
        needed = {"GetSecretValue": ("Decrypt",), "PutSecretValue": ("GenerateDataKey", "Decrypt"),
                  "CreateSecret": ("GenerateDataKey", "Decrypt")}.get(operation, ())  # fmt: skip
        if not key or key == _MANAGED_KEY:
            return
        context = {"kms:ViaService": f"secretsmanager.{region}.amazonaws.com"}
        if key.startswith("alias/"):
            context["kms:ResourceAliases"] = key
        if not key.startswith(("arn:", "key/")):
            key = f"key/{key}"
        arn = key if key.startswith("arn:") else f"arn:aws:kms:{region}:{one.account}:{key}"
        for action in needed:
            self.access.refuse(one, f"kms:{action}", arn, context)

    def _by_moto(
        self, call: Call, account: str, asked: dict[str, Any], strict: Strict
    ) -> dict[str, Any]:
        headers: Any = {
            "Content-Type": "application/x-amz-json-1.1",
            "X-Amz-Target": f"secretsmanager.{call.operation}",
            "Authorization": call.headers["authorization"],
            "X-Moto-Account-Id": account,
            "Host": f"secretsmanager.{strict.backend.region_name}.amazonaws.com",
        }
        data = json.dumps(asked).encode()
        builder = EnvironBuilder(method="POST", path="/", data=data, headers=headers)
        with _apps_guard:
            body, status, _ = run_wsgi_app(self._moto, builder.get_environ(), buffered=True)
            text = b"".join(body)
        builder.close()
        found: dict[str, Any] = json.loads(text or b"{}")
        if not status.startswith("200"):
            code = str(found.get("__type", "InternalServiceError")).rpartition("#")[2]
            raise AccessRefused(code, str(found.get("message", found.get("Message", ""))))
        return found

    def _metadata(self, call: Call) -> Answer:
        """Play the instance's metadata service (IMDSv2 only) and a container's agent."""
        if call.path == "/latest/api/token":
            if call.method != "PUT" or "x-aws-ec2-metadata-token-ttl-seconds" not in call.headers:
                return Answer(status=400)
            self.instance.tokens.add(token := secrets.token_urlsafe(30))
            return Answer(status=200, body=token.encode())
        role = self.instance.role
        if call.path.startswith("/container"):
            wanted = self.instance.container_token
            if wanted is not None and call.headers.get("authorization") != wanted:
                return Answer(status=401)
        elif call.headers.get("x-aws-ec2-metadata-token") not in self.instance.tokens:
            return Answer(status=401)
        if role is None:
            return Answer(status=404)
        name = role.arn.rpartition("/")[2]
        if call.path == _METADATA:
            return Answer(status=200, body=name.encode())
        made = self.access.session(role, "i-0123456789abcdef0")
        ends = made.ends_at or datetime.now(UTC)
        content = {"Code": "Success", "AccessKeyId": made.access, "SecretAccessKey": made.secret,
                   "Token": made.token, "Expiration": ends.strftime("%Y-%m-%dT%H:%M:%SZ")}  # fmt: skip
        return Answer(status=200, body=json.dumps(content).encode())


@contextlib.contextmanager
def stand_in(folder: Path, *, tls: bool = False, **more: Any) -> Iterator[StandIn]:
    """Run a stand-in until the block ends; with `tls` by a certificate of an authority of its own."""
    certificate = ca_file = None
    if tls:
        from keyturn.testing.certificates import new_authority

        authority = new_authority(folder / "tls")
        certificate, ca_file = authority.issue("aws"), authority.ca_file
    one = StandIn(certificate=certificate, ca_file=ca_file, **more)
    try:
        yield one
    finally:
        one.close()


def connection(one: StandIn, keys: Path, *, region: str = REGION) -> dict[str, Any]:
    """Return what to put under `connections.NAME` of a configuration."""
    found: dict[str, Any] = {
        "type": "aws",
        "region": region,
        "auth": {"method": "keys", "file": str(keys)},
        "endpoint": one.address,
        "sts_endpoint": one.address,
    }
    return {**found, "ca_file": str(one.ca_file)} if one.ca_file else found


def binary(text: bytes) -> str:
    """Return bytes as a JSON service takes them."""
    return base64.b64encode(text).decode()


def main(arguments: list[str] | None = None) -> None:
    """Run until interrupted; print what to put in a configuration."""
    parser = argparse.ArgumentParser(prog="python -m keyturn.testing.aws", description=__doc__)
    parser.add_argument("--port", type=int, default=4599)
    parser.add_argument("--folder", type=Path, help="where the keys go; by default a new one")
    parser.add_argument("--tls", action="store_true", help="https, by an authority of its own")
    parser.add_argument("--policy", type=Path, help="file with an IAM policy that the keys have")
    given = parser.parse_args(arguments)
    folder = (given.folder or Path(tempfile.mkdtemp(prefix="keyturn-aws-"))).resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with stand_in(folder, tls=given.tls, port=given.port, account=ACCOUNT) as one:
        policy: Policy | None = json.loads(given.policy.read_text()) if given.policy else None
        who = one.access.new_keys(ACCOUNT, user="keyturn", policy=policy)
        lines = ["connections:", "  aws:"]
        for key, value in connection(one, one.keys_file(folder, who)).items():
            lines.append(f"    {key}: {json.dumps(value)}")
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
