"""Several gateways, each a process of its own, behave as one."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.ledger import total
from tests.support.raw_client import NoResponseError
from tests.support.redis_groups import cluster, watched
from tests.support.redis_server import RedisServer, running_redis
from tests.support.scripted_engine import MODEL, Script, ScriptedEngine, sleep, status, whole_chat
from tests.support.several import ASK, CHAT, GatewayProcess, Load, configuration, engines, gateways

PATIENCE = 60.0
LOST = "the store cannot be asked: local limits, each gateway its share, until it can"
FOUND = "the store can be asked again"
FOLLOWS = "another gateway's finding"
STORE = "citadel_gateway_store_"


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["lmdb", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    if request.param == "lmdb":
        return {"kind": "lmdb", "path": str(tmp_path / "store")}
    redis: RedisServer = request.getfixturevalue("redis")
    redis.command("FLUSHALL")
    return {"kind": "redis", "url": redis.url}


def limited(rate: float, burst: int) -> dict[str, Any]:
    return {"rate_limiting_enabled": True, "rate_limit_rps": rate, "rate_limit_burst": burst}


@pytest.mark.parametrize("count", [1, 2, 4])
async def test_a_limit_is_one_for_all_gateways(
    tmp_path: Path, store: dict[str, Any], count: int
) -> None:
    rate, burst = 60, 20
    with trio.fail_after(PATIENCE):
        async with engines() as (_, ports):
            config = configuration(ports, store, performance=limited(rate, burst))
            async with gateways(tmp_path, count, config) as several:
                load = Load(clients=4 // count)
                await load.run(several, 2.0)
                misses = [total(await g.metrics(), STORE + "misses_total") for g in several]

    assert misses == [0] * count
    admitted = load.statuses[200]
    assert set(load.statuses) == {200, 429}
    assert admitted <= burst + rate * (load.last - load.first) + 1
    assert admitted >= 0.97 * (burst + rate * (load.last - load.first)) - 1


# Caps.


def slow(seconds: float) -> Script:
    return Script([sleep(seconds), *whole_chat("ok").steps])


async def ask_many(several: Sequence[GatewayProcess], each: int) -> list[int]:
    """The statuses; 0 for those who got no answer."""
    statuses = []

    async def ask(gateway: GatewayProcess) -> None:
        try:
            statuses.append((await gateway.ask()).status)
        except (OSError, NoResponseError, trio.BrokenResourceError):
            statuses.append(0)

    async with trio.open_nursery() as nursery:
        for gateway in several:
            for _ in range(each):
                nursery.start_soon(ask, gateway)
    return statuses


@pytest.mark.parametrize("count", [1, 2, 4])
async def test_a_cap_is_one_for_all_gateways(
    tmp_path: Path, store: dict[str, Any], count: int
) -> None:
    with trio.fail_after(PATIENCE):
        async with engines(2) as (fleet, ports):
            for engine in fleet:
                engine.default = slow(0.1)
            config = configuration(ports, store, performance={"max_concurrent_requests": 7})
            config["models"][MODEL]["max_concurrent"] = 4
            async with gateways(tmp_path, count, config) as several:
                statuses = await ask_many(several, 80 // count)

    assert statuses == [200] * 80
    assert max(engine.max_in_flight for engine in fleet) <= 4
    assert sum(engine.max_in_flight for engine in fleet) >= 7


async def test_a_killed_gateways_part_of_a_cap_comes_back(
    tmp_path: Path, store: dict[str, Any]
) -> None:
    with trio.fail_after(PATIENCE):
        async with engines() as ([engine], ports):
            engine.default = slow(60.0)
            config = configuration(ports, {**store, "lease": 2.0, "timeout": 1.0})
            config["models"][MODEL]["max_concurrent"] = 4
            async with gateways(tmp_path, 2, config) as several, trio.open_nursery() as nursery:
                nursery.start_soon(ask_many, several[:1], 4)
                await engine.wait_until(lambda: engine.in_flight == 4)
                engine.default = slow(0.0)
                await several[0].kill()
                statuses = await ask_many(several[1:], 8)

    assert statuses == [200] * 8
    assert engine.max_in_flight == 4


# What is known of endpoints.


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    while not await holds():  # noqa: ASYNC110  # it is told by other processes
        await trio.sleep(0.05)


async def know_each_other(several: Sequence[GatewayProcess]) -> bool:
    known = [total(await gateway.metrics(), STORE + "members") for gateway in several]
    return known == [len(several)] * len(several)


async def test_the_probes_move_to_another_gateway_when_theirs_is_killed(
    tmp_path: Path, store: dict[str, Any]
) -> None:
    with trio.fail_after(PATIENCE):
        async with engines() as ([engine], ports):
            store = {**store, "lease": 1.0, "timeout": 0.5}
            fast = {"health_check_interval": 0.5}
            config = configuration(ports, store, load_balancer=fast)
            async with gateways(tmp_path, 3, config) as several:

                async def probing() -> set[int]:
                    start = len(engine.ledger)
                    await trio.sleep(1.2)
                    return {entry.connection for entry in engine.ledger[start:]}

                before = await probing()
                survivors = list(several)
                for gateway in several:  # until it was the one that probes
                    await gateway.kill()
                    survivors.remove(gateway)
                    if not before & await probing():
                        break
                await trio.sleep(1.0)
                after = await probing()
                statuses = [(await gateway.ask()).status for gateway in survivors]

    assert (len(before), len(after)) == (1, 1)
    assert before != after
    assert set(statuses) == {200}


async def test_a_breaker_that_one_gateway_opens_is_open_for_all(
    tmp_path: Path, store: dict[str, Any]
) -> None:
    with trio.fail_after(PATIENCE):
        async with engines() as ([engine], ports):
            once = {"max_attempts": 1, "circuit_breaker_timeout": 3}
            config = configuration(ports, store, load_balancer=once)
            async with gateways(tmp_path, 3, config) as several:
                engine.default = status(500)
                for _ in range(5):
                    await several[0].ask()
                await trio.sleep(1.5)
                asked = len(engine.posts)
                refused = [(await gateway.ask()).status for gateway in several]
                none_asked = len(engine.posts) == asked
                engine.default = whole_chat("ok")

                async def is_back() -> bool:
                    return {(await gateway.ask()).status for gateway in several} == {200}

                async def all_have_followed() -> bool:
                    lines = [line for gateway in several for line in gateway.log.lines]
                    followed = [line["after"] for line in lines if FOLLOWS in line.get("why", "")]
                    return sorted(followed) == ["closed", "closed", "open", "open"]

                await until(is_back)
                await until(all_have_followed)

    assert refused == [503] * 3
    assert none_asked


async def test_an_operators_orders_to_one_gateway_count_for_all(
    tmp_path: Path, store: dict[str, Any]
) -> None:
    key = "sk-operator-" + "x" * 32
    digest = hashlib.sha256(key.encode()).hexdigest()
    keys = {"api_keys": [{"id": "operator", "sha256": digest, "admin": True}]}
    with trio.fail_after(PATIENCE):
        async with engines(2) as ([configured, added], ports):
            first, second = (f"http://127.0.0.1:{port}" for port in ports)
            config = configuration(ports[:1], store, security=keys)
            async with gateways(tmp_path, 2, config) as several:

                async def order(place: int, what: str, **body: str) -> int:
                    path = f"/admin/endpoints/{what}"
                    return (await several[place].request("POST", path, body, key)).status

                async def serve_from(one: ScriptedEngine, none: ScriptedEngine) -> bool:
                    before = len(one.posts), len(none.posts)
                    asked = [await gateway.request("POST", CHAT, ASK, key) for gateway in several]
                    after = len(one.posts), len(none.posts)
                    is_answered = all(answer.status == 200 for answer in asked)
                    return is_answered and after == (before[0] + len(several), before[1])

                statuses = [
                    await order(0, "add", endpoint=second, model=MODEL),
                    await order(1, "cordon", endpoint=first),
                ]
                await until(partial(serve_from, added, configured))
                statuses += [
                    await order(0, "uncordon", endpoint=first),
                    await order(0, "remove", endpoint=second),
                ]
                await until(partial(serve_from, configured, added))

    assert statuses == [200] * 4


# A store that is slow or gone.


async def test_a_store_that_stands_still_refuses_nobody_and_holds_up_nobody(
    tmp_path: Path, redis: RedisServer
) -> None:
    rate, burst, patience = 60, 20, 0.05
    store = {"kind": "redis", "url": redis.url, "timeout": patience}
    with trio.fail_after(PATIENCE):
        async with engines() as (_, ports):
            config = configuration(ports, store, performance=limited(rate, burst))
            async with gateways(tmp_path, 2, config) as several:
                await until(lambda: know_each_other(several))
                load = Load()
                redis.pause()
                try:
                    await load.run(several, 3.0)
                    up = [total(await g.metrics(), STORE + "up") for g in several]
                finally:
                    redis.resume()

                async def is_up() -> bool:
                    return all([total(await g.metrics(), STORE + "up") for g in several])

                await until(is_up)

                async def all_say_so() -> bool:
                    return [g.count(FOUND) for g in several] == [1, 1]

                await until(all_say_so)
                complaints = [gateway.complaints() for gateway in several]

    assert up == [0, 0]
    assert set(load.statuses) == {200, 429}
    span = load.last - load.first
    assert 0.8 * (burst + rate * span) <= load.statuses[200] <= 1.1 * (burst + rate * span)
    assert complaints == [[LOST], [LOST]]


async def nobody_is_refused_while(
    tmp_path: Path, url: str, breaks: Callable[[], Awaitable[None]]
) -> None:
    """Two gateways keep to their limit, more or less, and find the store again."""
    rate, burst = 60, 20
    with trio.fail_after(PATIENCE):
        async with engines() as (_, ports):
            store = {"kind": "redis", "url": url}
            config = configuration(ports, store, performance=limited(rate, burst))
            async with gateways(tmp_path, 2, config) as several:
                await until(lambda: know_each_other(several))
                load = Load()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(load.run, several, 4.0)
                    await trio.sleep(1.0)
                    await breaks()

                async def is_up() -> bool:
                    return all([total(await g.metrics(), STORE + "up") for g in several])

                await until(is_up)

    assert set(load.statuses) == {200, 429}
    span = load.last - load.first
    assert 0.8 * (burst + rate * span) <= load.statuses[200] <= 1.1 * (burst + rate * span)


async def test_a_store_that_dies_and_comes_back_refuses_nobody(tmp_path: Path) -> None:
    with running_redis(tmp_path / "redis") as redis:

        async def breaks() -> None:
            redis.kill()
            await trio.sleep(1.0)
            redis.start()

        await nobody_is_refused_while(tmp_path, redis.url, breaks)


async def test_a_fail_over_of_the_store_refuses_nobody(tmp_path: Path) -> None:
    with watched(tmp_path / "redis") as redis:

        async def breaks() -> None:
            redis.primary.kill()

        await nobody_is_refused_while(tmp_path, redis.url, breaks)


async def test_a_limit_is_one_for_all_gateways_on_a_cluster(tmp_path: Path) -> None:
    rate, burst = 60, 20
    with cluster(tmp_path / "redis") as redis, trio.fail_after(PATIENCE):
        async with engines() as (_, ports):
            store = {"kind": "redis", "url": redis.url}
            config = configuration(ports, store, performance=limited(rate, burst))
            async with gateways(tmp_path, 2, config) as several:
                load = Load(clients=2)
                await load.run(several, 2.0)

    assert load.statuses[200] <= burst + rate * (load.last - load.first) + 1
    assert load.statuses[200] >= 0.97 * (burst + rate * (load.last - load.first)) - 1


async def test_a_store_that_is_emptied_gives_no_second_burst(
    tmp_path: Path, redis: RedisServer
) -> None:
    rate, burst, losses = 20, 100, 6
    with trio.fail_after(PATIENCE):
        async with engines() as (_, ports):
            store = {"kind": "redis", "url": redis.url}
            config = configuration(ports, store, performance=limited(rate, burst))
            async with gateways(tmp_path, 2, config) as several:
                load = Load()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(load.run, several, 4.0)
                    for _ in range(losses):
                        await trio.sleep(0.5)
                        redis.command("FLUSHALL")

    assert set(load.statuses) == {200, 429}
    span = load.last - load.first
    # What the one was granted last the other cannot tell, and he may be the first to ask again.
    assert load.statuses[200] <= burst + rate * span + 2 + losses


async def test_without_a_store_from_the_beginning_gateways_serve(tmp_path: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with engines() as (_, ports):
            store = {"kind": "redis", "url": "redis://127.0.0.1:1"}
            config = configuration(ports, store, performance=limited(50, 50))
            async with gateways(tmp_path, 1, config) as [gateway]:
                status = (await gateway.ask()).status
                await trio.sleep(1.0)
                complaints = gateway.complaints()

    assert (status, complaints) == (200, [LOST])
