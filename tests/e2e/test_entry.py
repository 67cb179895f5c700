"""The first statement of every process: nothing that arrives after it kills us."""

from __future__ import annotations

import ast
import itertools
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

STORM = (signal.SIGUSR1, signal.SIGHUP)
_BLOCKED = (1 << (signal.SIGUSR1 - 1)) | (1 << (signal.SIGHUP - 1))
HELP = [sys.executable, "-m", "keyturn", "--help"]

# A daemon that applies a file whenever it is told, through the real entry and the real `run`.
STUB = """
import keyturn.entry
import sys, threading, types
def run(config, *, socket, standby):
    from keyturn.daemon import logs
    from keyturn.daemon.signals import Signals
    logs.configure(level="error")
    applied, ended = [""], threading.Event()
    def apply():
        applied[0] = config.read_text()
    signals = Signals(revoke=apply, reload=lambda: None, stop=ended.set)
    signals.start()
    print("ready", flush=True)
    ended.wait()
    signals.close()
    print(applied[0])
    return 0
service = types.ModuleType("keyturn.daemon.service")
service.run = run
sys.modules["keyturn.daemon.service"] = service
sys.argv = ["keyturn", "run", "-c", sys.argv[1]]
keyturn.entry.main()
"""


def blocked(pid: int) -> bool:
    """Tell whether the first statement has run."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    mask = int(status.partition("SigBlk:")[2].split()[0], 16)
    return mask & _BLOCKED == _BLOCKED


def start(*argv: str) -> subprocess.Popen[str]:
    """Start a process and return as soon as its first statement has run."""
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not blocked(process.pid):
        time.sleep(0.0002)
    return process


def storm(process: subprocess.Popen[str], seconds: float = 60.0) -> int:
    """Send USR1 and HUP in turn, every millisecond, until the process ends or the time is over."""
    until = time.monotonic() + seconds
    for sent, number in enumerate(itertools.cycle(STORM)):
        if process.poll() is not None or time.monotonic() > until:
            return sent
        os.kill(process.pid, number)
        time.sleep(0.001)
    raise AssertionError


def help_survives() -> None:
    """Run `keyturn --help` in a storm."""
    process = start(*HELP)
    sent = storm(process)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert out.startswith("Usage: keyturn")
    assert sent > 10


def run_survives(config: Path) -> None:
    """Run a daemon in a storm, change its file all the time, and see the last content applied."""
    config.write_text("0")
    process = start(sys.executable, "-c", STUB, str(config))
    storm(process, seconds=0.1)  # while it still imports
    for number in range(1, 60):
        temporary = config.with_suffix(".new")
        temporary.write_text(str(number))
        temporary.replace(config)
        os.kill(process.pid, signal.SIGUSR1)
        storm(process, seconds=0.003)
    temporary = config.with_suffix(".new")
    temporary.write_text("last")
    temporary.replace(config)
    os.kill(process.pid, signal.SIGUSR1)
    assert process.stdout is not None
    ready = process.stdout.readline().strip()  # TERM is the stop of a daemon that has begun
    process.terminate()
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert [ready, *out.splitlines()] == ["ready", "last"]


@pytest.mark.parametrize("run", range(10))
def test_help_survives_a_storm(run: int) -> None:
    """From the first statement to the end no USR1 and no HUP kills `keyturn --help`."""
    help_survives()


@pytest.mark.parametrize("run", range(10))
def test_a_daemon_survives_a_storm_and_applies_the_last_content(run: int, tmp_path: Path) -> None:
    """No signal kills the daemon while it starts, runs or ends, and the last one is obeyed."""
    run_survives(tmp_path / "revocations")


@pytest.mark.full
@pytest.mark.parametrize("run", range(100))
def test_a_hundred_storms(run: int, tmp_path: Path) -> None:
    """The long version of both."""
    help_survives()
    run_survives(tmp_path / "revocations")


def test_the_block_comes_before_everything_else() -> None:
    """After the docstring come the C module and the block; an import before would be a gap."""
    spec = find_spec("keyturn.entry")
    assert spec is not None
    assert spec.origin is not None
    first, second, third, *_ = ast.parse(Path(spec.origin).read_text()).body
    assert isinstance(first, ast.Expr)
    assert isinstance(first.value, ast.Constant)
    assert ast.unparse(second) == "import _signal"
    assert ast.unparse(third) == (
        "_signal.pthread_sigmask(_signal.SIG_BLOCK, {_signal.SIGUSR1, _signal.SIGHUP})"
    )


def test_what_stands_before_the_entry_imports_nothing() -> None:
    """`keyturn/__init__.py` runs first: it must stay empty of imports."""
    spec = find_spec("keyturn")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def test_children_inherit_the_block() -> None:
    """A process that we start cannot be killed by a USR1 that was meant for the group."""
    child = "print(open('/proc/self/status').read().partition('SigBlk:')[2].split()[0])"
    code = (
        f"import keyturn.entry, subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout, 16) & _BLOCKED == _BLOCKED


def test_no_core_file_and_no_reader_of_memory() -> None:
    """After `harden` the process is not dumpable and its core limit is zero (I2)."""
    code = (
        "from keyturn.entry import harden; harden(); import ctypes, resource;"
        "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 (0, 0)"


SLOW = {
    "alembic", "apscheduler", "argon2", "azure", "boto3", "cryptography", "hvac",
    "prometheus_client", "psycopg", "pydantic", "requests", "rich", "sqlalchemy", "structlog", "yaml",
}  # fmt: skip


TYPERS_OWN = {"pydantic"}  # newer Typers read the options of a command with it


@pytest.mark.parametrize(
    "line",
    ["--help", "revoke --help", "--version", "status --socket /nonexistent/s -c /nonexistent"],
)
def test_the_command_line_loads_nothing_slow(line: str) -> None:
    """What `--help` does not import it cannot wait for."""
    code = (
        "import sys; from keyturn.entry import main; sys.argv = ['keyturn', *sys.argv[1:]]\n"
        "import keyturn.cli.reach as reach\n"
        "reach._on_the_store = lambda *_: []\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('LOADED', *{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *line.split()], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.partition("LOADED ")[2].split())
    allowed = set() if line.startswith("-") else TYPERS_OWN
    assert "typer" in loaded
    assert loaded & SLOW <= allowed
