"""One connection in memory, in virtual time: what goes in, what comes out, and exactly when."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
from trio.testing import (
    MemorySendStream,
    lockstep_stream_pair,
    memory_stream_pair,
    wait_all_tasks_blocked,
)

from citadel_gateway.io.deadlines import Deadlines
from citadel_gateway.io.departures import Departures
from citadel_gateway.io.http1_exchange import ResponseAborted
from citadel_gateway.io.http1_server import ConnectionLimits, HttpConnection
from tests.support.raw_client import NoResponseError, RawClient, RawResponse, http_request

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

LIMITS = ConnectionLimits(
    header_timeout=5, body_timeout=60, keep_alive_timeout=75, write_timeout=30, max_requests=1000
)
CANARY = b"GET /canary HTTP/1.1\r\nhost: gateway\r\n\r\n"


@attrs.define(eq=False)
class Demo:
    """An application with a path for each habit that an application can have."""

    seen: list[str] = attrs.field(factory=list)
    cancelled: list[tuple[str, float]] = attrs.field(factory=list)
    bodies: list[bytes] = attrs.field(factory=list)
    running: int = 0
    most_running: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        self.seen.append(path)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await getattr(self, path.split("/")[1], self.echo)(scope, receive, send)
        except trio.Cancelled:
            self.cancelled.append((path, trio.current_time()))
            raise
        finally:
            self.running -= 1

    async def echo(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.bodies.append(await read_all(receive))
        await answer(send, f"{scope['method']} {scope['path']} ".encode() + self.bodies[-1])

    async def slow(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_all(receive)
        await trio.sleep(10)
        await answer(send, scope["path"].encode() + body)

    async def unread(self, scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, b"no", 401)

    async def hang(self, scope: Scope, receive: Receive, send: Send) -> None:
        await trio.sleep_forever()

    async def stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        await start(send, 200)
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await trio.sleep(100)
        await send({"type": "http.response.body", "body": b"two", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def flood(self, scope: Scope, receive: Receive, send: Send) -> None:
        await start(send, 200)
        while True:
            await send({"type": "http.response.body", "body": b"x" * 1000, "more_body": True})

    async def empty(self, scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, b"", int(scope["path"].rpartition("/")[2]))

    async def bug(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError("a bug")

    async def group(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            raise ZeroDivisionError("a bug in a nursery")

    async def silent(self, scope: Scope, receive: Receive, send: Send) -> None:
        pass

    async def text(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": [("a", "b")]}
        await send(head)
        await send({"type": "http.response.body", "body": b"", "more_body": True})

    async def latebug(self, scope: Scope, receive: Receive, send: Send) -> None:
        await start(send, 200)
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise ZeroDivisionError("a bug")

    async def abort(self, scope: Scope, receive: Receive, send: Send) -> None:
        await start(send, 200)
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise ResponseAborted

    async def goodbye(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Has last words for the client when it is cancelled from outside."""
        await start(send, 200)
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await send({"type": "http.response.body", "body": b"bye", "more_body": True})

    async def twice(self, scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, b"once")
        await send({"type": "http.response.body", "body": b"more"})


async def read_all(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    return body


async def start(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"X-A", b"b")]})


async def answer(send: Send, body: bytes, status: int = 200) -> None:
    await start(send, status)
    await send({"type": "http.response.body", "body": body})


@attrs.define(eq=False)
class Conversation:
    app: Demo
    client: RawClient
    connection: HttpConnection
    crashes: list[Exception]
    writes: list[float]  # when the server wrote
    ended: trio.Event

    async def send(self, data: bytes) -> None:
        await self.client.send(data)

    async def ask(self, path: str, method: str = "GET", **options: Any) -> RawResponse:
        await self.send(http_request(method, path, **options))
        return await self.client.read_response(method)

    async def expect_end(self) -> float:
        """The time at which the server hangs up, with nothing said before."""
        with pytest.raises(NoResponseError, match=r"after b''"):
            await self.client.read_head()
        return trio.current_time()


