"""What happens between two attempts: pauses, and waiting for an endpoint that asked for time."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
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
    words,
)
from tests.support.ledger import total
from tests.support.raw_client import RawResponse, http_request
from tests.support.scripted_engine import Script

STATUS = [429, 503]
JITTER = 0.05  # seconds at most, before an endpoint is asked for the second time


def refusal(status: int = 429, retry_after: float | str = 2) -> Script:
    return engines.status(status, b"", [("retry-after", str(retry_after))])


def config(*hosts: str, own: dict[str, Any] | None = None, **options: Any) -> Any:
    model = {"endpoints": [{"url": endpoint(host)} for host in hosts], **(own or {})}
    return fleet({"m": model}, load_balancer={"retry_budget_floor": 1000, **options})


async def timed(world: World, **fields: Any) -> tuple[RawResponse, float]:
    began = trio.current_time()
    response = await world.ask("m", **fields)
    return response, trio.current_time() - began


def draws(world: World, number: float) -> None:
    """Let every pause be that part of its bound."""
    world.service.generation.orchestrator.retrying.draw = lambda: number


def failing(world: World) -> None:
    for engine in world.engines.values():
        engine.default = engines.status(408)


# --- back-off --------------------------------------------------------------------------------


async def test_the_second_endpoint_is_asked_at_once_and_the_others_after_growing_pauses(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(config("a", "b", "c", "d", max_attempts=9)) as world:
        draws(world, 1.0)
        failing(world)
        response, took = await timed(world)
        asked = [post.received_at for post in world.posts]

    assert response.header("x-citadel-attempts") == "4"
    gaps = [later - earlier for earlier, later in pairwise(asked)]
    assert gaps == pytest.approx([0.0, 0.1, 0.2], abs=1e-9)
    assert took == pytest.approx(0.3, abs=1e-9)


async def test_a_pause_holds_no_slot_no_seat_and_no_permit(autojump_clock: MockClock) -> None:
    async with running_gateway(config("a", "b", "c")) as world, trio.open_nursery() as nursery:
        draws(world, 1.0)
        failing(world)
        nursery.start_soon(world.ask, "m")
        await trio.sleep(0.05)

        assert len(world.posts) == 2
        world.assert_at_rest()


async def test_a_pause_is_neither_overhead_of_ours_nor_time_in_the_queue(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(config("a", "b", "c")) as world:
        draws(world, 1.0)
        failing(world)
        await world.ask("m")
        metrics = await world.metrics()

    assert total(metrics, "citadel_gateway_overhead_seconds_sum") == pytest.approx(0, abs=1e-6)
    assert total(metrics, "citadel_gateway_queue_wait_seconds_count") == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_the_pause(autojump_clock: MockClock, stream: bool) -> None:
    async with running_gateway(config("a", "b", "c")) as world:
        draws(world, 1.0)
        failing(world)
        async with world.client() as client:
            await client.send(http_request("POST", CHAT, chat("m", stream=stream)))
            await trio.sleep(0.05)
        await wait_all_tasks_blocked()

        assert trio.current_time() == pytest.approx(0.05)
        world.assert_at_rest()
        (line,) = world.access_log
        assert (line["outcome"], line["phase"]) == ("client_closed", "backing_off")
        await trio.sleep(10)
        assert len(world.posts) == 2


async def test_a_pause_is_no_longer_than_the_request_has(autojump_clock: MockClock) -> None:
    async with running_gateway(config("a", "b", "c")) as world:
        draws(world, 0.5)
        failing(world)
        began = trio.current_time()
        response = await world.send("POST", CHAT, chat("m"), [("x-citadel-timeout", "0.04")])
        took = trio.current_time() - began

    assert response.status == 408
    assert took == pytest.approx(0.02, abs=1e-9)  # half of what it had
    assert len(world.posts) == 3


async def test_who_pauses_comes_before_those_who_came_later(autojump_clock: MockClock) -> None:
    """It has not left the queue: its age stays."""
    own = {"max_concurrent": 1}
    async with running_gateway(config("a", "b", "c", own=own)) as world:
        draws(world, 1.0)
        failing(world)
        world.engines["c"].default = engines.whole_chat("ok")
        for host in ("c",):
            world.engines[host].scripts.append(
                Script([engines.sleep(1), *engines.whole_chat("first").steps])
            )
        answered: list[str] = []

        async def ask(name: str, wait: float, host: str | None = None) -> None:
            await trio.sleep(wait)
            await world.send("POST", CHAT, chat("m"), [("x-request-id", name)])
            answered.append(name)

        for host in "a", "b":
            world.endpoint(host).cordon()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "holds c", 0.0)
            await trio.sleep(0.01)
            for host in "a", "b":
                world.endpoint(host).uncordon(trio.current_time())
            nursery.start_soon(ask, "pauses", 0.0)
            await trio.sleep(0.05)
            for host in "a", "b":
                world.endpoint(host).cordon()
            nursery.start_soon(ask, "comes later", 0.0)

    assert answered == ["holds c", "pauses", "comes later"]


async def test_a_broken_stream_s_client_hears_that_we_are_there_during_a_pause(
    autojump_clock: MockClock,
) -> None:
    """The third attempt at a stream of which the client has some already."""
    options = config("a", "b", "c", own={"engine": "vllm"})
    options["streaming"] = {"keep_alive": 0.03}
    async with running_gateway(options) as world:
        draws(world, 1.0)
        world.engines["a"].default = engines.cut_after(3)
        world.engines["b"].default = engines.status(408)
        world.engines["c"].default = engines.stream_chat(["end"])
        response, took = await timed(world, stream=True)

    assert took == pytest.approx(0.1, abs=0.06)
    assert response.body.count(b": keep-alive") == 3
    assert response.complete


# --- one that asked for time -----------------------------------------------------------------


@pytest.mark.parametrize("status", STATUS)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_lone_endpoint_that_asks_for_time_is_asked_again_when_it_is_over(
    autojump_clock: MockClock, status: int, stream: bool
) -> None:
    async with running_gateway(config("a")) as world:
        world.engines["a"].scripts.append(refusal(status, 2))
        response, took = await timed(world, stream=stream)

    assert response.status == 200
    assert 2 <= took <= 2 + JITTER
    assert response.header("x-citadel-attempts") == "2"
    assert words(response) if stream else response.json()["choices"]


@pytest.mark.parametrize("status", STATUS)
@pytest.mark.parametrize("after", ["30", "45", "1e9"])
async def test_a_time_that_ends_too_late_is_passed_on_at_once(
    autojump_clock: MockClock, status: int, after: str
) -> None:
    async with running_gateway(config("a")) as world:
        world.engines["a"].default = refusal(status, after)
        response, took = await timed(world)

    assert (response.status, took) == (status, 0)
    assert response.header("retry-after") == str(int(min(60, float(after))))
    assert response.header("x-should-retry") is None
    assert len(world.posts) == 1


async def test_a_minute_is_too_long_however_much_time_the_request_has(
    autojump_clock: MockClock,
) -> None:
    """Longer ones are capped, so that nobody knows when it would be worth asking."""
    patient = {**config("a"), "performance": {"request_timeout_seconds": 600}}
    async with running_gateway(patient) as world:
        world.engines["a"].scripts.append(refusal(429, 3600))
        refused, at_once = await timed(world)
        await trio.sleep(60)
        world.engines["a"].scripts.append(refusal(429, 59))
        answered, later = await timed(world)

    assert (refused.status, at_once) == (429, 0)
    assert answered.status == 200
    assert 59 <= later <= 59 + JITTER


async def test_the_time_that_a_client_has_named_is_too_short_to_wait(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(config("a")) as world:
        world.engines["a"].default = refusal(429, 2)
        began = trio.current_time()
        response = await world.send("POST", CHAT, chat("m"), [("x-citadel-timeout", "1.5")])
        took = trio.current_time() - began

    assert (response.status, took) == (429, 0)


async def test_it_is_asked_no_more_often_than_max_attempts(autojump_clock: MockClock) -> None:
    async with running_gateway(config("a", max_attempts=3)) as world:
        world.engines["a"].default = refusal(429, 2)
        response, took = await timed(world)

    assert (response.status, response.header("retry-after")) == (429, "2")
    assert len(world.posts) == 3
    assert 4 <= took <= 4 + 3 * JITTER


async def test_waiting_costs_a_retry_of_the_budget(autojump_clock: MockClock) -> None:
    async with running_gateway(config("a")) as world:
        budget = world.service.generation.orchestrator.retrying.budget
        budget.ratio = budget.floor = 0.0
        world.engines["a"].default = refusal(429, 2)
        response, took = await timed(world)

    assert (response.status, took) == (429, 0)
    assert response.header("x-should-retry") == "false"


async def test_503_without_a_time_is_not_waited_for(autojump_clock: MockClock) -> None:
    async with running_gateway(config("a")) as world:
        world.engines["a"].default = engines.status(503)
        response, took = await timed(world)

    assert (response.status, took) == (503, 0)


async def test_another_endpoint_or_a_fallback_goes_before_waiting(
    autojump_clock: MockClock,
) -> None:
    models: dict[str, dict[str, Any]] = {
        "m": {"endpoints": [{"url": endpoint("a")}, {"url": endpoint("b")}], "fallbacks": ["f"]},
        "f": {"endpoint": endpoint("f")},
    }
    async with running_gateway(fleet(models)) as world:
        for host in "a", "b":
            world.engines[host].default = refusal(429, 2)
        response, _ = await timed(world)

    assert response.header("x-citadel-model") == "f"
    assert len(world.posts) == 3


async def test_of_two_that_ask_for_time_the_one_that_is_ready_first_is_asked(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(config("a", "b")) as world:
        world.engines["a"].default = refusal(429, 9)
        world.engines["b"].scripts.append(refusal(429, 3))
        response, took = await timed(world)

    assert response.status == 200
    assert response.header("x-citadel-backend") == endpoint("b")
    assert 3 <= took <= 3 + 2 * JITTER


@pytest.mark.parametrize(
    ("busy_for", "refusals", "answers", "after", "attempts"),
    [(9, 1, "a", 2, 2), (1, 1, "b", 1, 2), (7, 9, "b", 7, 3)],
    ids=["rests for less", "is busy for less", "asks for time again"],
)
async def test_who_was_refused_while_all_others_are_full_has_who_is_ready_first(
    autojump_clock: MockClock,
    busy_for: float,
    refusals: int,
    answers: str,
    after: float,
    attempts: int,
) -> None:
    async with running_gateway(config("a", "b", own={"max_concurrent": 1})) as world:
        world.endpoint("a").cool_down(0.1, trio.current_time())
        world.engines["a"].scripts.extend([refusal(429, 2)] * refusals)
        world.engines["b"].scripts.append(
            Script([engines.sleep(busy_for + 0.2), *engines.whole_chat("ok").steps])
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.ask, "m")  # to b
            await trio.sleep(0.2)
            response, took = await timed(world)

    assert response.status == 200
    assert response.header("x-citadel-backend") == endpoint(answers)
    assert response.header("x-citadel-attempts") == str(attempts)
    assert took == pytest.approx(after, abs=2 * JITTER)


async def test_an_endpoint_that_asks_for_more_time_meanwhile_gets_it(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(config("a")) as world, trio.open_nursery() as nursery:
        world.engines["a"].scripts.append(refusal(429, 2))
        nursery.start_soon(world.ask, "m")
        await trio.sleep(1)
        world.endpoint("a").cool_down(5, trio.current_time())
        await trio.sleep(4.9)
        assert len(world.posts) == 1
        await trio.sleep(0.2)
        assert len(world.posts) == 2


async def test_if_that_is_too_long_the_client_is_told_the_time_that_is_true_now(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(config("a")) as world, trio.open_nursery() as nursery:
        world.engines["a"].scripts.append(refusal(429, 2))
        responses: list[RawResponse] = []

        async def ask() -> None:
            responses.append(await world.ask("m"))

        draws(world, 0.0)
        nursery.start_soon(ask)
        await trio.sleep(1)
        world.endpoint("a").cool_down(50, trio.current_time())
        await trio.sleep(1.1)

    (response,) = responses
    assert (response.status, response.header("retry-after-ms")) == (429, "49000")


async def test_waiting_for_it_holds_nothing_and_ends_when_the_client_leaves(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(config("a")) as world:
        world.engines["a"].default = refusal(429, 20)
        async with world.client() as client:
            await client.send(http_request("POST", CHAT, chat("m")))
            await trio.sleep(5)
            world.assert_at_rest()
        await wait_all_tasks_blocked()

        assert trio.current_time() == 5
        (line,) = world.access_log
        assert (line["outcome"], line["phase"]) == ("client_closed", "backing_off")


async def test_many_that_were_refused_together_do_not_come_back_together(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(config("a")) as world:
        world.engines["a"].scripts.extend(
            [Script([engines.sleep(0.1), *refusal(429, 2).steps])] * 8
        )
        answers = await gather(*[partial(world.ask, "m")] * 8)
        came_back = sorted(post.received_at for post in world.posts)[8:]

    assert {answer.status for answer in answers} == {200}
    assert len(set(came_back)) == 8


@pytest.mark.parametrize("stream", [False, True])
async def test_whoever_waits_for_an_endpoint_is_called_when_its_time_is_over(
    autojump_clock: MockClock, stream: bool
) -> None:
    """Two endpoints: one is busy, the other one has asked for time, and a third request waits."""
    async with running_gateway(config("a", "b", own={"max_concurrent": 1})) as world:
        world.engines["a"].default = Script([engines.sleep(8), *engines.whole_chat("late").steps])
        world.engines["b"].scripts.append(refusal(429, 2.3))
        world.engines["b"].default = (
            engines.stream_chat(["ok"]) if stream else (engines.whole_chat("ok"))
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.ask, "m")
            await trio.sleep(0.1)
            nursery.start_soon(world.ask, "m")  # refused by b, and waits for a
            await trio.sleep(0.1)
            began = trio.current_time()
            response = await world.ask("m", stream=stream)
            took = trio.current_time() - began
            nursery.cancel_scope.cancel()

    assert response.header("x-citadel-backend") == endpoint("b")
    assert took == pytest.approx(2.2, abs=1e-6)
    if stream:
        assert events(response)[-1] == "[DONE]"
