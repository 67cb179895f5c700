"""What every store promises, the same on SQLite and on PostgreSQL."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.engine import Connection

from keyturn.core import lifecycle
from keyturn.core.model import (
    Agent,
    AgentState,
    Case,
    Cause,
    Credential,
    Drift,
    Effect,
    Keys,
    Look,
    Outcome,
    Placement,
    Repairs,
    Request,
    RotationState,
    Target,
    VersionState,
    Waiting,
    WaitReason,
)
from keyturn.errors import (
    ClaimLost,
    IllegalTransition,
    Refused,
    StaleRevision,
    StorageError,
    StoreTooNew,
    StoreUnavailable,
    UnknownAgent,
    UnknownVersion,
)
from keyturn.ports import AuditEntry
from keyturn.storage import audit, reading, restoring
from keyturn.storage.decisions import DecisionReader
from keyturn.storage.membership import Membership
from keyturn.storage.store import Store
from keyturn.storage.takeover import TakeOver, Wanted
from support.pgbouncer import pgbouncer  # noqa: F401 - a fixture
from support.postgres import postgres  # noqa: F401 - a fixture
from support.stores import (
    NOW,
    TTL,
    Place,
    add,
    claim_of,
    declared,
    entry,
    intent,
    rotation,
    target,
    version,
)

CANARY = "kt_canary_never_printed"


_POOLED = pytest.param("pgbouncer", marks=pytest.mark.full)


@pytest.fixture(params=["sqlite", "postgresql", _POOLED])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Give an empty place for a store on each database."""
    url = f"sqlite:///{tmp_path}/keyturn.db"
    if request.param != "sqlite":
        url = request.getfixturevalue("postgres").new_database()
    if request.param == "pgbouncer":
        url = request.getfixturevalue("pgbouncer").url(url)
    place = Place(url, tmp_path)
    yield place
    place.close()


@pytest.fixture
def store(place: Place) -> Store:
    """Give an empty store."""
    return place.open()


def amend(store: Store, uid: str, change: Callable[[Case], Case], action: str = "test") -> Case:
    """Apply a change with one audit entry."""
    return store.amend(uid, lambda case: (change(case), [entry(action)])).case


def with_version(uid: str, *states: VersionState) -> Callable[[Case], Case]:
    """Return a change that adds versions in these states."""
    return lambda case: replace(
        case, versions=tuple(version(uid, n, state) for n, state in enumerate(states, 1))
    )


def raw(store: Store, statement: str, **values: Any) -> None:
    """Run a statement as somebody would who goes around the code."""
    with store.engine.begin() as connection:
        connection.execute(sa.text(statement), values)


# --- cases --------------------------------------------------------------------------------


def test_a_case_comes_back_as_it_was_saved(store: Store) -> None:
    """Every field of every noun survives the store, and a save returns what a load would."""
    first, second = Target(to="v", path="x/y", keys=Keys(id="u"), merge=True), target("b", "files")
    uid = add(store, targets=[first, second])
    current = version(
        uid, 1, VersionState.CURRENT, promoted_at=NOW, exposed=True, fence=3, origin="imported"
    )
    kept = version(uid, 2, VersionState.KEPT, deadline=NOW + TTL, tag=None)
    pending = version(uid, 3)
    waiting = Waiting(
        reason=WaitReason.DESTINATION,
        where="v",
        code="throttled",
        since=NOW,
        next_try_at=NOW,
        tries=4,
    )

    def change(case: Case) -> Case:
        credential = replace(
            case.credential,
            seq=3,
            next_rotation_at=NOW,
            sweep_at=NOW + TTL,
            request=Request(cause=Cause.REISSUE, grace=TTL, by="ann"),
            successor_owed=True,
            leaving=(target("old"),),
            drift=(Drift(target="v:x/y", kind="older", since=NOW),),
            looks=(Look(target="v:x/y", at=NOW, shown="7"),),
            repairs=(Repairs(target="v:x/y", at=(NOW,), fight=NOW + TTL),),
            withheld=("old",),
        )
        usual = Credential(uid="", agent_uid="")
        same = {
            one.name
            for one in fields(usual)
            if getattr(usual, one.name) == getattr(credential, one.name)
        }
        assert same <= {
            "name",
            "kind",
            "revision",
        }  # every other one is told apart from what it is at first
        return replace(
            case,
            credential=credential,
            versions=(current, kept, pending),
            rotation=rotation(
                uid,
                version_id=pending.id,
                state=RotationState.WAITING,
                waiting=waiting,
                targets=(first,),
                grace=TTL,
                attempt=2,
                error_code="x",
                error_where="v",
                error_detail="the login lacks update on v",
            ),
            intents=(intent(pending, expected="7"),),
            placements=(
                Placement(version_id=kept.id, credential_uid=uid, target="v:x/y", locator="6"),
            ),
        )

    saved = amend(store, uid, change)
    taken = store.claim(uid, holder="h", ttl=TTL)
    assert taken
    claim, loaded = taken
    assert loaded == store.load(claim)
    assert loaded.case == saved == store.case(uid) == store.case_of("a")
    assert saved == change(replace(saved, credential=replace(saved.credential)))
    # Whatever is remembered of it, a person can still cut it off.
    suspended = replace(saved.agent, state=AgentState.SUSPENDED)
    store.amend_agent(saved.agent.uid, suspended, identities={}, audit=[entry()])
    assert store.case(uid).agent.state is AgentState.SUSPENDED
    store.ledger.start([(saved.agent, saved.credential, saved.accepted)], incarnation=1, at=NOW)


