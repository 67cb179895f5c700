"""Nobody learns from the verifier which logins, ids or secrets there are: not by bytes, nor by time.

CVE-2023-3462, CVE-2025-6011, CVE-2025-54999, CVE-2020-35177, TOB-PYPI-5, GHSA-34fc-gh42-pj53: in each of
them one kind of refusal took longer, or said more, than another one.
"""

from __future__ import annotations

import http.client
import os
import random
import re
import socket
import statistics
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import pytest

from keyturn.core.model import VersionState
from keyturn.core.secret import ALPHABET, CHECKSUM_LENGTH, RANDOM_LENGTH, _checksum, mint
from support.cutter import administration, cut
from support.http_verifier import Held, Served, basic, served
from support.raw_client import connect
from support.stores import RealClock

SEED = int(os.environ.get("KEYTURN_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)
MOST_APART = ("unknown", "known id", "revoked")  # in what the store and the spool do for them
Kind = Callable[[], tuple[str, str]]


def wrong(draw: random.Random, version_id: str) -> str:
    """Return a well-formed secret of a version that is not the right one."""
    body = f"kt_{version_id}_" + "".join(draw.choices(ALPHABET, k=RANDOM_LENGTH))
    assert CHECKSUM_LENGTH
    return body + _checksum(body.encode())


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Served]:
    """Give a service with an agent in each state."""
    names = ["good", "known", "revoked", "retired", "expired", "suspended"]
    with served(tmp_path, names) as found:
        held = {one.agent: one for one in found.held}
        verbs = administration(tmp_path, found.store)
        cut(verbs, "revoke", held["revoked"].version_id)
        cut(verbs, "suspend", "suspended")
        now = RealClock().now()
        found.amend("retired", state=VersionState.RETIRED, ended_at=now)
        found.amend("expired", state=VersionState.PREVIOUS, deadline=now)
        yield found


def kinds_of(service: Served, draw: random.Random) -> dict[str, Kind]:
    """Return each kind of refusal, with the login and the secret that it shows."""
    held: dict[str, Held] = {one.agent: one for one in service.held}

    def right(name: str) -> Kind:
        return lambda: (name, held[name].secret.reveal())

    return {
        "unknown": lambda: ("good", mint(random_bytes=draw.randbytes)[1].reveal()),
        "unknown login": lambda: ("nobody", mint(random_bytes=draw.randbytes)[1].reveal()),
        "known id": lambda: ("known", wrong(draw, held["known"].version_id)),
        "revoked": right("revoked"),
        "revoked id": lambda: ("revoked", wrong(draw, held["revoked"].version_id)),
        "retired": right("retired"),
        "expired": right("expired"),
        "suspended": right("suspended"),
        "another agent's": lambda: ("known", held["good"].secret.reveal()),
    }


class Client:
    """A connection on which each answer has the same length."""

    def __init__(self, port: int) -> None:
        self.socket = connect(port)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.began, self.said = 0.0, ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.socket.close()

    def ask(self, login: str, secret: str) -> None:
        """Send a question."""
        header = f"Authorization: {basic(login, secret)}\r\n"
        data = f"POST /v1/verify HTTP/1.1\r\nHost: x\r\n{header}\r\n".encode()
        self.began = time.perf_counter()
        self.socket.sendall(data)

    def answer(self) -> float:
        """Return how long the answer took."""
        found = self.socket.recv(65536)
        took = time.perf_counter() - self.began
        self.said = re.sub(rb"Date: [^\r]*", b"", found).decode()
        return took


def one_refusal(
    connection: http.client.HTTPConnection, shown: tuple[str, str]
) -> tuple[float, str]:
    """Ask, and return how long that took and all that was said but the date."""
    headers = {"Authorization": basic(*shown)}
    began = time.perf_counter()
    connection.request("POST", "/v1/verify", headers=headers)
    found = connection.getresponse()
    body = found.read()
    took = time.perf_counter() - began
    said = [(name, value) for name, value in found.getheaders() if name != "Date"]
    return took, repr((found.status, said, body))


def auc(one: Sequence[float], other: Sequence[float]) -> float:
    """Return how often a value of one exceeds one of the other: 0.5 tells nothing."""
    ordered = sorted(one)
    above = sum(bisect_left(ordered, x) + bisect_right(ordered, x) for x in other)
    return above / 2 / len(one) / len(other)


@pytest.mark.parametrize(
    ("samples", "apart", "most"),
    [
        pytest.param(250, 0.15, 0.6, id="tenth"),
        pytest.param(
            10_000, 0.02, 0.53, id="whole", marks=[pytest.mark.full, pytest.mark.timeout(3600)]
        ),
    ],
)
def test_cve_2023_3462_no_refusal_differs_from_another(
    service: Served, samples: int, apart: float, most: float
) -> None:
    """Unknown, wrong, revoked, retired, expired, suspended, another's: the same bytes and times."""
    draw = random.Random(SEED)
    kinds = kinds_of(service, draw)
    for _ in range(2):
        took = timed(service, kinds, draw, samples)
        middle, told = statistics.median(took["unknown"]), []
        for name, values in took.items():
            if len(values) < samples:
                continue  # its bytes were looked at, and no more
            share, known = statistics.median(values) / middle - 1, auc(took["unknown"], values)
            print(f"{name}: median {share:+.1%}, AUC {known:.3f}")
            if abs(share) > apart or not 1 - most <= known <= most:
                told.append(f"{name}: median {share:+.1%}, AUC {known:.3f}")
        if not told:
            break  # what a busy machine tells once, a leak tells each time
    assert not told, f"seed {SEED}"


def timed(
    service: Served, kinds: dict[str, Kind], draw: random.Random, samples: int
) -> dict[str, list[float]]:
    """Ask each kind so often, in turns, and return how long each answer took; all say the same."""
    took: dict[str, list[float]] = {name: [] for name in kinds}
    said: dict[str, set[str]] = {name: set() for name in kinds}
    with Client(service.port) as one:
        for number in range(samples):
            asked = [
                (name, kinds[name]())  # made before: what a kind takes to make is no part of it
                for name in draw.sample(list(kinds), len(kinds))
                if number < 5 or samples >= 10_000 or name in MOST_APART
            ]
            for name, shown in asked:
                one.ask(*shown)
                took[name].append(one.answer())
                said[name].add(one.said)
    assert len(set.union(*said.values())) == 1, said
    assert service.hashes == []
    return took


def test_cve_2025_6004_no_spelling_of_a_login_is_another_way_in(service: Served) -> None:
    """CVE-2025-54998, CVE-2025-5999, CVE-2026-9798: case, blanks, zero width, NFKC, escapes: all no."""
    right = next(one for one in service.held if one.agent == "good")
    assert service.ask("/v1/auth", headers={"Authorization": right.basic})[0] == 200
    before = len(service.hashes)
    blanks = [" ", "\t", "\u00a0", "\u200b", "\ufeff", "\u2060", "%00", "%20", "+", "\0", "\n", "."]
    spellings = [
        *(
            "".join(c.upper() if 1 << i & n else c for i, c in enumerate("good"))
            for n in range(1, 16)
        ),
        *(place.format(blank) for blank in blanks for place in ("good{}", "{}good", "go{}od")),
        *(f"goo{c}" for c in "ԁｄⅾ𝐝ḍďđ"),
        *(f"{c}ood" for c in "ｇᶃɡǵ"),
        *(f"g{a}{b}d" for a in "оοｏ0" for b in "оοｏ0"),
        *(
            "%2567ood",
            "%u0067ood",
            "&#103;ood",
            "good/",
            "good\\",
            "good;",
            "good,",
            "good:",
            "'good'",
        ),
        *(f"good{n}" for n in range(120)),
    ]
    assert len(spellings) >= 200
    for number, login in enumerate(spellings):
        path = ("/v1/auth", "/v1/verify")[number % 2]
        header = basic(login, right.secret.reveal())
        assert service.ask(path, headers={"Authorization": header})[0] == 401, login
    assert len(service.hashes) == before


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(200, id="tenth"),
        pytest.param(10_000, id="whole", marks=[pytest.mark.full, pytest.mark.timeout(600)]),
    ],
)
def test_a_lockout_is_no_denial_of_service(service: Served, number: int) -> None:
    """Row 3: so many bad tries at a login from one place refuse its agent elsewhere not once."""
    draw = random.Random(SEED)
    right = next(one for one in service.held if one.agent == "good")
    bad = http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)
    good = http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)
    for count in range(number):
        assert "401" in one_refusal(bad, ("good", wrong(draw, right.version_id)))[1][:10]
        if count % 4 == 0:
            good.request("GET", "/v1/auth", headers={"Authorization": right.basic})
            found = good.getresponse()
            found.read()
            assert found.status == 200
    bad.close()
    good.close()
