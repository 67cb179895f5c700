"""What is special at Azure: names, soft delete, disabled versions, times, tags, rights."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from keyturn.core.model import Target
from keyturn.destinations import azure
from keyturn.destinations.azure import FENCE, OWNER, VERSION, AzureDestination, AzureOptions
from keyturn.destinations.azure_login import AuthOptions
from keyturn.errors import (
    ConfigError,
    Conflict,
    Denied,
    DestinationUnavailable,
    NotFound,
    Rejected,
    Throttled,
)
from keyturn.testing.azure import ALL, Cloud
from keyturn.testing.contract import (
    MINTED_AT,
    OTHER_STORE_ID,
    PLACE,
    STORE_ID,
    new_entry,
    parts,
    withdraw,
)
from keyturn.testing.wire import Answer, Call, Forward, as_json
from support.azure import by_secret, connect, reachable_cloud, root, shown

PAIRS = 10_000
BOTH = Target(to="contract", path="team/agent-1", merge=True, adopt=True)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """Give one cloud to all tests; each has a prefix of its own."""
    with reachable_cloud(tmp_path_factory.mktemp("azure")) as cloud:
        yield cloud


@pytest.fixture
def destination(one: Cloud, monkeypatch: pytest.MonkeyPatch) -> Iterator[AzureDestination]:
    """Give a connection with every right."""
    monkeypatch.setattr(azure, "STALE_PAUSE", 0.001)
    monkeypatch.setattr(azure, "RECOVERY_PAUSE", 0.02)
    made = connect(one, root(one))
    yield made
    made.close()
    one.server.rule = lambda call, app: app(call)
    one.vault.recovery, one.vault.firewall = 0.0, False


def copies(one: Cloud, destination: AzureDestination) -> list[Any]:
    """Return every version of the entry, the latest last."""
    return one.vault.secrets[destination.place(PLACE).lower()].versions


# --- names ------------------------------------------------------------------------------------


def test_what_reaches_one_secret_is_one_identity(one: Cloud, destination: AzureDestination) -> None:
    """10,000 pairs of spellings: one secret, one identity, and never one outside of the prefix."""
    draw, alphabet = random.Random("aliases"), "aAbB1-_."
    same = 0

    def path() -> str:
        parts = draw.randint(1, 3)
        text = "/".join("".join(draw.choices(alphabet, k=draw.randint(1, 2))) for _ in range(parts))
        return text if draw.random() < 0.7 else text.upper()

    for _ in range(PAIRS):
        pair = [Target(to="kv", path=path()) for _ in range(2)]
        if draw.random() < 0.3:
            pair[1] = Target(
                to="kv", path=pair[0].path.replace("_", "-").replace("/", ".").swapcase()
            )
        try:
            names = [destination.place(target) for target in pair]
        except ConfigError:
            continue
        assert all(name.startswith(f"{destination.options.prefix}-") for name in names)
        assert all(set(name) <= set("aAbB1-pP0123456789") for name in names)
        identities = [destination.identity(target) for target in pair]
        assert (names[0].lower() == names[1].lower()) is (identities[0] == identities[1])
        same += identities[0] == identities[1]
    assert same > 500


def test_only_the_secrets_of_the_prefix_are_asked_for(
    one: Cloud, destination: AzureDestination
) -> None:
    """Whatever the path, no request is about another name."""
    draw = random.Random("requests")
    before = len(one.server.seen)
    for _ in range(60):
        path = "".join(draw.choices("ab/._-", k=draw.randint(1, 8)))
        with contextlib.suppress(ConfigError):
            destination.observe(Target(to="kv", path=path))
    asked = {call.path.split("/")[2] for call, _ in one.server.seen[before:]
             if call.path.startswith("/secrets/")}  # fmt: skip
    assert len(asked) > 10
    assert all(name.startswith(f"{destination.options.prefix}-") for name in asked)


def test_two_spellings_reach_one_secret(one: Cloud, destination: AzureDestination) -> None:
    """The service tells no cases apart, so neither does the identity."""
    destination.activate(Target(to="kv", path="Team/Agent.1"), new_entry(1), expected="")
    assert (
        destination.observe(Target(to="kv", path="team_AGENT-1")).version_id
        == new_entry(1).version_id
    )


def test_a_name_that_is_too_long_is_a_mistake_in_the_file(destination: AzureDestination) -> None:
    """127 characters with the prefix, found out offline."""
    room = 127 - len(destination.options.prefix) - 1
    assert len(destination.place(Target(to="kv", path="a" * room))) == 127
    with pytest.raises(ConfigError, match="127"):
        destination.identity(Target(to="kv", path="a" * (room + 1)))


# --- what a version carries ---------------------------------------------------------------------


def test_a_version_carries_its_marks_and_times(one: Cloud) -> None:
    """Tags say whose and which it is; expiry and not-before follow the options, from journalled times."""
    options = {"tags": {"team": "red"}, "not_before": True}
    plain = connect(one, root(one), **options)
    dated = connect(one, root(one), expires_after="30d", **options)
    bare = connect(one, root(one))
    for made, exp, nbf in (
        (plain, None, MINTED_AT),
        (dated, MINTED_AT + timedelta(days=30), MINTED_AT),
        (bare, None, None),
    ):
        made.activate(PLACE, new_entry(1), expected="")
        (found,) = copies(one, made)
        marks = {OWNER: STORE_ID, VERSION: new_entry(1).version_id, FENCE: "7"}
        assert found.tags == (marks if made is bare else {"team": "red", **marks})
        assert found.content_type == "application/json"
        assert found.exp == (int(exp.timestamp()) if exp else None)
        assert found.nbf == (int(nbf.timestamp()) if nbf else None)
        made.close()


def test_an_enforced_end_is_shown(one: Cloud, destination: AzureDestination) -> None:
    """Without an option of its own the expiry is that of the version."""
    from dataclasses import replace

    end = MINTED_AT + timedelta(days=90)
    destination.activate(PLACE, replace(new_entry(1), not_after=end), expected="")
    assert copies(one, destination)[0].exp == int(end.timestamp())


@pytest.mark.parametrize(
    "tags",
    [{"keyturn-owner": "x"}, {"Keyturn-X": "x"}, {"": "x"}, {"x": 1}, {"x": "y" * 257}, "x",
     {str(n): "x" for n in range(13)}],
)  # fmt: skip
def test_tags_that_would_not_be_taken_are_a_mistake_in_the_file(tags: Any) -> None:
    """Ours cannot be overridden, and 15 are all that a version can carry."""
    with pytest.raises(ValueError, match=r".*"):
        AzureOptions(vault="https://x.vault.azure.net", tags=tags)


# --- versions -----------------------------------------------------------------------------------


def test_a_landed_twin_is_disabled_and_the_shown_one_stays(
    one: Cloud, destination: AzureDestination
) -> None:
    """Two enabled copies of one version: the one that is not shown goes, at the next call about it."""
    destination.activate(PLACE, new_entry(1), expected="")
    twin = copies(one, destination)[0]
    late = one.vault.add(destination.place(PLACE), twin.value, twin.tags)
    assert destination.activate(PLACE, new_entry(1), expected="") == late.id
    assert [copy.enabled for copy in copies(one, destination)] == [False, True]

    one.vault.add(destination.place(PLACE), twin.value, twin.tags)
    destination.activate(PLACE, new_entry(2), expected="")
    assert [copy.enabled for copy in copies(one, destination)].count(True) == 2
    destination.retire(PLACE, version_id=new_entry(1).version_id, locator=late.id, how="destroy")
    assert [copy.enabled for copy in copies(one, destination)] == [False, False, False, True]


@pytest.mark.parametrize("act", ["activate", "retire"])
def test_what_lands_between_two_looks_is_never_disabled(
    one: Cloud, destination: AzureDestination, act: str
) -> None:
    """A late write becomes what agents read while we look: it is not taken for a surplus one."""
    first = destination.activate(PLACE, new_entry(1), expected="")
    if act == "retire":
        destination.activate(PLACE, new_entry(2), expected="")
    twin, landed = copies(one, destination)[0], []

    def land(call: Call, app: Forward) -> Answer:
        answer = app(call)
        if call.path.startswith("/secrets") and answer.status == 200 and not landed:
            landed.append(one.vault.add(destination.place(PLACE), twin.value, twin.tags))
        return answer

    one.server.rule = land
    with contextlib.suppress(DestinationUnavailable):  # "read again" is a good answer as well
        if act == "activate":
            destination.activate(PLACE, new_entry(1), expected="")
        else:
            version_id = new_entry(1).version_id
            destination.retire(PLACE, version_id=version_id, locator=first, how="disable")
    assert landed
    assert copies(one, destination)[-1].enabled


def test_a_copy_without_its_tags_is_put_away_by_its_value(
    one: Cloud, destination: AzureDestination
) -> None:
    """Tags can be changed by others, values cannot; and no other version's copy is touched."""
    first = destination.activate(PLACE, new_entry(1), expected="")
    second = destination.activate(PLACE, new_entry(2), expected="")
    destination.activate(PLACE, new_entry(3), expected="")
    copies(one, destination)[0].tags.clear()
    old = new_entry(1).version_id
    destination.retire(PLACE, version_id=old, locator=second, how="disable")
    assert [copy.enabled for copy in copies(one, destination)] == [True, True, True]
    destination.retire(PLACE, version_id=old, locator=first, how="disable")
    assert [copy.enabled for copy in copies(one, destination)] == [False, True, True]
    destination.retire(PLACE, version_id=old, locator="gone", how="disable")


