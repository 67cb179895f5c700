"""AWS Secrets Manager: labels, writes, versions, and the states in which nothing of ours is written."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from keyturn.core.model import Keys, Target
from keyturn.destinations.aws import AwsDestination
from keyturn.destinations.aws_budget import line_of
from keyturn.destinations.aws_secret import CURRENT, FENCE, OWNER, PENDING, PREVIOUS, name_of
from keyturn.errors import (
    ConfigError,
    Conflict,
    DestinationUnavailable,
    Rejected,
    Throttled,
)
from keyturn.testing.aws import StandIn, stand_in
from keyturn.testing.contract import PLACE, STORE_ID, new_entry, parts, publish, withdraw
from keyturn.wiring import SystemClock
from support.aws import agent, connect, labels, versions

MERGED = Target(to="aws", path=PLACE.path, merge=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    """Give one stand-in; each test has a prefix of its own."""
    with stand_in(tmp_path_factory.mktemp("aws"), rate=1000) as one:
        yield one


@dataclass
class Scene:
    """A connection, the same agents' way in, and what the server holds of one entry."""

    server: StandIn
    destination: AwsDestination
    raw: Any
    folder: Path

    @property
    def name(self) -> str:
        """The name of the entry."""
        return self.destination.place(PLACE)

    def labels(self) -> dict[str, str]:
        """Return which version has which label."""
        return labels(self.server, self.name)

    def secret(self) -> Any:
        """Return moto's own record of the entry."""
        return self.server.secret(self.name)

    def stage_raw(self, text: str = '{"theirs": 1}', label: str = PENDING) -> str:
        """Stage as somebody else."""
        token = str(uuid.uuid4())
        self.raw.put_secret_value(
            SecretId=self.name, ClientRequestToken=token, SecretString=text, VersionStages=[label]
        )
        return token

    def again(self, **more: Any) -> AwsDestination:
        """Make another connection to the same place."""
        keys = self.server.keys_file(self.folder)
        return connect(self.server, keys, prefix=self.destination.options.prefix, **more)


@pytest.fixture
def scene(server: StandIn, tmp_path: Path) -> Iterator[Scene]:
    """Give a place for one entry."""
    destination = connect(server, server.keys_file(tmp_path))
    yield Scene(server, destination, agent(server), tmp_path)
    destination.close()


def rotate(destination: AwsDestination, seed: int, target: Target = PLACE) -> None:
    """Ask what the saga asks in one rotation; then retire the version before."""
    before = destination.observe(target)
    destination.stage(target, new_entry(seed), expected=before.token)
    read = destination.read(target, new_entry(seed).version_id)
    assert read.secret == new_entry(seed).secret
    destination.activate(target, new_entry(seed), expected=before.token)
    assert destination.observe(target).version_id == new_entry(seed).version_id
    if before.version_id:
        destination.retire(
            target, version_id=before.version_id, locator=before.locator, how="disable"
        )


# --- what it costs --------------------------------------------------------------------------


def test_a_rotation_is_four_writes_and_one_version(scene: Scene) -> None:
    """Put, move, unlabel; and one to retire the version before. The first is one write in all."""
    scene.server.front.seen.clear()
    rotate(scene.destination, 1)
    assert scene.server.writes() == ["CreateSecret"]
    for seed in (2, 3, 4):
        scene.server.front.seen.clear()
        rotate(scene.destination, seed)
        moves = ["UpdateSecretVersionStage"] * 3
        assert scene.server.writes() == ["PutSecretValue", *moves]
        assert versions(scene.server, scene.name) == seed
        assert scene.labels().keys() == {CURRENT}


def test_a_version_is_named_by_what_it_holds(scene: Scene) -> None:
    """The token is a function of the entry alone, the same for every connection, other for others."""
    publish(scene.destination, PLACE, new_entry(1))
    first = scene.labels()[CURRENT]
    twin = connect(scene.server, scene.server.keys_file(scene.folder))
    publish(twin, PLACE, new_entry(1))

    assert labels(scene.server, twin.place(PLACE))[CURRENT] == first
    assert uuid.UUID(first)
    assert publish(twin, PLACE, new_entry(2)) != first
    twin.close()