def test_a_load_leaves_out_what_is_over(store: Store) -> None:
    """Closed rotations, resolved intents and gone copies go; placed and 20 other versions stay."""
    uid = add(store)
    refused = tuple(version(uid, n, VersionState.RETIRED) for n in range(1, 31))
    current = version(uid, 31, VersionState.CURRENT)
    copies = [
        Placement(version_id=refused[n].id, credential_uid=uid, target="t", locator=str(n))
        for n in (1, 2)
    ]
    amend(
        store,
        uid,
        lambda case: replace(
            case,
            versions=(*refused, current),
            rotation=rotation(uid),
            intents=(intent(current),),
            placements=tuple(copies),
        ),
    )

    def end(case: Case) -> Case:
        assert case.rotation
        return replace(
            case,
            rotation=replace(case.rotation, state=RotationState.DONE, closed_at=NOW),
            intents=(replace(case.intents[0], outcome=Outcome.DONE, ended_at=NOW),),
            placements=(case.placements[0], replace(case.placements[1], gone=True)),
        )

    saved = amend(store, uid, end)
    assert saved == store.case(uid)
    assert (saved.rotation, saved.intents, len(saved.placements)) == (None, (), 1)
    assert [v.seq for v in saved.versions] == [2, *range(11, 32)]
    history = store.history(uid, limit=40)
    assert [v.seq for v in history.versions] == list(range(31, 0, -1))
    assert [r.state for r in history.rotations] == [RotationState.DONE]


def test_a_promotion_frees_current_before_it_takes_it(store: Store) -> None:
    """New becomes current and old previous in one save, in whatever order the tuple is."""
    uid = add(store)
    amend(store, uid, with_version(uid, VersionState.CURRENT, VersionState.PENDING))

    def promote(case: Case) -> Case:
        old, new = case.versions
        return replace(
            case,
            versions=(
                replace(new, state=VersionState.CURRENT, promoted_at=NOW),
                replace(old, state=VersionState.PREVIOUS, deadline=NOW + TTL),
            ),
        )

    states = [v.state for v in amend(store, uid, promote).versions]
    assert states == [VersionState.PREVIOUS, VersionState.CURRENT]


def test_nothing_open_is_forgotten(store: Store) -> None:
    """A change that drops an accepted version, an intent or an open rotation is refused."""
    uid = add(store)
    pending = version(uid)
    full = amend(
        store,
        uid,
        lambda case: replace(
            case, versions=(pending,), rotation=rotation(uid), intents=(intent(pending),)
        ),
    )
    for loss in ({"versions": ()}, {"rotation": None}, {"intents": ()}):
        with pytest.raises(IllegalTransition):
            amend(store, uid, lambda case, loss=loss: replace(case, **loss))  # type: ignore[misc]
    assert store.case(uid) == full


# --- claims -------------------------------------------------------------------------------


def test_one_of_two_racing_claims_wins(place: Place) -> None:
    """Threads of two processes that claim at once: exactly one gets it, and fences only grow."""
    stores = [place.open("w1"), place.open("w2")]
    uid = add(stores[0])
    fences = []
    with ThreadPoolExecutor(4) as pool:
        for number in range(15):
            barrier = threading.Barrier(4)

            def race(index: int, barrier: threading.Barrier = barrier, number: int = number) -> Any:
                barrier.wait()
                return claim_of(stores[index % 2], uid, holder=f"h{number}-{index}", ttl=TTL)

            won = [claim for claim in pool.map(race, range(4)) if claim]
            assert len(won) == 1
            fences.append(won[0].fence)
            stores[0].release(won[0], wake_at=None)
    assert fences == list(range(1, 16))


def test_a_run_whose_claim_was_taken_writes_nothing(store: Store) -> None:
    """After its claim ran out and was taken, a run can neither load, renew, save nor release."""
    uid = add(store)
    lost = claim_of(store, uid, holder="slow", ttl=timedelta(milliseconds=1500))
    assert lost
    before = store.load(lost).case
    assert claim_of(store, uid, holder="quick", ttl=TTL) is None
    time.sleep(1.6)
    taken = claim_of(store, uid, holder="quick", ttl=TTL)
    assert taken
    assert taken.fence == lost.fence + 1
    after = with_version(uid, VersionState.PENDING)(before)
    for late in (
        lambda: store.load(lost),
        lambda: store.renew(lost, ttl=TTL),
        lambda: store.save(lost, before=before, after=after, audit=[]),
        # The same holder's name does not help: the fence is another.
        lambda: store.save(replace(lost, holder="quick"), before=before, after=after, audit=[]),
    ):
        with pytest.raises(ClaimLost):
            late()
    store.release(lost, wake_at=None)
    assert store.load(taken).case == before
    assert store.renew(taken, ttl=2 * TTL).until > taken.until


def test_a_claim_ends_by_the_stores_clock(store: Store) -> None:
    """`until` is the store's time plus the ttl."""
    uid = add(store)
    low = store.now()
    claim = claim_of(store, uid, holder="h", ttl=TTL)
    assert claim
    assert low + TTL <= claim.until <= store.now() + TTL


def test_an_amendment_makes_a_running_save_stale(store: Store) -> None:
    """A revoke that comes between load and save wins; the run loads again and goes on."""
    uid = add(store)
    claim = claim_of(store, uid, holder="h", ttl=TTL)
    assert claim
    before = store.load(claim).case
    amend(store, uid, with_version(uid, VersionState.REVOKED))
    with pytest.raises(StaleRevision):
        store.save(claim, before=before, after=before, audit=[entry()])
    again = store.load(claim).case
    saved = store.save(claim, before=again, after=again, audit=[])
    assert saved.case.credential.revision == 2


