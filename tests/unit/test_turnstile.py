"""Who goes first in a turn of the event loop: real sockets, under Trio."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import trio
from trio.testing import wait_all_tasks_blocked

from citadel_gateway.app.server import Server
from citadel_gateway.config.schema import ServiceConfig
from citadel_gateway.io.listening import Address
from citadel_gateway.io.pump import Pump
from citadel_gateway.io.tcp_stream import TcpStream
from citadel_gateway.io.turnstile import MOST, Turnstile, turnstile
from tests.support.raw_client import RawClient

PATIENCE = 10
MANY = 10 * MOST


@contextmanager
def pairs(count: int) -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    with ExitStack() as stack:
        found = []
        for _ in range(count):
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            found.append((stack.enter_context(ours), stack.enter_context(theirs)))
        yield found


def here() -> Turnstile:
    found = turnstile()
    assert found is not None
    return found


@contextmanager
def bare() -> Iterator[Turnstile]:
    with select.epoll() as epoll:
        yield Turnstile(epoll)


def arrive(gate: Turnstile, *socks: tuple[socket.socket, socket.socket]) -> None:
    """A byte for each, of which Trio wants to be told once."""
    for ours, theirs in socks:
        gate.register(ours.fileno(), select.EPOLLIN | select.EPOLLONESHOT)
        theirs.send(b"x")


def taken(gate: Turnstile) -> list[int]:
    return [descriptor for descriptor, _ in gate.poll(0.0, 1000)]


def test_newcomers_come_a_few_at_a_time_in_the_order_in_which_their_bytes_came() -> None:
    with bare() as gate, pairs(2 * MOST + 3) as socks:
        numbers = [ours.fileno() for ours, _ in socks]
        for number in numbers:
            gate.enter(number)
        arrive(gate, *socks)

        turns = [taken(gate) for _ in range(4)]

    assert turns == [numbers[:MOST], numbers[MOST : 2 * MOST], numbers[2 * MOST :], []]


def test_everybody_else_goes_at_once_and_first() -> None:
    with bare() as gate, pairs(2 * MOST) as newcomers, pairs(2 * MOST) as others:
        for ours, _ in newcomers:
            gate.enter(ours.fileno())
        numbers = [ours.fileno() for ours, _ in others]
        arrive(gate, *newcomers)
        arrive(gate, *others[:MOST])
        first = taken(gate)
        arrive(gate, *others[MOST:])
        second = taken(gate)

    assert [first[:MOST], second[:MOST]] == [numbers[:MOST], numbers[MOST:]]
    assert len(first) == len(second) == 2 * MOST


def test_while_somebody_waits_for_a_turn_nobody_sleeps() -> None:
    with bare() as gate, pairs(MOST + 1) as socks:
        for ours, _ in socks:
            gate.enter(ours.fileno())
        arrive(gate, *socks)
        gate.poll(0.0, 1000)
        waited = gate.is_anybody_waiting

        last = gate.poll(3600.0, 1000)

    assert waited
    assert len(last) == 1
    assert not gate.is_anybody_waiting


def test_who_has_left_is_not_called_any_more() -> None:
    with bare() as gate, pairs(MOST + 2) as socks:
        numbers = [ours.fileno() for ours, _ in socks]
        for number in numbers:
            gate.enter(number)
        arrive(gate, *socks)
        gate.poll(0.0, 1000)
        gate.leave(numbers[-1])

        assert taken(gate) == [numbers[-2]]
        assert gate.newcomers == MOST + 1


async def test_a_stream_leaves_before_its_number_can_be_anybody_elses() -> None:
    gate = here()
    with pairs(1) as [(ours, _)]:
        stream = TcpStream(ours, gate)
        before = gate.newcomers
        stream.close()
        after = gate.newcomers
        stream.close()

    assert (before, after) == (1, 0)


async def test_trio_runs_what_was_taken_on_before_a_flood_of_newcomers() -> None:
    gate, order = here(), []

    async def wait(sock: socket.socket, name: str) -> None:
        await trio.lowlevel.wait_readable(sock)
        order.append(name)

    with pairs(MANY) as newcomers, pairs(MOST) as others, trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            for ours, _ in newcomers:
                gate.enter(ours.fileno())
                nursery.start_soon(wait, ours, "newcomer")
            for ours, _ in others:
                nursery.start_soon(wait, ours, "other")
            await wait_all_tasks_blocked()
            for _, theirs in (*newcomers, *others):
                theirs.send(b"x")
        for ours, _ in newcomers:
            gate.leave(ours.fileno())

    assert len(order) == MANY + MOST
    assert "other" not in order[2 * MOST :]


async def test_a_stream_that_is_carried_does_not_let_newcomers_wait_for_its_next_chunk() -> None:
    gate, pump, came = here(), Pump(), []

    async def wait(sock: socket.socket) -> None:
        await trio.lowlevel.wait_readable(sock)
        came.append(sock)

    with pairs(MANY) as newcomers, pairs(1) as [(stream, _)], trio.fail_after(PATIENCE):
        async with trio.open_nursery() as background:
            background.start_soon(pump.run)
            await wait_all_tasks_blocked()
            background.start_soon(pump.carry, stream, lambda now: True)  # nothing ever comes
            async with trio.open_nursery() as nursery:
                for ours, _ in newcomers:
                    gate.enter(ours.fileno())
                    nursery.start_soon(wait, ours)
                await wait_all_tasks_blocked()
                for _, theirs in newcomers:
                    theirs.send(b"x")
            background.cancel_scope.cancel()
        for ours, _ in newcomers:
            gate.leave(ours.fileno())

    assert len(came) == MANY


async def test_who_is_cancelled_while_waiting_for_a_turn_misses_nothing_later() -> None:
    gate = here()
    got: list[bytes] = []

    async def read(sock: socket.socket, everything: trio.CancelScope | None) -> None:
        await trio.lowlevel.wait_readable(sock)
        if everything is not None:
            everything.cancel()
        got.append(sock.recv(1))

    with pairs(MANY) as socks, trio.fail_after(PATIENCE):
        for ours, _ in socks:
            gate.enter(ours.fileno())
        async with trio.open_nursery() as nursery:
            for ours, _ in socks:
                nursery.start_soon(read, ours, nursery.cancel_scope)
            await wait_all_tasks_blocked()
            for _, theirs in socks:
                theirs.send(b"x")
        before = len(got)
        with trio.move_on_after(1):
            async with trio.open_nursery() as nursery:
                for ours, _ in socks:
                    nursery.start_soon(read, ours, None)
        for ours, _ in socks:
            gate.leave(ours.fileno())

    assert 0 < before <= MOST
    assert len(got) == MANY


async def test_a_server_whose_clients_go_last_lets_go_of_them_all() -> None:
    async def app(scope: object, receive: object, send: object) -> None:
        raise AssertionError("nothing is asked")

    gate, counts = here(), []
    server = Server(
        app, Address("127.0.0.1", 0), ServiceConfig(), lambda where, exc: None, goes_last=True
    )
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            bound = await nursery.start(server.run)
            counts.append(gate.newcomers)
            async with await RawClient.connect(bound.port):
                while not server.open_connections:  # noqa: ASYNC110  # it has no event for us
                    await trio.sleep(0.001)
                counts.append(gate.newcomers)
            await server.stop(1.0)
        counts.append(gate.newcomers)

    assert counts == [0, 1, 0]
