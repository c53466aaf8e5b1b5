from __future__ import annotations

import itertools
from collections.abc import Callable

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from citadel_gateway.io.admission import Admission
from citadel_gateway.policy.circuit_breaker import (
    BreakerPolicy,
    CircuitBreaker,
    Transition,
    Verdict,
)
from citadel_gateway.policy.endpoint import Endpoint, Slot
from citadel_gateway.policy.health_tracker import HealthTracker
from citadel_gateway.policy.priority import Party
from citadel_gateway.policy.waitroom import Choice, Displaced, Full, Nobody, Ticket, Waitroom


@attrs.define(eq=False)
class Restaurant:
    """One endpoint with *slots* of its own, and the admission in front of it."""

    slots: int = 1
    room: int = 10
    threshold: int = 5
    served: list[int] = attrs.field(factory=list)
    transitions: list[Transition] = attrs.field(factory=list)
    endpoint: Endpoint = attrs.field(init=False)
    admission: Admission = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.endpoint = Endpoint(
            model="m",
            url="http://engine",
            weight=1,
            max_concurrent=self.slots,
            cost=None,
            breaker=CircuitBreaker(BreakerPolicy(threshold=self.threshold), lambda: 0.5),
            health=HealthTracker(healthy=True),
        )
        self.admission = Admission(
            Waitroom(seats=self.slots, room=self.room),
            lambda endpoint, transition: self.transitions.append(transition),
        )

    def choose(self, now: float) -> Choice:
        return self.endpoint if self.endpoint.has_room() else None

    def ticket(self, choose: Callable[[float], Choice] | None = None) -> Ticket:
        return Ticket(queue="m", group="m", choose=choose or self.choose)

    async def dine(self, number: int, *, within: float = 100, stay: float = 1) -> None:
        ticket = self.ticket()
        self.admission.enter(ticket)
        try:
            await self.admission.wait(ticket, within)
            self.served.append(number)
            await trio.sleep(stay)
        finally:
            self.admission.leave(ticket, Verdict.NO_OPINION)

    def is_empty(self) -> bool:
        waitroom = self.admission.waitroom
        return (waitroom.taken, waitroom.depth("m"), self.endpoint.in_flight) == (0, 0, 0)


async def test_those_who_wait_are_called_in_their_order(autojump_clock: object) -> None:
    place = Restaurant()
    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(place.dine, number)
            await wait_all_tasks_blocked()

    assert place.served == list(range(6))
    assert trio.current_time() == 6
    assert place.is_empty()


async def test_somebody_who_finds_a_slot_does_not_wait(autojump_clock: object) -> None:
    place = Restaurant()
    ticket = place.ticket()
    place.admission.enter(ticket)
    await place.admission.wait(ticket, within=0)

    assert isinstance(ticket.outcome, Slot)
    assert place.endpoint.in_flight == 1


async def test_without_room_to_wait_there_is_no_waiting(autojump_clock: object) -> None:
    place = Restaurant(room=0)
    place.admission.enter(place.ticket())

    with pytest.raises(Full):
        place.admission.enter(place.ticket())


async def test_who_loses_its_place_to_another_is_told_at_once(autojump_clock: object) -> None:
    place = Restaurant(room=1)
    loser = place.ticket()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: place.dine(0, stay=10))
        await wait_all_tasks_blocked()
        place.admission.enter(loser)
        nursery.start_soon(place.admission.wait, loser, 5.0)
        await trio.sleep(1)
        urgent = place.ticket()
        urgent.party = Party("vip", 1.0, 0)
        place.admission.enter(urgent)
        await wait_all_tasks_blocked()
        told = (loser.outcome, trio.current_time(), len(place.admission._calls))
        place.admission.leave(urgent, Verdict.NO_OPINION)

    assert told == (Displaced(1.0), 1.0, 0)
    assert place.is_empty()


async def test_patience_ends_at_its_second(autojump_clock: object) -> None:
    place = Restaurant()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: place.dine(0, stay=10))
        await wait_all_tasks_blocked()
        with pytest.raises(trio.TooSlowError):
            await place.dine(1, within=3)
        assert trio.current_time() == 3

    assert (place.served, place.is_empty()) == ([0], True)


async def test_those_who_wait_are_told_that_there_is_nobody(autojump_clock: object) -> None:
    place = Restaurant()
    gone = False

    def choose(now: float) -> Choice:
        return Nobody(7.0) if gone else place.choose(now)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: place.dine(0, stay=10))
        await wait_all_tasks_blocked()
        ticket = place.ticket(choose)
        place.admission.enter(ticket)
        nursery.start_soon(place.admission.wait, ticket, 5.0)
        await trio.sleep(1)
        gone = True
        nursery.cancel_scope.cancel()  # the first one leaves, and the next is looked at
    place.admission.leave(ticket, Verdict.NO_OPINION)

    assert place.is_empty()


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
async def test_whoever_leaves_in_whatever_order_gives_everything_back(
    autojump_clock: object, order: tuple[int, ...]
) -> None:
    place = Restaurant(slots=2)
    scopes = [trio.CancelScope() for _ in range(4)]

    async def dine(number: int) -> None:
        with scopes[number]:
            await place.dine(number, stay=100)

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(dine, number)
            await wait_all_tasks_blocked()
        for number in order:
            scopes[number].cancel()
            if number % 2:  # some in the same tick
                await wait_all_tasks_blocked()

    assert place.is_empty()
    assert trio.current_time() == 0


async def test_a_move_keeps_the_seat_and_closes_the_slot(autojump_clock: object) -> None:
    place = Restaurant()
    ticket = place.ticket()
    place.admission.enter(ticket)
    first = ticket.outcome
    place.admission.move(ticket, Verdict.BAD)
    await place.admission.wait(ticket, within=0)

    assert isinstance(ticket.outcome, Slot)
    assert ticket.outcome is not first
    assert (place.admission.waitroom.taken, place.endpoint.in_flight) == (1, 1)


async def test_a_tripped_breaker_is_told(autojump_clock: object) -> None:
    place = Restaurant(threshold=1)
    ticket = place.ticket()
    place.admission.enter(ticket)
    place.admission.leave(ticket, Verdict.BAD)
    place.admission.leave(ticket, Verdict.BAD)  # once more is as good as once

    assert [t.after.value for t in place.transitions] == ["open"]
    assert place.is_empty()
