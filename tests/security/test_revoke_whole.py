"""A revoke is never finished as less than it was: clocks, odd texts, old versions, locks and repeats."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from keyturn.administration import Administration
from keyturn.core.model import AgentState, VersionState
from keyturn.daemon import revoking
from keyturn.daemon.service import Service, load
from keyturn.errors import Refused, StoreUnavailable, UnknownVersion
from keyturn.leaks import Leak
from keyturn.storage import codec
from keyturn.storage.requests import Once
from keyturn.storage.store import Store
from support.cutter import CALLER, administration, open_store
from support.running import Keyturn
from support.stores import RealClock, add, target

MINUTE = timedelta(minutes=1)


class Behind(RealClock):
    """The clock of a host that is ten minutes slow."""

    def now(self) -> datetime:
        """Return the time, ten minutes ago."""
        return super().now() - 10 * MINUTE


@dataclass
class Scene:
    """A store with agents and versions, and the verbs over it; `locked` takes no commit."""

    folder: Path
    store: Store
    verbs: Administration
    locked: bool = False

    def version(
        self, seq: int, state: str = "current", *, agent: str = "a", ledger: bool = True
    ) -> str:
        """Put a version there as if it had been minted just now."""
        found, name = self.store.agent(agent), f"{agent}{seq:013}"
        minted = codec.micros(datetime.now(UTC))
        self.raw(
            "INSERT INTO versions (id, login, credential_uid, seq, state, scheme, digest, origin,"
            " exposed, fence, minted_at, ended_at)"
            " VALUES (?, 'a', ?, ?, ?, 'argon2id', '', 'minted', 1, 1, ?, ?)",
            name,
            f"cred-{agent}",
            seq,
            state,
            minted,
            minted if state == "retired" else None,
        )
        if ledger:
            line = {"version": name, "state": state, "minted_at": minted}
            self.store.ledger.append(found, [line], sync=False)
        return name

    def raw(self, statement: str, *values: Any) -> None:
        """Change the store behind its back."""
        with closing(sqlite3.connect(self.folder / "keyturn.db")) as connection:
            connection.execute(statement, values)
            connection.commit()

    def state(self, version_id: str) -> str:
        """Return a version's state in the store."""
        found = self.store.find_version(version_id)
        assert found is not None
        return str(found[1].state)

    def incomplete(self, leak: Leak, **more: Any) -> dict[str, Any]:
        """Revoke while the store is locked."""
        self.locked = True
        result = self.verbs.revoke(leak, CALLER, **more)
        self.locked = False
        assert result["incomplete"]
        return result

    def restarted(self) -> Administration:
        """Return the verbs of another process."""
        return replace(self.verbs, applied=set(), made=set(), unknown=set(), later={})


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """Give a store with the agents a and b, without versions."""
    store = open_store(tmp_path, writer="w1")
    one = Scene(tmp_path, store, administration(tmp_path, store, patience=0.0))
    add(store, "a", targets=[target("a"), target("a", to="vault")])
    add(store, "b")
    amend = store.amend

    def lockable(*args: Any, **more: Any) -> Any:
        if one.locked:
            raise StoreUnavailable
        return amend(*args, **more)

    monkeypatch.setattr(store, "amend", lockable)
    yield one
    store.close()


# --- time -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reissue", [False, True])
def test_a_slow_clock_of_the_caller_spares_no_version(scene: Scene, reissue: bool) -> None:
    """What was minted by the store's clock is cut whatever the caller's clock says."""
    name = scene.version(1)
    verbs = replace(scene.verbs, clock=Behind())
    withhold = ("vault",) if reissue else ()

    result = verbs.revoke(Leak(agent="a", reissue=reissue, withhold=withhold), CALLER)

    case = scene.store.case_of("a")
    assert (result["versions"], scene.state(name)) == ([name], "revoked")
    assert (case.agent.state is AgentState.SUSPENDED) is not reissue
    assert (case.credential.successor_owed, case.credential.withheld) == (reissue, withhold)


