"""The command line against a daemon that writes down what it was asked."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket as socket_module
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer

from keyturn import errors
from keyturn.cli import act, client, look, main, options, output, reach
from keyturn.core.secret import Secret, mint
from keyturn.daemon.peer import Peer, Role, Roles
from keyturn.daemon.socket import AdminServer, Command, Progress, UnknownCommand

VERSION_ID, SECRET = mint(random_bytes=os.urandom)
CANARY = SECRET.reveal()
RANDOM_PART = CANARY.split("_")[2]

NAMES = [
    "status", "agents.list", "agents.show", "agents.add", "agents.remove", "rotate", "suspend",
    "resume", "revoke", "reload", "rotation.retry", "rotation.abandon", "identify", "audit",
    "metrics", "names", "destinations.forget", "rotate.forced", "notify.status", "notify.test",
    "notify.enable", "audit.quoted",
]  # fmt: skip


class FakeDaemon:
    """Answers every command with what was put in, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, Any] = {"notify.status": []}
        self.events: list[dict[str, Any]] = []
        self.own: dict[str, Any] = {}

    def handlers(self) -> dict[str, Command]:
        """Return one handler per command."""
        return {name: Command(role=Role.VIEW, function=self._handler(name)) for name in NAMES}

    def _handler(self, name: str) -> Any:
        def handle(args: dict[str, Any], peer: Peer, progress: Progress) -> Any:
            if name in self.own:
                return self.own[name](args, peer, progress)
            args.pop("request_id", None)
            self.asked.append((name, args))
            for event in self.events:
                progress(event)
            answer = self.answers[name]
            if isinstance(answer, Exception):
                raise answer
            return answer

        return handle


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short place for a socket, and an environment that names it."""
    made = Path(tempfile.mkdtemp(prefix="kt-"))
    monkeypatch.setenv("KEYTURN_SOCKET", str(made / "k" / "s"))
    monkeypatch.setenv("KEYTURN_CONFIG", str(made / "keyturn.yaml"))
    monkeypatch.delenv("KEYTURN_DEBUG", raising=False)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def daemon(folder: Path) -> Iterator[FakeDaemon]:
    """A daemon that runs."""
    fake = FakeDaemon()
    server = AdminServer(folder / "k" / "s", fake.handlers(), Roles(own_uid=os.geteuid()))
    server.start()
    yield fake
    server.close()


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run one command; returns exit code, stdout and stderr."""

    def command(*argv: str) -> tuple[int, str, str]:
        code = main.main(argv)
        out = capsys.readouterr()
        assert "Traceback" not in out.out + out.err
        return code, out.out, out.err

    return command


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """Give the command this on standard input."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


# --- what is asked ----------------------------------------------------------------------------

DONE = {"results": [{"agent": "a", "outcome": "promoted", "version": "v"}]}
REVOKED = {
    "target": "agent:a", "agent": "a", "versions": ["v1", "v2"], "incomplete": False,
    "refused_here_after_seconds": 0.004, "delay_seconds": 0.012, "destinations": ["vault-eu:a"],
    "verifiers": {"acknowledged": 1, "live": 1}, "dry_run": False, "warnings": [],
}  # fmt: skip
STATE = {"agent": "a", "state": "enabled"}
ADDED = {"agent": "hello", "outcome": "started"}

PONG = {"name": "pager", "ok": True, "answer": "HTTP 204", "text": "", "seconds": 0.1}
ASKED: list[tuple[str, str, dict[str, Any], Any]] = [
    ("status", "status", {}, []),
    ("notify status", "notify.status", {}, []),
    ("notify test --name pager", "notify.test", {"name": "pager"}, {"results": [PONG]}),
    ("notify enable pager", "notify.enable", {"name": "pager"}, {}),
    ("status a", "status", {"agent": "a"}, [STATE]),
    ("agents list", "agents.list", {}, []),
    ("agents show a", "agents.show", {"agent": "a"}, STATE),
    (
        "agents add hello --to vault-eu:hello --wait",
        "agents.add",
        {
            "name": "hello",
            "policy": "default",
            "wait": True,
            "targets": [{"to": "vault-eu", "path": "hello", "merge": False, "adopt": False}],
        },
        ADDED,
    ),
    (
        "agents add hello --to v:a/b --to w:c:d --login x@y --owner t --policy p --merge --adopt",
        "agents.add",
        {
            "name": "hello",
            "login": "x@y",
            "owner": "t",
            "policy": "p",
            "wait": False,
            "targets": [
                {"to": "v", "path": "a/b", "merge": True, "adopt": True},
                {"to": "w", "path": "c:d", "merge": True, "adopt": True},
            ],
        },
        ADDED,
    ),
    ("agents remove a --yes", "agents.remove", {"agent": "a"}, STATE),
    (
        "destinations forget a v:p --yes",
        "destinations.forget",
        {"agent": "a", "destination": "v:p"},
        STATE,
    ),
    ("rotate a b", "rotate", {"agents": ["a", "b"], "wait": False}, DONE),
    (
        "rotate a --grace 15m --force --wait",
        "rotate.forced",
        {"agents": ["a"], "wait": True, "grace_seconds": 900.0},
        DONE,
    ),
    ("suspend a --reason why", "suspend", {"agent": "a", "reason": "why"}, STATE),
    ("resume a", "resume", {"agent": "a"}, STATE),
    ("resume a --destination v", "resume", {"agent": "a", "destination": "v"}, STATE),
    (
        "revoke a --reissue --except w --except v",
        "revoke",
        {
            "agent": "a",
            "reissue": True,
            "reason": "",
            "dry_run": False,
            "wait": False,
            "except": ["v", "w"],
        },
        REVOKED | {"withheld": ["v", "w"]},
    ),
    (
        "revoke a --reissue --reason INC-1 --wait",
        "revoke",
        {"agent": "a", "reissue": True, "reason": "INC-1", "dry_run": False, "wait": True},
        REVOKED,
    ),
    (
        "revoke --version v1 --dry-run",
        "revoke",
        {"version": "v1", "reissue": False, "reason": "", "dry_run": True, "wait": False},
        REVOKED | {"dry_run": True, "delay_seconds": None},
    ),
    ("reload", "reload", {"allow_mass_change": False}, {"added": 1}),
    ("reload --allow-mass-change", "reload", {"allow_mass_change": True}, {}),
    (
        "rotation retry a",
        "rotation.retry",
        {"agents": ["a"], "destination": "", "wait": False},
        {"results": [{"agent": "a", "outcome": "tried again"}]},
    ),
    (
        "rotation retry --all --destination v",
        "rotation.retry",
        {"agents": [], "destination": "v", "wait": False},
        {"results": []},
    ),
    ("rotation abandon a", "rotation.abandon", {"agent": "a"}, STATE),
    ("audit", "audit", {"verify": False, "limit": 50}, {"entries": []}),
    (
        "audit a --verify --limit 5",
        "audit",
        {"agent": "a", "verify": True, "limit": 5},
        {"entries": [], "chain": {"ok": True}},
    ),
    ("metrics", "metrics", {}, {"text": "keyturn_up 1\n"}),
]


@pytest.mark.parametrize(("line", "name", "args", "answer"), ASKED, ids=[a[0] for a in ASKED])
def test_what_is_typed_is_what_is_asked(
    daemon: FakeDaemon, run: Any, line: str, name: str, args: dict[str, Any], answer: Any
) -> None:
    """Each command sends its name and arguments, prints something, and ends with 0."""
    daemon.answers[name] = answer
    code, out, err = run(*line.split())
    assert daemon.asked[0] == (name, args)
    assert {other for other, _ in daemon.asked[1:]} <= {"notify.status"}  # a word beside `status`
    assert (code, err) == (0, "")
    assert out.strip()


@pytest.mark.parametrize(("line", "name", "args", "answer"), ASKED, ids=[a[0] for a in ASKED])
def test_json_prints_the_same_data(
    daemon: FakeDaemon, run: Any, line: str, name: str, args: dict[str, Any], answer: Any
) -> None:
    """With --json stdout is the answer as JSON and nothing else."""
    daemon.answers[name] = answer
    daemon.events = [{"event": "step", "agent": "a"}]
    code, out, err = run(*line.split(), "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == (answer[0] if line == "status a" else answer)


def test_progress_is_shown_on_stderr(daemon: FakeDaemon, run: Any) -> None:
    """Steps appear while one waits; stdout keeps the result alone."""
    daemon.answers["rotate"] = DONE
    daemon.events = [
        {"event": "step", "agent": "a", "step": "publish", "target": "v:a", "state": "waiting",
         "why": "destination", "retry_in_seconds": 90}
    ]  # fmt: skip
    _, out, err = run("rotate", "a", "--wait")
    assert err == "a: publish v:a waiting (destination), next try in 1m 30s\n"
    assert out == "a: promoted, version v\n"


def test_every_command_of_the_socket_is_reached() -> None:
    """No command of the protocol is without a way to type it."""
    assert {name for _, name, _, _ in ASKED} | {"identify", "names", "audit.quoted"} == set(NAMES)


# --- exit codes -------------------------------------------------------------------------------

EVERY_ERROR = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.KeyturnError)
]


@pytest.mark.parametrize("kind", EVERY_ERROR, ids=lambda kind: kind.__name__)
def test_every_error_becomes_text_hint_and_its_exit_code(
    daemon: FakeDaemon, run: Any, kind: type[errors.KeyturnError]
) -> None:
    """One handler for all of them: `error:`, `hint:`, the class's own exit code, no traceback."""
    daemon.answers["resume"] = kind("what happened", hint="what to do")
    code, out, err = run("resume", "a")
    assert (code, out) == (kind.exit_code, "")
    assert err == "error: what happened\nhint: what to do\n"


