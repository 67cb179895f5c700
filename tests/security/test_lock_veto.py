"""Nobody vetoes a revoke with a lock: another user gets none, and the refusal needs no commit.

An SQLite file can be locked by any reader, and a daemon that is stopped inside a transaction keeps its
lock for ever. In every such case what is revoked is refused within 100 ms of the command's return.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from support.peers import needs_root
from support.running import Keyturn, accepts
from support.stopped_daemon import KINDS, MOMENTS

SEED = int(os.environ.get("KEYTURN_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)
WITHIN = 0.1  # seconds from the return of the command to the refusal
NOBODY = 65534
AT_ONCE = 7  # installations

_INTRUDER = """
import json, os, sqlite3, sys
folder, uid = sys.argv[1], int(sys.argv[2])
os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
store, got = folder + "/keyturn.db", []
def attempt(what, call):
    try:
        call()
        got.append(what)
    except (OSError, sqlite3.Error):
        pass
def sql(text, mode):
    one = sqlite3.connect("file:" + store + "?mode=" + mode, uri=True, isolation_level=None, timeout=0)
    one.execute(text).fetchall()
attempt("list", lambda: os.listdir(folder))
attempt("tombstone", lambda: open(folder + "/revoked.d/x", "x"))
for name in json.loads(sys.argv[3]):
    attempt("read " + name, lambda: open(folder + "/" + name, "rb"))
    attempt("write " + name, lambda: open(folder + "/" + name, "r+b"))
attempt("select", lambda: sql("SELECT * FROM versions", "ro"))
attempt("lock", lambda: sql("BEGIN EXCLUSIVE", "rw"))
attempt("share", lambda: sql("SELECT * FROM versions", "ro&immutable=1"))
print(json.dumps(got))
"""

_HOLDER = """
import sqlite3, sys
store = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=10)
if sys.argv[2] == "exclusive":
    store.execute("BEGIN EXCLUSIVE")
else:
    cursor = store.execute("SELECT 1 FROM versions a, versions b, versions c")
    cursor.fetchone()
print("held", flush=True)
sys.stdin.read()
"""


# --- another user -------------------------------------------------------------------------


@needs_root
def test_another_user_gets_no_hold_of_the_store() -> None:
    """Open, select and lock are denied by the folder's mode, and by each file's own as well."""
    place = Path(tempfile.mkdtemp())  # pytest's own folders keep other users out for us
    place.chmod(0o755)
    try:
        with Keyturn(place) as keyturn:
            keyturn.wait_first()
            keyturn.ask("revoke", "agent-0")
            assert intrude(keyturn) == []
        keyturn.store.parent.chmod(0o755)
        for folder in ("revoked.d", "ledger"):
            (keyturn.store.parent / folder).chmod(0o755)
        assert intrude(keyturn) == ["list"]
    finally:
        shutil.rmtree(place)


def intrude(keyturn: Keyturn) -> list[str]:
    """Try everything as another user; return what worked."""
    state = keyturn.store.parent
    files = [str(path.relative_to(state)) for path in state.rglob("*") if path.is_file()]
    assert {"keyturn.db", "keyturn.db-journal"} <= set(files)
    done = subprocess.run(
        [sys.executable, "-I", "-c", _INTRUDER, str(state), str(NOBODY), json.dumps(files)],
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[str] = json.loads(done.stdout)
    return found


# --- ourselves and root -------------------------------------------------------------------


class Watched:
    """A running Keyturn, all of whose agents are going to be revoked under a lock."""

    def __init__(self, keyturn: Keyturn, agents: int) -> None:
        self.keyturn = keyturn
        self.names = [f"agent-{number}" for number in range(agents)]
        self.held = {name: keyturn.held(name) for name in self.names}
        self.verifiers = {name: keyturn.verifier() for name in self.names}
        for name in self.names:
            assert accepts(self.verifiers[name], self.held[name]) is True

    def revoke(self, name: str) -> float:
        """Revoke one, and return the seconds from the command's return to the refusal."""
        code, result = self.keyturn.ask("revoke", name, "--reason", "locked")
        returned = time.monotonic()
        assert code in (0, 75), result
        while (answer := accepts(self.verifiers[name], self.held[name])) is not False:
            assert answer is None, f"{name} was accepted after its revoke had returned"
            assert time.monotonic() - returned < 10
        return time.monotonic() - returned

    def revoke_all(self) -> list[float]:
        """Revoke every agent, many at once, as people do in a night like that."""
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(self.revoke, self.names))

    def finish(self) -> None:
        """See the daemon write what the spool kept, once the lock is gone."""
        ask = self.keyturn.ask
        self.keyturn.wait_for(
            lambda: {row["state"] for row in ask("status")[1]} == {"suspended"}, seconds=40
        )
        for name in self.names:
            shown = self.keyturn.held(name)  # by then it may have been withdrawn
            for held in (self.held[name], *([shown] if "secret" in shown else [])):
                assert accepts(self.verifiers[name], held) is False
            self.verifiers[name].close()
        assert ask("audit", "--verify")[1]["chain"]["ok"]


def under_a_lock(folder: Path, lock: str, daemon: str, agents: int) -> list[float]:
    """Revoke while another process holds the store, with the daemon up or down."""
    with Keyturn(folder, agents=agents) as keyturn:
        keyturn.wait_first()
        watched = Watched(keyturn, agents)
        if daemon == "down":
            keyturn.stop()
        with holding(keyturn.store, lock):
            delays = watched.revoke_all()
        if daemon == "down":
            keyturn.start()
        watched.finish()
    return delays


