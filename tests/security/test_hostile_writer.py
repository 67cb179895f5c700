"""Somebody who may write where an agent reads: what they write is never accepted, never spread.

The writer strikes at random points of the saga, before and after every effect, on files, on a real
OpenBao and on the strict stand-in for AWS. Each story has a seed, which a failure names.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from keyturn import rotation
from keyturn.core import lifecycle
from keyturn.core.model import Agent, Credential, Target
from keyturn.core.secret import RANDOM_LENGTH, _base62, _checksum
from keyturn.destinations import azure, azure_login, vault
from keyturn.destinations.file import FileDestination, FileOptions
from keyturn.destinations.vault import OWNER
from keyturn.destinations.vault_auth import AuthOptions
from keyturn.errors import KeyturnError, StaleRevision
from keyturn.testing import openbao
from keyturn.testing.aws import StandIn, stand_in
from keyturn.testing.azure import Cloud
from keyturn.wiring import SystemClock
from support import azure as azures
from support import bench as benches
from support.aws import agent
from support.aws import connect as connect_aws
from support.bench import Bench, Crash
from support.real import Real
from support.vault import connect, root_of

SWEEP = timedelta(minutes=5)
STORIES = 500  # at all of them together; ten times as many in the full version
SHARE = {"file": 55, "vault": 25, "aws": 10, "azure": 10}  # per cent: each by what a request costs
BOT, NEIGHBOUR = Target(to="d0", path="bot"), Target(to="d0", path="neighbour")
Values = Mapping[str, Any]


class FilePlace:
    """Files, and an editor who may write in their folder."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "agents"

    def connect(self, store_id: str) -> FileDestination:
        options = FileOptions.model_validate({"root": str(self.root)})
        return FileDestination(options, name="d0", store_id=store_id, clock=SystemClock())

    def _path(self, target: Target) -> Path:
        return self.root / f"{target.path}.json"

    def read(self, target: Target) -> Any:
        """Read as an agent does; None where there is nothing of use."""
        try:
            return json.loads(self._path(target).read_bytes())
        except (OSError, ValueError):
            return None

    def write(self, target: Target, values: Values) -> None:
        path = self._path(target)
        path.with_suffix(".new").write_text(json.dumps(values))
        path.with_suffix(".new").rename(path)

    def delete(self, target: Target) -> None:
        self._path(target).unlink(missing_ok=True)

    def odd(self, target: Target, draw: random.Random) -> None:
        """Write what is no entry: half a file, no object, far too much, a folder of that name."""
        what = draw.choice([b'{"id": "bot", "sec', b"[1]", b"\xff" * 64, b"{" + b" " * 2_000_000])
        path = self._path(target)
        path.with_suffix(".new").write_bytes(what)
        path.with_suffix(".new").rename(path)

    def clear(self, target: Target) -> None:
        """What the person does who was called: take all of it away."""
        self.delete(target)


class VaultPlace:
    """A mount of a real OpenBao, and somebody whose policy lets them write there."""

    def __init__(self, server: openbao.Server) -> None:
        self._server, self._ask = server, root_of(server)
        self._prefix = ""

    def connect(self, store_id: str) -> Any:
        auth = AuthOptions(method="token", token_file=str(self._server.token_file))
        made = connect(self._server.address, auth, store_id=store_id)
        self._prefix = made.options.prefix
        return made

    def _path(self, kind: str, target: Target) -> str:
        return f"kv/{kind}/{self._prefix}/{target.path}"

    def read(self, target: Target) -> Any:
        """Read as an agent does."""
        with contextlib.suppress(OSError):  # 404
            return self._ask("GET", self._path("data", target))["data"]["data"]
        return None

    def write(self, target: Target, values: Values) -> None:
        self._ask("POST", self._path("data", target), {"data": dict(values)})

    def delete(self, target: Target) -> None:
        self._ask("DELETE", self._path("data", target))

    def odd(self, target: Target, draw: random.Random) -> None:
        """Write values of odd kinds, far too much, or other marks of the owner."""
        kind = draw.randrange(4)
        if kind == 0:
            self.write(target, {"id": 1, "secret": ["x"], "version": None})
        elif kind == 1:
            self.write(target, {"secret": "x" * 1_200_000})
        elif kind == 2:
            marks = {"custom_metadata": {OWNER: draw.choice(["else", "k" * 64])}}
            self._ask("POST", self._path("metadata", target), marks)
        else:
            self._ask("DELETE", self._path("metadata", target))

    def clear(self, target: Target) -> None:
        """What the person does who was called: take all of it away."""
        self._ask("DELETE", self._path("metadata", target))