def test_the_exit_codes_are_those_of_the_protocol() -> None:
    """No error of ours invents an exit code."""
    own = [client.DaemonDown, client.AnswerLost, look.NothingFound, UnknownCommand]
    assert {kind.exit_code for kind in [*EVERY_ERROR, *own]} <= {1, 2, 3, 4, 69, 75, 77, 78}


RESULTS: list[tuple[list[dict[str, Any]], int]] = [
    ([], 0),
    ([{"outcome": "promoted"}, {"outcome": "started"}], 0),
    ([{"outcome": "waiting"}], 75),
    ([{"outcome": "stalled"}], 1),
    ([{"outcome": "promoted"}, {"outcome": "stalled"}], 3),
    ([{"outcome": "stalled"}, {"outcome": "waiting"}], 3),
    ([{"error": {"exit_code": 4}}, {"error": {"exit_code": 4}}], 4),
    ([{"error": {"exit_code": 4}}, {"outcome": "promoted"}], 3),
]


@pytest.mark.parametrize(("results", "code"), RESULTS)
def test_several_results_make_one_exit_code(results: list[dict[str, Any]], code: int) -> None:
    """All good is 0, all the same its own, anything else is partial."""
    assert output.code_of(results) == code


def test_results_decide_the_exit_code_of_rotate(daemon: FakeDaemon, run: Any) -> None:
    """One good, one refused: exit 3, and both are told."""
    error = {"code": "x", "message": "no such agent", "hint": "look", "exit_code": 1}
    daemon.answers["rotate"] = {
        "results": [{"agent": "a", "outcome": "promoted"}, {"agent": "b", "error": error}]
    }
    code, out, _ = run("rotate", "a", "b")
    assert code == 3
    assert "no such agent (hint: look)" in out


