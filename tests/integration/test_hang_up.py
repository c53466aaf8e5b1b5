"""Clients that leave: the engine is told at once, everything is given back, nobody is blamed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from citadel_gateway.app.service import UnifiedAPIGatewayService
from citadel_gateway.config.loader import parse
from citadel_gateway.io.http1_exchange import ResponseAborted
from citadel_gateway.policy.circuit_breaker import State
from tests.support import scripted_engine as engines
from tests.support.gateway import (
    CHAT,
    CapturedLog,
    World,
    chat,
    endpoint,
    fleet,
    gather,
    running_gateway,
)
from tests.support.ledger import total
from tests.support.raw_client import RawClient, http_request
from tests.support.scripted_engine import LedgerEntry, Script, ScriptedEngine, hang, send, serve_tcp
from tests.support.sim_driver import calling, fetch

BOTH = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
HALF_BODY = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"id"'


def request(model: str | None = "m", **fields: Any) -> bytes:
    return http_request("POST", CHAT, chat(model, **fields))


@asynccontextmanager
async def somebody_leaves(world: World, data: bytes) -> AsyncIterator[RawClient]:
    """A client that has sent *data*, and leaves at the end of the body.

    Whatever it held must be back without any time passing, and the breakers must not have learnt
    anything from it.
    """
    before = [repr(upstream.endpoint.breaker) for upstream in world.service.balancer.upstreams]
    async with world.client() as client:
        await client.send(data)
        yield client
        left_at = trio.current_time()
    await wait_all_tasks_blocked()
    assert trio.current_time() == left_at
    world.assert_at_rest()
    after = [repr(upstream.endpoint.breaker) for upstream in world.service.balancer.upstreams]
    assert after == before


async def assert_one_leaver(world: World, phase: str, *, attempts: int) -> None:
    metrics = await world.metrics()
    (line,) = world.access_log
    assert (line["outcome"], line["code"]) == ("client_closed", "client_closed_request")
    assert line["phase"] == phase
    assert line["attempts"] == attempts
    assert total(metrics, "citadel_gateway_requests_total") == 1
    assert total(metrics, "citadel_gateway_requests_total", outcome="client_closed") == 1
    assert total(metrics, "citadel_gateway_cancellations_total") == 1
    assert total(metrics, "citadel_gateway_cancellations_total", phase=phase) == 1
    assert total(metrics, "citadel_gateway_attempts_total", result="cancelled") == attempts


async def test_while_it_sends_its_body(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": {}})) as world:
        async with somebody_leaves(world, request()[:-10]):
            await trio.sleep(1)
        await assert_one_leaver(world, "receiving", attempts=0)

    assert world.posts == []


async def test_before_its_head_is_complete(autojump_clock: MockClock) -> None:
    half = b"POST /v1/chat/completions HT"
    async with running_gateway(fleet({"m": {}})) as world, somebody_leaves(world, half):
        await trio.sleep(1)

    assert world.access_log == []


@BOTH
@pytest.mark.parametrize("model", ["m", None])
async def test_while_it_is_queued(
    autojump_clock: MockClock, stream: bool, model: str | None
) -> None:
    async with running_gateway(fleet({"m": {"max_concurrent": 1}})) as world:
        world.engines["m"].default = Script([engines.sleep(5), *engines.whole_chat("ok").steps])
        waitroom = world.service.admission.waitroom
        async with world.client() as first, world.client() as client:
            await first.send(request())
            await wait_all_tasks_blocked()
            await client.send(request(model, stream=stream))
            await wait_all_tasks_blocked()
            assert waitroom.depth("m") == 1  # the only model there is
            await client.aclose()
            await wait_all_tasks_blocked()
            assert waitroom.depth("m") == 0
            assert (await first.read_response()).status == 200
        left, answered = world.access_log
        metrics = await world.metrics()

    assert (left["outcome"], left["phase"]) == ("client_closed", "queued")
    assert answered["outcome"] == "ok"
    assert total(metrics, "citadel_gateway_cancellations_total", phase="queued") == 1
    assert len(world.posts) == 1


@BOTH
async def test_while_the_gateway_connects(autojump_clock: MockClock, stream: bool) -> None:
    async with running_gateway(fleet({"m": {}})) as world:
        await trio.sleep(4)  # until the connection of the probe is closed
        world.net.blackhole("m", 8000)
        async with somebody_leaves(world, request(stream=stream)):
            await trio.sleep(1)
        await assert_one_leaver(world, "connecting", attempts=1)

    assert world.posts == []


@BOTH
async def test_while_the_engine_is_silent(autojump_clock: MockClock, stream: bool) -> None:
    async with running_gateway(fleet({"m": {}})) as world:
        world.engines["m"].default = Script([hang()])
        async with somebody_leaves(world, request(stream=stream)):
            await trio.sleep(1)
            left_at = trio.current_time()
        await assert_one_leaver(world, "waiting", attempts=1)

    assert [post.client_left_at for post in world.posts] == [left_at]
    assert world.engines["m"].abandoned == 1


async def test_while_the_body_of_a_whole_answer_arrives(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": {}})) as world:
        world.engines["m"].default = Script([send(HALF_BODY), hang()])
        async with somebody_leaves(world, request()):
            await trio.sleep(1)
            left_at = trio.current_time()
        await assert_one_leaver(world, "waiting", attempts=1)

    assert [post.client_left_at for post in world.posts] == [left_at]


async def test_before_the_first_token(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": {}})) as world:
        world.engines["m"].default = engines.stall_after(0)
        async with somebody_leaves(world, request(stream=True)):
            await trio.sleep(1)
            left_at = trio.current_time()
        await assert_one_leaver(world, "waiting", attempts=1)

    assert [post.client_left_at for post in world.posts] == [left_at]


async def test_within_a_stream(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": {}})) as world:
        world.engines["m"].default = engines.stall_after(3)
        async with somebody_leaves(world, request(stream=True)) as client:
            reader = client.read_events()
            for _ in range(3):
                await anext(reader)
            await trio.sleep(1)
            left_at = trio.current_time()
        await assert_one_leaver(world, "streaming", attempts=1)
        metrics = await world.metrics()

    assert [post.client_left_at for post in world.posts] == [left_at]
    assert world.access_log[0]["status"] == 200
    assert total(metrics, "citadel_gateway_tokens_total", kind="completion") == 3


async def test_half_a_connection_is_none(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": {}})) as world:
        world.engines["m"].default = engines.stall_after(3)
        async with world.client() as client:
            await client.send(request(stream=True))
            await anext(client.read_events())
            assert isinstance(client.stream, trio.StapledStream)
            await client.stream.send_eof()
            await wait_all_tasks_blocked()
            world.assert_at_rest()

    assert world.engines["m"].abandoned == 1


@BOTH
async def test_between_two_attempts_there_is_no_second(
    autojump_clock: MockClock, stream: bool
) -> None:
    """One endpoint refuses for long, the other one is busy: the client leaves while it waits."""
    config = fleet({"m": {"endpoints": [{"url": endpoint("a")}, {"url": endpoint("b")}],
                          "max_concurrent": 1}})  # fmt: skip
    async with running_gateway(config) as world:
        a, b = world.engines["a"], world.engines["b"]
        refusal = engines.status(429, b"", [("retry-after", "9")])
        a.default = Script([engines.sleep(1), *refusal.steps])
        b.default = Script([engines.sleep(5), *engines.whole_chat("ok").steps])
        async with world.client() as client, world.client() as other:
            await client.send(request(stream=stream))
            await wait_all_tasks_blocked()
            await other.send(request())
            await trio.sleep(2)
            assert (len(a.posts), len(b.posts)) == (1, 1)
            await client.aclose()
            await wait_all_tasks_blocked()
            (line,) = world.access_log
            assert (await other.read_response()).status == 200

    assert (line["outcome"], line["phase"], line["attempts"]) == ("client_closed", "queued", 1)
    assert (len(a.posts), len(b.posts)) == (1, 1)


@BOTH
async def test_after_any_number_of_scheduling_rounds(
    autojump_clock: MockClock, stream: bool
) -> None:
    """From the first byte to the last: the client leaves everywhere that anything waits."""
    laps = [*range(40)] * 4  # whoever is scheduled first differs from lap to lap
    config = fleet({"m": {"endpoints": [{"url": endpoint("a")}, {"url": endpoint("b")}]}})
    async with running_gateway(config) as world:
        world.engines["a"].default = engines.status(429, b"", [("retry-after", "0")])
        for pauses in laps:
            async with world.client() as client:
                await client.send(request(stream=stream))
                for _ in range(pauses):
                    await trio.lowlevel.checkpoint()
            await trio.sleep(4)  # until no connection is left, so that all are opened anew
            world.assert_at_rest()
        metrics = await world.metrics()

    outcomes = Counter(line["outcome"] for line in world.access_log)
    assert set(outcomes) == {"client_closed", "ok"}
    assert outcomes["client_closed"] == total(metrics, "citadel_gateway_cancellations_total")
    assert total(metrics, "citadel_gateway_requests_total") == outcomes.total() <= len(laps)
    phases = {line["phase"] for line in world.access_log if "phase" in line}
    assert phases >= {"connecting", "waiting"}


@BOTH
@pytest.mark.parametrize("pauses", range(12))
async def test_exactly_when_its_answer_is_complete(
    autojump_clock: MockClock, stream: bool, pauses: int
) -> None:
    """The answer starts at the same moment; the client leaves some scheduling rounds later."""
    now = trio.Event()
    async with running_gateway(fleet({"m": {}})) as world:
        answer = engines.stream_chat(["ok"]) if stream else engines.whole_chat("ok")
        world.engines["m"].default = Script([engines.wait(now), *answer.steps])
        async with world.client() as client:
            await client.send(request(stream=stream))
            await wait_all_tasks_blocked()
            now.set()
            for _ in range(pauses):
                await trio.lowlevel.checkpoint()
        await trio.sleep(0.1)
        world.assert_at_rest()
        metrics = await world.metrics()

    (line,) = world.access_log
    left = line["outcome"] == "client_closed"
    assert left or line["outcome"] == "ok"
    assert total(metrics, "citadel_gateway_requests_total", outcome=line["outcome"]) == 1
    assert total(metrics, "citadel_gateway_requests_total") == 1
    assert total(metrics, "citadel_gateway_cancellations_total") == left
    assert total(metrics, "citadel_gateway_attempts_total") == 1


async def test_a_stream_that_was_delivered_to_its_end_is_no_cancellation(
    autojump_clock: MockClock,
) -> None:
    """The client hangs up on [DONE], while the engine lingers behind it."""
    async with running_gateway(fleet({"m": {}})) as world:
        world.engines["m"].default = engines.lingers()
        async with world.client() as client:
            await client.send(request(stream=True))
            async for _ in client.read_events():
                pass
        await trio.sleep(0.1)
        metrics = await world.metrics()

    assert [line["outcome"] for line in world.access_log] == ["ok"]
    assert total(metrics, "citadel_gateway_cancellations_total") == 0
    assert total(metrics, "citadel_gateway_attempts_total", result="ok") == 1


async def test_what_leaves_makes_room_for_who_waits(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": {"max_concurrent": 1}})) as world:
        world.engines["m"].scripts.append(Script([hang()]))
        async with world.client() as first, world.client() as second:
            await first.send(request())
            await wait_all_tasks_blocked()
            await second.send(request())
            await trio.sleep(1)
            left_at = trio.current_time()
            await first.aclose()
            response = await second.read_response()
            assert trio.current_time() == left_at

    assert response.status == 200
    assert world.engines["m"].max_in_flight == 1


async def test_a_hundred_leavers_teach_the_breaker_nothing(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": {}})) as world:
        world.engines["m"].default = engines.stall_after(1)
        for _ in range(100):
            async with somebody_leaves(world, request(stream=True)) as client:
                await anext(client.read_events())
        world.engines["m"].default = engines.whole_chat("ok")
        response = await world.ask("m")

    assert response.status == 200
    assert world.engines["m"].abandoned == 100


# --- any other server ------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("script", [Script([hang()]), engines.stall_after(0)])
async def test_a_server_that_only_reports_hang_ups_is_understood_too(
    autojump_clock: MockClock, stream: bool, script: Script
) -> None:
    async with running_gateway(fleet({"m": {}})) as world:
        world.engines["m"].default = script
        async with calling(world.service.app, CHAT, chat("m", stream=stream)) as call:
            await trio.sleep(1)
            left_at = trio.current_time()
            await call.hang_up()
        await wait_all_tasks_blocked()
        world.assert_at_rest()
        await assert_one_leaver(world, "waiting", attempts=1)

    assert [post.client_left_at for post in world.posts] == [left_at]
    assert call.reply.error is None


async def test_any_other_server_hears_of_a_hang_up_within_a_stream(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(fleet({"m": {}})) as world:
        world.engines["m"].default = engines.stall_after(3)
        async with calling(world.service.app, CHAT, chat("m", stream=True)) as call:
            await trio.sleep(1)
            await call.hang_up()
        await wait_all_tasks_blocked()
        world.assert_at_rest()
        await assert_one_leaver(world, "streaming", attempts=1)

    assert not call.reply.complete
    assert world.engines["m"].abandoned == 1


@BOTH
async def test_any_other_server_reports_the_end_as_well_and_that_is_no_hang_up(
    autojump_clock: MockClock, stream: bool
) -> None:
    async with running_gateway(fleet({"m": {}})) as world:
        reply = await fetch(world.service.app, CHAT, chat("m", stream=stream))

    assert (reply.status, reply.complete, reply.error) == (200, True, None)
    assert [line["outcome"] for line in world.access_log] == ["ok"]


async def test_in_any_other_server_a_broken_stream_is_aborted_too(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(fleet({"m": {}})) as world:
        world.engines["m"].default = engines.cut_after(2)
        reply = await fetch(world.service.app, CHAT, chat("m", stream=True))

    assert reply.events()[-1]["error"]["code"] == "upstream_connection_error"
    assert not reply.complete
    assert isinstance(reply.error, ResponseAborted)


# --- at random -------------------------------------------------------------------------------


@attrs.define(eq=False)
class Crowd:
    """Clients that come and go as *rng* says."""

    world: World
    rng: random.Random
    left: int = 0
    stayed: int = 0

    async def one(self, patience: float | None, stream: bool, late: float) -> None:
        await trio.sleep(late)
        model = self.rng.choice(["m", "n", None])
        async with self.world.client() as client:
            with trio.move_on_after(patience or 1000):
                data = request(model, stream=stream)
                cut = self.rng.randrange(len(data))
                await client.send(data[:cut])
                await trio.sleep(self.rng.choice([0, 0.5]))
                await client.send(data[cut:])
                await client.read_response("POST")
                self.stayed += 1
                return
        self.left += 1

    def script(self, entry: LedgerEntry) -> Script:
        """Mostly slow and good, sometimes bad; times are coarse, so that much coincides."""
        pause = self.rng.choice([0, 0.5, 1, 2])
        stream = entry.json.get("stream")
        kind = self.rng.random()
        if kind < 0.1:
            return self.rng.choice([engines.status(500), engines.status(429), engines.garbage()])
        if kind < 0.2:
            return engines.cut_after(2) if stream else engines.half_body()
        good = (
            engines.stream_chat(["a", "b", "c"], gap=pause) if stream else engines.whole_chat("a")
        )
        return Script([engines.sleep(pause), *good.steps])


@pytest.mark.parametrize("seed", range(8))
async def test_whoever_leaves_whenever_takes_nothing_along(
    autojump_clock: MockClock, seed: int
) -> None:
    rng = random.Random(seed)
    models = {
        "m": {"endpoints": [{"url": endpoint("a")}, {"url": endpoint("b")}], "max_concurrent": 3,
              "fallbacks": ["n"]},
        "n": {"endpoint": endpoint("c"), "max_concurrent": 5},
    }  # fmt: skip
    config = fleet(models, performance={"max_concurrent_requests": 8})
    async with running_gateway(config, seed=seed) as world:
        crowd = Crowd(world, rng)
        for engine in world.engines.values():
            engine.default = crowd.script
        calls = [
            partial(
                crowd.one,
                rng.choice([None, 0, 0.5, 1, 1.5, 2, 5]),
                rng.random() < 0.5,
                rng.choice([0, 0, 1, 2, 3]),
            )
            for _ in range(200)
        ]
        await gather(*calls)
        await trio.sleep(0.1)
        world.assert_at_rest()
        metrics = await world.metrics()
        outcomes = [line["outcome"] for line in world.access_log]
        ended = total(metrics, "citadel_gateway_requests_total")
        closed = total(metrics, "citadel_gateway_requests_total", outcome="client_closed")

    assert crowd.left + crowd.stayed == 200
    assert ended == len(outcomes) <= 200
    assert closed == outcomes.count("client_closed") <= crowd.left
    assert closed == total(metrics, "citadel_gateway_cancellations_total")
    assert total(metrics, "citadel_gateway_attempts_total") == sum(
        line["attempts"] for line in world.access_log
    )
    assert [engine.in_flight for engine in world.engines.values()] == [0, 0, 0]
    assert all(engine.max_in_flight <= most for engine, most in zip(
        world.engines.values(), [3, 3, 5], strict=True))  # fmt: skip


# --- over sockets ----------------------------------------------------------------------------


@BOTH
async def test_clients_that_leave_by_the_dozen_are_held_against_nobody(stream: bool) -> None:
    """The engine is told before the request is cancelled; the request must not take it amiss."""
    script = engines.stall_after(1) if stream else Script([hang()])
    engine = ScriptedEngine(default=script)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            url = f"http://127.0.0.1:{await serve_tcp(engine, nursery)}"
            log = CapturedLog()
            config = {
                "service": {"host": "127.0.0.1", "port": 0},
                "monitoring": {"prometheus_port": None},
                "models": {"m": {"endpoint": url}},
            }
            service = UnifiedAPIGatewayService(parse(config), log=log)
            address = await nursery.start(partial(service.run, handle_signals=False))
            for _ in range(3):
                clients = [await RawClient.connect(address.port) for _ in range(12)]
                for client in clients:
                    await client.send(request(stream=stream))
                await engine.wait_until(lambda: engine.in_flight == 12)
                if stream:
                    for client in clients:
                        await client.read_head()
                for client in clients:
                    await client.aclose()
                await engine.wait_until(lambda: engine.in_flight == 0)
            (upstream,) = service.balancer.upstreams
            while service.admission.waitroom.taken:
                await trio.lowlevel.checkpoint()
            state = upstream.endpoint.breaker.state(trio.current_time())
            nursery.cancel_scope.cancel()

    lines = [line for line in log.lines if line["event"] == "request"]
    assert Counter(line["outcome"] for line in lines) == {"client_closed": 36}
    assert {line["phase"] for line in lines} == {"streaming" if stream else "waiting"}
    assert {line["attempts"] for line in lines} == {1}
    assert state is State.CLOSED
    assert len(engine.posts) == 36
