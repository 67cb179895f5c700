"""What `keyturn check` and `keyturn policy` say about a configuration."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from keyturn import rotation, wiring
from keyturn.daemon.checks import check, least_policy
from keyturn.daemon.cron import Crontab
from keyturn.daemon.service import load
from keyturn.errors import ConfigError, Refused
from keyturn.testing.certificates import new_authority

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
    assert rows["entries files"]["detail"].startswith("1 of 2 can be rotated")
    assert rows["entry files:two"]["ok"] is False
    assert "entry files:one" not in rows
    assert [one.name for one in (tmp_path / "agents").iterdir()] == ["two.json"]


def rows_of(path: Path) -> dict[str, Any]:
    """Return the rows of a probe by their names."""
    return {row["name"]: row for row in check(path, probe=True)["checks"]}


def opened(path: Path) -> wiring.Parts:
    """Make the store of a configuration, with its agents."""
    parts = wiring.build(load(path), cron=Crontab(), create=True)
    parts.destinations = wiring.connect(
        parts.settings, store_id=parts.store.store_id, clock=parts.clock
    )
    parts.reconcile(actor="test")
    return parts


def test_a_probe_says_what_a_rotation_would_stall_at(tmp_path: Path) -> None:
    """Values of others, altered ones and other keys are named, by the rule of the rotation."""
    content = files_only(tmp_path / "agents")
    for name in ("mine", "altered", "keys"):
        content["agents"][name] = {"destinations": [{"to": "files", "path": name}]}
    path = written(tmp_path, content)
    parts = opened(path)
    for name in ("mine", "altered"):
        _rotated(parts, name)
    held = tmp_path / "agents" / "altered.json"
    held.write_text(held.read_text().replace('"secret": "kt', '"secret": "xx'))
    (tmp_path / "agents" / "one.json").write_text('{"secret": "theirs"}')
    (tmp_path / "agents" / "keys.json").write_text('{"x": 1}')
    before = sorted(tmp_path.rglob("*"))

    rows = rows_of(path)

    assert sorted(tmp_path.rglob("*")) == before
    assert rows["entries files"]["detail"].startswith("1 of 4 can be rotated")
    said = {name: rows[f"entry files:{name}"]["detail"] for name in ("one", "altered", "keys")}
    assert said["one"].startswith("not-ours")
    assert said["altered"].startswith("unknown-value")
    assert said["keys"].startswith("other-keys")
    assert "entry files:mine" not in rows
    parts.close()


def test_without_the_store_only_what_was_seen_is_promised(tmp_path: Path) -> None:
    """Where the store cannot be opened, an entry that carries some marker is not judged."""
    content = files_only(tmp_path / "agents")
    path = written(tmp_path, content)
    parts = opened(path)
    _rotated(parts, "one")
    parts.close()
    (tmp_path / "state" / "keyturn.db").write_bytes(os.urandom(8192))

    rows = rows_of(path)

    assert rows["entries files"]["detail"].startswith("rights on 1 of 1 are enough")
    assert "entry files:one" not in rows
    assert rows["store"]["ok"] is False
    assert "NOTADB" in rows["store"]["detail"]


def test_a_probe_makes_no_lock(tmp_path: Path) -> None:
    """An entry in a folder that we have written in gets no file of ours by being looked at."""
    content = files_only(tmp_path / "agents")
    content["agents"]["two"] = {"destinations": [{"to": "files", "path": "two"}]}
    path = written(tmp_path, content)
    parts = opened(path)
    _rotated(parts, "one")
    parts.close()
    before = sorted((tmp_path / "agents").rglob("*"))

    assert check(path, probe=True)["ok"] is True

    assert sorted((tmp_path / "agents").rglob("*")) == before


def test_a_probe_opens_the_store_and_an_offline_check_says_that_it_did_not(
    tmp_path: Path,
) -> None:
    """What cannot be opened is told; what is not there yet is made by nobody who only looks."""
    path = written(tmp_path, files_only(tmp_path / "agents"))
    offline = {row["name"]: row for row in check(path)["checks"]}
    assert offline["store"]["detail"].endswith("not opened")
    assert "not there yet" in rows_of(path)["store"]["detail"]
    assert not (tmp_path / "state").exists()

    opened(path).close()
    assert "opened, 1 agents" in rows_of(path)["store"]["detail"]

    dead = {**files_only(tmp_path / "agents"), "version": 1}
    other = tmp_path / "other.yaml"
    dead["store"] = {"url": "postgresql://keyturn@127.0.0.1:9/x", "state_dir": f"{tmp_path}/state"}
    other.write_text(yaml.safe_dump(dead))
    other.chmod(0o600)
    row = rows_of(other)["store"]
    assert row["ok"] is False
    assert "127.0.0.1:9" in row["detail"]


def test_a_missing_ca_file_is_named_offline(tmp_path: Path) -> None:
    """A pull request's host need not have it, so it is a note; a probe fails there."""
    missing = str(tmp_path / "nothing.pem")
    bao = {**CONTENT["connections"]["bao"], "ca_file": missing}
    content = {**CONTENT, "connections": {**CONTENT["connections"], "bao": bao}}
    notes = [row for row in check(written(tmp_path, content))["checks"] if row["name"] == "note"]
    assert any(missing in row["detail"] for row in notes)


