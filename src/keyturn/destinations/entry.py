"""What an entry is made of, whatever holds it: our three keys, those of others, whose it is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from keyturn.core.model import Keys, Target
from keyturn.core.secret import Secret
from keyturn.errors import Conflict, Rejected
from keyturn.ports import Entry, Observed


def observed(
    keys: Keys,
    values: Mapping[str, Any] | None,
    *,
    owner: str | None,
    token: str,
    locator: str = "",
    fresh: bool = True,
) -> Observed:
    """Read the three parts out of an entry's values; None where there is no entry."""
    if values is None:
        return Observed(owner=owner, token=token, fresh=fresh)
    secret = _text(values.get(keys.secret))
    return Observed(
        exists=True,
        has_value=keys.secret in values,
        login=_text(values.get(keys.id)),
        secret=Secret(secret) if secret is not None else None,
        version_id=_text(values.get(keys.version)),
        other_keys=any(key not in (keys.id, keys.secret, keys.version) for key in values),
        owner=owner,
        token=token,
        locator=locator,
        fresh=fresh,
    )


def merged(target: Target, shown: Mapping[str, Any], entry: Entry) -> dict[str, Any]:
    """Return the values of an entry: our three keys, and with `merge` those of others."""
    keys = target.keys
    own = {keys.id: entry.login, keys.secret: entry.secret.reveal(), keys.version: entry.version_id}
    return {**shown, **own} if target.merge else own


def without_ours(
    target: Target,
    shown: Mapping[str, Any],
    *,
    marked: str | None,
    owner: str,
    version_id: str,
) -> dict[str, Any] | None:
    """Return the values of an entry without our secret and version; None where it has neither.

    `marked` is the owner marker as found. Raises Rejected where the entry is not `owner`'s, Conflict
    where it shows another version: it was replaced since somebody looked.
    """
    keys = target.keys
    if keys.secret not in shown and keys.version not in shown:
        return None
    if marked != owner:
        raise Rejected("the entry is not ours", hint="empty it by hand, or leave it to its owner")
    if shown.get(keys.version) != version_id:
        raise Conflict
    return {key: value for key, value in shown.items() if key not in (keys.secret, keys.version)}


def refuse_foreign(
    target: Target, shown: Mapping[str, Any], *, owner: str | None, store_id: str
) -> None:
    """Refuse a write that would replace what is not ours. Raises Rejected.

    The saga looks before it writes; this is the same rule where the effect lands.
    """
    if owner not in (None, store_id):
        raise Rejected("the entry belongs to another store", hint="choose another path")
    keys = target.keys
    ours = owner == store_id or target.adopt
    if not ours and any(key in shown for key in (keys.id, keys.secret, keys.version)):
        raise Rejected("the entry exists and is not ours", hint="set adopt: true to take it over")
    if not target.merge and any(key not in (keys.id, keys.secret, keys.version) for key in shown):
        raise Rejected("the entry holds other keys", hint="set merge: true to keep them")


def parsed(text: str | bytes) -> dict[str, Any] | None:
    """Read an entry's text as any strict reader would, each key once, or not at all: None."""
    try:
        found = json.loads(
            text.decode() if isinstance(text, bytes) else text,
            object_pairs_hook=_once,
            parse_constant=_finite,
            parse_float=_finite,
        )
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """SECURITY: readers differ in which of two equal keys they take; our read-back proves one."""
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError
    return found


def _finite(text: str) -> float:
    """Refuse what could not be written back as it was."""
    if not math.isfinite(number := float(text)):
        raise ValueError
    return number


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
