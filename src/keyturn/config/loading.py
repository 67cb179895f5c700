"""One run of `load`: read, shape, connect, check, with all problems in one list."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from keyturn.config.file import Document, Problem, did_you_mean, read_document, refuse
from keyturn.config.generation import Generation, Include, Looks, Seen
from keyturn.config.keys import check_keys, shown_to_readers
from keyturn.config.listening import ListenSettings
from keyturn.config.models import (
    ID_FORM,
    MAIN_ONLY,
    AdminSettings,
    AgentSection,
    AuditSettings,
    HookSection,
    LogSettings,
    PolicySection,
    ReloadSettings,
    StoreSettings,
    TargetSection,
    TopSection,
    is_id,
)
from keyturn.config.settings import AgentDefinition, Connection, Settings
from keyturn.config.shape import Model, shape
from keyturn.config.verifying import VerifierSection
from keyturn.core.model import Keys, Policy, Retry, Target, Traits
from keyturn.core.policy import CronCalculator, check, default_grace, shortest_interval
from keyturn.core.revocations import RevocationEntry, parse_line
from keyturn.errors import ConfigError

ENVIRONMENT = "KEYTURN_"
_FROM_ENVIRONMENT = {"store": StoreSettings, "log": LogSettings}
_SOME_DAY = datetime(2026, 1, 1, tzinfo=UTC)  # `check` gives the same answer every day


class Adapter(Protocol):
    """What configuration needs of an adapter's class."""

    @property
    def Options(self) -> type[BaseModel]:  # noqa: N802  # a class attribute there
        """The model of its connections' options."""


