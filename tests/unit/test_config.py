"""The configuration file: what it becomes, and what is refused with which words."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from keyturn.config import Settings, check_owners, check_policies, load
from keyturn.config.verifying import VerifierSection
from keyturn.core.model import Keys, Policy, Target, Traits
from keyturn.daemon.cron import Crontab
from keyturn.errors import ConfigError

NOW = datetime(2026, 3, 2, 12, tzinfo=UTC)


class FakeOptions(BaseModel):
    """Options as an adapter has them."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    address: str = Field(pattern=r"^https://[a-z.-]+(:[0-9]+)?$", description="https://host:port")
    prefix: str = ""


class FakeAdapter:
    """Only its options count here."""

    Options = FakeOptions


def adapter(kind: str) -> type[FakeAdapter]:
    """Find the one type there is."""
    if kind != "fake":
        raise ConfigError("unknown type of destination: expected one of: fake")
    return FakeAdapter


GOOD = """\
version: 1
store: {url: "sqlite:////var/lib/keyturn/keyturn.db"}
connections:
  vault-eu: {type: fake, address: "https://vault.eu:8200", prefix: agents}
  other:
    type: fake
    address: https://other
policies:
  default:
    every: 30d
    jitter: 10%
    consumer_cache: 24h
    max_age: 90d
    retry: {first: 2s, max: 15m}
  weekly: {extends: default, consumer_cache: 8d, grace: 9d, retry: {max: 5m}}
  nightly: {extends: weekly, cron: "0 3 * * tue", zone: Europe/Berlin, grace: 8d}
  by-hand: {every: manual, consumer_cache: 40d, max_age: {after: 10d, mode: enforce}, window: "Mon-Fri 02:00-05:00"}
verifier: {lease: 30s, poll: 250ms}
admin: {groups: {view: keyturn-view, respond: keyturn-respond, admin: keyturn-admin}}
revocations_file: /etc/keyturn/revocations
revocations:
  - agent:gone at=2026-01-01T00:00:00Z reissue INC-1
notify: [{webhook: "https://hooks/x", key_file: /run/credentials/hook, on: [promoted]}]
agents:
  billing-bot:
    login: billing-bot@acme
    owner: team-billing
    policy: weekly
    destinations:
      - {to: vault-eu, path: a/billing, keys: {id: client_id, secret: client_secret}, merge: true}
      - {to: other, path: billing}
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file as its owner would, 0600."""

    def put(text: str | bytes, name: str = "k.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, mode=0o700)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(0o600)
        return path

    return put


def read(path: Path, environ: dict[str, str] | None = None) -> Settings:
    """Load with the fake adapter and the real calendar."""
    return load(path, environ=environ or {}, cron=Crontab(), now=NOW, adapter=adapter)


def refused(path: Path, environ: dict[str, str] | None = None) -> list[str]:
    """Return the problems, a line each, without the folder of the test."""
    with pytest.raises(ConfigError) as caught:
        read(path, environ)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


def test_a_whole_file_becomes_settings(write: Write) -> None:
    """Every section arrives, typed, with the places of agents."""
    path = write(GOOD)
    settings = read(path)
    assert settings.store.folder == Path("/var/lib/keyturn")
    assert settings.connections["vault-eu"].options == FakeOptions(
        address="https://vault.eu:8200", prefix="agents"
    )
    assert settings.admin.groups.respond == "keyturn-respond"
    assert settings.revocations_file == Path("/etc/keyturn/revocations")
    assert [(entry.agent, entry.reissue) for entry in settings.revocations] == [("gone", True)]
    agent = settings.agents["billing-bot"]
    assert (agent.login, agent.owner, agent.policy) == (
        "billing-bot@acme",
        "team-billing",
        "weekly",
    )
    assert agent.targets == (
        Target(
            to="vault-eu",
            path="a/billing",
            keys=Keys(id="client_id", secret="client_secret"),
            merge=True,
        ),
        Target(to="other", path="billing"),
    )
    assert agent.where == f"{path}:25"
    assert agent.at == (f"{path}:30", f"{path}:31")
    assert [(hook.label, hook.on) for hook in settings.notify] == [("hooks", ["promoted"])]
    assert settings.notes == ()


def test_policies_inherit_and_get_their_defaults(write: Write) -> None:
    """`extends` gives what is not given, nested and across schedules; grace follows the cache."""
    policies = read(write(GOOD)).policies
    assert policies["default"] == Policy()
    weekly = policies["weekly"]
    assert (weekly.every, weekly.grace, weekly.consumer_cache) == (
        timedelta(days=30),
        timedelta(days=9),
        timedelta(days=8),
    )
    assert (weekly.retry.first, weekly.retry.max) == (timedelta(seconds=2), timedelta(minutes=5))
    nightly = policies["nightly"]
    assert (nightly.every, nightly.cron, nightly.zone, nightly.jitter) == (
        None,
        "0 3 * * tue",
        "Europe/Berlin",
        0,
    )
    by_hand = policies["by-hand"]
    assert (by_hand.every, by_hand.cron, by_hand.grace) == (None, None, timedelta(days=80))
    assert (by_hand.max_age, by_hand.enforce_max_age) == (timedelta(days=10), True)


def test_the_smallest_file(write: Write) -> None:
    """A version is all that is needed; everything else has a default."""
    settings = read(write("version: 1\n"))
    assert settings.agents == {}
    assert settings.policies == {"default": Policy()}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("version: 1", "version: 2", "k.yaml:1: version: expected 1"),
        ("version: 1\n", "", "k.yaml:1: version: required: expected 1"),
        ("every: 30d", "every: 30 days", "k.yaml:10: policies.default.every: expected a duration such as 30d, 48h, 1h30m, 2s or 250ms, or manual"),
        ("connections:", "conections:", "k.yaml:3: conections: unknown key: did you mean connections?"),
        ("every: 30d", "evry: 30d", "k.yaml:10: policies.default.evry: unknown key: did you mean every?"),
        ("every: 30d", "every: 30d\n    cron: 0 3 * * *", "k.yaml:9: policies.default: expected `every` or `cron`, not both"),
        ("0 3 * * tue", "0 3 * * foo", 'k.yaml:16: policies.nightly.cron: expected five fields of a crontab such as "0 3 * * tue" (minute hour day month weekday)'),
        ("0 3 * * tue", "0 3 30 2 *", "k.yaml:16: policies.nightly.cron: expected a line that comes round"),
        ("0 3 * * tue", "0 3 * *", 'k.yaml:16: policies.nightly.cron: expected a crontab line of five fields such as "0 3 * * tue"'),
        ("Europe/Berlin", "Europe/Berln", "k.yaml:16: policies.nightly.zone: expected a time zone of the IANA list such as UTC or Europe/Berlin"),
        ("Mon-Fri 02", "Mon-Fry 02", 'k.yaml:17: policies.by-hand.window: expected a window such as "Mon-Fri 02:00-05:00"'),
        ("grace: 9d", "grace: {mode: adaptive, max: 14d}", "k.yaml:15: policies.weekly.grace: expected a duration such as 30d, 48h, 1h30m, 2s or 250ms (adaptive grace is not available yet)"),
        ("grace: 9d", "grace: 7d", "k.yaml:15: policies.weekly: grace 7d is 24h short of its floor 8d: consumer_cache 8d + lease 0s"),
        ("every: 30d", "every: 23h", "k.yaml:9: policies.default: a grace of 48h at this interval needs 5 accepted versions, and the limit is 4: rotate no more often than every 24h, or shorten the grace to 46h"),
        ("mode: enforce}", "mode: enforced}", "k.yaml:17: policies.by-hand.max_age.mode: expected alert or enforce"),
        ("max: 15m", "max: 1s", "k.yaml:9: policies.default: retry: expected `first` up to `max`"),
        ("extends: weekly", "extends: wekly", "k.yaml:16: policies.nightly.extends: unknown policy: did you mean weekly?"),
        ("extends: default", "extends: nightly", "k.yaml:15: policies.weekly.extends: expected no circle of policies"),
        ("policy: weekly", "policy: weakly", "k.yaml:28: agents.billing-bot.policy: unknown policy: did you mean weekly?"),
        ("to: other", "to: vaultt-eu", "k.yaml:31: agents.billing-bot.destinations[1].to: unknown connection: did you mean vault-eu?"),
        ("path: billing}", "path: x/../billing}", "k.yaml:31: agents.billing-bot.destinations[1].path: expected a relative path of segments of A-Z a-z 0-9 . _ - without . and .."),
        ("{to: other, path: billing}", "{to: other}", "k.yaml:31: agents.billing-bot.destinations[1].path: required: expected a relative path of segments of A-Z a-z 0-9 . _ - without . and .."),
        ("secret: client_secret", "secret: client_id", "k.yaml:30: agents.billing-bot.destinations[0].keys: expected three different keys"),
        ("merge: true", "merge: yes", "k.yaml:30: agents.billing-bot.destinations[0].merge: expected true or false"),
        ("billing-bot:", "Billing-bot:", "k.yaml:25: agents.Billing-bot: expected an id of a-z 0-9 . _ - (63 at most, a letter or digit first, no ..)"),
        ("billing-bot:", "a..b:", "k.yaml:25: agents.a..b: expected an id of a-z 0-9 . _ - (63 at most, a letter or digit first, no ..)"),
        ("billing-bot:", "17:", "k.yaml:25: agents.17: expected text as a key: put it in quotes"),
        ("billing-bot@acme", "billing:bot", "k.yaml:26: agents.billing-bot.login: expected 1 to 128 printable ASCII characters without colon and space"),
        ("type: fake, address", "type: fak, address", "k.yaml:4: connections.vault-eu.type: unknown type of destination: expected one of: fake"),
        ("type: fake, address", "address", "k.yaml:4: connections.vault-eu.type: required: expected the type of a destination"),
        ("https://other", "http://other", "k.yaml:7: connections.other.address: expected https://host:port"),
        ("prefix: agents", "prefx: agents", "k.yaml:4: connections.vault-eu.prefx: unknown key: did you mean prefix?"),
        ("owner: team", "login: x\n    owner: team", "k.yaml:27: agents.billing-bot.login: expected this key once; it is also in line 26"),
        ("login: billing", "login: &x billing", "k.yaml:26: agents.billing-bot.login: expected no anchor and no alias (& and *): write it out"),
        ("owner: team", "owner: !!str team", "k.yaml:27: agents.billing-bot.owner: expected no tag (!)"),
        ("agent:gone at=2026", "agent:gone at=2027", "k.yaml:22: revocations[0]: the time is in the future: expected one up to now"),
        ("/etc/keyturn/rev", "etc/keyturn/rev", "k.yaml:20: revocations_file: expected an absolute path"),
        ("agents:\n", "agents: []\nother:\n", "k.yaml:24: agents: expected a mapping by name"),
        ("lease: 30s", "lease: 6m", f"k.yaml:18: verifier: expected {VerifierSection.rule}"),
        ("poll: 250ms", "poll: 10s", f"k.yaml:18: verifier: expected {VerifierSection.rule}"),
        ("lease: 30s", "lease: 30", "k.yaml:18: verifier.lease: expected a duration such as 30d, 48h, 1h30m, 2s or 250ms"),
    ],
)  # fmt: skip
def test_a_wrong_file_says_where_and_what(write: Write, old: str, new: str, expected: str) -> None:
    """File, line, key and the expected form, and not the value."""
    assert old in GOOD
    assert expected in refused(write(GOOD.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("url", "good"),
    [
        ("sqlite:////x/k.db", True), ("sqlite:///k.db", False), ("sqlite://", False), ("mysql://h/d", False),
        ("postgresql://k@localhost/k", True), ("postgresql://k@/k?host=/run/postgresql", True),
        ("postgresql://k@db.eu/k?sslmode=verify-full", True), ("postgresql://k@db.eu/k", False),
        ("postgresql://k:pw@localhost/k", False), ("postgresql://k@localhost/k?password=pw", False),
        ("postgresql://k@db.eu/k?sslmode=require", False), ("postgresql://[::1/k", False),
        ("postgresql://k@localhost/k?host=db.eu", False), ("postgresql://k@/k?host=db.eu", False),
        ("postgresql://k@db.eu/k?host=/run/postgresql", False),
        ("postgresql://k@localhost/k?hostaddr=203.0.113.5", False),
        ("postgresql://k@/k?host=/run/pg,db.eu", False), ("postgresql:///k?service=x", False),
        ("postgresql://k@/k?host=/run/pg&host=db.eu", False),
        ("postgresql://k@/k?host=%2Frun%2Fpg%2Cdb.eu", False),
        ("postgresql://k@localhost/k?%68ost=db.eu", False), ("postgresql:///k?host", False),
        ("postgresql://k@localhost:1,db.eu:2/k", False), ("postgresql://k@db.eu@localhost/k", False),
        ("postgresql://k@[::1]:5433/k", True), ("postgresql://k@localhost#x/k", False),
        ("postgresql://localhost,db.eu/k", False), ("postgresql://k@localhost/k?passfile=/f", False),
        ("postgresql://k@localhost/k?options=-csearch_path=x", False),
        ("postgresql://k@db.eu/k?sslmode=disable&sslmode=verify-full", False),
        ("postgresql://k@db.eu/k?sslmode=verify-full&sslmode=disable", False),
        ("postgresql://k@db.eu/k?sslmode=verify-full&sslrootcert=root.crt", False),
        ("postgresql://k@db.eu/k?sslmode=verify-full&sslrootcert=/etc/ca.pem", True),
        ("postgresql://k@db.eu/k?sslmode=verify-full&sslrootcert=system", True),
        ("postgresql://k@db.eu/k?sslmode=verify-full&sslcert=/c.pem&sslkey=/k.pem", True),
    ],
)  # fmt: skip
def test_store_urls(write: Write, url: str, good: bool) -> None:
    """Absolute SQLite files, and PostgreSQL without a password in the text and verified off-host."""
    path = write(f'version: 1\nstore: {{url: "{url}"}}\n')
    if good:
        assert read(path).store.url == url
    else:
        assert refused(path)[0].startswith(
            "k.yaml:2: store.url: expected sqlite:////absolute/path or"
        )


def test_all_problems_are_reported_together(write: Write) -> None:
    """Three mistakes in three sections are three lines of one error."""
    text = (
        GOOD.replace("lease: 30s", "lease: x")
        .replace("to: other", "to: x")
        .replace("every: 30d", "every: x")
    )
    assert [line.split(": ")[1] for line in refused(write(text))] == [
        "verifier.lease", "policies.default.every", "agents.billing-bot.destinations[1].to",
    ]  # fmt: skip


def test_the_environment_sets_store_and_log_only(write: Write) -> None:
    """Store and log come from the environment too; an address never does, and problems name the variable."""
    path = write(GOOD)
    environ = {
        "KEYTURN_STORE__URL": "sqlite:////other/k.db",
        "KEYTURN_LOG__LEVEL": "debug",
        "KEYTURN_SOCKET": "x",
        "HOME": "/",
    }
    settings = read(path, environ)
    assert (settings.store.url, settings.log.level) == ("sqlite:////other/k.db", "debug")
    assert refused(
        path, {"KEYTURN_CONNECTIONS__VAULT_EU__ADDRESS": "https://evil", "KEYTURN_LOG__LEVEL": "x"}
    ) == [
        "environment:KEYTURN_CONNECTIONS__VAULT_EU__ADDRESS: connections: expected KEYTURN_STORE__… or KEYTURN_LOG__…: the rest stands in the file only",
        "environment:KEYTURN_LOG__LEVEL: log.level: expected debug, info, warning or error",
    ]


AGENT = "version: 1\nagents:\n  {}:\n    login: {}\n    destinations: [{{to: other, path: {}}}]\n"


def test_includes_bring_agents(write: Write) -> None:
    """Agents of other files join, with their own places."""
    write(AGENT.format("one", "one", "one"), "agents.d/a.yaml")
    write(AGENT.format("two", "two", "two"), "agents.d/b.yaml")
    settings = read(write(f"{GOOD}include: agents.d/*.yaml\n"))
    assert set(settings.agents) == {"billing-bot", "one", "two"}
    assert settings.agents["two"].where.endswith("b.yaml:3")


def test_a_login_is_taken_also_by_an_agent_of_the_same_line(write: Write) -> None:
    """The one who has it is another agent, wherever both stand."""
    rest = "destinations: [{to: other, path: %s}]"
    line = f"agents: {{a: {{login: z, {rest % 'a'}}}, b: {{login: z, {rest % 'b'}}}}}\n"
    write(f"version: 1\n{line}", "agents.d/a.yaml")

    problems = refused(write(f"{GOOD}include: agents.d/*.yaml\n"))

    text = "expected a login of its own; the agent at agents.d/a.yaml:2 has it"
    assert problems == [f"agents.d/a.yaml:2: agents.b.login: {text}"]


def test_includes_cannot_bring_addresses_or_take_agents(write: Write) -> None:
    """Connections, policies, a second agent of one name and a taken login are refused there."""
    text = (
        AGENT.format("billing-bot", "x", "x")
        + "connections: {evil: {type: fake, address: https://evil}}\n"
    )
    write(text, "agents.d/a.yaml")
    write(AGENT.format("two", "billing-bot@acme", "two"), "agents.d/b.yaml")
    problems = refused(write(f"{GOOD}include: agents.d/*.yaml\n"))
    assert problems == [
        "agents.d/a.yaml:6: connections: expected agents only: the rest stands in the main file",
        "agents.d/a.yaml:3: agents.billing-bot: expected this agent once; it is also at k.yaml:25",
        "agents.d/b.yaml:4: agents.two.login: expected a login of its own; the agent at k.yaml:25 has it",
    ]


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_is_refused(write: Write, mode: int) -> None:
    """Group or other may not write the file."""
    path = write(GOOD)
    path.chmod(mode)
    assert "k.yaml:1: (file): k.yaml is writable by others" in refused(path)[0]


def test_a_folder_that_others_can_write_is_refused(write: Write, tmp_path: Path) -> None:
    """A folder above it may not either, also behind a link, unless it is sticky."""
    path = write(GOOD, "deep/k.yaml")
    path.parent.chmod(0o777)
    assert "is writable by others" in refused(path)[0]
    link = tmp_path / "link.yaml"
    link.symlink_to(path)
    assert "is writable by others" in refused(link)[0]
    path.parent.chmod(0o1777)
    assert read(path).agents


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_somebody_else_is_refused(write: Write) -> None:
    """The main file belongs to root or to our uid."""
    path = write(GOOD)
    os.chown(path, 65534, -1)
    assert "is writable by others: expected owner root" in refused(path)[0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "k.yaml:1: (file): expected a mapping at the top: the file is empty (`agents: {}` says that there are none)"),
        (b"- x\n", "k.yaml:1: (file): expected a mapping at the top"),
        (b"version: 1\nowner: \xff\n", "k.yaml:2: (file): expected UTF-8"),
        (b"version: 1\n---\nversion: 1\n", "k.yaml:2: version: expected one document"),
        (b"version: 1\nagents: {a: [\n", "k.yaml:3: agents.a: expected valid YAML here (see indentation, quotes and colons)"),
        (b"version: 1\nagents: {a: \x01}\n", "k.yaml:2: (file): expected valid YAML here (see indentation, quotes and colons)"),
        (b"version: 1\n? [a]\n: b\n", "k.yaml:2: (file): expected text as a key"),
        (b"version: 1\nagents: " + b"[" * 500, "k.yaml:2: agents" + "[0]" * 16 + ": expected at most 16 levels"),
    ],
)  # fmt: skip
def test_broken_files_are_answered(write: Write, content: bytes, expected: str) -> None:
    """Nothing, half a file, two documents, garbage and deep nesting have an answer each."""
    assert refused(write(content)) == [expected]