def test_a_disabled_latest_version_is_an_entry_without_a_value(
    one: Cloud, destination: AzureDestination
) -> None:
    """Not a missing permission: ours is published over, somebody else's is left alone."""
    destination.activate(PLACE, new_entry(1), expected="")
    copies(one, destination)[-1].enabled = False
    found = destination.observe(PLACE)
    assert (found.exists, found.has_value, found.other_keys) == (True, False, False)
    assert (found.owner, found.token) == (STORE_ID, copies(one, destination)[-1].id)
    with pytest.raises(Rejected, match="disabled"):
        destination.activate(BOTH, new_entry(2), expected="")
    destination.activate(PLACE, new_entry(2), expected="")
    assert shown(one.vault, destination.place(PLACE)) == parts(PLACE.keys, new_entry(2))

    one.vault.add(destination.place(PLACE), "{}").enabled = False
    assert destination.observe(PLACE).other_keys
    with pytest.raises(Rejected, match="disabled"):
        destination.activate(PLACE, new_entry(3), expected="")


def test_a_version_by_hand_stays_ours_by_the_marks_of_the_older_ones(
    one: Cloud, destination: AzureDestination
) -> None:
    """Who edits by hand sets no tags; the secret is ours all the same, as at stores with one marker."""
    destination.activate(PLACE, new_entry(1), expected="")
    one.vault.add(destination.place(PLACE), json.dumps({"secret": "by hand"}))
    assert destination.observe(PLACE).owner == STORE_ID
    now = copies(one, destination)[0].created
    one.vault.add(destination.place(PLACE), "{}", {OWNER: OTHER_STORE_ID}).created = now
    one.vault.add(destination.place(PLACE), json.dumps({"secret": "by hand"}))
    assert destination.observe(PLACE).owner == OTHER_STORE_ID


