"""Commands that were done already: one that is repeated within a day is not done twice.

The caller names its command by a request id. What it did is kept under that id in the transaction of
the change itself, so a repeat after a lost answer finds either both or neither. A revoke does not
wait for the store, so it first notes beside it, in a plain file, which versions it is about to
refuse: a repeat refuses those again and never a successor.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from keyturn.errors import Refused
from keyturn.storage import codec
from keyturn.storage.tables import requests

KEPT = timedelta(hours=24)
LONGEST = 128
_NOTE_LIMIT = 64 * 1024


@dataclass(slots=True, kw_only=True)
class Once:
    """One command with its request id; `outcome` is what it did, now or the first time."""

    id: str
    digest: str
    outcome: dict[str, Any] = field(default_factory=dict)
    repeated: bool = False

    @classmethod
    def of(cls, request_id: str, command: str, args: Mapping[str, Any]) -> Once:
        """Return the request of this id. Raises Refused for an id that is none."""
        if not (
            0 < len(request_id) <= LONGEST and request_id.isascii() and request_id.isprintable()
        ):
            raise Refused(
                f"a request id is 1 to {LONGEST} printable ASCII characters",
                hint="leave --request-id out, and one is made up",
            )
        body = codec.text([command, dict(args)])
        # What is no text (bytes of an argument) is no cause to refuse a revoke either.
        digest = hashlib.sha256(body.encode(errors="surrogatepass")).hexdigest()
        return cls(id=request_id, digest=digest)

    def repeats(self, connection: Connection, credential_uid: str) -> bool:
        """Tell whether this was done, and then take over what it did. Raises Refused."""
        query = sa.select(requests).where(requests.c.id == self.id)
        for row in connection.execute(query):
            self.compare(row.digest)
            if row.credential_uid == credential_uid:
                self.outcome, self.repeated = json.loads(row.outcome), True
        return self.repeated

    def keep(self, connection: Connection, credential_uid: str, *, at: datetime) -> None:
        """Keep what was done, in the transaction that does it."""
        values = {"id": self.id, "credential_uid": credential_uid, "digest": self.digest}
        outcome = codec.text(self.outcome)
        connection.execute(sa.insert(requests).values(**values, at=at, outcome=outcome))

    def compare(self, digest: object) -> None:
        """Raise Refused where the id was used for something else."""
        if digest != self.digest:
            raise Refused(
                "this request id was used for another command within the last 24 hours",
                hint="choose another --request-id, or leave it out",
            )


def clean(connection: Connection, *, before: datetime) -> None:
    """Forget what was done before an instant."""
    connection.execute(sa.delete(requests).where(requests.c.at < before))


class Begun:
    """A folder of notes: which versions a revoke with a request id set out to refuse."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def note(self, once: Once, version_ids: Sequence[str]) -> None:
        """Note it, durably; a note that cannot be made is no cause to refuse a revoke."""
        body = json.dumps({"digest": once.digest, "versions": list(version_ids)}).encode()
        path = self._path(once)
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            number = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.write(number, body)
                os.fsync(number)
            finally:
                os.close(number)
            draft.replace(path)

    def versions(self, once: Once) -> list[str] | None:
        """Return what the first try set out to refuse, None where this is it. Raises Refused."""
        try:
            with self._path(once).open("rb") as file:
                found = json.loads(file.read(_NOTE_LIMIT))
            digest, versions = found["digest"], [str(one) for one in found["versions"]]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        once.compare(digest)
        return versions

    def clean(self, *, before: datetime) -> None:
        """Remove notes that were made before an instant."""
        with contextlib.suppress(OSError):
            for path in self._folder.iterdir():
                if path.stat().st_mtime < before.timestamp():
                    path.unlink(missing_ok=True)

    def _path(self, once: Once) -> Path:
        return self._folder / hashlib.sha256(once.id.encode()).hexdigest()
