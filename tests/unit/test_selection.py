"""Who gets the next request, counted."""

from __future__ import annotations

import random
from collections import Counter
from math import gcd

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from citadel_gateway.policy.circuit_breaker import BreakerPolicy, CircuitBreaker
from citadel_gateway.policy.drawing import Urn
from citadel_gateway.policy.endpoint import Endpoint
from citadel_gateway.policy.health_tracker import HealthTracker
from citadel_gateway.policy.picker import Picker
from citadel_gateway.policy.selection import Share, evenly, make_picker, share_by_cost

steady = settings(deadline=None, derandomize=True)

ALGORITHMS = [
    "round_robin",
    "weighted_round_robin",
    "random",
    "least_connections",
    "power_of_two",
    "least_latency",
    "cost",
    "consistent_hash",
    "session_affinity",
]


def endpoint(
    name: str, *, weight: float = 1.0, cost: float | None = None, in_flight: int = 0
) -> Endpoint:
    breaker = CircuitBreaker(BreakerPolicy(), lambda: 0.5)
    tracker = HealthTracker(healthy=True)
    return Endpoint(name, name, weight, 100, cost, breaker, tracker, in_flight=in_flight)


def in_line(algorithm: str, endpoints: list[Endpoint], share: Share = evenly) -> Picker:
    picker = make_picker(algorithm, random.Random(1), share)
    for i, one in enumerate(endpoints):
        picker.join(one, i / len(endpoints))
    return picker


def take(picker: Picker) -> Endpoint:
    picked = picker.pick((), lambda _: True)
    assert picked is not None
    return picked


def picks(algorithm: str, endpoints: list[Endpoint], count: int) -> list[str]:
    picker = in_line(algorithm, endpoints)
    return [take(picker).url for _ in range(count)]


def test_round_robin_takes_turns() -> None:
    endpoints = [endpoint(n, weight=w) for n, w in (("a", 1.0), ("b", 5.0), ("c", 2.0))]

    assert picks("round_robin", endpoints, 7) == ["a", "b", "c", "a", "b", "c", "a"]


def test_weighted_turns_are_spread_and_not_bunched() -> None:
    endpoints = [endpoint("a", weight=5), endpoint("b"), endpoint("c")]

    assert picks("weighted_round_robin", endpoints, 7) == ["a", "a", "b", "a", "c", "a", "a"]


@steady
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 3))
def test_weighted_turns_are_exact_in_every_period(weights: list[int], scale: int) -> None:
    endpoints = [endpoint(str(i), weight=w * scale / 4) for i, w in enumerate(weights)]
    divisor = gcd(*weights)
    period = sum(weights) // divisor
    expected = {str(i): w // divisor for i, w in enumerate(weights)}

    turns = picks("weighted_round_robin", endpoints, 3 * period)

    for start in (0, period, 2 * period):
        assert Counter(turns[start : start + period]) == expected


def test_shares_change_the_turns() -> None:
    a, b = endpoint("a"), endpoint("b")
    picker = in_line("round_robin", [a, b], lambda e: 0.25 if e is a else 1.0)

    turns = Counter(take(picker).url for _ in range(50))

    assert turns == {"a": 10, "b": 40}


def test_an_endpoint_that_was_away_does_not_get_its_missed_turns_back() -> None:
    a, b = endpoint("a"), endpoint("b")
    picker = in_line("round_robin", [a, b])
    picker.leave(b)
    for _ in range(1000):
        take(picker)
    picker.join(b)

    assert Counter(take(picker).url for _ in range(10)) == {"a": 5, "b": 5}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_only_candidate_is_picked(algorithm: str) -> None:
    assert picks(algorithm, [endpoint("a")], 3) == ["a", "a", "a"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_equals_all_get_their_turn(algorithm: str) -> None:
    turns = picks(algorithm, [endpoint(n) for n in "abc"], 300)

    assert set(turns) == {"a", "b", "c"}


@pytest.mark.parametrize("algorithm", ["least_connections", "power_of_two", "cost"])
def test_of_two_the_less_loaded_is_picked(algorithm: str) -> None:
    assert picks(algorithm, [endpoint("a", in_flight=3), endpoint("b", in_flight=2)], 2) == [
        "b",
        "b",
    ]


def test_load_is_measured_against_weight() -> None:
    big, small = endpoint("big", weight=4, in_flight=6), endpoint("small", in_flight=1)

    assert picks("least_connections", [small, big], 1) == ["big"]


def test_random_follows_the_weights() -> None:
    turns = Counter(picks("random", [endpoint("a", weight=3), endpoint("b")], 4000))

    assert turns["a"] == pytest.approx(3000, abs=100)


def test_chances_stay_exact_while_endpoints_leave_return_and_are_forgotten() -> None:
    urn, rng = Urn(random.Random(1), lambda e: e.weight), random.Random(2)
    endpoints = [endpoint(str(i), weight=1 + i) for i in range(9)]
    inside: set[Endpoint] = set()
    for _ in range(500):
        one = rng.choice(endpoints)
        if rng.random() < 0.5:
            urn.put(one)
            inside.add(one)
        else:
            rng.choice([urn.take, urn.forget])(one)
            inside.discard(one)
        drawn_now = urn.draw()
        assert drawn_now in inside if inside else drawn_now is None
    for one in endpoints:
        urn.put(one)

    drawn = Counter(urn.draw() for _ in range(9000))

    assert drawn == pytest.approx({e: 200 * e.weight for e in endpoints}, rel=0.15)


def test_cost_decides_before_load() -> None:
    cheap, dear = endpoint("cheap", cost=0.1, in_flight=9), endpoint("dear", cost=1.0)

    assert picks("cost", [dear, cheap], 2) == ["cheap", "cheap"]


def test_the_faster_one_is_picked_until_its_load_makes_up_for_it() -> None:
    fast, slow = endpoint("fast"), endpoint("slow")
    fast.latency.observe(1.0, 0.0)
    slow.latency.observe(3.0, 0.0)
    picker, turns = in_line("least_latency", [slow, fast]), []
    for _ in range(6):
        turns.append(take(picker))
        turns[-1].in_flight += 1

    assert [e.url for e in turns] == ["fast", "fast", "slow", "fast", "fast", "fast"]


def test_an_unknown_endpoint_is_tried_by_one_request_and_not_by_all() -> None:
    known, unknown = endpoint("known"), endpoint("unknown")
    known.latency.observe(1.0, 0.0)
    picker, turns = in_line("least_latency", [known, unknown]), []
    for _ in range(4):
        turns.append(take(picker))
        turns[-1].in_flight += 1

    assert [e.url for e in turns] == ["unknown", "known", "known", "known"]


def test_a_hundredth_of_the_price_earns_ten_times_the_share() -> None:
    cheap, dear, free = endpoint("a", cost=0.01), endpoint("b", cost=1.0), endpoint("c")

    share = share_by_cost([0.01, 1.0, None])

    assert [share(e) for e in (cheap, dear, free)] == [1.0, pytest.approx(0.1), 1.0]


def test_without_prices_all_have_the_same_share() -> None:
    assert share_by_cost([None, 0.0]) is evenly


def test_an_unknown_algorithm_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown algorithm 'best'"):
        make_picker("best", random.Random(1))
