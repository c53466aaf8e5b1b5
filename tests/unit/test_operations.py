"""Endpoints by command, by panic, and by measuring: through the whole gateway, in memory."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import orjson
import pytest
import trio
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked

from citadel_gateway.app.operations import Order
from citadel_gateway.io.departures import Departures
from citadel_gateway.io.http1_server import ConnectionLimits, HttpConnection
from tests.support import scripted_engine as engines
from tests.support.gateway import World, endpoint, events, fleet, gather, running_gateway
from tests.support.ledger import Metrics
from tests.support.raw_client import Headers, RawClient, RawResponse, http_request
from tests.support.scripted_engine import Script
from tests.unit.test_routing import host, refused, taking

KEYS = {name: f"sk-cit-{name}-" + "x" * 43 for name in ("root", "user")}
HERE = ("127.0.0.1", 40000)


def bearer(name: str) -> Headers:
    return [("authorization", f"Bearer {KEYS[name]}")]


def with_keys(**is_admin: bool) -> dict[str, Any]:
    return {
        "security": {
            "api_keys": [
                {
                    "id": name,
                    "sha256": hashlib.sha256(KEYS[name].encode()).hexdigest(),
                    "admin": admin,
                }
                for name, admin in is_admin.items()
            ]
        }
    }


@pytest.fixture
def two() -> dict[str, Any]:
    """A model with two endpoints, a and b, and an operator's key."""
    return dict(fleet({"m": ["a", "b"]}, **with_keys(root=True, user=False)))


def gauge(metrics: Metrics, name: str, of: str) -> float:
    labels = frozenset({("model", "m"), ("endpoint", endpoint(of))})
    return metrics[f"citadel_gateway_{name}", labels]


async def order(world: World, what: str, name: str, **fields: Any) -> RawResponse:
    body = {"endpoint": endpoint(name), **fields}
    return await world.send("POST", f"/admin/endpoints/{what}", body, bearer("root"))


async def ask(world: World, **fields: Any) -> RawResponse:
    return await world.ask("m", bearer("root"), **fields)


async def hosts(world: World, count: int) -> Counter[str]:
    return Counter([host(await ask(world)) for _ in range(count)])


# --- cordon --------------------------------------------------------------------------------------


async def test_a_cordoned_endpoint_gets_nothing_new(
    autojump_clock: MockClock, two: dict[str, Any]
) -> None:
    async with running_gateway(two) as world:
        answer = await order(world, "cordon", "a")
        assert answer.json() == {
            "endpoints": [
                {
                    "model": "m", "endpoint": endpoint("a"), "cordoned": True, "in_flight": 0,
                    "healthy": True,
                }
            ]
        }  # fmt: skip
        assert await hosts(world, 10) == {"b": 10}

        await trio.sleep(300)  # probes go on, and do not bring it back
        assert await hosts(world, 10) == {"b": 10}

        await order(world, "uncordon", "a")
        await trio.sleep(30)
        assert await hosts(world, 10) == {"a": 5, "b": 5}


async def test_what_it_has_it_finishes(autojump_clock: MockClock, two: dict[str, Any]) -> None:
    async with running_gateway(two) as world:
        for engine in world.engines.values():
            engine.default = engines.stream_chat(["one", "two", "three"], gap=5.0)

        async def cordon() -> None:
            await trio.sleep(1)
            for name in "ab":
                await order(world, "cordon", name)

        *answers, _ = await gather(*[partial(ask, world, stream=True)] * 2, cordon)

    assert {host(answer) for answer in answers} == {"a", "b"}
    assert [events(answer)[-1] for answer in answers] == ["[DONE]", "[DONE]"]


