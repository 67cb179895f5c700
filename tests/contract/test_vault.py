"""A real OpenBao keeps the contract: as root, and by AppRole with nothing but the printed policy."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import threading
import time
import urllib.error
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from keyturn.core.model import Target
from keyturn.destinations.vault import VaultDestination, VaultOptions
from keyturn.destinations.vault_auth import AuthOptions
from keyturn.errors import Denied, DestinationUnavailable, KeyturnError, NotFound, Rejected
from keyturn.testing import openbao
from keyturn.testing.contract import (
    OTHER_STORE_ID,
    PLACE,
    STORE_ID,
    DestinationContract,
    new_entry,
    parts,
    publish,
)
from keyturn.testing.fakes import FakeClock
from support.vault import root_of

_NUMBERS = itertools.count(1)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openbao.Server]:
    """Give one server for all tests; each has a prefix of its own."""
    with openbao.dev_server(tmp_path_factory.mktemp("openbao")) as one:
        yield one


@pytest.fixture(scope="session")
def strict_mount(server: openbao.Server) -> str:
    """Give a mount that demands check-and-set."""
    call(server, "POST", "sys/mounts/strict", {"type": "kv", "options": {"version": "2"}})
    until = time.monotonic() + 10
    while True:  # a new mount is being upgraded for a moment
        with contextlib.suppress(urllib.error.HTTPError):
            call(server, "POST", "strict/config", {"cas_required": True})
            return "strict"
        assert time.monotonic() < until


def call(server: openbao.Server, method: str, path: str, body: Any = None) -> Any:
    """Ask as root."""
    return root_of(server)(method, path, body)


def make(
    server: openbao.Server,
    *,
    auth: AuthOptions | None = None,
    store_id: str = STORE_ID,
    **options: Any,
) -> VaultDestination:
    """Make a connection."""
    auth = auth or AuthOptions(method="token", token_file=str(server.token_file))
    values = {"address": server.address, "prefix": f"t{next(_NUMBERS)}", **options}
    return VaultDestination(
        VaultOptions(auth=auth, **values), name="bao", store_id=store_id, clock=FakeClock()
    )


class VaultContract(DestinationContract):
    """What both shapes share."""

    def read_raw(self, destination: Any, target: Target) -> Mapping[str, Any] | None:
        path = f"{destination.options.mount}/data/{destination.place(target)}"
        try:
            found: Mapping[str, Any] = call(self.server, "GET", path)["data"]["data"]
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            return None
        return found

    def write_raw(self, destination: Any, target: Target, values: Mapping[str, Any]) -> None:
        path = f"{destination.options.mount}/data/{destination.place(target)}"
        body = {"data": dict(values)}
        try:
            number = call(self.server, "GET", path)["data"]["metadata"]["version"]
        except urllib.error.HTTPError:
            number = 0
        call(self.server, "POST", path, {**body, "options": {"cas": number}})


class TestVaultAsRoot(VaultContract):
    """A token from a file."""

    @pytest.fixture
    def destination(self, server: openbao.Server) -> Iterator[VaultDestination]:
        self.server = server
        one = make(server)
        yield one
        one.close()

    def sibling(self, destination: Any) -> VaultDestination:
        return make(self.server, store_id=OTHER_STORE_ID, prefix=destination.options.prefix)

    def test_numbers_that_began_anew_hit_no_good_copy(self, destination: Any) -> None:
        """Somebody removed the entry with its history: an old locator names another copy now."""
        for seed in (1, 2):
            publish(destination, PLACE, new_entry(seed))
        path = f"{destination.options.mount}/metadata/{destination.place(PLACE)}"
        call(self.server, "DELETE", path)
        old, good = new_entry(1), [new_entry(seed) for seed in (3, 4)]
        for number, entry in enumerate(good, start=1):
            publish(destination, PLACE, entry)
            for locator in ("1", "2", "7"):
                if int(locator) >= number:
                    destination.retire(
                        PLACE, version_id=old.version_id, locator=locator, how="destroy"
                    )
        destination.retire(PLACE, version_id=old.version_id, locator="1", how="destroy")
        data = f"{destination.options.mount}/data/{destination.place(PLACE)}"
        kept = [call(self.server, "GET", f"{data}?version={n}")["data"]["data"] for n in (1, 2)]
        assert kept == [parts(PLACE.keys, entry) for entry in good]


class TestVaultByAppRole(VaultContract):
    """AppRole with short tokens, `cas_required`, and the policy that Keyturn prints."""

    @pytest.fixture
    def destination(
        self, server: openbao.Server, strict_mount: str, tmp_path: Path
    ) -> Iterator[VaultDestination]:
        self.server = server
        prefix = f"r{next(_NUMBERS)}"
        auth = approle(server, tmp_path, prefix, policy=self.policy(prefix))
        one = make(server, auth=auth, prefix=prefix, mount=strict_mount)
        yield one
        one.close()

    def policy(self, prefix: str) -> str:
        """Return the printed policy, for any entry under the prefix of this test."""
        options = VaultOptions(
            address="https://x", auth={"method": "token", "token_file": "/x"}, mount="strict",
            prefix=prefix,
        )  # fmt: skip
        entries = [(Target(to="bao", path="PLACE"), how) for how in ("disable", "destroy")]
        return VaultDestination.least_policy(options, entries).replace("PLACE", "*")


def approle(
    server: openbao.Server, folder: Path, name: str, *, policy: str, ttl: str = "60s"
) -> AuthOptions:
    """Make a role with this policy and put its secret id into a file."""
    with contextlib.suppress(urllib.error.HTTPError):
        call(server, "POST", "sys/auth/approle", {"type": "approle"})
    call(server, "PUT", f"sys/policies/acl/{name}", {"policy": policy})
    role = {"token_policies": [name], "token_ttl": ttl, "token_no_default_policy": True}
    call(server, "POST", f"auth/approle/role/{name}", role)
    role_id = call(server, "GET", f"auth/approle/role/{name}/role-id")["data"]["role_id"]
    found = call(server, "POST", f"auth/approle/role/{name}/secret-id", {})
    path = folder / f"{name}-secret-id"
    path.touch(mode=0o600)
    path.write_text(found["data"]["secret_id"] + "\n")
    return AuthOptions(method="approle", role_id=role_id, secret_id_file=str(path))


def test_without_the_permission_it_is_denied_by_name(
    server: openbao.Server, tmp_path: Path
) -> None:
    """What is missing is named by capability and path; the vendor's text is not."""
    rule = 'path "kv/+/d/*" { capabilities = ["read"] }'
    auth = approle(server, tmp_path, "denied", policy=rule)
    destination = make(server, auth=auth, prefix="d")

    with pytest.raises(Denied, match=r"create, update on kv/metadata/d/x"):
        destination.activate(Target(to="bao", path="x"), new_entry(1), expected="0")
    destination.close()


