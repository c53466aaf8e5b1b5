"""How long things may take, through the whole gateway, in virtual time, and whose clock it was."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.support import scripted_engine as engines
from tests.support.gateway import (
    CHAT,
    PORT,
    World,
    chat,
    endpoint,
    fleet,
    gather,
    running_gateway,
    words,
)
from tests.support.raw_client import Headers, RawResponse, http_request
from tests.support.scripted_engine import Script

LONG = [{"role": "user", "content": "word " * 8000}]  # 40 000 bytes: 10 000 tokens by estimate
READS = 10.0  # thousands of them, give or take the rest of the body
BOUND = {"request_timeout_seconds": 30}
SAYS_NOTHING = engines.stall_after(0)


async def timed(world: World, headers: Headers = (), **fields: Any) -> tuple[RawResponse, float]:
    began = trio.current_time()
    response = await world.ask("m", headers, **{"stream": True, **fields})
    return response, trio.current_time() - began


def clocks(own: dict[str, Any], shared: dict[str, Any] | None = None, **model: Any) -> Any:
    return fleet({"m": {"timeouts": own, **model}}, performance={**BOUND, "timeouts": shared or {}})


# --- time to read a prompt -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "shared", "short", "long"),
    [
        ({"first_token": 4, "first_token_per_1k_tokens": 1}, {}, 4.0, 4.0 + READS),
        ({}, {"first_token": 4, "first_token_per_1k_tokens": 1}, 4.0, 4.0 + READS),
        ({"first_token": 4}, {"first_token_per_1k_tokens": 1}, 4.0, 4.0 + READS),
        (
            {"first_token_per_1k_tokens": 0.5},
            {"first_token": 4, "first_token_per_1k_tokens": 9},
            4.0, 4.0 + 0.5 * READS,
        ),
        ({"first_token_per_1k_tokens": 0}, {"first_token": 4, "first_token_per_1k_tokens": 9},
         4.0, 4.0),
        ({"first_token": 4}, {}, 4.0, 4.0),
        ({"first_token_per_1k_tokens": 2}, {}, 30.0, 30 + 2 * READS),
        ({"first_token": 20, "first_token_per_1k_tokens": 3}, {}, 20.0, 20 + 3 * READS),
    ],
    ids=[
        "model", "all", "both", "model wins", "model has none", "not configured",
        "no first_token: the request's", "beyond the request's",
    ],
)  # fmt: skip
async def test_the_first_token_may_take_longer_after_a_long_prompt(
    autojump_clock: MockClock,
    own: dict[str, Any], shared: dict[str, Any], short: float, long: float,
) -> None:  # fmt: skip
    async with running_gateway(clocks(own, shared)) as world:
        world.engines["m"].default = SAYS_NOTHING
        brief, after_brief = await timed(world)
        lengthy, after_lengthy = await timed(world, messages=LONG)

    for response in brief, lengthy:
        assert response.status == 504
        assert response.json()["error"]["code"] == "timeout_first_token"
    assert after_brief == pytest.approx(short, abs=0.2)
    assert after_lengthy == pytest.approx(long, abs=0.4)


async def test_a_long_prompt_s_stream_is_not_cut_by_the_request_timeout(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(clocks({"first_token_per_1k_tokens": 2})) as world:
        world.engines["m"].default = Script(
            [engines.sleep(45), *engines.stream_chat(["late"]).steps]
        )
        response, took = await timed(world, messages=LONG)

    assert (response.status, words(response)) == (200, "late")
    assert took == pytest.approx(45, abs=0.1)


async def test_a_whole_answer_s_time_does_not_grow_with_the_prompt(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(clocks({"first_token_per_1k_tokens": 2})) as world:
        world.engines["m"].default = Script([engines.hang()])
        response, took = await timed(world, messages=LONG, stream=False)

    assert response.json()["error"]["code"] == "timeout_total"
    assert took == 30


@pytest.mark.parametrize(("asked", "gets"), [(3, 3.0), (40, 40.0), (900, 30 + 2 * READS)])
async def test_a_client_s_own_time_is_kept_however_long_its_prompt(
    autojump_clock: MockClock, asked: int, gets: float
) -> None:
    async with running_gateway(clocks({"first_token_per_1k_tokens": 2})) as world:
        world.engines["m"].default = SAYS_NOTHING
        headers = [("x-citadel-timeout", str(asked))]
        _, took = await timed(world, headers, messages=LONG)
        failures = world.endpoint("m").breaker._failures

    assert took == pytest.approx(gets, abs=0.2)
    assert failures == (0 if gets == asked else 1)  # whose time it was, decides whose failure


async def test_a_request_s_time_is_that_of_the_slowest_reader_it_may_go_to(
    autojump_clock: MockClock,
) -> None:
    """And each model's own clock is what it was told."""
    models = {
        "m": {
            "timeouts": {"first_token": 10, "first_token_per_1k_tokens": 1},
            "fallbacks": ["slow"],
        },
        "slow": {
            "endpoint": endpoint("slow"),
            "timeouts": {"first_token": 10, "first_token_per_1k_tokens": 3},
        },
    }
    async with running_gateway(fleet(models, performance=BOUND)) as world:
        for engine in world.engines.values():
            engine.default = SAYS_NOTHING
        response, took = await timed(world, messages=LONG)

    assert response.status == 504
    assert took == pytest.approx((10 + READS) + (10 + 3 * READS), abs=0.5)


