"""What is known and what goes on survives another configuration; what it changes counts at once."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from citadel_gateway.config.loader import parse
from citadel_gateway.policy.adaptive import AdaptiveLimit, Kind, Sample
from citadel_gateway.policy.circuit_breaker import State
from citadel_gateway.policy.endpoint import Endpoint
from citadel_gateway.wire.openai_request import AUTO
from tests.support import scripted_engine as engines
from tests.support.gateway import World, endpoint, fleet, gather, running_gateway
from tests.support.scripted_engine import Script
from tests.unit.test_generations import adopt, host_of, hosts, slow

ADDRESSES = ["10.0.0.1", "10.0.0.2"]


def urls(*names: str, **options: Any) -> dict[str, Any]:
    return {"endpoints": [{"url": endpoint(name)} for name in names], **options}


def patient(models: dict[str, Any], **balancer: Any) -> Any:
    return fleet(
        models,
        load_balancer={"queue_timeout": 1000, **balancer},
        performance={"request_timeout_seconds": 1000},
    )


def cordon(world: World, host: str) -> None:
    world.service.balancer.cordons.cordon(endpoint(host), [world.endpoint(host)])


def leave_and_return(one: Endpoint) -> None:
    now = trio.current_time()
    for _ in range(3):
        one.probed("down", now)
    one.probed(None, now)


async def finish(world: World) -> None:
    """Let nothing be under way, so that a slow engine does not keep a test busy."""
    for engine in world.engines.values():
        engine.default = engines.whole_chat("ok")


# --- cordons -------------------------------------------------------------------------------------


async def test_a_cordon_stays_also_on_an_endpoint_that_leaves_and_comes_back(
    autojump_clock: MockClock,
) -> None:
    both, one = fleet({"m": ["a", "b"]}), fleet({"m": ["b"]})
    async with running_gateway(both) as world:
        cordon(world, "a")
        await adopt(world, both)
        untouched = await hosts(world, 4)
        await adopt(world, one)
        await trio.sleep(1)
        await adopt(world, both)
        returned = await hosts(world, 4)

        assert world.endpoint("a").cordoned
    assert untouched == returned == ["b"] * 4


async def test_who_had_to_ask_again_is_served_by_a_cordoned_endpoint_that_leaves(
    autojump_clock: MockClock,
) -> None:
    """Out of service and then out of the file, while it still has a request to finish."""
    refusal = b'{"error": {"message": "stream_options is not supported", "code": 400}}'
    async with running_gateway(fleet({"m": ["a", "b"]})) as world:
        world.engines["a"].scripts.append(
            Script([engines.sleep(2), *engines.status(400, refusal).steps])
        )
        world.engines["a"].default = engines.stream_chat(["x"])

        async def change() -> None:
            await trio.sleep(1)
            cordon(world, "a")
            await adopt(world, fleet({"m": ["b"]}))

        answer, _ = await gather(partial(world.ask, "m", stream=True), change)

    assert (answer.status, host_of(answer)) == (200, "a")


# --- adaptive limits -----------------------------------------------------------------------------


def learnt(most: int) -> AdaptiveLimit:
    limit = AdaptiveLimit(4, most)
    for _ in range(41):
        limit.learn(
            Sample(kind=Kind.WHOLE, size=9, seconds=1.0, began=1.0, in_flight=limit.limit), 2.0
        )
    return limit


def adapting(most: int = 50, least: int = 4, slow_start: float = 30) -> Any:
    options = {"adaptive_concurrency": True, "max_concurrent": most, "min_concurrent": least}
    return patient({"m": options}, slow_start=slow_start)


async def test_an_adaptive_limit_and_its_samples_go_on(autojump_clock: MockClock) -> None:
    async with running_gateway(adapting()) as world:
        one = world.endpoint("m")
        one.adaptive = learnt(50)
        known = attrs.asdict(one.adaptive)
        await adopt(world, adapting())

        assert one.adaptive is not None
        assert attrs.asdict(one.adaptive) == known
        assert known["_ratios"]
        assert one.limit == known["limit"] > 20


@pytest.mark.parametrize(
    ("most", "least", "expected"),
    [(60, 4, None), (50, 2, None), (10, 4, 10), (100, 70, 70), (3, 2, 3)],
)
async def test_other_bounds_do_not_make_it_begin_anew(
    autojump_clock: MockClock, most: int, least: int, expected: int | None
) -> None:
    async with running_gateway(adapting()) as world:
        one = world.endpoint("m")
        one.adaptive = learnt(50)
        before, at_rest = one.adaptive.limit, dict(one.adaptive._at_rest)
        await adopt(world, adapting(most, least))

        assert one.adaptive is not None
        assert one.limit == (before if expected is None else expected)
        assert one.adaptive._at_rest == at_rest
        assert (one.adaptive.floor, one.adaptive.ceiling) == (least, most)


async def test_a_raised_floor_lets_in_those_who_wait(autojump_clock: MockClock) -> None:
    async with running_gateway(adapting(50, 2)) as world:
        world.engines["m"].default = slow(10)

        async def change() -> None:
            await trio.sleep(1)
            await adopt(world, adapting(50, 20))

        began = trio.current_time()
        await gather(*[partial(world.ask, "m")] * 12, change)

    assert trio.current_time() - began == pytest.approx(11.1, abs=0.1)


# --- slow start ----------------------------------------------------------------------------------


async def test_a_slow_start_goes_on_where_it_was(autojump_clock: MockClock) -> None:
    config = patient({"m": ["a", "b"]}, slow_start=100)
    async with running_gateway(config) as world:
        one = world.endpoint("a")
        leave_and_return(one)
        await trio.sleep(35)
        await hosts(world, 1)
        before = one.warmth
        await adopt(world, config)
        after = one.warmth
        await trio.sleep(20)
        await hosts(world, 1)

        assert (before, after, one.warmth) == (0.3, 0.3, 0.5)


async def test_an_endpoint_that_comes_with_a_configuration_is_a_newcomer(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(patient({"m": ["a"]})) as world:
        await adopt(world, patient({"m": ["a", "b"]}))

        assert (world.endpoint("a").warmth, world.endpoint("b").warmth) == (1.0, 0.1)


@pytest.mark.parametrize(("window", "share"), [(0, 1.0), (20, 1.0), (50, 0.7), (400, 0.1)])
async def test_another_window_counts_at_once(
    autojump_clock: MockClock, window: float, share: float
) -> None:
    async with running_gateway(patient({"m": ["a", "b"]}, slow_start=1000)) as world:
        one = world.endpoint("a")
        leave_and_return(one)
        await trio.sleep(35)
        await adopt(world, patient({"m": ["a", "b"]}, slow_start=window))

        assert one.warmth == share
        await trio.sleep(17)  # and its steps come when they are due by the new one
        await hosts(world, 1)
        assert one.warmth == (0.1 if window == 400 else 1.0)


async def test_who_waits_for_one_that_warms_up_is_let_in_by_another_window(
    autojump_clock: MockClock,
) -> None:
    def config(window: float) -> Any:
        return patient(
            {"m": {"endpoints": [{"url": endpoint("a"), "max_concurrent": 1},
                                 {"url": endpoint("b"), "max_concurrent": 10}]}},
            slow_start=window,
        )  # fmt: skip

    async with running_gateway(config(3000)) as world:
        for engine in world.engines.values():
            engine.default = slow(10)
        leave_and_return(world.endpoint("b"))

        async def change() -> None:
            await trio.sleep(1)
            await adopt(world, config(0))

        began = trio.current_time()
        await gather(*[partial(world.ask, "m")] * 11, change)

    assert trio.current_time() - began == pytest.approx(11.1, abs=0.1)


# --- breakers, health, latency, cool-downs -------------------------------------------------------


async def test_a_breaker_stays_open_for_as_long_as_it_would_have(
    autojump_clock: MockClock,
) -> None:
    config = fleet(
        {"m": ["a", "b"]},
        load_balancer={"circuit_breaker_threshold": 1, "circuit_breaker_timeout": 30},
    )
    async with running_gateway(config) as world:
        one = world.endpoint("a")
        world.engines["a"].scripts.append(engines.status(500))
        while one.breaker.state(trio.current_time()) is not State.OPEN:
            await world.ask("m")
        ends = one.breaker.opens_again_at()
        await trio.sleep(5)
        await adopt(world, config)
        assert one.breaker.opens_again_at() == ends
        assert one.breaker.state(trio.current_time()) is State.OPEN
        assert await hosts(world, 3) == ["b"] * 3

        await trio.sleep(31)
        assert "a" in await hosts(world, 4)


async def test_health_latency_and_cool_downs_stay(autojump_clock: MockClock) -> None:
    config = fleet({"m": ["a", "b"]})
    async with running_gateway(config) as world:
        one = world.endpoint("a")
        await hosts(world, 4)
        one.health.observe("slow", trio.current_time())  # one bad probe of three
        one.cool_down(100, trio.current_time())
        before = attrs.asdict(one.health), attrs.asdict(one.latency), one.cooling_until
        await adopt(world, config)

        assert world.endpoint("a") is one
        after = attrs.asdict(one.health), attrs.asdict(one.latency), one.cooling_until
        assert after == before
        assert await hosts(world, 3) == ["b"] * 3


async def test_other_numbers_of_probes_count_from_the_next_one(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": ["a", "b"]})) as world:
        one = world.endpoint("a")
        one.probed("slow", 0.0)
        await adopt(world, fleet({"m": ["a", "b"]}, load_balancer={"unhealthy_after": 2}))
        one.probed("slow", 1.0)

        assert not one.health.healthy


# --- panic ---------------------------------------------------------------------------------------


def ill(world: World, *names: str) -> None:
    for name in names:
        for _ in range(3):
            world.endpoint(name).probed("down", trio.current_time())


async def test_panic_goes_on_and_another_share_ends_or_begins_it(
    autojump_clock: MockClock,
) -> None:
    def config(share: float) -> Any:
        return fleet({"m": ["a", "b", "c"]}, load_balancer={"panic_threshold": share})

    async with running_gateway(config(0.5)) as world:
        ill(world, "b", "c")
        used = []
        for share in (0.5, 0.1, 0.6):
            await adopt(world, config(share))
            used.append({*await hosts(world, 6)})
        states = [line["state"] for line in world.log.lines if line["event"] == "panic"]

    assert used == [{"a", "b", "c"}, {"a"}, {"a", "b", "c"}]
    assert [state == "over" for state in states] == [False, True, False]


async def test_endpoints_that_change_places_are_no_panic(autojump_clock: MockClock) -> None:
    """Those who go do so before those who come are there; the share in between is nobody's."""
    async with running_gateway(fleet({"m": ["a", "b", "c", "d", "e"]})) as world:
        ill(world, "d", "e")
        await adopt(world, fleet({"m": ["c", "d", "e", "f", "g"]}))
        states = [line for line in world.log.lines if line["event"] == "panic"]

        assert states == []
        assert {*await hosts(world, 40)} == {"c", "f", "g"}


