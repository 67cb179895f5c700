"""A thousand wrong files with canaries as values: none is printed, all are placed."""

from __future__ import annotations

import copy
import re
import tempfile
import traceback
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from keyturn.config import load
from keyturn.daemon.cron import Crontab
from keyturn.errors import ConfigError

Place = tuple[str | int, ...]


class FakeAuth(BaseModel):
    """Nested options with a choice."""

    model_config = ConfigDict(extra="forbid")

    method: str = Field(pattern="^(approle|token)$", description="approle or token")


class FakeOptions(BaseModel):
    """Options that print their input where nobody stops them."""

    model_config = ConfigDict(extra="forbid")

    address: str = Field(pattern="^https://[a-z.]+$")
    auth: FakeAuth
    limit: int = 5


class FakeAdapter:
    """Only its options count here."""

    Options = FakeOptions


def adapter(kind: str) -> type[FakeAdapter]:
    """Find the one type there is, as the registry does: known names only in the text."""
    if kind != "fake":
        raise ConfigError("unknown type of destination: expected one of: fake")
    return FakeAdapter


BASE: dict[str, Any] = {
    "version": 1,
    "store": {"url": "sqlite:////var/lib/k.db", "password_file": "/run/p", "state_dir": "/var/lib/k"},
    "log": {"level": "info", "format": "json"},
    "connections": {"vault": {"type": "fake", "address": "https://v", "auth": {"method": "token"}, "limit": 3}},
    "policies": {
        "default": {
            "every": "30d", "jitter": "10%", "grace": "48h", "consumer_cache": "24h", "zone": "UTC",
            "window": "Mon-Fri 02:00-05:00", "max_age": {"after": "90d", "mode": "alert"},
            "first_rotation": "now", "retire": "leave",
            "retry": {"first": "2s", "max": "15m", "settle_after": "5m"},
        },
        "nightly": {"extends": "default", "cron": "0 3 * * tue"},
    },
    "verifier": {"lease": "30s", "poll": "250ms"},
    "admin": {"socket": "/run/k.sock", "groups": {"view": "v", "respond": "r", "admin": "a"}},
    "revocations_file": "/etc/k",
    "revocations": ["agent:gone at=2026-01-01T00:00:00Z"],
    "agents": {
        "bot": {
            "login": "bot", "policy": "nightly",
            "destinations": [
                {"to": "vault", "path": "a/b", "keys": {"id": "i", "secret": "s", "version": "v"}, "merge": True, "adopt": False}
            ],
        }
    },
}  # fmt: skip


def places(data: Any, at: Place = ()) -> list[Place]:
    """Every place of the data but the top."""
    items = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    )
    return [found for key, value in items for found in [(*at, key), *places(value, (*at, key))]]


def inside(data: Any, at: Place) -> Any:
    """What stands at a place."""
    for part in at:
        data = data[part]
    return data


def name(at: Place) -> str:
    """Oracle: how a place is written."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in at).lstrip(".")


PLACES = places(BASE)
MAPPINGS = [at for at in [(), *PLACES] if isinstance(inside(BASE, at), dict)]
# These hold ids: any plain word is a good key there.
BY_ID = [("connections",), ("policies",), ("agents",)]
# Wrong wherever it stands: the blank and the mark fit no form.
CANARY = st.from_regex(r"cAnary [a-z0-9:@/]{3,12} ?!", fullmatch=True)
# Beginnings that mean something to a YAML parser.
RAW = [
    "*{}",
    "&{} x",
    "!{} x",
    "{{{}",
    "[{}",
    '"{}',
    "'{}",
    "{}: {}: x",
    "|{}",
    "@{}",
    "`{}",
    "%{}",
    "\t{}",
    "\x07{}",
    "- {}",
    "? {}",
]


def refusal(text: str, canary: str) -> tuple[str, list[str]]:
    """Load a wrong file; check that nothing of its error holds the canary; return file and lines."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "k.yaml"
        path.write_text(text)
        path.chmod(0o600)
        with pytest.raises(ConfigError) as caught:
            load(path, environ={}, cron=Crontab(), adapter=adapter)
    error: BaseException | None = caught.value
    shown = "".join(traceback.TracebackException.from_exception(caught.value).format())
    while error is not None:
        shown += f"{error}{error!r}{error.args}{vars(error)}"
        error = error.__cause__ or error.__context__
    for word in (canary, *re.findall(r"[A-Za-z0-9@:/]{5,}", canary)):
        assert word not in shown
    lines = str(caught.value).splitlines()
    assert lines
    for line in lines:
        assert re.match(rf"{re.escape(str(path))}:[1-9][0-9]*: [a-z(][^ ]*: .*[a-z)]", line), line
    return str(path), lines


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    at=st.sampled_from(PLACES),
    canary=CANARY,
    form=st.sampled_from(["text", "list", "mapping", "unknown"]),
    data=st.data(),
)
def test_no_value_is_ever_printed(at: Place, canary: str, form: str, data: st.DataObject) -> None:
    """1,000 wrong files: 0 canaries in any message, repr or traceback; file, line and key each time."""
    wrong = copy.deepcopy(BASE)
    if form == "unknown":
        holder = data.draw(st.sampled_from([found for found in MAPPINGS if found not in BY_ID]))
        at = (*holder, "mystery")
        inside(wrong, holder)["mystery"] = canary
    else:
        value = {"text": canary, "list": [canary], "mapping": {"x": canary}}[form]
        inside(wrong, at[:-1])[at[-1]] = value
    text = yaml.safe_dump(wrong, sort_keys=False)
    path, lines = refusal(text, canary)
    # The key itself is named, or one in it, or the section that does not fit together any more.
    assert any(
        line.split(": ")[1].startswith(
            (name(at), "agents.bot" if at[0] == "connections" else name(at))
        )
        for line in lines
    ), lines
    number = text[: text.index("cAnary")].count("\n") + 1
    near = [int(line[len(path) + 1 :].split(":")[0]) for line in lines]
    assert any(abs(found - number) <= 2 for found in near), (near, number)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(at=st.sampled_from(PLACES), canary=CANARY, raw=st.sampled_from(RAW))
def test_no_broken_yaml_is_ever_quoted(at: Place, canary: str, raw: str) -> None:
    """Raw canaries that break the YAML itself are not quoted by the parser's errors either."""
    wrong = copy.deepcopy(BASE)
    inside(wrong, at[:-1])[at[-1]] = "PLACEHOLDER"
    text = yaml.safe_dump(wrong, sort_keys=False).replace("PLACEHOLDER", raw.format(canary, canary))
    refusal(text, canary)
