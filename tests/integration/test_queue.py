"""The queue as clients see it: whose turn it is, who is refused, and what they are told."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import orjson
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from citadel_gateway.app.group import Group
from citadel_gateway.policy.priority import NAMES
from tests.support import scripted_engine as engines
from tests.support.gateway import CHAT, World, chat, fleet, gather, running_gateway
from tests.support.ledger import total
from tests.support.raw_client import RawResponse, http_request
from tests.support.scripted_engine import Script

Headers = list[tuple[str, str]]


def key(name: str) -> Headers:
    return [("authorization", f"Bearer {name}")]


def keys(**options: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that are called what they are."""
    return {
        "api_keys": [
            {"id": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), **more}
            for name, more in options.items()
        ]
    }


def taking(seconds: float, usage: tuple[int, int] = (1, 1)) -> Script:
    """A good answer after a while."""
    return Script([engines.sleep(seconds), *engines.whole_chat("ok", usage).steps])


def streaming(seconds: float) -> Script:
    """The same as a stream; most of the time is before its first token."""
    return Script([engines.sleep(seconds), *engines.stream_chat(["o", "k"]).steps])


def told(response: RawResponse) -> tuple[int, str, float]:
    """Status and code of a refusal, and when to come again, in seconds."""
    code = response.json()["error"]["code"]
    return response.status, code, int(response.header("retry-after-ms") or 0) / 1000


async def at(when: float, call: Callable[[], Awaitable[Any]]) -> Any:
    await trio.sleep_until(when)
    return await call()


def order(world: World) -> list[str]:
    """The names of requests in the order in which engines got them."""
    posts = sorted(world.posts, key=lambda post: post.received_at)
    return [str(post.request_id) for post in posts]


def named(name: str) -> Headers:
    return [("x-request-id", name)]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_one_keys_flood_costs_another_key_one_service_time_at_most(
    autojump_clock: MockClock, stream: bool
) -> None:
    async def p95(times: int) -> float:
        config = fleet({"m": {"max_concurrent": 4}}, security=keys(calm={}, loud={}))
        async with running_gateway(config) as world:
            world.engines["m"].default = streaming(1) if stream else taking(1)
            calls, rng, began = [], random.Random(5), trio.current_time()
            for name, rate in (("calm", 0.5), ("loud", 0.5 * times)):
                when = rng.expovariate(rate)
                while when < 60:
                    ask = partial(world.ask, "m", key(name), stream=stream)
                    calls.append(partial(at, began + when, ask))
                    when += rng.expovariate(rate)
            answers = await gather(*calls)
            await wait_all_tasks_blocked()
            assert len(answers) == len(world.access_log)
            calm = [line for line in world.access_log if line["key_id"] == "calm"]
            assert {line["status"] for line in calm} == {200}
            assert world.engines["m"].max_in_flight <= 4
            waits = sorted(line.get("queue_ms", 0) / 1000 for line in calm)
        return float(waits[int(0.95 * len(waits))])

    assert await p95(20) - await p95(1) <= 1.0


async def test_keys_share_by_weight_what_their_requests_really_use(
    autojump_clock: MockClock,
) -> None:
    """One gets long answers to its requests, the other short ones; the estimate is the same."""
    config = fleet(
        {"m": {"max_concurrent": 2}},
        security=keys(long={"weight": 2}, short={}),
        load_balancer={"queue_timeout": 1000, "queue_size": 1000},
        performance={"request_timeout_seconds": 1000},
    )
    usage = {"long": (10, 300), "short": (10, 30)}

    async def ask_for_ever(name: str) -> None:
        while True:
            await world.ask("m", [*key(name), *named(name)], stream=False)

    async with running_gateway(config) as world:
        world.engines["m"].default = lambda post: taking(1, usage[str(post.request_id)])
        with trio.move_on_after(400.5):
            await gather(*[partial(ask_for_ever, name) for name in 6 * ["long", "short"]])
        await trio.sleep(5)
        counts = {n: sum(p.request_id == n for p in world.posts) for n in usage}
    tokens = {name: counts[name] * (use[0] + 2 * use[1]) for name, use in usage.items()}

    assert tokens["long"] / tokens["short"] == pytest.approx(2, rel=0.1)
    assert sum(counts.values()) == pytest.approx(800, abs=20)


