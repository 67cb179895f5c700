"""The documents keep up with the product: commands, options and links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from keyturn import advice, incidents
from keyturn.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def commands(group: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every command that does something, with its full name."""
    inner = getattr(group, "commands", None)
    if inner is None:
        yield path, group
        return
    for name, command in inner.items():
        yield from commands(command, f"{path} {name}".strip())


ALL = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("name", ALL)
def test_every_command_and_option_stands_on_the_page(name: str) -> None:
    """The reference names each command with each of its options."""
    page = (ROOT / "docs" / "reference" / "commands.md").read_text()
    section = re.search(
        rf"^## `keyturn {re.escape(name)}\b.*?(?=^## |\Z)", page, re.DOTALL | re.MULTILINE
    )

    assert section is not None, f"no section about {name}"
    text = " ".join(section[0].split())
    assert " ".join((ALL[name].help or "").split()) in text, name
    for param in ALL[name].params:
        if param.param_type_name == "option" and "--help" not in param.opts:
            options = ", ".join(f"`{one}`" for one in param.opts)
            assert f"| {options} | {' '.join(param.help.split())} |" in text, name


NAMES = {
    "agent", "agents", "connection", "destination", "leave_out", "login", "owner", "policy",
    "take_over", "to", "version",
}  # fmt: skip
ELSEWHERE = {("agents add", "login"), ("init", "agent")}  # these are new


@pytest.mark.parametrize("name", ALL)
def test_whatever_names_something_completes(name: str) -> None:
    """TAB offers what there is wherever an agent, a connection, a policy … is typed."""
    for param in ALL[name].params:
        if param.name in NAMES and not getattr(param, "is_flag", False):
            completes = param._custom_shell_complete is not None
            assert completes != ((name, param.name) in ELSEWHERE), param.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_resolve(page: Path) -> None:
    """No relative link leads nowhere."""
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_what_stops_a_rotation_stands_on_the_page() -> None:
    """The page of states says the same of every code as `keyturn status` does."""
    page = (ROOT / "docs" / "reference" / "states.md").read_text()
    section = page.partition("## What stops a rotation")[2]
    rows = re.findall(r"^\| `(.+?)` \| (.+?) \| (.+?) \| `(.+?)` \|$", section, re.MULTILINE)
    assert {code: advice.Advice(*rest) for code, *rest in rows} == advice.TABLE


def test_every_incident_stands_on_the_page() -> None:
    """The page of incidents has the same table as the code."""
    page = (ROOT / "docs" / "reference" / "incidents.md").read_text()
    rows = re.findall(r"^\| `(.+?)` \| (.+?) \| `(.+?)` \|$", page, re.MULTILINE)
    assert {code: incidents.Incident(*rest) for code, *rest in rows} == incidents.TABLE


def test_the_commands_of_the_readme_exist() -> None:
    """What the README tells people to type is there."""
    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()

    for name in re.findall(r"^make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), name
    for line in re.findall(r"(?<![/=])keyturn ((?:[a-z]+ ?){1,2})", text):
        words = line.split()
        assert any(command.split()[0] == words[0] for command in ALL) or words[0] in {
            "gives",
            "reads",
        }