class Loading:
    """One run of `load`: what was read so far, and all that is wrong with it."""

    def __init__(
        self,
        path: Path,
        *,
        cron: CronCalculator | None,
        now: datetime | None,
        adapter: Callable[[str], Adapter],
        in_checkout: bool = False,
        only: Collection[str] = (),
    ) -> None:
        self._path, self._cron, self._now, self._adapter = path, cron, now, adapter
        self._in_checkout = in_checkout
        self._only = frozenset(only)
        self.problems: list[Problem] = []
        self._notes: list[str] = []
        self._include: Include | None = None
        self._seen: list[tuple[Path, Seen]] = []
        self._looks = Looks()

    def run(self, environ: Mapping[str, str], *, without_file: bool = False) -> Settings:
        """Return settings that are only good if there are no problems."""
        empty = Document(path=self._path)
        self._main = main = empty if without_file else self._read(self._path)
        refuse(self.problems if not main.data else [])
        for key in main.data.keys() - self._only if self._only else ():
            del main.data[key]
        self._overlay(environ)
        sections = ("agents", *MAIN_ONLY)
        scalars = {key: value for key, value in main.data.items() if key not in sections}
        top = self._shape(TopSection, scalars, main, ()) or TopSection(version=1)
        self._check_hooks(top.notify)
        store = self._section(StoreSettings, "store")
        verifier = self._section(VerifierSection, "verifier")
        leased = "verifier" in main.data and not store.url.startswith("sqlite:")
        if verifier.listen and verifier.embedded and leased and not self._only:
            at, text = (
                ("verifier", "embedded"),
                "expected false on PostgreSQL: the verifier has a uid",
            )
            text += " of its own there; run `keyturn verifier` as a unit of its own"
            self.problems.append(main.problem(at, text, "embedded"))
        lease = verifier.lease if leased else timedelta(0)
        connections = self._connections()
        policies, places = self._policies(lease)
        agents = self._agents([main, *self._includes(top.include)])
        if all(not problem.key.startswith("verifier") for problem in self.problems):
            self.problems += check_keys(verifier, store, policies, main)
        self._notes += shown_to_readers(store, policies, agents)
        return Settings(
            path=self._path,
            store=store,
            log=self._section(LogSettings, "log"),
            verifier=verifier,
            admin=self._section(AdminSettings, "admin"),
            listen=self._section(ListenSettings, "listen"),
            anchor_file=self._section(AuditSettings, "audit").anchor_file,
            notify=tuple(top.notify),
            connections=connections,
            policies=policies,
            policy_places=places,
            reload=self._section(ReloadSettings, "reload"),
            agents=agents,
            revocations_file=top.revocations_file,
            revocations=tuple(self._revocations(top.revocations)),
            lease=lease,
            notes=tuple(self._notes),
            generation=self.generation,
        )

    @property
    def generation(self) -> Generation:
        """The files as they were before they were read."""
        return Generation(main=self._path, include=self._include, files=tuple(self._seen))

    @property
    def is_steady(self) -> bool:
        """Whether no file was replaced, added or written to while they were read."""
        return self.generation.again() == self.generation

    def _read(self, path: Path) -> Document:
        self._seen.append((path, self._looks.at(path)))
        return read_document(path, self.problems, judge_writers=not self._in_checkout)

    # --- environment and sections ----------------------------------------------------------

    def _overlay(self, environ: Mapping[str, str]) -> None:
        """Put KEYTURN_STORE__… and KEYTURN_LOG__… over the file.

        SECURITY: nothing else can be set from there: whoever starts us must not be able to choose
        where secrets go.
        """
        for name in sorted(environ):
            section, nested, key = name.removeprefix(ENVIRONMENT).lower().partition("__")
            if not name.startswith(ENVIRONMENT) or not nested:
                continue
            where = f"environment:{name}"
            if section not in _FROM_ENVIRONMENT:
                text = (
                    "expected KEYTURN_STORE__… or KEYTURN_LOG__…: the rest stands in the file only"
                )
                self.problems.append(Problem(where=where, key=section, text=text))
                continue
            values = self._main.data.setdefault(section, {})
            if isinstance(values, dict):
                values[key] = environ[name]
                self._main.lines[section, key] = where

    def _shape(
        self, model: type[Model], data: object, document: Document, at: tuple[str | int, ...]
    ) -> Model | None:
        return shape(model, data, document=document, at=at, problems=self.problems)

    def _section(self, model: type[Model], name: str) -> Model:
        data = self._main.data.get(name, {})
        return self._shape(model, data, self._main, (name,)) or model()

    def _named(self, document: Document, name: str) -> Iterable[tuple[str, Any]]:
        """Yield the parts of a section that is keyed by ids."""
        data = document.data.get(name, {})
        if not isinstance(data, dict):
            self.problems.append(document.problem((name,), "expected a mapping by name"))
            return
        for key, value in data.items():
            if is_id(key):
                yield key, value
            else:
                self.problems.append(document.problem((name, key), f"expected {ID_FORM}"))

    # --- connections -----------------------------------------------------------------------

    def _connections(self) -> dict[str, Connection]:
        found: dict[str, Connection] = {}
        self._connection_names: set[str] = set()
        for name, data in self._named(self._main, "connections"):
            self._connection_names.add(name)  # known to agents, even if it is wrong itself
            at = ("connections", name)
            if not isinstance(data, dict):
                self.problems.append(self._main.problem(at, "expected a mapping"))
                continue
            kind, options = data.get("type"), {k: v for k, v in data.items() if k != "type"}
            adapter = self._adapter_of(kind, at)
            if adapter is None:
                continue
            read = self._shape(adapter.Options, options, self._main, at)
            if read is not None:
                found[name] = Connection(
                    name=name, type=str(kind), options=read, where=self._main.where(at)
                )
        return found

    def _adapter_of(self, kind: object, at: tuple[str, ...]) -> Adapter | None:
        text = "required: expected the type of a destination"
        if isinstance(kind, str):
            try:
                return self._adapter(kind)
            except ConfigError as error:
                text = (
                    f"{error} ({error.hint})"
                    if error.hint != ConfigError.default_hint
                    else str(error)
                )
        self.problems.append(self._main.problem((*at, "type"), text))
        return None

    # --- policies --------------------------------------------------------------------------

    def _policies(self, lease: timedelta) -> tuple[dict[str, Policy], dict[str, str]]:
        sections: dict[str, PolicySection] = {}
        self._policy_names = {"default"}
        for name, data in self._named(self._main, "policies"):
            self._policy_names.add(name)
            section = self._shape(PolicySection, data, self._main, ("policies", name))
            if section is not None:
                sections[name] = section
        sections.setdefault("default", PolicySection())
        policies: dict[str, Policy] = {}
        places: dict[str, str] = {}
        for name in sections:
            values = self._inherited(name, sections)
            if values is not None:
                policies[name] = _policy(name, values)
                places[name] = self._main.where(("policies", name))
                self.problems += check_policy(policies[name], places[name], {}, lease, self._cron)
        return policies, places

    def _inherited(self, name: str, sections: Mapping[str, PolicySection]) -> dict[str, Any] | None:
        """Return the values that are given along `extends`, the nearest first."""
        chain: list[str] = []
        following: str | None = name
        while following is not None:
            at = ("policies", chain[-1] if chain else name, "extends")
            if following in chain:
                self.problems.append(self._main.problem(at, "expected no circle of policies"))
                return None
            if following not in sections:
                if following not in self._policy_names:  # else its own problem has been reported
                    text = did_you_mean(following, self._policy_names)
                    problem = self._main.problem(at, f"unknown policy: {text}", "unknown-name")
                    self.problems.append(problem)
                return None
            chain.append(following)
            following = sections[following].extends
        values: dict[str, Any] = {}
        for ancestor in reversed(chain):
            values = _over(values, sections[ancestor])
        return values

    # --- agents ----------------------------------------------------------------------------

    def _includes(self, pattern: str | None) -> list[Document]:
        if pattern is None:
            return []
        include = Include.of(pattern, self._path)
        try:
            paths, closed = include.files(), sorted(include.closed())
        except ValueError:
            text = "expected a file pattern"
            self.problems.append(self._main.problem(("include",), text, "include"))
            return []
        self._include = include
        for folder in closed:
            text = f"expected folders that can be looked into: {folder} is closed to this user"
            self.problems.append(self._main.problem(("include",), text, "unreadable"))
        if not paths:
            self._matched_nothing(pattern)
        documents = [self._read(path) for path in paths]
        for document in documents:
            for key in document.data.keys() - {"agents", "version"}:
                # SECURITY: who may write agents must not be able to send secrets elsewhere.
                text = "expected agents only: the rest stands in the main file"
                self.problems.append(document.problem((key,), text, "main-file-only"))
            if document.data and "agents" not in document.data:
                # A file that is cut short must not mean that its agents are gone.
                text = (
                    "required: expected a mapping by name (`agents: {}` says that there are none)"
                )
                self.problems.append(document.problem(("agents",), text, "required"))
        return documents

    def _matched_nothing(self, pattern: str) -> None:
        if self._in_checkout:
            text = "expected a pattern that matches files here too: one relative to this file"
            self.problems.append(self._main.problem(("include",), text, "include"))
        else:
            where = self._main.where(("include",))
            self._notes.append(f"{where}: include matches no file")

    def _agents(self, documents: list[Document]) -> dict[str, AgentDefinition]:
        agents: dict[str, AgentDefinition] = {}
        logins: dict[str, str] = {}  # by login, the agent that has it first
        for document in documents:
            for name, data in self._named(document, "agents"):
                at = ("agents", name)
                section = self._shape(AgentSection, data, document, at)
                if section is None:
                    continue
                agent = self._agent(name, section, document)
                if name in agents:
                    text = f"expected this agent once; it is also at {agents[name].where}"
                    self.problems.append(document.problem(at, text, "duplicate-agent"))
                    continue
                agents[name] = agent
                first = agents[logins.setdefault(agent.login, name)]
                if first is not agent:
                    text = f"expected a login of its own; the agent at {first.where} has it"
                    self.problems.append(document.problem((*at, "login"), text, "duplicate-login"))
        return agents

    def _agent(self, name: str, section: AgentSection, document: Document) -> AgentDefinition:
        at = ("agents", name)
        if section.policy not in self._policy_names:
            text = f"unknown policy: {did_you_mean(section.policy, self._policy_names)}"
            self.problems.append(document.problem((*at, "policy"), text, "unknown-name"))
        places = [(*at, "destinations", number) for number in range(len(section.destinations))]
        for place, target in zip(places, section.destinations, strict=True):
            if target.to not in self._connection_names:
                text = f"unknown connection: {did_you_mean(target.to, self._connection_names)}"
                self.problems.append(document.problem((*place, "to"), text, "unknown-name"))
        return AgentDefinition(
            name=name,
            login=section.login or name,
            owner=section.owner,
            policy=section.policy,
            targets=tuple(map(_target, section.destinations)),
            where=document.where(at),
            at=tuple(map(document.where, places)),
        )

    # --- webhooks --------------------------------------------------------------------------

    def _check_hooks(self, hooks: Iterable[HookSection]) -> None:
        """Refuse two webhooks of one name: what each has told is kept under it."""
        names: set[str] = set()
        for number, hook in enumerate(hooks):
            if not is_id(hook.label) or hook.label in names:
                text = f"expected a name of its own for each webhook: {ID_FORM}"
                self.problems.append(self._main.problem(("notify", number, "name"), text))
            names.add(hook.label)

    # --- revocations -----------------------------------------------------------------------

    def _revocations(self, lines: list[str]) -> Iterable[RevocationEntry]:
        for number, line in enumerate(lines):
            try:
                entry = parse_line(line, number=number + 1, now=self._now)
            except ValueError as error:
                at = ("revocations", number)
                self.problems.append(self._main.problem(at, str(error), "revocation"))
            else:
                yield from [entry] if entry else []


