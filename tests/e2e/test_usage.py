"""What an operator sees of what verifiers saw: uses, laggards, and secrets that should be no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from keyturn.cli.client import AdminClient
from keyturn.core.secret import RANDOM_LENGTH, Secret, _checksum
from keyturn.verifier.decision import Verifier
from keyturn.verifier.usage import Usage
from keyturn.wiring import SystemClock
from support.running import Keyturn, accepts


class Watched:
    """A service that checks secrets and counts, beside a running daemon."""

    def __init__(self, keyturn: Keyturn) -> None:
        url, folder = f"sqlite:///{keyturn.store}", keyturn.store.parent
        self.keyturn = keyturn
        self.usage = Usage.open(url, state_dir=folder, clock=SystemClock(), every=0.1)
        self.verifier = Verifier.open(url, state_dir=folder, clock=SystemClock(), usage=self.usage)

    def close(self) -> None:
        """End it as a service does."""
        self.usage.close()
        self.verifier.close()

    def status(self, agent: str) -> dict[str, Any]:
        """Return what the daemon says of an agent."""
        [found] = ask(self.keyturn, "status", agent=agent)
        return dict(found)

    def metric(self, name: str, **labels: str) -> float | None:
        """Return a sample, None where there is none."""
        return metric(self.keyturn, name, **labels)


def ask(keyturn: Keyturn, name: str, **args: str) -> Any:
    """Ask the daemon as a command does, without starting a process for it."""
    return AdminClient(keyturn.folder / "run" / "admin.sock").call(name, args)


def metric(keyturn: Keyturn, name: str, **labels: str) -> float | None:
    """Return a sample, None where there is none."""
    for sample in ask(keyturn, "metrics")["samples"]:
        if (sample["name"], sample["labels"]) == (f"keyturn_{name}", labels):
            return float(sample["value"])
    return None


def forged(held: dict[str, Any]) -> dict[str, Any]:
    """Return the same version's public id with a made-up secret."""
    body = held["secret"].rpartition("_")[0] + "_" + "7" * RANDOM_LENGTH
    return {**held, "secret": body + _checksum(body.encode())}


def test_uses_laggards_and_ended_secrets_are_seen(tmp_path: Path) -> None:
    """A working day: nobody counts, then uses, then one that lags behind, then a revoked one is tried."""
    with Keyturn(tmp_path, agents=2, policy={"grace": "5m"}) as keyturn:
        keyturn.wait_first()
        code, _ = keyturn.ask("status", "--never-presented")
        assert code == 69
        [row] = [one for one in keyturn.ask("status")[1] if one["agent"] == "agent-0"]
        assert row["current"]["uses"] is None
        assert row["presented"] is None
        assert metric(keyturn, "laggards") is None
        watched = Watched(keyturn)
        try:
            _uses(watched)
            _laggards(watched)
            _ended(watched)
        finally:
            watched.close()
    assert watched.usage.counts["not_flushed"] == 0


def _uses(watched: Watched) -> None:
    keyturn = watched.keyturn
    held = keyturn.held("agent-0")
    for _ in range(3):
        assert accepts(watched.verifier, held)
    keyturn.wait_for(lambda: watched.status("agent-0")["current"]["uses"] == 3)
    shown = watched.status("agent-0")["current"]
    assert shown["first_used_at"] <= shown["last_used_at"]
    assert shown["minted_at"] < shown["first_used_at"]
    rows = keyturn.ask("status", "--never-presented")[1]
    assert [row["agent"] for row in rows] == ["agent-1"]
    [found] = keyturn.ask("identify", stdin=held["secret"])[1]
    assert (found["agent"], found["uses_last_hour"]) == ("agent-0", 3)
    assert watched.metric("laggards") == 0


def _laggards(watched: Watched) -> None:
    keyturn, old = watched.keyturn, watched.keyturn.held("agent-0")
    assert keyturn.ask("rotate", "agent-0", "--wait")[0] == 0
    assert accepts(watched.verifier, old)

    def lags() -> bool:
        assert accepts(watched.verifier, old) is not False
        return watched.status("agent-0")["previous"][0]["laggards"] == ["agent-0"]

    keyturn.wait_for(lags)
    assert watched.metric("laggards") == 1
    assert "still used" in watched.status("agent-0")["safe_to_retire"]["reason"]


def _ended(watched: Watched) -> None:
    keyturn, held = watched.keyturn, watched.keyturn.held("agent-1")
    assert keyturn.ask("revoke", "agent-1", "--reason", "leaked")[0] == 0
    before = watched.metric("verifications_total", result="refused") or 0.0
    for _ in range(20):
        assert accepts(watched.verifier, forged(held)) is False
    keyturn.wait_for(
        lambda: (watched.metric("verifications_total", result="refused") or 0.0) >= before + 20
    )
    assert watched.status("agent-1")["presented"] == []
    assert watched.metric("retired_presented_total", state="revoked") == 0

    assert accepts(watched.verifier, held) is False
    keyturn.wait_for(lambda: watched.metric("retired_presented_total", state="revoked") == 1)
    [shown] = watched.status("agent-1")["presented"]
    assert (shown["state"], shown["times"]) == ("revoked", 1)
    entries = ask(keyturn, "audit", agent="agent-1")["entries"]
    told = [one for one in entries if one["action"] == "incident"]
    assert [(one["outcome"], one["version"]) for one in told] == [
        ("revoked-presented", shown["version"])
    ]
    assert "revoked.presented" in keyturn.log.read_text()
    for text in (json.dumps(entries), keyturn.log.read_text()):
        assert Secret(held["secret"]).reveal() not in text
