"""The metrics by name, as operating.md promises them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from keyturn import __version__
from keyturn.daemon.metrics import AGENT_STATES, Metrics
from keyturn.daemon.readiness import Readiness

NAMES = [
    "rotations_total", "rotations_open", "step_duration_seconds", "agents", "agents_overdue",
    "versions", "scheduler_last_tick_timestamp_seconds", "destination_up",
    "destination_last_success_timestamp_seconds", "destination_requests_total",
    "destination_drift", "revocations_total", "revocation_duration_seconds",
    "revocation_cleanup_pending", "build_info", "store_up", "config_last_reload_successful",
    "audit_head_sequence", "store_ballast_bytes", "agents_over_max_age", "audit_queue_length",
    "own_credential_expiry_timestamp_seconds", "store_schema_version",
    "revocations_file_problems", "laggards", "longest_overdue_seconds", "ready", "leads", "not_ready",
    "revocations_file_problems", "webhooks_total", "webhooks_backlog",
    "webhooks_oldest_age_seconds", "audit_verified", "audit_anchor_timestamp_seconds",
    "verifiers_live",
]  # fmt: skip


def followed() -> Metrics:
    """Return all that a daemon shows."""
    metrics = Metrics()
    metrics.follow(Readiness())
    return metrics


@pytest.mark.parametrize("name", NAMES)
def test_the_promised_names_exist(name: str) -> None:
    """Dashboards and alerts are written against these names."""
    family = f"keyturn_{name.removesuffix('_total')}"
    assert f"# HELP {family}" in followed().text().replace("_total ", " ")


def test_every_metric_stands_on_the_page() -> None:
    """The reference names each metric with its labels and what it says, and no other."""
    page = (Path(__file__).parents[2] / "docs" / "reference" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(keyturn_\w+)(?:\{([\w,]+)\})?` \| (.+) \|$", page, re.MULTILINE)
    known = [
        (
            one._name + ("_total" if one._type == "counter" else ""),
            ",".join(one._labelnames),
            one._documentation,
        )
        for one in followed().registry._collector_to_names
    ]
    assert sorted(rows) == sorted(known)


def test_counts_show_in_the_text() -> None:
    """What was counted is in the Prometheus text, with its labels."""
    metrics = Metrics()
    metrics.rotations.labels("promoted").inc()
    metrics.step_duration.labels("publish", "vault-eu").observe(0.2)
    text = metrics.text()
    assert 'keyturn_rotations_total{outcome="promoted"} 1.0' in text
    assert 'keyturn_step_duration_seconds_count{destination="vault-eu",step="publish"} 1.0' in text
    assert f'keyturn_build_info{{version="{__version__}"}} 1.0' in text


def test_a_state_without_agents_is_zero() -> None:
    """A state that nobody is in any more falls back to zero and does not stay at its last count."""
    metrics = Metrics()
    metrics.set_states(metrics.agents, {"enabled": 3, "suspended": 1}, AGENT_STATES)
    metrics.set_states(metrics.agents, {"enabled": 4}, AGENT_STATES)
    assert 'keyturn_agents{state="suspended"} 0.0' in metrics.text()
    assert 'keyturn_agents{state="enabled"} 4.0' in metrics.text()


def test_two_of_them_do_not_meet() -> None:
    """Each has a registry of its own: two daemons in one test process count apart."""
    first, second = Metrics(), Metrics()
    first.revocations.labels("signal").inc()
    assert 'trigger="signal"' not in second.text()
