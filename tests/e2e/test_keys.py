"""`hmac-sha256` as an operator lives with it: turned on, a key missing, put back, restored, turned off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from keyturn.cli.client import AdminClient
from keyturn.core.secret import Secret
from keyturn.daemon.checks import check
from keyturn.daemon.keeping import backup
from keyturn.errors import KeyturnError, Refused
from keyturn.testing.canary import leaks
from keyturn.verifier.decision import Verifier
from keyturn.verifier.keyring import KeyRing, make_key
from keyturn.wiring import SystemClock
from support.running import Keyturn, accepts
from support.workloads import Workload


class Keyed(Keyturn):
    """An installation with a folder of keys, and everything that was printed or answered."""

    printed = ""

    def run(self, *args: str, stdin: str | None = None) -> Any:
        """Run a command, and keep what it says."""
        done = super().run(*args, stdin=stdin)
        self.printed += done.stdout + done.stderr
        return done

    def tell(self, command: str, **args: Any) -> Any:
        """Ask the daemon without starting a process for it."""
        said = AdminClient(self.folder / "run" / "admin.sock").call(command, args)
        self.printed += repr(said)
        return said

    def key(self, key_id: str) -> Path:
        """Return where a key is."""
        return self.folder / "keys" / key_id

    def configure(self, scheme: str, *keys: str, schemes: list[str] | None = None) -> None:
        """Write the configuration with these keys; the last one is for new hashes."""
        verifier: dict[str, Any] = {
            "keys": {key_id: {"file": str(self.key(key_id))} for key_id in keys},
            "key": keys[-1],
        }
        self.content["verifier"] = verifier | ({"schemes": schemes} if schemes else {})
        self.content["policies"]["default"]["scheme"] = scheme
        self.write()

    def takes_over(self) -> bool:
        """Reload; tell whether the files' agents are as they were."""
        return bool(self.tell("reload")["unchanged"] == 2)

    def rotate(self) -> None:
        """Rotate all, and wait for that."""
        done = self.tell("rotate", agents=list(self.content["agents"]), wait=True)["results"]
        assert {one["outcome"] for one in done} == {"promoted"}

    def end_previous(self, workloads: list[Workload]) -> None:
        """Revoke what was replaced, as soon as no agent holds it any more."""
        held = {one.agent: self.held(one.agent)["version"] for one in workloads}
        self.wait_for(lambda: all(one.versions[-1:] == [held[one.agent]] for one in workloads))
        for name in held:
            for version in self.tell("status", agent=name)[0]["previous"]:
                self.tell("revoke", version=version["version"])

    def keyed_verifier(self, *keys: str) -> Verifier:
        """Open a verifier with these keys."""
        ring = KeyRing.read({key_id: self.key(key_id) for key_id in keys})
        url = f"sqlite:///{self.store}"
        return Verifier.open(url, state_dir=self.store.parent, clock=SystemClock(), ring=ring)

    def checks(self) -> dict[str, str]:
        """Return what `check --probe` says of keys, by its name."""
        found = check(self.config, probe=True)["checks"]
        self.printed += repr(found)
        return {one["name"]: one["detail"] for one in found if "key" in one["name"]}

    def assert_no_key_got_out(self) -> None:
        """Look for the keys in all that was printed and written but their own files."""
        texts = {"printed": self.printed.encode()}
        for path in self.folder.rglob("*"):
            if path.is_file() and path.parent != self.folder / "keys":
                with suppress(FileNotFoundError):
                    texts[str(path)] = path.read_bytes()
        assert len(texts) > 8
        for path in (self.folder / "keys").iterdir():
            key = path.read_text().strip()
            for name, data in texts.items():
                assert leaks(data, Secret(key)) == [], name
                assert bytes.fromhex(key) not in data, name


@pytest.fixture
def keyturn(tmp_path: Path) -> Iterator[Keyed]:
    """Give an installation with two agents and two keys, not started."""
    one = Keyed(tmp_path, policy={"grace": "30m", "consumer_cache": "1s"})
    one.key("k1").parent.mkdir()
    for number, key_id in enumerate(("k1", "k2")):
        make_key(one.key(key_id), bytes(range(100 * number, 100 * number + 32)))
    yield one
    one.stop()
    one.assert_no_key_got_out()


