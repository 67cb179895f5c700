"""The key ring in the configuration: what is refused, on which line, and what is only remarked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator

from keyturn.config import load_all
from keyturn.config.schema import schema
from keyturn.errors import ConfigError

MAIN = """\
version: 1
store:
  url: "sqlite:///{folder}/state/keyturn.db"
connections:
  files: {{type: file, root: /srv/agents}}
policies:
  default: {{every: 30d}}
  quick:
    scheme: hmac-sha256
verifier:
  keys:
    k1: {{file: /etc/keyturn/keys/k1}}
    k2:
      file: /etc/keyturn/keys/k2
  key: k1
agents:
  bot: {{policy: quick, destinations: [{{to: files, path: bot}}]}}
"""


def problems(folder: Path, *changes: tuple[str, str]) -> list[tuple[int, str, str]]:
    """Return line, key and text of each problem of the file with these changes."""
    text = MAIN.format(folder=folder)
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    path = folder / "keyturn.yaml"
    path.write_text(text)
    try:
        _, found = load_all(path, environ={}, in_checkout=True)
    except ConfigError as error:
        raise AssertionError(str(error)) from error
    return [(int(one.where.rpartition(":")[2]), one.key, one.text) for one in found]


def test_a_ring_of_two_keys_is_good(tmp_path: Path) -> None:
    """The key of new hashes, another one to check with, and a policy that asks for them."""
    assert problems(tmp_path) == []
    settings, _ = load_all(tmp_path / "keyturn.yaml", environ={}, in_checkout=True)
    assert settings.policies["quick"].scheme == "hmac-sha256"
    assert settings.policies["default"].scheme == "argon2id"
    assert sorted(settings.verifier.keys) == ["k1", "k2"]


REFUSED = {
    "a key of new hashes that is not there": (
        ("key: k1", "key: k3"), 15, "verifier.key", "unknown key: expected one of: k1, k2",
    ),
    "hmac-sha256 without a key": (
        ("  key: k1\n", ""), 9, "policies.quick.scheme", "expected verifier.key",
    ),
    "a scheme that no verifier would accept": (
        ("  key: k1\n", "  key: k1\n  schemes: [argon2id]\n"),
        9, "policies.quick.scheme", "leaves hmac-sha256 out",
    ),
    "an unknown scheme": (
        ("scheme: hmac-sha256", "scheme: sha256"), 9, "policies.quick.scheme",
        "expected argon2id or hmac-sha256",
    ),
    "one file for two ids": (
        ("keys/k2", "keys/k1"), 14, "verifier.keys.k2.file", "k1 has it",
    ),
    "a key inline": (
        ("{file: /etc/keyturn/keys/k1}", "{value: 0123456789}"), 12, "verifier.keys.k1.value",
        "unknown key: expected one of: file",
    ),
    "a relative path": (
        ("file: /etc/keyturn/keys/k2", "file: keys/k2"), 14, "verifier.keys.k2.file",
        "expected an absolute path",
    ),
    "no scheme at all": (
        ("  key: k1\n", "  key: k1\n  schemes: []\n"), 16, "verifier.schemes", "one at least",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_with_its_line(tmp_path: Path, name: str) -> None:
    """Each mistake is named with line and key, and with what is expected."""
    change, line, key, text = REFUSED[name]
    found = problems(tmp_path, change)
    assert (line, key) in [one[:2] for one in found], found
    assert any(text in one[2] for one in found), found
    assert {key.partition(".")[0] for _, key, _ in found} == {
        key.partition(".")[0]
    }  # no echo of it


@pytest.mark.parametrize("place", ["state/k2", "state/keys/k2", "elsewhere/../state/k2", "link/k2"])
def test_a_key_in_the_stores_folder_is_refused(tmp_path: Path, place: str) -> None:
    """Whoever gets a copy of the folder must not get the key, whatever the path looks like."""
    (tmp_path / "state" / "keys").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "state" / "keys")
    (found,) = problems(tmp_path, ("/etc/keyturn/keys/k2", f"{tmp_path}/{place}"))
    assert found[:2] == (14, "verifier.keys.k2.file")
    assert "outside of the store's folder" in found[2]


def test_a_link_out_of_the_stores_folder_is_refused_too(tmp_path: Path) -> None:
    """The name stands in the folder: a copy that follows links would hold the key."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "k2").symlink_to("/etc/keyturn/keys/k2")
    (found,) = problems(tmp_path, ("/etc/keyturn/keys/k2", f"{tmp_path}/state/k2"))
    assert "outside of the store's folder" in found[2]


def test_the_environment_names_no_key(tmp_path: Path) -> None:
    """Whoever starts us cannot choose the keys, as he cannot choose where secrets go."""
    problems(tmp_path)
    environ = {"KEYTURN_VERIFIER__KEY": "k2"}
    _, found = load_all(tmp_path / "keyturn.yaml", environ=environ, in_checkout=True)
    assert [one.where for one in found] == ["environment:KEYTURN_VERIFIER__KEY"]


def test_agents_whose_hashes_a_view_will_not_show_are_remarked(tmp_path: Path) -> None:
    """Foreign verifiers see argon2id only: group, agent and policy are named."""
    url = "url: postgresql://keyturn@localhost/keyturn\n  readers: {web: {agents: [bot, other]}}"
    text = re.sub("url: .*", url, MAIN.format(folder=tmp_path))
    (tmp_path / "keyturn.yaml").write_text(text)
    settings, _ = load_all(tmp_path / "keyturn.yaml", environ={}, in_checkout=True)
    assert [note for note in settings.notes if "store.readers.web" in note and "bot" in note] == [
        "store.readers.web: agent bot has hmac-sha256 by its policy quick, and the view shows"
        " argon2id only: what is minted for it from now on is refused there"
    ]


def test_an_editor_knows_the_ring(tmp_path: Path) -> None:
    """The schema takes what the loader takes, also a key that systemd hands over, and no inline key."""
    problems(tmp_path)
    content = yaml.safe_load((tmp_path / "keyturn.yaml").read_text())
    judge = Draft7Validator(schema())
    assert list(judge.iter_errors(content)) == []
    content["verifier"]["keys"]["k1"] = {"file": "credential:k1"}
    content["store"]["readers"] = {"web": {"agents": ["bot"]}}
    assert list(judge.iter_errors(content)) == []
    content["verifier"]["keys"]["k1"] = {"value": "0123"}
    assert list(judge.iter_errors(content)) != []
