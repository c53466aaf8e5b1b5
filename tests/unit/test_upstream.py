"""One request to one endpoint: what comes back, what a failure means, and what is left behind."""

from __future__ import annotations

import gzip
import json
import math
import socket
import ssl
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from itertools import pairwise
from typing import Any

import anyio.abc
import attrs
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from citadel_gateway.io.deadlines import Deadlines
from citadel_gateway.io.dial import Connect, Origin, make_connect
from citadel_gateway.io.failures import UpstreamFailure
from citadel_gateway.io.pool import ConnectionPool
from citadel_gateway.io.pump import Pump
from citadel_gateway.io.record import Phase, nobody_to_hang_up_on
from citadel_gateway.io.target import Call, Target, Timing, split_url
from citadel_gateway.io.upstream import UpstreamClient, WholeAnswer
from citadel_gateway.policy.circuit_breaker import Verdict
from citadel_gateway.policy.retry import Judgement, Retry
from citadel_gateway.wire.openai_answer import Usage
from citadel_gateway.wire.openai_request import Kind, parse_request
from citadel_gateway.wire.openai_stream import StreamReader
from tests.support import scripted_engine as engines
from tests.support.memory_net import MemoryByteStream, MemoryNet
from tests.support.scripted_engine import (
    Answer,
    LedgerEntry,
    Script,
    ScriptedEngine,
    Step,
    answered,
    close,
    hang,
    reset,
    send,
    serve_tcp,
    sleep,
    status,
)
from tests.support.step_cancel import cancel_at

HEAD = b"HTTP/1.1 200 OK\r\n"
EVENTS = HEAD + b"content-type: text/event-stream\r\n"
DONE = b"data: [DONE]\n\n"

SAFE_BAD = Judgement(Retry.SAFE, Verdict.BAD)
SAFE_NEUTRAL = Judgement(Retry.SAFE, Verdict.NO_OPINION)
MAYBE_BAD = Judgement(Retry.AMBIGUOUS, Verdict.BAD)
NEVER_BAD = Judgement(Retry.NEVER, Verdict.BAD)
NEVER_NEUTRAL = Judgement(Retry.NEVER, Verdict.NO_OPINION)


@attrs.define
class Notes:
    """Where a request is, and how long upstreams have kept it waiting."""

    phase: Phase = Phase.RECEIVING
    upstream_wait: float = 0.0
    held: int = 0
    hang_up: Callable[[], None] = nobody_to_hang_up_on


@attrs.define
class Client:
    """A sink that writes down what it was given, and when."""

    writes: list[tuple[float, str, bytes]] = attrs.field(factory=list)
    began: float = attrs.field(factory=trio.current_time)
    takes_at_once: bool = False

    def write_now(self, data: bytes) -> bytes:
        return data

    async def write_rest(self, rest: bytes) -> None:
        await self._take("rest", rest)

    async def start_early(self, data: bytes) -> None:
        await self._take("start early", data)

    async def start(self, data: bytes) -> None:
        await self._take("start", data)

    async def write(self, data: bytes) -> None:
        await self._take("write", data)

    async def finish(self, data: bytes) -> None:
        await self._take("finish", data)

    @property
    def received(self) -> bytes:
        return b"".join(data for _, _, data in self.writes)

    @property
    def calls(self) -> list[str]:
        return [call for _, call, _ in self.writes]

    async def _take(self, call: str, data: bytes) -> None:
        await trio.lowlevel.checkpoint()  # as every real one does
        self.writes.append((trio.current_time() - self.began, call, data))


class World:
    """An engine, and the client of it that is tested."""

    def __init__(
        self, nursery: trio.Nursery, connect: Connect, target: Target, engine: ScriptedEngine
    ) -> None:
        deadlines = Deadlines()
        nursery.start_soon(deadlines.run)
        self.engine = engine
        self.target = target
        self.pool = ConnectionPool(connect)
        self.client = UpstreamClient(self.pool, deadlines, Pump())
        self.notes = Notes()
        self.reader = StreamReader()

    async def ask(self, *, asked: dict[str, Any] | None = None, **clocks: Any) -> WholeAnswer:
        return await self.client.ask(
            self.target, make_call(asked or {}), make_timing(**clocks), self.notes
        )

    async def relay(
        self, sink: Client, *, asked: dict[str, Any] | None = None, **clocks: Any
    ) -> None:
        call = make_call({"stream": True} | (asked or {}))
        self.reader = StreamReader()
        await self.client.relay(
            self.target, call, make_timing(**clocks), self.notes, sink, self.reader
        )

    async def fail(self, *, stream: bool, **clocks: Any) -> UpstreamFailure:
        with pytest.raises(UpstreamFailure) as caught:
            await (self.relay(Client(), **clocks) if stream else self.ask(**clocks))
        return caught.value

    def check_nothing_is_in_doubt(self) -> None:
        assert self.pool.open_count == self.pool.idle_count


class MemoryWorld(World):
    def __init__(
        self, nursery: trio.Nursery, *scripts: Answer, default: Answer = engines.as_asked
    ) -> None:
        engine = ScriptedEngine(scripts, default=default)
        self.net = MemoryNet(nursery)
        self.net.listen("up", 8000, engine.serve)
        super().__init__(nursery, self.connect, Target.of("http://up:8000", None), engine)

    async def connect(self, origin: Origin) -> anyio.abc.ByteStream:
        return await self.net.connect(origin.host, origin.port)

    async def settle(self) -> None:
        """Let the engine notice, and see that nobody holds anything that another lacks."""
        await trio.testing.wait_all_tasks_blocked()
        self.check_nothing_is_in_doubt()
        assert self.net.connections == self.pool.open_count == self.engine.open_connections
        assert self.engine.in_flight == 0


