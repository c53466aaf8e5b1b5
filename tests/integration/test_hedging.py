"""Streams whose first token is late: who is asked beside the first, who answers, who is let go."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from citadel_gateway.app.service import UnifiedAPIGatewayService
from citadel_gateway.config.loader import parse
from citadel_gateway.policy.circuit_breaker import State
from tests.support import scripted_engine as engines
from tests.support.canonical_engine import Canonical, stream
from tests.support.gateway import (
    CHAT,
    CapturedLog,
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
from tests.support.raw_client import RawClient, RawResponse, http_request
from tests.support.scripted_engine import (
    LedgerEntry,
    Script,
    ScriptedEngine,
    close,
    hang,
    serve_tcp,
    sleep,
)

AFTER = 0.5
TOKENS = ("The", " sea", " was", " calm", ".")


def hedged(*hosts: str, **sections: Any) -> dict[str, Any]:
    """One model on *hosts*, the first of which is asked first."""
    options = {"hedge": True, "hedge_after": AFTER, **sections.pop("model", {})}
    model = {"endpoints": [{"url": endpoint(host)} for host in hosts], **options}
    balancing = {"retry_budget_floor": 100, **sections.pop("load_balancer", {})}
    made: dict[str, Any] = fleet({"m": model}, load_balancer=balancing, **sections)
    return made


def says(text: str, after: float) -> Script:
    return Script([sleep(after), *engines.stream_chat([text, "."], gap=1.0).steps])


def refuses(code: int, after: float = 0.0) -> Script:
    return Script([sleep(after), *engines.status(code, b"{}").steps])


def host(response: RawResponse) -> str:
    return (response.header("x-citadel-backend") or "").removeprefix("http://").split(":")[0]


async def hedges(world: World) -> dict[str, int]:
    metrics = await world.metrics()
    return {
        dict(labels)["result"]: int(value)
        for (name, labels), value in metrics.items()
        if name == "citadel_gateway_hedges_total"
    }


async def attempts(world: World, name: str) -> dict[str, int]:
    """By result."""
    return {
        dict(labels)["result"]: int(value)
        for (metric, labels), value in (await world.metrics()).items()
        if metric == "citadel_gateway_attempts_total" and dict(labels)["endpoint"] == endpoint(name)
    }


def asked(world: World) -> list[str]:
    """Which engines were asked, in order."""
    found = [(e.received_at, name) for name, engine in world.engines.items() for e in engine.posts]
    return [name for _, name in sorted(found)]


# --- who answers -----------------------------------------------------------------------------


async def test_a_first_token_in_time_needs_no_second_endpoint(autojump_clock: MockClock) -> None:
    async with running_gateway(hedged("a", "b")) as world:
        world.engines["a"].default = says("one", 0.4)
        response = await world.ask("m", stream=True)

        assert (words(response), host(response)) == ("one.", "a")
        assert asked(world) == ["a"]
        assert await hedges(world) == {}
        assert "hedge" not in world.access_log[0]


async def test_the_second_endpoint_is_asked_when_it_is_time_and_answers_if_it_is_first(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(hedged("a", "b")) as world:
        world.engines["a"].default = says("one", 2.0)
        world.engines["b"].default = says("two", 0.3)
        began = trio.current_time()
        response = await world.ask("m", stream=True)

        assert (words(response), host(response)) == ("two.", "b")
        assert events(response)[-1] == "[DONE]"
        assert response.header("x-citadel-attempts") == "2"
        (first,), (second,) = world.engines["a"].posts, world.engines["b"].posts
        assert second.received_at == pytest.approx(began + AFTER)
        assert first.client_left_at == pytest.approx(began + AFTER + 0.3)
        assert (first.ended, second.ended) == ("client_left", "answered")
        assert first.body == second.body
        assert await hedges(world) == {"won": 1}
        assert await attempts(world, "a") == {"lost": 1}
        assert await attempts(world, "b") == {"ok": 1}
        line = world.access_log[0]
        assert (line["endpoint"], line["attempts"], line["hedge"]) == (endpoint("b"), 2, "won")
        assert line["first_byte_ms"] == pytest.approx(800)
        assert line["overhead_ms"] < 1
        assert line["upstream_ms"] == pytest.approx(line["duration_ms"])


async def test_the_second_is_let_go_at_once_when_the_first_answers(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(hedged("a", "b")) as world:
        world.engines["a"].default = says("one", 0.7)
        world.engines["b"].default = Script([hang()])
        began = trio.current_time()
        response = await world.ask("m", stream=True)

        assert (words(response), host(response)) == ("one.", "a")
        assert response.header("x-citadel-attempts") == "2"
        assert world.engines["b"].posts[0].client_left_at == pytest.approx(began + 0.7)
        assert await hedges(world) == {"lost": 1}
        assert await attempts(world, "b") == {"lost": 1}
        assert world.access_log[0]["upstream_ms"] == pytest.approx(1700)


async def test_a_loser_says_nothing_about_its_endpoint(autojump_clock: MockClock) -> None:
    config = hedged("a", "b", load_balancer={"circuit_breaker_threshold": 1})
    async with running_gateway(config) as world:
        world.engines["a"].default = Script([hang()])
        for _ in range(6):
            assert host(await world.ask("m", stream=True)) == "b"

        now = trio.current_time()
        assert world.endpoint("a").breaker.state(now) is State.CLOSED
        assert world.endpoint("a").breaker._window.counts(now) == (0, 0)


async def test_a_loser_is_known_to_be_slow(autojump_clock: MockClock) -> None:
    """Else the fastest of them all would be one that never answers."""
    config = hedged("a", "b", load_balancer={"algorithm": "least_latency"})
    async with running_gateway(config) as world:
        world.engines["a"].default = Script([hang()])
        world.engines["b"].default = says("two", 0.1)
        for _ in range(5):
            await world.ask("m", stream=True)

        assert len(world.engines["a"].posts) == 1


async def test_two_at_the_same_moment_are_one(autojump_clock: MockClock) -> None:
    async with running_gateway(hedged("a", "b"), seed=3) as world:
        world.engines["a"].default = says("x", AFTER + 0.2)
        world.engines["b"].default = says("x", 0.2)
        for _ in range(20):
            response = await world.ask("m", stream=True)
            assert words(response) == "x."

        found = await hedges(world)
        assert found.keys() == {"won", "lost"}


async def test_only_the_first_token_is_raced_for(autojump_clock: MockClock) -> None:
    async with running_gateway(hedged("a", "b")) as world:
        world.engines["a"].default = engines.stream_chat(["one", "."], gap=5.0)

        assert words(await world.ask("m", stream=True)) == "one."
        assert asked(world) == ["a"]


async def test_whole_answers_are_not_hedged(autojump_clock: MockClock) -> None:
    async with running_gateway(hedged("a", "b")) as world:
        world.engines["a"].default = Script([sleep(3), *engines.whole_chat("one").steps])

        assert (await world.ask("m")).json()["choices"][0]["message"]["content"] == "one"
        assert asked(world) == ["a"]


async def test_what_leaves_something_behind_is_not_hedged(autojump_clock: MockClock) -> None:
    async with running_gateway(hedged("a", "b")) as world:
        world.engines["a"].default = says("one", 2.0)

        assert words(await world.ask("m", stream=True, store=True)) == "one."
        assert asked(world) == ["a"]


async def test_a_third_is_never_asked_beside_the_two(autojump_clock: MockClock) -> None:
    async with running_gateway(hedged("a", "b", "c")) as world:
        world.engines["a"].default = says("one", 3.0)
        world.engines["b"].default = says("two", 9.0)

        assert words(await world.ask("m", stream=True)) == "one."
        assert asked(world) == ["a", "b"]


async def test_another_model_is_never_asked_instead(autojump_clock: MockClock) -> None:
    """Neither a fallback, nor another one that a request for `auto` could have had."""
    models: dict[str, dict[str, Any]] = {
        "m": {"endpoint": endpoint("a"), "hedge": True, "hedge_after": AFTER, "fallbacks": ["n"]},
        "n": {"endpoint": endpoint("b")},
    }
    async with running_gateway(fleet(models)) as world:
        world.engines["a"].default = says("one", 2.0)
        assert words(await world.ask("m", stream=True)) == "one."
        assert words(await world.ask("auto", stream=True)) == "one."

        assert asked(world) == ["a", "a"]
        assert await hedges(world) == {"no_room": 1}


# --- who fails -------------------------------------------------------------------------------


async def test_the_second_goes_on_when_the_first_fails(autojump_clock: MockClock) -> None:
    async with running_gateway(hedged("a", "b", "c")) as world:
        world.engines["a"].default = refuses(500, after=0.7)
        world.engines["b"].default = says("two", 1.0)
        response = await world.ask("m", stream=True)

        assert (words(response), host(response)) == ("two.", "b")
        assert response.header("x-citadel-attempts") == "2"
        assert asked(world) == ["a", "b"]
        assert await hedges(world) == {"won": 1}
        assert await attempts(world, "a") == {"upstream_500": 1}
        assert world.endpoint("a").breaker._window.counts(trio.current_time()) == (1, 1)


async def test_the_first_goes_on_when_the_second_fails(autojump_clock: MockClock) -> None:
    async with running_gateway(hedged("a", "b", "c")) as world:
        world.engines["a"].default = says("one", 2.0)
        world.engines["b"].default = refuses(500)
        response = await world.ask("m", stream=True)

        assert (words(response), host(response)) == ("one.", "a")
        assert asked(world) == ["a", "b"]
        assert await hedges(world) == {"failed": 1}
        assert await attempts(world, "b") == {"upstream_500": 1}
        assert world.endpoint("b").breaker._window.counts(trio.current_time()) == (1, 1)


@pytest.mark.parametrize("first_to_fail", [0.6, 1.5], ids=["the first", "the second"])
async def test_when_both_refuse_a_third_is_asked(
    autojump_clock: MockClock, first_to_fail: float
) -> None:
    config = hedged("a", "b", "c", "d", load_balancer={"max_attempts": 5})
    async with running_gateway(config) as world:
        world.engines["a"].default = refuses(503, after=first_to_fail)
        world.engines["b"].default = refuses(503, after=0.5)
        world.engines["c"].default = says("three", 2.0)
        response = await world.ask("m", stream=True)

        assert (words(response), host(response)) == ("three.", "c")
        assert asked(world) == ["a", "b", "c"]
        assert response.header("x-citadel-attempts") == "3"
        assert await hedges(world) == {"failed": 1}


async def test_neither_of_two_that_refuse_is_asked_again(autojump_clock: MockClock) -> None:
    async with running_gateway(hedged("a", "b")) as world:
        world.engines["a"].default = refuses(503, after=0.6)
        world.engines["b"].default = refuses(503, after=0.5)

        assert (await world.ask("m", stream=True)).status == 503
        assert asked(world) == ["a", "b"]


async def test_who_has_refused_is_not_asked_as_the_second(autojump_clock: MockClock) -> None:
    async with running_gateway(hedged("a", "b")) as world:
        world.engines["a"].default = refuses(404)
        world.engines["b"].default = says("two", 2.0)

        assert words(await world.ask("m", stream=True)) == "two."
        assert asked(world) == ["a", "b"]
        assert await hedges(world) == {"no_room": 1}


async def test_of_two_one_of_which_refused_only_the_other_was_executed(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(hedged("a", "b", "c")) as world:
        world.engines["a"].default = refuses(503, after=0.7)
        world.engines["b"].default = refuses(500, after=0.7)
        world.engines["c"].default = says("three", 0.1)

        assert words(await world.ask("m", stream=True)) == "three."
        assert asked(world) == ["a", "b", "c"]


@pytest.mark.parametrize("first_fails_at", [0.7, 3.0], ids=["first", "second"])
async def test_who_asks_to_be_left_alone_is_left_alone(
    autojump_clock: MockClock, first_fails_at: float
) -> None:
    async with running_gateway(hedged("a", "b", "c")) as world:
        world.engines["a"].default = refuses(503, after=first_fails_at)
        busy = engines.status(429, b"{}", [("retry-after", "30")])
        world.engines["b"].default = Script([sleep(0.7), *busy.steps])
        await world.ask("m", stream=True)

        assert world.endpoint("b").available_in(trio.current_time()) > 20
        assert world.endpoint("a").available_in(trio.current_time()) < 2


async def test_what_may_have_been_executed_twice_is_not_sent_a_third_time(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(hedged("a", "b", "c")) as world:
        world.engines["a"].default = Script([sleep(0.7), close()])
        world.engines["b"].default = Script([sleep(0.7), close()])
        response = await world.ask("m", stream=True)

        assert response.status == 502
        assert asked(world) == ["a", "b"]


async def test_after_a_retry_that_may_be_the_second_execution_nothing_is_hedged(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(hedged("a", "b", "c")) as world:
        world.engines["a"].default = refuses(500)
        world.engines["b"].default = says("two", 2.0)

        assert words(await world.ask("m", stream=True)) == "two."
        assert asked(world) == ["a", "b"]


async def test_a_retry_that_is_the_first_execution_may_be_hedged(autojump_clock: MockClock) -> None:
    async with running_gateway(hedged("a", "b", "c")) as world:
        world.engines["a"].default = refuses(503)
        world.engines["b"].default = says("two", 2.0)
        world.engines["c"].default = says("three", 0.1)

        assert words(await world.ask("m", stream=True)) == "three."
        assert asked(world) == ["a", "b", "c"]


async def test_a_hedge_is_one_of_the_attempts_that_are_allowed(autojump_clock: MockClock) -> None:
    config = hedged("a", "b", "c", load_balancer={"max_attempts": 2})
    async with running_gateway(config) as world:
        world.engines["a"].default = refuses(503)
        world.engines["b"].default = says("two", 2.0)

        assert words(await world.ask("m", stream=True)) == "two."
        assert asked(world) == ["a", "b"]


async def test_both_are_bound_by_the_deadline_of_the_request(autojump_clock: MockClock) -> None:
    config = hedged("a", "b", performance={"request_timeout_seconds": 2.0})
    async with running_gateway(config) as world:
        world.engines["a"].default = world.engines["b"].default = Script([hang()])
        began = trio.current_time()
        response = await world.ask("m", stream=True)

        assert response.json()["error"]["code"] == "timeout_first_token"
        assert trio.current_time() - began == pytest.approx(2.0)
        assert [e.posts[0].client_left_at for e in world.engines.values()] == [began + 2.0] * 2


async def test_nobody_is_asked_when_the_deadline_has_come(autojump_clock: MockClock) -> None:
    config = hedged(
        "a", "b", model={"hedge_after": 2.0}, performance={"request_timeout_seconds": 2.0}
    )
    async with running_gateway(config) as world:
        world.engines["a"].default = Script([hang()])
        for _ in range(5):
            await world.ask("m", stream=True)

        assert await hedges(world) == {}
        assert len(world.posts) == 5


async def test_an_engine_that_refuses_our_options_is_asked_without_them(
    autojump_clock: MockClock,
) -> None:
    error = b'{"error": {"message": "stream_options: extra fields not permitted"}}'
    async with running_gateway(hedged("a")) as world:
        world.engines["a"].scripts.append(engines.status(400, error))

        assert words(await world.ask("m", stream=True)) == "ok"


async def test_a_second_that_refuses_our_options_is_remembered(autojump_clock: MockClock) -> None:
    error = b'{"error": {"message": "stream_options: extra fields not permitted"}}'
    async with running_gateway(hedged("a", "b")) as world:
        world.engines["a"].default = says("one", 1.0)
        world.engines["b"].scripts.append(engines.status(400, error))
        assert words(await world.ask("m", stream=True)) == "one."
        world.engines["b"].default = says("two", 0.1)
        await world.ask("m", stream=True)

        assert "stream_options" in world.engines["b"].posts[0].json
        assert "stream_options" not in world.engines["b"].posts[1].json


# --- room, budget, probes --------------------------------------------------------------------


async def test_a_hedge_never_queues(autojump_clock: MockClock) -> None:
    config = hedged("a", "b", model={"max_concurrent": 1})
    async with running_gateway(config) as world:
        world.engines["a"].default = says("one", 2.0)
        world.engines["b"].default = says("two", 0.2)  # and goes on for a second
        await gather(*[partial(world.ask, "m", stream=True)] * 2)

        assert sorted(asked(world)) == ["a", "b"]
        assert await hedges(world) == {"no_room": 1}
        assert {line.get("hedge") for line in world.access_log} == {None, "no_room"}


async def test_a_hedge_takes_a_slot_and_a_seat_of_its_own(autojump_clock: MockClock) -> None:
    config = hedged("a", "b", model={"max_concurrent": 1})
    async with running_gateway(config) as world:
        world.engines["a"].default = Script([hang()])
        world.engines["b"].default = says("two", 1.0)
        waitroom = world.service.admission.waitroom
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(world.ask, "m", stream=True))
            await trio.sleep(AFTER + 0.1)
            assert waitroom.taken == 2
            assert [world.endpoint(name).in_flight for name in "ab"] == [1, 1]
            await trio.sleep(1.0)  # it has lost, the other one goes on
            assert waitroom.taken == 1
            assert [world.endpoint(name).in_flight for name in "ab"] == [0, 1]


async def test_a_hedge_needs_a_seat(autojump_clock: MockClock) -> None:
    config = hedged("a", "b", performance={"max_concurrent_requests": 1})
    async with running_gateway(config) as world:
        world.engines["a"].default = says("one", 2.0)

        assert words(await world.ask("m", stream=True)) == "one."
        assert asked(world) == ["a"]
        assert await hedges(world) == {"no_room": 1}


async def test_the_loser_makes_room_for_who_waits(autojump_clock: MockClock) -> None:
    config = hedged("a", "b", model={"max_concurrent": 1})
    async with running_gateway(config) as world:
        world.engines["a"].scripts.append(Script([hang()]))
        world.engines["b"].default = says("two", 0.3)
        began = trio.current_time()

        async def later() -> RawResponse:
            await trio.sleep(AFTER + 0.1)
            return await world.ask("m", stream=True)

        await gather(partial(world.ask, "m", stream=True), later)

        second = world.engines["a"].posts[1]
        assert second.received_at == pytest.approx(began + AFTER + 0.3)


async def test_hedges_stay_within_the_retry_budget(autojump_clock: MockClock) -> None:
    config = hedged("a", "b", load_balancer={"retry_budget_ratio": 0, "retry_budget_floor": 0.1})
    async with running_gateway(config) as world:
        world.engines["a"].default = says("one", 1.0)
        world.engines["b"].default = says("two", 0.1)
        for _ in range(4):
            await world.ask("m", stream=True)

        assert await hedges(world) == {"won": 1, "no_budget": 3}
        assert world.endpoint("b").in_flight == 0


async def test_a_probe_that_has_lost_gives_its_permit_back(autojump_clock: MockClock) -> None:
    config = hedged(
        "a", "b", load_balancer={"circuit_breaker_threshold": 1, "circuit_breaker_timeout": 2}
    )
    async with running_gateway(config) as world:
        world.engines["b"].scripts.extend([refuses(500), Script([hang()])])
        world.engines["a"].default = says("one", 1.0)
        await world.ask("m", stream=True)  # b refuses to be the second, and its breaker opens
        await trio.sleep(3)
        breaker = world.endpoint("b").breaker
        assert breaker.state(trio.current_time()) is State.HALF_OPEN
        assert host(await world.ask("m", stream=True)) in {"a", "b"}

        assert len(world.engines["b"].posts) == 2
        assert breaker.would_admit(trio.current_time())


# --- clients that leave, streams that break --------------------------------------------------


async def test_both_engines_learn_at_once_that_the_client_has_left(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(hedged("a", "b")) as world:
        for engine in world.engines.values():
            engine.default = Script([hang()])
        client = world.client()
        await client.send(http_request("POST", CHAT, chat("m", stream=True)))
        await trio.sleep(AFTER + 0.1)
        await client.aclose()
        left = trio.current_time()
        await trio.sleep(0.1)

        assert [e.posts[0].client_left_at for e in world.engines.values()] == [left, left]
        assert await hedges(world) == {"cancelled": 1}
        assert [await attempts(world, name) for name in "ab"] == [{"cancelled": 1}] * 2
        line = world.access_log[0]
        assert (line["outcome"], line["phase"]) == ("client_closed", "waiting")
        assert line["attempts"] == 2


async def test_the_winner_learns_at_once_that_the_client_has_left(
    autojump_clock: MockClock,
) -> None:
    async with running_gateway(hedged("a", "b")) as world:
        world.engines["a"].default = Script([hang()])
        world.engines["b"].default = Script([sleep(0.1), *engines.stall_after(2).steps])
        client = world.client()
        await client.send(http_request("POST", CHAT, chat("m", stream=True)))
        await trio.sleep(AFTER + 0.3)
        await client.aclose()
        left = trio.current_time()
        await trio.sleep(0.1)

        assert world.engines["b"].posts[0].client_left_at == left
        assert world.access_log[0]["phase"] == "streaming"
        assert await hedges(world) == {"won": 1}


async def test_a_winner_that_breaks_is_continued_elsewhere(autojump_clock: MockClock) -> None:
    engine = Canonical(TOKENS, "vllm")
    config = hedged("a", "b", "c", model={"engine": "vllm"})
    async with running_gateway(config) as world:
        world.engines["a"].default = Script([hang()])
        world.engines["b"].default = engine.breaks("two", 3)
        world.engines["c"].default = engine.answer("three")
        response = await world.ask("m", stream=True)

        assert words(response) == engine.text
        assert events(response)[-1] == "[DONE]"
        assert asked(world)[:2] == ["a", "b"]
        assert len(asked(world)) == 3
        assert await hedges(world) == {"won": 1}
        assert total(await world.metrics(), "citadel_gateway_continuations_total") == 1
        line = world.access_log[0]
        assert (line["attempts"], line["outcome"]) == (3, "ok")


async def test_a_first_that_wins_and_breaks_is_continued_elsewhere(
    autojump_clock: MockClock,
) -> None:
    engine = Canonical(TOKENS, "vllm")
    async with running_gateway(hedged("a", "b", model={"engine": "vllm"})) as world:
        late = stream(engine.chunks("one")[:3])
        world.engines["a"].default = Script([sleep(0.7), *late.steps])
        world.engines["b"].scripts.append(Script([hang()]))
        world.engines["b"].default = engine.answer("two")
        response = await world.ask("m", stream=True)

        assert words(response) == engine.text
        assert asked(world) == ["a", "b", "b"]  # it had lost, and was not at fault


async def test_what_goes_on_with_a_broken_stream_is_not_hedged(autojump_clock: MockClock) -> None:
    engine = Canonical(TOKENS, "vllm")
    config = hedged("a", "b", "c", model={"engine": "vllm"})
    async with running_gateway(config) as world:
        world.engines["a"].default = engine.breaks("one", 3)

        def late(entry: LedgerEntry) -> Script:
            return Script([sleep(2.0), *engine.answer("two")(entry).steps])

        world.engines["b"].default = world.engines["c"].default = late

        assert words(await world.ask("m", stream=True)) == engine.text
        assert asked(world) == ["a", "b"]


async def test_the_winners_first_token_tells_how_much_its_endpoint_can_take(
    autojump_clock: MockClock,
) -> None:
    config = hedged("a", "b", model={"adaptive_concurrency": True})
    async with running_gateway(config) as world:
        world.engines["a"].default = Script([hang()])
        world.engines["b"].default = says("two", 0.2)
        await world.ask("m", stream=True)

        measured = []
        for name in "ab":
            adaptive = world.endpoint(name).adaptive
            assert adaptive is not None
            measured.append(list(adaptive._at_rest.values()))
        assert measured == [[], [pytest.approx(0.2, rel=0.2)]]


async def test_comments_to_who_waits_go_on_while_two_are_asked(autojump_clock: MockClock) -> None:
    streaming = {"keep_alive_before_first_token": 0.2}
    async with running_gateway(hedged("a", "b", streaming=streaming)) as world:
        world.engines["a"].default = Script([hang()])
        world.engines["b"].default = says("two", 0.3)
        response = await world.ask("m", stream=True)

        await wait_all_tasks_blocked()
        assert response.body.count(b": keep-alive") in {3, 4}  # one is due now
        assert response.body.endswith(b"[DONE]\n\n")
        line = world.access_log[0]
        assert (line["hedge"], line["endpoint"]) == ("won", endpoint("b"))
        assert line["overhead_ms"] < 1
        assert line["upstream_ms"] == pytest.approx(line["duration_ms"])


async def test_tokens_are_counted_once(autojump_clock: MockClock) -> None:
    async with running_gateway(hedged("a", "b")) as world:
        world.engines["a"].default = Script([hang()])
        world.engines["b"].default = engines.stream_chat(["a", "b"], usage=(7, 2))
        await world.ask("m", stream=True)

        line = world.access_log[0]
        assert (line["prompt_tokens"], line["completion_tokens"]) == (7, 2)
        assert total(await world.metrics(), "citadel_gateway_tokens_total", kind="prompt") == 7


# --- when it is time -------------------------------------------------------------------------


async def test_when_it_is_time_is_measured(autojump_clock: MockClock) -> None:
    async with running_gateway(hedged("a", "b", model={"hedge_after": None})) as world:
        for engine in world.engines.values():
            engine.default = says("x", 0.2)
        world.engines["a"].scripts.append(says("slow", 3.0))
        assert words(await world.ask("m", stream=True)) == "slow."  # nothing is known yet
        world.engines["b"].scripts.extend([says("x", 0.3)] * 2)
        for _ in range(28):
            await world.ask("m", stream=True)
        assert await hedges(world) == {}
        world.engines["b"].scripts.append(Script([hang()]))  # its turn, after one for each of a, b
        began = trio.current_time()
        response = await world.ask("m", stream=True)

        assert (words(response), host(response)) == ("x.", "a")
        assert await hedges(world) == {"won": 1}
        assert world.engines["a"].posts[-1].received_at == pytest.approx(began + 0.3)


async def test_only_attempts_that_were_the_first_are_measured(autojump_clock: MockClock) -> None:
    async with running_gateway(hedged("a", "b")) as world:
        hedging = world.service.balancer.models["m"].hedging
        assert hedging is not None
        seen = hedging._seen._by_length
        world.engines["a"].scripts.extend([says("one", 0.4), says("one", 0.7), Script([hang()])])
        world.engines["a"].scripts.extend([refuses(500, after=0.7), refuses(503)])
        world.engines["b"].default = says("two", 0.3)
        while len(world.engines["a"].posts) < 5:
            await world.ask("m", stream=True)
            world.endpoint("b").cool_down(2.0, trio.current_time())  # let a be first

        assert [round(each, 3) for each in seen if each != 0.3] == [0.4, 0.7, math.inf, math.inf]


async def test_a_reload_keeps_what_was_measured(autojump_clock: MockClock) -> None:
    config = hedged("a", "b", model={"hedge_after": None})
    async with running_gateway(config) as world:
        for engine in world.engines.values():
            engine.default = says("x", 0.25)
        for _ in range(30):
            await world.ask("m", stream=True)
        config["load_balancer"]["queue_size"] = 7
        await world.service.adopt(parse(config, source="test"))
        hedging = world.service.balancer.models["m"].hedging

        assert hedging is not None
        assert hedging.after(trio.current_time()) == pytest.approx(0.25)


# --- over sockets ----------------------------------------------------------------------------


async def test_crowds_over_sockets_are_each_answered_by_one_engine_and_leave_nothing() -> None:
    """One engine of three never says a word; some clients leave before theirs has."""
    quick = engines.stream_chat(["one", "."], gap=0.01)
    fleet_of = [ScriptedEngine(default=Script([hang()]))]
    fleet_of += [ScriptedEngine(default=Script([sleep(0.02), *quick.steps])) for _ in range(2)]
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            ports = [await serve_tcp(engine, nursery) for engine in fleet_of]
            log = CapturedLog()
            config = {
                "service": {"host": "127.0.0.1", "port": 0},
                "monitoring": {"prometheus_port": None},
                "load_balancer": {"retry_budget_floor": 1000},
                "performance": {"max_concurrent_requests": 200},  # room for a hedge of each
                "models": {
                    "m": {
                        "endpoints": [{"url": f"http://127.0.0.1:{port}"} for port in ports],
                        "hedge": True,
                        "hedge_after": 0.1,
                    }
                },
            }
            service = UnifiedAPIGatewayService(parse(config), log=log)
            address = await nursery.start(partial(service.run, handle_signals=False))

            async def ask(number: int) -> RawResponse | None:
                async with await RawClient.connect(address.port) as client:
                    await client.send(http_request("POST", CHAT, chat("m", stream=True)))
                    if number % 7 == 0:
                        await trio.sleep(0.005 * (number % 5) + 0.09)
                        return None
                    return await client.read_response("POST")

            answers = await gather(*[partial(ask, number) for number in range(60)])
            while service.admission.waitroom.taken:
                await trio.lowlevel.checkpoint()
            silent = fleet_of[0]
            await silent.wait_until(lambda: silent.in_flight == 0)
            nursery.cancel_scope.cancel()

    told = [words(answer) for answer in answers if answer is not None]
    assert told == ["one."] * 51
    assert len(silent.posts) >= 20
    outcomes = Counter(line["outcome"] for line in log.lines if line["event"] == "request")
    assert outcomes["ok"] + outcomes["client_closed"] == 60
    assert {"crash", "breaker"}.isdisjoint(line["event"] for line in log.lines)
