"""When the desk answers: one flight for all, nobody by a flight that began before, and no by the beat."""

from __future__ import annotations

import http.client
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from structlog.testing import capture_logs

from keyturn.core.model import VersionState
from keyturn.core.secret import mint
from keyturn.errors import KeyturnError
from keyturn.verifier.decision import Verifier
from keyturn.verifier.http import desk
from keyturn.verifier.http.connection import Held as HeldConnection
from keyturn.verifier.http.connection import Registry
from keyturn.verifier.http.desk import BEAT
from keyturn.verifier.http.workers import READERS, Workers, _Lane
from support.cutter import administration, cut, open_store
from support.http_verifier import Counted, Served, basic, fill, serve, served
from support.stores import RealClock, entry


class Latch:
    """Holds hashes up until it is opened, and tells how many wait."""

    def __init__(self) -> None:
        self.arrived = threading.Semaphore(0)
        self.opened = threading.Event()

    def __call__(self) -> None:
        self.arrived.release()
        assert self.opened.wait(20)


@contextmanager
def held_up(folder: Path) -> Iterator[tuple[Served, Latch]]:
    """Serve with every hash held up."""
    hashing, latch = Counted(), Latch()
    with served(folder, ["a", "b"], hashing=hashing) as service:
        hashing.hold(latch)
        try:
            yield service, latch
        finally:
            latch.opened.set()


def wait_until_asked(service: Served, number: int) -> None:
    """Wait until so many requests have been handed over."""
    until = time.monotonic() + 20
    while sum(len(f.aboard) + len(f.late) for f in list(service.desk._flights.values())) < number:
        assert time.monotonic() < until
        time.sleep(0.002)


def test_500_first_uses_at_once_are_one_hash_and_no_503(tmp_path: Path) -> None:
    """security.md, test 5: a fleet restarts with one new secret, each replica on its connection."""
    number = 500
    with held_up(tmp_path) as (service, latch):
        held = service.held[0]
        connections = []
        for _ in range(number):
            one = http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)
            one.request("GET", "/v1/auth", headers={"Authorization": held.basic})
            connections.append(one)
        assert latch.arrived.acquire(timeout=20)
        wait_until_asked(service, number)
        latch.opened.set()
        answers = Counter()
        for one in connections:
            found = one.getresponse()
            found.read()
            answers[found.status] += 1
            one.close()
        assert answers == {200: number}
        assert len(service.hashes) == 1


@pytest.mark.parametrize("command", ["suspend", "revoke"])
def test_who_joins_a_flight_is_not_answered_by_what_it_found_before(
    tmp_path: Path, command: str
) -> None:
    """A yes on its way is no yes for who asks after the cut has returned."""
    with held_up(tmp_path) as (service, latch), ThreadPoolExecutor(2) as pool:
        held = service.held[0]
        headers = {"Authorization": held.basic}
        first = pool.submit(service.ask, "/v1/auth", headers=headers)
        assert latch.arrived.acquire(timeout=20)
        cut(
            administration(tmp_path, service.store),
            command,
            held.version_id if command == "revoke" else "a",
        )
        late = pool.submit(service.ask, "/v1/auth", headers=headers)
        wait_until_asked(service, 2)
        latch.opened.set()
        assert late.result()[0] == 401
        assert first.result()[0] == 401  # the store is asked once more after a hash


