"""Who looks every so often does so when others in the process do."""

from __future__ import annotations

import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from citadel_gateway.io.ticks import next_tick, sleep_until_tick


@given(
    now=st.floats(0.0, 1e6),
    period=st.sampled_from([0.1, 0.25, 0.5, 1.0, 10.0]),
    about=st.floats(-60.0, 60.0),
)
def test_the_tick_is_the_nearest_of_those_to_come(now: float, period: float, about: float) -> None:
    clock = trio.testing.MockClock()

    async def main() -> tuple[float, float]:
        clock.jump(now)
        return next_tick(period), next_tick(period, about)

    first, tick = trio.run(main, clock=clock)

    assert now < first <= now + period * (1 + 1e-6)
    assert tick >= first
    assert tick == first or abs(tick - (now + about)) <= period * (0.5 + 1e-6)


async def test_a_tick_is_over_when_it_has_come(autojump_clock: trio.testing.MockClock) -> None:
    period = 0.1  # 3 * 0.1 / 0.1 is less than 3

    for _ in range(100):
        before = trio.current_time()
        await sleep_until_tick(period)
        assert trio.current_time() > before


async def test_those_who_began_at_different_times_wake_together(
    autojump_clock: trio.testing.MockClock,
) -> None:
    woken: list[float] = []

    async def look(began: float, period: float) -> None:
        await trio.sleep(began)
        await sleep_until_tick(period)
        woken.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look, 0.1, 1.0)
        nursery.start_soon(look, 0.6, 0.5)
        nursery.start_soon(look, 0.9, 0.25)

    assert woken == [1.0, 1.0, 1.0]