def test_the_scheme_is_turned_on_and_off_while_agents_authenticate(keyturn: Keyed) -> None:
    """argon2id, hmac-sha256, a new key, and back: nobody is refused, and no key is ever missing."""
    keyturn.start()
    keyturn.wait_first()
    verifier = keyturn.keyed_verifier("k1", "k2")  # every verifier first
    workloads = [
        Workload(name, keyturn.held, verifier, cache=0.5, pause=0.02, seed=number)
        for number, name in enumerate(keyturn.content["agents"])
    ]
    for one in workloads:
        one.start()

    keyturn.configure("hmac-sha256", "k1")
    assert keyturn.takes_over()
    keyturn.rotate()
    keyturn.configure("hmac-sha256", "k1", schemes=["hmac-sha256"])
    with pytest.raises(KeyturnError, match=r"leaves argon2id out \(2 accepted versions\)"):
        keyturn.tell("reload")  # the previous ones
    assert keyturn.checks() == {"key k1": "can be used; 2 accepted versions"} | {
        "keys": "verifier.schemes leaves argon2id out (2 accepted versions)"
    }
    keyturn.end_previous(workloads)
    assert keyturn.takes_over()

    keyturn.configure("hmac-sha256", "k1", "k2", schemes=["hmac-sha256"])
    assert keyturn.takes_over()
    keyturn.rotate()
    keyturn.configure("hmac-sha256", "k2", schemes=["hmac-sha256"])
    with pytest.raises(KeyturnError, match="key k1 is missing: verifier.keys does not name it"):
        keyturn.tell("reload.rehearsed")
    keyturn.end_previous(workloads)
    assert keyturn.takes_over()
    assert keyturn.checks() == {"key k2": "can be used; 2 accepted versions"}

    keyturn.configure("argon2id", "k2")
    assert keyturn.takes_over()
    keyturn.rotate()
    keyturn.wait_for(lambda: all(len(one.versions) == 4 for one in workloads))
    for one in workloads:
        one.end()
        one.join()
    assert verifier.lacking() == []
    verifier.close()
    print({one.agent: dict(one.counts) for one in workloads})
    for one in workloads:
        assert one.counts["refused"] == 0, one.refusals
        assert one.counts["accepted"] > 9 * one.counts["unavailable"]  # a store that was locked
    assert keyturn.tell("health")["reasons"] == []


def test_a_missing_key_is_a_503_with_its_name(keyturn: Keyed) -> None:
    """Daemon, check and restore name it; a check of a secret answers 503, never no; put back, all is well."""
    keyturn.configure("hmac-sha256", "k1")
    keyturn.start()
    keyturn.wait_first()
    with pytest.raises(Refused, match="verifier key k1"):
        backup(keyturn.config, keyturn.key("backup.db"))
    place = keyturn.folder / "backup.db"
    backup(keyturn.config, place)
    assert b"$hmac-sha256$v=1$k=k1" in place.read_bytes()
    keyturn.stop()
    away = keyturn.key("k1").rename(keyturn.key("away"))
    told = keyturn.run("store", "restore", str(place), "--yes")
    assert told.returncode == 0
    assert "at 503 on this host until the key is here: verifier key k1" in told.stdout

    keyturn.start()
    (reason,) = keyturn.tell("health")["reasons"]
    assert reason["reason"] == "key-missing"
    assert "verifier key k1 is missing" in reason["text"]
    assert "(2 accepted versions)" in reason["text"]
    assert "keys.missing" in keyturn.log.read_text()
    assert "k1 is missing" in keyturn.checks()["keys"]
    held, without = keyturn.held("agent-0"), keyturn.keyed_verifier()
    assert accepts(without, held) is None
    assert accepts(without, keyturn.held("agent-1") | {"id": "agent-0"}) is False
    without.close()
    keyturn.tell("rotate", agents=["agent-0"])
    keyturn.wait_for(
        lambda: (
            (keyturn.tell("status", agent="agent-0")[0]["rotation"] or {}).get("error_code")
            == "key-missing"
        )
    )

    away.rename(keyturn.key("k1"))
    assert keyturn.takes_over()
    assert keyturn.tell("health")["reasons"] == []
    verifier = keyturn.keyed_verifier("k1")
    assert accepts(verifier, held) is True
    keyturn.tell("rotation.retry", agents=["agent-0"])
    keyturn.wait_for(lambda: keyturn.held("agent-0")["version"] != held["version"])
    assert accepts(verifier, keyturn.held("agent-0")) is True
    verifier.close()