async def test_without_any_left_it_is_said_at_once_and_clearly(
    autojump_clock: MockClock, two: dict[str, Any]
) -> None:
    async with running_gateway(two) as world:
        for name in "ab":
            await order(world, "cordon", name)
        began = trio.current_time()
        answer = await ask(world)

        assert trio.current_time() == began
        assert refused(answer) == (503, "no_healthy_backend")
        assert "out of service" in answer.json()["error"]["message"]
        assert int(answer.header("retry-after") or 0) >= 1


async def test_its_fallback_takes_over(autojump_clock: MockClock) -> None:
    models = {"m": {"fallbacks": ["n"]}, "n": {}}
    async with running_gateway(fleet(models, **with_keys(root=True))) as world:
        await order(world, "cordon", "m")

        assert await hosts(world, 3) == {"n": 3}


async def test_who_waits_for_it_is_told_at_once(autojump_clock: MockClock) -> None:
    config = fleet({"m": {"max_concurrent": 1}}, **with_keys(root=True))
    async with running_gateway(config) as world:
        world.engines["m"].default = taking(8)

        async def cordon() -> None:
            await trio.sleep(1)
            await order(world, "cordon", "m")

        async def wait() -> tuple[RawResponse, float]:
            await trio.sleep(0.5)
            answer = await ask(world)
            return answer, trio.current_time() - began

        began = trio.current_time()
        first, (second, at), _ = await gather(partial(ask, world), wait, cordon)

    assert first.status == 200
    assert refused(second) == (503, "no_healthy_backend")
    assert at == pytest.approx(1.0)


async def test_a_request_on_a_connection_that_was_dead_is_finished_by_a_cordoned_endpoint(
    autojump_clock: MockClock,
) -> None:
    """It had the request, so it is not taken from it by a command that came later."""
    async with running_gateway(fleet({"m": {}}, **with_keys(root=True))) as world:
        await ask(world)  # leaves an idle connection
        world.engines["m"].scripts.append(Script([engines.sleep(2), engines.close()]))

        async def cordon() -> None:
            await trio.sleep(1)
            await order(world, "cordon", "m")

        answer, _ = await gather(partial(ask, world), cordon)

    assert answer.status == 200


async def test_it_is_to_be_seen_everywhere(autojump_clock: MockClock, two: dict[str, Any]) -> None:
    async with running_gateway(two) as world:
        assert "cordoned" not in (await world.get("/health")).json()
        await order(world, "cordon", "a")
        health = (await world.get("/health")).json()
        status = (await world.get("/models/status", bearer("root"))).json()
        listed = (await world.get("/admin/endpoints", bearer("root"))).json()
        gauges = await world.metrics()
        lines = [line for line in world.log.lines if line["event"] == "cordoned"]

    assert (health["status"], health["cordoned"]) == ("healthy", {"m": 1})
    assert [e["cordoned"] for e in status["models"]["m"]["endpoints"]] == [True, False]
    assert [e["cordoned"] for e in listed["endpoints"]] == [True, False]
    assert gauge(gauges, "endpoint_cordoned", "a") == 1
    assert gauge(gauges, "endpoint_cordoned", "b") == 0
    assert [line["endpoint"] for line in lines] == [endpoint("a")]


async def test_an_endpoint_of_several_models_can_leave_one_of_them(
    autojump_clock: MockClock,
) -> None:
    models = {"m": ["a", "b"], "n": ["a"]}
    async with running_gateway(fleet(models, **with_keys(root=True))) as world:
        await order(world, "cordon", "a", model="m")

        assert await hosts(world, 4) == {"b": 4}
        assert host(await world.ask("n", bearer("root"))) == "a"
        assert len((await order(world, "cordon", "a")).json()["endpoints"]) == 2


