"""Commands that change what is accepted: rotate, suspend, resume, revoke, rotation."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated, Any

import typer

from keyturn.cli import complete, options, output, render, waves
from keyturn.cli.reach import ask

rotation = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Decide about a rotation that stalled."
)


def rotate(
    *,
    agents: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[AGENT]...", help="The agents' ids.", autocompletion=complete.agents
        ),
    ] = None,
    owner: Annotated[
        str,
        typer.Option(help="Every agent of this owner's.", autocompletion=complete.owners),
    ] = "",
    wave: Annotated[
        str,
        typer.Option(
            metavar="SIZES",
            help="In groups such as 3,30,rest; after one that fails none follows. Needs --wait.",
        ),
    ] = "",
    pause: Annotated[str, typer.Option(metavar="TIME", help="Between two waves, such as 1h.")] = "",
    grace: Annotated[
        str, typer.Option(help="How long the old version is still accepted, such as 15m.")
    ] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Allow a grace below the floor of the policy.")
    ] = False,
    wait: options.Wait = False,
    request_id: options.RequestId = "",
    json: options.Json = False,
    config: options.ConfigOfDaemon = options.CONFIG,
    socket: options.Socket = options.SOCKET,
) -> None:
    """Give agents a new secret now, and the old one its grace.

    `keyturn rotate billing-bot --wait` publishes first and cuts later. To cut first: `revoke`.
    `keyturn rotate --owner team-billing --wave 3,30,rest --pause 1h --wait` goes by growing groups.
    """
    if bool(agents) == bool(owner):
        raise typer.BadParameter("name agents or an --owner, one of them")
    if (wave and not wait) or (pause and not wave):
        raise typer.BadParameter("--wave goes with --wait, and --pause with --wave")
    names = agents or waves.owned(ask("agents.list", {}, socket=socket, config=config), owner)
    one_id = request_id or uuid.uuid4().hex
    given = {"grace_seconds": options.duration(grace).total_seconds()} if grace else {}
    shown = output.progress(as_json=json) if wait else None
    command = "rotate.forced" if force else "rotate"  # the second one needs the role admin

    def rotated(number: int, part: Sequence[str]) -> list[dict[str, Any]]:
        named = f"{one_id}.{number}" if wave else one_id
        args = {"agents": list(part), "wait": wait, "request_id": named} | given
        result = ask(command, args, socket=socket, config=config, on_progress=shown)
        return list(result["results"])

    parts = waves.split(names, wave) if wave else [names]
    between = options.duration(pause) if pause else timedelta(0)
    results = waves.rotate(parts, rotated, pause=between, told=bool(wave) and not json)
    output.show({"results": results}, as_json=json, people=lambda d: render.rotations(d["results"]))
    output.end_with(output.code_of(results))


def suspend(
    agent: options.AgentName,
    reason: options.Reason = "",
    json: options.Json = False,
    config: options.ConfigOfDaemon = options.CONFIG,
    socket: options.Socket = options.SOCKET,
) -> None:
    """Refuse everything of an agent until it is resumed."""
    args = {"agent": agent, "reason": reason}
    result = ask("suspend", args, socket=socket, config=config)
    output.show(result, as_json=json, people=render.changed)


def resume(
    agent: options.AgentName,
    destination: Annotated[
        str,
        typer.Option(
            metavar="CONNECTION",
            help="Publish again where `revoke --except` left it out.",
            autocompletion=complete.connections,
        ),
    ] = "",
    json: options.Json = False,
    config: options.ConfigOfDaemon = options.CONFIG,
    socket: options.Socket = options.SOCKET,
) -> None:
    """Accept a suspended agent again.

    What was revoked stays revoked. With --destination it ends no suspension: it lets the agent's
    next secret go to that connection again, at once.
    """
    args = {"agent": agent} | ({"destination": destination} if destination else {})
    result = ask("resume", args, socket=socket, config=config)
    output.show(result, as_json=json, people=render.changed)


def revoke(
    *,
    agent: Annotated[
        str,
        typer.Argument(
            metavar="AGENT", help="Everything of this agent.", autocompletion=complete.agents
        ),
    ] = "",
    version: Annotated[
        str,
        typer.Option("--version", help="Only this version.", autocompletion=complete.versions),
    ] = "",
    reissue: Annotated[
        bool, typer.Option("--reissue", help="Give the agent a new secret at once.")
    ] = False,
    leave_out: Annotated[
        list[str] | None,
        typer.Option(
            "--except",
            metavar="CONNECTION",
            help="Publish no new secret there: where it leaked. Until `resume --destination`.",
            autocompletion=complete.connections,
        ),
    ] = None,
    reason: options.Reason = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what it would cut.")
    ] = False,
    wait: options.Wait = False,
    request_id: options.RequestId = "",
    json: options.Json = False,
    config: options.ConfigOfDaemon = options.CONFIG,
    socket: options.Socket = options.SOCKET,
) -> None:
    """Refuse secrets now and for ever.

    Prints how long it took until every verifier refused them. AGENT without --reissue is suspended
    too: nothing is minted until `resume`. --version cuts that one alone: its agent stays enabled, so
    a destination that shows it gets a new secret at once (suspend the agent first to prevent that).
    Works with the daemon down, for root and the daemon's user.

    `keyturn revoke billing-bot --reissue --reason INC-4711 --wait`
    """
    if bool(agent) == bool(version):
        raise typer.BadParameter("name either an AGENT or a --version, one of them")
    args: dict[str, Any] = {"agent": agent} if agent else {"version": version}
    args |= {"reissue": reissue, "reason": reason, "dry_run": dry_run, "wait": wait}
    if leave_out and not (agent and reissue):
        raise typer.BadParameter("--except goes with AGENT and --reissue")
    args |= {"except": sorted(leave_out)} if leave_out else {}
    args["request_id"] = request_id or uuid.uuid4().hex
    shown = _CutFirst(as_json=json)
    result = ask("revoke", args, socket=socket, config=config, on_progress=shown)
    output.show(result, as_json=json, people=shown.rest)
    output.end_with(output.code_of_revocation(result))


class _CutFirst:
    """Prints what was cut as soon as it is, before the successor is waited for."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._told = False

    def __call__(self, event: dict[str, Any]) -> None:
        """Take an event of the daemon's."""
        if self._as_json:
            return
        if event.get("event") == "revoked":
            self._told = True
            typer.echo(render.cut(event["result"]))
        else:
            output.tell(event)

    def rest(self, result: dict[str, Any]) -> str:
        """Return what was not printed yet."""
        return render.after_cut(result) if self._told else render.revocation(result)


