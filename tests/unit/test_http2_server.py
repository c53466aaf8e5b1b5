"""One HTTP/2 connection in memory, in virtual time: who behaves badly, and what becomes of it."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import attrs
import pytest
import trio
from hypercorn.config import Config
from trio.testing import lockstep_stream_pair, memory_stream_pair, wait_all_tasks_blocked

from citadel_gateway.io.deadlines import Deadlines
from citadel_gateway.io.departures import Departures
from citadel_gateway.io.http1_exchange import EXCHANGE, ResponseAborted
from citadel_gateway.io.http1_server import ConnectionLimits
from citadel_gateway.io.http2_server import Http2Connection
from tests.support.h2_client import H2Answer, H2Client, h2_client

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

LIMITS = ConnectionLimits(
    header_timeout=5, body_timeout=60, keep_alive_timeout=75, write_timeout=30, max_requests=1000
)
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, REFUSED, CALM = 0, 1, 2, 7, 11
LAST = 2**31 - 1
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@attrs.define(eq=False)
class Demo:
    """An application with a path for each habit that an application can have."""

    seen: list[Scope] = attrs.field(factory=list)
    cancelled: list[tuple[str, float]] = attrs.field(factory=list)
    left: list[tuple[str, float]] = attrs.field(factory=list)
    running: int = 0
    most_running: int = 0
    sent: int = 0  # bytes that the server took from a flood

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        self.seen.append(scope)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        scope["extensions"][EXCHANGE].on_leave = partial(self._note_leave, path)
        try:
            await getattr(self, path.split("/")[1], self.echo)(scope, receive, send)
        except trio.Cancelled:
            self.cancelled.append((path, trio.current_time()))
            raise
        finally:
            self.running -= 1

    def _note_leave(self, path: str) -> None:
        self.left.append((path, trio.current_time()))

    async def echo(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_all(receive)
        await answer(send, f"{scope['method']} {scope['path']} ".encode() + body)

    async def slow(self, scope: Scope, receive: Receive, send: Send) -> None:
        await trio.sleep(10)
        await answer(send, scope["path"].encode())

    async def unread(self, scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, b"no", 413)

    async def hang(self, scope: Scope, receive: Receive, send: Send) -> None:
        await trio.sleep_forever()

    async def stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        await start(send, 200)
        await more(send, b"one")
        await trio.sleep(100)
        await more(send, b"two")
        await send({"type": "http.response.body"})

    async def large(self, scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, b"x" * int(scope["path"].rpartition("/")[2]))

    async def flood(self, scope: Scope, receive: Receive, send: Send) -> None:
        await start(send, 200)
        while True:
            await more(send, b"x" * 1000)
            self.sent += 1000

    async def empty(self, scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, b"", int(scope["path"].rpartition("/")[2]))

    async def bug(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError("a bug")

    async def latebug(self, scope: Scope, receive: Receive, send: Send) -> None:
        await start(send, 200)
        await more(send, b"half")
        raise ZeroDivisionError("a bug")

    async def abort(self, scope: Scope, receive: Receive, send: Send) -> None:
        await start(send, 200)
        await more(send, b"half")
        raise ResponseAborted

    async def goodbye(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Has last words for the client when it is cancelled from outside."""
        await start(send, 200)
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await more(send, b"bye")
                await send({"type": "http.response.body"})

    async def close(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"Connection", b"close"), (b"transfer-encoding", b"chunked")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"closed"})


async def read_all(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    return body


async def start(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"X-A", b"b")]})


