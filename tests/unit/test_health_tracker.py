"""When an endpoint counts as up or down."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from citadel_gateway.policy.health_tracker import HealthTracker

steady = settings(deadline=None, derandomize=True)


def observe(tracker: HealthTracker, results: str) -> list[bool]:
    """Feed ``+`` and ``-``; returns whether each flipped the verdict."""
    return [
        tracker.observe(None if r == "+" else "refused", float(i)) for i, r in enumerate(results)
    ]


@pytest.mark.parametrize(
    ("rise", "fall", "results", "healthy"),
    [
        (1, 3, "", ""),
        (1, 3, "+", "+"),
        (1, 3, "-", "-"),
        (2, 3, "+", "+"),
        (2, 3, "-++", "--+"),
        (2, 3, "-+-+-++", "------+"),
        (1, 3, "+---", "+++-"),
        (1, 3, "+--+--", "++++++"),
        (1, 3, "+---+", "+++-+"),
        (1, 1, "+-+-", "+-+-"),
    ],
    ids=lambda value: str(value) or "nothing",
)
def test_it_flips_after_enough_results_in_a_row(
    rise: int, fall: int, results: str, healthy: str
) -> None:
    tracker, seen = HealthTracker(rise=rise, fall=fall), ""
    for result in results:
        observe(tracker, result)
        seen += "+" if tracker.healthy else "-"

    assert seen == healthy


def test_only_a_flip_is_told() -> None:
    assert observe(HealthTracker(fall=2), "++--++") == [True, False, False, True, True, False]


def test_the_last_error_and_its_time_are_kept_until_a_good_probe() -> None:
    tracker = HealthTracker()
    tracker.observe("connection refused", 7.0)
    assert (tracker.last_error, tracker.observed_at) == ("connection refused", 7.0)

    tracker.observe(None, 9.0)
    assert (tracker.last_error, tracker.observed_at) == (None, 9.0)


@pytest.mark.parametrize(
    ("results", "doubt"),
    [("", True), ("-", True), ("+", False), ("+-", True), ("+-+", False), ("+---", True)],
    ids=lambda value: str(value) or "nothing",
)
def test_it_is_in_doubt_while_down_or_on_the_way_there(results: str, doubt: bool) -> None:
    tracker = HealthTracker()
    observe(tracker, results)

    assert tracker.in_doubt() is doubt


@steady
@given(st.text("+-", max_size=30), st.integers(1, 4), st.integers(1, 4))
def test_a_flip_needs_the_last_results_to_agree(results: str, rise: int, fall: int) -> None:
    tracker = HealthTracker(rise=rise, fall=fall)
    flips = observe(tracker, results)

    for i, flipped in enumerate(flips[1:], start=1):
        if flipped:
            needed = rise if results[i] == "+" else fall
            assert results[: i + 1].endswith(results[i] * needed)
