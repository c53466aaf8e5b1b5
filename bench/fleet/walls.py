"""What real stores can do: CPU of a redis-server, and what LMDB gives to processes that contend.

Clients are the gateway's own, in processes of their own.  On a machine with few cores the clients
take most of the time; what counts is the CPU that the server uses for each question, and the wall
is where that fills a core, as a Redis works on one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import trio

from bench.processes import cpu_seconds
from bench.store import start_redis
from citadel_gateway.io.store.base import StoreUnavailable
from citadel_gateway.io.store.lmdb_store import LmdbStore
from citadel_gateway.io.store.redis_address import RedisAddress
from citadel_gateway.io.store.redis_store import RedisStore
from citadel_gateway.policy.board import Statement
from citadel_gateway.policy.rate_limit import TokenBucket
from citadel_gateway.policy.shares import Need

Figures = dict[str, Any]
_LEASE = 1000.0  # seconds: all members that were there stay
_SECONDS = 2.0
_ROUNDS = 3


def buckets(client: int) -> list[tuple[str, TokenBucket]]:
    """As most requests have them: one for everybody, one of a client's own."""
    everybody, own = TokenBucket(1e9, 1e9), TokenBucket(1e9, 1e9)
    everybody.key, own.key = b"global", b"client:%d" % client
    return [("global", everybody), ("client", own)]


# Redis.


async def _with_redis(url: str, work: Callable[[RedisStore], Awaitable[Any]]) -> Any:
    store = RedisStore(RedisAddress(url=url), "walls", 5.0)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        result = await work(store)
        nursery.cancel_scope.cancel()
    return result


async def _take_for_a_while(tasks: int, place: int, store: RedisStore) -> int:
    count, end = 0, time.monotonic() + _SECONDS

    async def take(number: int) -> None:
        nonlocal count
        mine = buckets(place * 1000 + number)
        while time.monotonic() < end:
            await store.take(mine)
            count += 1

    async with trio.open_nursery() as nursery:
        for number in range(tasks):
            nursery.start_soon(take, number)
    return count


def _taker(url: str, tasks: int, place: int) -> int:
    done: int = trio.run(_with_redis, url, partial(_take_for_a_while, tasks, place))
    return done


def least(found: Callable[[], Figures], cpu: str) -> Figures:
    """Of the round that others on this machine disturbed least."""
    return min((found() for _ in range(_ROUNDS)), key=lambda figures: float(figures[cpu]))


