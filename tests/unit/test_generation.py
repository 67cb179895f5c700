"""Which generation of the files is read: never two at once, and a new one is noticed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from keyturn import config
from keyturn.cli.client import AdminClient
from keyturn.config import loading
from keyturn.config.generation import Include
from keyturn.credential_file import changeable_by_others, way_to
from keyturn.daemon.filewatch import FileWatch
from keyturn.errors import ConfigError, StoreUnavailable
from support.configmap import ConfigMap
from support.installed import Installed
from support.running import QUIET, Keyturn, file_at


def generation(number: int, folder: Path, agents: int = 2, **more: Any) -> dict[str, str]:
    """Return a ConfigMap whose every file names this number."""
    main = {
        "version": 1,
        "store": {"url": f"sqlite:///{folder}/state/keyturn.db"},
        "admin": {"socket": str(folder / "run" / "admin.sock")},
        "connections": {"files": file_at(folder / "agents")},
        "policies": {"default": QUIET, f"p{number}": {"extends": "default"}},
        "include": "team-*.yaml",
        **more,
    }
    found = {"keyturn.yaml": yaml.safe_dump(main)}
    for team in range(2):
        definitions = {
            f"t{team}-{n}": {
                "owner": f"g{number}",
                "policy": f"p{number}",
                "destinations": [{"to": "files", "path": f"t{team}-{n}"}],
            }
            for n in range(agents)
        }
        found[f"team-{team}.yaml"] = yaml.safe_dump({"agents": definitions})
    return found


@pytest.fixture
def volume(tmp_path: Path) -> ConfigMap:
    """Give a volume with its first content."""
    one = ConfigMap(tmp_path / "config")
    one.swap(generation(1, tmp_path))
    return one


def test_a_swap_in_the_middle_of_reading_is_read_again(
    volume: ConfigMap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main file of one generation is never put together with the teams of the next."""
    read, swaps = loading.read_document, iter([2, 3])

    def reading(path: Path, *args: Any, **more: Any) -> Any:
        found = read(path, *args, **more)
        if path.name == "keyturn.yaml" and (number := next(swaps, None)):
            volume.swap(generation(number, tmp_path))
        return found

    monkeypatch.setattr(loading, "read_document", reading)

    settings = config.load(volume.folder / "keyturn.yaml", environ={})

    assert {agent.owner for agent in settings.agents.values()} == {"g3"}
    assert "p3" in settings.policies


