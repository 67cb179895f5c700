"""A whole Keyturn in one process for the saga's tests: real store, real verifier, played destinations.

Everything that the saga touches goes through `Bench.point`, so a test can crash before or after each
effect, and I1 and I4 are looked at in every such moment, not only at the end.
"""

from __future__ import annotations

import atexit
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa

from keyturn import rotation
from keyturn.core import lifecycle, policy
from keyturn.core.model import (
    Agent,
    AgentState,
    Case,
    Credential,
    Policy,
    Retry,
    Target,
    Traits,
    Version,
    VersionState,
)
from keyturn.core.steps import Plan
from keyturn.destinations.memory import MemoryDestination, MemoryOptions
from keyturn.errors import DestinationUnavailable, VerificationFailed
from keyturn.ports import AuditEntry, Claim, Entry, Observed, Saved
from keyturn.storage.engine import open_database
from keyturn.storage.ledger import Ledger
from keyturn.storage.membership import Membership
from keyturn.storage.store import Store
from keyturn.storage.tables import meta
from keyturn.verifier.authority import BuiltinAuthority
from keyturn.verifier.decision import Verifier
from keyturn.verifier.hashing import CHEAP_FOR_TESTS, Hashing
from keyturn.verifier.keyed import Key
from keyturn.verifier.keyring import KeyRing

NOW = datetime(2026, 3, 2, 12, tzinfo=UTC)
GRACE = timedelta(hours=2)
CACHE = timedelta(hours=1)
SETTLE = timedelta(minutes=5)
SWEEP = timedelta(hours=1)
MOST_STEPS = 120  # of one run: more is a loop without end
SHAPES: dict[str, Traits] = {
    "staging": Traits(can_stage=True, has_cas=True, keeps_versions=True),
    "vault": Traits(has_cas=True, keeps_versions=True),
    "file": Traits(has_cas=True, settles_with_writer=True),
    "azure": Traits(keeps_versions=True),
}
Shape = tuple[str, ...]


class Crash(BaseException):
    """The process is gone: nothing may catch this."""


class Endless(BaseException):
    """One run took more steps than any rotation needs."""


class Clock:
    """Time that moves only when a test says so."""

    def __init__(self, now: datetime = NOW) -> None:
        self._start = self._now = now

    def now(self) -> datetime:
        """Return the present moment."""
        return self._now

    def boottime(self) -> timedelta:
        """Return the time since the start."""
        return self._now - self._start

    def advance(self, span: timedelta) -> None:
        """Let time pass."""
        self._now += span


class Played:
    """One destination as the saga sees it: a memory destination whose answers can be lost.

    `faults` is used up from its front, one per write: "" nothing, "before" not done and no answer,
    "after" done and no answer, "unsent" certainly not done, "late" goes on in the background.
    """

    def __init__(self, bench: Bench, name: str, shape: str) -> None:
        self.bench = bench
        self.name = name
        self.traits = SHAPES[shape]
        options = MemoryOptions(
            can_stage=self.traits.can_stage,
            has_cas=self.traits.has_cas,
            keeps_versions=self.traits.keeps_versions,
        )
        self.inner = MemoryDestination(
            options, name=name, store_id=bench.store_id, clock=bench.clock
        )
        self.faults: list[str] = []
        self.read_faults: list[Exception] = []
        self.stale = False
        self.behind: Observed | None = None  # what it says still, as if nothing had been written
        self.lates: list[tuple[Future[Any], Callable[[], str], datetime]] = []

    def observe(self, target: Target) -> Observed:
        """Read, or fail as told."""
        self._reading("observe")
        if self.behind is not None:
            return self.behind
        return replace(self.inner._observe(target), fresh=not self.stale)

    def read(self, target: Target, version_id: str) -> Observed:
        """Read by version id, or fail as told."""
        self._reading("read")
        return self.inner._read(target, version_id) if self.behind is None else Observed()

    def stage(self, target: Target, entry: Entry, *, expected: str) -> str:
        """Stage."""
        return self._write("stage", lambda: self.inner._stage(target, entry, expected))

    def activate(self, target: Target, entry: Entry, *, expected: str) -> str:
        """Activate."""
        return self._write("activate", lambda: self.inner._activate(target, entry, expected))

    def withdraw(self, target: Target, *, owner: str, version_id: str, expected: str) -> str:
        """Withdraw."""
        return self._write(
            "withdraw", lambda: self.inner._withdraw(target, owner, version_id, expected)
        )

    def retire(self, target: Target, *, version_id: str, locator: str, how: str) -> None:
        """Retire one copy."""

        def body() -> str:
            self.inner._retire(target, version_id, locator, how)
            return ""

        self._write("retire", body)

    def land(self) -> None:
        """Let every late call reach the destination and return."""
        for future, body, _ in self._taken():
            try:
                future.set_result(body())
            except Exception as error:
                future.set_exception(error)

    def fall(self) -> None:
        """Let every late call end without an effect, and nobody knows."""
        for future, _, _ in self._taken():
            future.set_exception(DestinationUnavailable("no answer"))

    def _taken(self) -> list[Any]:
        taken, self.lates = self.lates, []
        return taken

    def _reading(self, what: str) -> None:
        self.bench.point(f"{what} {self.name}")
        if self.read_faults:
            raise self.read_faults.pop(0)

    def _write(self, what: str, body: Callable[[], str]) -> str:
        fault = self.faults.pop(0) if self.faults else ""
        self.bench.point(f"before {what} {self.name}")
        if fault in ("before", "unsent"):
            raise DestinationUnavailable("no answer", sent=fault == "before")
        if fault == "late":
            call: Future[Any] = Future()
            self.lates.append((call, body, self.bench.clock.now()))
            raise DestinationUnavailable("no answer", late=call)
        done = body()
        self.bench.point(f"after {what} {self.name}")
        if fault == "after":
            raise DestinationUnavailable("no answer")
        return done