def test_who_joins_a_flight_is_not_refused_by_what_it_found_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A no on its way is no no for who asks after the version was accepted."""
    with served(tmp_path, ["a"]) as service, ThreadPoolExecutor(2) as pool:
        held, begin = service.held[0], service.verifier.begin
        cut(administration(tmp_path, service.store), "suspend", "a")
        found, go_on = threading.Event(), threading.Event()

        def slowly(*args: object, **more: object) -> object:
            answer = begin(*args, **more)  # type: ignore[arg-type]
            found.set()
            assert go_on.wait(20)
            return answer

        monkeypatch.setattr(service.verifier, "begin", slowly)
        headers = {"Authorization": held.basic}
        first = pool.submit(service.ask, "/v1/auth", headers=headers)
        assert found.wait(20)
        cut(administration(tmp_path, service.store), "resume", "a")
        late = pool.submit(service.ask, "/v1/auth", headers=headers)
        wait_until_asked(service, 2)
        go_on.set()
        assert (first.result()[0], late.result()[0]) == (401, 200)


def test_one_agents_hash_keeps_nobody_else_waiting(tmp_path: Path) -> None:
    """Junk, who is remembered, and a page are answered while every hash is held up (I7)."""
    with held_up(tmp_path) as (service, latch), ThreadPoolExecutor(1) as pool:
        a, b = service.held
        latch.opened.set()
        assert service.verify(b)[0] == 200
        latch.opened.clear()
        waiting = pool.submit(service.ask, "/v1/auth", headers={"Authorization": a.basic})
        assert latch.arrived.acquire(timeout=20)
        assert service.verify(b)[0] == 200
        assert service.verify(b, secret=a.secret.reveal())[0] == 401
        assert service.ask("/nope")[0] == 404
        assert not waiting.done()
        latch.opened.set()
        assert waiting.result()[0] == 200


@pytest.mark.parametrize("login", ["a+b%41", "a%ffb", "100%", "+", "a b"])
def test_a_login_with_odd_characters_is_right_encoded_and_raw(tmp_path: Path, login: str) -> None:
    """Clients that forget to encode are answered like those that do, remembered or not."""
    store = open_store(tmp_path, writer="w")
    (tmp_path / "revoked.d").mkdir(mode=0o700)
    hashing = Counted()
    held = fill(store, ["a"], hashing=hashing)[0]

    def renamed(case: object) -> object:
        version = replace(case.versions[0], login=login)  # type: ignore[attr-defined]
        return replace(case, versions=(version,)), [entry()]  # type: ignore[type-var]

    store.amend("cred-a", renamed)  # type: ignore[arg-type]
    verifier = Verifier.open(
        f"sqlite:///{tmp_path}/keyturn.db",
        state_dir=tmp_path,
        clock=RealClock(),
        hashing=hashing,
    )
    with serve(verifier) as (port, desk, server):
        service = Served(
            port=port, verifier=verifier, desk=desk, server=server, store=store, held=[held]
        )
        encoded = "".join(f"%{byte:02X}" for byte in login.encode())
        for shown, expected in ((login, 200), (encoded, 200), (login + "x", 401)):
            for _ in range(2):
                headers = {"Authorization": basic(shown, held.secret.reveal())}
                assert service.ask("/v1/auth", headers=headers)[0] == expected, shown
    verifier.close()
    store.close()


def test_each_answer_is_measured_once(tmp_path: Path) -> None:
    """Whoever waits for a thread is counted when it is answered, not when its turn ends as well."""
    with held_up(tmp_path) as (service, latch), ThreadPoolExecutor(3) as pool:
        good = {"Authorization": service.held[0].basic}
        first = pool.submit(service.ask, "/v1/auth", headers=good)
        wait_until_asked(service, 1)
        late = pool.submit(service.ask, "/v1/auth", headers=good)
        wait_until_asked(service, 2)
        assert sum(service.desk.measures.counts) == 0
        latch.opened.set()
        assert first.result()[0] == late.result()[0] == 200
        assert service.ask("/v1/auth", headers=good)[0] == 200  # on the loop
        assert service.ask("/v1/auth", headers={"Authorization": "Bearer kt_no"})[0] == 401
    assert sum(service.desk.measures.counts) == 4


def test_a_no_leaves_at_the_beat_however_soon_it_was_known(tmp_path: Path) -> None:
    """No look-up for nobody is answered within the time that another look-up may take."""
    with served(tmp_path, ["a"]) as service:
        one = http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)
        took = []
        for number in range(30):
            headers = {"Authorization": f"Bearer {'x' * 30}{number}"}
            began = time.perf_counter()
            one.request("GET", "/v1/auth", headers=headers)
            found = one.getresponse()
            found.read()
            took.append(time.perf_counter() - began)
            assert found.status == 401
        one.close()
        assert min(took) >= BEAT
        assert service.desk._refused == []


def test_retired_versions_are_refused_by_their_login_too(tmp_path: Path) -> None:
    """A version that ended is a no of the same kind, for its agent and for anybody."""
    with served(tmp_path, ["a"]) as service:
        held = service.held[0]
        service.amend("a", state=VersionState.RETIRED, ended_at=RealClock().now())
        assert service.verify(held)[0] == 401
        assert service.hashes == []


# --- places -----------------------------------------------------------------------------------


class Place(HeldConnection):
    """A connection that is nothing but its time."""

    def __init__(self, registry: Registry, until: float) -> None:
        self.registry, self.until, self.dropped = registry, until, False
        registry.add(self)

    def drop(self) -> None:
        self.dropped = True
        self.registry.remove(self)


def test_where_places_end_who_has_asked_nothing_goes_first() -> None:
    """Then who rests longest; who waits for an answer stays."""
    registry = Registry(most=3)
    busy, resting = Place(registry, float("inf")), Place(registry, 50.0)
    for one in (busy, resting):
        registry.useful(one)
    silent = Place(registry, 10.0)
    newer = Place(registry, 11.0)
    assert [silent.dropped, newer.dropped] == [True, False]
    registry.useful(newer)
    longest = resting
    last = Place(registry, 12.0)
    assert newer.dropped  # its time is over before that of who rests
    registry.useful(last)
    last.until = float("inf")
    Place(registry, 13.0)
    assert longest.dropped
    assert not busy.dropped
    assert not last.dropped


def test_where_all_wait_for_answers_the_one_that_comes_goes() -> None:
    """Nobody who was promised an answer pays for it."""
    registry = Registry(most=2)
    owed = [Place(registry, float("inf")) for _ in range(2)]
    for one in owed:
        registry.useful(one)
    late = Place(registry, float("inf"))
    assert late.dropped
    assert not any(one.dropped for one in owed)


def test_what_the_spool_refuses_waits_for_no_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many look-ups hang in a locked store, a revoked secret is a no at once."""
    with served(tmp_path, ["a", "b"]) as service, ThreadPoolExecutor(READERS * 3) as pool:
        held, unlocked = service.held[0], threading.Event()
        cut(administration(tmp_path, service.store), "revoke", held.version_id)
        lookup = service.verifier._reader.lookup

        def hang(version_id: str, login: str = "") -> object:
            assert unlocked.wait(20)
            return lookup(version_id, login)

        monkeypatch.setattr(service.verifier._reader, "lookup", hang)
        others = [mint(random_bytes=random.Random(99 + n).randbytes)[1] for n in range(READERS * 3)]
        hanging = [pool.submit(service.verify, held, secret=one.reveal()) for one in others]
        wait_until_asked(service, len(hanging))
        assert service.verify(held)[0] == 401
        assert not any(one.done() for one in hanging)
        unlocked.set()
        assert {one.result()[0] for one in hanging} == {401}


