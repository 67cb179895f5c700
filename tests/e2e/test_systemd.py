"""The shipped unit, users and folders: judged by systemd's own tools, and lived in by the daemon."""

from __future__ import annotations

import json
import os
import shlex
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from support import as_unit
from support.dockerfile import Box, needs_mounts
from support.http_verifier import basic
from support.running import QUIET, file_at
from support.supervised import Supervised

ROOT = Path(__file__).parents[2]
SYSTEMD = ROOT / "systemd"
UNIT = SYSTEMD / "keyturn.service"
VERIFIER = SYSTEMD / "keyturn-verifier.service"
SQLITE = SYSTEMD / "keyturn-verifier-sqlite.conf"
EXPOSURE = 15  # tenths; ours is 1.5
SOCKET = "/run/keyturn-verifier/verify.sock"
GROUPS = (
    "keyturn",
    "keyturn-ask",
    "keyturn-view",
    "keyturn-respond",
    "keyturn-admin",
    "keyturn-agents",
)
PYTHON = "/opt/keyturn/bin/python"
FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10}


def settings(path: Path = UNIT) -> dict[str, list[str]]:
    """Return what a unit sets, each key with its values in order."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def calls(lines: list[str]) -> list[str]:
    """Return the system calls that these lines of SystemCallFilter= allow."""
    allowed = set(members("@default"))
    for line in lines:
        names = {one for word in line.lstrip("~").split() for one in members(word)}
        allowed = allowed - names if line.startswith("~") else allowed | names
    return sorted(allowed)


def members(name: str) -> list[str]:
    """Return what is in a group of system calls, groups in it resolved."""
    if not name.startswith("@"):
        return [name]
    command = ["systemd-analyze", "syscall-filter", "--no-pager", name]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line.strip() for line in text.splitlines()[1:]]
    return [one for line in lines if line and line[0] != "#" for one in members(line)]


@pytest.mark.parametrize("parts", [[UNIT], [VERIFIER], [VERIFIER, SQLITE]], ids=["d", "v", "vs"])
def test_a_unit_is_as_closed_as_it_can_be(parts: list[Path], tmp_path: Path) -> None:
    """The exposure that systemd computes is 1.5 at most, of 10; a drop-in counts as it does there."""
    unit = tmp_path / parts[0].name
    unit.write_text("\n".join(part.read_text() for part in parts))
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE}"]
    done = subprocess.run(
        [*command, "--no-pager", str(unit)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-300:]


@pytest.mark.parametrize("parts", [[UNIT], [VERIFIER], [VERIFIER, SQLITE]], ids=["d", "v", "vs"])
def test_systemd_understands_every_line(parts: list[Path], tmp_path: Path) -> None:
    """No key that Debian's systemd ignores, no command that is none of ours."""
    unit = tmp_path / parts[0].name
    unit.write_text("\n".join(part.read_text() for part in parts).replace(PYTHON, "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--recursive-errors=no", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert settings(parts[0])["ExecStart"][0].startswith(f"{PYTHON} -I -m keyturn ")
    assert settings()["ExecReload"][0].startswith(f"{PYTHON} -I -m keyturn ")


class Host:
    """This machine's root under an overlay, with Keyturn installed as the how-to says."""

    def __init__(self, folder: Path) -> None:
        self.box = Box(folder)
        self.box.lend()
        self.box.run(["systemd-sysusers", str(SYSTEMD / "sysusers.conf")])
        self.box.run(["systemd-tmpfiles", "--create", str(SYSTEMD / "tmpfiles.conf")])
        self.user = self._ids("passwd", "keyturn")
        self.group = {name: self._ids("group", name) for name in GROUPS}
        self._as_systemd_makes_them()

    def _ids(self, base: str, name: str) -> int:
        return int(self.box.run(["getent", base, name]).split(":")[2])

    def _as_systemd_makes_them(self) -> None:
        """RuntimeDirectory= and LoadCredential= as the unit has them (systemd.exec(5))."""
        own = [self.user, self.group["keyturn"]]
        place = "/run/credentials/keyturn.service"
        boot = "/proc/sys/kernel/random/boot_id"
        self.box.run(["sh", "-ec", (
            f"chown {own[0]}:{own[1]} /run/keyturn; mkdir -p {place}; cat {boot} > {place}/boot-id;"
            f"chmod 0400 {place}/*; chmod 0500 {place}; chown -R {own[0]} {place}"
        )])  # fmt: skip

    def configure(self) -> None:
        """Write the configuration of the how-to."""
        content: dict[str, Any] = {
            "version": 1,
            "connections": {
                "files": file_at(Path("/srv/keyturn-agents")) | {"group": "keyturn-agents"}
            },
            "policies": {"default": QUIET},
            "admin": {"groups": {one: f"keyturn-{one}" for one in ("view", "respond", "admin")}},
            "agents": {"bot": {"destinations": [{"to": "files", "path": "team/bot"}]}},
            "verifier": {"listen": {"socket": SOCKET, "group": "keyturn-ask"}},
        }
        (self.box.upper / "etc/keyturn/keyturn.yaml").write_text(yaml.safe_dump(content))

    def command(self) -> list[str]:
        """Return what systemd would run, in the unit's sandbox."""
        unit = settings()
        families = unit["RestrictAddressFamilies"][0].split()
        become = {
            "uid": self.user,
            "gid": self.group["keyturn"],
            "groups": [self.group[f"keyturn-{name}"] for name in ("view", "agents", "ask")],
            "calls": calls(unit["SystemCallFilter"]),
            "families": [FAMILIES[name] for name in families],
        }
        writable = ["/var/lib/keyturn", "/run/keyturn"]
        writable += [path.lstrip("-") for path in unit["ReadWritePaths"]]
        mounts = [f"mount --bind $R{path} $R{path}" for path in writable]
        mounts += [
            "umount -R $R/proc",
            "mount -t proc -o subset=pid,hidepid=invisible proc $R/proc",
        ]
        launcher = ["python", "-I", as_unit.__file__, json.dumps(become)]
        start = shlex.split(unit["ExecStart"][0])
        return self.box.argv([*launcher, *start], read_only=True, mounts=mounts)

    def asks(self, pid: int, words: str, user: str, *groups: str) -> tuple[int, str]:
        """Run a command as somebody of these groups; returns its exit code and what it said."""
        done = self.box.inside(
            pid, [*shlex.split(words)], user, *(self.group[name] for name in groups)
        )
        return done.returncode, done.stdout + done.stderr

    def ask_as(self, pid: int, user: str, *groups: str) -> str:
        """Show the verifier what the agent reads, as somebody of these groups; returns the status."""
        held = json.loads((self.box.upper / "srv/keyturn-agents/team/bot.json").read_text())
        head = f"GET /v1/auth HTTP/1.1\r\nAuthorization: {basic(held['id'], held['secret'])}\r\n"
        code = (
            "import socket, sys\n"
            "one = socket.socket(socket.AF_UNIX)\n"
            "try:\n"
            f"    one.connect({SOCKET!r})\n"
            "except OSError as error:\n"
            "    sys.exit(print(type(error).__name__))\n"
            "one.sendall(sys.stdin.buffer.read())\n"
            "print(one.recv(99).split()[1].decode())\n"
        )
        done = self.box.inside(
            pid, [PYTHON, "-I", "-c", code], user, *(self.group[name] for name in groups),
            stdin=f"{head}Host: v\r\nConnection: close\r\n\r\n",
        )  # fmt: skip
        return done.stdout.strip()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """Give a host with Keyturn on it; its folder is made ready for the search for secrets."""
    one = Host(tmp_path / "box")
    one.configure()
    yield one
    for path in (one.box.upper / "srv").rglob("*.json"):
        path.unlink()  # what agents read holds a secret, as it should


@needs_mounts
def test_the_daemon_lives_in_its_unit_and_everybody_gets_what_is_theirs(host: Host) -> None:
    """Users, groups, folders, filter and read-only root: the documented setup, as other uids."""
    address = f"@keyturn-unit-{os.getpid()}"
    environ = {
        "PATH": f"/usr/local/bin:{os.environ['PATH']}",
        "KEYTURN_CONFIG": "/etc/keyturn/keyturn.yaml",
        "CREDENTIALS_DIRECTORY": "/run/credentials/keyturn.service",
    }
    with Supervised(
        host.command(), environ=environ, log=host.box.folder / "log", address=address
    ) as one:
        one.wait_ready()
        pid, keyturn = one.process.pid, f"{PYTHON} -I -m keyturn"
        own, alice = f"{host.user}:{host.group['keyturn']}", "70001:70001"

        def first_is_there() -> bool:
            code, said = host.asks(pid, f"{keyturn} status --json", own)
            return code == 0 and all(row["current"] for row in json.loads(said))

        _wait_for(first_is_there)  # it comes by itself, and another rotation may not open beside it
        done = host.asks(pid, f"{keyturn} rotate bot --wait", own)
        assert done[0] == 0, done
        assert host.asks(pid, settings()["ExecReload"][0], own)[0] == 0

        view, respond, admin = "keyturn-view", "keyturn-respond", "keyturn-admin"

        # the verifier beside it: for its group, and a process as closed as the daemon
        gateway = ("70003:70003", "keyturn-ask")
        _wait_for(
            lambda: host.ask_as(pid, *gateway) == "200",
            shown=lambda: host.ask_as(pid, *gateway) + (host.box.folder / "log").read_text(),
        )
        assert host.ask_as(pid, alice, view, respond, admin, "keyturn-agents") == "PermissionError"

        # who may type what
        for groups, wanted in [
            ((), {"status bot": 77}),
            ((respond, admin), {"status bot": 77}),  # the door belongs to view
            ((view,), {"status bot": 0, "suspend bot": 77}),
            ((view, respond), {"suspend bot": 0, "reload": 77}),
            ((view, admin), {"reload": 0}),
        ]:
            for line, code in wanted.items():
                found = host.asks(pid, f"{keyturn} {line}", alice, *groups)
                assert found[0] == code, (groups, line, found)

        # what agents read, and nobody else
        entry = "/srv/keyturn-agents/team/bot.json"
        assert host.asks(pid, f"test -r {entry}", "70002:70002", "keyturn-agents")[0] == 0
        assert host.asks(pid, f"test -w {entry}", "70002:70002", "keyturn-agents")[0] == 1
        assert host.asks(pid, f"test -r {entry}", alice, view, respond, admin)[0] == 1
        for place in ("/var/lib/keyturn", "/etc/keyturn/credentials"):
            assert host.asks(pid, f"ls {place}", alice, *GROUPS)[0] != 0

        # what the kernel says of it
        process = Path(f"/proc/{pid}")
        status = dict(line.split(":\t", 1) for line in _lines(process / "status"))
        assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")
        assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd")} == {0}
        assert status["Uid"].split()[0] == str(host.user)
        assert (
            process / "mem"
        ).stat().st_uid == 0  # not dumpable: root's, though it is not (proc(5))
        core = next(line for line in _lines(process / "limits") if "core file" in line)
        assert core.split()[4:6] == ["0", "0"]
        # ProcSubset= hides which boot this is, and the unit's credential says it
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # written when the lead is renewed
        _wait_for(lambda: _said_boot(host) == boot, shown=lambda: _said_boot(host))
        assert one.stop() == 0


def _wait_for(condition: Callable[[], bool], *, shown: Callable[[], str] = lambda: "") -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, shown()
        time.sleep(0.2)


def _said_boot(host: Host) -> str:
    with sqlite3.connect(host.box.upper / "var/lib/keyturn/keyturn.db") as connection:
        return str(connection.execute("SELECT boot_id FROM daemons").fetchone()[0])


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


@needs_mounts
def test_the_launcher_filters(tmp_path: Path) -> None:
    """The sandbox of these tests bites: what the unit forbids fails in it."""
    become = {"uid": 65532, "gid": 65532, "groups": []}
    become |= {"calls": calls(settings()["SystemCallFilter"]), "families": [1]}  # type: ignore[dict-item]
    code = "import socket as s; s.socket(s.AF_UNIX); print('unix'); s.socket(s.AF_INET)"
    box = Box(tmp_path / "box")
    launcher = ["python", "-I", as_unit.__file__, json.dumps(become)]
    python = str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())
    done = subprocess.run(
        box.argv([*launcher, python, "-I", "-c", code]),
        env={**os.environ, "PATH": f"/usr/local/bin:{os.environ['PATH']}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "unix\n")
    assert "PermissionError" in done.stderr
    assert "ptrace" not in calls(settings()["SystemCallFilter"])
