"""What an operator orders at one gateway counts for all that share its store."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.support.fellows import Fellows, fellows
from tests.support.gateway import World, endpoint, fleet
from tests.support.scripted_engine import Script, sleep, whole_chat
from tests.unit.test_operations import bearer, order, with_keys

HEARD = 0.6  # seconds in which everybody has met everybody
FORGOTTEN = 4.0  # seconds in which the word of those who have gone is no longer good


@pytest.fixture
def config() -> dict[str, Any]:
    return dict(fleet({"m": ["a", "b"]}, **with_keys(root=True)))


def cordoned(several: Fellows, host: str) -> list[bool]:
    return [world.endpoint(host).cordoned for world in several]


def urls(world: World) -> list[str]:
    return sorted(u.endpoint.url for u in world.service.balancer.upstreams)


async def cordon_and_vanish(several: Fellows) -> None:
    """The first cordons, all hear of it, and then it is to others as if it were dead."""
    await order(several[0], "cordon", "a")
    await trio.sleep(HEARD)
    several.stores[0].is_out = True
    await trio.sleep(FORGOTTEN)


async def test_what_is_cordoned_at_one_gateway_is_cordoned_at_all(
    autojump_clock: MockClock, config: dict[str, Any]
) -> None:
    async with fellows(config, 3, ["a", "b"]) as several:
        assert (await order(several[0], "cordon", "a")).status == 200
        await trio.sleep(HEARD)
        assert cordoned(several, "a") == [True] * 3
        assert cordoned(several, "b") == [False] * 3

        assert (await order(several[2], "uncordon", "a")).status == 200
        await trio.sleep(HEARD)
        assert cordoned(several, "a") == [False] * 3


async def test_while_one_gateway_drains_an_endpoint_no_other_gives_it_anything(
    autojump_clock: MockClock, config: dict[str, Any]
) -> None:
    async with fellows(config, 2, ["a", "b"]) as several:
        several.engines["a"].default = Script([sleep(10.0), *whole_chat("a").steps])
        async with trio.open_nursery() as nursery:
            for _ in range(2):  # one of them is with a
                nursery.start_soon(several[0].ask, "m", bearer("root"))
            await trio.sleep(HEARD)
            nursery.start_soon(order, several[0], "drain", "a")
            await trio.sleep(HEARD)
            before = len(several.engines["a"].posts)

            for _ in range(6):
                assert (await several[1].ask("m", bearer("root"))).status == 200

            assert before == 1
            assert len(several.engines["a"].posts) == 1


async def test_what_is_added_at_one_gateway_serves_at_all_and_goes_again(
    autojump_clock: MockClock, config: dict[str, Any]
) -> None:
    async with fellows(config, 3, ["a", "b", "c"]) as several:
        assert (await order(several[1], "add", "c", model="m", weight=3)).status == 200
        await trio.sleep(HEARD)
        assert [urls(world) for world in several] == [[*map(endpoint, "abc")]] * 3
        assert several[2].endpoint("c").weight == 3

        assert (await order(several[0], "remove", "c")).status == 200
        await trio.sleep(HEARD)
        assert [urls(world) for world in several] == [[*map(endpoint, "ab")]] * 3


async def test_of_two_orders_about_the_same_the_later_one_counts(
    autojump_clock: MockClock, config: dict[str, Any]
) -> None:
    async with fellows(config, 2, ["a", "b", "c"]) as several:
        await order(several[0], "add", "c", model="m", weight=3)
        await trio.sleep(HEARD)
        await order(several[1], "add", "c", model="m", weight=5)
        await trio.sleep(HEARD)

        assert [world.endpoint("c").weight for world in several] == [5, 5]


async def test_a_gateway_that_comes_later_is_told(
    autojump_clock: MockClock, config: dict[str, Any]
) -> None:
    async with fellows(config, 2, ["a", "b", "c"]) as several:
        await order(several[0], "cordon", "a")
        await order(several[0], "cordon", "b")
        await order(several[0], "uncordon", "b")
        await order(several[1], "add", "c", model="m")
        await trio.sleep(HEARD)

        late = await several.join()

        assert late.endpoint("a").cordoned
        assert not late.endpoint("b").cordoned
        assert urls(late) == [*map(endpoint, "abc")]


async def test_a_gateway_that_comes_after_the_store_was_emptied_is_told_by_those_who_know(
    autojump_clock: MockClock, config: dict[str, Any]
) -> None:
    async with fellows(config, 2, ["a", "b"]) as several:
        await cordon_and_vanish(several)
        several.memory.forget_all()
        await trio.sleep(HEARD)

        late = await several.join()

        assert late.endpoint("a").cordoned


async def test_orders_end_with_the_last_gateway(
    autojump_clock: MockClock, config: dict[str, Any]
) -> None:
    async with fellows(config, 1, ["a", "b"]) as several:
        await cordon_and_vanish(several)

        late = await several.join()

        assert not late.endpoint("a").cordoned


async def test_orders_outlive_a_store_that_was_away_for_longer_than_anybodys_word_is_good(
    autojump_clock: MockClock, config: dict[str, Any]
) -> None:
    async with fellows(config, 2, ["a", "b"]) as several:
        await order(several[0], "cordon", "a")
        await trio.sleep(HEARD)
        for is_out in (True, False):
            for store in several.stores:
                store.is_out = is_out
            await trio.sleep(FORGOTTEN)

        late = await several.join()

        assert cordoned(several, "a") == [True] * 3
        assert late.endpoint("a").cordoned


async def test_an_order_that_meets_no_store_is_heard_when_it_is_back(
    autojump_clock: MockClock, config: dict[str, Any]
) -> None:
    async with fellows(config, 2, ["a", "b"]) as several:
        several.stores[0].is_out = True
        await order(several[0], "cordon", "a")
        await trio.sleep(2 * FORGOTTEN)
        several.stores[0].is_out = False
        await trio.sleep(HEARD)

        assert cordoned(several, "a") == [True, True]


async def test_who_was_away_does_not_bring_back_what_was_ordered_before(
    autojump_clock: MockClock, config: dict[str, Any]
) -> None:
    async with fellows(config, 3, ["a", "b"]) as several:
        await cordon_and_vanish(several)
        await order(several[1], "uncordon", "a")
        await trio.sleep(HEARD)
        several.stores[0].is_out = False
        await trio.sleep(2 * HEARD)

        assert cordoned(several, "a") == [False] * 3


async def test_an_address_that_every_host_has_for_itself_is_not_ordered_elsewhere(
    autojump_clock: MockClock,
) -> None:
    config = dict(fleet({"m": ["127.0.0.1", "b"]}, **with_keys(root=True)))
    async with fellows(config, 0, ["127.0.0.1", "b"]) as several:
        for host in ("one", "one", "other"):
            await several.join(host)
        await order(several[0], "cordon", "127.0.0.1")
        await trio.sleep(HEARD)

        assert cordoned(several, "127.0.0.1") == [True, True, False]


async def test_what_one_gateway_cannot_use_is_told_there_and_hurts_nobody(
    autojump_clock: MockClock, config: dict[str, Any]
) -> None:
    async with fellows(config, 1, ["a", "b"]) as several:
        several.config = fleet({"other": ["b"]}, **with_keys(root=True))
        await several.join()
        await order(several[0], "add", "c", model="m")
        await order(several[0], "cordon", "a")
        await trio.sleep(HEARD)

        assert urls(several[1]) == [endpoint("b")]
        assert (await several[1].ask("other", bearer("root"))).status == 200
