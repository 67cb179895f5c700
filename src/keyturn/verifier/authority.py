"""The built-in authority: the verifier store itself says what is good.

Its effects are the rows that the journal commits, so deadlines, revocations and suspensions need
nothing more here but to wait for the verifiers that remember (rules 16 to 18).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from keyturn.core.model import Version
from keyturn.core.secret import Secret, parse
from keyturn.ports import Abilities, Accepted, Standing
from keyturn.verifier.gate import Gate
from keyturn.verifier.hashing import Hashing, same_tag, tag, text_of
from keyturn.verifier.keyring import KeyRing
from keyturn.verifier.registered import Registered
from keyturn.verifier.schemes import Schemes, Stored


def _saga_hashing() -> Hashing:
    # A permit of its own: guessers at the verifier must not keep rotations from going on.
    return Hashing(gate=Gate(1, queue=None))


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltinAuthority:
    """Implements `ports.Authority` over the store's rows.

    Without `registered` every verifier reads spool and store before each yes: none is waited for.
    """

    hashing: Hashing = field(default_factory=_saga_hashing)
    abilities: Abilities = field(default_factory=Abilities)
    registered: Registered | None = None
    ring: Callable[[], KeyRing] = KeyRing

    @property
    def _schemes(self) -> Schemes:
        return Schemes(hashing=self.hashing, ring=self.ring)

    def accept(
        self, *, version_id: str, secret: Secret, credential_uid: str, scheme: str
    ) -> Accepted:
        """Return what makes the version acceptable once it is committed."""
        return Accepted(
            secret=secret,
            scheme=scheme,
            digest=self._schemes.digest(
                scheme, secret, credential_uid=credential_uid, version_id=version_id
            ),
            tag=tag(version_id, secret),
        )

    def matches(self, version: Version, secret: Secret) -> bool:
        """Tell by tag and hash whether this text is that very version, accepted or not."""
        return self.resembles(version, secret) and self._has_hash(version, secret)

    def _has_hash(self, version: Version, secret: Secret) -> bool:
        stored = Stored(
            scheme=version.scheme,
            digest=version.digest,
            credential_uid=version.credential_uid,
            version_id=version.id,
        )
        return self._schemes.matches(stored, secret)

    def resembles(self, version: Version, secret: Secret) -> bool:
        """Tell by public form and tag whether this text can be that version."""
        if version.tag is None:
            return self._has_hash(version, secret)
        parsed = parse(text_of(secret))
        if parsed is None or parsed.version_id != version.id:
            return False
        return same_tag(version.tag, version.id, secret)

    def set_deadline(self, version: Version, deadline: datetime | None) -> None:
        """Do nothing: the row says it."""

    def revoke(self, version: Version) -> None:
        """Do nothing: the row says it."""

    def suspend(self, login: str, *, suspended: bool) -> None:
        """Do nothing: the row says it."""

    def settled(self, epoch: int) -> bool:
        """Tell whether every verifier that may answer has applied this epoch."""
        return self.registered is None or self.registered.settled(epoch)

    def standing(self, epoch: int) -> Standing:
        """Look where every registered verifier is. Raises StoreUnavailable."""
        if self.registered is None:
            return Standing(settled=True, acknowledged=1, live=1)
        return self.registered.standing(epoch)
