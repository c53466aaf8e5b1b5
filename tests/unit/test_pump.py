"""Streams that are carried: real sockets, and both ways of calling their steps."""

from __future__ import annotations

import select
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from citadel_gateway.io.pump import Pump, _find_trio_epoll

BOTH = pytest.mark.parametrize("in_place", [True, False], ids=["in place", "task"])
PATIENCE = 10


@asynccontextmanager
async def pumping(in_place: bool) -> AsyncIterator[Pump]:
    pump = Pump(in_place=in_place)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.run)
            await wait_all_tasks_blocked()
            yield pump
            nursery.cancel_scope.cancel()
    assert pump.flows == 0


def pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    return ours, theirs


@BOTH
async def test_a_step_is_called_for_everything_that_arrives_until_it_returns_false(
    in_place: bool,
) -> None:
    ours, theirs = pair()
    got: list[bytes] = []

    def step(now: float) -> bool:
        got.append(ours.recv(100))
        return got[-1] != b"last"

    async def send() -> None:
        for piece in (b"one", b"two", b"last"):
            await trio.sleep(0.01)
            theirs.send(piece)

    with ours, theirs:
        async with pumping(in_place) as pump, trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await pump.carry(ours, step)

    assert got == [b"one", b"two", b"last"]


@BOTH
async def test_what_a_step_raises_is_raised_by_the_task_that_is_carried(in_place: bool) -> None:
    def step(now: float) -> bool:
        raise LookupError("of this stream")

    ours, theirs = pair()
    with ours, theirs:
        async with pumping(in_place) as pump:
            theirs.send(b"x")
            with pytest.raises(LookupError, match="of this stream"):
                await pump.carry(ours, step)


@BOTH
async def test_a_carried_task_can_be_cancelled(in_place: bool) -> None:
    def step(now: float) -> bool:
        raise AssertionError("nothing has arrived")

    ours, theirs = pair()
    with ours, theirs:
        async with pumping(in_place) as pump:
            with trio.move_on_after(0.01) as scope:
                await pump.carry(ours, step)

    assert scope.cancelled_caught


@BOTH
async def test_a_socket_that_was_closed_under_a_stream_is_no_accident(in_place: bool) -> None:
    ours, theirs = pair()
    with theirs:
        async with pumping(in_place) as pump, trio.open_nursery() as nursery:
            nursery.start_soon(pump.carry, ours, lambda now: True)
            await wait_all_tasks_blocked()
            ours.close()
            nursery.cancel_scope.cancel()


@BOTH
async def test_a_step_may_cancel_its_own_task(in_place: bool) -> None:
    ours, theirs = pair()
    with ours, theirs:
        async with pumping(in_place) as pump:
            theirs.send(b"x")
            with trio.CancelScope() as scope:

                def step(now: float) -> bool:
                    ours.recv(1)
                    scope.cancel()
                    return False

                await pump.carry(ours, step)

    assert scope.cancelled_caught


@BOTH
async def test_everybody_else_goes_on_while_streams_flow(in_place: bool) -> None:
    """Timers, other sockets and threads: Trio gets its turn whatever the streams do."""
    ours, theirs = pair()
    other, sender = socket.socketpair()
    other.setblocking(False)

    def forward(now: float) -> bool:
        ours.recv(1)
        theirs.send(b"x")  # there is always more
        return True

    with ours, theirs, other, sender:
        theirs.send(b"x")
        async with pumping(in_place) as pump, trio.open_nursery() as nursery:
            nursery.start_soon(pump.carry, ours, forward)
            theirs.setblocking(False)
            await trio.sleep(0.02)
            sender.send(b"hello")
            await trio.lowlevel.wait_readable(other)
            assert await trio.to_thread.run_sync(lambda: "from a thread") == "from a thread"
            nursery.cancel_scope.cancel()


@BOTH
async def test_streams_do_not_mix(in_place: bool) -> None:
    pairs = [pair() for _ in range(50)]
    got: list[list[bytes]] = [[] for _ in pairs]

    def taking(place: int) -> Callable[[float], bool]:
        def step(now: float) -> bool:
            got[place].append(pairs[place][0].recv(100))
            return len(got[place]) < 3

        return step

    async with pumping(in_place) as pump, trio.open_nursery() as nursery:
        for place, (ours, _) in enumerate(pairs):
            nursery.start_soon(pump.carry, ours, taking(place))
        for lap in range(3):
            await trio.sleep(0.005)
            for place, (_, theirs) in enumerate(pairs):
                theirs.send(b"%d-%d" % (place, lap))

    assert got == [[b"%d-%d" % (place, lap) for lap in range(3)] for place in range(50)]
    for ours, theirs in pairs:
        ours.close()
        theirs.close()


async def test_a_wait_that_is_over_is_not_begun_again_by_trio() -> None:
    """Else whatever arrives during the second one waits for its end, and timers ring late."""
    ours, theirs = pair()
    with ours, theirs:
        async with pumping(in_place=True) as pump, trio.open_nursery() as nursery:
            nursery.start_soon(pump.carry, ours, lambda _: True)
            await wait_all_tasks_blocked()
            trios_own = select.poll()
            trios_own.register(_find_trio_epoll(), select.POLLIN)
            assert not trios_own.poll(0)

            pump.before_io_wait(0.001)

            assert trios_own.poll(0), "Trio would wait on"
            nursery.cancel_scope.cancel()


async def test_trio_has_its_turn_at_once_where_it_does_not_mean_to_wait() -> None:
    ours, theirs = pair()
    with ours, theirs:
        async with pumping(in_place=True) as pump, trio.open_nursery() as nursery:
            nursery.start_soon(pump.carry, ours, lambda _: True)
            await wait_all_tasks_blocked()
            trios_own = select.poll()
            trios_own.register(_find_trio_epoll(), select.POLLIN)

            pump.before_io_wait(0)

            assert not trios_own.poll(0)  # waking it would cost a turn for nothing
            nursery.cancel_scope.cancel()
