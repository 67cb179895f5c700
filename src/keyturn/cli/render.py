"""What people see. Every function takes the data that `--json` prints and returns text.

Tables are Rich's where there are rows; Rich is loaded here and only then. All text from the data is
escaped: an owner or a reason must not be able to steer the terminal that shows it.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from keyturn.daemon.masking import mask, printable

Row = dict[str, Any]
_WIDTH_OF_A_PIPE = 200
_NONE = "–"


def as_json(data: Any) -> str:
    """Return the data for machines."""
    return mask(json.dumps(data, indent=2, sort_keys=False))


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; on a terminal as wide as that, in a pipe wide enough for whole ids."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    drawn = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in headings:
        drawn.add_column(heading, overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(safe(cell)) for cell in row))
    width = shutil.get_terminal_size().columns if terminal else _WIDTH_OF_A_PIPE
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=terminal, highlight=False).print(drawn)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def safe(value: object) -> str:
    """Return one printable line for any value."""
    if value is None or value == "":
        return _NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    return mask(printable(str(value)).replace("\n", "\\n").replace("\t", " "))


def when(text: str | None, now: datetime) -> str:
    """Return how far away an instant is: `in 3d 4h`, `2h ago`."""
    if not text:
        return _NONE
    try:
        distance = datetime.fromisoformat(text) - now
    except (ValueError, TypeError):
        return safe(text)
    seconds = round(abs(distance.total_seconds()))
    size = _short(seconds)
    return f"in {size}" if distance.total_seconds() > 0 else f"{size} ago"


def _short(seconds: int) -> str:
    """Two units at most: nobody plans by the seconds of a month."""
    units = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    parts: list[str] = []
    for name, size in units:
        count, seconds = divmod(seconds, size)
        if count:
            parts.append(f"{count}{name}")
    return " ".join(parts[:2]) or "0s"


# --- status -----------------------------------------------------------------------------------


def status(rows: Sequence[Row], now: datetime | None = None) -> str:
    """Return one line per agent."""
    at = now or datetime.now(UTC)
    if not rows:
        return "no agents yet; add one: keyturn agents add NAME --to CONNECTION:PATH --wait"
    headings = ("AGENT", "STATE", "VERSION", "SINCE", "NEXT", "ROTATION", "IN SYNC", "LAST USED")
    return table(headings, (_status_row(row, at) for row in rows))


def _status_row(row: Row, now: datetime) -> tuple[str, ...]:
    current = row.get("current") or {}
    targets = row.get("destinations") or []
    synced = sum(1 for one in targets if one.get("in_sync"))
    following = when(row.get("next_rotation_at"), now)
    return (
        safe(row.get("agent")),
        "QUARANTINE" if row.get("quarantine") else safe(row.get("state")),
        safe(current.get("version")),
        when(current.get("promoted_at"), now),
        f"overdue, {following}" if row.get("overdue") else following,
        _rotation_words(row.get("rotation"), now),
        f"{synced}/{len(targets)}",
        when(current.get("last_used_at"), now),
    )


def _rotation_words(rotation: Row | None, now: datetime) -> str:
    if not rotation:
        return _NONE
    if _is_trying(rotation, now):
        return f"trying now, {safe(rotation.get('step'))}"
    words = [rotation.get("state"), rotation.get("step")]
    why = rotation.get("why") or rotation.get("error_code")
    return " ".join(safe(word) for word in words if word) + (f" ({safe(why)})" if why else "")


def own_logins(rows: Sequence[Row], now: datetime | None = None) -> str:
    """Return one line per connection that logs in, and below what keeps one from being replaced."""
    at = now or datetime.now(UTC)
    if not rows:
        return "no connection logs in anywhere, or none was looked at yet"
    headings = ("CONNECTION", "METHOD", "EXPIRES", "LAST ROTATION", "NEXT", "SECRET IDS", "STATE")
    lines = [table(headings, (_own_row(row, at) for row in rows))]
    for row in rows:
        error = row.get("error")
        if error:
            lines.append(f"{safe(row.get('connection'))}: {safe(error.get('detail'))}")
            lines.append(f"  next try {when(error.get('next_try_at'), at)}")
    return "\n".join(lines)


def _own_row(row: Row, now: datetime) -> tuple[str, ...]:
    ends = _instant(row.get("expires_at"), now) if row.get("expires_at") else safe(row.get("note"))
    states = [one.get("state") for one in row.get("versions") or ()]
    error = row.get("error")
    state = f"failing: {safe(error.get('code'))}" if error else "ok"
    return (
        safe(row.get("connection")),
        safe(row.get("method")),
        ends,
        when(row.get("last_rotation_at"), now),
        when(row.get("next_rotation_at"), now),
        ", ".join(safe(one) for one in states) or _NONE,
        "ENDS SOON" if row.get("ends_soon") else state,
    )


def status_of_one(row: Row, now: datetime | None = None) -> str:
    """Return everything about one agent, with the next command to type at the end."""
    at = now or datetime.now(UTC)
    lines = [
        f"{safe(row.get('agent'))}: {safe(row.get('state'))}",
        *_suspension_lines(row.get("suspension"), at),
        *_pairs(row, ("login", "owner", "policy", "managed_by", "file")),
        f"  next rotation  {_instant(row.get('next_rotation_at'), at)}"
        + ("  OVERDUE" if row.get("overdue") else ""),
        f"  maximum age    {_instant(row.get('max_age_at'), at)}",
        *_current_lines(row, at),
        *_version_lines("pending", row.get("pending"), at),
        *(
            line
            for one in row.get("previous") or ()
            for line in _version_lines("previous", one, at)
        ),
        *(line for one in row.get("kept") or () for line in _version_lines("kept", one, at)),
        *(_presented_line(one, at) for one in row.get("presented") or ()),
        *_rotation_lines(row.get("rotation"), at),
        *(_destination_line(one, at) for one in row.get("destinations") or ()),
    ]
    retire = row.get("safe_to_retire")
    if retire:
        answer = "yes" if retire.get("ok") else f"no: {safe(retire.get('reason'))}"
        lines.append(f"  safe to retire {answer}")
    if row.get("hint"):
        lines.append(f"next: {safe(row['hint'])}")
    return "\n".join(lines)


def _pairs(row: Row, names: Sequence[str]) -> list[str]:
    return [f"  {name.replace('_', ' '):<14} {safe(row.get(name))}" for name in names]


def _instant(text: str | None, now: datetime) -> str:
    return f"{safe(text)} ({when(text, now)})" if text else _NONE


def _version_lines(name: str, version: Row | str | None, now: datetime) -> list[str]:
    if not version:
        return []
    if isinstance(version, str):
        return [f"  {name:<14} {safe(version)}"]
    facts = [safe(version.get("version"))]
    for key, word in (
        ("promoted_at", "promoted"),
        ("deadline", "ends"),
        ("last_used_at", "last used"),
    ):
        if version.get(key):
            facts.append(f"{word} {when(version[key], now)}")
    if version.get("uses") is not None:
        facts.append(f"{version['uses']} {'use' if version['uses'] == 1 else 'uses'}")
    if version.get("laggards"):
        facts.append("still used by " + ", ".join(safe(one) for one in version["laggards"]))
    return [f"  {name:<14} " + " · ".join(facts)]


def _presented_line(one: Row, now: datetime) -> str:
    return (
        f"  PRESENTED      {safe(one.get('version'))} · {safe(one.get('state'))}"
        f" · last {when(one.get('last_at'), now)} · first {when(one.get('first_at'), now)}"
    )


def _rotation_lines(rotation: Row | None, now: datetime) -> list[str]:
    if not rotation:
        return []
    facts = [_rotation_words(rotation, now), f"attempt {safe(rotation.get('attempt'))}"]
    if rotation.get("waiting_since"):
        facts.append(f"since {when(rotation['waiting_since'], now)}")
    if rotation.get("next_try_at") and not _is_trying(rotation, now):
        facts.append(f"next try {when(rotation['next_try_at'], now)}")
    lines = ["  rotation       " + " · ".join(facts)]
    if rotation.get("error_detail"):
        lines.append(f"  because        {safe(rotation['error_detail'])}")
    return lines


def _is_trying(rotation: Row, now: datetime) -> bool:
    """Whether the next try of what waits has begun: its outcome is not known yet."""
    next_try = rotation.get("next_try_at")
    if not next_try or rotation.get("where") == "store":
        return False
    try:
        return datetime.fromisoformat(next_try) <= now
    except (ValueError, TypeError):
        return False


def _suspension_lines(suspension: Row | None, now: datetime) -> list[str]:
    if not suspension:
        return []
    how = "revoked" if suspension.get("how") == "revoke" else "suspended"
    facts = [f"{how} by {safe(suspension.get('by'))}", when(suspension.get("at"), now)]
    facts += [f"reason: {safe(suspension['reason'])}"] if suspension.get("reason") else []
    return ["  stopped        " + " · ".join(facts)]


def _current_lines(row: Row, now: datetime) -> list[str]:
    if row.get("current"):
        return _version_lines("current", row["current"], now)
    others = any(row.get(name) for name in ("pending", "previous", "kept"))
    lines = ["  current        none" + ("" if others else ": every secret is refused")]
    if row.get("successor_owed"):
        lines.append("  successor      owed; a rotation gives it, see below")
    return lines


def _destination_line(one: Row, now: datetime) -> str:
    state = "in sync" if one.get("in_sync") else f"NOT in sync ({safe(one.get('error_code'))})"
    state += ", left out" if one.get("withheld") else ", leaving" if one.get("leaving") else ""
    return (
        f"  at {safe(one.get('name'))}:{safe(one.get('path'))}  {state}"
        f" · shows {safe(one.get('shows_version'))} · read {when(one.get('read_back_at'), now)}"
    )


# --- the rest ---------------------------------------------------------------------------------


def agents(rows: Sequence[Row]) -> str:
    """Return one line per agent definition."""
    if not rows:
        return status([])
    headings = ("AGENT", "LOGIN", "OWNER", "POLICY", "MANAGED BY", "FILE", "STATE", "DESTINATIONS")
    return table(headings, (_agent_row(row) for row in rows))


def _agent_row(row: Row) -> tuple[str, ...]:
    names = ("agent", "login", "owner", "policy", "managed_by", "file", "state")
    places = ", ".join(f"{one['to']}:{one['path']}" for one in row.get("targets") or ())
    return (*(safe(row.get(name)) for name in names), safe(places))


def rotations(results: Sequence[Row]) -> str:
    """Return one line per agent that was to be rotated."""
    return "\n".join(_rotation_result(one) for one in results)


def retried(results: Sequence[Row]) -> str:
    """Return one line per rotation that was tried again."""
    return rotations(results) or "no rotation waits or is stalled"


def _rotation_result(one: Row) -> str:
    error = one.get("error") or {}
    line = f"{safe(one.get('agent'))}: {safe(one.get('outcome'))}"
    if one.get("version"):
        line += f", version {safe(one['version'])}"
    if one.get("deadline"):
        line += f", the old one is accepted until {safe(one['deadline'])}"
    if error:
        line += f": {safe(error.get('message'))}"
        line += f" (hint: {safe(error['hint'])})" if error.get("hint") else ""
    return line


def revocation(result: Row) -> str:
    """Return what was, or would be, refused from now on, how long that took, and its successor."""
    return "\n".join(one for one in (cut(result), after_cut(result)) if one)


def after_cut(result: Row) -> str:
    """Return what became of it after the cut: the successor, and what agents read."""
    lines = [successor(result)] if result.get("successor") else []
    found = result.get("cleanup") or {}
    lines += [
        f"NOT CLEANED UP: {safe(one.get('destination'))} {_HOLDS.get(one.get('code', ''), '')}"
        f" ({safe(one.get('code'))}); it is tried again every five minutes"
        for one in found.get("destinations") or ()
    ]
    if found.get("outcome") == "waiting" and not found.get("destinations"):
        lines.append(
            f"NOT CLEANED UP yet: see `keyturn status {safe(result.get('agent'))}` for what"
            " destinations show"
        )
    words = {
        "done": "no destination shows what was revoked",
        "later": "destinations are cleaned up once the daemon runs",
    }
    lines += [words[found["outcome"]]] if found.get("outcome") in words else []
    return "\n".join(lines)


_HOLDS = {
    "revoked": "still holds what was revoked",
    "unreadable": "cannot be read and may still hold what was revoked",
}


def cut(result: Row) -> str:
    """Return what was, or would be, refused from now on, and how long that took."""
    versions, dry_run = result.get("versions") or [], result.get("dry_run")
    number = f"{len(versions)} version" + ("" if len(versions) == 1 else "s")
    subject = safe(result.get("agent") or result.get("target"))
    lines = [f"{'would revoke' if dry_run else 'revoked'} {subject}: {number}"]
    lines += [f"  version {safe(one)}" for one in versions]
    lines += [f"  destination {safe(one)}" for one in result.get("destinations") or ()]
    lines += [
        f"  left out    {safe(one)}, until `keyturn resume {subject} --destination {safe(one)}`"
        for one in result.get("withheld") or ()
    ]
    if result.get("already"):
        lines[0] = f"revoked already: {subject}; nothing more of it was accepted"
    if not dry_run:
        lines += _revocation_end(result)
    if result.get("state") == "suspended":
        lines.append(f"suspended until: keyturn resume {subject}")
    return "\n".join(lines)


def _revocation_end(result: Row) -> list[str]:
    here, everywhere = result.get("refused_here_after_seconds"), result.get("delay_seconds")
    verifiers = result.get("verifiers") or {}
    known = f"{verifiers.get('acknowledged', 0)}/{verifiers.get('live', 0)} verifiers"
    lines = [f"  warning: {safe(one)}" for one in result.get("warnings") or ()]
    lines += _silent(verifiers)
    if here is not None:
        lines.append(f"refused on this host after {here * 1000:.0f} ms")
    if result.get("incomplete"):
        lines.append(f"INCOMPLETE ({known}): the daemon goes on with it; or repeat this command")
    elif everywhere is not None:
        lines.append(f"refused everywhere after {everywhere * 1000:.0f} ms ({known})")
    return lines


def _silent(verifiers: Row) -> list[str]:
    return [
        f"  verifier {safe(one)} did not answer; what it knew has run out: it refuses or says 503"
        for one in verifiers.get("silent") or ()
    ]


def successor(result: Row) -> str:
    """Return what the agent has now instead of what was revoked."""
    found, agent = result["successor"], safe(result.get("agent"))
    error = found.get("error") or {}
    if found.get("version"):
        return f"successor: version {safe(found['version'])}"
    if error:
        return (
            f"NO SUCCESSOR: the rotation stalled: {safe(error.get('message'))}\n"
            f"next: {safe(error.get('hint'))}"
        )
    words = {
        "waiting": f"no successor yet, the rotation waits: keyturn status {agent}",
        "asked": f"a successor is on its way: keyturn status {agent}",
    }
    later = f"a successor follows once the daemon runs: keyturn status {agent}"
    return words.get(found.get("outcome", ""), later)


def changed(result: Row) -> str:
    """Return `agent: state` after suspend, resume, remove, retry and abandon."""
    line = f"{safe(result.get('agent'))}: {safe(result.get('state'))}"
    if not result.get("changed", True):
        line = f"{line} (it was so already)"
    return "\n".join([line, *_silent(result.get("verifiers") or {})])


def clock(result: Row) -> str:
    """Return what time the daemon goes by, and what is wrong with the wall clock."""
    if result["ok"]:
        return f"the clock is believed: {result['now']}"
    return (
        f"the clock jumped by {result['jump_seconds']:+.0f} s; the daemon goes by {result['now']}\n"
        "due rotations and retirements wait: set the clock right, or `keyturn clock --trust`"
    )


def identified(rows: Sequence[Row]) -> str:
    """Return one line per secret that was found in a text."""
    return "\n".join(_identified(row) for row in rows)


def _identified(row: Row) -> str:
    if not row.get("agent"):
        return f"version {safe(row.get('version'))}: not of this store"
    uses = row.get("uses_last_hour")
    line = f"{safe(row['agent'])}, version {safe(row.get('version'))}, {safe(row.get('state'))}"
    return line + (f", {uses} {'use' if uses == 1 else 'uses'} an hour" if uses is not None else "")


def audit(result: Row) -> str:
    """Return the entries, and what `--verify` found."""
    headings = ("AT", "ACTOR", "ACTION", "AGENT", "VERSION", "OUTCOME", "DETAIL")
    names = ("at", "actor", "action", "agent", "version", "outcome")
    rows = [
        (*(safe(one.get(name)) for name in names), _detail(one.get("detail")))
        for one in result.get("entries") or ()
    ]
    chain = result.get("chain")
    parts = [table(headings, rows)] if rows else ["no entries"] if chain is None else []
    if chain is not None:
        whole = f"BROKEN: {safe(chain.get('problem'))}"
        parts.append(f"chain: {'whole' if chain.get('ok') else whole}")
    return "\n".join(parts)


def _detail(detail: object) -> str:
    if isinstance(detail, dict):
        return safe(" ".join(f"{key}={value}" for key, value in detail.items()))
    return safe(detail)


def checks(report: Row) -> str:
    """Return one line per check, with what to do below those that failed."""
    lines: list[str] = []
    for one in report.get("checks") or ():
        mark = "ok  " if one.get("ok") else "FAIL"
        lines.append(f"{mark} {safe(one.get('name'))}: {safe(one.get('detail'))}")
        if one.get("hint") and not one.get("ok"):
            lines.append(f"     hint: {safe(one['hint'])}")
    return "\n".join(lines)


def event(one: Row) -> str:
    """Return one line of progress: `billing-bot: publish vault-eu:billing, waiting (destination)`."""
    subject = one.get("agent") or one.get("event")
    words = [one[key] for key in ("step", "target", "state", "message") if one.get(key)]
    line = f"{safe(subject)}: " + " ".join(safe(word) for word in words)
    if one.get("why"):
        line += f" ({safe(one['why'])})"
    if one.get("retry_in_seconds") is not None:
        line += f", next try in {_short(round(one['retry_in_seconds']))}"
    return line