async def more(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def answer(send: Send, body: bytes, status: int = 200) -> None:
    await start(send, status)
    await send({"type": "http.response.body", "body": body})


@attrs.define(eq=False)
class Conversation:
    app: Demo
    client: H2Client
    connection: Http2Connection
    crashes: list[Exception]
    unserved: list[tuple[int, str]]
    ended: trio.Event
    cut: trio.CancelScope  # what a server does whose patience has ended

    async def fetch(self, path: str, method: str = "GET", **options: Any) -> H2Answer:
        return await self.client.fetch(method, path, **options)

    async def expect_end(self) -> float:
        """The time at which the server hangs up."""
        await self.client.until_ended()
        return trio.current_time()


@asynccontextmanager
async def talking(
    *, lockstep: bool = False, window: int = 65_535, lazy: bool = False, **limits: Any
) -> AsyncIterator[Conversation]:
    """A connection to an application; it must end when its client has left."""
    ours, theirs = lockstep_stream_pair() if lockstep else memory_stream_pair()
    crashes: list[Exception] = []
    unserved: list[tuple[int, str]] = []
    deadlines, departures = Deadlines(), Departures()
    departures.close()  # nothing here has a socket to watch
    app, config = Demo(), Config()
    config.include_server_header = False
    connection = Http2Connection(
        app=app,
        stream=theirs,
        limits=attrs.evolve(LIMITS, **limits),
        config=config,
        deadlines=deadlines,
        departures=departures,
        on_crash=crashes.append,
        on_unserved=lambda status, why: unserved.append((status, why)),
    )
    ended, cut = trio.Event(), trio.CancelScope()

    async def run() -> None:
        with cut:
            await connection.run()
        ended.set()

    # Nothing here takes so long: a test that hangs fails at once, for time is virtual.
    with trio.fail_after(10_000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(deadlines.run)
            nursery.start_soon(run)
            async with h2_client(ours, window=window, lazy=lazy) as client:
                yield Conversation(app, client, connection, crashes, unserved, ended, cut)
            with trio.fail_after(3):
                await ended.wait()
            assert app.running == 0
            nursery.cancel_scope.cancel()


# Requests and answers.


async def test_requests_are_answered(autojump_clock: object) -> None:
    async with talking() as talk:
        first = await talk.fetch("/a?b=c")
        second = await talk.fetch("/b", "POST", body=b"xyz")

        scope = talk.app.seen[0]
    assert (first.status, first.body, first.header("x-a")) == (200, b"GET /a ", "b")
    assert (second.body, second.header("content-length")) == (b"POST /b xyz", "11")
    assert len([name for name, _ in first.headers if name == "date"]) == 1
    assert (scope["http_version"], scope["scheme"]) == ("2", "https")
    assert (scope["raw_path"], scope["query_string"]) == (b"/a", b"b=c")
    assert scope["headers"] == [(b"host", b"gateway")]


async def test_many_are_answered_at_once(autojump_clock: object) -> None:
    async with talking() as talk:
        answers = [talk.client.open("GET", f"/slow/{n}") for n in range(100)]
        await talk.client.flush()
        for found in answers:
            await talk.client.finish(found)

        assert trio.current_time() == 10
        assert talk.app.most_running == 100
    assert [found.body for found in answers] == [b"/slow/%d" % n for n in range(100)]


async def test_a_stream_comes_as_it_is_made(autojump_clock: object) -> None:
    async with talking() as talk:
        found = await talk.client.ask("GET", "/stream")
        await talk.client.until(found, size=3)
        assert (trio.current_time(), found.body, found.complete) == (0, b"one", False)

        await talk.client.finish(found)
    assert (found.body, found.complete) == (b"onetwo", True)


@pytest.mark.parametrize("window", [1, 1000, 65_535, 2**30])
async def test_a_large_answer_arrives_whole_through_any_window(
    window: int, autojump_clock: object
) -> None:
    size = 300_000 if window > 1 else 300
    async with talking(window=window) as talk:
        found = await talk.fetch(f"/large/{size}")

        assert talk.client.pongs == 0
    assert (len(found.body), found.complete, found.reset) == (size, True, None)


async def test_a_large_body_arrives_whole(autojump_clock: object) -> None:
    async with talking() as talk:
        found = talk.client.open("POST", "/a", end=False)
        await talk.client.upload(found, 3_000_000)
        talk.client.h2.end_stream(found.stream_id)
        await talk.client.flush()
        await talk.client.finish(found)

    assert len(found.body) == len(b"POST /a ") + 3_000_000


async def test_a_body_that_nobody_reads_is_held_back(autojump_clock: object) -> None:
    async with talking() as talk:
        found = talk.client.open("POST", "/hang", end=False)
        with trio.move_on_after(50) as scope:
            await talk.client.upload(found, 3_000_000)

        assert scope.cancelled_caught
        assert talk.client.h2.local_flow_control_window(found.stream_id) == 0
        assert talk.client.h2.outbound_flow_control_window > 0
        assert (await talk.fetch("/b", "POST", body=b"x")).body == b"POST /b x"


async def test_what_was_never_read_does_not_use_up_the_connection(
    autojump_clock: object,
) -> None:
    async with talking() as talk:
        for _ in range(5):
            found = talk.client.open("POST", "/slow", end=False)
            await talk.client.upload(found, 400_000)
            await talk.client.finish(found)
            assert found.body == b"/slow"

        assert (await talk.fetch("/b", "POST", body=b"x")).body == b"POST /b x"


async def test_who_answers_early_wants_no_more_of_the_body(autojump_clock: object) -> None:
    async with talking() as talk:
        for _ in range(10):  # what is not read must not use up the connection's window
            found = talk.client.open("POST", "/unread", end=False)
            await talk.client.upload(found, 3_000_000)
            await talk.client.finish(found)
            assert (found.status, found.body, found.complete) == (413, b"no", True)
            assert found.reset == NO_ERROR

        assert (await talk.fetch("/b", "POST", body=b"x")).body == b"POST /b x"
    assert talk.crashes == []


async def test_who_waits_to_be_asked_for_the_body_is_asked(autojump_clock: object) -> None:
    async with talking() as talk:
        expect = [("expect", "100-continue")]
        found = await talk.client.ask("POST", "/a", headers=expect, end=False)
        while not found.informed:
            await talk.client.news()
        talk.client.h2.send_data(found.stream_id, b"body", end_stream=True)
        await talk.client.flush()
        await talk.client.finish(found)

        refused = await talk.client.ask("POST", "/unread", headers=expect, end=False)
        await talk.client.finish(refused)
    assert (found.informed, found.body) == ([100], b"POST /a body")
    assert (refused.informed, refused.status) == ([], 413)


async def test_an_answer_to_head_has_no_body(autojump_clock: object) -> None:
    async with talking() as talk:
        found = await talk.fetch("/a", "HEAD")
        streamed = await talk.fetch("/stream", "HEAD")

    assert (found.status, found.header("content-length"), found.body) == (200, "8", b"")
    assert (streamed.body, streamed.complete) == (b"", True)


@pytest.mark.parametrize("status", [204, 304])
async def test_an_answer_that_cannot_have_a_body_has_none(
    status: int, autojump_clock: object
) -> None:
    async with talking() as talk:
        found = await talk.fetch(f"/empty/{status}")

    assert (found.status, found.complete) == (status, True)
    assert found.header("content-length") is None


async def test_nothing_is_said_about_the_connection(autojump_clock: object) -> None:
    async with talking() as talk:
        found = await talk.fetch("/close")

        assert (await talk.fetch("/b")).body == b"GET /b "
    assert found.body == b"closed"
    assert {name for name, _ in found.headers} == {"content-length", "date"}


# Applications that fail.


async def test_a_bug_costs_one_stream(autojump_clock: object) -> None:
    async with talking() as talk:
        beside = await talk.client.ask("GET", "/slow")
        found = await talk.fetch("/bug")
        late = await talk.fetch("/latebug")
        await talk.client.finish(beside)

    assert (found.status, found.json()["error"]["type"]) == (500, "server_error")
    assert (late.body, late.complete, late.reset) == (b"half", False, INTERNAL_ERROR)
    assert beside.body == b"/slow"
    assert [type(exc) for exc in talk.crashes] == [ZeroDivisionError] * 2


async def test_a_cut_answer_does_not_look_whole(autojump_clock: object) -> None:
    async with talking() as talk:
        found = await talk.fetch("/abort")

    assert (found.body, found.complete, found.reset) == (b"half", False, INTERNAL_ERROR)
    assert talk.crashes == []


# Clients that leave.


async def test_a_stream_that_is_given_up_is_cancelled_at_once(autojump_clock: object) -> None:
    async with talking() as talk:
        left, stays = await talk.client.ask("GET", "/hang"), await talk.client.ask("GET", "/slow")
        await trio.sleep(3)
        await talk.client.give_up(left)
        await wait_all_tasks_blocked()

        assert (talk.app.left, talk.app.cancelled) == ([("/hang", 3)], [("/hang", 3)])
        assert (await talk.client.finish(stays)).body == b"/slow"


@pytest.mark.parametrize("path", ["/hang", "/stream", "/flood"])
async def test_a_client_that_closes_ends_all_it_asked_for(
    path: str, autojump_clock: object
) -> None:
    async with talking(lazy=True) as talk:
        for _ in range(5):
            await talk.client.ask("GET", path)
        await trio.sleep(3)
        await trio.aclose_forcefully(talk.client.stream)
        await wait_all_tasks_blocked()

        assert talk.app.left == talk.app.cancelled == [(path, 3)] * 5
        assert talk.ended.is_set()


async def test_a_client_that_leaves_in_a_body_is_gone(autojump_clock: object) -> None:
    async with talking() as talk:
        found = await talk.client.ask("POST", "/a", end=False)
        await wait_all_tasks_blocked()
        await talk.client.give_up(found)
        await wait_all_tasks_blocked()

        assert talk.app.cancelled == [("/a", 0)]


async def test_a_client_that_says_goodbye_gets_what_it_has_asked_for(
    autojump_clock: object,
) -> None:
    async with talking() as talk:
        found = await talk.client.ask("GET", "/slow")
        await wait_all_tasks_blocked()
        await talk.client.send(goaway())
        await wait_all_tasks_blocked()
        await talk.client.finish(found)

        assert (found.body, found.complete) == (b"/slow", True)
        assert await talk.expect_end() == 10


def goaway(code: int = 0) -> bytes:
    return frame(7, body=struct.pack(">II", 0, code))


def frame(kind: int, flags: int = 0, stream: int = 0, body: bytes = b"") -> bytes:
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body


# Clients that do not read.


async def test_a_window_that_is_never_opened_is_given_up(autojump_clock: object) -> None:
    async with talking(window=0, lazy=True) as talk:
        found = await talk.client.ask("GET", "/flood")
        await talk.client.finish(found)

        assert (trio.current_time(), found.status, found.body) == (30, 200, b"")
        assert (found.reset, talk.app.cancelled) == (INTERNAL_ERROR, [("/flood", 30)])
        assert talk.app.sent < 100_000


async def test_an_answer_that_is_complete_waits_no_longer_for_a_window(
    autojump_clock: object,
) -> None:
    async with talking(window=0, lazy=True) as talk:
        found = await talk.fetch("/large/10")

        assert (trio.current_time(), found.reset) == (30, INTERNAL_ERROR)
        assert talk.app.cancelled == [("/large/10", 30)]


async def test_a_refusal_waits_no_longer_for_a_window(autojump_clock: object) -> None:
    async with talking(window=0, lazy=True) as talk:
        found = await talk.fetch("*")

        assert (trio.current_time(), found.status, found.reset) == (30, 400, INTERNAL_ERROR)


async def test_the_window_of_the_connection_counts_too(autojump_clock: object) -> None:
    async with talking(window=2**30, lazy=True) as talk:
        found = await talk.client.ask("GET", "/flood")
        await talk.client.finish(found)

        assert (trio.current_time(), len(found.body)) == (30, 65_535)
        assert talk.app.cancelled == [("/flood", 30)]


async def test_a_window_that_is_opened_by_a_crack_is_given_up_too(autojump_clock: object) -> None:
    async with talking(window=0, lazy=True) as talk:
        found = await talk.client.ask("GET", "/flood")
        while found.reset is None:
            talk.client.h2.increment_flow_control_window(100, found.stream_id)
            await talk.client.flush()
            await trio.sleep(1)

        assert 30 <= trio.current_time() < 32


async def test_a_client_that_takes_its_time_is_served(autojump_clock: object) -> None:
    async with talking(window=0, lazy=True) as talk:
        found = await talk.client.ask("GET", "/large/300000")
        while not found.complete and found.reset is None:
            for stream_id in (None, found.stream_id):
                talk.client.h2.increment_flow_control_window(70_000, stream_id)
            await talk.client.flush()
            await trio.sleep(25)

    assert (found.complete, len(found.body)) == (True, 300_000)


async def test_a_socket_that_nobody_reads_is_given_up(autojump_clock: object) -> None:
    async with talking(lockstep=True) as talk:
        await talk.fetch("/a")
        talk.client.deaf = True
        for _ in range(3):
            talk.client.open("GET", "/flood")
        await talk.client.flush()
        await talk.ended.wait()

        assert trio.current_time() == 30
        assert talk.app.cancelled == [("/flood", 30)] * 3


# Clocks.


@pytest.mark.parametrize("said", [b"", PREFACE[:5], PREFACE + frame(4), PREFACE + frame(4) * 2])
async def test_who_asks_for_nothing_is_closed(said: bytes, autojump_clock: object) -> None:
    async with talking() as talk:
        await talk.client.send(said[len(said) :])

        assert await talk.expect_end() == 5
        assert talk.client.goaways == [(0, NO_ERROR)]


async def test_an_idle_connection_is_closed_whatever_pings_come(autojump_clock: object) -> None:
    async with talking() as talk:
        await talk.fetch("/a")
        while not talk.client.ended:
            talk.client.h2.ping(b"12345678")
            await talk.client.flush()
            await trio.sleep(10)

        assert 75 <= trio.current_time() <= 80
    assert talk.client.goaways == [(1, NO_ERROR)]


async def test_a_head_that_does_not_end_is_given_up(autojump_clock: object) -> None:
    async with talking() as talk:
        await talk.fetch("/a")
        await talk.client.send(frame(1, 0, 3, b"\x82"))  # no END_HEADERS
        began = trio.current_time()
        await trio.sleep(3)
        await talk.client.send(frame(9, 0, 3, b"\x84"))

        assert await talk.expect_end() == began + 5


async def test_a_body_that_does_not_come_is_given_up(autojump_clock: object) -> None:
    async with talking() as talk:
        found = await talk.client.ask("POST", "/a", end=False)
        while not found.complete:
            talk.client.h2.send_data(found.stream_id, b"x")
            await talk.client.flush()
            await trio.sleep(7)

        assert 60 <= trio.current_time() <= 70
        assert (found.status, found.reset) == (408, NO_ERROR)
        assert talk.app.cancelled == [("/a", 60)]


async def test_no_clock_runs_while_the_application_works(autojump_clock: object) -> None:
    async with talking() as talk:
        found = await talk.client.ask("POST", "/hang", body=b"x")
        await trio.sleep(5000)

        assert talk.app.cancelled == []
        await talk.client.give_up(found)


# Requests that are none, and floods.


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"path": "*"}, 400),
        ({"path": "/\xe9"}, 400),
        ({"path": "/" + "a" * 9000}, 414),
        ({"path": "/", "headers": [("x", "a" * 17_000)]}, 431),
        ({"path": "/", "headers": [(f"x-{n}", "a") for n in range(101)]}, 431),
        ({"path": "/", "method": "TRACE"}, 405),
        ({"path": "/", "method": "get"}, 400),
    ],
)
async def test_what_is_no_request_is_refused_alone(
    options: dict[str, Any], status: int, autojump_clock: object
) -> None:
    async with talking() as talk:
        beside = await talk.client.ask("GET", "/slow")
        found = await talk.fetch(**options)
        await talk.client.finish(beside)

        assert (found.status, found.complete) == (status, True)
        assert found.json()["error"]["code"] == "bad_http_request"
        assert [said for said, _ in talk.unserved] == [status]
        assert (beside.body, len(talk.app.seen)) == (b"/slow", 1)


