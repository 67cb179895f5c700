"""What probes and scrapes see of a daemon, from its first moment to its last."""

from __future__ import annotations

import http.client
import json
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from keyturn.cli.client import AdminClient
from keyturn.daemon.wire import waiting_path
from keyturn.errors import KeyturnError
from support.running import Keyturn

SLOW = (b"", b"GET /metrics HT", b"GET /metrics HTTP/1.1\r\nHost: a\r\nX: ")


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def keyturn(tmp_path: Path) -> Iterator[Keyturn]:
    """Give an installation that listens, not started."""
    keyturn = Keyturn(tmp_path, agents=1)
    keyturn.content["listen"] = {"address": f"127.0.0.1:{free_port()}"}
    keyturn.write()
    yield keyturn
    keyturn.stop()


def get(keyturn: Keyturn, path: str) -> tuple[int, bytes]:
    """Ask the listener; (0, b"") where nobody answers."""
    client = http.client.HTTPConnection(keyturn.content["listen"]["address"], timeout=10)
    try:
        client.request("GET", path)
        answer = client.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        client.close()


def reasons(keyturn: Keyturn) -> list[str]:
    """Return why it is not ready, as /readyz says it; [] if it is."""
    status, body = get(keyturn, "/readyz")
    found = [
        one["reason"] for one in json.loads(body or b'{"reasons": [{"reason": "down"}]}')["reasons"]
    ]
    assert status == (503 if found else 200) or found == ["down"]
    return found


