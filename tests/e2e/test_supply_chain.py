"""What is installed and shipped: locks with hashes, a wheel that is built twice alike, the SBOM."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = {"all": ROOT / "requirements" / "all.lock", "build": ROOT / "requirements" / "build.lock"}
PYTHONS = ("3.11", "3.12", "3.13")
EPOCH = "1577836800"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def wanted(name: str) -> list[Requirement]:
    """Return what pyproject asks for: of the product with the extra `all`, or of the build."""
    if name == "build":
        return [Requirement(line) for line in PROJECT["dependency-groups"]["build"]]
    extras = PROJECT["project"]["optional-dependencies"]
    (everything,) = [Requirement(line) for line in extras["all"]]
    lines = [*PROJECT["project"]["dependencies"]]
    return [
        Requirement(line) for line in (*lines, *(x for e in everything.extras for x in extras[e]))
    ]


def pinned(name: str) -> dict[str, list[tuple[Requirement, int]]]:
    """Return each requirement of a lock with the number of its hashes."""
    found: dict[str, list[tuple[Requirement, int]]] = {}
    for block in re.split(r"\n(?=\S)", LOCKS[name].read_text().replace("\\\n", " ")):
        line = block.partition("#")[0]
        one = Requirement(line.partition("--hash")[0].strip())
        found.setdefault(canonicalize_name(one.name), []).append(
            (one, line.count("--hash=sha256:"))
        )
    return found


@pytest.mark.parametrize("name", LOCKS)
@pytest.mark.parametrize("python", PYTHONS)
def test_the_locks_satisfy_pyproject(name: str, python: str) -> None:
    """On every Python each requirement is met by exactly one version, with its hashes."""
    lock = pinned(name)
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    for need in wanted(name):
        if need.marker and not need.marker.evaluate(environment):
            continue
        here = [
            one
            for one, _ in lock[canonicalize_name(need.name)]
            if one.marker is None or one.marker.evaluate(environment)
        ]
        (one,) = here
        (pin,) = one.specifier
        assert pin.operator == "=="
        assert need.specifier.contains(pin.version), f"{need}: `make lock`"
    assert all(hashes for pins in lock.values() for _, hashes in pins)


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_names_no_place_to_load_from(name: str) -> None:
    """Whose mirror made it is nobody's business, and no host is trusted by it."""
    text = LOCKS[name].read_text()
    assert not re.search(r"https?:|index-url|find-links|trusted-host|file:", text)


def build(folder: Path, *, umask: int) -> Path:
    """Build the wheel in a copy of the sources; returns it."""
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / name)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src", folder / "src", ignore=ignore, copy_function=shutil.copyfile)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"]
    environ = {**os.environ, "SOURCE_DATE_EPOCH": EPOCH}
    done = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, umask=umask, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next((folder / "dist").glob("*.whl"))


def test_the_same_sources_make_the_same_wheel(tmp_path: Path) -> None:
    """Built twice in different places, at different times and by different habits: equal bytes."""
    first, second = build(tmp_path / "a", umask=0o022), build(tmp_path / "some", umask=0o077)
    digests = {hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in (first, second)}
    assert len(digests) == 1
    names = zipfile.ZipFile(first).namelist()
    assert "keyturn/entry.py" in names
    assert not [name for name in names if name.startswith(("tests", "requirements"))]


@pytest.mark.full
def test_the_sbom_is_valid_and_whole(tmp_path: Path) -> None:
    """`make sbom` names every package of the locked environment, and says the same each time."""
    texts = []
    for name in ("sbom.json", "again.json"):
        subprocess.run(["make", "-s", "sbom", f"SBOM={tmp_path / name}"], cwd=ROOT, check=True)
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]
    assert str(ROOT) not in texts[0]
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(texts[0]) is None
    found = json.loads(texts[0])
    assert found["metadata"]["component"]["name"] == "keyturn"
    parts = {canonicalize_name(one["name"]): one["version"] for one in found["components"]}
    here = {
        name: next(iter(one.specifier)).version
        for name, pins in pinned("all").items()
        for one, _ in pins
        if one.marker is None or one.marker.evaluate()
    }
    assert parts == here
