"""Signals of the daemon, in processes of their own: a signal hits the whole process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

PROGRAM = """
import sys, threading, time
from keyturn.daemon import logs
from keyturn.daemon.signals import Signals
logs.configure()
done = threading.Event()
def say(what):
    print(what, flush=True)
def revoke():
    say("revoke begins"); time.sleep({revoke}); say("revoke ends")
def reload():
    say("reload"); {reload}
signals = Signals(revoke=revoke, reload=reload, stop=lambda: (say("stop"), {stop}))
signals.start()
say("ready")
done.wait()
signals.close(2)
say("end")
"""


class Program:
    """A process with Signals in it, read line by line."""

    def __init__(self, revoke: float = 0.0, reload: str = "pass", stop: str = "done.set()") -> None:
        code = PROGRAM.format(revoke=revoke, reload=reload, stop=stop)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.line() == "ready"

    def line(self) -> str:
        """Return the next line."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self.process.pid, number)

    def end(self) -> tuple[list[str], int]:
        """Return the remaining lines and the exit code."""
        rest, _ = self.process.communicate(timeout=20)
        return rest.splitlines(), self.process.returncode


@pytest.fixture
def started() -> Iterator[list[Program]]:
    """Programs that are killed at the end, whatever happened."""
    programs: list[Program] = []
    yield programs
    for program in programs:
        program.process.kill()
        program.process.communicate()


def test_each_signal_does_its_own(started: list[Program]) -> None:
    """USR1 revokes, HUP reloads, TERM stops in good order."""
    program = Program()
    started.append(program)
    program.send(signal.SIGUSR1)
    assert (program.line(), program.line()) == ("revoke begins", "revoke ends")
    program.send(signal.SIGHUP)
    assert program.line() == "reload"
    program.send(signal.SIGTERM)
    assert program.end() == (["stop", "end"], 0)


def test_one_that_arrives_during_the_work_means_again(started: list[Program]) -> None:
    """Any number of signals during the work make exactly one more run."""
    program = Program(revoke=0.4)
    started.append(program)
    program.send(signal.SIGUSR1)
    assert program.line() == "revoke begins"
    for _ in range(50):
        program.send(signal.SIGUSR1)
        time.sleep(0.002)
    assert [program.line() for _ in range(3)] == ["revoke ends", "revoke begins", "revoke ends"]
    program.send(signal.SIGINT)
    assert program.end() == (["stop", "end"], 0)


def test_a_reload_that_hangs_delays_neither_revoke_nor_stop(started: list[Program]) -> None:
    """USR1 and TERM work while a reload never comes back."""
    program = Program(reload="time.sleep(1000)")
    started.append(program)
    program.send(signal.SIGHUP)
    assert program.line() == "reload"
    program.send(signal.SIGUSR1)
    assert (program.line(), program.line()) == ("revoke begins", "revoke ends")
    program.send(signal.SIGTERM)
    assert program.end() == (["stop", "end"], 0)


def test_a_failure_does_not_deafen(started: list[Program]) -> None:
    """After a callback that raised, the same signal is heard again."""
    program = Program(reload="raise OSError('broken')")
    started.append(program)
    for _ in range(2):
        program.send(signal.SIGHUP)
        assert program.line() == "reload"
        time.sleep(0.1)
    program.send(signal.SIGTERM)
    assert program.end() == (["stop", "end"], 0)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_second_stop_quits_at_once(started: list[Program], second: signal.Signals) -> None:
    """Whoever asks twice does not wait for what is still running."""
    program = Program(stop="None")
    started.append(program)
    program.send(signal.SIGTERM)
    assert program.line() == "stop"
    program.send(second)
    assert program.end() == ([], 1)


def test_a_stop_that_fails_still_lets_the_second_one_quit(started: list[Program]) -> None:
    """A bug in the stop callback does not make the process immortal."""
    program = Program(stop="1 / 0")
    started.append(program)
    program.send(signal.SIGTERM)
    assert program.line() == "stop"
    time.sleep(0.1)
    program.send(signal.SIGTERM)
    assert program.end() == ([], 1)


def test_what_arrived_before_the_end_is_still_done(started: list[Program]) -> None:
    """A USR1 right before TERM, during the work, is not lost with the process."""
    program = Program(revoke=0.9)
    started.append(program)
    program.send(signal.SIGUSR1)
    assert program.line() == "revoke begins"
    program.send(signal.SIGUSR1)
    program.send(signal.SIGTERM)
    lines, code = program.end()
    assert lines.count("revoke ends") == 2
    assert (lines[-1], code) == ("end", 0)