@asynccontextmanager
async def talking(
    *, lockstep: bool = False, app: Demo | None = None, **limits: Any
) -> AsyncIterator[Conversation]:
    """A connection to an application; it must end when its client has left."""
    client, server = lockstep_stream_pair() if lockstep else memory_stream_pair()
    crashes: list[Exception] = []
    writes: list[float] = []
    app = app or Demo()
    deadlines, departures = Deadlines(), Departures()
    connection = HttpConnection(
        app, server, attrs.evolve(LIMITS, **limits), deadlines, departures, crashes.append
    )
    departures.close()  # nothing here has a socket to watch
    if isinstance(server.send_stream, MemorySendStream):
        server.send_stream.send_all_hook = _noting(writes, server.send_stream.send_all_hook)
    ended = trio.Event()

    async def run() -> None:
        await connection.run()
        ended.set()

    # Nothing here takes so long: a test that hangs fails at once, for time is virtual.
    with trio.fail_after(10_000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(deadlines.run)
            nursery.start_soon(run)
            talk = Conversation(app, RawClient(client), connection, crashes, writes, ended)
            yield talk
            await trio.aclose_forcefully(client)
            with trio.fail_after(1):
                await ended.wait()
            nursery.cancel_scope.cancel()


def _noting(writes: list[float], deliver: Any) -> Callable[[], Awaitable[None]]:
    async def note() -> None:
        writes.append(trio.current_time())
        await deliver()

    return note


def get(path: str, *headers: str) -> bytes:
    return http_request("GET", path, headers=[tuple(h.split(": ")) for h in headers])  # type: ignore[misc]


# Framing and keep-alive.


async def test_a_connection_is_kept_for_the_next_request(autojump_clock: object) -> None:
    async with talking() as talk:
        answers = [await talk.ask(path) for path in ("/a", "/b", "/c")]

    assert [a.body for a in answers] == [b"GET /a ", b"GET /b ", b"GET /c "]
    assert [a.header("connection") for a in answers] == [None] * 3


async def test_the_last_request_of_a_connection_says_so(autojump_clock: object) -> None:
    async with talking(max_requests=2) as talk:
        first, second = await talk.ask("/a"), await talk.ask("/b")

        assert await talk.expect_end() == 0
    assert (first.header("connection"), second.header("connection")) == (None, "close")


async def test_a_client_that_wants_to_close_is_closed(autojump_clock: object) -> None:
    async with talking() as talk:
        answer = await talk.ask("/a", headers=[("connection", "close")])

        assert answer.header("connection") == "close"
        assert await talk.expect_end() == 0


async def test_a_whole_answer_has_a_length_and_is_one_write(autojump_clock: object) -> None:
    async with talking() as talk:
        answer = await talk.ask("/a", "POST", body=b"xyz")

        assert talk.writes == [0]
    assert (answer.body, answer.header("content-length")) == (b"POST /a xyz", "11")
    assert (answer.header("transfer-encoding"), answer.header("x-a")) == (None, "b")


async def test_a_stream_is_chunked_and_its_head_comes_with_its_first_piece(
    autojump_clock: object,
) -> None:
    async with talking() as talk:
        answer = await talk.ask("/stream")

        assert talk.writes == [0, 100, 100]
    assert (answer.body, answer.complete) == (b"onetwo", True)
    assert (answer.header("transfer-encoding"), answer.header("content-length")) == (
        "chunked",
        None,
    )


async def test_a_chunked_request_arrives_as_its_body(autojump_clock: object) -> None:
    async with talking() as talk:
        await talk.send(http_request("POST", "/a", headers=[("transfer-encoding", "chunked")]))
        for piece in (b"3\r\nabc\r\n", b"2\r", b"\nde\r\n0\r\nhost: evil\r\n\r\n"):
            await talk.send(piece)
            await wait_all_tasks_blocked()

        assert (await talk.client.read_response()).body == b"POST /a abcde"
        assert (await talk.ask("/b")).body == b"GET /b "


@pytest.mark.parametrize(("keep", "said"), [(True, "keep-alive"), (False, "close")])
async def test_http_1_0_is_kept_alive_only_when_asked(
    keep: bool, said: str, autojump_clock: object
) -> None:
    async with talking() as talk:
        await talk.send(b"GET /a HTTP/1.0\r\n" + b"connection: keep-alive\r\n" * keep + b"\r\n")
        answer = await talk.client.read_response()

        assert (answer.body, answer.header("connection")) == (b"GET /a ", said)
        if not keep:
            assert await talk.expect_end() == 0


async def test_a_stream_to_http_1_0_ends_with_its_connection(autojump_clock: object) -> None:
    async with talking() as talk:
        await talk.send(b"GET /stream HTTP/1.0\r\nconnection: keep-alive\r\n\r\n")
        answer = await talk.client.read_response()

        assert (answer.body, answer.header("transfer-encoding")) == (b"onetwo", None)
        assert (answer.header("connection"), talk.client.ended) == ("close", "fin")


async def test_an_answer_to_head_has_the_head_of_an_answer_and_no_body(
    autojump_clock: object,
) -> None:
    async with talking() as talk:
        answer = await talk.ask("/a", "HEAD")
        streamed = await talk.ask("/stream", "HEAD")

        assert (await talk.ask("/b")).body == b"GET /b "
    assert (answer.status, answer.header("content-length")) == (200, "8")
    assert streamed.header("transfer-encoding") == "chunked"


@pytest.mark.parametrize("status", [204, 304])
async def test_an_answer_that_cannot_have_a_body_has_no_framing(
    status: int, autojump_clock: object
) -> None:
    async with talking() as talk:
        answer = await talk.ask(f"/empty/{status}")

        assert (await talk.ask("/b")).body == b"GET /b "
    assert answer.status == status
    assert answer.header("content-length") is answer.header("transfer-encoding") is None


async def test_what_is_sent_after_the_end_of_an_answer_is_ignored(autojump_clock: object) -> None:
    async with talking() as talk:
        await talk.ask("/twice")

        assert (await talk.ask("/b")).body == b"GET /b "


# Pipelining.


async def test_pipelined_requests_are_answered_in_order(autojump_clock: object) -> None:
    async with talking() as talk:
        await talk.send(b"".join(get(f"/{n}") for n in range(10)))
        answers = [await talk.client.read_response() for _ in range(10)]

    assert [a.body for a in answers] == [b"GET /%d " % n for n in range(10)]


async def test_however_many_requests_are_pipelined_each_is_answered(
    autojump_clock: object,
) -> None:
    async with talking() as talk:
        await talk.send(b"".join(get(f"/{n}") for n in range(300)) + b"GET /part")
        answers = [await talk.client.read_response() for _ in range(300)]
        late = await talk.client.read_response()

    assert [a.body for a in answers] == [b"GET /%d " % n for n in range(300)]
    assert (late.status, trio.current_time()) == (408, 5)


async def test_pipelined_posts_run_one_after_the_other(autojump_clock: object) -> None:
    async with talking() as talk:
        requests = [http_request("POST", f"/slow/{n}", body=b"%d" % n) for n in range(3)]
        await talk.send(b"".join(requests))
        answers = [await talk.client.read_response() for _ in range(3)]

        assert talk.writes == [10, 20, 30]
    assert [a.body for a in answers] == [b"/slow/00", b"/slow/11", b"/slow/22"]
    assert talk.app.most_running == 1


async def test_bytes_read_while_a_request_runs_belong_to_the_next(autojump_clock: object) -> None:
    async with talking() as talk:
        await talk.send(http_request("POST", "/slow", body=b"one"))
        await trio.sleep(5)
        second = http_request("POST", "/second", body=b"two")
        await talk.send(second[:20])
        await trio.sleep(1)
        await talk.send(second[20:])

        assert (await talk.client.read_response()).body == b"/slowone"
        assert (await talk.client.read_response()).body == b"POST /second two"


async def test_a_large_pipelined_body_is_not_kept_in_memory(autojump_clock: object) -> None:
    size = 2**20
    async with talking() as talk:
        await talk.send(get("/slow") + http_request("POST", "/big", body=b"x" * size))
        await trio.sleep(1)

        assert sum(r.buffered for r in talk.connection._parser.requests) < 100_000
        assert (await talk.client.read_response()).body == b"/slow"
        assert len((await talk.client.read_response()).body) == len("POST /big ") + size


async def test_a_pipelined_partial_head_does_not_end_a_running_stream(
    autojump_clock: object,
) -> None:
    async with talking() as talk:
        await talk.send(get("/stream") + b"GET /nev")
        answer = await talk.client.read_response()
        late = await talk.client.read_response()

    assert (answer.body, answer.complete) == (b"onetwo", True)
    assert (late.status, trio.current_time()) == (408, 105)  # its own clock begins afterwards


# The client leaves.


@pytest.mark.parametrize("pipelined", [b"", b"GET /ne", CANARY], ids=["", "partial", "whole"])
@pytest.mark.parametrize("path", ["/hang", "/stream"])
@pytest.mark.parametrize("how", ["close", "half"])
async def test_a_client_that_leaves_cancels_its_request(
    how: str, path: str, pipelined: bytes, autojump_clock: object
) -> None:
    async with talking() as talk:
        await talk.send(get(path) + pipelined)
        await trio.sleep(7)
        await (talk.client.stream.send_eof() if how == "half" else talk.client.aclose())  # type: ignore[attr-defined]
        await talk.ended.wait()

        assert talk.app.cancelled == [(path, 7)]
    assert (talk.app.seen, talk.crashes) == ([path], [])


async def test_a_client_that_leaves_within_its_body_cancels_its_request(
    autojump_clock: object,
) -> None:
    async with talking() as talk:
        for_reading = http_request("POST", "/a", headers=[("content-length", "10")])
        await talk.send(for_reading + b"12345")
        await trio.sleep(3)
        await talk.client.aclose()
        await talk.ended.wait()

        assert talk.app.cancelled == [("/a", 3)]


async def test_a_client_that_leaves_a_body_nobody_reads_cancels_its_request(
    autojump_clock: object,
) -> None:
    async with talking() as talk:
        await talk.send(http_request("POST", "/hang", headers=[("content-length", "10")]) + b"12")
        await trio.sleep(3)
        await talk.client.aclose()
        await talk.ended.wait()

        assert talk.app.cancelled == [("/hang", 3)]


async def test_a_request_whose_client_has_left_before_it_was_taken_up_is_not_run(
    autojump_clock: object,
) -> None:
    for _ in range(20):  # whichever of the two tasks the scheduler takes first
        async with talking() as talk:
            await talk.send(get("/hang"))
            await talk.client.aclose()
            await talk.ended.wait()

            assert len(talk.app.cancelled) == len(talk.app.seen)


# Expect: 100-continue.


def expecting(path: str, size: int, version: str = "1.1") -> bytes:
    return (
        f"POST {path} HTTP/{version}\r\nhost: gateway\r\nexpect: 100-continue\r\n"
        f"content-length: {size}\r\n\r\n"
    ).encode()


async def test_the_body_is_asked_for_when_the_application_wants_it(autojump_clock: object) -> None:
    async with talking() as talk:
        await talk.send(expecting("/a", 3))
        asked = await talk.client.read_response()
        await talk.send(b"abc")

        assert (asked.status, (await talk.client.read_response()).body) == (100, b"POST /a abc")
        assert (await talk.ask("/b")).status == 200


async def test_a_refusal_comes_instead_of_asking_for_the_body(autojump_clock: object) -> None:
    async with talking() as talk:
        await talk.send(expecting("/unread", 3))
        answer = await talk.client.read_response()

        assert (answer.status, answer.header("connection")) == (401, "close")
        await talk.send(b"abc" + CANARY)  # not a request: it may be the body
        assert await talk.expect_end() == 0
    assert talk.app.seen == ["/unread"]


async def test_http_1_0_and_those_who_sent_their_body_are_not_asked_for_it(
    autojump_clock: object,
) -> None:
    async with talking() as talk:
        await talk.send(expecting("/a", 3, "1.0") + b"ab")
        await wait_all_tasks_blocked()
        await talk.send(b"c")

        assert (await talk.client.read_response()).status == 200
    async with talking() as talk:
        await talk.send(expecting("/a", 3) + b"abc")

        assert (await talk.client.read_response()).status == 200


async def test_another_expectation_is_refused(autojump_clock: object) -> None:
    async with talking() as talk:
        answer = await talk.ask("/a", "POST", headers=[("expect", "magic")], body=b"abc")

    assert (answer.status, talk.app.seen) == (417, [])


# The application fails.


@pytest.mark.parametrize("path", ["/bug", "/group", "/silent", "/text"])
async def test_a_failure_before_the_head_is_a_500_and_a_close(
    path: str, autojump_clock: object
) -> None:
    async with talking() as talk:
        await talk.send(get(path) + CANARY)
        answer = await talk.client.read_response()

        assert await talk.expect_end() == 0
    assert (answer.status, answer.complete, answer.header("connection")) == (500, True, "close")
    assert answer.json()["error"]["code"] == "internal_error"
    assert (len(talk.crashes), talk.app.seen) == (1, [path])


@pytest.mark.parametrize(("path", "crashes"), [("/latebug", 1), ("/abort", 0)])
async def test_a_failure_after_the_head_cuts_the_body(
    path: str, crashes: int, autojump_clock: object
) -> None:
    async with talking() as talk:
        answer = await talk.ask(path)

    assert (answer.status, answer.body, answer.complete) == (200, b"half", False)
    assert len(talk.crashes) == crashes


async def test_a_failure_while_a_large_body_arrives_is_still_told(autojump_clock: object) -> None:
    async with talking() as talk:
        await talk.send(http_request("POST", "/bug", headers=[("content-length", "9000000")]))
        await talk.send(b"x" * 1_000_000)

        assert (await talk.client.read_response()).status == 500


async def test_a_request_cancelled_from_outside_may_have_last_words(autojump_clock: object) -> None:
    client, server = memory_stream_pair()
    departures = Departures()
    departures.close()
    connection = HttpConnection(Demo(), server, LIMITS, Deadlines(), departures, lambda exc: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        await client.send_all(get("/goodbye"))
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    answer = await RawClient(client).read_response()

    assert (answer.body, answer.complete) == (b"halfbye", False)


# What is no request.

HOST = b"host: gateway\r\n"
MALFORMED = {
    "length and chunked": (b"POST / HTTP/1.1\r\n" + HOST + b"content-length: 4\r\n"
        b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "two lengths": (b"POST / HTTP/1.1\r\n" + HOST + b"content-length: 2\r\n"
        b"content-length: 2\r\n\r\nab", 400),
    "signed length": (b"POST / HTTP/1.1\r\n" + HOST + b"content-length: +2\r\n\r\nab", 400),
    "padded length": (b"POST / HTTP/1.1\r\n" + HOST + b"content-length: 002\r\n\r\nab", 400),
    "gzip": (b"POST / HTTP/1.1\r\n" + HOST + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        501),
    "chunked in 1.0": (b"POST / HTTP/1.0\r\n" + HOST + b"transfer-encoding: chunked\r\n\r\n"
        b"0\r\n\r\n", 400),
    "bad chunk": (b"POST / HTTP/1.1\r\n" + HOST + b"transfer-encoding: chunked\r\n\r\n"
        b"0x2\r\nab\r\n0\r\n\r\n", 400),
    "bad second chunk": (b"POST / HTTP/1.1\r\n" + HOST + b"transfer-encoding: chunked\r\n\r\n"
        b"2\r\nab\r\n+2\r\nab\r\n0\r\n\r\n", 400),
    "folded": (b"GET / HTTP/1.1\r\n" + HOST + b"a: b\r\n c\r\n\r\n", 400),
    "bare LF": (b"GET / HTTP/1.1\n" + b"host: gateway\n\n", 400),
    "space before colon": (b"GET / HTTP/1.1\r\n" + HOST + b"a : b\r\n\r\n", 400),
    "NUL": (b"GET / HTTP/1.1\r\n" + HOST + b"a: b\0c\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
    "odd host": (b"GET / HTTP/1.1\r\nhost: a b/@c\r\n\r\n", 400),
    "absolute target": (b"GET http://x/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "query only": (b"GET ? HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "lower case": (b"get / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "trace": (b"TRACE / HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    "connect": (b"CONNECT a:1 HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    "version": (b"GET / HTTP/1.2\r\n" + HOST + b"\r\n", 505),
    "h2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "long target": (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
    "long head": (b"GET / HTTP/1.1\r\n" + HOST + b"a: " + b"x" * 60_000 + b"\r\n\r\n", 431),
    "many headers": (b"GET / HTTP/1.1\r\n" + HOST + b"a: b\r\n" * 101 + b"\r\n", 431),
    "websocket": (b"GET / HTTP/1.1\r\n" + HOST + b"connection: upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
}  # fmt: skip


@pytest.mark.parametrize(("data", "status"), MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "split"])
async def test_a_malformed_request_is_refused_and_what_follows_not_run(
    data: bytes, status: int, at_once: bool, autojump_clock: object
) -> None:
    async with talking() as talk:
        for piece in [data + CANARY] if at_once else [data[:40], data[40:] + CANARY]:
            await talk.send(piece)
            await wait_all_tasks_blocked()
        answer = await talk.client.read_response()

        assert await talk.expect_end() == 0
    assert (answer.status, answer.header("connection")) == (status, "close")
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert (talk.app.bodies, talk.crashes) == ([], [])
    assert "/canary" not in talk.app.seen


async def test_rubbish_behind_a_good_request_is_refused_after_its_answer(
    autojump_clock: object,
) -> None:
    async with talking() as talk:
        await talk.send(get("/slow"))
        await trio.sleep(5)
        await talk.send(b"\r\n\r\nrubbish\r\n\r\n" + CANARY)
        answer = await talk.client.read_response()
        refusal = await talk.client.read_response()

        assert answer.body == b"/slow"
        assert (refusal.status, refusal.header("connection")) == (400, "close")
        assert await talk.expect_end() == 10
    assert talk.app.seen == ["/slow"]


async def test_a_body_that_nobody_reads_ends_with_its_answer_whatever_it_is(
    autojump_clock: object,
) -> None:
    async with talking() as talk:
        await talk.send(http_request("POST", "/stream", headers=[("transfer-encoding", "chunked")]))
        await trio.sleep(5)
        await talk.send(b"rubbish\r\n" + CANARY)
        answer = await talk.client.read_response()

        assert (answer.body, answer.header("connection")) == (b"onetwo", "close")
        assert await talk.expect_end() == 100
    assert talk.app.seen == ["/stream"]


# Bodies that nobody wants.


def refused_upload(length: int, *headers: str) -> bytes:
    given = [("content-length", str(length)), *(tuple(h.split(": ")) for h in headers)]
    return http_request("POST", "/unread", headers=given)  # type: ignore[arg-type]


async def test_an_answer_before_a_small_body_costs_the_client_no_connection(
    autojump_clock: object,
) -> None:
    async with talking() as talk:
        await talk.send(refused_upload(3000) + b"x" * 1000)
        answer = await talk.client.read_response("POST")
        await trio.sleep(10)
        await talk.send(b"x" * 2000 + CANARY)
        canary = await talk.client.read_response()

    assert (answer.status, answer.header("connection")) == (401, None)
    assert canary.body == b"GET /canary "
    assert talk.app.seen == ["/unread", "/canary"]


@pytest.mark.parametrize(
    "request_",
    [
        refused_upload(2**20 + 1),
        http_request("POST", "/unread", headers=[("transfer-encoding", "chunked")]),
        refused_upload(100, "expect: 100-continue"),
    ],
    ids=["large", "of unknown length", "waiting to be asked for"],
)
async def test_an_answer_before_any_other_body_ends_the_connection(
    request_: bytes, autojump_clock: object
) -> None:
    async with talking() as talk:
        await talk.send(request_)
        answer = await talk.client.read_response("POST")

        assert (answer.status, answer.header("connection")) == (401, "close")
        await talk.expect_end()


async def test_a_body_that_nobody_wants_has_its_time_and_no_more(autojump_clock: object) -> None:
    async with talking() as talk:
        await talk.send(refused_upload(3000) + b"x" * 1000)
        await talk.client.read_response("POST")
        await trio.sleep(7)
        await talk.send(b"x")

        assert await talk.expect_end() == 60  # and not a word more


async def test_who_leaves_instead_of_sending_the_rest_has_left(autojump_clock: object) -> None:
    async with talking() as talk:
        await talk.send(refused_upload(3000))
        await talk.client.read_response("POST")
        await talk.client.aclose()
        await talk.ended.wait()

        assert trio.current_time() < 1
    assert talk.crashes == []


# Deadlines.


@pytest.mark.parametrize("drip", [b"", b"\r\n"])
async def test_a_client_that_asks_nothing_is_left(drip: bytes, autojump_clock: object) -> None:
    async with talking() as talk:
        for _ in range(4):
            await talk.send(drip)
            await trio.sleep(1)

        assert await talk.expect_end() == 5


async def test_a_head_that_drips_is_cut(autojump_clock: object) -> None:
    async with talking() as talk:
        for byte in b"GET ":
            await trio.sleep(1)
            await talk.send(bytes([byte]))
        answer = await talk.client.read_response()

        assert (answer.status, trio.current_time()) == (408, 5)
        assert await talk.expect_end() == 5


async def test_an_idle_connection_is_closed(autojump_clock: object) -> None:
    async with talking() as talk:
        await trio.sleep(1)
        await talk.ask("/a")
        await trio.sleep(74)
        await talk.send(b"\r\n")  # nothing, and no reason to wait longer

        assert await talk.expect_end() == 76


async def test_a_head_that_begins_late_has_its_whole_time(autojump_clock: object) -> None:
    async with talking() as talk:
        await talk.ask("/a")
        await trio.sleep(74)
        await talk.send(b"GET /b HTTP")
        await trio.sleep(4)
        await talk.send(b"/1.1\r\nhost: gateway\r\n\r\n")

        assert (await talk.client.read_response()).body == b"GET /b "


@pytest.mark.parametrize("path", ["/a", "/hang"])
async def test_a_body_that_drips_is_cut(path: str, autojump_clock: object) -> None:
    async with talking() as talk:
        await trio.sleep(1)
        await talk.send(http_request("POST", path, headers=[("content-length", "1000")]))
        for _ in range(59):
            await trio.sleep(1)
            await talk.send(b"x")
        answer = await talk.client.read_response()

        assert (answer.status, trio.current_time()) == (408, 61)
        await talk.send(CANARY)
        assert await talk.expect_end() == 61
    assert talk.app.cancelled == [(path, 61)]


async def test_each_body_has_its_own_time(autojump_clock: object) -> None:
    async with talking() as talk:
        for _ in range(3):
            request = http_request("POST", "/a", body=b"abc")
            await talk.send(request[:-1])
            await trio.sleep(50)
            await talk.send(request[-1:])
            assert (await talk.client.read_response()).status == 200


async def test_an_answer_may_take_as_long_as_it_takes(autojump_clock: object) -> None:
    async with talking(keep_alive_timeout=1, header_timeout=1, body_timeout=1) as talk:
        assert (await talk.ask("/stream")).body == b"onetwo"


async def test_a_client_that_does_not_read_is_cut(autojump_clock: object) -> None:
    async with talking(lockstep=True) as talk:
        with trio.move_on_after(1):
            await talk.send(get("/flood"))
        await talk.ended.wait()

        assert trio.current_time() == 30
        assert talk.app.cancelled == [("/flood", 30)]


async def test_the_clock_of_a_client_that_takes_nothing_is_told(autojump_clock: object) -> None:
    async with talking(lockstep=True) as talk:
        talk.connection.on_timeout = (told := list[str]()).append
        with trio.move_on_after(1):
            await talk.send(get("/flood"))
        await talk.ended.wait()

    assert told == ["client_write"]


async def test_a_last_write_that_was_cut_short_ends_the_connection(autojump_clock: object) -> None:
    async with talking(lockstep=True) as talk:
        with trio.move_on_after(1):
            await talk.send(get("/a") + CANARY)
        await talk.ended.wait()

        assert trio.current_time() == 30
    assert talk.app.seen == ["/a"]


async def test_a_client_that_reads_slowly_gets_everything(autojump_clock: object) -> None:
    size = 400_000
    app = Demo()
    async with talking(lockstep=True, app=app) as talk:
        await talk.send(http_request("POST", "/a", headers=[("content-length", str(size))]))
        await talk.send(b"x" * size)
        received = 0
        while received < size:
            await trio.sleep(29)
            received += len(await talk.client.stream.receive_some(2**16))

        assert trio.current_time() > 100


# Stopping.


async def test_draining_closes_an_idle_connection_at_once(autojump_clock: object) -> None:
    async with talking() as talk:
        await talk.ask("/a")
        assert talk.connection.is_idle
        talk.connection.drain()

        assert await talk.expect_end() == 0


async def test_draining_lets_what_was_asked_be_answered(autojump_clock: object) -> None:
    async with talking() as talk:
        await talk.send(get("/slow") + CANARY[:20])
        await trio.sleep(1)
        talk.connection.drain()
        answer = await talk.client.read_response()

        assert (answer.body, answer.header("connection")) == (b"/slow", "close")
        assert await talk.expect_end() == 10


async def test_draining_waits_for_a_head_that_has_begun(autojump_clock: object) -> None:
    async with talking() as talk:
        await talk.send(CANARY[:20])
        await trio.sleep(1)
        talk.connection.drain()
        await trio.sleep(1)
        await talk.send(CANARY[20:])
        answer = await talk.client.read_response()

    assert (answer.status, answer.header("connection")) == (200, "close")


async def test_a_request_that_races_with_the_close_is_closed_cleanly(
    autojump_clock: object,
) -> None:
    async with talking() as talk:
        await talk.ask("/a")
        talk.connection.drain()
        await wait_all_tasks_blocked()
        await talk.send(CANARY)

        assert await talk.expect_end() == 0
        assert talk.client.ended == "fin"
    assert talk.app.seen == ["/a"]


async def test_without_promises_the_next_answer_is_the_last(autojump_clock: object) -> None:
    async with talking() as talk:
        talk.connection.promise_nothing()

        assert (await talk.ask("/a")).header("connection") == "close"
        assert await talk.expect_end() == 0


async def test_a_client_that_does_not_close_is_given_two_seconds(autojump_clock: object) -> None:
    async with talking() as talk:
        await talk.ask("/a", headers=[("connection", "close")])
        await talk.ended.wait()

        assert trio.current_time() == 2


# Upgrades.


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_an_offer_of_http_2_is_ignored(framing: str, autojump_clock: object) -> None:
    offer = [("connection", "Upgrade, HTTP2-Settings"), ("upgrade", "h2c"), ("http2-settings", "")]
    chunked = framing == "chunked"
    body = b"3\r\nabc\r\n0\r\n\r\n" if chunked else b"abc"
    length = ("transfer-encoding", "chunked") if chunked else ("content-length", "3")
    async with talking() as talk:
        plain = await talk.ask("/a", headers=offer)
        await talk.send(http_request("POST", "/b", headers=[*offer, length]) + body)
        posted = await talk.client.read_response()

        assert (await talk.ask("/c")).body == b"GET /c "
    assert (plain.status, plain.body) == (200, b"GET /a ")
    assert (posted.status, posted.body) == (200, b"POST /b abc")


async def test_the_scope_says_what_was_asked(autojump_clock: object) -> None:
    scopes: list[Scope] = []

    class Keeping(Demo):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            scopes.append(scope)
            await super().__call__(scope, receive, send)

    async with talking(app=Keeping()) as talk:
        await talk.ask("/a%20b?c=%20", headers=[("X-Y", "z")])

    scope = scopes[0]
    assert (scope["path"], scope["raw_path"], scope["query_string"]) == (
        "/a b", b"/a%20b", b"c=%20",
    )  # fmt: skip
    assert (b"x-y", b"z") in scope["headers"]
    assert (scope["type"], scope["http_version"], scope["scheme"]) == ("http", "1.1", "http")
