"""The daemon tells a receiver, whatever happens to either of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from support.receiver import Receiver, key_file, receiving
from support.running import Keyturn

EVERYTHING = ["promoted", "stalled", "revoked", "incident"]


def hooked(folder: Path, receiver: Receiver, *, agents: int = 2) -> Keyturn:
    """Return an installation with one webhook, not started yet."""
    kt = Keyturn(folder, agents=agents)
    hook = {"name": "pager", "webhook": receiver.url, "key_file": str(key_file(folder))}
    kt.content["notify"] = [hook | {"on": EVERYTHING}]
    kt.write()
    return kt


def audited(kt: Keyturn) -> Counter[tuple[str, str]]:
    """Count what the audit has of promotions and revocations."""
    entries = kt.ask("audit", "--limit", "5000")[1]["entries"]
    kinds = {"version.promoted": "promoted", "revoke": "revoked"}
    return Counter((kinds[e["action"]], e["agent"]) for e in entries if e["action"] in kinds)


def told(receiver: Receiver) -> Counter[tuple[str, str]]:
    """Count what the receiver has of them, each id once."""
    once = {one["id"]: one for one in receiver.got if one["type"] in ("promoted", "revoked")}
    return Counter((one["type"], one["data"]["agent"]) for one in once.values())


def metric(kt: Keyturn, start: str) -> float:
    """Read one sample."""
    lines = kt.run("metrics").stdout.splitlines()
    return float(next(line for line in lines if line.startswith(start)).rpartition(" ")[2])


def test_a_life_with_webhooks(tmp_path: Path) -> None:
    """First versions, a revoke, a dead receiver, a ping by hand and by `check`, and a reload."""
    with receiving() as receiver, hooked(tmp_path, receiver) as kt:
        receiver.wait_for(2)  # the first versions
        kt.run("revoke", "agent-0", "--reason", "INC-1")
        assert receiver.wait_for(3)[2]["type"] == "revoked"

        receiver.mode = "broken"
        assert kt.run("rotate", "agent-1", "--wait").returncode == 0
        receiver.wait_tried(4)
        code, (row,) = kt.ask("notify", "status")
        assert (code, row["state"], row["last"]) == (75, "failing", "HTTP 500")
        code, found = kt.ask("notify", "test", "--name", "pager")
        (ping,) = found["results"]
        assert (code, ping["status"], ping["text"]) == (69, 500, "out of order")
        receiver.mode = "ok"
        assert receiver.wait_for(4)[3]["data"]["agent"] == "agent-1"

        assert "ok   webhook pager: HTTP 204" in kt.run("check", "--probe").stdout
        assert "no webhook is called x" in kt.run("notify", "test", "--name", "x").stderr

        kt.content["notify"][0]["on"] = ["revoked"]
        kt.write()
        assert kt.run("reload").returncode == 0
        kt.run("revoke", "agent-1")
        kt.wait_for(lambda: receiver.got[-1]["data"].get("agent") == "agent-1")
        assert metric(kt, 'keyturn_webhooks_total{hook="pager",result="delivered"}') >= 5
        assert told(receiver) == audited(kt)
        assert "hooks" not in kt.log.read_text().replace("webhooks", "")


def kill_and_count(folder: Path, *, kills: int, agents: int) -> tuple[int, int, int]:
    """Kill the daemon between events; return events, requests, and the ids that came twice."""
    with receiving() as receiver, hooked(folder, receiver, agents=agents) as kt:
        for number in range(kills):
            receiver.mode = ("ok", "lost", "broken", "ok")[number % 4]
            kt.run("rotate", *(f"agent-{n}" for n in range(agents)))  # some are at it already
            if number % 2:
                kt.wait_for(lambda: receiver.seen.total() > 0)
            assert kt.process is not None
            kt.process.kill()  # right after a commit, in a delivery, before its row
            kt.process.wait()
            kt.start()
        receiver.mode = "ok"
        kt.wait_for(lambda: all(not row["rotation"] for row in kt.ask("status")[1]), seconds=60)
        kt.run("revoke", "agent-0")
        kt.wait_for(lambda: told(receiver) == audited(kt), seconds=60)
        twice = [one for one, number in receiver.seen.items() if number > 1]
        bodies = Counter(json.dumps(one, sort_keys=True) for one in receiver.got)
        assert len({json.loads(body)["id"] for body in bodies}) == len(bodies)
        return len(set(receiver.seen)), receiver.seen.total(), len(twice)


def test_nothing_is_lost_when_the_daemon_is_killed(tmp_path: Path) -> None:
    """SIGKILL between commit, delivery and row: each event arrives, a repeat has the same id."""
    kill_and_count(tmp_path, kills=2, agents=2)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_nothing_is_lost_in_forty_kills(tmp_path: Path) -> None:
    """The long version of the above."""
    events, requests, twice = kill_and_count(tmp_path, kills=40, agents=4)
    print(f"webhooks: 40 kills, {events} events, 0 lost, {requests} requests, {twice} ids twice")
