"""The gateway near the end of its memory, its descriptors, or the room for large bodies."""

from __future__ import annotations

from functools import partial
from itertools import count
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from citadel_gateway.config.loader import parse
from citadel_gateway.io.buffers import STEP, UNCOUNTED, Buffers
from citadel_gateway.io.record import RequestRecord
from tests.support import scripted_engine as engines
from tests.support.gateway import CHAT, World, chat, fleet, gather, running_gateway
from tests.support.ledger import total
from tests.support.raw_client import RawResponse, http_request
from tests.support.scripted_engine import Script
from tests.support.step_cancel import cancel_at

GIB = 2**30
MIB = 2**20
LIMIT = 1.0  # GiB
LOOKS = 0.6  # seconds until the gateway has looked again
FLEET = fleet({"m": ["a"]}, performance={"memory_limit_gb": LIMIT})


def tight(limit: int, **models: Any) -> Any:
    """A gateway that may buffer *limit* bytes."""
    performance = {"max_buffered_bytes": limit, "max_body_bytes": limit}
    return fleet(models or {"m": ["a"]}, performance=performance)


def told(answer: RawResponse) -> tuple[int, str]:
    return answer.status, answer.json()["error"]["code"]


async def use(world: World, *, memory: float = 0.0, descriptors: float = 0.0) -> None:
    """Let so much be used, as shares of the limits, and the gateway see it."""
    world.meter.memory = int(memory * LIMIT * GIB)
    world.meter.descriptors = descriptors
    await trio.sleep(LOOKS)


def large(size: int) -> dict[str, Any]:
    return chat("m", padding="x" * size)


def large_answer(size: int, *, chunked: bool = False) -> Script:
    """A whole answer of so many bytes of text, of a length that is announced or not."""
    script = engines.whole_chat("x" * size)
    if not chunked:
        return script
    head, _, body = whole(script).partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"content-length")]
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    return Script([engines.send(b"\r\n".join([*lines, b"transfer-encoding: chunked\r\n", chunks]))])


def whole(script: Script) -> bytes:
    return b"".join(step.data for step in script.steps if isinstance(step, engines.Send))


@pytest.mark.parametrize("resource", ["memory", "descriptors"])
async def test_above_the_second_mark_new_requests_are_refused_until_all_is_well(
    resource: str, autojump_clock: MockClock
) -> None:
    async with running_gateway(FLEET) as world:
        statuses = []
        for share in (0.5, 0.85, 0.91, 0.88, 0.86, 0.5):
            await use(world, **{resource: share})
            answer = await world.ask("m")
            statuses.append(answer.status)
            if answer.status == 503:
                assert told(answer) == (503, "overloaded")
                assert 1 <= int(answer.header("retry-after") or 0) <= 5
                assert 1000 <= int(answer.header("retry-after-ms") or 0) <= 5000

    assert statuses == [200, 200, 503, 503, 200, 200]
    assert len(world.posts) == 4


async def test_what_is_running_goes_on(autojump_clock: MockClock) -> None:
    async with running_gateway(FLEET) as world:
        slow = [engines.sleep(5), *engines.stream_chat(["one", "two"]).steps]
        world.engines["a"].default = Script(slow)

        async def run_out() -> RawResponse:
            await trio.sleep(1)
            await use(world, memory=0.99)
            return await world.ask("m")

        stream, refused = await gather(partial(world.ask, "m", stream=True), run_out)
        await use(world)

    assert (stream.status, stream.complete) == (200, True)
    assert told(refused) == (503, "overloaded")


async def test_a_refusal_costs_neither_the_body_nor_a_place(autojump_clock: MockClock) -> None:
    async with running_gateway(FLEET) as world:
        await use(world, memory=0.91)
        async with world.client() as client:
            head = http_request("POST", CHAT, None, [("content-length", "1000000")])
            await client.send(head)
            answer = await client.read_response("POST")
        await use(world)

    assert told(answer) == (503, "overloaded")
    assert world.posts == []
    assert world.access_log[-1]["outcome"] == "overloaded"
    assert world.access_log[-1]["bytes_in"] == 0


