from __future__ import annotations

import itertools

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from citadel_gateway.sim.scheduler import QueueFull, Scheduler


async def hold(scheduler: Scheduler, log: list[int], number: int) -> None:
    with scheduler.place() as ticket:
        await ticket.wait_called()
        log.append(number)
        await trio.sleep(1)


async def test_requests_run_in_the_order_they_came(autojump_clock: object) -> None:
    scheduler, log = Scheduler(max_batch=1, max_queue=9), list[int]()
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(hold, scheduler, log, number)
            await wait_all_tasks_blocked()
        assert (scheduler.running, scheduler.waiting) == (1, 4)

    assert log == [0, 1, 2, 3, 4]
    assert trio.current_time() - began == 5
    assert (scheduler.running, scheduler.waiting, scheduler.finished) == (0, 0, 5)


async def test_one_more_than_the_queue_holds_is_rejected_at_once() -> None:
    scheduler = Scheduler(max_batch=1, max_queue=1)
    with scheduler.place(), scheduler.place():
        with pytest.raises(QueueFull), scheduler.place():
            pass
        assert (scheduler.running, scheduler.waiting) == (1, 1)

    assert scheduler.rejected == 1


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
async def test_whoever_leaves_in_whatever_order_no_place_is_lost(order: tuple[int, ...]) -> None:
    scheduler, log = Scheduler(max_batch=1, max_queue=3), list[int]()
    scopes = [trio.CancelScope() for _ in order]

    async def one(number: int) -> None:
        with scopes[number]:
            await hold(scheduler, log, number)

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(one, number)
            await wait_all_tasks_blocked()
        for left, number in enumerate(order, start=1):
            scopes[number].cancel()
            await wait_all_tasks_blocked()
            assert scheduler.running + scheduler.waiting == 4 - left
            assert scheduler.running == min(1, 4 - left)

    assert scheduler.aborted == 4


async def test_held_tokens_are_those_of_running_requests_only() -> None:
    scheduler = Scheduler(max_batch=1, max_queue=1)
    with scheduler.place() as running, scheduler.place() as waiting:
        running.tokens, waiting.tokens = 7, 100

        assert scheduler.held_tokens == 7
