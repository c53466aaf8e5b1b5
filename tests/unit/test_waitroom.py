"""Who is served, who waits, and that nothing is ever lost or given twice."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from citadel_gateway.policy.circuit_breaker import (
    BreakerPolicy,
    CircuitBreaker,
    State,
    Transition,
    Verdict,
)
from citadel_gateway.policy.endpoint import Endpoint, Slot
from citadel_gateway.policy.health_tracker import HealthTracker
from citadel_gateway.policy.priority import NEWCOMER, Party
from citadel_gateway.policy.waitroom import (
    Choice,
    Displaced,
    Full,
    Nobody,
    Ticket,
    Waitroom,
)

GOOD, BAD, NO_OPINION = Verdict.GOOD, Verdict.BAD, Verdict.NO_OPINION


def endpoint(name: str = "a", room: int = 1, threshold: int = 5) -> Endpoint:
    breaker = CircuitBreaker(BreakerPolicy(threshold=threshold), lambda: 0.5)
    return Endpoint(name, f"http://{name}", 1.0, room, None, breaker, HealthTracker(healthy=True))


def choose(endpoints: Iterable[Endpoint], now: float) -> Choice:
    available = [e for e in endpoints if e.is_available(now)]
    free = [e for e in available if e.has_room()]
    if free:
        return free[0]
    return None if available else Nobody(1.0)


def ticket(
    *endpoints: Endpoint,
    queue: str = "m",
    party: Party = NEWCOMER,
    prompt: int = 0,
    deadline: float = math.inf,
) -> Ticket:
    group = tuple(e.url for e in endpoints)
    return Ticket(queue, group, partial(choose, endpoints), party, prompt=prompt, deadline=deadline)


def enter(room: Waitroom, *tickets: Ticket) -> None:
    for each in tickets:
        room.enter(each, 0.0)


def where(one: Ticket) -> str | None:
    return one.outcome.endpoint.model if isinstance(one.outcome, Slot) else None


def test_a_seat_and_a_slot_are_taken_together_and_given_back_together() -> None:
    room, a = Waitroom(seats=2, room=2), endpoint()
    one = ticket(a)

    enter(room, one)
    assert (where(one), room.taken, a.in_flight) == ("a", 1, 1)

    room.leave(one, GOOD, 1.0)
    assert (room.taken, a.in_flight) == (0, 0)


def test_those_who_wait_are_served_in_order_of_arrival() -> None:
    room, a = Waitroom(9, 9), endpoint()
    tickets = [ticket(a) for _ in range(4)]
    enter(room, *tickets)

    served = []
    for leaving in tickets:
        room.leave(leaving, GOOD, 1.0)
        served += room.pump(1.0)

    assert served == tickets[1:]


def test_a_full_model_does_not_block_a_free_one() -> None:
    room, a, b = Waitroom(9, 9), endpoint("a"), endpoint("b")
    enter(room, ticket(a), ticket(a))
    late = ticket(b)

    enter(room, late)

    assert where(late) == "b"


def test_of_several_groups_the_oldest_that_can_be_placed_goes_first() -> None:
    room, a, b = Waitroom(2, 9), endpoint("a"), endpoint("b")
    first, second = ticket(a), ticket(b)
    for_a, for_either, for_b = ticket(a), ticket(a, b), ticket(b)
    enter(room, first, second, for_a, for_either, for_b)

    room.leave(second, GOOD, 1.0)

    assert room.pump(1.0) == [for_either]
    assert where(for_either) == "b"


def test_whoever_comes_when_somebody_of_the_group_waits_queues_behind() -> None:
    room, a = Waitroom(9, 9), endpoint()
    holder, waiting, late = ticket(a), ticket(a), ticket(a)
    enter(room, holder, waiting)
    room.leave(holder, GOOD, 1.0)

    enter(room, late)

    assert late.outcome is None
    assert room.pump(1.0) == [waiting]


def test_without_a_seat_everybody_waits_even_for_a_free_endpoint() -> None:
    room, a, b = Waitroom(1, 9), endpoint("a"), endpoint("b")
    one, two = ticket(a), ticket(b)
    enter(room, one, two)
    assert two.outcome is None
    assert room.pump(0.0) == []

    room.leave(one, GOOD, 1.0)

    assert room.pump(1.0) == [two]


def test_a_full_queue_turns_away_and_keeps_no_trace() -> None:
    room, a = Waitroom(9, 1), endpoint()
    holder, waiting, refused = ticket(a), ticket(a), ticket(a)
    enter(room, holder, waiting)

    with pytest.raises(Full):
        room.enter(refused, 0.0)
    room.leave(refused, NO_OPINION, 0.0)

    assert room.depth("m") == 1


def test_each_model_has_a_queue_of_its_own() -> None:
    room, a, b = Waitroom(9, 1), endpoint("a"), endpoint("b")
    enter(room, ticket(a), ticket(b), ticket(a, queue="x"), ticket(b, queue="y"))

    assert (room.depth("x"), room.depth("y"), room.depth("m")) == (1, 1, 0)


def test_who_leaves_while_waiting_holds_nobody_up() -> None:
    room, a = Waitroom(9, 9), endpoint()
    holder, impatient, patient = ticket(a), ticket(a), ticket(a)
    enter(room, holder, impatient, patient)

    room.leave(impatient, NO_OPINION, 1.0)
    room.leave(holder, GOOD, 1.0)

    assert room.pump(1.0) == [patient]
    assert room.depth("m") == 0


def test_leaving_twice_gives_back_once() -> None:
    room, a = Waitroom(2, 2), endpoint(room=2)
    one, other = ticket(a), ticket(a)
    enter(room, one, other)

    for _ in range(3):
        room.leave(one, GOOD, 1.0)

    assert (room.taken, a.in_flight) == (1, 1)


def test_nobody_there_is_told_at_once_and_takes_no_seat() -> None:
    room, a = Waitroom(2, 2), endpoint()
    a.health.healthy = False
    one = ticket(a)

    enter(room, one)

    assert one.outcome == Nobody(1.0)
    assert room.taken == 0
    room.leave(one, NO_OPINION, 0.0)
    assert (room.taken, a.in_flight) == (0, 0)


def test_those_who_wait_for_an_endpoint_that_went_down_are_told() -> None:
    room, a = Waitroom(9, 9), endpoint()
    waiting = [ticket(a), ticket(a)]
    enter(room, ticket(a), *waiting)
    a.health.healthy = False

    assert room.pump(1.0) == waiting
    assert [w.outcome for w in waiting] == [Nobody(1.0)] * 2


def test_moving_takes_the_other_endpoint_and_keeps_the_seat() -> None:
    room, a, b = Waitroom(1, 9), endpoint("a", threshold=1), endpoint("b")
    one = ticket(a, b)
    enter(room, one)

    transition = room.move(one, BAD, 1.0)

    assert transition == Transition(State.CLOSED, State.OPEN, "consecutive failures")
    assert (where(one), room.taken, a.in_flight, b.in_flight) == ("b", 1, 0, 1)


def test_who_failed_over_keeps_its_age_among_those_who_wait() -> None:
    room, a, b = Waitroom(9, 9), endpoint("a", room=3), endpoint("b")
    first, second, third = (ticket(a) for _ in range(3))
    holder, late = ticket(b), ticket(b)
    enter(room, first, second, third, holder, late)

    for one in (third, first, second):  # each may go to b only, from now on
        one.group, one.choose = late.group, late.choose
        room.move(one, NO_OPINION, 1.0)
    served = []
    for one in (holder, first, second, third):
        room.leave(one, GOOD, 1.0)
        served += room.pump(1.0)

    assert served == [first, second, third, late]


def test_an_endpoint_that_refuses_after_all_costs_no_seat() -> None:
    room, a = Waitroom(1, 9), endpoint(threshold=1)
    enter(room, one := ticket(a))
    room.leave(one, BAD, 0.0)

    with pytest.raises(RuntimeError):
        room.enter(Ticket("m", "g", lambda _: a), 1.0)

    assert (room.taken, a.in_flight) == (0, 0)


class AnyOrder(RuleBasedStateMachine):
    """Entering, failing over, leaving and pumping in any order, against plain counting."""

    SEATS, ROOM = 3, 3

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.room = Waitroom(self.SEATS, self.ROOM)
        self.endpoints = [endpoint("a", 1, 2), endpoint("b", 2, 2)]
        self.tickets: list[Ticket] = []

    @rule(
        which=st.sampled_from([(0,), (1,), (0, 1)]),
        tenant=st.sampled_from("xyz"),
        weight=st.sampled_from([1.0, 3.0]),
        rank=st.sampled_from([1, 2, 3]),
        prompt=st.sampled_from([1, 100]),
    )
    def enter(
        self, which: tuple[int, ...], tenant: str, weight: float, rank: int, prompt: int
    ) -> None:
        group = tuple(self.endpoints[i] for i in which)
        new = ticket(*group, queue=str(which), party=Party(tenant, weight, rank), prompt=prompt)
        waiting = self.waiting()
        try:
            self.room.enter(new, self.now)
        except Full:
            self.room.leave(new, NO_OPINION, self.now)
            assert len([t for t in waiting if t.group == new.group]) >= self.ROOM
        else:
            self.tickets.append(new)
        self.pump()

    @rule(pick=st.integers(0, 9), verdict=st.sampled_from(Verdict))
    def leave(self, pick: int, verdict: Verdict) -> None:
        if self.tickets:
            gone = self.tickets.pop(pick % len(self.tickets))
            gone.settle(7, 50)
            self.room.leave(gone, verdict, self.now)
            self.room.leave(gone, verdict, self.now)
            self.pump()

    @rule(pick=st.integers(0, 9), verdict=st.sampled_from(Verdict))
    def move(self, pick: int, verdict: Verdict) -> None:
        placed = [t for t in self.tickets if t.outcome is not None]
        if placed:
            moving = placed[pick % len(placed)]
            try:
                self.room.move(moving, verdict, self.now)
            except Full:
                assert not moving.returning
                self.tickets.remove(moving)
                self.room.leave(moving, verdict, self.now)
            self.pump()

    @rule()
    def pump(self) -> None:
        waiting = [t for t in self.waiting() if not t.returning]
        called = self.room.pump(self.now)
        assert len(set(called)) == len(called)
        assert all(t in self.tickets and t.outcome is not None for t in called)
        placed = [t for t in called if t in waiting and not isinstance(t.outcome, Displaced)]
        for kind in {(t.group, t.party) for t in placed}:
            served = [t.serial for t in placed if (t.group, t.party) == kind]
            oldest = sorted(t.serial for t in waiting if (t.group, t.party) == kind)
            assert served == oldest[: len(served)], "a tenant's first come is first served"
        for each in called:
            if isinstance(each.outcome, Displaced):
                self.tickets.remove(each)
        for each in self.waiting():
            takes = choose(self.endpoints_of(each), self.now)
            assert self.room.taken == self.SEATS or takes is None, "waits for nothing"

    @rule(seconds=st.sampled_from([0.1, 1.0, 70.0]), index=st.integers(0, 1))
    def time_passes_and_health_flips(self, seconds: float, index: int) -> None:
        self.now += seconds
        health = self.endpoints[index].health
        health.healthy = not health.healthy
        self.pump()

    def waiting(self) -> list[Ticket]:
        return [t for t in self.tickets if t.outcome is None]

    def endpoints_of(self, one: Ticket) -> list[Endpoint]:
        return [e for e in self.endpoints if e.url in str(one.group)]

    @invariant()
    def nothing_is_exceeded_or_lost(self) -> None:
        slots = [t.outcome for t in self.tickets if isinstance(t.outcome, Slot)]
        assert self.room.taken == len(slots) <= self.SEATS
        for each in self.endpoints:
            held = sum(slot.endpoint is each for slot in slots)
            assert each.in_flight == held <= each.max_concurrent
        for queue in {t.queue for t in self.tickets}:
            mine = [t for t in self.waiting() if t.queue == queue]
            assert self.room.depth(queue) == len(mine)
            assert sum(not t.returning for t in mine) <= self.ROOM
            for rank in range(4):
                depth = sum(t.party.rank == rank for t in mine)
                assert self.room.depth(queue, rank) == depth

    def teardown(self) -> None:
        for each in self.tickets:
            self.room.leave(each, NO_OPINION, self.now)
            self.room.pump(self.now)
        assert self.room.taken == 0
        assert [e.in_flight for e in self.endpoints] == [0, 0]
        assert not self.room.is_anybody_waiting()
        assert {account.waiting for account in self.room._house._accounts.values()} <= {0}


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(deadline=None, derandomize=True, max_examples=120)
