"""A reload and the agents of the store: nothing is accepted again, nothing moves unseen, all or none."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keyturn.administration import Leak
from keyturn.core.model import AgentState
from keyturn.daemon.commands import Commands
from keyturn.daemon.peer import local_peer
from keyturn.errors import Refused, UnknownAgent
from keyturn.status import describe
from support.installed import ME, Installed


@pytest.fixture
def keyturn(tmp_path: Path) -> Iterator[Installed]:
    """Give an installation whose two agents have their first versions."""
    one = Installed(tmp_path, "a", "b")
    one.run("a", "b")
    yield one
    one.end()


def shown(keyturn: Installed, agent: str) -> tuple[str, str]:
    """Return the state and the hint that `keyturn status` shows."""
    case = keyturn.case(agent)
    found = describe(case, policy=keyturn.parts.policy_of(case), now=keyturn.parts.store.now())
    return found["state"], found["hint"]


# --- a suspension survives --------------------------------------------------------------------


def test_no_reload_lifts_a_suspension(keyturn: Installed) -> None:
    """Out of the files and back: the agent stays suspended until a person resumes it."""
    held, whole = keyturn.held("a"), copy.deepcopy(keyturn.content)
    keyturn.parts.administration.suspend("a", ME)
    del keyturn.content["agents"]["a"]
    assert keyturn.reload()["unmanaged"] == 1
    assert (keyturn.accepts(held), shown(keyturn, "a")[0]) == (False, "suspended")
    keyturn.content = whole

    assert keyturn.reload()["changed"] == 1

    assert keyturn.accepts(held) is False
    keyturn.parts.administration.resume("a", ME)
    assert (keyturn.accepts(held), shown(keyturn, "a")[0]) == (True, "enabled")


def test_an_unmanaged_agent_that_is_suspended_stays_so(keyturn: Installed) -> None:
    """Neither a later reload nor a start accepts it again, and it can be removed."""
    held = keyturn.held("a")
    del keyturn.content["agents"]["a"]
    keyturn.reload()
    assert (keyturn.accepts(held), shown(keyturn, "a")[0]) == (True, "unmanaged")
    assert keyturn.parts.store.counts().agents == {"enabled": 1, "unmanaged": 1}
    keyturn.parts.administration.suspend("a", ME)

    keyturn.reload()
    assert keyturn.accepts(held) is False
    keyturn.end()
    keyturn.begin()
    assert keyturn.accepts(held) is False

    assert shown(keyturn, "a")[1].startswith("keyturn agents remove a")
    keyturn.parts.administration.remove("a", ME)
    with pytest.raises(UnknownAgent):
        keyturn.case("a")


def test_what_was_revoked_gets_no_successor_by_a_reload(keyturn: Installed) -> None:
    """Out of the files and back after a revoke: nothing is minted until a person resumes it."""
    whole = copy.deepcopy(keyturn.content)
    keyturn.parts.administration.revoke(Leak(agent="a", reason="leak"), ME)
    keyturn.run("a")
    del keyturn.content["agents"]["a"]
    keyturn.reload()
    keyturn.content = whole
    keyturn.reload()

    keyturn.run("a")

    case = keyturn.case("a")
    assert (case.agent.state, case.agent.listed, case.accepted) == (AgentState.SUSPENDED, True, ())
    assert "secret" not in keyturn.held("a")


def test_an_unmanaged_agent_is_not_rotated(keyturn: Installed) -> None:
    """It keeps what it has; the way back is the file."""
    held = keyturn.held("a")
    del keyturn.content["agents"]["a"]
    keyturn.reload()

    with pytest.raises(Refused, match="unmanaged and is not rotated"):
        keyturn.parts.administration.rotate("a", ME)

    keyturn.run("a")
    assert keyturn.held("a") == held


# --- agents of the command line ---------------------------------------------------------------


def command(keyturn: Installed, verb: str, **args: Any) -> Any:
    """Ask as somebody at the socket does."""
    function = Commands(lambda: keyturn.parts).table()[verb].function
    return function(args, local_peer(), lambda _event: None)


@pytest.mark.parametrize("login", ["x" * 129, "a:b\n\x1b[31m", " ", "a b", "\u00e4", "a:b"])
def test_a_login_that_no_file_may_have_is_refused(keyturn: Installed, login: str) -> None:
    """What agents present goes into headers, logs and tables."""
    place = [{"to": "files", "path": "c"}]
    with pytest.raises(Refused, match="printable ASCII"):
        command(keyturn, "agents.add", name="c", login=login, targets=place)
    with pytest.raises(Refused, match="owner"):
        command(keyturn, "agents.add", name="c", owner=f"{login}\x1b", targets=place)
    assert command(keyturn, "agents.add", name="c", login="c@acme", targets=place)["agent"] == "c"
