"""Strangers' junk, however much of it, never costs a good agent its answer."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from keyturn.core.model import VersionState
from keyturn.core.secret import mint
from keyturn.errors import StoreUnavailable, VerificationFailed
from keyturn.testing.fakes import seeded
from keyturn.verifier.decision import Verifier
from keyturn.verifier.hashing import CHEAP_FOR_TESTS, Hashing, tag
from support.cutter import open_store
from support.stores import RealClock, add, entry, version

THREADS = 8


@pytest.mark.parametrize(
    "seconds", [3, pytest.param(60, marks=[pytest.mark.full, pytest.mark.timeout(300)])]
)
def test_a_flood_of_junk_costs_no_good_agent_its_answer(tmp_path: Path, seconds: int) -> None:
    """Well-formed junk from many threads, unknown ids and a known one: no 503, no hash for any."""
    store = open_store(tmp_path, writer="w")
    (tmp_path / "revoked.d").mkdir(mode=0o700)
    hashing = Hashing(cost=CHEAP_FOR_TESTS)
    version_id, secret = mint(random_bytes=seeded(1))
    known = version(
        add(store, "a"),
        login="a",
        id=version_id,
        state=VersionState.CURRENT,
        digest=hashing.digest(secret),
        tag=tag(version_id, secret),
    )
    store.amend("cred-a", lambda case: (replace(case, versions=(known,)), [entry()]))
    verifier = Verifier.open(
        f"sqlite:///{tmp_path}/keyturn.db", state_dir=tmp_path, clock=RealClock(), hashing=hashing
    )
    draw = random.Random(2).randbytes
    junk = [mint(random_bytes=draw)[1] for _ in range(300)]
    over = threading.Event()

    def flood() -> int:
        sent = 0
        while not over.is_set():
            for one in junk:
                with suppress(VerificationFailed, StoreUnavailable):
                    verifier.verify("a", one)
                sent += 1
        return sent

    answers: Counter[str] = Counter()
    with ThreadPoolExecutor(THREADS) as pool:
        floods = [pool.submit(flood) for _ in range(THREADS)]
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                answers[verifier.verify("a", secret).state] += 1
            except StoreUnavailable:
                answers["unavailable"] += 1
            time.sleep(0.005)
        over.set()
        sent = sum(one.result() for one in floods)
    verifier.close()
    store.close()

    assert set(answers) == {"current"}, (answers, sent)
    assert verifier.counts["unavailable"] == 0
    assert len(verifier._proofs) == 1