# --- who waits -----------------------------------------------------------------------------------


async def test_a_raised_weight_counts_for_those_who_wait(autojump_clock: MockClock) -> None:
    def config(weight: float) -> Any:
        heavy = {"url": endpoint("a"), "weight": weight, "max_concurrent": 1}
        other = {"url": endpoint("b"), "max_concurrent": 1}
        return patient({"m": {"endpoints": [heavy, other]}}, algorithm="weighted_round_robin")

    async with running_gateway(config(1)) as world:
        world.engines["a"].default = world.engines["b"].default = slow(5)

        async def change() -> None:
            await trio.sleep(1)
            await adopt(world, config(9))
            await finish(world)

        *answers, _ = await gather(*[partial(world.ask, "m")] * 6, change)

        assert [answer.status for answer in answers] == [200] * 6
        assert world.endpoint("a").weight == 9


async def test_a_shorter_queue_sends_nobody_away_who_waits_already(
    autojump_clock: MockClock,
) -> None:
    def config(size: int) -> Any:
        return patient({"m": {"max_concurrent": 1}}, queue_size=size)

    async with running_gateway(config(10)) as world:
        world.engines["m"].default = slow(5)

        async def change() -> list[int]:
            await trio.sleep(1)
            await adopt(world, config(2))
            refused = (await world.ask("m")).status
            await adopt(world, config(20))
            return [refused, (await world.ask("m")).status]

        *answers, later = await gather(*[partial(world.ask, "m")] * 5, change)

    assert [answer.status for answer in answers] == [200] * 5
    assert later == [503, 200]


