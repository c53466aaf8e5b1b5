"""Who decides later has the later stamp, whatever the clocks say."""

from __future__ import annotations

from citadel_gateway.policy.stamps import Stamps


def test_stamps_of_one_grow_though_its_clock_stands_still_or_goes_back() -> None:
    stamps = Stamps()

    made = [stamps.make("one", now) for now in (5.0, 5.0, 4.0, 5.0004, 6.0)]

    assert made == sorted({*made})


def test_who_has_seen_a_stamp_makes_later_ones_though_its_clock_is_behind() -> None:
    ahead, behind = Stamps(), Stamps()
    seen = ahead.make("ahead", 100.0)

    before = behind.make("behind", 50.0)
    behind.see(seen)

    assert before < seen < behind.make("behind", 50.0)


def test_an_old_stamp_changes_nothing() -> None:
    stamps = Stamps()
    old = stamps.make("one", 1.0)
    new = stamps.make("one", 2.0)
    stamps.see(old)

    assert stamps.make("one", 2.0) > new


def test_two_that_decide_in_the_same_millisecond_have_different_stamps() -> None:
    assert Stamps().make("one", 1.0) != Stamps().make("other", 1.0)
