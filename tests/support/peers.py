"""Callers of the admin socket as other users: the kernel's facts, not ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

# Everything is imported before the rights are dropped: the new user may not read our files.
_CALL = """
import json, os, socket, sys
uid, gid, groups, path, line = json.loads(sys.argv[1])
os.setgroups(groups); os.setresgid(gid, gid, gid); os.setresuid(uid, uid, uid)
caller = socket.socket(socket.AF_UNIX)
caller.settimeout(20)
try:
    caller.connect(path)
except OSError as error:
    print(json.dumps({"errno": error.errno})); sys.exit()
try:
    caller.sendall(line.encode())
except BrokenPipeError:
    pass
last = b""
for answer in caller.makefile("rb"):
    last = answer
    if b'"ok"' in answer:
        break
print(last.decode())
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes its user id")


def call_as(
    path: Path, command: str, *, uid: int, gid: int, groups: Sequence[int] = ()
) -> dict[str, Any]:
    """Return the final answer that this user gets, or `{"errno": …}` if it cannot connect."""
    line = json.dumps({"command": command, "args": {}}) + "\n"
    given = json.dumps([uid, gid, list(groups), os.fspath(path), line])
    done = subprocess.run(
        [sys.executable, "-I", "-c", _CALL, given], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found
