"""What a confined process can still open: run in a process of its own, since there is no way back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from keyturn.config.verifying import VerifierSection
from keyturn.daemon.verifier_service import folders_of

CODE = """
import json, os, signal, sys, threading
from pathlib import Path
from keyturn.daemon.confinement import confine, program
folder = Path(sys.argv[1])
abi = confine(read=[*program(), folder / "read", folder / "nowhere"], write=[folder / "write"])
found = {"abi": abi}
def attempt(name, act):
    try:
        act()
        found[name] = "done"
    except OSError as error:
        found[name] = type(error).__name__
def all_of_it():
    attempt("read", lambda: (folder / "read" / "x").read_text())
    attempt("list", lambda: os.listdir(folder / "read"))
    attempt("change", lambda: (folder / "read" / "x").write_text("y"))
    attempt("secret", lambda: (folder / "secret" / "x").read_text())
    attempt("list secret", lambda: os.listdir(folder / "secret"))
    attempt("write", lambda: (folder / "write" / "x").write_text("y"))
    attempt("move", lambda: (folder / "write" / "x").rename(folder / "write" / "z"))
    attempt("make elsewhere", lambda: (folder / "secret" / "z").touch())
    attempt("signal", lambda: os.kill(os.getppid(), 0))
    import wave  # a part of the library that nobody has imported yet
thread = threading.Thread(target=all_of_it)
thread.start()
thread.join()
print(json.dumps(found))
"""


def test_what_was_not_named_is_closed(tmp_path: Path) -> None:
    """Named folders are as they were, in threads too; the rest of the host is closed, for root as well."""
    for name in ("read", "write", "secret"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    done = subprocess.run(
        [sys.executable, "-I", "-c", CODE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    abi = found.pop("abi")
    closed = "PermissionError" if abi else "done"
    assert found == {
        "read": "done",
        "list": "done",
        "change": closed,
        "secret": closed,
        "list secret": closed,
        "write": "done",
        "move": "done",
        "make elsewhere": closed,
        "signal": "PermissionError" if abi >= 6 else "done",
    }


def test_the_folders_of_links_are_open_too(tmp_path: Path) -> None:
    """A certificate that is a link into another folder can be read again when it is renewed."""
    for name in ("live", "archive"):
        (tmp_path / name).mkdir()
    (tmp_path / "archive" / "key1.pem").touch()
    (tmp_path / "live" / "key.pem").symlink_to("../archive/key1.pem")
    key = str(tmp_path / "live" / "key.pem")
    section = VerifierSection.model_validate(
        {
            "listen": {"address": "127.0.0.1:8700", "tls": {"certificate": key, "key": key}},
            "relying_parties": {"x": {"token_file": str(tmp_path / "tokens" / "x")}},
        }
    )
    found = set(folders_of(section))
    assert found == {tmp_path / name for name in ("live", "archive", "tokens")}
