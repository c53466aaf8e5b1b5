"""The server on real sockets: floods, limits, TLS, Hypercorn, and a stock ASGI server around us."""

from __future__ import annotations

import gc
import json
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trustme

from citadel_gateway.app.server import Server
from citadel_gateway.config.schema import ServiceConfig
from citadel_gateway.config.values import Count, HttpServer, Seconds
from citadel_gateway.io.http1_exchange import EXCHANGE, ResponseAborted
from citadel_gateway.io.listening import Address, CannotListen
from citadel_gateway.io.record import Outcome, RequestRecord
from citadel_gateway.policy.watermarks import Level
from tests.support.openfds import open_descriptors, task_count
from tests.support.raw_client import NoResponseError, RawClient, http_request
from tests.support.scripted_engine import MODEL, ScriptedEngine, serve_tcp

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

PATIENCE = 15.0


@attrs.define(eq=False)
class Demo:
    started: trio.Event = attrs.field(factory=trio.Event)
    cancelled: trio.Event = attrs.field(factory=trio.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["path"]:
            case "/refuse":
                await self.refuse(receive, send)
            case "/bug":
                raise ZeroDivisionError("a bug")
            case "/abort":
                await start(send, 200)
                await send({"type": "http.response.body", "body": b"half", "more_body": True})
                raise ResponseAborted
            case "/hang":
                await self.until_left(scope, receive, trio.sleep_forever)
            case "/flood":
                await self.until_left(scope, receive, partial(flood, send))
            case path:
                await start(send, 200)
                await send({"type": "http.response.body", "body": path.encode()})

    async def refuse(self, receive: Receive, send: Send) -> None:
        await receive()
        await start(send, 413)
        await send({"type": "http.response.body", "body": b"too large"})

    async def until_left(
        self, scope: Scope, receive: Receive, work: Callable[[], Awaitable[None]]
    ) -> None:
        """Work until cancelled: by the server itself, or else when it says that the client left."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._work, work)
            if EXCHANGE not in scope["extensions"]:
                while (await receive())["type"] != "http.disconnect":
                    pass
                nursery.cancel_scope.cancel()

    async def _work(self, work: Callable[[], Awaitable[None]]) -> None:
        self.started.set()
        try:
            await work()
        finally:
            self.cancelled.set()


async def flood(send: Send) -> None:
    await start(send, 200)
    while True:
        await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})


async def start(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})


@attrs.define(eq=False)
class Running:
    app: Demo
    server: Server
    port: int
    crashes: list[tuple[str, Exception]]
    unserved: list[RequestRecord]

    async def connect(self) -> RawClient:
        return await RawClient.connect(self.port)

    async def wait_until_empty(self) -> None:
        while self.server.open_connections:  # noqa: ASYNC110  # the server has no event for tests
            await trio.sleep(0.005)


@asynccontextmanager
async def serving(
    *, cert: tuple[str, str] | tuple[None, None] = (None, None), **service: Any
) -> AsyncIterator[Running]:
    config = ServiceConfig(host="127.0.0.1", **service)
    crashes: list[tuple[str, Exception]] = []
    unserved: list[RequestRecord] = []

    def note(status: int, code: str, why: str, client: str) -> None:
        unserved.append(RequestRecord(request_id="", route="", client=client, began=0.0))
        unserved[-1].refuse(status=status, code=code, message=why)

    app = Demo()
    server = Server(
        app,
        Address("127.0.0.1", 0, *cert),
        config,
        lambda where, exc: crashes.append((where, exc)),
        note,
    )
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            address: Address = await nursery.start(server.run)
            yield Running(app, server, address.port, crashes, unserved)
            await server.stop(0)
            await server.cut()


BOTH = pytest.mark.parametrize("server", list(HttpServer), ids=lambda s: s.value)


@BOTH
async def test_requests_are_answered_on_one_connection(server: HttpServer) -> None:
    async with serving(server=server) as running, await running.connect() as client:
        answers = [await client.request("GET", path) for path in ("/a", "/b")]

    assert [a.body for a in answers] == [b"/a", b"/b"]


@BOTH
async def test_a_failing_connection_touches_no_other(server: HttpServer) -> None:
    async with serving(server=server) as running, await running.connect() as good:
        await good.request("GET", "/before")
        for rubbish in (b"\x16\x03\x01\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0" * 9000):
            async with await running.connect() as bad:
                await bad.send(rubbish)
                await bad.reset()
        async with await running.connect() as bad:
            await bad.send(http_request("GET", "/bug"))
            await bad.read_response()

        assert (await good.request("GET", "/after")).body == b"/after"


async def test_an_aborted_body_has_no_end() -> None:
    async with serving() as running, await running.connect() as client:
        answer = await client.request("GET", "/abort")

        assert (answer.body, answer.complete) == (b"half", False)
        assert running.crashes == []


@BOTH
@pytest.mark.parametrize("how", ["fin", "half", "rst"])
async def test_a_client_that_leaves_is_noticed(server: HttpServer, how: str) -> None:
    async with serving(server=server) as running:
        client = await running.connect()
        pipelined = b"" if server is HttpServer.HYPERCORN else http_request("GET", "/next")[:-5]
        await client.send(http_request("GET", "/flood" if how == "rst" else "/hang") + pipelined)
        await running.app.started.wait()  # a client that leaves sooner is never served
        if how == "rst":
            await client.read_head()
            await client.reset()
        elif how == "half":
            assert isinstance(client.stream, trio.SocketStream)
            await client.stream.send_eof()
        else:
            await client.aclose()
        await running.app.cancelled.wait()
        await client.aclose()


async def test_a_client_can_read_why_its_upload_was_refused() -> None:
    size = 20_000_000
    async with serving() as running, await running.connect() as client:

        async def upload() -> None:
            await client.send(
                http_request("POST", "/refuse", headers=[("content-length", f"{size}")])
            )
            for _ in range(size // 100_000):
                await client.send(b"x" * 100_000)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(upload)
            answer = await client.read_response()

        assert (answer.status, answer.body, answer.complete) == (413, b"too large", True)
        assert answer.header("connection") == "close"


@BOTH
async def test_a_client_that_never_reads_is_hung_up_on(server: HttpServer) -> None:
    service = serving(server=server, write_timeout=Seconds(0.5))
    async with service as running, await running.connect() as client:
        await client.send(http_request("GET", "/flood"))
        await running.app.cancelled.wait()
        await running.wait_until_empty()


async def test_a_thousand_connects_and_closes_leave_nothing_behind() -> None:
    async with serving() as running:
        async with await running.connect() as client:
            await client.request("GET", "/warm")
        await running.wait_until_empty()
        gc.collect()  # what other tests have left
        before = open_descriptors(), task_count()

        async def visit() -> None:
            for _ in range(50):
                await (await running.connect()).aclose()

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(visit)
        async with await running.connect() as client:  # accepted last, so all others were, too
            assert (await client.request("GET", "/a")).status == 200
        await running.wait_until_empty()

        assert (open_descriptors(), task_count()) == before
        assert running.crashes == []


async def test_a_connection_too_many_is_told_so() -> None:
    async with serving(max_connections=Count(2)) as running:
        async with await running.connect() as first, await running.connect() as second:
            for client in (first, second):
                await client.request("GET", "/a")
            async with await running.connect() as third:
                answer = await third.request("GET", "/a")
                assert (answer.status, answer.header("connection")) == (503, "close")
                assert answer.json()["error"]["code"] == "too_many_connections"
                assert answer.header("retry-after") == "1"
            assert (await first.request("GET", "/b")).status == 200
        await running.wait_until_empty()

        async with await running.connect() as again:
            assert (await again.request("GET", "/a")).status == 200
        assert [record.outcome for record in running.unserved] == [Outcome.TOO_MANY_CONNECTIONS]


async def test_from_the_first_level_on_connections_end_with_their_answers() -> None:
    async with serving() as running, await running.connect() as old:
        before = await old.request("GET", "/a")
        running.server.take_less(Level.CLOSING)
        async with await running.connect() as new:
            during = [await client.request("GET", "/b") for client in (old, new)]
        running.server.take_less(Level.CALM)
        async with await running.connect() as client:
            after = [await client.request("GET", "/c") for _ in range(2)]

    assert before.header("connection") is None
    assert [answer.header("connection") for answer in during] == ["close", "close"]
    assert [answer.header("connection") for answer in after] == [None, None]


async def test_at_the_last_level_newcomers_wait_and_idle_connections_end() -> None:
    async with serving() as running:
        async with await running.connect() as idle, await running.connect() as busy:
            await idle.request("GET", "/a")
            await busy.send(http_request("GET", "/flood"))
            await running.app.started.wait()
            running.server.take_less(Level.SHUT)
            with pytest.raises(NoResponseError):
                await idle.read_head()
            await idle.aclose()
            async with await running.connect() as new:
                await new.send(http_request("GET", "/b"))
                with trio.move_on_after(0.2) as waiting:
                    await new.read_head()
                assert running.server.open_connections == 1
                assert (await busy.read_head()).status == 200  # what runs goes on
                running.server.take_less(Level.REFUSING)
                assert (await new.read_response()).body == b"/b"
        await running.wait_until_empty()

    assert waiting.cancelled_caught


async def test_a_server_that_is_shut_can_be_stopped_and_answers_who_waits() -> None:
    async with serving() as running:
        running.server.take_less(Level.SHUT)
        async with await running.connect() as waiting:
            await waiting.send(http_request("GET", "/a"))
            await trio.sleep(0.05)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(running.server.stop, 5)
                assert (await waiting.read_response()).body == b"/a"


async def test_a_flood_of_connections_is_held_to_the_limit() -> None:
    async with serving(max_connections=Count(2)) as running:
        clients = [await running.connect() for _ in range(150)]
        async with await running.connect() as last:
            with pytest.raises(NoResponseError):
                await last.read_head()  # too many even to be told
        assert running.server.open_connections <= 2 + 64
        for client in clients:
            await client.aclose()
        await running.wait_until_empty()


async def test_a_port_in_use_cannot_be_listened_on() -> None:
    async with serving() as running:
        second = Server(
            Demo(), Address("127.0.0.1", running.port), ServiceConfig(), lambda where, exc: None
        )
        with pytest.raises(CannotListen, match="it is in use"):
            await second.run()


# Whoever has connected is answered.


def connect_without_waiting(port: int, count: int) -> list[trio.SocketStream]:
    """Connections with a request each, which the server had no turn to see yet."""
    found = []
    for _ in range(count):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(http_request("GET", "/a"))
        sock.setblocking(False)
        found.append(trio.SocketStream(trio.socket.from_stdlib_socket(sock)))
    return found


@BOTH
async def test_who_has_connected_but_was_not_seen_yet_is_answered(server: HttpServer) -> None:
    answers = []
    async with serving(server=server) as running:
        waiting = connect_without_waiting(running.port, 200)
        running.server.promise_nothing()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.server.stop, 5)
            for stream in waiting:
                async with RawClient(stream) as client:
                    answers.append(await client.read_response())

    assert [a.body for a in answers] == [b"/a"] * 200
    if server is HttpServer.LLHTTP:
        assert {a.header("connection") for a in answers} == {"close"}


async def test_who_connects_when_the_listener_has_closed_is_refused() -> None:
    async with serving() as running:
        await running.server.stop(0)
        with pytest.raises(OSError, match="all attempts to connect"):
            await running.connect()


async def test_a_request_that_has_arrived_but_was_not_read_yet_is_answered() -> None:
    async with serving() as running, await running.connect() as client:
        await client.request("GET", "/before")
        running.server.share()  # so that stopping does not wait for anybody first
        stream = client.stream
        assert isinstance(stream, trio.SocketStream)
        os.write(stream.socket.fileno(), http_request("GET", "/a"))  # the server has no turn yet
        await running.server.stop(5)

        assert (await client.read_response()).body == b"/a"


async def test_a_listener_that_is_shared_is_left_with_those_who_wait() -> None:
    """They are served by the next process, which has the same socket."""

    served: list[str] = []

    def make(name: str) -> Server:
        demo = Demo()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            served.append(name)
            await demo(scope, receive, send)

        here, sock = Address("127.0.0.1", port), manager.dup()
        return Server(app, here, ServiceConfig(), lambda where, exc: None, inherited=sock)

    with socket.create_server(("127.0.0.1", 0)) as manager, trio.fail_after(PATIENCE):
        port = manager.getsockname()[1]
        first, second = make("first"), make("second")
        async with trio.open_nursery() as nursery:
            await nursery.start(first.run)
            async with await RawClient.connect(port) as client:
                assert (await client.request("GET", "/b")).body == b"/b"
            waiting = connect_without_waiting(port, 20)
            await first.stop(0)
            await first.cut()
            assert first.open_connections == 0
            address: Address = await nursery.start(second.run)
            answers = []
            for stream in waiting:
                async with RawClient(stream) as client:
                    answers.append((await client.read_response()).body)
            await second.stop(0)
            await second.cut()

    assert answers == [b"/a"] * 20
    assert served == ["first", *["second"] * 20]
    assert address == Address("127.0.0.1", port)


async def test_ipv6_is_listened_on_too() -> None:
    server = Server(Demo(), Address("::1", 0), ServiceConfig(), lambda where, exc: None)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            try:
                address: Address = await nursery.start(server.run)
            except* CannotListen:
                pytest.skip("there is no IPv6 here")
            assert str(address) == f"[::1]:{address.port}"
            async with await RawClient.connect(address.port, "::1") as client:
                assert (await client.request("GET", "/a")).body == b"/a"
            await server.stop(0)
            await server.cut()


# TLS.


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def cert(authority: trustme.CA, tmp_path: Path) -> tuple[str, str]:
    issued = authority.issue_cert("localhost")
    files = tmp_path / "cert.pem", tmp_path / "key.pem"
    issued.cert_chain_pems[0].write_to_path(files[0])
    issued.private_key_pem.write_to_path(files[1])
    return str(files[0]), str(files[1])


async def connect_tls(
    running: Running, authority: trustme.CA, protocols: list[str]
) -> trio.SSLStream[trio.SocketStream]:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    context.set_alpn_protocols(protocols)
    tcp = await trio.open_tcp_stream("127.0.0.1", running.port)
    stream = trio.SSLStream(tcp, context, server_hostname="localhost", https_compatible=True)
    await stream.do_handshake()
    return stream


@asynccontextmanager
async def tls_client(running: Running, authority: trustme.CA) -> AsyncIterator[RawClient]:
    async with RawClient(await connect_tls(running, authority, ["http/1.1"])) as client:
        yield client


async def test_http_1_1_over_tls(authority: trustme.CA, cert: tuple[str, str]) -> None:
    async with serving(cert=cert) as running, tls_client(running, authority) as client:
        assert (await client.request("GET", "/a")).body == b"/a"
        answer = await client.request("GET", "/b", headers=[("connection", "close")])
        assert (answer.body, answer.complete) == (b"/b", True)


async def test_an_upload_over_tls_can_read_why_it_was_refused(
    authority: trustme.CA, cert: tuple[str, str]
) -> None:
    async with serving(cert=cert) as running, tls_client(running, authority) as client:
        head = http_request("POST", "/refuse", headers=[("content-length", "9000000")])
        await client.send(head + b"x" * 5_000_000)
        answer = await client.read_response()

        assert (answer.status, answer.complete) == (413, True)


@pytest.mark.parametrize(("http2", "chosen"), [(True, "h2"), (False, "http/1.1")])
async def test_http_2_is_offered_unless_it_is_turned_off(
    http2: bool, chosen: str, authority: trustme.CA, cert: tuple[str, str]
) -> None:
    async with serving(cert=cert, http2=http2) as running:
        stream = await connect_tls(running, authority, ["h2", "http/1.1"])
        await trio.aclose_forcefully(stream)

        assert stream.selected_alpn_protocol() == chosen


async def test_a_handshake_that_does_not_come_is_given_up(cert: tuple[str, str]) -> None:
    async with serving(cert=cert, header_timeout=Seconds(0.2)) as running:
        async with await running.connect() as client:
            with pytest.raises(NoResponseError):
                await client.read_head()

        assert running.crashes == []


# Inside somebody else's server.


async def test_stock_hypercorn_can_host_the_gateway(tmp_path: Path) -> None:
    config = tmp_path / "gateway.yaml"
    engine = ScriptedEngine()
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            url = f"http://127.0.0.1:{await serve_tcp(engine, nursery)}"
            settings = {"models": {MODEL: {"endpoint": url}}}
            config.write_text(json.dumps(settings))
            command = [sys.executable, "-m", "hypercorn", "-k", "trio", "-b", "127.0.0.1:0"]
            process = await trio.lowlevel.open_process(
                [*command, "citadel_gateway:create_app()"],
                env={**os.environ, "CITADEL_CONFIG": str(config)},
                stderr=subprocess.PIPE,
            )
            try:
                port = await _announced_port(process)
                async with await RawClient.connect(port) as client:
                    health = await client.request("GET", "/health")
                    ask = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
                    chat = await client.request("POST", "/v1/chat/completions", ask)
                process.terminate()
                await process.wait()
            finally:
                if process.returncode is None:
                    process.kill()
                    with trio.move_on_after(2, shield=True):
                        await process.wait()
            nursery.cancel_scope.cancel()

    assert (health.status, health.json()["status"]) == (200, "healthy")
    assert chat.json()["choices"][0]["message"]["content"] == "ok"


async def _announced_port(process: trio.Process) -> int:
    assert process.stderr is not None
    said = b""
    while b" on http://127.0.0.1:" not in said or b"(CTRL" not in said:
        data = await process.stderr.receive_some()
        assert data, said
        said += data
    return int(said.partition(b" on http://127.0.0.1:")[2].split(b" ")[0])
