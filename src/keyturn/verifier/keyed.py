"""HMAC-SHA-256 for generated secrets: microseconds where argon2id takes a core's tens of milliseconds.

A generated secret has 256 bits of chance, so nothing has to make guesses dear. What the key adds: who can
write the store and has no key cannot make a row that is accepted, and a hash that is put under another
credential or version fits there no more (docs/howto/hmac-sha256.md).

    $hmac-sha256$v=1$k=KEY_ID,c=CHECK$MAC      base64url, without padding

MAC is HMAC(key, "v1" ‖ credential ‖ version ‖ secret), and CHECK the first 48 bits of HMAC(key, "check"):
by it a wrong file under a known id is told from a wrong secret. Each part stands behind its length, so no
two lists of parts make the same bytes, and the two labels keep the two uses of a key apart (NIST SP
800-108r1, 4).
"""

from __future__ import annotations

import hmac
import re
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from hashlib import sha256
from typing import NoReturn

from keyturn.core.secret import Secret

SCHEME = "hmac-sha256"
LEAST_BYTES = 32  # of a key: as many as the digest has (RFC 2104, 3)
MAC_LENGTH = (
    43  # of its text, at the very end: what stands before it is the same for every row of a key
)
_CHECK_BYTES = 6
_FORM = re.compile(
    rf"\${SCHEME}\$v=1\$k=(?P<key>[a-z0-9][a-z0-9._-]{{0,62}}),c=(?P<check>[A-Za-z0-9_-]{{8}})"
    rf"\$(?P<mac>[A-Za-z0-9_-]{{{MAC_LENGTH}}})",
    re.ASCII,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """What a stored text says of its key; `mac` is "" where only the key was asked for."""

    key_id: str
    check: str
    mac: str = ""


class Key:
    """The bytes of one key. It prints as a marker, and cannot be pickled or copied out."""

    __slots__ = ("_value", "check")

    def __init__(self, value: bytes) -> None:
        """Take 32 bytes at least. Raises ValueError."""
        if len(value) < LEAST_BYTES:
            raise ValueError("too short")
        self._value = value
        self.check = _text(hmac.digest(value, message(b"check"), sha256)[:_CHECK_BYTES])

    def digest(self, key_id: str, *, credential_uid: str, version_id: str, secret: Secret) -> str:
        """Return what is stored of a secret."""
        mac = self._mac(credential_uid, version_id, secret)
        return f"${SCHEME}$v=1$k={key_id},c={self.check}${mac}"

    def matches(
        self, named: Named, *, credential_uid: str, version_id: str, secret: Secret
    ) -> bool:
        """Tell in constant time whether the secret is that very version's."""
        mac = self._mac(credential_uid, version_id, secret)
        return hmac.compare_digest(named.mac.encode(), mac.encode())

    def _mac(self, credential_uid: str, version_id: str, secret: Secret) -> str:
        parts = b"v1", credential_uid.encode(), version_id.encode(), secret.reveal().encode()
        return _text(hmac.digest(self._value, message(*parts), sha256))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and hmac.compare_digest(self._value, other._value)

    def __hash__(self) -> int:
        return hash(self.check)

    def __repr__(self) -> str:
        return f"Key(***, check={self.check})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Key is never pickled or copied out of the process")

    def __getstate__(self) -> NoReturn:
        raise TypeError("a Key is never pickled or copied out of the process")


def message(*parts: bytes) -> bytes:
    """Return the parts as one text that no other list of parts makes."""
    return b"".join([len(part).to_bytes(4, "big") + part for part in parts])


def read(digest: str) -> Named | None:
    """Return what a stored text says, None where it is none of this version of the scheme."""
    found = _FORM.fullmatch(digest)
    return (
        None
        if found is None
        else Named(key_id=found["key"], check=found["check"], mac=found["mac"])
    )


def read_head(head: str) -> Named | None:
    """Return which key is named by a stored text without its MAC, None as in `read`."""
    found = read(head + "A" * MAC_LENGTH)
    return None if found is None else Named(key_id=found.key_id, check=found.check)


def _text(value: bytes) -> str:
    return urlsafe_b64encode(value).decode().rstrip("=")
