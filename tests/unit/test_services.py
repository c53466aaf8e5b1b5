"""The servers that SRV records name are endpoints, with their ports, weights and priorities."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from citadel_gateway.io.resolver import Lasting, Resolver
from citadel_gateway.io.service_lookup import make_service_lookup
from citadel_gateway.policy.services import Service, in_use, read_service
from tests.support import scripted_engine as engines
from tests.support.gateway import World, fleet, running_gateway
from tests.support.name_server import NameServer
from tests.unit.test_operations import bearer, with_keys

NAME = "_vllm._tcp.gpus"


# --- which are used ------------------------------------------------------------------------------


def used(records: Sequence[str], down: Sequence[str] = ()) -> dict[str, float]:
    services = [s for s in map(read_service, records) if s is not None]
    found = in_use(services, lambda service: service.target in down)
    return {choice.service.target: round(choice.weight, 3) for choice in found}


def test_a_record_is_read() -> None:
    assert read_service("10 60 8000 GPU1.example.org.") == Service(10, 60, 8000, "gpu1.example.org")


def test_a_dot_says_that_there_is_no_such_service() -> None:
    assert read_service("0 0 0 .") is None


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        (["0 1 1 a.", "0 3 1 b."], {"a": 0.5, "b": 1.5}),
        (["0 0 1 a.", "0 0 1 b."], {"a": 1.0, "b": 1.0}),
        (["0 0 1 a.", "0 100 1 b."], {"a": 0.01, "b": 2.0}),
        (["0 700 1 a."], {"a": 1.0}),
        ([], {}),
    ],
)
def test_weights_are_shares_of_an_average_endpoint(
    records: list[str], expected: dict[str, float]
) -> None:
    assert used(records) == expected


def test_the_next_priority_is_used_when_all_before_it_are_down() -> None:
    records = ["10 1 1 a.", "10 1 1 b.", "20 1 1 c.", "30 1 1 d."]

    assert [*used(records)] == ["a", "b"]
    assert [*used(records, ["a"])] == ["a", "b"]
    assert [*used(records, ["a", "b"])] == ["a", "b", "c"]
    assert [*used(records, ["a", "b", "c"])] == ["a", "b", "c", "d"]


# --- asking --------------------------------------------------------------------------------------


@asynccontextmanager
async def name_server() -> AsyncIterator[NameServer]:
    server = NameServer()
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        yield server
        nursery.cancel_scope.cancel()


async def test_records_and_their_time_to_live_come_from_a_name_server() -> None:
    async with name_server() as server:
        server.records[NAME] = (30, ["20 0 8000 b.gpus.", "10 5 8001 a.gpus."])
        found = await make_service_lookup(["127.0.0.1"], server.port)(NAME)

    assert isinstance(found, Lasting)
    assert (found, found.ttl) == (["10 5 8001 a.gpus.", "20 0 8000 b.gpus."], 30)


async def test_a_name_that_is_not_known_is_an_error() -> None:
    async with name_server() as server:
        with pytest.raises(OSError, match="no SRV records"):
            await make_service_lookup(["127.0.0.1"], server.port)("_nobody._tcp.gpus")


async def test_changed_records_are_noticed_when_their_time_is_over() -> None:
    async with name_server() as server, trio.open_nursery() as nursery:
        lookup, changed = make_service_lookup(["127.0.0.1"], server.port), trio.Event()
        resolver = Resolver(ttl=600.0, lookup=lookup, on_change=lambda _: changed.set())
        nursery.start_soon(resolver.run)
        server.records[NAME] = (1, ["0 0 8000 a."])
        first, changed = await resolver.addresses(NAME), trio.Event()
        server.records[NAME] = (600, ["0 0 8000 b."])
        with trio.fail_after(10):
            await changed.wait()
        nursery.cancel_scope.cancel()

    assert (first, resolver.known(NAME)) == (("0 0 8000 a.",), ("0 0 8000 b.",))


# --- what becomes of it --------------------------------------------------------------------------


@attrs.define
class Records:
    """What a name server says, and when it was asked."""

    said: Mapping[str, list[str]]
    ttl: float = 5.0
    asked: list[float] = attrs.field(factory=list)

    async def lookup(self, name: str) -> Lasting:
        await trio.lowlevel.checkpoint()
        self.asked.append(trio.current_time())
        if name not in self.said:
            raise OSError("no such name")
        return Lasting(self.said[name], self.ttl)


def services(**options: Any) -> Any:
    entry = {"url": f"http://{NAME}/base", "resolve": "srv", **options}
    balancing = {"algorithm": "weighted_round_robin"}
    return fleet({"m": {"endpoints": [entry]}}, load_balancer=balancing)


@asynccontextmanager
async def running(records: Records, *hosts: str, config: Any = None) -> AsyncIterator[World]:
    async with running_gateway(config or services(), hosts=hosts) as world:
        world.service.discovery.services.lookup = records.lookup
        await trio.sleep(40)  # the name had no records when it was asked for first
        yield world


async def answers(world: World, count: int) -> Counter[str]:
    found = [(await world.ask("m")).header("x-citadel-backend") or "" for _ in range(count)]
    return Counter(name.partition("[")[2].partition(":")[0] for name in found)


async def test_each_server_of_a_name_is_an_endpoint_with_its_weight(
    autojump_clock: MockClock,
) -> None:
    records = Records({NAME: ["0 1 8000 a.", "0 3 8000 b."]})
    async with running(records, "a", "b") as world:
        await answers(world, 4)
        shares = await answers(world, 8)
        urls = [u.endpoint.url for u in world.service.balancer.upstreams]
        entry = world.engines["a"].posts[0]
        (source,) = (await world.get("/models/status")).json()["models"]["m"]["sources"]

    assert shares == {"a": 2, "b": 6}
    assert urls == [f"http://{NAME}/base [{host}:8000]" for host in ("a", "b")]
    assert (entry.headers["host"], entry.path) == ("a:8000", "/base/v1/chat/completions")
    assert source == {"source": "srv", "name": NAME, "endpoints": 2, "problems": []}


async def test_servers_come_and_go_as_soon_as_the_records_have_had_their_time(
    autojump_clock: MockClock,
) -> None:
    said = {NAME: ["0 1 8000 a.", "0 1 8000 b."]}
    async with running(Records(said), "a", "b", "c") as world:
        kept = [u.endpoint for u in world.service.balancer.upstreams if "[b:" in u.endpoint.url]
        said[NAME] = ["0 1 8000 b.", "0 1 8000 c."]
        await trio.sleep(6.1)
        shares = await answers(world, 6)
        warm = [u.endpoint for u in world.service.balancer.upstreams]
        said[NAME] = ["0 0 0 ."]
        await trio.sleep(6.1)
        none = (await world.ask("m")).status

    assert {*shares} == {"b", "c"}
    assert kept[0] in warm
    assert none == 503


async def test_records_are_not_asked_for_before_their_time_is_over(
    autojump_clock: MockClock,
) -> None:
    records = Records({NAME: ["0 1 8000 a."]}, ttl=300.0)
    async with running(records, "a"):
        await trio.sleep(250)

    assert len(records.asked) == 1


async def test_a_name_server_that_fails_takes_nothing_away(autojump_clock: MockClock) -> None:
    said = {NAME: ["0 1 8000 a."]}
    async with running(Records(said), "a") as world:
        del said[NAME]
        await trio.sleep(60)
        answer = (await world.ask("m")).status
        (source,) = (await world.get("/models/status")).json()["models"]["m"]["sources"]

    assert answer == 200
    assert source["problems"] == ["no such name"]


async def test_the_second_priority_stands_in_while_all_of_the_first_are_down(
    autojump_clock: MockClock,
) -> None:
    records = Records({NAME: ["10 1 8000 a.", "10 1 8000 b.", "20 1 8000 c."]})
    async with running(records, "a", "b", "c") as world:
        usual = await answers(world, 4)
        for host in ("a", "b"):
            world.engines[host].routes["GET", "/base/health"] = engines.status(500)
            world.engines[host].routes["GET", "/health"] = engines.status(500)
        await trio.sleep(120)
        meanwhile = await answers(world, 4)
        panics = world.service.balancer.models["m"].quorum.is_panicking
        for host in ("a", "b"):
            for path in ("/base/health", "/health"):
                world.engines[host].routes["GET", path] = engines.status(200)
        await trio.sleep(120)
        again = await answers(world, 4)

    assert not panics
    assert (usual, meanwhile, again) == ({"a": 2, "b": 2}, {"c": 4}, {"a": 2, "b": 2})


async def test_a_cordon_of_the_first_priority_lets_the_second_stand_in(
    autojump_clock: MockClock,
) -> None:
    records = Records({NAME: ["10 1 8000 a.", "20 1 8000 b."]})
    config = {**services(), **with_keys(root=True)}
    key = bearer("root")
    async with running(records, "a", "b", config=config) as world:
        body = {"endpoint": f"http://{NAME}/base [a:8000]"}
        await world.send("POST", "/admin/endpoints/cordon", body, key)
        await trio.sleep(1)
        answer = await world.ask("m", key)

    assert answer.header("x-citadel-backend") == f"http://{NAME}/base [b:8000]"