async def test_a_websocket_is_refused(autojump_clock: object) -> None:
    async with talking() as talk:
        client = talk.client
        head = [
            (":method", "CONNECT"),
            (":protocol", "websocket"),
            (":scheme", "https"),
            (":path", "/v1/realtime"),
            (":authority", "gateway"),
            ("sec-websocket-version", "13"),
        ]
        stream_id = client.h2.get_next_available_stream_id()
        client.h2.send_headers(stream_id, head)
        found = client.answers[stream_id] = H2Answer(stream_id)
        await client.flush()
        await client.finish(found)

        assert (found.status, found.complete) == (400, True)
        assert found.json()["error"]["message"] == "WebSocket is not served here"
        assert (await talk.fetch("/b")).body == b"GET /b "
    assert client.h2.remote_settings.enable_connect_protocol == 0


async def test_a_head_that_is_far_too_large_ends_the_connection(autojump_clock: object) -> None:
    async with talking() as talk:
        talk.client.open("GET", "/", headers=[(f"x-{n}", "a" * 1000) for n in range(60)])
        await talk.client.flush()
        await talk.expect_end()

        assert talk.client.goaways[-1][1] == CALM
        assert talk.app.seen == []


@pytest.mark.parametrize("size", [0, 10, 16_000])
async def test_a_head_without_end_is_bounded(size: int, autojump_clock: object) -> None:
    async with talking() as talk:
        await talk.fetch("/a")
        sent = 0
        await talk.client.send(frame(1, 0, 3, b"\x82"))
        while not talk.client.ended and sent < 10_000_000:
            await talk.client.send(frame(9, 0, 3, b"x" * size))
            sent += size + 9
            await wait_all_tasks_blocked()

        assert talk.client.ended
        assert sent <= 81_000


