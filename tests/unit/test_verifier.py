"""Who says yes: every no looks alike, junk reaches no hash, and nothing outlives a revoke."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyturn.core.model import AgentState, VersionState
from keyturn.core.secret import ALPHABET, Secret, mint, parse
from keyturn.errors import StoreUnavailable, UnknownVersion, VerificationFailed, VerifierBusy
from keyturn.storage.decisions import Decision
from keyturn.storage.hashes import InUse
from keyturn.testing.fakes import FakeClock, seeded
from keyturn.verifier.authority import BuiltinAuthority
from keyturn.verifier.decision import Proof, Unproven, Verifier, identify
from keyturn.verifier.gate import Gate, Ticket
from keyturn.verifier.hashing import CHEAP_FOR_TESTS, Hashing, tag
from keyturn.verifier.spool import Spool


class Rows:
    """A reader over a dictionary, as fresh as the real one."""

    def __init__(self) -> None:
        self.rows: dict[str, Decision] = {}
        self.broken = False

    def lookup(self, version_id: str, login: str = "") -> Decision | None:
        if self.broken:
            raise StoreUnavailable
        return self.rows.get(version_id)

    def imported(self, login: str) -> list[Decision]:
        if self.broken:
            raise StoreUnavailable
        return [r for r in self.rows.values() if r.tag is None and r.login == login]

    def in_use(self) -> list[InUse]:
        return [
            InUse(
                scheme=r.scheme,
                head=r.digest[:-43] if r.scheme == "hmac-sha256" else "",
                versions=1,
            )
            for r in self.rows.values()
        ]

    def close(self) -> None:
        pass


class Counted(Hashing):
    """Hashing that counts its checks and can be held up."""

    def __init__(self) -> None:
        super().__init__(cost=CHEAP_FOR_TESTS)
        object.__setattr__(self, "checks", [])
        object.__setattr__(self, "during", lambda: None)

    def matches(self, digest: str, secret: Secret, ticket: Ticket | None = None) -> bool:
        self.checks.append(digest)  # type: ignore[attr-defined]
        right = super().matches(digest, secret, ticket)
        self.during()  # type: ignore[attr-defined]
        return right


class Bench:
    """A verifier with one agent and its secret."""

    def __init__(self, folder: Path) -> None:
        self.rows, self.clock, self.hashing = Rows(), FakeClock(), Counted()
        self.spool = Spool(folder / "revoked.d")
        self.verifier = Verifier(self.rows, self.spool, self.clock, hashing=self.hashing)
        self.secret = self.add(1)

    def add(self, seed: int, **changes: object) -> Secret:
        """Add a version of billing-bot and return its secret."""
        version_id, secret = mint(random_bytes=seeded(seed))
        row = Decision(
            not_after=None,
            agent_uid="a",
            agent_name="billing-bot",
            login="billing-bot@acme",
            agent_state=AgentState.ENABLED,
            credential_uid="c",
            version_id=version_id,
            state=VersionState.CURRENT,
            scheme="argon2id",
            digest=self.hashing.digest(secret),
            tag=tag(version_id, secret),
            deadline=None,
        )
        self.rows.rows[version_id] = replace(row, **changes)
        return secret

    def change(self, secret: Secret, **changes: object) -> None:
        """Change the row of a secret."""
        found = parse(secret.reveal().encode())
        assert found is not None
        row = self.rows.rows[found.version_id]
        self.rows.rows[found.version_id] = replace(row, **changes)

    def says(self, secret: Secret | str | bytes, login: str = "billing-bot@acme") -> bool:
        """Tell whether the verifier says yes."""
        try:
            self.verifier.verify(login, secret)
        except VerificationFailed:
            return False
        return True


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Give a verifier with one good secret."""
    return Bench(tmp_path)


def id_of(secret: Secret) -> str:
    """Return the public part."""
    found = parse(secret.reveal().encode())
    assert found is not None
    return found.version_id


REFUSALS = {
    "an unknown version": lambda b: (b.rows.rows.clear(), b.secret)[1],
    "a wrong random part": lambda b: forged(b.secret),
    "another login": lambda b: (b.change(b.secret, login="other"), b.secret)[1],
    "a retired version": lambda b: (b.change(b.secret, state=VersionState.RETIRED), b.secret)[1],
    "a revoked version": lambda b: (b.change(b.secret, state=VersionState.REVOKED), b.secret)[1],
    "a suspended agent": lambda b: (
        b.change(b.secret, agent_state=AgentState.SUSPENDED),
        b.secret,
    )[1],
    "a removed agent": lambda b: (b.change(b.secret, agent_state=AgentState.REMOVED), b.secret)[1],
    "a passed deadline": lambda b: (b.change(b.secret, deadline=b.clock.now()), b.secret)[1],
    "a tombstone": lambda b: (b.spool.revoke(id_of(b.secret), {}), b.secret)[1],
    "no secret at all": lambda _b: "",
    "a text of another form": lambda _b: "x" * 40,
    "too long a text": lambda _b: "x" * 300,
    "bytes that are no text": lambda _b: b"\xff\xfe",
    "a lone surrogate": lambda _b: "\ud800" * 20,
    "a trailing newline": lambda b: b.secret.reveal() + "\n",
}


