"""Logs: JSON lines, or lines for people on a terminal; the last processor masks secrets."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog
from structlog.typing import Processor

from keyturn.daemon.masking import mask, printable, render_exception

# SDKs log requests, headers and parameters at INFO and DEBUG.
QUIET = (
    "alembic", "asyncio", "azure", "boto3", "botocore", "hvac",
    "msal", "requests", "sqlalchemy", "urllib3",
)  # fmt: skip
LEVELS = ("debug", "info", "warning", "error")

_Event = MutableMapping[str, Any]


def configure(*, level: str = "info", form: str = "auto", stream: TextIO | None = None) -> None:
    """Send the logs of the whole process to `stream` (stderr by default), masked.

    `form` is `json`, `text` (lines for people), or `auto`: text on a terminal, else JSON.
    """
    out = sys.stderr if stream is None else stream
    for_people = form == "text" or (form == "auto" and out.isatty())
    before: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _exception_by_type,
    ]
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[_as_foreign, *before],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _for_people if for_people else structlog.processors.JSONRenderer(default=_opaque),
                _masked,
            ],
        )
    )
    structlog.configure(
        processors=[
            *before,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(_number(level)),
        cache_logger_on_first_use=False,
    )
    _take_over(handler, level)


def _take_over(handler: logging.Handler, level: str) -> None:
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(_number(level))
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    # A job that waits for the store would say so four times a second, and hide what matters.
    logging.getLogger("apscheduler").setLevel(logging.ERROR)
    # SECURITY: with raiseExceptions a record that cannot be rendered is printed raw, with its
    # arguments; the default hooks print the texts of vendor exceptions.
    logging.raiseExceptions = False
    logging.captureWarnings(capture=True)
    sys.excepthook = lambda _kind, error, _trace: _uncaught(error, "the process")
    threading.excepthook = lambda args: _uncaught(
        args.exc_value, args.thread.name if args.thread else "a thread"
    )
    sys.unraisablehook = lambda args: _uncaught(args.exc_value, "a finalizer")


def _uncaught(error: BaseException | None, where: str) -> None:
    if error is None or isinstance(error, SystemExit):
        return
    structlog.get_logger("keyturn").critical("uncaught", where=where, exc_info=error)


def _exception_by_type(_logger: Any, _method: str, event: _Event) -> _Event:
    """Replace exc_info by type, code and frames; see `masking.render_exception`."""
    found = event.pop("exc_info", None)
    event.pop("stack_info", None)
    if found is True:
        found = sys.exc_info()
    error = found[1] if isinstance(found, tuple) else found
    if isinstance(error, BaseException):
        event["exception"] = render_exception(error)
    return event


def _as_foreign(_logger: Any, _method: str, event: _Event) -> _Event:
    """Take the exception out of a stdlib record, or its formatter prints the vendor's text."""
    record = event.get("_record")
    if isinstance(record, logging.LogRecord):
        if record.exc_info:
            event["exc_info"] = record.exc_info
        record.exc_info = record.exc_text = record.stack_info = None
    return event


def _masked(_logger: Any, _method: str, rendered: Any) -> str:
    """Mask the finished line: whatever a renderer made of a value has been made by now."""
    return mask(str(rendered))


def _opaque(value: object) -> str:
    """Name the type of what is no JSON: a repr could hold anything."""
    return value.isoformat() if hasattr(value, "isoformat") else f"<{type(value).__name__}>"


def _for_people(_logger: Any, _method: str, event: _Event) -> str:
    """Write `time level event key=value…`, one line, with exceptions indented below."""
    when = str(event.pop("timestamp", ""))[11:23]
    level = str(event.pop("level", "")).upper()
    what = printable(str(event.pop("event", ""))).replace("\n", "\\n")
    below = event.pop("exception", None)
    event.pop("logger", None)
    pairs = " ".join(f"{key}={_value(value)}" for key, value in event.items())
    line = f"{when} {level:<8} {what} {pairs}".rstrip()
    if below is None:
        return line
    return line + "\n" + "\n".join(f"    {part}" for part in str(below).splitlines())


def _value(value: object) -> str:
    if isinstance(value, int | float) or value is None:
        return str(value)
    text = value if isinstance(value, str) else _opaque(value)
    text = printable(text).replace("\n", "\\n")
    return f'"{text}"' if " " in text or not text else text


def _number(level: str) -> int:
    return int(getattr(logging, level.upper()))