async def test_an_address_that_comes_back_is_still_cordoned(autojump_clock: MockClock) -> None:
    addresses = {"pool": ["10.0.0.1", "10.0.0.2"]}
    config = fleet({"m": {"endpoint": endpoint("pool"), "resolve": "each"}}, **with_keys(root=True))
    async with running_gateway(
        config, addresses=addresses, hosts=["10.0.0.1", "10.0.0.2"]
    ) as world:
        await order(world, "cordon", "pool")
        assert (await ask(world)).status == 503

        addresses["pool"] = ["10.0.0.2"]
        await trio.sleep(30)
        addresses["pool"] = ["10.0.0.1", "10.0.0.2"]
        await trio.sleep(30)
        assert (await ask(world)).status == 503

        await order(world, "uncordon", "pool")
        assert (await ask(world)).status == 200


# --- drain ---------------------------------------------------------------------------------------


async def drained_at(world: World, name: str, **fields: Any) -> tuple[bool, float]:
    await trio.sleep(1)
    answer = await order(world, "drain", name, **fields)
    return answer.json()["drained"], trio.current_time()


async def test_a_drain_ends_with_the_last_request(
    autojump_clock: MockClock, two: dict[str, Any]
) -> None:
    async with running_gateway(two) as world:
        for engine in world.engines.values():
            engine.default = taking(5)
        began = trio.current_time()
        *_, (done, at) = await gather(*[partial(ask, world)] * 2, partial(drained_at, world, "a"))
        assert done
        assert at - began == pytest.approx(5.0)
        assert await hosts(world, 2) == {"b": 2}
        assert [line["event"] for line in world.log.lines if line.get("endpoint") == endpoint("a")
                and line["event"] != "request"][-2:] == ["cordoned", "drained"]  # fmt: skip


async def test_a_drain_waits_no_longer_than_it_was_told(
    autojump_clock: MockClock, two: dict[str, Any]
) -> None:
    async with running_gateway(two) as world:
        for engine in world.engines.values():
            engine.default = taking(20)
        began = trio.current_time()
        *answers, (done, at) = await gather(
            *[partial(ask, world)] * 2, partial(drained_at, world, "a", within=3)
        )
        assert not done
        assert at - began == pytest.approx(4.0)
        assert {answer.status for answer in answers} == {200}
        assert world.endpoint("a").cordoned


async def test_a_drain_of_an_idle_endpoint_is_done_at_once(
    autojump_clock: MockClock, two: dict[str, Any]
) -> None:
    async with running_gateway(two) as world:
        began = trio.current_time()
        done, at = await drained_at(world, "a", within=0)

        assert done
        assert at - began == 1.0


async def test_a_drain_ends_when_the_endpoint_is_wanted_again(
    autojump_clock: MockClock, two: dict[str, Any]
) -> None:
    async with running_gateway(two) as world:
        for engine in world.engines.values():
            engine.default = taking(20)

        async def uncordon() -> None:
            await trio.sleep(3)
            await order(world, "uncordon", "a")

        began = trio.current_time()
        *_, (done, at), _ = await gather(
            *[partial(ask, world)] * 2, partial(drained_at, world, "a"), uncordon
        )
        assert not done
        assert at - began == pytest.approx(3.0)


async def test_who_leaves_while_it_drains_leaves_nothing_behind(
    autojump_clock: MockClock, two: dict[str, Any]
) -> None:
    async with running_gateway(two) as world:
        for engine in world.engines.values():
            engine.default = taking(20)

        async def leave() -> None:
            await trio.sleep(1)
            body = {"endpoint": endpoint("a")}
            async with world.client() as client:
                path = "/admin/endpoints/drain"
                await client.send(http_request("POST", path, body, bearer("root")))
                await wait_all_tasks_blocked()
            await trio.sleep(1)
            watchers.append(len(world.endpoint("a").watchers))

        watchers = [len(world.endpoint("a").watchers)]
        await gather(*[partial(ask, world)] * 2, leave)
        assert watchers[0] == watchers[1]
        assert world.endpoint("a").cordoned


