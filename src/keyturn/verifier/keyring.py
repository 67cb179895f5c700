"""The key ring: which keys this process has, read from their files, and which one new hashes get.

A key that cannot be used is no error here: it stands in the ring with the reason, and whoever needs it
says that nobody can tell now. SECURITY: a missing key must never become a "no", nor a yes by another way.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from keyturn.credential_file import changeable_by_others, plain_file, platform_given
from keyturn.errors import ConfigError, KeyMissing
from keyturn.storage.hashes import InUse
from keyturn.verifier import hashing, keyed
from keyturn.verifier.keyed import Key

SCHEMES = (hashing.SCHEME, keyed.SCHEME)
KEY_FORM = "64 hexadecimal digits (a newline may follow), or 32 to 1024 bytes, taken as they are"
MOST_BYTES = 1024
_HEX = re.compile(rb"[0-9A-Fa-f]{64}\n?")
_PUT_BACK = "put the key's file back and `keyturn reload`; see docs/howto/hmac-sha256.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRing:
    """Keys by id. `unusable` says of those that are configured and not there why; `current` makes new hashes.

    `schemes` are those that a row may have at all to be accepted.
    """

    keys: Mapping[str, Key] = field(default_factory=dict)
    unusable: Mapping[str, str] = field(default_factory=dict)
    current: str = ""
    schemes: frozenset[str] = frozenset(SCHEMES)

    @classmethod
    def read(
        cls, files: Mapping[str, Path], *, current: str = "", schemes: Iterable[str] = SCHEMES
    ) -> KeyRing:
        """Read the files as they are now."""
        keys: dict[str, Key] = {}
        unusable: dict[str, str] = {}
        for key_id, path in files.items():
            try:
                keys[key_id] = read_key(path)
            except ConfigError as error:
                unusable[key_id] = str(error)
        return cls(keys=keys, unusable=unusable, current=current, schemes=frozenset(schemes))

    def for_new(self) -> tuple[str, Key]:
        """Return the key of new hashes with its id. Raises KeyMissing."""
        found = self.keys.get(self.current)
        if found is None:
            raise KeyMissing(self._why(self.current), hint=_PUT_BACK)
        return self.current, found

    def of(self, named: keyed.Named) -> Key:
        """Return the very key that a row names. Raises KeyMissing."""
        found = self.keys.get(named.key_id)
        if found is None:
            raise KeyMissing(self._why(named.key_id), hint=_PUT_BACK)
        if found.check != named.check:
            text = f"verifier key {named.key_id} is another one than the one that was used"
            raise KeyMissing(text, hint=_PUT_BACK)
        return found

    def refuse_scheme(self, scheme: str) -> None:
        """Raise KeyMissing for a scheme that the configuration leaves out."""
        if scheme not in self.schemes:
            raise KeyMissing(
                f"verifier.schemes leaves {scheme} out",
                hint=f"add {scheme} to verifier.schemes, rotate what still has it, and then narrow it",
            )

    def judges(self, one: InUse) -> bool:
        """Whether this ring has what such versions need."""
        try:
            self._look(one)
        except KeyMissing:
            return False
        return True

    def lacking(self, used: Iterable[InUse]) -> Iterator[str]:
        """Say what accepted versions need and this ring does not have, one text each, sorted."""
        texts = set()
        for one in used:
            number = f"{one.versions} accepted version{'s' if one.versions > 1 else ''}"
            try:
                self._look(one)
            except KeyMissing as error:
                texts.add(f"{error} ({number})")
        yield from sorted(texts)

    def _look(self, one: InUse) -> None:
        if one.scheme not in SCHEMES:
            return  # lost in a restore, and in quarantine
        self.refuse_scheme(one.scheme)
        if one.scheme == keyed.SCHEME:
            named = keyed.read_head(one.head)
            if named is None:
                raise KeyMissing("a hash is of a form that this release does not know")
            self.of(named)

    def _why(self, key_id: str) -> str:
        if not key_id:
            return "verifier.key names no key for new hashes"
        return f"verifier key {key_id} is missing: " + self.unusable.get(
            key_id, "verifier.keys does not name it"
        )


def read_key(path: Path) -> Key:
    """Return the key in a file.

    Raises ConfigError, which names the file, where it cannot be read, others could have read or replaced
    it, or what is in it is too short or too long.
    """
    try:
        with plain_file(path) as (file, found):
            content = file.read(MOST_BYTES + 2)
            changeable = next(changeable_by_others(path, found), None)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read (errno {error.errno})") from None
    mode = stat.S_IMODE(found.st_mode)
    # A group reads only what a platform hands over: systemd's access lists show up as such a mode.
    closed = 0o037 if platform_given(path) else 0o077
    if mode & closed or mode & 0o100:
        raise ConfigError(
            f"{path} has mode {mode:04o}, and 0400 or 0600 is expected",
            hint=f"make a new key (`keyturn make-key FILE`): this one may be known; or chmod 400 {path}",
        )
    if changeable is not None:
        raise ConfigError(
            f"{path} could be replaced by others, through {changeable}",
            hint="file and folders must belong to root or the daemon's user, writable by nobody else",
        )
    if not keyed.LEAST_BYTES <= len(content) <= MOST_BYTES:
        raise ConfigError(f"{path} holds no key: expected {KEY_FORM}")
    return Key(bytes.fromhex(content[:64].decode()) if _HEX.fullmatch(content) else content)


def make_key(path: Path, value: bytes) -> Key:
    """Write a key as hexadecimal digits into a new file, 0600, durably.

    Raises ConfigError where there is a file already, or where it could not be kept to us.
    """
    key = Key(value)
    try:
        number = os.open(
            path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
    except FileExistsError:
        raise ConfigError(
            f"{path} is there already", hint="a key is never overwritten: name another file"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be made ({os.strerror(error.errno or 0)})",
            hint=f"its folder must be there, and writable: mkdir -m 0755 {path.parent}",
        ) from None
    try:
        with os.fdopen(number, "wb") as file:
            os.fchmod(number, 0o600)
            file.write(value.hex().encode() + b"\n")
            file.flush()
            os.fsync(number)
        read_key(path)  # through the same eyes as the daemon, before anybody relies on it
        _sync_folder(path.parent)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return key


def _sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    finally:
        os.close(number)
