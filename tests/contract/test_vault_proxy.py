"""Through a recording proxy: stale standbys, lost answers, redirects, and what one rotation asks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from keyturn.destinations.vault import VaultDestination
from keyturn.errors import DestinationUnavailable, KeyturnError, Rejected, Throttled
from keyturn.testing.contract import PLACE, new_entry
from keyturn.testing.production import Production, production
from keyturn.testing.wire import Answer, Call, Forward, HangUp, straight
from support.faults import late, reset_after, short
from support.recording_proxy import Proxy, StandbyBehind, recording_proxy
from support.vault import approle, connect, new_prefix, printed_policy

MOUNT = "teams"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Production]:
    """Give one server; each test has a prefix of its own."""
    with production(tmp_path_factory.mktemp("openbao")) as one:
        one.mount(MOUNT)
        yield one


@dataclass
class Scene:
    """A server, a proxy before it, and connections through it, each as after a restart."""

    server: Production
    proxy: Proxy
    folder: Path
    prefix: str
    opened: list[VaultDestination]

    def connect(self, *, uses: int = 0, **options: Any) -> VaultDestination:
        """Make a new connection, that knows nothing of what others wrote."""
        policy = printed_policy(MOUNT, self.prefix, [PLACE])
        auth = approle(
            self.server.call, self.folder, self.prefix, policy=policy, token_num_uses=uses
        )
        options = {"mount": MOUNT, "prefix": self.prefix, "call_deadline": "5s", **options}
        self.opened.append(connect(self.proxy.address, auth, **options))
        return self.opened[-1]

    @property
    def path(self) -> str:
        """Where the entry's values are."""
        return f"/v1/{MOUNT}/data/{self.prefix}/{PLACE.path}"

    def number(self) -> int:
        """Return the number of the newest version, by the server itself."""
        found = self.server.call("GET", self.path.removeprefix("/v1/"))
        return int(found["data"]["metadata"]["version"])

    def true_answer(self) -> Answer:
        """Return the answer to a read that is true now."""
        token = {"x-vault-token": self.server.token}
        return self.proxy.forward(Call(method="GET", target=self.path, headers=token))


@pytest.fixture
def scene(server: Production, tmp_path: Path) -> Iterator[Scene]:
    """Give a place for one entry."""
    with recording_proxy(server.address, ca_file=server.ca_file) as proxy:
        one = Scene(server, proxy, tmp_path, new_prefix(), [])
        yield one
        for destination in one.opened:
            destination.close()


def move(destination: VaultDestination, seed: int) -> str:
    """Publish one version as the saga does."""
    token = destination.observe(PLACE).token
    return destination.activate(PLACE, new_entry(seed), expected=token)


def as_vault(facts: dict[str, Any], rule: Callable[..., Answer]) -> Callable[..., Answer]:
    """Let the server say of itself what another product does; None hides that page."""

    def changed(call: Call, forward: Forward) -> Answer:
        if not call.path.startswith("/v1/sys/health"):
            return rule(call, forward)
        if not facts:
            return Answer(status=404, body=b'{"errors":[]}')
        found = forward(call)
        return replace(found, body=json.dumps({**json.loads(found.body), **facts}).encode())

    return changed


ENTERPRISE = {"version": "1.21.0+ent", "enterprise": True}


# --- rule 5: what is late may let nothing go ------------------------------------------------


@pytest.mark.parametrize("uses", [0, 1000])
def test_a_stale_standby_is_not_asked(scene: Scene, uses: int) -> None:
    """Wrapped, or with a token of limited uses, every read is the leader's: after a restart as well."""
    standby = StandbyBehind(limited=uses > 0)
    scene.proxy.rule = standby
    destination = scene.connect(uses=uses)
    move(destination, 1)
    standby.freeze(scene.path, scene.true_answer())
    move(destination, 2)

    for one in (destination, scene.connect(uses=uses)):
        found = one.observe(PLACE)
        assert (found.version_id, found.fresh) == (new_entry(2).version_id, True)
        assert one.read(PLACE, new_entry(1).version_id).has_value is False
    assert standby.replayed == 0


def test_a_stale_missing_entry_is_not_believed(scene: Scene) -> None:
    """A standby that has not heard of the entry yet does not make us think that nobody wrote it."""
    standby = StandbyBehind()
    scene.proxy.rule = standby
    standby.freeze(scene.path, Answer(status=404, body=b'{"errors":[]}'))
    move(scene.connect(), 1)

    found = scene.connect().observe(PLACE)

    assert (found.version_id, found.fresh) == (new_entry(1).version_id, True)


