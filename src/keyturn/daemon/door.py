"""The place of the admin socket in the file system: who may put one there, and who may open it."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from pathlib import Path

import structlog

from keyturn.errors import ConfigError

_FOLDER_MODE = 0o750
_SOCKET_MODE = 0o660
_BACKLOG = 32

_log = structlog.get_logger(__name__)


class Door:
    """One socket path, held by a lock as long as this daemon lives.

    A live daemon's socket is never stolen, a dead one's is replaced. Raises ConfigError.
    """

    def __init__(self, path: Path, group: int | None) -> None:
        self.path = path
        self._group = group
        self._lock = -1
        self._made_folder = False

    def open(self) -> socket.socket:
        """Return the listening socket."""
        self._prepare_folder()
        self._lock = self._take_lock()
        try:
            self._remove_dead()
            return self._listen()
        except BaseException:
            self._give_back()
            raise

    def close(self, listener: socket.socket) -> None:
        """Remove the socket and give the path back."""
        listener.close()
        if self._lock >= 0:
            self.path.unlink(missing_ok=True)
            self._give_back()

    def regroup(self, group: int | None) -> list[str]:
        """Give the open socket to another group, and the folder if it was ours to give.

        Returns what a person has to do for it.
        """
        before, self._group = self._group, group
        folder, given = self.path.parent, os.getegid() if group is None else group
        places = [self.path]
        if self._made_folder or (before is not None and folder.stat().st_gid == before):
            places.append(folder)
        notes = [
            f"{place} could not be given to the group {given}: restart the daemon as root or by systemd"
            for place in places
            if not self._give(place, given)
        ]
        return notes + self._shut_out()

    def _shut_out(self) -> list[str]:
        """Say where the folder keeps the group from the socket that has it."""
        folder = self.path.parent
        found = folder.stat()
        if self._group is None or found.st_mode & stat.S_IXOTH:
            return []
        if found.st_gid == self._group and found.st_mode & stat.S_IXGRP:
            return []
        mend = f"chgrp {self._group} {folder} && chmod g+x {folder}"
        return [f"{folder} keeps the members of admin.groups.view from the socket: `{mend}`"]

    def _give_back(self) -> None:
        os.close(self._lock)
        self._lock = -1

    def _prepare_folder(self) -> None:
        folder = self.path.parent
        if not folder.exists():
            try:
                folder.mkdir(mode=_FOLDER_MODE, parents=True)
            except OSError as error:
                raise ConfigError(
                    f"cannot make the folder {folder}",
                    hint="choose another place with --socket, or start as root or by systemd",
                ) from error
            folder.chmod(_FOLDER_MODE)
            self._made_folder = True
        elif self._is_for_us_alone(folder):
            self._made_folder = True
        if self._made_folder:
            self._give_to_group(folder)
        found = folder.stat()
        # SECURITY: whoever can write here can put a socket of their own in our place.
        if found.st_uid not in (0, os.geteuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ConfigError(
                f"the folder {folder} of the admin socket can be written by others",
                hint=f"chown it to the daemon's user and `chmod 0750 {folder}`",
            )
        for note in self._shut_out():
            _log.warning("admin.folder-shut", note=note)

    def _is_for_us_alone(self, folder: Path) -> bool:
        """Whether somebody made it for this daemon (RuntimeDirectory=, or we as a standby).

        Ours, of our own group, and nothing of others in it: so it is ours to give to the group.
        """
        found = folder.stat()
        ours = (found.st_uid, found.st_gid) == (os.geteuid(), os.getegid())
        return ours and all(one.name.startswith(self.path.name) for one in folder.iterdir())

    def _take_lock(self) -> int:
        """Lock a file beside the socket: two daemons that start at once cannot both find it dead."""
        name = self.path.with_name(self.path.name + ".lock")
        try:
            number = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigError(
                f"cannot write in the folder {name.parent}",
                hint="choose another place with --socket, or start as the folder's owner",
            ) from error
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(number)
            raise _taken(self.path) from None
        return number

    def _remove_dead(self) -> None:
        try:
            mode = self.path.lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise ConfigError(
                f"{self.path} is there and is no socket", hint="remove it, or choose another place"
            )
        if _somebody_answers(self.path):
            raise _taken(self.path)
        self.path.unlink(missing_ok=True)

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.bind(os.fspath(self.path))
        except OSError as error:
            listener.close()
            raise ConfigError(
                f"cannot open the socket {self.path}", hint="its path has at most 107 bytes"
            ) from error
        # Nobody can connect before listen(), so these two come in time.
        self.path.chmod(_SOCKET_MODE)
        self._give_to_group(self.path)
        listener.listen(_BACKLOG)
        return listener

    def _give_to_group(self, path: Path) -> None:
        if self._group is not None and not self._give(path, self._group):
            # Not a member ourselves: then only our own uid and root get in, which is safe.
            _log.warning("admin.group-not-given", path=str(path), gid=self._group)

    @staticmethod
    def _give(path: Path, group: int) -> bool:
        try:
            os.chown(path, -1, group)
        except OSError:
            return False
        return True


def _somebody_answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as attempt:
        attempt.settimeout(1)
        try:
            attempt.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # full backlog, no right to open it: there is somebody
            return True
        return True


def _taken(path: Path) -> ConfigError:
    return ConfigError(
        f"another daemon listens at {path}", hint="stop it, or give this one its own --socket"
    )
