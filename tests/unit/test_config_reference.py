"""The configuration reference is what the models say."""

from __future__ import annotations

from pathlib import Path

from keyturn.config.reference import render

REFERENCE = Path(__file__).parents[2] / "docs/reference/configuration.md"


def test_the_reference_is_made_from_the_models() -> None:
    """The file in the docs is what the command prints; make it anew after a change of a model."""
    assert REFERENCE.read_text() == render()


def test_every_key_says_what_is_expected() -> None:
    """No field falls back to a text that says nothing."""
    assert "a value of another form" not in render()
    assert "| text |" not in render()
