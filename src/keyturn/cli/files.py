"""Commands about the configuration's files: check, reload, config schema."""

from __future__ import annotations

import enum
import json as json_
from typing import Annotated, Any

import typer

from keyturn.cli import complete, options, output, render, render_files
from keyturn.cli.reach import ask, late
from keyturn.errors import ConfigError

config_ = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="What a configuration may hold."
)


class Format(enum.StrEnum):
    """How the problems of a configuration are printed."""

    TEXT = "text"
    JSON = "json"
    GITHUB = "github"
    GITLAB = "gitlab"


def check(
    *,
    config: options.Config = options.CONFIG,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe",
            help="Also log in to the destinations, look at each entry and ping the webhooks;"
            " changes nothing.",
        ),
    ] = False,
    pull_request: Annotated[
        bool,
        typer.Option(
            "--pull-request",
            help="For a checkout: look at nothing of this host, nor at who may write the files.",
        ),
    ] = False,
    form: Annotated[
        Format,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="text; json: file, line, column, key, code and message of each problem; github:"
            " workflow commands; gitlab: a code quality report.",
        ),
    ] = Format.TEXT,
    json: options.Json = False,
) -> None:
    """Check a configuration.

    Offline and without credentials; every problem of every file is named with its line, exit 78 if it
    cannot be used. As root it looks with the eyes of the user to whom the store belongs.
    """
    if probe and pull_request:
        raise typer.BadParameter("--probe asks the destinations; a --pull-request must not")
    form = Format.JSON if json else form
    try:
        report = late("keyturn.daemon.checks", "check")(
            config, probe=probe, in_checkout=pull_request
        )
    except ConfigError as error:
        if form is Format.TEXT:
            raise
        report = render_files.failed(error, config)
    people = {Format.GITHUB: render_files.github, Format.GITLAB: render_files.gitlab}
    output.show(report, as_json=form is Format.JSON, people=people.get(form, render.checks))
    output.end_with(78 if report.get("problems") else 0 if report["ok"] else 1)


def reload(
    *,
    allow_mass_change: Annotated[
        bool,
        typer.Option(
            "--allow-mass-change", help="Even if more disappears than one edit takes out."
        ),
    ] = False,
    take_over: Annotated[
        list[str] | None,
        typer.Option(
            "--take-over",
            metavar="AGENT",
            help="Give this agent of the command line to the file that names it.",
            autocompletion=complete.agents,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only show what would become of whom; exit 4 if it were refused."
        ),
    ] = False,
    json: options.Json = False,
    config: options.ConfigOfDaemon = options.CONFIG,
    socket: options.Socket = options.SOCKET,
) -> None:
    """Read the configuration again.

    With an error in it the old one stays in force, and no agent is changed.
    """
    args: dict[str, Any] = {"allow_mass_change": allow_mass_change}
    args |= {"take_over": take_over} if take_over else {}
    if not dry_run:
        result = ask("reload", args, socket=socket, config=config)
        output.show(result, as_json=json, people=render_files.reloaded)
        return
    result = ask("reload.rehearsed", args, socket=socket, config=config)
    output.show(result, as_json=json, people=render_files.rehearsed)
    output.end_with(result["refused"]["exit_code"] if result["refused"] else 0)


@config_.command("schema")
def schema(
    agents: Annotated[
        bool, typer.Option("--agents", help="Of an included file, which holds agents only.")
    ] = False,
) -> None:
    """Print the JSON schema of the configuration, for editors.

    `keyturn config schema > keyturn.schema.json`, and as the first line of the file:
    `# yaml-language-server: $schema=keyturn.schema.json`
    """
    found = late("keyturn.config.schema", "schema")(agents_only=agents)
    typer.echo(json_.dumps(found, indent=2))
