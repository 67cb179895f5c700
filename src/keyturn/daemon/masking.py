"""The second line of defence: nothing that is written out may hold a secret of ours.

The first line is that no secret gets near a message. What is written here has passed that line and
is masked anyway, and exceptions are rendered without the texts of other people's classes, because
those quote payloads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import TracebackType

from keyturn.core.secret import mask

__all__ = ["mask", "printable", "render_exception", "summary"]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_CODE_ATTRIBUTES = ("code", "status_code", "errno", "pgcode", "sqlstate")
_LONGEST_CHAIN = 10


def printable(text: str) -> str:
    """Escape control and direction characters: no text from outside may steer a terminal or a log."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def render_exception(error: BaseException) -> str:
    """Return type, code and frames of an exception and of its causes, the outermost last.

    Messages are shown for our own classes only: a vendor's may quote what was sent, and those of the
    standard library quote values as well. Never local variables, never source lines.
    """
    return mask("\n".join(line for link in _chain(error) for line in _lines(link)))


def summary(error: BaseException) -> str:
    """Return one line: type and code, and the message where the class is ours."""
    kind = type(error)
    name = f"{kind.__module__}.{kind.__qualname__}"
    code = next(_codes(error), None)
    head = f"{name}[{code}]" if code is not None else name
    if kind.__module__.partition(".")[0] == "keyturn":
        return mask(printable(f"{head}: {error}"))
    return mask(head)


def _codes(error: BaseException) -> Iterator[str]:
    """Yield short codes only: an attribute called `code` may hold anything in a vendor's class."""
    for name in _CODE_ATTRIBUTES:
        value = getattr(error, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            yield str(value)
        elif isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9-]{1,32}", value):
            yield value


def _chain(error: BaseException) -> list[BaseException]:
    links: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and len(links) < _LONGEST_CHAIN and following not in links:
        links.append(following)
        if following.__cause__ is not None or following.__suppress_context__:
            following = following.__cause__
        else:
            following = following.__context__
    return links[::-1]


def _lines(error: BaseException) -> Iterator[str]:
    yield summary(error)
    yield from (f"  at {frame}" for frame in _frames(error.__traceback__))
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions[:_LONGEST_CHAIN]:
            yield f"  with {summary(inner)}"


def _frames(trace: TracebackType | None) -> Iterator[str]:
    while trace is not None:
        code = trace.tb_frame.f_code
        yield f"{code.co_filename}:{trace.tb_lineno} {code.co_qualname}"
        trace = trace.tb_next