def test_the_marks_and_tags_of_an_entry(server: StandIn, tmp_path: Path) -> None:
    """Owner, fence and the configured tags stand on what we make; on what we adopt the first two."""
    destination = connect(server, server.keys_file(tmp_path), tags={"team": "agents"})
    publish(destination, PLACE, new_entry(1))
    raw, adopted = agent(server), Target(to="aws", path="adopted", adopt=True)
    raw.create_secret(Name=destination.place(adopted), SecretString='{"secret": "theirs so far"}')
    publish(destination, adopted, new_entry(1))

    found = [
        {tag["Key"]: tag["Value"] for tag in server.secret(destination.place(one)).tags}  # type: ignore[union-attr]
        for one in (PLACE, adopted)
    ]
    ours = {OWNER: STORE_ID, FENCE: "7"}
    assert found == [{"team": "agents", **ours}, ours]
    destination.close()


def test_connections_to_one_region_share_one_budget(server: StandIn, tmp_path: Path) -> None:
    """Two connections with 2 writes a second have 2 between them; another account has its own."""
    keys = server.keys_file(tmp_path)
    clock = SystemClock()
    one, two = (connect(server, keys, write_limit="2/s", account=server.account) for _ in range(2))
    for each in (one, two):
        each._budget._clock = clock
    other = connect(server, keys, write_limit="2/s", account="999999999999")
    same = line_of(one.clock, one.options.endpoint, one.options.region, server.account)

    assert one._budget._line is not two._budget._line  # clocks of their own: never compared
    twins = [AwsDestination(one.options, name=n, store_id="s", clock=clock) for n in "ab"]
    assert twins[0]._budget._line is twins[1]._budget._line
    assert twins[0]._budget._line is not other._budget._line
    assert same is one._budget._line
    twins[0]._budget.take(timedelta(seconds=1))
    twins[1]._budget.take(timedelta(seconds=1))
    twins[0]._budget.take(timedelta(seconds=1.1))
    with pytest.raises(Throttled):
        twins[1]._budget.take(timedelta(seconds=1))
    for each in (one, two, other, *twins):
        each.close()


@pytest.mark.parametrize(("kept", "seconds"), [(100, 864), (99, 873), (24, 3600)])
def test_the_quota_of_versions_is_a_floor_for_the_interval(
    server: StandIn, tmp_path: Path, kept: int, seconds: int
) -> None:
    """As many rotations in a day as the service keeps versions, and no more."""
    destination = connect(server, server.keys_file(tmp_path), versions_per_day=kept)
    assert destination.traits.minimum_interval == timedelta(seconds=seconds)
    destination.close()


# --- labels ---------------------------------------------------------------------------------


def test_somebody_elses_pending_is_never_stolen(scene: Scene) -> None:
    """It is seen as foreign, staging and activating are Conflicts, and the label stays where it is."""
    publish(scene.destination, PLACE, new_entry(1))
    theirs = scene.stage_raw()
    found = scene.destination.observe(PLACE)

    assert found.staged == ""
    for write in (scene.destination.stage, scene.destination.activate):
        with pytest.raises(Conflict):
            write(PLACE, new_entry(2), expected=found.token)
    with pytest.raises(Conflict, match=PENDING):
        scene.destination.probe_entry(PLACE, retire="disable")
    assert scene.labels()[PENDING] == theirs
    assert scene.labels()[CURRENT] == found.token


@pytest.mark.parametrize(
    "text",
    ["[1]", '{"version": 7}', json.dumps(parts(Keys(), new_entry(2))), '{"id": "x", "id": "y"}'],
)
def test_what_only_looks_like_ours_is_foreign(scene: Scene, text: str) -> None:
    """Our very own bytes under a token that we did not derive were staged by somebody else."""
    publish(scene.destination, PLACE, new_entry(1))
    scene.stage_raw(text)

    assert scene.destination.observe(PLACE).staged == ""


