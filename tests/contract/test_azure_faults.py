"""Whatever goes wrong at Azure, at whichever call: the right error, nothing lost, one version."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from azure.keyvault.secrets._shared import http_challenge_cache

from keyturn.core.model import Target
from keyturn.destinations import azure
from keyturn.destinations.azure import VERSION, AzureDestination
from keyturn.destinations.azure_login import AuthOptions
from keyturn.errors import (
    Denied,
    DestinationUnavailable,
    KeyturnError,
    Rejected,
    Throttled,
)
from keyturn.testing.azure import Cloud
from keyturn.testing.certificates import new_authority
from keyturn.testing.contract import PLACE, new_entry, parts
from keyturn.testing.wire import Answer, Call, Forward, HangUp, as_json
from support.azure import connect, reachable_cloud, root, shown
from support.faults import Once, far_too_much, reset_after, reset_before, stall

DEADLINE = "700ms"
OLD, NEW = new_entry(1), new_entry(2)
LOST = 20  # lost answers; ten times as many in the full version


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """Give one cloud to all tests; each has a prefix of its own."""
    with reachable_cloud(tmp_path_factory.mktemp("azure")) as cloud:
        yield cloud


@pytest.fixture(autouse=True)
def quick(one: Cloud, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pause little, and leave no rule behind."""
    monkeypatch.setattr(azure, "STALE_PAUSE", 0.001)
    yield
    one.server.rule = one.metadata.rule = lambda call, app: app(call)


# --- the matrix -----------------------------------------------------------------------------

CALLS: dict[str, Callable[[Call], bool]] = {
    "discover": lambda call: call.path.endswith("openid-configuration"),
    "login": lambda call: call.path.endswith("/token"),
    "challenge": lambda call: call.path.startswith("/secrets") and "authorization" not in call.headers,
    "read": lambda call: call.method == "GET" and _is_asked(call) and "/versions" not in call.path,
    "list": lambda call: call.method == "GET" and _is_asked(call) and "/versions" in call.path,
    "write": lambda call: call.method == "PUT" and _is_asked(call),
    "disable": lambda call: call.method == "PATCH" and _is_asked(call),
}  # fmt: skip
ERROR = {"error": {"code": "InternalServerError", "message": "canary"}}
RBAC = {
    "error": {"code": "Forbidden", "message": "canary", "innererror": {"code": "ForbiddenByRbac"}}
}


def _is_asked(call: Call) -> bool:
    return call.path.startswith("/secrets") and "authorization" in call.headers


def error_500(call: Call, app: Forward) -> Answer:
    """Fail, and do nothing."""
    return as_json(500, ERROR)


def error_500_after(call: Call, app: Forward) -> Answer:
    """Do it, and say that it failed."""
    app(call)
    return as_json(500, ERROR)


def error_503(call: Call, app: Forward) -> Answer:
    """Be away for a while."""
    return as_json(503, ERROR, Retry_After="5")


def too_many(call: Call, app: Forward) -> Answer:
    """Throttle."""
    return as_json(429, {"error": {"code": "Throttled", "message": "x"}}, Retry_After="7")


def forbidden(call: Call, app: Forward) -> Answer:
    """Deny the permission."""
    return as_json(403, RBAC)


def truncated(call: Call, app: Forward) -> Answer:
    """Do it, and stop in the middle of the answer."""
    answer = app(call)
    return Answer(status=answer.status, body=answer.body, headers=answer.headers, missing=50)


def no_json(call: Call, app: Forward) -> Answer:
    """Do it, and answer with a page."""
    app(call)
    return Answer(status=200, body=b"<html>canary", headers={"Content-Type": "text/html"})


def empty_object(call: Call, app: Forward) -> Answer:
    """Do it, and answer with nothing in it."""
    app(call)
    return as_json(200, {})


