"""The snippets of the how-to, run as they stand: other people's verifiers, without any import of ours."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from keyturn.core.model import VersionState
from keyturn.core.secret import mint
from keyturn.testing.fakes import seeded
from support.least_rights import LeastRights, least_rights, put, put_version
from support.postgres import Cluster, postgres  # noqa: F401 - a fixture
from support.stores import entry

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "verifier-in-other-languages.md"
READERS = {"web": ["billing-bot", "shop-bot"]}
_PYTHON = "import sys\nfor line in sys.stdin: print(accepted(*line.split()), flush=True)\n"
_NODE = """
(async () => {
  for await (const line of require("readline").createInterface({ input: process.stdin }))
    console.log((await accepted(...line.split(" "))) ? "True" : "False");
  await store.end();
})();
"""


def snippet(language: str) -> str:
    """Return the one block of this language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return str(found)


@pytest.fixture
def rights(postgres: Cluster, tmp_path: Path) -> Iterator[LeastRights]:  # noqa: F811
    """Give a store with a reader."""
    with least_rights(postgres, tmp_path, READERS) as made:
        yield made


class Script:
    """A verifier that reads pairs and prints what it thinks of them."""

    def __init__(self, command: list[str], folder: Path, url: str) -> None:
        self._process = subprocess.Popen(
            command, cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "KEYTURN_VIEW": url},
        )  # fmt: skip

    def says(self, login: str, secret: str) -> str:
        """Return its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{login} {secret}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def end(self) -> None:
        """Let it end by itself."""
        self._process.communicate(timeout=30)
        assert self._process.returncode == 0


def python(folder: Path, url: str) -> Script:
    """Start the snippet in Python, without this project's folders in its path."""
    (folder / "verify.py").write_text(snippet("python") + _PYTHON)
    return Script([sys.executable, "-I", "verify.py"], folder, url)


def node(folder: Path, url: str) -> Script:
    """Start the snippet in Node, with the packages that the page names."""
    subprocess.run(
        ["npm", "install", "--silent", "--no-fund", "--no-audit", "pg", "argon2"],
        cwd=folder, check=True, timeout=240,
    )  # fmt: skip
    (folder / "verify.js").write_text(snippet("js") + _NODE)
    return Script(["node", "verify.js"], folder, url)


def test_they_are_ten_lines_and_import_nothing_of_ours() -> None:
    """What the page promises can be counted."""
    for language in ("python", "js"):
        text = snippet(language)
        assert len([line for line in text.splitlines() if line]) <= 10
        assert not re.search(r"(import|from|require)\W+keyturn", text)


@pytest.mark.parametrize("start", [python, pytest.param(node, marks=pytest.mark.full)])
def test_the_snippets_say_what_our_verifier_says(
    rights: LeastRights, tmp_path: Path, start: type[Script]
) -> None:
    """Yes to what is accepted now, no to everything else, and no at once after a revoke."""
    store = rights.open()
    now = store.now()
    _, current = put(store, "billing-bot", seed=1)
    _, over = put_version(
        store, "cred-billing-bot", "billing-bot", seed=2, seq=2,
        state=VersionState.KEPT, deadline=now.replace(year=now.year - 1),
    )  # fmt: skip
    _, other = put(store, "hidden-bot", seed=3)
    _, unknown = mint(random_bytes=seeded(4))
    folder = tmp_path / "theirs"
    folder.mkdir()
    script = start(folder, rights.url("keyturn_reader_web"))
    good = current.reveal()
    swapped = good[:-7] + ("0" if good[-7] != "0" else "1") + good[-6:]
    assert script.says("billing-bot", good) == "True"
    for login, secret in (
        ("billing-bot", swapped), ("billing-bot", over.reveal()), ("billing-bot", unknown.reveal()),
        ("shop-bot", good), ("hidden-bot", other.reveal()), ("billing-bot", "junk"),
    ):  # fmt: skip
        assert script.says(login, secret) == "False"
    assert script.says("billing-bot", good) == "True"
    ended = store.now()
    store.amend(
        "cred-billing-bot",
        lambda case: (
            replace(
                case,
                versions=tuple(
                    replace(v, state=VersionState.REVOKED, deadline=None, ended_at=ended)
                    for v in case.versions
                ),
            ),
            [entry()],
        ),
    )
    assert script.says("billing-bot", good) == "False"
    script.end()
