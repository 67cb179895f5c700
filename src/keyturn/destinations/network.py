"""What the network does to a request: one deadline for the whole answer, and words for what went wrong.

`timeout` of requests and urllib3 counts from one piece of an answer to the next, so a server that
drips a byte at a time keeps a call for ever, and with it a thread and whatever lock it holds. Here
time is counted from the request to the answer's last byte. (Connecting, the TLS handshake and sending
have each a deadline as a whole already: Python counts those from their beginning.)

Nothing of an error's text is ever looked at: its class, its number and where it stands in the chain.
"""

from __future__ import annotations

import errno
import functools
import http.client
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import (
    ConnectTimeoutError,
    NameResolutionError,
    NewConnectionError,
    ReadTimeoutError,
)

from keyturn.bounded import BoundedAnswer

_LONGEST_CHAIN = 20


class _Timed:
    """What both connections get: the time for an answer counts from its request."""

    timeout: float | None
    response_class: Any

    def request(self, *more: Any, **named: Any) -> None:
        """Send a request."""
        if self.timeout is not None:
            until = time.monotonic() + self.timeout
            self.response_class = functools.partial(BoundedAnswer, until=until)
        super().request(*more, **named)  # type: ignore[misc]


class _Plain(_Timed, HTTPConnection):
    pass


class _Secure(_Timed, HTTPSConnection):
    def connect(self) -> None:
        try:
            super().connect()
        except ssl.SSLCertVerificationError:
            raise
        except ssl.SSLError as error:
            raise Unencrypted(*error.args) from error


class Unencrypted(ssl.SSLError):
    """The handshake failed, so nothing was sent; any other TLS error may come after a request."""


class _PlainPool(HTTPConnectionPool):
    ConnectionCls = _Plain


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _Secure


POOLS = {"http": _PlainPool, "https": _SecurePool}  # for whatever stands on urllib3


class BoundedAdapter(HTTPAdapter):
    """Carries a session's requests: the read timeout is one of the whole answer."""

    def init_poolmanager(self, *more: Any, **named: Any) -> None:
        """Make the pools."""
        super().init_poolmanager(*more, **named)
        self.poolmanager.pool_classes_by_scheme = POOLS


class Trouble(NamedTuple):
    """What happened, in our words, what to look at, and whether a request may have been sent."""

    what: str
    hint: str
    sent: bool


def trouble(error: BaseException) -> Trouble | None:
    """Say what the network did, by the errors that an error holds; None where that is not known."""
    chain = list(_chain(error))
    found = next(filter(None, map(_handshake, chain)), None)
    found = found or next(filter(None, map(_connecting, chain)), None)
    if found is None and any(isinstance(one, NewConnectionError) for one in chain):
        found = Trouble("no connection", "see whether it is up and reachable", sent=False)
    return found or next(filter(None, map(_answering, chain)), None)


def _handshake(error: BaseException) -> Trouble | None:
    if isinstance(error, ssl.SSLCertVerificationError):
        hint = "check ca_file, the name in the address and whether the certificate has run out"
        return Trouble("its certificate is not trusted", hint, sent=False)
    if isinstance(error, Unencrypted):
        hint = "check ca_file, and that the server speaks TLS at that port"
        return Trouble("the TLS handshake failed", hint, sent=False)
    return None


def _connecting(error: BaseException) -> Trouble | None:
    if isinstance(error, NameResolutionError | socket.gaierror):
        return Trouble("its name is unknown", "check the name, and this host's DNS", sent=False)
    if isinstance(error, ConnectionRefusedError):
        return Trouble("refused", "nothing listens there: is it up, is the port right?", sent=False)
    late = isinstance(error, ConnectTimeoutError) and not isinstance(error, NewConnectionError)
    if late or isinstance(error, requests.exceptions.ConnectTimeout):
        hint = "see whether it is up, and what firewalls lie between"
        return Trouble("no connection in time", hint, sent=False)
    if isinstance(error, OSError) and error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        return Trouble("no way leads there", "check the address and this host's routes", sent=False)
    return None


def _answering(error: BaseException) -> Trouble | None:
    hint = "see whether it is overloaded; the rotation goes on by itself"
    if isinstance(error, requests.exceptions.ReadTimeout | ReadTimeoutError | TimeoutError):
        return Trouble("no whole answer in time", hint, sent=True)
    if isinstance(error, ssl.SSLError):
        return Trouble("TLS failed after the request was sent", hint, sent=True)
    if isinstance(error, ConnectionError | http.client.HTTPException):
        return Trouble("the connection was cut", hint, sent=True)
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that it holds: vendors wrap each other's in several ways."""
    waiting: list[Any] = [error]
    met: set[int] = set()  # each once: the same one is held as argument, cause and context
    while waiting and len(met) < _LONGEST_CHAIN:
        one = waiting.pop(0)
        if id(one) in met:
            continue
        met.add(id(one))
        yield one
        inside = (
            getattr(one, "reason", None),  # urllib3
            getattr(one, "inner_exception", None),  # azure-core
            (getattr(one, "kwargs", None) or {}).get("error"),  # botocore
            *one.args,
            one.__cause__,
            one.__context__,
        )
        waiting += [other for other in inside if isinstance(other, BaseException)]
