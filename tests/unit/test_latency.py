"""Trouble is seen at once and forgiven slowly."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from citadel_gateway.policy.latency import PeakEwma

steady = settings(deadline=None, derandomize=True)


def test_an_unknown_endpoint_has_no_latency() -> None:
    assert PeakEwma().value == 0.0


def test_the_first_observation_counts_whole() -> None:
    ewma = PeakEwma()
    ewma.observe(0.25, 100.0)

    assert ewma.value == 0.25


def test_a_slower_answer_counts_at_once() -> None:
    ewma = PeakEwma()
    ewma.observe(0.1, 0.0)
    ewma.observe(5.0, 0.1)

    assert ewma.value == 5.0


def test_a_faster_answer_pulls_it_down_by_the_time_that_has_passed() -> None:
    ewma = PeakEwma(tau=10.0)
    ewma.observe(5.0, 0.0)
    ewma.observe(1.0, 10.0)

    assert ewma.value == pytest.approx(1.0 + 4.0 / math.e)


def test_many_fast_answers_at_one_moment_forgive_nothing() -> None:
    ewma = PeakEwma()
    ewma.observe(5.0, 0.0)
    for _ in range(1000):
        ewma.observe(0.1, 0.0)

    assert ewma.value == 5.0


@steady
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1))
def test_it_lies_between_the_last_answer_and_the_slowest(
    answers: list[tuple[float, float]],
) -> None:
    ewma, now = PeakEwma(), 0.0
    for latency, pause in answers:
        now += pause
        ewma.observe(latency, now)

    slowest = max(latency for latency, _ in answers)
    assert answers[-1][0] <= ewma.value * (1 + 1e-9) + 1e-9
    assert ewma.value <= slowest * (1 + 1e-9)


def test_who_was_not_waited_for_was_at_least_so_slow() -> None:
    ewma = PeakEwma()
    ewma.observe(1.0, 0.0)

    ewma.at_least(0.5, 1.0)
    assert ewma.value == 1.0
    ewma.at_least(2.0, 1.0)
    assert ewma.value == 2.0
