"""What becomes of a row and the ledger's lines about it: pure, so every case is a value."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from keyturn.core.merging import (
    AgentNews,
    Known,
    Moment,
    News,
    in_doubt,
    is_ahead,
    merged,
    merged_agent,
)
from keyturn.core.model import (
    Agent,
    AgentState,
    Case,
    Cause,
    Credential,
    Effect,
    Intent,
    Rotation,
    RotationState,
    Version,
    VersionState,
)

S = VersionState
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
AGENT = Agent(uid="u", name="a", login="a")
CREDENTIAL = Credential(uid="c", agent_uid="u", seq=1, revision=10)


def at(revision: int, life: int = 1) -> Moment:
    """Return a moment."""
    return Moment(incarnation=life, revision=revision)


def version(name: str, seq: int, state: VersionState, **more: Any) -> Version:
    """Return a version."""
    ended = None if state in {S.PENDING, S.CURRENT, S.PREVIOUS, S.KEPT} else NOW
    values = {"login": "a", "scheme": "argon2id", "digest": name, "minted_at": NOW}
    return Version(
        id=name, credential_uid="c", seq=seq, state=state, **values | {"ended_at": ended} | more
    )


def line(of: Version, revision: int, life: int = 1, **more: Any) -> News:
    """Return the ledger's line about a version."""
    return News(moment=at(revision, life), at=NOW, version=of, **more)


def about(agent: Agent, revision: int, **more: Any) -> AgentNews:
    """Return the ledger's line about the agent."""
    return AgentNews(moment=at(revision), at=NOW, agent=agent, credential=CREDENTIAL, **more)


def case(*versions: Version, **more: Any) -> Case:
    """Return a row as a backup has it, at revision 10 of life 1."""
    return Case(agent=AGENT, credential=CREDENTIAL, versions=versions, **more)


def after(row: Case, *lines: News, agents: tuple[AgentNews, ...] = ()) -> Case:
    """Merge."""
    known = Known(lines=lines, agents=agents or (about(AGENT, 0),))
    return merged(
        row, known, at(10), now=NOW, schedule=lambda _case, when: when + timedelta(days=1)
    )


def states(row: Case) -> dict[str, str]:
    """Return each version's state."""
    return {one.id: str(one.state) for one in row.versions}


V1, V2 = version("v1", 1, S.CURRENT), version("v2", 2, S.PENDING)


def test_what_was_accepted_since_is_known_again() -> None:
    """A rotation after the backup: both versions are as the ledger has them, and the next is planned."""
    ends = NOW + timedelta(hours=1)
    previous = replace(V1, state=S.PREVIOUS, deadline=ends)
    found = after(
        case(V1), line(V2, 12), line(previous, 15), line(replace(V2, state=S.CURRENT), 15)
    )
    assert states(found) == {"v1": "previous", "v2": "current"}
    assert found.version("v1").deadline == ends  # type: ignore[union-attr]
    assert found.credential.seq == 2
    assert found.credential.next_rotation_at == NOW + timedelta(days=1)


@pytest.mark.parametrize("revision", [9, 10])
def test_a_line_that_is_not_later_than_the_row_is_no_news(revision: int) -> None:
    """A ledger that is older than the backup moves nothing back."""
    revoked = version("v1", 1, S.REVOKED)
    assert states(after(case(revoked), line(V1, revision))) == {"v1": "revoked"}
    assert states(after(case(V1), line(V2, revision))) == {"v1": "current"}


def test_a_revoked_version_never_comes_back() -> None:
    """Whichever side says so, and whatever is announced after it."""
    revoked = version("v1", 1, S.REVOKED)
    assert states(after(case(V1), line(revoked, 11), line(V1, 12))) == {"v1": "revoked"}
    assert states(after(case(revoked), line(V1, 11, life=2))) == {"v1": "revoked"}


def test_a_pending_version_is_kept_and_its_rotation_is_closed() -> None:
    """Somebody may have read it; the write that may still land is unresolved."""
    rotation = Rotation(
        uid="r", credential_uid="c", cause=Cause.SCHEDULE, version_id="v2", opened_at=NOW
    )
    intent = Intent(
        uid="i", credential_uid="c", version_id="v2", target="files:a", effect=Effect.ACTIVATE,
        writer="w", fence=3, incarnation=1, at=NOW,
    )  # fmt: skip
    shown = News(moment=at(13), at=NOW, intent=intent)
    found = after(case(V1, rotation=rotation), line(V2, 12), shown)
    assert states(found) == {"v1": "current", "v2": "kept"}
    assert found.version("v2").exposed  # type: ignore[union-attr]
    assert found.intents == (intent,)
    assert found.rotation is not None
    assert (found.rotation.state, found.rotation.closed_at) == (RotationState.ABANDONED, NOW)


def test_an_announcement_that_was_never_committed_gives_way() -> None:
    """Its number was given to the next attempt: the ledger has both, the store had one."""
    again = version("v3", 2, S.PENDING)
    found = after(
        case(V1), line(V2, 11), line(again, 12), line(replace(again, state=S.CURRENT), 14)
    )
    assert states(found) == {"v1": "previous", "v3": "current"}
    assert [one.seq for one in found.versions] == [1, 2]


