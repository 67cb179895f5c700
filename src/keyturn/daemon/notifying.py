"""The daemon's webhooks: from settings to hooks, their metrics, and what can be asked about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keyturn.config import Settings
from keyturn.config.models import HookSection
from keyturn.daemon.metrics import Metrics
from keyturn.daemon.peer import Peer, Role
from keyturn.daemon.socket import Command, Progress
from keyturn.notify import Notifier
from keyturn.notify.hook import Spec
from keyturn.wiring import Parts

Args = dict[str, Any]
RESULTS = ("delivered", "failed", "refused", "gone")


def specs_of(settings: Settings) -> list[Spec]:
    """Return the hooks that the settings name."""
    return [spec_of(hook) for hook in settings.notify]


def spec_of(hook: HookSection) -> Spec:
    """Return one hook."""
    return Spec(
        name=hook.label,
        url=hook.webhook,
        key_file=hook.key_file,
        on=frozenset(hook.on),
        ca_file=hook.ca_file,
    )


def notifier_of(parts: Parts, metrics: Metrics) -> Notifier:
    """Make the notifier of a daemon; it sends nothing before it is given hooks."""
    return Notifier(
        parts.store, now=lambda: parts.store_clock.look()[0], instruments=HookMetrics(metrics)
    )


class HookMetrics:
    """Counts for the hooks. Labels are the hooks' names in the configuration."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def delivered(self, hook: str, result: str) -> None:
        """Count one try."""
        self._metrics.webhooks.labels(hook, result).inc()

    def waiting(self, hook: str, number: int, oldest: float) -> None:
        """Note what waits; a negative number says that there is no such hook any more."""
        gauges = (self._metrics.webhooks_backlog, self._metrics.webhooks_oldest_age)
        if number < 0:
            for gauge in gauges:
                gauge.remove(hook)
            return
        for result in RESULTS:  # an alert on a rate needs the zero before the first one
            self._metrics.webhooks.labels(hook, result)
        gauges[0].labels(hook).set(number)
        gauges[1].labels(hook).set(oldest)


class NotifyCommands:
    """What the admin socket can be asked about webhooks."""

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier

    def table(self) -> Mapping[str, Command]:
        """Return every command with the least role that it needs."""
        return {
            "notify.status": Command(role=Role.VIEW, function=self.status),
            "notify.test": Command(role=Role.RESPOND, function=self.test),
            "notify.enable": Command(role=Role.ADMIN, function=self.enable),
        }

    def status(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Describe every hook."""
        del args, peer, progress
        return self._notifier.status()

    def test(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Send a ping."""
        del peer, progress
        return {"results": self._notifier.test(str(args.get("name") or ""))}

    def enable(self, args: Args, peer: Peer, progress: Progress) -> Any:
        """Send again to a receiver that said it was gone."""
        del peer, progress
        return self._notifier.enable(str(args.get("name") or ""))
