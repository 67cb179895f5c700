"""Agents that are asked for their secret over HTTP, through whatever stands in between."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Mapping
from typing import Any

from keyturn.testing.places import Read
from support.http_verifier import basic
from support.workloads import Workload


class Asking(Workload):
    """Counts what it is told: accepted; refused (401, 403), which must not be; 5xx and cuts apart."""

    def __init__(
        self, name: str, read: Read, connect: Callable[[], http.client.HTTPConnection], **more: Any
    ) -> None:
        super().__init__(name, read, None, **more)  # type: ignore[arg-type]
        self._connect = connect
        self._connection: http.client.HTTPConnection | None = None

    def run(self) -> None:
        super().run()
        if self._connection is not None:
            self._connection.close()

    def _authenticate(self, held: Mapping[str, Any]) -> None:
        connection = self._connection = self._connection or self._connect()
        try:
            connection.request(
                "GET", "/", headers={"Authorization": basic(held["id"], held["secret"])}
            )
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            self._connection = None
            self.counts["cut off"] += 1
            return
        if answer.status == 200:
            self.counts["accepted"] += 1
        elif answer.status in (401, 403):
            self.counts["refused"] += 1
            self.refusals.append(held["version"])
        else:
            self.counts[str(answer.status)] += 1
