"""Every error that Keyturn raises on purpose.

    KeyturnError(retryable, retry_after, code)
    ├── ConfigError             before start: names file, line, key and expected form, never the value
    ├── DestinationError        something between us and a place where agents read
    │   ├── DestinationUnavailable*  no answer, a broken one, or a server that says "not now"
    │   ├── Throttled*               asked to slow down (or our own write limit did)
    │   ├── Denied                   the login is good, the permission is missing (or the login is not good)
    │   ├── NotFound                 the connection's mount or folder is not there (a missing entry is no error)
    │   ├── Conflict                 a compare-and-set met something else: read again and decide
    │   └── Rejected                 the destination will never take this request
    ├── StorageError
    │   ├── StoreUnavailable*        locked, unreachable
    │   │   └── StoreFull*           no space left on its disk
    │   │   └── StoreQuarantined     restored, and not merged yet: nobody can tell
    │   │   └── VerifierBusy*        too many hashes wait: come back after `retry_after`
    │   │   └── VerifierStale*       a verifier's lease has run out before it could ask again
    │   │   └── KeyMissing*          a hash needs a key that this process does not have
    │   ├── StoreTooNew, StoreTooOld  its schema and this release do not fit
    │   ├── StaleRevision            somebody else changed the row first
    │   └── ClaimLost                the single-writer right went to another run
    ├── VerificationFailed      one class and one text for unknown, wrong, expired and revoked
    └── RotationError           RotationInProgress, UnknownAgent, UnknownVersion, NotPermitted, Refused
    IllegalTransition(RuntimeError)   a bug in us: never caught, never retried

(* retryable.) Vendor texts never travel in these errors: they can quote payloads.
`hint` says what the operator should do next.
"""

from __future__ import annotations

from concurrent.futures import Future
from datetime import timedelta
from typing import Any


class KeyturnError(Exception):
    """Base of all of them. `code` is stable and documented; `hint` is the next thing to do."""

    code = "error"
    retryable = False
    exit_code = 1
    default_hint = ""

    def __init__(
        self, message: str = "", *, hint: str | None = None, retry_after: timedelta | None = None
    ) -> None:
        super().__init__(message or (self.__doc__ or self.code).splitlines()[0])
        self.hint = self.default_hint if hint is None else hint
        self.retry_after = retry_after


class ConfigError(KeyturnError):
    """The configuration cannot be used."""

    code = "configuration"
    exit_code = 78
    default_hint = "correct the file and run `keyturn check -c FILE`"


class DestinationError(KeyturnError):
    """A destination did not do what was asked."""

    code = "destination"


class DestinationUnavailable(DestinationError):
    """The destination cannot be reached or did not answer in time.

    `sent` is False only where the request certainly never left: then no intent stays open.
    `late` is the future of a call whose thread has not returned; its intent stays unresolved until
    it has.
    """

    code = "destination-unavailable"
    retryable = True
    exit_code = 69
    default_hint = "check that the destination is up and reachable; the rotation goes on by itself"

    def __init__(
        self,
        message: str = "",
        *,
        hint: str | None = None,
        retry_after: timedelta | None = None,
        sent: bool = True,
        late: Future[Any] | None = None,
    ) -> None:
        super().__init__(message, hint=hint, retry_after=retry_after)
        self.sent = sent
        self.late = late


class Throttled(DestinationError):
    """The destination asks us to slow down."""

    code = "throttled"
    retryable = True
    exit_code = 75


class Denied(DestinationError):
    """The destination refuses our login or our permission."""

    code = "denied"
    default_hint = (
        "compare the login's permissions with the how-to, then `keyturn rotation retry AGENT`"
    )


class NotFound(DestinationError):
    """The mount, vault or folder that the connection names is not there."""

    code = "not-found"
    default_hint = "check the connection's address, mount and prefix"


class Conflict(DestinationError):
    """The entry is not what we last read."""

    code = "conflict"


class Rejected(DestinationError):
    """The destination will not take this request."""

    code = "rejected"


class StorageError(KeyturnError):
    """The store did not take a change."""

    code = "store"


class StoreUnavailable(StorageError):
    """The store is locked, full or unreachable."""

    code = "store-unavailable"
    retryable = True
    exit_code = 69
    default_hint = "see disk space, locks and the store's address; nothing was changed"


class StoreFull(StoreUnavailable):
    """There is no space left on the disk of the store."""

    code = "store-full"
    default_hint = "free some space where the store is; nothing was changed, nothing is lost"


class StoreQuarantined(StoreUnavailable):
    """The store was restored or replaced, and what it says is not certain yet."""

    code = "store-quarantined"
    default_hint = "see `keyturn store status`: it says what is undecided and what to type"


class VerifierBusy(StoreUnavailable):
    """Too many first uses of secrets at once."""

    code = "verifier-busy"
    default_hint = "come back after the time that the answer names"


class VerifierStale(StoreUnavailable):
    """This verifier could not ask the store for longer than its lease."""

    code = "verifier-stale"
    default_hint = "see why the store cannot be reached from here; it answers again by itself"


class KeyMissing(StoreUnavailable):
    """A hash cannot be made or judged without a key that is not there."""

    code = "key-missing"
    default_hint = "see `keyturn check --probe`, and docs/howto/hmac-sha256.md"


class StoreTooNew(StorageError):
    """The store was contracted beyond this release."""

    code = "store-newer"
    exit_code = 78
    default_hint = "install that release or a newer one, or restore a backup of this one"


class StoreTooOld(StorageError):
    """The store has an older schema than this release needs."""

    code = "store-older"
    exit_code = 78
    default_hint = "run `keyturn store upgrade` first, with the login that may change tables"


class StaleRevision(StorageError):
    """Somebody else changed this first."""

    code = "stale-revision"


class ClaimLost(StorageError):
    """The single-writer right of this credential went to another run."""

    code = "claim-lost"


class VerificationFailed(KeyturnError):
    """The login or the secret is not right."""

    code = "refused"
    exit_code = 4


class RotationError(KeyturnError):
    """A command asks for something that does not fit the present state."""

    code = "rotation"


class RotationInProgress(RotationError):
    """A rotation of this agent is already open."""

    code = "rotation-in-progress"
    exit_code = 75


class UnknownAgent(RotationError):
    """No agent has this id."""

    code = "unknown-agent"
    default_hint = "`keyturn agents list` shows the ids"


class UnknownVersion(RotationError):
    """No version has this id."""

    code = "unknown-version"
    default_hint = "`keyturn status AGENT` shows the versions"


class NotPermitted(RotationError):
    """The caller's role does not cover this command."""

    code = "not-permitted"
    exit_code = 77


class Refused(RotationError):
    """The command was understood and is refused in this state."""

    code = "refused-command"
    exit_code = 4


class IllegalTransition(RuntimeError):
    """A bug in Keyturn: a move that the transition table does not have."""
