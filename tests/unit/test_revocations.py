"""The revocations file: what is applied, what is refused, what is never echoed."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyturn.core.revocations import (
    RevocationEntry,
    RevocationProblem,
    parse_line,
    parse_revocations,
)
from keyturn.core.secret import mint

NOW = datetime(2026, 3, 2, 12, tzinfo=UTC)
AT = "at=2026-03-01T10:00:00Z"


def read(
    text: str,
) -> tuple[tuple[RevocationEntry, ...], tuple[RevocationProblem, ...]]:
    """Parse a text as the file of today."""
    return parse_revocations(text.encode(), now=NOW)


def test_lines_are_read_with_every_part() -> None:
    """Target, time, reissue and reason come out as they were written; the rest is skipped."""
    entries, problems = read(
        f"# leaked in INC-1\n\nagent:billing-bot {AT} reissue INC-4711 on a wiki\n"
        "version:v7Q2xxxxxxxxxx at=2026-03-01T12:00:00.5+02:00 reissued by hand\n"
    )
    assert problems == ()
    first, second = entries
    assert (first.agent, first.version_id, first.reissue, first.line) == (
        "billing-bot",
        None,
        True,
        3,
    )
    assert first.at == datetime(2026, 3, 1, 10, tzinfo=UTC)
    assert first.reason == "INC-4711 on a wiki"
    assert (second.target, second.reissue, second.reason) == (
        "version:v7Q2xxxxxxxxxx",
        False,
        "reissued by hand",
    )
    assert second.at == datetime(2026, 3, 1, 10, 0, 0, 500_000, tzinfo=UTC)


def test_every_byte_prefix_of_a_save_names_no_wrong_target() -> None:
    """Wherever a save of 50 lines is cut off, only whole lines of it are applied."""
    draw = random.Random(11)
    lines = [
        f"agent:a{'b' * draw.randrange(1, 9)}{n}{'-x' * draw.randrange(3)} {AT}"
        f"{' reissue' * draw.randrange(2)}{' because' * draw.randrange(2)}"
        for n in range(50)
    ]
    data = "".join(f"{line}\n" for line in lines).encode()
    whole, problems = parse_revocations(data, now=NOW)
    assert (len(whole), problems) == (50, ())
    for cut in range(len(data) + 1):
        entries, _ = parse_revocations(data[:cut], now=NOW)
        assert entries == whole[: data[:cut].count(b"\n")]


def test_a_line_without_newline_is_reported_and_not_applied() -> None:
    """What has no newline is half-written: a problem with its number, no entry."""
    entries, problems = read(f"agent:one {AT}\nagent:two {AT}")
    assert [entry.agent for entry in entries] == ["one"]
    assert [(problem.line, problem.text) for problem in problems] == [
        (2, "the last line has no newline: not applied")
    ]


def test_a_future_time_is_refused() -> None:
    """A time after now is refused; now itself is not."""
    entries, problems = read(
        "agent:one at=2026-03-02T12:00:01Z\nagent:two at=2026-03-02T12:00:00Z\n"
    )
    assert [entry.agent for entry in entries] == ["two"]
    assert problems[0].line == 1
    assert "future" in problems[0].text


@pytest.mark.parametrize("form", ["{}", "version:{}", "agent:{}"])
def test_a_pasted_secret_is_revoked_by_its_id_and_never_echoed(form: str) -> None:
    """Somebody pastes the leak itself: its version is revoked and no random digit gets out."""
    version_id, secret = mint(random_bytes=random.Random(3).randbytes)
    entries, problems = read(
        f"{form.format(secret.reveal())} {AT} reissue found {secret.reveal()}\n"
    )
    assert problems == ()
    assert (entries[0].version_id, entries[0].reissue) == (version_id, True)
    assert secret.reveal()[18:] not in repr(entries)


@pytest.mark.parametrize(
    "line",
    [
        "CANARY", f"CANARY {AT}", "agent:bot", "agent:bot CANARY", "agent:bot at=CANARY", f"agent:CANARY {AT}",
        f"version:CANARY {AT}", f"agent:../canary {AT}", f"agents:bot {AT} CANARY", "agent:bot at=2026-03-01",
        "agent:bot at=2026-03-01T10:00:00", "agent:bot at=2026-02-30T10:00:00Z", f"agent: {AT}",
        "agent:bot at=0001-01-01T00:00:00+23:59", f"agent:a..b {AT}",
    ],
)  # fmt: skip
def test_a_wrong_line_is_named_by_number_and_never_quoted(line: str) -> None:
    """A broken line says its number and the form, hides nothing else, and quotes nothing."""
    entries, problems = read(f"agent:one {AT}\n{line}\nagent:two {AT}\n")
    assert [entry.agent for entry in entries] == ["one", "two"]
    assert [problem.line for problem in problems] == [2]
    assert "canary" not in repr(problems).lower()


@given(st.binary(max_size=200))
def test_any_bytes_are_answered(data: bytes) -> None:
    """Garbage never raises, and never yields more entries than it has lines."""
    entries, _ = parse_revocations(data, now=NOW)
    assert len(entries) <= data.count(b"\n")


def test_reasons_are_printable_and_short() -> None:
    """Control characters and endless reasons stay out of logs and audit."""
    entry = parse_line(f"agent:bot {AT} a\x1b[31mb {'x' * 900}", number=1, now=None)
    assert entry is not None
    assert entry.reason.startswith("a?[31mb x")
    assert len(entry.reason) == 200
    assert NOW - entry.at == timedelta(hours=26)


def test_an_entry_is_the_same_wherever_its_line_stands() -> None:
    """Taking an old line out of the file makes no other one new: none is applied a second time."""
    line = f"agent:one {AT} reissue why\n"
    (alone,), (_, below) = read(line)[0], read(f"agent:two {AT}\n{line}")[0]

    assert {alone} == {below}
