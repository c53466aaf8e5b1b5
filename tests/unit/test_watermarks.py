"""Levels are entered at their marks and left clearly below them."""

from __future__ import annotations

import pytest

from citadel_gateway.policy.watermarks import (
    LATEST,
    SOONEST,
    Level,
    Use,
    Watermark,
    come_again_in,
)

CALM, CLOSING, REFUSING, SHUT = Level


def levels(*shares: float) -> list[Level]:
    mark, found = Watermark(), []
    for share in shares:
        before = mark.level
        assert mark.observe(share) == (mark.level is not before)
        found.append(mark.level)
    return found


def test_each_mark_is_a_level_and_the_levels_come_in_order() -> None:
    shares = (0.0, 0.79, 0.80, 0.89, 0.90, 0.94, 0.95, 1.2)

    assert levels(*shares) == [CALM, CALM, CLOSING, CLOSING, REFUSING, REFUSING, SHUT, SHUT]


def test_a_level_is_kept_until_the_use_is_clearly_below_its_mark() -> None:
    shares = (0.96, 0.94, 0.93, 0.91, 0.88, 0.86, 0.78, 0.76)

    assert levels(*shares) == [SHUT, SHUT, SHUT, REFUSING, REFUSING, CLOSING, CLOSING, CALM]


def test_use_around_a_mark_changes_nothing_more() -> None:
    assert levels(*[0.91, 0.89] * 20) == [REFUSING] * 40


def test_a_jump_takes_all_levels_at_once_in_both_directions() -> None:
    assert levels(0.99, 0.1) == [SHUT, CALM]


def test_what_is_unlimited_is_never_used_up() -> None:
    assert Use(10**12, float("inf")).share == 0.0


@pytest.mark.parametrize("chance", [0.0, 0.25, 1.0])
def test_clients_are_told_to_come_again_at_different_times(chance: float) -> None:
    assert come_again_in(chance) == SOONEST + chance * (LATEST - SOONEST)
    assert (SOONEST, LATEST) == (1.0, 5.0)
