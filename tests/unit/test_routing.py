"""Who gets a request, who waits, and who is turned away: through the whole gateway, in memory."""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support import scripted_engine as engines
from tests.support.gateway import (
    CHAT,
    World,
    chat,
    endpoint,
    events,
    fleet,
    gather,
    running_gateway,
)
from tests.support.raw_client import RawResponse, http_request
from tests.support.scripted_engine import Script

ALGORITHMS = [
    "round_robin",
    "weighted_round_robin",
    "random",
    "least_connections",
    "power_of_two",
    "least_latency",
    "consistent_hash",
    "session_affinity",
    "cost",
]


def taking(seconds: float) -> Script:
    """A good answer after a while."""
    return Script([engines.sleep(seconds), *engines.whole_chat("ok").steps])


def weighted(**weights: float) -> dict[str, Any]:
    """One model, with an endpoint of each weight."""
    return {"m": {"endpoints": [{"url": endpoint(h), "weight": w} for h, w in weights.items()]}}


def algorithm(name: str, **options: Any) -> dict[str, Any]:
    return {"load_balancer": {"algorithm": name, **options}}


def host(response: RawResponse) -> str:
    """Which engine has answered."""
    return (response.header("x-citadel-backend") or "").removeprefix("http://").split(":")[0]


async def hosts(world: World, count: int, model: str | None = "m") -> list[str]:
    """Who answers *count* requests, asked one after the other."""
    return [host(await world.ask(model)) for _ in range(count)]


def refused(response: RawResponse) -> tuple[int, str]:
    return response.status, response.json()["error"]["code"]


# --- algorithms ------------------------------------------------------------------------------


async def test_round_robin_takes_turns_whatever_the_weights(autojump_clock: MockClock) -> None:
    config = fleet(weighted(a=5, b=1, c=1), **algorithm("round_robin"))
    async with running_gateway(config) as world:
        assert await hosts(world, 9) == ["a", "b", "c"] * 3


async def test_weighted_round_robin_is_exact_over_every_period(autojump_clock: MockClock) -> None:
    config = fleet(weighted(a=5, b=1, c=1), **algorithm("weighted_round_robin"))
    async with running_gateway(config) as world:
        picked = await hosts(world, 7 * 10)

    for first in range(0, 70, 7):
        assert Counter(picked[first : first + 7]) == {"a": 5, "b": 1, "c": 1}
    assert picked[:7] == ["a", "a", "b", "a", "c", "a", "a"]


async def test_weights_need_not_be_whole_to_be_exact(autojump_clock: MockClock) -> None:
    """The seed's weights: 1.0, 0.8, 0.6 and 0.4 come round in 14 turns."""
    config = fleet(weighted(a=1.0, b=0.8, c=0.6, d=0.4), **algorithm("weighted_round_robin"))
    async with running_gateway(config) as world:
        picked = await hosts(world, 14 * 5)

    for first in range(0, 70, 14):
        assert Counter(picked[first : first + 14]) == {"a": 5, "b": 4, "c": 3, "d": 2}


async def test_random_follows_the_weights(autojump_clock: MockClock) -> None:
    config = fleet(weighted(a=3, b=1), **algorithm("random"))
    async with running_gateway(config) as world:
        picked = Counter(await hosts(world, 400))

    assert 270 <= picked["a"] <= 330


async def test_least_connections_fills_by_weight(autojump_clock: MockClock) -> None:
    config = fleet(weighted(a=2, b=1), **algorithm("least_connections"))
    async with running_gateway(config) as world:
        for engine in world.engines.values():
            engine.default = taking(1)
        await gather(*[partial(world.ask, "m")] * 30)

    assert world.engines["a"].max_in_flight == 20
    assert world.engines["b"].max_in_flight == 10


async def test_least_connections_avoids_the_slow(autojump_clock: MockClock) -> None:
    config = fleet({"m": ["slow", "fast"]}, **algorithm("least_connections"))
    async with running_gateway(config) as world:
        world.engines["slow"].default = taking(10)
        world.engines["fast"].default = taking(1)

        async def ask(place: int) -> None:
            await trio.sleep(place)
            await world.ask("m")

        await gather(*[partial(ask, n) for n in range(60)])

    assert len(world.engines["slow"].posts) < 0.25 * 60