def forged(secret: Secret) -> str:
    """Make a well-formed secret of the same version: anybody can, from a log."""
    other = mint(random_bytes=seeded(99))[1].reveal()
    version = id_of(secret)
    from keyturn.core import secret as form

    body = f"kt_{version}_{other.split('_')[2][: form.RANDOM_LENGTH]}"
    return body + form._checksum(body.encode())


@pytest.mark.parametrize("case", REFUSALS)
def test_every_no_is_the_same_no(bench: Bench, case: str) -> None:
    """One class, one text, no hash, and nothing about why."""
    presented = REFUSALS[case](bench)

    with pytest.raises(VerificationFailed) as caught:
        bench.verifier.verify("billing-bot@acme", presented)

    assert str(caught.value) == str(VerificationFailed())
    assert caught.value.__cause__ is None
    assert bench.hashing.checks == []  # type: ignore[attr-defined]
    assert bench.verifier.counts == {"refused": 1}


@pytest.mark.parametrize("login", ["\ud800", "a\0", "a\n", "\u00e9", "\x7f", "billing-bot@acme\0"])
@pytest.mark.parametrize("ours", [True, False])
def test_a_login_that_nobody_can_have_is_a_plain_no(bench: Bench, login: str, ours: bool) -> None:
    """Neither an error of a codec or a database nor a look-up comes of it."""
    bench.rows.broken = True  # would raise
    secret: Secret | str = bench.secret if ours else "x" * 20

    with pytest.raises(VerificationFailed):
        bench.verifier.verify(login, secret)


@pytest.mark.parametrize("state", ["pending", "current", "previous", "kept"])
def test_every_accepted_state_is_a_yes(bench: Bench, state: str) -> None:
    """Pending as soon as it is stored, previous and kept through their grace."""
    bench.change(bench.secret, state=VersionState(state))

    found = bench.verifier.verify("billing-bot@acme", bench.secret)

    assert (found.agent, found.version_id, found.state) == (
        "billing-bot",
        id_of(bench.secret),
        state,
    )


def test_a_store_that_cannot_be_read_is_neither_yes_nor_no(bench: Bench) -> None:
    """Nobody can tell: 503, also for what was good a moment ago."""
    assert bench.says(bench.secret)
    bench.rows.broken = True

    with pytest.raises(StoreUnavailable):
        bench.verifier.verify("billing-bot@acme", bench.secret)


def test_a_tombstone_is_a_no_where_the_store_cannot_be_read(bench: Bench) -> None:
    """Whoever locks the store gets no "cannot tell" for what was revoked; there is no hash either."""
    bench.spool.revoke(id_of(bench.secret), {})
    bench.rows.broken = True

    assert not bench.says(bench.secret)
    assert bench.hashing.checks == []  # type: ignore[attr-defined]


def test_a_deadline_is_judged_at_each_verification(bench: Bench) -> None:
    """No sweeper is needed to end a grace, and what is remembered does not prolong it."""
    bench.change(bench.secret, deadline=bench.clock.now() + timedelta(seconds=10))
    assert bench.says(bench.secret)
    bench.clock.advance(timedelta(seconds=10))

    assert not bench.says(bench.secret)


@pytest.mark.parametrize("how", ["spool", "row", "suspend"])
def test_what_is_remembered_never_outlives_a_change(bench: Bench, how: str) -> None:
    """A good secret is refused by the first verification after the change."""
    assert bench.says(bench.secret)
    if how == "spool":
        bench.spool.revoke(id_of(bench.secret), {})
    elif how == "row":
        bench.change(bench.secret, state=VersionState.REVOKED)
    else:
        bench.change(bench.secret, agent_state=AgentState.SUSPENDED)

    assert not bench.says(bench.secret)


@pytest.mark.parametrize("how", ["spool", "row"])
def test_a_revoke_during_the_hash_wins(bench: Bench, how: str) -> None:
    """Spool and row are looked at once more before the yes."""

    def revoke() -> None:
        if how == "spool":
            bench.spool.revoke(id_of(bench.secret), {})
        else:
            bench.change(bench.secret, state=VersionState.REVOKED)

    object.__setattr__(bench.hashing, "during", revoke)

    assert not bench.says(bench.secret)


