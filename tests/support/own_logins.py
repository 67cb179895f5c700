"""What the tests of our own logins share: a role with the printed policy, and what the server has."""

from __future__ import annotations

import contextlib
import urllib.error
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from keyturn.core.model import Target
from keyturn.destinations.vault import VaultDestination, VaultOptions
from keyturn.destinations.vault_auth import AuthOptions
from keyturn.storage.store import Store
from keyturn.testing.contract import STORE_ID
from keyturn.testing.fakes import FakeClock, seeded
from support.vault import Root, approle

EVERY, GRACE = "7d", "1d"


class Role:
    """An AppRole whose policy is what `keyturn policy vault` prints for its connection."""

    def __init__(
        self, root: Root, folder: Path, name: str, targets: list[Target], **options: Any
    ) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.root, self.name, self.targets = root, name, targets
        given = {key: options.pop(key) for key in list(options) if key.startswith("secret_id")}
        rotate = options.pop("rotate", {"every": EVERY, "grace": GRACE})
        bare = approle(root, folder, name, policy="# written below", **given)
        self.file = Path(str(bare.secret_id_file))
        self.auth: dict[str, Any] = {
            "method": "approle",
            "role": name,
            "role_id": bare.role_id,
            "secret_id_file": str(self.file),
            **({"rotate": rotate} if rotate else {}),
        }
        self.connection: dict[str, Any] = {"prefix": name, "auth": self.auth, **options}
        policy = VaultDestination.least_policy(self.options(), [(t, "disable") for t in targets])
        root("PUT", f"sys/policies/acl/{name}", {"policy": policy})

    def options(self) -> VaultOptions:
        """Return the connection's options as they come from a file."""
        return VaultOptions.model_validate({**self.connection, "auth": AuthOptions(**self.auth)})

    def connect(self, *, store_id: str = STORE_ID) -> VaultDestination:
        """Make the connection, as each start of the daemon does."""
        return VaultDestination(self.options(), name="bao", store_id=store_id, clock=FakeClock())

    def accessors(self) -> set[str]:
        """Return the secret ids that the server has of it."""
        with contextlib.suppress(urllib.error.HTTPError):
            found = self.root("LIST", f"auth/approle/role/{self.name}/secret-id")
            return set(found["data"]["keys"])
        return set()

    def logs_in(self, text: str | None = None) -> bool:
        """Tell whether what the file holds, or this, is good for a login."""
        body = {"role_id": self.auth["role_id"], "secret_id": (text or self.text())}
        try:
            self.root("POST", "auth/approle/login", body)
        except urllib.error.HTTPError:
            return False
        return True

    def text(self) -> str:
        """Return what the file holds."""
        return self.file.read_text().strip()

    def put_new(self) -> str:
        """Put another secret id into the file, as a person does; returns its accessor."""
        found = self.root("POST", f"auth/approle/role/{self.name}/secret-id", {})["data"]
        self.file.write_text(found["secret_id"] + "\n")
        return str(found["secret_id_accessor"])


def open_store(folder: Path, clock: Any) -> Store:
    """Open a store of its own."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Store.open(
        f"sqlite:///{folder / 'keyturn.db'}",
        state_dir=folder,
        clock=clock,
        random_bytes=seeded(1),
        writer="w1",
    )


def clock_of_now() -> FakeClock:
    """Return a clock that begins with the server's time."""
    return FakeClock(datetime.now(UTC))
