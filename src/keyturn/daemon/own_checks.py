"""What `keyturn check` says of the daemon's own logins: files that must be ours to replace."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from keyturn.config import Settings
from keyturn.core.walltime import rfc3339
from keyturn.credential_file import refuse_given, refuse_unwritable
from keyturn.daemon.own_logins import WARN_BEFORE
from keyturn.destinations.base import DestinationBase
from keyturn.errors import ConfigError, Rejected


def rotated_files(settings: Settings) -> Mapping[str, Path]:
    """Return the credential files that Keyturn replaces, by connection.

    Raises ConfigError where two connections would replace the same one.
    """
    found: dict[str, Path] = {}
    for name, connection in settings.connections.items():
        auth = getattr(connection.options, "auth", None)
        if getattr(auth, "rotate", None) is None or auth is None:
            continue
        path: Path = auth.secret_id_file
        twin = next((one for one, its in found.items() if its.resolve() == path.resolve()), None)
        if twin is not None:
            raise ConfigError(
                f"connections {twin} and {name}: both would replace {path}",
                hint="leave `rotate` to one of them (the other reads the file anew at each login),"
                " or give each a secret id of its own",
            )
        found[name] = path
    return found


def problems(settings: Settings) -> Iterator[tuple[str, ConfigError | None]]:
    """Yield each replaced file with what is wrong with it; one that is not on this host is left out."""
    for name, path in rotated_files(settings).items():
        try:
            refuse_given(path)
            with suppress(FileNotFoundError, PermissionError):  # a pull request's host
                if os.geteuid() in (0, path.stat().st_uid):
                    refuse_unwritable(path)
                    yield f"login {name}", None
        except ConfigError as error:
            yield f"login {name}", error


def looked_at(destination: DestinationBase) -> str:
    """Say how a connection logs in and until when. Raises what the login raises, Rejected if soon."""
    login = destination.own_login()
    if login is None:
        return ""
    if destination.own_authority is not None:
        destination.own_authority.find(())  # what a rotation asks first
    if login.ends_at is None:
        return f"{login.method}: {login.note}"
    words = f"{login.method}: ends at {rfc3339(login.ends_at.replace(microsecond=0))}"
    if destination.own_authority is not None:
        return f"{words}; Keyturn replaces it"
    if login.ends_at - datetime.now(UTC) <= WARN_BEFORE:
        raise Rejected(words, hint="put a new one into its file before that")
    return words
