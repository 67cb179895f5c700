"""Signatures as Standard Webhooks has them (standardwebhooks.com, specification, "Signature scheme").

A receiver verifies `webhook-signature` over id, time and body, refuses a time that is minutes off,
and remembers ids: so nobody who saw a delivery can repeat it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from pathlib import Path

from keyturn.core.secret import Secret
from keyturn.credential_file import read_credential
from keyturn.errors import ConfigError

PREFIX = "whsec_"
LEAST, MOST = 24, 64  # bytes of a key, as the specification has them
KEYS = 2  # the new one and the one that receivers may still have
_HINT = (
    "one line `whsec_` and 24 to 64 random bytes in base64, or two while it changes:"
    ' echo "whsec_$(openssl rand -base64 32)" > FILE'
)


def read_keys(path: Path) -> tuple[Secret, ...]:
    """Read the keys of a hook anew: the file may have been replaced. Raises ConfigError."""
    lines = [line.strip() for line in read_credential(path).splitlines() if line.strip()]
    if not 1 <= len(lines) <= KEYS:
        raise ConfigError(f"{path} holds {len(lines)} keys", hint=_HINT)
    for line in lines:
        _bytes_of(line, path)
    return tuple(Secret(line) for line in lines)


def headers(keys: tuple[Secret, ...], *, id: str, seconds: int, body: bytes) -> dict[str, str]:
    """Return the three headers of a delivery; `seconds` is the time of this try since 1970."""
    signed = f"{id}.{seconds}.".encode() + body
    signatures = [
        base64.b64encode(hmac.digest(_bytes_of(key.reveal()), signed, hashlib.sha256)).decode()
        for key in keys
    ]
    return {
        "webhook-id": id,
        "webhook-timestamp": str(seconds),
        "webhook-signature": " ".join(f"v1,{one}" for one in signatures),
    }


def _bytes_of(text: str, path: Path | None = None) -> bytes:
    found = b""
    if text.startswith(PREFIX):
        try:
            found = base64.b64decode(text.removeprefix(PREFIX), validate=True)
        except binascii.Error:
            found = b""
    if not LEAST <= len(found) <= MOST:
        # Outside of the handler: an error's text must not hang on ours.
        raise ConfigError(f"{path} holds no key for webhooks", hint=_HINT)
    return found
