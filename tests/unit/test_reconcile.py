"""A reload and the agents of the store: nothing is accepted again, nothing moves unseen, all or none."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keyturn.core.model import AgentState, Keys
from keyturn.daemon.commands import Commands
from keyturn.daemon.peer import local_peer
from keyturn.errors import ConfigError, Refused, UnknownAgent
from keyturn.leaks import Leak
from keyturn.reconcile import MassChange, Reconciling
from keyturn.status import describe
from support.installed import ME, Installed
from support.running import file_at


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


# --- a connection that leads elsewhere --------------------------------------------------------


def test_a_moved_connection_is_refused_while_agents_read_at_its_old_place(
    keyturn: Installed,
) -> None:
    """By a new prefix as by a new root: nobody would look at the old place, and it is shown there."""
    place = [{"to": "files", "path": "c"}]
    command(keyturn, "agents.add", name="c", targets=place)
    keyturn.run("c")
    before = keyturn.parts.settings

    for change in ({"prefix": "prod"}, {"root": str(keyturn.folder / "elsewhere")}):
        keyturn.content["connections"]["files"].update(change)
        with pytest.raises(
            Refused, match=r"connection files leads elsewhere.*3 agents \(a, b, c\)"
        ):
            keyturn.reload()

    assert keyturn.parts.settings is before
    held = keyturn.held("a")
    keyturn.parts.administration.rotate("a", ME)
    keyturn.run("a")
    assert keyturn.held("a") != held  # at the old place, as before


def test_no_start_either_follows_a_moved_connection(keyturn: Installed) -> None:
    """Whether the daemon ran when the file was edited makes no difference."""
    keyturn.end()
    keyturn.content["connections"]["files"]["prefix"] = "prod"
    with pytest.raises(Refused, match="leads elsewhere"):
        keyturn.begin()
    keyturn.content["agents"] = {}  # and too many disappear as well
    keyturn.membership.leave()
    with pytest.raises(Refused, match="leads elsewhere"):
        keyturn.begin()


def test_a_moved_connection_gives_nobody_the_entry_of_another(keyturn: Installed) -> None:
    """The entry of an agent of the command line stays its own, whatever its connection is called."""
    one, two = keyturn.folder / "one", keyturn.folder / "two"
    keyturn.content["connections"] |= {"one": file_at(one), "two": file_at(two)}
    keyturn.reload()
    command(keyturn, "agents.add", name="victim", targets=[{"to": "one", "path": "x"}])
    keyturn.content["connections"]["one"] = file_at(keyturn.folder / "three")
    assert keyturn.reload()["moved"] == 1  # nothing was ever written there

    keyturn.content["connections"]["two"] = file_at(keyturn.folder / "three")
    keyturn.content["agents"]["thief"] = {
        "destinations": [{"to": "two", "path": "x", "adopt": True}]
    }
    with pytest.raises(Refused, match="belongs to agent 'victim'"):
        keyturn.reload()

    keyturn.run("victim")
    assert keyturn.held("x", "three")["id"] == "victim"
    (keyturn.folder / "three").rename(keyturn.folder / "four")
    for name in ("one", "two"):
        keyturn.content["connections"][name] = file_at(keyturn.folder / "four")
    with pytest.raises(Refused, match="leads elsewhere"):
        keyturn.reload()


def test_two_connections_that_nothing_was_written_to_can_change_places(tmp_path: Path) -> None:
    """A wrong address of the first day is corrected by a reload, also for both at once."""
    keyturn = Installed(tmp_path)
    roots = {"one": file_at(tmp_path / "1"), "two": file_at(tmp_path / "2")}
    keyturn.content["connections"] = roots
    keyturn.content["agents"] = {
        name: {"destinations": [{"to": name, "path": "x"}]} for name in roots
    }
    keyturn.reload()
    keyturn.content["connections"] = {"one": roots["two"], "two": roots["one"]}

    assert keyturn.reload()["moved"] == 2

    keyturn.run("one", "two")
    assert [keyturn.held("x", root)["id"] for root in "12"] == ["two", "one"]
    keyturn.end()


def test_a_connection_with_a_new_name_leads_to_the_same_entries(keyturn: Installed) -> None:
    """Nothing is left by that, and nobody else gets the entries."""
    keyturn.content["connections"]["store"] = keyturn.content["connections"].pop("files")
    for name, agent in keyturn.content["agents"].items():
        agent["destinations"] = [{"to": "store", "path": name}]

    assert keyturn.reload()["changed"] == 2

    case, held = keyturn.case("a"), keyturn.held("a")
    assert (case.credential.leaving, [t.key for t in case.agent.targets]) == ((), ["store:a"])
    keyturn.parts.administration.rotate("a", ME)
    keyturn.run("a")
    assert keyturn.held("a") != held
    with pytest.raises(Refused, match=r"belongs to agent 'a' \(as store:a\)"):
        command(keyturn, "agents.add", name="c", targets=[{"to": "store", "path": "a"}])


def test_a_connection_that_is_gone_hinders_no_reload(keyturn: Installed) -> None:
    """Agents and their connection can leave the file at once; the entries stay theirs."""
    keyturn.content["connections"] = {"other": file_at(keyturn.folder / "other")}
    keyturn.content["agents"] = {}
    assert keyturn.reload(allow_mass_change=True)["unmanaged"] == 2
    keyturn.content["connections"] = {"again": file_at(keyturn.folder / "agents")}
    keyturn.reload()

    with pytest.raises(Refused, match="belongs to agent 'a'"):
        command(keyturn, "agents.add", name="c", targets=[{"to": "again", "path": "a"}])


@pytest.mark.parametrize("more", [{"merge": True}, {}])
def test_other_key_names_in_an_entry_of_ours_are_refused(
    keyturn: Installed, more: dict[str, bool]
) -> None:
    """The old ones would stay there with a secret that is refused after the grace, seen by nobody."""
    keyturn.content["agents"]["c"] = {"destinations": [{"to": "files", "path": "c", **more}]}
    keyturn.reload()
    keyturn.run("c")
    (named,) = keyturn.content["agents"]["c"]["destinations"]
    named["keys"] = {"id": "client_id", "secret": "client_secret"}

    with pytest.raises(Refused, match=r"the keys of files:c get other names"):
        keyturn.reload()
    keyturn.content["connections"]["new"] = file_at(keyturn.folder / "agents")
    named["to"] = "new"  # the same entry under another name
    with pytest.raises(Refused, match=r"the keys of new:c get other names"):
        keyturn.reload()

    assert keyturn.case("c").agent.targets[0].keys == Keys()


# --- all or nothing ---------------------------------------------------------------------------


def test_a_reload_that_is_refused_changes_no_agent(keyturn: Installed) -> None:
    """The last agent's trouble leaves the first one as it was, in the store and in what is in force."""
    command(keyturn, "agents.add", name="zed", targets=[{"to": "files", "path": "zed"}])
    before = keyturn.parts.store.agents()
    keyturn.content["connections"]["new"] = file_at(keyturn.folder / "new")
    keyturn.content["policies"]["quick"] = {"extends": "default", "every": "2h"}
    for last in (
        {"zed": {"destinations": [{"to": "files", "path": "zed2"}]}},
        {"z": {"login": "zed", "destinations": [{"to": "files", "path": "z"}]}},
        {"z": {"destinations": [{"to": "files", "path": "zed"}]}},
    ):
        keyturn.content["agents"] = {
            "a": {"policy": "quick", "destinations": [{"to": "new", "path": "a"}]},
            "b": {"destinations": [{"to": "files", "path": "b"}]},
            "c": {"destinations": [{"to": "files", "path": "c"}]},
            **last,
        }
        with pytest.raises(Refused, match="zed"):
            keyturn.reload()

        assert keyturn.parts.store.agents() == before
        assert set(keyturn.parts.settings.connections) == {"files"}


