"""AWS Secrets Manager: every call fails in every way, and each write is found once afterwards."""

from __future__ import annotations

import contextlib
import json
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import urllib3.exceptions
from botocore.exceptions import SSLError

from keyturn.core.model import Target
from keyturn.destinations.aws import AwsDestination
from keyturn.destinations.aws_errors import understand
from keyturn.destinations.aws_secret import CURRENT
from keyturn.errors import (
    Conflict,
    Denied,
    DestinationError,
    DestinationUnavailable,
    KeyturnError,
    Rejected,
    Throttled,
)
from keyturn.testing.aws import StandIn, stand_in
from keyturn.testing.aws_access import refusal
from keyturn.testing.contract import PLACE, new_entry, parts, publish, withdraw
from keyturn.testing.wire import Answer, Call, Forward, straight
from support.aws import agent, connect, labels, versions
from support.faults import late, reset_after, reset_before, short

TAKEN = Target(to="aws", path=PLACE.path, adopt=True, merge=True)
Fault = Callable[[Call, Forward], Answer]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    """Give one stand-in; each test has a prefix of its own."""
    with stand_in(tmp_path_factory.mktemp("aws"), rate=1000) as one:
        yield one


@dataclass
class Scene:
    """A stand-in that fails when told to, and connections to it, each as after a restart."""

    server: StandIn
    folder: Path
    destination: AwsDestination
    raw: Any

    @property
    def name(self) -> str:
        """The name of the entry."""
        return self.destination.place(PLACE)

    def at(self, operation: str, fault: Fault, *, times: int = 1_000, skip: int = 0) -> None:
        """Let a fault befall an operation so many times, after so many good ones."""
        left, good = [times], [skip]

        def rule(call: Call, forward: Forward) -> Answer:
            if call.operation != operation:
                return forward(call)
            if good[0]:
                good[0] -= 1
                return forward(call)
            if not left[0]:
                return forward(call)
            left[0] -= 1
            return fault(call, forward)

        self.server.front.rule = rule

    def calm(self) -> None:
        """Let everything go well again."""
        self.server.front.rule = straight