def wrong_kinds(call: Call, app: Forward) -> Answer:
    """Do it, and answer with values of other kinds."""
    app(call)
    return as_json(200, {"value": 7, "id": ["canary"], "attributes": "canary", "tags": 1})


def somebody_elses(call: Call, app: Forward) -> Answer:
    """Do it, and answer with what is another secret's."""
    app(call)
    item = {"id": "https://example.vault.azure.net/secrets/other/" + "a" * 32,
            "attributes": {"enabled": False, "created": 1, "updated": 1}, "tags": {}}  # fmt: skip
    value = [item] if "/versions" in call.path else json.dumps(parts(PLACE.keys, new_entry(9)))
    return as_json(200, {**item, "value": value})


def redirect(call: Call, app: Forward) -> Answer:
    """Send the client to another host."""
    place = "https://login.microsoftonline.com/stranger"
    return Answer(status=307, headers={"Location": place})


FAULTS: dict[Callable[[Call, Forward], Answer], type[KeyturnError]] = {
    error_500: DestinationUnavailable,
    error_500_after: DestinationUnavailable,
    error_503: DestinationUnavailable,
    too_many: Throttled,
    forbidden: Denied,
    reset_before: DestinationUnavailable,
    reset_after: DestinationUnavailable,
    stall: DestinationUnavailable,
    truncated: DestinationUnavailable,
    no_json: DestinationUnavailable,
    empty_object: DestinationUnavailable,
    wrong_kinds: DestinationUnavailable,
    somebody_elses: DestinationUnavailable,
    far_too_much: Rejected,
    redirect: DestinationUnavailable,
}


def fresh_connection(one: Cloud, **more: Any) -> AzureDestination:
    """Make a connection that has to log in, and to be challenged, before anything else."""
    http_challenge_cache.clear()
    return connect(one, root(one), **more)


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_each_fault_at_each_call_ends_well(
    one: Cloud, kind: str, fault: Callable[[Call, Forward], Answer]
) -> None:
    """One call goes wrong: our error for it and no other, and the repetition makes it all good."""
    before = connect(one, root(one))
    first = before.activate(PLACE, OLD, expected="")
    second = before.activate(PLACE, new_entry(3), expected=first)
    name, prefix = before.place(PLACE), before.options.prefix
    before.close()
    destination = fresh_connection(one, prefix=prefix, **_deadline(fault))
    one.server.rule = once = Once(CALLS[kind], fault)
    raised: list[KeyturnError] = []

    def insist(act: Callable[[], Any]) -> Any:
        for _ in range(6):
            try:
                return act()
            except KeyturnError as error:
                raised.append(error)
        raise AssertionError(raised)

    located = insist(lambda: destination.activate(PLACE, NEW, expected=second))
    insist(
        lambda: destination.retire(PLACE, version_id=OLD.version_id, locator=first, how="disable")
    )
    found = insist(lambda: destination.observe(PLACE))

    assert once.hit == 1
    if kind in ("list", "challenge") and fault is empty_object:
        assert raised == []  # a list is for tidying up; what it lacks is put away the next time
    elif fault is stall:  # on a busy machine a second call can be too late as well
        assert {type(error) for error in raised} == {DestinationUnavailable}
    else:
        assert [type(error) for error in raised] == [FAULTS[fault]]
    _judge(raised, kind, fault)
    # What agents read is the new version, what was read says so, the old one was put away, and the
    # one between is as it was.
    assert shown(one.vault, name) == parts(PLACE.keys, NEW)
    assert (found.version_id, found.secret, found.locator) == (NEW.version_id, NEW.secret, located)
    copies = one.vault.secrets[name].versions
    enabled = Counter(copy.tags[VERSION] for copy in copies if copy.enabled)
    assert enabled == {NEW.version_id: 1, new_entry(3).version_id: 1}
    assert {OLD.version_id} <= {copy.tags[VERSION] for copy in copies}
    destination.close()


