"""The commands on the bare store, while the daemon is down: for root and the daemon's own uid.

The configuration need not be valid for this: at 3 a.m. a broken line must not stand between an
administrator and a revoke. Only the store's place is read from it.
"""

from __future__ import annotations

import os
import pwd
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keyturn import config, verifying, wiring
from keyturn.config.file import read_document
from keyturn.core.secret import Secret
from keyturn.daemon.anchoring import AnchorCommands
from keyturn.daemon.commands import Commands
from keyturn.daemon.cron import Crontab
from keyturn.daemon.registered import VerifierCommands
from keyturn.errors import ConfigError, NotPermitted, VerificationFailed
from keyturn.wiring import Parts


class Offline:
    """The parts of a store without its daemon."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def commands(self) -> Mapping[str, Callable[..., Any]]:
        """Return the daemon's functions under their names."""
        kinds = Commands, AnchorCommands, VerifierCommands
        groups = [kind(lambda: self._parts) for kind in kinds]
        table = {name: one for group in groups for name, one in group.table().items()}
        return {name: command.function for name, command in table.items()}

    def verify(self, login: str, secret: Secret) -> bool:
        """Tell whether the store accepts this pair now. Raises StoreUnavailable."""
        verifier = verifying.open_verifier(self._parts.settings)
        try:
            verifier.verify(login, secret)
        except VerificationFailed:
            return False
        finally:
            verifier.close()
        return True


@contextmanager
def offline(path: Path) -> Iterator[Offline]:
    """Open the store that a configuration names, as its owner."""
    settings = _settings(path)
    become_owner(settings.store.folder)
    parts = wiring.build(settings, cron=Crontab(), create=False)
    try:
        yield Offline(parts)
    finally:
        parts.close()


def _settings(path: Path) -> config.Settings:
    """Return where the store is. A file that is gone or no YAML must not keep a revoke from it."""
    try:
        return config.load_store(path, environ=os.environ)
    except ConfigError as error:
        if read_document(path, []).data:
            raise  # the store's own section is wrong: any other store would be the wrong one
        settings = config.store_alone(path, environ=os.environ)
        if not os.path.isdir(settings.store.folder):  # noqa: PTH112 - False also where it is not ours
            raise
        text = (
            f"note: {str(error).splitlines()[0]}; working on the store in {settings.store.folder}"
        )
        print(text, file=sys.stderr)  # noqa: T201
        return settings


def become_owner(folder: Path) -> None:
    """Drop from root to the store's owner, so that no file of root's is left behind.

    Raises NotPermitted for anybody else, with the line to type.
    """
    try:
        owner = folder.stat()
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no store in {folder}", hint="check store.url, or start the daemon first"
        ) from error
    except PermissionError:
        raise NotPermitted(f"{folder} is not yours", hint=_as_owner("root")) from None
    me = os.geteuid()
    if owner.st_uid == me:
        return
    if me != 0:
        raise NotPermitted(f"{folder} is not yours", hint=_as_owner(_name(owner.st_uid)))
    _take_groups(owner)
    os.setgid(owner.st_gid)
    os.setuid(owner.st_uid)


def _take_groups(owner: os.stat_result) -> None:
    """Take the groups that the owner has at a login, so that its files can go to one of them."""
    try:
        os.initgroups(pwd.getpwuid(owner.st_uid).pw_name, owner.st_gid)
    except KeyError:
        os.setgroups([])


def _as_owner(user: str) -> str:
    return f"sudo -u {user} keyturn …"


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"