class Wired:
    """The store as the saga sees it, with a point before and after everything durable."""

    def __init__(self, bench: Bench, store: Store) -> None:
        self._bench, self._store = bench, store
        self.store_id, self.writer = store.store_id, store.writer
        self.load = store.load
        self.writer_died_at = store.writer_died_at
        self.renew = store.renew

    def claim(
        self, credential_uid: str, *, holder: str, ttl: timedelta
    ) -> tuple[Claim, Saved] | None:
        """Take the claim."""
        taken = self._store.claim(credential_uid, holder=holder, ttl=ttl)
        self._bench.point("after claim")
        return taken

    def save(
        self,
        claim: Claim,
        *,
        before: Case,
        after: Case,
        audit: Sequence[AuditEntry],
        release: bool = False,
    ) -> Saved:
        """Save."""
        name = "+".join(entry.action for entry in audit) or "intent"
        self._bench.point(f"before save {name}")
        saved = self._store.save(claim, before=before, after=after, audit=audit, release=release)
        self._bench.point(f"after save {name}")
        return saved

    def report(self, intent_uid: str, *, landed: bool) -> None:
        """Report."""
        self._store.report(intent_uid, landed=landed)

    def release(self, claim: Claim, *, wake_at: datetime | None) -> None:
        """Release."""
        self._bench.point("before release")
        self._store.release(claim, wake_at=wake_at)
        self._bench.point("after release")


@dataclass(slots=True)
class Steps:
    """The watcher: what was done, and an end to what would never end."""

    done: list[str] = field(default_factory=list)
    in_run: int = 0

    def step(
        self, *, step: str, case: Case, where: str, seconds: float, code: str, detail: str
    ) -> None:
        """Note a step."""
        self.done.append(f"{step} {where} {code}".strip())
        self.in_run += 1
        if self.in_run > MOST_STEPS:
            raise Endless(self.done[-12:])


@cache
def _template() -> tuple[Path, str]:
    """Make one migrated store; every bench starts with a copy of its file."""
    folder = Path(tempfile.mkdtemp(prefix="keyturn-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    url = f"sqlite:///{folder}/store.db"
    store = Store.open(
        url,
        state_dir=folder,
        clock=Clock(),
        random_bytes=random.Random("bench").randbytes,
        writer="w0",
    )
    store.close()
    return folder / "store.db", store.store_id


def quick_folder() -> Path:
    """Return a new folder in memory where there is such a place: a commit costs no disk there."""
    shm = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="keyturn-", dir=shm if shm.is_dir() else None))


