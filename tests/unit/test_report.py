"""What `keyturn report` counts, and what a spreadsheet makes of it."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from keyturn.cli.report import as_csv, as_table
from keyturn.daemon.report import report
from keyturn.leaks import Leak
from support.installed import ME, Installed


@pytest.fixture
def keyturn(tmp_path: Path) -> Iterator[Installed]:
    """Give an installation with two agents, the first of which rotated twice."""
    one = Installed(tmp_path, "a", "b")
    one.content["agents"]["b"]["owner"] = "=HYPERLINK(1)"
    one.reload()
    one.run("a", "b")
    for _ in range(2):
        one.parts.administration.rotate("a", ME)
        one.run("a")
    yield one
    one.end()


def test_it_counts_what_became_current_and_what_was_revoked(keyturn: Installed) -> None:
    """In the span that was asked for, and not before it."""
    keyturn.parts.administration.revoke(Leak(agent="b", reason="leak"), ME)
    rows = {row["agent"]: row for row in report(keyturn.parts, since=timedelta(days=1))}
    assert (rows["a"]["rotations"], rows["a"]["revoked"]) == (3, 0)
    assert (rows["b"]["rotations"], rows["b"]["revoked"]) == (1, 1)
    assert (rows["a"]["state"], rows["b"]["state"]) == ("enabled", "suspended")
    assert rows["a"]["version"] == keyturn.held("a")["version"]
    assert (rows["b"]["version"], rows["b"]["age_days"]) == (None, None)
    assert rows["a"]["file"] == str(keyturn.config)
    later = report(keyturn.parts, since=timedelta(microseconds=1))
    assert {row["rotations"] for row in later} == {0}


def test_age_is_counted_from_the_mint(keyturn: Installed) -> None:
    """And compared with the policy's maximum."""
    keyturn.clock.by = timedelta(days=91)
    keyturn.parts.clock.trust()
    row = report(keyturn.parts, since=timedelta(days=365))[0]
    assert row["age_days"] == pytest.approx(91, abs=0.1)
    assert row["over_max_age"] is True


def test_a_spreadsheet_sees_text_and_no_formula(keyturn: Installed) -> None:
    """Every row has every column, and what begins like a formula is quoted."""
    rows = report(keyturn.parts, since=timedelta(days=1))
    read = list(csv.DictReader(as_csv(rows).splitlines()))
    assert [one["agent"] for one in read] == ["a", "b"]
    assert read[1]["owner"] == "'=HYPERLINK(1)"
    assert (read[0]["refusals"], read[0]["over_max_age"], read[0]["rotations"]) == ("", "no", "3")
    assert "AGE DAYS" in as_table(rows)
