"""Caps hold over all gateways together, and what one does not use another may."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from citadel_gateway.app.caps import Caps
from citadel_gateway.config.loader import parse
from tests.support.fellows import Fellows, fellows
from tests.support.gateway import endpoint, fleet, gather
from tests.support.scripted_engine import Script, sleep, whole_chat

SERVICE = 1.0  # seconds that an engine takes
REPORTS_EVERY = 0.75  # a quarter of a lease
SLOW = Script([sleep(SERVICE), *whole_chat("ok").steps])


def capped(cap: int, seats: int = 1000, **sections: Any) -> Any:
    return fleet(
        {"m": {"endpoint": endpoint("a"), "max_concurrent": cap}},
        performance={"max_concurrent_requests": seats, "request_timeout_seconds": 300},
        load_balancer={"queue_timeout": 300, "slow_start": 0, "queue_size": 1000},
        **sections,
    )


async def ask_all(several: Fellows, each: int) -> list[int]:
    answers = await gather(*[world.ask for world in several for _ in range(each)])
    return [answer.status for answer in answers]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(("cap", "seats"), [(1, 1000), (3, 1000), (10, 1000), (1000, 5)])
async def test_all_gateways_together_keep_the_cap_and_use_it(
    count: int, cap: int, seats: int, autojump_clock: MockClock
) -> None:
    async with fellows(capped(cap, seats), count, ["a"]) as several:
        engine = several.engines["a"]
        engine.default = SLOW
        began = trio.current_time()

        statuses = await ask_all(several, each=40 // count)

        took = trio.current_time() - began
        assert statuses == [200] * 40
        assert engine.max_in_flight == min(cap, seats)
        assert took < 1.1 * SERVICE * (40 / min(cap, seats) + 1)


async def test_one_gateway_may_use_all_while_the_others_are_idle(
    autojump_clock: MockClock,
) -> None:
    async with fellows(capped(20), 4, ["a"]) as several:
        engine = several.engines["a"]
        engine.default = SLOW

        await gather(*[several[2].ask] * 20)

        assert engine.max_in_flight == 20


async def test_while_nothing_happens_nobody_looks_more_often_than_there_is_to_report(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0
    report = Caps.report

    async def counted(self: Caps) -> None:
        nonlocal looks
        looks += 1
        await report(self)

    async with fellows(capped(20), 1, ["a"]):
        monkeypatch.setattr(Caps, "report", counted)
        await trio.sleep(60)

    assert looks <= 60 / REPORTS_EVERY


async def test_nobody_waits_long_where_others_have_most_of_it(autojump_clock: MockClock) -> None:
    async with fellows(capped(2), 3, ["a"]) as several:
        several.engines["a"].default = SLOW
        late: list[float] = []

        async def greedy() -> None:
            await gather(*[several[0].ask] * 40)

        async def modest() -> None:
            await trio.sleep(1.5)
            for _ in range(5):
                began = trio.current_time()
                assert (await several[1].ask()).status == 200
                late.append(trio.current_time() - began)

        await gather(greedy, modest)

        assert max(late) < 3.2 * SERVICE


async def test_what_a_dead_gateway_had_comes_back_within_its_lease(
    autojump_clock: MockClock,
) -> None:
    async with fellows(capped(4), 2, ["a"]) as several:
        engine = several.engines["a"]
        engine.default = Script([sleep(1000.0), *whole_chat("ok").steps])
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(several[0].ask)
            await trio.sleep(1.0)
            several.stores[0].is_out = True  # to the other it is as if it were dead
            engine.default = whole_chat("ok")
            began = trio.current_time()

            assert (await several[1].ask()).status == 200

            assert 1.0 < trio.current_time() - began < 3.5
            nursery.cancel_scope.cancel()


async def test_a_store_that_forgets_everything_lets_nobody_have_more(
    autojump_clock: MockClock,
) -> None:
    async with fellows(capped(4), 3, ["a"]) as several:
        engine = several.engines["a"]
        engine.default = SLOW

        async def forget() -> None:
            for _ in range(7):
                await trio.sleep(0.7)
                several.memory.forget_all()

        await gather(forget, *[world.ask for world in several for _ in range(20)])

        assert engine.max_in_flight == 4


@pytest.mark.parametrize("at", [1.0, 1.2, 1.3, 1.4, 1.5, 1.6])
async def test_an_outage_that_is_shorter_than_the_lease_lets_nobody_have_more(
    at: float, autojump_clock: MockClock
) -> None:
    """Who has nothing of the cap may not have heard of it for longer than who has all of it."""
    async with fellows(capped(4), 2, ["a"]) as several:
        engine = several.engines["a"]
        engine.default = SLOW

        async def break_down() -> None:
            await trio.sleep(at)
            for store in several.stores:
                store.is_out = True
            await trio.sleep(2.9)
            for store in several.stores:
                store.is_out = False

        async def ask_meanwhile() -> list[int]:
            await trio.sleep(at + 0.1)
            return await gather(*[several[1].ask] * 4)

        async def go_on_asking() -> None:
            for _ in range(8):
                await several[0].ask()

        await gather(break_down, ask_meanwhile, *[go_on_asking] * 4)

        assert engine.max_in_flight == 4


async def test_without_the_store_each_goes_by_its_part(autojump_clock: MockClock) -> None:
    async with fellows(capped(8), 2, ["a"]) as several:
        engine = several.engines["a"]
        engine.default = SLOW
        await trio.sleep(1)  # they know of each other
        for store in several.stores:
            store.is_out = True
        await trio.sleep(5)
        began = trio.current_time()

        assert await ask_all(several, each=20) == [200] * 40

        assert engine.max_in_flight == 8
        assert trio.current_time() - began < 6 * SERVICE
        for store in several.stores:
            store.is_out = False
        await trio.sleep(5)
        await gather(*[several[0].ask] * 8)
        assert engine.max_in_flight == 8


async def test_a_reload_changes_the_cap_for_all(autojump_clock: MockClock) -> None:
    async with fellows(capped(4), 2, ["a"]) as several:
        engine = several.engines["a"]
        engine.default = SLOW
        for world in several:
            await world.service.adopt(parse(capped(2), source="test"))
        await trio.sleep(1)

        assert await ask_all(several, each=5) == [200] * 10
        assert engine.max_in_flight == 2


@pytest.mark.parametrize("later", [0.7, 0.75, 0.8, 0.85, 0.9, 0.95])
async def test_what_begins_while_a_report_is_on_its_way_is_within_the_cap(
    later: float, autojump_clock: MockClock
) -> None:
    """The store may have given to another gateway what this one does not use."""
    async with fellows(capped(12, store={"timeout": 1.0}), 2, ["a"]) as several:
        engine = several.engines["a"]
        engine.default = SLOW
        for store in several.stores:
            store.is_far, store.takes = True, 0.2

        async def ask_later() -> list[int]:
            await trio.sleep(later)
            return await gather(*[several[0].ask] * 12)

        await gather(*[several[1].ask] * 24, ask_later)

        assert engine.max_in_flight == 12
