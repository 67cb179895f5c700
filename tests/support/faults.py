"""What can go wrong with any call over HTTP, as rules of `keyturn.testing.wire`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from keyturn.testing.wire import Answer, Call, Forward, HangUp

Fault = Callable[[Call, Forward], Answer]


def reset_before(call: Call, forward: Forward) -> Answer:
    """Reset the connection, and do nothing."""
    raise HangUp


def reset_after(call: Call, forward: Forward) -> Answer:
    """Do it, and reset the connection."""
    forward(call)
    raise HangUp


def stall(call: Call, forward: Forward) -> Answer:
    """Answer after the deadline of the call."""
    time.sleep(1.2)
    return forward(call)


def late(call: Call, forward: Forward) -> Answer:
    """Do it, and say so when nobody waits any more."""
    answer = forward(call)
    time.sleep(1.5)
    return answer


def short(call: Call, forward: Forward) -> Answer:
    """Do it, and promise more bytes than are sent."""
    answer = forward(call)
    return replace(answer, body=answer.body[:20], missing=len(answer.body) - 20)


def far_too_much(call: Call, forward: Forward) -> Answer:
    """Answer with more than a mebibyte."""
    return Answer(status=200, body=b"{" + b" " * 1_100_000)


class Once:
    """A rule that lets a fault happen to the first call that is meant, and all others pass."""

    def __init__(self, meant: Callable[[Call], bool], fault: Fault) -> None:
        self.meant, self.fault, self.hit = meant, fault, 0

    def __call__(self, call: Call, forward: Forward) -> Answer:
        if not self.hit and self.meant(call):
            self.hit += 1
            return self.fault(call, forward)
        return forward(call)
