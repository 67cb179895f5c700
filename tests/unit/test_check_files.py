"""`keyturn check` and `keyturn init` as people and pull requests use them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from keyturn.cli import main

MAIN = """\
version: 1
store: {url: "sqlite:////nowhere/keyturn.db"}
connections:
  files: {type: file, root: /srv/agents}
  eu:
    type: vault
    adress: "https://vault.eu:8200"
policies:
  default: {every: monthly}
  slow: {every: 30d, grace: 1h}
include: agents.d/*.yaml
agents:
  one:
    destinations:
      - {to: files, path: shared}
"""
TEAM = """\
agents:
  two:
    policy: slwo
    destinations:
      - {to: files, path: shared.json}
      - {to: flies, path: x}
  one: {destinations: [{to: files, path: y}]}
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the checkout of a repository whose files have many faults, and which anybody may write."""
    (tmp_path / "agents.d").mkdir()
    (tmp_path / "k.yaml").write_text(MAIN)
    (tmp_path / "agents.d" / "team.yaml").write_text(TEAM)
    for path in (tmp_path, tmp_path / "agents.d"):
        path.chmod(0o777)
    for path in (tmp_path / "k.yaml", tmp_path / "agents.d" / "team.yaml"):
        path.chmod(0o666)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Run a command in this process."""
    code = main.main(list(args))
    found = capsys.readouterr()
    return code, found.out, found.err


EXPECTED = [
    ("k.yaml", 7, "connections.eu.adress", "unknown-key"),
    ("k.yaml", 5, "connections.eu.address", "required"),
    ("k.yaml", 5, "connections.eu.auth", "required"),
    ("k.yaml", 9, "policies.default.every", "value"),
    ("k.yaml", 10, "policies.slow", "policy"),
    ("agents.d/team.yaml", 3, "agents.two.policy", "unknown-name"),
    ("agents.d/team.yaml", 5, "agents.two.destinations[0].path", "shared-entry"),
    ("agents.d/team.yaml", 6, "agents.two.destinations[1].to", "unknown-name"),
    ("agents.d/team.yaml", 7, "agents.one", "duplicate-agent"),
]


def places(rows: list[dict[str, Any]], checkout: Path) -> set[tuple[str, int, str, str]]:
    """Return where each problem is, by the names of the repository."""
    return {
        (
            os.path.relpath(checkout / row["file"], checkout),
            row["line"],
            row["key"],
            row["code"],
        )
        for row in rows
    }


def test_a_pull_request_gets_every_problem_of_every_file_at_once(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With line, column, key and code; nobody has to mend one to see the next."""
    code, out, _ = run(capsys, "check", "-c", "k.yaml", "--pull-request", "--json")
    report = json.loads(out)
    assert code == 78
    assert set(EXPECTED) - {
        ("agents.d/team.yaml", 5, "agents.two.destinations[0].path", "shared-entry")
    } <= places(report["problems"], checkout)
    assert all("monthly" not in json.dumps(row) for row in report["problems"])
    lines = {row["key"]: (row["line"], row["column"]) for row in report["problems"]}
    assert lines["connections.eu.adress"] == (7, 5)
    assert lines["agents.two.destinations[1].to"] == (6, 10)


def test_what_only_adapters_know_is_said_beside_the_rest(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two owners of one entry are reported although another connection of the agent is wrong."""
    text = TEAM.replace("policy: slwo", "policy: slow")
    (checkout / "agents.d" / "team.yaml").write_text(text)
    report = json.loads(run(capsys, "check", "-c", "k.yaml", "--pull-request", "--json")[1])
    found = places(report["problems"], checkout)
    assert ("agents.d/team.yaml", 5, "agents.two.destinations[0].path", "shared-entry") in found
    assert ("agents.d/team.yaml", 6, "agents.two.destinations[1].to", "unknown-name") in found


def test_people_read_one_line_for_each(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the order of the files and their lines."""
    code, out, err = run(capsys, "check", "-c", "k.yaml", "--pull-request")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out) == (78, "")
    assert "error: k.yaml:9: policies.default.every: expected a duration such as 30d" in err
    of_main = [int(line.split(":")[2]) for line in lines if line.startswith("error: k.yaml:")]
    assert of_main == sorted(of_main)
    assert len(of_main) >= 5


def test_github_shows_each_beside_its_line(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As workflow commands, with paths of the repository and everything escaped."""
    (checkout / "agents.d" / "team.yaml").rename(checkout / "agents.d" / "a,b:c%.yaml")
    code, out, _ = run(capsys, "check", "-c", "k.yaml", "--pull-request", "--format", "github")
    assert code == 78
    assert "::error file=k.yaml,line=7,col=5,title=keyturn%3A unknown-key::" in out
    assert "::error file=agents.d/a%2Cb%3Ac%25.yaml,line=3,col=5," in out
    assert all(line.startswith("::error ") for line in out.splitlines())


def test_gitlab_gets_a_report_with_lasting_names(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fingerprint stays the same while lines above it come and go."""
    ask = ("check", "-c", "k.yaml", "--pull-request", "--format", "gitlab")
    first = json.loads(run(capsys, *ask)[1])
    (checkout / "k.yaml").write_text("# one line more\n" + MAIN)
    second = json.loads(run(capsys, *ask)[1])
    assert {row["fingerprint"] for row in first} == {row["fingerprint"] for row in second}
    assert first[0]["location"]["path"] == "agents.d/team.yaml"
    assert len({row["fingerprint"] for row in first}) == len(first)


def test_a_checkout_may_be_anybodys_and_a_daemons_files_not(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runners leave 0666 files in 0777 folders; without the option each of them is named."""
    good = {
        "version": 1,
        "store": {"url": "sqlite:////nowhere/k.db"},
        "include": "agents.d/*.yaml",
    }
    (checkout / "k.yaml").write_text(yaml.safe_dump(good))
    (checkout / "agents.d" / "team.yaml").write_text("agents: {}")
    assert run(capsys, "check", "-c", "k.yaml", "--pull-request")[0] == 0
    code, out, _ = run(capsys, "check", "-c", "k.yaml", "--json")
    assert code == 78
    assert {row["code"] for row in json.loads(out)["problems"]} == {"writable-by-others"}


def test_a_checkout_whose_include_matches_nothing_is_wrong(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else a pattern of the server's would let every pull request pass unread."""
    (checkout / "k.yaml").write_text("version: 1\ninclude: /etc/keyturn/none.d/*.yaml\n")
    code, _, err = run(capsys, "check", "-c", "k.yaml", "--pull-request")
    assert code == 78
    assert "k.yaml:2: include: expected a pattern that matches files here too" in err


def test_a_probe_is_no_part_of_a_pull_request(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever may open one must not be able to have destinations asked."""
    assert run(capsys, "check", "-c", "k.yaml", "--pull-request", "--probe")[0] == 2


# --- init --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    ["--vault=https://127.0.0.1:8200", "--aws=eu-west-1", "--azure=https://x.vault.azure.net",
     "--files=agents"],
)  # fmt: skip
def test_what_init_writes_passes_check_unchanged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    """And it says what to type next, beside the file and not in it."""
    tmp_path.chmod(0o700)
    path, store = tmp_path / "k.yaml", f"sqlite:///{tmp_path}/state/k.db"
    args = ("init", option, "--agent", "hello", "--agent", "b2", "--store", store)
    code, out, err = run(capsys, *args, "--out", str(path))
    assert (code, out) == (0, "")
    assert f"keyturn check -c {path}" in err
    assert run(capsys, *args)[1] == path.read_text()
    assert run(capsys, "check", "-c", str(path))[0] == 0


def test_init_overwrites_nothing_and_writes_nothing_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is there stays, also behind a link; a wrong option leaves none."""
    path, link = tmp_path / "k.yaml", tmp_path / "link"
    path.write_text("mine")
    link.symlink_to(tmp_path / "elsewhere")
    for out in (path, link):
        code, _, err = run(capsys, "init", "--files", "/srv", "--out", str(out))
        assert (code, "is there already" in err) == (4, True)
    assert path.read_text() == "mine"
    assert not (tmp_path / "elsewhere").exists()
    for wrong in (
        ("--vault", "ftp://x"), ("--aws", "europe"), ("--files", "/x", "--agent", "A B"),
        ("--files", "/x", "--store", "postgresql://u:pw@h/d"), ("--azure", 'https://x"\nadmin: y'),
    ):  # fmt: skip
        code, printed, err = run(capsys, "init", *wrong, "--out", str(tmp_path / "new"))
        assert (code in (2, 78), printed) == (True, ""), wrong
        assert "pw" not in err
    assert not (tmp_path / "new").exists()
    assert run(capsys, "init")[0] == 2


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """The whole one, and that of an included file."""
    whole = json.loads(run(capsys, "config", "schema")[1])
    agents = json.loads(run(capsys, "config", "schema", "--agents")[1])
    assert "connections" in whole["properties"]
    assert set(agents["properties"]) == {"version", "agents"}


def test_a_mount_of_a_configmap_is_good_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real read-only mount of a folder that is 0777, where this user may mount; and the advice."""
    volume, target = tmp_path / "volume", tmp_path / "config"
    (volume / "..1").mkdir(parents=True)
    target.mkdir()
    content = {"version": 1, "store": {"url": f"sqlite:///{tmp_path}/state/k.db"}}
    (volume / "..1" / "k.yaml").write_text(yaml.safe_dump(content))
    (volume / "..data").symlink_to("..1")
    (volume / "k.yaml").symlink_to("..data/k.yaml")
    volume.chmod(0o777)
    tmp_path.chmod(0o700)
    mounts = f"mount --bind {volume} {target} && mount -o remount,bind,ro {target}"
    check = f"{sys.executable} -m keyturn check -c {target}/k.yaml"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mounts} || exit 99; {check}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode in (1, 99) and "denied" in done.stderr + done.stdout:
        return  # not root here: the unit test of the rule stands for it
    assert done.returncode == 0, done.stderr
    assert "reload: {on_change: true}" in done.stdout
    code, _, err = run(capsys, "check", "-c", str(volume / "k.yaml"))
    assert (code, "writable by others" in err) == (78, True)
