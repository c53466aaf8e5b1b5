"""Whatever operators order at the same time, and whoever hears late, all end up with the same."""

from __future__ import annotations

import random
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from citadel_gateway.app.operations import Order
from citadel_gateway.app.worker import Worker
from citadel_gateway.config.loader import parse
from citadel_gateway.io.store.base import StoreUnavailable
from citadel_gateway.io.workers import Said
from citadel_gateway.policy.board import News, Statement
from tests.support.fellows import fellows
from tests.support.gateway import World, endpoint, fleet
from tests.support.memory_store import MemoryStore
from tests.support.scripted_engine import Script, sleep, whole_chat
from tests.unit.test_fleet_orders import FORGOTTEN, HEARD, config, cordon_and_vanish, cordoned, urls
from tests.unit.test_operations import bearer, order, with_keys

__all__ = ["config"]


def wish(host: str, **options: Any) -> dict[str, Any]:
    return attrs.asdict(Order(endpoint(host), "m", 30.0, options))


@attrs.define(eq=False)
class FarStore:
    """What it does takes effect at once; the answers take *trip* seconds, or do not come."""

    near: MemoryStore
    trip: float = 0.0
    is_deaf: bool = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.near, name)

    async def meet(self, statement: Statement) -> News:
        news = await self.near.meet(statement)
        await trio.sleep(self.trip)
        if self.is_deaf:
            raise StoreUnavailable("no answer")
        return news


def far(world: World, store: MemoryStore, trip: float = 0.0) -> FarStore:
    peers = world.service.peers
    assert peers is not None
    made = FarStore(store, trip)
    peers.membership.store = made
    return made


@attrs.define(eq=False)
class Host:
    """What a worker needs of itself to be told by its supervisor."""

    service: Any

    async def obey(self, what: str, host: str) -> Any:
        body = {"what": what, "order": wish(host)}
        return await Worker._obey(self, body)  # type: ignore[arg-type]

    def hear(self, what: str, host: str) -> None:
        Worker._hear(self, Said.ORDER, {"what": what, "order": wish(host)})  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(4))
async def test_workers_that_are_told_one_after_the_other_agree(
    seed: int, autojump_clock: MockClock, config: dict[str, Any]
) -> None:
    rng = random.Random(seed)
    async with fellows(config, 2, ["a", "b"], seed=seed) as several:
        for world, store in zip(several, several.stores, strict=True):
            far(world, store, 0.01)
        for _ in range(60):
            for what in ("cordon", "uncordon"):
                for world in several:
                    await Host(world.service).obey(what, "a")
                    await trio.sleep(rng.uniform(0, 0.003))
                await trio.sleep(rng.uniform(0, 0.1))
            await trio.sleep(1)

            assert cordoned(several, "a") == [False, False]


async def test_an_order_that_is_given_while_an_earlier_one_is_on_its_way_counts(
    autojump_clock: MockClock, config: dict[str, Any]
) -> None:
    async with fellows(config, 2, ["a", "b", "c"]) as several:
        await order(several[0], "add", "c", model="m")
        await trio.sleep(HEARD)
        far(several[1], several.stores[1], 0.1)
        await trio.sleep(HEARD)
        await order(several[0], "remove", "c")
        await trio.sleep(0.2)  # the other one hears of it in this moment, or will
        await order(several[1], "add", "c", model="m", weight=5)
        await trio.sleep(2)

        assert urls(several[0]) == urls(several[1]) == [*map(endpoint, "abc")]
        assert several[0].endpoint("c").weight == 5


async def test_what_is_ordered_though_it_is_so_already_counts(
    autojump_clock: MockClock, config: dict[str, Any]
) -> None:
    async with fellows(config, 2, ["a", "b"]) as several:
        await trio.sleep(HEARD)
        await order(several[0], "cordon", "a")
        await trio.sleep(0.02)  # the other one has not heard of it
        assert (await order(several[1], "uncordon", "a")).status == 200
        await trio.sleep(2)

        assert cordoned(several, "a") == [False, False]


async def test_an_order_that_is_said_again_is_not_given_again(
    autojump_clock: MockClock, config: dict[str, Any]
) -> None:
    async with fellows(config, 2, ["a", "b"]) as several:
        deaf = far(several[0], several.stores[0])
        deaf.is_deaf = True  # it does not know that it was heard
        await order(several[0], "cordon", "a")
        await trio.sleep(HEARD)
        assert cordoned(several, "a") == [True, True]
        await order(several[1], "uncordon", "a")
        await trio.sleep(HEARD)
        deaf.is_deaf = False
        await trio.sleep(2)
        late = await several.join()

        assert cordoned(several, "a") == [False] * 3
        assert not late.endpoint("a").cordoned


