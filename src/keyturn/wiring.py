"""The one place that knows every adapter: from settings to parts that work together.

Used by the daemon and, while it is down, by the commands that work straight on the store.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from keyturn import config
from keyturn.administration import Administration
from keyturn.config import Settings
from keyturn.config.models import (
    ID_FORM,
    LOGIN_FORM,
    WORDS_FORM,
    is_id,
    is_login,
    is_words,
)
from keyturn.core import policy as due
from keyturn.core.model import (
    Agent,
    Case,
    ManagedBy,
    Policy,
    Target,
    Traits,
)
from keyturn.core.policy import CronCalculator
from keyturn.core.secret import Secret
from keyturn.core.steps import ACCEPTED_LIMIT, Plan
from keyturn.core.timekeeping import Anchor, judge
from keyturn.credential_file import credential_path, read_credential
from keyturn.destinations import registry
from keyturn.destinations.base import DestinationBase
from keyturn.errors import ConfigError, Refused, StaleRevision
from keyturn.ports import AuditEntry, Clock
from keyturn.reconcile import SWEEP_EVERY, Change, Reconciling, check_use, credential_of, undone
from keyturn.storage import restoring
from keyturn.storage.ballast import Ballast
from keyturn.storage.engine import is_sqlite, refuse_open
from keyturn.storage.ledger import Ledger
from keyturn.storage.postgresql import Password
from keyturn.storage.requests import Begun
from keyturn.storage.store import Store
from keyturn.storage.usage import UsageRecords
from keyturn.verifier.authority import BuiltinAuthority
from keyturn.verifier.keyring import KeyRing
from keyturn.verifier.registered import Registered
from keyturn.verifier.spool import Spool
from keyturn.world import Carried, Watcher, World

RECONCILE_TRIES = 5
LEARN_EVERY = timedelta(seconds=2)


class SystemClock:
    """The host's clocks."""

    def now(self) -> datetime:
        """Wall time, aware, UTC."""
        return datetime.now(UTC)

    def boottime(self) -> timedelta:
        """Time since boot, counting suspend."""
        return timedelta(seconds=time.clock_gettime(time.CLOCK_BOOTTIME))


class GuardedClock:
    """A clock that is believed only as long as it agrees with the time since boot. Thread-safe.

    A clock that is corrected in small steps is followed. One that has jumped is not: time goes on
    by CLOCK_BOOTTIME until it comes back or a person trusts it.
    """

    def __init__(
        self,
        source: Clock,
        *,
        boot_id: str,
        learn: Callable[[], Anchor | None] = lambda: None,
    ) -> None:
        self._source = source
        self.boot_id = boot_id
        self._learn = learn
        self._learned = timedelta(0)
        self.anchor: Anchor | None = None

    def now(self) -> datetime:
        """The time to go by, aware, UTC."""
        return self._look()[0].wall

    def boottime(self) -> timedelta:
        """Time since boot, counting suspend."""
        return self._source.boottime()

    def look(self) -> tuple[datetime, timedelta]:
        """Return the time to go by, and by how much the wall clock has jumped."""
        anchor, jump = self._look()
        return anchor.wall, jump

    def _look(self) -> tuple[Anchor, timedelta]:
        seen = self._seen()
        anchor, jump = judge(self.anchor, seen)
        if jump and seen.boottime - self._learned > LEARN_EVERY:
            self._learned = seen.boottime
            # Somebody may have trusted the clock meanwhile: whoever leads wrote that down.
            anchor, jump = judge(self._learn() or anchor, seen)
        self.anchor = anchor
        return anchor, jump

    def trust(self) -> timedelta:
        """Believe the wall clock as it is now. Returns by how much it had jumped."""
        jump = self._look()[1]
        self.anchor = self._seen()
        return jump

    def _seen(self) -> Anchor:
        # Boottime first: read late it would make the wall clock look slow, never fast.
        boottime = self._source.boottime()
        return Anchor(boot_id=self.boot_id, boottime=boottime, wall=self._source.now())


def boot_id() -> str:
    """Return what names this boot of the host; another one each time where it does not say.

    Under `ProcSubset=pid` the kernel's file is hidden, and our unit hands it over as a credential.
    """
    for place in (Path("/proc/sys/kernel/random/boot_id"), credential_path("credential:boot-id")):
        with suppress(OSError):
            return place.read_text().strip()
    return uuid.uuid4().hex


