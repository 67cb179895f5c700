"""What people see of the commands about the store."""

from __future__ import annotations

from typing import Any

from keyturn.cli.render import safe, table

Row = dict[str, Any]
_WHAT = {
    "added": "known again",
    "removed": "removed again",
    "suspended": "suspended again",
    "resumed": "resumed again",
    "changed": "as it was defined last",
    "accepted": "accepted",
    "refused": "refused",
    "deadline": "deadline as it was",
    "undecided": "UNDECIDED: no verifier answers for it",
}
_SHOWS = {
    "unreadable": "cannot be read",
    "missing": "shows nothing of ours",
    "unknown": "shows a version that nobody knows",
    "other": "shows another accepted version",
    "refused": "SHOWS A REFUSED VERSION",
}
_REASONS = {
    "ledger-ahead": "the ledger knows of later changes than the store",
    "ledger-missing": "the ledger is gone, and nobody can tell whether the store is an older one",
    "ledger-foreign": "the ledger is that of another store",
    "ledger-gap": "the ledger lacks what the store has",
    "restored": "it was restored",
    "held": "it was restored, and nobody has let it go",
}


def status(found: Row) -> str:
    """Return everything about the store, and what is in quarantine."""
    ledger, last = found["ledger"], found["last_backup"]
    since = f", since {safe(ledger['since'])}" if ledger["since"] else ""
    rows = [
        ("store", f"{found['kind']} {safe(found['version'])} at {safe(found['place'])}"),
        ("id", f"{safe(found['store'])}, incarnation {safe(found['incarnation'])}"),
        ("schema", _schema(found)),
        ("size", f"{found['size']:,} bytes, {found['agents']} agents"),
        ("journal mode", safe(found["journal_mode"])),
        ("daemons", ", ".join(safe(one["writer"]) for one in found["daemons"]) or "none"),
        ("ledger", f"{safe(ledger['folder'])}: {ledger['state']}{since}"),
        ("last backup", f"{safe(last['at'])} {safe(last['file'])}" if last else "not known"),
        ("quarantine", _quarantine(found["quarantine"])),
    ]
    return "\n".join([table(("STORE", ""), rows), *_doubts(found["quarantine"])])


def _schema(found: Row) -> str:
    text = f"{found['schema']}; works with releases from {found['oldest_schema']} on;"
    text += f" this one knows {found['this_release']}"
    if found["pending"]:
        text += f"; {len(found['pending'])} to go: `keyturn store upgrade`"
    return text


def _quarantine(rows: list[Row]) -> str:
    if not rows:
        return "none"
    everybody = [row for row in rows if row["agent"] is None]
    if everybody:
        text = f"EVERYBODY, since {everybody[0]['since']}: {_reason(everybody[0])}"
        is_held = everybody[0]["reason"] == "held"
        return text + (": `keyturn store release --all`" if is_held else "")
    return f"{len(rows)} agents wait for you: `keyturn store release AGENT`, or with --reissue"


def _doubts(rows: list[Row]) -> list[str]:
    named = [row for row in rows if row["agent"] is not None]
    if not named:
        return []
    shown = ((row["agent"], row["since"], _reason(row)) for row in named)
    return ["", table(("UNDECIDED", "SINCE", "WHY"), shown)]


def _reason(row: Row) -> str:
    return _REASONS.get(row["reason"], safe(row["reason"]))


def upgraded(found: Row) -> str:
    """Say which steps were made, and which are left."""
    would = "would be " if found["dry_run"] else ""
    lines = [f"{one['schema']} {one['kind']}: {would}done" for one in found["steps"]]
    lines = lines or [f"schema {safe(found['before'])}: nothing to do"]
    if found["left"] and not found["dry_run"]:
        steps = ", ".join(f"{one['schema']} {one['kind']}" for one in found["left"])
        lines.append(
            f"left for later: {steps}. When no older release runs any more:"
            " `keyturn store upgrade --contract`"
        )
    return "\n".join(lines)


def backed_up(found: Row) -> str:
    """Say what was copied."""
    return (
        f"{safe(found['file'])}: {found['size']:,} bytes, {found['agents']} agents, whole and synced"
        f" (store {safe(found['store_id'])}, incarnation {found['incarnation']})"
    )


def differences(report: Row) -> str:
    """Return what was merged, and what the destinations show that is not as it should be."""
    parts = []
    if report["merged"]:
        rows = (
            (one["agent"], _WHAT.get(one["what"], one["what"]), one["version"], one["before"], one["after"])
            for one in report["merged"]
        )  # fmt: skip
        parts.append(table(("SINCE THE BACKUP", "", "VERSION", "BACKUP", "NOW"), rows))
    else:
        parts.append("nothing happened since the backup that the ledger knows of")
    if report["destinations"]:
        shown = (
            (one["agent"], one["destination"], _SHOWS[one["what"]], one["shows"], one["why"])
            for one in report["destinations"]
        )
        parts.append(table(("AT A DESTINATION", "", "", "VERSION", ""), shown))
    else:
        parts.append("every destination shows what it should")
    if report["undecided"]:
        parts.append(
            f"at 503 until you decide: {', '.join(safe(name) for name in report['undecided'])}:"
            " `keyturn store release AGENT`, or with --reissue"
        )
    parts += [f"at 503 on this host until the key is here: {safe(text)}" for text in report["keys"]]
    return "\n\n".join(parts)


def restored(found: Row) -> str:
    """Say what a restore came to."""
    if not found["released"]:
        return "restored and merged; verifiers answer 503 until `keyturn store release --all`"
    text = f"restored: incarnation {found['incarnation']}; verifiers answer again"
    if found["undecided"]:
        text += f", but not for {len(found['undecided'])} agents: `keyturn store status`"
    return f"{text}. Start the daemon now."


def released(found: Row) -> str:
    """Say who was let go."""
    names = ", ".join(safe(name) for name in found["released"])
    others = "everybody whom the ledger knows" if found["everybody"] else "" if names else "nobody"
    text = f"let go: {', '.join(one for one in (others, names) if one)}"
    if found["reissue"] and found["released"]:
        text += "; all that the store had of them is revoked, a new secret is on its way"
    if found["undecided"]:
        text += f"\nstill at 503: {', '.join(safe(name) for name in found['undecided'])}"
    return text