async def test_who_waits_for_any_model_gets_what_its_names_have_now(
    autojump_clock: MockClock,
) -> None:
    """Its group has lost a model, and is nobody's any more but of those who wait in it."""
    names = {"pool": ADDRESSES[:1]}
    source = {"endpoint": endpoint("pool"), "resolve": "each", "max_concurrent": 1}
    both = patient({"m": source, "old": {"endpoint": endpoint("a"), "max_concurrent": 1}})
    async with running_gateway(both, addresses=names, hosts=ADDRESSES) as world:
        for engine in world.engines.values():
            engine.default = slow(40)

        async def change() -> None:
            await trio.sleep(1)
            await world.service.adopt(parse(patient({"m": source}), source="test"))
            names["pool"] = ADDRESSES[1:]

        *answers, _ = await gather(world.ask, world.ask, world.ask, change)

    backends = [answer.header("x-citadel-backend") or "" for answer in answers]
    assert sum(ADDRESSES[0] in backend for backend in backends) == 1
    assert sum(ADDRESSES[1] in backend for backend in backends) == 1


async def test_who_waits_for_any_model_sees_every_later_configuration(
    autojump_clock: MockClock,
) -> None:
    def config(*names: str, **other: Any) -> Any:
        return patient({"m": urls(*names, max_concurrent=1), **other})

    async with running_gateway(config("a", old={"max_concurrent": 1})) as world:
        for engine in world.engines.values():
            engine.default = slow(40)

        async def change() -> None:
            await trio.sleep(1)
            await adopt(world, config("a"))
            await adopt(world, config("b"))

        began = trio.current_time()
        *answers, _ = await gather(world.ask, world.ask, world.ask, change)
        (post,) = world.engines["b"].posts

    assert sorted(map(host_of, answers)) == ["a", "b", "old"]
    assert post.received_at - began == pytest.approx(1.0, abs=0.1)


