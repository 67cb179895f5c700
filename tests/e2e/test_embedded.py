"""The verifier that `keyturn run` keeps beside itself: there, clean, replaced, restarted, gone."""

from __future__ import annotations

import base64
import http.client
import os
import secrets
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from keyturn.cli.client import AdminClient
from keyturn.daemon.service import load
from keyturn.daemon.wire import waiting_path
from keyturn.errors import ConfigError, KeyturnError
from support.http_verifier import basic
from support.over_unix import UnixConnection, ask
from support.running import Keyturn

MARK = "login-of-a-destination-"  # what nobody but the daemon may have


@pytest.fixture
def keyturn(tmp_path: Path) -> Iterator[Keyturn]:
    """Give an installation with an embedded verifier at a Unix socket, not started."""
    one = Keyturn(tmp_path, agents=2)
    (tmp_path / "run").mkdir(mode=0o750)
    one.content["verifier"] = {"listen": {"socket": str(at(one))}}
    one.write()
    yield one
    one.stop()


def at(keyturn: Keyturn) -> Path:
    """Return where the verifier listens."""
    return keyturn.folder / "run" / "verify.sock"


def answer(keyturn: Keyturn, held: Mapping[str, Any], path: str = "/v1/auth") -> int:
    """Ask about what an agent holds, on a connection of its own; 0 where nobody answers."""
    connection = UnixConnection(at(keyturn))
    try:
        return ask(connection, path, headers={"Authorization": basic(held["id"], held["secret"])})[
            0
        ]
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # the thread has ended in this moment
            found += map(int, (task / "children").read_text().split())
    return found


def verifiers(keyturn: Keyturn) -> list[int]:
    """Return the pids of the daemon's children that are verifiers by now."""
    assert keyturn.process is not None
    found = []
    for pid in children(keyturn.process.pid):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"verifier" in words:
            found.append(pid)
    return found


def ears(keyturn: Keyturn) -> list[Path]:
    """Return the sockets at which children are heard."""
    return list(keyturn.store.parent.glob(".notify-*"))


def abstract_names(pid: int) -> list[str]:
    """Return the names of a process's sockets that everybody on this host may read and send to."""
    found = []
    mine = {str(one.readlink()) for one in Path(f"/proc/{pid}/fd").iterdir()}
    for line in Path("/proc/net/unix").read_text().splitlines():
        fields = line.split()
        if len(fields) == 8 and fields[7].startswith("@") and f"socket:[{fields[6]}]" in mine:
            found.append(fields[7])
    return found


