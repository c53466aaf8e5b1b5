"""Concurrency: what an engine has at once, by its own count."""

from __future__ import annotations

from pathlib import Path

import trio

from tests.many.fleet import Shape
from tests.many.ledger import Crowd, statuses
from tests.many.limits import PATIENCE
from tests.many.report import Finding
from tests.support.redis_server import RedisServer
from tests.support.scripted_engine import MODEL, LedgerEntry, Script, answered, sleep, whole_chat
from tests.support.several import configuration, engines, gateways

ALL, EACH = 12, 8
_TAKES = 0.1
_LEAST_USED = 0.9
_LOOKS = 0.005

PROMISE = f"never above {EACH} at an endpoint and {ALL} at all, at least 90 % used"


async def one_for_all(
    folder: Path,
    redis: RedisServer,
    shape: Shape,
    seconds: float,
    patience: float = PATIENCE,
    least: float = _LEAST_USED,
) -> list[Finding]:
    """Two endpoints, whose caps together are more than the whole one; 48 clients who never rest.

    :param patience: with the store, where little is promised of the machine.
    :param least: part of the whole cap that has to be in use.
    """
    redis.command("FLUSHALL")
    crowd = Crowd(clients=48, pause=0.0)
    peak, highest, used, looks = 0, 0, 0, 0
    leaves_at = trio.current_time() + 1e9
    async with engines(2) as (fleet, ports):

        def watched(entry: LedgerEntry) -> Script:
            nonlocal peak, highest
            if trio.current_time() < leaves_at:  # then engines hear of others before of departures
                peak = max(peak, sum(engine.in_flight for engine in fleet))
                highest = max(highest, *[engine.in_flight for engine in fleet])
            # Its work is done before its answer can be read, and the next request be sent.
            return Script([sleep(_TAKES), answered(), *whole_chat("ok").steps])

        for engine in fleet:
            engine.default = watched
        config = configuration(
            ports,
            {},
            service={"workers": shape.workers},
            performance={"max_concurrent_requests": ALL},
            load_balancer={"queue_size": 200, "queue_timeout": 30},
        )
        config["models"][MODEL]["max_concurrent"] = EACH
        config["store"] = {**shape.store(redis.url, folder / "store"), "timeout": patience}
        async with gateways(folder, shape.gateways, config) as several:
            leaves_at = trio.current_time() + seconds + 1.0
            with trio.move_on_at(leaves_at + 0.1):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(crowd.run, several)
                    await trio.sleep(1.0)
                    while trio.current_time() < leaves_at:
                        used += sum(engine.in_flight for engine in fleet)
                        looks += 1
                        await trio.sleep(_LOOKS)
    share = used / looks / ALL
    told = statuses(crowd.told)
    found = f"{highest} and {peak}, {share:.1%} used; {told[200]} answers"
    kept = highest <= EACH and peak <= ALL and share >= least and set(told) == {200}
    return [Finding(f"{shape}: 48 clients", PROMISE, found, kept)]
