"""Becomes what a systemd unit says, then runs a command: `python -I as_unit.py JSON COMMAND…`.

Stands alone, so that it runs before anything of ours: user, groups, no capability, the filter of
system calls and address families by libseccomp, no writable and executable memory, no core file.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
from typing import Any

_NO_NEW_PRIVS, _BOUNDING_DROP, _MDWE = 38, 24, 65  # prctl(2)
_ERRNO_EPERM, _ALLOW, _EQUAL = 0x00050001, 0x7FFF0000, 4  # seccomp.h


class _Argument(ctypes.Structure):
    _fields_ = [
        ("number", ctypes.c_uint),
        ("compare", ctypes.c_int),
        ("value", ctypes.c_uint64),
        ("other", ctypes.c_uint64),
    ]


def filter_calls(names: list[str], families: list[int]) -> None:
    """Allow these system calls, and sockets of these families."""
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(_ERRNO_EPERM))
    for name in names:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number < 0:
            continue  # not on this processor
        allowed = families if name == "socket" else [None]
        for family in allowed:
            arguments = (_Argument * 1)(_Argument(0, _EQUAL, family or 0, 0))
            count = 0 if family is None else 1
            library.seccomp_rule_add_array(context, _ALLOW, number, count, arguments)
    if library.seccomp_load(context) != 0:
        raise OSError("the filter was not loaded")


def become(unit: dict[str, Any]) -> None:
    """Take the unit's place in this order: what needs privileges first."""
    process = ctypes.CDLL(None, use_errno=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    for capability in range(64):
        process.prctl(_BOUNDING_DROP, capability, 0, 0, 0)
    os.setgroups(unit["groups"])
    os.setresgid(unit["gid"], unit["gid"], unit["gid"])
    os.setresuid(unit["uid"], unit["uid"], unit["uid"])
    process.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    process.prctl(_MDWE, 1, 0, 0, 0)
    filter_calls(unit["calls"], unit["families"])


if __name__ == "__main__":
    become(json.loads(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
