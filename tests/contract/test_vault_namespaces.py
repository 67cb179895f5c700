"""Namespaces of a real OpenBao: the contract inside of them, and that nothing leaves them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from keyturn.core.model import Target
from keyturn.destinations.vault import VaultDestination, VaultOptions
from keyturn.destinations.vault_auth import AuthOptions
from keyturn.errors import Denied, KeyturnError, NotFound
from keyturn.testing.contract import PLACE, new_entry, publish
from keyturn.testing.kubernetes import ApiServer, api_server
from keyturn.testing.production import Production, production
from keyturn.testing.wire import Call
from support.recording_proxy import Proxy, recording_proxy
from support.vault import (
    ByPolicyContract,
    Root,
    approle,
    connect,
    in_namespace,
    kubernetes,
    new_namespace,
    new_prefix,
    printed_policy,
    sibling_of,
)

MOUNT = "kv"
SPACES = ("platform", "platform/team")
OUTSIDE = {"/v1/sys/leader", "/v1/sys/health"}  # facts about the server, known outside only
LOGIN = {"method": "token", "token_file": "/x"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Production]:
    """Give one server with a namespace in a namespace, and a mount of one name in each of them."""
    with production(tmp_path_factory.mktemp("openbao")) as one:
        one.mount(MOUNT)
        for space in SPACES:
            new_namespace(one.call, space, mount=MOUNT)
        yield one


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """Give one Kubernetes cluster for all tests."""
    with api_server(tmp_path_factory.mktemp("kubernetes")) as one:
        yield one


def root_login(server: Production, folder: Path) -> AuthOptions:
    """Put the root token into a file."""
    path = folder / "root"
    path.touch(mode=0o600)
    path.write_text(server.token)
    return AuthOptions(method="token", token_file=str(path))


def strays(proxy: Proxy, namespace: str) -> list[Call]:
    """Return every call that was made outside of a namespace and is not about the server itself."""
    return [
        call
        for call, _ in proxy.seen
        if call.headers.get("x-vault-namespace") != namespace and call.path not in OUTSIDE
    ]


class InANamespace(ByPolicyContract):
    """Login, mount and policy lie in the namespace; every call is recorded on its way."""

    namespace: str

    @pytest.fixture
    def destination(
        self, server: Production, cluster: ApiServer, tmp_path: Path
    ) -> Iterator[VaultDestination]:
        self.root, self.server, self.cluster, self.folder = (
            in_namespace(server.call, self.namespace), server, cluster, tmp_path,
        )  # fmt: skip
        with recording_proxy(server.address, ca_file=server.ca_file) as proxy:
            one = self.by_policy(proxy.address, tmp_path, mount=MOUNT)
            yield one
            one.close()
            assert strays(proxy, self.namespace) == []

    def sibling(self, destination: Any) -> VaultDestination:
        auth = root_login(self.server, self.folder)
        return sibling_of(destination, destination.options.address, auth)


class TestVaultInANamespace(InANamespace):
    """By AppRole."""

    namespace = "platform"


class TestVaultInANestedNamespace(InANamespace):
    """By a Kubernetes login that is mounted in there."""

    namespace = "platform/team"

    def login(self, folder: Path, *, uses: int) -> AuthOptions:
        policy = printed_policy(self.mount, self.prefix, [], namespace=self.namespace)
        return kubernetes(self.root, folder, self.cluster, self.role, policy=policy, mount="k8s/eu")


class TestVaultByThePathOfANamespace(ByPolicyContract):
    """A login outside, and a mount that is named by the path through the namespace."""

    @pytest.fixture
    def destination(self, server: Production, tmp_path: Path) -> Iterator[VaultDestination]:
        self.root, self.server = server.call, server
        one = self.by_policy(
            server.address, tmp_path, mount=f"platform/{MOUNT}", ca_file=str(server.ca_file)
        )
        yield one
        one.close()


class Scene:
    """Connections to one server, each by a role of its own in its namespace."""

    def __init__(self, server: Production, folder: Path) -> None:
        self.server, self.folder, self.prefix = server, folder, new_prefix()
        self.opened: list[VaultDestination] = []

    def root(self, namespace: str | None) -> Root:
        """Give a way to ask as root in a namespace, or outside."""
        return in_namespace(self.server.call, namespace) if namespace else self.server.call

    def connect(self, namespace: str | None, **options: Any) -> VaultDestination:
        """Make a role and a connection."""
        name, mount = new_prefix(), options.get("mount", MOUNT)
        policy = printed_policy(mount, self.prefix, [PLACE], namespace=namespace)
        auth = approle(self.root(namespace), self.folder, name, policy=policy)
        values = {"mount": MOUNT, "ca_file": str(self.server.ca_file), **options}
        one = connect(self.server.address, auth, prefix=self.prefix, namespace=namespace, **values)
        self.opened.append(one)
        return one


@pytest.fixture
def scene(server: Production, tmp_path: Path) -> Iterator[Scene]:
    """Give a place for one entry in each namespace."""
    one = Scene(server, tmp_path)
    yield one
    for destination in one.opened:
        destination.close()


def test_connections_that_differ_in_the_namespace_alone_own_different_entries(
    scene: Scene,
) -> None:
    """One mount, one path and three namespaces are three entries, each with its own owner."""
    three = [scene.connect(namespace) for namespace in (None, *SPACES)]
    for seed, one in enumerate(three):
        publish(one, PLACE, new_entry(seed))

    shown = [one.observe(PLACE).version_id for one in three]
    assert shown == [new_entry(seed).version_id for seed in range(3)]
    assert len({one.identity(PLACE) for one in three}) == 3


def test_one_entry_by_the_header_and_by_the_path_is_one(scene: Scene) -> None:
    """OpenBao takes a namespace as the begin of a path as well: such a pair has one identity.

    So that no two agents can be given what is one entry at the server.
    """
    pairs = [
        (scene.connect("platform"), scene.connect(None, mount=f"platform/{MOUNT}")),
        (scene.connect("platform/team"), scene.connect("platform", mount=f"team/{MOUNT}")),
        (scene.connect("platform/team"), scene.connect(None, mount=f"platform/team/{MOUNT}")),
    ]
    for seed, (header, path) in enumerate(pairs, start=1):
        publish(header, PLACE, new_entry(seed))
        assert path.observe(PLACE).version_id == new_entry(seed).version_id
        assert path.identity(PLACE) == header.identity(PLACE)


def test_a_path_that_only_seems_to_be_a_mount_is_no_other_entry(scene: Scene) -> None:
    """`kv/data/x` is no mount, but `y` in it is read as the entry `x/data/y`: one identity."""
    good = scene.connect(None, mount=MOUNT)
    odd = connect(
        scene.server.address, root_login(scene.server, scene.folder), mount=f"{MOUNT}/data/x",
        prefix="", ca_file=str(scene.server.ca_file),
    )  # fmt: skip
    scene.opened.append(odd)
    bare = good.options.model_copy(update={"prefix": ""})
    whole = VaultDestination(bare, name="whole", store_id=good.store_id, clock=good.clock)
    entry = Target(to="bao", path="x/data/y")
    scene.server.call(
        "POST", f"{MOUNT}/data/x/data/y", {"data": {"version": "1"}, "options": {"cas": 0}}
    )

    assert odd.observe(Target(to="bao", path="y")).exists
    assert odd.identity(Target(to="bao", path="y")) == whole.identity(entry)
    whole.close()


@pytest.mark.parametrize("spelling", ["a/b", "/a/b", "a/b/", "/a/b/"])
def test_a_slash_at_the_ends_means_nothing(spelling: str) -> None:
    """Those are what command lines and variables use; they are one namespace, and one mount."""
    options = VaultOptions(address="https://x", auth=LOGIN, namespace=spelling, mount=spelling)

    assert (options.namespace, options.mount) == ("a/b", "a/b")


@pytest.mark.parametrize(
    "spelling",
    ["", "/", "//a", "a//b", "./a", "a/./b", "a/../a", "..", "a%2Fb", "%61", "a b", "a\n", "root",
     "root/a", "a/root", "\N{LATIN SMALL LETTER A WITH ACUTE}", "a\\b", "a?x", "a#x", "a;x", 7],
)  # fmt: skip
def test_odd_spellings_of_a_namespace_are_refused(spelling: Any) -> None:
    """The server takes many of them for a plain one, and they would be a second owner there."""
    with pytest.raises(ValidationError):
        VaultOptions(address="https://x", auth=LOGIN, namespace=spelling)
    if "root" not in str(spelling):
        with pytest.raises(ValidationError):
            VaultOptions(address="https://x", auth=LOGIN, mount=spelling)


def test_case_tells_namespaces_apart() -> None:
    """At the server `A` is another one than `a`."""
    made = [connect("https://x", AuthOptions(**LOGIN), prefix="p", namespace=n) for n in ("a", "A")]

    assert made[0].identity(PLACE) != made[1].identity(PLACE)
    for one in made:
        one.close()


def test_no_two_ways_to_one_request_have_two_identities() -> None:
    """Whatever part names which segment: the identity is the same exactly if the request is."""
    places: dict[str, str] = {}
    segments = ("a", "kv", "data")
    several = [list(one) for n in (1, 2) for one in itertools.product(segments, repeat=n)]
    for space, mount, path in itertools.product([[], *several], several, several):
        options = VaultOptions(
            address="https://x",
            auth=LOGIN,
            namespace="/".join(space) or None,
            mount="/".join(mount),
        )
        one = VaultDestination(options, name="x", store_id="s", clock=None)  # type: ignore[arg-type]
        asked = "/".join([*space, one._full(f"data/{'/'.join(path)}").removeprefix("/v1/")])
        identity = one.identity(Target(to="x", path="/".join(path)))
        assert places.setdefault(asked, identity) == identity
        one.close()
    assert len(set(places.values())) == len(places)


@pytest.mark.parametrize("method", ["token", "approle"])
def test_a_namespace_that_is_not_there_is_no_missing_entry(scene: Scene, method: str) -> None:
    """It is named, before and after the login; nothing is taken for gone."""
    there = scene.connect("platform")
    auth = there.options.auth if method == "approle" else root_login(scene.server, scene.folder)
    gone = connect(
        scene.server.address, auth, namespace="gone", mount=MOUNT,
        ca_file=str(scene.server.ca_file),
    )  # fmt: skip
    scene.opened.append(gone)
    for attempt in (lambda: gone.observe(PLACE), gone.probe):
        with pytest.raises(NotFound) as caught:
            attempt()
        assert "namespace" in caught.value.hint


def test_what_vanishes_later_is_no_missing_entry(scene: Scene) -> None:
    """A mount or a namespace that somebody removes lets no version go: the read is an error."""
    inside = new_namespace(scene.server.call, "passing", mount=MOUNT)
    inside("POST", "sys/mounts/other", {"type": "kv", "options": {"version": "2"}})
    auth = root_login(scene.server, scene.folder)
    options = {"namespace": "passing", "ca_file": str(scene.server.ca_file)}
    one = connect(scene.server.address, auth, mount=MOUNT, **options)
    scene.opened.append(one)
    publish(one, PLACE, new_entry(1))

    inside("DELETE", f"sys/mounts/{MOUNT}")
    with pytest.raises(NotFound, match="mount kv in the namespace passing"):
        one.observe(PLACE)
    inside("DELETE", "sys/mounts/other")
    scene.server.call("DELETE", "sys/namespaces/passing")
    with pytest.raises(KeyturnError):
        one.observe(PLACE)


def test_a_wrapped_secret_id_is_taken_inside_of_a_namespace(scene: Scene) -> None:
    """Its creation path is relative to the namespace there; one made for anything else is refused."""
    plain = scene.connect("platform/team")
    role = str(plain.options.auth.secret_id_file).rpartition("/")[2].removesuffix("-secret-id")
    path = scene.folder / "wrapping"
    wrapped = {"method": "approle", "role_id": plain.options.auth.role_id, "wrapped": True}
    auth = AuthOptions(**wrapped, secret_id_file=str(path))

    def wrap(what: str, body: dict[str, str]) -> VaultDestination:
        headers = {"X-Vault-Wrap-TTL": "60s", "X-Vault-Namespace": "platform/team"}
        node = scene.server.nodes[0]
        found = node.call("POST", what, body, token=scene.server.token, headers=headers)
        path.touch(mode=0o600)
        path.write_text(found["wrap_info"]["token"])
        options = plain.options.model_copy(update={"auth": auth})
        made = VaultDestination(options, name="w", store_id=plain.store_id, clock=plain.clock)
        scene.opened.append(made)
        return made

    assert wrap(f"auth/approle/role/{role}/secret-id", {}).observe(PLACE).exists is False
    with pytest.raises(Denied, match="not made for a secret id"):
        wrap("sys/wrapping/wrap", {"secret_id": "planted"}).observe(PLACE)


def test_a_probe_names_the_namespace(scene: Scene) -> None:
    """`check --probe` says where it looked, and how a mount is made there."""
    one = scene.connect("platform/team")
    publish(one, PLACE, new_entry(1))
    assert "namespace platform/team, mount kv: logged in by approle" in one.probe()
    one.probe_entry(PLACE, retire="disable")

    other = scene.connect("platform/team", mount="nowhere")
    with pytest.raises(KeyturnError) as caught:
        other.probe()
    assert "-namespace=platform/team -path=nowhere" in caught.value.hint


def test_a_policy_says_where_it_must_be_written() -> None:
    """Its paths are relative to the namespace, which is named in a comment."""
    inside = printed_policy(MOUNT, "p", [PLACE], namespace="platform/team")
    outside = printed_policy(MOUNT, "p", [PLACE])

    comment, _, rules = inside.partition("\n")
    assert comment.startswith("# ")
    assert "-namespace=platform/team" in comment
    assert rules == outside