async def test_a_worker_that_was_starting_goes_by_what_it_has_heard_in_the_store(
    autojump_clock: MockClock, config: dict[str, Any]
) -> None:
    async with fellows(config, 2, ["a", "b"]) as several:
        starting = await several.join()
        await order(several[1], "cordon", "a")
        await trio.sleep(HEARD)
        await order(several[0], "uncordon", "a")
        await trio.sleep(HEARD)
        Host(starting.service).hear("cordon", "a")  # what its supervisor knows is older
        await trio.sleep(2)

        assert cordoned(several, "a") == [False] * 3


async def test_without_a_store_a_worker_goes_by_what_its_supervisor_says(
    autojump_clock: MockClock, config: dict[str, Any]
) -> None:
    async with fellows(config, 2, ["a", "b", "c"]) as several:
        several.stores[1].is_out = True
        await trio.sleep(FORGOTTEN)
        worker = Host(several[1].service)
        worker.hear("add", "c")
        worker.hear("cordon", "a")
        worker.hear("cordon", "b")
        worker.hear("uncordon", "b")
        assert several[1].endpoint("a").cordoned
        assert not several[1].endpoint("b").cordoned
        assert urls(several[1]) == [*map(endpoint, "abc")]
        worker.hear("remove", "c")
        assert urls(several[1]) == [*map(endpoint, "ab")]
        several.stores[1].is_out = False
        await trio.sleep(2)

        assert cordoned(several, "a") == [False, True]  # it is not for a worker to say


@pytest.mark.parametrize("is_away", [False, True])
async def test_what_a_supervisor_restores_does_not_undo_what_was_ordered_since(
    is_away: bool, autojump_clock: MockClock, config: dict[str, Any]
) -> None:
    async with fellows(config, 2, ["a", "b"]) as several:
        await order(several[0], "cordon", "a")
        await trio.sleep(HEARD)
        await order(several[1], "uncordon", "a")
        await trio.sleep(HEARD)
        worker = await several.join(restored=[("m", endpoint("a"))], is_out=is_away)
        await order(worker, "cordon", "b")
        await trio.sleep(FORGOTTEN)
        several.stores[-1].is_out = False
        await trio.sleep(2)

        assert cordoned(several, "a") == [False] * 3
        assert cordoned(several, "b") == [True] * 3


async def test_what_only_a_supervisor_remembers_is_told_again(
    autojump_clock: MockClock, config: dict[str, Any]
) -> None:
    async with fellows(config, 1, ["a", "b"]) as several:
        await cordon_and_vanish(several)  # all workers of a host
        await several.join(restored=[("m", endpoint("a"))])
        await trio.sleep(HEARD)

        assert (await several.join()).endpoint("a").cordoned


async def test_who_heard_of_a_removal_from_others_first_waits_for_what_it_has_all_the_same(
    autojump_clock: MockClock, config: dict[str, Any]
) -> None:
    async with fellows(config, 2, ["a", "b", "c"]) as several:
        await order(several[0], "add", "c", model="m")
        for host in ("a", "b"):
            await order(several[0], "cordon", host)
        await trio.sleep(5)
        several.engines["c"].default = Script([sleep(10.0), *whole_chat("c").steps])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(several[1].ask, "m", bearer("root"))
            await trio.sleep(HEARD)
            await Host(several[0].service).obey("remove", "c")
            await trio.sleep(HEARD)
            began = trio.current_time()
            found = await Host(several[1].service).obey("remove", "c")

            assert found["report"]["drained"]
            assert trio.current_time() - began > 5


async def test_an_order_about_an_endpoint_that_a_reload_brings_is_not_lost_in_the_meantime(
    autojump_clock: MockClock,
) -> None:
    before, after = (dict(fleet({"m": hosts}, **with_keys(root=True))) for hosts in ("a", "ax"))
    async with fellows(before, 2, ["a", "x"]) as several:
        await several[0].service.adopt(parse(after, source="test"))
        several.engines["x"].routes["GET", "/health"] = Script([sleep(1.0), *whole_chat("").steps])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(several[1].service.adopt, parse(after, source="test"))
            await trio.sleep(0.3)
            assert (await order(several[0], "cordon", "x")).status == 200
        await trio.sleep(HEARD)

        assert cordoned(several, "x") == [True, True]