def test_a_token_that_runs_out_is_replaced(server: openbao.Server, tmp_path: Path) -> None:
    """With tokens of two seconds work goes on: renewed in time, and after a revoke by a new login."""
    rule = 'path "kv/*" { capabilities = ["create", "read", "update"] }\npath "auth/token/*" { capabilities = ["read", "update"] }'
    auth = approle(server, tmp_path, "short", policy=rule, ttl="2s")
    destination = make(server, auth=auth, prefix="s")
    for number in range(4):
        entry = new_entry(number)
        token = destination.observe(PLACE).token
        destination.activate(PLACE, entry, expected=token)
        time.sleep(1)

    assert destination.observe(PLACE).version_id == entry.version_id
    assert destination.login_ends_in is not None
    assert timedelta(0) < destination.login_ends_in <= timedelta(seconds=2)
    destination.close()


def test_a_wrapped_secret_id_is_unwrapped_once_and_only_if_it_is_one(
    server: openbao.Server, tmp_path: Path
) -> None:
    """A wrapping token that was made for something else is refused, unused."""
    rule = 'path "kv/*" { capabilities = ["create", "read", "update"] }'
    auth = approle(server, tmp_path, "wrapped", policy=rule)
    path = tmp_path / "wrapping"
    path.touch(mode=0o600)

    def wrap(method: str, what: str, body: Any) -> None:
        import urllib.request

        request = urllib.request.Request(
            f"{server.address}/v1/{what}", data=json.dumps(body).encode(), method=method
        )
        request.add_header("X-Vault-Token", server.token)
        request.add_header("X-Vault-Wrap-TTL", "60s")
        with urllib.request.urlopen(request, timeout=10) as answer:
            path.write_text(json.loads(answer.read())["wrap_info"]["token"])

    wrapped = auth.model_copy(update={"wrapped": True, "secret_id_file": path})
    wrap("POST", "auth/approle/role/wrapped/secret-id", {})
    looked = make(server, auth=wrapped, prefix="w")
    for _ in range(2):  # a probe leaves it for the daemon
        assert "left for the daemon" in looked.probe()
        assert looked.probe_entry(PLACE, retire="disable") is None
    looked.close()
    good = make(server, auth=wrapped, prefix="w")
    assert good.observe(PLACE).exists is False
    good.close()

    wrap("POST", "sys/wrapping/wrap", {"secret_id": "planted"})
    planted = make(server, auth=wrapped, prefix="w")
    for attempt in (planted.probe, lambda: planted.observe(PLACE)):
        with pytest.raises(Denied, match="not made for a secret id"):
            attempt()
    planted.close()


