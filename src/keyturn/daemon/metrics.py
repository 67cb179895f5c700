"""The metrics of operating.md in a registry of their own.

Labels are names from the configuration or words of ours, never an agent, never a caller's text.
What is not known yet has no sample: a standby's zero would look like an answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.exposition import choose_encoder

from keyturn import __version__
from keyturn.core.model import OPEN, UNMANAGED, AgentState, VersionState
from keyturn.daemon.readiness import Readiness, Reason

_STEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_REVOKE_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 15, 30, 60)
OPEN_STATES = tuple(state.value for state in OPEN)
AGENT_STATES = (*(state.value for state in AgentState), UNMANAGED)
VERSION_STATES = tuple(state.value for state in VersionState)
OUTCOMES = ("promoted", "stalled", "abandoned", "revoked", "kept", "retired")
TRIGGERS = ("command", "file", "reload", "spool")
REPAIRS = ("copied", "rotated", "failed", "left")
VERIFICATIONS = ("accepted", "accepted_previous", "refused", "limited", "unavailable")
ENDED_STATES = (VersionState.RETIRED.value, VersionState.REVOKED.value)
DRIFT_KINDS = ("older", "revoked", "unknown", "missing", "unreadable")


class Measured(Gauge):
    """A gauge without labels that has no sample until it was measured once."""

    measured = False

    def set(self, value: float) -> None:
        """Measure it."""
        super().set(value)
        self.measured = True

    def unset(self) -> None:
        """Have no sample: it cannot be measured any more."""
        self.measured = False

    def collect(self) -> Iterable[Metric]:
        """Give the sample if there is one; name and text in any case."""
        for family in super().collect():
            if not self.measured:
                family.samples = []
            yield family


class Metrics:
    """All instruments as attributes; `text()` is what a scrape gets. Thread-safe."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._rotations()
        self._destinations()
        self._revocations()
        self._usage()
        self._webhooks()
        self._process()

    def _rotations(self) -> None:
        self.rotations = self._counter(
            "rotations", "Ends of rotations and of their attempts", "outcome"
        )
        self.rotations_open = self._gauge("rotations_open", "Rotations not ended", "state")
        self.step_duration = self._histogram(
            "step_duration_seconds", "Time of one step", _STEP_BUCKETS, "step", "destination"
        )
        self.agents = self._gauge("agents", "Agents", "state")
        self.agents_overdue = self._measured(
            "agents_overdue", "Agents whose rotation has been due for more than five minutes"
        )
        self.longest_overdue = self._measured(
            "longest_overdue_seconds", "How long the rotation has been due that is due longest"
        )
        self.agents_over_max_age = self._measured(
            "agents_over_max_age", "Agents whose current version is older than their policy allows"
        )
        self.versions = self._gauge("versions", "Versions", "state")
        self.clock_jump = self._measured(
            "clock_jump_seconds", "How far the wall clock is off since it jumped; 0: it is believed"
        )
        self.last_tick = self._measured(
            "scheduler_last_tick_timestamp_seconds", "When the due-queue was last looked at"
        )

    def _destinations(self) -> None:
        self.destination_up = self._gauge(
            "destination_up", "1 if the last call got an answer", "destination"
        )
        self.destination_last_success = self._gauge(
            "destination_last_success_timestamp_seconds", "Last good call", "destination"
        )
        self.destination_requests = self._counter(
            "destination_requests", "Calls to destinations", "operation", "result"
        )
        self.destination_drift = self._gauge(
            "destination_drift", "Entries that are not as they should be", "kind"
        )
        self.repairs = self._counter("repairs", "Entries that were mended or given up", "outcome")
        self.repair_fights = self._gauge(
            "repair_fights", "Entries that others keep from being mended"
        )
        self.own_credential_expiry = self._gauge(
            "own_credential_expiry_timestamp_seconds",
            "When our own login ends unless a person acts; absent where it has no end, or renews itself",
            "connection",
        )

    def _revocations(self) -> None:
        self.revocations = self._counter("revocations", "Revocations", "trigger")
        self.revocation_duration = self._histogram(
            "revocation_duration_seconds", "From the request until refused", _REVOKE_BUCKETS
        )
        self.revocation_cleanup_pending = self._measured(
            "revocation_cleanup_pending", "Destinations that hold a revoked version still"
        )
        self.revocations_file_problems = self._measured(
            "revocations_file_problems", "Lines that are not applied; 1 where the file is refused"
        )
        self.verifiers_live = self._measured(
            "verifiers_live", "Verifiers that remember and are waited for; no sample on SQLite"
        )

    def _usage(self) -> None:
        self.laggards = self._measured(
            "laggards", "Who uses an old version still; no sample while nothing counts uses"
        )
        self.grace_ending_in_use = self._measured(
            "grace_ending_in_use", "Old versions in use of whose grace a quarter is left"
        )
        self.verifications = self._counter(
            "verifications", "Answers of all verifiers, as they have written them down", "result"
        )
        self.retired_presented = self._counter(
            "retired_presented",
            "Ended versions that were presented with the whole secret, at most once a minute each",
            "state",
        )
        self.usage_flushed = self._measured(
            "usage_flushed_timestamp_seconds", "When a verifier last wrote down what it counted"
        )

    def _webhooks(self) -> None:
        self.webhooks = self._counter(
            "webhooks", "Tries to deliver an event to a receiver", "hook", "result"
        )
        self.webhooks_backlog = self._gauge(
            "webhooks_backlog", "Events that wait for a receiver", "hook"
        )
        self.webhooks_oldest_age = self._gauge(
            "webhooks_oldest_age_seconds", "How long the oldest of them waits", "hook"
        )

    def _process(self) -> None:
        self._gauge("build_info", "Version of this build", "version").labels(__version__).set(1)
        self.store_up = self._measured("store_up", "1 if the store answers")
        self.embedded_verifier_ends = self._counter(
            "embedded_verifier_ends", "Ends of the embedded verifier that nobody asked for"
        )
        self.store_ballast = self._measured(
            "store_ballast_bytes", "What is kept for a revoke on a full disk; 1 MiB when whole"
        )
        self.config_last_reload_successful = self._measured(
            "config_last_reload_successful", "1 if the last reload was taken over"
        )
        self.audit_head_sequence = self._measured(
            "audit_head_sequence", "Number of the newest audit entry"
        )
        self.audit_verified = self._measured(
            "audit_verified", "0 once the audit was found to be changed, cut or put back"
        )
        self.audit_anchor = self._measured(
            "audit_anchor_timestamp_seconds", "When the audit's heads were last written down"
        )
        self.audit_queue_length = self._measured(
            "audit_queue_length", "Revocations that wait in the spool for the store and its audit"
        )
        self.store_schema_version = self._measured("store_schema_version", "Revision of the schema")

    def follow(self, readiness: Readiness) -> None:
        """Show at each scrape what this says of the daemon then."""
        ready = self._gauge("ready", "1 if the daemon leads and nothing holds it back")
        ready.set_function(lambda: float(readiness.ready))
        leads = self._gauge("leads", "1 if rotations and revocations are this daemon's")
        leads.set_function(lambda: float(readiness.leads))
        held = self._gauge("not_ready", "1 for each reason why it is not ready", "reason")
        for reason in Reason:
            held.labels(str(reason)).set_function(
                lambda one=reason: float(one in readiness.reasons)  # type: ignore[misc]
            )

    def forget(self, connection: str) -> None:
        """Drop what is known of a connection that the settings no longer name."""
        for gauge in (
            self.destination_up, self.destination_last_success, self.own_credential_expiry
        ):  # fmt: skip
            gauge.remove(connection)

    def set_states(self, gauge: Gauge, counts: Mapping[str, int], states: tuple[str, ...]) -> None:
        """Set one gauge for all its states, to 0 where `counts` names none."""
        for state in states:
            gauge.labels(state).set(counts.get(state, 0))

    def text(self) -> str:
        """Return all of them in the Prometheus text format."""
        return generate_latest(self.registry).decode()

    def page(self, accept: str) -> tuple[bytes, str]:
        """Return what a scrape that accepts these types gets, and its content type."""
        encode, kind = choose_encoder(accept)
        return encode(self.registry), kind

    def _measured(self, name: str, text: str) -> Measured:
        return Measured(f"keyturn_{name}", text, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"keyturn_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"keyturn_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(f"keyturn_{name}", text, labels, registry=self.registry, buckets=buckets)


def samples(text: str) -> list[dict[str, Any]]:
    """Return the metrics as data for machines; JSON knows no infinity and no NaN."""
    from prometheus_client.parser import text_string_to_metric_families

    return [
        {
            "name": sample.name,
            "labels": dict(sample.labels),
            "value": sample.value if math.isfinite(sample.value) else None,
        }
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