def test_nesting_without_end_has_one_answer(write: Write) -> None:
    """Releases of the YAML library that stop reading it themselves are answered for as well."""
    (answer,) = refused(write(b"version: 1\nagents: " + b"[" * 50_000))
    assert answer.startswith("k.yaml:2: agents")
    assert answer.endswith(
        (
            "expected at most 16 levels",
            "expected valid YAML here (see indentation, quotes and colons)",
        )
    )


def test_a_missing_file_is_answered(tmp_path: Path) -> None:
    """A file that cannot be read says so and is a configuration error."""
    assert refused(tmp_path / "none.yaml") == [
        "none.yaml:1: (file): expected a readable file (No such file or directory)"
    ]


def test_two_owners_of_one_entry_are_refused(write: Write) -> None:
    """Two spellings with one identity are one entry, whoever owns them."""
    text = GOOD + "  second:\n    destinations: [{to: other, path: BILLING}]\n"
    settings = read(write(text))
    check_owners(settings, lambda target: f"{target.to}/{target.path}")
    with pytest.raises(ConfigError) as caught:
        check_owners(settings, lambda target: f"{target.to}/{target.path.lower()}")
    line = str(caught.value)
    assert "k.yaml:33: agents.second.destinations[0].path: expected an entry of its own" in line
    assert "agents.billing-bot.destinations[1]" in line