def _deadline(fault: Any) -> dict[str, str]:
    return {"call_deadline": DEADLINE} if fault is stall else {}


def _judge(raised: list[KeyturnError], kind: str, fault: Any) -> None:
    """Nothing is quoted, and only what may have landed is said to be unsure."""
    for error in raised:
        text = f"{error!r} {error} {error.hint} {error.__cause__} {error.__context__}"
        assert "canary" not in text
        assert NEW.secret.reveal()[-20:] not in text
        if isinstance(error, DestinationUnavailable):
            unsure = kind in ("write", "disable") or error.late is not None
            assert error.sent is unsure or fault is stall
        if isinstance(error, Throttled):
            assert error.retry_after == timedelta(seconds=7)
        assert error.hint or not isinstance(error, Denied)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_each_fault_of_the_metadata_service_ends_well(
    one: Cloud, fault: Callable[[Call, Forward], Answer]
) -> None:
    """A managed identity's login goes wrong once: our error, and the next one is good."""
    identity = one.machine()
    one.vault.grant(identity)
    auth = AuthOptions(client_id=identity.client_id)
    destination = connect(one, auth, **_deadline(fault))
    one.metadata.rule = once = Once(CALLS["login"], fault)

    with pytest.raises(FAULTS[fault]) as raised:
        destination.observe(PLACE)

    assert once.hit == 1
    _judge([raised.value], "login", fault)
    assert destination.observe(PLACE).exists is False
    destination.close()


def test_an_older_answer_is_not_taken_for_what_was_written(one: Cloud) -> None:
    """Reads that are behind our own write are made again; if nothing else comes, they confirm nothing."""
    destination = connect(one, root(one))
    destination.activate(PLACE, OLD, expected="")
    kept: list[Answer] = []

    def freeze(call: Call, app: Forward) -> Answer:
        if not CALLS["read"](call):
            return app(call)
        if len(kept) < 1:
            kept.append(app(call))
        left[0] -= 1
        return kept[0] if left[0] >= 0 else app(call)

    left = [1]
    one.server.rule = freeze
    assert destination.observe(PLACE).version_id == OLD.version_id
    time.sleep(1.1)  # times of versions have seconds only
    one.server.rule = lambda call, app: app(call)
    destination.activate(PLACE, NEW, expected="")

    left[0], one.server.rule = 3, freeze
    assert destination.observe(PLACE).version_id == NEW.version_id
    left[0] = 1000
    with pytest.raises(DestinationUnavailable, match="stale"):
        destination.observe(PLACE)
    with pytest.raises(DestinationUnavailable, match="stale"):
        destination.retire(PLACE, version_id=NEW.version_id, locator="x", how="disable")
    destination.close()


def test_a_list_with_a_gap_lets_nothing_go(one: Cloud) -> None:
    """A list without what is shown is broken or too old: nothing counts as put away by it."""
    destination = connect(one, root(one))
    first = destination.activate(PLACE, OLD, expected="")
    destination.activate(PLACE, NEW, expected=first)
    one.server.rule = lambda call, app: (
        as_json(200, {"value": [], "nextLink": None}) if CALLS["list"](call) else app(call)
    )
    with pytest.raises(DestinationUnavailable, match="gap") as raised:
        destination.retire(PLACE, version_id=OLD.version_id, locator=first, how="disable")
    assert not raised.value.sent
    assert all(copy.enabled for copy in one.vault.secrets[destination.place(PLACE)].versions)
    destination.close()


def test_a_server_that_is_not_trusted_gets_nothing(one: Cloud, tmp_path: Path) -> None:
    """Neither vault nor authority is spoken to where the certificate is another authority's."""
    stranger = new_authority(tmp_path / "stranger")
    destination = connect(one, root(one), ca_file=str(stranger.ca_file))
    seen = len(one.server.seen)
    for act in (
        lambda: destination.observe(PLACE),
        lambda: destination.activate(PLACE, NEW, expected=""),
    ):
        with pytest.raises(
            DestinationUnavailable, match="its certificate is not trusted"
        ) as raised:
            act()
        assert not raised.value.sent
        assert "ca_file" in raised.value.hint
    assert len(one.server.seen) == seen
    destination.close()