# --- who may -------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["cordon", "uncordon", "drain"])
async def test_only_an_admin_key_may(
    autojump_clock: MockClock, two: dict[str, Any], what: str
) -> None:
    body = {"endpoint": endpoint("a")}
    path = f"/admin/endpoints/{what}"
    async with running_gateway(two) as world:
        nobody = await world.send("POST", path, body)
        user = await world.send("POST", path, body, bearer("user"))
        reading = await world.get("/admin/endpoints", bearer("user"))
        by_metrics = await by_listener_for_metrics(world, path, body)

        assert refused(nobody) == (401, "invalid_api_key")
        assert refused(user) == refused(reading) == (403, "admin_required")
        assert refused(by_metrics) == (401, "invalid_api_key")
        assert not world.endpoint("a").cordoned


async def by_listener_for_metrics(
    world: World,
    path: str,
    body: object,
    headers: Headers = (),
    *,
    client: tuple[str, int] = HERE,
    raw: bytes | None = None,
) -> RawResponse:
    """One request that came in by the second listener."""
    ours, theirs = memory_stream_pair()
    departures = Departures()
    departures.close()
    connection = HttpConnection(
        world.service.serve_monitoring, theirs, ConnectionLimits(), world.service.deadlines,
        departures, world.crashes.append, client=client,
    )  # fmt: skip
    world.nursery.start_soon(connection.run)
    async with RawClient(ours) as raw_client:
        data = orjson.dumps(body) if raw is None else raw
        await raw_client.send(http_request("POST", path, None, headers, body=data))
        return await raw_client.read_response("POST")


JSON: Headers = [("content-type", "application/json")]
LOCAL: Headers = [("host", "127.0.0.1:9090"), *JSON]


@pytest.mark.parametrize(
    ("headers", "client", "status"),
    [
        (LOCAL, HERE, 200),
        ([("host", "localhost"), *JSON], HERE, 200),
        ([("host", "[::1]:9090"), *JSON], ("::1", 1), 200),
        ([("host", "[::1]"), *JSON], ("::1", 1), 200),
        (LOCAL, ("192.0.2.7", 1), 403),
        ([("host", "evil.example:9090"), *JSON], HERE, 403),
        ([("host", "evil.example"), *JSON], HERE, 403),
        ([*LOCAL, ("x-forwarded-for", "192.0.2.7")], HERE, 403),
        ([*LOCAL, ("forwarded", "for=192.0.2.7")], HERE, 403),
        ([("host", "127.0.0.1"), ("content-type", "text/plain")], HERE, 415),
    ],
)
async def test_without_an_admin_key_only_the_machine_itself_may(
    autojump_clock: MockClock, headers: Headers, client: tuple[str, int], status: int
) -> None:
    async with running_gateway(fleet({"m": {}})) as world:
        answer = await by_listener_for_metrics(
            world, "/admin/endpoints/cordon", {"endpoint": endpoint("m")}, headers, client=client
        )

        assert answer.status == status
        assert world.endpoint("m").cordoned is (status == 200)


@pytest.mark.parametrize("keys", [{}, with_keys(user=False)])
async def test_without_an_admin_key_the_api_takes_no_orders(
    autojump_clock: MockClock, keys: dict[str, Any]
) -> None:
    async with running_gateway(fleet({"m": {}}, **keys)) as world:
        answer = await world.send(
            "POST", "/admin/endpoints/cordon", {"endpoint": endpoint("m")}, bearer("user")
        )

        assert refused(answer) == (403, "admin_required")
        assert "admin key" in answer.json()["error"]["message"]
        assert not world.endpoint("m").cordoned


