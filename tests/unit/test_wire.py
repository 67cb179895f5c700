"""One line, one request, one exact form."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given, strategies

from keyturn.daemon import wire
from keyturn.errors import UnknownAgent


def test_a_request_comes_back_as_it_was_written() -> None:
    """The client's line is what the server reads."""
    request = wire.parse_request(wire.request_line("rotate", {"agents": ["ä"]}, "alice"))
    assert (request.command, request.args, request.claimed_by) == (
        "rotate",
        {"agents": ["ä"]},
        "alice",
    )


NOT_REQUESTS = [
    b"",
    b"GET / HTTP/1.1\r",
    b"POST /rotate HTTP/1.1\r",
    b"\x16\x03\x01\x02\x00",
    b"null",
    b"[]",
    b'"status"',
    b"{}",
    b'{"command":"status"}',
    b'{"args":{}}',
    b'{"command":1,"args":{}}',
    b'{"command":"status","args":[]}',
    b'{"command":"status","args":{},"extra":1}',
    b'{"command":"status","args":{},"claimed_by":7}',
    b'{"command":"status","command":"revoke","args":{}}',
    b'{"command":"status","args":{"a":1,"a":2}}',
    b'{"command":"status","args":{"a":NaN}}',
    b'{"command":"status","args":{"a":-Infinity}}',
    b'{"command":"sta\\ntus","args":{}}',
    b'{"command":"status","args":{},"claimed_by":"a\\u001b[2J"}',
    b'{"command":"status","args":{},"claimed_by":"' + b"a" * 65 + b'"}',
    b'{"command":"status","args":{}} {}',
    b'{"command":"status","args":{},"x":' + b"[" * 60_000,
    b'{"command":"status","args":{"a":' + b'{"a":' * 10_000,
    b'{"command":"st\xff","args":{}}',
    '{"command":"status","args":{}}'.encode("utf-16"),
]


@pytest.mark.parametrize("line", NOT_REQUESTS, ids=lambda line: repr(line[:40]))
def test_anything_else_is_no_request(line: bytes) -> None:
    """Other forms raise one error, whatever is wrong with them."""
    with pytest.raises(wire.NotARequest):
        wire.parse_request(line)


@given(strategies.binary(max_size=200))
def test_random_bytes_never_break_the_reader(line: bytes) -> None:
    """Bytes are a request or NotARequest, never another exception."""
    with contextlib.suppress(wire.NotARequest):
        wire.parse_request(line)


def test_what_is_no_text_is_replaced() -> None:
    """JSON can spell half a character, which no file, row or hash can hold; whole ones stay."""
    line = rb'{"command": "revoke", "args": {"reason": "a\ud800b \ud83d\ude00", "x": [{"y": "\udcfc"}]}}'

    assert wire.parse_request(line).args == {"reason": "a?b \N{GRINNING FACE}", "x": [{"y": "?"}]}


def test_an_error_carries_code_hint_and_exit_code() -> None:
    """The one table from our errors to what the caller gets."""
    line = json.loads(wire.error_line(UnknownAgent("no agent x")))
    assert line == {
        "ok": False,
        "error": {
            "code": "unknown-agent",
            "message": "no agent x",
            "hint": UnknownAgent.default_hint,
            "exit_code": 1,
        },
    }


def test_an_answer_is_one_line() -> None:
    """A line break in a result stays inside its JSON string."""
    assert wire.result_line({"text": "a\nb\u2028c"}).count(b"\n") == 1
