"""Every metric that dashboards and alerts are written against moves when what it counts happens."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from keyturn.storage.migrations import HEAD
from support.running import Keyturn

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def measured(keyturn: Keyturn) -> Samples:
    """Read the metrics as a scrape gets them, as numbers by name and labels."""
    text = keyturn.run("metrics").stdout
    return {
        (sample.name.removeprefix("keyturn_"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(keyturn: Keyturn, name: str, **labels: str) -> float:
    """Return one sample; a missing one fails."""
    return measured(keyturn)[(name, frozenset(labels.items()))]


def test_the_metrics_of_a_working_day_move(tmp_path: Path) -> None:
    """Rotations, destinations, the store, reloads and the audit, one after the other."""
    with Keyturn(tmp_path, agents=1, policy={"max_age": "1s"}) as keyturn:
        keyturn.wait_first()

        seen = measured(keyturn)
        ones = [
            ("rotations_total", {"outcome": "promoted"}),
            ("agents", {"state": "enabled"}),
            ("versions", {"state": "current"}),
            ("destination_up", {"destination": "files"}),
            ("store_up", {}),
            ("config_last_reload_successful", {}),
            ("step_duration_seconds_count", {"step": "activate", "destination": "files"}),
            ("destination_requests_total", {"operation": "activate", "result": "ok"}),
        ]
        for name, labels in ones:
            assert seen[(name, frozenset(labels.items()))] == 1, name
        assert seen[("store_schema_version", frozenset())] == int(HEAD)
        for name, labels in [
            ("scheduler_last_tick_timestamp_seconds", {}),
            ("destination_last_success_timestamp_seconds", {"destination": "files"}),
        ]:
            assert seen[(name, frozenset(labels.items()))] > 1e9, name
        head = seen[("audit_head_sequence", frozenset())]
        assert (head > 0, seen[("agents_overdue", frozenset())]) == (True, 0)

        assert keyturn.ask("suspend", "agent-0")[0] == 0
        assert value(keyturn, "agents", state="suspended") == 1
        assert keyturn.ask("resume", "agent-0")[0] == 0
        assert value(keyturn, "audit_head_sequence") == head + 2
        keyturn.wait_for(lambda: value(keyturn, "agents_over_max_age") == 1)

        keyturn.content["version"] = 7
        keyturn.write()
        assert keyturn.ask("reload")[0] == 78
        assert value(keyturn, "config_last_reload_successful") == 0
        keyturn.content["version"] = 1
        keyturn.write()
        assert keyturn.ask("reload")[0] == 0
        assert value(keyturn, "config_last_reload_successful") == 1


@pytest.fixture
def blocked(tmp_path: Path) -> Keyturn:
    """Give an installation where somebody else's value stands in the way of a rotation."""
    keyturn = Keyturn(tmp_path, agents=1)
    keyturn.start()
    keyturn.wait_first()
    block(keyturn)
    return keyturn


def block(keyturn: Keyturn) -> None:
    """Put a stranger's value there and ask for a rotation."""
    path = keyturn.folder / "agents" / "agent-0.json"
    path.write_text('{"id": "x", "secret": "y", "version": "z"}')
    assert keyturn.ask("rotate", "agent-0", "--wait")[0] == 4


def test_every_end_of_a_rotation_is_counted(blocked: Keyturn) -> None:
    """Stalled, overdue, abandoned, revoked; then what a revocation leaves to be cleaned up."""
    keyturn = blocked
    try:
        assert value(keyturn, "rotations_total", outcome="stalled") == 1
        assert value(keyturn, "rotations_open", state="stalled") == 1
        with sqlite3.connect(keyturn.store) as store:
            store.execute("UPDATE credentials SET next_rotation_at = 1")
        store.close()
        keyturn.wait_for(lambda: value(keyturn, "agents_overdue") == 1)

        assert keyturn.ask("rotation", "abandon", "agent-0")[0] == 0
        assert value(keyturn, "rotations_total", outcome="abandoned") == 1
        assert value(keyturn, "rotations_open", state="stalled") == 0

        block(keyturn)
        assert keyturn.ask("revoke", "agent-0")[0] == 0
        assert value(keyturn, "rotations_total", outcome="revoked") == 1
        assert value(keyturn, "revocations_total", trigger="command") == 1
        assert value(keyturn, "revocation_duration_seconds_count") == 1
        assert value(keyturn, "audit_queue_length") == 0
        keyturn.wait_for(lambda: value(keyturn, "destination_drift", kind="unknown") == 1)
    finally:
        keyturn.stop()


def test_what_a_revocation_leaves_is_pending_until_it_is_withdrawn(tmp_path: Path) -> None:
    """A refused value that a destination shows is counted while it cannot be taken out."""
    with Keyturn(tmp_path, agents=1) as keyturn:
        keyturn.wait_first()
        files = keyturn.content["connections"]["files"]
        assert value(keyturn, "revocation_cleanup_pending") == 0
        set_group(keyturn, "no-such-group")

        assert keyturn.ask("revoke", "agent-0")[0] == 0

        keyturn.wait_for(lambda: value(keyturn, "destination_drift", kind="revoked") == 1)
        assert value(keyturn, "revocation_cleanup_pending") == 1
        failed = {"operation": "withdraw", "result": "not-found"}
        assert value(keyturn, "destination_requests_total", **failed) == 1
        del files["group"]
        keyturn.write()
        assert keyturn.ask("reload")[0] == 0
        sweep_now(keyturn)  # each sweep tries again
        keyturn.wait_for(lambda: value(keyturn, "revocation_cleanup_pending") == 0)
        assert value(keyturn, "destination_drift", kind="revoked") == 0
        assert value(keyturn, "destination_drift", kind="missing") == 0


def sweep_now(keyturn: Keyturn) -> None:
    """Make the next sweep due, without five minutes of waiting."""
    with sqlite3.connect(keyturn.store) as store:
        store.execute("UPDATE credentials SET sweep_at = 1, wake_at = 1")
    store.close()


def set_group(keyturn: Keyturn, name: str) -> None:
    """Name a group that may read the files: where there is none of that name no write works."""
    keyturn.content["connections"]["files"]["group"] = name
    keyturn.write()
    assert keyturn.ask("reload")[0] == 0


def test_what_waits_for_a_locked_store_is_queued(tmp_path: Path) -> None:
    """A tombstone that the store does not know of yet is work that waits."""
    with Keyturn(tmp_path, agents=1) as keyturn:
        keyturn.wait_first()
        lock = sqlite3.connect(keyturn.store, isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")

        assert keyturn.ask("revoke", "agent-0")[0] == 75
        assert value(keyturn, "audit_queue_length") == 1

        lock.execute("ROLLBACK")
        lock.close()
        keyturn.wait_for(lambda: value(keyturn, "audit_queue_length") == 0)


def test_the_metrics_are_data_for_machines(tmp_path: Path) -> None:
    """`metrics --json` gives samples with name, labels and value, and numbers that JSON knows."""
    keyturn = Keyturn(tmp_path, agents=1)
    keyturn.start()
    samples = keyturn.ask("metrics")[1]
    up = [one for one in samples if one["name"] == "keyturn_store_up"]
    assert up == [{"name": "keyturn_store_up", "labels": {}, "value": 1.0}]
    assert all(set(one) == {"name", "labels", "value"} for one in samples)
    assert keyturn.ask("clock")[1]["now"].endswith("Z")
    keyturn.stop()
