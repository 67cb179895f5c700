"""What the daemon makes of what verifiers saw: numbers, alarms, and nothing of what they make up."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from keyturn.core.model import Version
from keyturn.daemon.commands import Commands
from keyturn.leaks import Leak
from keyturn.storage.usage import FILE
from keyturn.verifier.decision import Verified
from keyturn.verifier.usage import Usage
from support.installed import ME, Installed


class Bench(Installed):
    """An installation with a verifier that counts what a test says."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "a", "b")
        self.run("a", "b")
        self.usage = Usage(self.parts.usage, self.clock, source="t")

    def uses(self, agent: str, held: dict[str, str], number: int = 1) -> None:
        """Use a version, and have it written down and looked at."""
        yes = Verified(
            agent=agent, login=agent, version_id=held["version"], state="current", deadline=None
        )
        for _ in range(number):
            self.usage.accepted(yes)
        self.look()

    def look(self) -> None:
        """Flush, and look as the daemon does."""
        assert self.usage.flush()
        self.service._usage.look()

    def passes(self, **more: float) -> None:
        """Let time pass."""
        self.clock.by += timedelta(**more)

    def value(self, name: str, **labels: str) -> float | None:
        """Return a sample."""
        return self.service.metrics.registry.get_sample_value(f"keyturn_{name}", labels)

    def status(self, agent: str) -> dict[str, Any]:
        """Return what `keyturn status AGENT` shows."""
        function: Any = Commands(lambda: self.parts, self.service).table()["status"].function
        [found] = function({"agent": agent}, None, None)
        return dict(found)

    def told(self) -> list[tuple[str, str, str]]:
        """Return the incidents in the audit: code, agent, version."""
        return [
            (one.entry.outcome, one.entry.agent, one.entry.version_id)
            for one in self.parts.store.audit_entries(limit=200)
            if one.entry.action == "incident"
        ]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Give an installation with two agents that have a version each."""
    made = Bench(tmp_path)
    yield made
    made.end()


def test_where_nobody_counts_nothing_is_made_up(bench: Bench) -> None:
    """No file, no sample, and null in the status: never a zero that looks like an answer."""
    bench.service._usage.look()
    assert not (bench.folder / "state" / FILE).exists()
    assert bench.value("laggards") is None
    assert bench.value("usage_flushed_timestamp_seconds") is None
    shown = bench.status("a")
    assert (shown["current"]["uses"], shown["current"]["laggards"], shown["presented"]) == (
        None,
        None,
        None,
    )


def test_uses_show_in_the_status_and_in_identify(bench: Bench) -> None:
    """Of each version its own; one that nobody used has zero, and no time."""
    held = bench.held("a")
    bench.uses("a", held, 14)
    current = bench.status("a")["current"]
    assert (current["uses"], current["laggards"]) == (14, None)
    assert current["first_used_at"] == current["last_used_at"]
    unused = bench.status("b")["current"]
    assert (unused["uses"], unused["last_used_at"]) == (0, None)
    function: Any = Commands(lambda: bench.parts).table()["identify"].function
    ids = [held["version"], bench.held("b")["version"]]
    rows = function({"versions": ids}, None, None)
    assert [row["uses_last_hour"] for row in rows] == [14, 0]


def test_a_laggard_is_who_uses_the_old_one_after_everybody_should_have_read(bench: Bench) -> None:
    """Within `consumer_cache` (2 s) after the promotion it is none; later it is, until it stops."""
    old = bench.held("a")
    bench.parts.administration.rotate("a", ME)
    bench.run("a")
    bench.passes(seconds=1)
    bench.uses("a", old)
    assert bench.value("laggards") == 0
    [previous] = bench.status("a")["previous"]
    assert (previous["uses"], previous["laggards"]) == (1, [])
    bench.passes(seconds=2)
    bench.uses("a", old)
    assert bench.value("laggards") == 1
    shown = bench.status("a")
    assert shown["previous"][0]["laggards"] == ["a"]
    assert shown["safe_to_retire"]["ok"] is False
    assert shown["safe_to_retire"]["reason"].endswith(", and it is still used")


def test_a_grace_that_ends_in_use_is_seen_when_a_quarter_is_left(bench: Bench) -> None:
    """Of ten seconds: not at five; at eight, if it was used within two and a half; not once it is over."""
    old = bench.held("a")
    bench.parts.administration.rotate("a", ME)
    bench.run("a")
    found = []
    for used in (True, False, True, False):
        bench.passes(seconds=4)
        if used:
            bench.uses("a", old)
        bench.look()
        found.append(bench.value("grace_ending_in_use"))
    assert found == [0, 0, 0, 0]
    old = bench.held("b")
    bench.parts.administration.rotate("b", ME)
    bench.run("b")
    bench.passes(seconds=8)
    bench.uses("b", old)
    assert bench.value("grace_ending_in_use") == 1
    bench.passes(seconds=2)
    bench.look()
    assert bench.value("grace_ending_in_use") == 0


def test_silence_is_no_proof(bench: Bench) -> None:
    """Once no verifier has written for a quarter of an hour the samples are gone, laggards are null."""
    old = bench.held("a")
    bench.parts.administration.rotate("a", ME, grace=timedelta(hours=2), force=True)
    bench.run("a")
    bench.passes(seconds=3)
    bench.uses("a", old)
    assert bench.value("laggards") == 1
    bench.passes(minutes=16)
    bench.service._usage.look()
    assert bench.value("laggards") is None
    assert bench.value("grace_ending_in_use") is None
    [previous] = bench.status("a")["previous"]
    assert (previous["uses"], previous["laggards"]) == (1, None)


def test_answers_add_up_from_now_on(bench: Bench) -> None:
    """The daemon counts what comes after its start; what verifiers wrote before is not of its count."""
    bench.usage.failed("refused")
    bench.look()
    for _ in range(3):
        bench.usage.failed("refused")
    bench.uses("a", bench.held("a"), 2)
    assert bench.value("verifications_total", result="refused") == 3
    assert bench.value("verifications_total", result="accepted") == 2
    assert bench.value("verifications_total", result="limited") == 0


def ended(bench: Bench) -> Version:
    """Revoke what agent b has, and return it."""
    [version] = bench.case("b").accepted
    bench.parts.administration.revoke(Leak(agent="b", reason="leak"), ME)
    return version


def test_a_revoked_secret_that_is_presented_is_told_once_an_hour(bench: Bench) -> None:
    """In the audit, where webhooks read it, in the metric each time, and in the agent's status."""
    version = ended(bench)
    for _ in range(3):
        bench.usage._presented(version.id, "revoked")
        bench.look()
        bench.passes(minutes=1)
    assert bench.told() == [("revoked-presented", "b", version.id)]
    assert bench.value("retired_presented_total", state="revoked") == 3
    bench.passes(hours=1)
    bench.look()
    assert bench.told() == [("revoked-presented", "b", version.id)] * 2
    bench.passes(hours=2)
    bench.look()
    assert len(bench.told()) == 2
    assert bench.value("retired_presented_total", state="revoked") == 3
    [shown] = bench.status("b")["presented"]
    assert (shown["version"], shown["state"], shown["times"]) == (version.id, "revoked", 3)
    assert bench.status("a")["presented"] == []


