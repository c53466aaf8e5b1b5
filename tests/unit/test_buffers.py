"""The budget for what is buffered: never exceeded, and given back whole."""

from __future__ import annotations

import attrs
import pytest
import trio
from trio.testing import MockClock

from citadel_gateway.io.buffers import Buffers, NoRoom


@attrs.define(eq=False)
class Request:
    held: int = 0


def test_what_does_not_fit_is_not_held() -> None:
    buffers, request = Buffers(100), Request()
    buffers.hold(request, 60)

    with pytest.raises(NoRoom):
        buffers.hold(request, 41)

    assert (buffers.used, request.held) == (60, 60)
    buffers.hold(request, 40)
    assert buffers.used == 100


def test_a_request_gives_back_what_is_its_own_once() -> None:
    buffers, one, other = Buffers(100), Request(), Request()
    buffers.hold(one, 30)
    buffers.hold(one, 20)
    buffers.hold(other, 10)

    buffers.let_go(one)
    buffers.let_go(one)

    assert (buffers.used, one.held, other.held) == (10, 0, 10)


def test_a_part_can_be_given_back() -> None:
    buffers, request = Buffers(100), Request()
    buffers.hold(request, 50)

    buffers.let_go(request, 20)

    assert (buffers.used, request.held) == (20, 20)


async def test_one_answer_at_a_time_may_overdraw(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    buffers, one, other, third = Buffers(100), Request(), Request(), Request()
    buffers.hold(one, 80)
    await buffers.wait_to_hold(other, 60)
    await buffers.wait_to_hold(other, 60)

    async def end_later() -> None:
        await trio.sleep(3)
        buffers.let_go(one)
        await trio.sleep(2)
        buffers.let_go(other)

    nursery.start_soon(end_later)
    assert (trio.current_time(), buffers.used) == (0, 200)
    with pytest.raises(NoRoom):
        buffers.hold(third, 1)
    await buffers.wait_to_hold(third, 60)

    assert trio.current_time() == 5
    assert (buffers.used, third.held) == (60, 60)


async def test_answers_that_fit_wait_for_nobody(autojump_clock: MockClock) -> None:
    buffers, one, other = Buffers(100), Request(), Request()
    await buffers.wait_to_hold(one, 60)
    await buffers.wait_to_hold(other, 40)

    assert (trio.current_time(), buffers.used) == (0, 100)


async def test_patience_has_an_end(autojump_clock: MockClock) -> None:
    buffers, one, other = Buffers(100), Request(), Request()
    await buffers.wait_to_hold(one, 180)

    with pytest.raises(NoRoom):
        await buffers.wait_to_hold(other, 60)

    assert trio.current_time() == 10
    assert (buffers.used, other.held) == (180, 0)


async def test_who_stops_waiting_holds_nothing(autojump_clock: MockClock) -> None:
    buffers, one, other = Buffers(100), Request(), Request()
    await buffers.wait_to_hold(one, 180)
    with trio.move_on_after(1):
        await buffers.wait_to_hold(other, 60)

    buffers.let_go(one)

    assert (buffers.used, other.held) == (0, 0)
