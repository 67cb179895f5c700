"""The ledger: a second record of versions beside the store, one append-only file per agent.

A restore is merged from it, and revoke resolves an agent's versions from it while the store is
locked. A line is on disk before the commit that it announces, so what it lists is never too little:
an accepted version counts from its announcement on, a refused one until its commit is confirmed.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from keyturn.core.model import Agent, Case, Effect, Intent, Version
from keyturn.errors import StoreFull, StoreUnavailable
from keyturn.storage import codec
from keyturn.storage.ballast import is_full


class Ledger:
    """Append-only files `<agent name>.jsonl` in one private folder. Thread- and process-safe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StoreUnavailable(f"the ledger's folder is unusable ({error.errno})") from None

    def announce(self, before: Case | None, after: Case, *, incarnation: int, at: datetime) -> bool:
        """Append what a commit is about to change; tell whether it must be confirmed later.

        Call it in the transaction, before its commit. Raises StoreUnavailable.
        """
        known = {v.id: v for v in before.versions} if before else {}
        changed = [v for v in after.versions if _tells(known.get(v.id)) != _tells(v)]
        open_before = {i.uid for i in before.intents} if before else set()
        starting = [
            i for i in after.intents if i.effect is Effect.ACTIVATE and i.uid not in open_before
        ]
        owed = after.credential.successor_owed
        owed_changed = owed != (before.credential.successor_owed if before else False)
        if not (changed or starting or owed_changed):
            return False
        lines = [_version_line(v) for v in changed] + [_intent_line(i) for i in starting]
        common = {
            "agent": after.agent.uid,
            "credential": after.credential.uid,
            "owed": owed,
            "incarnation": incarnation,
            "at": codec.micros(at),
        }
        self.append(after.agent, [line | common for line in lines or [{}]], sync=True)
        return any(not v.accepted for v in changed)

    def confirm(self, case: Case) -> None:
        """Note that the refusals announced last are committed. Losing this note is harmless."""
        refused = [v.id for v in case.versions if not v.accepted]
        # The commit is done: an error here would tell the caller that nothing was changed.
        with contextlib.suppress(StoreUnavailable):
            self.append(case.agent, [{"refused": refused}], sync=False)

    def append(self, agent: Agent, lines: Iterable[dict[str, Any]], *, sync: bool) -> None:
        """Append lines to an agent's file; with `sync` they are on disk when this returns."""
        # The leading newline ends a line that a crash tore, so no lock and no repair is needed.
        data = "".join(f"\n{codec.text(line)}\n" for line in lines).encode()
        path = self._path(agent.name)
        try:
            new = not path.exists()
            handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                written = os.write(handle, data)
                if sync:
                    os.fdatasync(handle)
            finally:
                os.close(handle)
            if new:
                self._sync_folder()
        except OSError as error:
            if is_full(error):
                raise StoreFull from None
            raise StoreUnavailable(f"the ledger cannot be written ({error.errno})") from None
        if written != len(data):
            raise StoreFull

    def accepted(self, agent_name: str) -> list[str]:
        """Return every version of an agent that may be accepted, oldest first.

        Works without the store; an unknown agent has none. Raises StoreUnavailable.
        """
        accepted: dict[str, None] = {}
        for line in self.lines(agent_name):
            if line.get("state") in _ACCEPTED_WORDS:
                accepted.setdefault(line["version"])
            for version_id in line.get("refused", ()):
                accepted.pop(version_id, None)
        return list(accepted)

    def knows(self, version_id: str) -> bool:
        """Tell whether any agent's file names a version. Raises StoreUnavailable."""
        try:
            files = sorted(self.folder.glob("*.jsonl"))
            return any(version_id.encode() in path.read_bytes() for path in files)
        except OSError as error:
            raise StoreUnavailable(f"the ledger cannot be read ({error.errno})") from None

    def minted(self, agent_name: str) -> dict[str, datetime]:
        """Return when every version of an agent was minted, without the store."""
        return {
            line["version"]: codec.instant(line["minted_at"])
            for line in self.lines(agent_name)
            if "minted_at" in line
        }

    def lines(self, agent_name: str) -> Iterator[dict[str, Any]]:
        """Yield an agent's lines, oldest first; torn ones are left out."""
        try:
            content = self._path(agent_name).read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise StoreUnavailable(f"the ledger cannot be read ({error.errno})") from None
        for raw in content.split(b"\n"):
            try:
                line = json.loads(raw) if raw else None
            except ValueError:
                continue  # torn by a crash: its commit never happened
            if isinstance(line, dict):
                yield line

    def _path(self, agent_name: str) -> Path:
        if "/" in agent_name or agent_name.startswith("."):
            raise ValueError("not the name of an agent")
        return self.folder / f"{agent_name}.jsonl"

    def _sync_folder(self) -> None:
        handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


_ACCEPTED_WORDS = frozenset({"pending", "current", "previous", "kept"})


def _tells(version: Version | None) -> tuple[object, ...] | None:
    """Return what the ledger records of a version, to see whether it changed."""
    return (version.state, version.deadline, version.digest) if version else None


def _version_line(version: Version) -> dict[str, Any]:
    return {
        "version": version.id,
        "seq": version.seq,
        "login": version.login,
        "state": version.state.value,
        "scheme": version.scheme,
        "digest": version.digest,
        "tag": version.tag.hex() if version.tag else None,
        "origin": version.origin,
        "fence": version.fence,
        "minted_at": codec.micros(version.minted_at),
        "deadline": codec.micros(version.deadline) if version.deadline else None,
        "not_after": codec.micros(version.not_after) if version.not_after else None,
    }


def _intent_line(intent: Intent) -> dict[str, Any]:
    return {
        "intent": intent.uid,
        "version": intent.version_id,
        "target": intent.target,
        "effect": intent.effect.value,
        "writer": intent.writer,
        "fence": intent.fence,
    }
