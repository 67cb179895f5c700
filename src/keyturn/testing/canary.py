"""A secret that must never be found where it does not belong, and a search that finds it.

A leak is rarely the plain text: it is base64 in a header dump, UTF-16 in a core file, hex in a trace,
gzip in a log archive, or the first characters of a shortened line.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import urllib.parse
import zlib
from collections.abc import Iterator

from keyturn.core.secret import Secret, mint
from keyturn.testing.fakes import seeded

PIECE = 8  # characters of the random part that count as a leak
_PUBLIC = len("kt_") + 14 + 1  # prefix and version id are public: they stand in logs


def canary(seed: int = 0) -> tuple[str, Secret]:
    """Return a version id and a secret of our form, the same ones for the same seed."""
    return mint(random_bytes=seeded(seed))


def leaks(found: bytes | str, secret: Secret) -> list[str]:
    """Return the forms in which a secret, or a piece of its hidden part, is in some output."""
    data = found.encode("utf-8", "surrogatepass") if isinstance(found, str) else found
    blobs = [data, *_unpacked(data)]
    return sorted({form for form, mark in _forms(secret) if any(mark in blob for blob in blobs)})


def _forms(secret: Secret) -> Iterator[tuple[str, bytes]]:
    plain = secret.reveal()
    hidden = plain[_PUBLIC:] if plain.startswith("kt_") else plain
    yield from (("piece", hidden[i : i + PIECE].encode()) for i in range(len(hidden) - PIECE + 1))
    yield "url", urllib.parse.quote(plain, safe="").encode()
    yield "reversed", hidden[::-1].encode()
    for name in ("utf-16-le", "utf-16-be", "utf-32-le"):
        yield name, hidden.encode(name)
    yield "hex", hidden.encode().hex().encode()
    yield "HEX", hidden.encode().hex().upper().encode()
    for offset in range(3):
        for name, encode in (
            ("base64", base64.b64encode),
            ("base64url", base64.urlsafe_b64encode),
        ):
            # The first and last groups depend on what stands beside it.
            yield f"{name}+{offset}", encode(b"\0" * offset + hidden.encode())[4:-4]


def _unpacked(data: bytes) -> Iterator[bytes]:
    """Yield what gzip members in some output hold; a cut one gives what it has."""
    magic = gzip.compress(b"")[:3]
    at = data.find(magic)
    while at >= 0:
        with contextlib.suppress(zlib.error):  # it only looked like one
            yield zlib.decompressobj(wbits=31).decompress(data[at:])
        at = data.find(magic, at + 1)
