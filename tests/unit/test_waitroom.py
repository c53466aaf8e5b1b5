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
    TooLong,
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


def test_who_steps_out_holds_nothing_and_comes_back_at_its_age() -> None:
    room, a = Waitroom(1, 9), endpoint()
    one, late = ticket(a), ticket(a)
    enter(room, one, late)

    room.step_out(one, NO_OPINION, 1.0)
    assert (one.outcome, room.taken, a.in_flight, room.depth("m")) == (None, 0, 0, 1)
    assert room.pump(1.0) == [late]
    enter(room, later := ticket(a))
    room.come_back(one, 2.0)
    room.leave(late, GOOD, 2.0)

    assert room.pump(2.0) == [one]
    room.leave(one, GOOD, 3.0)
    assert room.pump(3.0) == [later]


def test_who_comes_back_to_a_free_endpoint_has_it_at_once() -> None:
    room, a = Waitroom(1, 9), endpoint()
    enter(room, one := ticket(a))
    room.step_out(one, NO_OPINION, 1.0)

    room.come_back(one, 2.0)

    assert (where(one), room.taken) == ("a", 1)


@pytest.mark.parametrize("is_back", [False, True], ids=["outside", "in line again"])
def test_who_leaves_after_it_has_lost_its_slot_owes_nothing(is_back: bool) -> None:
    """What is under way counts for its tenant until it ends."""
    room, a = Waitroom(9, 9), endpoint()
    holder, one, other = ticket(a), ticket(a, party=Party("x"), prompt=100), ticket(a)
    enter(room, holder, one, other)
    room.leave(holder, GOOD, 0.5)
    assert room.pump(0.5) == [one]  # its turn, for which it is charged
    account = room._house.of("x")
    assert account is not None
    assert account.under_way > 0

    room.step_out(one, NO_OPINION, 1.0)
    if is_back:
        room.pump(1.0)
        room.come_back(one, 2.0)
        assert one.outcome is None
    room.leave(one, NO_OPINION, 3.0)

    assert account.under_way == 0


def test_an_endpoint_that_refuses_after_all_costs_no_seat() -> None:
    room, a = Waitroom(1, 9), endpoint(threshold=1)
    enter(room, one := ticket(a))
    room.leave(one, BAD, 0.0)

    with pytest.raises(RuntimeError):
        room.enter(Ticket("m", "g", lambda _: a), 1.0)

    assert (room.taken, a.in_flight) == (0, 0)


A, B, C = Party("a"), Party("b"), Party("c")


def work(room: Waitroom, *tickets: Ticket, seconds: float = 1.0) -> None:
    """Let as many requests come and go as a prediction needs."""
    for one in tickets:
        room.enter(one, 0.0)
        room.leave(one, GOOD, seconds)


def drain(room: Waitroom, holder: Ticket, now: float = 1.0) -> list[Ticket]:
    """One leaves after the other; returns those who were placed, in their order."""
    served: list[Ticket] = []
    leaving = [holder]
    while leaving:
        room.leave(leaving.pop(), GOOD, now)
        called = room.pump(now)
        served += called
        leaving += called
    return served


def test_tenants_take_turns_however_many_of_their_requests_wait() -> None:
    room, a = Waitroom(9, 99), endpoint()
    holder = ticket(a)
    flood, light = [ticket(a, party=A) for _ in range(5)], [ticket(a, party=B) for _ in range(2)]
    enter(room, holder, *flood, *light)

    assert drain(room, holder) == [flood[0], light[0], flood[1], light[1], *flood[2:]]


def test_turns_are_paid_in_tokens() -> None:
    room, a = Waitroom(9, 99), endpoint()
    holder = ticket(a)
    long = [ticket(a, party=A, prompt=300) for _ in range(3)]
    short = [ticket(a, party=B, prompt=100) for _ in range(6)]
    enter(room, holder, *long, *short)

    assert drain(room, holder) == [long[0], *short[:3], long[1], *short[3:], long[2]]


def test_a_request_is_charged_what_it_used_in_the_end() -> None:
    room, a = Waitroom(9, 99), endpoint()
    holder = ticket(a)
    wordy = [ticket(a, party=A, prompt=10) for _ in range(3)]
    terse = [ticket(a, party=B, prompt=10) for _ in range(5)]
    enter(room, holder, *wordy, *terse)

    room.leave(holder, GOOD, 1.0)
    assert room.pump(1.0) == [wordy[0]]
    wordy[0].settle(10, 15)  # two for each token of the answer: 40 in all
    assert drain(room, wordy[0]) == [*terse[:4], wordy[1], terse[4], wordy[2]]


