"""The JSON schema and the loader: what the schema refuses, the loader refuses too."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator

from keyturn import config
from keyturn.cli.init import render
from keyturn.config.schema import TYPES, schema
from keyturn.config.shape import Section
from keyturn.destinations import registry
from keyturn.errors import ConfigError

ROOT = Path(__file__).parents[2]
ADAPTER = functools.cache(registry.load)  # the look through what is installed is slow
WHOLE = Draft7Validator(schema())
AGENTS = Draft7Validator(schema(agents_only=True))

GOOD = """
version: 1
store: {url: "postgresql://keyturn@db/keyturn?sslmode=verify-full", password_file: /etc/pw}
log: {level: debug, format: json}
verifier: {lease: 30s, poll: 250ms}
admin: {socket: /run/x.sock, groups: {view: v, respond: r, admin: a}}
reload: {on_change: true}
connections:
  eu: {type: vault, address: "https://vault.eu:8200", namespace: platform, mount: kv, prefix: agents,
       auth: {method: kubernetes, role: keyturn}, ca_file: /ca.pem, write_limit: 20/s, parallel: 4}
  aws: {type: aws, region: eu-west-1, account: "111122223333", tags: {team: x}, staleness: 30s,
        role_arn: "arn:aws:iam::111122223333:role/keyturn", auth: {method: keys, file: /keys}}
  az: {type: azure, vault: "https://x.vault.azure.net", expires_after: 90d, not_before: true,
       auth: {method: client-secret, tenant_id: t, client_id: c, secret_file: /s}}
  files: {type: file, root: /srv/agents, group: agents, mode: "0640", call_deadline: 2s}
policies:
  default: {every: 30d, jitter: 10%, grace: 48h, consumer_cache: 24h, max_age: 90d,
            first_rotation: after-first-use, retire: disable, window: "Mon-Fri 02:00-05:00",
            retry: {first: 2s, max: 15m, settle_after: 5m}}
  slots: {extends: default, cron: "0 3 * * tue", zone: Europe/Berlin, max_age: {after: 90d, mode: alert}}
  still: {every: manual, max_age: none}
revocations_file: /etc/keyturn/revocations
revocations: ["agent:x at=2026-01-01T00:00:00Z"]
agents:
  billing-bot:
    login: billing-bot@acme
    owner: team-billing
    policy: slots
    destinations:
      - {to: eu, path: billing, keys: {id: client_id, secret: client_secret}, merge: true}
      - {to: files, path: a/b, adopt: true}
"""
# Each a place, a value, and what is wrong with it; all of them an editor can show.
BAD: list[tuple[tuple[str | int, ...], Any]] = [
    (("version",), 2), (("version",), "1"), (("version",), True), (("agnets",), {}), (("include",), ["a"]),
    (("store", "url"), 5), (("store", "password"), "x"), (("log", "level"), "loud"),
    (("verifier", "lease"), 30), (("verifier", "lease"), "30 s"), (("reload", "on_change"), "yes"),
    (("admin", "socket"), "run/x"), (("admin", "groups", "view"), "a b"),
    (("connections", "EU"), {"type": "file", "root": "/x"}), (("connections", "x"), {"root": "/x"}),
    (("connections", "eu", "adress"), "x"), (("connections", "eu", "auth"), "token"),
    (("connections", "eu", "parallel"), 65), (("connections", "eu", "auth", "method"), "ldap"),
    (("connections", "eu", "write_limit"), 20), (("connections", "az", "not_before"), "no"),
    (("connections", "aws", "account"), "1111"), (("connections", "aws", "tags"), {"a": 1}),
    (("connections", "files", "call_deadline"), "1x"), (("connections", "files", "root"), "srv"),
    (("policies", "default", "every"), "monthly"), (("policies", "default", "cron"), "0 3 * * tue"),
    (("policies", "default", "retire"), "burn"), (("policies", "slots", "cron"), "daily"),
    (("policies", "default", "retry", "first"), 2), (("policies", "default", "max_age"), {"mode": "alert"}),
    (("revocations",), "agent:x"), (("agents", "Bot"), {"destinations": [{"to": "eu", "path": "x"}]}),
    (("agents", "billing-bot", "destinations"), []), (("agents", "billing-bot", "login"), "a:b"),
    (("agents", "billing-bot", "destinations", 0, "path"), "../x"),
    (("agents", "billing-bot", "destinations", 0, "merge"), 1),
    (("agents", "billing-bot", "destinations", 0, "keys", "id"), "a b"),
    (("agents", "billing-bot", "destinations", 0), {"to": "eu"}),
]  # fmt: skip


def with_value(place: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """Return the good file with one value in another's place."""
    whole = copy.deepcopy(yaml.safe_load(GOOD))
    at = whole
    for part in place[:-1]:
        at = at[part]
    at[place[-1]] = value
    return dict(whole)


def loads(folder: Path, content: Any) -> bool:
    """Tell whether the loader takes a content."""
    path = folder / "k.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    try:
        config.load(path, environ={}, adapter=ADAPTER)
    except ConfigError:
        return False
    return True


def test_the_copy_in_the_documents_is_what_the_models_say() -> None:
    """Make it anew after a change of a model: `make docs`."""
    kept = json.loads((ROOT / "docs/reference/keyturn.schema.json").read_text())
    assert kept == schema()
    for one in (WHOLE, AGENTS):
        Draft7Validator.check_schema(one.schema)


