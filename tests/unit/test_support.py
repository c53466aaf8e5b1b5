"""The harness itself: an instrument that lies is worse than none."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.support import scripted_engine as engines
from tests.support.ledger import ClientLedger, parse_metrics, total
from tests.support.memory_net import MemoryNet
from tests.support.openfds import open_descriptors, task_count
from tests.support.raw_client import NoResponseError, RawClient, RawResponse, http_request
from tests.support.scripted_engine import Script, ScriptedEngine, serve_tcp

Reach = Callable[[ScriptedEngine], AbstractAsyncContextManager[RawClient]]
CHAT = "/v1/chat/completions"


def chat(request_id: str = "r1", *, stream: bool = False) -> bytes:
    return http_request("POST", CHAT, {"stream": stream}, [("x-request-id", request_id)])


async def until(engine: ScriptedEngine, holds: Callable[[], bool]) -> None:
    with trio.fail_after(5):
        await engine.wait_until(holds)


@asynccontextmanager
async def in_memory(engine: ScriptedEngine) -> AsyncIterator[RawClient]:
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.serve, theirs)
        yield RawClient(ours)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def over_tcp(engine: ScriptedEngine) -> AsyncIterator[RawClient]:
    async with trio.open_nursery() as nursery:
        async with await RawClient.connect(await serve_tcp(engine, nursery)) as client:
            yield client
        nursery.cancel_scope.cancel()


both = pytest.mark.parametrize("reach", [in_memory, over_tcp])


# --- the network -----------------------------------------------------------------------------


async def test_a_close_is_noticed_in_both_directions(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    seen: list[bytes] = []

    async def server(stream: trio.abc.Stream) -> None:
        await stream.send_all(b"hello")
        seen.append(bytes(await stream.receive_some()))
        await stream.send_all(b"too late")  # breaks, which the network shrugs off

    net = MemoryNet(nursery)
    net.listen("up", 80, server)
    stream = await net.connect("up", 80)
    assert (await stream.receive(2), await stream.receive()) == (b"he", b"llo")
    await stream.aclose()
    await trio.testing.wait_all_tasks_blocked()

    assert seen == [b""]
    assert net.connections == 0
    with pytest.raises(anyio.ClosedResourceError):
        await stream.receive()


async def test_a_server_that_hangs_up_ends_the_stream_and_breaks_sending(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    net = MemoryNet(nursery)
    net.listen("up", 80, lambda stream: stream.aclose())
    stream = await net.connect("up", 80)

    with pytest.raises(anyio.EndOfStream):
        await stream.receive()
    with pytest.raises(anyio.BrokenResourceError):
        await stream.send(b"anyone?")
    assert net.connections == 1  # the client has not let go
    await stream.aclose()
    await stream.aclose()
    assert net.connections == 0


async def test_an_end_of_sending_leaves_the_other_direction_open(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async def echo_at_eof(stream: trio.abc.Stream) -> None:
        heard = b""
        while data := await stream.receive_some():
            heard += data
        await stream.send_all(heard)

    net = MemoryNet(nursery)
    net.listen("up", 80, echo_at_eof)
    async with await net.connect("up", 80) as stream:
        await stream.send(b"bye")
        await stream.send_eof()

        assert await stream.receive() == b"bye"


async def test_hosts_refuse_or_say_nothing(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    net = MemoryNet(nursery)
    net.listen("gone", 80, ScriptedEngine().serve)
    net.refuse("gone", 80)
    net.blackhole("silent", 80)

    with pytest.raises(ConnectionRefusedError):
        await net.connect("unknown", 80)
    with pytest.raises(ConnectionRefusedError):
        await net.connect("gone", 80)
    with trio.move_on_after(3600) as scope:
        await net.connect("silent", 80)
    assert scope.cancelled_caught
    assert net.dialled == [("unknown", 80), ("gone", 80), ("silent", 80)]
    assert net.connections == 0


async def test_a_handlers_own_mistake_is_not_swallowed(autojump_clock: MockClock) -> None:
    async def mistaken(stream: trio.abc.Stream) -> None:
        raise ValueError("a bug in the test")

    with pytest.RaisesGroup(ValueError):
        async with trio.open_nursery() as nursery:
            net = MemoryNet(nursery)
            net.listen("up", 80, mistaken)
            async with await net.connect("up", 80):
                await trio.sleep(1)


# --- the engine ------------------------------------------------------------------------------


@both
async def test_one_connection_serves_probes_and_scripts_in_turn(reach: Reach) -> None:
    engine = ScriptedEngine([engines.whole_chat("one", usage=(2, 3)), engines.status(429)])
    async with reach(engine) as client:
        health = await client.request("GET", "/health")
        models = await client.request("GET", "/v1/models")
        await client.send(chat("a"))
        first = await client.read_response()
        await client.send(chat("a"))
        second = await client.read_response()
        await client.send(chat("b"))
        third = await client.read_response()

    assert [r.status for r in (health, models, first, second, third)] == [200, 200, 200, 429, 200]
    assert models.json()["data"][0]["id"] == engines.MODEL
    assert first.json()["choices"][0]["message"]["content"] == "one"
    assert first.json()["usage"]["total_tokens"] == 5
    assert third.json()["choices"][0]["message"]["content"] == "ok"
    assert [(e.request_id, e.attempt) for e in engine.posts] == [("a", 1), ("a", 2), ("b", 1)]
    assert {e.ended for e in engine.ledger} == {"answered"}
    assert (engine.connections, engine.open_connections, engine.max_in_flight) == (1, 0, 1)


async def test_tokens_come_when_the_script_says(autojump_clock: MockClock) -> None:
    engine = ScriptedEngine([engines.stream_chat(["a", "b", "c"], usage=(1, 3), gap=10)])
    start = trio.current_time()
    async with in_memory(engine) as client:
        await client.send(chat())
        events = client.read_events()
        got = [(trio.current_time() - start, data) async for data in events]

    assert [at for at, _ in got] == [0, 10, 20, 20, 20, 20]
    words = [json.loads(data)["choices"][0]["delta"]["content"] for _, data in got[:3]]
    assert words == ["a", "b", "c"]
    assert json.loads(got[3][1])["choices"][0]["finish_reason"] == "stop"
    assert json.loads(got[4][1])["usage"]["completion_tokens"] == 3
    assert got[5][1] == "[DONE]"
    assert events.response.complete


async def test_a_hang_up_is_recorded_at_its_very_moment(autojump_clock: MockClock) -> None:
    engine = ScriptedEngine([engines.stall_after(2)])
    start = trio.current_time()
    async with in_memory(engine) as client:
        await client.send(chat())
        events = client.read_events()
        await anext(events)
        await anext(events)
        await trio.testing.wait_all_tasks_blocked()
        hanging = engine.posts[0].ended
        await trio.sleep(7)
        await client.aclose()
        await until(engine, lambda: engine.open_connections == 0)

    (entry,) = engine.posts
    assert hanging == "hung"
    assert (entry.ended, entry.client_left_at) == ("client_left", start + 7)
    assert (engine.abandoned, engine.in_flight) == (1, 0)


@pytest.mark.parametrize("leave", [RawClient.aclose, RawClient.reset])
@pytest.mark.parametrize("script", [Script([engines.hang()]), engines.stall_after(1)])
async def test_a_hang_up_is_noticed_over_a_real_socket(
    leave: Callable[[RawClient], Awaitable[None]], script: Script
) -> None:
    engine = ScriptedEngine([script])
    async with over_tcp(engine) as client:
        await client.send(chat())
        await until(engine, lambda: bool(engine.posts) and engine.posts[0].ended == "hung")
        before = trio.current_time()
        await leave(client)
        await until(engine, lambda: engine.open_connections == 0)

    (entry,) = engine.posts
    assert entry.ended == "client_left"
    assert entry.client_left_at is not None
    assert entry.client_left_at - before < 1
    assert engine.abandoned == 1


async def test_a_client_that_leaves_inside_its_own_request_is_recorded(
    autojump_clock: MockClock,
) -> None:
    engine = ScriptedEngine()
    async with in_memory(engine) as client:
        await client.send(chat()[:-3])
        await client.aclose()
        await until(engine, lambda: engine.abandoned == 1)

    assert engine.posts[0].ended == "client_left"
    assert chat().endswith(engine.posts[0].body + chat()[-3:])


async def test_a_client_that_leaves_with_its_whole_answer_abandons_nothing() -> None:
    engine = ScriptedEngine()
    async with trio.open_nursery() as nursery:
        port = await serve_tcp(engine, nursery)
        for _ in range(100):
            async with await RawClient.connect(port) as client:
                await client.send(chat())
                assert (await client.read_response()).complete
        await until(engine, lambda: engine.open_connections == 0)
        nursery.cancel_scope.cancel()

    assert [entry.ended for entry in engine.posts] == ["answered"] * 100
    assert engine.abandoned == 0


async def test_the_ledger_knows_the_most_at_once(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    go = trio.Event()
    engine = ScriptedEngine(default=Script([engines.wait(go), *engines.whole_chat("x").steps]))
    net = MemoryNet(nursery)
    net.listen("up", 80, engine.serve)
    streams = [await net.connect("up", 80) for _ in range(3)]
    for stream in streams:
        await stream.send(chat())
    await until(engine, lambda: engine.in_flight == 3)
    go.set()
    await until(engine, lambda: engine.in_flight == 0)

    assert engine.max_in_flight == 3
    for stream in streams:
        await stream.aclose()


@both
@pytest.mark.parametrize(
    ("script", "ended", "complete"),
    [
        pytest.param(engines.half_body(), "closed", False, id="half a body"),
        pytest.param(engines.cut_after(2), "closed", False, id="cut between chunks"),
        pytest.param(engines.cut_after(2, mid_chunk=True), "closed", False, id="cut in a chunk"),
        pytest.param(engines.no_finish(), "answered", True, id="no finish"),
        pytest.param(engines.error_event(), "answered", True, id="error event"),
        pytest.param(engines.close_delimited(), "answered", True, id="close-delimited"),
        pytest.param(engines.html(), "answered", True, id="html"),
        pytest.param(engines.empty(), "answered", True, id="empty"),
        pytest.param(engines.redirect("http://elsewhere/"), "answered", True, id="redirect"),
        pytest.param(engines.loading(), "answered", True, id="loading"),
    ],
)
async def test_scripts_end_as_they_say(
    reach: Reach, script: Script, ended: str, complete: bool
) -> None:
    engine = ScriptedEngine([script])
    async with reach(engine) as client:
        await client.send(chat())
        response = await client.read_response()

    assert response.complete is complete
    assert engine.posts[0].ended == ended


@pytest.mark.parametrize(("reach", "end"), [(in_memory, "fin"), (over_tcp, "rst")])
async def test_a_reset_is_a_reset_on_a_socket(reach: Reach, end: str) -> None:
    engine = ScriptedEngine([engines.Script([engines.reset()])])
    async with reach(engine) as client:
        await client.send(chat())
        with pytest.raises(NoResponseError):
            await client.read_response()

    assert client.ended == end
    assert engine.posts[0].ended == "reset"


@both
async def test_a_second_response_lies_behind_the_first(reach: Reach) -> None:
    engine = ScriptedEngine([engines.surplus()])
    async with reach(engine) as client:
        await client.send(chat())
        first, second = await client.read_response(), await client.read_response()

    assert b"mine" in first.body
    assert b"surplus" in second.body
    assert len(engine.posts) == 1


async def test_bytes_come_on_an_idle_connection(autojump_clock: MockClock) -> None:
    engine = ScriptedEngine([engines.early_bytes_on_idle(5)])
    start = trio.current_time()
    async with in_memory(engine) as client:
        await client.send(chat())
        await client.read_response()
        idle = engine.in_flight
        unasked = await client.read_response()

    assert idle == 0
    assert b"unasked" in unasked.body
    assert trio.current_time() - start == 5


async def test_leaving_after_the_answer_is_no_abandonment(autojump_clock: MockClock) -> None:
    engine = ScriptedEngine([engines.lingers(1)])
    start = trio.current_time()
    async with in_memory(engine) as client:
        await client.send(chat())
        events = client.read_events()
        while await anext(events) != "[DONE]":
            pass
        await trio.sleep(2)
        await client.aclose()
        await until(engine, lambda: engine.open_connections == 0)

    (entry,) = engine.posts
    assert (entry.ended, entry.client_left_at) == ("answered", start + 2)
    assert engine.abandoned == 0
    assert not events.response.complete


@both
async def test_interim_responses_come_first(reach: Reach) -> None:
    engine = ScriptedEngine([engines.continues(2), engines.switching_protocols()])
    async with reach(engine) as client:
        await client.send(chat())
        codes = [(await client.read_response()).status for _ in range(3)]
        await client.send(chat())
        codes.append((await client.read_response()).status)

    assert codes == [103, 103, 200, 101]


@both
async def test_an_early_answer_does_not_wait_for_the_body(reach: Reach) -> None:
    engine = ScriptedEngine([engines.early_status(413)])
    async with reach(engine) as client:
        await client.send(http_request("POST", CHAT, headers=[("content-length", "99")]) + b"some")
        response = await client.read_response()
        await client.send(b"more")
        await client.aclose()
        await until(engine, lambda: engine.open_connections == 0)

    assert response.status == 413
    assert engine.posts[0].body == b"somemore"
    assert engine.abandoned == 0


async def test_an_engine_that_stops_reading_blocks_its_client() -> None:
    engine = ScriptedEngine([Script([engines.stop_reading(), engines.hang()], before_body=True)])
    async with over_tcp(engine) as client:
        with trio.move_on_after(0.3) as scope:
            await client.send(http_request("POST", CHAT, body=bytes(64 << 20)))

    assert scope.cancelled_caught
    assert engine.posts[0].ended == "hung"


async def test_garbage_is_no_response(autojump_clock: MockClock) -> None:
    engine = ScriptedEngine([engines.garbage()])
    async with in_memory(engine) as client:
        await client.send(chat())
        with pytest.raises((IndexError, ValueError)):
            await client.read_response()


@both
async def test_a_chunked_request_is_understood(reach: Reach) -> None:
    engine = ScriptedEngine()
    async with reach(engine) as client:
        head = http_request("POST", CHAT, headers=[("transfer-encoding", "chunked")])
        for byte in head + b'd\r\n{"stream":fal\r\n3;x=y\r\nse}\r\n0\r\nt: 1\r\n\r\n':
            await client.send(bytes([byte]))
        response = await client.read_response()

    assert response.status == 200
    assert engine.posts[0].body == b'{"stream":false}'


async def test_an_engine_that_is_stopped_says_so(autojump_clock: MockClock) -> None:
    engine = ScriptedEngine([Script([engines.sleep(100)])])
    async with in_memory(engine) as client:
        await client.send(chat())
        await until(engine, lambda: engine.in_flight == 1)

    assert engine.posts[0].ended == "stopped"
    assert (engine.in_flight, engine.abandoned) == (0, 0)


# --- the books -------------------------------------------------------------------------------


async def test_books_that_balance_raise_no_complaint(autojump_clock: MockClock) -> None:
    engine = ScriptedEngine()
    books = ClientLedger()
    async with in_memory(engine) as client:
        books.ask("a")
        await client.send(chat("a"))
        books.saw("a", await client.read_response())

    assert books.discrepancies(engine.posts) == []
    assert books.outcomes() == {"answered": 1}


async def test_books_that_do_not_balance_say_where(autojump_clock: MockClock) -> None:
    engine = ScriptedEngine()
    books = ClientLedger()
    async with in_memory(engine) as client:
        for request_id in ("twice", "twice", "stray"):
            await client.send(chat(request_id))
            response = await client.read_response()
    for request_id in ("twice", "lost", "invented"):
        books.ask(request_id)
    books.saw("twice", response)
    books.saw("invented", response)

    assert books.discrepancies(engine.posts) == [
        "invented: answered by nobody",
        "lost: 0 ends",
        "stray: nobody asked for it",
        "twice: executed 2 times",
    ]


def test_every_way_to_end_has_its_name() -> None:
    books = ClientLedger()
    books.saw("a", RawResponse(429, [], complete=True))
    books.saw("b", RawResponse(200, []), ["tok"])
    books.saw("c", RawResponse(200, [], complete=True), failed=True)
    books.saw("d", None)
    books.left("e", 200)

    assert books.outcomes() == {"refused": 1, "cut": 2, "failed": 1, "left": 1}


def test_metrics_are_summed_over_the_labels_not_named() -> None:
    metrics = parse_metrics(
        "# TYPE hits counter\n"
        'hits_total{endpoint="a",status="200"} 3\n'
        'hits_total{endpoint="b",status="200"} 4\n'
        'hits_total{endpoint="b",status="502"} 1\n'
    )

    assert total(metrics, "hits_total", status="200") == 7
    assert total(metrics, "hits_total", endpoint="b") == 5
    assert total(metrics, "hits_total", endpoint="c") == 0


async def test_descriptors_and_tasks_are_counted() -> None:
    tasks, descriptors = task_count(), open_descriptors()
    async with over_tcp(ScriptedEngine()) as client:
        await client.request("GET", "/health")
        during = task_count(), open_descriptors()

    assert during[0] > tasks
    assert during[1] == descriptors + 3  # the listener and both ends
    assert (task_count(), open_descriptors()) == (tasks, descriptors)