def test_another_daemon_goes_on_where_this_one_was(bench: Bench) -> None:
    """What was told is marked beside it: a restart tells nothing again, and forgets nothing."""
    version = ended(bench)
    bench.usage._presented(version.id, "revoked")
    assert bench.usage.flush()
    bench.end()
    bench.begin()
    bench.service._usage.look()
    assert bench.value("retired_presented_total", state="revoked") == 1
    bench.end()
    bench.begin()
    bench.service._usage.look()
    assert bench.value("retired_presented_total", state="revoked") == 0
    assert len(bench.told()) == 1


def test_a_verifier_in_wrong_hands_makes_nothing_up(bench: Bench) -> None:
    """A version that is unknown or accepted raises nothing; the store says what has ended, and how."""
    ids = ["Z" * 14, bench.held("a")["version"]]
    for version_id in ids:
        bench.usage._presented(version_id, "revoked")
    version = ended(bench)
    bench.usage._presented(version.id, "retired")
    bench.look()
    assert bench.told() == [("revoked-presented", "b", version.id)]
    assert bench.value("retired_presented_total", state="retired") == 0
    assert bench.parts.usage.presented(untold=True) == []


def test_a_damaged_file_is_no_trouble(bench: Bench) -> None:
    """Where the file is damaged the look ends quietly, and the status shows null."""
    bench.uses("a", bench.held("a"))
    bench.parts.usage.close()
    (bench.folder / "state" / FILE).write_bytes(b"no database" * 1000)
    bench.service._usage.look()
    assert bench.status("a")["current"]["uses"] is None
