"""Everything at once, for as long as you like: mixed load, while a seeded hand breaks things.

A *turn* is a time of faults, a time to heal, and a calm one, in which limits are looked at closely.
In the second half no worker dies, so that what they gather can be seen.
"""

from __future__ import annotations

import json
import random
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio
from bench.processes import free_ports

from tests.many.callers import QUICK, Callers, Kind, words
from tests.many.fleet import Shape, api_key
from tests.many.hand import KEY, Hand, Host
from tests.many.report import Finding
from tests.many.turns import (
    CALM,
    CALMS,
    CAP,
    HEALS,
    STEADY_BURST,
    STEADY_RATE,
    WAVE_BURST,
    WAVE_LASTS,
    WAVE_RATE,
    Counted,
    Soak,
)
from tests.many.verdict import LEASE, LEAST, judged
from tests.support.counters import CounterWatch
from tests.support.ledger import total
from tests.support.raw_client import NoResponseError
from tests.support.redis_server import RedisServer
from tests.support.scripted_engine import (
    MODEL,
    LedgerEntry,
    Script,
    ScriptedEngine,
    answered,
    sleep,
    stream_chat,
    whole_chat,
)
from tests.support.several import GatewayProcess, configuration, gateways

KINDS = [
    Kind(name="steady", count=4, pause=0.12, key="steady", model=QUICK),
    Kind(name="whole", count=5, pause=0.3),
    Kind(name="bulk", count=2, pause=0.3, priority="bulk"),
    Kind(name="stream", count=2, pause=0.1, stream=True, words=15),
    Kind(name="same-again", count=2, pause=0.1, stream=True, words=15, temperature=0.0),
    Kind(name="leaver", count=2, pause=0.5, stream=True, words=100, reads=4),
]
_WORD = 0.05  # seconds that one takes
_FAULTS = 20.0  # seconds of a turn
PATIENCE = 0.02  # the default
HOLDER = Kind(name="holder", count=4 * CAP, pause=0.0, words=20)


async def run(
    folder: Path,
    redis: RedisServer,
    shape: Shape,
    seconds: float,
    seed: int | None = None,
    patience: float = PATIENCE,
    least: float = LEAST,
) -> list[Finding]:
    """*seconds* of the faults and what is between them; the beginning and the end are besides.

    :param seed: of the faults; else a new one, which is told.
    :param patience: with the store, where little is promised of the machine.
    :param least: part of each bucket that has to be let through while nothing is disturbed.
    """
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    sys.stderr.write(f"soak of {shape}, --seed {seed}\n")
    ports = free_ports(3, first=24000)
    hosts = [Host(ScriptedEngine(), port) for port in ports]
    config, other = _configurations(shape, redis, folder, ports, patience)
    async with trio.open_nursery() as nursery:
        for host in hosts:
            await nursery.start(host.serve)
        async with gateways(folder, shape.gateways, config) as several:
            callers = Callers(several)
            counted = Counted(callers)
            _teach(hosts, counted)
            hand = Hand(
                shape, redis, several, hosts[:2], callers, nursery, (json.dumps(config), other),
                folder / "gateway.json",
            )  # fmt: skip
            watches = [CounterWatch() for _ in several]
            soak = Soak(shape, seed, hand, callers, counted, watches)
            soak.slow += await hand.until_whole(HEALS)
            async with trio.open_nursery() as scraping:
                for gateway, watch in zip(several, watches, strict=True):
                    scraping.start_soon(_scrape, gateway, watch, hand)
                await _all_turns(soak, seconds)
                scraping.cancel_scope.cancel(reason="it is over")
            seats = await _seats(soak, hosts)
            full = await _fill_all(soak)
            findings = await judged(soak, hosts, seats, full, least)
        nursery.cancel_scope.cancel(reason="it is over")
    return findings


async def _all_turns(soak: Soak, seconds: float) -> None:
    async with trio.open_nursery() as load:
        load.start_soon(soak.callers.run, KINDS)
        began = trio.current_time()
        while (left := began + seconds - trio.current_time()) > 0:
            faults = min(_FAULTS, max(left - CALMS * CALM - WAVE_LASTS, 1.0))
            deaths = left > seconds / 2
            await soak.take_turn(len(soak.turns), faults, deaths=deaths)
        soak.callers.stopping = True


