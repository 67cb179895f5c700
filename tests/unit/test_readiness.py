"""Whether a daemon lives and is ready, as everything that asks sees it."""

from __future__ import annotations

from keyturn.daemon.metrics import Metrics
from keyturn.daemon.readiness import STUCK_AFTER, TEXTS, Readiness, Reason


class Seconds:
    """A clock that stands until it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_daemon_becomes_ready_with_its_start() -> None:
    """Starting, standing by, starting anew with the lead, ready, stopping; it lives all the time."""
    readiness = Readiness()
    seen = []

    def look() -> None:
        seen.append((readiness.ready, readiness.leads, *map(str, readiness.reasons)))
        assert readiness.live

    look()
    readiness.stand_by()
    look()
    readiness.take_lead()
    look()
    readiness.release(Reason.STARTING)
    look()
    readiness.hold(Reason.STOPPING)
    look()
    assert seen == [
        (False, False, "starting"),
        (False, False, "standby"),
        (False, False, "starting"),
        (True, True),
        (False, True, "stopping"),
    ]


def test_who_looks_at_nothing_is_stuck() -> None:
    """Two minutes without a look at the due-queue; a start of any length is none of that."""
    clock = Seconds()
    readiness = Readiness(clock)
    readiness.release(Reason.STARTING)
    clock.now += STUCK_AFTER * 10
    assert readiness.live
    readiness.looked(store_answers=True)
    clock.now += STUCK_AFTER - 1
    assert readiness.ready
    clock.now += 1
    assert not readiness.live
    assert readiness.reasons == (Reason.STUCK,)
    readiness.looked(store_answers=True)
    assert readiness.ready


def test_a_store_that_is_away_is_no_reason_to_be_restarted() -> None:
    """It is not ready and lives; it is ready again by itself."""
    readiness = Readiness()
    readiness.release(Reason.STARTING)
    readiness.looked(store_answers=False)
    assert (readiness.live, readiness.reasons) == (True, (Reason.STORE_DOWN,))
    readiness.looked(store_answers=True)
    assert readiness.ready


def test_each_reason_has_a_text_and_a_metric() -> None:
    """What holds a daemon back is said in a sentence, and seen by a scrape at that moment."""
    readiness, metrics = Readiness(), Metrics()
    metrics.follow(readiness)
    readiness.release(Reason.STARTING)
    readiness.hold(Reason.QUARANTINED)

    assert set(TEXTS) == set(Reason)
    assert readiness.describe() == {
        "live": True,
        "ready": False,
        "leads": True,
        "reasons": [{"reason": "quarantined", "text": TEXTS[Reason.QUARANTINED]}],
    }
    text = metrics.text()
    assert 'keyturn_not_ready{reason="quarantined"} 1.0' in text
    assert 'keyturn_not_ready{reason="stuck"} 0.0' in text
    assert "keyturn_ready 0.0" in text
    readiness.release(Reason.QUARANTINED)
    assert "keyturn_ready 1.0" in metrics.text()


def test_what_was_not_measured_has_no_sample() -> None:
    """A standby's zero would look like a store that is down and a reload that failed."""
    metrics = Metrics()
    unknown = ("store_up", "config_last_reload_successful", "laggards")
    text = metrics.text()
    for name in unknown:
        assert f"# TYPE keyturn_{name} gauge" in text
        assert f"\nkeyturn_{name} " not in text
    metrics.store_up.set(0)
    assert "\nkeyturn_store_up 0.0" in metrics.text()
