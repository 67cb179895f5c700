"""What a Dockerfile does, without Docker: its steps run in this machine's root under an overlay.

Nothing outside the overlay changes. What the base image brings (a Python) is this machine's.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

Done = subprocess.CompletedProcess[str]

_CAN_MOUNT = """
mount -t tmpfs t /mnt && mkdir /mnt/u /mnt/w /mnt/r &&
mount -t overlay o -o lowerdir=/,upperdir=/mnt/u,workdir=/mnt/w /mnt/r
"""
_INSIDE = """
set -e
mount --make-rprivate /
mkdir -p {box}/root
mount -t overlay overlay -o lowerdir=/,upperdir={box}/upper,workdir={box}/work {box}/root
mount --rbind /proc {box}/root/proc
mount --rbind /dev {box}/root/dev
{more}
exec chroot {box}/root {command}
"""


def becoming(user: str, *groups: int) -> list[str]:
    """Return what runs a command as another user, `uid:gid`, without any privilege."""
    uid, _, gid = user.partition(":")
    if uid == "0":
        return []
    more = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
    drop = ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    return ["setpriv", f"--reuid={uid}", f"--regid={gid}", more, *drop]


def _can_mount() -> bool:
    command = ["unshare", "--mount", "sh", "-c", _CAN_MOUNT]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


needs_mounts = pytest.mark.skipif(
    os.geteuid() != 0 or not _can_mount(), reason="mounts an overlay in a namespace of its own"
)


@dataclass(kw_only=True)
class Stage:
    """One FROM and what follows it."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def last(self, instruction: str) -> str:
        """Return the value of the last step of a kind."""
        return [value for found, value in self.steps if found == instruction][-1]

    def argv(self, instruction: str) -> list[str]:
        """Return the value of such a step in its exec form."""
        value = self.last(instruction)
        argv: list[str] = json.loads(value[value.index("[") :])
        return argv


def parse(text: str) -> list[Stage]:
    """Read the stages of a Dockerfile."""
    kept = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    stages: list[Stage] = []
    for line in "\n".join(kept).replace("\\\n", " ").splitlines():
        instruction, _, value = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, name = value.partition(" AS ")
            stages.append(Stage(base=base, name=name or "final"))
        elif instruction:
            stages[-1].steps.append((instruction, " ".join(value.split())))
    return stages


class Box:
    """A root of its own over this machine's: what is written stays in `upper`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("upper", "work"):
            (folder / name).mkdir(parents=True)
        self.environ: dict[str, str] = {}
        python = self.upper / "usr/local/bin/python"
        python.parent.mkdir(parents=True)
        real = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
        python.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
        python.chmod(0o755)
        self.run(["chmod", "a+x", *map(str, real.parents)])  # for users that are not root

    @property
    def upper(self) -> Path:
        """Where this machine sees what was written inside."""
        return self.folder / "upper"

    def argv(
        self,
        command: Sequence[str],
        *,
        user: str = "0:0",
        read_only: bool = False,
        mounts: Sequence[str] = (),
    ) -> list[str]:
        """Return what runs a command inside; `mounts` are shell lines, `$R` being the root."""
        root = self.folder / "root"
        more = [f"R={shlex.quote(str(root))}", *mounts]
        if read_only:
            more.append("mount -o remount,ro,bind $R")
        script = _INSIDE.format(
            box=shlex.quote(str(self.folder)),
            more="\n".join(more),
            command=shlex.join([*becoming(user), *command]),
        )
        return ["unshare", "--mount", "sh", "-c", script]

    def run(self, command: Sequence[str], **more: Any) -> str:
        """Run a command inside and return what it printed; raises CalledProcessError."""
        environ = {**os.environ, **self.environ, "PATH": f"/usr/local/bin:{os.environ['PATH']}"}
        done = subprocess.run(
            self.argv(command, **more),
            env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stdout[-3000:])
        return done.stdout

    def lend(self) -> None:
        """Put a Python with what this test run has at /opt/keyturn: the quick way to an image."""
        self.run(["python", "-m", "venv", "--without-pip", "/opt/keyturn"])
        site = next(self.upper.glob("opt/keyturn/lib/python3*/site-packages"))
        source = Path(str(find_spec("keyturn").origin)).parents[1]  # type: ignore[union-attr]
        lent = [source, Path(sysconfig.get_paths()["purelib"])]
        (site / "lent.pth").write_text("".join(f"{path}\n" for path in lent))
        self.run(["chmod", "a+x", *(str(one) for path in lent for one in path.parents)])

    def inside(
        self, pid: int, command: Sequence[str], user: str, *groups: int, stdin: str | None = None
    ) -> Done:
        """Run a command beside a process that runs inside, as another user."""
        enter = ["nsenter", f"--target={pid}", "--mount", "--root", "--wd=/"]
        environ = {**os.environ, **self.environ}
        return subprocess.run(
            [*enter, *becoming(user, *groups), *command],
            env=environ, input=stdin, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip

    def build(self, stage: Stage, *, context: Path, others: Mapping[str, Box]) -> None:
        """Do the steps of a stage, as `docker build` would."""
        workdir = "/"
        for instruction, value in stage.steps:
            if instruction == "WORKDIR":
                workdir = value
                (self.upper / value.lstrip("/")).mkdir(parents=True)
            elif instruction == "COPY":
                self._copy(value.split(), context, others, workdir)
            elif instruction in ("ENV", "ARG"):
                name, _, content = value.partition("=")
                self.environ[name] = content
            elif instruction == "RUN":
                words = value.split(" ")
                script = " ".join(word for word in words if not word.startswith("--mount="))
                self.run(["sh", "-e", "-c", f"cd {workdir}; {script}"])

    def _copy(
        self, words: list[str], context: Path, others: Mapping[str, Box], workdir: str
    ) -> None:
        source = context
        if words[0].startswith("--from="):
            source = others[words.pop(0).partition("=")[2]].upper
        *names, target = words
        place = self.upper / os.path.join(workdir, target).lstrip("/")  # noqa: PTH118
        for name in names:
            found = source / name.lstrip("/")
            if found.is_dir():
                ignore = shutil.ignore_patterns("__pycache__") if source == context else None
                shutil.copytree(found, place, symlinks=True, dirs_exist_ok=True, ignore=ignore)
            else:
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy2(found, place)
