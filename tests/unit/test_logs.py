"""The logs of the whole process: form, level, silence of vendors, and no canary."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from keyturn.core.secret import mint
from keyturn.daemon import logs
from keyturn.errors import Denied

_, SECRET = mint(random_bytes=os.urandom)
CANARY = SECRET.reveal()
RANDOM_PART = CANARY.split("_")[2]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Logging is one per process: what was there before comes back."""
    root = logging.getLogger()
    kept = (root.handlers[:], root.level, logging.raiseExceptions)
    hooks = (sys.excepthook, threading.excepthook, sys.unraisablehook)
    yield
    root.handlers[:], logging.raiseExceptions = kept[0], kept[2]
    root.setLevel(kept[1])
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


def configured(**options: Any) -> io.StringIO:
    """Configure to a buffer."""
    out = io.StringIO()
    logs.configure(stream=out, **options)
    return out


def only_line(out: io.StringIO) -> dict[str, Any]:
    """Return the one JSON line that was written."""
    (line,) = out.getvalue().splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def test_json_has_time_level_name_and_event() -> None:
    """A line is one JSON object with the usual fields."""
    out = configured()
    structlog.get_logger("keyturn.x").info("rotation.done", agent="billing", seconds=1.5)
    line = only_line(out)
    assert line["event"] == "rotation.done"
    assert line["level"] == "info"
    assert line["logger"] == "keyturn.x"
    assert line["agent"] == "billing"
    assert line["timestamp"].endswith("Z")


def test_a_job_that_waits_for_the_store_is_no_line_of_the_log() -> None:
    """A locked store is told once, as `store.unavailable`, and not four times a second as well."""
    out = configured()
    logging.getLogger("apscheduler.scheduler").warning("Execution of job skipped")
    assert out.getvalue() == ""


def test_stdlib_records_take_the_same_way() -> None:
    """A record of the standard library becomes the same JSON."""
    out = configured()
    logging.getLogger("some.library").warning("%s went %s", "it", "wrong")
    line = only_line(out)
    assert (line["event"], line["logger"], line["level"]) == (
        "it went wrong",
        "some.library",
        "warning",
    )


@pytest.mark.parametrize("level", logs.LEVELS)
def test_the_level_holds_for_both(level: str) -> None:
    """Nothing below the level is written, by structlog or by the standard library."""
    out = configured(level=level)
    for name in logs.LEVELS:
        getattr(structlog.get_logger("a"), name)(f"s-{name}")
        getattr(logging.getLogger("b"), name)(f"l-{name}")
    expected = logs.LEVELS[logs.LEVELS.index(level) :]
    events = [json.loads(line)["event"] for line in out.getvalue().splitlines()]
    assert events == [f"{kind}-{name}" for name in expected for kind in "sl"]


@pytest.mark.parametrize("name", logs.QUIET)
def test_vendors_stay_at_warning(name: str) -> None:
    """At level debug the SDKs still write warnings only: they log requests and parameters."""
    out = configured(level="debug")
    logging.getLogger(f"{name}.connection").info("sent %s", CANARY)
    assert out.getvalue() == ""
    logging.getLogger(f"{name}.connection").warning("short")
    assert only_line(out)["event"] == "short"


class Talkative:
    """An object whose repr quotes a payload."""

    def __repr__(self) -> str:
        return f"Talkative({CANARY})"

    __str__ = __repr__


class VendorError(Exception):
    """Quotes what was sent."""


def log_the_canary_every_way() -> None:
    """Put the canary into every place of a log call."""
    ours, theirs = structlog.get_logger("ours"), logging.getLogger("theirs")
    ours.info(f"event {CANARY}", field=CANARY, **{CANARY: "as a key"})
    ours.info("nested", deep={"a": [CANARY, {"b": CANARY.encode()}], "c": Talkative()})
    theirs.info("args %s %r", CANARY, Talkative())
    theirs.info("extra", extra={"payload": CANARY})
    try:
        try:
            int(CANARY)
        except ValueError as error:
            raise VendorError(f"quoted {CANARY}") from error
    except VendorError as error:
        local_copy = CANARY
        ours.exception("failed")
        ours.error("failed", exc_info=error)
        theirs.exception("failed %s", local_copy)
        theirs.error("failed", exc_info=error, stack_info=True)
    try:
        raise Denied(f"ours, with {CANARY}")
    except Denied:
        ours.exception("failed")
    theirs.info("too few %s %s", CANARY)
    warnings.warn(f"warned of {CANARY}", stacklevel=1)


@pytest.mark.parametrize("form", ["json", "text"])
def test_no_canary_in_any_line(
    form: str, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    """Wherever a secret stands in a log call, exceptions included, its random part is not written."""
    out = configured(level="debug", form=form)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        log_the_canary_every_way()
    text = out.getvalue() + "".join(capfd.readouterr())
    assert text.count("VendorError") >= 4
    assert "quoted" not in text
    assert RANDOM_PART[:6] not in text
    assert "local_copy" not in text


def test_hooks_render_what_nobody_caught() -> None:
    """An exception that ends a thread or the process is logged by type, not printed with its text."""
    out = configured()
    thread = threading.Thread(target=_fail, name="worker-1")
    thread.start()
    thread.join()
    assert RANDOM_PART not in out.getvalue()
    assert only_line(out)["where"] == "worker-1"
    assert "VendorError" in only_line(out)["exception"]


def _fail() -> None:
    raise VendorError(CANARY)


def test_the_end_of_a_process_prints_no_message() -> None:
    """A whole process that dies of a vendor's exception leaves no canary on its output."""
    code = (
        "import sys; from keyturn.daemon import logs; logs.configure();"
        "canary = sys.stdin.read(); raise OSError(5, canary)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=CANARY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "OSError[5]" in done.stderr
    assert RANDOM_PART not in done.stdout + done.stderr


def test_for_people_one_event_is_one_line() -> None:
    """A line break or an escape sequence in a field cannot forge another line."""
    out = configured(form="text")
    structlog.get_logger("x").info("done", reason="a\nINFO forged\x1b[31m", agent="b c")
    (line,) = out.getvalue().splitlines()
    assert "\\nINFO forged\\x1b[31m" in line
    assert 'agent="b c"' in line


def test_bound_context_is_written() -> None:
    """What was bound for a rotation stands in every line of it."""
    out = configured()
    with structlog.contextvars.bound_contextvars(rotation="r1"):
        structlog.get_logger("x").info("step")
    assert only_line(out)["rotation"] == "r1"