async def test_a_header_lowers_the_class_and_never_raises_it(autojump_clock: MockClock) -> None:
    config = fleet(
        {"m": {"max_concurrent": 1}},
        security=keys(
            chat={"max_priority": "interactive"}, other={}, plain={}, batch={"max_priority": "bulk"}
        ),
        load_balancer={"lower_priority_share": 0},
    )
    asked = {
        "batch": ("batch", "system"),
        "plain": ("plain", "interactive"),
        "lowered": ("chat", "Bulk"),
        "unknown": ("chat", "urgent"),
        "chat": ("chat", None),
    }
    async with running_gateway(config) as world:
        world.engines["m"].default = taking(1)

        async def ask(name: str) -> None:
            await trio.sleep((1 + [*asked].index(name)) / 100)
            who, priority = asked[name]
            header = [] if priority is None else [("x-citadel-priority", priority)]
            await world.ask("m", [*key(who), *named(name), *header])

        first = partial(world.ask, "m", [*key("other"), *named("first")])
        await gather(first, *[partial(ask, name) for name in asked])
        lines = {line["request_id"]: line for line in world.access_log}
        metrics = await world.metrics()

    assert order(world) == ["first", "chat", "plain", "unknown", "batch", "lowered"]
    assert lines["lowered"]["priority"] == "bulk"
    waits = "citadel_gateway_queue_wait_seconds_count"
    assert total(metrics, waits, model="m", priority="bulk") == 2
    assert total(metrics, waits, model="m", priority="default") == 2
    assert total(metrics, waits, model="m", priority="interactive") == 1


async def test_without_keys_turns_are_by_address_and_the_class_can_be_lowered(
    autojump_clock: MockClock,
) -> None:
    config = fleet({"m": {"max_concurrent": 1}}, security={"trusted_proxies": ["192.0.2.0/24"]})
    people = {"a1": "198.51.100.1", "a2": "198.51.100.1", "a3": "198.51.100.1", "b": "198.51.100.2"}
    async with running_gateway(config) as world:
        world.engines["m"].default = taking(1)

        async def ask(name: str, *more: tuple[str, str]) -> None:
            await trio.sleep((1 + [*people].index(name)) / 100)
            await world.ask("m", [*named(name), ("x-forwarded-for", people[name]), *more])

        await gather(
            partial(world.ask, "m", named("first")),
            partial(ask, "a1", ("x-citadel-priority", "bulk")),
            *[partial(ask, name) for name in ("a2", "a3", "b")],
        )

    assert order(world) == ["first", "a2", "b", "a3", "a1"]


async def warm_up(world: World, times: int = 5) -> None:
    """Let the gateway see how long requests take."""
    for _ in range(times):
        await world.ask("m", key("a"))


async def test_who_would_wait_in_vain_is_told_at_once_and_when_to_come_again(
    autojump_clock: MockClock,
) -> None:
    config = fleet({"m": {"max_concurrent": 1}}, security=keys(a={}, b={}))
    async with running_gateway(config) as world:
        world.engines["m"].default = taking(2)
        await warm_up(world)
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(world.ask, "m", key("a"))
            await wait_all_tasks_blocked()
            began = trio.current_time()
            refused = await world.ask("m", key("a"))
            assert trio.current_time() == began
            other = await world.ask("m", key("b"))  # its turn is near
            waited = world.access_log[-1]["queue_ms"] / 1000

        status, code, again = told(refused)
        assert (status, code) == (503, "queue_timeout")
        assert "about 11.0 s" in refused.json()["error"]["message"]
        assert again == pytest.approx(2.0)
        assert (other.status, waited) == (200, 2.0)

        async with trio.open_nursery() as nursery:  # it was true
            for _ in range(6):
                nursery.start_soon(world.ask, "m", key("a"))
            await wait_all_tasks_blocked()
            await trio.sleep(again - 0.1)
            assert told(await world.ask("m", key("a")))[:2] == (503, "queue_timeout")
            await trio.sleep(0.2)
            assert (await world.ask("m", key("a"))).status == 200
        metrics = await world.metrics()

    assert total(metrics, "citadel_gateway_queue_refusals_total", model="m", reason="too_long") == 2