def test_destinations_must_carry_the_policies_of_their_agents(write: Write) -> None:
    """A quota or staleness of a connection counts for the policies whose agents use it."""
    settings = read(write(GOOD))
    check_policies(settings, lambda name: Traits(), cron=Crontab())
    with pytest.raises(
        ConfigError, match=r"k\.yaml:15: policies\.weekly: other carries one rotation every 40d"
    ):
        check_policies(
            settings, lambda name: Traits(minimum_interval=timedelta(days=40 * (name == "other")))
        )


def test_the_lease_counts_only_for_leased_verifiers(write: Write) -> None:
    """On SQLite each verifier looks before each yes: no lease. On PostgreSQL the section declares one."""
    assert read(write(GOOD)).lease == timedelta(0)
    leased = GOOD.replace("sqlite:////var/lib/keyturn/keyturn.db", "postgresql://k@localhost/k")
    leased = leased.replace("grace: 8d", "grace: 9d")
    assert read(write(leased)).lease == timedelta(seconds=30)


class OwnForm:
    """A form as adapters below this layer bring it."""

    text = "a colour"


def test_forms_of_adapters_are_used(write: Write) -> None:
    """An adapter's own words for an option stand in the error."""

    class Options(BaseModel):
        colour: Annotated[Literal["red"], OwnForm()] = "red"

    class Painter:
        pass

    Painter.Options = Options  # type: ignore[attr-defined]
    path = write("version: 1\nconnections: {a: {type: painter, colour: blue}}\n")
    with pytest.raises(ConfigError, match=r":2: connections\.a\.colour: expected a colour$"):
        load(path, environ={}, adapter=lambda kind: Painter)  # type: ignore[arg-type,return-value]


