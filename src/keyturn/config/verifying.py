"""The section `verifier`: how verifiers stay fresh, where they are asked, and by whom."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from keyturn.config.listening import Address, ListenSettings, TlsSection, is_loopback
from keyturn.config.models import CredentialFile, Duration, File, Flag, Group, Id, Scheme
from keyturn.config.shape import Section
from keyturn.core.lease import LONGEST, OFTENEST, SHORTEST
from keyturn.credential_file import CREDENTIAL_FORM, credential_path
from keyturn.destinations.base import Form

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
_SUBJECT = re.compile(r"(?:DNS|URI):[!-~]{1,250}", re.ASCII)
_SIZE = re.compile(r"([1-9][0-9]{0,5})(MiB|GiB)", re.ASCII)
_KIB = {"MiB": 1024, "GiB": 1024 * 1024}


def _subject(value: object) -> object:
    if not isinstance(value, str) or _SUBJECT.fullmatch(value) is None:
        raise ValueError
    return value


def _parties(value: object) -> object:
    names = list(value) if isinstance(value, dict) else [None]
    if not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names):
        raise ValueError
    return value


def _size(value: object) -> object:
    if not isinstance(value, str) or _SIZE.fullmatch(value) is None:
        raise ValueError
    return value


def _all_schemes() -> list[Scheme]:
    return ["argon2id", "hmac-sha256"]


class KeySection(Section):
    """One key of `hmac-sha256`: `verifier.keys`, by id. The id stands in each hash, the key nowhere."""

    file: Annotated[
        Path,
        BeforeValidator(credential_path),
        Form(CREDENTIAL_FORM),
        Field(
            description="file with the key: 64 hexadecimal digits, or 32 to 1024 bytes as they are; mode"
            " 0400 or 0600; `keyturn make-key` makes one"
        ),
    ]


class RelyingPartySection(Section):
    """One service that may ask: `verifier.relying_parties`, by name."""

    rule: ClassVar[str] = "a token_file, a certificate, or both"

    token_file: Annotated[
        CredentialFile,
        Field(
            description="its tokens, one a line, 32 characters at least; a second is for a change"
        ),
    ] = None
    certificate: Annotated[
        str | None,
        BeforeValidator(_subject),
        Form("DNS:name or URI:uri, as its subjectAltName has it"),
        Field(description="what its client certificate is made out to"),
    ] = None
    agents: Annotated[
        list[Id] | None,
        Field(min_length=1, description="the only agents that it hears of; default: all"),
        Form("a list of agents' ids, one at least"),
    ] = None

    @model_validator(mode="after")
    def _shows_itself(self) -> RelyingPartySection:
        if self.token_file is None and self.certificate is None:
            raise ValueError
        return self


class VerifierListen(Section):
    """Where verifiers are asked over HTTP: an address, a socket, or both."""

    rule: ClassVar[str] = "an address or a socket, and `tls` with any address but one of loopback"

    address: Annotated[
        Address,
        Form("IP:PORT such as 127.0.0.1:8700 or [::1]:8700"),
        Field(description="where to listen; any but loopback needs `tls` and relying parties"),
    ] = None
    tls: Annotated[TlsSection | None, Form("a mapping of certificate and key")] = None
    socket: Annotated[File, Field(description="a Unix socket, for gateways on this host")] = None
    group: Annotated[Group, Field(description="who may use the socket; default: our own")] = None

    @model_validator(mode="after")
    def _fits(self) -> VerifierListen:
        if self.address is None and (self.socket is None or self.tls is not None):
            raise ValueError
        if self.address is not None and self.tls is None and not is_loopback(self.address):
            raise ValueError
        if self.group is not None and self.socket is None:
            raise ValueError
        return self


class VerifierSection(Section):
    """How verifiers stay fresh, which keys they check with, where they are asked, and by whom."""

    rule: ClassVar[str] = (
        "a lease of 1s to 5m, and a poll of 20ms or more that is a quarter of it at most;"
        " relying_parties where others than this host can ask, and tls.client_ca for certificates"
    )

    lease: Annotated[
        Duration,
        Field(
            description="how long a verifier on PostgreSQL may answer until it must ask the store "
            "again; a revoke waits so long for one that does not answer"
        ),
    ] = timedelta(seconds=30)
    poll: Annotated[Duration, Field(description="how often it asks")] = timedelta(milliseconds=250)
    keys: Annotated[
        dict[Id, KeySection],
        Form("a mapping of ids to {file: …}"),
        Field(description="keys of hmac-sha256 (docs/howto/hmac-sha256.md)"),
    ] = Field(default_factory=dict)
    key: Annotated[
        Id | None, Form("an id in verifier.keys"), Field(description="the key of new hashes")
    ] = None
    schemes: Annotated[
        list[Scheme],
        Field(min_length=1, description="with which hashes a version may be accepted at all"),
        Form("a list of argon2id and hmac-sha256, one at least"),
    ] = Field(default_factory=_all_schemes)

    listen: Annotated[
        VerifierListen | None,
        Form("a mapping of address or socket"),
        Field(description="the service"),
    ] = None
    embedded: Annotated[
        Flag,
        Field(
            description="on SQLite `keyturn run` starts it as a child; false: you run it yourself"
        ),
    ] = True
    metrics: Annotated[
        ListenSettings | None,
        Form("a mapping of address"),
        Field(description="where the service has /healthz, /readyz and /metrics, besides `listen`"),
    ] = None
    relying_parties: Annotated[
        dict[str, RelyingPartySection],
        BeforeValidator(_parties),
        Form("a mapping of names to {token_file: …} or {certificate: …}"),
        Field(description="the services that may ask; without any, whoever reaches the address"),
    ] = Field(default_factory=dict)
    hash_memory: Annotated[
        str,
        BeforeValidator(_size),
        Form("a size such as 256MiB"),
        Field(description="what argon2 may use at once; more than one hash a core never runs"),
    ] = "256MiB"

    @model_validator(mode="after")
    def _polls_within(self) -> VerifierSection:
        good = SHORTEST <= self.lease <= LONGEST and OFTENEST <= self.poll <= self.lease / 4
        if not good:
            raise ValueError
        return self

    @model_validator(mode="after")
    def _strangers_are_out(self) -> VerifierSection:
        # SECURITY: an endpoint that tells anybody whether a secret is good is an oracle.
        address = self.listen.address if self.listen else None
        if address is not None and not is_loopback(address) and not self.relying_parties:
            raise ValueError
        tls = self.listen.tls if self.listen else None
        if any(one.certificate for one in self.relying_parties.values()) and (
            tls is None or tls.client_ca is None
        ):
            raise ValueError
        return self

    @property
    def hash_memory_kib(self) -> int:
        """What argon2 may use at once, in KiB."""
        return int(self.hash_memory[:-3]) * _KIB[self.hash_memory[-3:]]
