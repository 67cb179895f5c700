"""The daemon's own logins, as an operator has them: replaced, shown, given back at the end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import urllib.error
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keyturn.cli.client import AdminClient
from keyturn.core.model import Target
from keyturn.testing import openbao
from support.own_logins import Role
from support.running import Keyturn
from support.vault import new_prefix, root_of
from support.workloads import Workload

SEED = int(os.environ.get("KEYTURN_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)
AGENTS = 3
RETRY = {"first": "100ms", "max": "1s", "settle_after": "4s"}
QUICK = {"every": "2s", "grace": "1s"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openbao.Server]:
    """Give one server for all tests; each has a role of its own."""
    with openbao.dev_server(tmp_path_factory.mktemp("openbao")) as one:
        yield one


class Scene(Keyturn):
    """A Keyturn whose agents read at OpenBao, where it logs in by AppRole with the printed policy."""

    def __init__(
        self,
        server: openbao.Server,
        folder: Path,
        *,
        agents: int = 1,
        rotate: Any = None,
        **policy: Any,
    ) -> None:
        targets = [Target(to="bao", path=f"agent-{n}") for n in range(agents)]
        self.root = root_of(server)
        self.role = Role(
            self.root,
            folder / "login",
            new_prefix(),
            targets,
            address=server.address,
            rotate=rotate,
        )
        super().__init__(folder, agents=agents, policy={"retry": RETRY, **policy})
        self.content["connections"] = {
            "bao": {"type": "vault", "call_deadline": "3s", **self.role.connection}
        }
        for n in range(agents):
            self.content["agents"][f"agent-{n}"]["destinations"][0]["to"] = "bao"
        self.write()

    def change(self, **auth: Any) -> None:
        """Write the configuration with another login."""
        self.content["connections"]["bao"]["auth"] = {**self.role.auth, **auth}
        self.write()

    def read(self, agent: str) -> Any:
        """Read what an agent reads."""
        try:
            return self.root("GET", f"kv/data/{self.role.name}/{agent}")["data"]["data"]
        except urllib.error.HTTPError:
            return None

    def start(self, *module: str) -> None:
        """Start the daemon, and wait until it leads: `status` is answered before by the store."""
        super().start(*module)
        self.wait_for(lambda: self.ask("health", "--ready")[0] == 0, seconds=60)

    def call(self, command: str, **args: Any) -> Any:
        """Ask the daemon as the command line does, without a process for it."""
        return AdminClient(self.folder / "run" / "admin.sock").call(command, args)

    def wait_first(self) -> None:
        """Wait until every agent has a current version."""
        self.wait_for(lambda: all(row["current"] for row in self.call("status")))

    def own(self) -> dict[str, Any]:
        """Return the row of the connection."""
        rows = self.call("status.own")
        return next((row for row in rows if row["connection"] == "bao"), {})

    def killed(self, trap: int) -> None:
        """Let a daemon run into SIGKILL at one of the next effects on its own login."""
        command = [
            sys.executable,
            "-m",
            "support.killed_daemon",
            str(self.config),
            str(trap),
            "own",
        ]
        with self.log.open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environ)
        try:
            assert process.wait(60) == -signal.SIGKILL, self.log.read_text()[-3000:]
        finally:
            process.kill()
            process.wait()

    def tokens(self) -> int:
        """Count the tokens that came of the role's logins and live."""
        accessors = self.root("LIST", "auth/token/accessors")["data"]["keys"]
        count = 0
        for accessor in accessors:
            try:
                found = self.root("POST", "auth/token/lookup-accessor", {"accessor": accessor})
            except urllib.error.HTTPError:
                continue
            count += (found["data"].get("meta") or {}).get("role_name") == self.role.name
        return count


@pytest.mark.parametrize(
    ("kills", "rotations"),
    [(2, 2), pytest.param(40, 20, marks=[pytest.mark.full, pytest.mark.timeout(1800)])],
    ids=["few", "many"],
)
def test_killed_at_effects_it_can_always_log_in(
    server: openbao.Server, tmp_path: Path, kills: int, rotations: int
) -> None:
    """Each kill leaves a good login and at most one secret id more; agents rotate on, none refused."""
    scene = Scene(
        server, tmp_path, agents=AGENTS, rotate=QUICK, every="3s", grace="6s", jitter="30%"
    )
    with scene:
        scene.wait_first()
    verifier = scene.verifier()
    agents = [
        Workload(f"agent-{n}", scene.read, verifier, cache=2.0, pause=0.05, seed=n)
        for n in range(AGENTS)
    ]
    for one in agents:
        one.start()
    try:
        done, most = kill_and_rotate(scene, kills, rotations)
    finally:
        for one in agents:
            one.end()
        for one in agents:
            one.join(10)
        verifier.close()
    totals: Counter[str] = sum((one.counts for one in agents), Counter())
    versions = sum(len(set(one.versions)) for one in agents)
    print(
        f"\nseed {SEED}: {kills} kills, {done} rotations of the secret id, at most {most}"
        f" of them at once; agents: {versions} versions, {dict(totals)}"
    )
    assert totals["refused"] == 0
    assert totals["accepted"] > 100
    assert versions > AGENTS