def test_a_daemon_tells_how_it_is(keyturn: Keyturn) -> None:
    """Ready; live and not ready while the store is locked; ready again; then gone."""
    assert keyturn.run("health").returncode == 69
    keyturn.start()
    keyturn.wait_first()
    keyturn.wait_for(lambda: reasons(keyturn) == [])
    assert keyturn.run("health", "--ready").stdout == "ready\n"
    assert keyturn.ask("health")[1] == {"live": True, "ready": True, "leads": True, "reasons": []}

    lock = sqlite3.connect(keyturn.store, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    try:
        keyturn.wait_for(lambda: reasons(keyturn) == ["store-down"])
        assert get(keyturn, "/healthz") == (200, b'{"live": true}\n')
        assert b"\nkeyturn_store_up 0.0\n" in get(keyturn, "/metrics")[1]
        told = keyturn.run("health", "--ready")
        assert (told.returncode, told.stdout.split(":")[0]) == (69, "store-down")
        assert keyturn.run("health").returncode == 0
    finally:
        lock.execute("ROLLBACK")
        lock.close()
    keyturn.wait_for(lambda: reasons(keyturn) == [])

    keyturn.content["listen"]["address"] = "127.0.0.1:1"
    keyturn.write()
    assert keyturn.ask("reload")[1]["notes"] == ["listen: restart the daemon for this"]


def test_a_standby_lives_and_is_not_ready(keyturn: Keyturn, tmp_path: Path) -> None:
    """It says so at its own port and beside the admin socket, and follows when the lead is its own."""
    keyturn.start()
    keyturn.wait_first()
    (tmp_path / "second").mkdir()
    second = Keyturn(tmp_path / "second", agents=1)
    second.content = keyturn.content | {
        "listen": {"address": f"127.0.0.1:{free_port()}"},
        "admin": {"socket": str(second.folder / "run" / "admin.sock")},
    }
    second.write()
    with second.log.open("ab") as log:
        second.process = subprocess.Popen(
            [*second.python, "-m", "keyturn", "run", "-c", str(second.config)],
            stdout=log, stderr=log, env=second.environ,
        )  # fmt: skip
    try:
        second.wait_for(lambda: reasons(second) == ["standby"])
        assert get(second, "/healthz")[0] == 200
        page = get(second, "/metrics")[1]
        assert b"\nkeyturn_leads 0.0\n" in page
        assert b"\nkeyturn_store_up 1.0\n" in page
        assert b"\nkeyturn_config_last_reload_successful " not in page
        told = second.run("health", "--ready")
        assert (told.returncode, told.stdout.split(":")[0]) == (69, "standby")
        assert second.run("health").stdout == "live\n"

        keyturn.stop()
        second.wait_for(lambda: reasons(second) == [])
        assert second.run("health", "--ready").stdout == "ready\n"
        with pytest.raises(KeyturnError):
            AdminClient(waiting_path(second.folder / "run" / "admin.sock")).call("health", {})
    finally:
        second.stop()


def test_a_taken_port_ends_the_start(keyturn: Keyturn) -> None:
    """Exit 78 with the address and the command that shows who has it; nothing was rotated."""
    host, port = keyturn.content["listen"]["address"].split(":")
    with socket.socket() as other:
        other.bind((host, int(port)))
        other.listen()
        done = keyturn.run("run")
    assert done.returncode == 78
    assert f"{host}:{port} is taken by another process" in done.stderr
    assert "ss -ltnp" in done.stderr
    assert not (keyturn.folder / "agents").exists()


@pytest.mark.full
def test_five_hundred_slow_clients_disturb_nobody(keyturn: Keyturn) -> None:
    """Silent and half-sent ones, renewed all the time: scrapes answer, rotations end, and they go."""
    keyturn.content["policies"]["default"] |= {"every": "2s", "grace": "3s"}
    keyturn.content["policies"]["default"] |= {"consumer_cache": "0s"}
    keyturn.write()
    keyturn.start()
    keyturn.wait_first()
    scrapes: list[float] = []
    address = keyturn.content["listen"]["address"].split(":")
    alone = longest_life(address, 100)
    before, ended = promoted(keyturn), 0
    until = time.monotonic() + 40
    with ExitStack() as stack:
        crowd: set[socket.socket] = set()
        while time.monotonic() < until:
            while len(crowd) < 500:
                one = socket.create_connection((address[0], int(address[1])), timeout=10)
                one.sendall(SLOW[len(crowd) % 3])
                one.setblocking(False)
                crowd.add(stack.enter_context(one))
            for one in [one for one in crowd if has_ended(one)]:
                ended += 1
                one.close()
                crowd.remove(one)
            began = time.monotonic()
            assert get(keyturn, "/metrics")[0] == 200
            scrapes.append(time.monotonic() - began)
            assert get(keyturn, "/healthz")[0] == 200
    scrapes.sort()
    done = promoted(keyturn) - before
    print(
        f"\n100 slow clients alone were ended after {alone:.1f} s at most; 500 at once, renewed"
        f" {ended} times in 40 s:"
        f" {len(scrapes)} scrapes, p50 {scrapes[len(scrapes) // 2] * 1e3:.0f} ms,"
        f" longest {scrapes[-1] * 1e3:.0f} ms; {done:.0f} rotations meanwhile"
    )
    assert alone <= 15
    assert done >= 5


def longest_life(address: list[str], count: int) -> float:
    """Open as many slow connections as there are places for; return when the last one was ended."""
    crowd = [
        socket.create_connection((address[0], int(address[1])), timeout=30) for _ in range(count)
    ]
    began = time.monotonic()
    for number, one in enumerate(crowd):
        one.sendall(SLOW[number % 3])
    for one in crowd:
        with one:
            while one.recv(4096):
                pass
    return time.monotonic() - began


def has_ended(one: socket.socket) -> bool:
    """Whether the other side ended it."""
    try:
        if one.recv(4096) == b"":
            return True
    except BlockingIOError:
        return False
    except OSError:
        return True
    return False


def promoted(keyturn: Keyturn) -> float:
    """Return how many rotations were promoted, by a scrape."""
    text = get(keyturn, "/metrics")[1].decode()
    found = [
        line
        for line in text.splitlines()
        if line.startswith('keyturn_rotations_total{outcome="promoted"')
    ]
    return float(found[0].split()[-1])


@pytest.mark.full
def test_a_real_prometheus_raises_an_alert(keyturn: Keyturn, tmp_path: Path) -> None:
    """It scrapes the daemon by the shipped rules, with short waits, and says what a person is told."""
    rules = (Path(__file__).parents[2] / "monitoring" / "prometheus-rules.yaml").read_text()
    rules = rules.replace("for: 15m", "for: 1s")
    (tmp_path / "rules.yaml").write_text(rules)
    target = keyturn.content["listen"]["address"]
    (tmp_path / "prometheus.yaml").write_text(
        "global: {scrape_interval: 500ms, scrape_timeout: 400ms, evaluation_interval: 500ms}\n"
        "rule_files: [rules.yaml]\n"
        "scrape_configs:\n"
        f'  - {{job_name: keyturn, static_configs: [{{targets: ["{target}"]}}]}}\n'
    )
    keyturn.start()
    keyturn.wait_first()
    port = free_port()
    log = (tmp_path / "prometheus.log").open("wb")
    prometheus = subprocess.Popen(
        ["prometheus", "--config.file=prometheus.yaml", "--storage.tsdb.path=data",
         f"--web.listen-address=127.0.0.1:{port}"],
        cwd=tmp_path, stdout=log, stderr=log,
    )  # fmt: skip
    try:
        keyturn.wait_for(lambda: query(port, "keyturn_ready") == ["1"], seconds=60)
        assert query(port, "up") == ["1"]
        assert firing(port) == []
        path = keyturn.folder / "agents" / "agent-0.json"
        path.write_text('{"id": "x", "secret": "y", "version": "z"}')
        began = time.monotonic()
        assert keyturn.ask("rotate", "agent-0", "--wait")[0] == 4
        keyturn.wait_for(lambda: "KeyturnRotationStalled" in firing(port), seconds=60)
        print(f"\nstalled to firing in {time.monotonic() - began:.1f} s; alerts: {firing(port)}")
        assert keyturn.ask("rotation", "abandon", "agent-0")[0] == 0
        keyturn.wait_for(lambda: "KeyturnRotationStalled" not in firing(port), seconds=60)
    finally:
        prometheus.terminate()
        prometheus.wait(30)
        log.close()


def api(port: int, path: str) -> Any:
    """Ask Prometheus's API."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        client.request("GET", f"/api/v1/{path}")
        return json.loads(client.getresponse().read())["data"]
    except (OSError, ValueError):  # not up yet: it says so in words
        return {"result": [], "alerts": []}
    finally:
        client.close()


def query(port: int, expression: str) -> list[str]:
    """Return the values of an expression."""
    return [one["value"][1] for one in api(port, f"query?query={expression}")["result"]]


def firing(port: int) -> list[str]:
    """Return the names of the alerts that fire, and check that each says what to do."""
    found = [one for one in api(port, "alerts")["alerts"] if one["state"] == "firing"]
    for one in found:
        assert "{{" not in one["annotations"]["description"]
        assert one["annotations"]["runbook_url"].endswith(f"{one['labels']['alertname']}.md")
    return [one["labels"]["alertname"] for one in found]