def redis_takes(url: str, pid: int, processes: int, tasks: int) -> Figures:
    """*processes* gateways, each of which has *tasks* requests at the store all the time."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(_taker, [(url, 1, place) for place in range(processes)])  # they are awake now
        before, began = cpu_seconds(pid), time.monotonic()
        counts = pool.starmap(_taker, [(url, tasks, place) for place in range(processes)])
        took, cpu = time.monotonic() - began, cpu_seconds(pid) - before
    return {
        "processes": processes,
        "requests_at_once": tasks,
        "takes_per_s": round(sum(counts) / _SECONDS),
        "server_us_per_take": round(1e6 * cpu / sum(counts), 2),
        "server_share_of_core": round(cpu / took, 2),
        "wall_takes_per_s": round(sum(counts) / cpu),
    }


def _server_cost(pid: int, count: int, before: float) -> Figures:
    each = (cpu_seconds(pid) - before) / count
    return {"server_us": round(1e6 * each, 1), "wall_per_s": round(1 / each)}


async def _meetings(pid: int, store: RedisStore, *, members: int, endpoints: int) -> Figures:
    """Of gateways that all know everything, as usual."""
    names = [f"m http://engine-{i}.example:8000" for i in range(endpoints)]
    claims = tuple(f"probe {name}" for name in names)
    found = '0123456789abcdef0123456789abcdef {"healthy":true,"error":null,"engine":"vllm"}'
    posts = {f"health {name}": found for name in names}
    version = 0
    for place in range(members):
        told = {} if place else posts
        news = await store.meet(Statement(member=f"{place:032}", lease=_LEASE, posts=told))
        version = news.version
    rounds = max(20, min(500, 20_000 // endpoints))
    before = cpu_seconds(pid)
    for number in range(rounds):
        who = f"{number % members:032}"
        await store.meet(Statement(member=who, lease=_LEASE, seen=version, claims=claims))
    return {
        "gateways": members,
        "endpoints": endpoints,
        **_server_cost(pid, rounds, before),
    }


async def _reports(pid: int, store: RedisStore, *, members: int, caps: int) -> Figures:
    """Of gateways that wait for more of *caps* in one report."""
    rng = random.Random(1)
    names = [f"m http://engine-{i}.example:8000" for i in range(caps)]
    limits: dict[tuple[str, str], int | None] = {}

    async def report(who: str) -> None:
        needs = {
            name: Need(10 * members, limit, limit or 0, rng.randint(0, 20))
            for name in names
            for limit in [limits.get((who, name))]
        }
        for name, grant in (await store.report(who, _LEASE, needs)).items():
            limits[who, name] = grant.limit

    for place in range(members):
        await report(f"{place:032}")
    rounds = max(members, 1000 // caps)
    before = cpu_seconds(pid)
    for number in range(rounds):
        await report(f"{number % members:032}")
    return {"gateways": members, "caps": caps, **_server_cost(pid, rounds, before)}


def redis(redis_port: int) -> Figures:
    def fresh(work: Callable[[int, RedisStore], Awaitable[Figures]]) -> Figures:
        """Of a server that knows nothing yet."""
        with contextlib.ExitStack() as stack:
            url, server = start_redis(redis_port, stack)
            _wait_for(url)
            result: Figures = trio.run(_with_redis, url, partial(work, server.pid))
            return result

    sizes = ((1, 1), (10, 10), (100, 10), (10, 100), (100, 100), (10, 1000), (100, 1000))
    found: Figures = {}
    with contextlib.ExitStack() as stack:
        url, server = start_redis(redis_port, stack)
        _wait_for(url)
        found["takes"] = [
            least(partial(redis_takes, url, server.pid, processes, tasks), "server_us_per_take")
            for processes, tasks in ((1, 1), (4, 1), (8, 1), (1, 16), (4, 16), (4, 64))
        ]
    found["meetings"] = [
        least(partial(fresh, partial(_meetings, members=n, endpoints=e)), "server_us")
        for n, e in sizes
    ]
    found["reports"] = [
        least(partial(fresh, partial(_reports, members=n, caps=c)), "server_us")
        for n, c in ((1, 1), (10, 1), (100, 1), (10, 50), (100, 50))
    ]
    return found


def _wait_for(url: str) -> None:
    async def connect(store: RedisStore) -> None:
        with trio.fail_after(10):
            while True:
                with contextlib.suppress(StoreUnavailable):
                    await store.meet(Statement(member="first", lease=0.0))
                    return
                await trio.sleep(0.05)

    trio.run(_with_redis, url, connect)


# LMDB.


def _lmdb_taker(folder: str, place: int) -> tuple[int, int, float]:
    store = LmdbStore(Path(folder), 0.02)
    store.open()
    mine, count, missed = buckets(place), 0, 0
    cpu, end = time.process_time(), time.monotonic() + _SECONDS
    while time.monotonic() < end:
        try:
            store.take_nowait(mine)
        except StoreUnavailable:
            missed += 1
        else:
            count += 1
    cpu = time.process_time() - cpu
    store.close()
    return count, missed, cpu


def lmdb(processes: int) -> Figures:
    """All of *processes* take as fast as they can."""
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
        multiprocessing.get_context("spawn").Pool(processes) as pool,
    ):
        pool.starmap(_lmdb_taker, [(folder, place) for place in range(processes)])
        found = pool.starmap(_lmdb_taker, [(folder, place) for place in range(processes)])
    takes = sum(count for count, _, _ in found)
    return {
        "processes": processes,
        "takes_per_s": round(takes / _SECONDS),
        "us_per_take": round(1e6 * sum(cpu for *_, cpu in found) / takes, 2),
        "missed_percent": round(100 * sum(missed for _, missed, _ in found) / takes, 3),
    }
