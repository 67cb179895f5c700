"""A running Keyturn as an operator has it: a folder, a configuration, the daemon, the commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import yaml

from keyturn.core.secret import Secret
from keyturn.errors import StoreUnavailable, VerificationFailed
from keyturn.verifier.decision import Verifier
from keyturn.wiring import SystemClock

TESTS = Path(__file__).parents[1]
RETRY = {"first": "100ms", "max": "1s", "settle_after": "2s"}
QUIET = {"every": "1h", "grace": "10s", "consumer_cache": "2s", "jitter": "0%", "retry": RETRY}


def file_at(root: Path) -> dict[str, Any]:
    """Return a connection to files, quick enough for `RETRY`."""
    return {"type": "file", "root": str(root), "call_deadline": "1s"}


class Keyturn:
    """One installation in a folder of its own. `with` it, or call `stop`."""

    def __init__(
        self, folder: Path, *, agents: int = 2, policy: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = folder
        self.config = folder / "keyturn.yaml"
        self.revocations = folder / "revocations"
        self.log = folder / "daemon.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.python = [sys.executable]  # with the options that a test wants
        path = os.pathsep.join([str(TESTS), *sys.path])
        self.environ: Mapping[str, str] = {**os.environ, "PYTHONPATH": path}
        self.content: dict[str, Any] = {
            "version": 1,
            "store": {"url": f"sqlite:///{self.store}"},
            "admin": {"socket": str(folder / "run" / "admin.sock")},
            "revocations_file": str(self.revocations),
            "connections": {"files": file_at(folder / "agents")},
            "policies": {"default": {**QUIET, **(policy or {})}},
            "agents": {
                f"agent-{n}": {"destinations": [{"to": "files", "path": f"agent-{n}"}]}
                for n in range(agents)
            },
        }
        self.write()

    @property
    def store(self) -> Path:
        """The SQLite file."""
        return self.folder / "state" / "keyturn.db"

    def write(self) -> None:
        """Write the configuration as it stands in `content`."""
        self.config.touch(mode=0o600)
        self.config.write_text(yaml.safe_dump(self.content))

    # --- the daemon -------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def start(self, *module: str) -> None:
        """Start the daemon and wait until it answers; `module` starts another one in its place."""
        command = module or ("keyturn", "run", "-c", str(self.config))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.python, "-m", *command],
                stdout=log,
                stderr=log,
                env=self.environ,
            )
        self.wait_for(self._is_up, seconds=90)

    def _is_up(self) -> bool:
        """Tell whether the daemon itself answers, and is past its start: it leads, or is a standby."""
        _, found = self.ask("health")
        reasons = found.get("reasons") if isinstance(found, dict) else None
        return reasons is not None and all(one["reason"] != "starting" for one in reasons)

    def stop(self) -> int:
        """End the daemon by SIGTERM; returns its exit code."""
        if self.process is None:
            return 0
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            return self.process.wait(35)
        finally:
            self.process.kill()
            self.process.wait()
            self.process = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the daemon."""
        assert self.process is not None
        self.process.send_signal(number)

    # --- commands ---------------------------------------------------------------------------

    def ask(self, *args: str, stdin: str | None = None) -> tuple[int, Any]:
        """Run a command with --json; returns its exit code and what it printed."""
        done = self.run(*args, "--json", stdin=stdin)
        try:
            return done.returncode, json.loads(done.stdout)
        except ValueError:
            return done.returncode, done.stderr

    def run(self, *args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command as a person would."""
        environ = {
            **self.environ,
            "KEYTURN_CONFIG": str(self.config),
        }
        return subprocess.run(
            [*self.python, "-m", "keyturn", *args],
            input=stdin,
            capture_output=True,
            text=True,
            env=environ,
            timeout=60,
            check=False,
        )

    # --- agents -----------------------------------------------------------------------------

    def held(self, agent: str) -> dict[str, Any]:
        """Read what the agent reads."""
        found: dict[str, Any] = json.loads((self.folder / "agents" / f"{agent}.json").read_text())
        return found

    def wait_first(self) -> None:
        """Wait until every agent has a current version."""
        self.wait_for(lambda: all(row["current"] for row in self.ask("status")[1]))

    def verifier(self) -> Verifier:
        """Open a verifier as a service would."""
        return Verifier.open(
            f"sqlite:///{self.store}", state_dir=self.store.parent, clock=SystemClock()
        )

    def wait_for(self, condition: Callable[[], bool], *, seconds: float = 20) -> None:
        """Wait until something is so; fail with the daemon's log."""
        until = time.monotonic() + seconds
        while not condition():
            log = self.log.read_text()[-3000:] if self.log.exists() else ""
            assert time.monotonic() < until, log
            time.sleep(0.05)


def accepts(verifier: Verifier, held: Mapping[str, str]) -> bool | None:
    """Tell whether the verifier says yes (True), no (False) or cannot tell (None)."""
    try:
        verifier.verify(held["id"], Secret(held["secret"]))
    except VerificationFailed:
        return False
    except StoreUnavailable:
        return None
    return True
