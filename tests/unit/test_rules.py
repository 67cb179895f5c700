"""Each rule of the protocol can be missed: taken out of a copy of the source, a test must fail.

A patch is a text that occurs exactly once, so it goes stale loudly. Rules 9, 10, 20 and 21 live in
adapters and the store and are proven there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import keyturn

SOURCE = Path(keyturn.__file__).parent
TESTS = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """One text in one file, what stands there without the rule, and the test that must notice."""

    file: str
    text: str
    instead: str
    tests: str


PATCHES: dict[str, Patch] = {
    "1 exposed by intent": Patch(
        file="core/lifecycle.py",
        text="exposed=True) if exposes else changed",
        instead="exposed=False) if exposes else changed",
        tests="unit/test_saga.py -k test_the_crash_table",
    ),
    "2 an unresolved intent pins its version": Patch(
        file="core/lifecycle.py",
        text="        i.unresolved and i.version_id == version_id",
        instead="        False and i.version_id == version_id",
        tests="unit/test_lifecycle.py",
    ),
    "2 a call that has not returned is not settled": Patch(
        file="core/decision.py",
        text="    if intent.uid in run.in_flight:\n        return None\n",
        instead="",
        tests="unit/test_saga.py -k has_not_returned",
    ),
    "2 calls are known to later runs": Patch(
        file="world.py",
        text="            self._calls[intent_uid] = call\n",
        instead="            pass\n",
        tests="unit/test_saga.py -k has_not_returned",
    ),
    "2 settling takes its time": Patch(
        file="core/decision.py",
        text="max(intent.at, died) + plan.policy.retry.settle_after",
        instead="max(intent.at, died)",
        tests="unit/test_decision.py",
    ),
    "2 a writer reports its own intent": Patch(
        file="rotation.py",
        text="            self._report()\n            self.world.carried.drop",
        instead="            self.world.carried.drop",
        tests="unit/test_saga.py -k loser_of_the_claim",
    ),
    "3 what was read goes with the write": Patch(
        file="core/decision.py",
        text="return Activate(target=target, expected=sight.token)",
        instead='return Activate(target=target, expected="")',
        tests="unit/test_decision.py",
    ),
    "4 forward only": Patch(
        file="core/decision.py",
        text="shown.seq > own.seq:",
        instead="shown.seq > own.seq + 99:",
        tests="unit/test_decision.py",
    ),
    "5 letting go needs a fresh read": Patch(
        file="core/decision.py",
        text="        and run.sights[target.key].fresh\n",
        instead="",
        tests="unit/test_saga.py -k stale_read_lets_nothing_go",
    ),
    "5 a read that is behind lets nothing go": Patch(
        file="core/decision.py",
        text="version.landed_at is None or _conclusive_from(version.landed_at, plan) <= now",
        instead="True",
        tests="unit/test_saga.py -k answer_from_before",
    ),
    "5 letting go needs a read that shows it nowhere": Patch(
        file="core/decision.py",
        text="        and run.sights[target.key].shown != version.id\n",
        instead="",
        tests="unit/test_saga.py -k 'leaving_destination_keeps or comes_back'",
    ),
    "6 a start over voids what was seen": Patch(
        file="rotation.py",
        text="        self._take_up()\n\n    def _refresh",
        instead=(
            "        seen = self.seen\n        self._take_up()\n        self.seen = seen\n\n"
            "    def _refresh"
        ),
        tests="unit/test_saga.py -k voids_what_was_confirmed",
    ),
    "7 kept becomes previous at promote": Patch(
        file="core/lifecycle.py",
        text="if version.state in (S.CURRENT, S.KEPT):",
        instead="if version.state is S.CURRENT:",
        tests="unit/test_lifecycle.py",
    ),
    "7 the limit is waited for": Patch(
        file="core/decision.py",
        text="    if len(alive) < plan.max_accepted:",
        instead="    if len(alive) < 99:",
        tests="unit/test_decision.py",
    ),
    "8 staging into an empty entry is an activation": Patch(
        file="core/decision.py",
        text="exposes=sight.empty)",
        instead="exposes=False)",
        tests="unit/test_decision.py",
    ),
    "11 never the copy that is shown": Patch(
        file="core/decision.py",
        text="sight.fresh and sight.shown != placement.version_id:",
        instead="sight.fresh:",
        tests="unit/test_decision.py",
    ),
    "11 a good version is never withdrawn": Patch(
        file="core/decision.py",
        text="or shown.state is not VersionState.REVOKED:",
        instead="or False:",
        tests="unit/test_saga_withdraw.py -k suspension_alone",
    ),
    "11 what a rotation replaces is not withdrawn": Patch(
        file="core/decision.py",
        text="    return case.agent.rotates and target.key in served\n",
        instead="    return False\n",
        tests="unit/test_saga_withdraw.py -k 'rotation_that_stalls'",
    ),
    "11 only the version that was seen is withdrawn": Patch(
        file="destinations/entry.py",
        text="    if shown.get(keys.version) != version_id:\n        raise Conflict\n",
        instead="",
        tests="unit/test_saga_withdraw.py -k 'old_answer or lands_late'",
    ),
    "5 withdrawing needs a fresh read": Patch(
        file="core/decision.py",
        text="if sight is not None and sight.fresh else None\n        if sight is None or shown",
        instead="if sight is not None else None\n        if sight is None or shown",
        tests="unit/test_saga_withdraw.py -k not_fresh",
    ),
    "12 accept needs its open rotation": Patch(
        file="core/lifecycle.py",
        text="    rotation = _running(case)\n    if case.pending is not None",
        instead="    rotation = case.rotation\n    if case.pending is not None",
        tests="unit/test_lifecycle.py",
    ),
    "12 what may still land keeps a place": Patch(
        file="core/decision.py",
        text="(empty and target.key not in coming)",
        instead="empty",
        tests="unit/test_saga_copies.py -k still_hangs",
    ),
    "12 what was settled may have landed": Patch(
        file="storage/owners.py",
        text="outcomes & {None, Outcome.SETTLED}",
        instead="outcomes & {None}",
        tests="unit/test_saga_copies.py -k was_settled",
    ),
    "13 no reload lifts a suspension": Patch(
        file="storage/takeover.py",
        text="if known != list(taken.known) or",
        instead="if",
        tests="unit/test_reconcile.py -k suspended_in_the_middle",
    ),
    "12 what leaves is still read": Patch(
        file="core/model.py",
        text="(*of_rotation, *self.agent.targets, *self.credential.leaving)",
        instead="(*of_rotation, *self.agent.targets)",
        tests="unit/test_saga.py -k leaving_destination_keeps",
    ),
    "12 what cannot be read is no reason to mint": Patch(
        file="core/decision.py",
        text="            return _give_way(target, trouble)",
        instead="            continue",
        tests="unit/test_decision.py",
    ),
    "13 revoking an agent takes every accepted version": Patch(
        file="core/lifecycle.py",
        text="    for version in case.accepted:\n",
        instead="    for version in [v for v in case.accepted if v.state is not S.KEPT]:\n",
        tests="unit/test_lifecycle.py",
    ),
    "13 without reissue the agent is suspended": Patch(
        file="core/lifecycle.py",
        text="    if not reissue and case.agent.state",
        instead="    if reissue and case.agent.state",
        tests="unit/test_lifecycle.py",
    ),
    "14 a successor is owed": Patch(
        file="core/decision.py",
        text="    if credential.successor_owed:\n        return Cause.REISSUE\n",
        instead="",
        tests="unit/test_decision.py",
    ),
    "14 what owes a successor is not abandoned": Patch(
        file="core/lifecycle.py",
        text="    if case.credential.successor_owed:\n",
        instead="    if case.credential.successor_owed and False:\n",
        tests="unit/test_lifecycle.py",
    ),
    "15 a revoked version is never rolled forward": Patch(
        file="core/decision.py",
        text="    if own is not None and (own.state is not VersionState.PENDING or own.over(now)):\n",
        instead="    if False:\n",
        tests="unit/test_decision.py",
    ),
    "4 a repair moves forward only": Patch(
        file="core/repair.py",
        text="    forward = shown is None or shown.seq < current.seq\n",
        instead="    forward = True\n",
        tests="unit/test_decision.py -k 'moved and back'",
    ),
    "4 a copy is proven before it is published": Patch(
        file="mending.py",
        text="            or not self.world.authority.matches(version, found.secret)\n",
        instead="",
        tests="unit/test_saga_repair.py -k tag_alone",
    ),
    "4 a copy is ours by its marker": Patch(
        file="mending.py",
        text="            or found.owner != self.world.journal.store_id\n",
        instead="",
        tests="unit/test_saga_repair.py -k merely_found",
    ),
    "10 three repairs an hour": Patch(
        file="core/repair.py",
        text="else recent < MOST",
        instead="else True",
        tests="unit/test_decision.py -k 'three and repairs'",
    ),
    "10 an agent is rotated three times an hour for repair": Patch(
        file="core/decision.py",
        text="outdated or may_mend(case, WHOLE_AGENT, now)",
        instead="True",
        tests="unit/test_decision.py -k 'three and rotations'",
    ),
    "10 a fight is taken up once an hour": Patch(
        file="core/repair.py",
        text="    return recent == 0 if record.fight is not None else recent < MOST",
        instead="    return recent < MOST",
        tests="unit/test_decision.py -k 'fight and hour'",
    ),
    "10 what is counted is durable": Patch(
        file="storage/codec.py",
        text="    return text(\n        [\n            [one.target, [micros",
        instead="    return text(\n        []\n        and [\n            [one.target, [micros",
        tests="unit/test_saga_repair.py -k 'undoes and vault'",
    ),
    "11 a repair is counted before it is made": Patch(
        file="mending.py",
        text="        self.case = repair.charged(self.case, [key], self._now())\n",
        instead="",
        tests="unit/test_saga_repair.py -k 'undoes and vault'",
    ),
    "11 what is read goes with a repair": Patch(
        file="mending.py",
        text="            expected=action.expected,\n            exposes",
        instead='            expected="",\n            exposes',
        tests="unit/test_saga_repair.py -k intents_of_current",
    ),
    "5 a repair needs a fresh read": Patch(
        file="core/repair.py",
        text="    return sight.fresh and (ending or",
        instead="    return (ending or",
        tests="unit/test_decision.py -k 'stale and repairs'",
    ),
    "16 register before reading": Patch(
        file="storage/leases.py",
        text="            self._link.register()\n",
        instead="",
        tests="unit/test_leases.py -k registers",
    ),
    "16 the lease counts from the sending": Patch(
        file="storage/leases.py",
        text="sent, sent + self._lease, received",
        instead="sent, received + self._lease, received",
        tests="unit/test_leases.py -k from_the_sending",
    ),
    "16 the lease is compared in each request": Patch(
        file="storage/leases.py",
        text="if held is None or self._clock() >= held.until:",
        instead="if held is None:",
        tests="unit/test_leases.py -k after_a_gap",
    ),
    "16 a lease may end during a decision": Patch(
        file="verifier/decision.py",
        text="            self._freshness.epoch()  # a lease may have run out meanwhile\n",
        instead="            pass\n",
        tests="unit/test_leases.py -k during_a_decision",
    ),
    "16 another server may be behind": Patch(
        file="verifier/decision.py",
        text="if row.epoch[:2] < before[:2]:",
        instead="if False:",
        tests="unit/test_leases.py -k is_behind",
    ),
    "16 a child of a fork holds no lease": Patch(
        file="storage/leases.py",
        text="os.register_at_fork(after_in_child=_forked)\n",
        instead="",
        tests="unit/test_leases.py -k fork",
    ),
    "17 only what was applied is acknowledged": Patch(
        file="storage/leases.py",
        text='"UPDATE verifiers v SET incarnation = %s, epoch = %s, ',
        instead='"UPDATE verifiers v SET incarnation = m.incarnation + %s * 0, epoch = m.epoch + %s * 0, ',
        tests="contract/test_leases.py -k acknowledges_in_a_later",
    ),
    "17 applied before it is acknowledged": Patch(
        file="storage/leases.py",
        text="        self._held = _Held(epoch, sent",
        instead="        self._held = _Held(self._applied, sent",
        tests="unit/test_leases.py -k acknowledged_by_a_later",
    ),
    "18 one that is behind is waited for": Patch(
        file="verifier/registered.py",
        text="if began - asked <= allowance(row.lease)]",
        instead="if False]",
        tests="unit/test_leases.py -k whoever_has_acknowledged",
    ),
    "18 by the waiter's own clock": Patch(
        file="verifier/registered.py",
        text="if began - asked <= allowance(row.lease)]",
        instead="if found.now - row.renewed_at <= row.lease]",
        tests="unit/test_leases.py -k waiters_own_clock",
    ),
    "18 since its commit": Patch(
        file="verifier/registered.py",
        text="self._asked.setdefault(epoch, now)",
        instead="self._asked.setdefault(Epoch(0, 0), now)",
        tests="unit/test_leases.py -k waiters_own_clock",
    ),
    "18 acknowledged in this life of the store": Patch(
        file="verifier/registered.py",
        text="known.incarnation == wanted.incarnation and ",
        instead="",
        tests="unit/test_leases.py -k former_life",
    ),
    "18 publishing waits": Patch(
        file="rotation.py",
        text="if self.world.authority.settled(epoch):",
        instead="if epoch >= 0:",
        tests="unit/test_saga_leases.py",
    ),
    "18 what moves on is not waited for anew": Patch(
        file="rotation.py",
        text="self.world.carried.awaited(uid, own, self.saved.epoch)",
        instead="self.saved.epoch",
        tests="unit/test_saga_leases.py -k never_hears",
    ),
    "19 refused only when surely passed": Patch(
        file="storage/leases.py",
        text="(self._clock() - held.received) * (1 - DRIFT)",
        instead="self._clock() - held.sent",
        tests="unit/test_leases.py -k surely_passed",
    ),
    "19 by the store's time": Patch(
        file="storage/leases.py",
        text="return held.now + timedelta(",
        instead="return datetime.now(held.now.tzinfo) + timedelta(",
        tests="unit/test_leases.py -k stores_time_alone",
    ),
    "a rotation that waits keeps its version": Patch(
        file="world.py",
        text="            if known == version_id:\n                return plain\n",
        instead="",
        tests="unit/test_saga.py -k lost_answers",
    ),
    "a confirmed write is not repeated for ever": Patch(
        file="core/steps.py",
        text="written=self.written | {(where, effect)}",
        instead="written=frozenset()",
        tests="unit/test_saga.py -k no_read_shows",
    ),
}
OFTEN = (
    "1 exposed by intent",
    "2 calls are known to later runs",
    "5 letting go needs a read that shows it nowhere",
    "12 what leaves is still read",
    "10 three repairs an hour",
    "15 a revoked version is never rolled forward",
    "18 publishing waits",
    "a rotation that waits keeps its version",
)


def _fails_without(rule: str, folder: Path) -> None:
    patch = PATCHES[rule]
    shutil.copytree(SOURCE, folder / "keyturn", ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / "keyturn" / patch.file
    source = file.read_text()

    assert source.count(patch.text) == 1, f"the patch of {rule} is stale"
    file.write_text(source.replace(patch.text, patch.instead))
    where, _, words = patch.tests.partition(" -k ")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"),
            *("-m", "not full", str(TESTS / where)),
            *(("-k", words.strip("'")) if words else ()),
        ],
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        check=False,
    )
    assert done.returncode == 1, f"nothing misses rule {rule}:\n{done.stdout[-2000:]}"


@pytest.mark.parametrize("rule", OFTEN)
def test_a_rule_that_is_taken_out_is_missed(rule: str, tmp_path: Path) -> None:
    """Without the rule a test of the sentence that states it fails."""
    _fails_without(rule, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("rule", [rule for rule in PATCHES if rule not in OFTEN])
def test_every_rule_that_is_taken_out_is_missed(rule: str, tmp_path: Path) -> None:
    """The same for every other rule."""
    _fails_without(rule, tmp_path)


@pytest.mark.parametrize("rule", PATCHES)
def test_no_patch_is_stale(rule: str) -> None:
    """Each patch still finds its text, exactly once, and its tests exist."""
    patch = PATCHES[rule]

    assert (SOURCE / patch.file).read_text().count(patch.text) == 1
    assert (TESTS / patch.tests.split(" ")[0]).exists()