def test_no_saga_writes_by_a_file_that_is_refused(
    keyturn: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is due while a reload is under way goes by what is in force."""
    held = keyturn.held("b")
    keyturn.content["agents"] = {}
    keyturn.content["connections"]["new"] = file_at(keyturn.folder / "new")
    plan = Reconciling.plan

    def meanwhile(self: Reconciling, **options: Any) -> Any:
        keyturn.parts.administration.rotate("b", ME)
        keyturn.run("b")
        assert "new" not in keyturn.parts.world(keyturn.service.watching, bool).destinations
        return plan(self, **options)

    monkeypatch.setattr(Reconciling, "plan", meanwhile)
    with pytest.raises(Refused, match="2 of 2 agents would disappear"):
        keyturn.reload()

    assert keyturn.held("b") != held


def test_an_agent_that_is_suspended_in_the_middle_stays_so(
    keyturn: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reload that was computed before is computed anew."""
    keyturn.content["agents"]["a"]["owner"] = "team"
    plan, done = Reconciling.plan, []

    def meanwhile(self: Reconciling, **options: Any) -> Any:
        found = plan(self, **options)
        if not done:
            done.append(keyturn.parts.administration.suspend("a", ME))
        return found

    monkeypatch.setattr(Reconciling, "plan", meanwhile)
    assert keyturn.reload()["changed"] == 1

    agent = keyturn.case("a").agent
    assert (agent.state, agent.owner) == (AgentState.SUSPENDED, "team")


def test_a_start_with_too_many_agents_gone_goes_on_with_those_of_the_store(
    keyturn: Installed,
) -> None:
    """The guard stays, and the command that its hint names has a daemon to talk to."""
    keyturn.end()
    keyturn.content["agents"] = {}
    keyturn.begin()
    assert [a.listed for a in keyturn.parts.store.agents()] == [True, True]
    assert keyturn.service.metrics.config_last_reload_successful._value.get() == 0
    (entry, *_) = keyturn.parts.store.audit_entries()
    assert (entry.entry.action, entry.entry.outcome) == ("config.reload", MassChange.code)
    held = keyturn.held("a")
    keyturn.parts.administration.rotate("a", ME)
    keyturn.run("a")
    assert keyturn.held("a") != held

    assert keyturn.reload(allow_mass_change=True)["unmanaged"] == 2


# --- connections and policies -----------------------------------------------------------------


def test_a_reload_keeps_connections_whose_lines_are_the_same(keyturn: Installed) -> None:
    """A wrapped token is good once: only what changed is made anew, and only that is closed."""
    keyturn.content["connections"]["new"] = file_at(keyturn.folder / "new")
    keyturn.reload()
    before = dict(keyturn.parts.destinations)
    keyturn.content["connections"]["new"]["call_deadline"] = "2s"

    keyturn.reload()
    after = dict(keyturn.parts.destinations)
    keyturn.content["agents"] = {}
    keyturn.content["connections"]["files"]["call_deadline"] = "2s"
    with pytest.raises(Refused):
        keyturn.reload()

    assert after["files"] is before["files"]
    assert after["new"] is not before["new"]
    assert before["new"]._lane._closed
    assert dict(keyturn.parts.destinations) == after
    assert not any(one._lane._closed for one in after.values())


def test_the_floor_of_a_grace_holds_for_the_command_line_too(keyturn: Installed) -> None:
    """Rule 19 with the destination's staleness: when an agent is added, and at each reload."""
    token = keyturn.folder / "token"
    token.touch(mode=0o600)
    login = {"method": "token", "token_file": str(token)}
    stale = {"type": "vault", "address": "http://127.0.0.1:1", "auth": login, "call_deadline": "1s"}
    keyturn.content["connections"]["v"] = stale | {"staleness": "1h"}
    keyturn.reload()
    place = [{"to": "v", "path": "c"}]
    with pytest.raises(Refused, match="short of its floor.*staleness of v"):
        command(keyturn, "agents.add", name="c", targets=place)
    keyturn.content["connections"]["v"] = stale
    keyturn.reload()
    command(keyturn, "agents.add", name="c", targets=place)

    keyturn.content["connections"]["v"] = stale | {"staleness": "1h"}
    with pytest.raises(ConfigError, match=r"staleness of v.*used by c of the command line"):
        keyturn.reload()


def test_a_reload_says_what_it_did_not_take_over(keyturn: Installed) -> None:
    """A group that is not there, and what only a restart changes."""
    assert keyturn.reload()["notes"] == []
    keyturn.content["admin"] |= {
        "groups": {"admin": "no-such-group"},
        "socket": str(keyturn.folder / "run" / "other.sock"),
    }
    keyturn.content["log"] = {"level": "warning"}

    assert keyturn.reload()["notes"] == [
        "admin.groups: no group is called no-such-group on this host",
        "admin.socket: restart the daemon for this",
        "log: restart the daemon for this",
    ]
