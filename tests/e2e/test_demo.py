"""The demonstration is what people see first: it is true, everywhere, and it tells when something fails."""

from __future__ import annotations

from typing import Any

import pytest

from keyturn.cli import demo
from keyturn.errors import Refused


def test_nobody_is_refused_while_secrets_rotate_everywhere_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Files, OpenBao, AWS and Azure for every agent: rotations, a revoke, and not one wrong refusal."""
    assert demo.demo("all", seconds=8) == 0
    said = capsys.readouterr().out
    assert "OK: no agent was refused" in said
    assert "file, vault, aws, azure" in said
    assert " refused 0 " in said


def test_a_refusal_makes_it_fail(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Agents that present something else than they read are refused, and the demo says FAILED."""
    fresh = demo._Agent._fresh

    def wrong(agent: Any, held: dict[str, Any]) -> dict[str, Any]:
        return {**fresh(agent, held), "id": "somebody-else"}

    monkeypatch.setattr(demo._Agent, "_fresh", wrong)
    assert demo.demo("file", seconds=4) == 1
    assert "FAILED" in capsys.readouterr().out


def test_an_unknown_destination_is_named() -> None:
    """A typing error gets the list."""
    with pytest.raises(Refused, match="no demo for floppy") as refused:
        demo.demo("floppy")
    assert "azure or all" in refused.value.hint
