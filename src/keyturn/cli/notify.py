"""Commands about webhooks."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from keyturn.cli import options, output, render_notify
from keyturn.cli.client import AdminClient
from keyturn.cli.reach import ask, socket_of
from keyturn.cli.render import safe
from keyturn.errors import KeyturnError

notify = typer.Typer(no_args_is_help=True, help="Look after webhooks.", rich_markup_mode=None)

Name = Annotated[str, typer.Option("--name", help="Only this one; all by default.")]


@notify.command("status")
def status(
    json: options.Json = False,
    config: options.ConfigOfDaemon = options.CONFIG,
    socket: options.Socket = options.SOCKET,
) -> None:
    """Show what waits for each receiver.

    And since when one takes nothing. Exit 75 while one of them fails.
    """
    rows = ask("notify.status", {}, socket=socket, config=config)
    output.show(rows, as_json=json, people=render_notify.status)
    output.end_with(0 if all(row["state"] == "ok" for row in rows) else 75)


@notify.command("test")
def ping(
    name: Name = "",
    json: options.Json = False,
    config: options.ConfigOfDaemon = options.CONFIG,
    socket: options.Socket = options.SOCKET,
) -> None:
    """Send a signed event of type ping now, and print the answer.

    It goes beside what waits and changes nothing of that. Exit 69 if no receiver took it, 3 if some
    did not.
    """
    found = ask("notify.test", {"name": name}, socket=socket, config=config)
    output.show(found, as_json=json, people=render_notify.tests)
    good = [bool(one["ok"]) for one in found["results"]]
    output.end_with(0 if all(good) else output.PARTIAL if any(good) else 69)


@notify.command("enable")
def enable(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The webhook's name.")],
    json: options.Json = False,
    config: options.ConfigOfDaemon = options.CONFIG,
    socket: options.Socket = options.SOCKET,
) -> None:
    """Send again to a receiver that had answered 410 Gone.

    What happened since then is sent as well, as far as it is no older than three days; the rest is
    told in sum.
    """
    found = ask("notify.enable", {"name": name}, socket=socket, config=config)
    output.show(found, as_json=json, people=lambda _data: f"{name}: enabled")


def warn(socket: Path | None, config: Path) -> None:
    """Mention the webhooks that have failed for long; nothing where the daemon cannot be asked."""
    with suppress(KeyturnError):
        for row in AdminClient(socket or socket_of(config, quiet=True)).call("notify.status", {}):
            if row["problem"]:
                print(f"note: {safe(row['problem'])}", file=sys.stderr)  # noqa: T201
