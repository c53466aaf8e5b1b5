"""Another configuration while requests run: nobody loses anything, and nothing is left behind."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from citadel_gateway.config.loader import parse
from citadel_gateway.policy.auth import generate_key
from citadel_gateway.policy.circuit_breaker import State
from tests.support import scripted_engine as engines
from tests.support.gateway import PORT, World, endpoint, fleet, gather, running_gateway
from tests.support.ledger import total
from tests.support.raw_client import RawResponse
from tests.support.scripted_engine import Script, ScriptedEngine

BAD = engines.status(500)


def host_of(answer: RawResponse) -> str:
    return (answer.header("x-citadel-backend") or "").removeprefix("http://").partition(":")[0]


async def adopt(world: World, config: Any) -> None:
    """Take *config* in; engines that it names come into being, and are healthy."""
    for name, model in config["models"].items():
        for each in model.get("endpoints", [{"url": endpoint(name)}]):
            host = each["url"].removeprefix("http://").partition(":")[0]
            if host not in world.engines:
                world.engines[host] = ScriptedEngine()
                world.net.listen(host, PORT, world.engines[host].serve)
    await world.service.adopt(parse(config, source="test"))


def slow(seconds: float) -> Script:
    return Script([engines.sleep(seconds), *engines.whole_chat("ok").steps])


async def hosts(world: World, count: int, model: str | None = "m") -> list[str]:
    return [host_of(await world.ask(model)) for _ in range(count)]


async def test_requests_end_by_the_configuration_that_they_began_with(
    autojump_clock: MockClock,
) -> None:
    before = fleet({"m": ["a"], "old": ["b"]}, performance={"request_timeout_seconds": 30})
    after = fleet({"m": ["a"], "new": ["c"]}, performance={"request_timeout_seconds": 1})
    async with running_gateway(before) as world:
        for name in "ab":
            world.engines[name].default = slow(10)

        async def change() -> list[RawResponse]:
            await trio.sleep(1)
            await adopt(world, after)
            return [await world.ask(name) for name in ("m", "old", "new")]

        running, leaving, answers = await gather(
            partial(world.ask, "m"), partial(world.ask, "old"), change
        )

    assert (running.status, leaving.status) == (200, 200)
    assert [answer.status for answer in answers] == [504, 404, 200]


async def test_a_generation_ends_with_its_last_request(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": ["a"], "old": ["b"]})) as world:
        world.engines["b"].default = slow(10)
        first = world.service.generation
        ended: list[bool] = []

        async def change() -> None:
            await trio.sleep(1)
            await adopt(world, fleet({"m": ["a"]}))
            await adopt(world, fleet({"m": ["a"]}))
            ended.append(first.has_ended)
            report = (await world.get("/models/status")).json()["configuration"]
            assert (report["generation"], report["older_in_use"]) == (3, 1)
            await trio.sleep(10)
            ended.append(first.has_ended)

        await gather(partial(world.ask, "old"), change)
        report = (await world.get("/models/status")).json()["configuration"]

    assert ended == [False, True]
    assert (report["generation"], report["older_in_use"], report["refused"]) == (3, 0, None)


async def test_a_cap_holds_across_generations_and_may_change(autojump_clock: MockClock) -> None:
    def config(cap: int) -> Any:
        return fleet({"m": {"endpoint": endpoint("a"), "max_concurrent": cap}})

    async with running_gateway(config(2)) as world:
        engine, most = world.engines["a"], Counter[str]()
        engine.default = slow(2)

        async def look() -> None:
            for _ in range(40):
                await trio.sleep(0.2)
                now = trio.current_time() - began
                phase = "one" if now > 3 else "two"
                most[phase] = max(most[phase], world.endpoint("a").in_flight)

        async def change() -> None:
            await trio.sleep(1)
            await adopt(world, config(1))

        began = trio.current_time()
        ask = partial(world.ask, "m")
        *answers, _, _ = await gather(ask, ask, ask, ask, look, change)

        async def make_room() -> None:
            await trio.sleep(0.5)
            await adopt(world, config(3))

        raised = trio.current_time()
        await gather(ask, ask, ask, make_room)
        took = trio.current_time() - raised

    assert [answer.status for answer in answers] == [200] * 4
    assert most == {"two": 2, "one": 1}
    assert took == pytest.approx(2.5)  # those who waited were let in when there was more room


async def test_who_waits_is_served_in_order_and_by_endpoints_that_come(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(fleet({"m": {"endpoint": endpoint("a"), "max_concurrent": 1}})) as (
        world
    ):
        world.engines["a"].default = slow(8)
        order: list[int] = []

        async def ask(place: int) -> str:
            await trio.sleep(place / 10)
            answer = await world.ask("m")
            order.append(place)
            return host_of(answer)

        async def change() -> None:
            await trio.sleep(1)
            both = [{"url": endpoint("a")}, {"url": endpoint("b")}]
            await adopt(world, fleet({"m": {"endpoints": both, "max_concurrent": 1}}))

        *served, _ = await gather(*[partial(ask, n) for n in range(4)], change)

    assert served == ["a", "b", "b", "b"]
    assert order == [1, 2, 3, 0]


async def test_a_removed_endpoint_finishes_what_it_has_and_gets_nothing_new(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(fleet({"m": ["a", "b"]})) as world:
        world.engines["a"].default = world.engines["b"].default = slow(5)

        async def change() -> tuple[list[str], Any]:
            await trio.sleep(1)
            await adopt(world, fleet({"m": ["b"]}))
            page = await world.metrics()
            return await hosts(world, 3), page

        ask = partial(world.ask, "m")
        first, second, (later, page) = await gather(ask, ask, change)
        after = await world.metrics()
        probes = [e for e in world.engines["a"].ledger if e.path == "/health"]
        await trio.sleep(200)

    assert {host_of(first), host_of(second)} == {"a", "b"}
    assert later == ["b", "b", "b"]
    where = frozenset({("endpoint", endpoint("a")), ("model", "m")})
    assert page["citadel_gateway_in_flight", where] == 1
    assert ("citadel_gateway_in_flight", where) not in after
    assert [e for e in world.engines["a"].ledger if e.path == "/health"] == probes


async def test_an_added_endpoint_is_probed_before_it_is_used(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": ["a"]})) as world:
        world.engines["ill"] = ScriptedEngine()
        world.engines["ill"].routes["GET", "/health"] = engines.status(503)
        world.net.listen("ill", PORT, world.engines["ill"].serve)
        await adopt(world, fleet({"m": ["well", "ill"]}))
        used = await hosts(world, 4)
        asked = [entry.path for entry in world.engines["ill"].ledger]

    assert used == ["well"] * 4
    assert asked == ["/health"]


async def test_a_model_whose_only_endpoint_moves_is_never_without_one(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(fleet({"m": ["a"]})) as world:
        answers: list[RawResponse] = []

        async def keep_asking() -> None:
            while trio.current_time() < until:
                answers.append(await world.ask("m"))
                await trio.sleep(0.01)

        async def move() -> None:
            for host in "bcdab":
                await trio.sleep(0.1)
                await adopt(world, fleet({"m": [host]}))

        until = trio.current_time() + 1
        await gather(keep_asking, move)

    assert {answer.status for answer in answers} == {200}
    assert [*dict.fromkeys(map(host_of, answers))] == ["a", "b", "c", "d"]
    assert host_of(answers[-1]) == "b"


async def test_what_is_known_of_an_endpoint_stays_known(autojump_clock: MockClock) -> None:
    config = fleet(
        {"m": ["a", "b"]},
        load_balancer={"circuit_breaker_threshold": 2, "algorithm": "least_latency"},
    )
    async with running_gateway(config) as world:
        world.engines["a"].default = BAD
        while world.endpoint("a").breaker.state(trio.current_time()) is not State.OPEN:
            await world.ask("m")
        before = [world.endpoint(host) for host in "ab"]
        known = [attrs.asdict(e.latency) for e in before]
        await adopt(world, config)
        after = [world.endpoint(host) for host in "ab"]

        assert all(one is other for one, other in zip(before, after, strict=True))
        assert [attrs.asdict(e.latency) for e in after] == known
        assert after[0].breaker.state(trio.current_time()) is State.OPEN
        assert await hosts(world, 3) == ["b"] * 3


@pytest.mark.parametrize("model", ["m", None])
async def test_turns_go_on_where_they_were(model: str | None, autojump_clock: MockClock) -> None:
    config = fleet({"m": ["a", "b", "c"]})
    async with running_gateway(config) as world:
        served = []
        for _ in range(6):
            served += await hosts(world, 1, model)
            await adopt(world, config)
            served += await hosts(world, 1, model)
        other = fleet({"m": ["a", "b", "c"]}, load_balancer={"algorithm": "weighted_round_robin"})
        served += await hosts(world, 1, model)
        await adopt(world, other)
        served += await hosts(world, 2, model)

    assert served == ["a", "b", "c"] * 5


async def test_other_weights_count_at_once(autojump_clock: MockClock) -> None:
    def config(weight: int) -> Any:
        return fleet(
            {
                "m": {
                    "endpoints": [{"url": endpoint("a"), "weight": weight}, {"url": endpoint("b")}]
                }
            },
            load_balancer={"algorithm": "weighted_round_robin"},
        )

    async with running_gateway(config(1)) as world:
        before = Counter(await hosts(world, 10))
        await adopt(world, config(4))
        after = Counter(await hosts(world, 10))

    assert (before, after) == ({"a": 5, "b": 5}, {"a": 8, "b": 2})


async def test_limits_and_budgets_keep_their_level(autojump_clock: MockClock) -> None:
    config = fleet(
        {"m": ["a"]},
        performance={"rate_limiting_enabled": True, "rate_limit_rps": 1, "rate_limit_burst": 3},
    )
    async with running_gateway(config) as world:
        statuses = []
        for _ in range(5):
            statuses.append((await world.ask("m")).status)
            await adopt(world, config)
        budget = world.service.orchestrator.retrying.budget
        await adopt(world, config)

        assert world.service.orchestrator.retrying.budget is budget
    assert statuses == [200, 200, 200, 429, 429]


async def test_keys_count_from_the_next_request_on(autojump_clock: MockClock) -> None:
    (old, old_hash), (new, new_hash) = generate_key("old"), generate_key("new")

    def config(digest: str) -> Any:
        return fleet({"m": ["a"]}, security={"api_keys": [{"id": "k", "sha256": digest}]})

    async def ask(key: str) -> int:
        return (await world.ask("m", headers=[("authorization", f"Bearer {key}")])).status

    async with running_gateway(config(old_hash)) as world:
        world.engines["a"].default = slow(2)

        async def change() -> list[int]:
            await trio.sleep(1)
            await adopt(world, config(new_hash))
            return [await ask(old), await ask(new)]

        running, after = await gather(partial(ask, old), change)

    assert (running, after) == (200, [401, 200])


async def test_probes_come_when_they_are_due_however_often_the_configuration_changes(
    autojump_clock: MockClock,
) -> None:
    config = fleet({"m": ["a"]}, load_balancer={"health_check_interval": 10})
    async with running_gateway(config) as world:
        for _ in range(100):
            await trio.sleep(1)
            await adopt(world, config)
        probes = [e for e in world.engines["a"].ledger if e.path == "/health"]

    assert len(probes) == pytest.approx(11, abs=1)


async def test_a_hundred_changes_leave_nothing_behind(autojump_clock: MockClock) -> None:
    one = fleet({"m": ["a", "b"], "n": ["c"]})
    other = fleet({"m": ["a", "d"]}, load_balancer={"algorithm": "least_connections"})

    async def change(world: World, times: int) -> None:
        for n in range(times):
            await adopt(world, (other, one)[n % 2])
            await gather(partial(world.ask, "m"), world.ask)

    async def levels(world: World) -> tuple[float, int, int]:
        await trio.sleep(10)
        await trio.testing.wait_all_tasks_blocked()
        watchers = len(world.endpoint("a").watchers)
        tasks = trio.lowlevel.current_statistics().tasks_living
        return tasks, watchers, len(world.service.balancer.groups)

    async with running_gateway(one) as world:
        await change(world, 4)
        before = await levels(world)
        requests = total(await world.metrics(), "citadel_gateway_requests_total")
        await change(world, 100)
        assert await levels(world) == before
        after = total(await world.metrics(), "citadel_gateway_requests_total")

    assert after == requests + 200


async def test_what_needs_a_restart_is_named_and_stays(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": ["a"]})) as world:
        await adopt(world, fleet({"m": ["b"]}, service={"port": 8001, "workers": 1}))
        config = world.service.config
        lines = [line["problem"] for line in world.log.lines if line["event"] == "needs a restart"]

    assert (config.service.port, config.service.workers) == (8000, 4)
    assert next(u.endpoint.url for u in world.service.balancer.upstreams) == endpoint("b")
    assert lines == [
        "service.port stays 8000 until a restart; the file says 8001",
        "service.workers stays 4 until a restart; the file says 1",
    ]


async def test_addresses_of_names_stay_and_are_followed(autojump_clock: MockClock) -> None:
    entry = {"url": endpoint("vllm"), "resolve": "each"}
    config = fleet({"m": {"endpoints": [entry], "max_concurrent": 1}})
    names = {"vllm": ["10.0.0.1"]}

    def address(answer: RawResponse) -> str:
        return (answer.header("x-citadel-backend") or "").partition("[")[2].rstrip("]")

    async with running_gateway(
        config, addresses=names, hosts=["10.0.0.1", "10.0.0.2", "vllm"]
    ) as world:
        (before,) = [u.endpoint for u in world.service.balancer.upstreams]
        await world.service.adopt(parse(config, source="test"))
        (after,) = [u.endpoint for u in world.service.balancer.upstreams]
        first = address(await world.ask("m"))
        names["vllm"] = ["10.0.0.2"]
        await trio.sleep(12)
        second = address(await world.ask("m"))

    assert before is after
    assert (first, second) == ("10.0.0.1", "10.0.0.2")