@pytest.fixture
def scene(server: StandIn, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """Give a place for one entry; where the server stalls a call may take a second."""
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    deadline = "1s" if params.get("fault") is late else "10s"
    destination = connect(server, server.keys_file(tmp_path), call_deadline=deadline)
    one = Scene(server, tmp_path, destination, agent(server))
    yield one
    one.calm()
    destination.close()


# --- the faults -----------------------------------------------------------------------------


def internal(_call: Call, _forward: Forward) -> Answer:
    """Fail without having done anything."""
    return refusal("InternalServiceError", "canary-text", status=500)


def gateway(call: Call, forward: Forward) -> Answer:
    """Do it, and let a gateway lose the answer."""
    forward(call)
    return Answer(status=502, body=b"<html>canary-text</html>")


def throttled(_call: Call, _forward: Forward) -> Answer:
    """Ask for patience in the service's own way."""
    return refusal("ThrottlingException", "Rate exceeded, canary-text", Retry_After="7")


def too_many(_call: Call, _forward: Forward) -> Answer:
    """Ask for patience as any server does."""
    return Answer(status=429, headers={"Retry-After": "100000"}, body=b"canary-text")


def forbidden(_call: Call, _forward: Forward) -> Answer:
    """Take the right away."""
    return refusal("AccessDeniedException", "User: canary-text is not authorized", status=403)


def padded(call: Call, forward: Forward) -> Answer:
    """Send all of the JSON and promise more: the SDK would not notice."""
    return replace(forward(call), missing=10)


def truncated(call: Call, forward: Forward) -> Answer:
    """Send half of the JSON and call it all."""
    answer = forward(call)
    return replace(answer, body=answer.body[: len(answer.body) // 2])


def html(call: Call, forward: Forward) -> Answer:
    """Do it, and answer with a page."""
    return replace(forward(call), body=b"<html>canary-text</html>")


def listed(call: Call, forward: Forward) -> Answer:
    """Do it, and answer with JSON of another form."""
    return replace(forward(call), body=b'["canary-text"]')


def empty(call: Call, forward: Forward) -> Answer:
    """Do it, and answer with nothing."""
    return replace(forward(call), body=b"{}")


def large(call: Call, forward: Forward) -> Answer:
    """Do it, and answer without end."""
    return replace(forward(call), body=b'{"x": "' + b"y" * 1_100_000 + b'"}')


def redirect(call: Call, forward: Forward) -> Answer:
    """Do it, and send the caller elsewhere."""
    forward(call)
    return Answer(status=307, headers={"Location": "http://127.0.0.1:9/"})


LOST: tuple[Fault, ...] = (
    gateway, reset_after, late, short, padded, truncated, html, listed, empty, redirect,
)  # fmt: skip
SILENT = {truncated, html, listed, empty}
UNDONE: tuple[Fault, ...] = (internal, reset_before)
NEVER: dict[Fault, type[DestinationError]] = {
    throttled: Throttled, too_many: Throttled, forbidden: Denied,
}  # fmt: skip
WRITES = ("CreateSecret", "TagResource", "PutSecretValue", "UpdateSecretVersionStage")
READS = ("DescribeSecret", "GetSecretValue")


def ready(scene: Scene, operation: str) -> tuple[Target, Callable[[], object]]:
    """Bring an entry to where `operation` is the next write, and return what makes it."""
    destination, new = scene.destination, new_entry(2)
    if operation == "CreateSecret":
        return PLACE, lambda: destination.stage(PLACE, new, expected="")
    if operation == "TagResource":
        scene.raw.create_secret(Name=scene.name, SecretString='{"port": 1}')
        token = destination.observe(TAKEN).token
        return TAKEN, lambda: destination.stage(TAKEN, new, expected=token)
    publish(destination, PLACE, new_entry(1))
    token = destination.observe(PLACE).token
    if operation == "PutSecretValue":
        return PLACE, lambda: destination.stage(PLACE, new, expected=token)
    destination.stage(PLACE, new, expected=token)
    return PLACE, lambda: destination.activate(PLACE, new, expected=token)


def finish(destination: AwsDestination, target: Target) -> None:
    """Go on as the saga does after a look: stage where it is not staged, activate where not shown."""
    found = destination.observe(target)
    entry = new_entry(2)
    if found.version_id == entry.version_id:
        return
    if found.staged != entry.version_id:
        destination.stage(target, entry, expected=found.token)
    assert destination.read(target, entry.version_id).secret == entry.secret
    destination.activate(target, entry, expected=destination.observe(target).token)


def quotes_nothing(error: BaseException) -> None:
    """Hold an error against the texts of the server and the secrets of the test."""
    said = f"{error!r} {error} {getattr(error, 'hint', '')} {error.__cause__} {error.__context__}"
    assert "canary-text" not in said
    assert new_entry(2).secret.reveal() not in said


@pytest.mark.parametrize("operation", WRITES)
@pytest.mark.parametrize("fault", [*LOST, *UNDONE], ids=lambda fault: fault.__name__)
def test_a_write_that_fails_somehow_is_made_once(
    scene: Scene, operation: str, fault: Fault
) -> None:
    """Whatever becomes of the answer: it is said that it may have landed, and there is one version."""
    target, attempt = ready(scene, operation)
    scene.at(operation, fault)
    scene.server.front.seen.clear()
    if operation == "TagResource" and fault in SILENT:
        attempt()  # its answer is empty in the best case as well
    else:
        with pytest.raises(DestinationUnavailable) as caught:
            attempt()
        if caught.value.late is not None:
            with contextlib.suppress(KeyturnError):
                caught.value.late.result(timeout=10)
        quotes_nothing(caught.value)
        assert caught.value.sent
        assert caught.value.retryable
    scene.calm()
    asked = [call.operation for call, _ in scene.server.front.seen]
    assert asked.count(operation) == 1 - (
        fault is late
    )  # not answered yet; tries are made in one place, and that is the saga
    before = 0 if operation == "CreateSecret" else 1

    restarted = connect(
        scene.server, scene.server.keys_file(scene.folder), prefix=scene.destination.options.prefix
    )
    finish(restarted, target)

    shown = json.loads(scene.raw.get_secret_value(SecretId=scene.name)["SecretString"])
    assert shown.items() >= parts(target.keys, new_entry(2)).items()
    assert restarted.observe(target).secret == new_entry(2).secret
    assert versions(scene.server, scene.name) == before + 1
    restarted.close()


@pytest.mark.parametrize("operation", [*WRITES, *READS])
@pytest.mark.parametrize("fault", list(NEVER), ids=lambda fault: fault.__name__)
def test_what_is_refused_did_nothing_and_is_named(
    scene: Scene, operation: str, fault: Fault
) -> None:
    """Throttled with the time that was asked for, within bounds; Denied with the missing right."""
    if operation in READS:
        publish(scene.destination, PLACE, new_entry(1))
        target, attempt = PLACE, lambda: scene.destination.observe(PLACE)  # type: ignore[misc]
    else:
        target, attempt = ready(scene, operation)
    before = labels(scene.server, scene.name) if scene.server.secret(scene.name) else {}
    scene.at(operation, fault)
    with pytest.raises(NEVER[fault]) as caught:
        attempt()
    scene.calm()

    quotes_nothing(caught.value)
    if fault is forbidden:
        assert f"secretsmanager:{operation}" in str(caught.value)
        assert scene.name in str(caught.value)
        assert "keyturn policy aws" in caught.value.hint
    else:
        assert caught.value.retry_after == timedelta(seconds=7 if fault is throttled else 300)
    after = labels(scene.server, scene.name) if scene.server.secret(scene.name) else {}
    assert after == before
    finish(scene.destination, target)


@pytest.mark.parametrize("operation", READS)
@pytest.mark.parametrize("fault", [*LOST, *UNDONE], ids=lambda fault: fault.__name__)
def test_a_read_that_fails_somehow_confirms_nothing(
    scene: Scene, operation: str, fault: Fault
) -> None:
    """No answer is no empty entry; a call that only read before it failed has surely not landed."""
    publish(scene.destination, PLACE, new_entry(1))
    token = scene.destination.observe(PLACE).token
    scene.destination.stage(PLACE, new_entry(2), expected=token)
    before = labels(scene.server, scene.name)
    for attempt in (
        lambda: scene.destination.observe(PLACE),
        lambda: scene.destination.read(PLACE, new_entry(2).version_id),
        lambda: scene.destination.stage(PLACE, new_entry(3), expected=token),
        lambda: scene.destination.activate(PLACE, new_entry(2), expected=token),
        lambda: withdraw(scene.destination, PLACE, new_entry(1), token),
    ):
        scene.at(operation, fault)
        with pytest.raises(DestinationUnavailable) as caught:
            attempt()
        quotes_nothing(caught.value)
        if caught.value.late is None:
            assert caught.value.sent is False
        else:
            with contextlib.suppress(KeyturnError):
                caught.value.late.result(timeout=10)
        scene.calm()
        assert labels(scene.server, scene.name) == before
        if fault is late:
            break  # each costs seconds
    finish(scene.destination, PLACE)


@pytest.mark.parametrize("fault", [*LOST, *UNDONE, throttled, forbidden], ids=lambda f: f.__name__)
def test_a_label_that_could_not_be_taken_away_undoes_nothing(scene: Scene, fault: Fault) -> None:
    """AWSCURRENT has moved: that is the end of the call, whatever becomes of the clean-up."""
    target, attempt = ready(scene, "UpdateSecretVersionStage")
    scene.at("UpdateSecretVersionStage", fault, skip=1)
    if fault is late:
        with pytest.raises(DestinationUnavailable) as caught:
            attempt()
        assert caught.value.late is not None
        assert caught.value.late.result(timeout=10)
    else:
        assert attempt() == labels(scene.server, scene.name)[CURRENT]
    scene.calm()

    found = scene.destination.observe(target)
    assert (found.version_id, found.staged) == (new_entry(2).version_id, None)
    publish(scene.destination, PLACE, new_entry(3))
    assert versions(scene.server, scene.name) == 3


@pytest.mark.parametrize("fault", [*LOST, *UNDONE], ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("operation", ["PutSecretValue", "UpdateSecretVersionStage"])
def test_a_withdrawal_that_fails_somehow_is_made_once(
    scene: Scene, operation: str, fault: Fault
) -> None:
    """The revoked value goes, by however many tries; and there is one version more."""
    publish(scene.destination, PLACE, new_entry(1))
    token = scene.destination.observe(PLACE).token
    scene.at(operation, fault)
    with pytest.raises(DestinationUnavailable) as caught:
        withdraw(scene.destination, PLACE, new_entry(1), token)
    if caught.value.late is not None:
        with contextlib.suppress(KeyturnError):
            caught.value.late.result(timeout=10)
    scene.calm()
    found = scene.destination.observe(PLACE)
    withdraw(scene.destination, PLACE, new_entry(1), found.token)

    shown = json.loads(scene.raw.get_secret_value(SecretId=scene.name)["SecretString"])
    assert shown == {"id": new_entry(1).login}
    assert versions(scene.server, scene.name) == 2


@pytest.mark.parametrize("operation", [*WRITES, *READS])
def test_an_answer_without_end_is_cut_off(scene: Scene, operation: str) -> None:
    """More than 1 MiB is read by nobody."""
    if operation in READS:
        publish(scene.destination, PLACE, new_entry(1))
        attempt: Callable[[], object] = lambda: scene.destination.observe(PLACE)  # noqa: E731
        target = PLACE
    else:
        target, attempt = ready(scene, operation)
    scene.at(operation, large)
    with pytest.raises(DestinationError) as caught:
        attempt()
    quotes_nothing(caught.value)
    if operation not in READS:
        assert isinstance(caught.value, DestinationUnavailable)
        assert caught.value.sent  # it may have landed
    scene.calm()
    finish(scene.destination, target)


# --- answers that were true once ------------------------------------------------------------


def test_a_stale_read_costs_no_version_and_confirms_nothing(scene: Scene) -> None:
    """Who reads what was true before is stopped by the service itself, and by the next read."""
    publish(scene.destination, PLACE, new_entry(1))
    token = scene.destination.observe(PLACE).token
    kept: dict[bytes, Answer] = {}

    def remember(call: Call, forward: Forward) -> Answer:
        answer = forward(call)
        if call.operation == "DescribeSecret":
            kept[call.body] = answer
        return answer

    def replay(call: Call, forward: Forward) -> Answer:
        return kept.get(call.body) or forward(call)

    scene.server.front.rule = remember
    scene.destination.observe(PLACE)
    scene.calm()
    publish(scene.destination, PLACE, new_entry(2))
    behind = connect(
        scene.server,
        scene.server.keys_file(scene.folder),
        prefix=scene.destination.options.prefix,
        staleness="1h",
    )
    scene.server.front.rule = replay
    assert behind.observe(PLACE).version_id == new_entry(1).version_id
    assert behind.observe(PLACE).fresh is False
    behind.stage(PLACE, new_entry(3), expected=token)
    with pytest.raises((Conflict, Rejected)):
        behind.activate(PLACE, new_entry(3), expected=token)
    scene.calm()

    assert scene.destination.observe(PLACE).version_id == new_entry(2).version_id
    with pytest.raises(Conflict):
        behind.activate(PLACE, new_entry(3), expected=token)
    behind.close()


def test_an_answer_older_than_our_own_write_is_asked_for_again(scene: Scene) -> None:
    """A node that is behind is given a moment; what it shows then lets nothing go."""
    publish(scene.destination, PLACE, new_entry(1))
    destination = connect(
        scene.server,
        scene.server.keys_file(scene.folder),
        prefix=scene.destination.options.prefix,
        staleness="1h",
    )
    old = scene.raw.describe_secret(SecretId=scene.name)["VersionIdsToStages"]
    publish(destination, PLACE, new_entry(2))

    def behind(call: Call, forward: Forward) -> Answer:
        answer = forward(call)
        found = {**json.loads(answer.body), "VersionIdsToStages": old}
        return replace(answer, body=json.dumps(found).encode())

    scene.at("DescribeSecret", behind, times=2)
    found = destination.observe(PLACE)
    assert (found.version_id, found.fresh) == (new_entry(2).version_id, True)
    scene.at("DescribeSecret", behind)
    found = destination.observe(PLACE)
    assert (found.version_id, found.fresh) == (new_entry(1).version_id, False)
    destination.close()


def test_labels_and_values_are_of_one_moment(scene: Scene) -> None:
    """What moves between the two calls of a read is never read as a mixture."""
    publish(scene.destination, PLACE, new_entry(1))

    def meanwhile(call: Call, forward: Forward) -> Answer:
        answer = forward(call)
        scene.calm()
        publish(scene.destination, PLACE, new_entry(2))
        return answer

    scene.at("DescribeSecret", meanwhile, times=1)
    other = connect(
        scene.server,
        scene.server.keys_file(scene.folder),
        prefix=scene.destination.options.prefix,
    )
    found = other.observe(PLACE)
    assert (found.version_id, found.secret) == (new_entry(1).version_id, new_entry(1).secret)
    assert other.observe(PLACE).version_id == new_entry(2).version_id
    other.close()


def test_an_answer_about_another_entry_is_refused(scene: Scene) -> None:
    """The service can mean another secret by a name: nothing is read from it or written to it."""
    publish(scene.destination, PLACE, new_entry(1))

    def other(call: Call, forward: Forward) -> Answer:
        answer = forward(call)
        return replace(answer, body=json.dumps({**json.loads(answer.body), "Name": "x"}).encode())

    scene.at("DescribeSecret", other)
    for attempt in (
        lambda: scene.destination.observe(PLACE),
        lambda: scene.destination.stage(PLACE, new_entry(2), expected=""),
    ):
        with pytest.raises(Rejected, match="another entry"):
            attempt()


# --- TLS ------------------------------------------------------------------------------------


def test_a_certificate_that_does_not_hold_ends_it_before_anything_is_sent(tmp_path: Path) -> None:
    """Of an unknown authority, or none given: unavailable, nothing sent, nothing seen by the server."""
    with stand_in(tmp_path / "one", tls=True) as one, stand_in(tmp_path / "two", tls=True) as two:
        for ca_file in (str(two.ca_file), None):
            destination = connect(one, one.keys_file(tmp_path), ca_file=ca_file)
            for attempt in (
                lambda: destination.observe(PLACE),  # noqa: B023 - called in this round
                lambda: destination.stage(PLACE, new_entry(1), expected=""),  # noqa: B023
            ):
                with pytest.raises(
                    DestinationUnavailable, match="its certificate is not trusted"
                ) as caught:
                    attempt()
                assert caught.value.sent is False
                assert "ca_file" in caught.value.hint
            destination.close()
        assert one.front.seen == []


def test_only_a_certificate_that_does_not_hold_is_sure_to_come_first() -> None:
    """Other troubles of TLS can follow a request that has landed."""
    for reason, sent in (
        (ssl.SSLCertVerificationError(1, "x"), False),
        (ssl.SSLError(1, "x"), True),
    ):
        error = SSLError(endpoint_url="https://x", error=urllib3.exceptions.SSLError(reason))
        found = understand(error, name="aws", operation="PutSecretValue", what="x", write=True)
        assert isinstance(found, DestinationUnavailable)
        assert found.sent is sent


def test_a_server_that_is_away_is_unavailable(tmp_path: Path) -> None:
    """Nothing left, so no intent stays open."""
    with stand_in(tmp_path) as one:
        destination = connect(one, one.keys_file(tmp_path))
    with pytest.raises(DestinationUnavailable) as caught:
        destination.stage(PLACE, new_entry(1), expected="")
    assert caught.value.sent is False
    destination.close()
