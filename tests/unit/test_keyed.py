"""Keyed hashes: known answers, one message for one list of parts, and nothing of a key in any output."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from keyturn.core.secret import Secret
from keyturn.errors import KeyMissing, StoreUnavailable
from keyturn.storage.hashes import InUse
from keyturn.verifier import keyed
from keyturn.verifier.hashing import CHEAP_FOR_TESTS, Hashing
from keyturn.verifier.keyed import Key, message, read
from keyturn.verifier.keyring import KeyRing
from keyturn.verifier.schemes import Schemes, Stored

KEY = Key(bytes(range(32)))
OTHER = Key(bytes(range(1, 33)))
VERSION = "0123456789abcd"
SECRET = Secret(f"kt_{VERSION}_" + "x" * 43 + "000000")
# By `openssl dgst -sha256 -mac HMAC` over the four parts, each behind its length in four bytes.
KNOWN = "$hmac-sha256$v=1$k=k1,c=y2PHHmct$oerv93fJjyeuTnx1c0tFCY7lxJGf_vXYkNu-_raWpqU"
ROW = Stored(scheme="hmac-sha256", digest=KNOWN, credential_uid="c1", version_id=VERSION)


def schemes(ring: KeyRing | None = None) -> Schemes:
    """Return both schemes, with one key."""
    chosen = ring or KeyRing(keys={"k1": KEY}, current="k1")
    return Schemes(hashing=Hashing(cost=CHEAP_FOR_TESTS), ring=lambda: chosen)


def test_the_known_answer() -> None:
    """The stored text is what any other implementation makes of the same parts and key."""
    made = schemes().digest("hmac-sha256", SECRET, credential_uid="c1", version_id=VERSION)

    assert made == KNOWN
    assert schemes().matches(ROW, SECRET)


@pytest.mark.parametrize(
    ("changes", "secret"),
    [
        ({}, Secret(SECRET.reveal()[:-1] + "1")),
        ({"credential_uid": "c2"}, SECRET),
        ({"version_id": "0123456789abce"}, SECRET),
        ({"digest": KNOWN[:-1] + "V"}, SECRET),
    ],
    ids=["another secret", "another credential", "another version", "another digest"],
)
def test_a_hash_holds_for_one_secret_of_one_version(
    changes: dict[str, str], secret: Secret
) -> None:
    """A hash that is moved to another row, or altered, says no."""
    assert not schemes().matches(replace(ROW, **changes), secret)


PARTS = st.lists(st.binary(max_size=6), max_size=5)


@given(PARTS, PARTS)
@example([b"v1", b"ab", b"c"], [b"v1", b"a", b"bc"])
@example([b"a", b""], [b"a"])
@example([b"\0\0\0\1a"], [b"", b"a"])
def test_no_two_lists_of_parts_make_one_message(one: list[bytes], other: list[bytes]) -> None:
    """Two messages are equal only where every part is."""
    assert (message(*one) == message(*other)) == (one == other)


@given(PARTS, PARTS)
def test_no_message_begins_another_of_as_many_parts(one: list[bytes], other: list[bytes]) -> None:
    """Nor can a part be moved over the end of a message."""
    if len(one) == len(other) and one != other:
        assert not message(*one).startswith(message(*other))


@given(st.one_of(st.text(max_size=90), st.text(max_size=40).map(lambda end: KNOWN[:34] + end)))
def test_any_stored_text_has_an_answer(text: str) -> None:
    """What stands in a row never ends in another error than "nobody can tell", and never in a yes."""
    try:
        said = schemes().matches(replace(ROW, digest=text), SECRET)
    except StoreUnavailable:
        said = False
    assert said is (text == KNOWN)


def test_a_text_is_read_as_it_was_written() -> None:
    """Key id, check and MAC come back; a newline at the end, or another version, is another form."""
    found = read(KNOWN)
    assert found is not None
    assert (found.key_id, found.check, len(found.mac)) == ("k1", KEY.check, keyed.MAC_LENGTH)
    assert read(KNOWN + "\n") is None
    assert read(KNOWN.replace("v=1", "v=2")) is None
    assert keyed.read_head(KNOWN[: -keyed.MAC_LENGTH]) == replace(found, mac="")


CANNOT_TELL = {
    "no ring": KeyRing(),
    "another id": KeyRing(keys={"k2": KEY}, current="k2"),
    "another key under the id": KeyRing(keys={"k1": OTHER}, current="k1"),
    "the file is bad": KeyRing(unusable={"k1": "its file cannot be read"}, current="k1"),
    "the scheme is left out": KeyRing(
        keys={"k1": KEY}, current="k1", schemes=frozenset({"argon2id"})
    ),
}


@pytest.mark.parametrize("name", CANNOT_TELL)
def test_a_missing_key_is_never_a_no(name: str) -> None:
    """Without the very key, or with the scheme left out, nobody can tell, and the reason names it."""
    ring = CANNOT_TELL[name]
    with pytest.raises(KeyMissing, match=r"k1|hmac-sha256"):
        schemes(ring).matches(ROW, SECRET)

    used = InUse(scheme="hmac-sha256", head=KNOWN[: -keyed.MAC_LENGTH], versions=3)
    (said,) = ring.lacking([used])
    assert "(3 accepted versions)" in said
    assert not ring.judges(used)


def test_a_narrowed_ring_takes_no_argon2_row() -> None:
    """With hmac-sha256 alone, a hash of somebody's own choice in the store is never a yes."""
    digest = Hashing(cost=CHEAP_FOR_TESTS).digest(SECRET)
    row = replace(ROW, scheme="argon2id", digest=digest)
    assert schemes().matches(row, SECRET)

    narrow = KeyRing(keys={"k1": KEY}, current="k1", schemes=frozenset({"hmac-sha256"}))
    with pytest.raises(KeyMissing, match="leaves argon2id out"):
        schemes(narrow).matches(row, SECRET)
    with pytest.raises(KeyMissing):
        schemes(narrow).digest("argon2id", SECRET, credential_uid="c1", version_id=VERSION)
    # Nor by a row that says one scheme and holds a hash of the other.
    with pytest.raises(KeyMissing):
        schemes(narrow).matches(replace(row, scheme="hmac-sha256"), SECRET)
    assert not schemes().matches(replace(ROW, scheme="argon2id"), SECRET)
    assert not schemes().matches(replace(ROW, scheme="lost"), SECRET)


@pytest.mark.parametrize("escape", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_key_does_not_get_out(escape: Callable[[Any], object]) -> None:
    """It prints as a marker, and cannot be pickled or copied."""
    texts = (repr(KEY), str(KEY), f"{KEY}", repr(KeyRing(keys={"k1": KEY})))
    assert all("***" in text and "\\x01" not in text for text in texts)
    with pytest.raises(TypeError):
        escape(KEY)


def test_a_short_key_is_none() -> None:
    """31 bytes are refused, and the error quotes nothing."""
    with pytest.raises(ValueError, match="^too short$"):
        Key(bytes(31))
