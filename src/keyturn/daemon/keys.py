"""The key ring of this host: in the running daemon, at `keyturn check`, and where a key is made.

The daemon reads it at its start and at each reload, and it is never worse after one than before.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from keyturn import config, wiring
from keyturn.config import Settings
from keyturn.daemon.readiness import Readiness, Reason
from keyturn.errors import ConfigError, KeyturnError, Refused, StoreUnavailable
from keyturn.storage.hashes import InUse, in_use
from keyturn.verifier import keyed
from keyturn.verifier.keyring import KeyRing, make_key, read_key
from keyturn.wiring import Parts

LOOK = 30.0  # seconds between two looks: what is needed changes by a reload, a restore or a forger

_log = structlog.get_logger(__name__)


class Missing:
    """Holds readiness back while a key is missing, and says so once for each."""

    def __init__(self, readiness: Readiness, *, reload: str) -> None:
        """`reload` is what a person does for this process after the key is back."""
        self._readiness = readiness
        self._hint = f"put it back, then {reload}"
        self._told: list[str] = []

    def show(self, lacking: list[str]) -> None:
        """Take what is missing now; nothing is well."""
        if lacking:
            self._readiness.hold(Reason.KEY_MISSING, "; ".join(lacking))
        else:
            self._readiness.release(Reason.KEY_MISSING)
        for one in set(lacking) - set(self._told):
            _log.error("keys.missing", problem=one, hint=self._hint)
        self._told = lacking


class Keys:
    """The key ring of the daemon, as its settings and its store want it."""

    def __init__(self, parts: Callable[[], Parts], readiness: Readiness) -> None:
        self._parts = parts
        self._missing = Missing(readiness, reload="`keyturn reload`")

    def read(self, settings: Settings) -> KeyRing:
        """Return the ring of settings that are to come.

        Raises Refused where an accepted version would lose its key or its scheme by them. What was
        missing before keeps nobody from reloading.
        """
        ring = wiring.ring_of(settings)
        used = in_use(self._parts().store.database)
        lost = [one for one in used if self._parts().ring.judges(one) and not ring.judges(one)]
        if lost:
            raise Refused(
                f"accepted versions would get 503: {'; '.join(ring.lacking(lost))}",
                hint="put it back, rotate those agents, and take it away when `keyturn check --probe` says"
                " that nothing uses it",
            )
        return ring

    def begin(self) -> None:
        """Read the ring as it is when the lead is ours: a standby may have waited for months."""
        self._parts().ring = wiring.ring_of(self._parts().settings)
        self.look()

    def look(self) -> None:
        """Be ready only while every accepted version can be judged."""
        try:
            lacking = list(self._parts().ring.lacking(in_use(self._parts().store.database)))
        except StoreUnavailable:
            return  # the tick says so
        self._missing.show(lacking)


# --- commands ---------------------------------------------------------------------------------


def checked(settings: Settings, used: Sequence[InUse] | None) -> Iterator[dict[str, Any]]:
    """Yield a row of `keyturn check` for each key, and one for each that is missing.

    `used` is None where the store was not looked at: then a file that is not on this host is only a
    remark, as a pull request's host need not have it.
    """
    for key_id, key in settings.verifier.keys.items():
        yield _row(f"key {key_id}", key.file, key_id, used)
    for text in wiring.ring_of(settings).lacking(used or ()):
        hint = "put it back: until then verifiers answer 503 for them"
        yield {"name": "keys", "ok": False, "detail": text, "hint": hint}


def _row(name: str, path: Path, key_id: str, used: Sequence[InUse] | None) -> dict[str, Any]:
    if used is None and not os.access(path, os.R_OK):
        detail = f"{path} is not there, or not readable, on this host"
        return {"name": name, "ok": True, "detail": detail, "hint": ""}
    try:
        read_key(path)
    except ConfigError as error:
        return {"name": name, "ok": False, "detail": str(error), "hint": error.hint}
    detail = "can be used"
    if used is not None:
        heads = ((keyed.read_head(one.head), one.versions) for one in used)
        number = sum(count for named, count in heads if named and named.key_id == key_id)
        detail += f"; {number} accepted versions" if number else "; no accepted version uses it"
    return {"name": name, "ok": True, "detail": detail, "hint": ""}


def lacking_after_restore(parts: Parts) -> list[str]:
    """Say which keys a store that was just put back needs, and this host does not have."""
    return list(parts.ring.lacking(in_use(parts.store.database)))


def refuse_beside_keys(settings: Settings, place: Path) -> None:
    """Refuse a backup that would lie beside a key. Raises Refused."""
    folder = place.parent.resolve()
    for key_id, key in settings.verifier.keys.items():
        if key.file.resolve().parent == folder:
            raise Refused(
                f"{folder} holds the verifier key {key_id}",
                hint="name another folder: whoever gets a backup must not get the key with it",
            )


def make(path: Path, config_file: Path) -> dict[str, Any]:
    """Make a key file; root gives it to the user to whom the store belongs. Raises ConfigError."""
    path = path.absolute()
    folder = _folder_of(config_file)
    if folder is not None and folder.resolve() in path.resolve().parents:
        raise Refused(
            f"{folder} is the store's folder",
            hint="name another one: whoever gets a copy of the store must not get the key with it",
        )
    key = make_key(path, secrets.token_bytes(keyed.LEAST_BYTES))
    owner = os.geteuid()
    if owner == 0 and folder is not None and folder.exists():
        its = folder.stat()
        os.chown(path, its.st_uid, its.st_gid, follow_symlinks=False)
        owner = its.st_uid
    return {"file": str(path), "check": key.check, "owner": owner}


def _folder_of(config_file: Path) -> Path | None:
    """Return the store's folder, None where no configuration says it yet."""
    with suppress(KeyturnError, OSError):
        return config.load_store(config_file, environ=os.environ).store.folder
    return None