@rotation.command("retry")
def retry(
    agents: Annotated[
        list[str] | None,
        typer.Argument(metavar="[AGENT]...", help="The ids.", autocompletion=complete.agents),
    ] = None,
    *,
    every: Annotated[
        bool, typer.Option("--all", help="Every rotation that waits or is stalled.")
    ] = False,
    destination: Annotated[
        str,
        typer.Option(
            metavar="CONNECTION",
            help="Of these, only those that stopped there.",
            autocompletion=complete.connections,
        ),
    ] = "",
    wait: options.Wait = False,
    json: options.Json = False,
    config: options.ConfigOfDaemon = options.CONFIG,
    socket: options.Socket = options.SOCKET,
) -> None:
    """Try stalled or waiting rotations again, now.

    `keyturn rotation retry --all --destination vault-eu` after that one was mended.
    """
    if bool(agents) == every or (destination and not every):
        raise typer.BadParameter("name agents, or say --all (perhaps with --destination)")
    shown = output.progress(as_json=json) if wait else None
    args = {"agents": agents or [], "destination": destination, "wait": wait}
    result = ask("rotation.retry", args, socket=socket, config=config, on_progress=shown)
    output.show(result, as_json=json, people=lambda data: render.retried(data["results"]))
    output.end_with(output.code_of(result["results"]))


@rotation.command("abandon")
def abandon(
    agent: options.AgentName,
    json: options.Json = False,
    config: options.ConfigOfDaemon = options.CONFIG,
    socket: options.Socket = options.SOCKET,
) -> None:
    """Give a rotation up.

    The current version stays; a new one that somebody may have read stays accepted until it is
    shown nowhere any more and its grace has passed.
    """
    result = ask("rotation.abandon", {"agent": agent}, socket=socket, config=config)
    output.show(result, as_json=json, people=render.changed)
