"""A Redis that is killed, stopped or emptied in the middle of load."""

from __future__ import annotations

import statistics
from pathlib import Path

import trio

from tests.many.fleet import Shape
from tests.many.ledger import Crowd, admitted, excess, fill, quantile, statuses
from tests.many.report import Finding
from tests.support.ledger import total
from tests.support.redis_server import RedisServer
from tests.support.several import GatewayProcess, configuration, engines, gateways

RATE, BURST = 120, 12
_BOUND = 0.02  # the default of `store.timeout`
_SETTLES = 1.5
LOST = "the store cannot be asked: local limits, each gateway its share, until it can"
FOUND = "the store can be asked again"


async def outage(
    folder: Path, redis: RedisServer, what: str, shape: Shape, seconds: float
) -> list[Finding]:
    """*what*: kill, pause or empty."""
    crowd = Crowd(clients=36, pause=0.06)
    async with engines() as (_, ports):
        limits = {"rate_limiting_enabled": True, "rate_limit_rps": RATE, "rate_limit_burst": BURST}
        config = configuration(ports, {}, service={"workers": shape.workers}, performance=limits)
        config["store"] = shape.store(redis.url, folder / "store")
        async with gateways(folder, shape.gateways, config) as several:
            async with trio.open_nursery() as nursery:
                await _until_known(several, shape.processes)
                nursery.start_soon(crowd.run, several)
                await trio.sleep(seconds)
                began = trio.current_time()
                await _break(redis, what, seconds)
                restored = trio.current_time()
                await _until_known(several, shape.processes)
                healed = trio.current_time()
                await trio.sleep(_SETTLES)
                settled = trio.current_time()
                await trio.sleep(2 * seconds)
                nursery.cancel_scope.cancel()
            lost = sum(gateway.count(LOST) for gateway in several)
            found = sum(gateway.count(FOUND) for gateway in several)
    scene = f"{shape}: Redis {what} for {seconds:g} s"
    before, during, after = (
        crowd.between(crowd.told[0].began, began),
        crowd.between(began, restored),
        crowd.between(settled),
    )
    whole = crowd.between(0.0)
    passed = admitted(during)
    part = len(passed) / (RATE * (restored - began))
    again = admitted(after)
    over = excess(again, RATE, BURST)
    # The bucket is empty when we begin to look.
    filled = fill(again, RATE, 0)
    # While nothing is broken: three times as long, and how far they are apart is chance.
    half = (settled + after[-1].ended) / 2
    calm = [
        quantile(some, 0.99)
        for some in (
            crowd.between(began - seconds / 2, began),  # then all are connected
            crowd.between(settled, half),
            crowd.between(half),
        )
    ]
    usual, noise = statistics.median(calm), max(calm) - min(calm)
    slow = quantile(during, 0.99)
    lines = 0 if what == "emptied" else shape.processes
    return [
        Finding(
            scene,
            "nobody is refused but by limits, each its share",
            f"{dict(sorted(statuses(whole).items()))}; {part:.1%} of the rate meanwhile",
            set(statuses(whole)) == {200, 429} and 0.85 <= part <= 1.1,
        ),
        Finding(
            scene,
            "nobody waits longer for it than 20 ms: 99 of 100 answers are no later than by that, "
            "and by what they vary without it",
            f"{slow * 1e3:.1f} ms; usual are {usual * 1e3:.1f}, which vary by {noise * 1e3:.1f}; "
            f"slowest {quantile(during, 1) * 1e3:.1f}, before {quantile(before, 1) * 1e3:.1f}",
            slow <= usual + noise + _BOUND,
        ),
        Finding(
            scene,
            "it heals by itself, and limits are exact again",
            f"known by all {healed - restored:.2f} s after; then {over:+.1f} and {filled:.1%}",
            healed - restored <= 3.0 and over <= 1 and filled >= 0.97,
        ),
        Finding(
            scene,
            "one line in the log of each when it goes, one when it comes",
            f"{lost} and {found} of {shape.processes}",
            lost == found == lines,
        ),
    ]


async def _break(redis: RedisServer, what: str, seconds: float) -> None:
    match what:
        case "killed":
            redis.kill()
            await trio.sleep(seconds)
            redis.start()
        case "paused":
            redis.pause()
            await trio.sleep(seconds)
            redis.resume()
        case _:
            until = trio.current_time() + seconds
            while trio.current_time() < until:
                redis.command("FLUSHALL")
                await trio.sleep(0.7)


async def _until_known(several: list[GatewayProcess], members: int) -> None:
    """All can ask the store, and know of each other."""
    with trio.move_on_after(30.0):
        while True:
            pages = [await gateway.metrics() for gateway in several]
            up = all(total(page, "citadel_gateway_store_up") for page in pages)
            known = {total(page, "citadel_gateway_store_members") for page in pages}
            if up and known == {members}:
                return
            await trio.sleep(0.05)
