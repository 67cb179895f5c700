"""Whatever goes wrong at Vault or OpenBao, at whichever call: the right error, nothing lost, one version."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from keyturn.core.model import Target
from keyturn.destinations.vault import VaultDestination
from keyturn.destinations.vault_auth import AuthOptions
from keyturn.errors import Denied, DestinationUnavailable, KeyturnError, Rejected, Throttled
from keyturn.testing import openbao
from keyturn.testing.contract import new_entry, parts
from keyturn.testing.wire import Answer, Call, Forward, as_json, straight
from support.faults import Once, far_too_much, reset_after, reset_before, stall
from support.recording_proxy import Proxy, recording_proxy
from support.vault import Root, approle, connect, new_prefix, printed_policy, root_of

PLACE = Target(to="bao", path="team/agent-1")
FIRST = replace(PLACE, path="team/agent-2")
OLD, NEW, BETWEEN = new_entry(1), new_entry(2), new_entry(3)

CALLS: dict[str, Callable[[Call], bool]] = {
    "login": lambda call: call.path.endswith("/login"),
    "leader": lambda call: call.path == "/v1/sys/leader",
    "read": lambda call: call.method == "GET" and "/data/" in call.path,
    "marks": lambda call: call.method == "GET" and "/metadata/" in call.path,
    "write": lambda call: call.method == "POST" and "/data/" in call.path,
    "mark": lambda call: call.method == "POST" and "/metadata/" in call.path,
    "delete": lambda call: call.method == "POST" and "/delete/" in call.path,
}
WRITES = ("write", "mark", "delete")


def error_500(call: Call, forward: Forward) -> Answer:
    """Fail, and do nothing."""
    return as_json(500, {"errors": ["canary"]})


def sealed(call: Call, forward: Forward) -> Answer:
    """Be sealed."""
    return as_json(503, {"errors": ["Vault is sealed, canary"]})


def too_many(call: Call, forward: Forward) -> Answer:
    """Throttle."""
    return as_json(429, {"errors": ["canary"]}, Retry_After="7")


def forbidden(call: Call, forward: Forward) -> Answer:
    """Deny the permission."""
    return as_json(403, {"errors": ["1 error occurred:\n\t* permission denied\n\n"]})


def truncated(call: Call, forward: Forward) -> Answer:
    """Do it, and stop in the middle of the answer."""
    answer = forward(call)
    return replace(answer, body=answer.body[:10], missing=50)


def no_json(call: Call, forward: Forward) -> Answer:
    """Do it, and answer with a page."""
    forward(call)
    return Answer(status=200, body=b"<html>canary")


def empty_object(call: Call, forward: Forward) -> Answer:
    """Do it, and answer with nothing in it."""
    forward(call)
    return as_json(200, {})


def wrong_kinds(call: Call, forward: Forward) -> Answer:
    """Do it, and answer with values of other kinds."""
    forward(call)
    return as_json(200, {"data": {"data": 7, "metadata": ["canary"]}, "auth": "canary"})


def a_list(call: Call, forward: Forward) -> Answer:
    """Do it, and answer with JSON of another form."""
    forward(call)
    return as_json(200, ["canary"])


def redirect(call: Call, forward: Forward) -> Answer:
    """Send the client to another host."""
    return Answer(status=307, headers={"Location": f"https://stranger.invalid{call.target}"})


FAULTS: dict[Callable[[Call, Forward], Answer], type[KeyturnError]] = {
    error_500: DestinationUnavailable,
    sealed: DestinationUnavailable,
    too_many: Throttled,
    forbidden: Denied,
    reset_before: DestinationUnavailable,
    reset_after: DestinationUnavailable,
    stall: DestinationUnavailable,
    truncated: DestinationUnavailable,
    no_json: DestinationUnavailable,
    empty_object: DestinationUnavailable,
    wrong_kinds: DestinationUnavailable,
    a_list: DestinationUnavailable,
    far_too_much: Rejected,
    redirect: DestinationUnavailable,
}
# What is asked there decides only how reads are made: the careful way, where nothing is known.
CAREFUL = {("leader", fault) for fault in (error_500, forbidden, empty_object, wrong_kinds, a_list)}
# The service says nothing in these answers that anybody needs.
SAYS_NOTHING = {
    (kind, fault)
    for kind in ("mark", "delete")
    for fault in (truncated, empty_object, wrong_kinds, a_list)
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openbao.Server]:
    """Give one server; each test has a prefix of its own."""
    with openbao.dev_server(tmp_path_factory.mktemp("openbao")) as one:
        yield one


@dataclass
class Scene:
    """A server, a proxy before it, and connections through it by a login of least rights."""

    server: openbao.Server
    proxy: Proxy
    folder: Path
    prefix: str = field(default_factory=new_prefix)
    auth: AuthOptions | None = None

    @property
    def root(self) -> Root:
        """A way to ask the server, past the proxy."""
        return root_of(self.server)

    def connect(self, **options: Any) -> VaultDestination:
        """Make a connection that has to log in before anything else."""
        if self.auth is None:
            policy = printed_policy("kv", self.prefix, [PLACE, FIRST])
            self.auth = approle(self.root, self.folder, self.prefix, policy=policy)
        return connect(self.proxy.address, self.auth, prefix=self.prefix, **options)

    def shown(self, target: Target) -> Any:
        """Return values and number of what an agent reads."""
        found = self.root("GET", f"kv/data/{self.prefix}/{target.path}")["data"]
        return found["data"], found["metadata"]["version"]


@pytest.fixture
def scene(server: openbao.Server, tmp_path: Path) -> Iterator[Scene]:
    """Give a place for two entries."""
    with recording_proxy(server.address) as proxy:
        yield Scene(server, proxy, tmp_path)


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_each_fault_at_each_call_ends_well(
    scene: Scene, kind: str, fault: Callable[[Call, Forward], Answer]
) -> None:
    """One call goes wrong: our error for it and no other, and the repetition makes it all good."""
    before = scene.connect()
    first = before.activate(PLACE, OLD, expected="0")
    second = before.activate(PLACE, BETWEEN, expected=first)
    before.close()
    destination = scene.connect(**({"call_deadline": "700ms"} if fault is stall else {}))
    scene.proxy.rule = once = Once(CALLS[kind], fault)
    raised: list[KeyturnError] = []

    def insist(act: Callable[[], Any]) -> Any:
        for _ in range(6):
            try:
                return act()
            except KeyturnError as error:
                raised.append(error)
                time.sleep(0.7 if fault is stall else 0)
        raise AssertionError(raised)

    found = insist(lambda: destination.observe(PLACE))
    assert (found.version_id, found.token) == (BETWEEN.version_id, second)
    located = insist(lambda: destination.activate(PLACE, NEW, expected=second))
    insist(
        lambda: destination.retire(PLACE, version_id=OLD.version_id, locator=first, how="disable")
    )
    empty = insist(lambda: destination.observe(FIRST))
    assert empty.exists is False
    insist(lambda: destination.activate(FIRST, NEW, expected=empty.token))
    found = insist(lambda: destination.observe(PLACE))
    scene.proxy.rule = straight

    assert once.hit == 1
    if fault is truncated and kind in ("mark", "delete"):
        # Its answer has no body in the best case; the next call may meet the line that was cut.
        assert {type(error) for error in raised} <= {DestinationUnavailable}
    elif (kind, fault) in CAREFUL | SAYS_NOTHING:
        assert raised == []
    elif fault is stall:  # on a busy machine a second call can be too late as well
        assert {type(error) for error in raised} == {DestinationUnavailable}
    else:
        assert [type(error) for error in raised] == [FAULTS[fault]]
    _judge(raised, kind, fault)
    assert scene.shown(PLACE) == (parts(PLACE.keys, NEW), 3)
    assert scene.shown(FIRST) == (parts(FIRST.keys, NEW), 1)
    assert (found.version_id, found.secret, found.locator) == (NEW.version_id, NEW.secret, located)
    versions = scene.root("GET", f"kv/metadata/{scene.prefix}/{PLACE.path}")["data"]["versions"]
    assert [bool(versions[n]["deletion_time"]) for n in ("1", "2", "3")] == [True, False, False]
    destination.close()


def _judge(raised: list[KeyturnError], kind: str, fault: Any) -> None:
    """Nothing is quoted, and only what may have landed is said to be unsure."""
    for error in raised:
        text = f"{error!r} {error} {error.hint} {error.__cause__} {error.__context__}"
        assert "canary" not in text
        assert NEW.secret.reveal()[-20:] not in text
        if isinstance(error, DestinationUnavailable) and kind in WRITES:
            assert error.sent
        if isinstance(error, Throttled):
            assert error.retry_after == timedelta(seconds=7)
        assert error.hint or not isinstance(error, Denied)