def test_a_withdrawal_keeps_the_owner_and_names_no_version(
    one: Cloud, destination: AzureDestination
) -> None:
    """What is left says whose it is, and no version of ours."""
    destination.activate(PLACE, new_entry(1), expected="")
    withdraw(destination, PLACE, new_entry(1), "")
    assert copies(one, destination)[-1].tags == {OWNER: STORE_ID, FENCE: "7"}


def test_many_versions_are_listed_to_the_last(one: Cloud, destination: AzureDestination) -> None:
    """Pages of 25 and less, some of them empty: the twin among 120 is found."""
    for seed in range(3):
        destination.activate(PLACE, new_entry(seed), expected="")
    name, twin = destination.place(PLACE), copies(one, destination)[-1]
    for _ in range(120):
        one.vault.add(name, "{}")
    one.vault.add(name, twin.value, twin.tags)
    destination.activate(PLACE, new_entry(2), expected="")
    assert [c.enabled for c in copies(one, destination) if c.tags.get(VERSION) == twin.tags[VERSION]] == [
        False, True,
    ]  # fmt: skip


# --- soft delete --------------------------------------------------------------------------------


def test_a_deleted_entry_of_ours_is_recovered_and_read_again(
    one: Cloud, destination: AzureDestination
) -> None:
    """Recovery takes a moment; the saga is told to read again, and then publishes over it."""
    destination.activate(PLACE, new_entry(1), expected="")
    one.vault.delete(destination.place(PLACE))
    one.vault.recovery = 0.3
    assert destination.observe(PLACE).exists is False
    with pytest.raises(Conflict):
        destination.activate(PLACE, new_entry(2), expected="")
    assert destination.observe(PLACE).version_id == new_entry(1).version_id
    destination.activate(PLACE, new_entry(2), expected="")
    assert destination.observe(PLACE).version_id == new_entry(2).version_id


