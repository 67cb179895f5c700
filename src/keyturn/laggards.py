"""What verifiers saw of an agent's versions: who lags behind, and who presents what is over.

A laggard is a previous version that was presented later than its successor's promotion plus the policy's
`consumer_cache`: by then whoever reads its entry again holds the new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from keyturn.core.model import Case, Policy, Version, VersionState
from keyturn.core.walltime import rfc3339
from keyturn.errors import StorageError
from keyturn.storage.previous import Previous
from keyturn.storage.store import Store
from keyturn.storage.usage import Presented, UsageRecords, Used

LATELY = timedelta(minutes=15)  # after which a verifier that writes nothing counts no more
SHOWN = timedelta(days=30)  # for which status tells of an ended version that was presented
MOST = 500  # of those, over all agents
QUARTER = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What was counted for some agents. `counts` is whether any verifier has written lately."""

    counts: bool
    uses: Mapping[str, Used]  # by version
    presented: Mapping[str, Sequence[Presented]] = field(default_factory=dict)  # by agent


def look(store: Store, records: UsageRecords, cases: Iterable[Case], now: datetime) -> Seen | None:
    """Return what is known of these agents' versions; None where nothing counts or can be read."""
    try:
        flushed = records.flushed_at()
        if flushed is None:
            return None
        ids = [version.id for case in cases for version in case.versions]
        return Seen(
            counts=now - flushed <= LATELY,
            uses=records.uses(ids),
            presented=_by_agent(store, records.presented(), now),
        )
    except StorageError:
        return None


def _by_agent(
    store: Store, found: Sequence[Presented], now: datetime
) -> dict[str, list[Presented]]:
    lately = [one for one in found if now - one.last_at <= SHOWN]
    newest = sorted(lately, key=lambda one: one.last_at, reverse=True)[:MOST]
    known = store.find_versions([one.version_id for one in newest]) if newest else {}
    result: dict[str, list[Presented]] = {}
    for one in newest:
        if one.version_id in known:
            result.setdefault(known[one.version_id][0].name, []).append(one)
    return result


def last_hour(
    records: UsageRecords, version_ids: Sequence[str], now: datetime
) -> dict[str, Used | None] | None:
    """Return the uses of some versions, None for one without any; None where nothing counts."""
    try:
        flushed = records.flushed_at()
        if flushed is None or now - flushed > LATELY:
            return None
        return dict.fromkeys(version_ids) | records.uses(version_ids)
    except StorageError:
        return None


def is_laggard(replaced_at: datetime, policy: Policy, used: Used | None) -> bool:
    """Whether it was presented when everybody should have read the next one."""
    return used is not None and used.last_used_at > replaced_at + policy.consumer_cache


def ends_in_use(one: Previous, used: Used | None, now: datetime) -> bool:
    """Whether a quarter of its grace is left and it was used within a quarter of the grace."""
    if one.deadline is None or one.deadline <= now or used is None:
        return False
    quarter = (one.deadline - one.replaced_at) / QUARTER
    return one.deadline - now <= quarter and now - used.last_used_at <= quarter


def of_version(version: Version, case: Case, policy: Policy, seen: Seen | None) -> dict[str, Any]:
    """Return what `keyturn status` says of a version's uses: null where nothing counts them."""
    if seen is None:
        return dict.fromkeys(("first_used_at", "last_used_at", "uses", "laggards"))
    used = seen.uses.get(version.id)
    return {
        "first_used_at": rfc3339(used.first_used_at) if used else None,
        "last_used_at": rfc3339(used.last_used_at) if used else None,
        "uses": used.uses if used else 0,
        "laggards": _laggards(version, case, policy, seen),
    }


def _laggards(version: Version, case: Case, policy: Policy, seen: Seen) -> list[str] | None:
    """Name who lags: the agent, since a verifier knows no more of those who share its secret."""
    if version.state is not VersionState.PREVIOUS or not seen.counts:
        return None
    return [case.agent.name] if lags(version, case, policy, seen) else []


def lags(version: Version, case: Case, policy: Policy, seen: Seen | None) -> bool:
    """Whether a version of a case is a laggard."""
    later = (v.promoted_at for v in case.versions if v.seq > version.seq and v.promoted_at)
    replaced_at = min(later, default=None)
    if seen is None or replaced_at is None or version.state is not VersionState.PREVIOUS:
        return False
    return is_laggard(replaced_at, policy, seen.uses.get(version.id))


def presented_rows(case: Case, seen: Seen | None) -> list[dict[str, Any]] | None:
    """Return the ended versions of an agent that somebody still presented, the newest first."""
    if seen is None:
        return None
    return [
        {
            "version": one.version_id,
            "state": one.state,
            "first_at": rfc3339(one.first_at),
            "last_at": rfc3339(one.last_at),
            "times": one.number,
        }
        for one in seen.presented.get(case.agent.name, ())
    ]