async def test_who_may_not_ask_is_told_that_first(autojump_clock: MockClock) -> None:
    keys = [{"id": "k", "sha256": "0" * 64}]
    config = {**FLEET, "security": {"api_keys": keys}}
    async with running_gateway(config) as world:
        await use(world, memory=0.91)
        answer = await world.ask("m")
        await use(world)

    assert told(answer) == (401, "invalid_api_key")


async def test_readiness_is_red_and_health_and_metrics_answer(autojump_clock: MockClock) -> None:
    async with running_gateway(FLEET) as world:
        paths = ("/readyz", "/livez", "/health", "/metrics", "/models/status")
        before = [(await world.get(path)).status for path in paths]
        await use(world, descriptors=0.97)
        during = [(await world.get(path)).status for path in paths]
        await use(world)
        after = [(await world.get(path)).status for path in paths]

    assert before == after == [200] * 5
    assert during == [503, 200, 200, 200, 200]


async def test_levels_and_refusals_are_on_the_metrics_page_and_in_the_log(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(FLEET) as world:
        await use(world, memory=0.92, descriptors=0.81)
        await world.ask("m")
        await use(world, memory=0.5, descriptors=0.81)
        metrics = await world.metrics()
        await use(world)

    name = "citadel_gateway_overload"
    assert total(metrics, f"{name}_refusals_total", resource="memory") == 1
    assert total(metrics, f"{name}_level", resource="memory") == 0
    assert total(metrics, f"{name}_level", resource="descriptors") == 1
    assert total(metrics, f"{name}_used", resource="memory") == GIB // 2
    assert total(metrics, f"{name}_limit", resource="memory") == GIB
    lines = [line for line in world.log.lines if line["event"] == "overload"]
    assert [(line["resource"], line["state"]) for line in lines] == [
        ("memory", "refusing"),
        ("descriptors", "closing"),
        ("memory", "calm"),
        ("descriptors", "calm"),
    ]


async def test_memory_that_can_be_given_back_is_no_reason_to_refuse(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(FLEET) as world:
        world.meter.garbage = GIB // 2
        await use(world, memory=0.95)
        answer = await world.ask("m")

    assert answer.status == 200
    assert [line for line in world.log.lines if line["event"] == "overload"] == []


async def test_another_limit_counts_from_its_reload_on(autojump_clock: MockClock) -> None:
    async with running_gateway(FLEET) as world:
        await use(world, memory=0.6)
        smaller = fleet({"m": ["a"]}, performance={"memory_limit_gb": 0.6})
        await world.service.adopt(parse(smaller, source="test"))
        await trio.sleep(LOOKS)
        answer = await world.ask("m")
        await use(world)

    assert told(answer) == (503, "overloaded")
    assert world.service.overload.buffers.limit == 0.6 * GIB / 8


# The room for large bodies.


async def test_a_body_that_does_not_fit_is_refused_before_it_is_read(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(tight(MIB)) as world:
        world.engines["a"].default = Script([engines.sleep(5), *engines.whole_chat("ok").steps])

        async def announce() -> RawResponse:
            await trio.sleep(1)
            async with world.client() as client:
                await client.send(http_request("POST", CHAT, None, [("content-length", "600000")]))
                return await client.read_response("POST")

        first, second = await gather(partial(world.send, "POST", CHAT, large(600_000)), announce)
        again = await world.send("POST", CHAT, large(600_000))
        metrics = await world.metrics()

    assert (first.status, again.status) == (200, 200)
    assert told(second) == (503, "overloaded")
    assert total(metrics, "citadel_gateway_overload_refusals_total", resource="buffers") == 1


async def test_small_requests_need_no_room(autojump_clock: MockClock) -> None:
    async with running_gateway(tight(MIB)) as world:
        world.engines["a"].default = Script([engines.sleep(5), *engines.whole_chat("ok").steps])

        async def small() -> RawResponse:
            await trio.sleep(1)
            async with world.client() as client:  # head and body in two pieces
                head, end, body = http_request("POST", CHAT, chat("m")).partition(b"\r\n\r\n")
                await client.send(head + end)
                await trio.sleep(1)
                await client.send(body)
                return await client.read_response("POST")

        size = MIB - 2 * UNCOUNTED
        answers = await gather(partial(world.send, "POST", CHAT, large(size)), small)

    assert [answer.status for answer in answers] == [200, 200]


async def test_a_body_of_unknown_length_is_counted_as_it_comes(autojump_clock: MockClock) -> None:
    async with running_gateway(tight(8 * MIB)) as world:
        piece = b"10000\r\n" + b" " * 65536 + b"\r\n"
        sent, counted = 0, []
        async with world.client() as client:
            head = http_request("POST", CHAT, None, [("transfer-encoding", "chunked")])
            await client.send(head)
            for pieces in (1, 1, 20, 20):
                await client.send(piece * pieces)
                await trio.sleep(1)
                sent += pieces * 65536
                counted.append((sent, world.service.overload.buffers.used))
            await client.reset()

    assert counted[0] == (UNCOUNTED, 0)
    for sent, held in counted[1:]:
        assert sent - UNCOUNTED <= held <= sent + STEP


async def test_chunks_that_do_not_fit_are_refused(autojump_clock: MockClock) -> None:
    async with running_gateway(tight(MIB)) as world:
        world.engines["a"].default = Script([engines.sleep(5), *engines.whole_chat("ok").steps])

        async def chunks() -> RawResponse:
            await trio.sleep(1)
            async with world.client() as client:
                head = http_request("POST", CHAT, None, [("transfer-encoding", "chunked")])
                await client.send(head + (b"10000\r\n" + b" " * 65536 + b"\r\n") * 3)
                return await client.read_response("POST")

        _, refused = await gather(partial(world.send, "POST", CHAT, large(600_000)), chunks)

    assert told(refused) == (503, "overloaded")


@pytest.mark.parametrize("chunked", [False, True])
async def test_answers_wait_for_room_and_nobody_loses_one(
    chunked: bool, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go, most = Buffers.let_go, 0

    def spy(self: Buffers, *args: Any) -> None:
        nonlocal most
        most = max(most, self.used)
        let_go(self, *args)

    monkeypatch.setattr(Buffers, "let_go", spy)
    async with running_gateway(tight(3 * MIB)) as world:
        world.engines["a"].default = large_answer(2 * MIB, chunked=chunked)
        answers = await gather(*[partial(world.ask, "m")] * 8)

    assert [answer.status for answer in answers] == [200] * 8
    assert 2 * MIB < most <= (3 + 2) * MIB + STEP  # with one that overdraws


async def test_an_answer_for_which_no_room_comes_free_is_an_overload(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(tight(MIB)) as world:
        world.engines["a"].default = large_answer(2 * MIB)
        buffers, other = world.service.overload.buffers, RequestRecord("other", "", "", 0.0)
        await buffers.wait_to_hold(other, 2 * MIB)
        answer = await world.ask("m")
        buffers.let_go(other)
        after = await world.ask("m")

    assert told(answer) == (503, "overloaded")
    assert after.status == 200


async def test_the_answer_of_an_attempt_that_failed_holds_nothing(
    autojump_clock: MockClock,
) -> None:
    config = tight(3 * MIB, m=["a", "b"])
    async with running_gateway(config) as world:
        for engine in world.engines.values():
            engine.default = large_answer(2 * MIB)
        cut = Script([engines.send(whole(large_answer(2 * MIB))[:MIB]), engines.close()])
        world.engines["a"].scripts.append(cut)
        answers = [await world.ask("m") for _ in range(2)]

    assert [answer.status for answer in answers] == [200, 200]
    assert [answer.header("x-citadel-attempts") for answer in answers].count("2") == 1


@pytest.mark.parametrize("what", ["body", "answer"])
async def test_room_is_given_back_whenever_the_client_leaves(
    what: str, autojump_clock: MockClock
) -> None:
    """At every step of a request; that nothing is held at the end is checked for each gateway."""
    config = tight(4 * MIB)
    async with running_gateway(config) as world:
        world.engines["a"].default = large_answer(MIB if what == "answer" else 10)
        body = large(300_000 if what == "body" else 10)
        held = []

        async def ask() -> None:
            answer = await world.send("POST", CHAT, body)
            assert answer.status == 200

        for step in count(1):
            if not await cancel_at(step, ask):
                break
            held.append(world.service.overload.buffers.used > 0)
            await trio.sleep(0.2)
            assert world.service.overload.buffers.used == 0

    assert any(held)