def test_a_recovery_that_takes_longer_is_waited_for(one: Cloud) -> None:
    """Not longer than the call may take; the next try finds it under way, and later done."""
    slow = connect(one, root(one), call_deadline="600ms")
    slow.activate(PLACE, new_entry(1), expected="")
    one.vault.delete(slow.place(PLACE))
    one.vault.recovery = 1.5
    tries = 0
    with pytest.raises(Conflict):  # noqa: PT012 - as the saga would
        while True:
            tries += 1
            with contextlib.suppress(DestinationUnavailable):
                slow.activate(PLACE, new_entry(2), expected="")
                break
            time.sleep(0.1)
        raise Conflict
    one.vault.recovery = 0.0
    assert tries > 1
    slow.close()


def test_a_deleted_secret_of_somebody_else_is_not_brought_back(
    one: Cloud, destination: AzureDestination
) -> None:
    """Its owner deleted it: only `adopt` or `merge` say that it may come back."""
    name = destination.place(PLACE)
    one.vault.add(name, json.dumps({"secret": "theirs"}))
    one.vault.delete(name)
    with pytest.raises(Rejected, match="deleted secret") as refused:
        destination.activate(PLACE, new_entry(1), expected="")
    assert "purge" in refused.value.hint
    assert one.vault.secrets[name.lower()].deleted
    with pytest.raises(Conflict):
        destination.activate(BOTH, new_entry(1), expected="")
    destination.activate(BOTH, new_entry(1), expected="")
    assert destination.observe(PLACE).version_id == new_entry(1).version_id


def test_without_the_right_to_recover_it_is_named(one: Cloud) -> None:
    """The missing permission is named, not guessed from a conflict."""
    identity, path = one.application()
    one.vault.grant(identity, ALL - {"recover/action"})
    made = connect(one, by_secret(one, identity, path))
    made.activate(PLACE, new_entry(1), expected="")
    one.vault.delete(made.place(PLACE))
    made._written.clear()
    with pytest.raises(Denied, match=r"secrets/recover/action on p\d+-team-agent-1"):
        made.activate(PLACE, new_entry(2), expected="")
    made.close()


# --- rights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lacking", ["getSecret", "readMetadata", "setSecret", "update"])
def test_each_missing_right_is_named(one: Cloud, lacking: str) -> None:
    """By its data action and the secret; a probe finds all but the right to write."""
    identity, path = one.application()
    one.vault.grant(identity, ALL - {f"{lacking}/action"})
    made = connect(one, by_secret(one, identity, path))
    name = made.place(PLACE)
    one.vault.add(name, json.dumps(parts(PLACE.keys, new_entry(1))), {
        OWNER: STORE_ID, VERSION: new_entry(1).version_id, FENCE: "7"})  # fmt: skip
    locator = one.vault.add(name, json.dumps(parts(PLACE.keys, new_entry(2))), {
        OWNER: STORE_ID, VERSION: new_entry(2).version_id, FENCE: "7"}).id  # fmt: skip
    first = one.vault.secrets[name].versions[0].id
    words = rf"lacks Microsoft\.KeyVault/vaults/secrets/{lacking}/action on {name}"
    with pytest.raises(Denied, match=words) as denied:  # noqa: PT012 - one of the two meets it
        made.activate(PLACE, new_entry(3), expected=locator)
        made.retire(PLACE, version_id=new_entry(1).version_id, locator=first, how="disable")
    assert "policy azure" in denied.value.hint
    if lacking != "setSecret":
        with pytest.raises(Denied, match=words):
            made.probe_entry(PLACE, retire="disable")
    made.probe()
    made.close()


def test_a_firewall_is_named(one: Cloud, destination: AzureDestination) -> None:
    """It is no missing role."""
    one.vault.firewall = True
    for act in (lambda: destination.observe(PLACE), destination.probe):
        with pytest.raises(Denied, match="firewall"):
            act()


