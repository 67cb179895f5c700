"""The pages of the HTTP listener: /healthz, /readyz, /metrics, and nothing else.

They are answered from memory alone: no page asks the store, so a locked one delays no probe.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, Protocol

from keyturn.daemon.listener import Answer
from keyturn.daemon.readiness import Readiness

SAME_FOR = 1.0  # seconds for which a page of metrics is sent again: nobody can keep us rendering
_OPEN, _PLAIN = "application/openmetrics-text", "text/plain"
_METHODS = ("GET", "HEAD")


class Rendered(Protocol):
    """What can be scraped."""

    def page(self, accept: str) -> tuple[bytes, str]:
        """Return what a scrape that accepts these types gets, and its content type."""


class Pages:
    """Answers a request by its path. Thread-safe only in so far as one loop uses it."""

    def __init__(
        self, readiness: Readiness, metrics: Rendered, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._readiness = readiness
        self._metrics = metrics
        self._clock = clock
        self._rendered: dict[str, tuple[float, Answer]] = {}

    def __call__(self, method: str, target: str, accept: str) -> Answer:
        """Return the page."""
        pages: dict[str, Callable[[], Answer]] = {
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/metrics": lambda: self._metrics_page(accept),
        }
        page = pages.get(target.partition("?")[0])
        if page is None:
            return _text(404, "nothing here; there are /healthz, /readyz and /metrics\n")
        if method not in _METHODS:
            allow = ", ".join(_METHODS)
            return _text(405, f"only {allow}\n", allow=allow)
        return page()

    def _healthz(self) -> Answer:
        found = self._readiness.describe()
        return _json(found["live"], {"live": found["live"]})

    def _readyz(self) -> Answer:
        found = self._readiness.describe()
        return _json(found["ready"], {key: found[key] for key in ("ready", "reasons")})

    def _metrics_page(self, accept: str) -> Answer:
        # SECURITY: the caller's text is not passed on: each other one would be rendered anew, and
        # prometheus_client raises for a version that is none.
        offered = {one.partition(";")[0].strip() for one in accept.split(",")}
        form, now = _OPEN if _OPEN in offered else _PLAIN, self._clock()
        kept = self._rendered.get(form)
        if kept is None or now - kept[0] > SAME_FOR:
            body, kind = self._metrics.page(form)
            kept = self._rendered[form] = now, Answer(status=200, kind=kind, body=body)
        return kept[1]


def _json(good: bool, content: dict[str, Any]) -> Answer:
    body = json.dumps(content).encode() + b"\n"
    return Answer(status=200 if good else 503, kind="application/json", body=body)


def _text(status: int, text: str, *, allow: str = "") -> Answer:
    kind = "text/plain; charset=utf-8"
    return Answer(status=status, kind=kind, body=text.encode(), allow=allow)