# --- what is no order ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ([], 400, None),
        ({}, 400, "endpoint"),
        ({"endpoint": 1}, 400, "endpoint"),
        ({"endpoint": "nonsense"}, 400, "endpoint"),
        ({"endpoint": "http://elsewhere"}, 404, "endpoint"),
        ({"endpoint": endpoint("a"), "model": "n"}, 404, "endpoint"),
        ({"endpoint": endpoint("a"), "model": 1}, 400, "model"),
        ({"endpoint": endpoint("a"), "within": "soon"}, 400, "within"),
        ({"endpoint": endpoint("a"), "within": True}, 400, "within"),
        ({"endpoint": endpoint("a"), "within": -1}, 400, "within"),
        ({"endpoint": endpoint("a"), "within": 10**9}, 400, "within"),
        ({"endpoint": endpoint("a"), "url": "x"}, 400, "url"),
    ],
)
async def test_a_bad_order_is_refused_and_says_what_is_wrong(
    autojump_clock: MockClock, two: dict[str, Any], body: object, status: int, param: str | None
) -> None:
    async with running_gateway(two) as world:
        answer = await world.send("POST", "/admin/endpoints/drain", body, bearer("root"))

        assert (answer.status, answer.json()["error"]["param"]) == (status, param)
        assert not world.endpoint("a").cordoned


async def test_what_is_not_json_is_refused(autojump_clock: MockClock, two: dict[str, Any]) -> None:
    async with running_gateway(two) as world:
        answer = await world.send_body(b"{", "/admin/endpoints/cordon", [*JSON, *bearer("root")])

        assert refused(answer) == (400, "invalid_request")


@pytest.mark.parametrize("name", ["http://A:8000", "http://a:8000/"])
async def test_a_url_may_be_written_as_in_the_configuration(
    autojump_clock: MockClock, two: dict[str, Any], name: str
) -> None:
    async with running_gateway(two) as world:
        body = {"endpoint": name}
        answer = await world.send("POST", "/admin/endpoints/cordon", body, bearer("root"))

        assert answer.status == 200
        assert world.endpoint("a").cordoned


# --- panic ---------------------------------------------------------------------------------------