async def test_a_deadline_of_its_own_makes_a_request_hopeless_sooner(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(fleet({"m": {"max_concurrent": 1}})) as world:
        world.engines["m"].default = taking(2)
        await warm_up(world)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.ask, "m")
            await wait_all_tasks_blocked()
            began = trio.current_time()
            hasty = await world.ask("m", [("x-citadel-timeout", "0.9")])
            at_once = trio.current_time() - began
            patient = await world.ask("m", [("x-citadel-timeout", "5")])

    assert (told(hasty)[:2], at_once) == ((503, "queue_timeout"), 0)
    assert patient.status == 200


async def test_a_full_queue_makes_room_for_a_key_with_fewer_waiting(
    autojump_clock: MockClock,
) -> None:
    config = fleet(
        {"m": {"max_concurrent": 1}}, security=keys(a={}, b={}), load_balancer={"queue_size": 3}
    )
    async with running_gateway(config) as world:
        world.engines["m"].default = taking(1)

        async def ask(who: str, name: str, when: float) -> RawResponse:
            await trio.sleep(when)
            return await world.ask("m", [*key(who), *named(name)])

        calls = [partial(ask, "a", f"a{n}", n / 100) for n in range(6)]
        *flood, light = await gather(*calls, partial(ask, "b", "b", 0.5))
        metrics = await world.metrics()

    assert [answer.status for answer in flood] == [200, 200, 200, 503, 503, 503]
    assert light.status == 200
    assert order(world) == ["a0", "b", "a1", "a2"]
    for answer in flood[3:]:
        assert told(answer) == (503, "queue_full", 1.0)
    refusals = partial(total, metrics, "citadel_gateway_queue_refusals_total", model="m")
    assert (refusals(reason="displaced"), refusals(reason="full")) == (1, 2)
    assert total(metrics, "citadel_gateway_queue_depth") == 0


async def test_a_hopeless_request_is_refused_before_its_body_is_there(
    autojump_clock: MockClock,
) -> None:
    """Only where its model is known beforehand, though: there is but one."""
    answered = []
    for models in (["m"], ["m", "n"]):
        config = fleet(
            {name: {"max_concurrent": 1} for name in models},
            security=keys(a={}, b={"allowed_models": ["m"]}, c={}),
            load_balancer={"queue_size": 1},
        )
        async with running_gateway(config) as world:
            world.engines["m"].default = taking(5)
            async with trio.open_nursery() as nursery:
                for _ in range(2):
                    nursery.start_soon(world.ask, "m", key("a"))
                await wait_all_tasks_blocked()
                for name in ("b", "c"):
                    async with world.client() as client:
                        body = orjson.dumps(chat("m"))
                        whole = http_request("POST", CHAT, None, key(name), body=body)
                        await client.send(whole.removesuffix(body))
                        await wait_all_tasks_blocked()
                        early = len(world.access_log)
                        answered.append(early)
                        if not early:
                            await client.send(body)
                        response = await client.read_response("POST")
                        assert told(response)[:2] == (503, "queue_full")
                    await wait_all_tasks_blocked()
                    world.log.lines.clear()

    assert answered == [1, 1, 1, 0]


async def test_a_request_that_failed_over_goes_ahead_of_those_that_never_had_a_slot(
    autojump_clock: MockClock,
) -> None:
    models = {"m": {"endpoints": [{"url": "http://bad:8000"}, {"url": "http://good:8000"}],
                    "max_concurrent": 1}}  # fmt: skip
    async with running_gateway(fleet(models)) as world:
        world.engines["bad"].default = Script([engines.sleep(1), *engines.status(500).steps])
        world.engines["good"].default = taking(2)

        async def ask(name: str, when: float) -> RawResponse:
            await trio.sleep(when)
            return await world.ask("m", named(name))

        answers = await gather(
            partial(ask, "first", 0), partial(ask, "second", 0.1), partial(ask, "new", 0.2)
        )

    assert answers[0].status == answers[1].status == 200
    good = [post.request_id for post in world.engines["good"].posts]
    failed = world.engines["bad"].posts[0].request_id
    assert good[1] == failed


