"""Relying parties: who may ask a verifier about secrets, and about whose.

A service that is shown a secret learns whether it is good. Somebody who is no relying party must not
learn that from us, and a relying party can be limited to agents: about others it hears what it hears
about a secret that nobody has.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from keyturn.credential_file import Mark, mark, read_credential
from keyturn.errors import ConfigError

SHORTEST_TOKEN = 32  # characters
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks. `agents` None is about every agent."""

    name: str
    agents: frozenset[str] | None = None

    def may_hear_of(self, agent: str) -> bool:
        """Whether an answer about this agent is for this caller."""
        return self.agents is None or agent in self.agents

    @property
    def scope(self) -> tuple[bytes, ...]:
        """What its answers are remembered by, besides what was shown."""
        return () if self.agents is None else (self.name.encode(),)


ANYBODY = Caller(name="")


@dataclass(frozen=True, slots=True, kw_only=True)
class RelyingParty:
    """How a caller shows who it is: a token from a file, a name in its certificate, or either."""

    caller: Caller
    token_file: Path | None = None
    certificate: str = ""  # DNS:name or URI:uri, as its subjectAltName has it


class Callers:
    """Recognises relying parties. Without any, whoever reaches the address may ask.

    Raises ConfigError where a token file cannot be used at first; later the last good tokens stand.
    """

    def __init__(self, parties: Sequence[RelyingParty]) -> None:
        self._parties = tuple(parties)
        self._by_name = {one.certificate: one.caller for one in parties if one.certificate}
        self.open = not parties
        self._key = os.urandom(32)
        self._seen: tuple[Mark | None, ...] = self._look()
        self._refused: list[str] = []
        self._tokens = {one: self._read(one) for one in self._files}
        self._by_token = self._joined()

    @property
    def _files(self) -> list[Path]:
        return [one.token_file for one in self._parties if one.token_file is not None]

    def by_token(self, token: bytes) -> Caller | None:
        """Return whose token this is. Looked up by a keyed digest, so its time tells nothing."""
        return self._by_token.get(self._digest(token))

    def by_certificate(self, certificate: Mapping[str, Any] | None) -> Caller | None:
        """Return whose certificate this is, as `ssl` describes a verified one."""
        for kind, value in (certificate or {}).get("subjectAltName", ()):
            if (found := self._by_name.get(f"{kind}:{value}")) is not None:
                return found
        return None

    def refresh(self) -> None:
        """Read the token files again if one was changed, and again until all of them can be used."""
        seen = self._look()
        if seen == self._seen:
            return
        # SECURITY: each by itself: a token that was taken out of one file must not be good for as long
        # as another file is wrong. And until it is: a chmod that mends it changes no size and no time.
        refused = [error for error in map(self._take, self._files) if error is not None]
        try:
            self._by_token = self._joined()
        except ConfigError as error:
            refused.append(error)
        for one in refused:
            if str(one) not in self._refused:
                _log.error("verifier.tokens-refused", problem=str(one), hint=one.hint)
        self._refused = [str(one) for one in refused]
        if not refused:
            self._seen = seen

    def _take(self, file: Path) -> ConfigError | None:
        """Read a file; its last good tokens stand where that cannot be done."""
        try:
            self._tokens[file] = self._read(file)
        except ConfigError as error:
            return error
        return None

    def _read(self, file: Path) -> list[bytes]:
        # A line each: the new one and the old one, while both are in use.
        tokens = read_credential(file).split()
        if any(len(token) < SHORTEST_TOKEN for token in tokens):
            raise ConfigError(
                f"{file} has a token below {SHORTEST_TOKEN} characters",
                hint="make one with: openssl rand -hex 32",
            )
        return [self._digest(token.encode()) for token in tokens]

    def _joined(self) -> dict[bytes, Caller]:
        found: dict[bytes, Caller] = {}
        for party in self._parties:
            for digest in self._tokens[party.token_file] if party.token_file else ():
                if found.setdefault(digest, party.caller) is not party.caller:
                    raise ConfigError(
                        f"{party.token_file} has a token that another relying party has too",
                        hint="one each: make one with: openssl rand -hex 32",
                    )
        return found

    def _digest(self, token: bytes) -> bytes:
        return hashlib.blake2b(token, key=self._key, digest_size=32).digest()

    def _look(self) -> tuple[Mark | None, ...]:
        return tuple(map(mark, self._files))
