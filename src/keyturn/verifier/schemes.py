"""The one place that knows both schemes: what is stored of a secret, and whether one has a hash.

A row's scheme is fixed at accept and judged by what the row says, never by the policy of today: so a
policy can change while versions of both schemes are accepted, and recovery knows its copy again (I1).
Nothing here writes: a hash changes with the next rotation only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from keyturn.core.secret import Secret
from keyturn.errors import KeyMissing
from keyturn.storage.decisions import Decision
from keyturn.verifier import hashing, keyed
from keyturn.verifier.gate import Ticket
from keyturn.verifier.hashing import Hashing
from keyturn.verifier.keyring import KeyRing


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """The hash of one version, with everything that it is bound to."""

    scheme: str
    digest: str
    credential_uid: str
    version_id: str

    @classmethod
    def of(cls, row: Decision) -> Stored:
        """Return what a look-up has found."""
        return cls(
            scheme=row.scheme,
            digest=row.digest,
            credential_uid=row.credential_uid,
            version_id=row.version_id,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Schemes:
    """Hashes and checks by the scheme of the row. `ring` gives the keys in force."""

    hashing: Hashing = field(default_factory=Hashing)
    ring: Callable[[], KeyRing] = KeyRing

    def digest(self, scheme: str, secret: Secret, *, credential_uid: str, version_id: str) -> str:
        """Return what is stored of a new secret. Raises StoreUnavailable, KeyMissing."""
        ring = self.ring()
        ring.refuse_scheme(scheme)
        if scheme == keyed.SCHEME:
            key_id, key = ring.for_new()
            return key.digest(
                key_id, credential_uid=credential_uid, version_id=version_id, secret=secret
            )
        return self.hashing.digest(secret)

    def matches(self, stored: Stored, secret: Secret, ticket: Ticket | None = None) -> bool:
        """Tell whether the secret has this hash; one of another form than its scheme's never matches.

        `ticket` is a place in the queue for a hash. Raises StoreUnavailable, KeyMissing, VerifierBusy
        where nobody can tell.
        """
        ring = self.ring()
        if stored.scheme not in (hashing.SCHEME, keyed.SCHEME):
            return False
        ring.refuse_scheme(stored.scheme)
        if stored.scheme == hashing.SCHEME:
            return self.hashing.matches(stored.digest, secret, ticket)
        named = keyed.read(stored.digest)
        if named is None:
            raise KeyMissing("a hash is of a form that this release does not know")
        return ring.of(named).matches(
            named,
            credential_uid=stored.credential_uid,
            version_id=stored.version_id,
            secret=secret,
        )