def test_a_ledger_that_was_begun_later_lists_what_was_accepted_then() -> None:
    """What it does not list had ended, also where an earlier part of it knows the version."""
    begun = about(AGENT, 20, accepted=("v2",))
    kept = line(replace(V2, state=S.CURRENT), 20)
    assert states(after(case(V1), kept, agents=(begun,))) == {"v1": "retired", "v2": "current"}
    known = after(case(V1), line(V1, 11), kept, agents=(begun,))
    assert states(known) == {"v1": "retired", "v2": "current"}


def test_a_successor_that_is_owed_and_a_place_that_is_left_out_stay_so() -> None:
    """Of the last line about them; where a secret leaked nothing is published."""
    revoked = version("v1", 1, S.REVOKED)
    found = after(case(V1), line(revoked, 11, owed=True, withheld=("vault",)))
    assert found.credential.successor_owed
    assert found.credential.withheld == ("vault",)


def test_a_repeat_changes_nothing_more() -> None:
    """The merge of what was merged is the same."""
    lines = (line(V2, 12), line(version("v1", 1, S.REVOKED), 13))
    once = after(case(V1), *lines)
    twice = after(once, *lines, line(once.versions[1], 14, life=2))
    assert states(twice) == states(once)


@pytest.mark.parametrize(
    ("announced", "confirmed", "ahead"),
    [
        (at(10), at(0), False),
        (at(11), at(0), False),  # a crash between the line and its commit
        (at(11), at(11), True),
        (at(12), at(0), True),
        (at(1, life=2), at(0), True),
        (at(99, life=0), at(0), False),
    ],
)
def test_a_store_that_was_put_back_is_told_from_a_crash(
    announced: Moment, confirmed: Moment, ahead: bool
) -> None:
    """One announcement ahead is a crash, one confirmed commit or two announcements are not."""
    news = News(moment=announced, at=NOW, version=V1)
    assert is_ahead(Known(lines=(news,), confirmed=confirmed), at(10)) is ahead


def test_nobody_can_tell_where_the_ledger_has_a_gap() -> None:
    """Every accepted version must once have been in it what its row says."""
    sure = Known(lines=(line(V1, 5),), agents=(about(AGENT, 0),))
    assert not in_doubt(case(V1), sure, at(10))
    assert in_doubt(case(V1), Known(), at(10))
    assert in_doubt(case(V1, V2), sure, at(10))
    assert in_doubt(case(replace(V1, state=S.KEPT)), sure, at(10))
    later = replace(sure, agents=(about(AGENT, 20, accepted=()),))
    assert not in_doubt(case(V1, V2), later, at(10))


@pytest.mark.parametrize(
    "stranger",
    [
        replace(V1, digest="of a stranger"),
        replace(V1, tag=b"stranger"),
        replace(V1, login="b"),
        replace(V1, not_after=NOW),
    ],
)
def test_a_backup_does_not_choose_what_an_accepted_id_stands_for(stranger: Version) -> None:
    """An id that is accepted by the ledger, with another secret: a person looks at that."""
    sure = Known(lines=(line(V1, 5),), agents=(about(AGENT, 0),))
    assert in_doubt(case(stranger), sure, at(10))


def test_a_backup_that_says_it_is_of_a_later_life_revives_nothing() -> None:
    """What ledger and spool have refused stays refused, also where it is no news to the row."""
    agents = (about(AGENT, 0, confirmed=True),)
    revoked = (line(V1, 5), line(version("v1", 1, S.REVOKED), 6))
    assert states(after(case(V1), *revoked)) == {"v1": "revoked"}
    over = Known(lines=(line(V1, 5), line(version("v1", 1, S.RETIRED), 6)), agents=agents)
    assert in_doubt(case(V1), over, at(10))
    again = replace(over, lines=(*over.lines, line(V1, 8, life=1)))  # a person let it go
    assert not in_doubt(case(V1), again, at(10))
    suspended = about(replace(AGENT, state=AgentState.SUSPENDED), 7, confirmed=True)
    sure = Known(lines=(line(V1, 5),), agents=(*agents, suspended))
    assert in_doubt(case(V1), sure, at(10))


def test_an_agent_is_what_it_was_last() -> None:
    """What refuses counts when it is announced; what accepts again when it is confirmed."""
    suspended = replace(AGENT, state=AgentState.SUSPENDED)
    known = Known(agents=(about(AGENT, 0), about(suspended, 11)))
    assert merged_agent(AGENT, known, at(10)) == suspended
    back = Known(agents=(about(suspended, 11), about(AGENT, 12)))
    assert merged_agent(AGENT, back, at(10)) == suspended
    sure = Known(agents=(about(suspended, 11), about(AGENT, 12, confirmed=True)))
    assert merged_agent(AGENT, sure, at(10)) == AGENT
    assert merged_agent(None, Known(agents=(about(AGENT, 0),)), None) == AGENT
    assert (
        merged_agent(suspended, Known(agents=(about(AGENT, 3, confirmed=True),)), at(10))
        == suspended
    )