def test_the_policy_has_one_scope_a_secret(destination: AzureDestination) -> None:
    """What `keyturn policy azure` prints is a role that `az` takes, and where to assign it."""
    entries = [(Target(to="kv", path=path), "disable") for path in ("b", "a/x", "A.X")]
    found = json.loads(AzureDestination.least_policy(destination.options, entries))
    prefix = destination.options.prefix
    assert [scope.rpartition("/")[2] for scope in found["scopes"]] == [
        f"{prefix}-a-x",
        f"{prefix}-b",
    ]
    role = found["role"]
    assert role["AssignableScopes"] == ["/subscriptions/SUBSCRIPTION/resourceGroups/GROUP"]
    assert all(scope.startswith(role["AssignableScopes"][0]) for scope in found["scopes"])
    assert not [action for action in role["DataActions"] if "delete" in action or "purge" in action]
    assert len(role["DataActions"]) == 5
    assert role["Actions"] == []


# --- other answers ------------------------------------------------------------------------------


def test_a_host_that_is_no_vault_is_not_found(one: Cloud, destination: AzureDestination) -> None:
    """A 404 that is not about a secret is no missing entry."""
    one.server.rule = lambda call, app: (
        Answer(status=404, body=b"<html>") if call.path.startswith("/secrets") else app(call)
    )
    with pytest.raises(NotFound, match="no vault"):
        destination.observe(PLACE)


def test_a_name_that_does_not_resolve_is_waited_for(one: Cloud) -> None:
    """DNS can be away; nothing was sent."""
    made = connect(one, root(one), vault="https://nobody.vault.invalid")
    with pytest.raises(DestinationUnavailable, match="its name is unknown") as away:
        made.activate(PLACE, new_entry(1), expected="")
    assert away.value.sent is False
    made.close()


def test_a_value_that_is_too_large_is_refused_for_good(
    one: Cloud, destination: AzureDestination
) -> None:
    """With the keys of others an entry can outgrow 25 kB: a person has to know."""
    one.vault.add(destination.place(PLACE), json.dumps({"note": "x" * 25_500}))
    with pytest.raises(Rejected, match="400") as refused:
        destination.activate(BOTH, new_entry(1), expected="")
    assert "25 kB" in refused.value.hint


def test_a_retry_after_is_believed_up_to_five_minutes(
    one: Cloud, destination: AzureDestination
) -> None:
    """A server must not park us."""
    for text, seconds in (("7", 7), ("86400", 300), ("soon", 1), ("-1", 1)):
        one.server.rule = lambda call, app, text=text: (
            as_json(429, {}, Retry_After=text) if "authorization" in call.headers else app(call)
        )
        with pytest.raises(Throttled) as slowed:
            destination.observe(PLACE)
        assert slowed.value.retry_after == timedelta(seconds=seconds)


def test_a_write_limit_holds_by_default() -> None:
    """20 writes a second, of the 30 that a vault takes from all its clients together."""
    assert AzureOptions(vault="https://x.vault.azure.net").write_limit == 20.0


def test_a_write_that_is_late_does_not_fence_a_later_one(
    one: Cloud, destination: AzureDestination
) -> None:
    """Without compare-and-set a paused writer's value lands (rule 10), and is replaced again."""
    destination.activate(PLACE, new_entry(1), expected="")
    paused, go = threading.Event(), threading.Event()

    def pause(call: Call, app: Forward) -> Answer:
        if call.method == "PUT" and new_entry(2).version_id in call.body.decode():
            paused.set()
            go.wait(10)
        return app(call)

    one.server.rule = pause
    writer = threading.Thread(
        target=lambda: destination.activate(PLACE, new_entry(2), expected=""), daemon=True
    )
    writer.start()
    assert paused.wait(10)
    destination.activate(PLACE, new_entry(3), expected="")
    go.set()
    writer.join()
    assert destination.observe(PLACE).version_id == new_entry(2).version_id
    destination.activate(PLACE, new_entry(3), expected="")
    assert destination.observe(PLACE).version_id == new_entry(3).version_id
    enabled = [c.tags[VERSION] for c in copies(one, destination) if c.enabled]
    assert enabled.count(new_entry(3).version_id) == 1


def test_the_default_login_is_the_machine_s_own(one: Cloud) -> None:
    """Without `auth` the system-assigned identity is used, and nothing else is tried."""
    identity = one.entra.identities
    first = next((i for i in identity if i.managed), None) or one.machine()
    one.vault.grant(first)
    made = connect(one, AuthOptions())
    assert made.observe(PLACE).exists is False
    made.close()