def test_files_that_never_rest_are_refused(
    volume: ConfigMap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is an end to reading again, and the error says what is the matter."""
    read, number = loading.read_document, iter(range(2, 100))

    def reading(path: Path, *args: Any, **more: Any) -> Any:
        found = read(path, *args, **more)
        volume.swap(generation(next(number), tmp_path))
        return found

    monkeypatch.setattr(loading, "read_document", reading)

    with pytest.raises(ConfigError, match="being written to"):
        config.load(volume.folder / "keyturn.yaml", environ={})


def swapped_meanwhile(volume: ConfigMap, folder: Path, swaps: int) -> tuple[int, int, int]:
    """Load while another thread swaps; returns loads, mixtures, and loads that were put off."""
    done, loads, mixed, put_off = threading.Event(), 0, 0, 0

    def swap() -> None:
        for number in range(2, swaps + 2):
            volume.swap(generation(number, folder))
            done.wait(0.02 * (number % 6))
        done.set()

    thread = threading.Thread(target=swap)
    thread.start()
    while not done.is_set():
        loads += 1
        try:
            settings = config.load(volume.folder / "keyturn.yaml", environ={})
        except ConfigError as error:
            put_off += "being written to" in str(error)
            mixed += "being written to" not in str(error)
            continue
        owners = {agent.owner for agent in settings.agents.values()}
        numbers = {name[1:] for name in settings.policies if name != "default"}
        mixed += len(owners) != 1 or {f"g{number}" for number in numbers} != owners
    thread.join()
    return loads, mixed, put_off


def test_no_load_gives_a_mixture_while_a_volume_is_swapped(
    volume: ConfigMap, tmp_path: Path
) -> None:
    """Whatever the moment, main file and teams are of one generation."""
    loads, mixed, _ = swapped_meanwhile(volume, tmp_path, 20)
    assert (loads > 0, mixed) == (True, 0)


@pytest.mark.full
def test_200_swaps_of_a_volume_give_no_mixture(volume: ConfigMap, tmp_path: Path) -> None:
    """The long version, with its figures."""
    loads, mixed, put_off = swapped_meanwhile(volume, tmp_path, 200)
    print(f"\n200 swaps: {loads} loads, {mixed} mixtures, {put_off} put off")
    assert mixed == 0


# --- the watch ---------------------------------------------------------------------------------


@pytest.fixture
def keyturn(tmp_path: Path) -> Iterator[Installed]:
    """Give an installation that takes changed files over."""
    one = Installed(tmp_path, "a", "b")
    one.content["reload"] = {"on_change": True}
    one.reload()
    yield one
    one.end()


def test_a_change_is_taken_over_once_it_rests(keyturn: Installed) -> None:
    """One look sees it, the second one that it is still the same; what is in force is not read again."""
    watch = keyturn.service._files
    keyturn.content["agents"]["c"] = {"destinations": [{"to": "files", "path": "c"}]}
    before = keyturn.parts.settings
    watch.look()
    keyturn.write()
    watch.look()
    assert keyturn.parts.settings is before
    watch.look()
    assert keyturn.case("c").agent.file == str(keyturn.config)
    after = keyturn.parts.settings

    for _ in range(3):
        watch.look()
    assert keyturn.parts.settings is after


def test_a_file_that_is_cut_short_changes_nothing_and_is_refused_once(keyturn: Installed) -> None:
    """Every beginning of the file: no agent is lost, whatever of it happens to be valid."""
    watch, whole = keyturn.service._files, keyturn.config.read_text()
    before = keyturn.parts.settings
    for end in (0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 30):
        keyturn.config.write_text(whole[:end])
        for _ in range(4):
            watch.look()
        assert keyturn.parts.settings.agents.keys() == {"a", "b"}, end
        assert {keyturn.case(name).agent.shown_state for name in "ab"} == {"enabled"}
    assert keyturn.parts.settings is before
    keyturn.config.write_text(whole)
    watch.look()
    watch.look()
    assert keyturn.parts.settings is not before


def test_a_refused_change_is_tried_once_and_a_busy_store_again(keyturn: Installed) -> None:
    """A wrong line stays wrong until the file changes; a store that was away comes back."""
    tried: list[int] = []
    errors = [StoreUnavailable(), ConfigError("wrong")]

    def reload() -> None:
        tried.append(1)
        raise errors[min(len(tried), 2) - 1]

    watch = FileWatch(lambda: keyturn.parts.settings, reload)
    keyturn.write()
    for _ in range(6):
        watch.look()
    assert len(tried) == 2
    keyturn.config.write_text(keyturn.config.read_text() + "\n# once more\n")
    watch.look()
    watch.look()
    assert len(tried) == 3


def test_nothing_is_watched_unless_it_is_asked_for(tmp_path: Path) -> None:
    """By default only a signal or a command reads the files again."""
    one = Installed(tmp_path, "a")
    try:
        one.content["agents"]["b"] = {"destinations": [{"to": "files", "path": "b"}]}
        one.write()
        for _ in range(3):
            one.service._files.look()
        assert one.parts.settings.agents.keys() == {"a"}
    finally:
        one.end()


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_daemon_takes_200_swaps_over_without_a_mixture(tmp_path: Path) -> None:
    """Commands ask all the time; in the store all agents are of one generation, at the end the last."""
    tmp_path.chmod(0o700)
    volume, keyturn = ConfigMap(tmp_path / "config"), Keyturn(tmp_path, agents=0)
    keyturn.config = volume.folder / "keyturn.yaml"
    on = {"reload": {"on_change": True}}
    volume.swap(generation(1, tmp_path, **on))
    seen: list[set[str]] = []
    with keyturn:
        for number in range(2, 202):
            volume.swap(generation(number, tmp_path, agents=3 + number % 2, **on))
            threading.Event().wait(0.05 * (number % 8) if number % 20 else 5)
            rows = AdminClient(tmp_path / "run" / "admin.sock").call("agents.list", {})
            seen.append({row["owner"] for row in rows if row["state"] != "unmanaged"})
        keyturn.wait_for(lambda: keyturn.ask("agents", "show", "t0-0")[1]["owner"] == "g201")
    taken = keyturn.log.read_text().count("config.taken-over")
    print(f"\n200 swaps: {taken} generations taken over, {sum(len(s) > 1 for s in seen)} mixtures")
    assert all(len(owners) == 1 for owners in seen)
    assert "config.rejected" not in keyturn.log.read_text()


def test_a_revocations_file_in_a_volume_is_read_anew_after_a_swap(keyturn: Installed) -> None:
    """Its link leads to another file then, and the line that came with it is applied."""
    keyturn.run("a", "b")
    held = {name: keyturn.held(name) for name in "ab"}
    volume = ConfigMap(keyturn.folder / "lists")
    line = "agent:{} at=2020-01-01T00:00:00Z\n"
    volume.swap({"revocations": line.format("a")})
    keyturn.content["revocations_file"] = str(volume.folder / "revocations")
    keyturn.reload()
    now = keyturn.parts.clock.now().isoformat().replace("+00:00", "Z")
    assert [entry.agent for entry in keyturn.service.revoking.read_file()] == ["a"]

    volume.swap({"revocations": line.format("a") + f"agent:b at={now}\n"})
    entries = keyturn.service.revoking.read_file()
    keyturn.service.revoking.apply_entries(entries, trigger="file")

    assert [entry.agent for entry in entries] == ["a", "b"]
    assert (keyturn.accepts(held["a"]), keyturn.accepts(held["b"])) == (True, False)


# --- which files -------------------------------------------------------------------------------


def test_hidden_names_are_no_files_of_a_pattern(tmp_path: Path) -> None:
    """Old generations of a volume and locks of editors are not read beside the files themselves."""
    volume = ConfigMap(tmp_path / "agents.d")
    volume.swap({"x.yaml": "agents: {}", "y.yaml": "agents: {}"})
    (volume.folder / ".#x.yaml").symlink_to("nobody@nowhere")
    for pattern in ("agents.d/*.yaml", "**/*.yaml", f"{tmp_path}/*/*.yaml"):
        found = Include.of(pattern, tmp_path / "keyturn.yaml").files()
        assert [path.name for path in found] == ["x.yaml", "y.yaml"], pattern
        assert not any(".." in path.parts[-2] for path in found)


def test_a_folder_that_cannot_be_looked_into_is_an_error(
    volume: ConfigMap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A glob leaves it out in silence, and its agents would be unmanaged."""
    closed = tmp_path / "config" / "teams" / "a"
    closed.mkdir(parents=True)
    content = yaml.safe_load((volume.folder / "keyturn.yaml").read_text())
    content["include"] = "teams/*/agents.yaml"
    (volume.folder / "k.yaml").write_text(yaml.safe_dump(content))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed and access(path, mode))

    with pytest.raises(ConfigError, match=f"k.yaml:.*include: .*{closed} is closed to this user"):
        config.load(volume.folder / "k.yaml", environ={})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"t\.yaml:1: \(file\): .*the file is empty"),
        ("# all gone\n", r"t\.yaml:1: \(file\): .*the file is empty"),
        ("version: 1\n", r"t\.yaml:1: agents: required"),
        ("agents:\n", r"t\.yaml:1: agents: expected a mapping"),
        ("agents: {}\nstore: {url: x}\n", r"t\.yaml:2: store: expected agents only"),
    ],
)
def test_an_included_file_says_that_it_has_no_agents(tmp_path: Path, text: str, said: str) -> None:
    """Silence is no statement: a file that is empty or half written does not take its agents away."""
    main = {"version": 1, "include": "t.yaml"}
    (tmp_path / "k.yaml").write_text(yaml.safe_dump(main))
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        config.load(tmp_path / "k.yaml", environ={})
    (tmp_path / "t.yaml").write_text("agents: {}\n")
    assert config.load(tmp_path / "k.yaml", environ={}).agents == {}