def test_an_incomplete_revocation_is_75(daemon: FakeDaemon, run: Any) -> None:
    """Where the store did not take it yet, success is not claimed."""
    daemon.answers["revoke"] = REVOKED | {"incomplete": True, "warnings": ["the store is away"]}
    code, out, _ = run("revoke", "a")
    assert code == 75
    assert "INCOMPLETE" in out
    assert "warning: the store is away" in out


def test_a_broken_audit_chain_is_1(daemon: FakeDaemon, run: Any) -> None:
    """`audit --verify` fails loudly."""
    daemon.answers["audit"] = {"entries": [], "chain": {"ok": False, "problem": "entry 7"}}
    code, out, _ = run("audit", "--verify")
    assert code == 1
    assert "BROKEN: entry 7" in out


USAGE = [
    "nonsense", "rotate", "rotate a --grace soon", "revoke", "revoke a --version v",
    "revoke a --except v", "revoke --version v --reissue --except v",
    "agents add x", "agents add x --to nowhere", "agents add x --to :p", "agents add x --to v:",
    "audit --limit 0", "verify", "status a b", "agents remove a", "rotation",
    "destinations forget a v:p", "destinations forget a", "policy", "rotation retry",
    "rotation retry a --all", "rotation retry a --destination v",
]  # fmt: skip