def gone(pid: int) -> bool:
    """Tell whether a process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def reasons(keyturn: Keyturn) -> list[str]:
    """Return why the daemon is not ready."""
    socket = Path(keyturn.content["admin"]["socket"])
    for path in (socket, waiting_path(socket)):
        with suppress(KeyturnError):
            found = AdminClient(path).call("health", {})
            return [one["reason"] for one in found["reasons"]]
    return ["down"]


def reload(keyturn: Keyturn) -> None:
    """Have the files read again."""
    AdminClient(Path(keyturn.content["admin"]["socket"])).call("reload", {})


def memory_of(pid: int) -> Iterator[bytes]:
    """Yield all that a process has in memory; only root may."""
    with Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, rights, *_ = line.split()
            if rights[0] != "r" or line.endswith(("[vvar]", "[vsyscall]", "[vvar_vclock]")):
                continue
            first, last = (int(one, 16) for one in span.split("-"))
            try:
                memory.seek(first)
                yield memory.read(last - first)
            except OSError:
                continue  # the kernel's own


def forms(canary: str) -> list[bytes]:
    """Return how a text may stand in memory or in a file: as it is, wide, and in base64."""
    found = [canary.encode(), canary.encode("utf-16-le"), canary.encode("utf-32-le")]
    for shift in range(3):
        coded = base64.b64encode(b"\0" * shift + canary.encode())
        found.append(coded[4 if shift else 0 : -4])
    return found


def test_it_answers_and_holds_nothing_of_the_destinations(keyturn: Keyturn) -> None:
    """Security test 8: its memory, variables, arguments and descriptors hold no login of ours."""
    login, bait = (f"{MARK}{secrets.token_hex(16)}" for _ in range(2))
    token, folder = keyturn.folder / "token", keyturn.folder / "credentials"
    folder.mkdir(mode=0o700)
    for path in (token, folder / "vault-token"):
        path.touch(mode=0o600)
        path.write_text(login)
    auth = {"method": "token", "token_file": "credential:vault-token"}
    keyturn.content["connections"]["vault"] = {
        "type": "vault", "address": "http://127.0.0.1:9", "auth": auth, "call_deadline": "1s",
    }  # fmt: skip
    keyturn.write()
    keyturn.environ = {
        **keyturn.environ, "CREDENTIALS_DIRECTORY": str(folder), "AWS_SECRET_ACCESS_KEY": bait,
        "KEYTURN_ANYTHING": bait,
    }  # fmt: skip
    with keyturn:
        keyturn.wait_first()
        shown, hidden = keyturn.held("agent-0"), keyturn.held("agent-1")
        keyturn.wait_for(lambda: answer(keyturn, shown) == 200)
        assert answer(keyturn, {**shown, "id": "agent-1"}) == 401
        (pid,) = verifiers(keyturn)
        process = Path(f"/proc/{pid}")

        environ = dict(
            line.split("=", 1) for line in (process / "environ").read_text().split("\0") if line
        )
        assert environ.keys() <= {
            "PATH", "LANG", "LANGUAGE", "TZ", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH",
            "NOTIFY_SOCKET", "WATCHDOG_USEC", "KEYTURN_PARENT",
        }  # fmt: skip
        assert (process / "cmdline").read_bytes().split(b"\0")[1:-1] == [
            b"-I", b"-m", b"keyturn", b"verifier", b"-c", str(keyturn.config).encode(),
        ]  # fmt: skip
        # What it has open: the log, its own store, sockets and events; nothing of the daemon's.
        opened = {str(one.readlink()) for one in (process / "fd").iterdir()}
        files = {one for one in opened if one.startswith("/")}
        assert files <= {"/dev/null", "/dev/urandom", str(keyturn.log), str(keyturn.store)}, files
        assert _confined(keyturn, pid)
        inherited = {str((process / "fd" / str(n)).readlink()) for n in (0, 1, 2)}
        assert inherited == {"/dev/null", str(keyturn.log)}
        assert os.getsid(pid) == pid

        canaries = {login: "a login", bait: "a variable", hidden["secret"][-40:]: "a secret"}
        found = Counter(
            what
            for block in memory_of(pid)
            for canary, what in canaries.items()
            if any(form in block for form in forms(canary))
        )
        assert found == {}, found
        assert any(b"keyturn" in block for block in memory_of(pid))  # it was read at all


def _confined(keyturn: Keyturn, pid: int) -> bool:
    """Whether its files are closed to it, or the kernel cannot do that and the log says so."""
    if "verifier.not-confined" in keyturn.log.read_text():
        return True
    return "NoNewPrivs:\t1" in Path(f"/proc/{pid}/status").read_text()


class Asker(threading.Thread):
    """Asks again and again, each time on a new connection, and counts what it hears."""

    def __init__(self, keyturn: Keyturn, held: Mapping[str, Any]) -> None:
        super().__init__(daemon=True)
        self.counts: Counter[int] = Counter()
        self._keyturn, self._held = keyturn, held
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.002):
            self.counts[answer(self._keyturn, self._held)] += 1

    def end(self) -> None:
        self._ended.set()
        self.join()


def test_another_section_replaces_it_and_nobody_is_turned_away(keyturn: Keyturn) -> None:
    """A reload that changes `verifier` starts the new one first; one that does not keeps the old."""
    with keyturn:
        keyturn.wait_first()
        held = keyturn.held("agent-0")
        keyturn.wait_for(lambda: answer(keyturn, held) == 200)
        (first,) = verifiers(keyturn)
        asker = Asker(keyturn, held)
        asker.start()
        reload(keyturn)
        assert verifiers(keyturn) == [first]

        keyturn.content["verifier"]["hash_memory"] = "128MiB"
        keyturn.write()
        reload(keyturn)
        keyturn.wait_for(lambda: gone(first) and len(verifiers(keyturn)) == 1)
        (second,) = verifiers(keyturn)
        assert second != first

        # one that cannot start leaves the old one where it is
        keyturn.content["verifier"]["relying_parties"] = {"x": {"token_file": "/nowhere/token"}}
        keyturn.write()
        reload(keyturn)
        keyturn.wait_for(lambda: "verifier.not-replaced" in keyturn.log.read_text())
        assert verifiers(keyturn) == [second]
        asker.end()
        assert asker.counts.keys() == {200}, asker.counts
        assert reasons(keyturn) == []

        # and none where there is to be none
        del keyturn.content["verifier"]
        keyturn.write()
        reload(keyturn)
        keyturn.wait_for(lambda: gone(second))
        assert reasons(keyturn) == []


def test_it_is_restarted_and_dies_with_its_daemon(keyturn: Keyturn) -> None:
    """Killed or stopped: health, log and metric say so, and another one comes; none outlives its daemon."""
    with keyturn:
        keyturn.wait_first()
        held = keyturn.held("agent-0")
        keyturn.wait_for(lambda: answer(keyturn, held) == 200)
        assert reasons(keyturn) == []
        (first,) = verifiers(keyturn)
        os.kill(first, signal.SIGKILL)
        keyturn.wait_for(lambda: reasons(keyturn) == ["verifier-down"])
        keyturn.wait_for(lambda: answer(keyturn, held) == 200)
        keyturn.wait_for(lambda: reasons(keyturn) == [])
        metrics = AdminClient(Path(keyturn.content["admin"]["socket"])).call("metrics", {})["text"]
        assert "keyturn_embedded_verifier_ends_total 1.0" in metrics
        assert '"verifier.ended"' in keyturn.log.read_text()

        assert keyturn.run("revoke", "agent-0", "--reissue", "--reason", "t").returncode == 0
        assert answer(keyturn, held) in (401, 503)  # at once; 503 while the store is written to
        keyturn.wait_for(lambda: answer(keyturn, held) == 401)

        (second,) = verifiers(keyturn)
        assert keyturn.process is not None
        assert abstract_names(keyturn.process.pid) == []  # everybody could fill it
        (before,) = ears(keyturn)
        keyturn.process.kill()
        keyturn.process.wait()
        keyturn.wait_for(lambda: gone(second))

        keyturn.start()
        keyturn.wait_for(lambda: len(verifiers(keyturn)) == 1)
        (third,) = verifiers(keyturn)
        keyturn.wait_for(lambda: answer(keyturn, held) == 401)
        assert [one != before for one in ears(keyturn)] == [True]
        assert keyturn.stop() == 0
        assert gone(third)
        assert ears(keyturn) == []


@pytest.mark.full
def test_a_standby_has_one_as_well(keyturn: Keyturn, tmp_path: Path) -> None:
    """A verifier needs no lead: who waits for it answers already."""
    (tmp_path / "other").mkdir()
    other = Keyturn(tmp_path / "other", agents=0)
    other.content["store"] = keyturn.content["store"]
    (other.folder / "run").mkdir(mode=0o750)
    other.content["verifier"] = {"listen": {"socket": str(at(other))}}
    other.write()
    with keyturn:
        keyturn.wait_first()
        held = keyturn.held("agent-0")
        with other:
            other.wait_for(lambda: answer(other, held) == 200)
            assert reasons(other) == ["standby"]
            assert len(ears(keyturn)) == 2


def test_on_postgresql_it_is_a_unit_of_its_own(keyturn: Keyturn) -> None:
    """There it gets a uid of its own: `run` and `check` refuse to embed it, and say what to do."""
    keyturn.content["policies"]["default"]["grace"] = "60s"
    keyturn.content["store"] = {"url": "postgresql://keyturn@/keyturn?host=/run/postgresql"}
    keyturn.write()
    with pytest.raises(ConfigError, match="keyturn verifier") as refused:
        load(keyturn.config)
    assert "verifier.embedded" in str(refused.value)
    keyturn.content["verifier"]["embedded"] = False
    keyturn.write()
    load(keyturn.config)