def test_our_own_leftover_is_replaced(scene: Scene) -> None:
    """A version that was staged and given up loses its label to the next one."""
    publish(scene.destination, PLACE, new_entry(1))
    token = scene.destination.observe(PLACE).token
    scene.destination.stage(PLACE, new_entry(2), expected=token)
    left = scene.destination.observe(PLACE)
    later = scene.again()

    assert left.staged == new_entry(2).version_id
    assert later.observe(PLACE).staged == new_entry(2).version_id
    rotate(later, 3)
    assert scene.labels().keys() == {CURRENT}
    later.close()


def test_an_abandoned_copy_loses_its_label(scene: Scene) -> None:
    """Retiring a staged version takes AWSPENDING from it and touches nothing that is shown."""
    publish(scene.destination, PLACE, new_entry(1))
    token = scene.destination.observe(PLACE).token
    locator = scene.destination.stage(PLACE, new_entry(2), expected=token)
    scene.destination.retire(
        PLACE, version_id=new_entry(2).version_id, locator=locator, how="disable"
    )

    assert scene.labels() == {CURRENT: token}
    assert scene.destination.observe(PLACE).staged is None


def test_a_label_of_others_stays_and_is_reported(scene: Scene) -> None:
    """Ours go from the old version, theirs stays: it is said that the version can still be read."""
    publish(scene.destination, PLACE, new_entry(1))
    old = scene.labels()[CURRENT]
    scene.raw.update_secret_version_stage(
        SecretId=scene.name, VersionStage="audit", MoveToVersionId=old
    )
    publish(scene.destination, PLACE, new_entry(2))

    with pytest.raises(Rejected, match="label of somebody else"):
        scene.destination.retire(
            PLACE, version_id=new_entry(1).version_id, locator=old, how="disable"
        )
    assert {label for label, held in scene.labels().items() if held == old} == {"audit"}


def test_pending_on_what_is_shown_hinders_nothing(scene: Scene) -> None:
    """So AWS's rotations end, and so does a move of ours whose clean-up got lost."""
    publish(scene.destination, PLACE, new_entry(1))
    shown = scene.labels()[CURRENT]
    scene.raw.update_secret_version_stage(
        SecretId=scene.name, VersionStage=PENDING, MoveToVersionId=shown
    )

    assert scene.destination.observe(PLACE).staged is None
    rotate(scene.destination, 2)
    assert scene.labels().keys() == {CURRENT}


def test_a_first_value_is_shown_at_once(scene: Scene) -> None:
    """Staging into nothing, and into a secret without a value, is an activation (rule 8)."""
    for made in (False, True):
        target = Target(to="aws", path=f"first-{made}")
        if made:
            scene.raw.create_secret(Name=scene.destination.place(target))
        found = scene.destination.observe(target)
        assert (found.exists, found.token) == (False, "")
        scene.destination.stage(target, new_entry(1), expected="")
        assert scene.destination.observe(target).version_id == new_entry(1).version_id
        assert scene.destination.activate(target, new_entry(1), expected="")


def test_an_edit_of_others_between_stage_and_activate_is_kept(scene: Scene) -> None:
    """The copy is made again with what they wrote, under another token, never for ever a conflict."""
    scene.raw.create_secret(Name=scene.name, SecretString='{"port": 1}')
    token = scene.destination.observe(MERGED).token
    first = scene.destination.stage(MERGED, new_entry(1), expected=token)
    scene.raw.put_secret_value(SecretId=scene.name, SecretString='{"port": 2}')
    with pytest.raises(Conflict):
        scene.destination.activate(MERGED, new_entry(1), expected=token)
    found = scene.destination.observe(MERGED)

    assert found.staged == new_entry(1).version_id
    second = scene.destination.activate(MERGED, new_entry(1), expected=found.token)
    assert second != first
    shown = json.loads(scene.raw.get_secret_value(SecretId=scene.name)["SecretString"])
    assert shown == {"port": 2, **parts(MERGED.keys, new_entry(1))}
    assert scene.labels().keys() == {CURRENT, PREVIOUS}