def test_a_version_moves_only_from_the_state_that_was_seen(store: Store) -> None:
    """A row that changed behind the revision's back is not overwritten."""
    uid = add(store)
    amend(store, uid, with_version(uid, VersionState.PENDING))
    claim = claim_of(store, uid, holder="h", ttl=TTL)
    assert claim
    before = store.load(claim).case
    raw(store, "UPDATE versions SET state = 'revoked', ended_at = 1")
    after = replace(before, versions=(replace(before.versions[0], state=VersionState.CURRENT),))
    with pytest.raises(StaleRevision):
        store.save(claim, before=before, after=after, audit=[])


def test_amendments_from_many_threads_all_count(place: Place) -> None:
    """Two processes with four threads each: every change is there, and the chains are whole."""
    stores = [place.open("w1"), place.open("w2")]
    uid = add(stores[0])

    def bump(index: int) -> None:
        amend(
            stores[index % 2],
            uid,
            lambda case: replace(
                case, credential=replace(case.credential, seq=case.credential.seq + 1)
            ),
        )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(bump, range(40)))
    case = stores[0].case(uid)
    assert (case.credential.seq, case.credential.revision) == (40, 40)
    assert stores[1].verify_audit() == []
    assert len(stores[1].audit_entries(limit=100)) == 41


# --- due work -----------------------------------------------------------------------------


def test_due_is_what_waits_unclaimed_oldest_first(store: Store) -> None:
    """Due credentials come by age with their connections; claimed and later ones do not."""
    add(store, "late", wake_at=NOW + TTL)
    add(store, "never", wake_at=None)
    add(store, "two", targets=[target("x", "vault"), target("y", "files")], wake_at=NOW)
    add(store, "one", wake_at=NOW - TTL)
    found = store.due(now=NOW, limit=9)
    assert [(d.agent_name, d.connections) for d in found] == [
        ("one", ("files",)),
        ("two", ("files", "vault")),
    ]
    assert store.due(now=NOW, limit=1) == found[:1]
    assert store.next_wake() == NOW - TTL
    claim = claim_of(store, "cred-one", holder="h", ttl=TTL)
    assert claim
    # By the store's own time, since NOW is long past the claim's end or long before it.
    assert [d.agent_name for d in store.due(now=store.now(), limit=1)] == ["two"]
    store.release(claim, wake_at=None)
    assert [d.agent_name for d in store.due(now=NOW, limit=9)] == ["two"]


def test_what_is_due_at_full_connections_is_passed_over(store: Store) -> None:
    """Those who touch one in any way are left out by the query, and a look can go on after another."""
    add(store, "one", targets=[target("one", "v")], wake_at=NOW)
    add(store, "two", targets=[target("two", "va"), target("x", "f")], wake_at=NOW)
    add(store, "three", targets=[target("three", "v_")], wake_at=NOW)
    moved = add(store, "moved", targets=[target("moved", "f")], wake_at=NOW)
    left = (target("moved", "v"),)
    amend(store, moved, lambda c: replace(c, credential=replace(c.credential, leaving=left)))
    store.wake(moved, at=NOW)
    asked = add(store, "open", targets=[target("open", "f")], wake_at=NOW)
    opened = rotation(asked, targets=(target("open", "v"),))
    amend(store, asked, lambda c: replace(c, rotation=opened))
    store.wake(asked, at=NOW)

    def names(*full: str, **more: Any) -> set[str]:
        return {d.agent_name for d in store.due(now=NOW, limit=9, full=full, **more)}

    assert names() == {"one", "two", "three", "moved", "open"}
    assert names("v") == {"two", "three"}
    assert names("f") == {"one", "three"}
    assert names("v", "f") == {"three"}
    assert names("none") == names()
    whole = store.due(now=NOW, limit=9)
    pages = [store.due(now=NOW, limit=2)]
    while len(pages[-1]) == 2:
        pages.append(store.due(now=NOW, limit=2, after=pages[-1][-1]))
    assert [due for page in pages for due in page] == whole


def test_the_next_wake_of_a_claimed_credential_is_the_claims_end(store: Store) -> None:
    """A scheduler that sleeps until the next wake does not spin on what is being worked on."""
    uid = add(store)
    claim = claim_of(store, uid, holder="h", ttl=TTL)
    assert claim
    assert store.next_wake() == claim.until


def test_a_wake_is_only_ever_earlier(store: Store) -> None:
    """A later wish does not move an earlier one."""
    uid = add(store, wake_at=None)
    for at, expected in ((NOW, NOW), (NOW + TTL, NOW), (NOW - TTL, NOW - TTL)):
        store.wake(uid, at=at)
        assert store.next_wake() == expected


@pytest.mark.parametrize("by", ["wake", "amend"])
def test_a_release_keeps_an_earlier_wish(store: Store, by: str) -> None:
    """What was asked for since the claim was taken is not slept through."""
    uid = add(store)
    claim = claim_of(store, uid, holder="h", ttl=TTL)
    assert claim
    if by == "wake":
        store.wake(uid, at=NOW + TTL)
    else:
        amend(store, uid, lambda c: replace(c, credential=replace(c.credential, wake_at=NOW + TTL)))
    store.release(claim, wake_at=NOW + 2 * TTL)
    assert store.next_wake() == NOW + TTL
    again = claim_of(store, uid, holder="h", ttl=TTL)
    assert again
    store.release(again, wake_at=NOW + 3 * TTL)
    assert store.next_wake() == NOW + 3 * TTL


# --- intents ------------------------------------------------------------------------------


