"""The rotation of our own secret id, ended before and after each of its effects, at a real OpenBao."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from keyturn.core.model import Target
from keyturn.core.own import Own, OwnPlan, OwnState
from keyturn.errors import Denied, DestinationUnavailable
from keyturn.own import Held, OwnWorld, run
from keyturn.ports import OwnIssued
from keyturn.storage.store import Store
from keyturn.testing import openbao
from support.own_logins import Role, clock_of_now, open_store
from support.vault import new_prefix, root_of

DAY = timedelta(days=1)
PLAN = OwnPlan(every=7 * DAY, grace=DAY)
EFFECTS = ("issue", "publish", "destroy", "save_own")
PLACE = Target(to="bao", path="bot")


class Died(BaseException):
    """The process ended here."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openbao.Server]:
    """Give one server for all tests; each has a role of its own."""
    with openbao.dev_server(tmp_path_factory.mktemp("openbao")) as one:
        yield one


class Bench:
    """One connection that can end at a numbered point, and begins anew with nothing in memory."""

    def __init__(self, server: openbao.Server, folder: Path, **role: Any) -> None:
        address = {"address": server.address}
        self.role = Role(
            root_of(server), folder / "login", new_prefix(), [PLACE], **address, **role
        )
        self.clock = clock_of_now()  # not before the server has made the first one
        self.store = open_store(folder / "state", self.clock)
        self.points: list[str] = []
        self.dies_at: int | None = None
        self.ids = (f"version-{n}" for n in itertools.count(1))
        self.begin()

    def begin(self) -> None:
        """Start as a process does."""
        self.destination = self.role.connect(store_id=self.store.store_id)
        self.held = Held()

    def go(self) -> datetime | None:
        """Let one run go as far as it goes."""
        authority = self.destination.own_authority
        assert authority is not None
        world = OwnWorld(
            journal=_Trapped(self.store, self.point),  # type: ignore[arg-type]
            authority=_Trapped(authority, self.point),  # type: ignore[arg-type]
            plan=PLAN,
            clock=self.clock,
            new_id=lambda: next(self.ids),
            store_id=self.store.store_id,
            held=self.held,
        )
        return run(world, "bao", "host")

    def point(self, name: str) -> None:
        """Pass by a place where the process may end."""
        self.points.append(name)
        if len(self.points) - 1 == self.dies_at:
            raise Died

    def crash(self, at: int) -> bool:
        """Run and end at a point, then begin anew; False where there are not so many."""
        self.points.clear()
        self.dies_at = at
        try:
            self.go()
        except Died:
            self.destination.close()
            self.begin()
            return True
        finally:
            self.dies_at = None
        return False

    def known(self) -> Own:
        """Return what the journal has."""
        found = self.store.own("bao", "host")
        assert found is not None
        return found

    def close(self) -> None:
        self.destination.close()
        self.store.close()


class _Trapped:
    """Passes everything on, with a point before and after each effect."""

    def __init__(self, inner: Any, point: Callable[[str], None]) -> None:
        self._inner, self._point = inner, point

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in EFFECTS:
            return found

        def trapped(*args: Any, **more: Any) -> Any:
            self._point(f"before {name}")
            result = found(*args, **more)
            self._point(f"after {name}")
            return result

        return trapped


@pytest.fixture
def bench(server: openbao.Server, tmp_path: Path) -> Iterator[Bench]:
    """Give one whose first secret id was put there by a person and taken note of."""
    one = Bench(server, tmp_path)
    one.go()
    yield one
    one.close()


def test_a_secret_id_is_replaced_when_it_is_old_enough(bench: Bench) -> None:
    """Not before; then a new one is in the file, the old one is good for its grace and then gone."""
    first, before = bench.role.text(), bench.role.accessors()
    assert bench.go() is not None
    assert bench.role.text() == first

    bench.clock.advance(7 * DAY)
    until = bench.go()
    second = bench.role.text()
    assert second != first
    assert bench.role.logs_in(first)
    assert bench.role.logs_in(second)
    assert until == bench.clock.now() + DAY
    assert bench.role.file.stat().st_mode & 0o777 == 0o600

    bench.clock.advance(DAY)
    bench.go()
    assert not bench.role.logs_in(first)
    assert bench.role.logs_in(second)
    assert len(bench.role.accessors()) == 1
    assert bench.role.accessors() != before
    done = [one.entry.action for one in bench.store.audit_entries()]
    assert done == [f"own-login.{word}" for word in ("destroyed", "promoted", "minted", "adopted")]


def test_ended_at_every_point_it_converges(bench: Bench) -> None:
    """Whatever it was doing: a login is possible at once, one secret id more at most, none at last."""
    crashes = 0
    for at in itertools.count():
        bench.clock.advance(7 * DAY)
        if not bench.crash(at):
            break
        crashes += 1
        assert bench.role.logs_in(), bench.points
        assert len(bench.role.accessors()) <= 3, bench.points  # old, new and one that nobody has
        bench.go()
        assert bench.role.logs_in()
        assert len(bench.role.accessors()) <= 2, bench.points
        bench.clock.advance(DAY)
        bench.go()
        assert len(bench.role.accessors()) == 1, bench.points
        assert [one.state for one in bench.known().versions] == [OwnState.CURRENT]
    assert crashes >= 8
    assert not any(bench.known().only(OwnState.MINTING))


