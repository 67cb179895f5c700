"""Commands about agents and where they read: add, list, show, remove, forget."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from keyturn.cli import complete, options, output, render
from keyturn.cli.reach import ask

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

agents = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Add, list, show and remove agents."
)
destinations = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Decide about a destination that was dropped."
)


@agents.command("add")
def add(
    *,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The new agent's id.")],
    to: Annotated[
        list[str],
        typer.Option(
            "--to",
            metavar="CONNECTION:PATH",
            help="Where it reads; may be repeated.",
            autocompletion=complete.places,
        ),
    ],
    login: Annotated[str, typer.Option(help="What it presents; its id by default.")] = "",
    owner: Annotated[
        str, typer.Option(help="Who answers for it.", autocompletion=complete.owners)
    ] = "",
    policy: Annotated[
        str, typer.Option(help="The policy's name.", autocompletion=complete.policies)
    ] = "default",
    merge: Annotated[
        bool, typer.Option("--merge", help="Keep keys of an entry that are not ours.")
    ] = False,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Take over an entry that has our keys already.")
    ] = False,
    wait: options.Wait = False,
    json: options.Json = False,
    config: options.ConfigOfDaemon = options.CONFIG,
    socket: options.Socket = options.SOCKET,
) -> None:
    """Add an agent; it gets its first secret at once.

    `keyturn agents add hello --to vault-eu:hello --wait`
    """
    args: dict[str, Any] = {"name": name, "policy": policy, "wait": wait}
    args |= {key: value for key, value in (("login", login), ("owner", owner)) if value}
    args["targets"] = [options.target(one, merge=merge, adopt=adopt) for one in to]
    shown = output.progress(as_json=json) if wait else None
    result = ask("agents.add", args, socket=socket, config=config, on_progress=shown)
    output.show(result, as_json=json, people=lambda one: render.rotations([one]))
    output.end_with(output.code_of([result]))


@agents.command("list")
def list_agents(
    json: options.Json = False,
    config: options.ConfigOfDaemon = options.CONFIG,
    socket: options.Socket = options.SOCKET,
) -> None:
    """List the agents, their owners and where they read."""
    output.show(
        ask("agents.list", {}, socket=socket, config=config), as_json=json, people=render.agents
    )


@agents.command("show")
def show(
    agent: options.AgentName,
    json: options.Json = False,
    config: options.ConfigOfDaemon = options.CONFIG,
    socket: options.Socket = options.SOCKET,
) -> None:
    """Show one agent's definition."""
    result = ask("agents.show", {"agent": agent}, socket=socket, config=config)
    output.show(result, as_json=json, people=lambda one: render.agents([one]))


@agents.command("remove")
def remove(
    agent: options.AgentName,
    yes: Yes = False,
    json: options.Json = False,
    config: options.ConfigOfDaemon = options.CONFIG,
    socket: options.Socket = options.SOCKET,
) -> None:
    """End an agent for ever: everything of it is revoked.

    One that stands in the configuration is refused (exit 4), because a reload would bring it back:
    take it out of the file and `keyturn reload` first. To cut it now: `revoke`.
    """
    _be_sure(yes, f"revokes everything of {render.safe(agent)} for ever")
    result = ask("agents.remove", {"agent": agent}, socket=socket, config=config)
    output.show(result, as_json=json, people=render.changed)


@destinations.command("forget")
def forget(
    *,
    agent: options.AgentName,
    destination: Annotated[
        str,
        typer.Argument(
            metavar="DESTINATION",
            help="As `status` shows it: CONNECTION:PATH.",
            autocompletion=complete.destinations,
        ),
    ],
    yes: Yes = False,
    json: options.Json = False,
    config: options.ConfigOfDaemon = options.CONFIG,
    socket: options.Socket = options.SOCKET,
) -> None:
    """Look no more at a destination that was taken from an agent.

    Old versions are kept for as long as it shows one, or cannot be read. Who still reads there is
    refused once their grace has passed.
    """
    place = render.safe(destination)
    _be_sure(yes, f"ends, after its grace, the access of whoever still reads at {place}")
    args = {"agent": agent, "destination": destination}
    result = ask("destinations.forget", args, socket=socket, config=config)
    output.show(result, as_json=json, people=render.changed)


def _be_sure(yes: bool, what: str) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter(f"this {what}: add --yes")
    typer.confirm(f"This {what}. Go on?", abort=True)