def test_a_writer_reports_its_own_intent_without_a_claim(place: Place) -> None:
    """A late outcome lands once, wakes the credential and makes the running save stale."""
    store, other = place.open("w1"), place.open("w2")
    uid = add(store, wake_at=None)
    pending = version(uid)
    amend(store, uid, lambda c: replace(c, versions=(pending,), intents=(intent(pending),)))
    uid_of = intent(pending).uid
    other.report(uid_of, landed=True)
    assert store.case(uid).intents
    claim = claim_of(other, uid, holder="h", ttl=TTL)
    assert claim
    before = other.load(claim).case
    store.report(uid_of, landed=False)
    store.report(uid_of, landed=True)
    with pytest.raises(StaleRevision):
        other.save(claim, before=before, after=before, audit=[])
    assert other.load(claim).case.intents == ()
    other.release(claim, wake_at=None)
    assert store.next_wake() is not None
    with store.engine.connect() as connection:
        assert connection.execute(sa.text("SELECT outcome FROM intents")).scalar() == "failed"


# --- epoch --------------------------------------------------------------------------------


def test_the_epoch_moves_when_verifiers_must_know(store: Store) -> None:
    """A version's state and deadline and the agent's state move it; due times and a new login do not."""
    uid = add(store)

    def moves(change: Callable[[Case], Case]) -> bool:
        before = store.epoch
        amend(store, uid, change)
        return store.epoch == before + 1

    def first(case: Case, **values: Any) -> Case:
        return replace(case, versions=(replace(case.versions[0], **values),))

    assert moves(with_version(uid, VersionState.PENDING))
    assert moves(lambda c: first(c, state=VersionState.CURRENT, promoted_at=NOW))
    assert not moves(lambda c: replace(c, credential=replace(c.credential, sweep_at=NOW)))
    assert moves(lambda c: first(c, state=VersionState.PREVIOUS, deadline=NOW))
    assert moves(lambda c: first(c, deadline=NOW + TTL))
    assert moves(lambda c: replace(c, agent=replace(c.agent, state=AgentState.SUSPENDED)))
    assert not moves(lambda c: replace(c, agent=replace(c.agent, login="other")))
    assert moves(lambda c: first(c, state=VersionState.RETIRED, ended_at=NOW))


# --- owners -------------------------------------------------------------------------------


def test_names_logins_and_entries_have_one_owner(store: Store) -> None:
    """A second owner is refused with the name of the first, and nothing of it stays."""
    add(store, "one", login="shared")
    claims: list[dict[str, Any]] = [
        {"name": "one", "login": "x", "targets": [target("x")]},
        {"name": "x", "login": "shared", "targets": [target("x")]},
        {"name": "x", "login": "x", "targets": [target("one")]},
    ]
    for claim in claims:
        with pytest.raises(Refused, match="'one'"):
            add(store, claim.pop("name"), uid="second", **claim)
    assert [a.name for a in store.agents()] == ["one"]


def test_a_removed_agent_frees_its_name(store: Store) -> None:
    """Removed agents are only listed when asked for, and name, login and entry are free again."""
    uid = add(store, "a")
    agent = store.agent("a")
    gone = replace(agent, state=AgentState.REMOVED)
    store.amend_agent(agent.uid, gone, identities={}, audit=[entry()])
    with pytest.raises(UnknownAgent):
        store.agent("a")
    with pytest.raises(UnknownAgent):
        store.case_of("a")
    assert store.agents() == []
    assert store.agents(removed=True) == [gone]
    assert store.case(uid).agent == gone
    other = Agent(uid="another", name="a", login="a", targets=agent.targets)
    credential = replace(store.case(uid).credential, uid="cred-2", agent_uid="another")
    store.add_agent(other, credential, identities={"files:a": "file:///files:a"}, audit=[])
    assert store.agent("a") == other


def test_a_dropped_target_is_leaving_until_it_is_empty(store: Store) -> None:
    """A target where something of ours may be stays in the case and keeps its owner."""
    written, never = target("w"), target("n")
    uid = add(store, "a", targets=[written, never])
    current = version(uid, 1, VersionState.CURRENT)
    done = intent(current, target=written.key, outcome=Outcome.DONE, ended_at=NOW)
    amend(store, uid, lambda c: replace(c, versions=(current,), intents=(done,)))
    agent = replace(store.agent("a"), targets=())
    (case,) = store.amend_agent(agent.uid, agent, identities={}, audit=[entry()])
    assert case.credential.leaving == (written,)
    add(store, "b", targets=[never])
    with pytest.raises(Refused, match="'a'"):
        add(store, "c", targets=[written])
    amend(store, uid, lambda c: replace(c, credential=replace(c.credential, leaving=())))
    add(store, "c", targets=[written])


def test_a_target_that_comes_back_is_no_longer_leaving(store: Store) -> None:
    """Dropping a target and naming it again ends where it began."""
    uid = add(store, "a")
    agent = store.agent("a")
    pending = version(uid)
    amend(store, uid, lambda c: replace(c, versions=(pending,), intents=(intent(pending),)))
    dropped = replace(agent, targets=())
    (case,) = store.amend_agent(agent.uid, dropped, identities={}, audit=[])
    assert case.credential.leaving == agent.targets
    identities = {"files:a": "file:///files:a"}
    (case,) = store.amend_agent(agent.uid, agent, identities=identities, audit=[])
    assert (case.credential.leaving, case.agent) == ((), agent)


def test_a_reload_does_not_undo_a_suspension(store: Store) -> None:
    """A definition that was computed from an older row is refused when the row is named."""
    add(store, "a")
    seen = store.agent("a")
    suspended = replace(seen, state=AgentState.SUSPENDED)
    store.amend_agent(seen.uid, suspended, identities={"files:a": "file:///files:a"}, audit=[])
    with pytest.raises(StaleRevision):
        store.amend_agent(seen.uid, replace(seen, owner="x"), identities={}, audit=[], before=seen)
    assert store.agent("a") == suspended


def wanted(agent: Agent, *, credential: Credential | None = None) -> Wanted:
    """Return what an agent is to be, with the identities of its targets."""
    claimed = {t.key: f"file:///{t.key}" for t in agent.targets}
    audit = entry("agent.changed", agent=agent.name)
    return Wanted(agent=agent, claimed=claimed, audit=audit, credential=credential)


