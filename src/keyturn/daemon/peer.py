"""Who is at the other end of the admin socket, and what that one may do."""

from __future__ import annotations

import ctypes
import errno
import grp
import os
import pwd
import socket
import struct
from dataclasses import dataclass
from enum import IntEnum

_SO_PEERGROUPS = 59  # socket(7), Linux 4.13
_MOST_GROUPS = 65536  # NGROUPS_MAX


class Role(IntEnum):
    """What a caller may do; each role includes the smaller ones."""

    NONE = 0
    VIEW = 1
    RESPOND = 2
    ADMIN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A caller, as the kernel names it.

    `claimed_by` is what the request says about SUDO_USER: anybody can write it, so it goes into the
    audit as a claim and decides nothing.
    """

    uid: int
    user: str
    groups: frozenset[int]
    pid: int
    claimed_by: str = ""

    @property
    def actor(self) -> str:
        """The name for the audit: `root`, or `root (says: alice)`."""
        return f"{self.user} (says: {self.claimed_by})" if self.claimed_by else self.user


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Which unix groups have which role. Root and the daemon's own uid are always admin.

    The socket can belong to one group only, the one of `view`: it is the door, and members of the
    other two must be in it too.
    """

    view: int | None = None
    respond: int | None = None
    admin: int | None = None
    own_uid: int
    missing: tuple[str, ...] = ()

    @classmethod
    def from_names(cls, *, view: str = "", respond: str = "", admin: str = "") -> Roles:
        """Look the groups up. A group that does not exist gives its role to nobody: `missing`."""
        names = {"view": view, "respond": respond, "admin": admin}
        numbers = {role: _group_number(name) for role, name in names.items()}
        missing = tuple(name for role, name in names.items() if name and numbers[role] is None)
        return cls(
            view=numbers["view"],
            respond=numbers["respond"],
            admin=numbers["admin"],
            own_uid=os.geteuid(),
            missing=missing,
        )

    def of(self, peer: Peer) -> Role:
        """Return the highest role of a caller."""
        if peer.uid in (0, self.own_uid):
            return Role.ADMIN
        for role, group in (
            (Role.ADMIN, self.admin),
            (Role.RESPOND, self.respond),
            (Role.VIEW, self.view),
        ):
            if group is not None and group in peer.groups:
                return role
        return Role.NONE


def peer_of(connection: socket.socket) -> Peer:
    """Ask the kernel who called. The facts are those of the moment of connect()."""
    size = struct.calcsize("3i")
    pid, uid, gid = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    )
    # The primary group alone would miss most people: roles are supplementary groups.
    groups = frozenset({gid, *_supplementary(connection)})
    return Peer(uid=uid, user=user_name(uid), groups=groups, pid=pid)


def local_peer(claimed_by: str = "") -> Peer:
    """Return the caller of a command that works without the daemon: this process."""
    uid = os.geteuid()
    groups = frozenset({os.getegid(), *os.getgroups()})
    return Peer(uid=uid, user=user_name(uid), groups=groups, pid=os.getpid(), claimed_by=claimed_by)


def user_name(uid: int) -> str:
    """Return the account's name, or `uid:N` where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid:{uid}"


def _supplementary(connection: socket.socket) -> list[int]:
    """Read SO_PEERGROUPS by libc: Python's getsockopt stops at 1,024 bytes, 256 groups."""
    buffer = (ctypes.c_uint32 * _MOST_GROUPS)()
    length = ctypes.c_uint32(ctypes.sizeof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.getsockopt(
        connection.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, buffer, ctypes.byref(length)
    )
    if failed:
        number = ctypes.get_errno()
        if number in (errno.ENODATA, errno.ENOPROTOOPT):
            return []
        raise OSError(number, os.strerror(number))
    return list(buffer[: length.value // ctypes.sizeof(ctypes.c_uint32)])


def _group_number(name: str) -> int | None:
    try:
        return grp.getgrnam(name).gr_gid if name else None
    except KeyError:
        return None
