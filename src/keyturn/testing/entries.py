"""What the contract of destinations is tried with: entries whose secrets are canaries, odd paths and keys."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from keyturn.core.model import Keys, Target
from keyturn.ports import Destination, Entry
from keyturn.testing.canary import canary

MINTED_AT = datetime(2026, 11, 24, 3, 0, tzinfo=UTC)
STORE_ID = "store-under-test"
OTHER_STORE_ID = "store-of-somebody-else"
PLACE = Target(to="contract", path="team/agent-1")
ESCAPES = (
    "../x", "x/../y", "..", ".", "./x", "x/./y", "x/", "/x", "x//y", "", " ", "x y", "x\\y", "x\0",
    "x\n", "é", ".x", "x/.y", "%2e%2e/x", "x?y", "x#y", "x:y", "a..b", "~", "$HOME", "C:x", "x*",
    "\uff0e\uff0e/x", "x\u2215y", "data/../metadata",
)  # fmt: skip
FOREIGN: dict[str, str] = {
    "port": "5432",
    "empty": "",
    'quote " and \\ and {}': "line\nfeed\ttab\u2028separator",
    "ключ": "значение 🔑 ' ; -- $(id) %s",
    " spaced ": "  kept  ",
}
FOREIGN_VALUES: dict[str, Any] = {"n": 7, "yes": True, "none": None, "list": [1, {"deep": "x"}]}


def new_entry(
    seed: int, *, owner: str = STORE_ID, login: str = "agent-1@acme", fence: int = 7
) -> Entry:
    """Return an entry whose secret is a canary; the same one for the same seed."""
    version_id, secret = canary(seed)
    return Entry(
        login=login,
        secret=secret,
        version_id=version_id,
        owner=owner,
        fence=fence,
        minted_at=MINTED_AT,
    )


def publish(destination: Destination, target: Target, entry: Entry) -> str:
    """Do what the saga does: read the token, stage where there is staging, activate."""
    if destination.traits.can_stage:
        destination.stage(target, entry, expected=destination.observe(target).token)
    return destination.activate(target, entry, expected=destination.observe(target).token)


def withdraw(destination: Destination, target: Target, entry: Entry, token: str) -> str:
    """Take this version out again."""
    version_id = entry.version_id
    return destination.withdraw(target, owner=STORE_ID, version_id=version_id, expected=token)


def parts(keys: Keys, entry: Entry) -> dict[str, str]:
    """Return our three keys as an agent reads them."""
    return {
        keys.id: entry.login,
        keys.secret: entry.secret.reveal(),
        keys.version: entry.version_id,
    }
