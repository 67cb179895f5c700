"""Each agent belongs to one file or to the command line; a rehearsal says what a reload would do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import yaml

from keyturn.core.model import ManagedBy
from keyturn.daemon.commands import Commands
from keyturn.daemon.peer import local_peer
from keyturn.errors import ConfigError, Refused
from support.installed import Installed


class Split(Installed):
    """An installation whose agents stand in two files beside the main one."""

    def __init__(self, folder: Path) -> None:
        self.teams: dict[str, list[str] | None] = {"one": ["a", "b", "c"], "two": ["d"]}
        super().__init__(folder, "m")

    def path(self, team: str) -> Path:
        """Return a team's file."""
        return self.folder / "agents.d" / f"{team}.yaml"

    def write(self) -> None:
        """Write the main file and one for each team; a team of None has none."""
        self.content["include"] = "agents.d/*.yaml"
        self.path("x").parent.mkdir(exist_ok=True)
        for team, names in self.teams.items():
            if names is None:
                self.path(team).unlink(missing_ok=True)
                continue
            agents = {name: {"destinations": [{"to": "files", "path": name}]} for name in names}
            self.path(team).write_text(yaml.safe_dump({"agents": agents}))
        super().write()

    def command(self, verb: str, **args: Any) -> Any:
        """Ask as somebody at the socket does."""
        function = Commands(lambda: self.parts, self.service).table()[verb].function
        return function(args, local_peer(), lambda _event: None)


@pytest.fixture
def keyturn(tmp_path: Path) -> Iterator[Split]:
    """Give it."""
    one = Split(tmp_path)
    yield one
    one.end()


def rows(found: dict[str, Any]) -> dict[str, str]:
    """Return what would become of whom."""
    return {row["agent"]: row["change"] for row in found["changes"]}


def test_every_agent_says_which_file_it_belongs_to(keyturn: Split) -> None:
    """The store, `agents show` and `status` name the same file; one of a command has none."""
    keyturn.command("agents.add", name="x", targets=[{"to": "files", "path": "x"}])
    files = {row["agent"]: row["file"] for row in keyturn.command("agents.list")}
    assert files["m"] == str(keyturn.config)
    assert files["a"] == str(keyturn.path("one"))
    assert files["x"] is None
    status = keyturn.command("status", agent="d")[0]
    assert (status["managed_by"], status["file"]) == ("file", str(keyturn.path("two")))


def test_an_agent_that_goes_to_another_file_is_handed_over(keyturn: Split) -> None:
    """In one reload it is neither new nor gone: same credential, nothing rotated, and in the audit."""
    keyturn.run("b")
    before, held = keyturn.case("b"), keyturn.held("b")
    keyturn.teams = {"one": ["a", "c"], "two": ["d", "b"]}

    keyturn.write()
    rehearsed = keyturn.command("reload.rehearsed")
    assert rows(rehearsed) == {"b": "handed-over"}
    assert rehearsed["changes"][0] | {"line": 0} == {
        "agent": "b", "change": "handed-over", "what": ["file"], "line": 0,
        "file": str(keyturn.path("two")), "was_in": str(keyturn.path("one")),
    }  # fmt: skip
    done = keyturn.reload()

    assert (done["handed_over"], done["added"], done["unmanaged"]) == (1, 0, 0)
    after = keyturn.case("b")
    assert (after.agent.file, after.credential) == (str(keyturn.path("two")), before.credential)
    assert keyturn.held("b") == held
    actions = [one.entry.action for one in keyturn.parts.store.audit_entries(agent="b", limit=5)]
    assert "agent.handed-over" in actions


def test_an_agent_in_two_files_is_refused_with_both_places(keyturn: Split) -> None:
    """Both lines are named, and nothing of either file is taken over."""
    keyturn.teams["two"] = ["d", "a", "new"]
    with pytest.raises(ConfigError) as refused:
        keyturn.reload()
    one, two = keyturn.path("one"), keyturn.path("two")
    said = f"{two}:2: agents.a: expected this agent once; it is also at {one}:2"
    assert str(refused.value) == said
    assert "new" not in {agent.name for agent in keyturn.parts.store.agents()}


# --- agents that disappear ---------------------------------------------------------------------


def test_a_file_that_is_taken_away_leaves_its_agents_unmanaged(keyturn: Split) -> None:
    """They stay accepted, and still say where they stood."""
    keyturn.run("d")
    held = keyturn.held("d")
    keyturn.teams["two"] = None
    assert keyturn.reload()["unmanaged"] == 1
    agent = keyturn.case("d").agent
    assert (agent.shown_state, agent.file) == ("unmanaged", str(keyturn.path("two")))
    assert keyturn.accepts(held)


def test_more_than_half_of_a_file_that_is_still_there_is_a_mass_change(keyturn: Split) -> None:
    """Among many agents a file that was cut short is less than a tenth, and refused all the same."""
    keyturn.teams["many"] = [f"n{number}" for number in range(40)]
    keyturn.reload()
    keyturn.teams["one"] = ["a"]

    with pytest.raises(Refused, match=r"2 of the 3 agents of .*one\.yaml would disappear"):
        keyturn.reload()
    assert keyturn.command("reload.rehearsed")["refused"]["exit_code"] == 4
    assert keyturn.case("b").agent.listed

    keyturn.teams["one"] = ["a", "b"]
    assert keyturn.reload()["unmanaged"] == 1
    keyturn.teams["one"] = None  # whoever takes the file away means it
    assert keyturn.reload()["unmanaged"] == 2


