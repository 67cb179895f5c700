"""Reads the files that hold our own credentials: a token, a secret id, a database password."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from keyturn.errors import ConfigError

LONGEST = 64 * 1024
OPEN_TO_OTHERS = 0o037  # a group may read: that is how systemd and Kubernetes hand credentials over
READ_BY_OTHERS = 0o004


def read_credential(path: Path, *, anybody_may_read: bool = False) -> str:
    """Return the text of a credential file, read anew: it may have been replaced.

    `anybody_may_read` is for the one file that its maker leaves open (see `vault_auth.Kubernetes`);
    nobody else may ever write one.

    Raises ConfigError where it cannot be read, or where others can: what has been readable for
    anybody on this host has to count as known.
    """
    try:
        with path.open() as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(LONGEST)
    except (OSError, UnicodeDecodeError) as error:
        number = getattr(error, "errno", None)
        raise ConfigError(
            f"{path} cannot be read" + (f" (errno {number})" if number else ""),
            hint="it must be text, readable by the daemon's user",
        ) from None
    if mode & OPEN_TO_OTHERS & ~(READ_BY_OTHERS if anybody_may_read else 0):
        raise ConfigError(
            f"{path} is open to other users (mode {mode:04o})",
            hint=f"chmod 600 {path} (Kubernetes: defaultMode: 0400), and replace what is in it",
        )
    return text
