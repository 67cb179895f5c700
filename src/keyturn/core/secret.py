"""The secret: one value type with one exit, and the public form of a generated secret.

`<prefix>_<version id><random><checksum>` in the letters and digits of base 62, with one more
`_` before the random part. The version id is public, picks exactly one stored hash and is
never reused; the checksum (CRC-32) keeps typos and random guesses away from every later check and
lets scanners find leaks. It proves nothing by itself.
"""

from __future__ import annotations

import hmac
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
DEFAULT_PREFIX = "kt"
VERSION_ID_LENGTH = 14  # 62**14 ≈ 2**83: unguessable enough not to collide, and not time-ordered
RANDOM_LENGTH = 43  # 62**43 ≈ 2**256
CHECKSUM_LENGTH = 6  # 62**6 > 2**32
MAX_SECRET_BYTES = 256

RandomBytes = Callable[[int], bytes]

_FORM = re.compile(
    (
        rf"([A-Za-z0-9]{{1,16}})_([0-9A-Za-z]{{{VERSION_ID_LENGTH}}})"
        rf"_([0-9A-Za-z]{{{RANDOM_LENGTH}}})([0-9A-Za-z]{{{CHECKSUM_LENGTH}}})"
    ).encode()
)
VERSION_ID = re.compile(rf"[0-9A-Za-z]{{{VERSION_ID_LENGTH}}}")
# The version id is public and stays; the random part goes, also where a text was cut in the middle
# of it, and whatever stands in front of it.
_SECRET_PART = re.compile(rf"(_[0-9A-Za-z]{{{VERSION_ID_LENGTH}}}_)[0-9A-Za-z]{{4,}}")
# Where the beginning is missing too, the checksum cannot be checked any more: then a whole random part
# with its checksum goes that follows a `_`, of a length that no usual digest or id has. Without even
# the `_` it cannot be told from other people's ids, and masking those would blind whoever reads a log.
_CUT_PART = re.compile(
    r"_(?=[0-9A-Za-z]*[0-9])(?=[0-9A-Za-z]*[a-z])(?=[0-9A-Za-z]*[A-Z])"
    rf"[0-9A-Za-z]{{{RANDOM_LENGTH + CHECKSUM_LENGTH}}}(?![0-9A-Za-z])"
)


class Secret:
    """A secret value that prints as a marker. `reveal()` is the only way out."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the plaintext. Allowed where a destination or a hash needs it, nowhere else."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        # SECURITY: a plain == would tell a timer how long the common beginning is.
        return hmac.compare_digest(self._value.encode(), other._value.encode())

    __hash__ = None  # type: ignore[assignment]  # a hash would be a second exit

    def __len__(self) -> int:
        return len(self._value.encode())

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is never pickled or copied out of the process")

    def __getstate__(self) -> NoReturn:
        raise TypeError("a Secret is never pickled or copied out of the process")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedSecret:
    """The public parts of a secret in our own form."""

    prefix: str
    version_id: str


def mint(*, random_bytes: RandomBytes, prefix: str = DEFAULT_PREFIX) -> tuple[str, Secret]:
    """Return a new version id and the secret that carries it."""
    version_id = _base62(random_bytes, VERSION_ID_LENGTH)
    body = f"{prefix}_{version_id}_{_base62(random_bytes, RANDOM_LENGTH)}"
    return version_id, Secret(body + _checksum(body.encode()))


def parse(value: bytes) -> ParsedSecret | None:
    """Return the public parts of a secret of our form with a right checksum, else None.

    Only ASCII bytes that match from end to end count, and the form has one spelling only, so two
    different inputs can never name the same version.
    """
    if len(value) > MAX_SECRET_BYTES:
        return None
    found = _FORM.fullmatch(value)
    if found is None or _checksum(value[:-CHECKSUM_LENGTH]).encode() != found[4]:
        return None
    return ParsedSecret(prefix=found[1].decode(), version_id=found[2].decode())


def looks_like_ours(value: bytes) -> bool:
    """Tell whether a text has our form, whatever its checksum (imports refuse those)."""
    return _FORM.fullmatch(value) is not None


def mask(text: str) -> str:
    """Replace the secret part of everything that has the form of a secret of ours."""
    return _CUT_PART.sub("_***", _SECRET_PART.sub(r"\1***", text))


def is_version_id(text: str) -> bool:
    """Tell whether a text can be a version id."""
    return VERSION_ID.fullmatch(text) is not None


def _base62(random_bytes: RandomBytes, length: int) -> str:
    """Draw `length` unbiased base-62 digits (rejection sampling: 248 = 4 × 62)."""
    digits: list[str] = []
    while len(digits) < length:
        digits.extend(ALPHABET[byte % 62] for byte in random_bytes(length) if byte < 248)
    return "".join(digits[:length])


def _checksum(body: bytes) -> str:
    number, digits = zlib.crc32(body), ""
    for _ in range(CHECKSUM_LENGTH):
        number, digit = divmod(number, 62)
        digits = ALPHABET[digit] + digits
    return digits
