"""Reads that may let a version go (rule 5): answered by the node that writes go to, or not believed.

Standbys of OpenBao (by default) and of Vault Enterprise answer reads themselves, as late as their
replication is. What makes one ask the leader, by the servers' own sources:

- a token with a limited number of uses: both forward each of its calls, since each is a write;
- asking for a wrapped answer: OpenBao forwards it before anything is read. Vault Enterprise does not:
  it reads at the standby and forwards the wrapping alone;
- nothing, where there is no standby, and at Vault Community, whose standbys forward everything.

Sources: `request_handling.go` and `wrapping.go` of both projects; openbao.org, "Eventual
consistency"; developer.hashicorp.com, "Use performance standby nodes".
"""

from __future__ import annotations

import enum
import time
from typing import Any

import hvac.exceptions as vendor

from keyturn.destinations.vault_login import Login
from keyturn.errors import DestinationUnavailable

WRAP_FOR = "30s"
TRIES = 4
PAUSE = 0.05
_BARE: dict[str, str | None] = {"X-Vault-Token": None, "X-Vault-Namespace": None}


class Way(enum.StrEnum):
    """How a read gets to the leader."""

    PLAIN = "by itself"
    WRAPPED = "by wrapped answers"
    NONE = "not at all: give the login a limited number of uses (docs/howto/vault.md)"

    @property
    def fresh(self) -> bool:
        """Whether such a read may let a version go."""
        return self is not Way.NONE


class Reads:
    """Reads of one connection, each with whether it is fresh. Thread-safe."""

    def __init__(self, login: Login, name: str) -> None:
        self._login = login
        self._name = name
        self._found: tuple[int, Way] | None = None

    def get(self, path: str) -> tuple[Any, bool]:
        """Read a path. Raises what hvac raises, and DestinationUnavailable."""
        way = self.way()
        if way is not Way.WRAPPED:
            return self._login.request("get", path, None), way is Way.PLAIN
        answer = self._login.request("get", path, None, headers={"X-Vault-Wrap-TTL": WRAP_FOR})
        wrapped = answer.get("wrap_info") if isinstance(answer, dict) else None
        if not isinstance(wrapped, dict):
            return answer, False  # somebody in between does not know of wrapping
        return self._unwrapped(str(wrapped.get("token"))), True

    def way(self) -> Way:
        """Tell how; asked of the server once a login, since operators change clusters."""
        session = self._login.session()
        found = self._found
        if found is None or found[0] != session:
            found = self._found = session, self._ask()
        return found[1]

    def _ask(self) -> Way:
        if self._login.limited or self._facts("sys/leader").get("ha_enabled") is False:
            return Way.PLAIN
        health = self._facts("sys/health?standbyok=true&perfstandbyok=true")
        enterprise = health.get("enterprise")
        if enterprise is False:
            return Way.PLAIN
        if enterprise is not None or "+ent" in str(health.get("version", "+ent")):
            return Way.NONE  # also where the server does not say what it is
        return Way.WRAPPED

    def _facts(self, path: str) -> dict[str, Any]:
        """Ask what needs no login; those paths are known outside of namespaces only."""
        try:
            found = self._login.send("get", f"/v1/{path}", None, _BARE)
        except vendor.VaultDown:
            raise
        except vendor.VaultError:
            return {}
        return found if isinstance(found, dict) else {}

    def _unwrapped(self, token: str) -> Any:
        """Take what was wrapped. A standby may not know the wrapping token yet."""
        for attempt in range(TRIES):
            try:
                return self._login.send(
                    "post", "/v1/sys/wrapping/unwrap", {}, {"X-Vault-Token": token}
                )
            except (vendor.InvalidRequest, vendor.Forbidden):
                time.sleep(PAUSE * 2**attempt)
        raise DestinationUnavailable(
            f"{self._name}: a wrapped answer cannot be unwrapped yet", sent=False
        )