def kill_and_rotate(scene: Scene, kills: int, rotations: int) -> tuple[int, int]:
    """Return how many rotations there were, and the most secret ids that a kill left."""
    draw, most = random.Random(SEED), 1
    for _ in range(kills):
        scene.killed(draw.randrange(1, 14))
        assert scene.role.logs_in()
        # current, previous, one on its way, and that of this crash
        most = max(most, len(scene.role.accessors()))
        assert most <= 4
    with scene:
        wanted = max(rotations, rotated(scene) + 1)
        scene.wait_for(lambda: rotated(scene) >= wanted, seconds=120)
        done = rotated(scene)
        scene.change(rotate={"every": "1h", "grace": "1s"})
        scene.call("reload")
        scene.wait_for(lambda: quiet(scene), seconds=30)
        assert scene.role.logs_in()
    return done, most


def quiet(scene: Scene) -> bool:
    """Tell whether one secret id is left, at the server as in the journal, and nothing is wrong."""
    row = scene.own()
    states = [one["state"] for one in row.get("versions", ()) if one["state"] != "minting"]
    return states == ["current"] and not row["error"] and len(scene.role.accessors()) == 1


def rotated(scene: Scene) -> int:
    """Count the promotions in the audit."""
    found = scene.call("audit", limit=10000)
    return sum(1 for one in found["entries"] if one["action"] == "own-login.promoted")


def test_what_one_sees_of_it(server: openbao.Server, tmp_path: Path) -> None:
    """Status and log say when it is replaced and what failed; a reload that changes it logs out."""
    with Scene(server, tmp_path, rotate={"every": "30d", "grace": "1d"}) as scene:
        scene.wait_first()
        scene.wait_for(lambda: bool(scene.own().get("note")))
        row = scene.own()
        assert row["method"] == "approle"
        assert row["expires_at"] is None
        assert row["note"] == "it does not end"
        assert row["next_rotation_at"] is not None
        assert [one["state"] for one in row["versions"]] == ["current"]
        assert 'expiry_timestamp_seconds{connection="bao"}' not in scene.call("metrics")["text"]
        assert scene.tokens() == 1
        (accessor,) = scene.role.accessors()
        path = f"auth/approle/role/{scene.role.name}/secret-id-accessor/destroy"
        scene.root("POST", path, {"secret_id_accessor": accessor})
        scene.change(rotate={"every": "1s", "grace": "1s"})
        scene.call("reload")
        scene.wait_for(lambda: (scene.own().get("error") or {}).get("code") == "denied")
        assert scene.own()["ends_soon"] is False
        assert scene.tokens() == 0  # that of the connection as it was before
    said = scene.log.read_text()
    assert "own-login.failing" in said
    # With the daemon down the store says what it knows.
    code, rows = scene.ask("status", "--own")
    assert (code, rows[0]["error"]["code"]) == (0, "denied")


def test_an_end_within_the_week_is_said(server: openbao.Server, tmp_path: Path) -> None:
    """A secret id that nobody replaces is a warning and a metric; at SIGTERM the token is revoked."""
    scene = Scene(server, tmp_path)
    path = f"auth/approle/role/{scene.role.name}"
    scene.root("POST", path, {"secret_id_ttl": "72h"})
    scene.role.put_new()
    with scene:
        scene.wait_first()
        scene.wait_for(lambda: scene.own().get("ends_soon") is True)
        line = 'keyturn_own_credential_expiry_timestamp_seconds{connection="bao"}'
        assert line in scene.call("metrics")["text"]
        assert scene.tokens() >= 1
    assert scene.tokens() == 0
    assert scene.log.read_text().count("own-login.ends") == 1
    code, found = scene.ask("check", "--probe")
    rows = {row["name"]: row for row in found["checks"]}
    assert code == 1
    assert not rows["login bao"]["ok"]
    assert rows["entries bao"]["ok"]
