"""The ledger: a second record beside the store, in append-only files.

`AGENT.jsonl`    versions and intents of one agent, each with the revision that its commit makes
`_agents.jsonl`  what the agents are, and which are no more
`_store.jsonl`   whose ledger this is

A restore is merged from it, and revoke resolves an agent's versions from it while the store is
locked. A line is on disk before the commit that it announces, so what it lists is never too little:
an accepted version counts from its announcement on, a refused one until its commit is confirmed.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

from keyturn.core.model import Agent, Case, Credential, Effect, Intent, Version
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

    def announce(
        self, before: Case | None, after: Case, *, incarnation: int, at: datetime, revision: int = 0
    ) -> bool:
        """Append what a commit is about to change; tell whether it must be confirmed later.

        `revision` is the case's after it. Call it in the transaction, before its commit. Raises
        StoreUnavailable.
        """
        known = {v.id: v for v in before.versions} if before else {}
        changed = [v for v in after.versions if _tells(known.get(v.id)) != _tells(v)]
        open_before = {i.uid for i in before.intents} if before else set()
        starting = [
            i for i in after.intents if i.effect is Effect.ACTIVATE and i.uid not in open_before
        ]
        owed = after.credential.successor_owed
        owed_changed = owed != (before.credential.successor_owed if before else False)
        is_other = before is not None and before.agent != after.agent
        if is_other:
            pair = (after.agent, after.credential)
            self.announce_agents([pair], incarnation=incarnation, at=at, bump=1)
        if not (changed or starting or owed_changed):
            return is_other
        lines = [_version_line(v) for v in changed] + [_intent_line(i) for i in starting]
        common = {
            "agent": after.agent.uid,
            "credential": after.credential.uid,
            "owed": owed,
            "incarnation": incarnation,
            "at": codec.micros(at),
            "revision": revision,
            "withheld": list(after.credential.withheld),
        }
        self.append(after.agent, [line | common for line in lines or [{}]], sync=True)
        return is_other or any(not v.accepted for v in changed)

    def confirm(self, case: Case) -> None:
        """Note that the refusals announced last are committed. Losing this note is harmless."""
        refused = [v.id for v in case.versions if not v.accepted]
        line = {
            "refused": refused,
            "credential": case.credential.uid,
            "confirmed": case.credential.revision,
        }
        # The commit is done: an error here would tell the caller that nothing was changed.
        with contextlib.suppress(StoreUnavailable):
            self.append(case.agent, [line], sync=False)
        self.confirm_agents([case.agent])

    def announce_agents(
        self,
        pairs: Iterable[tuple[Agent, Credential]],
        *,
        incarnation: int,
        at: datetime,
        bump: int = 0,
    ) -> None:
        """Append what agents are about to be; `bump` is what the commit adds to their revisions.

        Raises StoreUnavailable.
        """
        lines = [
            _agent_line(agent, credential, incarnation=incarnation, at=at, bump=bump)
            for agent, credential in pairs
        ]
        if lines:
            self._append(self.folder / AGENTS, lines, sync=True)

    def start(
        self,
        pairs: Iterable[tuple[Agent, Credential, Sequence[Version]]],
        *,
        incarnation: int,
        at: datetime,
    ) -> None:
        """Append everything that is accepted now, where a ledger begins. Raises StoreUnavailable."""
        pairs, told = list(pairs), []
        few = len(pairs) <= FEW
        for agent, credential, accepted in pairs:
            line = _agent_line(agent, credential, incarnation=incarnation, at=at, bump=0)
            told.append(line | {"accepted": [version.id for version in accepted]})
            common = {
                "agent": agent.uid,
                "credential": credential.uid,
                "owed": credential.successor_owed,
                "incarnation": incarnation,
                "at": codec.micros(at),
                "revision": credential.revision,
            }
            if accepted:
                self.append(agent, [_version_line(v) | common for v in accepted], sync=few)
        if told:
            if not few:
                os.sync()  # one for all of thousands of files
            self._append(self.folder / AGENTS, told, sync=True)
            self.confirm_agents(agent for agent, _, _ in pairs)

    def confirm_agents(self, agents: Iterable[Agent]) -> None:
        """Note what agents are by a commit that returned. Losing this note is harmless.

        SECURITY: with their states. An announced resume whose commit never came may stand between.
        """
        if states := {agent.uid: agent.state.value for agent in agents}:
            with contextlib.suppress(StoreUnavailable):
                self._append(self.folder / AGENTS, [{"confirmed": states}], sync=False)

    def agent_lines(self) -> Iterator[dict[str, Any]]:
        """Yield the lines about agents, oldest first. Raises StoreUnavailable."""
        return self._lines(self.folder / AGENTS)

    def belongs(self) -> dict[str, Any]:
        """Return the last line about whose ledger this is; {} where there is none."""
        found: dict[str, Any] = {}
        for line in self._lines(self.folder / STORE):
            found = line
        return found

    def begin(self, *, store: str, ledger: str, at: datetime) -> None:
        """Note whose ledger this is. What every agent has must be in it by then."""
        line = {"store": store, "ledger": ledger, "at": codec.micros(at)}
        self._append(self.folder / STORE, [line], sync=True)

    def names(self) -> list[str]:
        """Return every agent that has a file, removed ones too. Raises StoreUnavailable."""
        try:
            found = [name for name in os.listdir(self.folder) if name.endswith(".jsonl")]  # noqa: PTH208
        except OSError as error:
            raise StoreUnavailable(f"the ledger cannot be read ({error.errno})") from None
        return sorted(name.removesuffix(".jsonl") for name in found if not name.startswith("_"))

    def newest(self, agent_name: str) -> list[dict[str, Any]]:
        """Return the last lines of an agent's file, an announcement among them if it has one."""
        path, last = self._path(agent_name), TAIL
        while True:
            found = list(self._lines(path, last=last))
            # SECURITY: a note of thousands of refusals is longer, and an end that shows nothing
            # would let an older store pass for this one.
            if any("revision" in line for line in found) or not _is_longer(path, last):
                return found
            last *= 4

    def append(self, agent: Agent, lines: Iterable[dict[str, Any]], *, sync: bool) -> None:
        """Append lines to an agent's file; with `sync` they are on disk when this returns."""
        self._append(self._path(agent.name), lines, sync=sync)

    def _append(self, path: Path, lines: Iterable[Mapping[str, Any]], *, sync: bool) -> None:
        # The leading newline ends a line that a crash tore, so no lock and no repair is needed.
        data = "".join(f"\n{codec.text(line)}\n" for line in lines).encode()
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
        return self._lines(self._path(agent_name))

    @staticmethod
    def _lines(path: Path, *, last: int = 0) -> Iterator[dict[str, Any]]:
        try:
            with path.open("rb") as file:
                if last:
                    file.seek(max(0, path.stat().st_size - last))
                content = file.read()
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


