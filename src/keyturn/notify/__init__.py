"""Tells other systems what happened: signed webhooks, derived from the audit.

signing     the headers of Standard Webhooks, by keys from a file
sending     one POST with one deadline
events      which audit entries are told, and in which words
hook        one receiver: a thread, its queue, back-off, what it has told
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

import structlog

from keyturn.core.model import Agent, Retry
from keyturn.errors import Refused, StoreUnavailable, UnknownAgent
from keyturn.notify.hook import RETRY, Hook, Instruments, Spec, Surroundings
from keyturn.notify.sending import Answer, deliver
from keyturn.storage.hooks import HookRecords
from keyturn.storage.store import Store

GOODBYE = 2.0  # seconds that SIGTERM waits for all hooks together

_log = structlog.get_logger(__name__)


class Notifier:
    """All hooks of a daemon. They are threads of their own: nothing here makes a rotation wait."""

    def __init__(
        self,
        store: Store,
        *,
        now: Callable[[], datetime],
        instruments: Instruments,
        send: Callable[..., Answer] = deliver,
        retry: Retry = RETRY,
    ) -> None:
        self._records = HookRecords(store.database)
        self._around = Surroundings(
            records=self._records,
            store_id=store.store_id,
            now=now,
            agent=lambda name: _agent(store, name),
            audit=store.append_audit,
            instruments=instruments,
            send=send,
            retry=retry,
        )
        self._guard = threading.Lock()
        self._hooks: dict[str, Hook] = {}

    def apply(self, specs: Iterable[Spec]) -> None:
        """Go by these hooks from now on: at the start and at each reload."""
        wanted = {spec.name: spec for spec in specs}
        with self._guard:
            for name in self._known() - wanted.keys():
                self._let_go(name)
            for name, spec in wanted.items():
                if name in self._hooks:
                    self._hooks[name].change(spec, _receiver(spec))
                else:
                    self._add(spec)

    def _known(self) -> set[str]:
        try:
            return {*self._hooks, *self._records.names()}
        except StoreUnavailable:
            return set(self._hooks)  # the rest is forgotten at the next start

    def _add(self, spec: Spec) -> None:
        hook = Hook(spec, self._around, _receiver(spec))
        try:
            hook.begin()
        except StoreUnavailable as error:  # its thread begins as soon as the store is there
            _log.warning("webhook.store-away", hook=spec.name, code=error.code)
        self._hooks[spec.name] = hook
        hook.start()

    def _let_go(self, name: str) -> None:
        hook = self._hooks.pop(name, None)
        try:
            if hook is not None:
                hook.leave()
            else:
                self._records.forget(name)
        except StoreUnavailable as error:
            _log.warning("webhook.store-away", hook=name, code=error.code)
        self._around.instruments.waiting(name, -1, 0.0)

    def stop(self) -> None:
        """End all of them; what they have not sent yet is sent after the next start."""
        with self._guard:
            hooks = list(self._hooks.values())
            for hook in hooks:
                hook.stop(0)
            for hook in hooks:
                hook.stop(GOODBYE / max(1, len(hooks)))

    def status(self) -> list[dict[str, Any]]:
        """Describe every hook."""
        with self._guard:
            return [hook.status() for _, hook in sorted(self._hooks.items())]

    def test(self, name: str = "") -> list[dict[str, Any]]:
        """Send a ping to one hook or all, and return what they answered. Raises Refused."""
        found = []
        for hook in self._chosen(name):
            message, answer = hook.test()
            found.append(in_words(hook.spec, message.id, answer))
        return found

    def enable(self, name: str) -> dict[str, Any]:
        """Send again to a receiver that said it was gone. Raises Refused."""
        (hook,) = self._chosen(name or "?")
        hook.enable()
        return {"name": hook.spec.name, "outcome": "enabled"}

    def _chosen(self, name: str) -> list[Hook]:
        with self._guard:
            hooks = [hook for key, hook in sorted(self._hooks.items()) if name in ("", key)]
            names = ", ".join(sorted(self._hooks)) or "none"
        if not hooks:
            raise Refused(
                f"no webhook is called {name}" if name else "there is no webhook",
                hint=f"`notify:` in the configuration has: {names}",
            )
        return hooks


def in_words(spec: Spec, message_id: str, answer: Answer) -> dict[str, Any]:
    """Return what a ping was answered with, for a person; where it leads may itself be secret."""
    text = answer.text
    for part in (spec.url, spec.url.partition("://")[2].partition("/")[2]):
        text = text.replace(part, "…") if part else text
    return {
        "name": spec.name,
        "ok": answer.delivered,
        "status": answer.status or None,
        "answer": answer.words,
        "text": " ".join(text.split()),
        "seconds": round(answer.seconds, 3),
        "id": message_id,
    }


def _agent(store: Store, name: str) -> Agent | None:
    try:
        return store.agent(name)
    except UnknownAgent:
        return None


def _receiver(spec: Spec) -> str:
    return hashlib.sha256(spec.url.encode()).hexdigest()
