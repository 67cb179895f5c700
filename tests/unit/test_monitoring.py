"""Alerts, their pages and the board, by the tools of those who read them: promtool and Grafana's SDK."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from keyturn.cli.main import app
from keyturn.daemon.metrics import Metrics
from keyturn.daemon.readiness import Readiness, Reason
from keyturn.daemon.verifier_metrics import VerifierMetrics
from keyturn.verifier.http.measures import Measures

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "monitoring"
RUNBOOKS = ROOT / "docs" / "runbooks"
RULES = [
    rule
    for group in yaml.safe_load((MONITORING / "prometheus-rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = [rule["alert"] for rule in RULES]
TESTS = yaml.safe_load((MONITORING / "prometheus-rules.test.yaml").read_text())["tests"]
BOARD: dict[str, Any] = json.loads((MONITORING / "grafana-dashboard.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
OF_THE_SCRAPE = {"job", "instance", "le", "alertname", "alertstate"}


def of_a_verifier() -> dict[str, set[str]]:
    """Return the same of a verifier's process."""
    verifier: Any = SimpleNamespace(counts=Counter(), waiting=0, staleness=lambda: 0.0)
    desk: Any = SimpleNamespace(measures=Measures())
    metrics = VerifierMetrics(verifier, desk, Readiness())
    return {
        sample.name: set(sample.labels) - {"le"}
        for family in metrics.collect()
        for sample in family.samples
    }


def known() -> dict[str, set[str]]:
    """Return the labels of every sample that a scrape can have, by its name."""
    metrics = Metrics()
    metrics.follow(Readiness())
    endings = {
        "counter": ["_total"],
        "gauge": [""],
        "histogram": ["_bucket", "_sum", "_count"],
    }
    return {
        one._name + ending: set(one._labelnames)
        for one in metrics.registry._collector_to_names
        for ending in endings[one._type]
    } | of_a_verifier()


KNOWN = known()


