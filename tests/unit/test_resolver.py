"""The resolver of stand-ins leads where it is told to, and nowhere else."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from keyturn.testing.resolver import as_text, from_text, resolving

PLACES = {("one.example", 443): ("127.0.0.1", 9443), ("192.0.2.1", 80): ("127.0.0.1", 9080)}


def test_only_what_is_named_leads_elsewhere() -> None:
    """A name or an address with its port is led to loopback; others are asked as before."""
    before = socket.getaddrinfo
    with resolving(PLACES):
        for place, there in PLACES.items():
            found = {one[4] for one in socket.getaddrinfo(*place, type=socket.SOCK_STREAM)}
            assert found == {there}
        found = {one[4] for one in socket.getaddrinfo("127.0.0.1", 80, type=socket.SOCK_STREAM)}
        assert found == {("127.0.0.1", 80)}
    assert socket.getaddrinfo is before


def test_places_can_be_written_and_read() -> None:
    """What one process writes another reads; anything else is an error."""
    assert from_text(as_text(PLACES)) == PLACES
    for text in ("", "x", "a:b=c:d", "a:1"):
        with pytest.raises(ValueError, match=r".*"):
            from_text(text)


def test_a_process_of_its_own_can_be_led() -> None:
    """A module runs as the main one, with its own arguments, among those names."""
    code = "import runpy,sys; sys.argv=['x', sys.argv[1], 'this_module', 'a']; runpy.run_module('keyturn.testing.resolver', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, as_text(PLACES)], capture_output=True, text=True, check=False
    )
    assert "this_module" in done.stderr
    listed = subprocess.run(
        [sys.executable, "-m", "keyturn.testing.resolver", as_text(PLACES), "keyturn", "--version"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert listed.stdout.startswith("keyturn ")
