"""Adapters are found by entry point, and only those that are named are imported."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from keyturn.destinations import registry
from keyturn.destinations.file import FileDestination
from keyturn.destinations.memory import MemoryDestination
from keyturn.errors import ConfigError


def _installed(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    found = EntryPoints(
        EntryPoint(name=name.rstrip("_"), value=value, group=registry.GROUP)
        for name, value in points.items()
    )
    monkeypatch.setattr(registry, "entry_points", found.select)


def test_the_shipped_types_are_found() -> None:
    """What pyproject declares can be loaded by its name."""
    assert registry.load("file") is FileDestination
    assert registry.load("memory") is MemoryDestination
    assert {"aws", "azure", "file", "memory", "vault"} <= set(registry.names())


def test_an_unknown_type_lists_those_that_are_known() -> None:
    """A typo is answered with the choices, but not with what is there for tests alone."""
    with pytest.raises(ConfigError, match="aws, azure, file, vault") as refused:
        registry.load("fiel")
    assert "memory" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "library"),
    [("vault", "hvac"), ("aws", "boto3.session"), ("azure", "azure.keyvault.secrets")],
)
def test_a_missing_library_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, kind: str, library: str
) -> None:
    """Who names a type without its library gets the line to type."""
    monkeypatch.setitem(sys.modules, library, None)
    for name in [name for name in sys.modules if name.startswith(f"keyturn.destinations.{kind}")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError) as error:
        registry.load(kind)
    assert error.value.hint == f"pip install 'keyturn[{kind}]'"


def test_a_bug_of_ours_is_no_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of ours that is not there is an error of ours."""
    _installed(monkeypatch, lost="keyturn.destinations.lost:Lost")
    with pytest.raises(ModuleNotFoundError):
        registry.load("lost")


def test_two_packages_cannot_claim_one_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the search path never chooses who gets the secrets."""
    _installed(monkeypatch, vault="keyturn.destinations.vault:V", vault_="evil.vault:V")
    with pytest.raises(ConfigError, match="two installed packages"):
        registry.load("vault")


def test_what_is_no_destination_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point must lead to a class made from the template."""
    _installed(monkeypatch, json="json:JSONDecoder", text="sys:platform")
    for name in ("json", "text"):
        with pytest.raises(ConfigError, match="no destination"):
            registry.load(name)


def test_nothing_is_imported_that_is_not_named() -> None:
    """Listing the types and loading one leaves the libraries of the others alone."""
    code = (
        "import sys; from keyturn.destinations import registry; "
        "registry.names(); registry.load('file'); import keyturn.testing; "
        "print([m for m in ('hvac', 'requests', 'boto3', 'botocore', 'moto', 'azure', 'msal', 'pytest', "
        "'keyturn.destinations.vault', 'keyturn.destinations.aws', 'keyturn.destinations.azure') "
        "if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"