def check(*args: str, folder: Path = MONITORING, stdin: str = "") -> None:
    """Run promtool; fail with what it says."""
    done = subprocess.run(
        ["promtool", *args], input=stdin, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def foreign(expression: str) -> Iterator[str]:
    """Yield what an expression names that no scrape has: metrics, labels, reasons."""
    for name, matchers in re.findall(r"\b(keyturn_\w+)(?:\{([^}]*)\})?", expression):
        if name not in KNOWN:
            yield name
            continue
        for label, value in re.findall(r'(\w+)[=!~]+"([^"]*)"', matchers):
            if label not in KNOWN[name] | OF_THE_SCRAPE:
                yield f"{name}{{{label}}}"
            if label == "reason" and value not in set(Reason):
                yield f"{name}{{reason={value}}}"
    labels = set.union(*KNOWN.values()) | OF_THE_SCRAPE
    for names in re.findall(r"\bby \(([^)]*)\)", expression):
        yield from (name for name in re.split(r",\s*", names) if name not in labels)


def test_prometheus_has_nothing_against_the_names() -> None:
    """The real promtool reads the page: units, endings and texts are as people expect them."""
    metrics = Metrics()
    metrics.follow(Readiness())
    metrics.step_duration.labels("activate", "vault-eu").observe(0.2)
    metrics.rotations.labels("promoted").inc()
    metrics.store_up.set(1)
    check("check", "metrics", stdin=metrics.text())


# --- rules ----------------------------------------------------------------------------------


def test_prometheus_takes_the_rules() -> None:
    """The real promtool parses every rule."""
    check("check", "rules", "--lint-fatal", "prometheus-rules.yaml")


def test_each_alert_fires_when_it_should_and_only_then() -> None:
    """The real promtool runs every rule over series; each expects one alert alone, or none."""
    check("test", "rules", "prometheus-rules.test.yaml")
    for alert in ALERTS:
        own = [test for test in TESTS if test["name"].startswith(f"{alert}: ")]
        expected = [bool(test["promql_expr_test"][0]["exp_samples"]) for test in own]
        assert True in expected, alert
        assert False in expected, alert


@pytest.mark.parametrize("rule", RULES, ids=ALERTS)
def test_an_alert_is_about_what_there_is_and_leads_to_its_page(rule: dict[str, Any]) -> None:
    """Metrics and labels exist; it says how urgent it is, what happened, and where to read on."""
    assert not list(foreign(rule["expr"]))
    assert rule["labels"]["severity"] in {"page", "ticket"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    page = ROOT / rule["annotations"]["runbook_url"]
    assert page == RUNBOOKS / f"{rule['alert']}.md"
    assert page.exists()
    shown = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
    assert shown <= set.union(*KNOWN.values())


# --- pages ----------------------------------------------------------------------------------


def test_each_page_has_an_alert() -> None:
    """No page is left over."""
    assert sorted(path.stem for path in RUNBOOKS.glob("*.md")) == sorted(ALERTS)


def test_the_how_to_lists_every_alert() -> None:
    """Whoever sets the monitoring up sees all that may fire, and how urgent each is."""
    text = (ROOT / "docs" / "howto" / "monitoring.md").read_text()
    listed = re.findall(r"^\| \[(\w+)\]\(\.\./runbooks/\1\.md\) \| (\w+) \|", text, re.MULTILINE)
    assert sorted(listed) == sorted((rule["alert"], rule["labels"]["severity"]) for rule in RULES)


@pytest.mark.parametrize("alert", ALERTS)
def test_a_page_begins_with_the_next_command(alert: str) -> None:
    """Title, then what to type; every command of ours on the page is one that the product takes."""
    text = (RUNBOOKS / f"{alert}.md").read_text()
    first = re.match(
        rf"# {alert}\n\n```\n(.+)\n```\n\n\*\*It shows\*\* .+\n\n\*\*It means\*\* ", text
    )
    assert first is not None
    assert "\n## What to do\n\n1. " in text
    assert "\n## When it is over\n\n" in text
    commands = [first[1], *re.findall(r"`(keyturn [^`]+)`", text)]
    assert first[1].split()[0] in {"keyturn", "df"}
    for command in commands:
        parse(command)


def parse(command: str) -> None:
    """Have the command line read it as it would from a shell, and do nothing."""
    program, *words = shlex.split(command, comments=True)
    if program != "keyturn":
        return
    group: Any = typer.main.get_command(app)
    while hasattr(group, "commands"):
        name = words.pop(0)
        assert name in group.commands, command
        group = group.commands[name]
    try:
        group.make_context(group.name, words)
    except Exception as error:
        raise AssertionError(command) from error


def test_a_wrong_command_on_a_page_is_found() -> None:
    """The check above can fail."""
    for wrong in ("keyturn stat", "keyturn status --al", "keyturn rotation abandon"):
        with pytest.raises(AssertionError):
            parse(wrong)


# --- board ----------------------------------------------------------------------------------


def lost(given: Any, read: Any, path: str = "") -> Iterator[str]:
    """Yield what a typed board does not have that the file has: names or forms that Grafana ignores."""
    if isinstance(given, dict):
        for key, value in given.items():
            if isinstance(read, dict) and key in read:
                yield from lost(value, read[key], f"{path}.{key}")
            elif value is not None:
                yield f"{path}.{key}"
    elif isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        for number, (one, other) in enumerate(zip(given, read, strict=True)):
            yield from lost(one, other, f"{path}[{number}]")
    elif given != read:
        yield path


def typed(board: dict[str, Any]) -> Any:
    """Read a board as Grafana's own types and write it again."""
    register_default_plugins()
    return json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(board)))


def test_grafana_knows_every_field_of_the_board() -> None:
    """Decoded into the types of Grafana's SDK and back nothing is lost; a slip of the pen would be."""
    assert list(lost(BOARD, typed(BOARD))) == []
    broken = json.loads(json.dumps(BOARD))
    broken["panels"][1]["options"]["colourMode"] = "background"
    assert list(lost(broken, typed(broken))) == [".panels[1].options.colourMode"]


def test_the_board_asks_what_there_is(tmp_path: Path) -> None:
    """The real promtool parses each expression, and each metric and label in it exists."""
    filled = [one.replace("$__rate_interval", "5m").replace("$job", ".+") for one in EXPRESSIONS]
    rules = [{"record": f"board:{n}", "expr": one} for n, one in enumerate(filled)]
    content = {"groups": [{"name": "board", "rules": rules}]}
    (tmp_path / "board.yaml").write_text(yaml.safe_dump(content))
    check("check", "rules", "board.yaml", folder=tmp_path)
    assert [name for one in EXPRESSIONS for name in foreign(one)] == []


def test_the_board_can_be_read() -> None:
    """Each panel says what it shows and stands beside the others, and none needs a fixed source."""
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    assert max(x for x, _ in taken) == 23
    assert all(panel["description"] for panel in PANELS)
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in PANELS)


def test_every_metric_is_on_the_board_or_left_out_on_purpose() -> None:
    """What is measured is shown; a new metric wants a panel, or a word here."""
    # `not_ready` says it with the reason; a verifier's ends are in the log, and it pages when down
    left_out = {"ready", "embedded_verifier_ends_total"}
    text = " ".join(EXPRESSIONS)
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in KNOWN}
    missing = {
        name.removeprefix("keyturn_")
        for name in families
        if not re.search(rf"\b{name}(_bucket)?\b", text)
    }
    assert missing == left_out
