"""One Keyturn in this process: its files, its parts, and sagas that run when a test says so."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from keyturn import rotation, verifying, wiring
from keyturn.core.model import Case
from keyturn.daemon.service import Service, load
from keyturn.errors import StoreUnavailable, VerificationFailed
from keyturn.leaks import Caller
from keyturn.storage.membership import Membership
from support.running import QUIET, file_at

ME = Caller(name="me")


class Ahead:
    """The host's clocks, ahead by as much as a test says."""

    def __init__(self) -> None:
        self.by = timedelta(0)
        self._host = wiring.SystemClock()

    def now(self) -> Any:
        """Return the wall time."""
        return self._host.now() + self.by

    def boottime(self) -> timedelta:
        """Return the time since boot."""
        return self._host.boottime() + self.by


class Installed:
    """A daemon that never starts a thread: reloads are real, and so are store and verifier."""

    def __init__(self, folder: Path, *agents: str) -> None:
        folder.chmod(0o700)
        self.folder, self.config = folder, folder / "keyturn.yaml"
        self.content: dict[str, Any] = {
            "version": 1,
            "store": {"url": f"sqlite:///{folder}/state/keyturn.db"},
            "admin": {"socket": str(folder / "run" / "admin.sock")},
            "connections": {"files": file_at(folder / "agents")},
            "policies": {"default": dict(QUIET)},
            "agents": {name: {"destinations": [{"to": "files", "path": name}]} for name in agents},
        }
        self.clock = Ahead()
        self.service: Service
        self.begin()

    def begin(self) -> None:
        """Start as the daemon does, up to its threads."""
        self.write()
        self.service = Service(load(self.config), socket=self.folder / "run" / "admin.sock")
        self.parts.clock._source = self.clock
        self.membership = Membership(self.parts.store)
        assert self.membership.try_lead(ttl=timedelta(minutes=1))
        self.service._connect()
        self.service._reconcile_at_start()

    def end(self) -> None:
        """Give everything back."""
        self.membership.leave()
        self.parts.close()
        self.service._pool.shutdown()

    @property
    def parts(self) -> wiring.Parts:
        """The parts in force."""
        return self.service.parts

    def write(self) -> None:
        """Write the configuration as it stands in `content`."""
        self.config.touch(mode=0o600)
        self.config.write_text(yaml.safe_dump(self.content))

    def reload(self, *, allow_mass_change: bool = False) -> dict[str, Any]:
        """Write the configuration and reload it."""
        self.write()
        return self.service.reload(allow_mass_change=allow_mass_change, actor="me")

    def run(self, *agents: str) -> None:
        """Run the sagas of these agents once."""
        for name in agents:
            self.run_uid(self.case(name).credential.uid)

    def run_uid(self, credential_uid: str) -> None:
        """Run a saga once."""
        world = self.parts.world(self.service.watching, lambda: False)
        rotation.run(world, credential_uid, holder="test")

    def case(self, agent: str) -> Case:
        """Return an agent's case."""
        return self.parts.store.case_of(agent)

    def held(self, agent: str, root: str = "agents") -> dict[str, str]:
        """Read what an agent reads."""
        found: dict[str, str] = json.loads((self.folder / root / f"{agent}.json").read_text())
        return found

    def accepts(self, held: dict[str, str]) -> bool:
        """Ask a new verifier."""
        verifier = verifying.open_verifier(self.parts.settings)
        try:
            verifier.verify(held["id"], held["secret"])
        except VerificationFailed:
            return False
        except StoreUnavailable:
            raise AssertionError("nobody can tell") from None
        finally:
            verifier.close()
        return True