@pytest.mark.parametrize("line", USAGE)
def test_wrong_usage_is_2(
    daemon: FakeDaemon, run: Any, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that cannot be meant asks the daemon nothing and says what was expected."""
    stdin(monkeypatch, b"")
    code, out, err = run(*line.split())
    assert code == 2
    assert out + err
    assert daemon.asked == []


def test_every_fault_of_a_configuration_is_a_line_of_its_own(daemon: FakeDaemon, run: Any) -> None:
    """Several faults are several lines; one line cannot pretend to be two by a control character."""
    daemon.answers["reload"] = errors.ConfigError("k.yaml:3: a\nk.yaml:9: b\x1b[2J", hint="mend")
    code, _, err = run("reload")
    assert code == 78
    assert err == "error: k.yaml:3: a\nerror: k.yaml:9: b\\x1b[2J\nhint: mend\n"


def test_a_bug_is_told_without_its_text(
    run: Any, monkeypatch: pytest.MonkeyPatch, daemon: FakeDaemon
) -> None:
    """An exception that nobody foresaw shows its type, never its message, and where with --debug."""

    def broken(*_args: Any, **_options: Any) -> Any:
        raise RuntimeError(f"quoted {CANARY}")

    monkeypatch.setattr(act, "ask", broken)
    code, _, err = run("resume", "a")
    assert code == 1
    assert err.startswith("error: internal error: builtins.RuntimeError\nhint: ")
    monkeypatch.setenv("KEYTURN_DEBUG", "1")
    _, _, err = run("resume", "a")
    assert "in broken" in err or "broken" in err
    assert "quoted" not in err
    assert RANDOM_PART not in err


# --- without the daemon -----------------------------------------------------------------------


class FakeStore:
    """What `keyturn.daemon.offline` gives."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any], Peer]] = []
        self.config: Path | None = None
        self.accepts = {("bot", CANARY)}

    @contextlib.contextmanager
    def offline(self, config: Path) -> Iterator[FakeStore]:
        """Stand in for the function of the daemon's package."""
        self.config = config
        yield self

    def commands(self) -> Mapping[str, Any]:
        """Return the commands by name."""
        return {name: self._command(name) for name in NAMES}

    def _command(self, name: str) -> Any:
        def command(args: dict[str, Any], peer: Peer, _progress: Progress) -> Any:
            self.asked.append((name, args, peer))
            return {"status": [STATE], "revoke": REVOKED, "audit": {"entries": []}}.get(name, STATE)

        return command

    def verify(self, login: str, secret: Secret) -> bool:
        """Accept one pair."""
        return (login, secret.reveal()) in self.accepts


@pytest.fixture
def bare_store(monkeypatch: pytest.MonkeyPatch) -> FakeStore:
    """A store without a daemon."""
    fake = FakeStore()
    stand_in = types.ModuleType("keyturn.daemon.offline")
    stand_in.offline = fake.offline  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "keyturn.daemon.offline", stand_in)
    return fake


