"""Commands that change nothing: status, audit, verify, identify, metrics."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from keyturn.cli import complete, options, output, render
from keyturn.cli.notify import warn
from keyturn.cli.reach import ask, late, store
from keyturn.core.secret import MAX_SECRET_BYTES, Secret, parse
from keyturn.errors import KeyturnError

_CANDIDATE = re.compile(rb"[0-9A-Za-z]{1,16}_[0-9A-Za-z]{14}_[0-9A-Za-z]{49}")
_LONGEST = 16 + 1 + 14 + 1 + 49
_CHUNK = 1024 * 1024
_BATCH = 1000
_QUOTES = 250  # heads in one question: a request line has its limit


class NothingFound(KeyturnError):
    """Nothing in the input has the form of a secret of Keyturn's."""

    code = "nothing-found"
    default_hint = "imported secrets of another form cannot be identified by their text"


class NothingCounts(KeyturnError):
    """No verifier of this store has ever written down what it saw."""

    code = "nothing-counts"
    exit_code = 69
    default_hint = (
        "a verifier counts once it runs on this store; see `keyturn verify` for one secret"
    )


def status(
    *,
    agent: Annotated[
        str,
        typer.Argument(
            metavar="AGENT", help="Only this one, with details.", autocompletion=complete.agents
        ),
    ] = "",
    never_presented: Annotated[
        bool,
        typer.Option("--never-presented", help="Only those whose secret nobody has presented yet."),
    ] = False,
    own: Annotated[
        bool, typer.Option("--own", help="The daemon's own logins instead, and when they end.")
    ] = False,
    json: options.Json = False,
    config: options.ConfigOfDaemon = options.CONFIG,
    socket: options.Socket = options.SOCKET,
) -> None:
    """Show what every agent has and what comes next.

    Works on the store directly where the daemon is down.
    """
    if own:
        if agent:
            raise typer.BadParameter("--own is about the daemon, not about an agent")
        logins = ask("status.own", {}, socket=socket, config=config)
        output.show(logins, as_json=json, people=render.own_logins)
        return
    args = {"agent": agent} if agent else {}
    rows = ask("status", args, socket=socket, config=config)
    rows = _never_presented(rows) if never_presented else rows
    if not json:
        warn(socket, config)
    if agent and rows:
        output.show(rows[0], as_json=json, people=render.status_of_one)
    else:
        output.show(rows, as_json=json, people=render.status)


