"""What an endpoint can take, and that a slot tells the breaker exactly once."""

from __future__ import annotations

import pytest

from citadel_gateway.policy.circuit_breaker import (
    BreakerPolicy,
    CircuitBreaker,
    State,
    Transition,
    Verdict,
)
from citadel_gateway.policy.endpoint import Endpoint, Slot
from citadel_gateway.policy.health_tracker import HealthTracker


def endpoint(*, healthy: bool = True, threshold: int = 1) -> Endpoint:
    breaker = CircuitBreaker(BreakerPolicy(threshold=threshold), lambda: 0.5)
    return Endpoint("m", "http://m", 1.0, 2, None, breaker, HealthTracker(healthy=healthy))


def fail(one: Endpoint, now: float) -> Transition | None:
    return Slot.take(one, now).close(Verdict.BAD, now)


def test_it_is_available_while_healthy_warm_and_closed() -> None:
    one = endpoint()

    assert one.is_available(0.0)
    assert one.available_in(0.0) == 0.0


def test_an_unhealthy_one_is_not_available() -> None:
    assert not endpoint(healthy=False).is_available(0.0)


def test_it_cools_down_for_as_long_as_it_asked() -> None:
    one = endpoint()
    one.cool_down(5.0, now=10.0)

    assert not one.is_available(14.9)
    assert one.available_in(12.0) == 3.0
    assert one.is_available(15.0)


def test_a_shorter_cool_down_does_not_cut_a_longer_one() -> None:
    one = endpoint()
    one.cool_down(5.0, now=0.0)
    one.cool_down(1.0, now=1.0)

    assert one.cooling_until == 5.0


def test_a_tripped_one_is_available_when_its_rest_is_over() -> None:
    one = endpoint()
    fail(one, 0.0)

    assert not one.is_available(59.0)
    assert one.available_in(20.0) == 40.0
    assert one.is_available(60.0)


def test_while_a_probe_is_out_it_may_be_available_in_a_second() -> None:
    one = endpoint()
    fail(one, 0.0)
    Slot.take(one, 60.0)

    assert not one.is_available(60.0)
    assert one.available_in(60.0) == 1.0


def test_it_has_room_up_to_its_limit() -> None:
    one = endpoint()
    first = Slot.take(one, 0.0)
    Slot.take(one, 0.0)
    assert not one.has_room()

    first.close(Verdict.GOOD, 1.0)
    assert one.has_room()


def test_closing_a_slot_again_says_nothing_more() -> None:
    one = endpoint()
    slot = Slot.take(one, 0.0)

    assert slot.close(Verdict.BAD, 1.0) == Transition(
        State.CLOSED, State.OPEN, "consecutive failures"
    )
    assert slot.close(Verdict.BAD, 2.0) is None
    assert one.in_flight == 0


def test_a_slot_on_an_endpoint_that_rests_is_a_mistake_and_leaves_nothing_behind() -> None:
    one = endpoint()
    fail(one, 0.0)

    with pytest.raises(RuntimeError, match="does not admit requests"):
        Slot.take(one, 1.0)
    assert one.in_flight == 0
