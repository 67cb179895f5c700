"""The canary over the whole suite sees a leak: in every kind of place, in every form, at rest too."""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import json
import logging
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import urllib.parse
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from keyturn.cli.client import AdminClient
from keyturn.core import secret
from keyturn.daemon import logs
from keyturn.daemon.metrics import Metrics
from keyturn.errors import Denied
from support import canary_watch
from support.canary_watch import Hooks, Watch
from support.postgres import Cluster, postgres

__all__ = ["postgres"]  # a fixture

SEED = 20260313
PUBLIC = len("kt_") + secret.VERSION_ID_LENGTH + 1
TESTS = Path(__file__).parents[1]


def made_up(number: int) -> str:
    """Return a text in the form of a secret that nothing has minted: the real canary knows none."""
    draw = random.Random(f"{SEED} {number}")
    parts = (secret.VERSION_ID_LENGTH, secret.RANDOM_LENGTH + secret.CHECKSUM_LENGTH)
    return "_".join(["kt", *("".join(draw.choices(secret.ALPHABET, k=size)) for size in parts)])


def hidden(text: str) -> str:
    """Return the random part."""
    return text[PUBLIC : PUBLIC + secret.RANDOM_LENGTH]


def _zip(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("log", b"x" * 100 + data)
    return file.getvalue()


FORMS: dict[str, Callable[[str], bytes]] = {
    "plain": str.encode,
    "piece of 8": lambda s: s[PUBLIC + 11 : PUBLIC + 19].encode(),
    "first 8": lambda s: s[: PUBLIC + 8].encode(),
    "reversed": lambda s: s[::-1].encode(),
    "base64+0": lambda s: base64.b64encode(s.encode()),
    "base64+1": lambda s: base64.b64encode(b"{" + s.encode()),
    "base64+2": lambda s: base64.b64encode(b'{"' + s.encode()),
    "base64url": lambda s: base64.urlsafe_b64encode(b"\xff\xfe" + s.encode()),
    "base64 between letters": lambda s: b"abcde" + base64.b64encode(s.encode()) + b"f",
    "hex": lambda s: s.encode().hex().encode(),
    "HEX, one off": lambda s: b"a" + s.encode().hex().upper().encode(),
    "utf-16-le": lambda s: s.encode("utf-16-le"),
    "utf-16-be": lambda s: s.encode("utf-16-be"),
    "utf-32": lambda s: s.encode("utf-32-be"),
    "url": lambda s: "".join(f"%{ord(letter):02x}" for letter in s).encode(),
    "url, quoted": lambda s: urllib.parse.quote(f"a={s}&", safe="").encode(),
    "JSON": lambda s: json.dumps({"a": s}).encode(),
    "JSON, escaped": lambda s: "".join(f"\\u{ord(letter):04x}" for letter in s).encode(),
    "gzip": lambda s: gzip.compress(b"x" * 50 + s.encode()),
    "zlib": lambda s: zlib.compress(b"x" * 50 + s.encode()),
    "zip": lambda s: _zip(s.encode()),
    "gzip in gzip": lambda s: gzip.compress(gzip.compress(s.encode())),
    "base64 of gzip": lambda s: base64.b64encode(gzip.compress(s.encode())),
    "base64 in gzip": lambda s: gzip.compress(base64.b64encode(s.encode())),
    "base64 in hex": lambda s: base64.b64encode(s.encode()).hex().encode(),
    "utf-16 in zip": lambda s: _zip(s.encode("utf-16-le")),
}


@pytest.fixture
def watch() -> Watch:
    """Give a watch of its own that knows one secret among many: no leak of this test is a real one."""
    one = Watch()
    for number in range(200):
        one.mints(hidden(made_up(number)))
    return one


@pytest.fixture
def text() -> str:
    """Give the secret that leaks."""
    return made_up(77)


@pytest.fixture
def hooked(watch: Watch) -> Iterator[Watch]:
    """Wrap once more for this watch alone."""
    hooks = Hooks(watch)
    yield watch
    hooks.undo()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_found_and_not_told(watch: Watch, text: str, form: str) -> None:
    """Between bytes of noise each form is found; the report names place and form, never a value."""
    noise = random.Random(SEED).randbytes(3000)
    watch.search("here", noise + b"\n" + FORMS[form](text) + b"\n" + noise)

    assert {place for place, _ in watch.hits} == {"here"}
    assert not only(text).scanner.find(str(watch.hits).encode())


def only(text: str) -> Watch:
    """Return a watch that knows this secret alone."""
    one = Watch()
    one.mints(hidden(text))
    return one


def test_what_is_public_is_no_leak(watch: Watch) -> None:
    """Version ids, hashes, other secrets, noise: nothing of two megabytes is taken for a leak."""
    draw = random.Random(SEED)
    lines = [f"{made_up(n)[:PUBLIC]}*** {draw.randbytes(32).hex()}" for n in range(200)]
    lines += [made_up(number) for number in range(1000, 3000)]
    watch.search("public", "\n".join(lines).encode() + draw.randbytes(2_000_000))

    assert watch.hits == set()


def _store(path: Path, data: bytes) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE audit (detail BLOB)")
        connection.execute("INSERT INTO audit VALUES (?)", (data,))
    connection.close()


FILES: dict[str, Callable[[Path, bytes], object]] = {
    "daemon.log": lambda path, data: path.write_bytes(b"start\n" + data + b"\nend\n"),
    "daemon.log.1.gz": lambda path, data: path.write_bytes(gzip.compress(b"start\n" + data)),
    "ledger": lambda path, data: path.write_bytes(b"{}\n" + data + b"\n{}\n"),
    "keyturn.db": _store,
    "keyturn.db-journal": lambda path, data: path.write_bytes(bytes(512) + data),
    "backup.zip": lambda path, data: path.write_bytes(_zip(data)),
}


@pytest.mark.parametrize("form", ["plain", "piece of 8", "base64+1", "hex", "utf-16-le", "gzip"])
@pytest.mark.parametrize("name", FILES)
def test_a_leak_at_rest_is_found(
    watch: Watch, text: str, tmp_path: Path, name: str, form: str
) -> None:
    """In logs, rotated logs, ledger, store, journal and backups, below any folder."""
    place = tmp_path / "state" / "deep" / name
    place.parent.mkdir(parents=True)
    FILES[name](place, FORMS[form](text))
    watch.search_tree(tmp_path)

    assert {where for where, _ in watch.hits} == {f"file state/deep/{name}"}


def test_only_a_declared_folder_may_hold_secrets(watch: Watch, text: str, tmp_path: Path) -> None:
    """The root of a destination is left out by its path, its neighbour of the same name is not."""
    for name in ("agents", "other/agents"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "bot.json").write_text(text)
    config = {"connections": {"files": {"type": "file", "root": str(tmp_path / "agents")}}}
    (tmp_path / "keyturn.yaml").write_text(json.dumps(config))
    watch.search_tree(tmp_path)

    assert watch.hits == {("file other/agents/bot.json", "plain")}


@pytest.mark.parametrize("form", ["plain", "base64+2", "hex", "gzip"])
def test_a_leak_in_postgresql_is_found(
    watch: Watch, text: str, postgres: Cluster, form: str
) -> None:
    """Whatever table and type it is in."""
    url = postgres.new_database()
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE audit (detail bytea)")
        connection.execute("INSERT INTO audit VALUES (%s)", (FORMS[form](text),))
        connection.commit()
    watch.search_postgres(iter([url]))

    assert {place for place, _ in watch.hits} == {"PostgreSQL table audit"}


# --- the hooks ------------------------------------------------------------------------------


def _argv(text: str) -> None:
    subprocess.run([sys.executable, "-c", "", text], check=True)


def _environ(text: str) -> None:
    subprocess.run([sys.executable, "-c", ""], env={"TOKEN": text}, check=True)


def _command(text: str) -> None:
    subprocess.run(
        [sys.executable, "-c", "import sys; print(sys.stdin.read())"],
        input=text.encode(),
        capture_output=True,
        check=True,
    )


def _error(text: str) -> None:
    """Make an error as a module of the product would."""
    code = compile("Denied('for ' + text)", f"{canary_watch._PRODUCT}/rotation.py", "eval")
    eval(code, {"Denied": Denied, "text": text})


def _metrics(text: str) -> None:
    metrics = Metrics()
    metrics.rotations.labels(text).inc()
    metrics.text()


def _log(text: str) -> None:
    """Log it in a form that the mask cannot know."""
    logs._masked(None, "info", base64.b64encode(text.encode()).decode())


HOOKS: dict[str, Callable[[str], None]] = {
    "argv": _argv,
    "an environment": _environ,
    "what a command printed": _command,
    "Denied of rotation.py": _error,
    "the metrics": _metrics,
    "a log line": _log,
}


@pytest.mark.parametrize("place", HOOKS)
def test_output_that_leaves_the_process_is_seen(hooked: Watch, place: str) -> None:
    """Arguments, environments, printed text, errors, metrics and log lines are searched."""
    text = made_up(78)
    HOOKS[place](text)
    hooked.search_kept()

    assert place in {where for where, _ in hooked.hits}


def test_answers_are_seen(hooked: Watch, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the admin socket answers is searched, whatever is in it."""
    monkeypatch.setattr(AdminClient, "_connect", lambda _self: contextlib.nullcontext())
    monkeypatch.setattr(AdminClient, "_send", lambda *_: None)
    answer = {"ok": True, "result": [{"hint": text}]}
    monkeypatch.setattr(AdminClient, "_answers", lambda *_: iter([answer]))
    AdminClient().call("status", {})
    hooked.search_kept()

    assert hooked.hits == {("an answer", "plain")}


def test_the_secrets_of_other_processes_are_known(tmp_path: Path) -> None:
    """A process that is started with the tests' folder on its path notes what it mints."""
    code = "from keyturn.core.secret import mint; import os; print(mint(random_bytes=os.urandom)[1].reveal())"
    environ = {**os.environ, "PYTHONPATH": str(TESTS), canary_watch.FOLDER: str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environ)
    assert process.stdout is not None
    printed = process.stdout.read()
    assert process.wait() == 0
    process.stdout.close()
    watch = Watch()
    watch.take_notes(tmp_path)
    watch.search("here", printed)

    assert watch.minted == 1
    assert watch.hits == {("here", "plain")}
    assert list(tmp_path.iterdir()) == []


def test_a_suite_that_leaks_does_not_end_well(tmp_path: Path) -> None:
    """One secret in one file, as base64 in a rotated log: the run of tests fails and says where."""
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(
        "import base64, gzip, os\n"
        "from keyturn.core import secret\n"
        "def test_leak(tmp_path):\n"
        "    _, one = secret.mint(random_bytes=os.urandom)\n"
        "    text = base64.b64encode(one.reveal().encode())\n"
        "    (tmp_path / 'old.gz').write_bytes(gzip.compress(text))\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp"]
    done = subprocess.run(
        [*command, str(tmp_path / "base"), str(tmp_path)],
        capture_output=True, text=True, env=environ, check=False, cwd=tmp_path,
    )  # fmt: skip

    shutil.rmtree(tmp_path / "base")  # this run is watched as well

    assert "1 passed" in done.stdout
    assert "LEAK in file test_leak0/old.gz: gzip, base64" in done.stdout
    assert done.returncode == 1


def test_records_of_the_standard_library_are_seen(hooked: Watch, text: str) -> None:
    """A line that another library logs goes through the same last step, and is searched."""
    stream, root = io.StringIO(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logs.configure(stream=stream, form="json")
    try:
        logging.getLogger("vendor").warning("payload %s", text.encode().hex())
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    hooked.search_kept()

    assert ("a log line", "hex") in hooked.hits