# --- what ran out is counted -----------------------------------------------------------------

ALL = {"connect": 2, "headers": 3, "first_token": 4, "idle": 5, "total": 6}


IDLE = 4.0  # seconds after which no connection of the probes is left in the pool


async def counted(world: World) -> dict[tuple[str, str], float]:
    """By clock and model."""
    return {
        (dict(labels)["clock"], dict(labels)["model"]): value
        for (name, labels), value in (await world.metrics()).items()
        if name == "citadel_gateway_timeouts_total"
    }


@pytest.mark.parametrize(
    ("clock", "script", "stream"),
    [
        ("connect", None, True),
        ("headers", Script([engines.hang()]), True),
        ("first_token", SAYS_NOTHING, True),
        ("idle", engines.stall_after(3), True),
        ("total", engines.stream_chat(["x"] * 10, gap=1.0), True),
        ("total", SAYS_NOTHING, False),
    ],
)
async def test_each_clock_of_an_upstream_is_counted_when_it_runs_out(
    autojump_clock: MockClock, clock: str, script: Script | None, stream: bool
) -> None:
    async with running_gateway(clocks(ALL)) as world:
        if isinstance(script, Script):
            world.engines["m"].default = script
        else:
            world.net.blackhole("m", PORT)
            await trio.sleep(IDLE)
        await timed(world, stream=stream)

        assert await counted(world) == {(clock, "m"): 1}


async def test_every_attempt_s_clock_is_counted_although_another_one_answers(
    autojump_clock: MockClock,
) -> None:
    config = fleet({"m": ["bad", "good"]}, performance={"timeouts": {"headers": 3}})
    async with running_gateway(config) as world:
        world.engines["bad"].default = Script([engines.hang()])
        response, _ = await timed(world)

        assert response.status == 200
        assert await counted(world) == {("headers", "m"): 1}


async def test_nothing_is_counted_while_all_is_in_time(autojump_clock: MockClock) -> None:
    async with running_gateway(clocks(ALL)) as world:
        await timed(world)

        assert await counted(world) == {}


async def test_an_engine_s_own_word_for_a_timeout_is_no_clock_of_ours(
    autojump_clock: MockClock,
) -> None:
    body = b'{"error": {"message": "late", "code": "timeout_idle"}}'
    async with running_gateway(clocks(ALL)) as world:
        world.engines["m"].default = engines.status(504, body)
        await world.ask("m")

        assert await counted(world) == {}


async def test_a_wait_for_a_slot_that_was_too_long_is_counted(autojump_clock: MockClock) -> None:
    config = fleet({"m": {"max_concurrent": 1}}, load_balancer={"queue_timeout": 2})
    async with running_gateway(config) as world:
        world.engines["m"].default = Script([engines.sleep(5), *engines.whole_chat("ok").steps])
        await gather(*[partial(world.ask, "m")] * 2)

        assert await counted(world) == {("queue", "m"): 1}


async def test_a_client_s_clocks_are_counted(autojump_clock: MockClock) -> None:
    """Nobody knows by then which model it wants."""
    async with running_gateway(clocks({})) as world:
        async with world.client() as client:
            await client.send(b"POST / HT")
            assert (await client.read_response()).status == 408
        async with world.client() as client:
            await client.send(http_request("POST", CHAT, None, [("content-length", "9")]))
            assert (await client.read_response()).status == 408
        assert await counted(world) == {("client_header", "none"): 1, ("client_body", "none"): 1}


async def test_a_kept_connection_that_is_not_used_again_is_nothing_to_count(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(clocks({})) as world, world.client() as client:
        await client.request("POST", CHAT, chat("m"))
        await trio.sleep(100)

        assert await counted(world) == {}
