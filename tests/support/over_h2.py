"""HTTP/2 without TLS, with whatever header fields a test wants: nothing of them is checked or mended."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
)

_ENDS = (StreamEnded, StreamReset, ConnectionTerminated)


def ask_h2(
    path: Path,
    fields: Sequence[tuple[str, str]],
    *,
    body: bytes = b"",
    trailers: Sequence[tuple[str, str]] = (),
) -> tuple[int, dict[str, str], bytes]:
    """Send one request to whoever serves a path; status 0 where the stream is thrown out unanswered."""
    config = H2Configuration(
        header_encoding="latin-1",
        validate_outbound_headers=False,
        normalize_outbound_headers=False,
        split_outbound_cookies=False,
    )
    line, status, headers, content = H2Connection(config), 0, {}, b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        one.settimeout(20)
        one.connect(str(path))
        line.initiate_connection()
        line.send_headers(1, list(fields), end_stream=not (body or trailers))
        if body:
            line.send_data(1, body, end_stream=not trailers)
        if trailers:
            line.send_headers(1, list(trailers), end_stream=True)
        one.sendall(line.data_to_send())
        while got := one.recv(65536):
            for event in line.receive_data(got):
                match event:
                    case ResponseReceived():
                        found = {str(name): str(value) for name, value in event.headers}
                        status, headers = int(found.pop(":status")), found
                    case DataReceived():
                        content += event.data
                if isinstance(event, _ENDS):
                    return status, headers, content
            one.sendall(line.data_to_send())
    return status, headers, content
