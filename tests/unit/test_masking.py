"""What is written out holds no secret, and no text of other people's exceptions."""

from __future__ import annotations

import os

import pytest

from keyturn.core.secret import mint
from keyturn.daemon.masking import mask, printable, render_exception, summary
from keyturn.errors import Denied, DestinationUnavailable, KeyturnError

VERSION_ID, SECRET = mint(random_bytes=os.urandom)
CANARY = SECRET.reveal()
RANDOM_PART = CANARY.split("_")[2]


class VendorError(Exception):
    """A vendor's exception with its usual attributes."""

    status_code = 403


@pytest.mark.parametrize("around", ["{}", "x={}&y", '{{"a":"{}"}}', "kt{}", "{0}{0}", "ä{}\n"])
def test_a_secret_anywhere_in_a_text_is_masked(around: str) -> None:
    """The random part goes wherever the secret stands, the public version id stays."""
    masked = mask(around.format(CANARY))
    assert RANDOM_PART not in masked
    assert RANDOM_PART[:8] not in masked
    assert VERSION_ID in masked


@pytest.mark.parametrize("length", [8, 20, 48])
def test_a_secret_that_was_cut_is_masked(length: int) -> None:
    """A message that was cut in the middle of a secret gives its beginning away no more."""
    head = CANARY.rpartition("_")[0]
    assert RANDOM_PART[:4] not in mask(f"{head}_{RANDOM_PART[:length]}")


@pytest.mark.parametrize("cut", [1, 3, 9, 16])
def test_a_secret_without_its_beginning_is_masked(cut: int) -> None:
    """Whoever pastes from the middle of the public id on still pastes all of the secret part."""
    assert RANDOM_PART not in mask(f"x={CANARY[cut:]} y")
    assert RANDOM_PART[:8] not in mask(CANARY[cut:])


def test_digests_and_ids_of_others_stay() -> None:
    """Only a whole random part after a `_` looks like ours: other lengths and one case do not."""
    for text in (
        "a_" + "0aF" * 13,
        "a_" + "0af" * 16 + "0",
        f"x {'aB3' * 16}a",
        "sha_" + "aB" * 40,
    ):
        assert mask(text) == text


def test_words_that_are_no_secret_stay() -> None:
    """Ids, times and ordinary words with underscores are not touched."""
    text = f"keyturn_rotations_total {VERSION_ID} 2026-01-01T00:00:00Z vault-eu:a_b"
    assert mask(text) == text


def test_control_characters_are_escaped() -> None:
    """Neither an escape sequence nor a right-to-left mark reaches a terminal."""
    assert printable("a\x1b[2Jb\u202ec\x9bd\r") == "a\\x1b[2Jb\\x202ec\\x9bd\\x0d"


def test_a_vendor_message_is_never_rendered() -> None:
    """Of an exception that is not ours only type and code are shown."""
    text = render_exception(VendorError(f"denied for {CANARY} and plain words"))
    assert "VendorError[403]" in text
    assert "plain words" not in text
    assert RANDOM_PART not in text


def test_our_message_is_rendered_and_masked() -> None:
    """Our own classes show their message, masked all the same."""
    text = summary(Denied(f"no right to write {CANARY}"))
    assert text.startswith("keyturn.errors.Denied[denied]: no right to write kt_")
    assert RANDOM_PART not in text


def test_causes_are_rendered_unless_cut_off() -> None:
    """The chain shows causes in order, and stops where `from None` cut it."""
    with pytest.raises(KeyturnError) as kept:
        _raise_from(cut=False)
    assert render_exception(kept.value).index("VendorError") < render_exception(kept.value).index(
        "DestinationUnavailable"
    )
    with pytest.raises(KeyturnError) as cut:
        _raise_from(cut=True)
    assert "VendorError" not in render_exception(cut.value)


def _raise_from(*, cut: bool) -> None:
    secret_in_a_local = CANARY
    try:
        raise VendorError(secret_in_a_local)
    except VendorError as error:
        if cut:
            raise DestinationUnavailable from None
        raise DestinationUnavailable from error


def test_no_locals_and_no_source_lines_are_rendered() -> None:
    """Frames are file, line and function only."""
    with pytest.raises(KeyturnError) as caught:
        _raise_from(cut=False)
    text = render_exception(caught.value)
    assert "_raise_from" in text
    assert "secret_in_a_local" not in text
    assert RANDOM_PART not in text


def test_a_group_shows_its_members() -> None:
    """An exception group names what is in it, with the same care."""
    text = render_exception(ExceptionGroup("two", [VendorError(CANARY), Denied("x")]))
    assert "VendorError[403]" in text
    assert "Denied[denied]: x" in text
    assert RANDOM_PART not in text


def test_a_chain_with_a_ring_ends() -> None:
    """Causes that point at each other do not hang the logger."""
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert render_exception(first).count("ValueError") == 2


def test_a_code_that_holds_a_payload_is_not_shown() -> None:
    """An attribute called `code` is shown only where it can be one."""
    error = VendorError()
    error.status_code = f"body was {CANARY}"  # type: ignore[assignment]
    assert summary(error).endswith("VendorError")
