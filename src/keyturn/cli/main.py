"""The command line: what there is, and the one place where errors become text and exit codes.

0 done    1 error    2 usage    3 partly done    4 refused    69 unavailable
75 waiting or incomplete    77 not permitted    78 configuration
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from keyturn import __version__
from keyturn.cli import act, complete, files, init, look, options, output, render, report
from keyturn.cli.agents import agents, destinations
from keyturn.cli.health import health
from keyturn.cli.keys import make_key
from keyturn.cli.notify import notify
from keyturn.cli.reach import late
from keyturn.cli.store import store
from keyturn.cli.verifiers import verifiers
from keyturn.daemon.masking import render_exception, summary
from keyturn.errors import KeyturnError

# Rich help costs 80 ms, and the pretty exceptions print locals.
app = typer.Typer(
    name="keyturn",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("status")(look.status)
app.add_typer(agents, name="agents")
app.add_typer(destinations, name="destinations")
app.command("rotate")(act.rotate)
app.add_typer(act.rotation, name="rotation")
app.command("suspend")(act.suspend)
app.command("resume")(act.resume)
app.command("revoke")(act.revoke)
app.command("verify")(look.verify)
app.command("identify")(look.identify)
app.command("audit")(look.audit)
app.command("clock")(look.clock)
app.command("verifiers")(verifiers)
app.command("metrics")(look.metrics)
app.command("health")(health)
app.add_typer(store, name="store")
app.command("report")(report.report)
app.command("init")(init.init)
app.command("check")(files.check)
app.command("make-key")(make_key)
app.command("reload")(files.reload)
app.add_typer(files.config_, name="config")
app.add_typer(notify, name="notify")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Errors are on stderr, without a traceback."""
    command = typer.main.get_command(app)
    try:
        command.main(args=None if argv is None else list(argv), prog_name="keyturn")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyturnError as error:
        return _report(str(error), error.hint, error)
    except Exception as error:  # noqa: BLE001  # the last place where a text for people can be made
        return _report(f"internal error: {summary(error)}", _INTERNAL_HINT, error)
    return 0


_INTERNAL_HINT = "this is a bug in Keyturn; `keyturn --debug …` shows where"


def _report(message: str, hint: str, error: Exception) -> int:
    for line in message.splitlines():  # a configuration can have several faults
        print(f"error: {render.safe(line)}", file=sys.stderr)  # noqa: T201
    if hint:
        print(f"hint: {render.safe(hint)}", file=sys.stderr)  # noqa: T201
    if _debug_wanted():
        print(render_exception(error), file=sys.stderr)  # noqa: T201
    return error.exit_code if isinstance(error, KeyturnError) else 1


def _debug_wanted() -> bool:
    return bool(os.environ.get("KEYTURN_DEBUG"))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"keyturn {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
    version: Annotated[  # noqa: ARG001  # eager: its callback does the work
        bool,
        typer.Option(
            "--version", "-V", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Rotate the credentials of agents and services; no agent notices."""
    if debug:
        os.environ["KEYTURN_DEBUG"] = "1"


@app.command()
def run(
    config: options.Config = options.CONFIG,
    socket: Annotated[
        Path | None,
        typer.Option(
            "--socket", envvar="KEYTURN_SOCKET", help="Instead of `admin.socket` of the file."
        ),
    ] = None,
    no_standby: Annotated[
        bool, typer.Option("--no-standby", help="End at once if another daemon has the store.")
    ] = False,
) -> None:
    """Run the daemon.

    SIGTERM ends it, SIGHUP reloads the configuration, SIGUSR1 applies the revocations file now.
    """
    serve = late("keyturn.daemon.service", "run")
    output.end_with(serve(config, socket=socket, standby=not no_standby))


@app.command()
def verifier(config: options.Config = options.CONFIG) -> None:
    """Run the verifier's HTTP service.

    It needs `store` and `verifier` of the configuration, and no login to any destination. SIGTERM
    ends it; certificates and tokens are read again when they change.
    """
    output.end_with(late("keyturn.daemon.verifier_service", "run")(config))


@app.command()
def demo(
    dest: Annotated[
        str,
        typer.Option(
            help="Where the demo publishes: file, vault, aws, azure or all.",
            autocompletion=complete.demos,
        ),
    ] = "file",
) -> None:
    """Show it all on this machine, in a minute.

    Agents authenticate all the time while their secrets rotate every few seconds. Exit 1 if one
    authentication was refused that should not have been.
    """
    output.end_with(late("keyturn.cli.demo", "demo")(dest))


@app.command("policy")
def policy_(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="TYPE", help="The type of destination.", autocompletion=complete.types
        ),
    ],
    connection: Annotated[
        str,
        typer.Option(
            "--connection",
            help="Only this one, where there are several.",
            autocompletion=complete.connections,
        ),
    ] = "",
    config: options.Config = options.CONFIG,
) -> None:
    """Print the least rights for a type of destination.

    `keyturn policy vault -c k.yaml | vault policy write keyturn -`
    """
    found = late("keyturn.daemon.checks", "least_policy")(config, kind, connection)
    for note in found["notes"]:
        typer.echo(f"note: {render.safe(note)}", err=True)
    typer.echo(found["text"])