class Bench:
    """One agent with one destination per shape, and everything around it."""

    def __init__(self, *shapes: str, seed: object = 0, **policy_options: Any) -> None:
        self.folder = quick_folder()
        file, self.store_id = _template()
        shutil.copy(file, self.folder / "store.db")
        self.clock = Clock()
        self.draw = random.Random(f"bench {seed}")
        self.steps = Steps()
        self.watched = True
        self.points: list[str] = []
        self.crash_at: Callable[[int, str], bool] = lambda _number, _name: False
        self.on_point: Callable[[str], None] = lambda _name: None
        self.crashes = self.writers = self.ids = 0
        self.policy = Policy(
            **{
                "every": timedelta(days=30),
                "grace": GRACE,
                "consumer_cache": CACHE,
                "retry": Retry(settle_after=SETTLE, max=timedelta(minutes=1)),
                **policy_options,
            }
        )
        self.max_accepted = 4
        self.database = open_database(f"sqlite:///{self.folder}/store.db", clock=self.clock)
        (self.folder / "revoked.d").mkdir(mode=0o700)
        self.hashing = Hashing(cost=CHEAP_FOR_TESTS)
        self.ring = KeyRing(keys={"k1": Key(bytes(range(32)))}, current="k1")
        self.authority = BuiltinAuthority(hashing=self.hashing, ring=lambda: self.ring)
        self.verifier = Verifier.open(
            f"sqlite:///{self.folder}/store.db",
            state_dir=self.folder,
            clock=self.clock,
            hashing=self.hashing,
            ring=self.ring,
        )
        self.membership: Membership | None = None
        self.start()
        names = [f"d{number}" for number in range(len(shapes))]
        self.played = {
            name: Played(self, name, shape) for name, shape in zip(names, shapes, strict=True)
        }
        self.targets = {name: Target(to=name, path="bot") for name in names}
        self.edited: dict[str, dict[str, str]] = {}
        self.shown_at: dict[str, datetime] = {}
        self.texts: dict[str, tuple[str, str]] = {}
        self.uid = "credential"
        agent = Agent(uid="agent", name="bot", login="bot", targets=tuple(self.targets.values()))
        now = self.clock.now()
        credential = Credential(uid=self.uid, agent_uid="agent", wake_at=now, sweep_at=now + SWEEP)
        self.store.add_agent(agent, credential, identities=self.identities(agent.targets), audit=[])

    # --- the process ------------------------------------------------------------------------

    def start(self) -> None:
        """Start a process on the store; the ones before it are dead."""
        self.writers += 1
        if self.membership is not None:
            self.membership._lock.drop()
        with self.database.engine.connect() as connection:
            row = connection.execute(sa.select(meta)).one()
        identity = SimpleNamespace(store_id=row.store_id, incarnation=row.incarnation)
        self.store = Store(
            self.database,
            ledger=Ledger(self.folder / "ledger"),
            clock=self.clock,
            writer=f"w{self.writers}",
            identity=identity,
        )
        self.membership = Membership(self.store)
        assert self.membership.try_lead(ttl=timedelta(minutes=1))
        self.world = self._world()

    def restart(self) -> None:
        """End the process without a word, and start another one."""
        for played in getattr(self, "played", {}).values():
            if played.traits.settles_with_writer:
                played.fall()
            played.faults.clear()
        self.crash_at = lambda _number, _name: False
        self.start()

    def close(self) -> None:
        """Give everything back."""
        for played in self.played.values():
            played.inner.close()
        self.verifier.close()
        assert self.membership is not None
        self.membership._lock.drop()
        self.database.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def point(self, name: str) -> None:
        """Mark a moment: look at the invariants, then crash if told to."""
        self.points.append(name)
        if self.watched:
            self.look()
        self.on_point(name)
        if self.crash_at(len(self.points) - 1, name):
            raise Crash(name)

    def run(self) -> datetime | None:
        """Run the saga once."""
        self.steps.in_run = 0
        return rotation.run(self.world, self.uid, holder=f"run{len(self.points)}")

    def crashing_run(self) -> bool:
        """Run; where that crashes, start a new process. Tells whether it crashed."""
        try:
            self.run()
        except Crash:
            self.crashes += 1
            self.restart()
            return True
        return False

    def go(self, *, runs: int = 40, until: Callable[[], bool] | None = None) -> None:
        """Run whenever the store says that something is due, until it is quiet."""
        quiet = until or self.quiet
        for _ in range(runs):
            self.crashing_run()
            if quiet():
                return
            wake = self.store.next_wake()
            assert wake is not None, "nothing will ever look again"
            self.pass_time(max(wake - self.clock.now(), timedelta(seconds=1)))
        raise AssertionError(f"not quiet after {runs} runs: {self.case}; {self.steps.done[-20:]}")

    def pass_time(self, span: timedelta) -> None:
        """Let time pass, looking in between."""
        for _ in range(4):
            self.clock.advance(span / 4)
            self.look()

    def use(self, **changes: Any) -> None:
        """Give every part another key ring, as a reload does."""
        self.ring = replace(self.ring, **changes)
        self.verifier.use(self.ring)

    # --- what is so -------------------------------------------------------------------------

    @property
    def case(self) -> Case:
        """The case as stored."""
        return self.store.case(self.uid)

    def quiet(self) -> bool:
        """Whether nothing is under way: one current version, shown everywhere, nothing else."""
        case = self.case
        alone = [v.state for v in case.accepted] == [VersionState.CURRENT]
        return alone and case.rotation is None and not case.intents and self.at_home()

    def at_home(self) -> bool:
        """Whether every destination shows the current version."""
        current = self.case.current
        return current is not None and all(self.shown(name) == current.id for name in self.targets)

    def shown(self, name: str) -> str | None:
        """Return the version id that an agent reads."""
        values = self.played[name].inner.raw_get(self.targets[name])
        return values.get("version") if values else None

    def version(self, version_id: str) -> Version:
        """Return a version of any state."""
        return next(v for v in self.versions() if v.id == version_id)

    def versions(self) -> tuple[Version, ...]:
        """Return every version ever minted, newest first."""
        return self.store.history(self.uid, limit=500).versions

    def accepts(self, login: str, text: str) -> bool:
        """Ask the verifier."""
        try:
            self.verifier.verify(login, text)
        except VerificationFailed:
            return False
        return True

    def look(self) -> None:
        """Assert I1 and I4 at this instant."""
        now = self.clock.now()
        for name, target in getattr(self, "targets", {}).items():
            values = self.played[name].inner.raw_get(target)
            if values is None or values == self.edited.get(name) or "secret" not in values:
                continue
            version_id = values["version"]
            self.texts[version_id] = values["id"], values["secret"]
            self.shown_at[version_id] = now
        exempt: bool | None = None
        for version_id, at in self.shown_at.items():
            if now < at + GRACE and not self.accepts(*self.texts[version_id]):
                exempt = self.case.agent.state is not AgentState.ENABLED
                state = self.version(version_id).state
                assert exempt or state is VersionState.REVOKED, (
                    f"{version_id} ({state}) was shown {now - at} ago and is refused:"
                    f" {self.points[-6:]} {self.steps.done[-12:]}"
                )

    def assert_home(self) -> None:
        """Assert where everything must end."""
        case = self.case
        assert self.quiet(), case
        for name in self.targets:
            values = self.played[name].inner.raw_get(self.targets[name])
            assert values is not None
            assert self.accepts(values["id"], values["secret"])

    # --- what people and the world do ---------------------------------------------------------

    def amend(self, change: Callable[..., Case], *arguments: Any, **options: Any) -> None:
        """Do what a command does: a pure change in one transaction."""

        def body(case: Case) -> tuple[Case, list[AuditEntry]]:
            return change(case, *arguments, now=self.clock.now(), **options), []

        self.store.amend(self.uid, body)

    def ask(self) -> None:
        """Ask for a rotation."""
        from keyturn.core.model import Request

        self.amend(lambda case, now: lifecycle.request(case, Request(), now=now))

    def edit(self, name: str, **values: str) -> None:
        """Write something else into an entry, as a stranger."""
        self.edited[name] = values
        self.played[name].inner.raw_put(self.targets[name], values)

    def retarget(self, *names: str) -> None:
        """Give the agent other destinations, as a reload does."""
        agent = self.case.agent
        targets = tuple(self.targets[name] for name in names)
        changed = replace(agent, targets=targets)
        self.store.amend_agent(agent.uid, changed, identities=self.identities(targets), audit=[])

    @staticmethod
    def identities(targets: Sequence[Target]) -> dict[str, str]:
        """Return the canonical keys of targets."""
        return {target.key: f"memory:{target.key}" for target in targets}

    def _world(self) -> rotation.World:
        return rotation.World(
            journal=Wired(self, self.store),
            authority=self.authority,
            destinations=_Live(self),
            plan=self._plan,
            schedule=lambda _case, now: now + timedelta(days=30),
            backoff=lambda plan, tries: policy.backoff(plan.policy.retry, tries, unit=1.0),
            sweep_every=SWEEP,
            clock=self.clock,
            random_bytes=self.draw.randbytes,
            new_id=self._new_id,
            watcher=self.steps,
        )

    def _plan(self, case: Case) -> Plan:
        traits = {t.key: self.played[t.to].traits for t in case.targets if t.to in self.played}
        missing = {t.key: Traits() for t in case.targets if t.key not in traits}
        return Plan(
            policy=self.policy, traits={**missing, **traits}, max_accepted=self.max_accepted
        )

    def _new_id(self) -> str:
        self.ids += 1
        return f"id{self.ids}"


class _Live(dict[str, Any]):
    """The connections by name, as they are at the moment of a call."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def get(self, name: str, default: Any = None) -> Any:
        return self._bench.played.get(name, default)
