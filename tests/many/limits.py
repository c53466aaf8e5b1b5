"""Rates: never more than the bucket holds, and hardly less."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import trio

from tests.many.fleet import Shape, api_key
from tests.many.ledger import Crowd, admitted, excess, fill, statuses
from tests.many.report import Finding
from tests.support.ledger import total
from tests.support.redis_server import RedisServer
from tests.support.several import configuration, engines, gateways

RATE, BURST = 100, 20
KEYS = {"first": 15, "second": 25, "third": 40}
_KEYS_BURST = 10
LEAST = 0.97
PATIENCE = 0.02  # the default

PROMISE = "at most 1 above the bucket in any window, at least 97 % of it"


async def one_for_all(
    folder: Path, redis: RedisServer, shape: Shape, seconds: float
) -> list[Finding]:
    """A limit over all clients, of whom there are four times as many as it lets through."""
    crowd = Crowd(clients=24, pause=0.05)
    limits = {"rate_limit_rps": RATE, "rate_limit_burst": BURST}
    misses = await _run(folder, redis, shape, seconds, crowd, limits, [])
    passed = admitted(crowd.told)
    over, part = excess(passed, RATE, BURST), fill(passed, RATE, BURST)
    offered = len(crowd.told) / seconds / RATE
    found = (
        f"{len(passed)} of {len(crowd.told)} ({offered:.1f} times the rate), {over:+.1f}, "
        f"{part:.1%}; {misses:.0f} decided without the store"
    )
    kept = over <= 1 and part >= LEAST and set(statuses(crowd.told)) == {200, 429}
    return [Finding(f"{shape}: {RATE}/s, burst {BURST}", PROMISE, found, kept)]


async def one_for_each_key(
    folder: Path,
    redis: RedisServer,
    shape: Shape,
    seconds: float,
    patience: float = PATIENCE,
    least: float = LEAST,
) -> list[Finding]:
    """Three keys with limits of their own, none of which is all of the whole one.

    :param patience: with the store, where little is promised of the machine.
    :param least: part of each bucket that has to be let through.
    """
    crowd = Crowd(clients=24, pause=0.05, keys=list(KEYS))
    keys = [
        api_key(name, rate_limit_rps=rate, rate_limit_burst=_KEYS_BURST)
        for name, rate in KEYS.items()
    ]
    whole = {"rate_limit_rps": 1000.0}
    await _run(folder, redis, shape, seconds, crowd, whole, keys, patience)
    figures = []
    for name, rate in KEYS.items():
        passed = admitted(crowd.told, name)
        figures.append((excess(passed, rate, _KEYS_BURST), fill(passed, rate, _KEYS_BURST)))
    found = ", ".join(f"{over:+.1f} and {part:.1%}" for over, part in figures)
    kept = all(over <= 1 and part >= least for over, part in figures)
    rates = ", ".join(map(str, KEYS.values()))
    return [Finding(f"{shape}: keys with {rates}/s at once", PROMISE, found, kept)]


async def keys_within_the_whole(
    folder: Path, redis: RedisServer, shape: Shape, seconds: float
) -> list[Finding]:
    """What a key is refused must cost nothing of what is there for all."""
    rate = sum(KEYS.values()) - 20
    crowd = Crowd(clients=24, pause=0.05, keys=list(KEYS))
    keys = [
        api_key(name, rate_limit_rps=each, rate_limit_burst=_KEYS_BURST)
        for name, each in KEYS.items()
    ]
    limits = {"rate_limit_rps": rate, "rate_limit_burst": BURST}
    await _run(folder, redis, shape, seconds, crowd, limits, keys)
    passed = admitted(crowd.told)
    over, part = excess(passed, rate, BURST), fill(passed, rate, BURST)
    worst = max(excess(admitted(crowd.told, k), each, _KEYS_BURST) for k, each in KEYS.items())
    found = f"{over:+.1f} and {part:.1%}; keys {worst:+.1f} at the most"
    kept = max(over, worst) <= 1 and part >= LEAST
    return [Finding(f"{shape}: the same keys, {rate}/s for all", PROMISE, found, kept)]


async def _run(
    folder: Path,
    redis: RedisServer,
    shape: Shape,
    seconds: float,
    crowd: Crowd,
    limits: Mapping[str, float],
    keys: list[dict[str, object]],
    patience: float = PATIENCE,
) -> float:
    """How many requests the store did not decide.

    :param patience: with the store, where little is promised of the machine.
    """
    redis.command("FLUSHALL")
    async with engines() as (_, ports):
        config = configuration(
            ports,
            {},
            service={"workers": shape.workers},
            performance={"rate_limiting_enabled": True, **limits},
            security={"api_keys": keys},
        )
        config["store"] = {**shape.store(redis.url, folder / "store"), "timeout": patience}
        async with gateways(folder, shape.gateways, config) as several:
            with trio.move_on_after(seconds):
                await crowd.run(several)
            pages = [await gateway.metrics(crowd.keys[0]) for gateway in several]
    return sum(total(page, "citadel_gateway_store_misses_total") for page in pages)