def test_a_folder_that_is_not_there_is_no_fault_where_it_can_be_made(tmp_path: Path) -> None:
    """The first rotation makes the root; where it could not, the hint speaks of folders."""
    path = written(tmp_path, files_only(tmp_path / "a" / "b"))
    assert "makes it" in rows_of(path)["connection files"]["detail"]
    (tmp_path / "a").write_text("in the way")
    row = rows_of(path)["connection files"]
    assert row["ok"] is False
    assert "mount" not in row["hint"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_root_looks_as_the_daemons_user(tmp_path: Path) -> None:
    """A configuration that is good for the store's owner is good when root asks."""
    home = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own folders let nobody else in
    try:
        home.chmod(0o755)
        path = written(home, files_only(home / "agents"))
        for name, mode in (("state", 0o700), ("agents", 0o2750)):
            (home / name).mkdir()
            (home / name).chmod(mode)
            os.chown(home / name, 65534, 65534)
        os.chown(path, 65534, 65534)  # judged by its own user, root would call it a stranger's
        code = "from keyturn.daemon.checks import check; from pathlib import Path; import json;"
        code += f"print(json.dumps(check(Path({str(path)!r}), probe=True)))"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        report = json.loads(done.stdout)
        assert [row for row in report["checks"] if not row["ok"]] == []
        assert "looked at as the user nobody" in report["checks"][0]["detail"]

        os.chown(path, 0, 0)  # 0600: the daemon could not read it
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert "expected a readable file" in done.stderr
    finally:
        shutil.rmtree(home)


def _rotated(parts: wiring.Parts, name: str) -> None:
    """Give an agent its first version."""

    class Nobody:
        def step(self, **_told: Any) -> None:
            """Listen to nothing."""

    uid = parts.store.case_of(name).credential.uid
    rotation.run(parts.world(Nobody(), lambda: False), uid, holder="test")
    assert parts.store.case_of(name).current is not None


def test_a_group_that_this_host_does_not_have_is_a_note(tmp_path: Path) -> None:
    """It may be there where the daemon runs, so nothing is refused for it."""
    groups = {"view": "root", "respond": "no-such-group"}
    report = check(written(tmp_path, {**CONTENT, "admin": {"groups": groups}}))

    notes = [row["detail"] for row in report["checks"] if row["name"] == "note"]
    assert report["ok"] is True
    assert notes == ["admin.groups: no group is called no-such-group on this host"]


def test_a_probe_looks_at_the_listeners_certificate(tmp_path: Path) -> None:
    """Before the daemon does not start for it; offline nothing is read, as for every credential."""
    certificate, key = new_authority(tmp_path / "ca").issue("host")
    tls = {"certificate": str(certificate), "key": str(key)}
    listen = {"address": "0.0.0.0:9464", "tls": tls}
    path = written(tmp_path, {"version": 1, "listen": listen})

    def row(*, probe: bool = True) -> list[tuple[bool, str]]:
        rows = check(path, probe=probe)["checks"]
        return [(one["ok"], one["detail"]) for one in rows if one["name"] == "listen"]

    assert row(probe=False) == []
    assert row() == [(True, "0.0.0.0:9464: certificate and key can be used")]
    key.chmod(0o644)
    assert row()[0][0] is False


def test_a_probe_looks_at_what_the_embedded_verifier_needs(tmp_path: Path) -> None:
    """Its tokens, its group and its socket's folder: after a reload the log alone would tell."""
    token = tmp_path / "token"

    def probed(**listen: str) -> list[tuple[bool, str]]:
        section = {"listen": listen, "relying_parties": {"a": {"token_file": str(token)}}}
        rows = check(written(tmp_path, {"version": 1, "verifier": section}), probe=True)["checks"]
        return [(one["ok"], one["detail"]) for one in rows if one["name"] == "verifier"]

    assert probed(address="127.0.0.1:8700") == [(False, f"{token} cannot be read (errno 2)")]
    token.write_text("0" * 64)
    token.chmod(0o600)
    assert probed(address="127.0.0.1:8700")[0][0]
    assert probed(socket=f"{tmp_path}/verify.sock")[0][0]
    assert "no group is called" in probed(socket=f"{tmp_path}/verify.sock", group="nobodys")[0][1]
    assert "is not there" in probed(socket=f"{tmp_path}/none/verify.sock")[0][1]
