"""What the tests of Vault and OpenBao share: a root, namespaces, logins, the contract's hooks."""

from __future__ import annotations

import contextlib
import itertools
import json
import urllib.error
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from keyturn.core.model import Target
from keyturn.destinations.vault import VaultDestination, VaultOptions
from keyturn.destinations.vault_auth import AuthOptions
from keyturn.testing import openbao
from keyturn.testing.contract import OTHER_STORE_ID, STORE_ID, DestinationContract
from keyturn.testing.fakes import FakeClock
from keyturn.testing.kubernetes import ApiServer
from keyturn.testing.production import await_true
from keyturn.testing.wire import Answer, Call, Forward
from support.recording_proxy import Proxy

AUDIENCE = "vault"  # of the service account tokens
Root = Callable[..., Any]  # (method, path, body=None) -> what the server says, as root

_NUMBERS = itertools.count(1)


def new_prefix() -> str:
    """Return a folder that no other test uses."""
    return f"p{next(_NUMBERS)}"


def root_of(server: openbao.Server) -> Root:
    """Give a way to ask a server in dev mode as root, without any code of the adapter."""

    def ask(method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        found = openbao.call(server, method, path, data)
        return json.loads(found) if found else {}

    return ask


def connect(
    address: str, auth: AuthOptions, *, store_id: str = STORE_ID, **options: Any
) -> VaultDestination:
    """Make a connection."""
    values = {"address": address, "prefix": new_prefix(), **options}
    return VaultDestination(
        VaultOptions(auth=auth, **values), name="bao", store_id=store_id, clock=FakeClock()
    )


def approle(
    root: Root, folder: Path, name: str, *, policy: str, ttl: str = "60s", **role: Any
) -> AuthOptions:
    """Make a role with this policy alone and put its secret id into a file."""
    with contextlib.suppress(urllib.error.HTTPError):
        root("POST", "sys/auth/approle", {"type": "approle"})
    root("PUT", f"sys/policies/acl/{name}", {"policy": policy})
    wanted = {"token_policies": [name], "token_ttl": ttl, "token_no_default_policy": True, **role}
    root("POST", f"auth/approle/role/{name}", wanted)
    role_id = root("GET", f"auth/approle/role/{name}/role-id")["data"]["role_id"]
    found = root("POST", f"auth/approle/role/{name}/secret-id", {})
    path = folder / f"{name}-secret-id"
    path.touch(mode=0o600)
    path.write_text(found["data"]["secret_id"] + "\n")
    return AuthOptions(method="approle", role_id=role_id, secret_id_file=str(path))


def in_namespace(root: Root, namespace: str) -> Root:
    """Give a way to ask inside of a namespace, which the server takes as the begin of a path."""
    return lambda method, path, body=None: root(method, f"{namespace}/{path}", body)


def new_namespace(root: Root, path: str, *, mount: str) -> Root:
    """Make a namespace, beneath one that is there, with a mount that demands check-and-set."""
    above, _, name = path.rpartition("/")
    (in_namespace(root, above) if above else root)("PUT", f"sys/namespaces/{name}", {})
    inside = in_namespace(root, path)
    inside("POST", f"sys/mounts/{mount}", {"type": "kv", "options": {"version": "2"}})
    await_true(lambda: inside("POST", f"{mount}/config", {"cas_required": True}) == {})
    return inside


def kubernetes(
    root: Root,
    folder: Path,
    cluster: ApiServer,
    name: str,
    *,
    policy: str,
    ttl: str = "60s",
    mount: str | None = None,
    **role: Any,
) -> AuthOptions:
    """Make a role for one service account and project a token of it, readable for anybody."""
    place = mount or "kubernetes"
    with contextlib.suppress(urllib.error.HTTPError):
        root("POST", f"sys/auth/{place}", {"type": "kubernetes"})
    config = {
        "kubernetes_host": cluster.address,
        "kubernetes_ca_cert": cluster.ca_file.read_text(),
        "token_reviewer_jwt": cluster.reviewer,
        "disable_local_ca_jwt": True,
    }
    root("POST", f"auth/{place}/config", config)
    root("PUT", f"sys/policies/acl/{name}", {"policy": policy})
    bound = {
        "bound_service_account_names": [name],
        "bound_service_account_namespaces": ["prod"],
        "audience": AUDIENCE,
        "token_policies": [name],
        "token_ttl": ttl,
        "token_no_default_policy": True,
    }
    root("POST", f"auth/{place}/role/{name}", {**bound, **role})
    path = folder / f"{name}-service-account"
    project(path, cluster.token(cluster.account("prod", name), audiences=[AUDIENCE]))
    options = {"method": "kubernetes", "role": name, "token_file": str(path)}
    return AuthOptions.model_validate({**options, **({"mount": mount} if mount else {})})


def project(path: Path, token: str, *, mode: int = 0o644) -> None:
    """Put a service account's token there at one stroke, as kubelet replaces it."""
    new = path.with_suffix(".new")
    new.write_text(token)
    new.chmod(mode)
    new.replace(path)


def printed_policy(mount: str, prefix: str, targets: list[Target], **more: Any) -> str:
    """Return what `keyturn policy vault` prints for these entries, for both ways to retire."""
    login = {"method": "token", "token_file": "/x"}
    options = VaultOptions(address="https://x", auth=login, mount=mount, prefix=prefix, **more)
    entries = [(target, how) for target in targets for how in ("disable", "destroy")]
    return VaultDestination.least_policy(options, entries)


class VaultContract(DestinationContract):
    """The contract's hooks; `root` is set by the fixture of the destination."""

    root: Root

    def read_raw(self, destination: Any, target: Target) -> Mapping[str, Any] | None:
        path = f"{destination.options.mount}/data/{destination.place(target)}"
        try:
            found: Mapping[str, Any] = self.root("GET", path)["data"]["data"]
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            return None
        return found

    def write_raw(self, destination: Any, target: Target, values: Mapping[str, Any]) -> None:
        path = f"{destination.options.mount}/data/{destination.place(target)}"
        try:
            number = self.root("GET", path)["data"]["metadata"]["version"]
        except urllib.error.HTTPError:
            number = 0
        self.root("POST", path, {"data": dict(values), "options": {"cas": number}})


class ProxiedContract(VaultContract):
    """Through a proxy, which can show what the real server never holds and refuse what it allows."""

    proxy: Proxy

    def write_garbage(self, destination: Any, target: Target) -> bool:
        """KV v2 takes objects only; a server that is not one may show anything."""
        place = f"/data/{destination.place(target)}"
        metadata = {"version": 3, "custom_metadata": None}
        body = json.dumps({"data": {"data": "no object", "metadata": metadata}}).encode()
        before = self.proxy.rule

        def rule(call: Call, forward: Forward) -> Answer:
            if call.path.endswith(place):
                assert call.method == "GET", "garbage was written over"
                return Answer(status=200, body=body)
            return before(call, forward)

        self.proxy.rule = rule
        return True

    @contextlib.contextmanager
    def denied(self, destination: Any) -> Iterator[bool]:
        """Nobody takes rights from root: the proxy answers as the server does to others."""
        before, mount = self.proxy.rule, f"/v1/{destination.options.mount}/"

        def rule(call: Call, forward: Forward) -> Answer:
            if call.path.startswith(mount):
                return Answer(status=403, body=b'{"errors":["permission denied"]}')
            return before(call, forward)

        self.proxy.rule = rule
        yield True
        self.proxy.rule = before


class ByPolicyContract(VaultContract):
    """By AppRole, with what `keyturn policy vault` prints for the entries of the test and no more."""

    role: str  # also the name of its policy
    granted: list[Target]
    prefix: str
    mount: str
    namespace: str | None = None

    def _target(self, name: str, **more: Any) -> Target:
        target = super()._target(name, **more)
        self.granted.append(target)
        self.grant(self.granted)
        return target

    def grant(self, targets: list[Target]) -> None:
        """Write the policy for these entries; it holds at once, for tokens that are out as well."""
        text = printed_policy(self.mount, self.prefix, targets, namespace=self.namespace)
        self.root("PUT", f"sys/policies/acl/{self.role}", {"policy": text})

    @contextlib.contextmanager
    def denied(self, destination: Any) -> Iterator[bool]:
        """Take the entries out of the policy."""
        self.grant([])
        yield True
        self.grant(self.granted)

    def by_policy(
        self, address: str, folder: Path, *, mount: str, uses: int = 0, **options: Any
    ) -> VaultDestination:
        """Make the connection, and everything that it needs at the server."""
        self.prefix = self.role = new_prefix()
        self.mount, self.granted = mount, []
        auth = self.login(folder, uses=uses)
        options = {"namespace": self.namespace, **options}
        return connect(address, auth, prefix=self.prefix, mount=mount, **options)

    def login(self, folder: Path, *, uses: int) -> AuthOptions:
        """Make a role whose policy is the printed one, for no entry yet."""
        policy = printed_policy(self.mount, self.prefix, [], namespace=self.namespace)
        return approle(self.root, folder, self.role, policy=policy, token_num_uses=uses)


def sibling_of(destination: Any, address: str, auth: AuthOptions) -> VaultDestination:
    """Make the connection of another store to the same place."""
    options = destination.options
    same = {name: getattr(options, name) for name in ("prefix", "mount", "namespace", "ca_file")}
    return connect(address, auth, store_id=OTHER_STORE_ID, **same)
