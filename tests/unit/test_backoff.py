"""Pauses between attempts: when there is one, and how long it may be."""

from __future__ import annotations

import random

import pytest

from citadel_gateway.policy.backoff import is_worth_waiting, pause


def most() -> float:
    return 1.0


def test_another_endpoint_is_asked_at_once_the_first_time() -> None:
    assert pause(1, 30.0, most, same=False) == 0.0


@pytest.mark.parametrize(
    ("attempts", "same", "bound"),
    [(1, True, 0.05), (2, False, 0.1), (2, True, 0.1), (3, False, 0.2), (6, True, 1.6),
     (7, False, 2.0), (5000, True, 2.0)],
)  # fmt: skip
def test_the_bound_doubles_up_to_two_seconds(attempts: int, same: bool, bound: float) -> None:
    assert pause(attempts, 1000.0, most, same=same) == pytest.approx(bound)


def test_jitter_is_full() -> None:
    """From nothing to the bound, each length as likely as any other."""
    rng = random.Random(7)
    drawn = sorted(pause(3, 30.0, rng.random, same=False) for _ in range(1000))

    assert drawn[0] < 0.002
    assert drawn[-1] > 0.198
    assert drawn[500] == pytest.approx(0.1, abs=0.01)


def test_it_ends_before_the_request_does() -> None:
    assert pause(3, 0.03, most, same=False) == pytest.approx(0.03)
    assert pause(3, -1.0, most, same=False) == 0.0


@pytest.mark.parametrize(
    ("rest", "left", "worth"),
    [(2.0, 30.0, True), (30.0, 30.0, False), (31.0, 30.0, False), (59.0, 600.0, True),
     (60.0, 600.0, False)],
)  # fmt: skip
def test_a_rest_is_waited_for_if_it_ends_in_time_and_within_a_minute(
    rest: float, left: float, worth: bool
) -> None:
    assert is_worth_waiting(rest, left) is worth