def _configurations(
    shape: Shape, redis: RedisServer, folder: Path, ports: list[int], patience: float
) -> tuple[dict[str, Any], str]:
    """Two that differ in what changes no promise."""
    limits = {"rate_limiting_enabled": True, "rate_limit_rps": 10_000}
    keys = [
        api_key(KEY, weight=2),
        api_key("steady", rate_limit_rps=STEADY_RATE, rate_limit_burst=STEADY_BURST),
        api_key("waves", rate_limit_rps=WAVE_RATE, rate_limit_burst=WAVE_BURST),
    ]
    balancing: dict[str, Any] = {
        "queue_size": 400, "queue_timeout": 30, "health_check_interval": 0.5,
        "circuit_breaker_timeout": 1.0,
    }  # fmt: skip
    config = configuration(
        ports[:2],
        {},
        service={"workers": shape.workers},
        performance={**limits, "max_concurrent_requests": 200},
        security={"api_keys": keys},
        load_balancer=balancing,
    )
    config["models"][MODEL]["max_concurrent"] = CAP
    config["models"][QUICK] = {"endpoint": f"http://127.0.0.1:{ports[2]}", "max_concurrent": 100}
    config["store"] = {**shape.store(redis.url, folder / "store"), "timeout": patience}
    other = {**config, "load_balancer": {**config["load_balancer"], "algorithm": "least_latency"}}
    other["models"] = {**config["models"], MODEL: {**config["models"][MODEL], "aliases": ["alias"]}}
    return config, json.dumps(other)


def _teach(hosts: list[Host], counted: Counted) -> None:
    def default(number: int) -> Any:
        def answer(entry: LedgerEntry) -> Script:
            counted.note(number, entry)
            return _answer(entry)

        return answer

    for number, host in enumerate(hosts):
        host.engine.default = default(number)
    # Who answers at once has no more of it than the connections that there are.
    hosts[2].engine.default = Script([answered(), *whole_chat("ok").steps])


def _answer(entry: LedgerEntry) -> Script:
    """Its work is done before its end can be read, and the next request be sent."""
    asked = entry.json
    if not asked["stream"]:
        return Script([sleep(asked["max_tokens"] * _WORD), answered(), *whole_chat("ok").steps])
    steps = stream_chat(words(asked["max_tokens"]), gap=_WORD).steps
    return Script([sleep(_WORD), *steps[:-3], answered(), *steps[-3:]])


async def _scrape(gateway: GatewayProcess, watch: CounterWatch, hand: Hand) -> None:
    looked, misses = trio.current_time(), 0.0
    while True:
        with suppress(OSError, NoResponseError, trio.BrokenResourceError, ValueError):
            page = await gateway.metrics(KEY)  # unless it asked the one that is killed
            watch.take(page)
            before, misses = misses, total(page, "citadel_gateway_store_misses_total")
            if misses > before:
                hand.missed.append((looked, trio.current_time()))
            looked = trio.current_time()
        await trio.sleep(1.0)


async def _seats(soak: Soak, hosts: list[Host]) -> list[str]:
    """What is still taken when all clients have left."""
    taken = ["all"]
    with trio.move_on_after(LEASE + 1.0):
        while taken:
            found = [f"{h.engine.in_flight} at {h.port}" for h in hosts if h.engine.in_flight]
            for gateway in soak.hand.several:
                status = (await gateway.request("GET", "/models/status", key=KEY)).json()
                if (count := status["limits"]["in_flight"]) or status["waiting_for_any_model"]:
                    found.append(f"{count} seats")
                for name, model in status["models"].items():
                    there = sum(endpoint["in_flight"] for endpoint in model["endpoints"])
                    if there or model["waiting"]:
                        found.append(f"{name}: {there} at engines, {model['waiting']} wait")
            taken = found
            await trio.sleep(0.1)
    return taken


async def _fill_all(soak: Soak) -> float:
    """Seconds until all of both caps is in use again by who comes then; infinity for never."""
    soak.callers.stopping = False
    began = trio.current_time()
    took = float("inf")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(soak.callers.run, [HOLDER], LEASE + 1.0)
        with trio.move_on_after(LEASE + 1.0):
            while min(soak.counted.of(0), soak.counted.of(1)) < CAP:  # noqa: ASYNC110
                await trio.sleep(0.005)
            took = trio.current_time() - began
        soak.callers.stopping = True
    return took
