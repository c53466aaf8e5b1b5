"""Sessions over sockets: processes agree on where they are, and none is a trap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.raw_client import RawClient
from tests.support.redis_server import running_redis
from tests.support.scripted_engine import MODEL, Script, close, status, whole_chat
from tests.support.several import GatewayProcess, configuration, engines, gateways

CHAT = "/v1/chat/completions"
PATIENCE = 60.0
ASK = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
SESSIONS = [f"session-{n}" for n in range(40)]


def sticky(algorithm: str, **balancing: Any) -> dict[str, Any]:
    return {"algorithm": algorithm, "slow_start": 0, "retry_budget_floor": 1000, **balancing}


async def say(port: int, session: str) -> tuple[int, str]:
    """Status, and the endpoint that has answered."""
    async with await RawClient.connect(port) as client:
        response = await client.request("POST", CHAT, ASK, [("x-session-id", session)])
    return response.status, response.header("x-citadel-backend") or ""


async def places(gateway: GatewayProcess) -> dict[str, str]:
    return {session: (await say(gateway.port, session))[1] for session in SESSIONS}


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    while not await holds():  # noqa: ASYNC110
        await trio.sleep(0.05)


@pytest.mark.parametrize("algorithm", ["consistent_hash", "session_affinity"])
async def test_one_dead_of_four_costs_no_client_anything_though_all_its_sessions_stick(
    tmp_path: Path, algorithm: str
) -> None:
    outcomes: Counter[int] = Counter()
    with trio.fail_after(PATIENCE):
        async with engines(4) as (fleet, ports):
            config = configuration(ports, {"kind": "memory"}, load_balancer=sticky(algorithm))
            async with gateways(tmp_path, 1, config) as [gateway]:
                home = (await say(gateway.port, "s"))[1]
                dead = fleet[ports.index(int(home.rpartition(":")[2]))]

                async def client(session: str) -> None:
                    for _ in range(30):
                        outcomes[(await say(gateway.port, session))[0]] += 1

                async with trio.open_nursery() as nursery:
                    for n in range(8):  # all of them with that one
                        nursery.start_soon(client, "s" if n < 6 else f"{n}")
                    await trio.sleep(0.1)
                    dead.routes["GET", "/health"] = status(500)
                    dead.default = Script([close()])
                last = {(await say(gateway.port, "s"))[1] for _ in range(5)}

    assert outcomes == {200: 240}
    assert len(last) == 1
    assert home not in last


@pytest.mark.parametrize("algorithm", ["consistent_hash", "session_affinity"])
async def test_four_gateways_agree_where_every_session_is(tmp_path: Path, algorithm: str) -> None:
    with trio.fail_after(PATIENCE):
        async with engines(4) as (_, ports):
            store = {"kind": "lmdb", "path": str(tmp_path / "store")}
            config = configuration(ports, store, load_balancer=sticky(algorithm))
            async with gateways(tmp_path, 4, config) as several:
                found = [await places(gateway) for gateway in several]

    assert found == [found[0]] * 4
    assert len({*found[0].values()}) == 4


async def test_two_gateways_on_one_redis_agree_after_sessions_have_moved(tmp_path: Path) -> None:
    with trio.fail_after(PATIENCE), running_redis(tmp_path) as redis:
        async with engines(4) as (fleet, ports):
            balancing = sticky("session_affinity", unhealthy_after=1, health_check_interval=0.5)
            store = {"kind": "redis", "url": redis.url}
            config = configuration(ports, store, load_balancer=balancing)
            async with gateways(tmp_path, 2, config) as [one, other]:
                before = await places(one)
                assert before == await places(other)
                down = before[SESSIONS[0]]
                engine = fleet[ports.index(int(down.rpartition(":")[2]))]
                engine.routes["GET", "/health"] = status(500)
                engine.default = Script([close()])
                after = await places(one)
                assert down not in after.values()
                engine.routes["GET", "/health"] = status(200)
                engine.default = whole_chat("ok")

                unused = count()  # who began while it was down stays elsewhere

                async def is_back() -> bool:
                    new = [f"new-{next(unused)}" for _ in range(20)]
                    return down in {(await say(other.port, session))[1] for session in new}

                async def agrees() -> bool:
                    return await places(other) == after

                await until(is_back)
                await until(agrees)

                assert await places(one) == after


async def test_workers_of_one_gateway_agree_without_a_word(tmp_path: Path) -> None:
    found: dict[str, set[str]] = {session: set() for session in SESSIONS}
    with trio.fail_after(PATIENCE):
        async with engines(4) as (_, ports):
            config = configuration(
                ports,
                {"kind": "auto"},
                load_balancer=sticky("session_affinity"),
                service={"workers": 4},
            )
            async with gateways(tmp_path, 1, config) as [gateway]:
                for _ in range(6):
                    for session in SESSIONS:
                        answered, place = await say(gateway.port, session)
                        assert answered == 200
                        found[session].add(place)

    assert {len(seen) for seen in found.values()} == {1}