def test_an_include_that_matches_nothing_any_more_is_a_mass_change(keyturn: Split) -> None:
    """A folder that is not mounted takes nobody away, however few stood there."""
    keyturn.content["agents"] |= {
        f"n{number}": {"destinations": [{"to": "files", "path": f"n{number}"}]}
        for number in range(60)
    }
    keyturn.reload()
    keyturn.teams = {"one": None, "two": None}

    with pytest.raises(Refused, match="include matches no file any more: 4 agents"):
        keyturn.reload()
    assert keyturn.reload(allow_mass_change=True)["unmanaged"] == 4


# --- the command line's ------------------------------------------------------------------------


def test_an_agent_of_the_command_line_goes_to_a_file_when_it_is_said(keyturn: Split) -> None:
    """A file that names it is refused with its lines; one command hands it over, and keeps its secret."""
    for name in ("x", "y"):
        keyturn.command("agents.add", name=name, targets=[{"to": "files", "path": name}])
    keyturn.run("x")
    held, before = keyturn.held("x"), keyturn.case("x")
    keyturn.teams["two"] = ["d", "x", "y"]

    with pytest.raises(Refused) as refused:
        keyturn.reload()
    assert str(refused.value).count("belongs to the command line") == 2
    assert "--take-over x --take-over y" in refused.value.hint
    with pytest.raises(Refused, match="y belongs"):
        keyturn.command("reload", take_over=["x"])
    assert keyturn.case("x").agent == before.agent
    rehearsed = keyturn.command("reload.rehearsed", take_over=["x", "y"])
    assert rows(rehearsed) == {"x": "changed", "y": "changed"}
    assert rehearsed["refused"] is None

    keyturn.command("reload", take_over=["x", "y"])

    agent = keyturn.case("x").agent
    assert (agent.managed_by, agent.file) == (ManagedBy.FILE, str(keyturn.path("two")))
    assert (agent.uid, keyturn.held("x")) == (before.agent.uid, held)
    assert keyturn.accepts(held)
    with pytest.raises(Refused, match="no file names z"):
        keyturn.command("reload", take_over=["z"])


def test_a_daemon_starts_where_a_file_names_what_a_command_added(keyturn: Split) -> None:
    """What a reload refuses must not keep a start from rotating and revoking."""
    keyturn.command("agents.add", name="x", targets=[{"to": "files", "path": "x"}])
    keyturn.teams["two"] = ["d", "x"]
    keyturn.write()
    keyturn.end()
    keyturn.begin()
    assert keyturn.case("x").agent.managed_by is ManagedBy.COMMAND
    assert keyturn.service.metrics.config_last_reload_successful._value.get() == 0


# --- the rehearsal -----------------------------------------------------------------------------


def test_a_rehearsal_says_what_would_be_and_changes_nothing(keyturn: Split) -> None:
    """Every kind of change with its place; the same reload then does just that."""
    keyturn.teams = {"one": ["a", "b", "new"], "two": ["d", "m"]}
    del keyturn.content["agents"]["m"]
    keyturn.content["policies"]["other"] = {"extends": "default"}
    keyturn.write()
    text = keyturn.path("two").read_text().replace("  d:\n", "  d:\n    policy: other\n")
    keyturn.path("two").write_text(text)
    before = keyturn.parts.store.agents(), keyturn.parts.store.audit_entries(agent=None, limit=99)

    found = keyturn.command("reload.rehearsed")

    assert rows(found) == {
        "new": "added", "d": "changed", "m": "handed-over", "c": "unmanaged"
    }  # fmt: skip
    assert found["refused"] is None
    changed = next(row for row in found["changes"] if row["agent"] == "d")
    assert (changed["what"], changed["line"]) == (["policy"], 2)
    now = keyturn.parts.store.agents(), keyturn.parts.store.audit_entries(agent=None, limit=99)
    assert now == before
    assert "other" not in keyturn.parts.settings.policies
    done = keyturn.service.reload(allow_mass_change=False, actor="me")
    assert {key: done[key] for key in ("added", "changed", "handed_over", "unmanaged")} == {
        key: found[key] for key in ("added", "changed", "handed_over", "unmanaged")
    }


def test_a_rehearsal_shows_what_the_store_would_refuse(keyturn: Split) -> None:
    """A login that another agent has is known to the store alone."""
    keyturn.command("agents.add", name="x", login="taken", targets=[{"to": "files", "path": "x"}])
    keyturn.write()
    text = keyturn.path("two").read_text().replace("  d:\n", "  d:\n    login: taken\n")
    keyturn.path("two").write_text(text)

    found = keyturn.command("reload.rehearsed")

    assert "taken" in found["refused"]["message"]
    assert rows(found) == {"d": "changed"}


def test_a_store_of_the_release_before_learns_the_files_at_the_next_start(keyturn: Split) -> None:
    """Its agents have no file yet; none of them counts as new, and nothing is rotated."""
    keyturn.run("a")
    held, before = keyturn.held("a"), keyturn.case("a")
    with keyturn.parts.store.engine.connect() as connection, connection.begin():
        connection.execute(sa.text("UPDATE agents SET file = NULL"))  # as its migration leaves it
    keyturn.end()

    keyturn.begin()

    after = keyturn.case("a")
    assert after.agent.file == str(keyturn.path("one"))
    assert (after.versions, keyturn.held("a")) == (before.versions, held)
    assert keyturn.accepts(held)
