"""The metrics of operating.md that exist so far, in a registry of their own.

Labels are names from the configuration or words of ours, never an agent, never a caller's text.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from keyturn import __version__
from keyturn.core.model import OPEN, UNMANAGED, AgentState, VersionState

_STEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_REVOKE_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 15, 30, 60)
OPEN_STATES = tuple(state.value for state in OPEN)
AGENT_STATES = (*(state.value for state in AgentState), UNMANAGED)
VERSION_STATES = tuple(state.value for state in VersionState)
OUTCOMES = ("promoted", "stalled", "abandoned", "revoked", "kept", "retired")
DRIFT_KINDS = ("older", "revoked", "unknown", "missing", "unreadable")


class Metrics:
    """All instruments as attributes; `text()` is what a scrape gets. Thread-safe."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._rotations()
        self._destinations()
        self._revocations()
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
        self.agents_overdue = self._gauge("agents_overdue", "Agents past their next rotation")
        self.agents_over_max_age = self._gauge(
            "agents_over_max_age", "Agents whose current version is older than their policy allows"
        )
        self.versions = self._gauge("versions", "Versions", "state")
        self.clock_jump = self._gauge(
            "clock_jump_seconds", "How far the wall clock is off since it jumped; 0: it is believed"
        )
        self.last_tick = self._gauge(
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
        self.own_credential_expiry = self._gauge(
            "own_credential_expiry_timestamp_seconds",
            "When our own login ends unless it is renewed",
            "connection",
        )

    def _revocations(self) -> None:
        self.revocations = self._counter("revocations", "Revocations", "trigger")
        self.revocation_duration = self._histogram(
            "revocation_duration_seconds", "From the request until refused", _REVOKE_BUCKETS
        )
        self.revocation_cleanup_pending = self._gauge(
            "revocation_cleanup_pending", "Destinations that hold a revoked version still"
        )
        self.revocations_file_problems = self._gauge(
            "revocations_file_problems", "Lines that are not applied; 1 where the file is refused"
        )

    def _process(self) -> None:
        self._gauge("build_info", "Version of this build", "version").labels(__version__).set(1)
        self.store_up = self._gauge("store_up", "1 if the store answers")
        self.store_ballast = self._gauge(
            "store_ballast_bytes", "What is kept for a revoke on a full disk; 1 MiB when whole"
        )
        self.config_last_reload_successful = self._gauge(
            "config_last_reload_successful", "1 if the last reload was taken over"
        )
        self.audit_head_sequence = self._gauge(
            "audit_head_sequence", "Number of the newest audit entry"
        )
        self.audit_queue_length = self._gauge(
            "audit_queue_length", "Revocations that wait in the spool for the store and its audit"
        )
        self.store_schema_version = self._gauge("store_schema_version", "Revision of the schema")

    def set_states(self, gauge: Gauge, counts: Mapping[str, int], states: tuple[str, ...]) -> None:
        """Set one gauge for all its states, to 0 where `counts` names none."""
        for state in states:
            gauge.labels(state).set(counts.get(state, 0))

    def text(self) -> str:
        """Return all of them in the Prometheus text format."""
        return generate_latest(self.registry).decode()

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"keyturn_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"keyturn_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(f"keyturn_{name}", text, labels, registry=self.registry, buckets=buckets)
