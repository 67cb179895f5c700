"""Prints the configuration reference from the models: `python -m keyturn.config.reference`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from keyturn.config import listening, models, verifying
from keyturn.config.shape import form_of
from keyturn.core.duration import format_duration

_INTRODUCTION = """\
# Configuration reference

Made from the settings by `python -m keyturn.config.reference > docs/reference/configuration.md`.

The main file is YAML: text, whole numbers, decimals, `true`, `false` and `null`, no anchors, aliases
or tags, each key once. It and every folder above it belong to root or to the daemon's uid, and
nobody else may write there. Every problem is reported as `file:line: key: what is expected`; values
are never printed.

`KEYTURN_STORE__…` and `KEYTURN_LOG__…` in the environment come before the file (for example
`KEYTURN_STORE__URL`). Nothing else can be set from there.
"""
_CONNECTIONS = """
## `connections.NAME`

A named way to reach a destination: address, login, limits. Main file only. `type` names the kind of
destination (`file`, `vault`, `aws`, `azure`, or one that is installed as an entry point
`keyturn.destinations`); the other keys are its own.
"""
_SECTIONS: list[tuple[str, type[BaseModel]]] = [
    ("Top", models.TopSection),
    ("`store`", models.StoreSettings),
    ("`store.readers.GROUP`", models.ReaderSection),
    ("`log`", models.LogSettings),
    ("`policies.NAME`", models.PolicySection),
    ("`policies.NAME.max_age`", models.MaxAge),
    ("`policies.NAME.retry`", models.RetrySection),
    ("`verifier`", verifying.VerifierSection),
    ("`verifier.listen`", verifying.VerifierListen),
    ("`verifier.relying_parties.NAME`", verifying.RelyingPartySection),
    ("`verifier.keys.ID`", verifying.KeySection),
    ("`admin`", models.AdminSettings),
    ("`admin.groups`", models.GroupSettings),
    ("`listen`", listening.ListenSettings),
    ("`listen.tls`", listening.TlsSection),
    ("`reload`", models.ReloadSettings),
    ("`audit`", models.AuditSettings),
    ("`notify[]`", models.HookSection),
    ("`agents.ID`", models.AgentSection),
    ("`agents.ID.destinations[]`", models.TargetSection),
    ("`agents.ID.destinations[].keys`", models.KeysSection),
]


def render() -> str:
    """Return the reference as Markdown."""
    parts = [_INTRODUCTION]
    for heading, model in _SECTIONS:
        if model is models.PolicySection:
            parts.append(_CONNECTIONS)
        text = (model.__doc__ or "").strip()
        rows = "\n".join(_row(name, field) for name, field in model.model_fields.items())
        parts.append(
            f"\n## {heading}\n\n{text}{_rule(model)}\n\n"
            f"| key | expected | default | meaning |\n|---|---|---|---|\n{rows}\n"
        )
    return "".join(parts)


def _rule(model: type[BaseModel]) -> str:
    rule = model.__dict__.get("rule")
    return f" Expected together: {rule}." if rule else ""


def _row(name: str, field: FieldInfo) -> str:
    cells = (f"`{name}`", form_of(field), default_of(field), field.description or "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def default_of(field: FieldInfo) -> str:
    """Return the default as it would be written."""
    if field.is_required():
        return "required"
    return ", ".join(_values(field.get_default(call_default_factory=True)))


def _values(value: Any) -> Iterator[str]:
    if isinstance(value, BaseModel):
        given = value.model_fields_set
        yield (
            "{" + ", ".join(f"{k}: {next(_values(getattr(value, k)))}" for k in given) + "}"
            if given
            else "see there"
        )
    elif isinstance(value, timedelta):
        yield f"`{format_duration(value)}`"
    elif isinstance(value, float):
        yield f"`{value:.0%}`"
    elif isinstance(value, bool):
        yield f"`{str(value).lower()}`"
    else:
        yield f"`{value}`" if value not in (None, []) else "none"


if __name__ == "__main__":
    sys.stdout.write(render())
