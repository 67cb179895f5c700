"""Who gets in by which unix groups, at a real daemon's socket, as the README says it."""

from __future__ import annotations

import grp
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.peers import call_as, needs_root
from support.running import Keyturn

VIEW, RESPOND, ADMIN = (grp.getgrall()[number] for number in (1, 2, 3))
STRANGER = 64123


@pytest.fixture
def keyturn() -> Iterator[Keyturn]:
    """Give a daemon whose socket other users of this host can get to, if its folder lets them."""
    folder = Path(tempfile.mkdtemp(prefix="kt-"))
    folder.chmod(0o755)
    one = Keyturn(folder, agents=1)
    one.content["admin"]["groups"] = {
        "view": VIEW.gr_name,
        "respond": RESPOND.gr_name,
        "admin": ADMIN.gr_name,
    }
    one.write()
    with one:
        one.wait_first()
        yield one
    shutil.rmtree(folder)


def outcome(keyturn: Keyturn, command: str, *groups: grp.struct_group) -> Any:
    """Return what a user with these groups gets: done, its error's code, or the errno."""
    path = keyturn.folder / "run" / "admin.sock"
    numbers = [group.gr_gid for group in groups]
    answer = call_as(path, command, uid=STRANGER, gid=STRANGER, groups=numbers)
    if "errno" in answer:
        return answer["errno"]
    return "done" if answer["ok"] else answer["error"]["code"]


@needs_root
def test_the_door_belongs_to_those_who_may_look(keyturn: Keyturn) -> None:
    """Respond and admin get in by the group of view as well, and only then have their role."""
    denied, permitted = "not-permitted", "refused-command"  # "the command needs agent"
    for groups, looks, suspends, reloads in [
        ((), 13, 13, 13),
        ((RESPOND,), 13, 13, 13),
        ((ADMIN,), 13, 13, 13),
        ((VIEW,), "done", denied, denied),
        ((VIEW, RESPOND), "done", permitted, denied),
        ((VIEW, ADMIN), "done", permitted, "done"),
    ]:
        found = [outcome(keyturn, name, *groups) for name in ("status", "suspend", "reload")]
        assert found == [looks, suspends, reloads], groups
    folder = keyturn.folder / "run"
    assert (folder.stat().st_mode & 0o777, folder.stat().st_gid) == (0o750, VIEW.gr_gid)


@needs_root
def test_a_reload_lets_other_groups_in(keyturn: Keyturn) -> None:
    """Without a restart, and the group that was named before is out."""
    other = grp.getgrall()[4]
    assert outcome(keyturn, "status", other) == 13
    keyturn.content["admin"]["groups"]["view"] = other.gr_name
    keyturn.write()

    assert keyturn.ask("reload")[0] == 0

    assert outcome(keyturn, "status", other) == "done"
    assert outcome(keyturn, "status", VIEW) == 13
