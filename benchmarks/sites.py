"""Where rotations are measured: a destination of ours, its peer, and how its requests are seen."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import requests

from keyturn.destinations.base import DestinationBase
from keyturn.testing import openbao
from peers import IN_FLIGHT, AwsPeer, AzurePeer, Peer, VaultPeer
from standins import stand_in

Watch = Callable[[list[str]], contextlib.AbstractContextManager[Any]]
NO_LIMIT = 99999.0  # writes a second


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One destination. `watch` writes each request into a list, by the words of its peer."""

    name: str
    kind: type[DestinationBase]
    options: Any
    peer: Callable[..., Peer]
    watch: Watch
    writes: frozenset[str]
    most_writes: int | None = None  # that a rotation may make
    stores: tuple[str, ...] = ("SQLite",)


@contextlib.contextmanager
def vault(folder: Path) -> Iterator[Site]:
    """A real OpenBao."""
    from keyturn.destinations.vault import VaultDestination, VaultOptions
    from keyturn.destinations.vault_auth import AuthOptions

    with openbao.dev_server(folder) as server:
        options = VaultOptions(
            address=server.address,
            auth=AuthOptions(method="token", token_file=str(server.token_file)),
            prefix="ours",
            parallel=IN_FLIGHT,
        )
        table = [
            ("get", re.compile(r"/v1/kv/data/[^?]+"), "read"),
            ("get", re.compile(r"/v1/kv/data/[^?]+\?version=[0-9]+"), "read old"),
            ("post", re.compile(r"/v1/kv/data/[^?]+"), "write"),
            ("post", re.compile(r"/v1/kv/delete/[^?]+"), "delete"),
        ]
        yield Site(
            name="OpenBao",
            kind=VaultDestination,
            options=options,
            peer=partial(VaultPeer, server),
            watch=partial(_of_requests, table),
            writes=frozenset({"write", "delete"}),
            stores=("SQLite", "PostgreSQL"),
        )


@contextlib.contextmanager
def aws(folder: Path) -> Iterator[Site]:
    """AWS Secrets Manager, as the stand-in plays it."""
    from keyturn.destinations.aws import AwsDestination, AwsOptions

    with stand_in("aws", folder) as found:
        connection = {**found["connection"]}
        del connection["type"]
        options = AwsOptions(
            **connection,
            prefix="ours",
            parallel=IN_FLIGHT,
            write_limit=f"{NO_LIMIT:.0f}/s",
            staleness="0s",  # or each rotation would wait for it
            versions_per_day=100_000,
        )
        yield Site(
            name="AWS",
            kind=AwsDestination,
            options=options,
            peer=partial(AwsPeer, found),
            watch=_of_botocore,
            writes=frozenset(
                {"put AWSPENDING", "move AWSCURRENT", "remove AWSPENDING", "remove AWSPREVIOUS"}
            ),
            most_writes=4,
        )


@contextlib.contextmanager
def azure(folder: Path) -> Iterator[Site]:
    """Azure Key Vault, as the stand-in plays it."""
    from keyturn.destinations.azure import AzureDestination, AzureOptions

    with stand_in("azure", folder) as found:
        options = AzureOptions(
            **found["connection"],
            prefix="ours",
            parallel=IN_FLIGHT,
            write_limit=f"{NO_LIMIT:.0f}/s",
        )
        table = [
            ("get", re.compile(r"/secrets/[^/?]+/?\?.*"), "get"),
            ("get", re.compile(r"/secrets/[^/?]+/versions\?.*"), "list"),
            ("get", re.compile(r"/secrets/[^/?]+/[0-9a-f]{32}\?.*"), "get version"),
            ("put", re.compile(r"/secrets/[^/?]+\?.*"), "set"),
            ("patch", re.compile(r"/secrets/[^/?]+/[0-9a-f]{32}\?.*"), "disable"),
        ]
        yield Site(
            name="Azure",
            kind=AzureDestination,
            options=options,
            peer=partial(AzurePeer, found),
            watch=partial(_of_requests, table),
            writes=frozenset({"set", "disable"}),
        )


SITES: Mapping[str, Callable[[Path], contextlib.AbstractContextManager[Site]]] = {
    "vault": vault,
    "aws": aws,
    "azure": azure,
}


def _of_requests(table: list[tuple[str, re.Pattern[str], str]], script: list[str]) -> Any:
    """See what leaves by a session of requests: hvac's, and the pipeline of Azure's SDK."""
    send = requests.Session.request

    def request(session: Any, method: str, url: str, *more: Any, **named: Any) -> Any:
        path = "/" + url.partition("//")[2].partition("/")[2]
        kinds = [k for verb, form, k in table if verb == method.lower() and form.fullmatch(path)]
        if len(kinds) != 1:
            raise SystemExit(f"a request that the peer cannot make: {method} {path}")
        script.extend(kinds)
        return send(session, method, url, *more, **named)

    return mock.patch.object(requests.Session, "request", request)


def _of_botocore(script: list[str]) -> Any:
    """See the operations of botocore's clients; versions are named by the label they had last."""
    from botocore.client import BaseClient

    labels: dict[str, str] = {}
    call = BaseClient._make_api_call  # noqa: SLF001 - there is no other place for all operations

    def make(client: Any, operation: str, asked: dict[str, Any]) -> Any:
        if operation == "DescribeSecret":
            script.append("describe")
            answer = call(client, operation, asked)
            for version, named in answer["VersionIdsToStages"].items():
                labels[version] = min(named)
            return answer
        if operation == "GetSecretValue":
            script.append(f"get {labels[asked['VersionId']]}")
        elif operation == "PutSecretValue":
            script.append(f"put {' '.join(asked['VersionStages'])}")
            labels[asked["ClientRequestToken"]] = asked["VersionStages"][0]
        elif operation == "UpdateSecretVersionStage":
            verb = "move" if "MoveToVersionId" in asked else "remove"
            script.append(f"{verb} {asked['VersionStage']}")
        else:
            raise SystemExit(f"a request that the peer cannot make: {operation}")
        return call(client, operation, asked)

    return mock.patch.object(BaseClient, "_make_api_call", make)