@dataclass(slots=True, kw_only=True)
class Parts:
    """Everything of one running Keyturn. `settings`, `destinations`, `ring` change with a reload."""

    settings: Settings
    open_store: Callable[[], Store]
    spool: Spool
    ballast: Ballast
    authority: BuiltinAuthority
    administration: Administration
    clock: GuardedClock
    ring: KeyRing
    destinations: dict[str, DestinationBase] = field(default_factory=dict)
    on_revocation: Callable[[Mapping[str, Any], str], None] = lambda _result, _trigger: None
    on_rotation_end: Callable[[str], None] = lambda _outcome: None
    cron: CronCalculator
    # Held while agents are defined and connections swapped: nobody writes by half of a change.
    defining: threading.RLock = field(default_factory=threading.RLock)
    _store_clock: GuardedClock | None = None
    _carried: Carried = field(default_factory=Carried)
    _store: Store | None = None
    _usage: UsageRecords | None = None

    @property
    def usage(self) -> UsageRecords:
        """What verifiers saw. Raises StoreUnavailable."""
        if self._usage is None:
            folder, store = self.settings.store.folder, self.store
            self._usage = UsageRecords.beside(store.database, state_dir=folder, clock=self.clock)
        return self._usage

    @property
    def store(self) -> Store:
        """The store, opened at its first use. Raises StoreUnavailable."""
        if self._store is None:
            self._store = self.open_store()
        return self._store

    @property
    def store_clock(self) -> GuardedClock:
        """The store's time: on SQLite this host's, else what the database says."""
        if self.store.database.is_sqlite:
            return self.clock
        if self._store_clock is None:
            learned = StoreClock(self.store, self.clock)
            self._store_clock = GuardedClock(learned, boot_id=self.clock.boot_id)
        return self._store_clock

    @property
    def carried(self) -> Carried:
        """What outlives a run but not this process."""
        return self._carried

    def close(self) -> None:
        """Give everything back."""
        for destination in self.destinations.values():
            destination.close()
        if self._usage is not None:
            self._usage.close()
        if self._store is not None:
            self._store.close()

    # --- policies ---------------------------------------------------------------------------

    def policy_of(self, case: Case) -> Policy:
        """The agent's policy; the default one where the files no longer name it."""
        policies = self.settings.policies
        return policies.get(case.agent.policy) or policies.get("default") or Policy()

    def plan(self, case: Case) -> Plan:
        """What does not change during a run."""
        traits = {
            target.key: self.destinations[target.to].traits
            for target in case.targets
            if target.to in self.destinations
        }
        missing = {t.key: Traits() for t in case.targets if t.key not in traits}
        limit = min(ACCEPTED_LIMIT, self.authority.abilities.max_accepted)
        return Plan(
            policy=self.policy_of(case),
            traits={**missing, **traits},
            max_accepted=limit,
            paused=bool(self.store_clock.look()[1]),
        )

    def schedule(self, case: Case, now: datetime) -> datetime | None:
        """When a credential that was promoted `now` rotates next."""
        return due.next_rotation(
            self.policy_of(case), last=now, now=now, key=case.credential.uid, cron=self.cron
        )

    def check_grace(self, case: Case, grace: timedelta) -> None:
        """Refuse a grace below the floor of rule 19."""
        staleness = max((d.traits.staleness for d in self._of(case)), default=timedelta(0))
        floor = due.grace_floor(
            self.policy_of(case), staleness=staleness, lease=self.settings.lease
        )
        if grace < floor:
            raise Refused(
                f"a grace of {grace} is below the floor of {floor}: agents may keep what they read"
                " for longer",
                hint="add --force to cut those agents off",
            )

    def _of(self, case: Case) -> Iterator[DestinationBase]:
        return (self.destinations[t.to] for t in case.targets if t.to in self.destinations)

    # --- agents -----------------------------------------------------------------------------

    def identity(self, target: Target) -> str:
        """The canonical remote key of an entry; two spellings, one identity."""
        return _identity(self.destinations, target)

    def add_agent(
        self,
        name: str,
        *,
        login: str,
        owner: str | None,
        policy: str,
        targets: tuple[Target, ...],
        actor: str,
    ) -> Case:
        """Add an agent that the command line owns; its first version is minted at once."""
        if not is_id(name):
            raise Refused(f"an agent's id is {ID_FORM}", hint="choose another id")
        if not is_login(login):
            raise Refused(f"an agent's login is {LOGIN_FORM}", hint="choose another login")
        if owner is not None and not is_words(owner):
            raise Refused(f"an agent's owner is {WORDS_FORM}", hint="choose another owner")
        if policy not in self.settings.policies:
            raise Refused(
                f"no policy is called {policy}",
                hint=f"the configuration has: {', '.join(sorted(self.settings.policies))}",
            )
        agent = Agent(
            uid=uuid.uuid4().hex,
            name=name,
            login=login,
            owner=owner,
            policy=policy,
            managed_by=ManagedBy.COMMAND,
            targets=targets,
        )
        with self.defining:
            identities = {target.key: self.identity(target) for target in targets}
            try:
                self._check_use(self.settings, self.destinations, [agent])
            except ConfigError as error:
                raise Refused(str(error), hint="choose another policy, or mend this one") from None
            return self.store.add_agent(
                agent,
                credential_of(agent, self.store.now()),
                identities=identities,
                audit=[AuditEntry(action="agent.added", actor=actor, agent=name)],
            )

    def _check_use(
        self,
        settings: Settings,
        destinations: Mapping[str, DestinationBase],
        agents: Iterable[Agent],
    ) -> None:
        traits = {name: destination.traits for name, destination in destinations.items()}
        of_commands = [a for a in agents if a.managed_by is ManagedBy.COMMAND]
        check_use(settings, of_commands, traits, cron=self.cron)

    def reconcile(
        self,
        *,
        actor: str,
        allow_mass_change: bool = False,
        leave_agents: bool = False,
        settings: Settings | None = None,
        destinations: Mapping[str, DestinationBase] | None = None,
        take_over: frozenset[str] = frozenset(),
        rehearse: Callable[[list[Change]], object] | None = None,
    ) -> dict[str, int]:
        """Bring the store's agents in line with the files, all or none.

        `settings` and `destinations` are those that are to come, if others than the ones in force.
        With `leave_agents` the files' agents are only looked at where their connections moved. The
        agents of the command line that `take_over` names go to the files that name them. With
        `rehearse` nothing is changed: it is given what would become of each agent, before anything
        is refused for it. Raises Refused, ConfigError; then nothing was changed.
        """
        settings = settings or self.settings
        places = self.destinations if destinations is None else destinations
        for _ in range(RECONCILE_TRIES):
            known, owned = self.store.agents(), self.store.owned()
            one = Reconciling(
                settings=settings,
                identity=lambda target: _identity(places, target),
                known=known,
                owned=owned,
                now=self.store.now(),
                actor=actor,
                take_over=take_over,
            )
            taken, done = one.plan(leave_agents=leave_agents)
            if rehearse is not None:
                rehearse(one.changes)
            self._check_use(settings, places, one.after)
            if not allow_mass_change and not leave_agents:
                one.refuse_mass_change()
            with suppress(StaleRevision):  # an agent was suspended or left a place meanwhile
                if rehearse is not None:
                    undone(self.store, taken)
                else:
                    self.store.take_over(taken)
                return done
        raise Refused("the agents change too fast", hint="repeat this in a moment")

    def note_revocation(self, result: Mapping[str, Any], *, trigger: str) -> None:
        """Count a revocation and log it."""
        self.on_revocation(result, trigger)

    def world(self, watcher: Watcher, stopping: Callable[[], bool]) -> World:
        """What a saga touches."""
        return World(
            journal=self.store,
            authority=self.authority,
            destinations=_InForce(self),
            plan=self.plan,
            schedule=self.schedule,
            backoff=lambda plan, tries: due.backoff(
                plan.policy.retry, tries, unit=secrets.randbelow(1 << 30) / (1 << 30)
            ),
            sweep_every=SWEEP_EVERY,
            clock=self.store_clock,
            random_bytes=secrets.token_bytes,
            new_id=lambda: uuid.uuid4().hex,
            watcher=watcher,
            stopping=stopping,
            carried=self._carried,
        )