def test_strangers_before_a_slow_store_keep_no_known_agent_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many wait, a revoked secret is a no at once, and who was right before comes soon (I7)."""
    monkeypatch.setattr(desk, "MOST_FLIGHTS", READERS * 2)
    with served(tmp_path, ["a", "b"]) as service, ThreadPoolExecutor(READERS * 3) as pool:
        known, revoked = service.held
        assert service.verify(known)[0] == 200
        cut(administration(tmp_path, service.store), "revoke", revoked.version_id)
        lookup, asked, answered = (
            service.verifier._reader.lookup,
            list[str](),
            threading.Semaphore(0),
        )

        def slowly(version_id: str, login: str = "") -> object:
            asked.append(version_id)
            assert answered.acquire(timeout=20)
            return lookup(version_id, login)

        monkeypatch.setattr(service.verifier._reader, "lookup", slowly)
        others = [mint(random_bytes=random.Random(99 + n).randbytes)[1] for n in range(READERS * 2)]
        strangers = [pool.submit(service.verify, known, secret=one.reveal()) for one in others]
        wait_until_asked(service, len(strangers))
        stranger = mint(random_bytes=random.Random(98).randbytes)[1]
        assert service.verify(known, secret=stranger.reveal())[0] == 503
        assert service.verify(revoked)[0] == 401
        again = pool.submit(service.verify, known)
        wait_until_asked(service, len(strangers) + 1)
        assert known.version_id not in asked
        answered.release(2)
        until = time.monotonic() + 20
        while len(asked) < READERS + 2:
            assert time.monotonic() < until
            time.sleep(0.002)
        assert known.version_id in asked
        answered.release(100)
        assert again.result()[0] == 200
        assert {one.result()[0] for one in strangers} == {401}


def test_whoever_is_new_waits_for_few_of_those_who_were_right_before() -> None:
    """However many come before it, a new secret has its turn."""
    lane, latch, done = _Lane(1), Latch(), list[str]()
    lane.put(latch)
    assert latch.arrived.acquire(timeout=20)
    for _ in range(100):
        lane.put(lambda: done.append("known"), first=True)
    for _ in range(2):
        lane.put(lambda: done.append("new"))
    latch.opened.set()
    until = time.monotonic() + 20
    while len(done) < 102:
        assert time.monotonic() < until
        time.sleep(0.002)
    lane.close()
    assert [n for n, one in enumerate(done) if one == "new"] == [2, 6]


def test_an_error_for_one_who_came_late_is_none_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong in an answer, everybody gets one."""
    with held_up(tmp_path) as (service, latch), ThreadPoolExecutor(3) as pool:
        headers = {"Authorization": service.held[0].basic}
        first = pool.submit(service.ask, "/v1/auth", headers=headers)
        assert latch.arrived.acquire(timeout=20)
        late = [pool.submit(service.ask, "/v1/auth", headers=headers) for _ in range(2)]
        wait_until_asked(service, 3)
        ask, failing = service.desk._ask, [True]

        def fail_once(*args: object) -> None:
            if failing.pop() if failing else False:
                raise ValueError
            ask(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(service.desk, "_ask", fail_once)
        with capture_logs() as lines:
            latch.opened.set()
            assert first.result()[0] == 200
            assert sorted(one.result()[0] for one in late) == [200, 500]
        assert [line["event"] for line in lines] == ["verifier.failed"]


def test_hashes_give_way_to_the_loop_and_to_look_ups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where cores are short a crowd of first uses keeps neither pages nor others' answers waiting."""
    hashing, nice = Counted(), list[int]()
    with served(tmp_path, ["a"], hashing=hashing) as service:
        mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        lookup = service.verifier._reader.lookup

        def note() -> None:
            nice.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) - mine)

        def noted(version_id: str, login: str = "") -> object:
            note()
            return lookup(version_id, login)

        hashing.hold(note)
        monkeypatch.setattr(service.verifier._reader, "lookup", noted)
        assert service.verify(service.held[0])[0] == 200
    assert nice[:2] == [0, 5]  # the look-up, and the hash; another look-up follows


