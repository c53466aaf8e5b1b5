"""Deadlines ring exactly when they are due, however often they were moved before."""

from __future__ import annotations

import math
from functools import partial

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from citadel_gateway.io.deadlines import Deadlines


@pytest.fixture
async def deadlines(nursery: trio.Nursery) -> Deadlines:
    made = Deadlines()
    nursery.start_soon(made.run)
    await wait_all_tasks_blocked()
    return made


async def test_a_deadline_rings_once_and_on_time(
    autojump_clock: MockClock, deadlines: Deadlines
) -> None:
    rung: list[float] = []
    deadline = deadlines.add(lambda: rung.append(trio.current_time()))
    deadlines.move(deadline, 5)
    await trio.sleep(100)

    assert rung == [5]
    assert deadline.due == math.inf


async def test_those_of_one_instant_ring_as_they_were_made(
    autojump_clock: MockClock, deadlines: Deadlines
) -> None:
    rung: list[int] = []
    made = [deadlines.add(partial(rung.append, n)) for n in range(100)]
    for deadline in reversed(made):
        deadlines.move(deadline, 5)
    deadlines.discard(made[50])
    await trio.sleep(10)

    assert rung == [n for n in range(100) if n != 50]


async def test_one_that_has_moved_on_does_not_ring(
    autojump_clock: MockClock, deadlines: Deadlines
) -> None:
    rung: list[float] = []
    deadline = deadlines.add(lambda: rung.append(trio.current_time()))
    for second in range(50):
        deadlines.move(deadline, second + 5)
        await trio.sleep(1)
    deadline.due = math.inf
    await trio.sleep(100)

    assert rung == []


async def test_one_that_is_moved_forward_rings_earlier(
    autojump_clock: MockClock, deadlines: Deadlines
) -> None:
    rung: list[float] = []
    late = deadlines.add(lambda: rung.append(trio.current_time()))
    deadlines.move(late, 60)
    await trio.sleep(1)
    deadlines.move(late, 3)
    await trio.sleep(100)

    assert rung == [3]


async def test_many_ring_each_at_its_own_time_and_may_set_each_other(
    autojump_clock: MockClock, deadlines: Deadlines
) -> None:
    rung: list[tuple[int, float]] = []

    def ring(number: int) -> None:
        rung.append((number, trio.current_time()))
        if number == 3:
            deadlines.move(made[7], 20)

    made = [deadlines.add(lambda n=n: ring(n)) for n in range(10)]  # type: ignore[misc]
    for number in (5, 3, 9):
        deadlines.move(made[number], number)
    discarded = deadlines.add(lambda: ring(99))
    deadlines.move(discarded, 4)
    deadlines.discard(discarded)
    await trio.sleep(100)

    assert rung == [(3, 3), (5, 5), (9, 9), (7, 20)]
