"""Classes, those who come back, and who has to go when there is no room."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from citadel_gateway.policy.line import Line
from citadel_gateway.policy.priority import Party
from citadel_gateway.policy.ticket import Ticket
from citadel_gateway.policy.virtual_tokens import Counters

HIGH, MIDDLE, LOW = 0, 2, 3
_serials = iter(range(10**9))


def push(line: Line, tenant: str, rank: int = MIDDLE, *, returning: bool = False) -> Ticket:
    ticket = Ticket("m", "g", lambda now: None, Party(tenant, 1.0, rank), prompt=10)
    ticket.serial, ticket.returning = next(_serials), returning
    line.push(ticket, None if returning else Counters().join(ticket.party))
    return ticket


def serve(line: Line) -> Ticket:
    ticket = line.first()
    line.serve(ticket)
    return ticket


def test_higher_classes_go_first_whenever_they_came() -> None:
    line = Line("m", 0.0)
    pushed = {rank: push(line, "a", rank) for rank in (LOW, MIDDLE, HIGH)}

    assert [serve(line) for _ in range(3)] == [pushed[HIGH], pushed[MIDDLE], pushed[LOW]]
    assert line.depth == 0


def test_of_the_turns_that_pass_over_lower_classes_those_get_their_share() -> None:
    line, turns = Line("m", 0.1), Counter[int]()
    for rank in (HIGH, MIDDLE, LOW):
        push(line, "a", rank)
    for _ in range(1100):
        rank = serve(line).party.rank
        turns[rank] += 1
        push(line, "a", rank)

    assert turns[HIGH] == pytest.approx(1000, abs=5)
    assert turns[MIDDLE] == pytest.approx(50, abs=5)
    assert turns[LOW] == pytest.approx(50, abs=5)


def test_without_a_share_lower_classes_wait_for_ever() -> None:
    line = Line("m", 0.0)
    push(line, "a", LOW)
    for _ in range(1000):
        push(line, "a", HIGH)
        assert serve(line).party.rank == HIGH


def test_a_turn_that_is_owed_is_not_saved_up() -> None:
    line = Line("m", 0.5)
    for _ in range(2):
        push(line, "a", LOW)
    for _ in range(20):
        push(line, "a", HIGH)
    gone = line.first()
    ranks = [serve(line).party.rank for _ in range(5)]

    assert gone.party.rank == HIGH
    assert ranks == [HIGH, HIGH, LOW, HIGH, HIGH]


def test_who_had_a_slot_goes_ahead_within_its_class_oldest_first() -> None:
    line = Line("m", 0.0)
    new = push(line, "a")
    old = [push(line, "a", returning=True) for _ in range(3)]
    urgent = push(line, "a", HIGH)
    line.remove(old[1])

    assert [serve(line) for _ in range(4)] == [urgent, old[0], old[2], new]


def test_those_who_come_back_and_leave_again_leave_nothing_behind() -> None:
    line = Line("m", 0.0)
    first = push(line, "a", returning=True)
    for _ in range(5000):
        line.remove(push(line, "a", returning=True))

    assert line.first() is first
    assert len(line._lanes[MIDDLE].returning._heap) < 100


def test_a_full_line_makes_room_first_by_class_and_then_by_number() -> None:
    line = Line("m", 0.0)
    push(line, "few")
    many = [push(line, "many") for _ in range(3)]
    low = [push(line, "low", LOW) for _ in range(2)]

    assert line.newest_unfair(Party("anybody", 1.0, HIGH)) is low[-1]
    assert line.newest_unfair(Party("few", 1.0, LOW)) is low[-1]
    assert line.newest_unfair(Party("low", 1.0, LOW)) is None
    for each in low:
        line.remove(each)
    assert line.newest_unfair(Party("new")) is many[-1]
    assert line.newest_unfair(Party("few")) is many[-1]
    assert line.newest_unfair(Party("many")) is None
    line.remove(many[-1])
    assert line.newest_unfair(Party("few")) is None  # it would only be the other way round
    assert line.newest_unfair(Party("new", 1.0, LOW)) is None


def test_who_comes_back_is_never_turned_out() -> None:
    line = Line("m", 0.0)
    for _ in range(3):
        push(line, "many", LOW, returning=True)

    assert line.newest_unfair(Party("new", 1.0, HIGH)) is None


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_places_are_about_what_they_turn_out_to_be(share: float) -> None:
    rng = random.Random(2)
    for _ in range(300):
        line = Line("m", share)
        for _ in range(rng.randint(0, 40)):
            push(line, rng.choice("aaaabc"), rng.choice([HIGH, MIDDLE, LOW]))
        party = Party(rng.choice("abcd"), 1.0, rng.choice([HIGH, MIDDLE, LOW]))
        expected = line.places_to(party)
        mine = push(line, str(party.tenant), party.rank)
        turns = 1
        while serve(line) is not mine:
            turns += 1

        slack = 4 if not share else 4 + 0.25 * turns
        assert abs(expected - turns) <= slack