def test_a_line_spares_what_was_minted_after_its_time(scene: Scene) -> None:
    """A line has a time of its own: a successor lives, and the line does nothing a second time."""
    old = scene.version(1, "previous")
    line = Leak(agent="a", at=datetime.now(UTC))
    new = scene.version(2)

    for versions in ([old], []):
        assert scene.verbs.revoke(line, CALLER)["versions"] == versions
        assert (scene.state(old), scene.state(new)) == ("revoked", "current")
    assert scene.store.agent("a").state is AgentState.ENABLED
    actions = [one.entry.action for one in scene.store.audit_entries(agent="a")]
    assert actions.count("revoke") == 1


# --- what the spool completes --------------------------------------------------------------------


def test_an_incomplete_revoke_of_an_agent_covers_what_was_minted_since(scene: Scene) -> None:
    """A rotation that is quicker than the spool's poll saves nobody."""
    old = scene.version(1)
    scene.incomplete(Leak(agent="a", reason="stolen laptop"))
    scene.raw("UPDATE versions SET state = 'previous' WHERE id = ?", old)
    new = scene.version(2)

    assert scene.verbs.apply_spool(CALLER) == 1

    assert (scene.state(old), scene.state(new)) == ("revoked", "revoked")
    assert scene.store.agent("a").state is AgentState.SUSPENDED


def test_a_second_revoke_of_a_version_may_ask_for_more(scene: Scene) -> None:
    """While the store is locked: one version first, then the whole agent. Both are carried out."""
    name = scene.version(1)
    scene.incomplete(Leak(version=name, reason="on a gist"), once=Once.of("r1", "revoke", {}))
    request = Once.of("r2", "revoke", {})
    scene.incomplete(Leak(agent="a", reason="host is owned"), once=request)

    scene.restarted().apply_spool(CALLER)

    assert scene.store.agent("a").state is AgentState.SUSPENDED
    reasons = [
        dict(one.entry.detail)["reason"]
        for one in scene.store.audit_entries(agent="a")
        if one.entry.action == "revoke"
    ]
    assert sorted(reasons) == ["host is owned", "on a gist"]
    new = scene.version(2)  # after a resume; a repeat of either command is no new one
    for number in ("r1", "r2"):
        leak = Leak(version=name) if number == "r1" else Leak(agent="a")
        scene.restarted().revoke(leak, CALLER, once=Once.of(number, "revoke", {}))
    assert scene.state(new) == "current"


