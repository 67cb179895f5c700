"""The one place where structured values become text and back.

Compact JSON with sorted keys: equal values have equal texts, so a row that did not change is not
written, and an audit hash can be computed again from what was stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from keyturn.core.model import (
    Cause,
    Drift,
    Keys,
    Look,
    Repairs,
    Request,
    Target,
    Waiting,
    WaitReason,
)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


def micros(at: datetime) -> int:
    """Return whole microseconds since 1970 UTC. Naive values are refused: they mean nothing."""
    if at.tzinfo is None:
        raise ValueError("a datetime without a zone cannot be stored")
    return (at - EPOCH) // MICROSECOND


def instant(value: int) -> datetime:
    """Return the aware UTC datetime of whole microseconds since 1970."""
    return EPOCH + timedelta(microseconds=value)


def text(value: Any) -> str:
    """Return the one JSON text of a value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def loads(value: str) -> dict[str, Any]:
    """Return the object of a JSON text."""
    found: dict[str, Any] = json.loads(value)
    return found


def detail_text(detail: Iterable[tuple[str, Any]]) -> str:
    """Return the text of an audit entry's details; times become microseconds."""
    return text([[name, _plain(value)] for name, value in detail])


def detail_from(value: str) -> tuple[tuple[str, Any], ...]:
    """Return an audit entry's details."""
    return tuple((name, item) for name, item in json.loads(value))


def targets_text(targets: Iterable[Target]) -> str:
    """Return the text of a list of destinations, in its order."""
    return text([_target(target) for target in targets])


def leads_to(connection: str) -> str:
    """Return what the text of a list holds exactly where one of its destinations is there.

    No other value of it can: a quote inside one is escaped.
    """
    return f'"to":{json.dumps(connection)}'


def targets_from(value: str) -> tuple[Target, ...]:
    """Return a list of destinations."""
    return tuple(Target(**{**item, "keys": Keys(**item["keys"])}) for item in json.loads(value))


def request_text(request: Request) -> str:
    """Return the text of a requested rotation."""
    grace = None if request.grace is None else request.grace // MICROSECOND
    return text({"cause": request.cause.value, "grace": grace, "by": request.by})


def request_from(value: str) -> Request:
    """Return a requested rotation."""
    item = json.loads(value)
    grace = None if item["grace"] is None else timedelta(microseconds=item["grace"])
    return Request(cause=Cause(item["cause"]), grace=grace, by=item["by"])


def drift_text(drift: Iterable[Drift]) -> str:
    """Return the text of what the last sweep found."""
    return text([[item.target, item.kind, micros(item.since)] for item in drift])


def drift_from(value: str) -> tuple[Drift, ...]:
    """Return what the last sweep found."""
    return tuple(
        Drift(target=target, kind=kind, since=instant(since))
        for target, kind, since in json.loads(value)
    )


def looks_text(looks: Iterable[Look]) -> str:
    """Return the text of what the last sweeps saw."""
    return text([[item.target, micros(item.at), item.shown] for item in looks])


def looks_from(value: str) -> tuple[Look, ...]:
    """Return what the last sweeps saw."""
    return tuple(
        Look(target=target, at=instant(at), shown=shown) for target, at, shown in json.loads(value)
    )


def repairs_text(repairs: Iterable[Repairs]) -> str:
    """Return the text of what is remembered of repairs."""
    return text(
        [
            [one.target, [micros(at) for at in one.at], micros(one.fight) if one.fight else None]
            for one in repairs
        ]
    )


def repairs_from(value: str) -> tuple[Repairs, ...]:
    """Return what is remembered of repairs."""
    return tuple(
        Repairs(
            target=target,
            at=tuple(instant(moment) for moment in at),
            fight=None if fight is None else instant(fight),
        )
        for target, at, fight in json.loads(value)
    )


def names_text(names: Iterable[str]) -> str:
    """Return the text of a list of names."""
    return text(list(names))


def names_from(value: str) -> tuple[str, ...]:
    """Return a list of names."""
    return tuple(json.loads(value))


def waiting_text(waiting: Waiting) -> str:
    """Return the text of why a rotation waits."""
    return text(
        {
            "reason": waiting.reason.value,
            "where": waiting.where,
            "code": waiting.code,
            "detail": waiting.detail,
            "since": micros(waiting.since),
            "next_try_at": micros(waiting.next_try_at),
            "tries": waiting.tries,
        }
    )


def waiting_from(value: str) -> Waiting:
    """Return why a rotation waits."""
    item = json.loads(value)
    return Waiting(
        reason=WaitReason(item["reason"]),
        where=item["where"],
        code=item["code"],
        detail=item["detail"],
        since=instant(item["since"]),
        next_try_at=instant(item["next_try_at"]),
        tries=item["tries"],
    )


def _target(target: Target) -> Mapping[str, Any]:
    keys = target.keys
    return {
        "to": target.to,
        "path": target.path,
        "keys": {"id": keys.id, "secret": keys.secret, "version": keys.version},
        "merge": target.merge,
        "adopt": target.adopt,
    }


def _plain(value: Any) -> Any:
    """Reduce a detail to what JSON has; anything unknown becomes its text."""
    if isinstance(value, datetime):
        return micros(value)
    if isinstance(value, timedelta):
        return value // MICROSECOND
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)
