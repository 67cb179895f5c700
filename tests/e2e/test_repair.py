"""Somebody else writes where Keyturn publishes: a real OpenBao and files, and a daemon that lives."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hvac
import pytest

from keyturn.testing import openbao
from support.running import Keyturn, accepts

BOT = "agent-0"
EVERY = 0.2  # seconds between two writes of the other one
Put = Callable[[Mapping[str, Any]], None]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openbao.Server]:
    """Run one OpenBao."""
    with openbao.dev_server(tmp_path_factory.mktemp("bao")) as one:
        yield one


class Shelf:
    """An entry in OpenBao as agents and other tools see it, and how often it was written."""

    def __init__(self, server: openbao.Server, path: str) -> None:
        self._path = path
        self._kv = hvac.Client(url=server.address, token=server.token).secrets.kv.v2

    def read(self) -> dict[str, Any]:
        """Read as an agent does."""
        found = self._kv.read_secret_version(
            self._path, mount_point="kv", raise_on_deleted_version=True
        )
        values: dict[str, Any] = found["data"]["data"]
        return values

    def write(self, values: Mapping[str, Any]) -> None:
        """Write as a tool does that asks nobody."""
        self._kv.create_or_update_secret(self._path, dict(values), mount_point="kv")

    def number(self) -> int:
        """Return how often it was written, by whomever."""
        found = self._kv.read_secret_metadata(self._path, mount_point="kv")
        return int(found["data"]["current_version"])


def installation(
    folder: Path, server: openbao.Server, prefix: str, *to: str, **target: Any
) -> Keyturn:
    """Return a Keyturn whose one agent reads from these connections."""
    one = Keyturn(folder, agents=1, policy={"grace": "30m", "consumer_cache": "1m"})
    auth = {"method": "token", "token_file": str(server.token_file)}
    one.content["connections"]["bao"] = {
        "type": "vault",
        "address": server.address,
        "auth": auth,
        "prefix": prefix,
        "call_deadline": "1900ms",
    }
    one.content["agents"][BOT]["destinations"] = [{"to": c, "path": BOT, **target} for c in to]
    one.write()
    return one


def sweep(keyturn: Keyturn) -> None:
    """Let a sweep come at once, and wait until it is over."""
    with sqlite3.connect(keyturn.store, timeout=10) as store:
        store.execute("UPDATE credentials SET sweep_at = 1, wake_at = 1")
    store.close()

    def over() -> bool:
        with sqlite3.connect(keyturn.store, timeout=10) as store:
            row = store.execute("SELECT sweep_at, holder FROM credentials").fetchone()
        store.close()
        return bool(row[0] != 1 and row[1] is None)

    keyturn.wait_for(over)


@contextmanager
def controller(put: Put, values: Mapping[str, Any]) -> Iterator[list[int]]:
    """Write the same value again and again, as a sync tool with a cache does; gives the count."""
    done, stop = [0], threading.Event()

    def write() -> None:
        while not stop.wait(EVERY):
            put(values)
            done[0] += 1

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()


def destination(keyturn: Keyturn, name: str) -> dict[str, Any]:
    """Return what status says of a destination."""
    found: list[dict[str, Any]] = keyturn.ask("status", BOT)[1]["destinations"]
    return next(one for one in found if one["name"] == name)


def test_a_tool_that_writes_an_old_value_back_is_not_fought(
    tmp_path: Path, server: openbao.Server
) -> None:
    """Three writes and a word about whom to look for; agents are accepted all the time."""
    shelf = Shelf(server, f"fight/{BOT}")
    keyturn = installation(tmp_path, server, "fight", "bao", "files")
    verifier = None
    try:
        keyturn.start()
        keyturn.wait_first()
        verifier = keyturn.verifier()
        old = shelf.read()
        assert keyturn.ask("rotate", BOT, "--wait")[0] == 0
        current = keyturn.held(BOT)
        began = shelf.number()
        with controller(shelf.write, old) as theirs:

            def one_round() -> bool:
                keyturn.wait_for(lambda: shelf.read()["version"] == old["version"])
                sweep(keyturn)
                assert accepts(verifier, shelf.read()) is True
                assert accepts(verifier, keyturn.held(BOT)) is True
                return bool(destination(keyturn, "bao")["error_code"] == "repair-fight")

            # on a slow machine the other one is often quicker, and then nothing of ours is written
            keyturn.wait_for(one_round, seconds=120)
            keyturn.stop()  # what was counted survives the process
            keyturn.start()
            assert all(one_round() for _ in range(3))
        assert shelf.number() - began - theirs[0] <= 3
        assert keyturn.held(BOT) == current

        found = destination(keyturn, "bao")
        assert (found["error_code"], found["in_sync"]) == ("repair-fight", False)
        assert found["repairs"]["next_try_at"]
        keyturn.wait_for(lambda: "keyturn_repair_fights 1.0" in keyturn.run("metrics").stdout)
        assert '"repair.fight"' in keyturn.log.read_text()
        hint = keyturn.ask("status", BOT)[1]["hint"]
        assert "another sync tool" in hint
        assert "keyturn rotation retry agent-0" in hint

        assert keyturn.ask("rotation", "retry", BOT)[0] == 0
        keyturn.wait_for(lambda: shelf.read() == current)
        keyturn.wait_for(lambda: destination(keyturn, "bao")["in_sync"])
        assert keyturn.ask("audit", "--verify")[1]["chain"]["ok"]
    finally:
        if verifier is not None:
            verifier.close()
        keyturn.stop()


def test_a_file_that_somebody_restores_is_mended_from_the_other_place(
    tmp_path: Path, server: openbao.Server
) -> None:
    """A backup that is played back, or a file that is deleted, is mended without a new version."""
    keyturn = installation(tmp_path, server, "restored", "files", "bao")
    path = tmp_path / "agents" / f"{BOT}.json"
    try:
        keyturn.start()
        keyturn.wait_first()
        old = path.read_text()
        assert keyturn.ask("rotate", BOT, "--wait")[0] == 0
        current = path.read_text()

        path.write_text(old)
        sweep(keyturn)
        assert json.loads(path.read_text()) == json.loads(current)
        path.unlink()
        sweep(keyturn)
        assert json.loads(path.read_text()) == json.loads(current)
        noted = [one["action"] for one in keyturn.ask("audit", BOT)[1]["entries"]]
        assert noted.count("entry.repaired") == 2
        assert 'repairs_total{outcome="copied"} 2.0' in keyturn.run("metrics").stdout
    finally:
        keyturn.stop()


def test_two_keyturns_on_one_entry_do_not_fight(tmp_path: Path, server: openbao.Server) -> None:
    """The second one writes nothing, says whose the entry is, and the first one notices nothing."""
    shelf = Shelf(server, f"shared/{BOT}")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first = installation(tmp_path / "one", server, "shared", "bao")
    second = installation(tmp_path / "two", server, "shared", "bao", adopt=True)
    try:
        first.start()
        first.wait_first()
        began, held = shelf.number(), shelf.read()
        second.start()

        def stalled() -> bool:
            return bool(destination(second, "bao")["error_code"] == "other-owner")

        second.wait_for(stalled)
        for _ in range(3):
            sweep(first)
            assert second.ask("rotation", "retry", BOT)[0] == 0
            second.wait_for(stalled)
        assert (shelf.number(), shelf.read()) == (began, held)
        assert destination(first, "bao")["in_sync"]
        assert "another Keyturn" in second.ask("status", BOT)[1]["hint"]
    finally:
        first.stop()
        second.stop()
