"""How what a destination gives is understood: ours, unaltered, replaceable, or somebody else's.

Kept apart from the saga because every line here is a rule against a hostile or careless writer.
"""

from __future__ import annotations

from keyturn.core.model import Case, Target
from keyturn.core.secret import Secret
from keyturn.core.steps import Sight
from keyturn.ports import Authority, Observed


def look(
    case: Case,
    target: Target,
    found: Observed,
    *,
    authority: Authority,
    store_id: str,
    holding: str | None = None,
    plain: Secret | None = None,
) -> Sight:
    """Turn a read into what a run knows; `plain` is the plaintext of version `holding`, if held."""
    shown = recognise(case, found, authority=authority)
    staged = case.version(found.staged)
    return Sight(
        shown=shown,
        verified=shown is not None and shown == holding and plain == found.secret,
        blocked=_blocked(case, target, found, known=shown is not None, store_id=store_id),
        staged=staged.id if staged else None,
        foreign_staged=found.staged is not None and staged is None,
        empty=not found.has_value,
        token=found.token,
        locator=found.locator,
        fresh=found.fresh,
    )


def recognise(case: Case, found: Observed, *, authority: Authority) -> str | None:
    """Return the version that is shown, if it is one of this credential's and unaltered.

    SECURITY: the id in the entry is only a claim. The text itself must parse to that id and carry
    its tag, and the login must be its own, or a hostile writer could pass a value off as ours.
    """
    version = case.version(found.version_id)
    if version is None or found.secret is None or found.login != version.login:
        return None
    if not authority.resembles(version, found.secret):
        return None
    return version.id


def _blocked(case: Case, target: Target, found: Observed, *, known: bool, store_id: str) -> str:
    """Say why a write here would replace what is not ours; "" if it would not.

    Entries are create-only; `adopt` takes over our keys once, `merge` keeps the keys of others.
    """
    if found.owner not in (None, store_id):
        return "other-owner"
    if found.has_value and not known:
        placed = any(placement.target == target.key for placement in case.placements)
        if target.adopt and not placed:
            return ""
        # With our marker, somebody edited what we wrote; without it, it never was ours.
        return "unknown-value" if found.owner == store_id else "not-ours"
    if found.other_keys and not target.merge:
        return "other-keys"
    return ""