FLOODS = {
    "ping": frame(6, 0, 0, b"12345678"),
    "pong": frame(6, 1, 0, b"12345678"),
    "settings": frame(4),
    "priority": frame(2, 0, 5, struct.pack(">IB", 3, 7)),
    "window": frame(8, 0, 0, struct.pack(">I", 1)),
    "unknown": frame(0xEE, 0, 0, b"?"),
    "empty": frame(0, 0, 1),
}


@pytest.mark.parametrize("one", FLOODS.values(), ids=FLOODS.keys())
async def test_a_flood_of_frames_that_carry_nothing_ends_the_connection(
    one: bytes, autojump_clock: object
) -> None:
    async with talking() as talk:
        await talk.client.ask("POST", "/hang", end=False)
        await wait_all_tasks_blocked()
        sent = 0
        while not talk.client.ended and sent < 5000:
            await talk.client.send(one * 50)
            sent += 50
            await wait_all_tasks_blocked()

        assert 900 <= sent <= 1100
        assert talk.client.goaways == [(1, CALM)]
        assert [status for status, _ in talk.unserved] == [400]


async def test_as_many_a_second_as_anybody_needs_are_no_flood(autojump_clock: object) -> None:
    async with talking() as talk:
        await talk.client.ask("GET", "/hang")
        for _ in range(600):
            await talk.client.send(FLOODS["ping"] * 9)
            await trio.sleep(0.1)

        assert (talk.client.pongs, talk.client.ended) == (5400, False)


