"""The pool: which connection is given out, and which one is never given out again."""

from __future__ import annotations

import math
from typing import Any

import anyio.abc
import pytest
import trio
import trio.testing
from anyio.abc import SocketAttribute
from trio.testing import MockClock

from citadel_gateway.io.connection import Connection
from citadel_gateway.io.dial import Origin, make_connect
from citadel_gateway.io.pool import ConnectionPool
from tests.sim.wires import Wire, wire_pair
from tests.support import scripted_engine as engines
from tests.support.memory_net import MemoryNet
from tests.support.raw_client import http_request
from tests.support.scripted_engine import Script, ScriptedEngine, serve_tcp
from tests.support.step_cancel import cancel_at

UP = Origin("http", "up", 80)
ASK = http_request("POST", "/v1/chat/completions", {"stream": False})
OK = engines.whole_chat("ok")


def make_pool(net: MemoryNet, **settings: Any) -> ConnectionPool:
    async def connect(origin: Origin) -> anyio.abc.ByteStream:
        return await net.connect(origin.host, origin.port)

    return ConnectionPool(connect, **settings)


def make_net(nursery: trio.Nursery, engine: ScriptedEngine) -> MemoryNet:
    net = MemoryNet(nursery)
    net.listen("up", 80, engine.serve)
    return net


async def exchange(connection: Connection) -> bytes:
    await connection.send(ASK)
    await connection.read_head()
    body = b""
    while piece := await connection.read_body():
        body += piece
    return body


async def test_a_connection_to_an_address_that_is_gone_is_closed_instead_of_used_again(
    nursery: trio.Nursery,
) -> None:
    gone: set[object] = set()
    net = make_net(nursery, ScriptedEngine())
    pool = make_pool(net, is_current=lambda stream: stream not in gone)
    old = await pool.acquire(UP)
    await pool.release(old)
    gone.add(old.stream)
    new = await pool.acquire(UP)

    assert new is not old
    assert (pool.open_count, net.connections) == (1, 1)
    await pool.release(new)
    assert await pool.acquire(UP) is new
    await pool.aclose()


async def answered_but_for_the_end(pool: ConnectionPool, engine: Wire) -> Connection:
    """A connection to *engine*, back in the pool."""
    connection = await pool.acquire(UP)
    await connection.send(b"GET / HTTP/1.1\r\n\r\n")
    await engine.receive_some()
    await engine.send_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n")
    await connection.read_head()
    assert await connection.read_body() == b"hi"
    assert connection.leave_the_end()
    await pool.release(connection)
    return connection


async def test_a_response_that_lacks_its_end_is_waited_for_by_nobody() -> None:
    pairs = [wire_pair(direct=True) for _ in range(2)]
    dialled = iter(gateway for gateway, _ in pairs)
    engines = [engine for _, engine in pairs]

    async def connect(_: Origin) -> anyio.abc.ByteStream:
        await trio.lowlevel.checkpoint()
        return next(dialled)

    pool = ConnectionPool(connect)
    first = await answered_but_for_the_end(pool, engines[0])
    second = await pool.acquire(UP)
    assert second is not first
    await engines[0].send_all(b"0\r\n\r\n")
    assert await pool.acquire(UP) is first
    await pool.aclose()
    for engine in engines:
        engine.close()


async def test_a_response_that_does_not_end_costs_its_connection() -> None:
    gateway, engine = wire_pair(direct=True)

    async def connect(_: Origin) -> anyio.abc.ByteStream:
        await trio.lowlevel.checkpoint()
        return gateway

    pool = ConnectionPool(connect)
    connection = await answered_but_for_the_end(pool, engine)
    connection.give_up_the_end(0)  # what it was asked before
    assert not engine.is_over()
    connection.give_up_the_end(1)

    assert engine.is_over()
    assert await pool.reuse(UP) is None
    assert pool.open_count == 0
    engine.close()


