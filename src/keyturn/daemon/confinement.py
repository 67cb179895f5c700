"""Closes the files of this host to a process, as far as the kernel can: Landlock (landlock(7)).

What is open stays open. What is not named here cannot be opened any more, no process outside can be
traced, and none can be signalled where the kernel knows that (ABI 6). Threads that start later inherit
it; those that run already do not.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every processor since 5.13
_ASK_VERSION, _PATH_BENEATH = 1, 1
_NO_NEW_PRIVS = 38  # prctl(2)
_SCOPE_SIGNAL = 1 << 1
# linux/landlock.h: the rights, in the order in which kernels learned them.
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 1 << 1, 1 << 2, 1 << 3
_FIRST_RIGHTS, _REFER, _TRUNCATE = (1 << 13) - 1, 1 << 13, 1 << 14
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE

# What the interpreter and the C library look up while they run.
_SYSTEM = (
    "/usr", "/lib", "/lib64", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/localtime",
    "/etc/ssl", "/etc/ld.so.cache", "/dev/urandom", "/proc/sys/kernel/random", "/proc/self",
)  # fmt: skip


def program() -> list[Path]:
    """Return where this program and what it may import lies."""
    own = [sys.prefix, sys.base_prefix, sys.exec_prefix, sysconfig.get_path("stdlib"), *sys.path]
    return [Path(one) for one in (*own, *_SYSTEM) if one]


def confine(*, read: Iterable[Path], write: Iterable[Path]) -> int:
    """Close all other files to this thread and those that it starts; returns the kernel's ABI.

    Folders count with all that is below them; what does not exist is left out. 0 where the kernel has
    no Landlock, or does not allow it: nothing has changed then.
    """
    library = ctypes.CDLL(None, use_errno=True)
    abi = int(library.syscall(_CREATE_RULESET, None, 0, _ASK_VERSION))
    if abi < 1:
        return 0
    handled = _FIRST_RIGHTS | (_REFER if abi >= 2 else 0) | (_TRUNCATE if abi >= 3 else 0)
    scoped = _SCOPE_SIGNAL if abi >= 6 else 0
    attributes = struct.pack("=QQQ", handled, 0, scoped)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = library.syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return 0
    try:
        for rights, places in ((_READ, read), (handled, write)):
            for place in places:
                _allow(library, ruleset, place, rights & handled)
        library.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
        return abi if library.syscall(_RESTRICT_SELF, ruleset, 0) == 0 else 0
    finally:
        os.close(ruleset)


def _allow(library: ctypes.CDLL, ruleset: int, place: Path, rights: int) -> None:
    try:
        found = os.open(place, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not place.is_dir():
            rights &= _OF_FILES
        rule = struct.pack("=Qi", rights, found)
        library.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
    finally:
        os.close(found)