async def test_opening_windows_for_what_comes_is_no_flood(autojump_clock: object) -> None:
    async with talking(window=1000) as talk:
        found = await talk.fetch("/large/5000000")

    assert (len(found.body), found.complete) == (5_000_000, True)


async def test_streams_that_are_opened_and_reset_are_bounded(autojump_clock: object) -> None:
    async with talking() as talk:
        sent = 0
        while not talk.client.ended and sent < 3000:
            for _ in range(20):
                talk.client.h2.reset_stream(talk.client.open("GET", "/hang").stream_id)
            await talk.client.flush()
            sent += 20
            await wait_all_tasks_blocked()

        assert await talk.expect_end() == 0
        assert len(talk.app.seen) <= 200
        assert talk.app.most_running <= 100
        assert talk.client.goaways[-1][1] == CALM


async def test_streams_that_make_us_reset_them_are_bounded_too(autojump_clock: object) -> None:
    async with talking() as talk:
        sent = 0
        while not talk.client.ended and sent < 1000:
            found = await talk.client.ask("GET", "/hang")
            await talk.client.send(frame(8, 0, found.stream_id, struct.pack(">I", LAST)))
            sent += 1
            await wait_all_tasks_blocked()

        assert 150 <= sent <= 210
        assert talk.client.goaways[-1][1] == CALM