async def test_power_of_two_never_takes_the_busier_of_two(autojump_clock: MockClock) -> None:
    config = fleet({"m": ["a", "b"]}, **algorithm("power_of_two"))
    async with running_gateway(config) as world:
        for engine in world.engines.values():
            engine.default = taking(1)
        await gather(*[partial(world.ask, "m")] * 40)

    assert [engine.max_in_flight for engine in world.engines.values()] == [20, 20]


async def test_least_latency_prefers_the_fast(autojump_clock: MockClock) -> None:
    config = fleet({"m": ["slow", "fast"]}, **algorithm("least_latency"))
    async with running_gateway(config) as world:
        world.engines["slow"].default = taking(3)
        world.engines["fast"].default = taking(0.5)
        picked = Counter(await hosts(world, 20))

    assert picked["fast"] >= 17
    assert picked["slow"] >= 1  # once, to know


async def test_cost_takes_the_cheapest_that_has_room(autojump_clock: MockClock) -> None:
    models = {
        "dear": {"cost_per_request": 0.1},
        "cheap": {"cost_per_request": 0.01, "max_concurrent": 3},
    }
    async with running_gateway(fleet(models, **algorithm("cost"))) as world:
        for engine in world.engines.values():
            engine.default = taking(1)
        answers = await gather(*[partial(world.ask)] * 5)

    assert Counter(map(host, answers)) == {"cheap": 3, "dear": 2}


async def test_cheap_models_get_the_larger_share_of_requests_for_any(
    autojump_clock: MockClock,
) -> None:
    """The seed's prices, 10 : 5 : 2 : 1, give shares as one over their square roots."""
    prices = {"mixtral": 0.1, "hermes": 0.05, "openchat": 0.02, "phi": 0.01}
    models = {name: {"cost_per_request": price} for name, price in prices.items()}
    async with running_gateway(fleet(models)) as world:
        picked = Counter(await hosts(world, 500, None))
        explicit = Counter(await hosts(world, 10, "mixtral"))

    shares = {name: (0.01 / price) ** 0.5 for name, price in prices.items()}
    for name, share in shares.items():
        assert abs(picked[name] - 500 * share / sum(shares.values())) <= 1
    assert explicit == {"mixtral": 10}


async def test_without_cost_optimisation_prices_do_not_matter(autojump_clock: MockClock) -> None:
    models = {"dear": {"cost_per_request": 0.1}, "cheap": {"cost_per_request": 0.01}}
    config = fleet(models, gateway={"cost_optimization_enabled": False})
    async with running_gateway(config) as world:
        assert Counter(await hosts(world, 20, None)) == {"dear": 10, "cheap": 10}


# --- room ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
async def test_no_endpoint_and_no_gateway_has_more_than_it_may(
    autojump_clock: MockClock, name: str
) -> None:
    models = {
        "m": {"endpoints": [{"url": endpoint("a"), "max_concurrent": 7}, {"url": endpoint("b")}],
              "max_concurrent": 11},
        "n": {"endpoint": endpoint("c"), "max_concurrent": 4},
    }  # fmt: skip
    config = fleet(
        models,
        **algorithm(name, queue_size=200, queue_timeout=100),
        performance={"max_concurrent_requests": 16, "request_timeout_seconds": 100},
    )
    most = 0

    def busy(entry: engines.LedgerEntry) -> Script:
        nonlocal most
        most = max(most, sum(engine.in_flight for engine in world.engines.values()))
        return taking(1)

    async with running_gateway(config) as world:
        for engine in world.engines.values():
            engine.default = busy
        answers = await gather(
            *[partial(world.ask, ("m", "n", None)[n % 3], stream=False) for n in range(200)]
        )

    assert {answer.status for answer in answers} == {200}
    assert world.engines["a"].max_in_flight <= 7
    assert world.engines["b"].max_in_flight <= 11
    assert world.engines["c"].max_in_flight <= 4
    assert most == 16


