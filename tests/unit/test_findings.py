"""What one gateway knows of an endpoint, all that share a store know, and nobody asks twice."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from citadel_gateway.policy.circuit_breaker import State
from tests.support.fellows import Fellows, fellows
from tests.support.gateway import endpoint, fleet, gather
from tests.support.scripted_engine import Script, ScriptedEngine, close, sleep, status, whole_chat

HEARD = 0.6  # seconds in which everybody has met everybody


def probes(engine: ScriptedEngine) -> int:
    return sum((entry.method, entry.path) == ("GET", "/health") for entry in engine.ledger)


def healthy(several: Fellows, host: str) -> list[bool]:
    return [world.endpoint(host).health.healthy for world in several]


def states(several: Fellows, host: str) -> list[State]:
    now = trio.current_time()
    return [world.endpoint(host).breaker.state(now) for world in several]


async def test_an_endpoint_is_probed_by_one_gateway_and_known_to_all(
    autojump_clock: MockClock,
) -> None:
    async with fellows(fleet({"m": ["a", "b"]}), 3, ["a", "b"]) as several:
        first = [probes(engine) for engine in several.engines.values()]
        await trio.sleep(300)

        assert first == [1, 1]
        assert healthy(several, "a") == [True] * 3
        for engine in several.engines.values():
            assert 9 <= probes(engine) <= 12


async def test_all_know_at_once_that_an_endpoint_has_become_ill(autojump_clock: MockClock) -> None:
    config = fleet({"m": ["a", "b"]}, load_balancer={"unhealthy_after": 1})
    async with fellows(config, 3, ["a", "b"]) as several:
        several.engines["a"].routes["GET", "/health"] = status(500)
        await trio.sleep(35)

        assert healthy(several, "a") == [False] * 3
        assert [w.endpoint("a").health.last_error for w in several] == ["status 500"] * 3
        del several.engines["a"].routes["GET", "/health"]
        several.engines["a"].routes["GET", "/health"] = status(200)
        await trio.sleep(6)
        assert healthy(several, "a") == [True] * 3


async def test_who_cannot_reach_an_endpoint_has_it_probed_by_the_one_who_does_that(
    autojump_clock: MockClock,
) -> None:
    config = fleet({"m": ["a", "b"]}, load_balancer={"unhealthy_after": 1})
    async with fellows(config, 2, ["a", "b"]) as several:
        several.engines["a"].routes["GET", "/health"] = status(500)
        several.engines["a"].default = Script([close()])

        await gather(*[several[1].ask] * 2)  # the other one is the prober
        await trio.sleep(HEARD)

        assert healthy(several, "a") == [False] * 2


async def test_another_takes_over_the_probes_when_their_gateway_is_gone(
    autojump_clock: MockClock,
) -> None:
    async with fellows(fleet({"m": ["a"]}), 2, ["a"]) as several:
        held = several.memory.board.holders
        before = {task: who for task, (who, _) in held.items()}
        assert set(before.values()) == {several[0].service.membership.name}  # type: ignore[union-attr]
        asked = probes(several.engines["a"])
        several.stores[0].is_out = True  # to the others it is as if it were dead

        await trio.sleep(3.5)

        assert {w for w, _ in held.values()} == {several[1].service.membership.name}  # type: ignore[union-attr]
        assert probes(several.engines["a"]) > asked


async def test_a_breaker_that_opens_opens_everywhere_and_one_request_tries_the_endpoint(
    autojump_clock: MockClock,
) -> None:
    config = fleet({"m": ["a"]}, load_balancer={"max_attempts": 1, "circuit_breaker_timeout": 10})
    async with fellows(config, 3, ["a"]) as several:
        engine = several.engines["a"]
        engine.default = status(500)
        for _ in range(5):
            await several[1].ask()
        await trio.sleep(HEARD)
        assert states(several, "a") == [State.OPEN] * 3
        spent = len(engine.posts)

        for _ in range(40):  # half a minute, in which it rests twice
            await gather(*[world.ask for world in several])
            await trio.sleep(0.75)

        tried = len(engine.posts) - spent
        assert 1 <= tried <= 2
        engine.default = whole_chat("ok")
        answers = []
        for _ in range(80):
            answers = [r.status for r in await gather(*[world.ask for world in several])]
            if answers == [200, 200, 200]:
                break
            await trio.sleep(0.75)
        assert answers == [200, 200, 200]
        assert states(several, "a") == [State.CLOSED] * 3


async def test_the_one_gateway_that_has_requests_may_try_the_endpoint_in_the_end(
    autojump_clock: MockClock,
) -> None:
    config = fleet({"m": ["a"]}, load_balancer={"max_attempts": 1, "circuit_breaker_timeout": 10})
    async with fellows(config, 4, ["a"]) as several:
        engine = several.engines["a"]
        engine.default = status(500)
        for _ in range(5):
            await several[3].ask()
        engine.default = whole_chat("ok")
        await trio.sleep(11)

        with trio.fail_after(15):
            while (await several[3].ask()).status != 200:  # noqa: ASYNC110
                await trio.sleep(0.5)

        await trio.sleep(HEARD)
        assert states(several, "a") == [State.CLOSED] * 4


async def test_a_cool_down_is_everybodys(autojump_clock: MockClock) -> None:
    async with fellows(fleet({"m": ["a", "b"]}), 2, ["a", "b"]) as several:
        busy = status(503, headers=[("retry-after", "30")])
        several.engines["a"].default = busy
        for _ in range(2):
            assert (await several[0].ask()).status == 200
        await trio.sleep(HEARD)

        assert {(await several[1].ask()).status for _ in range(6)} == {200}
        assert len(several.engines["a"].posts) == 1
        now = trio.current_time()
        left = [world.endpoint("a").cooling_until - now for world in several]
        assert left[1] == pytest.approx(left[0])


async def test_who_waits_is_called_when_a_cool_down_that_another_gateway_heard_of_is_over(
    autojump_clock: MockClock,
) -> None:
    places = [{"url": endpoint(host), "max_concurrent": 8} for host in "ab"]
    config = fleet({"m": {"endpoints": places}}, load_balancer={"max_attempts": 1})
    async with fellows(config, 2, ["a", "b"]) as several:
        busy, slow = status(503, headers=[("retry-after", "3.3")]), Script([sleep(9)])
        several.engines["a"].scripts.append(busy)
        while not several.engines["a"].posts:
            await several[0].ask()
        refused_at = several.engines["a"].posts[0].received_at
        await trio.sleep(HEARD)
        several.engines["b"].default = slow
        async with trio.open_nursery() as nursery:
            for _ in range(8 + 1):  # one of them has to wait, whatever b has room for
                nursery.start_soon(several[1].ask)
            await trio.sleep(5)
            nursery.cancel_scope.cancel()

        assert several.engines["a"].posts[1].received_at == pytest.approx(refused_at + 3.3)


async def test_a_gateway_that_has_no_store_any_more_looks_after_itself(
    autojump_clock: MockClock,
) -> None:
    config = fleet({"m": ["a", "b"]}, load_balancer={"unhealthy_after": 1})
    async with fellows(config, 2, ["a", "b"]) as several:
        for store in several.stores:
            store.is_out = True
        await trio.sleep(5)
        asked = probes(several.engines["a"])
        several.engines["a"].routes["GET", "/health"] = status(500)
        await trio.sleep(35)

        assert probes(several.engines["a"]) >= asked + 2
        assert healthy(several, "a") == [False] * 2
        events = [line["event"] for world in several for line in world.log.lines]
        assert sum("the store cannot be asked" in event for event in events) == 2
