"""What each code of an open rotation means, what mends it, and the command to type then.

The codes are those of `errors.DestinationError`, of `core.model.WaitReason` and what `sight` and
`core.decision` say of an entry. docs/reference/states.md shows the same table; a test compares.
"""

from __future__ import annotations

from typing import NamedTuple

from keyturn.core.model import WaitReason

# What an ordinary read has shown there: until it is put right, what we know of the entry is old.
ALTERED = frozenset({"unknown-value", "not-ours", "other-keys", "other-owner", "later-version"})


class Advice(NamedTuple):
    """One row of the table; `command` holds the agent's name as `AGENT`."""

    meaning: str
    mend: str
    command: str


_RETRY = "keyturn rotation retry AGENT"
_PROBE = "keyturn check --probe"
_LOOK = "keyturn audit AGENT"
_BY_ITSELF = "it goes on by itself"

TABLE = {
    "denied": Advice(
        "the destination refuses our login or our permission",
        "see which: a login that has run out and a missing right (`keyturn policy`) look the same;"
        " mend it, then `keyturn rotation retry AGENT`",
        _PROBE,
    ),
    "not-found": Advice(
        "the mount or folder that the connection names is not there",
        "make it, or correct the connection's address, mount or prefix and reload",
        _RETRY,
    ),
    "rejected": Advice(
        "the destination will never take this request",
        "see the destination's own log for what it refuses",
        _RETRY,
    ),
    "unknown-value": Advice(
        "somebody altered the entry after us",
        "see who wrote it; put the entry back, or remove it",
        _RETRY,
    ),
    "not-ours": Advice(
        "the entry existed before and was not made by Keyturn",
        "remove it, or give the destination `adopt: true` and reload",
        _RETRY,
    ),
    "other-keys": Advice(
        "the entry holds keys of others too",
        "remove those, or give the destination `merge: true` and reload",
        _RETRY,
    ),
    "other-owner": Advice(
        "the entry is marked as another Keyturn's",
        "choose another path, or end the other one and remove the entry",
        _RETRY,
    ),
    "later-version": Advice(
        "the entry shows a later version than the one that is to be shown",
        "see who put it there: nothing is moved back",
        _RETRY,
    ),
    "destination-unavailable": Advice(
        "no answer, a broken one, or one that says “not now”",
        f"see whether it is up; {_BY_ITSELF}",
        _PROBE,
    ),
    "throttled": Advice(
        "the destination asks us to slow down",
        f"lower `write_limit` or raise its quota; {_BY_ITSELF}",
        _PROBE,
    ),
    "conflict": Advice(
        "others write the entry, or have staged something of theirs",
        f"see who else writes there; {_BY_ITSELF}",
        _LOOK,
    ),
    "not-shown": Advice(
        "our write was confirmed, and a read does not show it yet",
        f"see whether its replicas follow; {_BY_ITSELF}",
        _PROBE,
    ),
    "repair-fight": Advice(
        "others undo our repairs: three within an hour, now one an hour is tried",
        "see who writes there (another sync tool, Terraform, a second Keyturn, a restore) and end"
        " that",
        _RETRY,
    ),
    "store-full": Advice(
        "the disk of our own store is full",
        f"free some space there; {_BY_ITSELF}, and a revoke works meanwhile",
        "keyturn metrics",
    ),
    "store-unavailable": Advice(
        "our own store is locked or cannot be reached",
        f"see who holds it, or whether the database is up; {_BY_ITSELF}",
        "keyturn audit AGENT",
    ),
    str(WaitReason.VERIFIERS): Advice(
        "a verifier has not taken the new version over yet",
        f"see which is behind or stale; {_BY_ITSELF}, once its lease has run out at the latest",
        "keyturn verifiers",
    ),
    "key-missing": Advice(
        "the key that the hash needs is not on this host",
        "put its file back and `keyturn reload`; it goes on by itself, or at once by"
        " `keyturn rotation retry AGENT`",
        _PROBE,
    ),
    str(WaitReason.ACCEPTED_LIMIT): Advice(
        "as many versions are accepted as may be",
        "it goes on when the first grace ends; sooner by revoking the oldest version",
        "keyturn revoke --version OLDEST",
    ),
}


def hint(code: str, agent: str, *, oldest: str = "") -> str:
    """Return the command to type, with what it means and what comes first as its comment."""
    found = TABLE.get(code) or Advice(code, "mend what is named there", _RETRY)
    text = f"{found.command}   # {code}: {found.meaning}; {found.mend}"
    return text.replace("AGENT", agent).replace("OLDEST", oldest or "OLDEST")