def _over(values: dict[str, Any], section: PolicySection) -> dict[str, Any]:
    """Return the values with those that a section gives itself put over them."""
    given = {name: getattr(section, name) for name in section.model_fields_set - {"extends"}}
    merged = {**values, **given}
    if "cron" in given:  # one schedule replaces the other
        merged["every"] = None
    elif "every" in given:
        merged["cron"] = None
    if "retry" in given:
        own = {name: getattr(section.retry, name) for name in section.retry.model_fields_set}
        merged["retry"] = {**values.get("retry", {}), **own}
    return merged


def _policy(name: str, values: dict[str, Any]) -> Policy:
    """Return the policy that these values make: what is missing has its default."""
    chosen = PolicySection().model_copy(update=values)
    return Policy(
        name=name,
        every=chosen.every,
        cron=chosen.cron,
        zone=chosen.zone,
        window=chosen.window,
        jitter=chosen.jitter if chosen.cron is None else 0.0,
        grace=chosen.grace or default_grace(chosen.consumer_cache),
        consumer_cache=chosen.consumer_cache,
        max_age=chosen.max_age.after if chosen.max_age else None,
        enforce_max_age=chosen.max_age is not None and chosen.max_age.mode == "enforce",
        first_rotation=chosen.first_rotation,
        retry=Retry(**values.get("retry", {})),
        retire=chosen.retire,
        scheme=chosen.scheme,
    )


def _target(section: TargetSection) -> Target:
    return Target(
        to=section.to,
        path=section.path,
        keys=Keys(id=section.keys.id, secret=section.keys.secret, version=section.keys.version),
        merge=section.merge,
        adopt=section.adopt,
    )


def check_policy(
    policy: Policy,
    where: str,
    traits: Mapping[str, Traits],
    lease: timedelta,
    cron: CronCalculator | None,
) -> list[Problem]:
    """Return what cannot work about a policy; without `cron` no crontab line is looked at."""
    key, interval = f"policies.{policy.name}", None
    if policy.cron is not None and cron is not None:
        try:
            interval = shortest_interval(policy, now=_SOME_DAY, cron=cron)
        except ValueError as error:
            return [Problem(where=where, key=f"{key}.cron", text=str(error), code="policy")]
        if cron.next(policy.cron, zone=policy.zone, after=_SOME_DAY) is None:
            text = "expected a line that comes round"
            return [Problem(where=where, key=f"{key}.cron", text=text, code="policy")]
    texts = check(policy, traits, lease, interval=interval)
    return [Problem(where=where, key=key, text=text, code="policy") for text in texts]
