"""Clients that leave while nobody reads from them, over real sockets."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from citadel_gateway.io.departures import Departures

PATIENCE = 10


@attrs.define(eq=False)
class Connection:
    """Writes down in which order it and others were told what."""

    name: str
    told: list[tuple[str, str]]
    left: trio.Event = attrs.field(factory=trio.Event)
    has_input: trio.Event = attrs.field(factory=trio.Event)

    def pass_on_leave(self) -> None:
        self.told.append(("pass on", self.name))

    def leave(self) -> None:
        self.told.append(("leave", self.name))
        self.left.set()

    def read_ahead(self) -> None:
        self.has_input.set()


@asynccontextmanager
async def watching() -> AsyncIterator[Departures]:
    with trio.fail_after(PATIENCE), closing(Departures()) as departures:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(departures.run)
            yield departures
            nursery.cancel_scope.cancel()


def connect() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        return listener.accept()[0], client


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.mark.parametrize(
    "leave",
    [socket.socket.close, lambda client: client.shutdown(socket.SHUT_WR), reset],
    ids=["close", "half", "reset"],
)
@pytest.mark.parametrize("behind", [b"", b"GET /next"], ids=["", "behind bytes"])
async def test_a_client_that_leaves_is_noticed_however_it_does(
    leave: object, behind: bytes
) -> None:
    ours, client = connect()
    connection = Connection("a", [])
    with ours, client:
        async with watching() as departures:
            with departures.watching(ours, connection):
                client.sendall(behind)
                leave(client)  # type: ignore[operator]
                await connection.left.wait()

    assert connection.told == [("pass on", "a"), ("leave", "a")]


async def test_of_several_that_leave_together_all_are_passed_on_before_any_is_cleaned_up() -> None:
    told: list[tuple[str, str]] = []
    async with watching() as departures:
        pairs = [connect() for _ in range(5)]
        made = [Connection(str(n), told) for n in range(5)]
        contexts = [
            departures.watching(ours, each) for (ours, _), each in zip(pairs, made, strict=True)
        ]
        for context in contexts:
            context.__enter__()
        for _, client in pairs:
            client.close()
        for each in made:
            await each.left.wait()
        for context in contexts:
            context.__exit__(None, None, None)
    for ours, _ in pairs:
        ours.close()

    assert [what for what, _ in told] == ["pass on"] * 5 + ["leave"] * 5


async def test_bytes_alone_are_no_departure_but_are_told_of_after_a_while() -> None:
    ours, client = connect()
    connection = Connection("a", [])
    with ours, client:
        async with watching() as departures:
            with departures.watching(ours, connection):
                client.sendall(b"GET /next")
                await connection.has_input.wait()

    assert connection.told == []


async def test_nobody_looks_at_connections_that_are_silent() -> None:
    ours, client = connect()
    with ours, client:
        async with watching() as departures:
            with departures.watching(ours, Connection("a", [])):
                await wait_all_tasks_blocked()
                next_look = trio.lowlevel.current_statistics().seconds_to_next_deadline

    assert next_look > PATIENCE / 2  # the test's own


async def test_who_is_no_longer_watched_is_told_nothing() -> None:
    ours, client = connect()
    connection = Connection("a", [])
    with ours:
        async with watching() as departures:
            with departures.watching(ours, connection):
                pass
            client.close()
            await trio.sleep(0.05)

    assert connection.told == []