async def test_below_the_share_all_endpoints_are_used_and_it_is_said(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(fleet({"m": ["a", "b", "c"]})) as world:
        for name in "bc":
            world.endpoint(name).probed("down", 0.0)
            world.endpoint(name).probed("down", 0.0)
            world.endpoint(name).probed("down", 0.0)
        used = Counter([host(await world.ask("m")) for _ in range(9)])
        health = (await world.get("/health")).json()
        during = await world.metrics()
        await trio.sleep(60)  # the next probes go well
        after = await world.metrics()
        states = [line["state"] for line in world.log.lines if line["event"] == "panic"]

    assert used == {"a": 3, "b": 3, "c": 3}
    assert health["panic"] == ["m"]
    panic = ("citadel_gateway_panic", frozenset({("model", "m")}))
    assert (during[panic], after[panic]) == (1, 0)
    assert [state == "over" for state in states] == [False, True]


async def test_one_model_of_four_that_is_up_is_no_panic(autojump_clock: MockClock) -> None:
    """Other models are no stand-ins whose health would say anything about its own."""
    async with running_gateway(fleet({name: {} for name in "abcd"})) as world:
        for name in "bcd":
            world.endpoint(name).health.healthy = False
        used = Counter([host(await world.ask()) for _ in range(8)])

    assert used == {"a": 8}


# --- measuring -----------------------------------------------------------------------------------


def adapting(**options: Any) -> dict[str, Any]:
    model = {"adaptive_concurrency": True, "max_concurrent": 50, **options}
    return dict(fleet({"m": model}, load_balancer={"queue_timeout": 1000, "queue_size": 1000},
                      performance={"request_timeout_seconds": 1000}))  # fmt: skip


async def test_streams_raise_the_limit_and_those_who_wait_are_called_at_once(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(adapting()) as world:
        world.engines["m"].default = engines.stream_chat(["a", "b"], gap=60.0)
        answers = await gather(*[partial(world.ask, "m", stream=True)] * 30)
        gauges = await world.metrics()

    assert {answer.status for answer in answers} == {200}
    asked_at = [post.received_at for post in world.posts]
    assert sum(at == asked_at[0] for at in asked_at) > 20  # long before the first had ended
    assert 20 < gauge(gauges, "endpoint_limit", "m") <= 50
    assert gauge(gauges, "endpoint_max_concurrent", "m") == 50


async def test_what_another_endpoint_sends_is_not_taken_for_an_answer_of_the_first(
    autojump_clock: MockClock,
) -> None:
    models = {"m": {"endpoints": [{"url": endpoint("a"), "adaptive_concurrency": True},
                                  {"url": endpoint("b")}]}}  # fmt: skip
    async with running_gateway(fleet(models)) as world:
        world.engines["a"].default = engines.status(500)
        world.engines["b"].default = engines.stream_chat(["x"])
        answers = [await world.ask("m", stream=True) for _ in range(6)]
        adaptive = world.endpoint("a").adaptive

    assert {host(answer) for answer in answers} == {"b"}
    assert adaptive is not None
    assert adaptive._at_rest == {}


async def test_whole_answers_raise_it_too(autojump_clock: MockClock) -> None:
    async with running_gateway(adapting()) as world:
        world.engines["m"].default = taking(1)
        for _ in range(4):
            await gather(*[partial(world.ask, "m")] * 20)

    assert world.endpoint("m").limit > 8


@pytest.mark.parametrize("script", [engines.status(429), engines.status(503)])
async def test_a_refusal_lowers_it(autojump_clock: MockClock, script: Script) -> None:
    async with running_gateway(adapting(min_concurrent=2)) as world:
        world.engines["m"].default = taking(1)
        await gather(*[partial(world.ask, "m")] * 60)
        before = world.endpoint("m").limit
        world.engines["m"].scripts.append(script)
        await gather(*[partial(world.ask, "m")] * before)

    assert world.endpoint("m").limit < before


async def test_a_timeout_lowers_it_unless_it_was_the_clients_own(
    autojump_clock: MockClock,
) -> None:
    config = adapting(timeouts={"headers": 5})
    async with running_gateway(config) as world:
        world.engines["m"].default = taking(1)
        for _ in range(3):
            await gather(*[partial(world.ask, "m")] * 30)
        before = world.endpoint("m").limit
        world.engines["m"].default = taking(100)
        hurried = [("x-citadel-timeout", "2")]
        await gather(*[partial(world.ask, "m", hurried)] * before)
        assert world.endpoint("m").limit == before

        await gather(*[partial(world.ask, "m")] * before)
        assert world.endpoint("m").limit < before


async def test_without_it_nothing_is_measured(autojump_clock: MockClock) -> None:
    async with running_gateway(fleet({"m": {"max_concurrent": 7}})) as world:
        await gather(*[partial(world.ask, "m")] * 20)

        assert world.endpoint("m").adaptive is None
        assert world.endpoint("m").limit == 7


# --- slow start ----------------------------------------------------------------------------------


async def test_an_endpoint_that_comes_back_starts_slowly(
    autojump_clock: MockClock, two: dict[str, Any]
) -> None:
    async with running_gateway(two) as world:
        serve = world.engines["a"].serve
        world.net.refuse("a", 8000)
        await trio.sleep(60)
        assert await hosts(world, 10) == {"b": 10}
        world.net.listen("a", 8000, serve)
        await trio.sleep(5.6)  # the longest that a probe of one that is down is away
        assert world.endpoint("a").warmth < 1
        world.endpoint("a").start_slowly(trio.current_time())
        world.endpoint("a").eased()  # from this moment, for exact numbers

        at_first = await hosts(world, 110)
        gauges = await world.metrics()
        await trio.sleep(10)
        later = await hosts(world, 110)
        gone = await world.metrics()

    assert at_first["a"] == pytest.approx(10, abs=2)
    assert later == {"a": 55, "b": 55}
    assert gauge(gauges, "endpoint_slow_start_share", "a") == 0.1
    assert gauge(gauges, "endpoint_limit", "a") == 10
    assert gauge(gone, "endpoint_slow_start_share", "a") == 1


async def test_an_address_that_joins_others_starts_slowly_but_not_the_first(
    autojump_clock: MockClock,
) -> None:
    addresses = {"pool": ["10.0.0.1"]}
    config = fleet({"m": {"endpoint": endpoint("pool"), "resolve": "each"}})
    async with running_gateway(
        config, addresses=addresses, hosts=["10.0.0.1", "10.0.0.2"]
    ) as world:
        (first,) = world.service.balancer.upstreams
        assert first.endpoint.warmth == 1.0
        addresses["pool"].append("10.0.0.2")
        await trio.sleep(10.5)
        _, second = world.service.balancer.upstreams

        assert second.endpoint.warmth < 1.0
        assert first.endpoint.warmth == 1.0


async def test_the_last_one_that_comes_back_is_not_held_up(autojump_clock: MockClock) -> None:
    config = fleet({"m": {"max_concurrent": 40}}, performance={"max_concurrent_requests": 1000})
    async with running_gateway(config) as world:
        one = world.endpoint("m")
        for _ in range(3):
            one.probed("down", trio.current_time())
        one.probed(None, trio.current_time())
        world.engines["m"].default = taking(1)
        began = trio.current_time()
        answers = await gather(*[partial(world.ask, "m")] * 40)

        assert {answer.status for answer in answers} == {200}
        assert trio.current_time() - began == pytest.approx(1.0, abs=0.01)


def well_again(world: World) -> None:
    [checker] = [c for c in world.service.watch.checkers if c.endpoint is world.endpoint("back")]
    checker.learn("down", healthy=False)
    checker.learn(None, healthy=True)


def wanted_again(world: World) -> None:
    world.service.operations.cordon(Order(endpoint("back")))
    world.service.operations.uncordon(Order(endpoint("back")))


@pytest.mark.parametrize("come_back", [well_again, wanted_again])
async def test_who_waits_for_one_that_warms_up_is_served_as_it_does(
    autojump_clock: MockClock, come_back: Callable[[World], None]
) -> None:
    models = {"m": {"endpoints": [{"url": endpoint("warm"), "max_concurrent": 1},
                                  {"url": endpoint("back"), "max_concurrent": 10}]}}  # fmt: skip
    config = fleet(models, load_balancer={"queue_timeout": 60},
                   performance={"request_timeout_seconds": 60})  # fmt: skip
    async with running_gateway(config) as world:
        for engine in world.engines.values():
            engine.default = taking(25)
        await trio.sleep(0.4)  # between two looks at what else is to be done
        come_back(world)
        began = trio.current_time()

        async def timed() -> float:
            assert (await world.ask("m")).status == 200
            return trio.current_time() - began - 25

        waits = await gather(*[timed] * 11)

    due = [0.0, 0.0, *[float(step) for step in range(2, 11)]]
    assert sorted(waits) == pytest.approx(due)


async def test_who_waits_elsewhere_has_some_of_the_room_that_one_in_a_hurry_makes(
    autojump_clock: MockClock,
) -> None:
    models = {"m": {"max_concurrent": 10}, "n": {"max_concurrent": 1}}
    config = fleet(models, performance={"request_timeout_seconds": 60})
    async with running_gateway(config) as world:
        world.engines["m"].default = world.engines["n"].default = taking(25)
        await trio.sleep(0.4)  # between two looks at what else is to be done
        world.endpoint("m").start_slowly(trio.current_time())
        world.endpoint("m").eased()
        async with trio.open_nursery() as nursery:
            for model in ["m", "n", "auto", "m"]:
                nursery.start_soon(world.ask, model)
                await trio.sleep(0.1)
            began = [post.received_at for post in world.engines["m"].posts]
            nursery.cancel_scope.cancel()

    first, in_a_hurry, waited = began
    assert in_a_hurry - first == pytest.approx(0.3)
    assert waited == in_a_hurry
