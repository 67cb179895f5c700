"""One delivery: a POST with one deadline from the name's look-up to the answer's last byte.

Nothing is trusted that the configuration does not name: no proxy, no netrc, no redirect is followed.
A connection serves one delivery, so nothing of an earlier answer is left in it.
"""

from __future__ import annotations

import functools
import http.client
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

from keyturn import __version__
from keyturn.bounded import BoundedAnswer

DEADLINE = 10.0  # seconds for a delivery
LONGEST_ANSWER = 64 * 1024
LONGEST_PAUSE = timedelta(hours=1)  # that a receiver may ask for


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of a delivery. `status` is 0 where there was no answer, and `trouble` says why.

    `text` is the answer's beginning, for a person at a terminal only.
    """

    status: int = 0
    trouble: str = ""
    retry_after: timedelta | None = None
    seconds: float = 0.0
    text: str = ""

    @property
    def delivered(self) -> bool:
        """Whether the receiver has it."""
        return 200 <= self.status < 300

    @property
    def gone(self) -> bool:
        """Whether the receiver wants nothing ever again (Standard Webhooks, "410 Gone")."""
        return self.status == 410

    @property
    def refused(self) -> bool:
        """Whether it is this very message that the receiver does not want."""
        return 400 <= self.status < 500 and self.status not in _ABOUT_THE_WAY

    @property
    def words(self) -> str:
        """Say what came of it, in our words."""
        if self.trouble:
            return self.trouble
        return "redirect, not followed" if 300 <= self.status < 400 else f"HTTP {self.status}"


# Logins, addresses, time and load: the next message would meet the same.
_ABOUT_THE_WAY = frozenset({401, 403, 404, 405, 407, 408, 410, 421, 425, 429})


def deliver(
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    *,
    ca_file: Path | None = None,
    deadline: float = DEADLINE,
) -> Answer:
    """Send one message. Never raises for what a network or a receiver does."""
    began = time.monotonic()
    try:
        answer = _post(url, body, headers, ca_file, began + deadline)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Answer(trouble=_trouble(error), seconds=time.monotonic() - began)
    return answer


def _post(
    url: str, body: bytes, headers: Mapping[str, str], ca_file: Path | None, until: float
) -> Answer:
    began, parts = time.monotonic(), urlsplit(url)
    secure = parts.scheme == "https"
    host, port = parts.hostname or "", parts.port or (443 if secure else 80)
    line = http.client.HTTPConnection(host, port)
    line.response_class = functools.partial(BoundedAnswer, until=until)  # type: ignore[assignment]
    line.auto_open = 0
    try:
        line.sock = _connect(host, port, until)
        if secure:
            line.sock.settimeout(_left(until))
            line.sock = _context(ca_file).wrap_socket(line.sock, server_hostname=host)
        line.sock.settimeout(_left(until))
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        line.request("POST", path or "/", body=body, headers=_FIXED | dict(headers))
        found = line.getresponse()
        text = found.read(LONGEST_ANSWER)
        return Answer(
            status=found.status,
            retry_after=_retry_after(found.getheader("Retry-After")),
            seconds=time.monotonic() - began,
            text=text[:200].decode(errors="replace"),
        )
    finally:
        line.close()


_FIXED = {
    "Content-Type": "application/json",
    "User-Agent": f"keyturn/{__version__}",
    "Accept-Encoding": "identity",
    "Connection": "close",
}


def _connect(host: str, port: int, until: float) -> socket.socket:
    """Connect to the first address that answers; all of them share the deadline."""
    last: OSError | None = None
    for family, kind, protocol, _name, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM
    ):
        made = socket.socket(family, kind, protocol)
        try:
            made.settimeout(_left(until))
            made.connect(address)
        except OSError as error:
            made.close()
            last = error
        else:
            return made
    raise last or OSError("no address")


@functools.lru_cache(maxsize=1)
def _platform() -> ssl.SSLContext:
    return ssl.create_default_context()


def _context(ca_file: Path | None) -> ssl.SSLContext:
    """Trust the given authority alone, or those of this platform; read anew, it may be replaced."""
    return ssl.create_default_context(cafile=str(ca_file)) if ca_file else _platform()


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _retry_after(value: str | None) -> timedelta | None:
    """Read `Retry-After` (RFC 9110, 10.2.3), within what a receiver may ask for."""
    text = (value or "").strip()
    if not text or len(text) > 64:
        return None
    if text.isascii() and text.isdigit():
        return min(timedelta(seconds=int(text[:9])), LONGEST_PAUSE)
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return max(timedelta(0), min(at - datetime.now(UTC), LONGEST_PAUSE))


def _trouble(error: Exception) -> str:
    """Say what the network did, by the error's class; its text is never looked at."""
    for kinds, words in _WORDS:
        if isinstance(error, kinds):
            return words
    return "no answer"


_WORDS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (ssl.SSLCertVerificationError, "its certificate is not trusted"),
    (TimeoutError, "no whole answer in time"),
    (ssl.SSLError, "TLS failed"),
    (FileNotFoundError, "its ca_file cannot be read"),
    (socket.gaierror, "its name is unknown"),
    (ConnectionRefusedError, "refused: nothing listens there"),
    (ConnectionError, "the connection was cut"),
    ((http.client.HTTPException, ValueError), "an answer that is no HTTP"),
    (OSError, "no way leads there"),
)
