"""An operator adds endpoints to a running gateway, and takes them back."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from citadel_gateway.config.loader import parse
from citadel_gateway.io.workers import Orders, missed_orders
from tests.support import scripted_engine as engines
from tests.support.gateway import endpoint, fleet, gather, running_gateway
from tests.support.scripted_engine import Script
from tests.unit.test_operations import ask, bearer, hosts, order, two, with_keys

__all__ = ["two"]

SETTLED = 30.0  # seconds: it has started slowly, and is warm


async def test_an_added_endpoint_is_probed_and_then_shares_the_load(
    autojump_clock: MockClock, two: dict[str, Any]
) -> None:
    async with running_gateway(two, hosts=["c"]) as world:
        told = await order(world, "add", "c", model="m", weight=2, max_concurrent=7)
        await wait_all_tasks_blocked()
        warmth = world.endpoint("c").warmth
        await trio.sleep(SETTLED)
        answers = await hosts(world, 6)

        assert told.status == 200
        assert told.json()["endpoints"] == [
            {
                "model": "m", "endpoint": endpoint("c"), "cordoned": False, "in_flight": 0,
                "healthy": False,
            }
        ]  # fmt: skip
        assert warmth < 1.0
        assert answers == {"a": 2, "b": 2, "c": 2}
        assert (world.endpoint("c").weight, world.endpoint("c").max_concurrent) == (2, 7)


async def test_a_removed_endpoint_finishes_what_it_has_and_who_removes_it_can_wait(
    autojump_clock: MockClock, two: dict[str, Any]
) -> None:
    async with running_gateway(two, hosts=["c"]) as world:
        await order(world, "add", "c", model="m")
        for name in ("a", "b"):
            await order(world, "cordon", name)
        await wait_all_tasks_blocked()
        slow = Script([engines.sleep(20), *engines.whole_chat("ok").steps])
        world.engines["c"].default = slow

        async def remove() -> Any:
            await trio.sleep(1)
            for name in ("a", "b"):
                await order(world, "uncordon", name)
            hurried = await order(world, "remove", "c", within=2)
            patient = await order(world, "remove", "c")
            gone = await order(world, "remove", "c")
            return hurried.json(), patient.json(), gone.status

        answer, (hurried, patient, gone) = await gather(partial(ask, world), remove)
        elsewhere = await hosts(world, 4)

    assert (hurried["drained"], hurried["endpoints"][0]["in_flight"]) == (False, 1)
    assert (patient["drained"], patient["endpoints"][0]["in_flight"]) == (True, 0)
    assert (gone, answer.status, {*elsewhere}) == (404, 200, {"a", "b"})


async def test_a_removal_of_an_idle_endpoint_is_done_at_once(
    autojump_clock: MockClock, two: dict[str, Any]
) -> None:
    async with running_gateway(two, hosts=["c"]) as world:
        await order(world, "add", "c", model="m")
        began = trio.current_time()
        told = (await order(world, "remove", "c")).json()
        again = await order(world, "remove", "c")

        assert (told["drained"], trio.current_time() - began) == (True, 0)
        assert [each["endpoint"] for each in told["endpoints"]] == [endpoint("c")]
        assert (again.status, again.json()["error"]["code"]) == (404, "endpoint_not_found")


async def test_what_is_added_twice_is_as_was_said_last(
    autojump_clock: MockClock, two: dict[str, Any]
) -> None:
    async with running_gateway(two, hosts=["c"]) as world:
        await order(world, "add", "c", model="m", max_concurrent=7)
        added = world.endpoint("c")
        await order(world, "add", "c", model="m", max_concurrent=9)

        assert world.endpoint("c") is added
        assert added.max_concurrent == 9


async def test_it_stays_through_reloads_also_of_its_model(
    autojump_clock: MockClock, two: dict[str, Any]
) -> None:
    other = {**two, **fleet({"n": ["a"]})}
    async with running_gateway(two, hosts=["c"]) as world:
        await order(world, "add", "c", model="m")
        await trio.sleep(SETTLED)
        added = world.endpoint("c")
        await world.service.adopt(parse(two, source="test"))
        kept = world.endpoint("c") is added
        await world.service.adopt(parse(other, source="test"))
        without = [u.endpoint.url for u in world.service.balancer.upstreams]
        await world.service.adopt(parse(two, source="test"))
        await trio.sleep(SETTLED)
        answers = await hosts(world, 6)

    assert kept
    assert without == [endpoint("a")]
    assert answers == {"a": 2, "b": 2, "c": 2}


async def test_an_addition_that_a_later_configuration_rules_out_is_not_used_and_that_is_said(
    autojump_clock: MockClock, two: dict[str, Any]
) -> None:
    narrow = {**two, "models": {"m": {**two["models"]["m"], "max_concurrent": 4}}}
    async with running_gateway(two, hosts=["c"]) as world:
        await order(world, "add", "c", model="m", min_concurrent=6)
        await world.service.adopt(parse(narrow, source="test"))
        await wait_all_tasks_blocked()
        report = (await world.get("/models/status", bearer("root"))).json()["models"]["m"]

    assert len(report["endpoints"]) == 2
    assert report["sources"] == [
        {
            "source": "order", "name": "added", "endpoints": 0,
            "problems": [f"{endpoint('c')}: min_concurrent: 6 is more than max_concurrent, 4"],
        }
    ]  # fmt: skip


async def test_an_address_of_an_added_name_is_an_endpoint(
    autojump_clock: MockClock, two: dict[str, Any]
) -> None:
    names = {"pool": ["10.0.0.1", "10.0.0.2"]}
    async with running_gateway(two, addresses=names, hosts=names["pool"]) as world:
        await order(world, "add", "pool", model="m", resolve="each")
        await trio.sleep(SETTLED)
        before = len(world.service.balancer.upstreams)
        told = (await order(world, "remove", "pool")).json()

        assert before == 4
        assert (told["drained"], len(told["endpoints"])) == (True, 2)
        assert len(world.service.balancer.upstreams) == 2


@pytest.mark.parametrize(
    ("what", "body", "status", "param"),
    [
        ("add", {"endpoint": "http://c"}, 400, "model"),
        ("add", {"model": "m"}, 400, "endpoint"),
        ("add", {"endpoint": "nonsense", "model": "m"}, 400, "endpoint"),
        ("add", {"endpoint": "http://c", "model": "nobody"}, 404, "model"),
        ("add", {"endpoint": "http://c", "model": "m", "weight": 0}, 400, "weight"),
        ("add", {"endpoint": "http://c", "model": "m", "wieght": 1}, 400, "wieght"),
        ("add", {"endpoint": "http://c", "model": "m", "within": 1}, 400, "within"),
        ("add", {"endpoint": "http://c", "model": "m", "url": "http://d"}, 400, "url"),
        ("add", {"endpoint": "http://c", "model": "m", "api_key": "env:HOME"}, 400, "api_key"),
        ("add", {"endpoint": "http://c", "model": "m", "tls": {}}, 400, "tls"),
        ("add", {"endpoint": "http://10.0.0.1", "model": "m", "resolve": "each"}, 400, "resolve"),
        ("add", {"endpoint": endpoint("a"), "model": "m"}, 400, "endpoint"),
        ("remove", {"endpoint": endpoint("a")}, 400, "endpoint"),
        ("remove", {"endpoint": "http://c"}, 404, "endpoint"),
        ("remove", {"endpoint": "http://c", "weight": 1}, 400, "weight"),
    ],
)
async def test_a_bad_order_is_refused_and_changes_nothing(
    autojump_clock: MockClock,
    two: dict[str, Any],
    what: str,
    body: object,
    status: int,
    param: str,
) -> None:
    async with running_gateway(two) as world:
        answer = await world.send("POST", f"/admin/endpoints/{what}", body, bearer("root"))

        assert (answer.status, answer.json()["error"]["param"]) == (status, param)
        assert len(world.service.balancer.upstreams) == 2


@pytest.mark.parametrize("what", ["add", "remove"])
async def test_only_an_admin_key_may(autojump_clock: MockClock, what: str) -> None:
    async with running_gateway(fleet({"m": ["a"]}, **with_keys(root=True, user=False))) as world:
        body = {"endpoint": endpoint("c"), "model": "m"}
        answer = await world.send("POST", f"/admin/endpoints/{what}", body, bearer("user"))

    assert answer.status == 403


def test_a_worker_that_was_starting_is_told_what_it_has_missed() -> None:
    def orders(cordons: list[list[str]], added: list[list[Any]]) -> Orders:
        return Orders(
            number=1, workers=2, place=0, source="f", text="", digest="", generation=1,
            cordons=cordons, added=added, sockets_stay=False,
        )  # fmt: skip

    before = orders([["m", "u1"]], [["m", "a1", {}], ["m", "a2", {}], ["m", "a3", {}]])
    now = orders([["m", "u2"]], [["m", "a2", {"weight": 2}], ["m", "a3", {}], ["m", "a4", {}]])

    assert [(what, o["url"], o["options"]) for what, o in missed_orders(before, now)] == [
        ("remove", "a1", {}),
        ("add", "a2", {"weight": 2}),
        ("add", "a4", {}),
        ("uncordon", "u1", {}),
        ("cordon", "u2", {}),
    ]