def test_a_mount_that_is_not_there_is_named(server: openbao.Server) -> None:
    """A wrong mount is no empty entry when it is written to."""
    destination = make(server, mount="nowhere")

    with pytest.raises((NotFound, Rejected, Denied)):
        destination.activate(PLACE, new_entry(1), expected="0")
    destination.close()


def test_a_probe_names_a_mount_that_is_missing_or_of_another_kind(
    server: openbao.Server, tmp_path: Path
) -> None:
    """`check --probe` sees what the first write would fail at, by the rights of a least policy too."""
    call(server, "POST", "sys/mounts/old", {"type": "kv", "options": {"version": "1"}})
    call(server, "POST", "sys/mounts/ciphers", {"type": "transit"})
    expected = {"nowhere": "no mount nowhere", "old": "of version 2", "ciphers": "of version 2"}
    for mount, words in expected.items():
        options = {"mount": mount, "prefix": "p"}
        rule = f'path "{mount}/*" {{ capabilities = ["read"] }}\npath "auth/token/*" {{ capabilities = ["read", "update"] }}'
        for auth in (None, approle(server, tmp_path, f"probe-{mount}", policy=rule)):
            destination = make(server, auth=auth, **options)
            with pytest.raises((Denied, Rejected), match=words) as refused:
                destination.probe()
            assert refused.value.hint
            destination.close()


@pytest.mark.parametrize("asks", [True, False])
def test_a_probe_names_the_right_that_an_entry_lacks(
    server: openbao.Server, tmp_path: Path, asks: bool
) -> None:
    """The missing right to write is named without a write; who may not ask sees what he reads."""
    rule = 'path "kv/+/q/*" { capabilities = ["read"] }\npath "auth/token/*" { capabilities = ["read"] }'
    rule += '\npath "sys/capabilities-self" { capabilities = ["update"] }' * asks
    auth = approle(server, tmp_path, f"lacking-{asks}", policy=rule)
    destination = make(server, auth=auth, prefix="q")
    assert "kv" in destination.probe()
    if asks:
        with pytest.raises(Denied, match=r"lacks create, update on kv/data/q/"):
            destination.probe_entry(PLACE, retire="disable")
    else:
        destination.probe_entry(PLACE, retire="disable")
    destination.close()


@pytest.mark.parametrize(
    ("mode", "good"), [(0o400, True), (0o440, True), (0o604, False), (0o620, False)]
)
def test_a_credential_file_that_others_can_read_is_refused(
    server: openbao.Server, tmp_path: Path, mode: int, good: bool
) -> None:
    """A group may read it, as systemd and Kubernetes hand it over; the message says what to do."""
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_text(server.token)
    path.chmod(mode)
    destination = make(server, auth=AuthOptions(method="token", token_file=str(path)))
    if good:
        assert destination.observe(PLACE).exists is False
    else:
        with pytest.raises(Denied, match="open to other users") as refused:
            destination.observe(PLACE)
        assert str(path) in refused.value.hint
        assert server.token not in f"{refused.value} {refused.value.hint}"
    destination.close()


def test_the_metadata_of_others_stays(server: openbao.Server) -> None:
    """An entry that is taken over keeps what others wrote about it; our marks come beside it."""
    place = Target(to="bao", path="shared", merge=True)
    destination = make(server)
    path = f"{destination.options.prefix}/shared"
    call(server, "POST", f"kv/data/{path}", {"data": {"theirs": "1"}})
    theirs = {"team": "billing", "pager": "x"}
    call(server, "POST", f"kv/metadata/{path}", {"custom_metadata": theirs})

    token = destination.observe(place).token
    destination.activate(place, new_entry(1), expected=token)

    marks = call(server, "GET", f"kv/metadata/{path}")["data"]["custom_metadata"]
    assert theirs.items() <= marks.items()
    assert destination.observe(place).owner == STORE_ID
    destination.close()


def test_an_address_has_one_spelling(tmp_path: Path) -> None:
    """Case, the scheme's own port and a final dot make no second owner of an entry."""
    auth = AuthOptions(method="token", token_file=str(tmp_path / "token"))

    def identity(address: str) -> str:
        options = VaultOptions(auth=auth, address=address)
        made = VaultDestination(options, name="b", store_id=STORE_ID, clock=FakeClock())
        found = made.identity(PLACE)
        made.close()
        return found

    one = {identity(f"https://{host}") for host in ("v", "v:443", "v.", "V.:443", "v/")}
    assert len(one) == 1
    assert identity("https://v:8200") not in one
    assert identity("http://localhost:443") != identity("https://localhost")