def test_a_lost_answer_leaves_nothing(bench: Bench) -> None:
    """A secret id whose answer never came is found by its version and destroyed."""
    bench.clock.advance(7 * DAY)
    authority: Any = bench.destination.own_authority
    issue = authority.issue

    def lost(version_id: str, *, owner: str) -> OwnIssued:
        issue(version_id, owner=owner)
        raise DestinationUnavailable("the answer was lost")

    authority.issue = lost
    bench.go()
    problem = bench.known().problem
    assert problem is not None
    assert problem.code == "destination-unavailable"
    assert len(bench.role.accessors()) == 2

    authority.issue = issue
    bench.go()
    assert bench.known().problem is None
    assert len(bench.role.accessors()) == 2  # the old one and the new one
    bench.clock.advance(DAY)
    bench.go()
    assert len(bench.role.accessors()) == 1


def test_an_unproven_one_is_never_published(bench: Bench) -> None:
    """One that no login takes stays out of the file, and is destroyed."""
    first, authority = bench.role.text(), bench.destination.own_authority
    bench.clock.advance(7 * DAY)

    def refused(_secret: Any) -> None:
        raise Denied("no")

    authority.prove = refused  # type: ignore[union-attr,method-assign,assignment]
    bench.go()
    assert bench.role.text() == first
    bench.go()
    assert bench.role.text() == first
    assert len(bench.role.accessors()) <= 2


def test_what_a_person_puts_there_is_taken_over(bench: Bench) -> None:
    """Theirs is the current one from now on; ours gets its grace and goes."""
    ours = bench.role.text()
    accessor = bench.role.put_new()
    bench.go()
    assert bench.known().current.accessor == accessor  # type: ignore[union-attr]
    assert bench.role.logs_in(ours)
    bench.clock.advance(DAY)
    bench.go()
    assert not bench.role.logs_in(ours)
    assert bench.role.accessors() == {accessor}


def test_two_keyturns_do_not_share_one(bench: Bench, tmp_path: Path) -> None:
    """A second store that finds what the first one has made leaves it alone and says so."""
    bench.clock.advance(7 * DAY)
    bench.go()
    text = bench.role.text()
    mine, bench.store = bench.store, open_store(tmp_path / "other", bench.clock)
    bench.store._store_id = "another"
    bench.go()
    problem = bench.known().problem
    bench.store.close()
    bench.store = mine
    assert problem is not None
    assert "another Keyturn" in problem.detail
    assert bench.role.text() == text
    assert bench.role.logs_in()


def test_one_that_the_server_ends_is_replaced_in_time(
    server: openbao.Server, tmp_path: Path
) -> None:
    """With a secret_id_ttl shorter than the interval, at two thirds of that life."""
    bench = Bench(server, tmp_path, secret_id_ttl="72h")
    bench.go()
    first = bench.role.text()
    bench.clock.advance(2 * DAY - timedelta(minutes=1))
    bench.go()
    assert bench.role.text() == first
    bench.clock.advance(timedelta(minutes=2))
    bench.go()
    assert bench.role.text() != first
    bench.close()


def test_limited_uses_are_refused(server: openbao.Server, tmp_path: Path) -> None:
    """Where each login takes one of few uses, nothing is replaced, and it says what to change."""
    bench = Bench(server, tmp_path, secret_id_num_uses=5)
    first = bench.role.text()
    bench.go()
    bench.clock.advance(7 * DAY)
    bench.go()
    problem = bench.known().problem
    assert problem is not None
    assert "limited number of uses" in problem.detail
    assert bench.role.text() == first
    assert len(bench.role.accessors()) == 1
    bench.close()


def test_a_folder_that_cannot_be_written_costs_nothing(bench: Bench) -> None:
    """No secret id is made that could not be kept."""
    bench.clock.advance(7 * DAY)
    file, moved = bench.role.file, bench.role.file.with_suffix(".elsewhere")
    file.rename(moved)
    file.symlink_to(moved)
    bench.go()
    problem = bench.known().problem
    assert problem is not None
    assert "is a link" in problem.detail
    assert len(bench.role.accessors()) == 1


def test_what_cannot_be_destroyed_keeps_no_new_one_back(bench: Bench) -> None:
    """Where the right to destroy is missing it rotates on, and says so until that is mended."""
    authority: Any = bench.destination.own_authority
    destroy = authority.destroy

    def refused(_accessor: str) -> None:
        raise Denied("no right to destroy")

    authority.destroy = refused
    texts = {bench.role.text()}
    for _ in range(3):
        bench.clock.advance(7 * DAY)
        bench.go()
        texts.add(bench.role.text())
    assert len(texts) == 4
    problem = bench.known().problem
    assert problem is not None
    assert "no right to destroy" in problem.detail

    authority.destroy = destroy
    bench.clock.advance(DAY)
    bench.go()
    assert bench.known().problem is None
    assert len(bench.role.accessors()) == 1


def test_a_dead_secret_id_is_not_replaced_by_us(bench: Bench) -> None:
    """Whoever destroys it wants us out: our token that still lives makes no new one."""
    (accessor,) = bench.role.accessors()
    bench.clock.advance(7 * DAY)
    path = f"auth/approle/role/{bench.role.name}/secret-id-accessor/destroy"
    bench.role.root("POST", path, {"secret_id_accessor": accessor})
    bench.go()
    problem = bench.known().problem
    assert problem is not None
    assert problem.code == "denied"
    assert bench.role.accessors() == set()


def test_nothing_of_it_is_written_down(bench: Bench, tmp_path: Path) -> None:
    """Neither store nor audit nor ledger holds a secret id."""
    texts = [bench.role.text()]
    bench.clock.advance(7 * DAY)
    bench.go()
    texts.append(bench.role.text())
    store: Store = bench.store
    assert store.own("bao", "host") is not None
    for path in (tmp_path / "state").rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not any(text.encode() in content for text in texts), path