async def test_another_share_for_lower_classes_counts_for_those_who_wait(
    autojump_clock: MockClock,
) -> None:
    def config(share: float) -> Any:
        return patient({"m": {"max_concurrent": 1}}, lower_priority_share=share)

    async with running_gateway(config(0.0)) as world:
        world.engines["m"].default = slow(1)
        order: list[str] = []

        async def ask(priority: str) -> None:
            await world.ask("m", [("x-citadel-priority", priority)])
            order.append(priority)

        async def change() -> None:
            await trio.sleep(0.5)
            await adopt(world, config(0.5))

        await gather(*[partial(ask, "default")] * 6, *[partial(ask, "bulk")] * 2, change)

    assert order.index("bulk") < 5


# --- limits of clients ---------------------------------------------------------------------------


async def test_other_limits_of_clients_count_at_once_and_give_nothing_away(
    autojump_clock: MockClock,
) -> None:
    def config(rate: float, burst: int) -> Any:
        limits = {"rate_limiting_enabled": True, "rate_limit_rps": 1000}
        per_client = {"client_rate_limit_rps": rate, "client_rate_limit_burst": burst}
        return fleet({"m": ["a"]}, performance={**limits, **per_client})

    async def allowed(world: World) -> int:
        count = 0
        while (await world.ask("m")).status == 200:
            count += 1
        return count

    async with running_gateway(config(0.001, 4)) as world:
        first = await allowed(world)
        await adopt(world, config(1, 8))
        second = await allowed(world)
        await trio.sleep(5)
        third = await allowed(world)

    assert (first, second, third) == (4, 0, 5)


# --- what engines have shown ---------------------------------------------------------------------


async def test_what_an_engine_has_shown_is_still_known(autojump_clock: MockClock) -> None:
    config = fleet({"m": ["a"]})
    async with running_gateway(config) as world:
        (upstream,) = world.service.balancer.upstreams
        upstream.asks_usage, upstream.endpoint.engine = False, "llamacpp"
        engine = upstream.known_engine
        await adopt(world, config)
        (after,) = world.service.balancer.upstreams

        assert after is not upstream
        assert not after.asks_usage
        assert after.known_engine is engine


async def test_where_a_request_would_go_can_be_asked_after_a_change(
    autojump_clock: MockClock,
) -> None:
    """The preview works on a copy, and must not copy the whole gateway."""
    threshold = {"circuit_breaker_threshold": 1}
    async with running_gateway(fleet({"m": ["a", "b"]}, load_balancer=threshold)) as world:
        world.engines["a"].default = engines.status(500)
        await hosts(world, 4)
        group = world.service.balancer._groups["m"]
        await adopt(world, fleet({"m": ["b"], AUTO + "x": ["a"]}, load_balancer=threshold))
        preview = group.preview(trio.current_time())

        assert preview is world.endpoint("b")
        assert group._roster._returns == []