def test_a_tombstone_of_another_user_takes_a_note(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root has touched it; then the whole agent is revoked, and the store is locked all the time."""
    name = scene.version(1)
    place = scene.folder / "revoked.d" / name
    place.parent.mkdir()
    place.touch()
    before, opens = place.stat().st_ino, os.open

    def guarded(path: Any, flags: int, *more: Any, **where: Any) -> int:
        if path == name and place.stat().st_ino == before and flags & os.O_WRONLY:
            raise PermissionError(errno.EACCES, "not yours")
        return opens(path, flags, *more, **where)

    monkeypatch.setattr(os, "open", guarded)
    scene.incomplete(Leak(agent="a"))

    assert scene.restarted().apply_spool(CALLER) == 1
    assert scene.store.agent("a").state is AgentState.SUSPENDED
    assert scene.verbs.spool.ids() == [name]


def test_an_old_tombstone_never_replays_onto_a_successor(scene: Scene) -> None:
    """A version that was retired meanwhile is over with: the agent's note on it does nothing."""
    old = scene.version(1)
    scene.incomplete(Leak(agent="a"))
    scene.raw("UPDATE versions SET state = 'retired', ended_at = 1 WHERE id = ?", old)
    new = scene.version(2)

    assert scene.restarted().apply_spool(CALLER) == 0

    assert scene.state(new) == "current"
    assert scene.store.agent("a").state is AgentState.ENABLED


def test_a_restore_revives_no_version_and_costs_no_successor(scene: Scene) -> None:
    """Tombstones say up to when a revoke was done: an older store is cut again, no later version."""
    old = scene.version(1)
    scene.verbs.revoke(Leak(agent="a", reissue=True), CALLER)
    new = scene.version(2)
    scene.raw("DROP TRIGGER versions_tombstones")
    scene.raw("UPDATE versions SET state = 'previous', ended_at = NULL WHERE id = ?", old)

    assert scene.restarted().apply_spool(CALLER) == 1

    assert (scene.state(old), scene.state(new)) == ("revoked", "current")


def test_one_tombstone_that_fails_keeps_no_other_from_the_store(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is logged and tried again; nothing of it is raised, so the daemon starts."""
    bad, good = scene.version(1), scene.version(1, agent="b")
    for name in (bad, good):
        scene.verbs.spool.revoke(name, {})
    amend = scene.store.amend

    def picky(uid: str, *args: Any, **more: Any) -> Any:
        if uid == "cred-a":
            raise UnicodeEncodeError("utf-8", "x", 0, 1, "no")
        return amend(uid, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(scene.store, "amend", picky)
        assert scene.verbs.apply_spool(CALLER) == 1
        assert scene.verbs.queued() == 1
    assert (scene.state(bad), scene.state(good)) == ("current", "revoked")
    scene.verbs.later.clear()
    assert scene.verbs.apply_spool(CALLER) == 1
    assert (scene.state(bad), scene.verbs.queued()) == ("revoked", 0)


# --- old versions, and unknown ones ---------------------------------------------------------------


def test_a_version_is_revoked_however_old(scene: Scene) -> None:
    """Also one that the agent's case has forgotten, and one of an agent that was removed."""
    first = scene.version(1, "retired")
    for seq in range(2, 30):
        scene.version(seq, "retired")
    assert scene.store.case_of("a").version(first) is None

    assert not scene.verbs.revoke(Leak(version=first), CALLER)["already"]
    assert scene.verbs.revoke(Leak(version=first), CALLER)["already"]

    scene.raw("UPDATE agents SET listed = 0 WHERE name = 'a'")
    scene.verbs.remove("a", CALLER)
    add(scene.store, "a", uid="another")
    scene.verbs.revoke(Leak(version=f"a{2:013}", reissue=True), CALLER)
    scene.verbs.spool.revoke(f"a{3:013}", {})
    scene.restarted().apply_spool(CALLER)
    assert [scene.state(f"a{seq:013}") for seq in (1, 2, 3, 4)] == [*["revoked"] * 3, "retired"]
    assert scene.store.agent("a").state is AgentState.ENABLED


def test_an_unknown_version_leaves_no_tombstone(scene: Scene) -> None:
    """Where the store can be asked; where it is locked, or the ledger knows it, the tombstone stays."""
    unknown, announced, by_hand = "u" * 14, "v" * 14, "w" * 14
    line = {"version": announced, "state": "pending"}
    scene.store.ledger.append(scene.store.agent("a"), [line], sync=False)
    (scene.folder / "revoked.d").mkdir()
    (scene.folder / "revoked.d" / by_hand).touch()
    for name in (unknown, announced, by_hand):
        scene.verbs.refuse_first([(Leak(version=name), CALLER)])
        with pytest.raises(UnknownVersion):
            scene.verbs.revoke(Leak(version=name), CALLER)
    assert scene.verbs.spool.ids() == [announced, by_hand]


def test_a_version_that_nobody_can_look_up_is_refused(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that is away cannot say that it knows none: the tombstone is made and stays."""

    def away(*_args: Any) -> Any:
        raise StoreUnavailable

    monkeypatch.setattr(scene.store, "find_version", away)
    assert scene.verbs.revoke(Leak(version="u" * 14), CALLER)["incomplete"]
    assert scene.verbs.spool.ids() == ["u" * 14]


def test_thousands_of_unknown_tombstones_cost_little(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are looked up by hundreds, remembered, and not opened; known ones are looked at once."""
    known = scene.version(1)
    for name in (known, *(f"u{number:013}" for number in range(1200))):
        scene.verbs.spool.revoke(name, {}) if name == known else (
            scene.folder / "revoked.d" / name
        ).touch()
    asked, opened = list[int](), list[str]()
    find, notes = scene.store.find_versions, scene.verbs.spool.notes

    def counted(ids: Any) -> Any:
        asked.append(len(ids))
        return find(ids)

    monkeypatch.setattr(scene.store, "find_versions", counted)
    monkeypatch.setattr(
        scene.verbs.spool, "notes", lambda name: (opened.append(name), notes(name))[1]
    )
    for _ in range(3):
        scene.verbs.apply_spool(CALLER)
        assert scene.verbs.queued() == 0

    assert len([count for count in asked if count > 1]) == 3
    assert set(opened) == {known}


# --- texts ------------------------------------------------------------------------------------------


def test_a_reason_that_is_no_text_keeps_nobody_from_being_refused(scene: Scene) -> None:
    """Bytes that are not UTF-8 come as lone surrogates: replaced, in store, audit and spool."""
    name, odd = scene.version(1), "f\udcfcr INC-1"
    request = Once.of("r1", "revoke", {"reason": odd})

    result = scene.verbs.revoke(Leak(agent="a", reason=odd), CALLER, once=request)

    assert (result["incomplete"], scene.state(name)) == (False, "revoked")
    scene.verbs.suspend("b", CALLER, reason=odd)
    details = [dict(one.entry.detail) for one in scene.store.audit_entries()]
    assert [one["reason"] for one in details if one.get("reason")] == ["f?r INC-1"] * 2
    assert scene.verbs.spool.notes(name)[0]["reason"] == "f?r INC-1"


# --- successors -----------------------------------------------------------------------------------


def test_leaving_out_the_last_place_of_all_is_refused(scene: Scene) -> None:
    """What an earlier revoke left out counts: a successor must have somewhere to go."""
    scene.version(1)
    scene.verbs.revoke(Leak(agent="a", reissue=True, withhold=("vault",)), CALLER)
    new = scene.version(2)

    with pytest.raises(Refused, match="NOTHING WAS CUT.*vault"):
        scene.verbs.revoke(Leak(agent="a", reissue=True, withhold=("files",)), CALLER)

    assert scene.state(new) == "current"
    assert scene.store.case_of("a").credential.withheld == ("vault",)


def test_a_revoke_that_cancels_an_owed_successor_says_so(scene: Scene) -> None:
    """The second one suspends the agent and takes the successor from it: nobody shall be surprised."""
    scene.version(1)
    assert scene.verbs.revoke(Leak(agent="a", reissue=True), CALLER)["warnings"] == []

    result = scene.verbs.revoke(Leak(agent="a"), CALLER)

    assert (result["already"], result["state"]) == (True, "suspended")
    assert "owed it a successor" in result["warnings"][0]
    again = scene.verbs.revoke(Leak(agent="a", reissue=True), CALLER)
    assert "suspended" in again["warnings"][0]


# --- the daemon -------------------------------------------------------------------------------------


def test_a_standby_applies_its_own_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was revoked on its host while the store was away stands in no other host's spool."""
    monkeypatch.setattr(revoking, "POLL", 0.0)
    daemon = Service(load(Keyturn(tmp_path, agents=1).config), socket=tmp_path / "socket")
    store, verbs = daemon.parts.store, daemon.parts.administration
    scene = Scene(tmp_path / "state", store, verbs)
    add(store, "a")
    name = scene.version(1)
    (scene.folder / "revoked.d" / name).touch()
    seen = list[str]()

    def try_lead(**_more: Any) -> bool:
        seen.append(scene.state(name))
        if len(seen) == 2:
            raise StoreUnavailable  # no reason for a standby to end
        return len(seen) == 3

    membership: Any = SimpleNamespace(try_lead=try_lead)
    assert daemon._lead(membership, standby=True)
    daemon._pool.shutdown()
    daemon.parts.close()
    assert seen == ["current", "revoked", "revoked"]


def test_status_shows_what_only_the_spool_refuses(scene: Scene) -> None:
    """A touched tombstone counts for what one sees, with the daemon down as well."""
    name = scene.version(1)
    (scene.folder / "revoked.d").mkdir()
    (scene.folder / "revoked.d" / name).touch()

    case = scene.verbs.refused_here(scene.store.case_of("a"))

    assert case.current is None
    assert [v.state for v in case.versions] == [VersionState.REVOKED]
    assert json.dumps(scene.verbs.spool.notes(name)) == "[]"