class AwsPlace:
    """A region of AWS by the strict stand-in, and somebody whose policy lets them write there."""

    def __init__(self, server: StandIn, folder: Path) -> None:
        self._server, self._raw = server, agent(server)
        self._keys = server.keys_file(folder)
        self._prefix = ""

    def connect(self, store_id: str) -> Any:
        made = connect_aws(self._server, self._keys, store_id=store_id)
        self._prefix = made.options.prefix
        return made

    def _name(self, target: Target) -> str:
        return f"{self._prefix}/{target.path}"

    def read(self, target: Target) -> Any:
        """Read as an agent does."""
        with contextlib.suppress(ClientError, ValueError, KeyError):
            return json.loads(
                self._raw.get_secret_value(SecretId=self._name(target))["SecretString"]
            )
        return None

    def write(self, target: Target, values: Values) -> None:
        self._put(target, SecretString=json.dumps(values))

    def _put(self, target: Target, **value: Any) -> None:
        name = self._name(target)
        with contextlib.suppress(ClientError):
            self._raw.restore_secret(SecretId=name)
        try:
            self._raw.put_secret_value(SecretId=name, **value)
        except self._raw.exceptions.ResourceNotFoundException:
            self._raw.create_secret(Name=name, **value)

    def delete(self, target: Target) -> None:
        with contextlib.suppress(ClientError):
            self._raw.delete_secret(SecretId=self._name(target), ForceDeleteWithoutRecovery=True)

    def odd(self, target: Target, draw: random.Random) -> None:
        """Write values of odd kinds, other marks, stage, move labels, mark it for deletion."""
        name, kind = self._name(target), draw.randrange(7)
        if kind == 0:
            self.write(target, {"id": 1, "secret": ["x"], "version": None})
        elif kind == 1:
            self._put(target, SecretBinary=b"\xff" * 60_000)
        elif kind == 2:
            self._put(target, SecretString='{"id": "bot", "id": "neighbour"}')
        with contextlib.suppress(ClientError):
            if kind == 3:
                tag = {"Key": OWNER, "Value": draw.choice(["else", "k" * 64])}
                self._raw.tag_resource(SecretId=name, Tags=[tag])
            elif kind == 4:
                self._raw.put_secret_value(
                    SecretId=name, SecretString="{}", VersionStages=["AWSPENDING"]
                )
            elif kind == 5:
                held = self._raw.describe_secret(SecretId=name)["VersionIdsToStages"]
                labels = {label: version for version, named in held.items() for label in named}
                other = draw.choice(sorted(held))
                self._raw.update_secret_version_stage(
                    SecretId=name, VersionStage="AWSCURRENT", MoveToVersionId=other,
                    RemoveFromVersionId=labels["AWSCURRENT"],
                )  # fmt: skip
            elif kind == 6:
                self._raw.delete_secret(SecretId=name, RecoveryWindowInDays=7)

    def clear(self, target: Target) -> None:
        """What the person does who was called: take all of it away."""
        self.delete(target)