# --- lost answers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rotations",
    [LOST, pytest.param(10 * LOST, marks=[pytest.mark.full, pytest.mark.timeout(900)])],
    ids=["tenth", "whole"],
)
def test_after_lost_answers_each_rotation_has_one_enabled_version(
    one: Cloud, rotations: int
) -> None:
    """Every write's answer is lost, some land only after their repetition: one enabled version each."""
    destination = connect(one, root(one))
    name, lost = destination.place(PLACE), Counter[str]()
    faults = (reset_after, error_500_after, truncated, empty_object)
    late: list[tuple[Call, Forward]] = []
    turn = 0

    def lose(call: Call, app: Forward) -> Answer:
        if not CALLS["write"](call):
            return app(call)
        number = json.loads(call.body)["tags"][VERSION]
        lost[number] += 1
        if lost[number] > 1:
            answer = app(call)
            while late:  # the first one lands now, behind the one that repeats it
                was, its = late.pop()
                its(was)
            return answer
        if turn % 5 == 4:
            late.append((call, app))
            raise HangUp
        return faults[turn % 5](call, app)

    one.server.rule = lose
    for turn in range(rotations):
        entry = new_entry(100 + turn)
        for _ in range(4):
            with contextlib.suppress(DestinationUnavailable):
                destination.activate(PLACE, entry, expected=destination.observe(PLACE).token)
                break
        assert destination.observe(PLACE).version_id == entry.version_id
    one.server.rule = lambda call, app: app(call)
    last = new_entry(99)
    destination.activate(PLACE, last, expected="")

    copies = one.vault.secrets[name].versions
    enabled = Counter(copy.tags[VERSION] for copy in copies if copy.enabled)
    assert len(enabled) == rotations + 1
    assert set(enabled.values()) == {1}
    assert len(copies) <= rotations + 1 + rotations // 5
    assert all(count >= 1 for count in lost.values())
    print(f"\nlost answers: {rotations}, versions {len(copies)}, enabled once {len(enabled)}")
    destination.close()


def test_a_storm_of_429_loses_nothing(one: Cloud) -> None:
    """Half of all requests are throttled, logins too: every rotation ends, none is refused."""
    destination = connect(one, root(one))
    count, pauses = iter(range(10**6)), set[Any]()
    one.server.rule = lambda call, app: (
        too_many(call, app) if (next(count) * 7919) % 10 < 5 else app(call)
    )

    def insist(act: Callable[[], Any]) -> Any:
        for _ in range(200):
            try:
                return act()
            except Throttled as error:
                pauses.add(error.retry_after)
        raise AssertionError

    for number in range(5):
        entry = new_entry(200 + number)
        insist(lambda: destination.activate(PLACE, entry, expected=""))  # noqa: B023
        assert insist(lambda: destination.observe(PLACE)).version_id == entry.version_id
    assert len(one.vault.secrets[destination.place(PLACE)].versions) == 5
    assert pauses == {timedelta(seconds=7)}
    destination.close()


def test_many_threads_share_a_login(one: Cloud) -> None:
    """Eight calls at once, the first ones of a connection: one login, and eight good answers."""
    destination = fresh_connection(one)
    seen, together = len(one.server.seen), threading.Barrier(8)
    found: list[bool] = []

    def look(number: int) -> None:
        together.wait()
        found.append(destination.observe(Target(to="kv", path=f"x{number}")).exists)

    threads = [threading.Thread(target=look, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [False] * 8
    logins = [call for call, _ in one.server.seen[seen:] if CALLS["login"](call)]
    assert len(logins) == 1
    destination.close()