@contextmanager
def holding(store: Path, lock: str) -> Iterator[None]:
    """Hold a lock on the store from a process of its own."""
    with subprocess.Popen(
        [sys.executable, "-I", "-c", _HOLDER, str(store), lock],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield


def inside_a_transaction(folder: Path, kind: str, moment: str, agents: int) -> list[float]:
    """Revoke while the daemon is stopped inside a transaction of this kind."""
    keyturn = Keyturn(folder, agents=agents)
    keyturn.start("support.stopped_daemon", str(keyturn.config), kind, moment)
    try:
        keyturn.wait_first()
        watched = Watched(keyturn, agents)
        (folder / "armed").touch()
        commands = [["rotate", "agent-0"], ["suspend", "agent-1"], ["reload"]]
        with ThreadPoolExecutor(
            3
        ) as pool:  # one of them is what it stops in; their answers do not count
            asked = [pool.submit(keyturn.run, *command) for command in commands]
            keyturn.wait_for(lambda: is_stopped(keyturn))
            delays = watched.revoke_all()
            keyturn.signal(signal.SIGCONT)
            for one in asked:
                one.result()
        watched.finish()
    finally:
        keyturn.stop()
    return delays


def is_stopped(keyturn: Keyturn) -> bool:
    """Ask the kernel whether the daemon is stopped."""
    assert keyturn.process is not None
    assert keyturn.process.poll() is None
    stat = Path(f"/proc/{keyturn.process.pid}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] == "T"


def run_all(folder: Path, cases: Sequence[tuple[str, str]], *, agents: int, at_once: int) -> None:
    """Run a case per kind of transaction and one per lock, and judge all delays together."""

    def one(number: int, case: tuple[str, str]) -> list[float]:
        first, second = case
        place = folder / str(number)
        place.mkdir()
        run = inside_a_transaction if first in KINDS else under_a_lock
        return run(place, first, second, agents)

    with ThreadPoolExecutor(at_once) as pool:
        ended = list(pool.map(one, range(len(cases)), cases))
    delays = sorted(delay for of_case in ended for delay in of_case)
    shown = f"seed {SEED}: {len(delays)} revokes, worst {delays[-1] * 1000:.1f} ms, "
    shown += f"median {delays[len(delays) // 2] * 1000:.1f} ms"
    print(shown)
    assert delays[-1] <= WITHIN, shown


def test_a_lock_keeps_no_line_of_the_revocations_file_from_refusing(tmp_path: Path) -> None:
    """With the store locked and a tombstone waiting for it, file and signal refuse all the same."""
    with Keyturn(tmp_path) as keyturn:
        keyturn.wait_first()
        watched = Watched(keyturn, 2)
        first, second = (watched.held[name]["version"] for name in watched.names)
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        with holding(keyturn.store, "exclusive"):
            (keyturn.store.parent / "revoked.d" / first).touch()
            lines = f"version:{second} at={now} INC-1\nagent:agent-1 at={now} INC-1\n"
            keyturn.revocations.write_text(lines)
            keyturn.signal(signal.SIGUSR1)
            for name in watched.names:
                verifier, held = watched.verifiers[name], watched.held[name]
                keyturn.wait_for(lambda: accepts(verifier, held) is False, seconds=40)  # noqa: B023
        keyturn.wait_for(lambda: is_revoked(keyturn, "agent-1"), seconds=40)
        for verifier in watched.verifiers.values():
            verifier.close()


def test_no_line_waits_for_another_while_the_store_is_locked(tmp_path: Path) -> None:
    """Every line has its tombstone at once; only the rows wait for the store, and then are there."""
    with Keyturn(tmp_path, agents=4) as keyturn:
        keyturn.wait_first()
        versions = {f"agent-{n}": keyturn.held(f"agent-{n}")["version"] for n in range(4)}
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        spool = keyturn.store.parent / "revoked.d"
        targets = [f"version:{versions[name]}" for name in list(versions)[:3]] + ["agent:agent-3"]
        with holding(keyturn.store, "exclusive"):
            keyturn.revocations.write_text("".join(f"{one} at={now} INC-1\n" for one in targets))
            keyturn.signal(signal.SIGUSR1)
            began = time.monotonic()
            keyturn.wait_for(lambda: all((spool / one).exists() for one in versions.values()))
            assert time.monotonic() - began < 2.0  # the first row alone waits for five
        keyturn.wait_for(lambda: all(is_revoked(keyturn, name) for name in versions), seconds=40)


def is_revoked(keyturn: Keyturn, agent: str) -> bool:
    """Tell whether the store has a revocation of an agent in its audit."""
    code, result = keyturn.ask("audit", agent)
    return code == 0 and "revoke" in [entry["action"] for entry in result["entries"]]


LOCKS = [(lock, daemon) for lock in ("exclusive", "cursor") for daemon in ("up", "down")]


def test_no_lock_keeps_a_revoke_from_refusing(tmp_path: Path) -> None:
    """Locks of other processes and a daemon stopped in each kind of transaction: 22 revokes."""
    draw = random.Random(SEED)
    stopped = [(kind, draw.choice(MOMENTS)) for kind in KINDS]
    run_all(tmp_path, [*stopped, *LOCKS], agents=2, at_once=AT_ONCE)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_no_lock_keeps_any_of_200_revokes_from_refusing(tmp_path: Path) -> None:
    """Every kind of transaction at each of its moments and every lock: 250 revokes."""
    stopped = [(kind, moment) for kind in KINDS for moment in MOMENTS]
    run_all(tmp_path, [*stopped, *LOCKS], agents=10, at_once=3)