def test_a_missing_library_names_what_to_install(write: Write) -> None:
    """A type whose SDK is not there says the command that helps."""

    def missing(kind: str) -> type[FakeAdapter]:
        raise ConfigError("the type vault needs a library", hint="pip install 'keyturn[vault]'")

    path = write("version: 1\nconnections: {a: {type: vault}}\n")
    with pytest.raises(ConfigError, match=r"needs a library \(pip install 'keyturn\[vault\]'\)"):
        load(path, environ={}, adapter=missing)


# --- the listener ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines",
    [
        '{address: "127.0.0.1:9464"}',
        '{address: "127.8.8.8:1"}',
        '{address: "[::1]:65535"}',
        '{address: "0.0.0.0:9464", tls: {certificate: /c, key: /k}}',
        '{address: "[2001:db8::1]:9464", tls: {certificate: /c, key: /k, client_ca: /a}}',
        "{}",
    ],
)
def test_a_listener_is_closed_or_on_this_host(write: Write, lines: str) -> None:
    """Loopback as it is, any other address with TLS; without an address nothing listens."""
    found = read(write(f"{GOOD}listen: {lines}\n")).listen
    assert (found.address is None) == (lines == "{}")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ('listen: {address: "0.0.0.0:8700"}', "listen: expected an address or a socket, and `tls`"),
        ('metrics: {address: "0.0.0.0:9465"}', "metrics: expected an address with `tls`"),
        ("listen: [1]", "listen: expected a mapping of address or socket"),
        ("relying_parties: {a: {agents: [b]}}", "a: expected a token_file, a certificate, or both"),
    ],
)
def test_a_section_within_a_section_says_what_fits_together(
    write: Write, lines: str, expected: str
) -> None:
    """It is there, and a mapping: the error says which rule of it was broken."""
    with pytest.raises(ConfigError) as found:
        read(write(GOOD.replace("verifier: {", f"verifier: {{{lines}, ")))
    assert expected in str(found.value)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ('{address: "0.0.0.0:9464"}', "an address with `tls`, or one of loopback"),
        ('{address: "[::]:9464"}', "an address with `tls`, or one of loopback"),
        ('{address: "10.0.0.1:9464"}', "an address with `tls`, or one of loopback"),
        ("{tls: {certificate: /c, key: /k}}", "an address with `tls`, or one of loopback"),
        ('{address: "localhost:9464"}', "address: expected IP:PORT"),
        ('{address: "127.0.0.1"}', "address: expected IP:PORT"),
        ('{address: "127.0.0.1:0"}', "address: expected IP:PORT"),
        ('{address: "127.0.0.1:65536"}', "address: expected IP:PORT"),
        ('{address: "127.1:9464"}', "address: expected IP:PORT"),
        ('{address: "0.0.0.0:1", tls: {certificate: /c}}', "tls.key: required"),
        ('{address: "0.0.0.0:1", tls: {certificate: c, key: /k}}', "certificate: expected an abs"),
    ],
)
def test_an_open_listener_is_refused(write: Write, lines: str, expected: str) -> None:
    """Nobody on the way reads metrics; names are not looked up; the error says what is expected."""
    with pytest.raises(ConfigError) as found:
        read(write(f"{GOOD}listen: {lines}\n"))
    assert expected in str(found.value)
