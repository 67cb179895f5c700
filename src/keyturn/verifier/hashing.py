"""Hashes of the built-in authority: argon2id at rest, and a public 64-bit tag before it.

SECURITY: version ids are public and the checksum can be computed, so anyone can make well-formed
junk. Only a text whose tag matches reaches argon2; 192 bits of the secret stay unknown to a thief of
the store.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import hmac
import os
from dataclasses import dataclass, field

from argon2 import Parameters, PasswordHasher, extract_parameters
from argon2.exceptions import HashingError, InvalidHashError, VerificationError, VerifyMismatchError
from argon2.low_level import Type

from keyturn.core.secret import Secret
from keyturn.errors import StoreUnavailable
from keyturn.verifier.gate import Gate, Ticket

SCHEME = "argon2id"
TAG_LABEL = b"keyturn-tag-v1"
TAG_BYTES = 8
MAX_MEMORY_KIB = 128 * 1024  # what a stored hash may ask for, however it got there
MAX_TIME = 10
MAX_PARALLELISM = 4
_M_ARENA_MAX = -8  # malloc.h
_NO_MEMORY = "a hash could not be computed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Parameters of argon2id; the default is the OWASP minimum (Password Storage Cheat Sheet)."""

    memory_kib: int = 19456
    time: int = 2
    parallelism: int = 1


CHEAP_FOR_TESTS = Cost(memory_kib=64, time=1)


def _one_a_core() -> Gate:
    return Gate(os.cpu_count() or 1, queue=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hashing:
    """Hashes and checks secrets, never more at once than the gate allows."""

    cost: Cost = Cost()
    gate: Gate = field(default_factory=_one_a_core)

    def digest(self, secret: Secret) -> str:
        """Return the argon2id hash of a secret, in PHC form with its parameters.

        Raises StoreUnavailable where there is no memory for it.
        """
        hasher = PasswordHasher(
            time_cost=self.cost.time,
            memory_cost=self.cost.memory_kib,
            parallelism=self.cost.parallelism,
            type=Type.ID,
        )
        with self.gate.passing(self.cost.memory_kib):
            try:
                return hasher.hash(secret.reveal())
            except (HashingError, MemoryError):
                raise StoreUnavailable(_NO_MEMORY) from None

    def matches(self, digest: str, secret: Secret, ticket: Ticket | None = None) -> bool:
        """Tell whether the secret has this hash. One that asks for too much never matches.

        `ticket` is a place in the gate's queue. Raises StoreUnavailable where nobody can tell: argon2
        did not get its memory; VerifierBusy where too many wait.
        """
        asked = _asked(digest)
        if asked is None:
            return False
        with self.gate.passing(asked.memory_cost, ticket, who=digest):
            try:
                return PasswordHasher().verify(digest, secret.reveal())
            except (VerifyMismatchError, InvalidHashError):
                return False
            except (VerificationError, MemoryError):
                # SECURITY: a "no" here would cut good agents off whenever the host is short of memory.
                raise StoreUnavailable(_NO_MEMORY) from None


def share_memory() -> None:
    """Let all threads of this process hash in the same memory; to be called before there are any.

    glibc gives threads arenas of their own, and each keeps the 19 MiB of its last hash: 412 MiB were
    seen for 64 threads of which two hashed at once, 71 with one arena (mallopt(3)).
    """
    with contextlib.suppress(OSError, AttributeError):  # another libc, with habits of its own
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def tag(version_id: str, secret: Secret) -> bytes:
    """Return the 64-bit tag of a generated secret."""
    text = TAG_LABEL + version_id.encode() + secret.reveal().encode()
    return hashlib.sha256(text).digest()[:TAG_BYTES]


def same_tag(expected: bytes, version_id: str, secret: Secret) -> bool:
    """Compare a tag in constant time."""
    return hmac.compare_digest(expected, tag(version_id, secret))


class Fingerprint:
    """Keyed digests of byte strings: keys for memory only, of no use with another key (RFC 7693, 2.9)."""

    __slots__ = ("_keyed",)

    def __init__(self, key: bytes) -> None:
        self._keyed = hashlib.blake2b(key=key, digest_size=32)

    def of(self, *parts: bytes) -> bytes:
        """Return the 32 bytes that stand for these parts, in this order and divided like this."""
        digest = self._keyed.copy()  # half the price of a new one
        for part in parts:
            digest.update(b"%d:%b" % (len(part), part))
        return digest.digest()


def text_of(secret: Secret) -> bytes:
    """Return the bytes that a parser of the public form needs."""
    return secret.reveal().encode()


def _asked(digest: str) -> Parameters | None:
    """Return what a hash asks for, None where it is no hash of ours or asks for too much."""
    if not (digest.isascii() and digest.isprintable()):
        return None  # argon2-cffi raises for the one, and argon2 stops reading at some of the other
    try:
        asked = extract_parameters(digest)
    except InvalidHashError:
        return None
    bearable = (
        asked.type is Type.ID
        and asked.memory_cost <= MAX_MEMORY_KIB
        and asked.time_cost <= MAX_TIME
        and asked.parallelism <= MAX_PARALLELISM
    )
    return asked if bearable else None