def make_call(asked: dict[str, Any]) -> Call:
    messages = [{"role": "user", "content": "hello"}]
    body = json.dumps({"model": "m", "messages": messages} | asked).encode()
    request = parse_request(Kind.CHAT, body)
    return Call(request=request, body=body, request_id="r1", tracing=[(b"traceparent", b"00-1")])


def make_timing(*, deadline: float = 100, shortened: bool = False, **clocks: float) -> Timing:
    usual = {"connect": 2, "headers": 10, "first_token": 20, "idle": 5, "total": 60}
    return Timing(
        **(usual | clocks),
        deadline=trio.current_time() + deadline,
        allowed=deadline,
        shortened=shortened,
    )


def raw(*pieces: bytes) -> Script:
    return Script([send(piece) for piece in pieces])


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta or {}, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice]} | more).encode() + b"\n\n"


ROLE = chunk({"role": "assistant", "content": ""})
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'
END = chunk(finish="stop")
ERROR = b'data: {"error":{"message":"out of memory","type":"server_error","code":500}}\n\n'


def word(text: str) -> bytes:
    return chunk({"content": text})


def events(*pieces: bytes, cut: bool = False) -> Script:
    """A stream, each piece a chunk and a segment of its own; without its last chunk if *cut*."""
    chunks = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces]
    last = [] if cut else [b"0\r\n\r\n"]
    return raw(EVENTS + b"transfer-encoding: chunked\r\n\r\n", *chunks, *last)