def test_all_agents_change_in_one_transaction_or_none(store: Store) -> None:
    """New, changed and dropped targets together; the last one's trouble undoes the first one's."""
    uid = add(store, "a")
    add(store, "b")
    current = version(uid, 1, VersionState.CURRENT)
    done = intent(current, target="files:a", outcome=Outcome.DONE, ended_at=NOW)
    amend(store, uid, lambda c: replace(c, versions=(current,), intents=(done,)))
    one, two = store.agents()
    new = Agent(uid="agent-c", name="c", login="c", targets=(target("c"),))
    credential = Credential(uid="cred-c", agent_uid="agent-c", wake_at=NOW)
    changes = [
        wanted(replace(one, targets=(target("moved"),))),
        wanted(new, credential=credential),
        wanted(replace(two, owner="team", listed=False)),
    ]
    thief = replace(new, uid="agent-d", name="d", login="d", targets=(target("a"),))
    stolen = wanted(thief, credential=replace(credential, uid="cred-d", agent_uid="agent-d"))
    before = {"known": store.agents(), "owned": store.owned()}
    revision = store.case_of("b").credential.revision
    with pytest.raises(Refused, match="belongs to agent 'a'"):
        store.take_over(TakeOver(**before, wanted=[*changes, stolen]))
    assert {"known": store.agents(), "owned": store.owned()} == before

    store.take_over(TakeOver(**before, wanted=changes))

    assert [(a.name, a.listed) for a in store.agents()] == [("a", True), ("b", False), ("c", True)]
    assert [t.key for t in store.case_of("a").credential.leaving] == ["files:a"]
    assert store.case_of("c").credential == credential
    assert store.case_of("b").credential.revision == revision + 1
    with pytest.raises(Refused, match="'a'"):
        add(store, "x", targets=[target("a")])
    with pytest.raises(StaleRevision):
        store.take_over(TakeOver(**before, wanted=changes))
    assert store.counts().agents == {"enabled": 2, "unmanaged": 1}


def test_a_changed_agent_makes_a_running_save_stale(store: Store) -> None:
    """A run that loaded before its agent changed loads again."""
    uid = add(store, "a")
    claim = claim_of(store, uid, holder="h", ttl=TTL)
    assert claim
    before = store.load(claim).case
    agent = replace(before.agent, policy="other")
    store.amend_agent(agent.uid, agent, identities={"files:a": "file:///files:a"}, audit=[])
    with pytest.raises(StaleRevision):
        store.save(claim, before=before, after=before, audit=[])


# --- audit --------------------------------------------------------------------------------


def test_revocations_of_other_processes_can_be_counted(place: Place) -> None:
    """Those between two positions, by what triggered them; one's own are counted as they happen."""
    mine, other = place.open("w1"), place.open("w10")
    mine.append_audit(entry("revoke", detail=(("trigger", "file"),)))
    before = mine.counts().audit_head
    for store, action, trigger in (
        (mine, "revoke", "file"),
        (other, "revoke", "command"),
        (other, "suspend", "command"),
        (other, "revoke", "spool"),
    ):
        store.append_audit(entry(action, detail=(("trigger", trigger),)))
    upto = mine.counts().audit_head
    assert mine.revocations_of_others(after=before, upto=upto) == ["command", "spool"]
    assert mine.revocations_of_others(after=before, upto=upto - 1) == ["command"]
    other.append_audit(entry("revoke"))
    assert mine.revocations_of_others(after=upto, upto=upto + 1) == [""]


def test_revocations_have_a_chain_of_their_own(store: Store) -> None:
    """Entries of revocations never wait for other entries, and an agent's have one order."""
    uid = add(store)
    amend(store, uid, lambda case: case, "revoke.version")
    store.append_audit(entry("reload", detail=(("agents", 3), ("at", NOW))))
    reload, revoked, added = store.audit_entries()
    assert (revoked.entry.action, revoked.chain, revoked.seq) == ("revoke.version", "w1/revoke", 1)
    assert [r.entry.action for r in (reload, added)] == ["reload", "agent.add"]
    assert reload.chain == added.chain != revoked.chain
    assert (added.seq, reload.seq) == (1, 2)
    assert store.verify_audit() == []
    assert store.audit_entries(agent="nobody") == []