class _InForce(Mapping[str, DestinationBase]):
    """The connections as they are at the moment of a call, and never in the middle of a reload."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def __getitem__(self, name: str) -> DestinationBase:
        with self._parts.defining:
            return self._parts.destinations[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts.destinations)

    def __len__(self) -> int:
        return len(self._parts.destinations)


def _identity(destinations: Mapping[str, DestinationBase], target: Target) -> str:
    destination = destinations.get(target.to)
    if destination is None:
        raise ConfigError(
            f"no connection is called {target.to}",
            hint=f"the configuration has: {', '.join(sorted(destinations)) or 'none'}",
        )
    return destination.identity(target)


class StoreClock:
    """A database's time, which several hosts share.

    Asked for at most every `LEARN_EVERY`; between two answers it goes on by CLOCK_BOOTTIME, so a jump
    of this host's wall clock changes nothing. Thread-safe: a stale pair is as good as a fresh one.
    """

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._learned: tuple[timedelta, datetime] | None = None

    def now(self) -> datetime:
        """The store's time, aware, UTC. Raises StoreUnavailable."""
        boottime, learned = self._clock.boottime(), self._learned
        if learned is None or boottime - learned[0] > LEARN_EVERY:
            # Counted from before the question: never ahead of the store.
            learned = self._learned = (boottime, self._store.now())
        return learned[1] + (boottime - learned[0])

    def boottime(self) -> timedelta:
        """Time since boot, counting suspend."""
        return self._clock.boottime()


