"""The search for leaked secrets finds them in every dress, and nothing else."""

from __future__ import annotations

import base64
import gzip
import random
import urllib.parse
from collections.abc import Callable

import pytest

from keyturn.testing import canary, leaks

DRESSES: dict[str, Callable[[str], bytes]] = {
    "plain": str.encode,
    "piece": lambda s: s[30:38].encode(),
    "cut": lambda s: s[:40].encode(),
    "url": lambda s: urllib.parse.quote(s).encode(),
    "reversed": lambda s: s[::-1].encode(),
    "utf-16": lambda s: s.encode("utf-16"),
    "utf-16-be": lambda s: s.encode("utf-16-be"),
    "hex": lambda s: s.encode().hex().encode(),
    "HEX": lambda s: s.encode().hex().upper().encode(),
    "gzip": lambda s: b"before" + gzip.compress(b"x" + s.encode()) + b"after",
    **{
        f"base64+{n}": lambda s, n=n: base64.b64encode(b"a" * n + s.encode() + b"zz")
        for n in range(3)
    },
    **{
        f"base64url+{n}": lambda s, n=n: base64.urlsafe_b64encode(b"a" * n + s.encode())
        for n in range(3)
    },
}


@pytest.mark.parametrize("dress", DRESSES.values(), ids=DRESSES.keys())
def test_it_is_found_in_every_dress(dress: Callable[[str], bytes]) -> None:
    """Twenty secrets, each between other bytes."""
    draw = random.Random(3)
    for seed in range(20):
        _, secret = canary(seed)
        noise = draw.randbytes(50)
        assert leaks(noise + b"\n" + dress(secret.reveal()) + b"\n" + noise, secret)


def test_the_public_part_is_no_leak() -> None:
    """Version ids stand in logs, and other secrets are not this one."""
    version_id, secret = canary(1)
    assert leaks(f"version kt_{version_id}_ rotated, {canary(2)[1].reveal()}", secret) == []
    assert leaks(random.Random(5).randbytes(200_000), secret) == []


def test_the_same_seed_gives_the_same_secret() -> None:
    """Tests can name a secret by its seed."""
    assert canary(4) == canary(4)
    assert canary(4)[0] != canary(5)[0]