@pytest.mark.parametrize(
    "harm",
    [
        "UPDATE audit SET actor = 'x' WHERE seq = 3",
        "UPDATE audit SET detail = '[[\"k\",1]]' WHERE seq = 3",
        "UPDATE audit SET at = at + 1 WHERE seq = 3",
        "DELETE FROM audit WHERE seq = 3",
        "DELETE FROM audit WHERE seq = 1",
        "DELETE FROM audit WHERE seq = 6",
        "DELETE FROM audit WHERE seq > 2",
        "DELETE FROM audit",
        "DELETE FROM chains",
        "UPDATE audit SET seq = CASE seq WHEN 3 THEN -4 ELSE -3 END WHERE seq IN (3, 4);"
        "UPDATE audit SET seq = -seq WHERE seq < 0",
        "UPDATE audit SET chain = 'other' WHERE seq = 6",
    ],
)
@pytest.mark.parametrize("piece", [2, audit.SLICE])
def test_a_harmed_chain_is_found(
    store: Store, harm: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Edited, cut, dropped and swapped entries are named, however many are read at once."""
    monkeypatch.setattr(audit, "SLICE", piece)
    add(store)
    for number in range(5):
        store.append_audit(entry(f"action-{number}", detail=(("n", number),)))
    assert store.verify_audit() == []
    for statement in harm.split(";"):
        raw(store, statement)
    assert store.verify_audit() != []


def test_the_chains_are_walked_in_short_reads_while_others_append(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two slices commits go through, and what they append is no harm; all is judged later."""
    store, other = place.open("w1"), place.open("w2")
    for number in range(12):
        store.append_audit(entry(f"action-{number}", agent=f"agent-{number}"))
    monkeypatch.setattr(audit, "SLICE", 3)
    read, slices = store.database.read, []

    def read_and_append(body: Callable[[Connection], Any]) -> Any:
        found = read(body)
        if not isinstance(found, tuple):
            return found  # the names of the anchors, which are walked afterwards
        slices.append(len(found[0]))
        for writer in (other, store):  # the last chain grows as well as those that are done
            writer.append_audit(entry("meanwhile", agent=f"agent-{len(slices) % 12}"))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(store.database, "read", read_and_append)
        assert store.verify_audit() == []

    assert len(slices) >= 4
    assert max(slices) <= 3
    assert store.verify_audit() == []
    raw(store, "UPDATE audit SET actor = 'x' WHERE action = 'meanwhile'")
    assert len(store.verify_audit()) == 2 * len(slices)


def test_no_request_reads_more_of_the_audit_than_it_may(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A negative limit is none at all, and a large one is cut; slices join without gap or double."""
    for number in range(9):
        store.append_audit(entry(f"action-{number}", agent=f"agent-{number % 2}"))
    assert store.audit_entries(limit=-1) == []
    whole = store.audit_entries()
    monkeypatch.setattr(audit, "SLICE", 2)
    assert [store.audit_entries(limit=limit) for limit in range(11)] == [
        whole[:limit] for limit in range(11)
    ]
    assert store.audit_entries(agent="agent-1") == [e for e in whole if e.entry.agent == "agent-1"]
    monkeypatch.setattr(audit, "MOST", 4)
    assert store.audit_entries(limit=10**9) == whole[:4]


def test_a_chain_goes_on_from_where_it_stands(store: Store) -> None:
    """What was rolled back, or what another moved, leaves no gap and no fork."""

    def undone(connection: Connection) -> None:
        audit.append(connection, [entry("lost")], writer="w1", at=NOW, heads=store._heads)
        raise Refused("rolled back")

    store.append_audit(entry("one"))
    with pytest.raises(Refused):
        store.database.write(undone)
    store.append_audit(entry("two"))
    # Another process of the same name: never so, and harmless.
    store.database.write(
        lambda connection: audit.append(connection, [entry("three")], writer="w1", at=NOW, heads={})
    )
    store.append_audit(entry("four"))

    found = [(one.seq, one.entry.action) for one in store.audit_entries()]
    assert found == [(4, "four"), (3, "three"), (2, "two"), (1, "one")]
    assert store.verify_audit() == []


def test_a_change_without_its_audit_entry_is_refused(store: Store) -> None:
    """If the entry cannot be written, nothing is changed."""
    uid = add(store)
    raw(store, "ALTER TABLE audit RENAME TO elsewhere")
    before = store.case(uid)
    with pytest.raises(StorageError):
        amend(store, uid, with_version(uid, VersionState.PENDING))
    assert store.case(uid) == before


# --- illegal states -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE versions SET state = 'active' WHERE seq = 2",
        "UPDATE versions SET state = 'current' WHERE seq = 2",
        "UPDATE versions SET state = 'pending' WHERE seq = 1",
        "UPDATE versions SET deadline = 1 WHERE state = 'current'",
        "UPDATE versions SET deadline = 1 WHERE state = 'pending'",
        "UPDATE versions SET state = 'retired' WHERE seq = 2",
        "UPDATE versions SET ended_at = 1 WHERE state = 'current'",
        "UPDATE versions SET state = 'kept', ended_at = NULL WHERE state = 'retired'",
        "UPDATE versions SET state = 'retired' WHERE state = 'revoked'",
        "UPDATE versions SET state = 'current', ended_at = NULL WHERE state = 'revoked'",
        "UPDATE versions SET seq = 1 WHERE seq = 2",
        "UPDATE agents SET state = 'gone'",
        "UPDATE agents SET name = 'a'",
        "UPDATE agents SET login = 'a'",
        "UPDATE rotations SET state = 'waiting' WHERE closed_at IS NULL",
        "UPDATE rotations SET state = 'done' WHERE closed_at IS NULL",
        "UPDATE rotations SET state = 'running', closed_at = NULL",
        "UPDATE intents SET outcome = 'done'",
        "UPDATE intents SET effect = 'delete'",
        "UPDATE credentials SET holder = 'x'",
        "DELETE FROM versions WHERE seq = 1",
        "INSERT INTO meta SELECT 2, 'x', 1, 1, 1",
    ],
)
def test_the_database_refuses_an_illegal_state(store: Store, statement: str) -> None:
    """Even a statement that goes around the code cannot store what must never be."""
    uid = add(store)
    add(store, "b")
    current = version(uid, 1, VersionState.CURRENT)
    others = [
        version(uid, 2),
        version(uid, 3, VersionState.RETIRED),
        version(uid, 4, VersionState.REVOKED),
    ]
    closed = rotation(uid, 1, state=RotationState.DONE, closed_at=NOW)
    amend(
        store,
        uid,
        lambda c: replace(
            c, versions=(current, *others), intents=(intent(current),), rotation=closed
        ),
    )
    amend(store, uid, lambda c: replace(c, rotation=rotation(uid, 2)))
    with pytest.raises(sa.exc.DBAPIError):
        raw(store, statement)


def test_a_bug_of_ours_is_an_illegal_transition(store: Store) -> None:
    """Two current versions, or a tombstone that comes back: refused as a whole, by its own name."""
    uid = add(store)
    with pytest.raises(IllegalTransition):
        amend(store, uid, with_version(uid, VersionState.CURRENT, VersionState.CURRENT))
    case = amend(store, uid, with_version(uid, VersionState.REVOKED))
    with pytest.raises(IllegalTransition):
        amend(
            store,
            uid,
            lambda c: replace(
                c, versions=(replace(c.versions[0], state=VersionState.CURRENT, ended_at=None),)
            ),
        )
    assert store.case(uid) == case


def test_errors_name_no_values(store: Store) -> None:
    """What a person sees of a database's error has neither SQL nor a value in it."""
    uid = add(store)
    bad = (
        version(uid, 1, VersionState.CURRENT, digest=CANARY),
        version(uid, 2, VersionState.CURRENT, digest=CANARY),
    )
    with pytest.raises(IllegalTransition) as caught:
        amend(store, uid, lambda c: replace(c, versions=bad))
    text = "".join(traceback.format_exception(caught.value))
    assert CANARY not in text
    assert "INSERT" not in text


# --- schema -------------------------------------------------------------------------------


def test_the_migrations_build_what_the_tables_declare(store: Store) -> None:
    """The schema of a fresh store and `tables` are the same."""
    with store.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, declared(store.engine)) == []


def test_a_store_of_a_newer_release_is_refused(place: Place) -> None:
    """Where it works with newer ones only it is left as it is, and the message says what to do."""
    store = place.open()
    raw(store, "UPDATE alembic_version SET version_num = '9999'")
    raw(store, "UPDATE meta SET oldest_schema = '9998'")
    with pytest.raises(StoreTooNew, match="releases from schema 9998 on") as caught:
        place.open()
    assert "install" in caught.value.hint


def test_a_store_is_only_made_when_asked(place: Place) -> None:
    """A command that merely reads never leaves an empty store behind."""
    for _ in range(2):
        with pytest.raises(StorageError, match="no store|is empty"):
            place.open(create=False)


def test_a_store_keeps_its_identity(place: Place) -> None:
    """Id and incarnation are made once; two that open it at once make it once."""
    with ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(lambda n: place.open(f"w{n}"), range(3)))
    assert len({(s.store_id, s.incarnation) for s in stores}) == 1
    assert place.open(create=False).store_id == stores[0].store_id


