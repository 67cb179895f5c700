"""One case under one claim: what is saved, what has changed since, and what is journalled before a call.

The saga decides and looks on top of this; nothing is done to a destination but through `_write`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from keyturn.core import lifecycle
from keyturn.core.model import Case, Effect, Intent, Outcome, Target
from keyturn.errors import DestinationError, DestinationUnavailable
from keyturn.ports import AuditEntry, Claim, Destination, Saved
from keyturn.world import World


@dataclass(slots=True)
class Casework:
    """The case as saved, the case as it is now, and what is to be told with the next save."""

    world: World
    claim: Claim
    saved: Saved
    case: Case = field(init=False)
    audit: list[AuditEntry] = field(default_factory=list)
    outcomes: dict[str, bool] = field(default_factory=dict)

    # --- saving -----------------------------------------------------------------------------

    def _commit(self) -> None:
        if self.case == self.saved.case and not self.audit:
            return
        self.saved = self.world.journal.save(
            self.claim, before=self.saved.case, after=self.case, audit=tuple(self.audit)
        )
        self._committed()

    def _committed(self) -> None:
        self.case = self.saved.case
        self.audit.clear()
        self.outcomes.clear()

    def _now(self) -> datetime:
        return self.world.clock.now()

    def _note(
        self, action: str, *, version_id: str = "", outcome: str = "ok", **detail: Any
    ) -> None:
        entry = AuditEntry(
            action=action,
            actor=f"daemon:{self.claim.holder}",
            agent=self.case.agent.name,
            version_id=version_id,
            outcome=outcome,
            detail=tuple(sorted(detail.items())),
        )
        self.audit.append(entry)

    def _report(self) -> None:
        """A writer may always report its own intents, claim or not (rule 2)."""
        for intent_uid, landed in self.outcomes.items():
            self.world.journal.report(intent_uid, landed=landed)
        self.outcomes.clear()

    # --- calls that change something --------------------------------------------------------

    def _write(
        self,
        target: Target,
        effect: Effect,
        version_id: str,
        *,
        call: Callable[[Destination], str],
        expected: str = "",
        exposes: bool = False,
    ) -> None:
        """Journal the intent, then act. The token was read under this claim and is journalled."""
        intent = Intent(
            uid=self.world.new_id(),
            credential_uid=self.case.credential.uid,
            version_id=version_id,
            target=target.key,
            effect=effect,
            expected=expected,
            writer=self.world.journal.writer,
            fence=self.claim.fence,
            incarnation=self.claim.incarnation,
            at=self._now(),
        )
        self.case = lifecycle.intend(self.case, intent, exposes=exposes)
        self._commit()
        self._reported(intent, lambda: call(self.world.destination(target)))

    def _reported(self, intent: Intent, call: Callable[[], str]) -> None:
        """Make the call and note how its intent ended; an unknown end leaves it unresolved."""
        try:
            locator = call()
        except DestinationUnavailable as error:
            if not error.sent:
                self._outcome(intent, Outcome.FAILED)
            elif error.late is not None:
                self.world.carried.follow(intent.uid, error.late, self.world.journal)
            raise
        except DestinationError:
            self._outcome(intent, Outcome.FAILED)
            raise
        self._outcome(intent, Outcome.DONE, locator)

    def _outcome(self, intent: Intent, outcome: Outcome, locator: str = "") -> None:
        self.case = lifecycle.resolve(
            self.case, intent.uid, outcome, now=self._now(), locator=locator
        )
        self.outcomes[intent.uid] = outcome is Outcome.DONE