@pytest.mark.parametrize(
    "rounds", [1000, pytest.param(10_000, marks=pytest.mark.full)], ids=["tenth", "whole"]
)
def test_no_race_gives_a_stale_yes(tmp_path: Path, rounds: int) -> None:
    """A verification that starts after a revoke returned is refused, however hot the memory is."""
    bench = Bench(tmp_path)
    stale, secret = 0, bench.secret
    with ThreadPoolExecutor(2) as pool:
        for number in range(rounds):
            secret = bench.add(number + 10) if number % 10 == 0 else secret
            bench.change(secret, state=VersionState.CURRENT)
            busy = [pool.submit(bench.says, secret) for _ in range(2)]
            bench.change(secret, state=VersionState.REVOKED)
            stale += bench.says(secret)
            for one in busy:
                one.result()
    assert stale == 0


def test_five_hundred_first_uses_are_one_hash(bench: Bench) -> None:
    """A fleet that gets one new secret at once costs one argon2."""
    object.__setattr__(bench.hashing, "during", lambda: time.sleep(0.2))
    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda _: bench.says(bench.secret), range(500)))

    assert answers == [True] * 500
    assert len(bench.hashing.checks) == 1  # type: ignore[attr-defined]


def test_what_only_a_hash_can_tell_waits_in_the_queue(bench: Bench) -> None:
    """What is begun holds its place until it is proven, and is remembered like any other yes."""
    verifier, gate = bench.verifier, Gate(1, queue=1)
    object.__setattr__(bench.hashing, "gate", gate)
    shown = b"billing-bot@acme", bench.secret.reveal().encode()
    begun = verifier.begin(b"key", *shown)
    assert isinstance(begun, Unproven)
    assert verifier.waiting == 1
    with pytest.raises(VerifierBusy):
        verifier.begin(b"another key", *shown)
    found = begun.prove()
    assert isinstance(found, Proof)
    assert verifier.waiting == 0
    assert isinstance(verifier.begin(b"another key", *shown), Proof)  # this hash was checked


def test_a_hash_that_nobody_can_compute_gives_its_place_back(bench: Bench) -> None:
    """Whatever ends a check, the queue has room again."""
    bench.change(bench.secret, scheme="argon2id", digest="no hash")
    begun = bench.verifier.begin(b"key", b"billing-bot@acme", bench.secret.reveal().encode())
    assert isinstance(begun, Unproven)
    assert begun.prove() is None
    assert bench.verifier.waiting == 0


@pytest.mark.parametrize(
    "digest",
    [
        "$argon2id$v=19$m=1048576,t=2,p=1$c29tZXNhbHQ$aGFzaGhhc2hoYXNoaGFzaA",
        "$argon2id$v=19$m=64,t=11,p=1$c29tZXNhbHQ$aGFzaGhhc2hoYXNoaGFzaA",
        "$argon2id$v=19$m=64,t=1,p=64$c29tZXNhbHQ$aGFzaGhhc2hoYXNoaGFzaA",
        "$argon2i$v=19$m=64,t=1,p=1$c29tZXNhbHQ$aGFzaGhhc2hoYXNoaGFzaA",
        "garbage",
        "",
    ],
)
def test_a_stored_hash_that_asks_for_too_much_never_matches(digest: str) -> None:
    """Whoever writes a hash into the store cannot make a verifier burn."""
    began = time.process_time()

    assert Hashing().matches(digest, Secret("x" * 40)) is False
    assert time.process_time() - began < 0.5


def test_a_hash_without_memory_is_no_answer() -> None:
    """Short of memory nobody can tell: 503, never a refusal; and nothing is remembered of it."""
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_MEMORY], capture_output=True, text=True, check=False
    )

    assert done.stdout.split() == ["unavailable", "unavailable", "True"], done.stderr


_WITHOUT_MEMORY = """
import resource
from keyturn.core.secret import Secret
from keyturn.errors import StoreUnavailable
from keyturn.verifier.hashing import Cost, Hashing

hashing, secret = Hashing(cost=Cost(memory_kib=65536)), Secret("x" * 40)
digest = hashing.digest(secret)


def ask(what):
    try:
        print(what())
    except StoreUnavailable:
        print("unavailable")


used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 16 * 2**20, -1))
ask(lambda: hashing.matches(digest, secret))
ask(lambda: hashing.digest(secret))
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
ask(lambda: hashing.matches(digest, secret))
"""


def test_the_authority_knows_its_own_version_only(bench: Bench) -> None:
    """Recovery asks whether a text is this very version, by tag and by hash."""
    authority = BuiltinAuthority(hashing=Hashing(cost=CHEAP_FOR_TESTS))
    version_id, secret = mint(random_bytes=seeded(5))
    accepted = authority.accept(
        version_id=version_id, secret=secret, credential_uid="c", scheme="argon2id"
    )
    from keyturn.core.model import Version

    version = Version(
        id=version_id, credential_uid="c", seq=1, login="bot", state=VersionState.PENDING,
        scheme=accepted.scheme, digest=accepted.digest, tag=accepted.tag,
        minted_at=bench.clock.now(),
    )  # fmt: skip

    assert authority.matches(version, secret)
    assert not authority.resembles(version, bench.secret)
    assert not authority.matches(version, Secret(forged(secret)))
    assert not authority.matches(replace(version, tag=bytes(8)), secret)