@pytest.mark.parametrize("line", ["status", "revoke a", "suspend a", "resume a", "audit"])
def test_the_urgent_commands_work_without_the_daemon(
    bare_store: FakeStore, run: Any, line: str, folder: Path
) -> None:
    """They go straight to the store that the configuration names, as this user, and say so."""
    code, out, err = run(*line.split(), "-c", "/x/k.yaml")
    assert (code, bool(out)) == (0, True)
    assert err.startswith("note: ")
    assert bare_store.config == Path("/x/k.yaml")
    ((name, _, peer),) = bare_store.asked
    assert name == line.split(maxsplit=1)[0]
    assert (peer.uid, peer.pid) == (os.geteuid(), os.getpid())
    assert name in reach.WITHOUT_DAEMON


@pytest.mark.parametrize(
    "line",
    ["rotate a", "reload", "agents list", "agents add x --to v:x", "agents remove a --yes",
     "rotation retry a", "rotation abandon a", "metrics", "agents show a"],
)  # fmt: skip
def test_the_others_say_that_the_daemon_is_not_running(
    bare_store: FakeStore, run: Any, line: str
) -> None:
    """Exit 69, and how to start it; the store is not touched."""
    code, out, err = run(*line.split())
    assert (code, out) == (69, "")
    assert err.startswith("error: the daemon is not running")
    assert "hint: start it with `keyturn run -c FILE`" in err
    assert bare_store.asked == []


def test_an_answer_of_the_daemon_is_never_overruled(
    daemon: FakeDaemon, bare_store: FakeStore, run: Any
) -> None:
    """Where the daemon refuses, nobody tries the store instead."""
    daemon.answers["revoke"] = errors.NotPermitted("no")
    code, _, _ = run("revoke", "a")
    assert code == 77
    assert bare_store.asked == []


@pytest.mark.parametrize(
    ("login", "data", "code", "word"),
    [
        ("bot", CANARY, 0, "accepted"),
        ("bot", CANARY + "\n", 0, "accepted"),
        ("bot", CANARY + "\r\n", 0, "accepted"),
        ("bot", CANARY + "\n\n", 4, "refused"),
        ("other", CANARY, 4, "refused"),
        ("bot", "", 4, "refused"),
        ("bot", "x" * 100_000, 4, "refused"),
    ],
)
def test_verify_reads_the_secret_from_stdin(
    bare_store: FakeStore,
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
    login: str,
    data: str,
    code: int,
    word: str,
) -> None:
    """One word, exit 0 or 4, and the secret is on no output."""
    stdin(monkeypatch, data.encode())
    assert run("verify", login) == (code, f"{word}\n", "")


