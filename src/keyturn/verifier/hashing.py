"""Hashes of the built-in authority: argon2id at rest, and a public 64-bit tag before it.

SECURITY: version ids are public and the checksum can be computed, so anyone can make well-formed
junk. Only a text whose tag matches reaches argon2; 192 bits of the secret stay unknown to a thief of
the store. The permits of a gate belong to the thread that hashes, not to the request: a client that
hangs up cannot leave more hashes running than there are permits.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import threading
from dataclasses import dataclass, field

from argon2 import PasswordHasher, extract_parameters
from argon2.exceptions import HashingError, InvalidHashError, VerificationError, VerifyMismatchError
from argon2.low_level import Type

from keyturn.core.secret import Secret
from keyturn.errors import StoreUnavailable

SCHEME = "argon2id"
TAG_LABEL = b"keyturn-tag-v1"
TAG_BYTES = 8
MAX_MEMORY_KIB = 128 * 1024  # what a stored hash may ask for, however it got there
MAX_TIME = 10
MAX_PARALLELISM = 4
_NO_MEMORY = "a hash could not be computed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Parameters of argon2id; the default is the OWASP minimum (Password Storage Cheat Sheet)."""

    memory_kib: int = 19456
    time: int = 2
    parallelism: int = 1


CHEAP_FOR_TESTS = Cost(memory_kib=64, time=1)


def _permits() -> threading.BoundedSemaphore:
    return threading.BoundedSemaphore(os.cpu_count() or 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hashing:
    """Hashes and checks secrets, never more at once than the gate allows."""

    cost: Cost = Cost()
    gate: threading.BoundedSemaphore = field(default_factory=_permits)

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
        with self.gate:
            try:
                return hasher.hash(secret.reveal())
            except (HashingError, MemoryError):
                raise StoreUnavailable(_NO_MEMORY) from None

    def matches(self, digest: str, secret: Secret) -> bool:
        """Tell whether the secret has this hash. One that asks for too much never matches.

        Raises StoreUnavailable where nobody can tell: argon2 did not get its memory.
        """
        if not _bearable(digest):
            return False
        with self.gate:
            try:
                return PasswordHasher().verify(digest, secret.reveal())
            except (VerifyMismatchError, InvalidHashError):
                return False
            except (VerificationError, MemoryError):
                # SECURITY: a "no" here would cut good agents off whenever the host is short of memory.
                raise StoreUnavailable(_NO_MEMORY) from None


def tag(version_id: str, secret: Secret) -> bytes:
    """Return the 64-bit tag of a generated secret."""
    text = TAG_LABEL + version_id.encode() + secret.reveal().encode()
    return hashlib.sha256(text).digest()[:TAG_BYTES]


def same_tag(expected: bytes, version_id: str, secret: Secret) -> bool:
    """Compare a tag in constant time."""
    return hmac.compare_digest(expected, tag(version_id, secret))


def fingerprint(key: bytes, *parts: bytes, secret: Secret) -> bytes:
    """Return a keyed, length-prefixed HMAC over the parts and the secret: a key for memory only."""
    mac = hmac.new(key, digestmod=hashlib.sha256)
    for part in (*parts, secret.reveal().encode()):
        mac.update(len(part).to_bytes(4, "big"))
        mac.update(part)
    return mac.digest()


def text_of(secret: Secret) -> bytes:
    """Return the bytes that a parser of the public form needs."""
    return secret.reveal().encode()


def _bearable(digest: str) -> bool:
    try:
        asked = extract_parameters(digest)
    except InvalidHashError:
        return False
    return (
        asked.type is Type.ID
        and asked.memory_cost <= MAX_MEMORY_KIB
        and asked.time_cost <= MAX_TIME
        and asked.parallelism <= MAX_PARALLELISM
    )