# --- building -----------------------------------------------------------------------------


def build(settings: Settings, *, cron: CronCalculator, create: bool) -> Parts:
    """Put the parts together. The store is opened at its first use, destinations by `connect`."""
    clock = GuardedClock(SystemClock(), boot_id=boot_id())
    writer = f"{os.uname().nodename}:{os.getpid()}:{uuid.uuid4().hex[:12]}"
    folder = settings.store.folder
    if create:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        refuse_open(folder, 0o700)  # before anything is put there
    ballast = Ballast(folder / "ballast")
    if create:
        ballast.keep()
        (folder / "revoked.d").mkdir(mode=0o700, exist_ok=True)  # for a person who has only `touch`
    spool = Spool(folder / "revoked.d", make_room=ballast.release)
    parts: Parts
    here = is_sqlite(settings.store.url)
    patience = 2 * settings.verifier.poll.total_seconds() + 0.1
    registered = None if here else Registered(lambda: parts.store.database, patience=patience)
    authority = BuiltinAuthority(ring=lambda: parts.ring, registered=registered)

    def open_store() -> Store:
        if (folder / "ledger").exists():
            restoring.refuse_lost(settings.store.url, Ledger(folder / "ledger"))
        return Store.open(
            settings.store.url,
            state_dir=folder,
            clock=clock,
            random_bytes=secrets.token_bytes,
            writer=writer,
            password=password_of(settings),
            create=create,
        )

    administration = Administration(
        open_store=lambda: parts.store,
        ledger=Ledger(folder / "ledger"),
        spool=spool,
        begun=Begun(folder / "requests.d"),
        authority=authority,
        clock=clock,
        schedule=lambda case, now: parts.schedule(case, now),  # noqa: PLW0108 - bound below
        on_rotation_end=lambda outcome: parts.on_rotation_end(outcome),  # noqa: PLW0108 - as above
        make_room=ballast.release,
    )
    parts = Parts(
        settings=settings,
        open_store=open_store,
        spool=spool,
        ballast=ballast,
        authority=authority,
        administration=administration,
        clock=clock,
        cron=cron,
        ring=ring_of(settings),
    )
    return parts


def connect(
    settings: Settings,
    *,
    store_id: str,
    clock: Clock,
    before: Settings | None = None,
    kept: Mapping[str, DestinationBase] | None = None,
) -> dict[str, DestinationBase]:
    """Make every destination that the settings name. None is contacted yet.

    Those of `kept` stay that `before` describes in the same way: a login that is good once is not
    used again, and a call that is under way is not cut off.
    """
    found: dict[str, DestinationBase] = {}
    for name, connection in settings.connections.items():
        old = before.connections.get(name) if before else None
        same = old is not None and (old.type, old.options) == (connection.type, connection.options)
        if same and kept and name in kept:
            found[name] = kept[name]
            continue
        found[name] = registry.load(connection.type)(
            connection.options, name=name, store_id=store_id, clock=clock
        )
    return found


def ring_of(settings: Settings) -> KeyRing:
    """Read the key ring's files as they are now; one that cannot be used stands in it with its reason."""
    verifier = settings.verifier
    files = {key_id: key.file for key_id, key in verifier.keys.items()}
    return KeyRing.read(files, current=verifier.key or "", schemes=verifier.schemes)


def password_of(settings: Settings) -> Password:
    """Return what reads the store's password, each time anew: it may have been changed.

    Raises ConfigError where it cannot be read now.
    """

    def read() -> Secret | None:
        path = settings.store.password_file
        if path is None:
            return None
        try:
            return Secret(read_credential(path).removesuffix("\n"))
        except ConfigError as error:
            raise ConfigError(f"store.password_file: {error}", hint=error.hint) from None

    read()
    return read


def check_settings(settings: Settings, *, cron: CronCalculator) -> None:
    """Make the checks that need adapters: owners of entries, quotas, staleness. Offline.

    Raises ConfigError.
    """
    destinations = connect(settings, store_id="", clock=SystemClock())
    problems: list[config.Problem] = []

    def collect(check: Callable[..., None], *args: Any, **more: Any) -> None:
        try:
            check(settings, *args, **more)
        except config.BadFiles as error:
            problems.extend(error.problems)

    try:
        collect(config.check_owners, lambda target: destinations[target.to].identity(target))
        collect(config.check_policies, lambda name: destinations[name].traits, cron=cron)
        config.refuse(problems)
    finally:
        for destination in destinations.values():
            destination.close()
