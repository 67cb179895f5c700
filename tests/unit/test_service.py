"""The daemon's loops: a destination that hangs, a store that is away, and what goes on meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from keyturn.daemon import service
from keyturn.daemon.service import Service
from keyturn.errors import StoreUnavailable
from support.running import Keyturn, file_at
from support.stores import add, target

PARALLEL = 2


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Service]:
    """Give a daemon that was not started, with two connections."""
    keyturn = Keyturn(tmp_path, agents=0)
    keyturn.content["connections"]["dead"] = file_at(tmp_path / "dead") | {"parallel": PARALLEL}
    keyturn.write()
    one = Service(service.load(keyturn.config), socket=tmp_path / "socket")
    one._connect()
    yield one
    one.stop()
    one._pool.shutdown()
    one.parts.close()


def test_a_hanging_destination_leaves_the_others_to_their_agents(
    daemon: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many agents wait for it, and for how long: one tick starts everybody else."""
    store, go, guard = daemon.parts.store, threading.Event(), threading.Lock()
    at = store.now() - timedelta(hours=1)
    monkeypatch.setattr(service, "WORKERS_AT_MOST", 8)
    monkeypatch.setattr(service, "LOOK", 32)
    for number in range(50):
        name = f"a{number}"
        add(store, name, targets=[target(name, "dead")], wake_at=at + timedelta(seconds=number))
    add(store, "both", targets=[target("both"), target("both", "dead")], wake_at=at)
    add(store, "healthy", wake_at=store.now() - timedelta(seconds=1))
    ran, looks = [], []
    due = store.due

    def run(_world: Any, uid: str, *, holder: str) -> None:
        del holder
        with guard:
            ran.append(uid)
        if uid != "cred-healthy":
            go.wait(30)

    monkeypatch.setattr(service.rotation, "run", run)
    monkeypatch.setattr(store, "due", lambda **more: looks.append(1) or due(**more))  # type: ignore[func-returns-value]
    try:
        daemon._tick()
        for _ in range(200):
            if "cred-healthy" in ran:
                break
            threading.Event().wait(0.02)
        assert "cred-healthy" in ran
        assert len(ran) == PARALLEL + 1
        assert len(looks) <= 3
        looks.clear()
        daemon._tick()  # all is full: one look, and nothing of the queue is read
        assert len(looks) <= 2
        assert len(ran) <= PARALLEL + 2  # the healthy one is still due: nobody claimed it
    finally:
        daemon.stop()
        go.set()


class Away:
    """A membership whose store is away for a while."""

    def __init__(self, *, tries: int) -> None:
        self.left = tries

    def try_lead(self, *, ttl: timedelta) -> bool:
        del ttl
        self.left -= 1
        if self.left >= 0:
            raise StoreUnavailable
        return True


def test_a_standby_outlives_a_store_that_is_away(
    daemon: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the database restarts it is there to take over; a daemon that may not wait says so."""
    monkeypatch.setattr(service, "LEAD_AWAY", 0.01)

    assert daemon._lead(Away(tries=3), standby=True)  # type: ignore[arg-type]
    with pytest.raises(StoreUnavailable):
        daemon._lead(Away(tries=1), standby=False)  # type: ignore[arg-type]