def _never_presented(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    uses = [(row, (row["current"] or {}).get("uses")) for row in rows if row["current"]]
    if uses and all(number is None for _, number in uses):
        raise NothingCounts
    return [row for row, number in uses if number == 0]


def audit(
    *,
    agent: Annotated[
        str,
        typer.Argument(metavar="AGENT", help="Only this one.", autocompletion=complete.agents),
    ] = "",
    verify: Annotated[bool, typer.Option("--verify", help="Check the hash chains.")] = False,
    anchor: Annotated[
        Path | None,
        typer.Option(help="Check by this file of anchors as well."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, max=10000, help="The newest N entries; 50 by default.")
    ] = None,
    json: options.Json = False,
    config: options.ConfigOfDaemon = options.CONFIG,
    socket: options.Socket = options.SOCKET,
) -> None:
    """Show who did what.

    With --verify it tells instead whether the record is whole, exit 1 if it is not; with --limit it
    does both. The chains alone cannot show that somebody wrote them anew, cut them back, or put an
    older store in place: --anchor can, by the file that `audit.anchor_file` names or a copy. Works on the store directly where the daemon is down.
    """
    kept = late("keyturn.anchor_file", "read_anchors")(anchor) if anchor is not None else None
    verify = verify or kept is not None
    args: dict[str, Any] = {"verify": verify, "limit": limit or (0 if verify else 50)}
    if agent:
        args["agent"] = agent
    result = ask("audit", args, socket=socket, config=config)
    if kept is not None:
        _compare(result, kept, socket=socket, config=config)
    output.show(result, as_json=json, people=render.audit)
    chain = result.get("chain")
    output.end_with(1 if chain is not None and not chain.get("ok") else 0)


def _compare(result: dict[str, Any], kept: Any, *, socket: Path | None, config: Path) -> None:
    """Add to a verification what a file of anchors says. `kept` is an `anchor_file.Anchors`."""
    problems = [f"anchor file: {one}" for one in kept.problems]
    store_id = ""
    for batch in late("keyturn.anchor_file", "batches")(kept.quotes, _QUOTES):
        found = ask("audit.quoted", {"heads": batch}, socket=socket, config=config)
        store_id, problems = found["store"], problems + found["problems"]
    if store_id and kept.stores - {store_id}:
        problems.append("anchor file: it has anchors of another store")
    chain = result["chain"]
    said = [chain["problem"]] if chain["problem"] else []
    result["chain"] = {"ok": chain["ok"] and not problems, "problem": "; ".join(said + problems)}
    result["anchor"] = {"lines": kept.lines, "heads": len(kept.quotes), "newest_at": kept.newest_at}


def clock(
    trust: Annotated[
        bool,
        typer.Option("--trust", help="The wall clock is right: go by it from now on."),
    ] = False,
    json: options.Json = False,
    config: options.ConfigOfDaemon = options.CONFIG,
    socket: options.Socket = options.SOCKET,
) -> None:
    """Show whether the clock that the daemon goes by has jumped.

    After a jump of more than five minutes against the time since boot the daemon goes on by that,
    and due rotations and retirements wait. Set the clock right, or say --trust: what it says has
    passed then counts as passed, so look at the deadlines of `keyturn status` before. Exit 75 while
    it waits.
    """
    result = ask("clock.trust" if trust else "clock", {}, socket=socket, config=config)
    output.show(result, as_json=json, people=render.clock)
    output.end_with(0 if result["ok"] else 75)


def verify(
    login: Annotated[
        str,
        typer.Argument(
            metavar="LOGIN", help="What the agent presents.", autocompletion=complete.logins
        ),
    ],
    json: options.Json = False,
    config: options.Config = options.CONFIG,
) -> None:
    """Tell whether a secret on standard input is accepted.

    `keyturn verify billing-bot@acme < secret.txt`. Prints `accepted` (exit 0) or `refused` (exit 4). The secret stays in this process: the store is
    asked as a library, not the daemon.
    """
    secret = _read_secret()
    with store(config) as offline:
        accepted = bool(offline.verify(login, secret))
    word = "accepted" if accepted else "refused"
    output.show({"login": login, "result": word}, as_json=json, people=lambda _data: word)
    output.end_with(0 if accepted else output.REFUSED)


def identify(
    json: options.Json = False,
    config: options.ConfigOfDaemon = options.CONFIG,
    socket: options.Socket = options.SOCKET,
) -> None:
    """Tell whose secrets stand in a text on standard input.

    It prints ids, never a secret; exit 1 if none is of this store. Only the public version ids
    leave this process: `keyturn identify < leak.txt`.
    """
    ids = list(dict.fromkeys(_version_ids(sys.stdin.buffer)))
    if not ids:
        raise NothingFound
    rows: list[dict[str, Any]] = []
    for start in range(0, len(ids), _BATCH):  # a request line has its limit
        rows += ask(
            "identify", {"versions": ids[start : start + _BATCH]}, socket=socket, config=config
        )
    known = {row["version"] for row in rows}
    nothing = dict.fromkeys(("agent", "state", "last_used_at", "uses_last_hour"))
    strange = [{"version": one, **nothing} for one in ids if one not in known]
    output.show([*rows, *strange], as_json=json, people=render.identified)
    output.end_with(0 if known else 1)


def metrics(
    json: options.Json = False,
    config: options.ConfigOfDaemon = options.CONFIG,
    socket: options.Socket = options.SOCKET,
) -> None:
    """Print the metrics in the Prometheus text format."""
    result = ask("metrics", {}, socket=socket, config=config)
    text = str(result["text"]).rstrip("\n")
    output.show(result.get("samples", result), as_json=json, people=lambda _data: text)


def _version_ids(stream: BinaryIO) -> Iterator[str]:
    """Yield the version id of every secret with a right checksum, in a text of any length."""
    rest = b""
    while chunk := stream.read(_CHUNK):
        text = rest + chunk
        for candidate in _CANDIDATE.findall(text):
            # What stands directly before a secret may look like a part of its prefix.
            for start in range(candidate.index(b"_")):
                found = parse(candidate[start:])
                if found is not None:
                    yield found.version_id
        rest = text[-_LONGEST:]


def _read_secret() -> Secret:
    """Read one line; on a terminal without showing it."""
    if sys.stdin.isatty():
        import getpass

        return Secret(getpass.getpass("Secret: "))
    data = sys.stdin.buffer.read(MAX_SECRET_BYTES + 2).removesuffix(b"\n").removesuffix(b"\r")
    # Bytes that are no UTF-8, or too many, are no secret of ours: refused like any other.
    return Secret(data.decode("utf-8", errors="replace"))