def test_nobody_waits_for_a_store_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look-up that hangs is a 503 in time, for who joined it too, and a yes as soon as it ends."""
    monkeypatch.setattr(desk, "PATIENCE", 0.4)
    with served(tmp_path, ["a"]) as service, ThreadPoolExecutor(2) as pool:
        held, back = service.held[0], threading.Event()
        lookup = service.verifier._reader.lookup

        def hang(version_id: str, login: str = "") -> object:
            assert back.wait(20)
            return lookup(version_id, login)

        monkeypatch.setattr(service.verifier._reader, "lookup", hang)
        headers = {"Authorization": held.basic}
        asked = [pool.submit(service.ask, "/v1/auth", headers=headers) for _ in range(2)]
        assert [one.result()[0] for one in asked] == [503, 503]
        assert service.desk.busy == 1
        back.set()
        until = time.monotonic() + 20
        while service.desk.busy:
            assert time.monotonic() < until
            time.sleep(0.005)
        assert service.ask("/v1/auth", headers=headers)[0] == 200
        assert len(service.hashes) == 1  # of the look-up that was given up


def test_nothing_is_looked_up_for_those_who_were_told_that_nobody_can_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that is too slow is asked for who waits still; and who comes then is answered."""
    monkeypatch.setattr(desk, "PATIENCE", 0.4)
    with served(tmp_path, ["a"]) as service, ThreadPoolExecutor(READERS * 3) as pool:
        held, back, looked_up = service.held[0], threading.Event(), list[str]()
        lookup = service.verifier._reader.lookup

        def hang(version_id: str, login: str = "") -> object:
            looked_up.append(version_id)
            assert back.wait(20)
            return lookup(version_id, login)

        monkeypatch.setattr(service.verifier._reader, "lookup", hang)
        others = [mint(random_bytes=random.Random(99 + n).randbytes)[1] for n in range(READERS * 3)]
        asked = [pool.submit(service.verify, held, secret=one.reveal()) for one in others]
        assert {one.result()[0] for one in asked} == {503}
        assert service.desk.busy == len(others)
        monkeypatch.setattr(desk, "PATIENCE", 20.0)
        back.set()
        assert service.verify(held, secret=others[-1].reveal())[0] == 401
        assert service.verify(held)[0] == 200
        until = time.monotonic() + 20
        while service.desk.busy:
            assert time.monotonic() < until
            time.sleep(0.005)
        strangers = [one for one in looked_up if one != held.version_id]
        assert len(strangers) <= READERS + 2


