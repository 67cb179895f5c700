"""The admin socket against callers of every kind, friendly and hostile."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keyturn.cli.client import AdminClient, Answered, AnswerLost, DaemonDown
from keyturn.daemon import socket as admin
from keyturn.daemon.peer import Peer, Role, Roles, local_peer
from keyturn.daemon.socket import AdminServer, Command, Progress
from keyturn.errors import ConfigError, IllegalTransition, UnknownAgent
from support.peers import call_as, needs_root

VIEW, RESPOND, ADMIN, OTHER = 20101, 20102, 20103, 20104
STRANGER = 34567
ROLES = Roles(view=VIEW, respond=RESPOND, admin=ADMIN, own_uid=os.geteuid())


def who(_args: dict[str, Any], peer: Peer, _progress: Progress) -> dict[str, Any]:
    """Tell the caller who it is."""
    return {"uid": peer.uid, "actor": peer.actor, "pid": peer.pid, "groups": sorted(peer.groups)}


def echo(args: dict[str, Any], _peer: Peer, _progress: Progress) -> dict[str, Any]:
    """Give the arguments back."""
    return args


def fail(args: dict[str, Any], _peer: Peer, _progress: Progress) -> None:
    """Fail as asked."""
    if args["how"] == "ours":
        raise UnknownAgent("no agent has the id x")
    if args["how"] == "bug":
        raise IllegalTransition("secret detail")
    raise OSError("secret detail")


def count(args: dict[str, Any], _peer: Peer, progress: Progress) -> int:
    """Report progress."""
    for number in range(args["to"]):
        progress({"event": "counted", "number": number})
    return int(args["to"])


HANDLERS = {
    "who": Command(role=Role.VIEW, function=who),
    "view": Command(role=Role.VIEW, function=who),
    "respond": Command(role=Role.RESPOND, function=who),
    "admin": Command(role=Role.ADMIN, function=who),
    "echo": Command(role=Role.VIEW, function=echo),
    "fail": Command(role=Role.VIEW, function=fail),
    "count": Command(role=Role.VIEW, function=count),
    "not-json": Command(role=Role.VIEW, function=lambda *_: object()),
}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that other users can walk through, with a short name."""
    made = Path(tempfile.mkdtemp(prefix="kt-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def path(folder: Path) -> Path:
    """Where the socket will be; its folder does not exist yet."""
    return folder / "keyturn" / "admin.sock"


@pytest.fixture
def server(path: Path) -> Iterator[AdminServer]:
    """A running server."""
    running = AdminServer(path, HANDLERS, ROLES)
    running.start()
    yield running
    running.close()


@pytest.fixture
def client(server: AdminServer, path: Path) -> AdminClient:
    """A client of it."""
    return AdminClient(path)


def raw(path: Path) -> socket.socket:
    """Connect without the client."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(20)
    connection.connect(str(path))
    return connection


def received(connection: socket.socket) -> bytes:
    """Return everything until the server closes."""
    parts = []
    while True:
        try:
            part = connection.recv(65536)
        except ConnectionResetError:
            break
        if not part:
            break
        parts.append(part)
    return b"".join(parts)


# --- friendly ---------------------------------------------------------------------------------


def test_a_command_gets_its_arguments_and_answers(client: AdminClient) -> None:
    """Arguments go to the function and its result comes back."""
    assert client.call("echo", {"a": [1, "ü\n"]}) == {"a": [1, "ü\n"]}


def test_progress_comes_before_the_result(client: AdminClient) -> None:
    """Events arrive in order while the command runs; `received` is the client's own affair."""
    events: list[Any] = []
    assert client.call("count", {"to": 3}, events.append) == 3
    assert events == [{"event": "counted", "number": number} for number in range(3)]


def test_the_kernel_names_the_caller(client: AdminClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uid and pid are the kernel's; SUDO_USER is only a claim beside them."""
    monkeypatch.setenv("SUDO_USER", "alice")
    answer = client.call("who", {})
    assert (answer["uid"], answer["pid"]) == (os.geteuid(), os.getpid())
    assert answer["actor"] == f"{local_peer().user} (says: alice)"


def test_our_errors_keep_code_hint_and_exit_code(client: AdminClient) -> None:
    """A KeyturnError of the function reaches the caller whole."""
    with pytest.raises(Answered) as caught:
        client.call("fail", {"how": "ours"})
    assert str(caught.value) == "no agent has the id x"
    assert (caught.value.code, caught.value.exit_code) == ("unknown-agent", 1)
    assert caught.value.hint == UnknownAgent.default_hint


@pytest.mark.parametrize(
    ("command", "args"),
    [("fail", {"how": "bug"}), ("fail", {"how": "vendor"}), ("fail", {}), ("not-json", {})],
)
def test_a_bug_is_an_internal_error_without_details(
    client: AdminClient, command: str, args: dict[str, Any]
) -> None:
    """Whatever else a function raises or returns, the caller learns nothing of it."""
    with pytest.raises(Answered) as caught:
        client.call(command, args)
    assert (caught.value.code, str(caught.value)) == ("internal", "internal error")
    assert "secret" not in caught.value.hint


def test_an_unknown_command_says_so(client: AdminClient) -> None:
    """A newer command line meets an older daemon: usage, and what to do."""
    with pytest.raises(Answered) as caught:
        client.call("of-next-year", {})
    assert (caught.value.code, caught.value.exit_code) == ("unknown-command", 2)


def test_no_daemon_is_unavailable(path: Path) -> None:
    """Nobody at the path: exit 69, and a hint how to start it."""
    with pytest.raises(DaemonDown) as caught:
        AdminClient(path).call("who", {})
    assert caught.value.exit_code == 69
    assert "keyturn run" in caught.value.hint


def test_a_stopped_daemon_counts_as_down(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that does not even say `received` must not hold a revoke up."""
    monkeypatch.setattr("keyturn.cli.client.RECEIVED_WITHIN", 0.2)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(folder / "s"))
        silent.listen()
        with pytest.raises(DaemonDown):
            AdminClient(folder / "s").call("who", {})


@pytest.mark.parametrize("rest", [b"", b'{"ok":true,"resu', b'{"ok":true,"result":1}'])
def test_a_daemon_that_ends_in_between_is_no_success(folder: Path, rest: bytes) -> None:
    """After `received` and no answer the outcome is unknown: exit 75, look and repeat."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b'{"event":"received"}\n' + rest)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(AnswerLost) as caught:
            AdminClient(folder / "s").call("who", {})
        thread.join()
    assert caught.value.exit_code == 75


def test_a_caller_that_leaves_stops_no_command(path: Path) -> None:
    """The function sees that nobody listens any more, goes on, and comes to its end."""
    left, ended = threading.Event(), threading.Event()

    def long(_args: dict[str, Any], _peer: Peer, progress: Progress) -> None:
        assert left.wait(20)
        until = time.monotonic() + 20
        while not progress.gone and time.monotonic() < until:  # type: ignore[attr-defined]
            time.sleep(0.01)
        for _ in range(1000):
            progress({"event": "x" * 1000})
        ended.set()

    server = AdminServer(path, {"long": Command(role=Role.VIEW, function=long)}, ROLES)
    server.start()
    try:
        with raw(path) as caller:
            caller.sendall(b'{"command":"long","args":{}}\n')
            assert b"received" in caller.recv(1000)
        left.set()
        assert ended.wait(20)
    finally:
        server.close()


# --- hostile ----------------------------------------------------------------------------------

HOSTILE = {
    "http": b"GET /rotate HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "http with a request as its body": b'POST / HTTP/1.1\r\n\r\n{"command":"who","args":{}}\n',
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n",
    "garbage": bytes(range(256)) * 10 + b"\n",
    "list": b"[1]\n",
    "an unknown key": b'{"command":"who","args":{},"origin":"x"}\n',
    "deep": b'{"command":"who","args":{"a":' + b"[" * 50_000 + b"\n",
    "huge": b'{"command":"who","args":{"a":"' + b"a" * 70_000 + b'"}}\n',
    "endless": b"a" * 1_000_000,
}


@pytest.mark.parametrize("sent", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_is_no_request_closes_without_an_answer(
    client: AdminClient, path: Path, sent: bytes
) -> None:
    """No byte comes back, nothing after it is read, and the next caller is served."""
    with raw(path) as caller:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            caller.sendall(sent)
        assert received(caller) == b""
    assert client.call("echo", {}) == {}


def test_the_longest_line_is_taken(client: AdminClient) -> None:
    """The cap is 64 KiB with the newline, not less."""
    overhead = len(b'{"command":"echo","args":{"a":""},"claimed_by":""}\n')
    text = "a" * (64 * 1024 - overhead)
    assert client.call("echo", {"a": text}) == {"a": text}


@pytest.mark.parametrize("drip", [False, True])
def test_half_a_line_is_cut_off_at_the_deadline(
    client: AdminClient, path: Path, drip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline is that of the whole line: neither silence nor a slow drip holds a connection."""
    monkeypatch.setattr(admin, "READ_DEADLINE", 0.4)
    began = time.monotonic()
    with raw(path) as caller:
        while time.monotonic() - began < 5:
            try:
                caller.sendall(b"{" if not drip or time.monotonic() == began else b" ")
            except (BrokenPipeError, ConnectionResetError):
                break
            time.sleep(0.05)
            if not drip:
                assert received(caller) == b""
                break
    assert 0.3 < time.monotonic() - began < 3
    assert client.call("echo", {}) == {}


def test_one_user_cannot_take_all_connections(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above its share a user is told that it is busy; the daemon's own uid still gets in."""
    monkeypatch.setattr(admin, "MOST_CONNECTIONS", 3)
    monkeypatch.setattr(admin, "_KEPT_FOR_HIGHER", {Role.VIEW: 1})
    server = AdminServer(path, HANDLERS, ROLES)
    stranger = Peer(uid=STRANGER, user="x", groups=frozenset({VIEW}), pid=1)
    own = Peer(uid=os.geteuid(), user="y", groups=frozenset(), pid=1)
    assert [server._count(stranger, Role.VIEW) for _ in range(3)] == [True, True, False]
    assert [server._count(own, Role.ADMIN) for _ in range(2)] == [True, False]


def test_no_crowd_of_a_lower_role_keeps_a_higher_one_out(path: Path) -> None:
    """As many users as there may be, each with its share: whoever may do more still gets in."""
    server = AdminServer(path, HANDLERS, ROLES)

    def crowd(role: Role, first: int) -> int:
        users = [
            Peer(uid=uid, user="x", groups=frozenset(), pid=1) for uid in range(first, first + 9)
        ]
        return sum(server._count(user, role) for user in users for _ in range(16))

    own = Peer(uid=os.geteuid(), user="y", groups=frozenset(), pid=1)
    assert [crowd(role, 1000 * role) for role in (Role.VIEW, Role.RESPOND, Role.ADMIN)] == [
        32,
        16,
        8,
    ]
    assert [server._count(own, Role.ADMIN) for _ in range(9)] == [True] * 8 + [False]


def test_more_than_the_limit_are_told_to_wait(
    client: AdminClient, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full server answers `busy` with exit 75, and serves again when one has left."""
    monkeypatch.setattr(admin, "MOST_CONNECTIONS", 2)
    held = [raw(path), raw(path)]
    for connection in held:
        connection.sendall(b'{"command":"echo","args":{}}\n')
        assert connection.recv(1000)
    with pytest.raises(Answered) as caught:
        client.call("echo", {})
    assert (caught.value.code, caught.value.exit_code) == ("busy", 75)
    for connection in held:
        connection.close()
    assert eventually(lambda: client.call("echo", {}) == {})


def eventually(true: Callable[[], bool]) -> bool:
    """Try for a while."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            if true():
                return True
        except Answered:
            time.sleep(0.01)
    return False


# --- the place --------------------------------------------------------------------------------


def test_modes_and_group(server: AdminServer, path: Path) -> None:
    """Folder 0750 and socket 0660, both of the view group where we may give it."""
    assert oct(path.parent.stat().st_mode & 0o777) == "0o750"
    assert oct(path.stat().st_mode & 0o777) == "0o660"
    if os.geteuid() == 0:
        assert path.stat().st_gid == path.parent.stat().st_gid == VIEW


@needs_root
def test_other_groups_get_the_open_socket(server: AdminServer, path: Path) -> None:
    """A reload gives the socket and the folder that was made for it to the new group of view."""
    assert call_as(path, "who", uid=STRANGER, gid=STRANGER, groups=[OTHER])["errno"] == 13

    assert server.regroup(replace(ROLES, view=OTHER)) == []

    assert call_as(path, "who", uid=STRANGER, gid=STRANGER, groups=[OTHER])["ok"]
    assert call_as(path, "who", uid=STRANGER, gid=STRANGER, groups=[VIEW])["errno"] == 13
    assert server.regroup(replace(ROLES, view=None)) == []
    assert path.stat().st_gid == path.parent.stat().st_gid == os.getegid()


@needs_root
def test_a_folder_that_keeps_the_group_out_is_named(
    path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the start and at a reload, with the line to type; a folder of others is left as it is."""
    path.parent.mkdir(mode=0o750)
    os.chown(path.parent, -1, RESPOND)
    server = AdminServer(path, HANDLERS, ROLES)
    server.start()
    try:
        said = capsys.readouterr().out + caplog.text
        assert f"chgrp {VIEW} {path.parent}" in said
        (note,) = server.regroup(replace(ROLES, view=OTHER))
        assert f"chgrp {OTHER} {path.parent}" in note
        assert (path.parent.stat().st_gid, path.stat().st_gid) == (RESPOND, OTHER)
        os.chown(path.parent, -1, OTHER)
        assert server.regroup(replace(ROLES, view=OTHER)) == []
    finally:
        server.close()


def test_a_live_daemon_keeps_its_socket(client: AdminClient, path: Path) -> None:
    """A second server at the path is a configuration error, and the first goes on."""
    with pytest.raises(ConfigError, match="another daemon"):
        AdminServer(path, HANDLERS, ROLES).start()
    assert client.call("echo", {}) == {}


def test_a_live_socket_without_our_lock_is_not_stolen(client: AdminClient, path: Path) -> None:
    """Somebody removed the lock file: whoever answers still owns the path."""
    path.with_name("admin.sock.lock").unlink()
    with pytest.raises(ConfigError, match="another daemon"):
        AdminServer(path, HANDLERS, ROLES).start()
    assert client.call("echo", {}) == {}


def test_a_dead_socket_is_replaced(path: Path) -> None:
    """What a killed daemon left behind is no obstacle."""
    path.parent.mkdir(mode=0o750)
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    server = AdminServer(path, HANDLERS, ROLES)
    server.start()
    assert AdminClient(path).call("echo", {}) == {}
    server.close()
    assert not path.exists()


def test_a_file_at_the_path_is_not_removed(path: Path) -> None:
    """A path that was mistyped onto a file costs nothing."""
    path.parent.mkdir(mode=0o750)
    path.write_text("precious")
    with pytest.raises(ConfigError, match="no socket"):
        AdminServer(path, HANDLERS, ROLES).start()
    assert path.read_text() == "precious"


@pytest.mark.parametrize("mode", [0o770, 0o757, 0o1777])
def test_a_folder_that_others_can_write_is_refused(path: Path, mode: int) -> None:
    """Whoever can write there can put a socket of their own in our place."""
    path.parent.mkdir()
    path.parent.chmod(mode)
    with pytest.raises(ConfigError, match="written by others"):
        AdminServer(path, HANDLERS, ROLES).start()


def test_a_path_that_is_too_long_is_a_clear_error(folder: Path) -> None:
    """The kernel's limit of 107 bytes is named."""
    with pytest.raises(ConfigError) as caught:
        AdminServer(folder / "k" / ("a" * 120), HANDLERS, ROLES).start()
    assert "107" in caught.value.hint


def test_closing_waits_for_what_runs(path: Path) -> None:
    """A command that is in the middle still answers when the daemon ends."""
    began, finished = threading.Event(), threading.Event()

    def slow(*_: Any) -> str:
        began.set()
        time.sleep(0.3)
        finished.set()
        return "done"

    server = AdminServer(path, {"slow": Command(role=Role.VIEW, function=slow)}, ROLES)
    server.start()
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(AdminClient(path).call("slow", {})))
    thread.start()
    assert began.wait(10)
    server.close(wait_seconds=10)
    assert finished.is_set()
    thread.join()
    assert results == ["done"]


# --- roles ------------------------------------------------------------------------------------


def test_groups_that_do_not_exist_give_no_role() -> None:
    """A role whose group is missing is nobody's, and the name is reported."""
    roles = Roles.from_names(view="no-such-group-a", respond="", admin="no-such-group-b")
    assert roles.missing == ("no-such-group-a", "no-such-group-b")
    stranger = Peer(uid=STRANGER, user="x", groups=frozenset({STRANGER}), pid=1)
    assert roles.of(stranger) is Role.NONE


MATRIX = [
    # primary, supplementary, what works
    (VIEW, [], {"view"}),
    (OTHER, [VIEW], {"view"}),
    (OTHER, [VIEW, RESPOND], {"view", "respond"}),
    (OTHER, [VIEW, ADMIN], {"view", "respond", "admin"}),
    (OTHER, [RESPOND, VIEW, ADMIN], {"view", "respond", "admin"}),
    (OTHER, [*range(40000, 40400), VIEW, RESPOND], {"view", "respond"}),
    (RESPOND, [VIEW], {"view", "respond"}),
]


@needs_root
@pytest.mark.parametrize("command", ["view", "respond", "admin"])
@pytest.mark.parametrize(("primary", "groups", "allowed"), MATRIX)
def test_the_role_matrix(
    server: AdminServer,
    path: Path,
    command: str,
    primary: int,
    groups: list[int],
    allowed: set[str],
) -> None:
    """A real process of another uid gets what its groups allow, supplementary ones included."""
    answer = call_as(path, command, uid=STRANGER, gid=primary, groups=groups)
    if command in allowed:
        assert answer["ok"]
        assert answer["result"]["uid"] == STRANGER
        assert set(answer["result"]["groups"]) == {primary, *groups}
    else:
        assert answer["error"]["code"] == "not-permitted"
        assert answer["error"]["exit_code"] == 77


@needs_root
@pytest.mark.parametrize("groups", [[], [OTHER], [RESPOND], [ADMIN]])
def test_who_is_not_in_the_view_group_cannot_open_the_door(
    server: AdminServer, path: Path, groups: list[int]
) -> None:
    """The file system keeps everybody else out before a byte is read."""
    assert call_as(path, "view", uid=STRANGER, gid=OTHER, groups=groups) == {"errno": 13}


@needs_root
def test_who_has_no_role_is_refused_even_with_the_door_open(
    server: AdminServer, path: Path
) -> None:
    """Modes that somebody loosened do not loosen the roles."""
    path.parent.chmod(0o755)
    path.chmod(0o666)
    answer = call_as(path, "view", uid=STRANGER, gid=OTHER)
    assert answer["error"]["code"] == "not-permitted"


@needs_root
def test_the_daemons_own_uid_and_root_are_admin(path: Path) -> None:
    """Both have every role without any group."""
    server = AdminServer(path, HANDLERS, Roles(view=VIEW, own_uid=STRANGER))
    server.start()
    try:
        path.parent.chmod(0o755)
        path.chmod(0o666)
        assert call_as(path, "admin", uid=STRANGER, gid=OTHER)["ok"]
        assert call_as(path, "admin", uid=0, gid=0)["ok"]
        assert "error" in call_as(path, "view", uid=STRANGER + 1, gid=OTHER)
    finally:
        server.close()


def test_an_answer_is_valid_json_whatever_is_in_it(server: AdminServer, path: Path) -> None:
    """Each line that comes back parses by itself."""
    with raw(path) as caller:
        caller.sendall(b'{"command":"echo","args":{"a":"\\ud800\\n"}}\n')
        lines = caller.makefile("rb")
        assert json.loads(lines.readline()) == {"event": "received"}
        assert json.loads(lines.readline())["ok"]
