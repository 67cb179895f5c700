"""Restores that are killed at every step, and repeated: `python -m support.killed_restore FOLDER EVERY`.

The folder holds a drill that ended (`state`, `keyturn.yaml`, `backup.db`) and `expected.json`, what each
secret that was held is answered with. For each point at which a restore can end (every EVERY-th) a copy
of it is restored by a process that is killed there, and then restored again, or started. Prints how many
points there were, and whatever came out otherwise.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keyturn.daemon import keeping, logs
from keyturn.storage import copying
from keyturn.storage.engine import Database
from keyturn.storage.ledger import Ledger
from support.drill import Drill


class Countdown:
    """Ends the process at the n-th point."""

    def __init__(self, left: int) -> None:
        self.left, self.seen = left, 0

    def point(self) -> None:
        """Be killed here, or go on."""
        self.seen += 1
        if self.seen == self.left:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner: Any, name: str) -> None:
        """Make a function of ours two points: before it, and after it."""
        inner = getattr(owner, name)

        def counted(*args: Any, **more: Any) -> Any:
            self.point()
            done = inner(*args, **more)
            self.point()
            return done

        setattr(owner, name, counted)


def in_a_process(body: Callable[[], int]) -> int:
    """Run something in a copy of this process; returns its exit code, negative where it was killed."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            code = body()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            code = 99
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def restored(folder: Path, left: int) -> int:
    """Restore, and be killed at a point; 42 where there is no such point any more."""
    countdown = Countdown(left)
    countdown.around(Database, "write")
    countdown.around(Ledger, "_append")
    for name in ("snapshot", "put_into", "facts"):
        countdown.around(copying, name)
    restore(folder)
    return 42


def restore(folder: Path) -> int:
    """Restore as the command does."""
    logs.configure(level="critical")
    keeping.logs.configure = lambda **_more: None  # type: ignore[assignment]
    file = folder / "backup.db"
    keeping.restore(folder / "keyturn.yaml", file, dry_run=False, ask=lambda _report: True)
    return 0


def judged(folder: Path, expected: dict[str, Any]) -> int:
    """Compare what is answered with what was answered before the loss, and go on working."""
    logs.configure(level="critical")
    drill = Drill(folder, 1)
    drill.held = expected["held"]
    found = drill.verdicts()
    wrong = [v for v, verdict in found.items() if verdict is not expected["verdicts"][v]]
    for version in wrong:
        print(f"{version}: {found[version]}", file=sys.stderr)
    return 1 if wrong or drill.quiet() else 0


def main() -> None:
    """Kill at one point after the other."""
    source, every = Path(sys.argv[1]), int(sys.argv[2])
    expected = json.loads((source / "expected.json").read_text())
    done = failed = 0
    point = 1
    while True:
        # In the same place each time: the configuration names it.
        shutil.rmtree(source / "state")
        shutil.copytree(source / "lost", source / "state")
        ended = in_a_process(lambda: restored(source, point))  # noqa: B023
        if ended == 42:
            break
        again = 0
        if done % 2:
            again = in_a_process(lambda: restore(source))
        judgement = in_a_process(lambda: judged(source, expected))
        if (ended, again, judgement) != (-signal.SIGKILL, 0, 0):
            failed += 1
            print(f"killed at point {point}: {ended}, {again}, {judgement}", file=sys.stderr)
        done += 1
        point += every
    print(json.dumps({"points": point - 1, "kills": done, "failed": failed}))


if __name__ == "__main__":
    main()