def test_an_answer_is_charged_by_what_the_last_ones_took_until_its_length_is_known() -> None:
    room, a = Waitroom(9, 99), endpoint()
    enter(room, holder := ticket(a), *(early := [ticket(a, party=A, prompt=10) for _ in range(3)]))
    room.leave(holder, GOOD, 1.0)
    for one in early:
        assert room.pump(1.0) == [one]
        one.settle(10, 45)
        room.leave(one, GOOD, 1.0)
    enter(room, holder := ticket(a, party=C), first := ticket(a, party=A, prompt=10))
    capped = ticket(a, party=A, prompt=10)
    capped.answer = 5
    enter(room, capped)
    charged = []
    for leaving, placed in ((holder, first), (first, capped)):
        room.leave(leaving, GOOD, 1.0)
        assert room.pump(1.0) == [placed]
        assert placed.bill is not None
        charged.append(placed.bill.tokens)

    assert charged == [pytest.approx(100), 20]


def test_who_never_had_to_wait_is_charged_nothing() -> None:
    room, a = Waitroom(9, 99), endpoint()
    enter(room, one := ticket(a, party=A, prompt=1000))
    one.settle(1000, 1000)

    assert one.bill is None


def test_a_full_queue_makes_room_for_who_has_fewer_waiting() -> None:
    room, a = Waitroom(9, 3), endpoint()
    holder, flood = ticket(a), [ticket(a, party=A) for _ in range(3)]
    enter(room, holder, *flood)
    with pytest.raises(Full):
        room.enter(ticket(a, party=A), 0.0)

    enter(room, light := ticket(a, party=B))

    assert room.pump(0.0) == [flood[-1]]
    assert flood[-1].outcome == Displaced(1.0)
    assert room.depth("m") == 3
    room.leave(flood[-1], NO_OPINION, 0.0)
    assert drain(room, holder) == [flood[0], light, flood[1]]


def test_a_queue_with_one_place_gives_it_to_the_higher_class() -> None:
    room, a = Waitroom(9, 1), endpoint()
    bulk, urgent = ticket(a, party=Party("a", 1.0, 3)), ticket(a, party=Party("a", 1.0, 1))
    enter(room, holder := ticket(a), bulk, urgent)

    assert room.pump(0.0) == [bulk]
    assert isinstance(bulk.outcome, Displaced)
    assert drain(room, holder) == [urgent]


def test_who_would_be_served_too_late_is_refused_at_once_and_let_in_when_it_was_told() -> None:
    room, a = Waitroom(9, 99, patience=10.0), endpoint()
    work(room, *(ticket(a) for _ in range(5)), seconds=2.0)
    enter(room, holder := ticket(a, party=A), *(ticket(a, party=A) for _ in range(5)))

    with pytest.raises(TooLong) as refused:
        room.enter(ticket(a, party=A), 0.0)
    assert (refused.value.wait, refused.value.retry_after) == pytest.approx((11.0, 2.0))
    with pytest.raises(TooLong):
        room.enter(ticket(a, party=B, deadline=0.9), 0.0)

    room.leave(holder, GOOD, 2.0)
    room.pump(2.0)
    room.enter(ticket(a, party=A), 2.0)
    with pytest.raises(TooLong):
        room.enter(ticket(a, party=A), 2.0)
    room.enter(ticket(a, party=B), 2.0)  # its place is near the front


def test_there_is_no_hope_if_every_group_would_refuse() -> None:
    room, a, b = Waitroom(9, 1), endpoint("a"), endpoint("b")
    groups = [ticket(a).group, ticket(b).group]
    enter(room, ticket(a, party=A), ticket(a, party=A))
    assert room.is_hopeless(groups[:1], B, math.inf, 0.0) is not None
    assert room.is_hopeless(groups, B, math.inf, 0.0) is None
    assert room.is_hopeless(groups[:1], Party("b", 1.0, 0), math.inf, 0.0) is None

    enter(room, ticket(b, party=A), ticket(b, party=A))

    assert room.is_hopeless(groups, B, math.inf, 0.0) is not None
    assert room.is_hopeless([], B, math.inf, 0.0) is None


def test_for_seats_tenants_take_turns_across_models() -> None:
    room, a, b = Waitroom(1, 99), endpoint("a", room=9), endpoint("b", room=9)
    holder = ticket(a, party=A)
    flood = [ticket(a, queue="a", party=A) for _ in range(4)]
    light = [ticket(b, queue="b", party=B) for _ in range(2)]
    enter(room, holder, *flood, *light)

    assert drain(room, holder) == [flood[0], light[0], flood[1], light[1], *flood[2:]]


def test_for_seats_a_lower_class_of_another_model_has_its_share() -> None:
    room, a, b = Waitroom(1, 999), endpoint("a", room=9), endpoint("b", room=9)
    high, low = Party("a", 1.0, 0), Party("b", 1.0, 3)
    enter(room, holder := ticket(a))
    enter(room, *(ticket(a, queue="a", party=high) for _ in range(200)))
    enter(room, *(ticket(b, queue="b", party=low) for _ in range(50)))

    served = [t.party for t in drain(room, holder)[:110]]

    assert served.count(low) == pytest.approx(10, abs=1)


def test_what_was_used_is_remembered_for_a_minute_after_the_last_one_waited() -> None:
    for later, first in ((30.0, B), (100.0, A)):
        room, a = Waitroom(9, 99), endpoint()
        enter(room, holder := ticket(a), *(both := [ticket(a, party=B), ticket(a, party=A)]))
        assert drain(room, holder) == both
        both[1].settle(500, 0)  # after its queue is empty
        holder = ticket(a, party=C)
        new = [ticket(a, party=A), ticket(a, party=B)]
        for one in (holder, *new):
            room.enter(one, later)
        served = drain(room, holder, later)

        assert served[0].party == first


