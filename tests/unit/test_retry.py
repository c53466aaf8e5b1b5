"""Which failures may be tried again elsewhere, and how many of them."""

from __future__ import annotations

import pytest

from citadel_gateway.policy.circuit_breaker import Verdict
from citadel_gateway.policy.retry import Judgement, Retry, RetryBudget, judge_status

GOOD, BAD, NO_OPINION = Verdict.GOOD, Verdict.BAD, Verdict.NO_OPINION


@pytest.mark.parametrize(
    ("status", "retry", "verdict"),
    [
        (400, Retry.NEVER, NO_OPINION),
        (401, Retry.SAFE, NO_OPINION),
        (403, Retry.SAFE, NO_OPINION),
        (404, Retry.SAFE, NO_OPINION),
        (408, Retry.SAFE, NO_OPINION),
        (409, Retry.NEVER, NO_OPINION),
        (413, Retry.NEVER, NO_OPINION),
        (415, Retry.NEVER, NO_OPINION),
        (422, Retry.NEVER, NO_OPINION),
        (429, Retry.SAFE, NO_OPINION),
        (500, Retry.AMBIGUOUS, BAD),
        (502, Retry.AMBIGUOUS, BAD),
        (503, Retry.SAFE, BAD),
        (504, Retry.AMBIGUOUS, BAD),
        (599, Retry.AMBIGUOUS, BAD),
    ],
    ids=str,
)
def test_a_status_is_judged_about_the_upstream(status: int, retry: Retry, verdict: Verdict) -> None:
    assert judge_status(status, has_retry_after=False) == Judgement(retry, verdict)


def test_a_503_that_says_when_to_come_back_does_not_count_against_the_endpoint() -> None:
    assert judge_status(503, has_retry_after=True) == Judgement(Retry.SAFE, NO_OPINION)


def withdrawn(budget: RetryBudget, now: float, tries: int = 1000) -> int:
    return sum(budget.withdraw(now) for _ in range(tries))


def test_retries_are_a_fifth_of_the_requests_and_three_a_second() -> None:
    budget = RetryBudget(ratio=0.2, floor=3.0)
    for _ in range(1000):
        budget.deposit(5.0)

    assert withdrawn(budget, 5.0) == 200 + 30


def test_without_traffic_only_the_floor_is_left() -> None:
    assert withdrawn(RetryBudget(ratio=0.2, floor=1.0), 100.0) == 10


def test_a_budget_of_nothing_allows_nothing() -> None:
    assert withdrawn(RetryBudget(ratio=0.0, floor=0.0), 1.0) == 0


@pytest.mark.parametrize(("later", "left"), [(9.0, 0), (10.0, 10)], ids=["9 s", "10 s"])
def test_retries_are_forgotten_after_ten_seconds(later: float, left: int) -> None:
    budget = RetryBudget(ratio=0.0, floor=1.0)
    withdrawn(budget, 1000.0)

    assert withdrawn(budget, 1000.0 + later) == left


@pytest.mark.parametrize(("later", "left"), [(9.0, 20), (10.0, 0)], ids=["9 s", "10 s"])
def test_requests_are_forgotten_after_ten_seconds(later: float, left: int) -> None:
    budget = RetryBudget(ratio=0.2, floor=0.0)
    for _ in range(100):
        budget.deposit(1000.0)

    assert withdrawn(budget, 1000.0 + later) == left


def test_a_long_silence_forgets_everything() -> None:
    budget = RetryBudget(ratio=1.0, floor=0.0)
    for second in range(10):
        budget.deposit(float(second))

    assert withdrawn(budget, 1e6) == 0