class AzurePlace:
    """A vault of the stand-in with the printed rights, and somebody who may write there."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud, self._vault = cloud, cloud.vault
        self._names: Any = None

    def connect(self, store_id: str) -> Any:
        identity = self._cloud.machine()
        auth = azure_login.AuthOptions(client_id=identity.client_id)
        made = azures.connect(self._cloud, auth, store_id=store_id)
        entries = [(target, "disable") for target in (BOT, NEIGHBOUR)]
        found = json.loads(type(made).least_policy(made.options, entries))
        for scope in found["scopes"]:
            actions = set(found["role"]["DataActions"])
            self._vault.grant(identity, actions, secret=scope.rpartition("/")[2])
        self._names = made.place
        return made

    def read(self, target: Target) -> Any:
        """Read as an agent does; None where there is nothing of use."""
        try:
            return azures.shown(self._vault, self._names(target))
        except (ValueError, RecursionError):
            return None

    def write(self, target: Target, values: Values) -> None:
        """Add a version: without tags, or with those that the latest one has."""
        latest = self._vault.latest(self._names(target))
        tags = latest.tags if latest is not None and len(str(values)) % 2 else {}
        self._vault.add(self._names(target), json.dumps(values), tags)

    def delete(self, target: Target) -> None:
        self._vault.delete(self._names(target))

    def odd(self, target: Target, draw: random.Random) -> None:
        """Write what is no entry, disable what is shown, change tags, take everything away."""
        name, kind = self._names(target), draw.randrange(5)
        latest = self._vault.latest(name)
        if kind == 0:
            self._vault.add(name, draw.choice(['{"id": "bot", "sec', "[1]", "", "[" * 9000]))
        elif kind == 1:
            self.write(target, {"id": 1, "secret": ["x"], "version": None})
        elif kind == 2:
            self.clear(target)
        elif latest is not None and kind == 3:
            latest.enabled = False
        elif latest is not None:
            for copy in self._vault.secrets[name.lower()].versions:
                tag = draw.choice([azure.OWNER, azure.VERSION, azure.FENCE])
                copy.tags[tag] = draw.choice(["else", "k" * 64, *latest.tags.values()])

    def clear(self, target: Target) -> None:
        """What the person does who was called: take all of it away."""
        self._vault.purge(self._names(target))


class Story:
    """Two agents beside each other; somebody writes into the entry of one of them."""

    def __init__(self, place: Any, seed: str) -> None:
        self.draw = random.Random(seed)
        self.place = place
        self.bench = bench = Bench("file", seed=seed)
        bench.watched = False
        bench.look = lambda: None  # type: ignore[method-assign]
        destination = place.connect(bench.store_id)
        bench.played = {"d0": Real(bench, destination, place)}  # type: ignore[dict-item]
        self.forged: list[str] = []
        self.minted: dict[str, str] = {}  # texts of ours that agents read, by version id
        self.replays: list[Values] = []
        self.strikes = self.moves = 0
        self.neighbour = self._add_neighbour()
        if self.draw.random() < 0.8:
            bench.go(until=lambda: bench.case.current is not None)
            self._learn()
        bench.on_point = self._at_point

    def _add_neighbour(self) -> dict[str, str]:
        bench, now = self.bench, self.bench.clock.now()
        agent = Agent(uid="other", name="neighbour", login="neighbour", targets=(NEIGHBOUR,))
        credential = Credential(uid="others", agent_uid="other", wake_at=now)
        identities = bench.identities(agent.targets)
        bench.store.add_agent(agent, credential, identities=identities, audit=[])
        rotation.run(bench.world, "others", holder="first")
        values: dict[str, str] = self.place.read(NEIGHBOUR)
        assert bench.accepts("neighbour", values["secret"])
        return values

    # --- the writer ---------------------------------------------------------------------------

    def _at_point(self, _name: str) -> None:
        self._learn()
        self.check()
        if self.moves and self.draw.random() < 0.2:
            self.moves -= 1
            self.strike()

    def _learn(self) -> None:
        """Read what the agent reads, as the writer can, too."""
        values = self.place.read(BOT)
        text = values.get("secret") if isinstance(values, dict) else None
        if isinstance(text, str) and text not in (*self.forged, self.neighbour["secret"]):
            self.replays.append(values)
            self.minted[str(values.get("version"))] = text

    def forge(self, version_id: str) -> str:
        """Make a secret of the right form for a version that they have not."""
        body = f"kt_{version_id}_{_base62(self.draw.randbytes, RANDOM_LENGTH)}"
        self.forged.append(body + _checksum(body.encode()))
        return self.forged[-1]

    def strike(self) -> None:
        """Write something into the entry."""
        self.strikes += 1
        version_id = self.draw.choice([v.id for v in self.bench.versions()] or ["0" * 14])
        unknown = _base62(self.draw.randbytes, 14)
        read = self.place.read(BOT)
        shown = read if isinstance(read, dict) else {}
        move = self.draw.randrange(8)
        if move == 0:
            entry = {"id": "bot", "secret": self.forge(unknown), "version": unknown}
        elif move == 1:
            entry = {"id": "bot", "secret": self.forge(version_id), "version": version_id}
        elif move == 2:
            entry = {**shown, "secret": self.forge(version_id)}
        elif move == 3:
            entry = dict(self.neighbour)
        elif move == 4:
            entry = {**shown, "id": "neighbour"}
        elif move == 5 and self.replays:
            entry = dict(self.draw.choice(self.replays))
        elif move == 6:
            return self.place.delete(BOT)
        else:
            return self.place.odd(BOT, self.draw)
        return self.place.write(BOT, entry)

    # --- what must hold -------------------------------------------------------------------------

    def check(self) -> None:
        """Nothing of theirs is accepted, nothing of ours refused, the neighbour as it was."""
        accepts = self.bench.accepts
        for login in ("bot", "neighbour"):
            assert not any(accepts(login, text) for text in self.forged[-2:])
        assert not accepts("bot", self.neighbour["secret"])
        now = self.bench.clock.now()
        alive = [v for v in self.bench.case.accepted if v.deadline is None or now < v.deadline]
        good = [v.id for v in alive if v.id in self.minted]
        assert all(accepts("bot", self.minted[one]) for one in good), good

    def told(self) -> bool:
        """Whether what agents read is good, or somebody is told that it is not."""
        case = self.bench.case
        values = self.place.read(BOT)
        good = (
            isinstance(values, dict)
            and case.current is not None
            and values.get("version") == case.current.id
            and values.get("id") == "bot"
            and isinstance(values.get("secret"), str)
            and self.bench.accepts("bot", values["secret"])
        )
        stalled = case.rotation is not None and bool(case.rotation.error_code)
        return good or stalled or bool(case.credential.drift)

    def live(self) -> None:
        """Rotate, crash, wait; the writer strikes in the middle of it."""
        bench = self.bench
        for _ in range(self.draw.randint(1, 4)):
            self.moves = self.draw.randint(1, 3)
            with contextlib.suppress(KeyturnError):
                bench.ask()
            if self.draw.random() < 0.25:
                end = len(bench.points) + self.draw.randrange(30)
                bench.crash_at = lambda at, _name, end=end: at >= end  # type: ignore[misc]
            self.turn()
            bench.crash_at = lambda _at, _name: False
            if self.moves and self.draw.random() < 0.5:
                self.strike()
            bench.clock.advance(timedelta(seconds=self.draw.choice([1, 60, 3600, 4 * 3600])))

    def turn(self) -> None:
        """Run once, as the daemon does when something is due."""
        self.bench.steps.in_run = 0
        self.bench.crashing_run()

    def be_told(self) -> None:
        """Within five minutes after the last strike the daemon has told."""
        bench, until = self.bench, self.bench.clock.now() + SWEEP
        self.moves = 0
        while not self.told() and bench.clock.now() <= until:
            wake = bench.store.next_wake()
            assert wake is not None
            bench.clock.advance(max(wake - bench.clock.now(), timedelta(seconds=1)))
            self.turn()
        assert self.told(), (bench.case, self.place.read(BOT))

    def end(self) -> None:
        """A person takes it away and says go on: everything is good again."""
        bench = self.bench
        self.place.clear(BOT)
        with contextlib.suppress(KeyturnError, StaleRevision):
            bench.amend(lifecycle.retry)
        with contextlib.suppress(KeyturnError):
            bench.ask()
        bench.go(until=lambda: bench.at_home() and bench.case.rotation is None)
        self._learn()
        for login in ("bot", "neighbour"):
            assert not any(bench.accepts(login, text) for text in self.forged)
        assert self.place.read(NEIGHBOUR) == self.neighbour
        assert bench.accepts("neighbour", self.neighbour["secret"])


def tell(place: Any, seed: str) -> int:
    """Play one story; returns how often the writer struck."""
    story = Story(place, seed)
    try:
        story.live()
        story.be_told()
        story.end()
    except (AssertionError, Crash) as error:
        raise AssertionError(f"story {seed}: {story.bench.steps.done[-30:]}") from error
    finally:
        story.bench.close()
    return story.strikes


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openbao.Server]:
    """Give one OpenBao to all stories."""
    with openbao.dev_server(tmp_path_factory.mktemp("openbao")) as one:
        yield one


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    """Give one stand-in for AWS to all stories."""
    with stand_in(tmp_path_factory.mktemp("aws"), rate=100_000) as one:
        yield one


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """Give one Azure to all stories."""
    with azures.reachable_cloud(tmp_path_factory.mktemp("azure")) as one:
        yield one


@pytest.mark.parametrize(
    "stories",
    [STORIES, pytest.param(10 * STORIES, marks=[pytest.mark.full, pytest.mark.timeout(2400)])],
    ids=["tenth", "whole"],
)
@pytest.mark.parametrize("kind", ["file", "vault", "aws", "azure"])
def test_what_a_hostile_writer_writes_is_never_accepted_or_spread(
    kind: str,
    stories: int,
    server: openbao.Server,
    aws: StandIn,
    cloud: Cloud,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No foreign value accepted, no other agent's entry touched, told within five minutes."""
    monkeypatch.setattr(benches, "SWEEP", SWEEP)
    stories = stories * SHARE[kind] // 100
    for adapter in (vault, azure):
        monkeypatch.setattr(adapter, "STALE_PAUSE", 0.0)  # here nobody is behind
    strikes = 0
    for number in range(stories):
        folder = benches.quick_folder()
        places: dict[str, Callable[[], Any]] = {
            "file": lambda: FilePlace(folder),  # noqa: B023 - called in this round
            "vault": lambda: VaultPlace(server),
            "aws": lambda: AwsPlace(aws, folder),  # noqa: B023
            "azure": lambda: AzurePlace(cloud),
        }
        place = places[kind]()
        strikes += tell(place, f"hostile {kind} {number}")
    print(f"\nhostile writer, {kind}: {stories} stories, {strikes} strikes, 0 accepted")
    assert strikes > stories
