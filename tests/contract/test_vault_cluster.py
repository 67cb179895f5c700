"""Three nodes over TLS: standbys that read by themselves, that forward, that redirect; elections."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keyturn.destinations.vault import VaultDestination
from keyturn.errors import Conflict, Denied, DestinationUnavailable
from keyturn.testing.contract import PLACE, new_entry
from keyturn.testing.production import Production, production
from support.recording_proxy import recording_proxy
from support.vault import (
    approle,
    connect,
    in_namespace,
    new_namespace,
    new_prefix,
    printed_policy,
)

pytestmark = pytest.mark.full  # three servers and elections of ten seconds

MOUNT, NAMESPACE = "teams", "platform"
PATIENCE = 60.0


@pytest.fixture(scope="module", params=["standbys-read", "standbys-forward"])
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Production]:
    """Give a cluster of either kind."""
    reads = request.param == "standbys-read"
    with production(tmp_path_factory.mktemp("bao"), nodes=3, standby_reads=reads) as one:
        one.mount(MOUNT)
        new_namespace(one.call, NAMESPACE, mount=MOUNT)
        yield one


class Place:
    """One entry and its role, reached through any node."""

    def __init__(self, cluster: Production, folder: Path, namespace: str | None = None) -> None:
        self.cluster, self.prefix, self.namespace = cluster, new_prefix(), namespace
        self.root = in_namespace(cluster.call, namespace) if namespace else cluster.call
        policy = printed_policy(MOUNT, self.prefix, [PLACE], namespace=namespace)
        self.auth = approle(self.root, folder, self.prefix, policy=policy)

    def through(self, address: str, **options: Any) -> VaultDestination:
        """Connect to one node."""
        same = {"ca_file": str(self.cluster.ca_file), "namespace": self.namespace}
        options = {**same, **options}
        return connect(address, self.auth, mount=MOUNT, prefix=self.prefix, **options)

    def number(self) -> int:
        """Return the number of the newest version, by the leader."""
        found = self.root("GET", f"{MOUNT}/data/{self.prefix}/{PLACE.path}")
        return int(found["data"]["metadata"]["version"])


@pytest.fixture
def place(request: pytest.FixtureRequest, cluster: Production, tmp_path: Path) -> Place:
    """Give an entry of its own, outside of namespaces unless the test names one."""
    return Place(cluster, tmp_path, getattr(request, "param", None))


def patiently(step: Any) -> Any:
    """Repeat what is retryable, as the saga does; the login may not be replicated yet either."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return step()
        except (DestinationUnavailable, Denied):
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


@pytest.mark.parametrize("place", [None, NAMESPACE], indirect=True)
def test_what_is_written_at_one_node_is_read_at_all_at_once(place: Place) -> None:
    """Two hundred moves, each written at one node and looked at through another at once: never late."""
    nodes = [place.through(node.address) for node in place.cluster.nodes]
    for number in range(200):
        writer, reader = nodes[number % 3], nodes[(number + 1) % 3]
        token = patiently(lambda: writer.observe(PLACE)).token  # noqa: B023
        assert int(token) == number
        patiently(lambda: writer.activate(PLACE, new_entry(number), expected=token))  # noqa: B023
        found = patiently(lambda: reader.observe(PLACE))  # noqa: B023
        assert (found.version_id, found.fresh) == (new_entry(number).version_id, True)
    for one in nodes:
        one.close()


@pytest.mark.parametrize("place", [None, NAMESPACE], indirect=True)
def test_a_real_redirect_is_refused(place: Place) -> None:
    """A standby that may not forward sends a 307 to the leader: nothing goes there from us."""
    leader, standby = place.cluster.leader(), place.cluster.standbys()[0]
    destination = place.through(leader.address)
    destination.activate(PLACE, new_entry(1), expected="0")
    with recording_proxy(standby.address, ca_file=place.cluster.ca_file) as proxy:
        through = place.through(proxy.address, ca_file=None)
        patiently(lambda: through.observe(PLACE))
        alone = "X-Vault-No-Request-Forwarding"
        proxy.rule = lambda call, forward: forward(call.with_header(alone, "1"))
        proxy.seen.clear()

        for attempt in (
            lambda: through.observe(PLACE),
            lambda: through.activate(PLACE, new_entry(2), expected="1"),
        ):
            with pytest.raises(DestinationUnavailable, match="redirect"):
                attempt()

        assert {status for _, status in proxy.seen} == {307}
        assert place.number() == 1
        through.close()
    destination.close()


@pytest.mark.parametrize("end", ["step-down", "stop"])
def test_an_election_in_the_middle_of_writes_loses_and_doubles_nothing(
    place: Place, end: str
) -> None:
    """Every move is retried until it is confirmed by a fresh read: each number is one version."""
    leader = place.cluster.leader()
    standby = place.cluster.standbys()[0]
    destination = place.through(standby.address, call_deadline="5s")
    patiently(lambda: destination.observe(PLACE))
    faults: list[DestinationUnavailable] = []
    moved = 0

    def until_shown(seed: int) -> None:
        entry, until = new_entry(seed), time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                found = destination.observe(PLACE)
                if found.version_id == entry.version_id:
                    return
                destination.activate(PLACE, entry, expected=found.token)
            except Conflict:
                continue
            except DestinationUnavailable as error:
                faults.append(error)
                time.sleep(0.1)
        raise TimeoutError(f"still {faults[-1:]}")

    if end == "step-down":
        fall = threading.Thread(target=place.cluster.step_down)
    else:
        fall = threading.Thread(target=leader.stop)
    try:
        while moved < 5 or (moved < 400 and fall.is_alive()):
            if moved == 3:
                fall.start()
            until_shown(moved)
            moved += 1
        fall.join()
        for _ in range(5):
            until_shown(moved)
            moved += 1
    finally:
        if end == "stop":
            fall.join()
            leader.start()
            place.cluster.unseal(leader)

    assert all(fault.retryable for fault in faults)
    assert place.number() == moved
    destination.close()