async def test_the_last_one_back_is_the_first_one_out(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    pool = make_pool(make_net(nursery, ScriptedEngine()))
    first, second = [await pool.acquire(UP) for _ in range(2)]
    for connection in (first, second):
        await exchange(connection)
        await pool.release(connection)

    assert await pool.acquire(UP) is second
    assert await pool.acquire(UP) is first
    assert await pool.acquire(UP) not in {first, second}


@pytest.mark.parametrize(("age", "kept"), [(2.999, True), (3.0, False)])
async def test_an_idle_connection_expires_after_three_seconds(
    age: float, kept: bool, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    engine = ScriptedEngine()
    pool = make_pool(make_net(nursery, engine))
    connection = await pool.acquire(UP)
    await exchange(connection)
    await pool.release(connection)
    await trio.sleep(age)

    assert (await pool.acquire(UP) is connection) is kept
    await trio.testing.wait_all_tasks_blocked()
    assert engine.open_connections == pool.open_count == 1


async def test_pruning_closes_exactly_the_old_ones(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    net = make_net(nursery, ScriptedEngine())
    pool = make_pool(net)
    old, young = [await pool.acquire(UP) for _ in range(2)]
    await pool.release(old)
    await trio.sleep(1)
    await pool.release(young)
    await trio.sleep(2)
    await pool.prune()

    assert (pool.idle_count, net.connections) == (1, 1)
    await trio.sleep(1)
    await pool.prune()
    assert (pool.idle_count, pool.open_count, net.connections) == (0, 0, 0)


async def test_idle_connections_are_bounded_for_each_origin(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    net = make_net(nursery, ScriptedEngine())
    net.listen("other", 80, ScriptedEngine().serve)
    pool = make_pool(net, most_idle=2)
    held = [await pool.acquire(UP) for _ in range(3)]
    held.append(await pool.acquire(Origin("http", "other", 80)))
    for connection in held:
        await pool.release(connection)

    assert pool.idle_count == pool.open_count == net.connections == 3


async def test_a_connection_that_was_never_used_is_as_good_as_new(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    pool = make_pool(make_net(nursery, ScriptedEngine()))
    connection = await pool.acquire(UP)
    await pool.release(connection)

    assert await pool.acquire(UP) is connection
    assert not connection.is_reused
    assert b"ok" in await exchange(connection)


async def test_fresh_leaves_the_idle_ones_alone(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    pool = make_pool(make_net(nursery, ScriptedEngine()))
    connection = await pool.acquire(UP)
    await pool.release(connection)

    assert await pool.acquire(UP, fresh=True) is not connection
    assert await pool.acquire(UP) is connection


async def test_origins_do_not_share(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    net = make_net(nursery, ScriptedEngine())
    net.listen("up", 81, ScriptedEngine().serve)
    pool = make_pool(net)
    await pool.release(await pool.acquire(UP))
    await pool.acquire(Origin("http", "up", 81))

    assert net.dialled == [("up", 80), ("up", 81)]


async def test_closing_the_pool_closes_what_is_in_use_and_what_is_idle(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    net = make_net(nursery, ScriptedEngine())
    pool = make_pool(net)
    idle, used = [await pool.acquire(UP) for _ in range(2)]
    await pool.release(idle)
    await pool.aclose()

    assert (net.connections, pool.open_count, pool.idle_count) == (0, 0, 0)
    await pool.release(used)  # its user finds out later
    assert (pool.open_count, pool.idle_count) == (0, 0)
    with pytest.raises(RuntimeError, match="closed"):
        await pool.acquire(UP)


async def test_a_connection_that_was_being_opened_as_the_pool_closed_is_not_kept(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    net = make_net(nursery, ScriptedEngine())
    dialling, go_on = trio.Event(), trio.Event()

    async def connect(origin: Origin) -> anyio.abc.ByteStream:
        dialling.set()
        await go_on.wait()
        return await net.connect(origin.host, origin.port)

    pool = ConnectionPool(connect)

    async def use() -> None:
        await pool.release(await pool.acquire(UP))

    async with trio.open_nursery() as using:
        using.start_soon(use)
        await dialling.wait()
        await pool.aclose()
        go_on.set()

    assert (net.connections, pool.open_count) == (0, 0)


async def test_cancelling_at_any_step_of_a_checkout_loses_nothing(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    engine = ScriptedEngine()
    for step in range(1, 100):
        net = make_net(nursery, engine)
        pool = make_pool(net, keepalive=1)
        expired = [await pool.acquire(UP) for _ in range(2)]
        for connection in expired:
            await pool.release(connection)
        await trio.sleep(1)  # so that these two are discarded on the way
        got: list[Connection] = []

        async def check_out(pool: ConnectionPool = pool, got: list[Connection] = got) -> None:
            got.append(await pool.acquire(UP))

        fired = await cancel_at(step, check_out)
        await trio.testing.wait_all_tasks_blocked()
        assert pool.open_count == pool.idle_count + len(got) == net.connections
        await pool.aclose()
        if not fired:
            break
    else:
        pytest.fail("it never came to an end")
    assert step > 3


# --- over sockets, where an idle connection can be asked about ---------------------------------


def parting(how: str) -> Script:
    match how:
        case "fin":
            return OK.then(engines.answered(), engines.close())
        case "rst":
            return OK.then(engines.answered(), engines.reset())
        case "bytes":
            return OK.then(engines.answered(), engines.send(b"x"), engines.hang())
        case _:
            unasked = engines.surplus().steps[0]
            return OK.then(engines.answered(), engines.sleep(0.01), unasked, engines.hang())


@pytest.mark.parametrize("how", ["fin", "rst", "bytes", "response"])
async def test_what_became_stale_is_thrown_away_at_the_checkout(
    how: str, nursery: trio.Nursery
) -> None:
    engine = ScriptedEngine([parting(how)])
    origin = Origin("http", "127.0.0.1", await serve_tcp(engine, nursery))
    pool = ConnectionPool(make_connect(), keepalive=math.inf)
    with trio.fail_after(5):
        stale = await pool.acquire(origin)
        await exchange(stale)
        await pool.release(stale)
        if pool.idle_count:  # it did not come with the answer, which is noticed at once
            await trio.lowlevel.wait_readable(stale.stream.extra(SocketAttribute.raw_socket))
        fresh = await pool.acquire(origin)

        assert fresh is not stale
        assert b'"ok"' in await exchange(fresh)
        await pool.release(fresh)
        assert pool.open_count == pool.idle_count == 1
        await pool.aclose()
    nursery.cancel_scope.cancel()


async def test_a_connection_whose_peer_is_quiet_is_used_again(nursery: trio.Nursery) -> None:
    engine = ScriptedEngine()
    origin = Origin("http", "127.0.0.1", await serve_tcp(engine, nursery))
    pool = ConnectionPool(make_connect())
    with trio.fail_after(5):
        for _ in range(20):
            connection = await pool.acquire(origin)
            await exchange(connection)
            await pool.release(connection)
        await pool.aclose()

    assert engine.connections == 1
    nursery.cancel_scope.cancel()
