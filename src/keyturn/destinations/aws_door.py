"""The one place from which requests to AWS leave: clients of boto3 that trust nothing around them.

No environment, no `~/.aws`, no proxy, no redirect, no retry of the SDK's own, answers of a bounded
size. The SDK reads a shortened answer as a whole one and logs bodies at DEBUG: both are closed here.
Sources: the botocore documentation (configuration, events) and its source, of version 1.44.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import boto3.session
import botocore.session
from botocore import UNSIGNED
from botocore.awsrequest import AWSResponse
from botocore.config import Config
from botocore.configprovider import BOTOCORE_DEFAUT_SESSION_VARIABLES, ConstantProvider
from botocore.credentials import Credentials, ReadOnlyCredentials
from botocore.httpsession import URLLib3Session
from botocore.loaders import Loader

from keyturn.destinations.network import POOLS
from keyturn.errors import DestinationUnavailable

ANSWER_LIMIT = 1024 * 1024
_CHUNK = 65536
_LOADER = Loader(
    # SECURITY: by default it looks into ~/.aws/models first, and a model says where to connect to.
    extra_search_paths=[Loader.BUILTIN_DATA_PATH],
    include_default_search_paths=False,
)
# What every session would take from the environment or from ~/.aws, and what it gets instead.
_SETTINGS: dict[str, Any] = {
    "config_file": None,
    "credentials_file": None,
    "ec2_metadata_v1_disabled": True,
    "ignore_configured_endpoint_urls": True,
    "account_id_endpoint_mode": "disabled",
    "sts_regional_endpoints": "regional",
    "max_attempts": 1,
}

# SECURITY: at DEBUG these write what is sent and what is answered, secrets and all.
for _name in ("botocore", "boto3"):
    logging.getLogger(_name).setLevel(logging.WARNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Credentials as the service gives them; `ends_at` in seconds of the monotonic clock."""

    access: str
    secret: str = field(repr=False)
    token: str | None = field(default=None, repr=False)
    ends_at: float | None = None

    def frozen(self) -> ReadOnlyCredentials:
        """Return them in the SDK's form."""
        return ReadOnlyCredentials(self.access, self.secret, self.token)


class Door:
    """Makes clients for one connection. Thread-safe."""

    def __init__(
        self, *, region: str, ca_file: str | None, timeout: timedelta, parallel: int
    ) -> None:
        seconds = timeout.total_seconds()
        self._region = region
        self._guard = threading.Lock()
        self._config = Config(
            retries={"mode": "standard", "total_max_attempts": 1},  # the saga tries again
            proxies={},
            ignore_configured_endpoint_urls=True,
            connect_timeout=seconds,
            read_timeout=seconds,
            max_pool_connections=parallel,
        )
        self._http = URLLib3Session(
            verify=ca_file or True,
            proxies={},
            timeout=(seconds, seconds),
            max_pool_connections=parallel,
            # As the SDK sets it: without it each request waits for an acknowledgement, 40 ms.
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        )
        # A server that drips would keep a thread for ever: the time is one of the whole answer. The
        # SDK's own pools differ from urllib3's in `Expect: 100-continue` alone, which S3 needs.
        self._http._manager.pool_classes_by_scheme = POOLS  # noqa: SLF001

    def client(self, service: str, *, endpoint: str | None, keys: Callable[[], Keys] | None) -> Any:
        """Return a client that signs with what `keys` gives at each call; None: it signs nothing."""
        with self._guard:  # the SDK makes clients in one thread at a time
            core = _bare_session()
            signing = _Signing(keys) if keys is not None else None
            core.register_component("credential_provider", _Provider(signing))
            config = self._config
            if signing is None:
                config = config.merge(Config(signature_version=UNSIGNED))
            made = boto3.session.Session(botocore_session=core).client(
                service, region_name=self._region, endpoint_url=endpoint, config=config
            )
        made.meta.events.register("before-send", self._send)
        return made

    def close(self) -> None:
        """Give the connections back."""
        self._http.close()

    def _send(self, request: Any, **_more: Any) -> AWSResponse:
        """Send it in the SDK's place, and read no more than an answer may weigh."""
        request.stream_output = True
        answer = self._http.send(request)
        try:
            body = _read(answer.raw, answer.headers.get("Content-Length"))
        finally:
            answer.raw.close()
        return AWSResponse(answer.url, answer.status_code, answer.headers, _Whole(body))


def _read(raw: Any, length: str | None) -> bytes:
    body = bytearray()
    for chunk in raw.stream(_CHUNK):
        body += chunk
        if len(body) > ANSWER_LIMIT:
            raise DestinationUnavailable("the answer is larger than 1 MiB")
    if length is not None and length.isdecimal() and int(length) != len(body):
        raise DestinationUnavailable("the answer was cut short")
    return bytes(body)


class _Whole:
    """A body that has been read already, in the form that the SDK asks for."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def stream(self) -> Iterator[bytes]:
        yield self._body


class _Signing(Credentials):  # type: ignore[misc]
    """Credentials that are asked for at each signature."""

    def __init__(self, keys: Callable[[], Keys]) -> None:
        super().__init__("by-keyturn", "by-keyturn", method="keyturn")
        self._keys = keys

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        """Return what signs the next request."""
        return self._keys().frozen()


class _Provider:
    """Stands where the SDK would search environment, files, programs and metadata services."""

    def __init__(self, found: Credentials | None) -> None:
        self._found = found

    def load_credentials(self) -> Credentials | None:
        return self._found


def _bare_session() -> Any:
    """Return a session of botocore for which there is no environment and no file."""
    core = botocore.session.Session()
    core.register_component("data_loader", _LOADER)
    store = core.get_component("config_store")
    for name, (_, _, default, _) in BOTOCORE_DEFAUT_SESSION_VARIABLES.items():
        value = _SETTINGS.get(name, default)
        store.set_config_provider(name, ConstantProvider(value))
    return core