def _is_longer(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size > size
    except OSError:
        return False


class SealedLedger(Ledger):
    """A ledger to look at: what would be appended is dropped."""

    def _append(self, path: Path, lines: Iterable[Mapping[str, Any]], *, sync: bool) -> None:
        """Append nothing."""


AGENTS, STORE = "_agents.jsonl", "_store.jsonl"
FEW = 100  # files that are synced one by one
TAIL = 16 * 1024  # more than most commits append of one agent
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


def _agent_line(
    agent: Agent, credential: Credential, *, incarnation: int, at: datetime, bump: int
) -> dict[str, Any]:
    return {
        "agent": _plain(agent),
        "credential": _plain(credential),
        "incarnation": incarnation,
        "at": codec.micros(at),
        "revision": credential.revision + bump,
    }


_NOT_TOLD = frozenset({"request", "drift", "looks", "repairs", "sweep_at", "wake_at", "revision"})


def _plain(value: Agent | Credential) -> dict[str, Any]:
    """Return an agent or a credential as JSON values; what a restore finds out anew is left out."""
    names = [field.name for field in fields(value) if field.name not in _NOT_TOLD]
    return {name: _plain_item(getattr(value, name)) for name in names}


def _plain_item(item: Any) -> Any:
    if isinstance(item, datetime):
        return codec.micros(item)
    if isinstance(item, tuple) and not all(isinstance(one, str) for one in item):
        return codec.targets_text(item)
    return item
