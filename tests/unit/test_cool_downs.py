"""The end of a cool-down calls whoever waits, exactly then, and one deadline does for all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import trio
from trio.testing import MockClock

from citadel_gateway.io.cool_downs import CoolDowns
from citadel_gateway.io.deadlines import Deadlines
from citadel_gateway.policy.circuit_breaker import BreakerPolicy, CircuitBreaker
from citadel_gateway.policy.endpoint import Endpoint
from citadel_gateway.policy.health_tracker import HealthTracker


def endpoint(name: str) -> Endpoint:
    breaker = CircuitBreaker(BreakerPolicy(), lambda: 0.5)
    return Endpoint(name, f"http://{name}", 1.0, 1, None, breaker, HealthTracker(healthy=True))


@attrs.define
class Scene:
    cool_downs: CoolDowns
    deadlines: Deadlines
    calls: list[float]

    def cool_down(self, endpoint: Endpoint, seconds: float) -> None:
        endpoint.cool_down(seconds, trio.current_time())
        self.cool_downs.begin(endpoint)


@asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    deadlines, calls = Deadlines(), list[float]()
    cool_downs = CoolDowns(deadlines, lambda: calls.append(trio.current_time()))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(deadlines.run)
        yield Scene(cool_downs, deadlines, calls)
        nursery.cancel_scope.cancel()


async def test_each_end_is_told_whichever_comes_first(autojump_clock: MockClock) -> None:
    async with scene() as s:
        s.cool_down(endpoint("a"), 5)
        s.cool_down(endpoint("b"), 2)
        s.cool_down(endpoint("c"), 9)
        await trio.sleep(20)

    assert s.calls == [2, 5, 9]


async def test_a_longer_time_moves_the_end_and_a_shorter_one_does_not(
    autojump_clock: MockClock,
) -> None:
    async with scene() as s:
        a, b = endpoint("a"), endpoint("b")
        s.cool_down(a, 2)
        s.cool_down(b, 6)
        await trio.sleep(1)
        s.cool_down(a, 3)
        s.cool_down(b, 1)
        await trio.sleep(20)

    assert s.calls[-2:] == [4, 6]
    assert set(s.calls) <= {2, 4, 6}  # what was promised first may be looked at, too


async def test_nothing_is_left_when_nobody_rests_and_it_begins_anew(
    autojump_clock: MockClock,
) -> None:
    async with scene() as s:
        for _ in range(3):
            s.cool_down(endpoint("a"), 1)
            await trio.sleep(2)
            assert not s.deadlines._pending

    assert s.calls == [1, 3, 5]
