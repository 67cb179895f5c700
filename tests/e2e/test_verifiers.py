"""Verifiers that remember beside a daemon on PostgreSQL: what an operator sees, and what is waited for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.leased import Process
from support.postgres import Cluster, postgres  # noqa: F401 - a fixture
from support.running import Keyturn

LEASE, POLL = 2.0, 0.2


class Site:
    """A daemon, and a verifier on what might be another host."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.url = cluster.new_database()
        self.keyturn = Keyturn(folder, agents=3)
        self.keyturn.content["store"] = {"url": self.url, "state_dir": str(folder / "state")}
        self.keyturn.write()
        self.keyturn.start()
        self.keyturn.wait_first()
        (folder / "elsewhere").mkdir()
        self.verifier = Process(self.url, folder / "elsewhere", lease=LEASE, poll=POLL)
        self.verifier.ready()

    def say(self, agent: str) -> str:
        """Return what the verifier says to what an agent would read now."""
        held = self.keyturn.held(agent)
        return self.verifier.ask(held["id"], held["secret"])

    def ask(self, *args: str) -> Any:
        """Run a command that must succeed."""
        code, said = self.keyturn.ask(*args)
        assert code == 0, said
        return said

    def close(self) -> None:
        """End all."""
        self.verifier.end()
        self.keyturn.stop()


@pytest.fixture
def site(postgres: Cluster, tmp_path: Path) -> Iterator[Site]:  # noqa: F811
    """Give one with everything home."""
    one = Site(postgres, tmp_path)
    yield one
    one.close()


def test_a_fleet_is_shown_waited_for_and_taken_away(site: Site) -> None:
    """One life: it is listed; rotations and cuts wait for it, daemon up and down; stopped, and gone."""
    (row,) = site.ask("verifiers")["verifiers"]
    assert (row["host"], row["stale"], row["lease_seconds"]) == ("tests", False, LEASE)
    site.keyturn.wait_for(lambda: "fresh" in site.keyturn.run("verifiers").stdout)

    site.ask("rotate", "agent-0", "--wait")
    assert site.say("agent-0") == "yes"  # at once: it knew before the file was written

    cut = site.ask("suspend", "agent-0")
    assert cut["verifiers"] == {"acknowledged": 1, "live": 1, "silent": []}
    assert site.say("agent-0") == "no"
    assert site.say("agent-1") == "yes"
    assert site.ask("revoke", "agent-1")["verifiers"]["acknowledged"] == 1
    site.keyturn.stop()
    assert site.ask("verifiers")["verifiers"][0]["id"] == row["id"]
    assert site.say("agent-2") == "yes"
    held = site.keyturn.held("agent-2")
    site.verifier.stop()
    site.verifier.tell(held["id"], held["secret"])
    done = site.keyturn.run("revoke", "agent-2")
    assert done.returncode == 0
    assert "(0/1 verifiers)" in done.stdout
    assert f"verifier tests/{row['id'][:8]} did not answer" in done.stdout
    site.verifier.go_on()
    assert site.verifier.said() in ("no", "unavailable")
