"""What a connection to OpenBao says of its own login: when it ends, and whose it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from keyturn.core.model import Target
from keyturn.daemon.own_checks import looked_at, problems
from keyturn.daemon.service import load
from keyturn.destinations.vault import VaultDestination, VaultOptions
from keyturn.destinations.vault_auth import AuthOptions
from keyturn.errors import ConfigError, Denied, KeyturnError, Rejected
from keyturn.testing import openbao
from support.own_logins import Role
from support.running import Keyturn
from support.vault import Root, connect, new_prefix, root_of

PLACE = Target(to="bao", path="bot")
WEEK = timedelta(days=7)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openbao.Server]:
    """Give one server for all tests; each has a role of its own."""
    with openbao.dev_server(tmp_path_factory.mktemp("openbao")) as one:
        yield one


@pytest.fixture
def root(server: openbao.Server) -> Root:
    """Ask as root."""
    return root_of(server)


def by_token(server: openbao.Server, folder: Path, **made: Any) -> tuple[VaultDestination, str]:
    """Log in with a token that somebody else has made; also returns its accessor."""
    found = root_of(server)("POST", "auth/token/create", {"policies": ["default"], **made})["auth"]
    path = folder / "token"
    path.touch(mode=0o600)
    path.write_text(found["client_token"])
    auth = AuthOptions(method="token", token_file=str(path))
    return connect(server.address, auth), found["accessor"]


TOKENS: list[tuple[dict[str, Any], timedelta | None, str]] = [
    ({"ttl": "48h", "renewable": False}, timedelta(hours=48), ""),
    ({"ttl": "48h", "explicit_max_ttl": "96h"}, timedelta(hours=96), ""),
    ({"ttl": "48h"}, None, "it is renewed"),
    ({"period": "48h"}, None, "it is renewed"),
]


@pytest.mark.parametrize(("made", "left", "note"), TOKENS)
def test_a_token_of_others_is_left_alone(
    server: openbao.Server, tmp_path: Path, made: dict[str, Any], left: timedelta | None, note: str
) -> None:
    """It says when a person has to make another one, and revokes none that it was given."""
    destination, accessor = by_token(server, tmp_path, **made)
    login = destination.own_login()
    destination.close()
    if left is None:
        assert login.ends_at is None
    else:
        assert login.ends_at is not None
        assert abs(login.ends_at - (datetime.now(UTC) + left)) < timedelta(minutes=1)
    assert login.note.startswith(note)
    found = root_of(server)("POST", "auth/token/lookup-accessor", {"accessor": accessor})
    assert found["data"]["ttl"] > 0


def test_a_renewed_token_shows_its_maximum_when_that_is_near(
    server: openbao.Server, tmp_path: Path
) -> None:
    """As soon as a renewal gives less than before."""
    destination, _ = by_token(server, tmp_path, ttl="60s")
    assert destination.own_login().ends_at is None
    destination._login._life = 10_000_000.0  # as if it had been given more the first time
    destination._login._renew_at = 0.0
    assert destination.own_login().ends_at is not None
    destination.close()


def test_a_secret_id_says_its_end_where_its_role_is_named(
    server: openbao.Server, root: Root, tmp_path: Path
) -> None:
    """By the one right more that the printed policy has then; without it the end is not known."""
    named = Role(
        root,
        tmp_path,
        new_prefix(),
        [PLACE],
        address=server.address,
        rotate=None,
        secret_id_ttl="72h",
    )
    destination = named.connect()
    ends_at = destination.own_login().ends_at
    assert ends_at is not None
    assert abs(ends_at - datetime.now(UTC) - timedelta(hours=72)) < timedelta(minutes=1)
    with pytest.raises(Rejected, match="approle: ends at"):
        looked_at(destination)
    destination.close()

    named.auth.pop("role")
    destination = named.connect()
    assert destination.own_login().note.startswith("not known: name the role")
    assert "not known" in looked_at(destination)
    destination.close()


def test_the_printed_policy_reaches_no_other_role(
    server: openbao.Server, root: Root, tmp_path: Path
) -> None:
    """Its rights are for its own role's secret ids, and printed with `rotate` only."""
    mine = Role(root, tmp_path / "a", new_prefix(), [PLACE], address=server.address)
    theirs = Role(root, tmp_path / "b", new_prefix(), [PLACE], address=server.address)
    still = VaultDestination.least_policy(
        VaultOptions.model_validate(
            {**mine.connection, "auth": AuthOptions(**{**mine.auth, "rotate": None})}
        ),
        [],
    )
    assert "secret-id-accessor" not in still
    assert "role/" + mine.name + '/secret-id"' not in still

    mine.auth["role"] = theirs.name
    destination = mine.connect()
    authority = destination.own_authority
    assert authority is not None
    attempts: list[Callable[[], Any]] = [
        authority.look,
        lambda: authority.issue("v", owner="o"),
        lambda: authority.find(["v"]),
        lambda: authority.destroy(next(iter(theirs.accessors()))),
        lambda: looked_at(destination),
    ]
    for attempt in attempts:
        with pytest.raises(Denied):
            attempt()
    assert len(theirs.accessors()) == 1
    destination.close()