# --- who can change them -----------------------------------------------------------------------


def changeable(path: Path) -> list[str]:
    """Name what others can write on the way to a file."""
    return list(changeable_by_others(path, path.stat()))


def test_every_link_on_the_way_is_looked_at(tmp_path: Path) -> None:
    """A link in between, in a folder that others can write, decides where the last one leads."""
    tmp_path.chmod(0o700)
    for name in ("first", "between", "last"):
        (tmp_path / name).mkdir()
    (tmp_path / "last" / "k.yaml").write_text("version: 1")
    (tmp_path / "between" / "k.yaml").symlink_to("../last/k.yaml")
    link = tmp_path / "first" / "k.yaml"
    link.symlink_to(tmp_path / "between" / "k.yaml")
    assert changeable(link) == []
    (tmp_path / "between").chmod(0o777)
    assert changeable(link) == [str(tmp_path / "between")]
    (tmp_path / "between").chmod(0o1777)
    assert changeable(link) == []

    if os.geteuid() == 0:
        os.lchown(tmp_path / "between" / "k.yaml", 65534, 65534)
        found = (
            tmp_path / "last" / "k.yaml"
        ).stat()  # the kernel may follow such a link for nobody
        assert list(changeable_by_others(link, found)) == [str(tmp_path / "between" / "k.yaml")]
        (tmp_path / "between" / "k.yaml").unlink()


def test_a_folder_of_kubernetes_is_open_and_mounted_read_only(
    volume: ConfigMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubelet makes it 0777: refused where it can be written, good where it is mounted read-only."""
    path = volume.folder / "keyturn.yaml"
    volume.folder.chmod(0o777)
    assert changeable(path) == [str(volume.folder)]
    with pytest.raises(ConfigError, match="writable by others"):
        config.load(path, environ={})

    class ReadOnly:
        f_flag = os.ST_RDONLY

    monkeypatch.setattr(os, "statvfs", lambda _path: ReadOnly)
    assert changeable(path) == []
    assert config.load(path, environ={}).agents


def test_links_that_go_round_are_no_file(tmp_path: Path) -> None:
    """A circle ends with an error and not never."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        list(way_to(tmp_path / "a"))
