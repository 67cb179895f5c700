"""The shipped Envoy configuration: read by Envoy's own types, and its requests put to the verifier.

There is no Envoy in a package registry. What it would refuse is refused by the protobufs that it is
made of; what it sends is what its ext_authz filter documents: method and path of the request behind
`path_prefix`, `Host`, `Content-Length: 0`, and the headers that are allowed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from envoy.config.bootstrap.v3.bootstrap_pb2 import Bootstrap
from envoy.extensions.filters.http.ext_authz.v3.ext_authz_pb2 import ExtAuthz
from envoy.extensions.filters.http.router.v3 import router_pb2  # noqa: F401  # known to `Any`
from envoy.extensions.filters.network.http_connection_manager.v3.http_connection_manager_pb2 import (
    HttpConnectionManager,
)
from envoy.extensions.http.early_header_mutation.header_mutation.v3 import header_mutation_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2  # noqa: F401
from google.protobuf import json_format

from support.http_verifier import Served, basic, served
from support.over_unix import UnixConnection, ask

SHIPPED = Path(__file__).parents[2] / "deploy" / "envoy" / "envoy.yaml"
# As Envoy writes them where nothing else is allowed, and what a client may have sent besides.
SENT = {"content-length": "0", "x-envoy-internal": "true", "x-envoy-expected-rq-timeout-ms": "5000"}


def bootstrap() -> Bootstrap:
    """Read the file as Envoy does: a key that it does not know is an error."""
    return json_format.ParseDict(yaml.safe_load(SHIPPED.read_text()), Bootstrap())


def manager() -> HttpConnectionManager:
    """Return the listener's HTTP part."""
    found = HttpConnectionManager()
    (listener,) = bootstrap().static_resources.listeners
    assert listener.filter_chains[0].filters[0].typed_config.Unpack(found)
    return found


def ext_authz() -> ExtAuthz:
    """Return the filter that asks us."""
    found = ExtAuthz()
    assert manager().http_filters[0].typed_config.Unpack(found)
    return found


def test_envoy_knows_every_key() -> None:
    """Strictly, into the packed parts; a slip of the pen would be found."""
    assert bootstrap().static_resources.clusters[0].name == "keyturn_verifier"
    broken = SHIPPED.read_text().replace("failure_mode_allow:", "failure_mode_alow:")
    with pytest.raises(json_format.ParseError, match="failure_mode_alow"):
        json_format.ParseDict(yaml.safe_load(broken), Bootstrap())


def test_nobody_gets_through_because_nobody_can_tell() -> None:
    """Closed in error, and 503 then: an agent that hears 403 would take it for a refusal."""
    asked = ext_authz()
    assert not asked.failure_mode_allow
    assert asked.status_on_error.code == 503
    assert asked.http_service.path_prefix == "/v1/auth"
    clusters = {one.name: one for one in bootstrap().static_resources.clusters}
    assert asked.http_service.server_uri.cluster in clusters


def test_what_goes_where() -> None:
    """The verifier gets one header, the application the agent's id alone, the client its deadline."""
    asked = ext_authz()
    answer = asked.http_service.authorization_response

    def names(matcher: Any) -> set[str]:
        assert all(one.exact and one.ignore_case for one in matcher.patterns)
        return {one.exact for one in matcher.patterns}

    assert names(asked.allowed_headers) == {"authorization"}
    assert names(answer.allowed_upstream_headers) == {"keyturn-agent"}
    assert names(answer.allowed_client_headers) == {"www-authenticate", "retry-after"}
    assert names(answer.allowed_client_headers_on_success) == {"keyturn-deadline"}
    (host,) = manager().route_config.virtual_hosts
    assert list(host.request_headers_to_remove) == ["authorization"]


def test_nobody_names_himself() -> None:
    """Every header of ours is taken out before the filter, and twins with an underscore are refused."""
    found = manager()
    early = header_mutation_pb2.HeaderMutation()
    assert found.early_header_mutation_extensions[0].typed_config.Unpack(early)
    removed = {one.remove for one in early.mutations}
    said = {"agent", "login", "version", "state", "deadline", "caller-token"}
    assert removed == {f"keyturn-{name}" for name in said}
    options = found.common_http_protocol_options
    assert options.headers_with_underscores_action == options.REJECT_REQUEST


@pytest.fixture
def behind(tmp_path: Path) -> Iterator[tuple[Served, UnixConnection]]:
    """Give a verifier at a Unix socket, and a connection to it that is kept."""
    (tmp_path / "state").mkdir(mode=0o700)
    path = tmp_path / "v.sock"
    with (
        served(tmp_path / "state", ("a", "b"), path=path) as verifier,
        closing(UnixConnection(path)) as connection,
    ):
        yield verifier, connection


def test_the_verifier_answers_what_envoy_sends(behind: tuple[Served, UnixConnection]) -> None:
    """Any method, any path behind the prefix: 200 alone is a yes, and a no comes with its challenge."""
    verifier, connection = behind
    good, other = verifier.held
    prefix = ext_authz().http_service.path_prefix
    paths = ["/", "/x/y?a=1&b=%2F", "/a%20b", "/v1/verify", "//x", "/.well-known/x", "/%fc"]
    for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"):
        for path in paths:
            headers = {**SENT, "authorization": good.basic}
            status, found, body = ask(connection, prefix + path, method=method, headers=headers)
            assert (status, found["keyturn-agent"], body) == (200, "a", b""), (method, path)
    for headers in (
        SENT,
        {**SENT, "authorization": basic("a", other.secret.reveal())},
        {**SENT, "authorization": "Bearer x"},
    ):
        status, found, body = ask(connection, prefix + "/x", headers=headers)
        assert (status, body) == (401, b"")
        assert found["www-authenticate"].startswith("Basic ")
        assert not any(name.startswith("keyturn") for name in found)
    bearer = {**SENT, "authorization": f"Bearer {good.secret.reveal()}"}
    assert ask(connection, prefix + "/x", headers=bearer)[0] == 200
    assert len(verifier.server.registry) == 1  # one connection for all of it