def test_a_deleted_entry_keeps_its_number(server: openbao.Server) -> None:
    """After somebody deleted the newest version the next write compares with its number."""
    destination = make(server)
    destination.activate(PLACE, new_entry(1), expected="0")
    path = destination.place(PLACE)
    call(server, "DELETE", f"kv/data/{path}")

    found = destination.observe(PLACE)

    assert (found.has_value, found.token, found.owner) == (False, "1", STORE_ID)
    assert destination.activate(PLACE, new_entry(2), expected="1") == "2"
    destination.close()


# --- hostile answers ----------------------------------------------------------------------


class Stranger:
    """A server on loopback that answers whatever it is told to, and remembers what it was sent."""

    def __init__(self) -> None:
        self.status, self.headers, self.body = 200, {}, b"{}"
        self.delay = 0.0
        self.seen: list[str] = []
        stranger = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                stranger.seen.append(str(self.headers))
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                time.sleep(stranger.delay)
                self.send_response(stranger.status)
                for name, value in stranger.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(stranger.body)

            do_GET = do_POST = do_PUT = answer  # noqa: N815 - names of the library

            def log_message(self, *_args: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.http.server_port}"

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def strangers() -> Iterator[tuple[Stranger, Stranger]]:
    """Give the server that we are told to use, and another one."""
    first, second = Stranger(), Stranger()
    yield first, second
    first.close()
    second.close()


def hostile(address: str, folder: Path, **options: Any) -> VaultDestination:
    """Make a connection whose token is a canary."""
    path = folder / "token"
    path.touch(mode=0o600)
    path.write_text("canary-token")
    auth = AuthOptions(method="token", token_file=str(path))
    options = {"address": address, "call_deadline": "1s", **options}
    return VaultDestination(
        VaultOptions(auth=auth, **options), name="bao", store_id=STORE_ID, clock=FakeClock()
    )


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(
    strangers: tuple[Stranger, Stranger], tmp_path: Path, status: int
) -> None:
    """Whatever a server redirects to, nobody else ever sees the token."""
    server, stranger = strangers
    server.status, server.headers = status, {"Location": f"{stranger.address}/v1/kv/data/x"}
    destination = hostile(server.address, tmp_path)

    for attempt in (
        lambda: destination.observe(PLACE),
        lambda: destination.activate(PLACE, new_entry(1), expected="0"),
    ):
        with pytest.raises(KeyturnError):
            attempt()

    assert stranger.seen == []
    assert server.seen
    destination.close()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b"<html>"),
        (200, b"[]"),
        (200, b'{"data": {"data": "text", "metadata": {"version": 1}}}'),
        (200, b"{" + b" " * (1024 * 1024 + 1)),
        (404, b"canary-body"),
        (500, b'{"errors": ["canary-body"]}'),
        (503, b'{"errors": ["canary-body: sealed"]}'),
        (400, b'{"errors": ["canary-body"]}'),
        (403, b'{"errors": ["canary-body"]}'),
        (429, b""),
        (472, b"{}"),
        (418, b"canary-body"),
    ],
)
def test_garbage_is_one_of_our_errors_and_quotes_nothing(
    strangers: tuple[Stranger, Stranger], tmp_path: Path, status: int, body: bytes
) -> None:
    """Any answer ends in a clear error without the server's text, and never in a write."""
    server, _ = strangers
    server.status, server.body = status, body
    destination = hostile(server.address, tmp_path)

    with pytest.raises(KeyturnError) as caught:
        destination.activate(PLACE, new_entry(1), expected="0")

    shown = f"{caught.value!r} {caught.value} {caught.value.__cause__} {caught.value.__context__}"
    assert "canary" not in shown
    destination.close()


def test_a_server_that_stalls_is_given_up(
    strangers: tuple[Stranger, Stranger], tmp_path: Path
) -> None:
    """The whole answer has a deadline; a write that was given up stays known by its future."""
    server, _ = strangers
    server.delay = 3.0
    destination = hostile(server.address, tmp_path)
    began = time.monotonic()

    with pytest.raises(DestinationUnavailable):
        destination.observe(PLACE)

    assert time.monotonic() - began < 2.5
    destination.close()


def test_nothing_of_the_surroundings_is_trusted(
    server: openbao.Server,
    strangers: tuple[Stranger, Stranger],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Variables, proxies and netrc that point elsewhere are not looked at."""
    trap, _ = strangers
    for name in ("VAULT_ADDR", "BAO_ADDR", "HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, trap.address)
    for name in ("VAULT_TOKEN", "BAO_TOKEN", "VAULT_NAMESPACE", "VAULT_CACERT"):
        monkeypatch.setenv(name, "trap")
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login trap password trap\n")
    (tmp_path / ".vault-token").write_text("trap")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    destination = make(server)

    assert destination.observe(PLACE).exists is False
    assert trap.seen == []
    destination.close()
