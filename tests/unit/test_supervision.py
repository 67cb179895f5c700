"""The datagrams to a supervisor: what is taken from the environment, and when the heart beats."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from keyturn.daemon.supervision import Supervisor

ADDRESS = "@keyturn-test-supervision"


@pytest.fixture
def ear() -> Iterator[socket.socket]:
    """Listen as systemd does, at an abstract name."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        one.bind("\0" + ADDRESS[1:])
        one.settimeout(0.5)
        yield one


def heard(ear: socket.socket) -> list[str]:
    """Return everything that was said up to now and in the half second after it."""
    found: list[str] = []
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        try:
            found.append(ear.recv(4096).decode())
        except TimeoutError:
            break
    return found


def test_the_variables_are_taken_and_not_left_to_children() -> None:
    """Whoever starts after us cannot speak for us, and other variables stay."""
    environ = {"NOTIFY_SOCKET": ADDRESS, "WATCHDOG_USEC": "9", "WATCHDOG_PID": "7", "HOME": "/"}
    Supervisor.take(environ, pid=7)
    assert environ == {"HOME": "/"}


@pytest.mark.parametrize(
    ("watchdog_pid", "beats"),
    [("7", True), ("", True), ("8", False)],
    ids=["ours", "none", "other"],
)
def test_a_watchdog_of_another_process_is_not_ours(
    ear: socket.socket, watchdog_pid: str, beats: bool
) -> None:
    """`$WATCHDOG_PID` names who has to beat (sd_watchdog_enabled(3))."""
    environ = {"NOTIFY_SOCKET": ADDRESS, "WATCHDOG_USEC": "200000", "WATCHDOG_PID": watchdog_pid}
    one = Supervisor.take(environ, pid=7)
    one.ready("here")
    found = heard(ear)
    one.stopping()
    assert ("WATCHDOG=1" in found) is beats


def test_the_heart_beats_only_with_the_scheduler(ear: socket.socket) -> None:
    """Without a pulse the beats end within half of the time; stopping ends them too."""
    one = Supervisor(address=ADDRESS, watchdog=0.4)
    one.ready("here")
    time.sleep(0.5)
    heard(ear)
    assert "WATCHDOG=1" not in heard(ear)
    one.pulse()
    assert "WATCHDOG=1" in heard(ear)
    one.stopping()
    heard(ear)
    one.pulse()
    assert heard(ear) == []


def test_a_refused_reload_is_said_and_ready_comes_anyhow(ear: socket.socket) -> None:
    """What reloads us waits for READY after RELOADING, whatever came of it."""
    one = Supervisor(address=ADDRESS)
    with pytest.raises(ValueError, match="bad"), one.reloading():
        raise ValueError("bad")
    began, ended = heard(ear)
    assert began.startswith("RELOADING=1\nMONOTONIC_USEC=")
    assert ended.startswith("READY=1\nSTATUS=")
    assert "refused" in ended


@pytest.mark.parametrize("address", ["", "vsock:2:1", "/nonexistent/notify", "@nobody-listens"])
def test_nobody_who_listens_is_no_error(address: str) -> None:
    """A supervisor that is not there, or not of our kind, stops nothing."""
    one = Supervisor.take({"NOTIFY_SOCKET": address}, pid=1)
    one.starting("here")
    one.ready("here")
    with one.reloading():
        pass
    one.stopping()
