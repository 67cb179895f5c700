"""Bad weather between the daemon and a destination: every kind of fault, now and then, from a seed."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable

from keyturn.testing.wire import Answer, Call, Forward, HangUp

BEHIND = 0.9  # s that an answer may be old: with the call deadline, less than `settle_after`
# Said by each service in its own words; a daemon must understand them all.
REFUSALS: dict[str, dict[str, Answer]] = {
    "vault": {
        "500": Answer(status=500, body=b'{"errors":["internal error"]}'),
        "429": Answer(status=429, headers={"Retry-After": "1"}, body=b'{"errors":["too many"]}'),
        "403": Answer(status=403, body=b'{"errors":["permission denied"]}'),
    },
    "aws": {
        "500": Answer(status=500, body=b'{"__type":"InternalServiceError","message":"x"}'),
        "429": Answer(
            status=400,
            headers={"Retry-After": "1"},
            body=b'{"__type":"ThrottlingException","message":"Rate exceeded"}',
        ),
        "403": Answer(status=400, body=b'{"__type":"AccessDeniedException","Message":"x"}'),
    },
    "azure": {
        "500": Answer(status=500, body=b'{"error":{"code":"InternalServerError","message":"x"}}'),
        "429": Answer(
            status=429,
            headers={"Retry-After": "1"},
            body=b'{"error":{"code":"Throttled","message":"x"}}',
        ),
        "403": Answer(
            status=403,
            body=json.dumps(
                {"error": {"code": "Forbidden", "innererror": {"code": "ForbiddenByRbac"}}}
            ).encode(),
        ),
    },
}


class Weather:
    """A rule of a server. Thread-safe; `seen` counts what was done, calm calls as well."""

    def __init__(self, kind: str, *, seed: object, share: float, stall: float) -> None:
        self.seen: Counter[str] = Counter()
        self.calm = True
        self._refusals = REFUSALS[kind]
        self._draw = random.Random(f"weather {kind} {seed}")
        self._share, self._stall = share, stall
        self._guard = threading.Lock()
        self._old: dict[tuple[str, str, bytes], tuple[float, Answer]] = {}
        self._faults: dict[str, Callable[[Call, Forward], Answer]] = {
            **{name: self._refused(name) for name in self._refusals},
            "reset before": _reset_before,
            "reset after": _reset_after,
            "stall": self._stalled,
            "truncated": lambda call, forward: _cut(forward(call)),
            "wrong body": lambda call, forward: _wrong(forward(call)),
            "stale read": self._stale,
            "redirect": lambda call, _: Answer(
                status=307, headers={"Location": f"https://stranger.invalid{call.target}"}
            ),
        }

    def __call__(self, call: Call, forward: Forward) -> Answer:
        with self._guard:
            strikes = not self.calm and self._draw.random() < self._share
            fault = self._draw.choice(sorted(self._faults)) if strikes else "calm"
            self.seen[fault] += 1
        if fault != "calm":
            return self._faults[fault](call, forward)
        answer = forward(call)
        if answer.status == 200:
            self._old[call.method, call.target, call.body] = time.monotonic(), answer
        return answer

    def _refused(self, name: str) -> Callable[[Call, Forward], Answer]:
        return lambda _call, _forward: self._refusals[name]

    def _stalled(self, call: Call, forward: Forward) -> Answer:
        """Answer when nobody waits any more; the request lands, late."""
        time.sleep(self._stall)
        return forward(call)

    def _stale(self, call: Call, forward: Forward) -> Answer:
        """Say once more what was said last, if that was true a moment ago."""
        key = call.method, call.target, call.body
        at, old = self._old.get(key, (0.0, None)) if _reads(call) else (0.0, None)
        return old if old and time.monotonic() - at < BEHIND else forward(call)


def _reads(call: Call) -> bool:
    target = call.headers.get("x-amz-target", "")
    return call.method == "GET" or target.endswith((".GetSecretValue", ".DescribeSecret"))


def _reset_before(_call: Call, _forward: Forward) -> Answer:
    raise HangUp


def _reset_after(call: Call, forward: Forward) -> Answer:
    forward(call)
    raise HangUp


def _cut(answer: Answer) -> Answer:
    half = len(answer.body) // 2
    return Answer(
        status=answer.status, headers=answer.headers, body=answer.body[:half], missing=half + 1
    )


def _wrong(answer: Answer) -> Answer:
    return Answer(status=answer.status, headers=answer.headers, body=b'{"data": "lorem"}')
