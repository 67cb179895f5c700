"""What `keyturn check` and `keyturn policy` say about a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from keyturn.daemon.checks import check, least_policy
from keyturn.errors import ConfigError, Refused

CONTENT: dict[str, Any] = {
    "version": 1,
    "connections": {
        "bao": {
            "type": "vault",
            "address": "https://vault.example:8200",
            "mount": "kv",
            "prefix": "agents",
            "auth": {"method": "token", "token_file": "/etc/keyturn/token"},
        },
        "files": {"type": "file", "root": "/srv/agents"},
    },
    "policies": {
        "default": {"every": "30d", "grace": "48h"},
        "strict": {"every": "30d", "grace": "48h", "retire": "destroy"},
    },
    "agents": {
        "mild": {"destinations": [{"to": "bao", "path": "mild"}]},
        "strict": {"policy": "strict", "destinations": [{"to": "bao", "path": "strict"}]},
        "elsewhere": {"policy": "strict", "destinations": [{"to": "files", "path": "x"}]},
    },
}


def written(folder: Path, content: dict[str, Any]) -> Path:
    """Return a main file with this content and a store beside it."""
    path = folder / "keyturn.yaml"
    store = {"url": f"sqlite:///{folder}/state/keyturn.db"}
    path.write_text(yaml.safe_dump({**content, "store": store}))
    path.chmod(0o600)
    return path


def test_each_entry_gets_what_its_own_agents_policy_needs(tmp_path: Path) -> None:
    """Destroying is granted where that agent's policy destroys, and nowhere else."""
    found = least_policy(written(tmp_path, CONTENT), "vault", "bao")
    text = found["text"]

    assert '"kv/destroy/agents/strict"' in text
    assert '"kv/destroy/agents/mild"' not in text
    assert '"kv/delete/agents/mild"' in text
    assert '"kv/delete/agents/strict"' not in text
    assert "elsewhere" not in text
    assert "agents/x" not in text


def test_a_policy_is_printed_for_one_connection_that_has_some(tmp_path: Path) -> None:
    """Several connections, none, another name and a type without policies have an answer each."""
    bao = CONTENT["connections"]["bao"]
    content = {
        **CONTENT,
        "connections": {**CONTENT["connections"], "other": {**bao, "auth": dict(bao["auth"])}},
    }
    path = written(tmp_path, content)
    for kind, name, words in (
        ("vault", "", "2 connections of type vault"),
        ("memory", "", "0 connections of type memory"),
        ("vault", "three", "no connection three"),
        ("file", "", "no policies of its own"),
    ):
        with pytest.raises(Refused, match=words) as refused:
            least_policy(path, kind, name)
        assert refused.value.hint


def test_one_entry_by_header_and_by_path_has_one_owner(tmp_path: Path) -> None:
    """A namespace as an option and as the begin of the mount lead to one entry: refused offline."""
    bao = {**CONTENT["connections"]["bao"], "prefix": ""}
    same = {"namespace": "a/b", "mount": "kv"}, {"namespace": "/a/", "mount": "b/kv"}
    other = {"namespace": "a", "mount": "kv"}
    for pair, good in ((same, False), ((same[0], other), True)):
        connections = {
            f"v{n}": {**bao, **one, "auth": dict(bao["auth"])} for n, one in enumerate(pair)
        }
        agents = {f"a{n}": {"destinations": [{"to": f"v{n}", "path": "x"}]} for n in range(2)}
        content = {**CONTENT, "connections": connections, "agents": agents}
        path = written(tmp_path, content)
        if good:
            assert check(path)["ok"]
        else:
            with pytest.raises(ConfigError, match="expected an entry of its own"):
                check(path)


def test_a_policy_for_a_namespace_says_so(tmp_path: Path) -> None:
    """Its first line is a comment that names where it must be written."""
    bao = {**CONTENT["connections"]["bao"], "namespace": "a/b"}
    content = {**CONTENT, "connections": {**CONTENT["connections"], "bao": bao}}

    text = least_policy(written(tmp_path, content), "vault", "bao")["text"]

    assert text.startswith("# to be written in the namespace a/b: -namespace=a/b\npath ")


def files_only(root: Path) -> dict[str, Any]:
    """Return a configuration of one agent and one folder."""
    return {
        "version": 1,
        "connections": {"files": {"type": "file", "root": str(root)}},
        "policies": {"default": {"every": "30d", "grace": "48h"}},
        "agents": {"one": {"destinations": [{"to": "files", "path": "one"}]}},
    }


def test_a_store_folder_that_is_open_to_others_fails_the_check(tmp_path: Path) -> None:
    """What `run` would refuse is found before it is run, and a folder that is not there is good."""
    path = written(tmp_path, files_only(tmp_path / "agents"))
    assert check(path)["ok"] is True

    (tmp_path / "state").mkdir(mode=0o755)
    report = check(path)

    assert report["ok"] is False
    (bad,) = [row for row in report["checks"] if not row["ok"]]
    assert (bad["name"], bad["hint"]) == ("store", f"chmod 700 {tmp_path / 'state'}")
    assert list((tmp_path / "state").iterdir()) == []


def test_a_probe_looks_at_each_entry_and_names_the_bad_ones(tmp_path: Path) -> None:
    """One row says how many are good, one each which are not; nothing is changed."""
    content = files_only(tmp_path / "agents")
    content["agents"]["two"] = {"destinations": [{"to": "files", "path": "two"}]}
    (tmp_path / "agents" / "two.json").mkdir(parents=True)

    report = check(written(tmp_path, content), probe=True)

    rows = {row["name"]: row for row in report["checks"]}
    assert report["ok"] is False
    assert rows["entries files"]["detail"] == "1 of 2 can be rotated"
    assert rows["entry files:two"]["ok"] is False
    assert "entry files:one" not in rows
    assert [one.name for one in (tmp_path / "agents").iterdir()] == ["two.json"]
