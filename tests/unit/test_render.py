"""What people see, from canned data of the documented shapes."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from keyturn.cli import output, render, render_files
from keyturn.cli.verifiers import table as verifiers_table

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
CANARY = "kt_" + "A" * 14 + "_" + "b" * 49

STATUS: dict[str, Any] = {
    "agent": "billing-bot",
    "login": "billing-bot@acme",
    "owner": "team-billing",
    "policy": "restart-weekly",
    "managed_by": "file",
    "state": "enabled",
    "next_rotation_at": "2026-03-04T12:00:00Z",
    "overdue": False,
    "max_age_at": "2026-05-01T12:00:00Z",
    "current": {
        "version": "v7Q2aaaaaaaaaa",
        "promoted_at": "2026-03-01T10:00:00Z",
        "last_used_at": None,
        "deadline": None,
    },
    "pending": None,
    "kept": [],
    "previous": [
        {"version": "v6aaaaaaaaaaaa", "deadline": "2026-03-03T12:00:00Z", "laggards": ["10.0.0.7"]}
    ],
    "rotation": {
        "id": "r1",
        "state": "waiting",
        "why": "destination",
        "attempt": 1,
        "waiting_since": "2026-03-01T11:58:00Z",
        "next_try_at": "2026-03-01T12:00:30Z",
        "error_code": "destination-unavailable",
    },
    "destinations": [
        {"name": "vault-eu", "path": "billing", "shows_version": "v7Q2aaaaaaaaaa", "in_sync": True},
        {
            "name": "aws",
            "path": "b",
            "shows_version": None,
            "in_sync": False,
            "error_code": "older",
        },
    ],
    "safe_to_retire": {"ok": False, "reason": "the grace has not passed"},
    "hint": "keyturn rotation retry billing-bot",
}


def test_the_overview_is_one_line_per_agent() -> None:
    """Agent, state, version, ages, what waits and why, and how many destinations are in sync."""
    text = render.status([STATUS, STATUS | {"agent": "b", "overdue": True}], NOW)
    first, second, third = text.splitlines()
    assert first.split()[:3] == ["AGENT", "STATE", "VERSION"]
    assert "v7Q2aaaaaaaaaa" in second
    assert "2h ago" in second
    assert "in 3d" in second
    assert "waiting (destination)" in second
    assert "1/2" in second
    assert "overdue, in 3d" in third


def test_no_agents_says_how_to_add_one() -> None:
    """An empty list is no empty screen."""
    assert "keyturn agents add" in render.status([])


def test_one_agent_shows_everything_and_the_next_command() -> None:
    """All versions, the rotation, each destination, and at the end what to type."""
    lines = render.status_of_one(STATUS, NOW).splitlines()
    text = "\n".join(lines)
    assert lines[0] == "billing-bot: enabled"
    assert "v6aaaaaaaaaaaa · ends in 2d · still used by 10.0.0.7" in text
    assert "since 2m ago · next try in 30s" in text
    assert "at vault-eu:billing  in sync" in text
    assert "at aws:b  NOT in sync (older)" in text
    assert "safe to retire no: the grace has not passed" in text
    assert lines[-1] == "next: keyturn rotation retry billing-bot"


def test_a_new_agent_without_anything_renders() -> None:
    """Nulls everywhere, as just after `agents add`."""
    bare = dict.fromkeys(STATUS) | {"agent": "a", "state": "enabled"}
    assert "a: enabled" in render.status_of_one(bare, NOW)
    assert "a" in render.status([bare], NOW)


TEXTS = {
    "escape": ("a\x1b[2J\x1b]0;x\x07b", "\x1b"),
    "line break": ("a\nerror: forged", "\nerror"),
    "right to left": ("a\u202eb", "\u202e"),
    "secret of ours": (f"see {CANARY}", "bbbb"),
    "rich markup": ("[red]a[/red] [link=http://x]b", "\x1b"),
}


@pytest.mark.parametrize(("text", "forbidden"), TEXTS.values(), ids=TEXTS.keys())
def test_hostile_text_cannot_steer_the_terminal(text: str, forbidden: str) -> None:
    """Owners, reasons, details and messages are shown as text, whatever is in them."""
    row = STATUS | {"owner": text, "hint": text, "agent": text, "rotation": {"state": text}}
    shown = [
        render.status([row], NOW),
        render.status_of_one(row, NOW),
        render.agents([row | {"targets": [{"to": text, "path": text}]}]),
        render.rotations([{"agent": text, "outcome": text, "error": {"message": text}}]),
        render.revocation({"agent": text, "versions": [text], "destinations": [text]}),
        render.changed({"agent": text, "state": text}),
        render.identified([{"version": text, "agent": text, "state": text}]),
        render.audit({"entries": [{"actor": text, "detail": {"reason": text}}]}),
        render.checks({"checks": [{"name": text, "detail": text, "hint": text}]}),
        render.event({"event": text, "message": text, "why": text}),
    ]
    assert [part for part in shown if forbidden in part] == []


def test_rich_markup_is_shown_as_it_is() -> None:
    """Brackets are text: an owner called [bold] keeps its brackets."""
    assert "[bold]x[/bold]" in render.agents([{"agent": "a", "owner": "[bold]x[/bold]"}])


def test_json_is_masked_too() -> None:
    """The second line of defence stands before every output."""
    assert "bbbb" not in render.as_json({"reason": CANARY})


WHENS = [
    (None, "–"),
    ("2026-03-01T12:00:00Z", "0s ago"),
    ("2026-03-01T12:00:45Z", "in 45s"),
    ("2026-03-01T08:29:59+00:00", "3h 30m ago"),
    ("2026-03-11T13:00:00Z", "in 10d 1h"),
    ("nonsense", "nonsense"),
    ("2026-03-01T12:00:00", "2026-03-01T12:00:00"),
]


@pytest.mark.parametrize(("text", "expected"), WHENS)
def test_distances_in_time(text: str | None, expected: str) -> None:
    """Two units at most; what is no time is shown as it is."""
    assert render.when(text, NOW) == expected


def test_whole_ids_in_a_pipe() -> None:
    """Output that a script reads is not cut at 80 columns."""
    long = "a" * 63
    assert long in render.status([STATUS | {"agent": long}], NOW)


def test_a_revocation_tells_the_delays() -> None:
    """How long until this host and until every verifier refused."""
    text = render.revocation(
        {
            "agent": "a",
            "versions": ["v1"],
            "incomplete": False,
            "reissue": True,
            "successor": {"outcome": "asked"},
            "refused_here_after_seconds": 0.0041,
            "delay_seconds": 0.0123,
            "verifiers": {"acknowledged": 4, "live": 4},
        }
    )
    assert text.splitlines() == [
        "revoked a: 1 version",
        "  version v1",
        "refused on this host after 4 ms",
        "refused everywhere after 12 ms (4/4 verifiers)",
        "a successor is on its way: keyturn status a",
    ]


SUCCESSORS = {
    "there": ({"outcome": "promoted", "version": "v2"}, "successor: version v2", 0),
    "stalled": (
        {
            "outcome": "stalled",
            "error": {"message": "denied at eu:a", "hint": "retry", "exit_code": 1},
        },
        "NO SUCCESSOR: the rotation stalled: denied at eu:a\nnext: retry",
        3,
    ),
    "waiting": (
        {"outcome": "waiting"},
        "no successor yet, the rotation waits: keyturn status a",
        3,
    ),
    "asked": ({"outcome": "asked"}, "a successor is on its way: keyturn status a", 0),
    "later": (
        {"outcome": "later"},
        "a successor follows once the daemon runs: keyturn status a",
        0,
    ),
}


@pytest.mark.parametrize("name", SUCCESSORS)
def test_a_revocation_tells_what_became_of_the_successor(name: str) -> None:
    """Everything is cut; whether the agent has something new is another matter, and exit 3."""
    found, text, code = SUCCESSORS[name]
    result = {"agent": "a", "incomplete": False, "reissue": True, "successor": found}
    assert render.revocation(result).endswith(text)
    assert output.code_of_revocation(result) == code
    assert output.code_of_revocation(result | {"incomplete": True}) == 75


def test_checks_show_what_to_do_about_failures() -> None:
    """A hint stands below what failed, not below what is good."""
    text = render.checks(
        {
            "checks": [
                {"name": "store", "ok": True, "detail": "SQLite 3.51.3", "hint": "unused"},
                {"name": "vault-eu", "ok": False, "detail": "denied", "hint": "see the policy"},
            ]
        }
    )
    assert text.splitlines() == [
        "ok   store: SQLite 3.51.3",
        "FAIL vault-eu: denied",
        "     hint: see the policy",
    ]


def test_a_reload_says_what_is_left_to_do() -> None:
    """Its counts on the first line, and a line for each note."""
    found = {
        "added": 1,
        "changed": 0,
        "unmanaged": 0,
        "unchanged": 2,
        "moved": 3,
        "notes": ["x\x1b"],
    }
    lines = render_files.reloaded(found).splitlines()

    assert lines[0] == "configuration taken over: 1 added, 0 changed, 0 unmanaged, 2 unchanged"
    assert lines[1:] == ["note: 3 agents have entries at another place now", "note: x\\x1b"]


def test_an_agent_that_was_cut_off_shows_it() -> None:
    """No current version is said in words, and so is the successor that is owed."""
    row = STATUS | {"current": None, "previous": [], "successor_owed": True}
    text = render.status_of_one(row, NOW)
    assert "current        none: every secret is refused" in text
    assert "successor      owed" in text
    assert "refused" not in render.status_of_one(row | {"previous": STATUS["previous"]}, NOW)


def test_who_stopped_an_agent_is_shown() -> None:
    """Actor, time and reason stand above everything else."""
    stopped = {"by": "uid:0", "at": "2026-03-01T11:00:00Z", "how": "suspend", "reason": "INC-1"}
    text = render.status_of_one(STATUS | {"suspension": stopped}, NOW)
    assert "suspended by uid:0 · 1h ago · reason: INC-1" in text


def test_a_try_whose_time_has_come_is_made_now() -> None:
    """While a call hangs, its time lies in the past: that is no next try."""
    waits = STATUS["rotation"] | {"next_try_at": "2026-03-01T11:59:54Z", "step": "publish"}
    text = render.status_of_one(STATUS | {"rotation": waits}, NOW)
    assert "trying now, publish" in text
    assert "next try" not in text
    assert "trying now" in render.status([STATUS | {"rotation": waits}], NOW)


OWN: list[dict[str, Any]] = [
    {
        "connection": "bao",
        "method": "approle",
        "expires_at": "2026-03-04T12:00:00+00:00",
        "note": "",
        "ends_soon": True,
        "last_rotation_at": "2026-02-01T12:00:00+00:00",
        "next_rotation_at": "2026-02-08T12:00:00+00:00",
        "versions": [{"state": "previous"}, {"state": "current"}],
        "error": {
            "code": "denied",
            "detail": "mint: bao: the login lacks update on auth/approle/role/k/secret-id",
            "next_try_at": "2026-03-01T12:05:00+00:00",
        },
    },
    {"connection": "aws", "method": "keys", "note": "access keys do not end"},
]


def test_own_logins_say_until_when_and_what_keeps_them() -> None:
    """One line for each connection, and below it why one is not replaced."""
    text = render.own_logins(OWN, NOW)
    assert "ENDS SOON" in text
    assert "(in 3d)" in text
    assert "previous, current" in text
    assert "lacks update on auth/approle/role/k/secret-id" in text
    assert "next try in 5m" in text
    assert "access keys do not end" in text
    assert "no connection logs in" in render.own_logins([], NOW)


def test_a_verifier_that_did_not_answer_is_named() -> None:
    """After a revoke and after a suspension, with what that means."""
    verifiers = {"acknowledged": 3, "live": 4, "silent": ["web-2/0a1b2c3d"]}
    done = {
        "target": "agent:bot", "agent": "bot", "versions": ["v1"], "dry_run": False,
        "delay_seconds": 36.1, "refused_here_after_seconds": 0.004, "verifiers": verifiers,
    }  # fmt: skip
    text = render.cut(done)
    assert "refused everywhere after 36100 ms (3/4 verifiers)" in text
    assert "verifier web-2/0a1b2c3d did not answer" in text
    told = render.changed({"agent": "bot", "state": "suspended", "verifiers": verifiers})
    assert told.startswith("bot: suspended\n")
    assert "web-2/0a1b2c3d" in told


def test_verifiers_are_a_table() -> None:
    """A line for each with one word for how it is; where there is none, why."""
    one = {
        "id": "0a1b2c3d4e5f", "host": "web-2", "release": "1.0", "since": "2026-01-01T00:00:00Z",
        "epoch": 7, "renewed_at": "2026-01-01T00:00:00Z", "stale": False, "behind": True,
    }  # fmt: skip
    rows = [one, {**one, "stale": True}, {**one, "behind": False}]
    text = verifiers_table({"leased": True, "verifiers": rows})
    assert [word for word in ("behind", "stale", "fresh") if word in text] == [
        "behind",
        "stale",
        "fresh",
    ]
    assert "0a1b2c3d" in text
    assert "on SQLite" in verifiers_table({"leased": False, "verifiers": []})


def test_what_verifiers_saw_is_said_in_words() -> None:
    """Uses of a version, who lags behind, an ended one that was presented, and uses within an hour."""
    row = {
        "agent": "a", "state": "enabled",
        "current": {"version": "v2", "uses": 1, "last_used_at": "2026-03-01T11:00:00Z"},
        "previous": [{"version": "v1", "uses": 40, "laggards": ["a"]}],
        "presented": [
            {"version": "v0", "state": "revoked", "first_at": "2026-03-01T10:00:00Z",
             "last_at": "2026-03-01T11:30:00Z", "times": 3}
        ],
    }  # fmt: skip
    text = render.status_of_one(row, datetime(2026, 3, 1, 12, tzinfo=UTC))
    assert "v2 · last used 1h ago · 1 use\n" in text
    assert "v1 · 40 uses · still used by a" in text
    assert "PRESENTED      v0 · revoked · last 30m ago · first 2h ago" in text
    found = {"agent": "a", "version": "v1", "state": "current"}
    assert render.identified([found | {"uses_last_hour": 14}]).endswith("current, 14 uses an hour")
    assert render.identified([found | {"uses_last_hour": None}]).endswith("current")