async def test_more_streams_than_allowed_end_the_connection(autojump_clock: object) -> None:
    async with talking() as talk:
        await wait_all_tasks_blocked()
        assert talk.client.h2.remote_settings.max_concurrent_streams == 100
        talk.client.h2.remote_settings[3] = 1000
        talk.client.h2.remote_settings.acknowledge()
        for _ in range(101):
            talk.client.open("GET", "/hang")
        await talk.client.flush()

        assert await talk.expect_end() == 0
        assert talk.app.most_running <= 100


@pytest.mark.parametrize(
    "noise",
    [
        frame(0, 0, 99, b"x"),
        frame(1, 4, 2, b"\x82"),
        frame(1, 4, 3, b"\xff\xff\xff\xff"),
        frame(9, 4, 3, b"x"),
        frame(5, 4, 1, b"\x00\x00\x00\x02\x82"),
        frame(4, 0, 0, b"12345"),
        frame(8, 0, 0, bytes(4)),
        (2**14 + 1).to_bytes(3, "big") + bytes(100),
        b"\xff" * 100,
        b"GET / HTTP/1.1\r\nhost: a\r\n\r\n" * 5,
    ],
)
async def test_noise_ends_the_connection_and_nothing_else(
    noise: bytes, autojump_clock: object
) -> None:
    async with talking() as talk:
        await talk.client.ask("GET", "/hang")
        await wait_all_tasks_blocked()
        await talk.client.send(noise)

        assert await talk.expect_end() <= 5
        assert talk.app.cancelled
        assert talk.crashes == []


