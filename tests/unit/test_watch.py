"""Endpoints come and go as a name's addresses do, and no request notices."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from citadel_gateway.wire.openai_request import Kind, parse_request
from tests.support import scripted_engine as engines
from tests.support.gateway import World, endpoint, fleet, gather, running_gateway
from tests.support.raw_client import RawResponse
from tests.support.scripted_engine import Script

ASK = b'{"model": "m", "messages": [{"role": "user", "content": "hi"}]}'
A, B, C = "10.0.0.1", "10.0.0.2", "10.0.0.3"


def each(**options: Any) -> Any:
    """One model, whose engines are the addresses of one name."""
    entry = {"url": endpoint("vllm"), "resolve": "each"}
    return fleet({"m": {"endpoints": [entry], **options}})


def backend(response: RawResponse) -> str:
    """The address of the engine that has answered."""
    return (response.header("x-citadel-backend") or "").partition("[")[2].rstrip("]")


async def backends(world: World, count: int) -> Counter[str]:
    return Counter([backend(await world.ask("m")) for _ in range(count)])


def labels(metrics: Any) -> set[str]:
    """The endpoints that have levels."""
    return {
        dict(pairs)["endpoint"]
        for name, pairs in metrics
        if name == "citadel_gateway_endpoint_healthy"
    }


async def test_each_address_is_an_endpoint_of_its_own(autojump_clock: MockClock) -> None:
    async with running_gateway(each(), addresses={"vllm": [A, B]}, hosts=[A, B]) as world:
        answers = await backends(world, 10)
        seen = labels(await world.metrics())
        host = world.engines[A].posts[0].headers["host"]
        first = (await world.ask("m")).header("x-citadel-backend")

    assert answers == {A: 5, B: 5}
    assert seen == {f"http://vllm:8000 [{A}]", f"http://vllm:8000 [{B}]"}
    assert host == "vllm:8000"
    assert first == f"http://vllm:8000 [{A}]"


async def test_each_address_has_its_own_health_breaker_and_limit(
    autojump_clock: MockClock,
) -> None:
    config = each(max_concurrent=1)
    async with running_gateway(config, addresses={"vllm": [A, B, C]}, hosts=[A, B]) as world:
        for engine in world.engines.values():
            engine.default = Script([engines.sleep(1), *engines.whole_chat("ok").steps])
        began = trio.current_time()
        answers = await gather(*[partial(world.ask, "m")] * 4)
        took = trio.current_time() - began
        report = (await world.get("/models/status")).json()

    assert Counter(map(backend, answers)) == {A: 2, B: 2}
    assert took == pytest.approx(2)
    states = {e["url"]: e["healthy"] for e in report["models"]["m"]["endpoints"]}
    assert states == {f"http://vllm:8000 [{a}]": a != C for a in (A, B, C)}


async def test_a_new_address_is_used_after_a_good_probe_and_a_lost_one_no_longer(
    autojump_clock: MockClock,
) -> None:
    names = {"vllm": [A]}
    async with running_gateway(each(), addresses=names, hosts=[A, B, C]) as world:
        world.engines[C].routes["GET", "/health"] = engines.status(503)
        before = await backends(world, 4)
        names["vllm"] = [B, C]
        await trio.sleep(12)
        after = await backends(world, 4)
        seen = labels(await world.metrics())
        asked = [entry.path for entry in world.engines[B].ledger]

    assert (before, after) == ({A: 4}, {B: 4})
    assert asked[0] == "/health"
    assert seen == {f"http://vllm:8000 [{B}]", f"http://vllm:8000 [{C}]"}
    known = [(line["endpoint"][-9:-1], line["known"][:3]) for line in world.log.lines
             if line["event"] == "endpoint"]  # fmt: skip
    assert known == [(A, "no "), (B, "fro"), (C, "fro")]


async def test_requests_with_a_lost_address_finish_and_then_it_is_forgotten(
    autojump_clock: MockClock,
) -> None:
    names = {"vllm": [A]}
    async with running_gateway(each(), addresses=names, hosts=[A, B]) as world:
        world.engines[A].default = Script([engines.sleep(20), *engines.whole_chat("ok").steps])
        during: set[str] = set()

        async def move() -> None:
            await trio.sleep(1)
            names["vllm"] = [B]
            await trio.sleep(14)
            during.update(labels(await world.metrics()))

        answer, _ = await gather(partial(world.ask, "m"), move)
        after = labels(await world.metrics())
        (group,) = world.service.balancer.plan(parse_request(Kind.CHAT, ASK)).groups
        upstreams = [*group.upstreams.values()]

    assert (answer.status, backend(answer)) == (200, A)
    assert during == {f"http://vllm:8000 [{A}]", f"http://vllm:8000 [{B}]"}
    assert after == {f"http://vllm:8000 [{B}]"}
    assert [u.target.origin.address for u in upstreams] == [B]


async def test_an_address_that_returns_while_its_requests_run_keeps_their_count(
    autojump_clock: MockClock,
) -> None:
    names = {"vllm": [A, B]}
    config = each(max_concurrent=1)
    async with running_gateway(config, addresses=names, hosts=[A, B]) as world:
        world.engines[A].default = Script([engines.sleep(28), *engines.whole_chat("ok").steps])

        async def move() -> list[str]:
            await trio.sleep(1)
            names["vllm"] = [B]
            await trio.sleep(11)
            names["vllm"] = [A, B]
            await trio.sleep(12)
            return [*await backends(world, 3)]

        slow, others = await gather(partial(world.ask, "m"), move)
        after = await backends(world, 2)

    assert (backend(slow), others) == (A, [B])
    assert after == {A: 1, B: 1}


async def test_a_name_server_that_fails_takes_nothing_away(autojump_clock: MockClock) -> None:
    names = {"vllm": [A]}
    async with running_gateway(each(), addresses=names, hosts=[A]) as world:
        names.clear()
        await trio.sleep(60)
        answers = await backends(world, 2)

    assert answers == {A: 2}
    troubles = [line for line in world.log.lines if "cannot be looked up" in line["event"]]
    assert [line["host"] for line in troubles] == ["vllm"]


async def test_a_name_that_appears_after_the_start_is_served_from_then_on(
    autojump_clock: MockClock,
) -> None:
    names: dict[str, list[str]] = {}
    async with running_gateway(each(), addresses=names, hosts=[A]) as world:
        early = await world.ask("m")
        names["vllm"] = [A]
        await trio.sleep(12)
        late = await backends(world, 2)

    assert (early.status, early.json()["error"]["code"]) == (503, "no_healthy_backend")
    assert late == {A: 2}


async def test_requests_for_any_model_follow_the_addresses_too(autojump_clock: MockClock) -> None:
    names = {"vllm": [A]}
    async with running_gateway(each(), addresses=names, hosts=[A, B]) as world:
        before = backend(await world.ask())
        names["vllm"] = [B]
        await trio.sleep(12)
        after = backend(await world.ask())

    assert (before, after) == (A, B)