async def test_who_waits_is_served_in_order_of_arrival(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": {"max_concurrent": 1}})) as world:
        world.engines["m"].default = taking(1)

        async def ask(number: int) -> RawResponse:
            await trio.sleep(number / 100)
            return await world.ask("m", [("x-request-id", f"r{number}")])

        answers = await gather(*[partial(ask, n) for n in range(9)])

    assert {answer.status for answer in answers} == {200}
    assert [post.request_id for post in world.posts] == [f"r{n}" for n in range(9)]
    gaps = [later.received_at - post.received_at for post, later in
            zip(world.posts, world.posts[1:], strict=False)]  # fmt: skip
    assert gaps == pytest.approx([1.0] * 8)


@pytest.mark.parametrize("size", [0, 3])
async def test_a_full_queue_turns_away_at_once_and_says_when_to_come_again(
    autojump_clock: MockClock, size: int
) -> None:
    config = fleet({"m": {"max_concurrent": 1}}, load_balancer={"queue_size": size})
    async with running_gateway(config) as world:
        world.engines["m"].default = taking(1)

        async def ask() -> tuple[RawResponse, float]:
            response = await world.ask("m")
            return response, trio.current_time() - began

        began = trio.current_time()
        answers = await gather(*[ask] * 10)

    turned_away = [(r, at) for r, at in answers if r.status != 200]
    assert len(turned_away) == 10 - 1 - size
    for response, at in turned_away:
        assert refused(response) == (503, "queue_full")
        assert response.json()["error"]["type"] == "server_overloaded"
        assert response.header("x-citadel-backend") is None
        assert at == 0
        assert int(response.header("retry-after") or 0) >= 1
        assert int(response.header("retry-after-ms") or 0) >= 1
    assert len(world.posts) == 1 + size


async def test_a_wait_that_takes_too_long_ends_with_503(autojump_clock: MockClock) -> None:
    config = fleet({"m": {"max_concurrent": 1}}, load_balancer={"queue_timeout": 4})
    async with running_gateway(config) as world:
        world.engines["m"].default = taking(5)
        began = trio.current_time()
        answers = await gather(*[partial(world.ask, "m")] * 2)

    late = next(answer for answer in answers if answer.status != 200)
    assert refused(late) == (503, "queue_timeout")
    assert late.header("retry-after")
    assert world.access_log[0]["queue_ms"] == 4000
    assert trio.current_time() - began == pytest.approx(5, abs=0.2)
    assert len(world.posts) == 1


async def test_nobody_waits_longer_than_it_has_time(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": {"max_concurrent": 1}})) as world:
        world.engines["m"].default = taking(5)
        async with world.client() as other:
            await other.send(http_request("POST", CHAT, chat("m")))
            await wait_all_tasks_blocked()
            began = trio.current_time()
            response = await world.ask("m", [("x-citadel-timeout", "0.5")])
            took = trio.current_time() - began
            await other.read_response()

    assert refused(response) == (503, "queue_timeout")
    assert took == 0.5


async def test_a_full_model_does_not_block_a_free_one(autojump_clock: MockClock) -> None:
    config = fleet({"full": {"max_concurrent": 1}, "free": {}})
    async with running_gateway(config) as world:
        world.engines["full"].default = taking(5)

        async def ask_free() -> float:
            await trio.sleep(1)
            await world.ask("free")
            await world.ask()
            return trio.current_time() - began

        began = trio.current_time()
        *_, at = await gather(*[partial(world.ask, "full")] * 2, ask_free)

    assert at == 1
    assert len(world.engines["free"].posts) == 2


async def test_the_global_cap_is_shared_in_order_of_arrival(autojump_clock: MockClock) -> None:
    config = fleet({"m": {}, "n": {}}, performance={"max_concurrent_requests": 1})
    async with running_gateway(config) as world:
        for engine in world.engines.values():
            engine.default = taking(1)

        async def ask(number: int) -> None:
            await trio.sleep(number / 100)
            await world.ask("mn"[number % 2], [("x-request-id", f"r{number}")])

        await gather(*[partial(ask, n) for n in range(8)])

    served = sorted(world.posts, key=lambda post: post.received_at)
    assert [post.request_id for post in served] == [f"r{n}" for n in range(8)]


# --- who can ---------------------------------------------------------------------------------


async def test_a_long_prompt_goes_to_a_model_that_can_hold_it(autojump_clock: MockClock) -> None:
    models = {"small": {"context_window": 100}, "large": {"context_window": 10_000}}
    long = [{"role": "user", "content": "word " * 400}]
    async with running_gateway(fleet(models)) as world:
        short = Counter(await hosts(world, 4, None))
        answers = [await world.ask(messages=long) for _ in range(4)]
        roomy = [await world.ask(max_tokens=2000) for _ in range(4)]

    assert short == {"small": 2, "large": 2}
    assert Counter(map(host, [*answers, *roomy])) == {"large": 8}


async def test_a_prompt_too_long_for_every_model_is_refused(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": {"context_window": 100}})) as world:
        response = await world.ask(max_tokens=1000)

    error = response.json()["error"]
    assert (response.status, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == "messages"
    assert world.posts == []


async def test_what_a_model_cannot_do_it_is_not_asked(autojump_clock: MockClock) -> None:
    models = {"talks": {"capabilities": ["chat"]}, "embeds": {"capabilities": ["embeddings"]}}
    async with running_gateway(fleet(models)) as world:
        world.engines["embeds"].default = engines.status(200, b'{"data":[]}')
        chats = Counter(await hosts(world, 4, None))
        embedded = await world.send("POST", "/v1/embeddings", {"input": "hi"})
        wrong = await world.ask("embeds")
        nobody = await world.send("POST", "/v1/completions", {"prompt": "hi"})

    assert chats == {"talks": 4}
    assert host(embedded) == "embeds"
    assert refused(wrong) == refused(nobody) == (400, "unsupported_request")
    assert wrong.json()["error"]["param"] == "model"


async def test_fallbacks_are_tried_in_order_and_only_on_failure(autojump_clock: MockClock) -> None:
    models = {"m": {"fallbacks": ["b", "c"]}, "b": {}, "c": {}}
    async with running_gateway(fleet(models)) as world:
        good = await hosts(world, 2)
        for name in ("m", "b"):
            world.engines[name].default = engines.status(429)
        response = await world.ask("m")

    assert good == ["m", "m"]
    assert host(response) == "c"
    assert response.header("x-citadel-model") == "c"
    assert response.header("x-citadel-attempts") == "3"
    assert response.header("x-citadel-route-reason") == "fallback:c"
    assert [post.json["model"] for post in world.posts] == ["m", "m", "m", "b", "c"]


async def test_a_request_for_any_model_goes_on_to_the_next_under_its_own_name(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(fleet({"m": {}, "n": {"upstream_model": "org/n"}})) as world:
        world.engines["m"].default = engines.status(500)
        response = await world.ask()

    assert response.header("x-citadel-model") == "n"
    assert response.header("x-citadel-attempts") == "2"
    assert [post.json["model"] for post in world.posts] == ["m", "org/n"]


async def test_fallbacks_that_cannot_answer_are_passed_over(autojump_clock: MockClock) -> None:
    models: dict[str, dict[str, Any]] = {
        "m": {"fallbacks": ["mute", "small", "c"]},
        "mute": {"capabilities": ["embeddings"]},
        "small": {"context_window": 1},
        "c": {},
    }
    async with running_gateway(fleet(models)) as world:
        world.engines["m"].default = engines.status(429)
        response = await world.ask("m")

    assert host(response) == "c"
    assert response.header("x-citadel-attempts") == "2"


async def test_a_model_that_is_full_is_waited_for_not_fallen_back_from(
    autojump_clock: MockClock,
) -> None:
    models = {"m": {"fallbacks": ["b"], "max_concurrent": 1}, "b": {}}
    async with running_gateway(fleet(models)) as world:
        world.engines["m"].default = taking(1)
        answers = await gather(*[partial(world.ask, "m")] * 3)

    assert [host(answer) for answer in answers] == ["m", "m", "m"]


async def test_an_unhealthy_model_is_left_for_its_fallback_until_it_is_back(
    autojump_clock: MockClock,
) -> None:
    models = {"m": {"fallbacks": ["b"]}, "b": {}}
    async with running_gateway(fleet(models)) as world:
        serve = world.engines["m"].serve
        world.net.refuse("m", 8000)
        await trio.sleep(60)
        health = (await world.get("/health")).json()
        away = await world.ask("m")
        world.net.listen("m", 8000, serve)
        await trio.sleep(6)
        back = await world.ask("m")

    assert (health["status"], health["models"]) == ("degraded", ["b"])
    assert (host(away), away.header("x-citadel-attempts")) == ("b", "1")
    assert host(back) == "m"


async def test_no_endpoint_at_all_is_said_at_once(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": {}})) as world:
        world.endpoint("m").health.healthy = False
        began = trio.current_time()
        named, any_model = await world.ask("m"), await world.ask()
        took = trio.current_time() - began

    assert refused(named) == refused(any_model) == (503, "no_healthy_backend")
    assert named.header("retry-after")
    assert took == 0


# --- keys ------------------------------------------------------------------------------------

KEY = "sk-cit-a-" + "x" * 43
BEARER = [("authorization", f"Bearer {KEY}")]


def keyed(*allowed: str) -> dict[str, Any]:
    key = {"id": "a", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}
    return {"security": {"api_keys": [{**key, "allowed_models": list(allowed)}]}}


async def test_a_key_may_use_its_models_and_no_others(autojump_clock: MockClock) -> None:
    models: dict[str, dict[str, Any]] = {
        "m": {"fallbacks": ["n", "o"]},
        "n": {"aliases": ["y"]},
        "o": {},
    }
    async with running_gateway(fleet(models, **keyed("m", "o"))) as world:
        world.engines["m"].scripts.append(engines.status(429, b"", [("retry-after", "0")]))
        fallen_back = await world.ask("m", BEARER)
        forbidden = [await world.ask(name, BEARER) for name in ("n", "y")]
        chosen = Counter([host(await world.ask(None, BEARER)) for _ in range(6)])
        listed = (await world.get("/v1/models", BEARER)).json()["data"]
        hidden = await world.get("/v1/models/n", BEARER)

    assert host(fallen_back) == "o"
    assert [refused(response) for response in forbidden] == [(403, "model_not_allowed")] * 2
    assert forbidden[0].json()["error"]["param"] == "model"
    assert chosen == {"m": 3, "o": 3}
    assert [card["id"] for card in listed] == ["m", "o"]
    assert hidden.status == 404
    assert world.engines["n"].posts == []


async def test_with_routing_off_a_key_still_needs_leave_for_the_default_model(
    autojump_clock: MockClock,
) -> None:
    config = fleet({"m": {}, "n": {}}, gateway={"model_routing_enabled": False}, **keyed("n"))
    async with running_gateway(config) as world:
        response = await world.ask("n", BEARER)

    assert refused(response) == (403, "model_not_allowed")


# --- foretold --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("model", ["m", None])
async def test_what_is_foretold_is_what_happens(
    autojump_clock: MockClock, name: str, model: str | None
) -> None:
    models = {
        "m": {"endpoints": [{"url": endpoint("a"), "weight": 3}, {"url": endpoint("b")}],
              "cost_per_request": 0.2, "fallbacks": ["n"]},
        "n": {"endpoint": endpoint("c"), "cost_per_request": 0.1},
    }  # fmt: skip
    async with running_gateway(fleet(models, **algorithm(name))) as world:
        for seconds, engine in enumerate(world.engines.values()):
            engine.default = taking(seconds)
        for _ in range(20):
            foretold = (await world.send("POST", "/models/route", chat(model))).json()
            response = await world.ask(model)
            assert foretold["would_pick"] == {
                "model": response.header("x-citadel-model"),
                "endpoint": response.header("x-citadel-backend"),
            }
            assert foretold["reason"] == response.header("x-citadel-route-reason")


async def test_a_foretelling_names_everybody_and_what_speaks_against_them(
    autojump_clock: MockClock,
) -> None:
    models = {"m": {"endpoints": [{"url": endpoint(h)} for h in "abcd"], "fallbacks": ["n"]},
              "n": {}}  # fmt: skip
    async with running_gateway(fleet(models)) as world:
        world.endpoint("a").health.healthy = False
        world.endpoint("b").cool_down(30, trio.current_time())
        world.endpoint("c").in_flight = 100
        report = (await world.send("POST", "/models/route", chat("m"))).json()
        world.endpoint("c").in_flight = 0

    first, fallback = report["groups"]
    assert [c["eligible"] for c in first["candidates"]] == [False, False, False, True]
    why = [c["why_not"] for c in first["candidates"]]
    assert why[0].startswith("unhealthy")
    assert "30.0 s" in why[1]
    assert why[2].startswith("full")
    assert why[3] is None
    assert (fallback["name"], fallback["role"]) == ("n", "fallback")
    assert report["would_pick"]["endpoint"] == endpoint("d")
    assert world.posts == []


async def test_a_foretelling_refuses_as_routing_does(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": {}})) as world:
        unknown = await world.send("POST", "/models/route", chat("gpt-7"))
        wrong = await world.send("POST", "/models/route", {"model": "m"})

    assert refused(unknown) == (404, "model_not_found")
    assert wrong.json()["error"]["param"] == "messages"


async def test_streams_hold_their_place_until_they_end(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": {"max_concurrent": 1}})) as world:
        world.engines["m"].default = engines.stream_chat(["a", "b"], gap=2.0)
        answers = await gather(*[partial(world.ask, "m", stream=True)] * 3)

    assert all(events(answer)[-1] == "[DONE]" for answer in answers)
    assert world.engines["m"].max_in_flight == 1