def test_a_probe_finds_the_right_that_is_missing(
    server: openbao.Server, root: Root, tmp_path: Path
) -> None:
    """Before the first rotation meets it."""
    one = Role(root, tmp_path, new_prefix(), [PLACE], address=server.address)
    destination = one.connect()
    assert "logged in by approle" in destination.probe()
    without = VaultDestination.least_policy(one.options(), [(PLACE, "disable")])
    without = without.replace("-accessor/destroy", "-gone")
    without += '\npath "sys/capabilities-self" { capabilities = ["update"] }'
    root("PUT", f"sys/policies/acl/{one.name}", {"policy": without})
    with pytest.raises(Denied, match="lacks update on .*secret-id-accessor/destroy"):
        destination.probe()
    destination.close()


def test_a_new_file_is_read_at_the_next_login(
    server: openbao.Server, root: Root, tmp_path: Path
) -> None:
    """A person's new secret id needs no reload; where there is no good one, it says what to do."""
    one = Role(root, tmp_path, new_prefix(), [PLACE], address=server.address, rotate=None)
    destination = one.connect()
    destination.observe(PLACE)
    (old,) = one.accessors()
    path = f"auth/approle/role/{one.name}/secret-id-accessor/destroy"
    root("POST", path, {"secret_id_accessor": old})
    root("POST", "auth/token/revoke", {"token": destination._login._client.token})
    with pytest.raises(Denied, match="AppRole login is refused"):
        destination.observe(PLACE)
    one.put_new()
    destination.observe(PLACE)
    destination.close()


# --- files that are replaced ------------------------------------------------------------------


def _twins(content: dict[str, Any]) -> None:
    content["connections"]["twin"] = {**copy.deepcopy(content["connections"]["bao"]), "prefix": "t"}


def _no_role(content: dict[str, Any]) -> None:
    del content["connections"]["bao"]["auth"]["role"]


def _wrapped(content: dict[str, Any]) -> None:
    content["connections"]["bao"]["auth"]["wrapped"] = True


def _upwards(content: dict[str, Any]) -> None:
    content["connections"]["bao"]["auth"]["role"] = "x/../other"


def _long_grace(content: dict[str, Any]) -> None:
    content["connections"]["bao"]["auth"]["rotate"]["grace"] = "8d"


@pytest.fixture
def kept(tmp_path: Path) -> Keyturn:
    """Give a configuration with `rotate` whose file lies where it should."""
    folder = tmp_path / "login"
    folder.mkdir(mode=0o700)
    (folder / "secret-id").touch(mode=0o600)
    one = Keyturn(tmp_path, agents=0)
    auth = {
        "method": "approle",
        "role": "keyturn",
        "role_id": "r",
        "secret_id_file": str(folder / "secret-id"),
        "rotate": {"every": "7d", "grace": "1d"},
    }
    one.content["connections"] = {
        "bao": {
            "type": "vault",
            "address": "http://127.0.0.1:1",
            "call_deadline": "1s",
            "auth": auth,
        }
    }
    one.write()
    return one


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_twins, "both would replace"),
        (_no_role, "expected a method with its own keys"),
        (_wrapped, "expected a method with its own keys"),
        (_upwards, "expected a role's name"),
        (_long_grace, "grace not the longer"),
    ],
)
def test_a_login_that_cannot_be_kept_is_refused(
    kept: Keyturn, change: Callable[[Any], None], said: str
) -> None:
    """Before anything runs, also by a reload: one owner for each file, and one role."""
    load(kept.config)
    change(kept.content)
    kept.write()
    with pytest.raises(ConfigError) as caught:
        load(kept.config)
    assert said in str(caught.value)


def test_files_of_others_are_refused_by_the_check(kept: Keyturn) -> None:
    """What systemd hands over cannot be replaced; offline too, and it says what to do."""
    assert list(problems(load(kept.config))) == [("login bao", None)]
    auth = kept.content["connections"]["bao"]["auth"]
    auth["secret_id_file"] = "/run/credentials/keyturn.service/secret-id"
    kept.write()
    ((name, error),) = problems(load(kept.config))
    assert name == "login bao"
    assert isinstance(error, KeyturnError)
    assert "StateDirectory=" in (error.hint or "")
    assert yaml.safe_load(kept.config.read_text())["version"] == 1
