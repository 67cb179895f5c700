"""The ledger's lines as values: what `core.merging` decides on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from keyturn.core.merging import AgentNews, Known, Moment, News
from keyturn.core.model import (
    Agent,
    AgentState,
    Credential,
    Effect,
    Intent,
    ManagedBy,
    Target,
    Version,
    VersionState,
)
from keyturn.storage import codec
from keyturn.storage.ledger import Ledger


@dataclass(slots=True)
class _Gathered:
    lines: list[News] = field(default_factory=list)
    agents: list[AgentNews] = field(default_factory=list)
    confirmed: list[Moment] = field(default_factory=list)

    def known(self) -> Known:
        nothing = Moment(incarnation=0, revision=0)
        sure = [one.moment for one in self.agents if one.confirmed]
        return Known(
            lines=tuple(self.lines),
            agents=tuple(self.agents),
            confirmed=max([*self.confirmed, *sure], default=nothing),
        )


def read(ledger: Ledger, *, whole: bool = True) -> dict[str, Known]:
    """Return what the ledger knows by credential; without `whole` only how far it goes.

    Raises StoreUnavailable.
    """
    found: dict[str, _Gathered] = defaultdict(_Gathered)
    _read_agents(ledger, found)
    for name in ledger.names():
        for line in ledger.lines(name) if whole else ledger.newest(name):
            _read_line(line, found)
    return {uid: one.known() for uid, one in found.items()}


def incarnation(known: Iterable[Known]) -> int:
    """Return the last life of a store that the ledger has seen."""
    return max((one.announced.incarnation for one in known), default=0)


def _read_agents(ledger: Ledger, found: dict[str, _Gathered]) -> None:
    last: dict[str, AgentNews] = {}
    for line in ledger.agent_lines():
        if "confirmed" in line:
            for uid, state in line["confirmed"].items():
                if uid in last and last[uid].agent.state == state:
                    _confirm(found[last[uid].credential.uid], last[uid])
            continue
        news = AgentNews(
            moment=_moment(line),
            at=codec.instant(line["at"]),
            agent=_agent(line["agent"]),
            credential=_credential(line["credential"]),
            accepted=tuple(line["accepted"]) if "accepted" in line else None,
        )
        last[news.agent.uid] = news
        found[news.credential.uid].agents.append(news)


def _confirm(gathered: _Gathered, news: AgentNews) -> None:
    """Mark a line, and whatever stands before it of this agent, as committed."""
    gathered.agents = [
        replace(one, confirmed=True) if one.moment <= news.moment else one
        for one in gathered.agents
    ]


def _read_line(line: dict[str, Any], found: dict[str, _Gathered]) -> None:
    if "refused" in line:
        if "confirmed" in line:
            own = found[line["credential"]]
            life = own.lines[-1].moment.incarnation if own.lines else 0
            if life:
                own.confirmed.append(Moment(incarnation=life, revision=line["confirmed"]))
        return
    if "revision" not in line:
        return  # of a release that wrote none: a later start of this ledger has it all
    version = _version(line) if "state" in line else None
    found[line["credential"]].lines.append(
        News(
            moment=_moment(line),
            at=codec.instant(line["at"]),
            version=version,
            intent=_intent(line) if "intent" in line else None,
            owed=line.get("owed"),
            withheld=tuple(line.get("withheld", ())),
        )
    )


def writers(known: Iterable[Known]) -> Iterator[tuple[str, datetime]]:
    """Yield every process that wrote an intent, and when."""
    for one in known:
        for news in one.lines:
            if news.intent is not None:
                yield news.intent.writer, news.at


def _moment(line: dict[str, Any]) -> Moment:
    return Moment(incarnation=line["incarnation"], revision=line["revision"])


def _instant(value: int | None) -> datetime | None:
    return None if value is None else codec.instant(value)


def _targets(value: Any) -> tuple[Target, ...]:
    return codec.targets_from(value) if isinstance(value, str) else ()


def _agent(line: dict[str, Any]) -> Agent:
    changed = {
        "managed_by": ManagedBy(line["managed_by"]),
        "state": AgentState(line["state"]),
        "targets": _targets(line["targets"]),
    }
    return Agent(**line | changed)


def _credential(line: dict[str, Any]) -> Credential:
    changed = {
        "leaving": _targets(line["leaving"]),
        "withheld": tuple(line["withheld"]),
        "next_rotation_at": _instant(line["next_rotation_at"]),
    }
    return Credential(**line | changed)


def _version(line: dict[str, Any]) -> Version:
    return Version(
        id=line["version"],
        credential_uid=line["credential"],
        seq=line["seq"],
        login=line["login"],
        state=VersionState(line["state"]),
        scheme=line["scheme"],
        digest=line["digest"],
        tag=bytes.fromhex(line["tag"]) if line["tag"] else None,
        origin=line["origin"],
        fence=line["fence"],
        minted_at=codec.instant(line["minted_at"]),
        deadline=_instant(line["deadline"]),
        not_after=_instant(line["not_after"]),
    )


def _intent(line: dict[str, Any]) -> Intent:
    return Intent(
        uid=line["intent"],
        credential_uid=line["credential"],
        version_id=line["version"],
        target=line["target"],
        effect=Effect(line["effect"]),
        expected="",
        writer=line["writer"],
        fence=line["fence"],
        incarnation=line["incarnation"],
        at=codec.instant(line["at"]),
    )