def test_withdrawing_leaves_no_label_but_the_services_own(scene: Scene) -> None:
    """What is withdrawn is AWSPREVIOUS until it is retired; foreign AWSPENDING is not touched."""
    publish(scene.destination, PLACE, new_entry(1))
    theirs = scene.stage_raw()
    token = scene.destination.observe(PLACE).token
    withdraw(scene.destination, PLACE, new_entry(1), token)

    held = scene.labels()
    assert held.keys() == {CURRENT, PREVIOUS, PENDING}
    assert (held[PREVIOUS], held[PENDING]) == (token, theirs)
    scene.destination.retire(
        PLACE, version_id=new_entry(1).version_id, locator=token, how="destroy"
    )
    assert scene.labels().keys() == {CURRENT, PENDING}


def test_the_value_of_others_is_not_guessable_from_a_name() -> None:
    """VersionIds are public: they are keyed with the entry's secret, or with the one that goes."""
    values = {"pin": 1234, **parts(PLACE.keys, new_entry(1))}
    other = {**values, PLACE.keys.secret: new_entry(2).secret.reveal()}
    version_id = new_entry(1).version_id
    assert name_of(PLACE, values, version_id) == name_of(PLACE, dict(values), version_id)
    assert name_of(PLACE, values, version_id) != name_of(PLACE, other, version_id)
    left = {"pin": 1234}
    assert name_of(PLACE, left, version_id, key="a") != name_of(PLACE, left, version_id, key="b")


def test_the_shown_copy_keeps_every_label(scene: Scene) -> None:
    """Retiring what is shown is refused before anything is taken from it."""
    publish(scene.destination, PLACE, new_entry(1))
    shown = scene.labels()[CURRENT]
    scene.raw.update_secret_version_stage(
        SecretId=scene.name, VersionStage=PENDING, MoveToVersionId=shown
    )
    with pytest.raises(Rejected, match="is the one shown"):
        scene.destination.retire(
            PLACE, version_id=new_entry(1).version_id, locator=shown, how="destroy"
        )
    assert scene.labels() == {CURRENT: shown, PENDING: shown}


# --- where nothing is written ---------------------------------------------------------------


def test_where_aws_rotates_we_do_not(scene: Scene) -> None:
    """Two rotators of one secret would cut each other's agents off: refused, with the line to type."""
    publish(scene.destination, PLACE, new_entry(1))
    token = scene.destination.observe(PLACE).token
    secret = scene.secret()
    secret.rotation_requested = secret.rotation_enabled = True

    for attempt in (
        lambda: scene.destination.stage(PLACE, new_entry(2), expected=token),
        lambda: scene.destination.activate(PLACE, new_entry(2), expected=token),
        lambda: withdraw(scene.destination, PLACE, new_entry(1), token),
        lambda: scene.destination.probe_entry(PLACE, retire="disable"),
    ):
        with pytest.raises(Rejected, match="own rotation") as refused:
            attempt()
        assert "cancel-rotate-secret" in refused.value.hint
    assert scene.destination.observe(PLACE).token == token


def test_what_is_marked_for_deletion_is_named(scene: Scene) -> None:
    """No read and no write is made, and the hint says how it comes back."""
    publish(scene.destination, PLACE, new_entry(1))
    token = scene.destination.observe(PLACE).token
    scene.raw.delete_secret(SecretId=scene.name, RecoveryWindowInDays=7)

    for attempt in (
        lambda: scene.destination.observe(PLACE),
        lambda: scene.destination.stage(PLACE, new_entry(2), expected=token),
        lambda: scene.destination.activate(PLACE, new_entry(2), expected=token),
    ):
        with pytest.raises(Rejected, match="marked for deletion") as refused:
            attempt()
        assert "restore-secret" in refused.value.hint
    scene.raw.restore_secret(SecretId=scene.name)
    rotate(scene.destination, 2)