def test_a_tombstone_is_durable_private_and_idempotent(tmp_path: Path) -> None:
    """0600 in 0700; the first note stays; nothing but version ids becomes a file."""
    spool = Spool(tmp_path / "revoked.d")
    version_id = mint(random_bytes=seeded(1))[0]
    spool.revoke(version_id, {"reason": "first"})
    spool.revoke(version_id, {"reason": "second"})

    assert spool.holds(version_id)
    assert spool.notes(version_id) == [{"reason": "first"}]
    assert (tmp_path / "revoked.d").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "revoked.d" / version_id).stat().st_mode & 0o777 == 0o600
    for name in ("../x", "x", "", version_id + "x", "é" * 14):
        with pytest.raises(UnknownVersion):
            spool.revoke(name, {})
    (tmp_path / "revoked.d" / "notes.txt").touch()
    assert spool.ids() == [version_id]


def test_a_torn_note_still_refuses(tmp_path: Path) -> None:
    """A crash inside the note leaves a tombstone all the same."""
    spool = Spool(tmp_path)
    version_id = mint(random_bytes=seeded(1))[0]
    (tmp_path / version_id).write_bytes(b'{"reason": "to')

    assert spool.holds(version_id)
    assert (spool.ids(), spool.notes(version_id)) == ([version_id], [])


def test_a_spool_that_cannot_be_read_is_no_yes(bench: Bench, tmp_path: Path) -> None:
    """A file where the folder should be: nobody can tell."""
    (tmp_path / "revoked.d").write_text("")

    with pytest.raises(StoreUnavailable):
        bench.verifier.verify("billing-bot@acme", bench.secret)


def test_a_lost_spool_is_no_yes(tmp_path: Path) -> None:
    """Beside a store the folder is always there: without it a tombstone may have gone with it."""
    folder, version_id = tmp_path / "revoked.d", mint(random_bytes=seeded(1))[0]
    spool = Spool(folder, required=True)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="missing"):
            spool.holds(version_id)
        folder.mkdir(mode=0o700)
        assert not spool.holds(version_id)
        folder.rmdir()
    assert not Spool(folder).holds(version_id)


def test_a_secret_is_found_in_any_text(bench: Bench) -> None:
    """`identify` names the version of each whole secret, once, and prints nothing else."""
    text = f"curl -u 'a:{bench.secret.reveal()}' x {bench.secret.reveal()}, {forged(bench.secret)}x"

    assert identify(text) == [id_of(bench.secret)]


def test_nothing_shows_the_secret(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """No repr, log or error of a verification holds what was presented."""
    caplog.set_level(logging.DEBUG)
    wrong = forged(bench.secret)
    with pytest.raises(VerificationFailed) as caught:
        bench.verifier.verify("billing-bot@acme", wrong)
    shown = repr(caught.value) + caplog.text + repr(bench.verifier.__dict__)
    assert bench.says(bench.secret)
    shown += repr(bench.verifier.__dict__)

    assert wrong not in shown
    assert bench.secret.reveal() not in shown


# --- the public form ----------------------------------------------------------------------


@given(st.binary(max_size=400))
def test_any_bytes_are_parsed_without_a_crash(value: bytes) -> None:
    """Whatever is presented is our form or not."""
    found = parse(value)

    assert found is None or found.version_id.encode() in value


@given(seed=st.integers(0, 10_000), position=st.integers(0, 65), digit=st.sampled_from(ALPHABET))
def test_one_wrong_character_is_no_secret(seed: int, position: int, digit: str) -> None:
    """The checksum covers prefix, version id and random part."""
    text = mint(random_bytes=seeded(seed))[1].reveal()
    changed = text[:position] + digit + text[position + 1 :]

    assert (parse(changed.encode()) is None) == (changed != text)


def test_a_secret_never_leaves_by_copy_format_or_pickle() -> None:
    """One exit: everything else is a marker or an error."""
    import copy
    import json
    import pickle

    secret = Secret("canary-canary-canary")
    for shown in (repr(secret), str(secret), f"{secret}", f"{secret:>80}", [secret], {"k": secret}):
        assert "canary" not in str(shown)
    for leak in (pickle.dumps, copy.copy, copy.deepcopy, json.dumps, hash, os.fspath):
        with pytest.raises(TypeError):
            leak(secret)  # type: ignore[operator]
    assert secret == Secret("canary-canary-canary")
    assert secret != "canary-canary-canary"