@pytest.mark.parametrize("facts", [ENTERPRISE, {"version": "1.13.0+ent"}, {}])
def test_where_nothing_reaches_the_leader_no_read_is_fresh(
    scene: Scene, facts: dict[str, Any]
) -> None:
    """Where a standby may answer, that is said; what is older than our own write is refused.

    Vault Enterprise reads at the standby for a wrapped answer too, and a nameless server may be one.
    """
    standby = StandbyBehind()
    scene.proxy.rule = as_vault(facts, standby)
    writer = scene.connect()
    move(writer, 1)
    standby.freeze(scene.path, scene.true_answer())
    token = str(scene.number())
    writer.activate(PLACE, new_entry(2), expected=token)

    with pytest.raises(DestinationUnavailable, match="only stale answers"):
        writer.observe(PLACE)
    restarted = scene.connect()
    found = restarted.observe(PLACE)

    assert (found.version_id, found.fresh) == (new_entry(1).version_id, False)
    with pytest.raises(DestinationUnavailable, match="no fresh read"):
        restarted.retire(PLACE, version_id=new_entry(1).version_id, locator="1", how="destroy")
    assert "limited number of uses" in restarted.probe()
    assert standby.replayed >= 2


def test_enterprise_with_limited_tokens_reads_fresh(scene: Scene) -> None:
    """There a token of limited uses is what makes a standby ask the leader."""
    standby = StandbyBehind(limited=True)
    scene.proxy.rule = as_vault(ENTERPRISE, standby)
    destination = scene.connect(uses=1000)
    move(destination, 1)

    assert destination.observe(PLACE).fresh
    assert "by itself" in destination.probe()


def test_a_community_standby_forwards_and_costs_nothing(scene: Scene) -> None:
    """Vault Community answers nothing at a standby: its reads are one plain call each."""
    scene.proxy.rule = as_vault({"version": "1.21.0", "enterprise": False}, straight)
    destination = scene.connect()
    move(destination, 1)

    assert destination.observe(PLACE).fresh
    assert not any("wrapping" in call for call in scene.proxy.calls())


def test_a_wrapping_token_that_a_standby_does_not_know_yet_is_tried_again(scene: Scene) -> None:
    """It is replicated as well, so the standby may refuse it for a moment."""
    refusals = 2

    def rule(call: Call, forward: Forward) -> Answer:
        nonlocal refusals
        if call.path.endswith("/unwrap") and refusals:
            refusals -= 1
            return Answer(status=400, body=b'{"errors":["wrapping token is not valid"]}')
        return forward(call)

    destination = scene.connect()
    move(destination, 1)
    scene.proxy.rule = rule

    assert destination.observe(PLACE).version_id == new_entry(1).version_id
    assert refusals == 0
    refusals = 100
    with pytest.raises(DestinationUnavailable, match="unwrapped"):
        destination.observe(PLACE)


def test_who_takes_the_wrapping_away_is_not_believed(scene: Scene) -> None:
    """A proxy that drops the header gives an answer of whichever node: it is not fresh."""

    def rule(call: Call, forward: Forward) -> Answer:
        kept = {k: v for k, v in call.headers.items() if k != "x-vault-wrap-ttl"}
        return forward(replace(call, headers=kept))

    scene.proxy.rule = rule
    destination = scene.connect()
    move(destination, 1)

    assert destination.observe(PLACE).fresh is False


def test_an_entry_that_was_removed_with_its_history_begins_anew(scene: Scene) -> None:
    """A lower number than we wrote is the truth where the leader says so."""
    destination = scene.connect()
    move(destination, 1)
    move(destination, 2)
    scene.server.call("DELETE", f"{MOUNT}/metadata/{scene.prefix}/{PLACE.path}")

    assert destination.observe(PLACE).exists is False
    assert move(destination, 3) == "1"


# --- a network that lies, stalls and hangs up -----------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_in_the_middle_is_not_followed(scene: Scene, status: int) -> None:
    """Once logged in, a redirect to another host is retryable and no token leaves for there."""
    destination = scene.connect()
    move(destination, 1)
    token = destination.observe(PLACE).token
    with recording_proxy(scene.server.address, ca_file=scene.server.ca_file) as stranger:

        def rule(call: Call, forward: Forward) -> Answer:
            to = {"Location": f"{stranger.address}{call.target}"}
            return Answer(status=status, headers=to)

        scene.proxy.rule = rule
        for attempt in (
            lambda: destination.observe(PLACE),
            lambda: destination.activate(PLACE, new_entry(2), expected=token),
            destination.probe,
        ):
            with pytest.raises(DestinationUnavailable, match="redirect") as caught:
                attempt()
            assert caught.value.retryable
            assert caught.value.sent  # perhaps it landed before the standby gave up
        assert stranger.seen == []
    scene.proxy.rule = straight
    assert destination.activate(PLACE, new_entry(2), expected=token) == "2"


def at_write(scene: Scene, fault: Callable[[Call, Forward], Answer]) -> Callable[..., Answer]:
    """Let a fault befall every write of values."""

    def rule(call: Call, forward: Forward) -> Answer:
        return (
            fault(call, forward)
            if (call.method, call.path) == ("POST", scene.path)
            else forward(call)
        )

    return rule


def _garbled(call: Call, forward: Forward) -> Answer:
    return replace(forward(call), body=b"<html>gateway</html>")


def _gone(call: Call, forward: Forward) -> Answer:
    forward(call)
    return Answer(status=502, body=b"<html>bad gateway</html>")


