"""Agents as they are in the wild: plain reads, a cache of their own, authentications all the time."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keyturn.core.secret import Secret
from keyturn.errors import StoreUnavailable, VerificationFailed
from keyturn.verifier.decision import Verifier

Read = Callable[[str], dict[str, Any] | None]


def file_reader(root: Path) -> Read:
    """Read as an agent without any code of ours does."""

    def read(agent: str) -> dict[str, Any] | None:
        try:
            return json.loads((root / f"{agent}.json").read_text())
        except FileNotFoundError:
            return None

    return read


def vault_reader(address: str, token: str, *, mount: str = "kv", prefix: str = "agents") -> Read:
    """Read by plain hvac."""
    import hvac

    client = hvac.Client(url=address, token=token)

    def read(agent: str) -> dict[str, Any] | None:
        try:
            found = client.secrets.kv.v2.read_secret_version(
                f"{prefix}/{agent}", mount_point=mount, raise_on_deleted_version=True
            )
        except hvac.exceptions.InvalidPath:
            return None
        return found["data"]["data"]

    return read


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
