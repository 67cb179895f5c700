"""The contract of `ports.Destination`, as a test class that every adapter runs unchanged.

A subclass gives the fixture `destination` and two hooks that bypass the adapter: what an agent reads
(`read_raw`), and somebody else's edit (`write_raw`). What is expected follows from the declared
traits, never from an adapter's name. Needs pytest.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from keyturn.core.model import Keys, Target
from keyturn.core.secret import Secret, mint
from keyturn.destinations.base import DestinationBase
from keyturn.errors import ConfigError, Conflict, KeyturnError, Rejected
from keyturn.ports import Entry
from keyturn.testing.fakes import seeded

STORE_ID = "store-under-test"
PLACE = Target(to="contract", path="team/agent-1")
HARD_KEYS = Keys(id="client id", secret="ключ/секрет", version='v"1')


def new_entry(seed: int, *, login: str = "agent-1") -> Entry:
    """Make an entry whose secret is a canary of its own."""
    version_id, secret = mint(random_bytes=seeded(seed))
    return Entry(login=login, secret=secret, version_id=version_id, owner=STORE_ID, fence=seed)


class DestinationContract:
    """What every destination promises."""

    # --- hooks ------------------------------------------------------------------------------

    def read_raw(self, destination: DestinationBase, target: Target) -> dict[str, Any] | None:
        """Return what an agent reads there, by other means than the adapter."""
        raise NotImplementedError

    def write_raw(
        self, destination: DestinationBase, target: Target, values: Mapping[str, str]
    ) -> None:
        """Edit the entry as somebody else."""
        raise NotImplementedError

    # --- helpers ----------------------------------------------------------------------------

    def publish(self, destination: DestinationBase, target: Target, entry: Entry) -> str:
        """Bring an entry to where agents read it, by the steps that the traits ask for."""
        if destination.traits.can_stage:
            token = destination.observe(target).token
            destination.stage(target, entry, expected=token)
        token = destination.observe(target).token
        return destination.activate(target, entry, expected=token)

    # --- reading ----------------------------------------------------------------------------

    def test_a_missing_entry_is_an_answer(self, destination: DestinationBase) -> None:
        """Where nothing is, the read says so and raises nothing."""
        found = destination.observe(PLACE)

        assert (found.exists, found.has_value, found.secret) == (False, False, None)

    def test_what_is_published_is_what_an_agent_reads(self, destination: DestinationBase) -> None:
        """Id, secret and version arrive together where an agent reads."""
        entry = new_entry(1)
        self.publish(destination, PLACE, entry)

        raw = self.read_raw(destination, PLACE)

        assert raw is not None
        assert (entry.login, entry.secret.reveal(), entry.version_id) == (
            raw["id"],
            raw["secret"],
            raw["version"],
        )

    def test_what_is_published_is_observed(self, destination: DestinationBase) -> None:
        """The adapter's own read gives the same parts, the owner and a fresh answer."""
        entry = new_entry(2)
        self.publish(destination, PLACE, entry)

        found = destination.observe(PLACE)

        assert (entry.login, entry.secret, entry.version_id) == (
            found.login,
            found.secret,
            found.version_id,
        )
        assert (found.owner, found.fresh, found.other_keys) == (STORE_ID, True, False)

    def test_the_key_names_of_the_configuration_are_used(
        self, destination: DestinationBase
    ) -> None:
        """Names with spaces, quotes and other scripts survive."""
        target = replace(PLACE, keys=HARD_KEYS)
        entry = new_entry(3)
        self.publish(destination, target, entry)

        raw = self.read_raw(destination, target)

        assert raw is not None
        assert entry.version_id == raw[HARD_KEYS.version]
        assert entry.secret == destination.observe(target).secret

    # --- writing ----------------------------------------------------------------------------

    def test_the_same_version_twice_is_one(self, destination: DestinationBase) -> None:
        """A retry after a lost answer changes nothing and succeeds."""
        entry = new_entry(4)
        first = self.publish(destination, PLACE, entry)
        before = destination.observe(PLACE)

        again = destination.activate(PLACE, entry, expected=before.token)

        assert first == again
        assert before.token == destination.observe(PLACE).token

    def test_a_later_version_replaces_an_earlier_one(self, destination: DestinationBase) -> None:
        """Publishing moves forward and leaves nothing of the old one to be read."""
        self.publish(destination, PLACE, new_entry(5))
        later = new_entry(6)
        self.publish(destination, PLACE, later)

        raw = self.read_raw(destination, PLACE)

        assert raw is not None
        assert later.version_id == raw["version"]

    def test_an_old_token_writes_nothing(self, destination: DestinationBase) -> None:
        """Where writes are compared, one that compares with an older read does not land."""
        if not destination.traits.has_cas:
            return
        self.publish(destination, PLACE, new_entry(7))
        old = destination.observe(PLACE).token
        shown = new_entry(8)
        self.publish(destination, PLACE, shown)

        with pytest.raises(Conflict):
            destination.activate(PLACE, new_entry(9), expected=old)

        assert shown.version_id == destination.observe(PLACE).version_id

    def test_an_outside_edit_voids_the_token(self, destination: DestinationBase) -> None:
        """Somebody else's write between read and write is met with a conflict."""
        if not destination.traits.has_cas:
            return
        self.publish(destination, PLACE, new_entry(10))
        token = destination.observe(PLACE).token
        self.write_raw(destination, PLACE, {"id": "x", "secret": "edited", "version": "y"})

        with pytest.raises(Conflict):
            destination.activate(PLACE, new_entry(11), expected=token)

        raw = self.read_raw(destination, PLACE)
        assert raw is not None
        assert raw["secret"] == "edited"

    def test_of_two_writers_with_one_token_one_wins(self, destination: DestinationBase) -> None:
        """Two writes that compare with the same read: exactly one lands."""
        if not destination.traits.has_cas:
            return
        self.publish(destination, PLACE, new_entry(12))
        token = destination.observe(PLACE).token
        entries = [new_entry(13), new_entry(14)]
        if destination.traits.can_stage:
            for entry in entries:
                destination.stage(PLACE, entry, expected=token)

        def attempt(entry: Entry) -> str:
            try:
                destination.activate(PLACE, entry, expected=token)
            except Conflict:
                return ""
            return entry.version_id

        with ThreadPoolExecutor(2) as pool:
            winners = [version for version in pool.map(attempt, entries) if version]

        assert [destination.observe(PLACE).version_id] == winners

    # --- other people's entries -------------------------------------------------------------

    def test_a_foreign_entry_is_not_replaced(self, destination: DestinationBase) -> None:
        """Create-only is the default: what exists and is not ours stays."""
        theirs = {"id": "them", "secret": "theirs", "version": "1"}
        self.write_raw(destination, PLACE, theirs)

        with pytest.raises(Rejected):
            self.publish(destination, PLACE, new_entry(15))

        assert theirs == self.read_raw(destination, PLACE)

    def test_adopt_takes_our_keys_over(self, destination: DestinationBase) -> None:
        """With `adopt` an entry that has our keys becomes ours."""
        self.write_raw(destination, PLACE, {"id": "them", "secret": "theirs", "version": "1"})
        entry = new_entry(16)
        self.publish(destination, replace(PLACE, adopt=True), entry)

        assert entry.secret == destination.observe(PLACE).secret

    def test_merge_keeps_the_keys_of_others(self, destination: DestinationBase) -> None:
        """With `merge` foreign keys stay as they were, hard characters and all."""
        self.write_raw(destination, PLACE, {"url": 'https://x/"?ü=1\n'})
        entry = new_entry(17)
        self.publish(destination, replace(PLACE, merge=True), entry)

        raw = self.read_raw(destination, PLACE)

        assert raw is not None
        assert ('https://x/"?ü=1\n', entry.version_id) == (raw["url"], raw["version"])
        assert destination.observe(PLACE).other_keys

    def test_foreign_keys_are_not_dropped(self, destination: DestinationBase) -> None:
        """Without `merge` an entry with keys of others is left alone."""
        self.write_raw(destination, PLACE, {"url": "https://x"})

        with pytest.raises(Rejected):
            self.publish(destination, PLACE, new_entry(18))

        assert self.read_raw(destination, PLACE) == {"url": "https://x"}

    # --- staging and old copies -------------------------------------------------------------

    def test_what_is_staged_is_not_shown(self, destination: DestinationBase) -> None:
        """A staged version is read by its id and by nothing else."""
        if not destination.traits.can_stage:
            return
        shown, staged = new_entry(19), new_entry(20)
        self.publish(destination, PLACE, shown)
        destination.stage(PLACE, staged, expected=destination.observe(PLACE).token)

        found = destination.observe(PLACE)

        assert (shown.version_id, staged.version_id) == (found.version_id, found.staged)
        assert staged.secret == destination.read(PLACE, staged.version_id).secret

    def test_the_shown_version_is_read_by_its_id(self, destination: DestinationBase) -> None:
        """Recovery finds the copy that agents read; another id finds nothing."""
        entry = new_entry(21)
        self.publish(destination, PLACE, entry)

        assert entry.secret == destination.read(PLACE, entry.version_id).secret
        assert not destination.read(PLACE, new_entry(22).version_id).has_value

    def test_an_old_copy_is_retired_and_the_shown_one_never(
        self, destination: DestinationBase
    ) -> None:
        """Retirement reaches exactly one immutable copy, and may be repeated."""
        if not destination.traits.keeps_versions:
            return
        old, new = new_entry(23), new_entry(24)
        first = self.publish(destination, PLACE, old)
        second = self.publish(destination, PLACE, new)
        for _ in range(2):
            destination.retire(PLACE, version_id=old.version_id, locator=first, how="disable")

        with pytest.raises(Rejected):
            destination.retire(PLACE, version_id=new.version_id, locator=second, how="disable")

        assert not destination.read(PLACE, old.version_id).has_value
        assert new.secret == destination.observe(PLACE).secret

    # --- paths and leaks --------------------------------------------------------------------

    @pytest.mark.parametrize(
        "path", ["../x", "a/../b", "./a", "a//b", "/a", "a/", "", ".", "a/.", "a\x00b", "a b", "ä"]
    )
    def test_paths_out_of_bounds_are_refused(self, destination: DestinationBase, path: str) -> None:
        """No spelling reaches an entry outside the prefix, for reads either."""
        with pytest.raises(ConfigError):
            destination.identity(Target(to="contract", path=path))
        with pytest.raises(KeyturnError):
            destination.observe(Target(to="contract", path=path))

    def test_a_secret_stays_out_of_logs_and_errors(
        self, destination: DestinationBase, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Nothing that is logged, raised or printed holds the secret."""
        caplog.set_level(logging.DEBUG)
        entry = new_entry(25)
        self.write_raw(destination, PLACE, {"id": "them", "secret": "theirs", "version": "1"})
        try:
            self.publish(destination, PLACE, entry)
        except KeyturnError as error:
            text = "".join(traceback.format_exception(error))
        else:
            text = ""
        text += caplog.text + repr(entry) + repr(destination) + repr(destination.observe(PLACE))

        assert entry.secret.reveal() not in text
        assert "theirs" not in text

    def test_a_secret_prints_as_a_marker(self) -> None:
        """The value type itself gives nothing away."""
        assert repr(Secret("canary")) == "Secret(***)"