@pytest.mark.parametrize("fault", [reset_after, late, short, _garbled, _gone])
@pytest.mark.parametrize("first", [True, False])
def test_a_write_whose_answer_is_lost_is_found_once(
    scene: Scene, fault: Callable[..., Answer], first: bool
) -> None:
    """Whatever becomes of the answer: the try says that it may have landed, the next finds it."""
    destination = scene.connect(call_deadline="1s")
    if not first:
        move(destination, 1)
    token = destination.observe(PLACE).token
    before = 0 if first else 1
    scene.proxy.rule = at_write(scene, fault)

    with pytest.raises(DestinationUnavailable) as caught:
        destination.activate(PLACE, new_entry(2), expected=token)
    if caught.value.late is not None:
        caught.value.late.exception(timeout=10)
    scene.proxy.rule = straight
    shown = destination.observe(PLACE)
    again = destination.activate(PLACE, new_entry(2), expected=token)

    assert caught.value.sent
    assert caught.value.retryable
    assert shown.version_id == new_entry(2).version_id
    assert again == shown.locator == str(before + 1)
    assert scene.number() == before + 1


def test_a_write_that_never_left_did_nothing(scene: Scene) -> None:
    """Cut before it arrives, the entry is as it was, and the same token is still good."""

    def cut(call: Call, forward: Forward) -> Answer:
        raise HangUp

    destination = scene.connect()
    move(destination, 1)
    token = destination.observe(PLACE).token
    scene.proxy.rule = at_write(scene, cut)
    with pytest.raises(DestinationUnavailable):
        destination.activate(PLACE, new_entry(2), expected=token)
    scene.proxy.rule = straight

    assert destination.observe(PLACE).version_id == new_entry(1).version_id
    assert destination.activate(PLACE, new_entry(2), expected=token) == "2"


@pytest.mark.parametrize(
    ("said", "heard"), [("7", 7), ("100000", 300), ("soon", 1), ("-3", 1), (None, 1)]
)
def test_a_server_that_asks_for_patience_gets_it(
    scene: Scene, said: str | None, heard: int
) -> None:
    """Retry-After is passed on, within bounds, for reads and writes; the write did nothing."""
    destination = scene.connect()
    move(destination, 1)
    token = destination.observe(PLACE).token
    headers = {} if said is None else {"Retry-After": said}
    scene.proxy.rule = lambda call, forward: Answer(status=429, headers=headers)

    for attempt in (
        lambda: destination.observe(PLACE),
        lambda: destination.activate(PLACE, new_entry(2), expected=token),
    ):
        with pytest.raises(Throttled) as caught:
            attempt()
        assert caught.value.retry_after == timedelta(seconds=heard)
    assert scene.number() == 1


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"7", b'"text"', b"[1]", b'{"data": null}', b'{"data": []}', b'{"data": {"metadata": 7}}',
     b'{"data": {"data": {}, "metadata": {"version": "x"}}}', b"\xff\xfe", b"{" * 5000],
)  # fmt: skip
def test_garbage_to_a_write_is_no_success(scene: Scene, body: bytes) -> None:
    """An answer without the number that must come next is never taken as written."""
    destination = scene.connect()
    move(destination, 1)
    token = destination.observe(PLACE).token
    scene.proxy.rule = at_write(scene, lambda call, forward: Answer(status=200, body=body))

    with pytest.raises(KeyturnError) as caught:
        destination.activate(PLACE, new_entry(2), expected=token)

    assert not isinstance(caught.value, Rejected)
    assert scene.number() == 1


# --- what it costs --------------------------------------------------------------------------


def rotation(destination: VaultDestination, seed: int) -> str:
    """Ask what the saga asks in one rotation: look, activate, look again; later retire the old.

    Returns the number of the old one.
    """
    shown = destination.observe(PLACE)
    destination.activate(PLACE, new_entry(seed), expected=shown.token)
    destination.observe(PLACE)
    destination.retire(
        PLACE, version_id=shown.version_id or "", locator=shown.locator, how="disable"
    )
    return shown.locator


def test_one_rotation_asks_no_more_than_it_needs(scene: Scene) -> None:
    """Plain: four reads, one write, one clean-up. Wrapped, each read is two calls."""
    short = {scene.path.removeprefix("/v1/"): "entry", "sys/wrapping/unwrap": "unwrap"}
    for uses, read in ((1000, ["GET entry"]), (0, ["GET entry", "POST unwrap"])):
        destination = scene.connect(uses=uses)
        move(destination, 10 + uses)
        scene.proxy.seen.clear()

        old = rotation(destination, 20 + uses)

        asked = [call.split(" ", 1) for call in scene.proxy.calls()]
        calls = [f"{method} {short.get(path, path)}" for method, path in asked]
        clean = f"POST {MOUNT}/delete/{scene.prefix}/{PLACE.path}"
        number = f"GET {MOUNT}/data/{scene.prefix}/{PLACE.path}?version={old}"
        copy = [number if step == "GET entry" else step for step in read]
        assert calls == [*read, "POST entry", *read, *read, *copy, clean]
