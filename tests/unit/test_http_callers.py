"""Tokens of relying parties: one that was taken away is good no longer than its own file is wrong."""

from __future__ import annotations

from pathlib import Path

from structlog.testing import capture_logs

from keyturn.verifier.http.callers import Caller, Callers, RelyingParty

OLD, NEW = b"o" * 32, b"n" * 32


def party(folder: Path, name: str, token: bytes) -> RelyingParty:
    """Return a party with a token file."""
    file = folder / name
    write(file, token)
    return RelyingParty(caller=Caller(name=name), token_file=file)


def write(file: Path, token: bytes, mode: int = 0o600) -> None:
    """Put a file in the place of the one that was there, as a rotation of it does."""
    draft = file.with_suffix(".new")
    draft.write_bytes(token)
    draft.chmod(mode)
    draft.replace(file)


def test_a_token_file_that_was_mended_by_chmod_is_read(tmp_path: Path) -> None:
    """A new file with a wrong mode is refused; once its mode is right the old token ends."""
    callers = Callers([party(tmp_path, "one", OLD)])
    write(tmp_path / "one", NEW, mode=0o644)
    callers.refresh()
    assert callers.by_token(OLD) is not None
    (tmp_path / "one").chmod(0o600)
    callers.refresh()
    assert callers.by_token(OLD) is None
    assert callers.by_token(NEW) is not None


def test_a_wrong_file_of_one_party_keeps_no_token_of_another(tmp_path: Path) -> None:
    """Whoever breaks a file cannot lengthen the life of a token that stood in another one."""
    callers = Callers([party(tmp_path, "one", OLD), party(tmp_path, "two", b"t" * 32)])
    write(tmp_path / "two", b"short")
    write(tmp_path / "one", NEW)
    callers.refresh()
    assert callers.by_token(OLD) is None
    assert callers.by_token(b"t" * 32) is not None


def test_a_wrong_file_is_told_once(tmp_path: Path) -> None:
    """It is looked at each second, and said once."""
    callers = Callers([party(tmp_path, "one", OLD)])
    write(tmp_path / "one", b"short")
    with capture_logs() as told:
        for _ in range(3):
            callers.refresh()
    assert [one["event"] for one in told] == ["verifier.tokens-refused"]
