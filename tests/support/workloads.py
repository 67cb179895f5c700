"""Agents as they are in the wild: plain reads, a cache of their own, authentications all the time."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from typing import Any

from keyturn.core.secret import Secret
from keyturn.errors import StoreUnavailable, VerificationFailed
from keyturn.testing.places import Read
from keyturn.verifier.decision import Verifier


class Workload(threading.Thread):
    """One agent that reads, keeps what it read for at most `cache` seconds, and authenticates."""

    def __init__(
        self, name: str, read: Read, verifier: Verifier, *, cache: float, pause: float, seed: int
    ) -> None:
        super().__init__(name=f"workload-{name}", daemon=True)
        self.agent = name
        self.counts: Counter[str] = Counter()
        self.refusals: list[str] = []
        self.versions: list[str] = []
        self._read, self._verifier = read, verifier
        self._cache, self._pause = cache, pause
        self._random = random.Random(seed)
        self._ended = threading.Event()

    def run(self) -> None:
        held: dict[str, Any] | None = None
        until = 0.0
        while not self._ended.wait(self._pause):
            if held is None or time.monotonic() >= until:
                held = self._read(self.agent)
                until = time.monotonic() + self._random.uniform(0, self._cache)
                if held and (not self.versions or self.versions[-1] != held["version"]):
                    self.versions.append(held["version"])
            if held:
                self._authenticate(held)

    def end(self) -> None:
        self._ended.set()

    def _authenticate(self, held: dict[str, Any]) -> None:
        try:
            self._verifier.verify(held["id"], Secret(held["secret"]))
        except VerificationFailed:
            self.counts["refused"] += 1
            self.refusals.append(held["version"])
        except StoreUnavailable:
            self.counts["unavailable"] += 1
        else:
            self.counts["accepted"] += 1