def test_threads_that_cannot_be_had_show_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a limit of tasks the service says so before its first answer, and leaves no thread behind."""
    before, start, left = threading.active_count(), threading.Thread.start, [12]

    def start_some(thread: threading.Thread) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    workers = Workers(cast("Verifier", None), hashing=2, done=lambda _key, _outcome: None)
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", start_some)
        with pytest.raises(KeyturnError, match="threads") as caught:
            workers.start()
    assert "TasksMax" in (caught.value.hint or "")
    workers.close()
    assert threading.active_count() == before


def test_the_beat_is_set_by_the_asking_and_not_by_the_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop's alarm is exact to a millisecond: one set by a finding would tell when that was."""
    with served(tmp_path, ["a"]) as service, ThreadPoolExecutor(1) as pool:
        at, begin, later = service.desk, service.verifier.begin, service.desk._later
        events, go_on = list[str](), threading.Event()

        def slowly(*args: object, **more: object) -> object:
            assert go_on.wait(20)
            events.append("found")
            return begin(*args, **more)  # type: ignore[arg-type]

        def alarm(delay: float, call: Callable[[], None]) -> object:
            events.append("alarm" if call == at._beat else "other")
            return later(delay, call)

        monkeypatch.setattr(service.verifier, "begin", slowly)
        monkeypatch.setattr(at, "_later", alarm)
        asked = pool.submit(
            service.ask, "/v1/auth", headers={"Authorization": "Bearer " + "x" * 30}
        )
        until = time.monotonic() + 20
        while events.count("alarm") < 3:  # it goes on by itself, whatever is found
            assert time.monotonic() < until
            time.sleep(0.001)
        assert "found" not in events
        go_on.set()
        assert asked.result()[0] == 401
        while at._beating:  # and ends where nobody waits
            assert time.monotonic() < until
            time.sleep(0.001)
