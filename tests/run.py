"""Runs the suite in parts side by side: `python tests/run.py [pytest's options]`.

Most of it waits for servers, so two cores do three parts in a third of the time that they take one
after the other. What the parts print comes one after the other, and at the end the sum of all.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parent
# Found by looking at --durations: the parts take about as long as each other.
PARTS = [
    ["contract", "unit"],
    ["crash", "security", "stateful"],
    ["e2e"],
]
_COUNT = re.compile(r"([0-9]+) (passed|failed|errors?|skipped|deselected)")


def main(options: list[str]) -> int:
    """Run all and return the worst of their exit codes."""
    with tempfile.TemporaryDirectory(prefix="tests-run-") as name:
        outputs = [Path(name, f"part-{number}") for number in range(len(PARTS))]
        running = [
            _start(folders, output, options) for folders, output in zip(PARTS, outputs, strict=True)
        ]
        codes, total = [], Counter[str]()
        for process, output, folders in zip(running, outputs, PARTS, strict=True):
            codes.append(process.wait())
            text = output.read_text(errors="replace")
            print(f"===== {' '.join(folders)}: exit {codes[-1]}\n{text}", flush=True)
            total.update(_counts(text))
    failed = total["failed"] + total["error"] + total["errors"]
    failed = failed or sum(map(bool, codes))  # one that ended before it could count
    print(f"{total['passed']} passed, {failed} failed, {total['skipped']} skipped")
    return max(codes, key=abs)


def _start(folders: list[str], output: Path, options: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pytest", *(str(TESTS / one) for one in folders), *options]
    with output.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=TESTS.parent)


def _counts(text: str) -> Counter[str]:
    last = next((line for line in reversed(text.splitlines()) if " in " in line), "")
    return Counter({word: int(number) for number, word in _COUNT.findall(last)})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
