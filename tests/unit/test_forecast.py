"""What is predicted, and that it comes true."""

from __future__ import annotations

import pytest

from citadel_gateway.policy.forecast import Forecast, Full, Refused, TooLong
from citadel_gateway.policy.line import Line
from citadel_gateway.policy.pace import Pace
from citadel_gateway.policy.priority import Party
from citadel_gateway.policy.ticket import Ticket
from citadel_gateway.policy.virtual_tokens import Counters

A, B = Party("a"), Party("b")


def waiting(count: int, party: Party = A) -> Line:
    line = Line("m", 0.1)
    for serial in range(count):
        ticket = Ticket("m", "g", lambda now: None, party)
        ticket.serial = serial
        line.push(ticket, Counters().join(party))
    return line


def forecast(*, room: int, busy: int, seconds: float, count: int = 40) -> Forecast:
    """One of a queue in which *busy* slots are held for so many *seconds* each."""
    made = Forecast(room)
    pace = made.pace("m")
    pace.busy = busy + count
    for _ in range(count):
        pace.ended(seconds)
    return made


def test_the_rate_is_that_of_littles_law() -> None:
    assert forecast(room=9, busy=4, seconds=2.0).pace("m").interval() == pytest.approx(0.5)


def test_the_latest_service_times_count() -> None:
    made = forecast(room=9, busy=1, seconds=1.0)
    for _ in range(100):
        made.pace("m").busy += 1
        made.pace("m").ended(3.0)

    assert made.pace("m").interval() == pytest.approx(3.0, rel=0.05)


def test_from_a_few_or_of_an_idle_queue_nothing_is_predicted() -> None:
    assert forecast(room=9, busy=1, seconds=9.0, count=4).pace("m").interval() is None
    assert forecast(room=9, busy=0, seconds=9.0).pace("m").interval() is None
    assert Pace().interval() is None

    made = forecast(room=9, busy=1, seconds=99.0, count=4)
    assert made.refusal(waiting(5), A, 1.0) is None
    assert made.again(waiting(5), A, 1.0) == 1.0


def test_the_wait_is_from_the_tenants_place_not_from_the_end_of_the_line() -> None:
    made, line = forecast(room=999, busy=4, seconds=2.0), waiting(100)

    assert made.wait(line, A) == pytest.approx(100.5 * 0.5)
    assert made.wait(line, B) == pytest.approx(1.5 * 0.5)
    assert made.wait(Line("m", 0.1), A) == pytest.approx(0.25)


def test_who_would_wait_too_long_is_refused_until_its_turn_is_near_enough() -> None:
    made, line = forecast(room=999, busy=4, seconds=2.0), waiting(100)

    refused = made.refusal(line, A, 10.0)

    assert isinstance(refused, TooLong)
    assert (refused.wait, refused.retry_after) == pytest.approx((50.25, 40.5))
    assert made.refusal(line, B, 10.0) is None
    assert made.refusal(waiting(19), A, 10.0) is None
    assert isinstance(made.refusal(waiting(20), A, 10.0), TooLong)


def test_one_slot_that_is_held_for_longer_than_somebody_can_wait_may_yet_be_free_in_time() -> None:
    made = forecast(room=9, busy=1, seconds=12.0)
    assert made.refusal(Line("m", 0.1), A, 10.0) is None  # more likely than not
    assert isinstance(made.refusal(Line("m", 0.1), A, 5.0), TooLong)


@pytest.mark.parametrize(("busy", "expected"), [(4, 1.0), (1, 2.0)])
def test_a_full_line_says_when_there_is_a_place(busy: int, expected: float) -> None:
    made = forecast(room=3, busy=busy, seconds=2.0)

    refused = made.refusal(waiting(3), A, 100.0)

    assert isinstance(refused, Full)
    assert refused.retry_after == pytest.approx(expected)


def test_nobody_is_told_to_come_again_in_less_than_a_second_or_more_than_a_minute() -> None:
    assert _full(seconds=0.01).retry_after == 1.0
    assert _full(seconds=1e4).retry_after == 60.0


def _full(*, seconds: float) -> Refused:
    refused = forecast(room=3, busy=1, seconds=seconds).refusal(waiting(3), A, 1e9)
    assert refused is not None
    return refused
