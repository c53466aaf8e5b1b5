"""One connection: what may follow a response, and how its owner learns that nothing may."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import anyio
import pytest
import trio
import trio.testing
import trustme
from anyio.abc import SocketAttribute
from trio.testing import MockClock

from citadel_gateway.io.connection import Connection
from citadel_gateway.io.dial import Origin, make_connect
from citadel_gateway.wire.http1_response import BadResponse, CutShort
from tests.support.memory_net import MemoryByteStream
from tests.support.raw_client import reset_stream

Handler = Callable[[trio.SocketStream], Awaitable[None]]
UP = Origin("http", "up", 80)
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
OTHER = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nnope"


def in_memory() -> tuple[
    Connection, trio.testing.MemoryReceiveStream, trio.testing.MemorySendStream
]:
    ours, theirs = trio.testing.memory_stream_pair()
    connection = Connection(UP, MemoryByteStream(ours), trio.current_time)
    return connection, theirs.receive_stream, theirs.send_stream


async def read(connection: Connection) -> bytes:
    await connection.read_head()
    body = b""
    while piece := await connection.read_body():
        body += piece
    return body


@pytest.mark.parametrize(
    ("raw", "body", "reusable"),
    [
        (ANSWER, b"ok", True),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", b"ok", True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
        (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n", b"", True),
        (b"HTTP/1.1 103 Early Hints\r\n\r\n" + ANSWER, b"ok", True),
        (b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nok", b"ok", True),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", b"ok", False),
        (
            b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok", b"ok", False,
        ),
        (ANSWER + OTHER, b"ok", False),
        (ANSWER + b"x", b"ok", False),
        (ANSWER + b"\0", b"ok", False),
        (b"HTTP/1.1 204 No Content\r\n\r\nnot content", b"", False),
        (b"HTTP/1.1 304 Not Modified\r\n\r\nmodified", b"", False),
    ],
)  # fmt: skip
async def test_only_a_clean_end_makes_a_connection_reusable(
    raw: bytes, body: bytes, reusable: bool, autojump_clock: MockClock
) -> None:
    connection, _, engine = in_memory()
    await connection.send(b"request")
    assert not connection.is_reusable()
    await engine.send_all(raw)

    assert await read(connection) == body
    assert connection.is_reusable() is reusable


async def test_a_body_that_was_not_read_to_its_end_is_in_doubt(autojump_clock: MockClock) -> None:
    connection, _, engine = in_memory()
    await connection.send(b"request")
    await engine.send_all(ANSWER)
    await connection.read_head()

    assert not connection.is_reusable()
    assert await connection.read_body() == b"ok"
    assert not connection.is_reusable()
    assert await connection.read_body() == b""
    assert connection.is_reusable()


async def test_an_early_answer_to_a_request_that_was_not_sent_whole_ends_the_connection(
    autojump_clock: MockClock,
) -> None:
    connection, requests, engine = in_memory()
    await engine.send_all(b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n")
    requests.close()
    with pytest.raises(ConnectionResetError):
        await connection.send(b"request")

    assert await read(connection) == b""
    assert connection.response.status == 413
    assert not connection.is_reusable()


@pytest.mark.parametrize(
    ("sent", "started"), [(b"", False), (b"HTTP/1.1 2", True), (ANSWER[:-1], True)]
)
async def test_being_cut_short_tells_whether_anything_had_come(
    sent: bytes, started: bool, autojump_clock: MockClock
) -> None:
    connection, _, engine = in_memory()
    await connection.send(b"request")
    await engine.send_all(sent)
    await engine.aclose()
    with pytest.raises(CutShort) as caught:
        await read(connection)

    assert caught.value.started is started
    assert not connection.is_reusable()


async def test_the_wait_for_the_upstream_is_measured_even_if_it_was_in_vain(
    autojump_clock: MockClock,
) -> None:
    connection, _, engine = in_memory()
    await connection.send(b"request")
    with trio.move_on_after(2):
        await connection.read_head()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.read_head)
        await trio.sleep(3)
        await engine.send_all(ANSWER)

    assert connection.waited == 5


async def test_closing_never_waits_and_works_while_cancelled(autojump_clock: MockClock) -> None:
    connection, requests, _ = in_memory()
    with trio.CancelScope() as scope:
        scope.cancel()
        await connection.aclose()

    assert not scope.cancelled_caught
    assert await requests.receive_some() == b""


# --- over sockets ----------------------------------------------------------------------------


@asynccontextmanager
async def connected(handler: Handler, tls: trustme.CA | None = None) -> AsyncIterator[Connection]:
    context = ssl.create_default_context()
    if tls is not None:
        tls.configure_trust(context)
    async with trio.open_nursery() as nursery:
        listeners: list[trio.SocketListener] = await nursery.start(
            partial(trio.serve_tcp, handler, 0, host="127.0.0.1")
        )
        scheme = "http" if tls is None else "https"
        origin = Origin(scheme, "127.0.0.1", listeners[0].socket.getsockname()[1])
        with trio.fail_after(5):
            connection = Connection(origin, await make_connect(context)(origin), trio.current_time)
            try:
                yield connection
            finally:
                await connection.aclose()
        nursery.cancel_scope.cancel()


async def something_arrives(connection: Connection) -> None:
    await trio.lowlevel.wait_readable(connection.stream.extra(SocketAttribute.raw_socket))


@pytest.mark.parametrize("how", ["fin", "rst", "bytes"])
async def test_whatever_arrives_on_an_idle_connection_makes_it_stale(how: str) -> None:
    asked_to = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(ANSWER)
        await asked_to.wait()
        match how:
            case "rst":
                await reset_stream(stream)
            case "bytes":
                await stream.send_all(OTHER)
                await trio.sleep_forever()

    async with connected(serve) as connection:
        await connection.send(b"request")
        await read(connection)
        assert connection.is_reusable()
        assert not connection.is_stale()
        asked_to.set()
        await something_arrives(connection)

        assert connection.is_stale()


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_a_reset_is_a_short_answer_whoever_notices_it(how: str) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        if how == "rst":
            await reset_stream(stream)

    async with connected(serve) as connection:
        await connection.send(b"request")
        with pytest.raises(CutShort) as caught:
            await connection.read_head()

        assert not caught.value.started


async def test_a_send_to_a_connection_that_was_reset_is_an_os_error() -> None:
    async with connected(reset_stream) as connection:
        await something_arrives(connection)
        with pytest.raises(OSError, match="closed the connection"):
            await connection.send(b"request")


async def test_hanging_up_reaches_the_upstream_before_the_task_in_charge_has_noticed() -> None:
    noticed = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(ANSWER)
        assert await stream.receive_some() == b""
        noticed.set()

    async with connected(serve) as connection:
        await connection.send(b"request")
        await read(connection)
        connection.hang_up()
        await noticed.wait()

        assert not connection.is_reusable()


def speaking_tls(
    authority: trustme.CA, talk: Callable[[trio.SSLStream[trio.SocketStream]], Awaitable[None]]
) -> Handler:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)

    async def serve(stream: trio.SocketStream) -> None:
        await talk(trio.SSLStream(stream, context, server_side=True, https_compatible=True))

    return serve


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


async def test_a_quiet_tls_connection_is_used_again(authority: trustme.CA) -> None:
    async def talk(stream: trio.SSLStream[trio.SocketStream]) -> None:
        while await stream.receive_some():
            await stream.send_all(ANSWER)

    async with connected(speaking_tls(authority, talk), authority) as connection:
        for _ in range(3):
            await connection.send(b"request")
            assert await read(connection) == b"ok"
            assert connection.is_reusable()
            assert not connection.is_stale()


async def test_surplus_in_a_tls_record_of_its_own_makes_the_connection_stale(
    authority: trustme.CA,
) -> None:
    # Both records come with one read of the socket, so that no poll can see the second one.
    async def talk(stream: trio.SSLStream[trio.SocketStream]) -> None:
        await stream.receive_some()
        both = bytearray()
        raw = stream.transport_stream
        stream.transport_stream = _Collector(both)  # type: ignore[assignment]
        await stream.send_all(ANSWER)
        await stream.send_all(OTHER)
        await raw.send_all(both)
        await trio.sleep_forever()

    async with connected(speaking_tls(authority, talk), authority) as connection:
        await connection.send(b"request")
        assert await read(connection) == b"ok"

        assert connection.is_stale()


class _Collector:
    def __init__(self, into: bytearray) -> None:
        self._into = into

    async def send_all(self, data: bytes) -> None:
        self._into += data


@pytest.mark.parametrize("goodbye", [True, False])
async def test_an_idle_tls_connection_that_was_closed_is_stale(
    goodbye: bool, authority: trustme.CA
) -> None:
    async def talk(stream: trio.SSLStream[trio.SocketStream]) -> None:
        await stream.receive_some()
        await stream.send_all(ANSWER)
        if goodbye:
            await stream.aclose()

    async with connected(speaking_tls(authority, talk), authority) as connection:
        await connection.send(b"request")
        assert await read(connection) == b"ok"
        await something_arrives(connection)

        assert connection.is_stale()


async def test_garbage_inside_tls_is_an_os_error_or_a_bad_response(
    authority: trustme.CA,
) -> None:
    async def talk(stream: trio.SSLStream[trio.SocketStream]) -> None:
        await stream.receive_some()
        await stream.transport_stream.send_all(b"not a TLS record at all")
        await trio.sleep_forever()

    async with connected(speaking_tls(authority, talk), authority) as connection:
        await connection.send(b"request")
        with pytest.raises((OSError, BadResponse)) as caught:
            await connection.read_head()

        assert not isinstance(caught.value, anyio.BrokenResourceError)
