"""A secret that must never be found where it does not belong, and a search that finds it.

A leak is rarely the plain text: it is base64 in a header dump, UTF-16 in a core file, hex in a trace,
gzip in a log archive, or the first characters of a shortened line.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import itertools
import re
import urllib.parse
import zlib
from collections.abc import Callable, Iterable, Iterator

from keyturn.core.secret import Secret, mint
from keyturn.testing.fakes import seeded

PIECE = 8  # characters of the random part that count as a leak
FEWEST = 5  # different characters in a piece: fewer stand by chance in tables and made-up values
_PUBLIC = len("kt_") + 14 + 1  # prefix and version id are public: they stand in logs
_DEEPEST = 4  # archives in archives
_MOST = 64 * 1024 * 1024  # bytes that one archive may unpack to

_RUN = re.compile(rb"[0-9A-Za-z]{%d,}" % PIECE)
_BASE64 = re.compile(rb"[0-9A-Za-z+/_-]{12,}")
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_WIDE = re.compile(rb"(?:[0-9A-Za-z]\0{1,3}){7,}[0-9A-Za-z]")
_HEX = re.compile(rb"(?:[0-9A-Fa-f]{2}){%d,}" % PIECE)
# Percent (URL), \\u00 (JSON) and \\x (a repr): letters that need no escape, escaped all the same.
_ESCAPE = re.compile(rb"(?:%|\\u00|\\x)([0-9A-Fa-f]{2})")


def canary(seed: int = 0) -> tuple[str, Secret]:
    """Return a version id and a secret of our form, the same ones for the same seed."""
    return mint(random_bytes=seeded(seed))


def leaks(found: bytes | str, secret: Secret) -> list[str]:
    """Return the forms in which a secret, or a piece of its hidden part, is in some output."""
    data = found.encode("utf-8", "surrogatepass") if isinstance(found, str) else found
    blobs = [data, *(blob for _, blob in unpacked(data))]
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


class Scanner:
    """Looks for any piece of many secrets at once, in every form.

    It does not make the forms of each secret but undoes those of what it is given, so that tens of
    thousands of secrets cost no more than one. Made for secrets in our own form.
    """

    def __init__(self) -> None:
        self._pieces: dict[bytes, str] = {}

    def __len__(self) -> int:
        return len(self._pieces)

    def add(self, hidden: str) -> None:
        """Take the random part of a secret."""
        for text, form in ((hidden, "plain"), (hidden[::-1], "reversed")):
            for at in range(len(text) - PIECE + 1):
                piece = text[at : at + PIECE].encode()
                if len(set(piece)) >= FEWEST:
                    self._pieces.setdefault(piece, form)

    def find(self, data: bytes, *, known: set[bytes] | None = None) -> list[str]:
        """Return the forms in which a piece of any secret is in this output.

        `known` holds what was looked at before and was clean; use one only while nothing is added.
        """
        known = set() if known is None else known
        found = set(self._in(data, known))
        for form, blob in unpacked(data):
            found.update(f"{form}, {inner}" for inner in self._in(blob, known))
        return sorted(found)

    def _in(self, data: bytes, known: set[bytes]) -> Iterator[str]:
        yield from self._plain("", data, known)
        for form, decoded in _decoded(data, known):
            yield from self._plain(form, decoded, known)
            inside = unpacked(decoded)
            if form == "hex":  # so databases dump their bytes, whatever these are
                inside = itertools.chain(inside, _decoded(decoded, known))
            for inner, blob in inside:
                yield from self._plain(f"{form}, {inner}", blob, known)

    def _plain(self, form: str, data: bytes, known: set[bytes]) -> Iterator[str]:
        pieces = self._pieces
        for run in _new(_RUN.findall(data), known):
            for at in range(len(run) - PIECE + 1):
                if run[at : at + PIECE] in pieces:
                    known.discard(run)
                    yield form or pieces[run[at : at + PIECE]]
                    break


def unpacked(data: bytes, *, depth: int = _DEEPEST) -> Iterator[tuple[str, bytes]]:
    """Yield what gzip, zlib and zip members in some output hold; a cut one gives what it has."""
    if not depth:
        return
    for name, magic, skip, wbits in _ARCHIVES:
        for start in magic.finditer(data):
            blob = b""
            with contextlib.suppress(zlib.error, IndexError):  # it only looked like one
                at = start.start() + skip(data[start.start() : start.start() + 30])
                blob = zlib.decompressobj(wbits=wbits).decompress(memoryview(data)[at:], _MOST)
            if len(blob) >= PIECE:
                yield name, blob
                for inner, deeper in unpacked(blob, depth=depth - 1):
                    yield f"{name}, {inner}", deeper


def _zip_header(header: bytes) -> int:
    """Length of a local file header with its name and extra field (APPNOTE.TXT, 4.3.7)."""
    return 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


_ARCHIVES: tuple[tuple[str, re.Pattern[bytes], Callable[[bytes], int], int], ...] = (
    ("gzip", re.compile(rb"\x1f\x8b\x08"), lambda _header: 0, 31),
    ("zlib", re.compile(rb"\x78[\x01\x5e\x9c\xda]"), lambda _header: 0, 15),
    ("zip", re.compile(rb"PK\x03\x04.{4}\x08", re.DOTALL), _zip_header, -15),
)


def _new(runs: Iterable[bytes], known: set[bytes]) -> Iterator[bytes]:
    for run in runs:
        if run not in known:
            known.add(run)
            yield run


def _decoded(data: bytes, known: set[bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield what a text may have been before somebody encoded it."""
    for run in _WIDE.findall(data):
        yield "utf-16", run.replace(b"\0", b"")
    for run in _new((b"hex " + run for run in _HEX.findall(data)), known):
        digits = run[4:]
        yield "hex", binascii.unhexlify(digits)
        yield "hex", binascii.unhexlify(digits[1:-1])
    if b"%" in data or b"\\" in data:
        yield "escaped", _ESCAPE.sub(lambda found: binascii.unhexlify(found[1]), data)
    for run in _new((b"64 " + run for run in _BASE64.findall(data)), known):
        text = run[3:].translate(_URL_SAFE)
        for offset in range(4):
            part = text[offset:]
            with contextlib.suppress(binascii.Error):
                yield "base64", binascii.a2b_base64(part[: len(part) // 4 * 4])