# The end.


async def test_what_is_running_is_finished_while_nothing_new_begins(
    autojump_clock: object,
) -> None:
    async with talking() as talk:
        slow = await talk.client.ask("GET", "/slow")
        await trio.sleep(1)
        talk.connection.drain()
        await wait_all_tasks_blocked()
        assert talk.client.goaways == [(LAST, NO_ERROR)]
        late = await talk.client.ask("GET", "/slow")  # it may not have heard of it
        await trio.sleep(1)
        talk.connection.drain()
        refused = await talk.fetch("/slow")
        await talk.client.finish(slow)
        await talk.client.finish(late)

        assert (slow.body, late.body, refused.reset) == (b"/slow", b"/slow", REFUSED)
        assert await talk.expect_end() == 11
        assert talk.client.goaways[1:] == [(refused.stream_id, NO_ERROR)]


async def test_an_idle_connection_drains_at_once(autojump_clock: object) -> None:
    async with talking() as talk:
        await talk.fetch("/a")
        talk.connection.drain()

        assert await talk.expect_end() == 0
        assert talk.client.goaways == [(1, NO_ERROR)]


async def test_who_is_promised_nothing_gets_an_answer_to_all_it_asks_for(
    autojump_clock: object,
) -> None:
    async with talking() as talk:
        talk.connection.promise_nothing()
        slow = await talk.client.ask("GET", "/slow")
        await trio.sleep(5)
        other = await talk.fetch("/a")
        await talk.client.finish(slow)

        assert (other.body, slow.body) == (b"GET /a ", b"/slow")
        assert await talk.expect_end() == 10
        assert talk.client.goaways == [(3, NO_ERROR)]


async def test_a_connection_has_enough_at_some_time(autojump_clock: object) -> None:
    async with talking(max_requests=3) as talk:
        slow = await talk.client.ask("GET", "/slow")
        answers = [await talk.fetch("/a") for _ in range(5)]
        await talk.client.finish(slow)

        assert [found.status for found in (slow, *answers)] == [200] * 6
        assert await talk.expect_end() == 10


async def test_who_is_cut_hears_the_last_words(autojump_clock: object) -> None:
    async with talking() as talk:
        told, cut = await talk.client.ask("GET", "/goodbye"), await talk.client.ask("GET", "/hang")
        await wait_all_tasks_blocked()
        talk.cut.cancel()
        await talk.client.until_ended()

        assert trio.current_time() == 0
        assert (told.body, told.complete) == (b"bye", True)
        assert (cut.status, cut.reset) == (0, INTERNAL_ERROR)


async def test_who_reads_nothing_cannot_delay_the_cut(autojump_clock: object) -> None:
    async with talking(lockstep=True) as talk:
        await talk.fetch("/a")
        talk.client.deaf = True
        await talk.client.ask("GET", "/flood")
        await trio.sleep(1)
        talk.cut.cancel()
        await talk.ended.wait()

        assert trio.current_time() <= 3
