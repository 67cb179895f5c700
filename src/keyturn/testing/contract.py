"""What every destination promises, as tests: subclass `DestinationContract` and give three things.

    class TestMine(DestinationContract):
        @pytest.fixture
        def destination(self): ...                           # empty, its store id is STORE_ID
        def read_raw(self, destination, target): ...         # what an agent reads, by other means
        def write_raw(self, destination, target, values): ...   # somebody else's edit, unmarked

What is expected follows from the declared traits alone; no test is ever skipped. Without the hooks
`sibling`, `write_garbage` and `denied` three tests have nothing to prove: give them wherever the
server can be brought to it. `keys_as_text` is for those that hold
text values only.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from keyturn.core.model import Keys, Target
from keyturn.errors import (
    ConfigError,
    Conflict,
    Denied,
    DestinationError,
    KeyturnError,
    Rejected,
)
from keyturn.ports import Destination, Entry, Observed
from keyturn.testing.canary import leaks
from keyturn.testing.entries import (
    ESCAPES,
    FOREIGN,
    FOREIGN_VALUES,
    MINTED_AT,
    OTHER_STORE_ID,
    PLACE,
    STORE_ID,
    new_entry,
    parts,
    publish,
    withdraw,
)

__all__ = [
    "MINTED_AT",
    "OTHER_STORE_ID",
    "PLACE",
    "STORE_ID",
    "DestinationContract",
    "new_entry",
    "parts",
    "publish",
    "withdraw",
]  # fmt: skip


class DestinationContract:
    """The promises of `ports.Destination`. See the module for what a subclass gives."""

    TO = "contract"
    keys_as_text = False

    # --- what a subclass gives --------------------------------------------------------------

    @pytest.fixture
    def destination(self) -> Any:
        """Give an empty destination whose store id is STORE_ID."""
        raise NotImplementedError

    def read_raw(self, destination: Any, target: Target) -> Mapping[str, Any] | None:
        """Return what an agent reads, without the adapter; None where there is nothing."""
        raise NotImplementedError

    def write_raw(self, destination: Any, target: Target, values: Mapping[str, Any]) -> None:
        """Write as somebody else, past the adapter: make no owner marker, leave one that is there."""
        raise NotImplementedError

    def sibling(self, destination: Any) -> Destination | None:
        """Return another connection to the same place for the store OTHER_STORE_ID, if it can be."""
        return None

    def write_garbage(self, destination: Any, target: Target) -> bool:
        """Put something there that is no entry; False where the destination takes none."""
        return False

    def denied(self, destination: Any) -> contextlib.AbstractContextManager[bool]:
        """Take the login's permissions away for a while; gives False where that cannot be done."""
        return contextlib.nullcontext(False)

    def publish(self, destination: Any, target: Target, entry: Entry) -> str:
        """Do what the saga does: read the token, stage where there is staging, activate."""
        return publish(destination, target, entry)

    # --- looking ----------------------------------------------------------------------------

    def test_probe_says_what_it_reached_and_changes_nothing(self, destination: Any) -> None:
        """A probe answers in one line and leaves no entry."""
        target = self._target("probe")
        with contextlib.suppress(DestinationError):  # the place may be made by the first write
            line = destination.probe()
            assert line
            assert "\n" not in line
        assert self.read_raw(destination, target) is None

    def test_an_entry_is_probed_without_a_write(self, destination: Any) -> None:
        """With the rights that rotations have nothing is wrong with an entry, there or not."""
        target, missing, entry = self._target("looked-at"), self._target("missing"), new_entry(1)
        publish(destination, target, entry)
        token = destination.observe(target).token
        for how in ("disable", "destroy"):
            destination.probe_entry(target, retire=how)
            destination.probe_entry(missing, retire=how)
        assert destination.observe(target).token == token
        assert self.read_raw(destination, missing) is None

    def test_a_missing_entry_is_an_answer(self, destination: Any) -> None:
        """Nothing there is no error, and says nothing about any part."""
        found = destination.observe(self._target("missing"))
        assert (found.exists, found.has_value, found.other_keys) == (False, False, False)
        assert (found.login, found.secret, found.version_id, found.owner) == (None,) * 4
        assert found.staged is None
        assert found.locator == ""

    def test_reading_twice_gives_the_same_token(self, destination: Any) -> None:
        """A token is a function of what is there, so it can be journalled and compared later."""
        target = self._target("token")
        assert destination.observe(target) == destination.observe(target)
        publish(destination, target, new_entry(1))
        assert destination.observe(target) == destination.observe(target)

    def test_a_version_that_is_nowhere_has_no_value(self, destination: Any) -> None:
        """Reading by an unknown version id is an answer too, before and after a first write."""
        target = self._target("nowhere")
        assert not destination.read(target, new_entry(2).version_id).has_value
        publish(destination, target, new_entry(1))
        assert not destination.read(target, new_entry(2).version_id).has_value

    # --- writing ----------------------------------------------------------------------------

    def test_create_is_what_an_agent_reads(self, destination: Any) -> None:
        """A first entry holds exactly our three keys, and our own reads agree with an agent's."""
        target, entry = self._target("create"), new_entry(1)
        locator = publish(destination, target, entry)
        assert self.read_raw(destination, target) == parts(target.keys, entry)
        found = destination.observe(target)
        self._shows(found, entry)
        assert found.owner == STORE_ID
        assert not found.other_keys
        assert found.locator == locator
        assert bool(locator) is destination.traits.keeps_versions
        self._shows(destination.read(target, entry.version_id), entry)

    def test_the_same_version_again_changes_nothing(self, destination: Any) -> None:
        """A retry after a lost answer succeeds, with any token, and moves nothing."""
        target, entry = self._target("again"), new_entry(1)
        before = destination.observe(target).token
        locator = publish(destination, target, entry)
        shown = destination.observe(target)
        assert destination.activate(target, entry, expected=before) == locator
        assert destination.activate(target, entry, expected=shown.token) == locator
        assert destination.observe(target) == shown

    def test_replacing_moves_the_token(self, destination: Any) -> None:
        """A later version takes the entry over whole, and an old token is void."""
        target, old, new = self._target("replace"), new_entry(1), new_entry(2)
        publish(destination, target, old)
        token = destination.observe(target).token
        publish(destination, target, new)
        assert self.read_raw(destination, target) == parts(target.keys, new)
        self._shows(destination.observe(target), new)
        if destination.traits.has_cas:
            assert destination.observe(target).token != token

    def test_a_wrong_token_changes_nothing(self, destination: Any) -> None:
        """With compare-and-set a void token is a Conflict; without it the write lands."""
        target, old, new, late = self._target("cas"), new_entry(1), new_entry(2), new_entry(3)
        void = destination.observe(target).token
        publish(destination, target, old)
        stale = destination.observe(target).token
        publish(destination, target, new)
        if not destination.traits.has_cas:
            destination.activate(target, late, expected=stale)
            assert self.read_raw(destination, target) == parts(target.keys, late)
            return
        shown = destination.observe(target)
        for token in (void, stale):
            with pytest.raises(Conflict):
                destination.activate(target, late, expected=token)
            with pytest.raises(Conflict):
                destination.activate(target, old, expected=token)
        assert self.read_raw(destination, target) == parts(target.keys, new)
        assert destination.observe(target) == shown

    def test_an_outside_edit_voids_the_token(self, destination: Any) -> None:
        """Whoever edits between our read and our write is not overwritten unseen."""
        target, old, new = self._target("edit", merge=True), new_entry(1), new_entry(2)
        publish(destination, target, old)
        token = destination.observe(target).token
        edited = {**parts(target.keys, old), "note": "by hand"}
        self.write_raw(destination, target, edited)
        if destination.traits.has_cas:
            with pytest.raises(Conflict):
                destination.activate(target, new, expected=token)
            assert self.read_raw(destination, target) == edited
        publish(destination, target, new)
        assert self.read_raw(destination, target) == {**edited, **parts(target.keys, new)}

    def test_one_of_many_writers_wins(self, destination: Any) -> None:
        """With one token, exactly one of eight writes at once lands, and that one is shown."""
        target, entries = self._target("race"), [new_entry(seed) for seed in range(2, 10)]
        publish(destination, target, new_entry(1))
        if destination.traits.can_stage:
            for entry in entries:
                destination.stage(target, entry, expected=destination.observe(target).token)
        token = destination.observe(target).token
        together = threading.Barrier(len(entries))

        def write(entry: Entry) -> bool:
            together.wait()
            try:
                destination.activate(target, entry, expected=token)
            except Conflict:
                return False
            return True

        with ThreadPoolExecutor(len(entries)) as pool:
            landed = [e for e, won in zip(entries, pool.map(write, entries), strict=True) if won]
        assert len(landed) == (1 if destination.traits.has_cas else len(entries))
        assert self.read_raw(destination, target) in [parts(target.keys, entry) for entry in landed]

    def test_the_same_entry_has_the_same_bytes(self, destination: Any) -> None:
        """A re-write after a takeover must not look like another value (rule 9)."""
        first, second = self._target("bytes-1"), self._target("bytes-2")
        publish(destination, first, new_entry(1))
        publish(destination, second, new_entry(1))
        one, two = self.read_raw(destination, first), self.read_raw(destination, second)
        assert one == two
        assert list(one or {}) == list(two or {})

    # --- what is not ours -------------------------------------------------------------------

    def test_an_entry_that_is_not_ours_is_never_replaced(self, destination: Any) -> None:
        """Entries are create-only: neither foreign keys nor keys named like ours are touched."""
        for name, values in (("their-keys", {"port": "5432"}), ("our-keys", {"secret": "theirs"})):
            target = self._target(name)
            self.write_raw(destination, target, values)
            self._refuses(destination, target, values)

    def test_merge_keeps_the_keys_of_others(self, destination: Any) -> None:
        """Whatever others hold in the entry is still there, to the last character."""
        target = self._target("merge", merge=True)
        theirs = FOREIGN if self.keys_as_text else {**FOREIGN, **FOREIGN_VALUES}
        self.write_raw(destination, target, theirs)
        assert destination.observe(target).other_keys
        for seed in (1, 2):
            publish(destination, target, new_entry(seed))
            assert self.read_raw(destination, target) == {
                **theirs,
                **parts(target.keys, new_entry(seed)),
            }
        assert destination.observe(target).other_keys

    def test_merge_alone_does_not_take_our_keys_over(self, destination: Any) -> None:
        """A value under our key that we did not write is somebody's password."""
        target = self._target("merge-ours", merge=True)
        self._refuses_written(destination, target, {"secret": "theirs", "port": "5432"})

    def test_adopt_takes_our_keys_over(self, destination: Any) -> None:
        """With `adopt` the value becomes ours, and the marker says so."""
        target = self._target("adopt", adopt=True)
        self.write_raw(destination, target, {"id": "old", "secret": "old secret of some length"})
        assert destination.observe(target).owner is None
        publish(destination, target, new_entry(1))
        assert self.read_raw(destination, target) == parts(target.keys, new_entry(1))
        assert destination.observe(target).owner == STORE_ID

    def test_adopt_alone_does_not_drop_the_keys_of_others(self, destination: Any) -> None:
        """Adopting covers our keys; keys of others need `merge` as well, and are then kept."""
        values = {"secret": "old secret", "port": "5432"}
        self._refuses_written(destination, self._target("adopt-other", adopt=True), values)
        both = self._target("adopt-merge", adopt=True, merge=True)
        self.write_raw(destination, both, values)
        publish(destination, both, new_entry(1))
        assert self.read_raw(destination, both) == {
            "port": "5432",
            **parts(both.keys, new_entry(1)),
        }

    def test_keys_that_others_added_to_our_entry_are_not_dropped(self, destination: Any) -> None:
        """Without `merge` an entry of ours that somebody else uses as well is left alone."""
        target = self._target("shared")
        publish(destination, target, new_entry(1))
        shared = {**parts(target.keys, new_entry(1)), "port": "5432"}
        self._refuses_written(destination, target, shared)

    def test_another_stores_entry_is_refused(self, destination: Any) -> None:
        """What carries the marker of another Keyturn is not taken, not even with `adopt`."""
        sibling = self.sibling(destination)
        if sibling is None:
            return
        target, theirs = self._target("theirs"), new_entry(1, owner=OTHER_STORE_ID)
        publish(sibling, target, theirs)
        assert destination.observe(target).owner == OTHER_STORE_ID
        taking = self._target("theirs", adopt=True, merge=True)
        self._refuses(destination, taking, parts(target.keys, theirs))

    def test_key_names_can_hold_any_text(self, destination: Any) -> None:
        """The agent's own names of the keys are used as they are."""
        keys = Keys(id='client "id"', secret="пароль 🔑", version="v/1 \\ %s")
        target = self._target("keys", keys=keys)
        publish(destination, target, new_entry(1))
        assert self.read_raw(destination, target) == parts(keys, new_entry(1))
        self._shows(destination.observe(target), new_entry(1))

    def test_parts_that_are_no_text_are_no_parts(self, destination: Any) -> None:
        """A number under our key is a value, but none that can be presented."""
        if self.keys_as_text:
            return
        target = self._target("types")
        self.write_raw(destination, target, {"id": 7, "secret": ["x"], "version": None})
        found = destination.observe(target)
        assert found.exists
        assert found.has_value
        assert (found.login, found.secret, found.version_id) == (None, None, None)

    def test_garbage_is_never_replaced(self, destination: Any) -> None:
        """What cannot be read as an entry exists, has no value of ours, and stays."""
        for name, more in (("garbage", {}), ("garbage-both", {"merge": True, "adopt": True})):
            target = self._target(name, **more)
            if not self.write_garbage(destination, target):
                return
            found = destination.observe(target)
            assert found.exists
            assert not found.has_value
            assert found.other_keys
            with pytest.raises(Rejected):
                publish(destination, target, new_entry(1))
            assert destination.observe(target) == found

    # --- staging and old copies -------------------------------------------------------------

    def test_staged_is_readable_and_not_shown(self, destination: Any) -> None:
        """Stage, read by version id, activate; agents see the old one until the last step."""
        target, old, new = self._target("stage"), new_entry(1), new_entry(2)
        publish(destination, target, old)
        token = destination.observe(target).token
        if not destination.traits.can_stage:
            with pytest.raises(Rejected):
                destination.stage(target, new, expected=token)
            assert self.read_raw(destination, target) == parts(target.keys, old)
            return
        locator = destination.stage(target, new, expected=token)
        assert destination.stage(target, new, expected=token) == locator
        assert self.read_raw(destination, target) == parts(target.keys, old)
        found = destination.observe(target)
        self._shows(found, old)
        assert found.staged == new.version_id
        self._shows(destination.read(target, new.version_id), new)
        assert destination.activate(target, new, expected=found.token) == locator
        assert self.read_raw(destination, target) == parts(target.keys, new)
        assert destination.observe(target).staged is None

    def test_staging_with_a_wrong_token_changes_nothing(self, destination: Any) -> None:
        """A staged copy is conditional on what it will replace as well."""
        if not (destination.traits.can_stage and destination.traits.has_cas):
            return
        target = self._target("stage-cas")
        void = destination.observe(target).token
        publish(destination, target, new_entry(1))
        shown = destination.observe(target)
        with pytest.raises(Conflict):
            destination.stage(target, new_entry(2), expected=void)
        assert destination.observe(target) == shown

    def test_old_copies_are_put_away_and_the_shown_one_never(self, destination: Any) -> None:
        """Retiring hits one immutable copy, can be repeated, and refuses the one shown."""
        for how in ("disable", "destroy"):
            target, old, new = self._target(how), new_entry(1), new_entry(2)
            first = publish(destination, target, old)
            if not destination.traits.keeps_versions:
                with pytest.raises(Rejected):
                    destination.retire(target, version_id=old.version_id, locator="1", how=how)
                assert self.read_raw(destination, target) == parts(target.keys, old)
                continue
            second = publish(destination, target, new)
            assert first != second
            for _ in range(2):
                destination.retire(target, version_id=old.version_id, locator=first, how=how)
            with pytest.raises(Rejected):
                destination.retire(target, version_id=new.version_id, locator=second, how=how)
            assert self.read_raw(destination, target) == parts(target.keys, new)
            assert not destination.read(target, old.version_id).has_value

    # --- withdrawing ------------------------------------------------------------------------

    def test_what_is_withdrawn_shows_no_secret_and_is_published_over(
        self, destination: Any
    ) -> None:
        """The id stays and the entry is ours: a later version takes it without `adopt`."""
        target, old, new = self._target("withdrawn"), new_entry(1), new_entry(2)
        publish(destination, target, old)
        token = destination.observe(target).token
        locator = withdraw(destination, target, old, token)
        assert self.read_raw(destination, target) == {target.keys.id: old.login}
        found = destination.observe(target)
        assert (found.exists, found.has_value, found.other_keys) == (True, False, False)
        assert (found.login, found.secret, found.version_id) == (old.login, None, None)
        assert (found.owner, found.locator) == (STORE_ID, locator)
        if destination.traits.has_cas:
            with pytest.raises(Conflict):
                destination.activate(target, new, expected=token)
        publish(destination, target, new)
        assert self.read_raw(destination, target) == parts(target.keys, new)
        self._shows(destination.observe(target), new)

    def test_withdrawing_keeps_the_keys_of_others(self, destination: Any) -> None:
        """Theirs stay to the last character, with `merge` and where they added them without it."""
        theirs = FOREIGN if self.keys_as_text else {**FOREIGN, **FOREIGN_VALUES}
        for name, merge in (("withdraw-merge", True), ("withdraw-added", False)):
            target, entry = self._target(name, merge=merge), new_entry(1)
            publish(destination, target, entry)
            self.write_raw(destination, target, {**theirs, **parts(target.keys, entry)})
            withdraw(destination, target, entry, destination.observe(target).token)
            assert self.read_raw(destination, target) == {**theirs, target.keys.id: entry.login}

    def test_withdrawing_again_changes_nothing(self, destination: Any) -> None:
        """A retry after a lost answer succeeds, with any token, and moves nothing."""
        target, entry = self._target("withdraw-twice"), new_entry(1)
        publish(destination, target, entry)
        token = destination.observe(target).token
        locator = withdraw(destination, target, entry, token)
        left = destination.observe(target)
        for any_token in (token, left.token):
            assert withdraw(destination, target, entry, any_token) == locator
        assert destination.observe(target) == left

    def test_withdrawing_makes_no_entry(self, destination: Any) -> None:
        """Where there is nothing, or nothing of ours, nothing is written."""
        target, other = self._target("withdraw-none"), self._target("withdraw-theirs")
        assert withdraw(destination, target, new_entry(1), destination.observe(target).token) == ""
        assert self.read_raw(destination, target) is None
        self.write_raw(destination, other, {"port": "5432"})
        found = destination.observe(other)
        withdraw(destination, other, new_entry(1), found.token)
        assert destination.observe(other) == found

    def test_another_version_is_never_withdrawn(self, destination: Any) -> None:
        """What was replaced meanwhile stays: by the token where that is compared, and by its id."""
        target, old, new = self._target("withdraw-late"), new_entry(1), new_entry(2)
        publish(destination, target, old)
        stale = destination.observe(target).token
        publish(destination, target, new)
        shown = destination.observe(target)
        late = [(old, stale), (old, shown.token)]
        for entry, token in [*late, (new, stale)] if destination.traits.has_cas else late:
            with pytest.raises(Conflict):
                withdraw(destination, target, entry, token)
        assert destination.observe(target) == shown

    def test_only_our_own_is_withdrawn(self, destination: Any) -> None:
        """What somebody else wrote is left alone, also where it looks like ours."""
        target, entry = self._target("withdraw-copied"), new_entry(1)
        self.write_raw(destination, target, parts(target.keys, entry))
        sibling, places = self.sibling(destination), [target]
        if sibling is not None:
            places.append(self._target("withdraw-sibling"))
            publish(sibling, places[1], new_entry(1, owner=OTHER_STORE_ID))
        for place in places:
            found = destination.observe(place)
            with pytest.raises(Rejected):
                withdraw(destination, place, entry, found.token)
            assert destination.observe(place) == found

    # --- what must not get out, and where nothing may go --------------------------------------

    def test_paths_out_of_bounds_are_refused(self, destination: Any) -> None:
        """No path leaves its place: refused offline, and again wherever it would be used."""
        for path in ESCAPES:
            target = Target(to=self.TO, path=path, merge=True, adopt=True)
            calls: list[Callable[[], object]] = [
                lambda: destination.identity(target),  # noqa: B023 - called in this round
                lambda: destination.observe(target),  # noqa: B023
                lambda: destination.read(target, "x"),  # noqa: B023
                lambda: destination.stage(target, new_entry(1), expected=""),  # noqa: B023
                lambda: destination.activate(target, new_entry(1), expected=""),  # noqa: B023
                lambda: destination.withdraw(target, owner=STORE_ID, version_id="x", expected=""),  # noqa: B023
                lambda: destination.retire(target, version_id="x", locator="1", how="disable"),  # noqa: B023
            ]
            for number, call in enumerate(calls):
                with pytest.raises((ConfigError, Rejected) if number > 2 else ConfigError):
                    call()

    def test_identity_is_constant_and_tells_entries_apart(self, destination: Any) -> None:
        """One entry, one identity, whatever the connection's name; another entry has another."""
        target, other = self._target("same"), self._target("other")
        before = destination.identity(target)
        publish(destination, target, new_entry(1))
        assert destination.identity(target) == before
        assert destination.identity(other) != before
        sibling = self.sibling(destination)
        if sibling is not None:
            assert sibling.identity(target) == before
            sibling.close()

    def test_a_denied_login_is_named_as_such(self, destination: Any) -> None:
        """No permission is Denied with a hint, never a missing entry and never retried for ever."""
        target = self._target("denied")
        publish(destination, target, new_entry(1))
        token = destination.observe(target).token
        with self.denied(destination) as possible:
            if not possible:
                return
            with pytest.raises(Denied) as reading:
                destination.observe(target)
            with pytest.raises(Denied) as writing:
                destination.activate(target, new_entry(2), expected=token)
            with pytest.raises(Denied) as probing:
                destination.probe_entry(target, retire="disable")
            with pytest.raises(Denied) as withdrawing:
                withdraw(destination, target, new_entry(1), token)
        assert reading.value.hint
        assert writing.value.hint
        assert probing.value.hint
        assert withdrawing.value.hint
        assert self.read_raw(destination, target) == parts(target.keys, new_entry(1))

    def test_no_secret_gets_out(
        self, destination: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Logs at DEBUG, texts of values, errors and their tracebacks hold no piece of a secret."""
        target, old, new, late = self._target("canary"), new_entry(1), new_entry(2), new_entry(3)
        said: list[str] = []
        with caplog.at_level(logging.DEBUG):
            void = destination.observe(target).token
            publish(destination, target, old)
            publish(destination, target, new)
            for call in (
                lambda: destination.activate(target, late, expected=void),
                lambda: destination.stage(target, late, expected=void),
                lambda: destination.activate(Target(to=self.TO, path="../x"), late, expected=void),
                lambda: withdraw(destination, target, old, void),
                lambda: withdraw(destination, target, new, void),
                lambda: destination.retire(
                    target, version_id=new.version_id, locator="1", how="disable"
                ),
            ):
                said += self._said_by(call)
            found = destination.observe(target)
            said += [repr(value) + str(value) for value in (found, old, destination, target)]
            said.append(f"{destination.probe()} {destination.identity(target)}")
        captured = capfd.readouterr()
        text = "\n".join((*said, caplog.text, captured.out, captured.err))
        text += "".join(repr(record.__dict__) for record in caplog.records)
        for entry in (old, new, late):
            assert leaks(text, entry.secret) == []

    # --- inside -----------------------------------------------------------------------------

    def _target(self, name: str, **more: Any) -> Target:
        return Target(to=self.TO, path=name, **more)

    def _shows(self, found: Observed, entry: Entry) -> None:
        assert found.exists
        assert found.has_value
        assert (found.login, found.version_id) == (entry.login, entry.version_id)
        assert found.secret == entry.secret

    def _refuses(self, destination: Any, target: Target, values: Mapping[str, Any]) -> None:
        with pytest.raises(Rejected):
            publish(destination, target, new_entry(9))
        token = destination.observe(target).token
        with pytest.raises(Rejected):
            destination.activate(target, new_entry(9), expected=token)
        assert self.read_raw(destination, target) == values

    def _refuses_written(self, destination: Any, target: Target, values: Mapping[str, Any]) -> None:
        self.write_raw(destination, target, values)
        self._refuses(destination, target, values)

    def _said_by(self, call: Callable[[], object]) -> Iterator[str]:
        """Yield every text of an error, and of those that hang on it, hidden or not."""
        try:
            call()
        except KeyturnError as error:
            yield "".join(traceback.format_exception(error))
            seen: BaseException | None = error
            while seen is not None:
                yield f"{seen!r} {seen} {vars(seen)!r}"
                seen = seen.__cause__ or seen.__context__
