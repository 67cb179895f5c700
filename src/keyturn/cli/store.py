"""Commands about the store itself: what it is, its schema, copies of it, and a restore."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from keyturn.cli import complete, options, output, render_store
from keyturn.cli.client import DaemonDown
from keyturn.cli.reach import ask, late
from keyturn.errors import Refused

store = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Look at the store, upgrade it, copy it and restore it.",
)
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]


def _keeping(name: str) -> Any:
    return late("keyturn.daemon.keeping", name)


@store.command("status")
def status(
    json: options.Json = False,
    config: options.ConfigOfDaemon = options.CONFIG,
    socket: options.Socket = options.SOCKET,
) -> None:
    """Say what the store is.

    Schema, size, ledger, last backup, and what is in quarantine (then exit 75).
    """
    try:
        found = ask("store.status", {}, socket=socket, config=config)
    except DaemonDown:
        found = _keeping("status")(config)
    output.show(found, as_json=json, people=render_store.status)
    output.end_with(output.INCOMPLETE if found["quarantine"] else 0)


@store.command("upgrade")
def upgrade(
    contract: Annotated[
        bool,
        typer.Option(
            "--contract", help="Also take away what older releases need; refused while one runs."
        ),
    ] = False,
    dry_run: DryRun = False,
    json: options.Json = False,
    config: options.Config = options.CONFIG,
) -> None:
    """Bring the schema up to this release.

    It only adds, so that the release before goes on working; `keyturn run` does as much by itself on
    SQLite. PostgreSQL: with the login that owns the tables, in `KEYTURN_STORE__URL`.
    """
    found = _keeping("upgrade")(config, contract=contract, dry_run=dry_run)
    output.show(found, as_json=json, people=render_store.upgraded)


@store.command("backup")
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file, on another disk.")],
    json: options.Json = False,
    config: options.Config = options.CONFIG,
) -> None:
    """Copy the store into a new file.

    Also while the daemon runs. The copy is of one moment, private (0600), checked and synced, and never half-written under its
    name. Ledger and revoked.d are not in it: copy those folders all the time, a restore needs them
    newer than the backup.
    """
    found = _keeping("backup")(config, file)
    output.show(found, as_json=json, people=render_store.backed_up)


@store.command("restore")
def restore(
    *,
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="What `keyturn store backup` made.")
    ] = None,
    adopt: Annotated[
        bool,
        typer.Option(
            "--adopt",
            help="No file: the store was put back already, by pg_restore, a failover or by hand.",
        ),
    ] = False,
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Let go without asking.")] = False,
    json: options.Json = False,
    config: options.Config = options.CONFIG,
) -> None:
    """Put a backup back, with all that happened since.

    The daemon must be down. Verifiers answer 503 until ledger and revoked.d are merged, every
    destination was read, and you have seen what differs. What the ledger does not know stays at 503
    until `keyturn store release`.
    """
    if (file is None) is not adopt:
        raise Refused("name a FILE, or say --adopt", hint="see `keyturn store restore --help`")

    def agreed(report: dict[str, Any]) -> bool:
        if not json:
            typer.echo(render_store.differences(report))
        if yes:
            return True
        if not sys.stdin.isatty():
            print("note: not let go; `keyturn store release --all` does that", file=sys.stderr)  # noqa: T201
            return False
        return typer.confirm("Let go?", err=True)

    found = _keeping("restore")(config, file, dry_run=dry_run, ask=agreed)
    if json:
        output.show(found, as_json=True, people=render_store.differences)
    elif dry_run:
        typer.echo(render_store.differences(found))
    else:
        typer.echo(render_store.restored(found))
    undone = not found["released"] or found["undecided"]
    output.end_with(output.INCOMPLETE if undone and not dry_run else 0)


@store.command("release")
def release(
    *,
    agents: Annotated[
        list[str] | None,
        typer.Argument(metavar="AGENT...", help="Whom.", autocompletion=complete.agents),
    ] = None,
    everybody: Annotated[
        bool, typer.Option("--all", help="Everybody who is in quarantine.")
    ] = False,
    reissue: Annotated[
        bool,
        typer.Option(
            "--reissue", help="Revoke all that the store has of them, and give them a new secret."
        ),
    ] = False,
    json: options.Json = False,
    config: options.ConfigOfDaemon = options.CONFIG,
    socket: options.Socket = options.SOCKET,
) -> None:
    """Decide about agents that a restore left at 503.

    What the store has of them is accepted again. A version that was accepted after the backup, and that no ledger knows, is refused then: where an
    agent may hold one, say --reissue.
    """
    names = list(agents or ())
    if bool(names) is everybody:
        raise Refused("name the agents, or say --all", hint="`keyturn store status` lists them")
    try:
        args = {"agents": names, "reissue": reissue}
        found = ask("store.release", args, socket=socket, config=config)
    except DaemonDown:
        peer = late("keyturn.daemon.peer", "local_peer")(os.environ.get("SUDO_USER", ""))
        found = _keeping("release")(config, names, reissue=reissue, actor=peer.actor)
    output.show(found, as_json=json, people=render_store.released)