async def test_a_fallbacks_queue_is_bounded_too(autojump_clock: MockClock) -> None:
    config = fleet(
        {"m": {"fallbacks": ["n"]}, "n": {"max_concurrent": 1}}, load_balancer={"queue_size": 2}
    )
    async with running_gateway(config) as world:
        world.endpoint("m").health.healthy = False
        world.engines["n"].default = taking(1)
        answers = await gather(*[partial(world.ask, "m")] * 10)

    assert sorted(answer.status for answer in answers) == 3 * [200] + 7 * [503]
    assert {told(a)[1] for a in answers if a.status == 503} == {"queue_full"}


async def test_those_who_ask_for_any_model_stand_in_the_same_queue_if_there_is_but_one(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(fleet({"m": {"max_concurrent": 1}})) as world:
        world.engines["m"].default = taking(1)

        async def ask(number: int) -> RawResponse:
            await trio.sleep(number / 100)
            return await world.ask((None, "m")[number % 2], named(f"r{number}"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(gather, *[partial(ask, n) for n in range(6)])
            await trio.sleep(0.5)
            metrics = await world.metrics()

    assert order(world) == [f"r{n}" for n in range(6)]
    depths = {name: total(metrics, "citadel_gateway_queue_depth", model="m", priority=name)
              for name in NAMES}  # fmt: skip
    assert depths == {"system": 0, "interactive": 0, "default": 5, "bulk": 0}


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_clients_do_nothing_is_lost_and_no_slot_is_idle(
    autojump_clock: MockClock, seed: int
) -> None:
    """Clients of several keys and classes come, wait, leave at random, and engines fail."""
    rng = random.Random(seed)
    config = fleet(
        {"m": {"endpoints": [{"url": "http://a:8000"}, {"url": "http://b:8000"}],
               "max_concurrent": 2, "fallbacks": ["n"]}, "n": {"max_concurrent": 1}},
        security=keys(x={}, y={"weight": 3}, z={"max_priority": "system"}),
        load_balancer={"queue_size": 8, "queue_timeout": 4},
        performance={"max_concurrent_requests": 4},
    )  # fmt: skip

    def behave(post: engines.LedgerEntry) -> Script:
        if rng.random() < 0.1:
            return Script([engines.sleep(rng.random()), *engines.status(500).steps])
        return taking(rng.uniform(0.1, 1.5), (rng.randint(1, 50), rng.randint(1, 50)))

    async def visit() -> None:
        await trio.sleep(rng.uniform(0, 60))
        headers = [*key(rng.choice("xyz")), ("x-citadel-priority", rng.choice(NAMES))]
        with trio.move_on_after(rng.choice([0.3, 2.0, 1000.0])):
            async with world.client() as client:
                body = chat(rng.choice(["m", "n", None]), stream=rng.random() < 0.5)
                await client.request("POST", CHAT, body, headers)

    async with running_gateway(config, seed=seed) as world:  # at its end everything is given back
        waitroom = world.service.admission.waitroom
        for engine in world.engines.values():
            engine.default = behave
        async with trio.open_nursery() as nursery:
            for _ in range(400):
                nursery.start_soon(visit)
            for _ in range(700):
                await trio.sleep(0.1)
                await wait_all_tasks_blocked()
                assert waitroom.taken <= 4
                for group in waitroom._lines:
                    if waitroom.taken < 4 and isinstance(group, Group):  # not after a failure
                        now, endpoints = trio.current_time(), group.upstreams
                        assert not any(e.is_available(now) and e.has_room() for e in endpoints)
        metrics = await world.metrics()

    assert len(world.access_log) == 400
    assert total(metrics, "citadel_gateway_requests_total") == 400
    assert {line["outcome"] for line in world.access_log} >= {"ok", "client_closed"}