def test_verify_never_asks_the_daemon(
    daemon: FakeDaemon, bare_store: FakeStore, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A running daemon is not shown the secret either."""
    stdin(monkeypatch, CANARY.encode())
    assert run("verify", "bot")[0] == 0
    assert daemon.asked == []


def test_identify_sends_version_ids_only(
    daemon: FakeDaemon, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Secrets are found anywhere in a text; only public ids leave the process, each once."""
    other_id, other = mint(random_bytes=os.urandom)
    torn = CANARY[:-1] + ("a" if CANARY[-1] != "a" else "b")
    text = f'log "{CANARY}",{CANARY}\ntoken={other.reveal()}; \xff {torn}'
    stdin(monkeypatch, text.encode("latin-1"))
    daemon.answers["identify"] = [{"version": VERSION_ID, "agent": "bot", "state": "current"}]
    code, out, _ = run("identify")
    assert code == 0
    assert daemon.asked == [("identify", {"versions": [VERSION_ID, other_id]})]
    assert out == (f"bot, version {VERSION_ID}, current\nversion {other_id}: not of this store\n")


def test_identify_finds_secrets_in_any_place(
    daemon: FakeDaemon, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Glued to other words, and across the places where a long text is cut for reading."""
    minted = [mint(random_bytes=os.urandom) for _ in range(1001)]
    glue = "x" * 1_000_000
    text = glue + ("token" + "mypasswordis".join(one.reveal() for _, one in minted))
    monkeypatch.setattr(look, "_CHUNK", 997)
    stdin(monkeypatch, text.encode())
    daemon.answers["identify"] = []
    code, _, _ = run("identify")
    assert code == 1
    assert [len(args["versions"]) for _, args in daemon.asked] == [1000, 1]
    asked = [one for _, args in daemon.asked for one in args["versions"]]
    assert sorted(asked) == sorted(version for version, _ in minted)


def test_identify_without_any_secret_says_so(
    daemon: FakeDaemon, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in our form: exit 1 and no question to the daemon."""
    stdin(monkeypatch, b"just some text")
    code, _, err = run("identify")
    assert (code, daemon.asked) == (1, [])
    assert "has the form" in err


# --- help -------------------------------------------------------------------------------------


def every_command(found: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield every command and group as what one types."""
    command = typer.main.get_command(main.app) if found is None else found
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from every_command(inner, (*path, name))


@pytest.mark.parametrize("path", list(every_command()), ids=" ".join)
def test_every_command_has_help(run: Any, path: tuple[str, ...]) -> None:
    """It names itself, says in a whole sentence what it does, and explains each option."""
    code, out, err = run(*path, "--help")
    assert (code, err) == (0, "")
    assert out.startswith("Usage: keyturn")
    body = out.splitlines()[2]
    assert body.strip()
    for line in out.splitlines()[1:]:
        assert not line.rstrip().endswith("..."), "a summary that is cut off"
        if line.lstrip().startswith("--"):
            assert len(line.split()) > 2, line


def test_no_command_is_help_and_2(run: Any) -> None:
    """`keyturn` alone shows what there is."""
    code, out, err = run()
    assert code in (0, 2)
    assert "Commands:" in out + err


def test_version_is_printed(run: Any) -> None:
    """`keyturn --version` is one line."""
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("keyturn ")


def test_durations_and_targets_are_read() -> None:
    """What options take, and the usage error for the rest."""
    assert options.duration("1h30m").total_seconds() == 5400
    with pytest.raises(typer.BadParameter):
        options.duration("15")


# --- where the daemon is ----------------------------------------------------------------------

NAMED = Path("/x/k.sock")
FILES: list[tuple[str, Path]] = [
    ("admin: {socket: /x/k.sock}\n", NAMED),
    ("store: {url: x}\nadmin:\n  socket: '/x/k.sock'\n", NAMED),
    ("admin: {socket: /x/k.sock}\nstore: {url: [\n", NAMED),
    ("admin:\n\tsocket: /x/k.sock\n", NAMED),
    ("version: 1\n", client.DEFAULT_SOCKET),
    ("admin: {socket: relative}\n", client.DEFAULT_SOCKET),
    ("admin: [1]\n", client.DEFAULT_SOCKET),
    ("", client.DEFAULT_SOCKET),
    ("{{{", client.DEFAULT_SOCKET),
]


@pytest.mark.parametrize(("text", "socket"), FILES)
def test_the_configuration_names_the_socket(tmp_path: Path, text: str, socket: Path) -> None:
    """The client goes where the daemon listens, and a broken file does not keep it from there."""
    (tmp_path / "k.yaml").write_text(text)
    assert reach.socket_of(tmp_path / "k.yaml") == socket


def test_a_missing_configuration_means_the_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that somebody named and that is not there is told; the usual one is simply not there."""
    assert reach.socket_of(tmp_path / "none.yaml") == client.DEFAULT_SOCKET
    assert "No such file" in capsys.readouterr().err
    monkeypatch.setattr(reach, "DEFAULT_CONFIG", tmp_path / "none.yaml")
    assert reach.socket_of(tmp_path / "none.yaml") == client.DEFAULT_SOCKET
    assert capsys.readouterr().err == ""


# --- lost answers -----------------------------------------------------------------------------


def breaking(daemon: FakeDaemon, name: str, times: int) -> list[str]:
    """Let the daemon do a command and break the connection instead of answering, so many times."""
    asked: list[str] = []

    def handle(args: dict[str, Any], _peer: Peer, progress: Any) -> Any:
        asked.append(args["request_id"])
        if len(asked) <= times:
            progress._connection.shutdown(socket_module.SHUT_RDWR)
        return daemon.answers[name]

    daemon.own[name] = handle
    return asked


@pytest.mark.parametrize("line", ["rotate a", "revoke a", "revoke a --request-id INC-1"])
def test_a_lost_answer_is_asked_for_once_more(daemon: FakeDaemon, run: Any, line: str) -> None:
    """The second try names the same request, so the daemon does nothing twice."""
    name = line.split(maxsplit=1)[0]
    daemon.answers[name] = {"rotate": DONE, "revoke": REVOKED}[name]
    asked = breaking(daemon, name, 1)
    code, out, err = run(*line.split())
    assert (code, len(asked), len(set(asked))) == (0, 2, 1)
    assert err == "note: the connection broke; asking again\n"
    assert out
    if "INC-1" in line:
        assert asked[0] == "INC-1"


def test_two_lost_answers_are_told(daemon: FakeDaemon, run: Any) -> None:
    """After the second one the person decides, and the exit code says that nobody knows."""
    daemon.answers["rotate"] = DONE
    asked = breaking(daemon, "rotate", 2)
    code, _, err = run("rotate", "a")
    assert (code, len(asked)) == (75, 2)
    assert "repeating does no harm" in err


def test_a_webhook_that_fails_for_long_is_mentioned(run: Any, daemon: FakeDaemon) -> None:
    """`status` says so to people, beside its table; machines ask `notify status`."""
    daemon.answers = {"status": [], "notify.status": [{"problem": "webhook pager fails"}]}
    assert "note: webhook pager fails" in run("status")[2]
    assert run("status", "--json")[2] == ""


HOOK = {
    "name": "pager", "on": ["revoked"], "state": "failing", "waiting": 7, "oldest_at": None,
    "in_sum": 0, "last": "HTTP 500", "problem": "webhook pager fails",
}  # fmt: skip
PING = {"name": "pager", "ok": False, "answer": "HTTP 500", "text": "no\x1b[2J", "seconds": 0.1}


def test_webhooks_as_people_see_them(run: Any, daemon: FakeDaemon) -> None:
    """What waits and what was answered, with exit codes for scripts; nothing steers the terminal."""
    daemon.answers = {"notify.status": [HOOK], "notify.test": {"results": [PING, PING | {"ok": 1}]}}
    code, out, _ = run("notify", "status")
    assert (code, "failing" in out, "HTTP 500" in out, "webhook pager fails" in out) == (
        75, True, True, True,
    )  # fmt: skip
    code, out, _ = run("notify", "test")
    assert (code, "FAIL pager: HTTP 500" in out, "\x1b" in out) == (3, True, False)


def test_an_anchor_that_does_not_agree_ends_with_1(
    run: Any, daemon: FakeDaemon, tmp_path: Path
) -> None:
    """What the file names is asked for in pieces, and every problem is told."""
    file = tmp_path / "anchors"
    heads = {f"w/{n}": [n, "h"] for n in range(600)}
    file.write_text(json.dumps({"at": "t", "store": "s1", "heads": heads}))
    daemon.answers = {
        "audit": {"entries": [], "chain": {"ok": True, "problem": ""}},
        "audit.quoted": {"store": "s1", "problems": []},
    }
    assert run("audit", "--anchor", str(file))[0] == 0
    assert [len(args["heads"]) for name, args in daemon.asked if name == "audit.quoted"] == [
        250, 250, 100,
    ]  # fmt: skip
    daemon.answers["audit.quoted"] = {"store": "s2", "problems": ["w/3: entry 3 is gone"]}
    code, out, _ = run("audit", "--anchor", str(file))
    assert (code, "w/3: entry 3 is gone" in out, "of another store" in out) == (1, True, True)
    assert run("audit", "--anchor", str(tmp_path / "none"))[0] == 1