def test_a_request_that_never_had_a_slot_is_new_in_the_queue_that_it_falls_back_to() -> None:
    room, a, b = Waitroom(9, 1), endpoint("a"), endpoint("b")
    enter(room, ticket(b), ticket(b))
    a.health.healthy = False
    enter(room, one := ticket(a))
    one.group, one.choose = ticket(b).group, ticket(b).choose

    with pytest.raises(Full):
        room.move(one, NO_OPINION, 0.0)
    room.leave(one, NO_OPINION, 0.0)

    assert (room.depth("m"), room.taken) == (1, 1)


class AnyOrder(RuleBasedStateMachine):
    """Entering, failing over, leaving and pumping in any order, against plain counting."""

    SEATS, ROOM = 3, 3

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.room = Waitroom(self.SEATS, self.ROOM)
        self.endpoints = [endpoint("a", 1, 2), endpoint("b", 2, 2)]
        self.tickets: list[Ticket] = []
        self.outside: list[Ticket] = []  # those that have stepped out

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
            self.outside = [t for t in self.outside if t is not gone]
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

    @rule(pick=st.integers(0, 9), verdict=st.sampled_from(Verdict), out=st.booleans())
    def step_out_or_come_back(self, pick: int, verdict: Verdict, out: bool) -> None:
        placed = [t for t in self.tickets if isinstance(t.outcome, Slot)]
        if out and placed:
            moving = placed[pick % len(placed)]
            self.room.step_out(moving, verdict, self.now)
            self.outside.append(moving)
        elif not out and self.outside:
            self.room.come_back(self.outside.pop(pick % len(self.outside)), self.now)
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
        return [t for t in self.tickets if t.outcome is None and t not in self.outside]

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
        lines = [line for _, line in self.room._lines._resting.values()]
        counters = [lane.fresh.counters for line in lines for lane in line._lanes.values()]
        for account in [a for c in (self.room._house, *counters) for a in c._accounts.values()]:
            assert account.waiting == 0
            assert account.under_way == pytest.approx(0, abs=1e-6)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(deadline=None, derandomize=True, max_examples=120)


# --- second attempts -------------------------------------------------------------------------


def test_a_second_attempt_has_a_seat_and_a_slot_of_its_own() -> None:
    room, a, b = Waitroom(9, 9), endpoint("a"), endpoint("b")
    enter(room, ticket(a))
    second = ticket(b)

    slot = room.spare(second, 1.0)
    assert (slot is second.outcome, where(second), room.taken, b.in_flight) == (True, "b", 2, 1)

    room.leave(second, NO_OPINION, 2.0)
    assert (room.taken, b.in_flight) == (1, 0)


def test_a_second_attempt_neither_queues_nor_takes_a_seat_that_is_not_there() -> None:
    room, a, b = Waitroom(2, 9), endpoint("a"), endpoint("b")
    enter(room, ticket(a), full := ticket(b))
    assert room.spare(ticket(b), 1.0) is None

    room.leave(full, GOOD, 1.0)
    enter(room, ticket(a))  # which is full, so it waits
    assert room.spare(ticket(b, queue="m"), 1.0) is None
    assert room.depth("m") == 1

    second = room.spare(ticket(b, queue="another"), 1.0)
    assert second is not None
    assert room.spare(ticket(endpoint("c"), queue="another"), 1.0) is None


def test_a_second_attempt_that_found_nobody_may_be_left_all_the_same() -> None:
    room, a = Waitroom(9, 9), endpoint()
    enter(room, ticket(a))
    second = ticket(a)

    assert room.spare(second, 1.0) is None
    room.leave(second, NO_OPINION, 1.0)
    assert (room.taken, a.in_flight) == (1, 1)


def test_two_attempts_exchange_their_slots() -> None:
    room, a, b = Waitroom(9, 9), endpoint("a", threshold=1), endpoint("b", threshold=1)
    enter(room, first := ticket(a))
    room.spare(second := ticket(b), 1.0)

    first.swap(second)
    assert (where(first), where(second)) == ("b", "a")

    room.leave(second, BAD, 2.0)
    assert (a.in_flight, b.in_flight) == (0, 1)
    assert (a.breaker.state(2.0), b.breaker.state(2.0)) == (State.OPEN, State.CLOSED)
    room.leave(first, GOOD, 3.0)
    assert (room.taken, b.in_flight) == (0, 0)


def test_a_request_that_is_with_two_is_charged_once() -> None:
    room, a, b = Waitroom(9, 9), endpoint("a"), endpoint("b")
    enter(room, first := ticket(a, party=A, prompt=30))
    room.spare(second := ticket(b, party=A, prompt=30), 1.0)

    enter(room, ticket(a, party=B))  # somebody has to wait: those who hold slots are charged

    assert first.bill is not None
    assert second.bill is None