# --- ledger -------------------------------------------------------------------------------


def test_the_ledger_follows_the_store(store: Store) -> None:
    """What may be accepted is listed without the store: from before accept until after refusal."""
    uid = add(store)
    assert store.ledger.accepted("a") == []
    case = amend(store, uid, with_version(uid, VersionState.CURRENT, VersionState.PENDING))
    ids = [v.id for v in case.versions]
    assert store.ledger.accepted("a") == ids

    def retire(case: Case) -> Case:
        first, second = case.versions
        return replace(
            case, versions=(replace(first, state=VersionState.REVOKED, ended_at=NOW), second)
        )

    amend(store, uid, retire)
    assert store.ledger.accepted("a") == ids[1:]


def test_no_version_is_accepted_without_its_ledger_line(store: Store) -> None:
    """If the ledger cannot be written the change is refused."""
    uid = add(store)
    (store.ledger.folder / "a.jsonl").mkdir()
    with pytest.raises(StoreUnavailable):
        amend(store, uid, with_version(uid, VersionState.PENDING))
    assert store.case(uid).versions == ()


def test_a_refusal_that_was_not_committed_stays_listed(store: Store) -> None:
    """A revoke whose commit failed leaves its version where the next revoke finds it."""
    uid = add(store)
    case = amend(store, uid, with_version(uid, VersionState.CURRENT))
    raw(store, "ALTER TABLE audit RENAME TO elsewhere")
    with pytest.raises(StorageError):
        amend(store, uid, with_version(uid, VersionState.REVOKED))
    assert store.ledger.accepted("a") == [case.versions[0].id]


def test_the_ledger_has_every_activation(store: Store) -> None:
    """An activation intent is in the ledger before it is committed, a staging is not."""
    uid = add(store)
    pending = version(uid)
    staging = intent(pending, 2, effect=Effect.STAGE)
    amend(store, uid, lambda c: replace(c, versions=(pending,), intents=(intent(pending), staging)))
    found = [line["intent"] for line in store.ledger.lines("a") if "intent" in line]
    assert found == [intent(pending).uid]


def test_the_end_of_a_ledger_is_found_behind_a_long_note(store: Store) -> None:
    """A confirmation of a whole life of versions does not hide how far the ledger goes."""
    uid = add(store)
    restoring.keep_ledger(store)
    case = amend(store, uid, with_version(uid, VersionState.CURRENT))
    many = [f"{number:014}" for number in range(2000)]
    note = {"refused": many, "credential": uid, "confirmed": case.credential.revision + 5}
    store.ledger.append(case.agent, [note], sync=False)
    assert reading.read(store.ledger, whole=False)[uid].confirmed.revision == note["confirmed"]
    assert restoring.compare(store) == restoring.AHEAD


# --- look-ups and numbers -----------------------------------------------------------------


def test_versions_are_found_by_their_id(store: Store) -> None:
    """A leaked version id names its agent, also after the agent is gone."""
    uid = add(store)
    case = amend(store, uid, with_version(uid, VersionState.CURRENT))
    assert store.find_version(case.versions[0].id) == (case.agent, case.versions[0])
    assert store.find_version("nobody") is None


