"""The metrics of a verifier process, read from its counters when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sized

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from keyturn import __version__
from keyturn.daemon.metrics import VERIFICATIONS
from keyturn.daemon.readiness import Readiness
from keyturn.verifier.decision import Verifier
from keyturn.verifier.http.desk import Desk

RESULTS = (*VERIFICATIONS, "malformed", "stranger")


class VerifierMetrics(Collector):
    """What a scrape of a verifier gets. Labels are words of ours, never a caller's text."""

    def __init__(self, verifier: Verifier, desk: Desk, readiness: Readiness) -> None:
        self._verifier = verifier
        self._desk = desk
        self._readiness = readiness
        self._connections: Sized = ()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def follow(self, connections: Sized) -> None:
        """Count these connections as well."""
        self._connections = connections

    def page(self, accept: str) -> tuple[bytes, str]:
        """Return what a scrape that accepts these types gets, and its content type."""
        encode, kind = choose_encoder(accept)
        return encode(self._registry), kind

    def collect(self) -> Iterator[Metric]:
        """Read the counters."""
        requests = CounterMetricFamily(
            "keyturn_verify_requests", "Answers about secrets", labels=["result"]
        )
        for result in RESULTS:
            requests.add_metric([result], self._verifier.counts[result])
        yield requests
        measures = self._desk.measures
        duration = HistogramMetricFamily(
            "keyturn_verify_duration_seconds", "From the request to its answer"
        )
        duration.add_metric([], measures.buckets(), measures.total)
        yield duration
        yield GaugeMetricFamily(
            "keyturn_hash_queue_depth",
            "First uses that wait for their hash",
            self._verifier.waiting,
        )
        yield GaugeMetricFamily(
            "keyturn_verifier_staleness_seconds",
            "How old what it answers by is; 0 where the store is asked each time",
            self._verifier.staleness(),
        )
        yield GaugeMetricFamily(
            "keyturn_verifier_connections", "Open connections", len(self._connections)
        )
        yield GaugeMetricFamily(
            "keyturn_verifier_ready", "1 if it can tell", float(self._readiness.ready)
        )
        yield InfoMetricFamily("keyturn_build", "This release", {"version": __version__})
