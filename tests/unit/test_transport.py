"""The transport, as httpx sees it and as the engine sees it."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import partial

import anyio.abc
import httpx
import pytest
import trio
import trio.testing
import trustme
from trio.testing import MockClock

from citadel_gateway import AnyIOTransport
from citadel_gateway.io.dial import Origin
from citadel_gateway.io.transport import make_probe_client
from tests.support import scripted_engine as engines
from tests.support.memory_net import MemoryNet
from tests.support.scripted_engine import (
    Answer,
    LedgerEntry,
    Script,
    ScriptedEngine,
    close,
    hang,
    send,
    serve_tcp,
    sleep,
    status,
)
from tests.support.step_cancel import cancel_at

URL = "http://up/v1/chat/completions"
HEAD = b"HTTP/1.1 200 OK\r\n"
OK = status(200)


class World:
    """An engine in memory, and a client of it over the transport."""

    def __init__(self, nursery: trio.Nursery, *scripts: Answer, default: Answer = OK) -> None:
        self.engine = ScriptedEngine(scripts, default=default)
        self.net = MemoryNet(nursery)
        self.net.listen("up", 80, self.engine.serve)
        self.transport = AnyIOTransport(connect=self.connect)
        self.client = httpx.AsyncClient(transport=self.transport, trust_env=False, timeout=None)

    async def connect(self, origin: Origin) -> anyio.abc.ByteStream:
        return await self.net.connect(origin.host, origin.port)

    async def check_nothing_is_in_doubt(self) -> None:
        """The pool, the network and the engine agree on what is open, and all of it is idle."""
        await trio.testing.wait_all_tasks_blocked()
        pool = self.transport.pool
        assert pool.open_count == pool.idle_count
        assert self.net.connections == pool.open_count
        assert self.engine.open_connections == pool.open_count
        assert self.engine.in_flight == 0


def echo(entry: LedgerEntry) -> Script:
    """Answers with what was asked for, so that a mixed-up answer is found out."""
    return status(200, entry.path.encode() + b" " + entry.body)


def raw(*pieces: bytes) -> Script:
    return Script([send(piece) for piece in pieces])


# --- requests as they reach the engine -------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "content", "length"),
    [
        ("POST", b"hello", "5"),
        ("POST", None, "0"),
        ("PUT", None, "0"),
        ("GET", None, None),
        ("DELETE", None, None),
    ],
)
async def test_requests_arrive_as_they_were_made(
    method: str, content: bytes | None, length: str | None,
    autojump_clock: MockClock, nursery: trio.Nursery,
) -> None:  # fmt: skip
    world = World(nursery)
    world.engine.routes = {(m, "/a%20b?q=1"): status(200, b"ok") for m in ("GET", "DELETE", "PUT")}
    response = await world.client.request(method, "http://up/a b?q=1", content=content)

    assert response.status_code == 200
    assert response.http_version == "HTTP/1.1"
    (entry,) = world.engine.ledger
    assert (entry.method, entry.path) == (method, "/a%20b?q=1")
    assert (entry.body, entry.headers.get("content-length")) == (content or b"", length)
    assert entry.headers["host"] == "up"


async def test_host_and_length_are_sent_once_and_are_the_callers(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    seen: list[bytes] = []

    async def serve(stream: trio.abc.Stream) -> None:
        seen.append(bytes(await stream.receive_some()))
        await stream.send_all(HEAD + b"content-length: 0\r\n\r\n")

    world = World(nursery)
    world.net.listen("up", 8000, serve)
    await world.client.post(
        "http://up:8000/", content=b"12345", headers={"Host": "virtual", "Content-Length": "5"}
    )

    (request,) = seen
    head = request.lower().partition(b"\r\n\r\n")[0].split(b"\r\n")
    assert [line for line in head if line.startswith((b"host", b"content-length"))] == [
        b"host: virtual", b"content-length: 5",
    ]  # fmt: skip


async def test_a_streamed_request_body_gets_a_length(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"one "
        yield b"two"

    world = World(nursery)
    await world.client.post(URL, content=body())

    (entry,) = world.engine.posts
    assert entry.body == b"one two"
    assert "transfer-encoding" not in entry.headers
    assert entry.headers["content-length"] == "7"


@pytest.mark.parametrize("value", ["x\r\nevil: 1", "x\nevil: 1", "x\0"])
async def test_a_header_cannot_smuggle_a_line(
    value: str, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = World(nursery)
    with pytest.raises(httpx.LocalProtocolError):
        await world.client.get("http://up/", headers={"x": value})

    assert world.engine.ledger == []
    await world.check_nothing_is_in_doubt()


async def test_other_schemes_are_refused(nursery: trio.Nursery) -> None:
    with pytest.raises(httpx.UnsupportedProtocol):
        await World(nursery).client.get("ftp://up/")


# --- answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "reused"),
    [
        (raw(HEAD + b"content-length: 5\r\n\r\nhello"), True),
        (raw(HEAD + b"content-length: 5\r\n\r\n", b"he", b"llo"), True),
        (
            raw(HEAD + b"transfer-encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\na: b\r\n\r\n"),
            True,
        ),
        (raw(HEAD + b"\r\nhello").then(close()), False),
        (raw(b"HTTP/1.0 200 OK\r\n\r\nhello").then(close()), False),
        (raw(*[bytes([b]) for b in HEAD + b"content-length: 5\r\n\r\nhello"]), True),
    ],
)
async def test_bodies_end_by_length_by_chunks_or_by_a_close(
    script: Script, reused: bool, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = World(nursery, script, echo)

    assert (await world.client.post(URL)).content == b"hello"
    await world.check_nothing_is_in_doubt()
    await world.client.post(URL, content=b"again")
    assert world.engine.connections == (1 if reused else 2)


async def test_a_head_request_has_no_body_whatever_the_answer_says(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = World(nursery)
    world.engine.routes["HEAD", "/"] = raw(HEAD + b"content-length: 5\r\n\r\n")
    response = await world.client.head("http://up/")

    assert (response.content, response.headers["content-length"]) == (b"", "5")
    await world.check_nothing_is_in_doubt()


async def test_a_streamed_answer_comes_piece_by_piece_and_is_reused_at_its_end(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = World(nursery, engines.stream_chat(["a", "b", "c"], gap=1), echo)
    began = trio.current_time()
    async with world.client.stream("POST", URL) as response:
        assert response.headers["content-type"] == "text/event-stream"
        pieces = [(trio.current_time() - began, piece) async for piece in response.aiter_raw()]
    await world.client.post(URL)

    assert [at for at, piece in pieces if b'"content"' in piece] == [0, 1, 2]
    assert world.engine.connections == 1


async def test_leaving_a_streamed_answer_hangs_up(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = World(nursery, engines.stall_after(1))
    async with world.client.stream("POST", URL) as response:
        assert response.status_code == 200
    await world.check_nothing_is_in_doubt()

    assert world.engine.abandoned == 1


async def test_walking_off_between_two_pieces_hangs_up(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = World(nursery, engines.stall_after(1))
    response = await world.transport.handle_async_request(httpx.Request("POST", URL))
    assert isinstance(response.stream, httpx.AsyncByteStream)
    async for piece in response.stream:
        assert b"tok0" in piece
        break
    await response.aclose()
    await world.check_nothing_is_in_doubt()

    assert world.engine.abandoned == 1


async def test_connections_are_kept_for_less_than_three_seconds(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = World(nursery)
    for pause in (2.9, 2.9, 3.0):
        await world.client.post(URL)
        await trio.sleep(pause)
    await world.client.post(URL)

    assert world.engine.connections == 2


async def test_closing_the_client_closes_every_connection(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = World(nursery)
    async with world.client:
        await world.client.post(URL)
    await trio.testing.wait_all_tasks_blocked()

    assert world.net.connections == world.engine.open_connections == 0


async def test_many_at_once_each_get_their_own_answer(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = World(nursery, default=lambda entry: Script([sleep(1), *echo(entry).steps]))

    async def ask(number: int) -> None:
        response = await world.client.post(URL, content=b"%d" % number)
        assert response.content.endswith(b" %d" % number)

    for _ in range(3):
        async with trio.open_nursery() as asking:
            for number in range(20):
                asking.start_soon(ask, number)

    assert world.engine.connections == world.engine.max_in_flight == 20


# --- failures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "error", "after"),
    [
        (Script([hang()]), httpx.ReadTimeout, 3),
        (raw(HEAD + b"content-length: 5\r\n\r\nhe").then(hang()), httpx.ReadTimeout, 3),
        (Script([close()]), httpx.RemoteProtocolError, 0),
        (engines.half_body(), httpx.RemoteProtocolError, 0),
        (engines.cut_after(2, mid_chunk=True), httpx.RemoteProtocolError, 0),
        (engines.garbage(), httpx.RemoteProtocolError, 0),
        (engines.switching_protocols(), httpx.RemoteProtocolError, 0),
        (engines.continues(9), httpx.RemoteProtocolError, 0),
        (raw(b"<html>HTTP/0.9</html>"), httpx.RemoteProtocolError, 0),
        (raw(b"HTTP/1.1 9999 Far Out\r\n\r\n"), httpx.RemoteProtocolError, 0),
        (raw(b"HTTP/1.1 600 Unheard\r\ncontent-length: 0\r\n\r\n"), httpx.RemoteProtocolError, 0),
        (raw(b"HTTP/1.1 999 Denied\r\ncontent-length: 0\r\n\r\n"), httpx.RemoteProtocolError, 0),
        (raw(b"HTTP/1.1 000 Nil\r\ncontent-length: 0\r\n\r\n"), httpx.RemoteProtocolError, 0),
        (raw(HEAD + b"no colon here\r\n\r\n"), httpx.RemoteProtocolError, 0),
        (raw(HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\nok!"),
         httpx.RemoteProtocolError, 0),
        (raw(HEAD + b"content-length: -2\r\n\r\nok"), httpx.RemoteProtocolError, 0),
        (raw(HEAD + b"x: " + b"y" * 70_000 + b"\r\n\r\n"), httpx.RemoteProtocolError, 0),
        (raw(*[HEAD, *[b"x: " + b"y" * 1000 + b"\r\n"] * 70]), httpx.RemoteProtocolError, 0),
        (raw(HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n"), httpx.RemoteProtocolError, 0),
    ],
)  # fmt: skip
async def test_failures_are_httpx_errors_and_cost_the_connection(
    script: Script, error: type[Exception], after: float,
    autojump_clock: MockClock, nursery: trio.Nursery,
) -> None:  # fmt: skip
    world = World(nursery, script, default=echo)
    began = trio.current_time()
    with pytest.raises(error) as caught:
        await world.client.post(URL, timeout=3)

    assert type(caught.value) is error
    assert trio.current_time() - began == after
    await world.check_nothing_is_in_doubt()
    response = await world.client.post(URL, content=b"mine")
    assert response.content.endswith(b" mine")
    assert world.engine.connections == 2


async def test_a_refused_connection_is_a_connect_error(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = World(nursery)
    world.net.refuse("up", 80)
    with pytest.raises(httpx.ConnectError, match="nothing listens"):
        await world.client.get("http://up/")

    await world.check_nothing_is_in_doubt()


async def test_a_connection_that_is_never_made_is_a_connect_timeout(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = World(nursery)
    world.net.blackhole("up", 80)
    began = trio.current_time()
    with pytest.raises(httpx.ConnectTimeout):
        await world.client.get("http://up/", timeout=httpx.Timeout(None, connect=2))

    assert trio.current_time() - began == 2
    await world.check_nothing_is_in_doubt()


async def test_a_request_that_nobody_takes_is_a_write_timeout(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    ours, theirs = trio.testing.lockstep_stream_pair()

    class Lockstep(anyio.abc.ByteStream):
        async def receive(self, max_bytes: int = 65536) -> bytes:
            return bytes(await ours.receive_some(max_bytes))

        async def send(self, item: bytes) -> None:
            await ours.send_all(item)

        async def send_eof(self) -> None:
            raise NotImplementedError

        async def aclose(self) -> None:
            await ours.aclose()

    async def connect(origin: Origin) -> anyio.abc.ByteStream:
        return Lockstep()

    began = trio.current_time()
    async with httpx.AsyncClient(transport=AnyIOTransport(connect=connect)) as client:
        with pytest.raises(httpx.WriteTimeout):
            await client.post("http://up/", timeout=httpx.Timeout(None, write=4))

    assert trio.current_time() - began == 4
    assert await theirs.receive_some() != b""
    assert await theirs.receive_some() == b""


@pytest.mark.parametrize(
    "script",
    [
        engines.surplus(),
        raw(b"HTTP/1.1 204 No Content\r\n\r\nnot content"),
        raw(b"HTTP/1.1 304 Not Modified\r\n\r\nmodified"),
        raw(HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nmore"),
        raw(HEAD + b"connection: close\r\ncontent-length: 2\r\n\r\nok"),
        raw(b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok"),
        engines.continues(3),
        engines.continues(3, code=100),
    ],
)
async def test_the_next_request_gets_its_own_answer(
    script: Script, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = World(nursery, script, default=echo)
    await world.client.post(URL)
    await world.check_nothing_is_in_doubt()

    for number in range(3):
        response = await world.client.post(URL, content=b"%d" % number)
        assert response.content.endswith(b" %d" % number)


async def test_a_length_beside_chunks_costs_the_connection(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    both = HEAD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    world = World(nursery, raw(both), default=echo)
    with pytest.raises(httpx.RemoteProtocolError):
        await world.client.post(URL)

    await world.check_nothing_is_in_doubt()
    assert world.transport.pool.open_count == 0


# --- cancellation ----------------------------------------------------------------------------


async def ask(world: World) -> None:
    await world.client.post(URL, content=b"cancelled")


async def stream(world: World) -> None:
    async with world.client.stream("POST", URL, content=b"cancelled") as response:
        async for _ in response.aiter_raw():
            pass


async def ask_over_an_old_connection(world: World) -> None:
    await world.client.post(URL, content=b"first")
    await world.client.post(URL, content=b"cancelled")


@pytest.mark.parametrize("work", [ask, stream, ask_over_an_old_connection])
async def test_cancelling_at_any_step_leaves_nothing_in_doubt(
    work: Callable[[World], Awaitable[None]], autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    def slowly(entry: LedgerEntry) -> Script:
        if entry.body == b"after":
            return echo(entry)
        return Script([sleep(1), *engines.stream_chat(["a", "b"], gap=1).steps])

    for step in range(1, 1000):
        world = World(nursery, default=slowly)

        async def run(world: World = world) -> None:
            await work(world)

        fired = await cancel_at(step, run)
        await world.check_nothing_is_in_doubt()
        response = await world.client.post(URL, content=b"after")
        assert response.content.endswith(b" after")
        await world.client.aclose()
        if not fired:
            break
    else:
        pytest.fail("it never came to an end")
    assert step > 20


@pytest.mark.parametrize(
    ("script", "phase"),
    [
        (Script([hang()]), "head"),
        (raw(HEAD + b"content-length: 9\r\n\r\nhalf").then(hang()), "body"),
    ],
)
async def test_the_engine_sees_the_hang_up_at_once(
    script: Script, phase: str, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = World(nursery, script)
    began = trio.current_time()
    with trio.move_on_after(7):
        await world.client.post(URL)
    await world.check_nothing_is_in_doubt()

    (entry,) = world.engine.posts
    assert entry.ended == "client_left"
    assert entry.client_left_at == began + 7


# --- over sockets ----------------------------------------------------------------------------


async def test_it_speaks_to_real_engines_and_reuses_their_connections(
    nursery: trio.Nursery,
) -> None:
    engine = ScriptedEngine()
    port = await serve_tcp(engine, nursery)
    with trio.fail_after(5):
        async with make_probe_client() as client:
            for _ in range(3):
                response = await client.get(f"http://127.0.0.1:{port}/health")
                assert response.json() == {"status": "ok"}
    nursery.cancel_scope.cancel()

    assert engine.connections == 1


@pytest.mark.parametrize("how", ["fin", "rst", "bytes"])
async def test_an_idle_connection_that_went_bad_costs_no_request_an_error(
    how: str, nursery: trio.Nursery
) -> None:
    told = trio.Event()
    parting = {"fin": close(), "rst": engines.reset(), "bytes": send(HEAD)}[how]
    first = engines.whole_chat("one").then(engines.answered(), parting, engines.tell(told))
    engine = ScriptedEngine([first], default=engines.whole_chat("two"))
    port = await serve_tcp(engine, nursery)
    with trio.fail_after(5):
        async with make_probe_client() as client:
            await client.post(f"http://127.0.0.1:{port}/v1/chat/completions")
            if how == "bytes":
                await told.wait()
            else:
                await engine.wait_until(lambda: engine.open_connections == 0)
            response = await client.post(f"http://127.0.0.1:{port}/v1/chat/completions")
            assert b"two" in response.content
    nursery.cancel_scope.cancel()

    assert engine.connections == 2


async def test_it_speaks_tls(nursery: trio.Nursery) -> None:
    authority = trustme.CA()
    engine = ScriptedEngine(default=engines.whole_chat("safe"))
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(server)

    async def serve(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):  # the client leaves without a TLS goodbye
            await engine.serve(trio.SSLStream(stream, server, server_side=True))

    listeners: list[trio.SocketListener] = await nursery.start(
        partial(trio.serve_tcp, serve, 0, host="localhost")
    )
    port = listeners[0].socket.getsockname()[1]
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    with trio.fail_after(5):
        async with httpx.AsyncClient(transport=AnyIOTransport(tls=trusted)) as client:
            for _ in range(2):
                response = await client.post(f"https://localhost:{port}/", json={})
                assert b"safe" in response.content
    nursery.cancel_scope.cancel()

    assert engine.connections == 1