def test_until_every_replica_has_it_nothing_is_let_go(scene: Scene) -> None:
    """A read with a replica that is behind is not fresh, and retires nothing; a failed one is named."""
    publish(scene.destination, PLACE, new_entry(1))
    old = scene.labels()[CURRENT]
    scene.raw.replicate_secret_to_regions(
        SecretId=scene.name, AddReplicaRegions=[{"Region": "eu-central-1"}]
    )
    publish(scene.destination, PLACE, new_entry(2))
    replica = scene.secret().replicas[0]
    assert scene.destination.observe(PLACE).fresh
    for status in ("InProgress", "Failed"):
        replica.config["Status"] = status
        assert scene.destination.observe(PLACE).fresh is False
        with pytest.raises(DestinationUnavailable, match="eu-central-1"):
            scene.destination.retire(
                PLACE, version_id=new_entry(1).version_id, locator=old, how="disable"
            )
    with pytest.raises(Rejected, match="eu-central-1 has failed"):
        scene.destination.probe_entry(PLACE, retire="disable")
    assert scene.labels()[PREVIOUS] == old

    elsewhere = scene.again(region="eu-central-1")
    with pytest.raises(Rejected, match="primary region"):
        elsewhere.probe_entry(PLACE, retire="disable")
    elsewhere.close()


def test_a_read_lets_nothing_go_before_writes_are_seen_everywhere(scene: Scene) -> None:
    """The service promises no order: within `staleness` only an answer with our own write is fresh."""
    publish(scene.destination, PLACE, new_entry(1))
    slow = scene.again(staleness="1h")

    assert slow.observe(PLACE).fresh is False  # a process before this one may have written
    publish(slow, PLACE, new_entry(2))
    assert slow.observe(PLACE).fresh
    scene.raw.put_secret_value(SecretId=scene.name, SecretString='{"by": "hand"}')
    assert slow.observe(PLACE).fresh is False
    assert scene.destination.observe(PLACE).fresh
    slow.close()


def test_an_entry_of_another_account_is_refused(scene: Scene) -> None:
    """A login of the wrong account would publish where no agent reads."""
    publish(scene.destination, PLACE, new_entry(1))
    other = scene.again(account="999999999999")

    for attempt in (other.probe, lambda: other.observe(PLACE)):
        with pytest.raises(Rejected, match="account"):
            attempt()
    other.close()


def test_what_is_too_large_or_too_long_is_refused_before_it_is_sent(scene: Scene) -> None:
    """65,536 bytes and 512 characters are the service's own bounds."""
    text = json.dumps({"theirs": "x" * 65_400})
    scene.raw.create_secret(Name=scene.name, SecretString=text)
    token = scene.destination.observe(MERGED).token
    scene.server.front.seen.clear()

    with pytest.raises(Rejected, match="65536"):
        scene.destination.stage(MERGED, new_entry(1), expected=token)
    assert scene.server.writes() == []
    with pytest.raises(ConfigError, match="512"):
        scene.destination.identity(Target(to="aws", path="x" * 600))


def test_names_that_end_like_an_arn_are_entries_of_their_own(scene: Scene) -> None:
    """`x-secret` ends in a hyphen and six characters and is not `x`."""
    for seed, path in enumerate(("x", "x-secret", "x-secret-secret"), start=1):
        target = Target(to="aws", path=path)
        publish(scene.destination, target, new_entry(seed))
        assert scene.destination.observe(target).version_id == new_entry(seed).version_id


def test_identities_know_no_spellings(server: StandIn, tmp_path: Path) -> None:
    """However the service is reached it is one store, and an account of a role is known offline."""
    keys = server.keys_file(tmp_path)
    role = "arn:aws:iam::111122223333:role/keyturn"
    ways: list[dict[str, Any]] = [
        {"endpoint": None, "role_arn": role},
        {"endpoint": "https://secretsmanager.eu-west-1.amazonaws.com", "account": "111122223333"},
        {
            "endpoint": "https://vpce-1.secretsmanager.eu-west-1.vpce.amazonaws.com/",
            "role_arn": role,
        },
    ]
    made = [connect(server, keys, prefix="p", **way) for way in ways]
    assert {one.identity(PLACE) for one in made} == {f"aws:/eu-west-1/111122223333/p/{PLACE.path}"}
    assert made[0].identity(PLACE) != made[0].identity(Target(to="aws", path=PLACE.path.upper()))
    for one in made:
        one.close()
