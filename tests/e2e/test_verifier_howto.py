"""The how-to about the verifier says what is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from keyturn import config
from keyturn.core.secret import Secret
from keyturn.verifier.hashing import CHEAP_FOR_TESTS, Hashing
from support.cutter import open_store
from support.http_verifier import fill

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "verifier.md"


def blocks(kind: str) -> list[str]:
    """Return the page's blocks of code of a kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def test_a_service_can_decide_by_itself(tmp_path: Path) -> None:
    """The lines for one's own process work as they stand, but for the place of the store."""
    (code,) = blocks("python")
    assert code.count('"/var/lib/keyturn"') == 1
    store = open_store(tmp_path, writer="w")
    (tmp_path / "revoked.d").mkdir(mode=0o700, exist_ok=True)
    (held,) = fill(store, ["a"], hashing=Hashing(cost=CHEAP_FOR_TESTS))
    names: dict[str, Any] = {}
    exec(code.replace('"/var/lib/keyturn"', repr(str(tmp_path))), names)
    who = names["who"]
    assert who("a", held.secret.reveal()) == (200, "a")
    assert who("a", Secret("wrong").reveal()) == (401, "")
    (tmp_path / "revoked.d" / held.version_id).touch(mode=0o600)
    assert who("a", held.secret.reveal()) == (401, "")
    names["verifier"].close()
    store.close()


def test_every_configuration_on_the_page_is_one(tmp_path: Path) -> None:
    """Each block of YAML is taken by `keyturn verifier`."""
    tmp_path.chmod(0o700)
    path = tmp_path / "k.yaml"
    path.touch(mode=0o600)
    found = blocks("yaml")
    assert len(found) == 4
    for text in found:
        content = yaml.safe_load(text) | {"version": 1}
        path.write_text(yaml.safe_dump(content))
        assert config.load_verifier(path, environ={}).verifier is not None