def test_a_good_file_is_good_for_both(tmp_path: Path) -> None:
    """With every section and every kind of destination in it."""
    content = yaml.safe_load(GOOD)
    assert [error.message for error in WHOLE.iter_errors(content)] == []
    assert loads(tmp_path, content)
    assert AGENTS.is_valid({"version": 1, "agents": content["agents"]})
    assert not AGENTS.is_valid({"agents": {}, "store": {}})
    assert not AGENTS.is_valid({"version": 1})


@pytest.mark.parametrize(("place", "value"), BAD, ids=lambda one: str(one)[:40])
def test_what_the_schema_refuses_the_loader_refuses(
    tmp_path: Path, place: tuple[str | int, ...], value: Any
) -> None:
    """Faults that an editor underlines are faults indeed, and at their place."""
    content = with_value(place, value)
    errors = list(WHOLE.iter_errors(content))
    assert errors
    assert not loads(tmp_path, content)
    paths = [tuple(error.absolute_path) for error in errors]
    assert any(path[: len(place)] == place[: len(path)] for path in paths), paths


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 200), st.floats(0, 99).map(lambda x: round(x, 1)),
    st.sampled_from([
        "", "30d", "0s", "1h30m", "manual", "none", "10%", "5/s", "x", "/x", "a b", "a:b", "UTC",
        "0 3 * * tue", "Mon-Fri 02:00-05:00", "https://x", "http://localhost:1", "eu-west-1", "0640",
        "disable", "token", "kubernetes", "instance", "debug", "111122223333", "default", "file", "1",
        "sqlite:////x", "*.yaml", "agent:x at=2026-01-01T00:00:00Z", "\u00e4", "x/../y", "A", "alert",
    ]),
    st.just([]), st.just({}), st.just(["x"]), st.just({"after": "90d"}), st.just({"method": "instance"}),
)  # fmt: skip


def places(content: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the place of every value."""
    inner = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in inner if isinstance(content, dict | list) else ():
        yield (*at, key)
        if isinstance(value, dict | list):
            yield from places(value, (*at, key))


KNOWN = [registry.load(kind).Options for kind in TYPES] + Section.__subclasses__()
KEYS = sorted({key for model in KNOWN for key in model.model_fields})
PLACES = sorted(places(yaml.safe_load(GOOD)), key=str)


@st.composite
def contents(draw: st.DrawFn) -> dict[str, Any]:
    """Return the good file with some values changed, added or taken away."""
    whole = copy.deepcopy(yaml.safe_load(GOOD))
    for place in draw(st.lists(st.sampled_from(PLACES), max_size=3)):
        at = whole
        try:
            for part in place[:-1]:
                at = at[part]
            if draw(st.integers(0, 4)) == 0:
                at.pop(place[-1])
            elif draw(st.booleans()) and isinstance(at, dict):
                at[draw(st.sampled_from(KEYS))] = draw(VALUES)
            else:
                at[place[-1]] = draw(VALUES)
        except (KeyError, IndexError, TypeError, AttributeError):
            continue
    return dict(whole)


def examples(count: int) -> Any:
    """Return the test with so many of them."""

    @settings(max_examples=count, deadline=None)
    @given(content=contents())
    def judge(content: dict[str, Any], folder: Path) -> None:
        if loads(folder, content):
            assert [error.message for error in WHOLE.iter_errors(content)] == []

    return judge


def test_whatever_the_loader_accepts_the_schema_accepts(tmp_path: Path) -> None:
    """No editor underlines what works: with values of every kind in every place."""
    examples(40)(folder=tmp_path)


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_whatever_the_loader_accepts_the_schema_accepts_long(tmp_path: Path) -> None:
    """The long version."""
    examples(2000)(folder=tmp_path)


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.full
def test_every_value_in_every_place(tmp_path: Path, place: tuple[str | int, ...]) -> None:
    """One place after the other, with every text that means something somewhere."""
    taken = 0
    for value in (
        "30d",
        "0s",
        "none",
        "/x",
        "x",
        "10%",
        "5/s",
        1,
        0,
        True,
        None,
        [],
        {},
        "default",
    ):
        content = with_value(place, value)
        if loads(tmp_path, content):
            taken += 1
            assert [error.message for error in WHOLE.iter_errors(content)] == []
    print(f"{place}: {taken} accepted by both")


@pytest.mark.parametrize(
    "chosen",
    [
        {"vault": "https://127.0.0.1:8200"}, {"aws": "eu-west-1"},
        {"azure": "https://x.vault.azure.net"}, {"files": "/srv/agents"},
        {"vault": "https://127.0.0.1:8200", "files": "/srv/agents"},
    ],
    ids=str,
)  # fmt: skip
def test_what_init_prints_is_good_for_both(tmp_path: Path, chosen: dict[str, str]) -> None:
    """Without agents and with some; its first line names the schema to editors."""
    for agents in ([], ["hello", "1e3"]):
        text = render(chosen, agents=agents, store="sqlite:////var/lib/keyturn/keyturn.db")
        content = yaml.safe_load(text)
        assert [error.message for error in WHOLE.iter_errors(content)] == []
        assert loads(tmp_path, text)
        assert list(content["agents"]) == agents
        assert text.startswith("# yaml-language-server: $schema=")