def test_an_amendment_can_have_a_version_however_old(store: Store) -> None:
    """One that the case has forgotten is loaded by its id and written; one of others is not."""
    uid, other = add(store), add(store, "b")
    refused = tuple(version(uid, n, VersionState.RETIRED) for n in range(1, 31))
    amend(store, uid, lambda case: replace(case, versions=refused))
    first = refused[0]

    def revoke(case: Case) -> tuple[Case, Sequence[AuditEntry]]:
        return lifecycle.revoke_version(case, first.id, reissue=False, now=NOW), [entry("revoke")]

    store.amend(uid, revoke, also=first.id)

    found = store.find_versions([first.id, refused[1].id, "nobody"])
    assert {name: one.state for name, (_, one) in found.items()} == {
        first.id: VersionState.REVOKED,
        refused[1].id: VersionState.RETIRED,
    }
    with pytest.raises(UnknownVersion):
        store.amend(other, revoke, also=first.id)


def test_numbers_by_state(store: Store) -> None:
    """Counts name what is there; overdue are enabled agents whose time has passed."""
    for name in ("a", "b"):
        uid = add(store, name)
        amend(
            store,
            uid,
            lambda c: replace(c, credential=replace(c.credential, next_rotation_at=NOW)),
        )
    amend(store, uid, with_version(uid, VersionState.CURRENT, VersionState.PENDING))
    amend(store, uid, lambda c: replace(c, rotation=rotation("cred-b")))
    amend(store, uid, lambda c: replace(c, agent=replace(c.agent, state=AgentState.SUSPENDED)))
    found = store.counts()
    assert found.agents == {"enabled": 1, "suspended": 1}
    assert found.versions == {"current": 1, "pending": 1}
    assert found.rotations == {"running": 1}
    assert found.overdue == 1
    age = store.now() - NOW
    assert timedelta(0) <= found.longest_overdue <= age
    later = store.counts(late_by=age + timedelta(hours=1))
    assert (later.overdue, later.longest_overdue) == (0, timedelta(0))


def test_unknown_names_are_unknown(store: Store) -> None:
    """Each look-up by a wrong name says that there is no such agent."""
    for look in (
        lambda: store.agent("x"),
        lambda: store.case_of("x"),
        lambda: store.case("x"),
        lambda: store.amend("x", lambda c: (c, [])),
    ):
        with pytest.raises(UnknownAgent):
            look()


# --- readers ------------------------------------------------------------------------------


def test_a_reader_sees_every_commit(place: Place) -> None:
    """A look-up that starts after a commit of another connection returned shows it."""
    store, reader = place.open(), DecisionReader.open(place.url)
    uid = add(store, login="a-newer-login")
    assert reader.lookup("unknown") is None
    known = version(uid, 1, VersionState.CURRENT, login="its-own")
    case = amend(store, uid, lambda c: replace(c, versions=(known,)))
    for number in range(50):
        deadline = NOW + timedelta(seconds=number)
        values = {"state": VersionState.PREVIOUS, "deadline": deadline}
        amend(
            store,
            uid,
            lambda c, v=values: replace(c, versions=(replace(c.versions[0], **v),)),  # type: ignore[misc]
        )
        found = reader.lookup(case.versions[0].id)
        assert found
        assert (found.state, found.deadline) == (VersionState.PREVIOUS, deadline)
    assert (found.login, found.tag, found.agent_state) == ("its-own", b"12345678", "enabled")
    reader.close()


def test_imported_versions_are_found_by_login(place: Place) -> None:
    """Only imported ones of that login, newest first."""
    store, reader = place.open(), DecisionReader.open(place.url)
    uid = add(store, login="l")
    states = [VersionState.REVOKED, VersionState.CURRENT, VersionState.PENDING]
    made = [version(uid, n, s, origin="imported", login="l") for n, s in enumerate(states, 1)]
    made[2] = replace(made[2], origin="generated")
    amend(store, uid, lambda c: replace(c, versions=tuple(made)))
    assert [d.version_id for d in reader.imported("l")] == [made[1].id, made[0].id]
    assert reader.imported("other") == []
    reader.close()


def test_a_login_is_taken_until_its_last_version_is_over(store: Store) -> None:
    """Who has a new login is still known by the old one: nobody else gets it meanwhile."""
    uid = add(store, "a", login="old")
    amend(store, uid, lambda c: replace(c, versions=(version(uid, 1, login="old"),)))
    case = store.case(uid)
    moved = replace(case.agent, login="new")
    identities = {t.key: f"file:///{t.key}" for t in moved.targets}
    store.amend_agent(moved.uid, moved, identities=identities, audit=[])
    with pytest.raises(Refused, match="'old' is still used by older versions of agent 'a'"):
        add(store, "b", login="old")
    over = {"state": VersionState.RETIRED, "ended_at": NOW}
    amend(store, uid, lambda c: replace(c, versions=(replace(c.versions[0], **over),)))
    add(store, "b", login="old")


# --- membership ---------------------------------------------------------------------------


def test_one_leads_and_the_other_stands_by(place: Place) -> None:
    """The second process leads when the first has left, and knows that it ended."""
    first, second = place.open("w1"), place.open("w2")
    one, two = Membership(first), Membership(second)
    assert one.try_lead(ttl=TTL)
    assert one.try_lead(ttl=TTL)
    assert not two.try_lead(ttl=TTL)
    one.renew(ttl=TTL)
    with pytest.raises(ClaimLost):
        two.renew(ttl=TTL)
    assert second.writer_died_at("w1") is None
    uid = add(first)
    assert claim_of(first, uid, holder="h", ttl=TTL)
    one.leave()
    assert two.try_lead(ttl=TTL)
    assert second.writer_died_at("w1") is not None
    assert second.writer_died_at("w2") is None
    assert [d.credential_uid for d in second.due(now=second.now(), limit=9)] == [uid]
    assert claim_of(second, uid, holder="h", ttl=TTL)
    with pytest.raises(ClaimLost):
        one.renew(ttl=TTL)
    two.leave()