# --- what is sent ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "origin", "path"),
    [
        ("http://up", Origin("http", "up", 80), ""),
        ("https://up/", Origin("https", "up", 443), ""),
        ("http://up:8000/v1/", Origin("http", "up", 8000), "/v1"),
        ("http://[::1]:8000/a/b", Origin("http", "::1", 8000), "/a/b"),
        ("http://[::1]", Origin("http", "::1", 80), ""),
        ("unix:/run/a.sock", Origin("http", "localhost", 80, socket="/run/a.sock"), ""),
        ("unix:/run/a.sock:/v1", Origin("http", "localhost", 80, socket="/run/a.sock"), "/v1"),
    ],
)
def test_an_address_is_an_origin_and_a_path(url: str, origin: Origin, path: str) -> None:
    assert split_url(url) == (origin, path)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("http://up:8000", "/v1/chat/completions"),
        ("http://up:8000/v1", "/v1/chat/completions"),
        ("http://up:8000/team/", "/team/v1/chat/completions"),
    ],
)
async def test_the_engine_gets_the_body_the_key_and_what_traces_the_request(
    url: str, path: str, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = MemoryWorld(nursery)
    world.target = Target.of(url, "secret")
    await world.ask()

    (entry,) = world.engine.posts
    assert entry.path == path
    assert entry.json["messages"][0]["content"] == "hello"
    assert entry.headers == {
        "host": "up:8000",
        "content-type": "application/json",
        "accept": "application/json, text/event-stream",
        "accept-encoding": "identity",
        "user-agent": "citadel-gateway",
        "authorization": "Bearer secret",
        "x-request-id": "r1",
        "traceparent": "00-1",
        "content-length": str(len(entry.body)),
    }


# --- whole answers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        engines.whole_chat("ok", (7, 4)),
        engines.continues(3),
        engines.continues(3, code=100),
        engines.close_delimited(),
    ],
)
async def test_a_whole_answer_comes_as_it_is(
    script: Script, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = MemoryWorld(nursery, script)
    answer = await world.ask()

    assert json.loads(answer.body)["choices"][0]["message"]["content"] == "ok"
    assert answer.usage in {Usage(7, 4), Usage(1, 1)}
    assert world.notes.phase is Phase.WAITING
    await world.settle()


async def test_connections_are_reused_by_whole_answers_and_by_streams(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = MemoryWorld(nursery)
    for _ in range(3):
        await world.ask()
        await world.relay(Client())
    await world.settle()

    assert world.engine.connections == 1
    assert world.pool.idle_count == 1


async def test_the_wait_for_the_upstream_is_on_the_books(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    slow = engines.whole_chat("ok")
    world = MemoryWorld(nursery, Script([sleep(3), *slow.steps]), Script([hang()]))
    await world.ask()
    assert world.notes.upstream_wait == 3
    await world.fail(stream=False)
    assert world.notes.upstream_wait == 13

    world.net.blackhole("up", 8000)
    await world.fail(stream=False)
    assert world.notes.upstream_wait == 15


# --- failures that mean the same for whole answers and for streams ---------------------------


@attrs.frozen
class Row:
    """What an engine does, and what it means."""

    does: Script
    code: str
    judgement: Judgement
    after: float = 0.0
    status: int = 502
    cool_down: float | None = None


def refusal(code: int, judgement: Judgement, error: str | None = None, **more: Any) -> Row:
    body = b'{"error":{"message":"no","type":"t"}}'
    return Row(status(code, body), error or f"upstream_{code}", judgement, status=code, **more)


def slow_down(code: int, value: str, seconds: float) -> Row:
    return Row(
        status(code, b"{}", [("retry-after", value)]), "upstream_overloaded", SAFE_NEUTRAL,
        status=code, cool_down=seconds,
    )  # fmt: skip


def protocol(does: Script) -> Row:
    return Row(does, "upstream_protocol_error", MAYBE_BAD)


def lost(does: Script) -> Row:
    return Row(does, "upstream_connection_error", MAYBE_BAD)


YESTERDAY = format_datetime(datetime.now(UTC) - timedelta(days=1), usegmt=True)
TOMORROW = format_datetime(datetime.now(UTC) + timedelta(days=1), usegmt=True)

ROWS = {
    "reads, never answers": Row(
        Script([hang()]), "timeout_headers", MAYBE_BAD, after=10, status=504
    ),
    "half a head": Row(
        raw(HEAD).then(hang()), "timeout_headers", MAYBE_BAD, after=10, status=504
    ),
    "fin before the head": lost(Script([close()])),
    "reset before the head": lost(Script([reset()])),
    "fin in the head": lost(raw(HEAD).then(close())),
    "garbage": protocol(engines.garbage()),
    "http/0.9": protocol(raw(b"<html>It works!</html>")),
    "status 9999": protocol(raw(b"HTTP/1.1 9999 Far Out\r\n\r\n")),
    "status 000": protocol(raw(b"HTTP/1.1 000 Nil\r\n\r\n")),
    "status 600": protocol(status(600)),
    "status 999": protocol(status(999)),
    "a bad header line": protocol(raw(HEAD + b"no colon here\r\n\r\n")),
    "a head of 70 KiB": protocol(raw(HEAD + b"x: " + b"y" * 70_000 + b"\r\n\r\n")),
    "two lengths": protocol(raw(HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\nok!")),
    "length and chunks": protocol(
        raw(HEAD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
    ),
    "too many 1xx": protocol(engines.continues(2000)),
    "101": protocol(engines.switching_protocols()),
    "204": protocol(raw(b"HTTP/1.1 204 No Content\r\n\r\nnot content")),
    "206": protocol(status(206, b"{}")),
    "302": Row(engines.redirect("http://169.254.169.254/"), "upstream_redirect", MAYBE_BAD),
    "304": Row(
        raw(b"HTTP/1.1 304 Not Modified\r\n\r\nmodified"), "upstream_redirect", MAYBE_BAD
    ),
    "400": refusal(400, NEVER_NEUTRAL),
    "401": Row(status(401), "upstream_credentials_exhausted", SAFE_NEUTRAL),
    "403": Row(status(403), "upstream_credentials_exhausted", SAFE_NEUTRAL),
    "404": refusal(404, SAFE_NEUTRAL),
    "408": refusal(408, SAFE_NEUTRAL),
    "422": refusal(422, NEVER_NEUTRAL),
    "429": refusal(429, SAFE_NEUTRAL, "upstream_overloaded", cool_down=1),
    "500": refusal(500, MAYBE_BAD),
    "502": refusal(502, MAYBE_BAD),
    "503": refusal(503, SAFE_BAD, "upstream_overloaded", cool_down=1),
    "504": refusal(504, MAYBE_BAD),
    "loading": Row(
        engines.loading(), "upstream_overloaded", SAFE_BAD, status=503, cool_down=1
    ),
    "retry-after 2": slow_down(503, "2", 2),
    "retry-after 0": slow_down(429, "0", 0),
    "retry-after -1": slow_down(429, "-1", 1),
    "retry-after abc": slow_down(429, "abc", 1),
    "retry-after nan": slow_down(429, "nan", 1),
    "retry-after 1e9": slow_down(429, "1e9", 60),
    "retry-after yesterday": slow_down(503, YESTERDAY, 1),
    "retry-after tomorrow": slow_down(503, TOMORROW, 60),
    "an error whose body is cut": Row(
        raw(b"HTTP/1.1 503 Busy\r\ncontent-length: 99\r\n\r\n{").then(close()),
        "upstream_overloaded", SAFE_BAD, status=503, cool_down=1,
    ),
    "an error whose body is huge": Row(
        status(400, b"x" * 300_000), "upstream_400", NEVER_NEUTRAL, status=400
    ),
    "an error whose body hangs": Row(
        raw(b"HTTP/1.1 500 No\r\ncontent-length: 99\r\n\r\n{").then(hang()),
        "timeout_headers", MAYBE_BAD, after=10, status=504,
    ),
    "an early answer": Row(
        engines.early_status(413, b'{"error":"too large"}'), "upstream_413", NEVER_NEUTRAL,
        status=413,
    ),
    "html": protocol(engines.html()),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
async def test_what_a_failure_means(
    row: Row, stream: bool, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = MemoryWorld(nursery, row.does)
    began = trio.current_time()
    failure = await world.fail(stream=stream)

    assert (failure.error.code, failure.error.status) == (row.code, row.status)
    assert failure.judgement == row.judgement
    assert failure.cool_down == row.cool_down
    assert trio.current_time() - began == row.after
    assert not failure.committed
    assert not failure.stale
    assert world.engine.connections == 1  # no second connection, to wherever
    await world.settle()
    await world.ask()  # gets its own answer


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_closed_port_fails_safely_and_at_once(
    stream: bool, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = MemoryWorld(nursery)
    world.net.refuse("up", 8000)
    failure = await world.fail(stream=stream)

    assert failure.error.code == "upstream_connection_error"
    assert str(failure) == "cannot connect: nothing listens on up:8000"
    assert failure.judgement == SAFE_BAD


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_connection_that_is_never_made_fails_safely_after_the_connect_clock(
    stream: bool, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = MemoryWorld(nursery)
    world.net.blackhole("up", 8000)
    began = trio.current_time()
    failure = await world.fail(stream=stream)

    assert failure.error.code == "timeout_connect"
    assert failure.judgement == SAFE_BAD
    assert trio.current_time() - began == 2


async def test_our_own_lack_of_sockets_is_not_held_against_the_upstream(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async def connect(origin: Origin) -> anyio.abc.ByteStream:
        raise OSError("All connection attempts failed") from OSError(24, "Too many open files")

    world = World(nursery, connect, Target.of("http://up", None), ScriptedEngine())
    failure = await world.fail(stream=False)

    assert (failure.error.code, failure.error.status) == ("gateway_exhausted", 503)
    assert failure.judgement == NEVER_NEUTRAL


@pytest.mark.parametrize(
    "error",
    [
        ssl.SSLCertVerificationError(1, "certificate has expired"),
        ConnectionResetError("the upstream hung up during the TLS handshake"),
        socket.gaierror(-2, "Name or service not known"),
    ],
)
async def test_what_fails_before_anything_was_sent_may_go_elsewhere(
    error: OSError, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async def connect(origin: Origin) -> anyio.abc.ByteStream:
        raise error

    world = World(nursery, connect, Target.of("https://up", None), ScriptedEngine())
    failure = await world.fail(stream=False)

    assert failure.error.code == "upstream_connection_error"
    assert failure.judgement == SAFE_BAD


async def test_tls_that_breaks_after_the_request_was_sent_leaves_it_in_doubt(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = MemoryWorld(nursery)

    class Breaking(MemoryByteStream):
        async def receive(self, max_bytes: int = 65536) -> bytes:
            raise ssl.SSLError(1, "bad record mac")

    async def connect(origin: Origin) -> anyio.abc.ByteStream:
        return Breaking(trio.testing.memory_stream_pair()[0])

    world.pool.connect = connect
    failure = await world.fail(stream=False)

    assert failure.error.code == "upstream_connection_error"
    assert failure.judgement == MAYBE_BAD


# --- failures of whole answers ---------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        lost(engines.half_body()),
        protocol(engines.empty()),
        protocol(status(200, b"{")),
        protocol(status(200, b"[]")),
        protocol(status(200, b'{"choices":null}')),
        protocol(
            status(200, gzip.compress(b'{"choices":[]}'), [("content-encoding", "gzip")])
        ),
        protocol(engines.stream_chat(["streamed"])),
        Row(status(200, b'{"error":{"message":"no"}}'), "upstream_502", MAYBE_BAD),
        Row(
            status(200, b'{"error":{"message":"no","code":400}}'), "upstream_400",
            NEVER_NEUTRAL, status=400,
        ),
        Row(
            raw(HEAD + b"content-length: 9\r\n\r\n{").then(hang()), "timeout_total", NEVER_BAD,
            after=100, status=504,
        ),
    ],
)  # fmt: skip
async def test_what_a_bad_whole_answer_means(
    row: Row, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = MemoryWorld(nursery, row.does)
    began = trio.current_time()
    failure = await world.fail(stream=False)

    assert (failure.error.code, failure.error.status) == (row.code, row.status)
    assert failure.judgement == row.judgement
    assert trio.current_time() - began == row.after
    await world.settle()
    await world.ask()


# --- clocks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "deadline", "shortened", "code", "judgement"),
    [
        (False, 7, False, "timeout_total", NEVER_BAD),
        (False, 7, True, "timeout_total", NEVER_NEUTRAL),
        (True, 7, False, "timeout_first_token", NEVER_BAD),
        (True, 7, True, "timeout_first_token", NEVER_NEUTRAL),
        (False, 10, True, "timeout_total", NEVER_NEUTRAL),
        (False, 11, True, "timeout_headers", MAYBE_BAD),
        (False, 1, True, "timeout_total", NEVER_NEUTRAL),
        (False, 0, False, "timeout_total", NEVER_BAD),
        (True, -1, True, "timeout_first_token", NEVER_NEUTRAL),
    ],
)
async def test_the_requests_deadline_outranks_the_clock_that_would_strike_later(
    stream: bool, deadline: float, shortened: bool, code: str, judgement: Judgement,
    autojump_clock: MockClock, nursery: trio.Nursery,
) -> None:  # fmt: skip
    world = MemoryWorld(nursery, Script([hang()]))
    began = trio.current_time()
    failure = await world.fail(stream=stream, deadline=deadline, shortened=shortened)

    assert failure.error.code == code
    assert failure.judgement == judgement
    assert trio.current_time() - began == max(0, min(deadline, 10))


async def test_the_deadline_counts_while_connecting_too(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = MemoryWorld(nursery)
    world.net.blackhole("up", 8000)
    began = trio.current_time()
    failure = await world.fail(stream=False, deadline=1, shortened=True)

    assert trio.current_time() - began == 1
    assert failure.judgement == NEVER_NEUTRAL


@pytest.mark.parametrize(
    ("does", "clocks", "code", "judgement", "after", "committed"),
    [
        (engines.stall_after(0), {}, "timeout_first_token", MAYBE_BAD, 20, False),
        (events(ROLE, cut=True).then(hang()), {}, "timeout_first_token", MAYBE_BAD, 20, False),
        (
            engines.stall_after(0), {"deadline": 15.0, "shortened": True},
            "timeout_first_token", NEVER_NEUTRAL, 15, False,
        ),
        (engines.stall_after(3), {}, "timeout_idle", MAYBE_BAD, 5, True),
        (
            engines.stall_after(3), {"deadline": 1.0, "shortened": True},
            "timeout_idle", MAYBE_BAD, 5, True,
        ),
        (engines.stall_after(3), {"total": 4.0}, "timeout_total", MAYBE_BAD, 4, True),
        (engines.stream_chat("x" * 99, gap=4.9), {}, "timeout_total", MAYBE_BAD, 60, True),
        (
            Script([sleep(9), *engines.stall_after(0).steps]), {},
            "timeout_first_token", MAYBE_BAD, 20, False,
        ),
    ],
)  # fmt: skip
async def test_each_clock_of_a_stream_strikes_on_the_second(
    does: Script, clocks: dict[str, Any], code: str, judgement: Judgement, after: float,
    committed: bool, autojump_clock: MockClock, nursery: trio.Nursery,
) -> None:  # fmt: skip
    world = MemoryWorld(nursery, does)
    began = trio.current_time()
    failure = await world.fail(stream=True, **clocks)

    assert failure.error.code == code
    assert failure.judgement == judgement
    assert trio.current_time() - began == after
    assert failure.committed is committed
    await world.settle()
    assert world.pool.open_count == 0
    assert world.engine.abandoned == 1


async def test_the_idle_clock_starts_anew_with_each_event_and_stops_while_the_client_is_slow(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    class Slow(Client):
        async def write(self, data: bytes) -> None:
            await trio.sleep(8)
            await super().write(data)

    world = MemoryWorld(nursery, engines.stream_chat(["a", "b", "c"], gap=4.9))
    sink = Slow()
    await world.relay(sink, total=math.inf)

    assert sink.received.endswith(DONE)
    await world.settle()


async def test_a_clock_that_strikes_as_the_token_arrives_does_not_cut_a_write_to_the_client(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    sink = Client()

    async def serve(stream: trio.abc.Stream) -> None:
        await stream.receive_some()
        head = EVENTS + b"transfer-encoding: chunked\r\n\r\n"
        await stream.send_all(head + b"%x\r\n%b\r\n" % (len(word("a")), word("a")))
        await trio.testing.wait_all_tasks_blocked()
        assert sink.calls == ["start"]
        await stream.send_all(b"%x\r\n%b\r\n" % (len(word("b")), word("b")))
        autojump_clock.jump(5)  # the token is on its way as the idle clock strikes
        await stream.receive_some()

    world = MemoryWorld(nursery)
    world.net.listen("up", 8000, serve)
    with pytest.raises(UpstreamFailure) as caught:
        await world.relay(sink)

    assert caught.value.error.code == "timeout_idle"
    assert sink.received in (word("a"), word("a") + word("b"))  # whoever came first
    assert len(sink.writes) == sink.received.count(b"data: ")


async def test_a_first_token_in_the_tick_of_its_deadline_is_in_time_or_commits_nothing(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async def serve(stream: trio.abc.Stream) -> None:
        await stream.receive_some()
        await stream.send_all(EVENTS + b"transfer-encoding: chunked\r\n\r\n")
        await trio.testing.wait_all_tasks_blocked()
        await stream.send_all(b"%x\r\n%b\r\n" % (len(word("a")), word("a")))
        autojump_clock.jump(20)
        await stream.receive_some()

    world, sink = MemoryWorld(nursery), Client()
    world.net.listen("up", 8000, serve)
    with pytest.raises(UpstreamFailure) as caught:
        await world.relay(sink)

    late = caught.value.error.code == "timeout_first_token"
    assert late or caught.value.error.code == "timeout_idle"
    assert caught.value.committed is not late
    assert sink.calls == ([] if late else ["start"])


# --- streams ---------------------------------------------------------------------------------


PLAIN = [ROLE, b": ping\n\n", word("a"), word("b"), END]


@pytest.mark.parametrize(
    ("does", "expected"),
    [
        (events(*PLAIN, DONE), b"".join(PLAIN)),
        (events(b"".join(PLAIN) + DONE), b"".join(PLAIN)),
        (events(*PLAIN), b"".join(PLAIN)),  # [DONE] is missing, and the answer whole
        (events(*PLAIN, USAGE, DONE), b"".join(PLAIN)),
        (events(word("a"), b"data: {oops\n\n", END, DONE), word("a") + END),
        (events(word("a"), b"data: 5\n\n", END, DONE), word("a") + END),
        (events(word("a"), END.rstrip()), word("a") + END),
        (events(word("a"), END, b"data: [DONE]"), word("a") + END),
        (events(word("a"), END, DONE + word("after")), word("a") + END),
        (events(END, DONE), END),
        (
            raw(EVENTS + b"\r\n", word("a"), END + DONE).then(answered(), close()),
            word("a") + END,
        ),
        (events(word("x" * 900_000), END, DONE), word("x" * 900_000) + END),
    ],
)
async def test_a_stream_is_relayed_byte_for_byte(
    does: Script, expected: bytes, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world, sink = MemoryWorld(nursery, does), Client()
    await world.relay(sink)

    assert sink.received == expected + DONE
    assert sink.calls[0] == "start"
    assert sink.calls[-1] == "finish"
    assert set(sink.calls[1:-1]) <= {"write"}
    assert world.notes.phase is Phase.STREAMING
    await world.settle()
    await world.ask()


async def test_usage_is_read_along_and_relayed_only_to_those_who_asked(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world, sink = MemoryWorld(nursery, events(word("a"), END, USAGE, DONE)), Client()
    await world.relay(sink, asked={"stream_options": {"include_usage": True}})

    assert sink.received == word("a") + END + USAGE + DONE
    assert world.reader.final_usage() == Usage(3, 2)


async def test_malformed_events_are_dropped_and_counted(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    bad = b"data: nonsense\n\n"
    world, sink = MemoryWorld(nursery, events(bad, word("a"), bad * 3, END, DONE)), Client()
    await world.relay(sink)

    assert b"nonsense" not in sink.received
    assert world.reader.malformed == 4


async def test_nothing_is_committed_before_there_is_content(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    head, *rest = events(ROLE, b": ping\n\n", word("a"), END, DONE).steps
    script = Script([head, rest[0], sleep(3), rest[1], sleep(3), *rest[2:]])
    world, sink = MemoryWorld(nursery, script), Client()
    await world.relay(sink)

    assert sink.writes[0] == (6.0, "start", ROLE + b": ping\n\n" + word("a"))
    assert world.notes.upstream_wait == 6


async def test_tokens_are_passed_on_as_they_come(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world, sink = MemoryWorld(nursery, engines.stream_chat(["a", "b", "c"], gap=1)), Client()
    await world.relay(sink)

    assert [at for at, _, data in sink.writes if b'"content"' in data] == [0, 1, 2]


@pytest.mark.parametrize(
    ("does", "code", "received", "committed"),
    [
        (events(ROLE, ERROR), "upstream_500", b"", False),
        (events(word("a"), ERROR), "upstream_500", word("a"), True),
        (events(word("a") + ERROR), "upstream_500", word("a"), True),
        (events(word("a") + ERROR + END + DONE), "upstream_500", word("a"), True),
        (events(word("a"), b"data: no\n\n" * 6), "upstream_protocol_error", word("a"), True),
        (events(b"data: no\n\n" * 6), "upstream_protocol_error", b"", False),
        (events(word("a"), DONE), "upstream_connection_error", word("a"), True),
        (events(word("a")), "upstream_connection_error", word("a"), True),
        (events(DONE), "upstream_connection_error", b"", False),
        (events(ROLE, DONE), "upstream_connection_error", b"", False),
        (events(), "upstream_connection_error", b"", False),
        (engines.no_finish(1), "upstream_connection_error", None, True),
        (engines.cut_after(3), "upstream_connection_error", None, True),
        (engines.cut_after(3, mid_chunk=True), "upstream_connection_error", None, True),
        (engines.reset_after(3), "upstream_connection_error", None, True),
        (engines.cut_after(0), "upstream_connection_error", b"", False),
        (events(*[ROLE] * 65), "upstream_protocol_error", b"", False),
        (events(b": " + b"x" * 2**18 + b"\n\n"), "upstream_protocol_error", b"", False),
        (events(word("a"), b"data: " + b"x" * 2**20, b"x"), "upstream_protocol_error",
         word("a"), True),
        (engines.whole_chat("whole"), "upstream_protocol_error", b"", False),
        (engines.status(200, b'{"error": {"message": "out of memory", "code": 507}}'),
         "upstream_507", b"", False),
        (raw(EVENTS + b"content-length: 100\r\n\r\n" + word("a")[:50]).then(close()),
         "upstream_connection_error", b"", False),
        (raw(EVENTS + b"content-encoding: gzip\r\ncontent-length: 30\r\n\r\n",
             gzip.compress(b"data: x\n\n") + b"padding-0"),
         "upstream_protocol_error", b"", False),
    ],
)  # fmt: skip
async def test_what_a_bad_stream_means(
    does: Script, code: str, received: bytes | None, committed: bool,
    autojump_clock: MockClock, nursery: trio.Nursery,
) -> None:  # fmt: skip
    world, sink = MemoryWorld(nursery, does), Client()
    began = trio.current_time()
    with pytest.raises(UpstreamFailure) as caught:
        await world.relay(sink)

    failure = caught.value
    assert failure.error.code == code
    assert failure.judgement == MAYBE_BAD
    assert failure.committed is committed
    assert trio.current_time() == began
    assert received is None or sink.received == received
    assert "finish" not in sink.calls
    await world.settle()
    await world.ask()


@pytest.mark.parametrize(
    "ending",
    [close(), engines.reset(), send(b"zz\r\n"), hang()],
    ids=["FIN", "RST", "junk", "hang"],
)
async def test_a_stream_that_is_cut_behind_its_last_word_is_whole(
    ending: Step, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    does = events(word("a"), END, cut=True).then(sleep(1), ending)
    world, sink = MemoryWorld(nursery, does), Client()
    await world.relay(sink)

    assert sink.received == word("a") + END + DONE
    assert sink.calls[-1] == "finish"
    await world.settle()
    await world.ask()


async def test_an_error_behind_the_last_word_takes_nothing_back(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    does = events(word("a"), END, ERROR, cut=True).then(hang())
    world, sink = MemoryWorld(nursery, does), Client()
    began = trio.current_time()
    await world.relay(sink)

    assert sink.received == word("a") + END + DONE
    assert trio.current_time() == began  # it may work on, and is hung up on at once


async def test_pings_during_a_long_prefill_are_borne(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    pings = [b": ping\n\n"] * 600
    world, sink = MemoryWorld(nursery, events(*pings, word("a"), END, DONE)), Client()
    await world.relay(sink)

    assert sink.received == b"".join(pings) + word("a") + END + DONE


@pytest.mark.parametrize(
    ("does", "after", "kept"),
    [
        (engines.lingers(1), 0.05, False),
        (
            events(word("a"), END, DONE + word("more"), cut=True).then(answered(), hang()),
            0.05,
            False,
        ),
        (events(word("a"), END, DONE, cut=True).then(answered(), close()), 0, False),
        (events(word("a"), END, DONE, cut=True).then(send(b"zz\r\n")), 0, False),
        (events(word("a"), END, DONE), 0, True),
    ],
)
async def test_what_comes_behind_done_costs_the_connection_at_most(
    does: Script, after: float, kept: bool, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world, sink = MemoryWorld(nursery, does), Client()
    began = trio.current_time()
    await world.relay(sink)

    assert sink.calls[-1] == "finish"
    assert trio.current_time() - began == pytest.approx(after, abs=1e-9)
    assert sink.writes[-1][0] == 0  # the client was not kept waiting for it
    await world.settle()
    assert world.pool.idle_count == int(kept)


LINE_ENDS = ["\n", "\r\n", "\r"]


@given(
    texts=st.lists(st.text(max_size=20), min_size=1, max_size=5),
    line_end=st.sampled_from(LINE_ENDS),
    cuts=st.lists(st.integers(0, 2000), max_size=40),
    framing=st.sampled_from(["chunked", "length", "close"]),
)
@settings(max_examples=150, deadline=None)
def test_however_the_bytes_are_cut_the_client_gets_the_same(
    texts: list[str], line_end: str, cuts: list[int], framing: str
) -> None:
    answer = b"".join([ROLE, b": c\n\n", *map(word, texts), END])
    answer = answer.replace(b"\n", line_end.encode())
    body = answer + DONE.replace(b"\n", line_end.encode())
    match framing:
        case "chunked":
            chunks = [body[at : at + 37] for at in range(0, len(body), 37)]
            whole = b"".join([b"%x\r\n%b\r\n" % (len(c), c) for c in chunks]) + b"0\r\n\r\n"
            response = EVENTS + b"transfer-encoding: chunked\r\n\r\n" + whole
        case "length":
            response = EVENTS + b"content-length: %d\r\n\r\n%b" % (len(body), body)
        case _:
            response = EVENTS + b"\r\n" + body
    at = sorted({cut % len(response) for cut in cuts} | {0, len(response)})
    script = raw(*[response[a:b] for a, b in pairwise(at)])
    if framing == "close":
        script = script.then(close())

    async def main() -> bytes:
        async with trio.open_nursery() as nursery:
            world, sink = MemoryWorld(nursery, script), Client()
            await world.relay(sink)
            await world.pool.aclose()
            nursery.cancel_scope.cancel()
        return sink.received

    received = trio.run(main, clock=MockClock(autojump_threshold=0))
    # Of "\r\n\r\n", the last "\n" may come too late to be told from the next event's first byte.
    assert received in {answer + DONE, answer.removesuffix(b"\n") + DONE}


# --- connections that die --------------------------------------------------------------------


def dies_idle(how: Callable[[], engines.Step]) -> Script:
    """A good answer, and an end that is noticed only when the connection is used again."""
    return engines.whole_chat("first").then(answered(), how())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("how", [close, reset])
async def test_a_request_that_met_a_dead_connection_says_nothing_about_the_endpoint(
    how: Callable[[], engines.Step], stream: bool, autojump_clock: MockClock,
    nursery: trio.Nursery,
) -> None:  # fmt: skip
    world = MemoryWorld(nursery, dies_idle(how))
    await world.ask()
    failure = await world.fail(stream=stream)

    assert failure.stale
    assert failure.judgement == Judgement(Retry.AMBIGUOUS, Verdict.NO_OPINION)
    assert world.engine.connections == 1
    await world.settle()


async def test_a_fresh_connection_is_a_new_one(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = MemoryWorld(nursery)
    await world.ask()
    call = attrs.evolve(make_call({}), fresh=True)
    await world.client.ask(world.target, call, make_timing(), Notes())

    assert world.engine.connections == 2
    await world.settle()


async def test_a_new_connection_that_dies_is_not_tried_again(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = MemoryWorld(nursery, Script([close()]))
    failure = await world.fail(stream=False)

    assert not failure.stale
    assert world.engine.connections == 1


async def test_an_answer_that_had_begun_is_not_asked_for_again(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = MemoryWorld(nursery, engines.whole_chat("first"), raw(b"HTTP").then(close()))
    await world.ask()
    failure = await world.fail(stream=False)

    assert not failure.stale
    assert len(world.engine.posts) == 2


# --- cancellation ----------------------------------------------------------------------------


async def one_answer(world: MemoryWorld) -> None:
    await world.ask()


async def one_stream(world: MemoryWorld) -> None:
    await world.relay(Client())


async def one_stale(world: MemoryWorld) -> None:
    world.engine.scripts.append(dies_idle(close))
    await world.ask()
    with pytest.raises(UpstreamFailure):
        await world.ask()


async def one_refused(world: MemoryWorld) -> None:
    world.engine.scripts.append(status(500, b"{}"))
    with pytest.raises(UpstreamFailure):
        await world.ask()


@pytest.mark.parametrize("work", [one_answer, one_stream, one_stale, one_refused])
async def test_cancelling_at_any_step_leaves_nothing_in_doubt(
    work: Callable[[MemoryWorld], Awaitable[None]],
    autojump_clock: MockClock, nursery: trio.Nursery,
) -> None:  # fmt: skip
    def slowly(entry: LedgerEntry) -> Script:
        return Script([sleep(0.1), *engines.as_asked(entry).steps])

    for step in range(1, 1000):
        world = MemoryWorld(nursery, default=slowly)

        async def run(world: MemoryWorld = world) -> None:
            await work(world)

        fired = await cancel_at(step, run)
        await trio.testing.wait_all_tasks_blocked()
        world.check_nothing_is_in_doubt()
        assert world.net.connections == world.pool.open_count
        assert world.engine.in_flight == 0
        world.engine.scripts.clear()
        assert b'"ok"' in (await world.ask()).body
        await world.pool.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert world.engine.open_connections == 0
        if not fired:
            break
    else:
        pytest.fail("it never came to an end")
    assert step > 10


@pytest.mark.parametrize(
    ("script", "stream"),
    [
        (Script([hang()]), False),
        (Script([hang()]), True),
        (engines.stall_after(0), True),
        (engines.stall_after(3), True),
    ],
)
async def test_the_engine_sees_a_client_leave_in_any_phase(
    script: Script, stream: bool, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = MemoryWorld(nursery, script)
    began = trio.current_time()
    with trio.move_on_after(2):
        await (world.relay(Client()) if stream else world.ask())
    await world.settle()

    (entry,) = world.engine.posts
    assert (entry.ended, entry.client_left_at) == ("client_left", began + 2)
    assert world.pool.open_count == 0


async def test_a_client_that_cannot_be_written_to_ends_the_request_upstream(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    class Gone(Client):
        async def write(self, data: bytes) -> None:
            raise trio.BrokenResourceError

    world = MemoryWorld(nursery, engines.stream_chat("abc", gap=1).then(hang()))
    with pytest.raises(trio.BrokenResourceError):
        await world.relay(Gone())
    await world.settle()

    assert world.engine.abandoned == 1
    assert world.pool.open_count == 0


# --- over sockets ----------------------------------------------------------------------------


async def reach(engine: ScriptedEngine, nursery: trio.Nursery) -> World:
    port = await serve_tcp(engine, nursery)
    return World(nursery, make_connect(), Target.of(f"http://127.0.0.1:{port}", None), engine)


@pytest.mark.parametrize("how", [close, reset])
async def test_an_engine_may_hang_up_on_idle_connections_whenever_it_likes(
    how: Callable[[], engines.Step], nursery: trio.Nursery
) -> None:
    # The hang-up races with the next request: sometimes before the checkout, sometimes after.
    engine = ScriptedEngine(default=engines.whole_chat("ok").then(answered(), how()))
    world = await reach(engine, nursery)
    served, failures = 0, []
    with trio.fail_after(10):
        for _ in range(200):
            try:
                await world.ask(headers=5)
                served += 1
            except UpstreamFailure as failure:
                failures.append(failure)
        await world.pool.aclose()
    nursery.cancel_scope.cancel()

    assert all(failure.stale for failure in failures)
    assert {failure.judgement.verdict for failure in failures} <= {Verdict.NO_OPINION}
    assert served == 200 - len(failures) > 0


async def test_surplus_reaches_nobody(nursery: trio.Nursery) -> None:
    engine = ScriptedEngine([engines.surplus()])
    world = await reach(engine, nursery)
    with trio.fail_after(5):
        assert b'"mine"' in (await world.ask()).body
        assert b'"ok"' in (await world.ask()).body
        await world.pool.aclose()
    nursery.cancel_scope.cancel()

    assert engine.connections == 2


async def test_an_upstream_that_reads_nothing_is_given_up_by_the_headers_clock(
    nursery: trio.Nursery,
) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    listeners: list[trio.SocketListener] = await nursery.start(
        partial(trio.serve_tcp, serve, 0, host="127.0.0.1")
    )
    port = listeners[0].socket.getsockname()[1]
    target = Target.of(f"http://127.0.0.1:{port}", None)
    world = World(nursery, make_connect(), target, ScriptedEngine())
    with trio.fail_after(5), pytest.raises(UpstreamFailure) as caught:
        await world.ask(asked={"user": "x" * 2**24}, headers=0.1)
    nursery.cancel_scope.cancel()

    assert caught.value.error.code == "timeout_headers"
    assert caught.value.judgement == MAYBE_BAD
    assert world.pool.open_count == 0


async def test_a_refusal_in_the_middle_of_a_large_request_reaches_the_client(
    nursery: trio.Nursery,
) -> None:
    engine = ScriptedEngine([engines.early_status(413, b'{"error":"too large"}')])
    world = await reach(engine, nursery)
    with trio.fail_after(5), pytest.raises(UpstreamFailure) as caught:
        await world.ask(asked={"user": "x" * 2**23})
    nursery.cancel_scope.cancel()

    assert caught.value.error.status == 413
    assert world.pool.open_count == 0


async def test_a_client_that_does_not_read_stops_the_engine(nursery: trio.Nursery) -> None:
    event = word("x" * 10_000)
    count, sent, go_on = 3000, 0, trio.Event()
    writes: list[int] = []

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal sent
        await stream.receive_some()
        await stream.send_all(EVENTS + b"\r\n")
        for _ in range(count):
            await stream.send_all(event)
            sent += 1
        await stream.send_all(END + DONE)

    class Stuck(Client):
        async def _take(self, call: str, data: bytes) -> None:
            await go_on.wait()
            writes.append(len(data))

    listeners: list[trio.SocketListener] = await nursery.start(
        partial(trio.serve_tcp, serve, 0, host="127.0.0.1")
    )
    port = listeners[0].socket.getsockname()[1]
    target = Target.of(f"http://127.0.0.1:{port}", None)
    world = World(nursery, make_connect(), target, ScriptedEngine())
    with trio.fail_after(10):
        async with trio.open_nursery() as relaying:
            relaying.start_soon(world.relay, Stuck())
            await trio.testing.wait_all_tasks_blocked(0.05)
            stuck_at = sent
            go_on.set()
    nursery.cancel_scope.cancel()

    assert 0 < stuck_at < count
    assert sum(writes) == count * len(event) + len(END) + len(DONE)
    assert max(writes) < 2 * 64 * 1024  # one read, and what was left of the one before
