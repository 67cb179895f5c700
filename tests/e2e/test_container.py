"""The image, and how compose and Kubernetes run it: judged by their own tools, and run without them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from keyturn import config
from keyturn.daemon.checks import check
from support.dockerfile import Box, Stage, needs_mounts, parse
from support.supervised import Supervised

ROOT = Path(__file__).parents[2]
BUILD, FINAL = parse((ROOT / "Dockerfile").read_text())
MANIFESTS = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
VERIFIER = sorted((ROOT / "deploy" / "kubernetes" / "verifier").glob("*.yaml"))
SUPPORTED = ["1.29", "1.37"]  # the oldest that people have, and the newest that is known here
TOOLS = ("pip", "build", "hatchling", "setuptools", "uv")


def manifest(kind: str) -> dict[str, Any]:
    """Return the one manifest of a kind."""
    found = [yaml.safe_load(path.read_text()) for path in MANIFESTS]
    one: dict[str, Any] = next(each for each in found if each["kind"] == kind)
    return one


def compose() -> dict[str, Any]:
    """Return compose.yaml."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return found


# --- judged by tools --------------------------------------------------------------------------


def test_the_dockerfile_is_clean() -> None:
    """Hadolint finds nothing, not even a remark."""
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [str(linter), "--failure-threshold=style", str(ROOT / "Dockerfile")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_runs_as_nobody_from_one_pinned_base() -> None:
    """A numeric user, one base with its whole version, the program in its exec form and isolated."""
    assert FINAL.last("USER") == "65532:65532"
    assert BUILD.base == FINAL.base
    assert BUILD.base.count(".") == 2
    program = ["/opt/keyturn/bin/python", "-I", "-m", "keyturn"]
    assert FINAL.argv("ENTRYPOINT") == program
    assert FINAL.argv("HEALTHCHECK") == [*program, "health"]


def test_what_is_copied_is_in_the_context() -> None:
    """The list of what Docker may see names every source of a COPY, and nothing else."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    seen = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        name.rstrip("/")
        for instruction, value in BUILD.steps
        if instruction == "COPY"
        for name in value.split()[:-1]
    }
    assert copied == seen
    assert all((ROOT / name).exists() for name in seen)


def test_compose_follows_its_specification() -> None:
    """The schema of the Compose Specification accepts the file."""
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec",
         str(ROOT / "compose.yaml")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", SUPPORTED)
@pytest.mark.parametrize("path", MANIFESTS + VERIFIER, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_the_manifests_follow_the_schemas_of_kubernetes(path: Path, version: str) -> None:
    """Strictly: a key that Kubernetes would ignore is an error."""
    kubernetes_validate.validate(yaml.safe_load(path.read_text()), version, strict=True)


def test_everywhere_it_has_the_same_user_and_no_privilege() -> None:
    """Image, compose and Kubernetes agree, and the root is read-only in both."""
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    security = container["securityContext"]
    ids = {pod["securityContext"][key] for key in ("runAsUser", "runAsGroup", "fsGroup")}
    assert ids == {65532}
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    service = compose()["services"]["keyturn"]
    assert (service["user"], service["read_only"]) == (FINAL.last("USER"), True)
    assert service["cap_drop"] == ["ALL"]
    assert service["memswap_limit"] == service["mem_limit"]  # so none of it is swapped
    probes = {name: container[name]["exec"]["command"] for name in container if "Probe" in name}
    program = [*FINAL.argv("ENTRYPOINT"), "health"]
    assert probes == {
        "startupProbe": program,
        "readinessProbe": [*program, "--ready"],
        "livenessProbe": program,
    }


def test_the_verifier_is_as_closed_and_holds_no_login_of_the_daemon() -> None:
    """The same rights, probes on its own pages, another uid in Kubernetes, and nothing of OpenBao's."""
    (found,) = [yaml.safe_load(path.read_text()) for path in VERIFIER if path.stem == "deployment"]
    pod = found["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (daemon,) = manifest("Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["securityContext"] == daemon["securityContext"]
    assert pod["securityContext"]["runAsUser"] not in (0, 65532)
    probes = {name: one["httpGet"] for name, one in container.items() if "Probe" in name}
    assert {name: one["path"] for name, one in probes.items()} == {
        "startupProbe": "/healthz", "readinessProbe": "/readyz", "livenessProbe": "/healthz",
    }  # fmt: skip
    services = compose()["services"]
    same = (
        "read_only",
        "cap_drop",
        "security_opt",
        "user",
        "ulimits",
        "mem_limit",
        "memswap_limit",
    )
    for key in same:
        assert services["verifier"][key] == services["keyturn"][key], key
    assert services["verifier"]["secrets"] == ["db-password"]


@pytest.mark.parametrize("whose", ["compose", "kubernetes"])
def test_the_shipped_configurations_of_the_verifier_are_good(whose: str, tmp_path: Path) -> None:
    """What compose and the ConfigMap bring is taken, and listens."""
    text = (ROOT / "deploy" / "compose" / "verifier.yaml").read_text()
    if whose == "kubernetes":
        (found,) = [
            yaml.safe_load(path.read_text()) for path in VERIFIER if path.stem == "configmap"
        ]
        text = found["data"]["verifier.yaml"]
    tmp_path.chmod(0o700)
    path = tmp_path / "verifier.yaml"
    path.touch(mode=0o600)
    path.write_text(text)
    settings = config.load_verifier(path, environ={})
    assert settings.verifier.listen is not None
    assert settings.verifier.listen.address is not None


@pytest.mark.parametrize("whose", ["compose", "kubernetes"])
def test_the_shipped_configurations_are_good(whose: str, tmp_path: Path) -> None:
    """`keyturn check` accepts what compose and the ConfigMap bring."""
    text = (ROOT / "deploy" / "compose" / "keyturn.yaml").read_text()
    if whose == "kubernetes":
        text = manifest("ConfigMap")["data"]["keyturn.yaml"]
    tmp_path.chmod(0o700)
    path = tmp_path / "keyturn.yaml"
    path.touch(mode=0o600)
    path.write_text(text)
    report = check(path)
    assert report["ok"], report


# --- run --------------------------------------------------------------------------------------


class Pod:
    """A container of the final stage as Kubernetes runs it: its user, a read-only root, volumes.

    A volume is root's, its group is `fsGroup`, and that group can write it: as kubelet makes them.
    """

    def __init__(self, box: Box) -> None:
        self.box = box
        uid, _, gid = FINAL.last("USER").partition(":")
        self.user = f"{uid}:{gid}"
        config = box.upper / "etc/keyturn/..data"
        config.mkdir(parents=True)
        (config / "keyturn.yaml").write_text(manifest("ConfigMap")["data"]["keyturn.yaml"])
        (box.upper / "etc/keyturn/keyturn.yaml").symlink_to("..data/keyturn.yaml")
        state = box.folder / "state"
        state.mkdir()
        os.chown(state, 0, int(gid))
        state.chmod(0o2775)
        self.mounts = [
            f"mount --bind {state} $R/var/lib/keyturn",
            f"mount -t tmpfs -o mode=2777,gid={gid},size=1m run $R/run/keyturn",
        ]

    def command(self) -> list[str]:
        """Return what runs the image's program with its default arguments."""
        argv = [*FINAL.argv("ENTRYPOINT"), *FINAL.argv("CMD")]
        return self.box.argv(argv, user=self.user, read_only=True, mounts=self.mounts)

    def healthcheck(self, pid: int, *more: str) -> int:
        """Run the probe beside the daemon."""
        argv = FINAL.argv("HEALTHCHECK")
        return self.box.inside(pid, [*argv, *more], self.user).returncode


def run_as_a_pod(box: Box, tmp_path: Path) -> None:
    """Start it, ask its probes, end it."""
    pod = Pod(box)
    environ = {"PATH": f"/usr/local/bin:{os.environ['PATH']}", **box.environ}
    address = f"@keyturn-pod-{os.getpid()}"
    with Supervised(pod.command(), environ=environ, log=tmp_path / "log", address=address) as one:
        one.wait_ready()
        pid = one.process.pid
        assert [pod.healthcheck(pid), pod.healthcheck(pid, "--ready")] == [0, 0]
        written = box.inside(pid, shlex.split("touch /etc/keyturn/x"), "0:0")
        assert "Read-only" in written.stderr
        assert one.stop() == 0


@pytest.fixture
def box(tmp_path: Path) -> Box:
    """Give a root for a stage."""
    return Box(tmp_path / "final")


@needs_mounts
def test_the_final_stage_runs_as_kubernetes_runs_it(box: Box, tmp_path: Path) -> None:
    """Its own steps, with what this test run has in place of what the first stage builds."""
    lent = Stage(base=FINAL.base, name="", steps=[s for s in FINAL.steps if s[0] != "COPY"])
    box.build(lent, context=ROOT, others={})
    box.lend()
    run_as_a_pod(box, tmp_path)


@pytest.mark.full
@needs_mounts
def test_every_step_of_the_image_runs(box: Box, tmp_path: Path) -> None:
    """From the locks and the sources to a healthy daemon, and no tool of the build is left."""
    build = Box(tmp_path / "build")
    build.build(BUILD, context=ROOT, others={})
    box.build(FINAL, context=ROOT, others={BUILD.name: build})
    site = next((box.upper / "opt/keyturn/lib").glob("python3*/site-packages"))
    assert (site / "keyturn").is_dir()
    assert not [name for name in TOOLS if (site / name).exists()]
    locked = {
        line.split("==")[0].lower()
        for line in (ROOT / "requirements" / "all.lock").read_text().splitlines()
        if "==" in line and not line.startswith(" ")
    }
    installed = {
        path.name.partition("-")[0].replace("_", "-").lower() for path in site.glob("*.dist-info")
    }
    assert installed - {"keyturn"} <= locked
    run_as_a_pod(box, tmp_path)
